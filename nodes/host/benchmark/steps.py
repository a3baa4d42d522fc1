"""The steps that `truepose benchmark --host` times, counts and weighs (see run.py)."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

from truepose_core.benchmark.memory import high_water
from truepose_core.benchmark.timing import CpuClock, CudaClock
from truepose_core.parsing import HumanParsing

from .. import applied as host_applied
from .. import call as host_call
from .. import features as host_features
from .. import patch as host_patch
from .. import source as host_source

ALL = (1.0,) * 7
PERSON = (0.0, *ALL[1:])
BLOCK = 64
"""Pixels along a side of the squares that are person or background: whole tokens at every level of SD1.5."""
SHARE = 0.4
READING = "reading the source, once"
LEVELS = (2, 4, 8)
"""Noise levels that a source is read at."""
STEPS, POSES = 25, 4
"""Of the runs over which readings are spread."""


def _flops(q: tuple, k: tuple, v: tuple, *args: object, out_val: object = None, **kwargs: object) -> int:
    return sdpa_flop_count(q, k, v)


# The counter knows the kernels of a GPU only.
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flops}


@dataclass(frozen=True)
class Shape:
    """A UNet like SD1.5's and a picture. width: model_channels. height, wide: of the latent in cells."""

    name: str
    width: int
    heads: int
    context: int
    height: int
    wide: int


FULL = Shape("SD1.5", 320, 8, 768, 96, 64)
QUICK = Shape("SD1.5 at half width", 160, 4, 768, 48, 32)


def make_model(shape: Shape) -> object:
    """A MODEL of the host's own class with random weights."""
    settings = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": shape.width,
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "context_dim": shape.context,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float16 if comfy.model_management.get_torch_device().type == "cuda" else torch.float32,
    }
    config = comfy.supported_models.SD15(settings)
    config.unet_config |= {"num_heads": shape.heads, "num_head_channels": -1}
    model = config.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        # A gain of one keeps values away from overflow and from denormals, whatever the depth.
        spread = 1.0 if parameter.dim() == 1 else (parameter[0].numel()) ** -0.5
        noise = torch.empty(parameter.shape).uniform_(-1, 1, generator=generator)
        parameter.data.copy_(noise * spread)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def person(shape: Shape) -> HumanParsing:
    """A parsing whose person fills about 40 % of the picture, in whole blocks."""
    rows, columns = shape.height * 8 // BLOCK, shape.wide * 8 // BLOCK
    count = round(SHARE * rows * columns)
    labels = (torch.arange(rows * columns).reshape(rows, columns) < count).long() * 3
    return HumanParsing.from_labels(labels.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[None])


class _Steps(comfy.samplers.Sampler):
    """Runs `work(step)` where a sampler would run, with the model loaded; step() is one guided call. The first of a run
    projects the source's keys and values, so what is counted and timed has that in it."""

    def __init__(self, work: Callable[[Callable[[], Tensor]], None]) -> None:
        self.work = work

    def sample(
        self,
        model_wrap: object,
        sigmas: Tensor,
        extra_args: dict,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        x = noise * 3
        sigma = torch.full((x.shape[0],), 3.0, device=x.device)
        self.work(lambda: model_wrap(x, sigma, **extra_args))
        return latent_image


def inside(model: object, shape: Shape, work: Callable[[Callable[[], Tensor]], None]) -> None:
    """Call work(step) within a run of the host's guider, guidance on."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[torch.randn(1, 77, shape.context), {"pooled_output": torch.zeros(1, 1280)}]] for _ in "+-"))
    guider.set_cfg(4.0)
    noise = torch.randn(1, 4, shape.height, shape.wide)
    guider.sample(noise, torch.zeros_like(noise), _Steps(work), torch.tensor([3.0, 0.0]), disable_pbar=True)


def _return_at_once(on: bool) -> None:
    """Whether glibc gives freed memory back at once, so that a peak is one, or keeps it, which is faster."""
    if sys.platform == "linux":
        mmap_threshold, default = -3, 32 * 2**20
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(mmap_threshold, 2**16 if on else default)


def _peak(device: torch.device, step: Callable[[], object]) -> int | None:
    """Bytes held at most during a step, above what was held before it; None where this system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux: the high-water mark starts anew
    except OSError:
        return None
    before = high_water()
    step()
    return high_water() - before


def measure(quick: bool, repeats: int | None, shape: Shape | None = None) -> dict:
    """Everything `truepose benchmark --host` tells, ready for JSON."""
    shape = shape or (QUICK if quick else FULL)
    device = comfy.model_management.get_torch_device()
    on_gpu = device.type == "cuda"
    repeats = repeats or (10 if on_gpu else 1)
    if not on_gpu:
        torch.set_num_threads(1)
    torch.manual_seed(0)
    model, parsing = make_model(shape), person(shape)
    latent = torch.randn(1, 4, shape.height, shape.wide)
    conditioning = [[torch.randn(1, 77, shape.context), {}]]

    def read() -> host_features.HostFeatures:
        return host_source.read_source(model, latent, parsing, conditioning)

    source = read()
    anew = host_source.read_source(model, latent, parsing, conditioning, levels=1, anew=True)

    def applied(
        omega: tuple[float, ...], keep: bool, source: host_features.HostFeatures = source, **more: object
    ) -> object:
        return host_patch.with_hpfa(model, host_applied.AppliedSource(source, omega, keep_unconditional=keep, **more))

    match = {"beta": 2.0, "target": parsing}
    models = {
        "plain": model,
        "all tokens": applied(ALL, True),
        "all tokens, source read at every step": applied(ALL, True, source=anew),
        "all tokens, negative row without": applied(ALL, False),
        "person": applied(PERSON, True),
        "person, source read at every step": applied(PERSON, True, source=anew),
        "person, negative row without": applied(PERSON, False),
        "person, negative row without, region match": applied(PERSON, False, **match),
    }
    clock = CudaClock(device) if on_gpu else CpuClock()
    bar = tqdm(desc=f"{shape.name} in ComfyUI", total=(repeats + 2) * (len(models) + 1), file=sys.stderr)
    found: dict[str, dict] = {}

    def look(name: str, call: Callable[[], object]) -> None:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            call()
        bar.update()
        found[name] = {"flops": counter.get_total_flops(), "peak_bytes": _peak(device, call), "readings": []}
        bar.update()

    def time(name: str, call: Callable[[], object]) -> None:
        found[name]["readings"].append(clock.seconds(call, 1))
        bar.update()

    for what, times in ((look, 1), (time, repeats)):
        _return_at_once(what is look)
        for _ in range(times):
            # In turn, so that a slow minute slows all of them.
            for name, patched in models.items():
                inside(patched, shape, partial(what, name))
            what(READING, read)
    bar.close()
    for values in found.values():
        values["seconds"] = median(values["readings"])
    plain = found["plain"]
    rows = []
    for name, values in found.items():
        more = None if values["peak_bytes"] is None else values["peak_bytes"] - plain["peak_bytes"]
        rows.append(
            {
                "what": name,
                "counted": values["flops"] / plain["flops"],
                "timed": values["seconds"] / plain["seconds"],
                "seconds": values["seconds"],
                "extra_peak_mb": None if more is None else more / 2**20,
            }
        )
    import comfyui_version

    return {
        "machine": {
            "comfyui": comfyui_version.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
            "device_type": device.type,
            "dtype": str(model.model.get_dtype()).removeprefix("torch."),
            "attention": host_call.host_attention.optimized_attention.__name__,
            "repeats": repeats,
        },
        "model": shape.name,
        "size": f"{shape.wide * 8}x{shape.height * 8}",
        "person": float((parsing.masks[:, 1:].sum(1) > 0.5).float().mean()),
        "source_mb": source.nbytes / 2**20,
        "source_dtype": str(next(iter(source.sites.values())).dtype).removeprefix("torch."),
        "steps": rows,
        "run_steps": STEPS,
        "run_poses": POSES,
        "runs": runs(found),
    }


def runs(found: dict[str, dict]) -> list[dict]:
    """A run of `STEPS` steps, and one with the same source for each of `POSES` poses, over as many plain steps: what is
    read before is read once for all of them."""
    plain, reading = found["plain"], found[READING]
    rows = []
    for tokens in ("all tokens", "person"):
        readings = {"once": 1, **{f"{n} noise levels": n for n in LEVELS}, "every step": 1}
        for how, passes in readings.items():
            step = found[f"{tokens}, source read at every step" if how == "every step" else tokens]
            row = {"tokens": tokens, "reading": how}
            for poses in (1, POSES):
                for key, what in (("counted", "flops"), ("timed", "seconds")):
                    total = passes * reading[what] + poses * STEPS * step[what]
                    row[f"{key}_{poses}"] = total / (poses * STEPS * plain[what])
            rows.append(row)
    return rows
