"""What `truepose benchmark --editors` counts and times (see run.py): forwards of editors with references.

Counted: real configurations in the host's own classes on the meta device, through the node's own patch, so that what
is counted is what runs. Timed: small networks of the same kinds, and their counts beside.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from statistics import mean, median
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras import nodes_flux
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from truepose_core.benchmark.timing import CpuClock, CudaClock
from truepose_core.mannequin import ready_poses, render, sample_identities
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

from ..references import KEY, GuidePatch, ReferenceGuide
from .steps import CPU_ATTENTION, _peak

SHARES = (1.0, 0.6, 0.4, 0.25)
COUNTS = (1, 2, 3)
TIMED = 0.4
STEPS = 20
"""Of a run, over which the host's reference cache saves."""
PERSON = (0.0, *(1.0,) * 6)
BETA = 2.0


@dataclass(frozen=True)
class Editor:
    """A configuration: the host's class, the network, the text's width, the latent's channels and cells along a side.

    text: tokens of the prompt; seen: tokens that the text encoder adds for each reference that it looks at. cached:
    whether the host's reference cache is meant for it.
    """

    name: str
    kind: str
    network: Mapping[str, Any] = field(repr=False)
    text: int
    width: int
    channels: int
    side: int
    seen: int = 0
    cached: bool = False

    @property
    def patch(self) -> int:
        """Cells along one side of a token."""
        return self.network.get("patch_size", 2)

    @property
    def frames(self) -> tuple[int, ...]:
        """The latent's axis of frames, for networks that have one."""
        return (1,) if self.kind == "QwenImage" else ()


FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 19,
    "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = {
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 15360,
    "hidden_size": 6144,
    "mlp_ratio": 3.0,
    "num_heads": 48,
    "depth": 8,
    "depth_single_blocks": 48,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": True,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
KLEIN = {
    **FLUX2,
    "context_in_dim": 12288,
    "hidden_size": 4096,
    "num_heads": 32,
    "depth_single_blocks": 24,
    "guidance_embed": False,
}
QWEN = {"in_channels": 64, "out_channels": 16, "num_layers": 60}
EDITORS = (
    Editor("FLUX.1 Kontext", "Flux", FLUX, 256, 4096, 16, 128),
    Editor("FLUX.2 dev", "Flux2", FLUX2, 512, 15360, 128, 64),
    Editor("FLUX.2 klein 9B", "Flux2", KLEIN, 512, 12288, 128, 64, cached=True),
    Editor("Qwen-Image-Edit Plus", "QwenImage", QWEN, 64, 3584, 16, 128, seen=196),
)
"""At 1024x1024, configured as the host does it for the published files, with texts as long as the host pads them.
Qwen's are not padded: a short prompt, and what its encoder makes of each reference at 384x384."""

_SMALL_FLUX = {
    **FLUX,
    "vec_in_dim": 64,
    "context_in_dim": 128,
    "hidden_size": 512,
    "num_heads": 4,
    "depth": 2,
    "depth_single_blocks": 4,
}
_SMALL_QWEN = {**QWEN, "num_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 128}
SMALL = (
    Editor("a small Flux", "Flux", _SMALL_FLUX, 64, 128, 16, 64),
    Editor("a small Qwen", "QwenImage", _SMALL_QWEN, 64, 128, 16, 64),
)
"""The same kinds with four heads and few blocks, at 512x512: a CPU runs them."""
WIDE = (
    Editor("six blocks of FLUX.1 Kontext", "Flux", {**FLUX, "depth": 2, "depth_single_blocks": 4}, 256, 4096, 16, 128),
    Editor("four blocks of Qwen-Image-Edit", "QwenImage", {**QWEN, "num_layers": 4}, 512, 3584, 16, 128),
)
"""Blocks of the true width, at 1024x1024, for a GPU."""


def known_to_host(editor: Editor) -> bool:
    """Whether this version of the host has the class."""
    return hasattr(comfy.supported_models, editor.kind)


def make_model(editor: Editor, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """The host's model, with random weights unless it is on the meta device."""
    network = {**editor.network, "dtype": dtype}
    if editor.kind.startswith("Flux"):
        # Older hosts know fewer settings, all of which are at their defaults for the networks that they know.
        names = comfy.ldm.flux.model.FluxParams.__dataclass_fields__
        network = {k: v for k, v in network.items() if k in names or k == "dtype"}
    config = getattr(comfy.supported_models, editor.kind)(network)
    config.unet_config = dict(network)
    model = config.get_model({}, "", device=device).eval()
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(0)
        for parameter in model.diffusion_model.parameters():
            spread = 1.0 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            noise = torch.empty(parameter.shape, device=device).uniform_(-1, 1, generator=generator)
            parameter.data.copy_(noise * spread)
    return model


def person(editor: Editor, share: float) -> HumanParsing:
    """A parsing whose person is that share of the tokens, in whole tokens."""
    side = editor.side // editor.patch
    count = round(share * side * side)
    labels = (torch.arange(side * side).reshape(1, side, side) < count).long() * int(Region.UPPER)
    return HumanParsing.from_labels(labels)


@lru_cache(1)
def filled() -> float:
    """How much of the box around a person the person fills: the mean over the ready poses of the mannequin."""
    shares = []
    identity = sample_identities([5], 1)
    for pose in ready_poses().values():
        rows, columns = (render(identity, pose, 192, 144, supersample=1).parsing[0].argmax(0) > 0).nonzero().unbind(1)
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        shares.append(len(rows) / int(box))
    return mean(shares)


@dataclass(frozen=True)
class Forward:
    """One forward of a model, for one row."""

    editor: Editor
    model: torch.nn.Module
    device: torch.device
    dtype: torch.dtype

    def run(
        self, sides: list[tuple[int, int]], guides: tuple[ReferenceGuide, ...] = (), patches: dict | None = None
    ) -> Tensor:
        """A forward with references of these (rows, columns) of cells. patches: as in the transformer options."""
        editor = self.editor

        def rand(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)

        options: dict = {"cond_or_uncond": [0], "patches": dict(patches or {})}
        if self.device.type == "meta":
            # Other kernels of the host ask the device for its memory.
            options["optimized_attention_override"] = _pytorch
        if guides:
            options["wrappers"] = {WrappersMP.APPLY_MODEL: {KEY: [GuidePatch(guides).on_model_call]}}
        conditions: dict = {}
        if editor.network.get("vec_in_dim"):
            conditions["y"] = rand(1, editor.network["vec_in_dim"])
        if editor.network.get("guidance_embed"):
            conditions["guidance"] = rand(1)
        if sides:
            conditions["ref_latents"] = [rand(1, editor.channels, *editor.frames, *side) for side in sides]
        if patches:
            conditions["ref_latents_method"] = "index_timestep_zero"
        x = rand(1, editor.channels, *editor.frames, editor.side, editor.side)
        sigma = torch.full((1,), 0.5, device=self.device)
        context = rand(1, editor.text + editor.seen * len(sides), editor.width)
        with torch.no_grad():
            return self.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options, **conditions)

    def guides(self, count: int, share: float, match: bool) -> tuple[ReferenceGuide, ...]:
        """The person alone of each reference, or all of it; match: region match as well."""
        parsing = person(self.editor, share)
        more = {"beta": BETA, "target": parsing} if match else {}
        return tuple(ReferenceGuide(i, parsing, PERSON, **more) for i in range(1, count + 1))


def _pytorch(func: Callable, *args: object, **more: object) -> Tensor:
    return host_attention.attention_pytorch(*args, **more)


def counted(call: Callable[[], Any]) -> int:
    """FLOPs of the call."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Counter:
    """Counts forwards of a configuration on the meta device. Every block of a kind costs the same, so networks of one
    and two blocks of each kind say what one of any depth costs, exactly."""

    editor: Editor
    parts: tuple[tuple[int, Forward], ...]

    @classmethod
    def of(cls, editor: Editor) -> Counter:
        """The networks, and how often each is added."""
        depths = [name for name in ("depth", "depth_single_blocks", "num_layers") if name in editor.network]
        ones = dict.fromkeys(depths, 1)
        extra = {name: editor.network[name] - 1 for name in depths}
        shapes = [(1 - sum(extra.values()), ones), *((extra[name], {**ones, name: 2}) for name in depths)]
        meta, dtype = torch.device("meta"), torch.bfloat16
        parts = []
        for times, depth in shapes:
            small = replace(editor, network={**editor.network, **depth})
            parts.append((times, Forward(small, make_model(small, meta, dtype), meta, dtype)))
        return cls(editor, tuple(parts))

    def flops(self, call: Callable[[Forward], Any]) -> int:
        """FLOPs of what a call does with a forward."""
        return sum(times * counted(partial(call, forward)) for times, forward in self.parts)


def count(editor: Editor, tick: Callable[[], Any]) -> list[dict[str, Any]]:
    """A row for each number of references and each share."""
    counter, fill = Counter.of(editor), filled()
    whole = (editor.side, editor.side)
    rows = []
    for references in COUNTS:
        sides = [whole] * references
        plain = counter.flops(lambda forward, sides=sides: forward.run(sides))
        for share in SHARES:
            box = min(1.0, share / fill)
            # As wide as before and lower: only how many tokens there are counts.
            cropped = [(max(1, round(box * editor.side / editor.patch)) * editor.patch, editor.side)] * references

            def kept(forward: Forward, match: bool, sides: list = sides, share: float = share) -> None:
                forward.run(sides, forward.guides(len(sides), share, match))

            found = {
                "kept": counter.flops(partial(kept, match=False)),
                "match": counter.flops(partial(kept, match=True)),
                "cropped": counter.flops(lambda forward, cropped=cropped: forward.run(cropped)),
            }
            row = {"model": editor.name, "references": references, "tokens": share, "box": box}
            row |= {key: value / plain for key, value in found.items()}
            row |= {"cache": None, "cache_kept": None}
            if editor.cached and hasattr(nodes_flux, "FluxKVCache"):
                row |= {key: value / plain for key, value in _cache(counter, sides, share).items()}
            rows.append(row)
            tick()
    return rows


def _cache(counter: Counter, sides: list[tuple[int, int]], share: float) -> dict[str, float]:
    """The host's reference cache, alone and with the guide: the mean over a run, whose first step fills it."""

    def steps(forward: Forward, guided: bool, later: int) -> None:
        holder = _Patches(forward.model)
        nodes_flux.FluxKVCache.execute(holder)
        guides = forward.guides(len(sides), share, False) if guided else ()
        for _ in range(1 + later):
            forward.run(sides, guides, holder.patches)

    found = {}
    for key, guided in (("cache", False), ("cache_kept", True)):
        first, both = (counter.flops(partial(steps, guided=guided, later=later)) for later in (0, 1))
        found[key] = (first + (STEPS - 1) * (both - first)) / STEPS
    return found


class _Patches:
    """What of a MODEL the host's cache node uses: it takes patches, and hands them on."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.patches = model, {}

    def clone(self) -> _Patches:
        return self

    def set_model_attn1_patch(self, patch: object) -> None:
        self.patches.setdefault("attn1_patch", []).append(patch)

    def set_model_post_input_patch(self, patch: object) -> None:
        self.patches.setdefault("post_input", []).append(patch)

    def add_object_patch(self, name: str, value: object) -> None:
        """The method of positions, which is given with the conditions here."""


def time(editor: Editor, device: torch.device, repeats: int, tick: Callable[[], Any]) -> list[dict[str, Any]]:
    """Seconds of a forward beside that with all tokens of the references, and counts of the same network."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    forward = Forward(editor, make_model(editor, device, dtype), device, dtype)
    clock = CudaClock(device) if on_gpu else CpuClock()
    whole = (editor.side, editor.side)
    rows = []
    for references in COUNTS[:2]:
        sides = [whole] * references
        works = {"all": partial(forward.run, sides)}
        works["kept"] = partial(forward.run, sides, forward.guides(references, TIMED, False))
        works["match"] = partial(forward.run, sides, forward.guides(references, TIMED, True))
        readings: dict[str, list[float]] = {key: [] for key in works}
        for work in works.values():
            work()
        for _ in range(repeats):
            # In turn, so that a slow minute slows all of them.
            for key, work in works.items():
                readings[key].append(clock.seconds(work, 1))
                tick()
        seconds = {key: median(values) for key, values in readings.items()}
        flops = {key: counted(work) for key, work in works.items()}
        for key in ("kept", "match"):
            peaks = [_peak(device, works[k]) for k in ("all", key)] if on_gpu else [None, None]
            rows.append(
                {
                    "model": editor.name,
                    "references": references,
                    "tokens": TIMED,
                    "what": key,
                    "counted": flops[key] / flops["all"],
                    "timed": seconds[key] / seconds["all"],
                    "seconds": seconds[key],
                    "saved_peak_mb": None if peaks[0] is None else (peaks[0] - peaks[1]) / 2**20,
                }
            )
    return rows


def measure(quick: bool, repeats: int | None) -> dict[str, Any]:
    """Everything `truepose benchmark --editors` tells, ready for JSON."""
    device = comfy.model_management.get_torch_device()
    on_gpu = device.type == "cuda"
    repeats = repeats or (10 if on_gpu else 1 if quick else 3)
    if not on_gpu:
        torch.set_num_threads(1)
    editors = [editor for editor in EDITORS if known_to_host(editor)]
    if quick:
        editors = editors[:1]
    small = WIDE if on_gpu else SMALL
    total = len(editors) * len(COUNTS) * len(SHARES) + len(small) * 2 * 3 * repeats
    bar = tqdm(desc="editors in ComfyUI", total=total, file=sys.stderr)
    rows = [row for editor in editors for row in count(editor, bar.update)]
    times = [row for editor in small for row in time(editor, device, repeats, bar.update)]
    bar.close()
    import comfyui_version

    return {
        "machine": {
            "comfyui": comfyui_version.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
            "device_type": device.type,
            "attention": host_attention.optimized_attention.__name__,
            "repeats": repeats,
        },
        "size": "1024x1024",
        "steps": STEPS,
        "fill": filled(),
        "counted": rows,
        "timed": times,
    }
