"""The UNets that are measured, their attention sites, and random inputs of those shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from truepose_core.attention.caa import RegionTokens
from truepose_core.attention.hpfa import SourceTokens
from truepose_core.regions import N_REGIONS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

SHARES = (1.0, 0.4, 0.25)
"""How much of the source's tokens HPFA reads."""

CHANNELS = (0, 8, 16)
"""Spare channels: none (all kept weights 1, beta 0), region match, region and body match."""

BETA, GAMMA = 2.0, 16.0
"""Any values but 0: they decide whether channels are needed, not how long attention takes."""

PER_REGION = 4
"""CAA's tokens per region, the default of `CAAConfig`."""


@dataclass(frozen=True)
class Net:
    """A UNet and the size it works at. unet: arguments of UNet2DConditionModel. latent: (h, w). context: text tokens.

    size: width x height of the picture, for people to read.
    """

    model: str
    size: str
    unet: Mapping[str, Any] = field(repr=False)
    latent: tuple[int, int]
    context: int = 77


@dataclass(frozen=True)
class Site:
    """`count` self-attentions of one shape: N target tokens, H heads of width D."""

    tokens: int
    heads: int
    width: int
    count: int

    @property
    def inner(self) -> int:
        return self.heads * self.width

    def kept(self, share: float) -> int:
        """How many of the source's tokens are read: as many as the target has, times the share, rounded."""
        return max(1, round(share * self.tokens))


NETS = (
    Net(
        "sd15",
        "512x768",
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        (96, 64),
    ),
    Net(
        "sdxl",
        "1024x768",
        {
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (96, 128),
    ),
)
"""Stable Diffusion 1.5 and SDXL base, as in the config.json of their unet folders; sizes are width x height."""


def build(net: Net) -> UNet2DConditionModel:
    """The UNet without memory for its weights, on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**net.unet).eval()


def materialise(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Give a module of the meta device random weights, of a size that keeps activations finite."""
    # diffusers' own `to` warns about mixed precision, which is none here.
    module = nn.Module.to(module, dtype).to_empty(device=device)
    with torch.no_grad():
        for name, x in module.named_parameters():
            if x.ndim > 1:
                nn.init.normal_(x, std=x[0].numel() ** -0.5)
            else:
                nn.init.constant_(x, 1.0 if name.endswith("weight") else 0.0)
    return module.eval()


def step_inputs(net: Net, unet: UNet2DConditionModel, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of one call of the UNet, for one picture."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    inputs: dict[str, Any] = {
        "sample": rand(1, unet.config.in_channels, *net.latent),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": rand(1, net.context, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": rand(1, pooled), "time_ids": rand(1, 6)}
    return inputs


@dataclass(frozen=True)
class AttentionInputs:
    """What `hpfa_attention` and `hpfa_attention_masked` take: f(q, k, v, source, **terms)."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: SourceTokens
    terms: dict[str, Any]


def source_tokens(site: Site, kept: int, channels: int, device: torch.device | str, dtype: torch.dtype) -> SourceTokens:
    """Random K, V and rows of `kept` source tokens, with just what those spare channels need."""

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, dtype=dtype)

    return SourceTokens(
        rand(1, site.heads, kept, site.width),
        rand(1, site.heads, kept, site.width),
        regions=rand(1, kept, N_REGIONS) if channels >= 8 else None,
        log_w=-rand(1, kept) if channels >= 8 else None,
        body=rand(1, kept, 3) if channels >= 16 else None,
    )


def attention_inputs(
    site: Site, kept: int, channels: int, device: torch.device | str, dtype: torch.dtype
) -> AttentionInputs:
    """Random inputs for one attention call, for one picture."""
    q, k, v = (torch.randn(1, site.heads, site.tokens, site.width, device=device, dtype=dtype) for _ in range(3))
    terms: dict[str, Any] = {}
    if channels >= 8:
        terms |= {
            "target_regions": torch.rand(1, site.tokens, N_REGIONS, device=device, dtype=dtype),
            "beta": BETA,
        }
    if channels >= 16:
        terms |= {"target_body": torch.rand(1, site.tokens, 3, device=device, dtype=dtype), "gamma": GAMMA}
    return AttentionInputs(q, k, v, source_tokens(site, kept, channels, device, dtype), terms)


def region_tokens(width: int, device: torch.device | str, dtype: torch.dtype) -> RegionTokens:
    """CAA's tokens of one source that shows every region."""
    count = N_REGIONS * PER_REGION
    tokens = torch.randn(1, count, width, device=device, dtype=dtype)
    return RegionTokens(tokens, torch.ones(1, count, device=device, dtype=torch.bool))
