"""`truepose data prepare`: a data set parsed, posed and lifted once, in shards."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import Console, add_report_arguments, height_by_width, number, whole
from truepose_core.cli.models import add_models_argument
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from truepose_core.workers import Workers

HELP = "prepare a data set once: parsed, posed and lifted pictures in WebDataset shards"
DESCRIPTION = """\
Parse, pose and lift every picture once, and write WebDataset shards, the lists of pairs and a manifest (counts, hashes,
versions, what was left out and why). Stopped and started again it goes on; on finished data it does nothing.
Needs: pip install "comfyui-truepose[scale]"

kinds of data:
  deepfashion ROOT   In-shop pictures (MEN/ and WOMEN/, or flat) with the files of CFLD (fashion-resize-pairs-*.csv and
                     fashion-resize-annotation-*.csv), PIDM (*_pairs.txt, pose/) or PCDMs (*_data.json,
                     normalized_pose_txt/)
  folder ROOT        your own: pairs.csv with images/, or one folder per garment or person; every two pictures of one
                     are a pair
  mannequin          people of the mannequin world, with exact parsing, keypoints and bodies

Label maps are taken from ROOT/parsing/NAME.png, keypoints from ROOT/poses/NAME.json, where there are any.
"""
EPILOG = """\
examples:
  truepose data prepare mannequin --people 100 --poses 4 --size 128x96 --out shards
  truepose data prepare folder photos --estimate-pose --parser schp-atr --out shards
  truepose data prepare deepfashion fashion --parser segformer-b2-clothes --out shards --workers 8 --gpus 0.25
"""
KINDS = ("deepfashion", "folder", "mannequin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose data`."""
    parser.add_argument("action", choices=("prepare",), help="what to do")
    parser.add_argument("kind", choices=KINDS, help="what the data is")
    parser.add_argument("root", nargs="?", metavar="ROOT", help="its folder (not for mannequin)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder for the shards")
    parser.add_argument(
        "--layout", choices=("cfld", "pidm", "pcdms"), help="deepfashion: whose files to read, where several are there"
    )
    parser.add_argument(
        "--parser",
        metavar="NAME",
        help="parsing of pictures without a label map: keypoints (no network), schp-atr, ..., an .onnx file "
        "(default: keypoints)",
    )
    parser.add_argument(
        "--parsing-labels", default="regions", metavar="NAME", help="what label maps' numbers mean (default: regions)"
    )
    parser.add_argument("--estimate-pose", action="store_true", help="find keypoints with DWPose where there are none")
    parser.add_argument("--vae", metavar="FOLDER", help="also keep latents of this VAE, of pictures fitted to --size")
    parser.add_argument("--size", type=height_by_width, metavar="HxW", help="of mannequins, and for --vae")
    parser.add_argument(
        "--people", type=whole(1, 10_000_000), default=100, metavar="N", help="mannequins (default: 100)"
    )
    parser.add_argument("--poses", type=whole(1, 100), default=2, metavar="N", help="of each mannequin (default: 2)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="of the mannequins (default: 0)")
    parser.add_argument(
        "--shard-size", type=whole(1, 100_000), default=500, metavar="N", help="pictures per shard (default: 500)"
    )
    add_models_argument(parser)
    add_worker_arguments(parser)
    add_report_arguments(parser)


def add_worker_arguments(parser: argparse._ActionsContainer) -> None:
    """How many workers, and where: --workers, --gpus, --cpus, --address and --retries."""
    group = parser.add_argument_group("workers (Ray)")
    group.add_argument(
        "--workers", type=whole(0, 10_000), default=0, metavar="N", help="Ray workers; 0 works without Ray (default: 0)"
    )
    group.add_argument(
        "--gpus", type=number(0, 64), default=0.0, metavar="N", help="GPUs of each worker, 0.25 shares one (default: 0)"
    )
    group.add_argument("--cpus", type=number(0, 1024), default=1.0, metavar="N", help="CPU cores of each (default: 1)")
    group.add_argument("--address", metavar="ADDRESS", help="of a running Ray cluster (default: this machine)")
    group.add_argument(
        "--retries",
        type=whole(0, 100),
        default=2,
        metavar="N",
        help="how often a job is tried again whose worker died (default: 2)",
    )


def chosen_workers(args: argparse.Namespace) -> Workers:
    """Of `add_worker_arguments`. Raises TruePoseError where an option has nothing to work on."""
    from truepose_core.workers import Workers

    if args.workers == 0 and (args.address is not None or args.gpus):
        raise TruePoseError("--address and --gpus are of Ray workers; add --workers N")
    return Workers(args.workers, args.gpus, args.cpus, args.address, args.retries)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prepare. Returns the manifest."""
    if args.kind == "mannequin":
        if args.root is not None:
            raise TruePoseError(f"data prepare mannequin takes no folder ({args.root}); leave it out")
        for option in ("parser", "estimate_pose", "layout"):
            if vars(args)[option]:
                raise TruePoseError(f"--{option.replace('_', '-')} is for photographs; leave it out for mannequins")
    elif args.root is None:
        raise TruePoseError(f"data prepare {args.kind} needs the folder of the data; see truepose data --help")
    if args.layout is not None and args.kind != "deepfashion":
        raise TruePoseError("--layout belongs to deepfashion; leave it out")
    from tqdm.auto import tqdm

    from truepose_core.datasets import layouts
    from truepose_core.datasets.prepare import KEYPOINTS, Options, prepare, summary

    size = args.size or ((128, 96) if args.kind == "mannequin" else None)
    options = Options(
        parser=args.parser or KEYPOINTS,
        labels=args.parsing_labels,
        estimate_pose=args.estimate_pose,
        models=args.models,
        vae=args.vae,
        size=size,
        seed=args.seed,
        poses=args.poses,
    )
    console.doing("looking through the data")
    if args.kind == "deepfashion":
        source = layouts.read_deepfashion(Path(args.root), args.layout)
    elif args.kind == "folder":
        source = layouts.read_folder(Path(args.root))
    else:
        source = layouts.mannequin_source(args.people, args.poses)
    with tqdm(total=len(source.records), disable=args.quiet, unit="picture", desc="prepare") as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        manifest = prepare(
            source,
            Path(args.out),
            options,
            shard_size=args.shard_size,
            workers=chosen_workers(args),
            progress=progress,
        )
    console.say(summary(manifest))
    console.say(f"wrote {args.out}")
    console.report(manifest)
    return manifest
