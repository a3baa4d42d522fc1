"""`truepose batch`: many sources in many poses, from a table."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from truepose_core.cli.console import Console, add_report_arguments, number, whole
from truepose_core.cli.data import add_worker_arguments, chosen_workers
from truepose_core.errors import TruePoseError

HELP = "a whole catalogue: sources x poses x options from a table"
DESCRIPTION = """\
Make a picture for every row of a table. A row has a source and a pose; other columns are options of truepose transfer
without their dashes (parsing, source-pose, seed, region ...), and what stands behind -- holds for all rows. Rows that
differ in their pose alone are one job: the source is read once for all of them.

A batch that was stopped goes on when it is started again: what is finished is not done twice. A row that cannot be made
stops nothing; the report says why, and the next start tries it again.
"""
EPILOG = """\
table (.csv or .parquet):
  id,source,pose,source-pose,parsing,seed
  dress-1,photos/dress.png,gallery:walking,poses/dress.json,maps/dress.png,7
  dress-2,photos/dress.png,poses/wave.json,poses/dress.json,maps/dress.png,7

output, in a folder or an object store (s3://bucket/run, gs://...):
  pictures/ID.png     records/ID.json     report.parquet     report.html, with thumbnails and filters

examples:
  truepose batch catalogue.csv --out results -- --parser keypoints --steps 20
  truepose batch catalogue.parquet --out s3://shop/run --workers 8 --gpus 0.5 --address auto -- --model ./sd15
  truepose batch catalogue.csv --out results --comfyui http://gpu1:8188 http://gpu2:8188 --workflow api.json
"""
SEPARATOR = "--"
"""What stands behind it on the command line is for `truepose transfer`: `args.rest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose batch`."""
    parser.usage = "truepose batch TABLE --out DIR [options] [-- options of truepose transfer]"
    parser.add_argument("table", metavar="TABLE", help="the rows: a .csv or .parquet file")
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder, or an address that fsspec knows")
    parser.add_argument(
        "--poses-per-job",
        type=whole(1, 100_000),
        default=64,
        metavar="N",
        help="poses of one source that one worker does in a row (default: 64)",
    )
    add_worker_arguments(parser)
    pool = parser.add_argument_group("a pool of ComfyUI servers instead of workers")
    pool.add_argument("--comfyui", nargs="+", metavar="URL", help="the servers, such as http://127.0.0.1:8188")
    pool.add_argument(
        "--workflow",
        metavar="FILE.json",
        help="in API format, with {{source}}, {{pose}} or another column where a row's cell goes; {{pose:text}} is "
        "what the file holds",
    )
    pool.add_argument(
        "--timeout", type=number(1), default=600.0, metavar="S", help="seconds that a row may take (default: 600)"
    )
    pool.add_argument(
        "--patience", type=number(0), default=60.0, metavar="S", help="that a failed server is waited for (default: 60)"
    )
    add_report_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read the table, do what is missing, report. Raises TruePoseError at the end when rows failed."""
    from truepose_core.cli.batch.spec import arrow, read_spec
    from truepose_core.cli.batch.work import TransferPainter, on_workers

    arrow()  # the report's, before any work
    if (args.comfyui is None) != (args.workflow is None):
        raise TruePoseError("--comfyui and --workflow belong together: the servers, and what they shall do")
    workers, base = chosen_workers(args), tuple(args.rest)
    if args.comfyui is not None:
        return _run_pool(args, base, console)
    check_base(base)
    console.doing(f"reading {args.table}")
    rows = read_spec(args.table)
    return run_batch(rows, args.out, base, on_workers(TransferPainter, workers), args.poses_per_job, console)


def _run_pool(args: argparse.Namespace, base: tuple[str, ...], console: Console) -> dict[str, Any]:
    """The rows on ComfyUI servers."""
    import hashlib
    import json

    from truepose_core.cli.batch.comfyui import Pool, check_columns, read_workflow, run_pool
    from truepose_core.cli.batch.spec import read_spec

    if base or args.workers or args.gpus or args.address:
        raise TruePoseError(
            "with --comfyui the servers work: leave out --workers, --gpus, --address and what stands behind --"
        )
    for server in args.comfyui:
        if not server.startswith(("http://", "https://")):
            raise TruePoseError(f"--comfyui {server} is no address; write for example http://127.0.0.1:8188")
    workflow = read_workflow(args.workflow)
    pool = Pool(tuple(args.comfyui), workflow, timeout=args.timeout, patience=args.patience, retries=args.retries)
    rows = read_spec(args.table, transfer=False)
    check_columns(pool, rows)
    # Pictures of another workflow are other pictures.
    mark = (hashlib.sha256(json.dumps(workflow, sort_keys=True).encode()).hexdigest(),)
    return run_batch(rows, args.out, mark, lambda jobs, out, _: run_pool(jobs, pool, out, mark), 1, console)


def check_base(base: Sequence[str]) -> None:
    """Raises TruePoseError for options behind -- that transfer does not have, or that a batch sets itself."""
    from truepose_core.cli.batch.spec import NOT_IN_ROWS, Row
    from truepose_core.cli.batch.work import parse_rows

    for word in base:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in NOT_IN_ROWS:
            raise TruePoseError(f"{word} behind {SEPARATOR}: the batch sets it itself; leave it out")
    if base and not base[0].startswith("-"):
        raise TruePoseError(f"{base[0]!r} is no option; sources stand in the table, options behind {SEPARATOR}")
    parse_rows(base, [Row("check", "source.png", "pose.json")], "check.png")


def run_batch(
    rows: Sequence[Any],
    out: str,
    base: tuple[str, ...],
    do: Callable[[Sequence[Any], Any, tuple[str, ...]], Iterable[Any]],
    poses_per_job: int,
    console: Console,
) -> dict[str, Any]:
    """Do every row that is not done, and write the report. Returns the counts.

    base: the options of all rows. do: (jobs, store, base) -> an `Outcome` for each job as it ends.

    Raises TruePoseError after the report when rows failed, and before anything where the output cannot be written.
    """
    from tqdm.auto import tqdm

    from truepose_core.cli.batch.report import collect, write_report
    from truepose_core.cli.batch.spec import group_rows
    from truepose_core.cli.batch.store import PICTURES, Store
    from truepose_core.cli.batch.work import is_done, record_of

    started = time.perf_counter()
    store = Store(out)
    if store.local is not None and store.local.exists() and not store.local.is_dir():
        raise TruePoseError(f"--out {out} is a file; expected a folder, or a path where one can be made")
    before, pictures = store.records(), store.names(PICTURES)
    left = []
    for row in rows:
        if row.problem is not None:
            store.record(record_of(row, base, error=row.problem))
        elif not (is_done(before.get(row.id), row, base) and f"{row.id}.png" in pictures):
            left.append(row)
    jobs = group_rows(left, poses_per_job)
    kept = sum(row.problem is None for row in rows) - len(left)
    if kept:
        console.say(f"{kept} of {len(rows)} rows are done already")
    tries = Counter()
    with tqdm(total=len(left), disable=console.quiet, unit="picture", desc="batch") as bar:
        for outcome in do(jobs, store, base):
            if outcome.error is not None:
                _record_failures(store, outcome.job.rows, base, outcome.error)
            tries["again"] += outcome.tries - 1
            bar.update(len(outcome.job.rows))
    entries = collect(rows, store.records(), base)
    names = write_report(store, entries)
    counts = Counter(entry["status"] for entry in entries)
    seconds = time.perf_counter() - started
    report = {
        "rows": len(rows),
        "done": counts["done"],
        "failed": counts["failed"],
        "done before": kept,
        "sources read": len(jobs),
        "tried again": tries["again"],
        "seconds": round(seconds, 3),
        "out": out,
    }
    console.say(
        f"{counts['done']} of {len(rows)} pictures, {len(left)} of them now from {len(jobs)} readings of sources, in "
        f"{seconds:.1f} s"
    )
    console.say("wrote " + ", ".join(f"{out}/{name}" for name in names))
    console.report(report)
    failed = [entry for entry in entries if entry["status"] != "done"]
    if failed:
        raise TruePoseError(
            f"{len(failed)} of {len(rows)} rows failed, first {failed[0]['id']}: {failed[0]['error']}. The others are "
            f"done, {out}/{names[1]} lists all; the same command tries the failed ones again"
        )
    return report


def _record_failures(store: Any, rows: Sequence[Any], base: Sequence[str], error: str) -> None:
    """Of a job whose workers died: what it did not come to."""
    from truepose_core.cli.batch.work import finished, record_of

    for row in rows:
        if not finished(store, row, base):
            store.record(record_of(row, base, error=error))
