"""`truepose eval`: the table of rows on the fixed test split."""

from __future__ import annotations

import argparse
import time
from typing import Any

from truepose_core.cli.console import (
    Console,
    check_file,
    choose_device,
    memory_text,
    peak_memory,
    whole,
)
from truepose_core.errors import TruePoseError

HELP = "measure the models on the fixed test split, as a table"
DESCRIPTION = """\
Measure every row of the table on pairs that training never sees: PSNR and SSIM on the person, the clothes and the
face, and whether the pattern of the clothes was carried over. Needs: pip install "comfyui-truepose[eval]"

Rows without a network: copy (the source as it is), regions (the source's mean colours painted on the true target
parsing), warp (the source moved along the skeleton). Learned rows of equal data, budget and seed: pose, concat, HPFA,
HPFA+CAA. And bundled, the model that ships.

With --depth-order: who is in front where keypoints do not say, on targets that come in two depths; the models of the
relative depth guidance's ablation. Their rows in the table: depth-base, depth-decoupled, depth-2d, depth-3d (its
bodies lifted from keypoints), depth-3d-given (true bodies), depth-3d-found, depth-3d-found-given.

With --parts: what surrounds the model instead. Parsing from keypoints (IoU of each region), retargeting (pixels),
pasting back, and a swapped garment with the bundled model.
"""
EPILOG = """\
examples:
  truepose eval --data mannequin --pairs 32                     a quick look
  truepose eval --data mannequin --json table.json --sheet table.png
  truepose eval --rows copy warp HPFA+CAA --steps 20
  truepose eval --rows copy mine --model mine=run/weights.safetensors
  truepose eval --data mannequin --parts --pairs 64
  truepose eval --data mannequin --depth-order --steps 2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose eval`."""
    parser.add_argument(
        "--data", default="mannequin", choices=("mannequin",), help="the test data (default: mannequin)"
    )
    parser.add_argument(
        "--pairs",
        type=whole(1, 1_000_000),
        default=None,
        metavar="N",
        help="the first N pairs (default: 512, all; with --parts 64, with --depth-order 128)",
    )
    parser.add_argument(
        "--parts", action="store_true", help="measure parsing from keypoints, retargeting, pasting back and a swap"
    )
    parser.add_argument(
        "--depth-order", action="store_true", help="measure who is in front, on targets that differ in depth alone"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        action="extend",
        metavar="ROW",
        help="which rows: copy, regions, warp, pose, concat, HPFA, HPFA+CAA, bundled (default: all)",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        default=[],
        metavar="ROW=FILE",
        help="the weights of a learned row, or of a row of your own",
    )
    parser.add_argument(
        "--steps", type=whole(1, 1000), default=12, metavar="N", help="sampling steps of learned rows (default: 12)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the sampling noise (default: 0)")
    parser.add_argument("--details", action="store_true", help="also print the table per view and per pattern")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of the first pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: auto)")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check the outputs, measure, print the table, then write. Returns what is in the JSON file."""
    started = time.perf_counter()
    models = parse_models(args.model)
    from truepose_core.images import IMAGE_SUFFIXES, atomic_write, save_image

    if args.json is not None:
        check_file(args.json, args.overwrite, (".json",))
    if args.sheet is not None:
        check_file(args.sheet, args.overwrite, IMAGE_SUFFIXES)
    if args.depth_order:
        return _run_depth_order(args, console, started, models)
    if args.parts:
        return _run_parts(args, console, started)
    from truepose_core.evaluation.evaluate import PAIRS, evaluate

    device = choose_device(args.device)
    report = evaluate(
        args.data, args.pairs or PAIRS, args.seed, args.rows, args.steps, models=models or None, device=device
    )
    if args.json is not None:
        atomic_write(args.json, report.to_json() + "\n", args.overwrite)
    if args.sheet is not None:
        save_image(report.contact_sheet(), args.sheet, args.overwrite)
    console.say(report.markdown(details=args.details))
    console.say(f"{time.perf_counter() - started:.1f} s in all; {memory_text(peak_memory(device))}")
    for path in (args.json, args.sheet):
        if path is not None:
            console.say(f"wrote {path}")
    return report.to_dict()


def _run_parts(args: argparse.Namespace, console: Console, started: float) -> dict[str, Any]:
    """`--parts`: no model and no picture takes part in it."""
    for option, given in (
        ("--rows", args.rows),
        ("--model", args.model),
        ("--sheet", args.sheet),
        ("--details", args.details),
    ):
        if given:
            raise TruePoseError(f"{option} belongs to the table of models; leave it out with --parts")
    from truepose_core.evaluation.parts import evaluate_parts
    from truepose_core.images import atomic_write

    report = evaluate_parts(args.pairs or 64)
    if args.json is not None:
        atomic_write(args.json, report.to_json() + "\n", args.overwrite)
    console.say(report.markdown())
    console.say(f"{time.perf_counter() - started:.1f} s in all")
    if args.json is not None:
        console.say(f"wrote {args.json}")
    return report.to_dict()


def _run_depth_order(
    args: argparse.Namespace, console: Console, started: float, models: dict[str, str]
) -> dict[str, Any]:
    """`--depth-order`: its own targets, and the models of the ablation."""
    for option, given in (
        ("--rows", args.rows),
        ("--parts", args.parts),
        ("--sheet", args.sheet),
        ("--details", args.details),
    ):
        if given:
            raise TruePoseError(f"{option} does not go with --depth-order; leave it out")
    from truepose_core.evaluation.depth_order import PAIRS, evaluate_depth_order
    from truepose_core.images import atomic_write

    device = choose_device(args.device)
    report = evaluate_depth_order(args.pairs or PAIRS, steps=args.steps, seed=args.seed, models=models, device=device)
    if args.json is not None:
        atomic_write(args.json, report.to_json() + "\n", args.overwrite)
    console.say(report.markdown())
    console.say(f"{time.perf_counter() - started:.1f} s in all")
    if args.json is not None:
        console.say(f"wrote {args.json}")
    return report.to_dict()


def parse_models(items: list[str]) -> dict[str, str]:
    """["HPFA=file", ...] -> {row: file}. Raises TruePoseError for an item of another form or a row given twice."""
    models: dict[str, str] = {}
    for item in items:
        row, equals, path = item.partition("=")
        if not (row and equals and path):
            raise TruePoseError(f"--model {item!r} is not ROW=FILE; write for example HPFA=run/weights.safetensors")
        if row in models:
            raise TruePoseError(f"--model: row {row!r} is given twice")
        models[row] = path
    return models
