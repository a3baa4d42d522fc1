"""`truepose eval`: the table of rows on the fixed test split."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import (
    Console,
    add_report_arguments,
    check_file,
    choose_device,
    height_by_width,
    memory_text,
    number,
    peak_memory,
    whole,
)
from truepose_core.cli.evaluate_pairs import (
    add_pairs_arguments,
    refuse_pairs_options,
    refuse_table_options,
    run_pairs,
)
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.evaluation.depth_order import DepthOrderReport
    from truepose_core.evaluation.field import FieldReport
    from truepose_core.evaluation.guidance import GuidanceReport
    from truepose_core.evaluation.surroundings import PartsReport

HELP = "measure the models on the fixed test split, as a table"
DESCRIPTION = """\
Measure every row of the table on pairs that training never sees: PSNR and SSIM on the person, the clothes and the
face, and whether the pattern of the clothes was carried over. Needs: pip install "comfyui-truepose[eval]"

Rows without a diffusion model: copy (the source as it is), regions (the source's mean colours painted on the true
target parsing), warp (the source moved along the skeleton), body-lifted, body-given, surface (moved along a body lifted
from the keypoints, a body of true parameters, the true person's surface), alignment-K (recurrent alignment in K steps
on lifted bodies). With +parsing, places that the source hides are painted on the true target parsing. Learned rows of
equal data, budget and seed, each one more part: pose, concat, HPFA-skeleton, HPFA (body match on the surface),
HPFA+CAA, aligned (on recurrent alignment), aligned+field (with the pose field's guidance), aligned-3d. And
bundled, the model that ships (bundled-given: with true bodies).

With --depth-order: who is in front where keypoints do not say, on targets that come in two depths; the models of the
relative depth guidance's ablation. Their rows in the table: depth-base, depth-decoupled, depth-2d, depth-3d (its
bodies lifted from keypoints), depth-3d-given (true bodies), depth-3d-found, depth-3d-found-given.

With --parts: what surrounds the model instead. Parsing from keypoints (IoU of each region), retargeting (pixels),
pasting back, and a swapped garment with the bundled model.

With --field: the pose field's distance against the true one, on noise that training never saw. With --field-guidance:
the share of joints that lie where they should (PCK) with that field's guidance and without, and what it costs.

With --pairs-file: finished pictures instead of models. FID, LPIPS, SSIM and PSNR exactly as the code of PIDM, CFLD or
PCDMs computes them, or torchmetrics with its defaults; figures compare under the same preset only.
"""
EPILOG = """\
examples:
  truepose eval --data mannequin --pairs 32                     a quick look
  truepose eval --data mannequin --report table.json --sheet table.png
  truepose eval --rows copy warp HPFA+CAA --steps 20
  truepose eval --rows warp body-lifted body-given surface --size 128x96 --details
  truepose eval --rows copy mine --model mine=run/weights.safetensors
  truepose eval --data mannequin --parts --pairs 64
  truepose eval --data mannequin --field
  truepose eval --data mannequin --field-guidance --field-scale 10 50 250
  truepose eval --data mannequin --depth-order --steps 2
  truepose eval --pairs-file fashion-resize-pairs-test.csv --preset cfld --truth test_highres --results mine \
      --real train_highres --save-real cfld-256.npz
  truepose eval --pairs-file pairs.csv --preset pcdms --truth test --results mine --metrics ssim psnr --parsing maps
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
        help="the first N pairs (default: 512, all; with --parts 64, with --depth-order 128; with --field 6000 poses)",
    )
    parser.add_argument(
        "--parts", action="store_true", help="measure parsing from keypoints, retargeting, pasting back and a swap"
    )
    parser.add_argument(
        "--field", action="store_true", help="measure the pose field: Spearman's correlation with the true distance"
    )
    parser.add_argument(
        "--field-guidance",
        action="store_true",
        help="measure the pose field's guidance on easy and extreme poses (--pairs of each; default 128)",
    )
    parser.add_argument(
        "--field-scale",
        type=number(),
        nargs="+",
        metavar="S",
        help="with --field-guidance: the scales to compare (default: 10)",
    )
    parser.add_argument(
        "--field-mu",
        type=number(),
        metavar="M",
        help="with --field-guidance: weight of the distance to the target pose (default: 20)",
    )
    parser.add_argument(
        "--depth-order", action="store_true", help="measure who is in front, on targets that differ in depth alone"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        action="extend",
        metavar="ROW",
        help="which rows: copy, regions, warp, body-lifted, body-given, surface (each also with +parsing), "
        "alignment-1, alignment-2, alignment-4, and the learned ones above (default: all)",
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
        "--steps", type=whole(1, 1000), default=1, metavar="N", help="sampling steps of learned rows (default: 1)"
    )
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the sampling noise (default: 0)")
    parser.add_argument(
        "--size",
        type=height_by_width,
        metavar="HxW",
        help="height x width of the pictures in pixels, 16 to 1024 (default: the largest chosen model's, else 64x48)",
    )
    parser.add_argument(
        "--world",
        choices=("usual", "shifted", "one-colour", "busy", "crossed-arm"),
        default="usual",
        help="shifted: the same pairs in garments, builds and light that training never drew; one-colour: top and "
        "trousers of the same colours; busy: sources before cells of strong colours; crossed-arm: sources with an arm "
        "across the trunk (default: usual)",
    )
    parser.add_argument(
        "--keypoint-noise",
        type=number(0, 64),
        default=0.0,
        metavar="PX",
        help="body and alignment rows: noise on the keypoints, in pixels of a 512x768 picture (default: 0)",
    )
    parser.add_argument(
        "--missing",
        type=number(0, 1),
        default=0.0,
        metavar="SHARE",
        help="body and alignment rows: share of the keypoints that are left out (default: 0)",
    )
    parser.add_argument(
        "--angle-noise",
        type=number(0, 90),
        default=0.0,
        metavar="DEGREES",
        help="row body-given: noise on the joint rotations (default: 0)",
    )
    parser.add_argument(
        "--refit", action="store_true", help="row body-given: fit the noisy bodies to the keypoints (default: off)"
    )
    parser.add_argument("--details", action="store_true", help="also print the table per view and per pattern")
    parser.add_argument("--report", metavar="FILE.json", help="write the table as JSON")
    parser.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet of the first pairs")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: auto)")
    add_pairs_arguments(parser)
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check the outputs, measure, print the table, then write. Returns what is in the JSON file."""
    if args.pairs_file is not None:
        refuse_table_options(args)
        return run_pairs(args, console)
    refuse_pairs_options(args)
    started = time.perf_counter()
    models = parse_models(args.model)
    from truepose_core.pictures.files import IMAGE_SUFFIXES, atomic_write, save_image

    if args.report is not None:
        check_file(args.report, args.overwrite, (".json",))
    if args.sheet is not None:
        check_file(args.sheet, args.overwrite, IMAGE_SUFFIXES)
    chosen = [name for name in ("parts", "field", "field_guidance", "depth_order") if vars(args)[name]]
    if len(chosen) > 1:
        raise TruePoseError(f"--{chosen[0]} and --{chosen[1].replace('_', '-')} are two measurements; give one of them")
    if (args.field_scale or args.field_mu is not None) and not args.field_guidance:
        raise TruePoseError("--field-scale and --field-mu belong to --field-guidance; add it, or leave them out")
    if chosen and args.world != "usual":
        raise TruePoseError(f"--world belongs to the table of models; leave it out with --{chosen[0]}")
    console.doing("getting ready to measure")
    if chosen:
        return _run_other(args, chosen[0], console, started)
    from truepose_core.evaluation.bodies import Difficulty
    from truepose_core.evaluation.evaluate import PAIRS, evaluate

    device = choose_device(args.device)
    report = evaluate(
        args.data,
        args.pairs or PAIRS,
        args.seed,
        args.rows,
        args.steps,
        models=models or None,
        size=args.size,
        world=args.world,
        device=device,
        quiet=args.quiet,
        difficulty=Difficulty(args.keypoint_noise, args.missing, args.angle_noise, args.refit),
    )
    if args.report is not None:
        atomic_write(args.report, report.to_json() + "\n", args.overwrite)
    if args.sheet is not None:
        save_image(report.contact_sheet(), args.sheet, args.overwrite)
    console.say(report.markdown(details=args.details))
    console.say(f"{time.perf_counter() - started:.1f} s in all; {memory_text(peak_memory(device))}")
    for path in (args.report, args.sheet):
        if path is not None:
            console.say(f"wrote {path}")
    console.report(report.to_dict())
    return report.to_dict()


def _run_other(args: argparse.Namespace, what: str, console: Console, started: float) -> dict[str, Any]:
    """`--parts`, `--field`, `--field-guidance` and `--depth-order`: what is not the table of models."""
    used = {"field_guidance": ("model",), "depth_order": ("model",)}.get(what, ())
    for option in ("rows", "model", "sheet", "details"):
        if vars(args)[option] and option not in used:
            raise TruePoseError(
                f"--{option} belongs to the table of models; leave it out with --{what.replace('_', '-')}"
            )
    from truepose_core.pictures.files import atomic_write

    measured = {"parts": _parts, "field": _field, "field_guidance": _field_guidance, "depth_order": _depth_order}
    report = measured[what](args)
    if args.report is not None:
        atomic_write(args.report, report.to_json() + "\n", args.overwrite)
    console.say(report.markdown())
    console.say(f"{time.perf_counter() - started:.1f} s in all")
    if args.report is not None:
        console.say(f"wrote {args.report}")
    console.report(report.to_dict())
    return report.to_dict()


def _parts(args: argparse.Namespace) -> PartsReport:
    from truepose_core.evaluation.surroundings import evaluate_parts

    return evaluate_parts(args.pairs or 64)


def _field(args: argparse.Namespace) -> FieldReport:
    from truepose_core.evaluation.field import POSES, evaluate_field

    return evaluate_field(args.pairs or POSES, seed=args.seed)


def _field_guidance(args: argparse.Namespace) -> GuidanceReport:
    from dataclasses import replace

    from truepose_core.evaluation.guidance import PAIRS, evaluate_guidance
    from truepose_core.guidance.field import FieldGuidance
    from truepose_core.weights.strict import BUNDLED

    models = parse_models(args.model)
    strange = set(models) - {BUNDLED}
    if strange:
        raise TruePoseError(f"--model: unknown row {min(strange)!r} for --field-guidance; expected {BUNDLED}=FILE")
    usual = FieldGuidance() if args.field_mu is None else FieldGuidance(mu=args.field_mu)
    options = {}
    for scale in args.field_scale or [usual.scale]:
        options[f"scale {scale:g}"] = replace(usual, scale=scale)
        options[f"scale {scale:g}, field alone"] = replace(usual, scale=scale, mu=0)
    return evaluate_guidance(
        options,
        args.pairs or PAIRS,
        model=models.get(BUNDLED, BUNDLED),
        steps=args.steps,
        seed=args.seed,
        device=choose_device(args.device),
    )


def _depth_order(args: argparse.Namespace) -> DepthOrderReport:
    from truepose_core.evaluation.depth_order import PAIRS, evaluate_depth_order

    return evaluate_depth_order(
        args.pairs or PAIRS,
        steps=args.steps,
        seed=args.seed,
        models=parse_models(args.model),
        device=choose_device(args.device),
    )


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
