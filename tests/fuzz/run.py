"""Read damaged files: nothing may come of it but success or a `TruePoseError`, in bounded time and memory.

    python tests/fuzz/run.py                          2,000 cases of every reader, as the tests run it
    python tests/fuzz/run.py --cases 100000           the long run
    python tests/fuzz/run.py --reader image --keep bad --first 70000 --cases 1000

A case is fixed by the reader, --seed and its number, so that what is found can be found again (but for the addresses
in checkpoints of torch's old format). --keep: a folder for the files of failures. The last line is JSON; the exit code
is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from readers import READERS, Reader, whole_of  # noqa: E402

from truepose_core.errors import TruePoseError  # noqa: E402

SECONDS = 5.0
"""Of computing, for one file."""
GIBIBYTES = 2.0
"""More than before the first case, at most."""
_ROOM = 8 * 2**30
"""Address space beyond what is in use: what asks for more gets a MemoryError, and not the machine."""
SHOWN = 20
"""Failures that are told in full."""


class TooSlow(BaseException):
    """No `Exception`, so that nothing takes it for a damaged file."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise `TooSlow` in what computes for longer than `SECONDS`."""

    def ring(*_: object) -> None:
        raise TooSlow(f"over {SECONDS:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def peak() -> float:
    """The most memory this process ever held, in GiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage counts what the parent held before this process was its own.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (2**30 if sys.platform == "darwin" else 2**20)


def bound_memory() -> None:
    """Keep a case that asks for terabytes from getting them."""
    if not Path("/proc/self/statm").is_file():
        return
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, used + _ROOM))


def hush_libraries() -> None:
    """C libraries print a line for each damaged TIFF: what Python says still comes through."""
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def fuzz(reader: Reader, cases: range, seed: int, keep: Path | None) -> dict[str, Any]:
    """Read `cases` damaged files. Returns what came of them."""
    seeds, failures = reader.seeds(), []
    counts = {"read": 0, "refused": 0}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, content in seeds:
            (Path(folder) / name).write_bytes(whole_of(content))
        # A reader that refuses everything would pass the rest.
        for name, _ in seeds:
            reader.read(Path(folder) / name)
        before = peak()
        for number in cases:
            rng = random.Random(f"{reader.name} {seed} {number}")
            name, content = rng.choice(seeds)
            path, damaged = Path(folder) / name, reader.damage(content, rng)
            path.write_bytes(damaged)
            started, problem = time.process_time(), ""
            try:
                with limited():
                    reader.read(path)
                counts["read"] += 1
            except TruePoseError:
                counts["refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.format_exc().strip().splitlines()
                problem = f"{type(error).__name__}: {str(error)[:200]} | {' '.join(where[-3].split())[:200]}"
            seconds = time.process_time() - started
            slowest = max(slowest, seconds)
            if not problem and seconds > SECONDS:
                problem = f"took {seconds:.1f} s"
            if not problem and peak() - before > GIBIBYTES:
                problem, before = f"took {peak() - before:.1f} GiB", peak()
            if problem:
                failures.append({"case": number, "file": name, "problem": problem})
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{reader.name.replace(' ', '-')}-{number}-{name}").write_bytes(damaged)
    return {**counts, "slowest": round(slowest, 2), "peak": round(peak(), 2), "failures": failures}


def main() -> int:
    """Run, print, and say by the exit code whether anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="damaged files of every reader (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="other files (default: 0)")
    parser.add_argument("--reader", nargs="+", choices=[r.name for r in READERS], help="which (default: all)")
    parser.add_argument("--keep", type=Path, help="folder for the files of failures")
    args = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bound_memory()
    hush_libraries()
    results = {}
    for reader in READERS:
        if args.reader and reader.name not in args.reader:
            continue
        started = time.process_time()
        result = fuzz(reader, range(args.first, args.first + args.cases), args.seed, args.keep)
        results[reader.name] = result
        print(
            f"{reader.name}: {args.cases:,} cases in {time.process_time() - started:.1f} s, {result['read']:,} read, "
            f"{result['refused']:,} refused, {len(result['failures'])} failed; slowest {result['slowest']:.2f} s, peak "
            f"{result['peak']:.2f} GiB",
            flush=True,
        )
        for failure in result["failures"][:SHOWN]:
            print(f"  case {failure['case']}, {failure['file']}: {failure['problem']}", flush=True)
    print(json.dumps(results))
    return int(any(result["failures"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
