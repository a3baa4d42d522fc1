"""`truepose benchmark --body`: seconds to lift, fit, render, carry and align one person of the mannequin world."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from truepose_core.benchmark.measure import choose_device
from truepose_core.benchmark.timing import CpuClock, CudaClock, interleaved
from truepose_core.parsing import HumanParsing

SIZE = (768, 512)
"""(height, width) of the picture."""
REPEATS = 5


def measure_body(device: str = "auto", repeats: int | None = None) -> dict[str, Any]:
    """{"device", "size", "repeats", "seconds": step -> median seconds for one person}: CPU seconds of one thread, or
    seconds between CUDA events."""
    from truepose_core.body.carry import carry
    from truepose_core.body.lift import lift, lift_net
    from truepose_core.body.render import GenericBody
    from truepose_core.mannequin.split import split_pairs

    where = choose_device(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = split_pairs(1, SIZE)
        source, target = pair.source.to(where), pair.target.to(where)
        lift_net().to(where)
        aspect = SIZE[1] / SIZE[0]
        first = lift(source.keypoints, aspect).bodies
        second = lift(target.keypoints, aspect, shape=first.beta).bodies
        parsing = HumanParsing(source.parsing)
        work = {
            "lift": partial(lift, source.keypoints, aspect, steps=0),
            "lift and fit": partial(lift, source.keypoints, aspect),
            "render": partial(GenericBody().render, second, *SIZE),
            "render source and target, carry": partial(carry, source.image, parsing, first, second),
        }
        clock = CpuClock() if where.type == "cpu" else CudaClock(where)
        seconds = interleaved(work, repeats or REPEATS, clock)
    finally:
        torch.set_num_threads(threads)
        lift_net().to("cpu")
    return {"device": str(where), "size": list(SIZE), "repeats": repeats or REPEATS, "seconds": seconds}


def body_table(result: dict[str, Any]) -> str:
    """The seconds as a markdown table."""
    height, width = result["size"]
    rows = "\n".join(f"| {name} | {seconds:.3f} |" for name, seconds in result["seconds"].items())
    return (
        f"One person at {width}x{height} on {result['device']}, one thread, median of {result['repeats']}\n\n"
        f"| step | seconds |\n|---|---:|\n{rows}\n"
    )
