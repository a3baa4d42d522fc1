"""`truepose inspect`: what weight files are, and what they are good for here."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import MEBI, Console, add_report_arguments
from truepose_core.cli.convert import parse_choices
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.weights.reading import CheckpointReader

HELP = "say what weight files are and what they can be used for"
DESCRIPTION = """\
Read the names, shapes and types in weight files (.safetensors, .pth, .pt, .bin, .ckpt, or the .index.json of shards)
and say what they are: models of this package, systems that can be converted, other known kinds, or why none of these.
Several files are also judged together. No values are read, nothing is written, and nothing in a pickle is run.
"""
EPILOG = """\
examples:
  truepose inspect model.safetensors
  truepose inspect reference_unet.pth denoising_unet.pth pose_guider.pth
  truepose inspect *.pth --json

exit code 2 if a file cannot be read at all; the others are told first.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose inspect`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="weight files, of any kind")
    parser.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="as for truepose convert: what the files alone do not tell",
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Tell of each file, then of all together. Returns the report that --json prints."""
    from truepose_core.weights.reading import CheckpointReader

    choices = parse_choices(args.choose)
    told: list[dict[str, Any]] = []
    failures: list[str] = []
    for path in args.files:
        try:
            with CheckpointReader(path, choices.get("weights")) as reader:
                told.append(describe(reader))
        except TruePoseError as error:
            failures.append(str(error))
            told.append({"file": str(path), "error": str(error)})
            continue
        console.say("\n".join(lines(told[-1])))
    report: dict[str, Any] = {"files": told}
    foreign = [path for path, file in zip(args.files, told, strict=True) if not file.get("ours")]
    if not failures and any(file["parts"] for file in told):
        report["together"] = together(foreign, choices)
        console.say(report["together"]["verdict"])
    console.report(report)
    if failures:
        raise TruePoseError("; ".join(failures))
    return report


def describe(reader: CheckpointReader) -> dict[str, Any]:
    """One file for machines: kind, tensors, types, size, metadata, parts by family, and what it is good for."""
    from truepose_core.cli.opening import ModelChoice, parse_config
    from truepose_core.cli.transfer.maps import command_line
    from truepose_core.importing.convert import not_recognised
    from truepose_core.importing.families import FAMILIES
    from truepose_core.importing.plan import describe as kind_of
    from truepose_core.weights.reading import refuse_quantised
    from truepose_core.weights.strict import ARCHITECTURE

    infos = reader.infos()
    architecture = reader.metadata.get("architecture")
    ours = architecture == ARCHITECTURE or "converter" in reader.metadata
    parts = [] if ours else [(family, part) for family in FAMILIES for part in family.recognise(0, infos)]
    kind = kind_of(infos)
    why_not = command = ""
    try:
        refuse_quantised(infos, str(reader.path))
        if architecture == ARCHITECTURE and "config" in reader.metadata:
            model = ModelChoice((str(reader.path),), parse_config(reader.metadata["config"]))
            command = command_line(model)
    except TruePoseError as error:
        why_not = str(error)
    if architecture == ARCHITECTURE:
        node = "Load CFLD" if command and model.is_cfld else "Load TruePose Model"
        use = f"a model of this package: --model {reader.path}, or {node} in ComfyUI"
    elif ours:
        use = f"converted already: {reader.metadata.get('title', architecture)}, for Load CAA Adapter in ComfyUI"
    elif parts:
        use = "truepose convert, together with the other files of its system"
    else:
        use = kind.use if kind is not None else "nothing here"
        why_not = why_not or f"{reader.path.name} {not_recognised(infos)}"
    return {
        "file": str(reader.path),
        "kind": reader.kind,
        "bytes": sum(path.stat().st_size for path in reader.files),
        "tensors": len(infos),
        "dtypes": dict(Counter(info.dtype for info in infos.values()).most_common()),
        "ours": ours,
        "looks_like": None if ours or kind is None else kind.name,
        "parts": [{"family": f.name, "title": f.title, "role": p.role, "prefix": p.prefix} for f, p in parts],
        "use": use,
        "command": command,
        "why_not": why_not,
        "metadata": reader.metadata,
        "not_read": reader.skipped,
    }


def together(files: list[str], choices: dict[str, str]) -> dict[str, Any]:
    """Whether all files make up one model. "verdict": for people. "command": what uses the files as they are, "" for
    what is no model of its own."""
    from truepose_core.cli.opening import ModelChoice, parse_config
    from truepose_core.cli.transfer.maps import command_line
    from truepose_core.importing.convert import find
    from truepose_core.weights.strict import ARCHITECTURE

    try:
        found = find(files, choices)
    except TruePoseError as error:
        return {"convertible": False, "verdict": f"cannot be converted: {error}", "command": ""}
    options = "".join(f" --choose {shlex.quote(f'{name}={value}')}" for name, value in choices.items())
    names = " ".join(shlex.quote(str(Path(file))) for file in files)
    verdict = f"{found.title}, complete: truepose convert {names}{options} --out model.safetensors"
    command = ""
    if found.plan.metadata.get("architecture", ARCHITECTURE) == ARCHITECTURE:
        config = parse_config(json.dumps(found.plan.config))
        command = command_line(ModelChoice(tuple(map(str, files)), config, True, choices))
        verdict += f"\nor as they are: {command}"
    return {"convertible": True, "family": found.plan.family, "verdict": verdict, "command": command}


SHORT = 160
"""Longer metadata is cut in what people read."""


def lines(file: dict[str, Any]) -> list[str]:
    """`describe`, for people."""
    types = ", ".join(f"{count:,} {name}" for name, count in file["dtypes"].items())
    rows = [("is", f"{file['kind']}, {file['tensors']:,} tensors ({types}), {file['bytes'] / MEBI:,.1f} MiB")]
    if file["looks_like"]:
        rows.append(("looks like", file["looks_like"]))
    for part in file["parts"]:
        under = f" under {part['prefix']}" if part["prefix"] else ""
        rows.append(("found", f"{part['title']}: {part['role']}{under}"))
    rows.append(("good for", file["use"]))
    if file["command"]:
        rows.append(("command", file["command"]))
    if file["why_not"]:
        rows.append(("but", file["why_not"]))
    for name, value in sorted(file["metadata"].items()):
        rows.append(("says", f"{name}: {value if len(value) <= SHORT else value[:SHORT] + ' ...'}"))
    rows += [("not read", f"{entry}: {reason}") for entry, reason in file["not_read"].items()]
    return [file["file"], *(f"  {label:<10}  {text}" for label, text in rows)]
