"""`truepose study`: a user study as one page, and its statistics."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from truepose_core.cli.console import Console, add_report_arguments, check_file, whole
from truepose_core.errors import TruePoseError

HELP = "ask people: a user study (R2G, G2R, Jab) as one page, and its statistics"
DESCRIPTION = """\
make: one page that works without a server. People judge whether pictures are photographs, and, of several methods,
which result is the best; the page saves a file per person. What is behind each picture stands in a key, which the page
does not hold.

score: R2G (real pictures judged generated), G2R (generated ones judged real) and Jab (judged the best) with 95 %
intervals, once as if all answers were independent, once over people.
"""
EPILOG = """\
examples:
  truepose study make --pairs-file pairs.csv --truth test --results ours=mine theirs=other --out study.html
  truepose study score study.key.json answers/*.json --report study.json
"""
ACTIONS = ("make", "score")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose study`."""
    parser.add_argument("action", choices=ACTIONS, help="make a page, or score answers")
    parser.add_argument("files", nargs="*", metavar="FILE", help="score: the key, then the answers that people sent")
    made = parser.add_argument_group("make")
    made.add_argument("--pairs-file", metavar="FILE", help="the list of pairs, as for truepose eval")
    made.add_argument("--truth", metavar="FOLDER", help="the true pictures")
    made.add_argument("--sources", metavar="FOLDER", help="the source pictures (default: the folder of --truth)")
    made.add_argument(
        "--results", nargs="+", metavar="NAME=FOLDER", help="each method's name and its results, SOURCE_to_TARGET.png"
    )
    made.add_argument("--out", metavar="FILE.html", help="the page; the key is written beside it as FILE.key.json")
    made.add_argument(
        "--trials", type=whole(1, 1000), default=30, metavar="N", help="pictures of each kind to judge (default: 30)"
    )
    made.add_argument(
        "--height", type=whole(64, 1024), default=256, metavar="PX", help="height of every picture (default: 256)"
    )
    made.add_argument("--title", default="Which pictures are real?", help="of the page")
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="picks pictures and orders; of the bootstrap (default: 0)"
    )
    parser.add_argument("--report", metavar="FILE.json", help="score: write the figures as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Make or score. Returns what `--json` prints."""
    return _make(args, console) if args.action == "make" else _score(args, console)


def _make(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if args.files:
        raise TruePoseError(f"study make takes no files ({args.files[0]}); see truepose study --help")
    for option in ("pairs_file", "truth", "results", "out"):
        if vars(args)[option] is None:
            raise TruePoseError(f"study make needs --{option.replace('_', '-')}; see truepose study --help")
    from truepose_core.datasets.pairs import read_pair_list
    from truepose_core.evaluation.published import find_items, find_picture
    from truepose_core.evaluation.study import kinds, make_study
    from truepose_core.pictures.files import atomic_write

    page = check_file(args.out, args.overwrite, (".html",))
    key = check_file(page.with_suffix(".key.json"), args.overwrite)
    folders: dict[str, Path] = {}
    for text in args.results:
        name, equals, folder = text.partition("=")
        if not (name.strip() and equals and folder):
            raise TruePoseError(f"--results {text!r} is not NAME=FOLDER; write for example ours=results")
        if name in folders:
            raise TruePoseError(f"--results: {name!r} is given twice")
        folders[name] = Path(folder)
    pairs = read_pair_list(args.pairs_file)
    truth = Path(args.truth)
    methods = {name: find_items(pairs, truth, folder) for name, folder in folders.items()}
    beside = Path(args.sources) if args.sources is not None else truth
    sources = {}
    if len(methods) > 1:
        for pair in pairs:
            sources[pair.source] = find_picture(beside, pair.source)
    console.doing("making the page")
    study = make_study(methods, sources, trials=args.trials, seed=args.seed, height=args.height, title=args.title)
    from truepose_core.cli.console import to_json

    atomic_write(key, to_json(study.key) + "\n", args.overwrite)
    atomic_write(page, study.page, args.overwrite)
    counts = kinds(study.key)
    console.say(", ".join(f"{count} {name}" for name, count in counts.items()))
    console.say(f"wrote {page} ({len(study.page) / 2**20:.1f} MiB), and {key}, which people must not see")
    result = {"study": study.key["study"], "page": str(page), "key": str(key), "trials": counts}
    console.report(result)
    return result


def _score(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    if len(args.files) < 2:
        raise TruePoseError("study score needs the key and at least one file of answers; see truepose study --help")
    from truepose_core.evaluation.study import score_study
    from truepose_core.pictures.files import atomic_write

    if args.report is not None:
        check_file(args.report, args.overwrite, (".json",))
    report = score_study(args.files[0], args.files[1:], args.seed)
    for person, count in report.missing.items():
        console.note(f"{person} left out {count} trials; the others count")
    if args.report is not None:
        atomic_write(args.report, report.to_json() + "\n", args.overwrite)
    console.say(report.markdown())
    if args.report is not None:
        console.say(f"wrote {args.report}")
    console.report(report.to_dict())
    return report.to_dict()
