"""Peak memory of one attention call, above its inputs.

On a GPU torch's allocator tells. On a CPU a fresh process measures its own high-water mark before and after each
call (VmHWM on Linux, ru_maxrss on macOS; elsewhere nothing is measured). `passed_bytes` is the part that can be
reckoned: the tensors made to be handed to the kernel.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from truepose_core.attention.hpfa import hpfa_attention, hpfa_attention_masked
from truepose_core.benchmark.shapes import Site, attention_inputs

CALLS: dict[str, Callable[..., Any]] = {"augmented": hpfa_attention, "masked": hpfa_attention_masked}


def passed_bytes(site: Site, kept: int, how: str, itemsize: int) -> int:
    """Bytes of what the kernel is given besides q, k, v of the plain call, and of its output.

    augmented: q', k', v' and the output, all 8 channels wider. masked: k', v', the output, and a bias [H, N, N + M].
    """
    n, m, d = site.tokens, kept, site.width
    extra, bias = (8, 0) if how == "augmented" else (0, n * (n + m))
    # q and the output, k and v; the masked form uses the plain q as it is.
    rows = 2 * n + 2 * (n + m) if extra else n + 2 * (n + m)
    return site.heads * (rows * (d + extra) + bias) * itemsize


def cuda_peak(site: Site, kept: int, how: str, device: torch.device, dtype: torch.dtype) -> int:
    """Peak bytes above the inputs on a GPU."""
    x = attention_inputs(site, kept, 8, device, dtype)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.no_grad():
        CALLS[how](x.q, x.k, x.v, x.source, **x.terms)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peaks(cases: Iterable[tuple[Site, int, str]]) -> list[int | None]:
    """Peak bytes above the inputs of (site, kept, "augmented" or "masked") in float32, in one child process.

    None where this system tells no high-water mark, or the child did not live to tell it; then stderr says why.
    """
    text = json.dumps([(asdict(site), kept, how) for site, kept, how in cases])
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "truepose_core.benchmark.memory"],
        input=text,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["it was ended from outside, perhaps for lack of memory"]
        print(
            f"peak memory was not measured: the child process ended with {done.returncode}: {why[0]}", file=sys.stderr
        )
    count = len(json.loads(text))
    lines = [json.loads(line) for line in done.stdout.split()]
    return (lines + [None] * count)[:count]


def high_water() -> int | None:
    """The most memory that this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux a child inherits its parent's.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def child() -> None:
    """Read cases, measure them from the smallest up (a high-water mark never falls), print bytes line by line."""
    torch.set_num_threads(1)
    cases = [(Site(**site), kept, how) for site, kept, how in json.load(sys.stdin)]
    made = [(CALLS[how], attention_inputs(site, kept, 8, "cpu", torch.float32)) for site, kept, how in cases]
    warm = attention_inputs(Site(16, 1, 8, 1), 16, 8, "cpu", torch.float32)
    # Importing may have held more than is held now; this lifts the present above that mark.
    ballast = torch.ones(2**26)
    peaks: dict[int, int | None] = {}
    with torch.no_grad():
        for call in CALLS.values():
            call(warm.q, warm.k, warm.v, warm.source, **warm.terms)
        before = high_water()
        for i in sorted(range(len(cases)), key=lambda i: passed_bytes(*cases[i], 4)):
            call, x = made[i]
            call(x.q, x.k, x.v, x.source, **x.terms)
            peaks[i] = None if before is None else high_water() - before
    del ballast
    for i in range(len(cases)):
        print(json.dumps(peaks[i]))


if __name__ == "__main__":
    child()
