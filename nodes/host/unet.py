"""The host's UNet: its blocks and their names, what a call carries in its options, and noise levels."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache

import comfy.ldm.modules.attention as host_attention
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor

from truepose_core.errors import TruePoseError

GUIDANCE = "truepose_guidance"
NOTHING, POSE_ONLY = "nothing", "pose"
"""What a call of the guider may see; without a word it sees all."""
PARTS = {
    "all": ("input", "middle", "output"),
    "encoder": ("input",),
    "middle": ("middle",),
    "decoder": ("output",),
    "middle and decoder": ("middle", "output"),
}
"""Choice of blocks -> the host's parts of a UNet."""
BLOCKS = tuple(PARTS)
Block = tuple[str, int, int]

log = logging.getLogger("truepose")


@lru_cache(maxsize=256)
def say_once(message: str) -> None:
    """Log a warning the first time it is said; sampling would repeat it at every block and step."""
    log.warning(message)


# ---------------------------------------------------------------------------------------------- what a model is


def site_name(block: Block) -> str:
    """("input", 1, 0) -> "input.1.0"."""
    return ".".join(str(part) for part in block)


def place_name(block: tuple[str, int]) -> str:
    """("output", 1) -> "output.1"."""
    return f"{block[0]}.{block[1]}"


def transformer_blocks(unet: UNetModel) -> dict[str, tuple[Block, torch.nn.Module]]:
    """Site name -> (the host's block, its module) of blocks with self-attention, in the order of the forward pass."""
    found: dict[str, tuple[Block, torch.nn.Module]] = {}
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for part, layers in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, layer in enumerate(layers):
            for module in layer:
                if not isinstance(module, host_attention.SpatialTransformer):
                    continue
                for index, block in enumerate(module.transformer_blocks):
                    if not block.disable_self_attn:
                        at = (part, number, index)
                        found[site_name(at)] = (at, block)
    return found


def self_attentions(unet: UNetModel) -> dict[str, tuple[Block, torch.nn.Module]]:
    """Site name -> (the host's block, its attn1)."""
    return {site: (at, block.attn1) for site, (at, block) in transformer_blocks(unet).items()}


def style_places(unet: UNetModel) -> frozenset[tuple[str, int]]:
    """Where style is read and put: behind the last sixth of the input blocks, the middle, and the first third of the
    output blocks (as "reference only" weighs them). ("output", n) is in front of that block."""
    inputs, outputs = len(unet.input_blocks), len(unet.output_blocks)
    behind = {("input", n) for n in range(inputs - inputs // 6, inputs)}
    return frozenset(behind | {("output", n) for n in range(outputs // 3 + 1)})


def unet_of(model: object, what: str) -> UNetModel:
    """The UNet of a MODEL. Raises for a model of another kind, saying which node input is meant by `what`."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise TruePoseError(
            f"{what} is a {type(unet).__name__} ({type(model.model.model_config).__name__}), not a UNet; "
            "HPFA needs a UNet with self-attention: use an SD1.5, SD2.x or SDXL checkpoint"
        )
    if any(isinstance(m, host_attention.SpatialVideoTransformer) for m in unet.modules()):
        raise TruePoseError(f"{what} is a video UNet; use an SD1.5, SD2.x or SDXL checkpoint")
    if not self_attentions(unet):
        raise TruePoseError(f"{what} has no self-attention to read or to patch; use an SD1.5, SD2.x or SDXL model")
    return unet


def family_of(model: object) -> str:
    """Which models can share sources: "sd15", "sd21", "sdxl", a TruePose model's own, or the configuration's name."""
    config = model.model.model_config
    # Asked through vars: the host's configurations warn about every name that they do not have.
    own = vars(config).get("truepose_family")
    if own is not None:
        return own
    widths = {768: "sd15", 1024: "sd21", 2048: "sdxl", 1280: "sdxl-refiner"}
    return widths.get(config.unet_config.get("context_dim"), type(config).__name__.lower())


def cell_size(vae: object) -> int:
    """Pixels along one side of a latent cell of this VAE."""
    return int(vae.spacial_compression_encode())


def in_window(window: tuple[float, float] | None, sigma: Tensor | None) -> bool:
    """Whether a noise level is in (highest, lowest). Without a window it is not read: that would wait for the GPU."""
    if window is None or sigma is None:
        return True
    return window[0] >= float(sigma.flatten()[0]) >= window[1]


def is_on(strength: float | Tensor) -> bool:
    """Whether a strength of match (a number or [H]) is above 0 anywhere."""
    return bool((strength > 0).any()) if isinstance(strength, Tensor) else strength > 0


def sigma_window(model: object, start: float, end: float) -> tuple[float, float] | None:
    """(highest, lowest) sigma of a range of the sampling, given as fractions 0..1; None for all of it. Raises
    TruePoseError for a start after the end."""
    if start > end:
        raise TruePoseError(f"start_percent {start:g} is after end_percent {end:g}; expected start <= end")
    if start <= 0 and end >= 1:
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


def with_patches(options: Mapping, more: Mapping[str, list]) -> dict[str, list]:
    """New lists of patches: those in the options, and ours behind them."""
    patches = dict(options.get("patches", {}))
    for name, ours in more.items():
        patches[name] = [*patches.get(name, []), *ours]
    return patches
