"""Pose encoders: pictures that tell the target pose in, what is added after TargetNet's conv_in out. Plain torch, the
same for diffusers and ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.errors import TruePoseError
from truepose_core.models.config import SKELETON, Behaviour

HEADS = 8
"""Of champ's attention."""


class PoseEncoder(nn.Module):
    """Picture [B, 3, H, W] in [0, 1] -> [B, width, H/8, W/8] with four widths: ControlNet's conditioning embedding
    (arXiv 2302.05543), under the names that diffusers gives its layers. Starts at zero.

    attention: one transformer block before the last layer, as champ has (arXiv 2403.14781).
    """

    def __init__(self, width: int, widths: tuple[int, ...], attention: bool = False):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in pairwise(widths):
            self.blocks.append(nn.Conv2d(a, a, 3, padding=1))
            self.blocks.append(nn.Conv2d(a, b, 3, padding=1, stride=2))
        self.attention = MapAttention(widths[-1]) if attention else None
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def forward(self, picture: Tensor) -> Tensor:
        x = silu(self.conv_in(picture))
        for block in self.blocks:
            x = silu(block(x))
        if self.attention is not None:
            x = self.attention(x)
        return self.conv_out(x)


class MapAttention(nn.Module):
    """A transformer block over the cells of a map [B, C, h, w], without cross-attention; C is a multiple of 32."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.norm1, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.ff_in, self.ff_out = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, picture: Tensor) -> Tensor:
        height, width = picture.shape[-2:]
        x = self.proj_in(self.norm(picture)).flatten(2).mT
        n = self.norm1(x)
        q, k, v = (split_heads(f(n), HEADS) for f in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(merge_heads(scaled_dot_product_attention(q, k, v)))
        value, gate = self.ff_in(self.norm3(x)).chunk(2, -1)
        x = x + self.ff_out(value * gelu(gate))
        return picture + self.proj_out(x.mT.unflatten(2, (height, width)))


def make_pose_encoder(width: int, widths: tuple[int, ...], behaviour: Behaviour) -> nn.Module | None:
    """The encoder of the only pose map, a ModuleDict of one for each, or None for a model without."""
    encoders = {name: PoseEncoder(width, widths, behaviour.pose_attention) for name in behaviour.pose_maps}
    if not encoders:
        return None
    return encoders[SKELETON] if set(encoders) == {SKELETON} else nn.ModuleDict(encoders)


def encode_maps(encoder: nn.Module, maps: Mapping[str, Tensor]) -> Tensor:
    """The sum of what the encoders give for these maps [B, 3, H, W]. Raises TruePoseError for a map that has none."""
    known = dict(encoder.items()) if isinstance(encoder, nn.ModuleDict) else {SKELETON: encoder}
    unknown = sorted(set(maps) - set(known))
    if unknown or not maps:
        raise TruePoseError(
            f"this model reads the pose maps {', '.join(known)}, of which at least one is needed; "
            f"given are {', '.join(maps) or 'none'}"
        )
    return torch.stack([known[name](picture) for name, picture in maps.items()]).sum(0)
