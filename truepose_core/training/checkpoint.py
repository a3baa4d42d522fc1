"""Checkpoints of training: one safetensors file with its story, written whole and not interrupted, read with care."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json
from truepose_core.weights.strict import open_tensors, read_metadata

AGAIN = "delete that file to train anew, or use another --out folder"
MOST_STEPS = 10**9
_MOMENTS = {"step": (), "exp_avg": None, "exp_avg_sq": None}
"""What AdamW keeps of a weight -> its shape, None for the weight's own."""


@contextmanager
def uninterrupted(told: str = "") -> Iterator[None]:
    """Ctrl-C waits until the block is done. (Python hears signals in the main thread only.) told: said on stderr to who
    presses it meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[tuple[Any, ...]] = []

    def hear(*args: Any) -> None:
        if told and not heard:
            # Not through sys.stderr, which may be in the middle of a line.
            os.write(2, f"\n{told}\n".encode())
        heard.append(args)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard and callable(before):
        before(*heard[0])


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], story: Mapping[str, Any]) -> None:
    """Write a checkpoint: it is the old one or the new one, never half of either. story: JSON values, among them
    "step", "seconds" and "config". Raises TruePoseError, saying what is there, when the disk refuses."""
    from safetensors.torch import save

    from truepose_core.pictures.files import atomic_write

    try:
        atomic_write(path, save(dict(tensors), {"story": json.dumps(dict(story))}), overwrite=True)
    except TruePoseError as error:
        raise TruePoseError(f"{error}; {what_is_saved(path)[0]}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The story and the tensors of a checkpoint. Raises TruePoseError that says which file to delete."""
    with of_this_run():
        metadata, tensors = open_tensors(path)
        return _read_story(metadata, path), tensors


def what_is_saved(path: Path, steps: int | None = None, done: int = 0) -> tuple[str, ...]:
    """After looking: which step is in the checkpoint at `path`, and what the same command does, each as words. steps:
    of the whole run. done: those that the run had come to."""
    of = "" if steps is None else f" of {steps}"
    try:
        step = _read_story(read_metadata(path), path)["step"] if path.is_file() else None
    except TruePoseError:
        step = None
    if step is None:
        return "nothing is saved", "the same command begins anew"
    lost = f" (the run had come to step {done})" if done > step else ""
    return f"step {step}{of} is saved in {path.parent}{lost}", "the same command goes on from there"


@contextmanager
def of_this_run() -> Iterator[None]:
    """A `TruePoseError` about a checkpoint, which names it, also says what to do with it."""
    try:
        yield
    except TruePoseError as error:
        raise TruePoseError(f"{error}; {AGAIN}") from error


def _read_story(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    if "story" not in metadata:
        raise TruePoseError(f"{path} is no checkpoint of truepose train")
    story = parse_json(metadata["story"], f"the story of {path}")
    if not isinstance(story, dict):
        raise TruePoseError(f"the story of {path} is a {type(story).__name__}; expected an object")
    for name in ("step", "ema_steps"):
        value = story.get(name, 0 if name == "ema_steps" else None)
        if type(value) is not int or not 0 <= value <= MOST_STEPS:
            raise TruePoseError(f"the story of {path} says {name} {value!r:.60}; expected a number of steps")
    seconds = story.get("seconds")
    if type(seconds) not in (int, float) or not (math.isfinite(seconds) and seconds >= 0):
        raise TruePoseError(f"the story of {path} says seconds {seconds!r:.60}; expected a time")
    if not isinstance(story.get("config"), dict):
        raise TruePoseError(f"the story of {path} does not say the settings of its run")
    return story


def optimizer_state(found: Mapping[str, Tensor], weights: Sequence[tuple[str, nn.Parameter]], where: str) -> dict:
    """AdamW's state, by the weights' numbers, of tensors called KIND.WEIGHT. A weight may have none.

    weights: (name, weight) in the optimizer's order. Raises TruePoseError for others, and for other shapes.
    """
    number = {name: i for i, (name, _) in enumerate(weights)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        kind, _, name = key.partition(".")
        if kind not in _MOMENTS or name not in number:
            raise TruePoseError(f"{where}: nothing here has an optimizer state called {key!r:.100}")
        shape = weights[number[name]][1].shape if _MOMENTS[kind] is None else torch.Size(_MOMENTS[kind])
        if value.shape != shape:
            raise TruePoseError(f"{where}: optimizer state {key} is {tuple(value.shape)}, expected {tuple(shape)}")
        state.setdefault(number[name], {})[kind] = value
    lacking = next((i for i, own in state.items() if len(own) < len(_MOMENTS)), None)
    if lacking is not None:
        raise TruePoseError(f"{where}: the optimizer state of {weights[lacking][0]} is not whole")
    return state
