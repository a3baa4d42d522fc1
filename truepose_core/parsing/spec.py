"""`ParserSpec`: how a parser wants its picture and what its labels mean, built in or from a JSON file beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json
from truepose_core.networks.known import KNOWN
from truepose_core.networks.onnx import OnnxSession, shape_text
from truepose_core.regions import ATR_LABELS, LABEL_SETS, LIP_LABELS, REGION_NAMES, Region
from truepose_core.regions import to_region as region_of

MAX_INPUT = 4096


@dataclass(frozen=True)
class ParserSpec:
    """What lies between a picture and a parser's network.

    labels: each label's name and region, in the order of the network's output channels. input_size: (height, width).
    mean, std: of pixels in [0, 1], in the order of `channels` ("RGB" or "BGR"). layout: of input and output, "NCHW" or
    "NHWC". resize: "keep" keeps the aspect: the picture is centred, black around it, corner pixels on corner pixels
    (SCHP's own); "stretch" fills the input (SegFormer's own). output: the name or number of the output with the scores;
    None is the last one with as many channels as there are labels. scores: "logits", or "probabilities" where the
    network ends in a softmax. Raises `TruePoseError` for anything else.
    """

    name: str
    labels: tuple[tuple[str, Region], ...]
    input_size: tuple[int, int]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels: str = "RGB"
    layout: str = "NCHW"
    resize: str = "keep"
    output: int | str | None = None
    scores: str = "logits"

    def __post_init__(self) -> None:
        def refuse(field: str, expected: str) -> None:
            raise TruePoseError(f"parser {self.name}: {field} is {getattr(self, field)!r}; expected {expected}")

        if len(self.labels) < 2 or all(region is Region.BACKGROUND for _, region in self.labels):
            refuse("labels", "at least two labels, one of them not background")
        sides = self.input_size
        if len(sides) != 2 or not all(type(side) is int and 8 <= side <= MAX_INPUT for side in sides):
            refuse("input_size", f"[height, width] in pixels, 8 to {MAX_INPUT}")
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) != 3 or not all(_is_number(value) for value in values):
                refuse(field, "three numbers")
        if min(self.std) <= 0:
            refuse("std", "three numbers above 0")
        for field, options in _OPTIONS.items():
            if getattr(self, field) not in options:
                refuse(field, " or ".join(repr(option) for option in options))
        if not (self.output is None or type(self.output) in (int, str)):
            refuse("output", "the name or the number of an output")

    @classmethod
    def from_json(cls, text: str, name: str) -> ParserSpec:
        """Read a description such as `EXAMPLE`; `name` is used in messages. labels: a label set ("atr", "lip", "cihp",
        "pascal", "segformer_clothes") or an object {label: region} in the order of the channels."""
        try:
            given = parse_json(text, name)
        except TruePoseError as error:
            raise TruePoseError(f"{error}; {EXAMPLE}") from error
        if not isinstance(given, dict):
            raise TruePoseError(f"{name} holds a {type(given).__name__}; {EXAMPLE}")
        allowed = {field.name for field in fields(cls)} - {"name"}
        unknown = sorted(set(given) - allowed)
        missing = sorted({"labels", "input_size"} - set(given))
        if unknown or missing:
            what = f"has unknown entries: {', '.join(unknown)}" if unknown else f"lacks {', '.join(missing)}"
            raise TruePoseError(f"{name} {what}; {EXAMPLE}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        for key in ("input_size", "mean", "std"):
            if key in values and not isinstance(values[key], tuple):
                raise TruePoseError(f"{name}: {key} is {values[key]!r}; expected a list of numbers")
        return cls(**{**values, "name": name, "labels": _read_labels(given["labels"], name)})


_OPTIONS = {
    "channels": ("RGB", "BGR"),
    "layout": ("NCHW", "NHWC"),
    "resize": ("keep", "stretch"),
    "scores": ("logits", "probabilities"),
}

EXAMPLE = (
    'expected {"labels": "atr" or {"Background": "background", "Hat": "accessory", ...} in the order of the output\'s '
    'channels, "input_size": [512, 512] (height, width), "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], '
    '"channels": "RGB" or "BGR", "layout": "NCHW" or "NHWC", "resize": "keep" or "stretch", "output": its name or '
    'number, "scores": "logits" or "probabilities"}; only labels and input_size must be there. The regions are '
    + ", ".join(REGION_NAMES)
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read_labels(given: Any, name: str) -> tuple[tuple[str, Region], ...]:
    if isinstance(given, str):
        if given.lower() not in LABEL_SETS:
            raise TruePoseError(f"{name}: unknown label set {given!r}; the label sets are {', '.join(LABEL_SETS)}")
        given = LABEL_SETS[given.lower()]
    if not isinstance(given, Mapping):
        raise TruePoseError(f"{name}: labels is a {type(given).__name__}; {EXAMPLE}")
    try:
        return tuple((label, region_of(region)) for label, region in given.items())
    except TruePoseError as error:
        raise TruePoseError(f"{name}, labels: {error}") from error


def _spec(name: str, labels: Mapping[str, Region], input_size: tuple[int, int], **rest: Any) -> ParserSpec:
    return ParserSpec(name, tuple(labels.items()), input_size, **rest)


# Known model -> how it was trained. SCHP: GoGoDuck912/Self-Correction-Human-Parsing, simple_extractor.py.
# SegFormer: the preprocessor_config.json beside the weights.
_SCHP = {"mean": (0.406, 0.456, 0.485), "std": (0.225, 0.224, 0.229), "channels": "BGR", "resize": "keep"}
_SEGFORMER = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channels": "RGB", "resize": "stretch"}
BUILT_IN: dict[str, ParserSpec] = {
    spec.name: spec
    for spec in (
        _spec("schp-atr", ATR_LABELS, (512, 512), **_SCHP),
        _spec("schp-lip", LIP_LABELS, (473, 473), **_SCHP),
        _spec("segformer-b2-clothes", ATR_LABELS, (512, 512), **_SEGFORMER),
        _spec("segformer-b3-clothes", ATR_LABELS, (512, 512), **_SEGFORMER),
    )
}


def recognise(path: Path, session: OnnxSession) -> ParserSpec:
    """The spec of an ONNX file: its JSON (NAME.json beside NAME.onnx), else its known file name together with its
    shapes. Raises `TruePoseError` that shows how to write the JSON for any other file, and when spec and shapes differ.
    """
    beside = path.with_suffix(".json")
    if beside.is_file():
        try:
            spec = ParserSpec.from_json(beside.read_text(encoding="utf-8-sig"), str(beside))
        except (OSError, UnicodeDecodeError) as error:
            raise TruePoseError(f"{beside} cannot be read ({error}); save it as UTF-8 text") from error
    else:
        spec = next((BUILT_IN[name] for name in BUILT_IN if path.name.lower() in KNOWN[name].files), None)
        if spec is None:
            known = ", ".join(file for name in BUILT_IN for file in KNOWN[name].files[:1])
            raise TruePoseError(
                f"{path.name} is not a parser that is known by its name ({known}), so its labels are unknown. "
                f"{_shapes(session)}. Write {beside.name} beside it: {EXAMPLE}"
            )
    input_name(session, spec)
    output_name(session, spec)
    return spec


def input_name(session: OnnxSession, spec: ParserSpec) -> str:
    """The name of the picture's input. Raises `TruePoseError` when the network takes anything else."""
    name, shape = next(iter(session.inputs.items()), ("", ()))
    height, width = spec.input_size
    wanted = (3, height, width) if spec.layout == "NCHW" else (height, width, 3)
    if len(session.inputs) != 1 or not _fits(shape, (None, *wanted)):
        raise TruePoseError(
            f"{session.path.name} does not fit parser {spec.name}, whose input is {shape_text((None, *wanted))}: "
            f"{_shapes(session)}. {_write_json(session)}"
        )
    return name


def output_name(session: OnnxSession, spec: ParserSpec) -> str:
    """The name of the output with one channel per label. Raises `TruePoseError` when the network has none."""
    count = len(spec.labels)
    wanted = (None, count, None, None) if spec.layout == "NCHW" else (None, None, None, count)
    names = list(session.outputs)
    if isinstance(spec.output, int):
        names = names[spec.output : spec.output + 1] if spec.output >= 0 else []
    elif spec.output is not None:
        names = [name for name in names if name == spec.output]
    # An output whose shape the file does not tell is checked when it comes.
    names = [name for name in names if not session.outputs[name] or _fits(session.outputs[name], wanted)]
    if not names:
        which = "" if spec.output is None else f" called or numbered {spec.output!r}"
        raise TruePoseError(
            f"{session.path.name} does not fit parser {spec.name}, which has an output{which} of {shape_text(wanted)} "
            f"scores for its {count} labels: {_shapes(session)}. {_write_json(session)}"
        )
    return names[-1]


def _fits(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        None in pair or pair[0] == pair[1] for pair in zip(shape, wanted, strict=True)
    )


def _shapes(session: OnnxSession) -> str:
    def told(ends: dict[str, tuple[int | None, ...]]) -> str:
        return ", ".join(f"{name} {shape_text(shape)}" for name, shape in ends.items())

    return f"its inputs are {told(session.inputs)} and its outputs {told(session.outputs)}"


def _write_json(session: OnnxSession) -> str:
    return f"If it is another parser, write {session.path.with_suffix('.json').name} beside it: {EXAMPLE}"
