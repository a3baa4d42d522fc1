"""`truepose eval --pairs-file`: results on listed pairs, measured as published codes measure them."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from truepose_core.cli.console import Console, check_file, choose_device
from truepose_core.errors import TruePoseError

OPTIONS = (
    *("preset", "truth", "results", "metrics", "real", "save_real", "inception", "alexnet", "parsing"),
    *("face_network", "poses"),
)


def add_pairs_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that go with --pairs-file."""
    group = parser.add_argument_group("results on listed pairs, measured as published codes measure them")
    group.add_argument(
        "--pairs-file",
        metavar="FILE",
        help="measure finished pictures: a csv with the columns from, to and perhaps result (CFLD), a JSON list of "
        "source_image and target_image (PCDMs), or lines target,source,... (PIDM)",
    )
    group.add_argument(
        "--preset", metavar="NAME", help="whose code to follow: pidm, cfld, pcdms or torchmetrics (needed)"
    )
    group.add_argument("--truth", metavar="FOLDER", help="the true pictures (needed)")
    group.add_argument("--results", metavar="FOLDER", help="the results, SOURCE_to_TARGET.png each (needed)")
    group.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="of fid, lpips, ssim and psnr (default: all of them)"
    )
    group.add_argument(
        "--real", metavar="FOLDER", help="FID's reference pictures, or an .npz of their statistics (mu, sigma)"
    )
    group.add_argument("--save-real", metavar="FILE.npz", help="keep the reference's statistics for the next time")
    group.add_argument(
        "--inception", metavar="FILE", help="weights of FID's network (default: the file in torch's cache)"
    )
    group.add_argument("--alexnet", metavar="FILE", help="weights of LPIPS' AlexNet (default: likewise)")
    group.add_argument(
        "--parsing",
        metavar="FOLDER",
        help="label maps NAME.png of the true pictures: regions and pattern score",
    )
    group.add_argument(
        "--face-network", metavar="FILE.onnx", help="a face network (ArcFace): is it the same face? With --poses"
    )
    group.add_argument(
        "--poses", metavar="FOLDER", help="keypoints of the true pictures: NAME.json, NAME.txt, or CFLD's csv"
    )


def run_pairs(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print and write. Returns what is in the JSON file."""
    started = time.perf_counter()
    for option in ("preset", "truth", "results"):
        if vars(args)[option] is None:
            raise TruePoseError(f"--pairs-file needs --{option}; see truepose eval --help")
    from truepose_core.datasets.pairs import read_pair_list
    from truepose_core.evaluation.protocols import METRICS, PRESETS
    from truepose_core.evaluation.published import evaluate_pairs, find_items
    from truepose_core.pictures.files import atomic_write

    if args.preset not in PRESETS:
        raise TruePoseError(f"--preset: unknown preset {args.preset!r}; the presets are {', '.join(PRESETS)}")
    if args.report is not None:
        check_file(args.report, args.overwrite, (".json",))
    if args.save_real is not None:
        check_file(args.save_real, args.overwrite, (".npz",))
        if "fid" not in (args.metrics or METRICS):
            raise TruePoseError("--save-real keeps what FID needs; add fid to --metrics, or leave it out")
    console.doing("getting ready to measure")
    items = find_items(read_pair_list(args.pairs_file), Path(args.truth), Path(args.results))
    report = evaluate_pairs(
        items[: args.pairs],
        args.preset,
        metrics=args.metrics or METRICS,
        size=args.size,
        real=_path(args.real),
        inception_file=_path(args.inception),
        alexnet_file=_path(args.alexnet),
        parsing=_path(args.parsing),
        face_network=_path(args.face_network),
        poses=_path(args.poses),
        device=choose_device(args.device),
        quiet=args.quiet,
    )
    for name, about in report.weights.items():
        if about.get("published") is False:
            console.note(f"{about['file']} is not the published {name}; the figures compare with no other's")
    if report.real.get("checked") is False:
        console.note(f"{args.real} does not say how it was made; it is taken to be of the preset {args.preset}")
    if args.report is not None:
        atomic_write(args.report, report.to_json() + "\n", args.overwrite)
    if args.save_real is not None and report.statistics is not None:
        atomic_write(args.save_real, report.statistics, args.overwrite)
    console.say(report.markdown())
    console.say(f"{time.perf_counter() - started:.1f} s in all")
    for path in (args.report, args.save_real):
        if path is not None:
            console.say(f"wrote {path}")
    console.report(report.to_dict())
    return report.to_dict()


def refuse_pairs_options(args: argparse.Namespace) -> None:
    """Raises TruePoseError where an option of --pairs-file is given without it."""
    for option in OPTIONS:
        if vars(args)[option] is not None:
            raise TruePoseError(f"--{option.replace('_', '-')} goes with --pairs-file; add it, or leave this out")


def refuse_table_options(args: argparse.Namespace) -> None:
    """Raises TruePoseError where an option of the table of models is given with --pairs-file."""
    for option in ("rows", "model", "sheet", "details", "parts", "field", "field_guidance", "depth_order"):
        if vars(args)[option]:
            raise TruePoseError(
                f"--{option.replace('_', '-')} measures models on the mannequin world; leave it out with --pairs-file"
            )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
