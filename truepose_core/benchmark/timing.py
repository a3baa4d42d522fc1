"""Clocks, and interleaved repeats: everything that is compared runs in turn, so a slow minute slows all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)

SHORT = 0.05
"""Seconds. Shorter work is called several times per reading, up to about this long."""

LONG = 0.25
"""Seconds. A reading this long needs no warm-up before it; a shorter one is warm-up for those to come."""


class CpuClock:
    """CPU seconds of this process: other programs on the machine do not count, waiting threads do, so run on one."""

    first_counts = True

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """Mean seconds of one call."""
        start = time.process_time()
        for _ in range(times):
            work()
        return (time.process_time() - start) / times


class CudaClock:
    """Seconds between two CUDA events around the work."""

    first_counts = False
    """A first call loads kernels and may try several."""

    def __init__(self, device: torch.device):
        self.device = device

    def seconds(self, work: Callable[[], Any], times: int) -> float:
        """Mean seconds of one call."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(times):
                work()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000 / times


def interleaved(
    work: Mapping[Key, Callable[[], Any]],
    repeats: int,
    clock: CpuClock | CudaClock,
    tick: Callable[[], Any] = lambda: None,
) -> dict[Key, float]:
    """Median seconds of one call of each, over `repeats` rounds of all of them. `tick` is called after each reading,
    warm-up apart."""
    readings: dict[Key, list[float]] = {}
    times: dict[Key, int] = {}
    with torch.no_grad():
        for key, call in work.items():
            if not clock.first_counts:
                clock.seconds(call, 1)
            first = clock.seconds(call, 1)
            times[key] = max(1, round(SHORT / max(first, 1e-6)))
            readings[key] = [first] if first >= LONG else []
            if readings[key]:
                tick()
        while min(map(len, readings.values())) < repeats:
            for key, call in work.items():
                if len(readings[key]) < repeats:
                    readings[key].append(clock.seconds(call, times[key]))
                    tick()
    return {key: median(values) for key, values in readings.items()}
