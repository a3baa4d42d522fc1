"""`truepose convert`: downloaded weights of other systems become one file of this package."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import MEBI, Console, add_report_arguments, check_file
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.importing.convert import Found

HELP = "make one model file of another system's downloaded weights"
DESCRIPTION = """\
Read the weight files that another system publishes (.safetensors, .pth, .pt, .bin, .ckpt, or the .index.json of shards)
and write them as one .safetensors file that --model and the ComfyUI nodes take. What the files are is told from their
tensors, never from their names; a table says what was found, taken and left out. Nothing in a pickle is run.
"""
EPILOG = """\
examples:
  truepose convert reference_unet.pth denoising_unet.pth pose_guider.pth --out animate-anyone.safetensors
  truepose convert pose_transfer.pth --out leffa.safetensors --dtype float16
  truepose convert a.pth b.pth --out model.safetensors --choose family=champ

truepose inspect FILE... says what files are and what is missing, and writes nothing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose convert`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="the weight files of one system, in any order")
    parser.add_argument("--out", required=True, metavar="FILE.safetensors", help="the file to write")
    parser.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="what the files alone do not tell; an error says when it is needed",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="number format to write; auto keeps the files' own (default: auto)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Find out what the files are, write, and tell. Returns the report that --json prints."""
    choices = parse_choices(args.choose)
    started = time.perf_counter()
    import torch
    from tqdm.auto import tqdm

    from truepose_core.importing.convert import convert

    out = check_file(args.out, args.overwrite, (".safetensors",))
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with tqdm(unit="B", unit_scale=True, desc="convert", delay=0.5, leave=False, disable=args.quiet) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = convert(args.files, out, choices=choices, dtype=dtype, overwrite=args.overwrite, progress=progress)
    seconds, size = round(time.perf_counter() - started, 1), out.stat().st_size
    console.say("\n".join(table(found)))
    console.say(f"wrote {out} ({size / MEBI:,.1f} MiB) in {seconds} s")
    report = {"out": str(out), "bytes": size, "seconds": seconds, **describe(found)}
    console.report(report)
    return report


def parse_choices(items: list[str]) -> dict[str, str]:
    """["name=value", ...] -> {name: value}. Raises TruePoseError for another form or a name given twice."""
    choices: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise TruePoseError(f"--choose {item!r} is not NAME=VALUE; write for example --choose family=champ")
        if name in choices:
            raise TruePoseError(f"--choose: {name!r} is given twice")
        choices[name] = value
    return choices


def table(found: Found) -> list[str]:
    """What was found, for people: a line per file and, below it, what was left out and why."""
    rows = [("file", "what it is", "tensors", "taken", "left out")]
    below: list[list[str]] = [[]]
    for file in found.files:
        roles = ", ".join(dict.fromkeys(part.role for part in file.parts))
        numbers = (file.tensors, file.mapped, sum(file.ignored.values()))
        rows.append((file.path.name, roles, *(f"{n:,}" for n in numbers)))
        reasons = [f"{count:,} left out: {reason}" for reason, count in file.ignored.items()]
        reasons += [f"{entry} is not read: {reason}" for entry, reason in file.skipped.items()]
        below.append(reasons)
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [f"{found.title}; licence of the weights: {found.licence}"]
    for row, reasons in zip(rows, below, strict=True):
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
        lines += [f"  {reason}" for reason in reasons]
    return lines


def describe(found: Found) -> dict[str, Any]:
    """`table` for machines."""
    return {
        "family": found.plan.family,
        "title": found.title,
        "tensors": len(found.plan.tensors),
        "config": found.plan.config,
        "licence": found.licence,
        "metadata": found.plan.metadata,
        "files": [
            {
                "file": str(file.path),
                "kind": file.kind,
                "parts": [{"role": part.role, "prefix": part.prefix} for part in file.parts],
                "tensors": file.tensors,
                "taken": file.mapped,
                "left_out": file.ignored,
                "not_read": file.skipped,
            }
            for file in found.files
        ],
    }
