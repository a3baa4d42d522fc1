"""What a worker does with a job: `truepose transfer`'s own steps, the source read once for all its poses."""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from truepose_core.cli.batch.spec import Job, Row, transfer_parser
from truepose_core.cli.batch.store import PICTURES, RECORDS, Store
from truepose_core.cli.console import Console
from truepose_core.errors import TruePoseError
from truepose_core.workers import Outcome, Workers, run_jobs

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.cli.opening import Opened

Painter = Callable[[Sequence[Row]], Iterator[tuple[Row, bytes, Sequence[str]]]]
"""Rows of one job -> each with its finished PNG and notes on it, as it is done. Raises TruePoseError for rows that do
not do."""


@dataclass(frozen=True)
class BatchWork:
    """Makes a worker. base: the options of all rows. out: where to write. paint: makes the worker's `Painter`."""

    base: tuple[str, ...]
    out: str
    paint: Callable[[tuple[str, ...]], Painter]

    def __call__(self) -> Callable[[Job], dict[str, Any]]:
        painter, store = self.paint(self.base), Store(self.out)

        def work(job: Job) -> dict[str, Any]:
            return do_job(job, painter, store, self.base)

        return work


def on_workers(
    paint: Callable[[tuple[str, ...]], Painter], workers: Workers
) -> Callable[[Sequence[Job], Store, tuple[str, ...]], Iterator[Outcome[Job]]]:
    """What `run_batch` does jobs with: workers that paint."""

    def do(jobs: Sequence[Job], store: Store, base: tuple[str, ...]) -> Iterator[Outcome[Job]]:
        # Without jobs no worker is made, and no model opened.
        return run_jobs(BatchWork(base, store.url, paint), jobs, workers) if jobs else iter(())

    return do


def do_job(job: Job, painter: Painter, store: Store, base: Sequence[str]) -> dict[str, Any]:
    """Make what is missing of a job. Returns {"done", "failed"}: how many rows.

    A picture is written, then its record; so a record tells of a picture that is there. A job that was begun by a
    worker that died goes on behind the last record. Where one row spoils the job, each is done alone.
    """
    left = [row for row in job.rows if not finished(store, row, base)]
    done, failed = len(job.rows) - len(left), 0
    alone = False
    while left:
        rows = left[:1] if alone else left
        since = time.perf_counter()
        try:
            for row, data, notes in painter(rows):
                store.write(f"{PICTURES}/{row.id}.png", data)
                now = time.perf_counter()
                store.record(record_of(row, base, data=data, seconds=now - since, notes=notes))
                since, done, left = now, done + 1, left[1:]
        except TruePoseError as error:
            if not alone and len(rows) > 1:
                alone = True
                continue
            store.record(record_of(rows[0], base, error=str(error)))
            failed, left = failed + 1, left[1:]
    return {"done": done, "failed": failed}


def finished(store: Store, row: Row, base: Sequence[str]) -> bool:
    """Whether a record says that this row, with these options, is done, and its picture is there."""
    text = store.read(f"{RECORDS}/{row.id}.json")
    try:
        record = json.loads(text or b"")
    except ValueError:
        return False
    return is_done(record, row, base) and store.exists(record["picture"])


def is_done(record: dict[str, Any] | None, row: Row, base: Sequence[str]) -> bool:
    """Whether it is this row's record, made with these options, of a picture that was made."""
    return record is not None and record.get("status") == "done" and record.get("hash") == row.hash(base)


def record_of(
    row: Row,
    base: Sequence[str],
    *,
    data: bytes | None = None,
    seconds: float = 0.0,
    error: str | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """What became of a row. data: its picture, or error: why there is none. notes: what `truepose transfer` would have
    said beside."""
    return {
        "id": row.id,
        "status": "done" if data is not None else "failed",
        "source": row.source,
        "pose": row.pose,
        "options": dict(row.options),
        "picture": f"{PICTURES}/{row.id}.png" if data is not None else None,
        "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
        "seconds": round(seconds, 4),
        "error": error,
        "notes": "; ".join(notes) or None,
        "hash": row.hash(base),
    }


class _Listening(Console):
    """Keeps notes for the record: a worker has nobody to tell."""

    def __init__(self) -> None:
        super().__init__(json_on_stdout=True, quiet=True)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


class TransferPainter:
    """Paints by `truepose transfer`'s steps; the model stays open while rows name the same one."""

    def __init__(self, base: tuple[str, ...]):
        self.base = base
        self._opened: tuple[Any, Opened] | None = None
        parse_rows(base, [Row("check", "source.png", "pose.json")], "check.png")

    def __call__(self, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes, Sequence[str]]]:
        from truepose_core.cli.opening import memory_errors
        from truepose_core.cli.transfer.command import make_pictures, make_plan, prepare, read_source, tell_about
        from truepose_core.pictures.files import encode_image

        with tempfile.TemporaryDirectory() as folder, _Listening() as console:
            # Nothing is written there: transfer checks that it could.
            args = parse_rows(self.base, rows, f"{folder}/{'x.png' if len(rows) == 1 else 'x'}")
            plan = make_plan(args)
            given = prepare(args, plan.model, console)
            if len(given.targets) != len(rows):
                raise TruePoseError(
                    f"{rows[0].pose} has {len(given.targets)} poses; a row is one picture, so give a file of one frame"
                )
            opened = self._open(args, plan.model)
            tell_about(args, plan, given, opened, console)
            with memory_errors(opened.device):
                features = read_source(args, plan, given, opened, console)
                pictures: Iterator[Tensor] = make_pictures(args, plan, given, opened, features)
                for row, picture in zip(rows, pictures, strict=True):
                    yield row, encode_image(picture), console.notes

    def _open(self, args: argparse.Namespace, model: Any) -> Opened:
        from truepose_core.cli.opening import open_model

        key = [vars(args)[k] for k in ("model", "choose", "prompt", "controlnet", "vae", "image_encoder")]
        if self._opened is None or self._opened[0] != key:
            self._opened = None  # the old one leaves before the next one comes
            self._opened = key, open_model(model, args.device, args.dtype)
        return self._opened[1]


def parse_rows(base: Sequence[str], rows: Sequence[Row], out: str) -> argparse.Namespace:
    """Transfer's options for rows of one job. Raises TruePoseError as its parser."""
    argv = [rows[0].source, *base, *Job(tuple(rows)).argv, "--pose", *(row.pose for row in rows)]
    return transfer_parser().parse_args([*argv, "--out", out, "--quiet"])
