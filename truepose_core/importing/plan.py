"""What a foreign checkpoint becomes: the types that every family of weights speaks.

A family reads names, shapes and types only, never a value and never a file's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from truepose_core.weights.reading import TensorInfo

NOT_STATED = "not stated"
"""The licence of weights whose publisher names none."""


@dataclass(frozen=True)
class Part:
    """One thing found in one file: which family knows it, what it is there (role), the file's number, and what stands
    before its keys ("" where nothing does)."""

    family: str
    role: str
    file: int
    prefix: str


@dataclass(frozen=True)
class Plan:
    """How files become one of ours.

    config: JSON of the model (`TruePoseConfig`'s fields). tensors: our name -> (file number, original key), in the
    order of the written file. ignored: (file number, original key) -> the reason, in words. Every key of every file is
    in one of the two. metadata: more of the written file's metadata (licence as stated or `NOT_STATED`, title, ...).
    expected: name -> shape of every weight of the model, which the tensors must be exactly; None where `config` is
    `TruePoseConfig`'s, which tells it.
    """

    family: str
    config: dict[str, Any]
    tensors: dict[str, tuple[int, str]]
    ignored: dict[tuple[int, str], str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    expected: Mapping[str, tuple[int, ...]] | None = None


class Family(Protocol):
    """A kind of weights that can be read. name: "animate-anyone"; title: for people."""

    name: str
    title: str

    def recognise(self, file: int, tensors: Mapping[str, TensorInfo]) -> list[Part]:
        """The parts of this family in one file, told from keys and shapes; [] where there are none."""
        ...

    def plan(
        self, parts: Sequence[Part], files: Sequence[Mapping[str, TensorInfo]], choices: Mapping[str, str]
    ) -> Plan:
        """What the parts become. parts: this family's, of all files. choices: what the user said by name.

        Raises TruePoseError when a file of the set is missing, parts do not belong together, widths are wrong, or a
        choice is needed (the message says which: "add --choose name=value"). A message may say "file 0": whoever shows
        it puts the file's name there.
        """
        ...
