"""`truepose benchmark --catalogue`: what reading a source once for several poses saves, and a million pictures.

Counted: FLOPs of a picture on the real shapes, 25 steps with guidance (a row without the source, a row with it), 40 %
of the source's tokens, region match, and the VAE; the source is encoded and read once for its poses, or for each.
Timed: the bundled model, one source in several poses, beside as many single runs that open the model and read the
source each time; CPU seconds of one thread, in one process. GPU hours are the counted FLOPs over what the maker states
for 16-bit matrix products times a share that is assumed; no GPU has been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from truepose_core.benchmark.count import META, added_by_hpfa, added_by_projection, count_step, counted
from truepose_core.benchmark.shapes import NETS, Net
from truepose_core.benchmark.timing import CpuClock, interleaved

POSES = (1, 2, 4, 8)
STEPS = 25
SHARE, CHANNELS = 0.4, 8
GPUS = {"L4": 121, "A10": 125, "RTX 4090": 165, "L40S": 362, "A100": 312, "H100 SXM": 989}
"""Dense 16-bit TFLOP/s of the makers' data sheets, accumulating in float32."""
UTILISATION = 0.35
"""The share of them that a UNet's sampling is assumed to reach."""
MILLION = 1_000_000
REPEATS = 3


def measure_catalogue(repeats: int | None = None) -> dict[str, Any]:
    """{"counted": model -> {"size", "reading", "sampling", "tflop": poses -> per picture}, "timed": poses ->
    {"batch", "alone"} seconds per picture, "million": model -> poses -> GPU -> hours, ...}."""
    counts = {net.model: count_picture(net) for net in NETS}
    million = {
        model: {
            poses: {gpu: tflop * MILLION / (peak * UTILISATION) / 3600 for gpu, peak in GPUS.items()}
            for poses, tflop in found["tflop"].items()
        }
        for model, found in counts.items()
    }
    return {
        "steps": STEPS,
        "share": SHARE,
        "utilisation": UTILISATION,
        "gpus": GPUS,
        "counted": counts,
        "million": million,
        "timed": time_poses(repeats or REPEATS),
        "repeats": repeats or REPEATS,
    }


def count_picture(net: Net) -> dict[str, Any]:
    """TFLOP of a picture of this net, for each number of poses per source."""
    step = count_step(net)
    encode, decode = count_vae(net)
    # SourceNet is the same net on one row, without guidance.
    reading = encode + step.flops + added_by_projection(step, SHARE)
    sampling = STEPS * (2 * step.flops + added_by_hpfa(step, SHARE, CHANNELS)) + decode
    tflop = {poses: (reading / poses + sampling) / 1e12 for poses in POSES}
    return {"size": net.size, "reading": reading / 1e12, "sampling": sampling / 1e12, "tflop": tflop}


def count_vae(net: Net) -> tuple[int, int]:
    """FLOPs of Stable Diffusion's VAE: (encoding, decoding) one picture."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **kinds).eval()
    height, width = net.latent
    encoded = counted(lambda: vae.encode(torch.empty(1, 3, 8 * height, 8 * width, **META)))
    return encoded, counted(lambda: vae.decode(torch.empty(1, 4, height, width, **META)))


def time_poses(repeats: int) -> dict[int, dict[str, float]]:
    """CPU seconds per picture of the bundled model, for each number of poses: as a batch, and one by one."""
    from truepose_core.mannequin.split import split_pairs
    from truepose_core.models.store import load_model
    from truepose_core.parsing import HumanParsing
    from truepose_core.pipeline import TruePosePipeline

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        size = load_model("bundled").config.size
        pairs = split_pairs(max(POSES), size)
        image, keypoints = pairs.source.image[:1], pairs.source.keypoints[:1]
        parsing, targets = HumanParsing(pairs.source.parsing[:1]), pairs.target.keypoints

        def run(poses: int, opened: Callable[[], TruePosePipeline]) -> None:
            pipe = opened()
            features = pipe.encode_source(image, parsing, keypoints)
            for i in range(poses):
                pipe(features, targets[i : i + 1], height=size[0], width=size[1], num_inference_steps=1, seed=0)

        def opened() -> TruePosePipeline:
            pipe = TruePosePipeline.from_model(load_model("bundled"))
            pipe.set_progress_bar_config(disable=True)
            return pipe

        def alone(poses: int) -> None:
            for _ in range(poses):
                run(1, opened)

        work: dict[str, Callable[[], object]] = {}
        for poses in POSES:
            work[f"{poses} batch"] = partial(run, poses, opened)
            work[f"{poses} alone"] = partial(alone, poses)
        seconds = interleaved(work, repeats, CpuClock())
    finally:
        torch.set_num_threads(threads)
    return {poses: {kind: seconds[f"{poses} {kind}"] / poses for kind in ("batch", "alone")} for poses in POSES}


def catalogue_tables(result: dict[str, Any]) -> str:
    """The numbers as markdown tables."""
    lines = [
        f"Counted TFLOP per picture, {result['steps']} guided steps, {result['share']:.0%} of the source's tokens, by "
        "poses per source",
        "",
        "| model | size | reading | sampling | " + " | ".join(f"{poses}" for poses in POSES) + " | saved at 8 |",
        "|---|---|---:|---:|" + "---:|" * (len(POSES) + 1),
    ]
    for model, found in result["counted"].items():
        each = found["tflop"]
        cells = " | ".join(f"{each[poses]:.1f}" for poses in POSES)
        saved = f"{1 - each[POSES[-1]] / each[1]:.1%}"
        lines.append(
            f"| {model} | {found['size']} | {found['reading']:.2f} | {found['sampling']:.1f} | {cells} | {saved} |"
        )
    lines += [
        "",
        f"CPU seconds per picture of the bundled model, one thread, median of {result['repeats']}",
        "",
        "| poses per source | one job | one by one | saved |",
        "|---:|---:|---:|---:|",
    ]
    for poses, found in result["timed"].items():
        saved = f"{1 - found['batch'] / found['alone']:.0%}"
        lines.append(f"| {poses} | {found['batch']:.3f} | {found['alone']:.3f} | {saved} |")
    lines += [
        "",
        f"GPU hours for a million pictures, 8 poses per source: counted FLOPs at {result['utilisation']:.0%} of the "
        "maker's dense 16-bit TFLOP/s, which is assumed; no GPU was measured",
        "",
        "| GPU | TFLOP/s | " + " | ".join(result["million"]) + " |",
        "|---|---:|" + "---:|" * len(result["million"]),
    ]
    for gpu, peak in result["gpus"].items():
        hours = " | ".join(f"{found[POSES[-1]][gpu]:,.0f}" for found in result["million"].values())
        lines.append(f"| {gpu} | {peak} | {hours} |")
    return "\n".join(lines) + "\n"
