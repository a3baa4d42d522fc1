"""All measurements, as one dictionary ready for JSON."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from truepose_core.benchmark.calls import (
    Work,
    attention_work,
    caa_work,
    compared_work,
    projection_work,
    rest_seconds,
    rest_work,
    some_heads,
    whole_work,
)
from truepose_core.benchmark.count import StepCount, added_by_caa, added_by_hpfa, added_by_projection, count_step
from truepose_core.benchmark.memory import cpu_peaks, cuda_peak, passed_bytes
from truepose_core.benchmark.shapes import CHANNELS, SHARES, Net, Site
from truepose_core.benchmark.timing import CpuClock, CudaClock, interleaved
from truepose_core.errors import TruePoseError

TIMED_CHANNELS = (0, 8)
BUDGET = 13e9
"""FLOPs of the plain attention call that is timed for a site on a CPU: two heads of SD1.5's largest."""
QUICK_BUDGET = 3e9
"""The same in a quick run, and wherever masks are made: they are large."""


def measure(
    nets: Sequence[Net],
    *,
    quick: bool = False,
    device: str = "auto",
    repeats: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Everything that `truepose benchmark` tells about these UNets. Shows a progress bar on stderr,
    unless quiet.

    Raises TruePoseError for an unknown or missing device, or fewer than one repeat.
    """
    where = choose_device(device)
    on_gpu = where.type == "cuda"
    if repeats is None:
        repeats = (3 if quick else 10) if on_gpu else (1 if quick else 3)
    if repeats < 1:
        raise TruePoseError(f"--repeats is {repeats}; expected at least 1")
    dtype = torch.float16 if on_gpu else torch.float32
    result: dict[str, Any] = {"machine": _machine(where, dtype, quick, repeats)}
    result |= {"steps": [], "attention": [], "kv": [], "caa": []}
    threads = torch.get_num_threads()
    try:
        if not on_gpu:
            # CPU time counts threads that wait for each other; one thread has nobody to wait for.
            torch.set_num_threads(1)
        for net in nets:
            _measure_net(net, quick, where, dtype, repeats, result, quiet)
    finally:
        torch.set_num_threads(threads)
    return result


def _measure_net(
    net: Net, quick: bool, device: torch.device, dtype: torch.dtype, repeats: int, result: dict[str, Any], quiet: bool
) -> None:
    name = {"model": net.model, "size": net.size}
    with tqdm(total=1, desc=f"{net.model} {net.size}: counting", file=sys.stderr, disable=quiet) as bar:
        step = count_step(net)
        bar.update()
    on_gpu = device.type == "cuda"
    budget = None if on_gpu else (QUICK_BUDGET if quick else BUDGET)
    small = None if on_gpu else QUICK_BUDGET
    largest = step.sites[0]
    compared = (0.4,) if quick else SHARES
    context = net.unet["cross_attention_dim"]

    work: Work = projection_work(step.sites, SHARES, device, dtype) | caa_work(step.sites, context, device, dtype)
    work |= compared_work(largest, compared, device, dtype, small)
    if on_gpu:
        work |= whole_work(net, SHARES, TIMED_CHANNELS, device, dtype)
    else:
        work |= rest_work(step.parts, device, dtype)
        work |= attention_work(step.sites, SHARES, TIMED_CHANNELS, device, dtype, budget)
    with tqdm(total=len(work) * repeats, desc=f"{net.model} {net.size}: timing", file=sys.stderr, disable=quiet) as bar:
        clock = CudaClock(device) if on_gpu else CpuClock()
        seconds = interleaved(work, repeats, clock, bar.update)
    del work
    for key in seconds:
        if key[0] in ("plain", "hpfa"):
            seconds[key] *= key[1].heads / some_heads(key[1], budget).heads
        if key[0] in ("augmented", "masked", "mask ready"):
            seconds[key] *= key[1].heads / some_heads(key[1], small).heads

    def added(what: str, *key: Any) -> float:
        return sum(s.count * seconds[(what, s, *key)] for s in step.sites)

    if on_gpu:
        plain = seconds["step",]
        fused = {(share, c): seconds["step", share, c] for share in SHARES for c in TIMED_CHANNELS}
    else:
        rest = rest_seconds(step, seconds)
        plain = rest + added("plain")
        fused = {(share, c): rest + added("hpfa", share, c) for share in SHARES for c in TIMED_CHANNELS}

    for share in SHARES:
        counts = {c: 1 + added_by_hpfa(step, share, c) / step.flops for c in CHANNELS}
        projection = added_by_projection(step, share) / step.flops
        result["steps"].append(
            {
                **name,
                "tokens": share,
                "counted": counts[0],
                "timed": fused[share, 0] / plain,
                "counted_region_match": counts[8],
                "timed_region_match": fused[share, 8] / plain,
                "counted_body_match": counts[16],
                "plain_gflops": step.flops / 1e9,
                "plain_seconds": plain,
            }
        )
        result["kv"].append(
            {
                **name,
                "tokens": share,
                "counted_cached": counts[0],
                "counted_projected": counts[0] + projection,
                "counted": (counts[0] + projection) / counts[0],
                "timed": (fused[share, 0] + added("project", share)) / fused[share, 0],
                "projection_seconds": added("project", share),
                # SourceNet is a UNet of the same shape: one plain step more.
                "counted_source_net_every_step": counts[0] + projection + 1,
            }
        )
    result["attention"] += _attention_rows(name, largest, compared, seconds, small, device, dtype, quiet)
    result["caa"].append(_caa_row(name, step, context, plain, added("caa"), added("query")))


def _attention_rows(
    name: dict[str, str],
    site: Site,
    shares: Sequence[float],
    seconds: dict[tuple, float],
    budget: float | None,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Augmented against masked at one site; times and bytes are those of all its heads."""
    part = some_heads(site, budget)
    cases = [(part, part.kept(share), how) for share in shares for how in ("augmented", "masked")]
    with tqdm(total=1, desc=f"{name['model']} {name['size']}: memory", file=sys.stderr, disable=quiet) as bar:
        on_gpu = device.type == "cuda"
        peaks = [cuda_peak(*case, device, dtype) for case in cases] if on_gpu else cpu_peaks(cases)
        bar.update()
    rows = []
    for i, share in enumerate(shares):
        row: dict[str, Any] = {
            **name,
            "tokens": share,
            "target_tokens": site.tokens,
            "heads": site.heads,
            "head_width": site.width,
            "heads_measured": part.heads,
            "augmented_seconds": seconds["augmented", site, share],
            "masked_seconds": seconds["masked", site, share],
            "mask_ready_seconds": seconds["mask ready", site, share],
        }
        row["timed"] = row["augmented_seconds"] / row["masked_seconds"]
        row["timed_mask_ready"] = row["augmented_seconds"] / row["mask_ready_seconds"]
        for how, peak in zip(("augmented", "masked"), peaks[2 * i : 2 * i + 2], strict=True):
            row[f"{how}_passed_mb"] = passed_bytes(site, site.kept(share), how, dtype.itemsize) / 1e6
            row[f"{how}_peak_mb"] = None if peak is None else peak * site.heads / part.heads / 1e6
        known = row["augmented_peak_mb"] is not None and row["masked_peak_mb"]
        row["peak"] = row["augmented_peak_mb"] / row["masked_peak_mb"] if known else None
        rows.append(row)
    return rows


def _caa_row(
    name: dict[str, str], step: StepCount, context: int, plain: float, once: float, query: float
) -> dict[str, Any]:
    cross, aligned = added_by_caa(step, context)
    return {
        **name,
        "counted": 1 + cross / step.flops,
        "timed": 1 + once / plain,
        "counted_with_alignment": 1 + (cross + aligned) / step.flops,
        "timed_with_alignment": 1 + (2 * once + query) / plain,
    }


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise TruePoseError(f"--device is {name!r}; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TruePoseError(
            f"--device is {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    return device


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _machine(device: torch.device, dtype: torch.dtype, quick: bool, repeats: int) -> dict[str, Any]:
    import diffusers

    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "device_type": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if on_gpu else 1,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "clock": "CUDA events" if on_gpu else "process CPU time",
        "memory": "torch.cuda.max_memory_allocated" if on_gpu else "high-water mark of a child process",
        "repeats": repeats,
        "quick": quick,
    }
