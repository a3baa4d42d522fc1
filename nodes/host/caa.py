"""CAA inside the host's blocks: a second cross-attention beside attn2, to the region tokens of a source person.

`CrossTokens` are the region tokens at one site. call.py puts them into a call of the UNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truepose_core.attention.caa import caa_attention
from truepose_core.attention.heads import merge_heads, split_heads

SELF_INPUT, CROSS_INPUT = "truepose_self_input", "truepose_cross_input"
"""Where a block's patches leave its attentions' inputs for each other, in the options of that block alone."""


@dataclass(frozen=True, eq=False)
class CrossTokens:
    """CAA's region tokens at one site: k, v [S, H, T, D], regions [T, 7] one-hot, shown [S, T], kappa [H], scale []."""

    k: Tensor
    v: Tensor
    regions: Tensor
    shown: Tensor
    kappa: Tensor
    scale: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> CrossTokens:
        """The same on a device; which tokens are shown stays a mask."""
        k, v, regions, kappa, scale = (
            x.to(device=device, dtype=dtype) for x in (self.k, self.v, self.regions, self.kappa, self.scale)
        )
        return CrossTokens(k, v, regions, self.shown.to(device), kappa, scale)

    def rows(self, index: Tensor) -> CrossTokens:
        """Sources chosen or repeated by index [B]."""
        return CrossTokens(self.k[index], self.v[index], self.regions, self.shown[index], self.kappa, self.scale)

    def weighed(self, omega: Sequence[float], strength: float, kappa: float | None = None) -> CrossTokens:
        """The same tokens, each region's values times its weight (7 numbers), and all of it times strength.

        Only values are weighed: a place that looks at a region of weight 0 gets nothing, and never another region in
        its stead. kappa: region match for every head, or None to leave it.
        """
        weight = self.regions @ self.v.new_tensor(omega)
        match = self.kappa if kappa is None else torch.full_like(self.kappa, kappa)
        return replace(self, v=self.v * weight[:, None], kappa=match, scale=self.scale * strength)

    @property
    def batch(self) -> int:
        return self.k.shape[0]

    @property
    def numel(self) -> int:
        return self.k.numel() + self.v.numel()


def keep_self_input(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An attn1 patch: leave the self-attention's input for CAA's alignment, which asks with attn2's queries."""
    extra[SELF_INPUT] = n
    return n, context, value


def keep_cross_input(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
    """An attn2 patch: leave the cross-attention's input for the second cross-attention, beside it."""
    extra[CROSS_INPUT] = n
    return n, context, value


def beside_attention(attn2: torch.nn.Module, x: Tensor, cross: CrossTokens, prior: Tensor | None) -> Tensor:
    """lambda CrossAttn(x, E) as it leaves the block's to_out: the output projection is linear, so what another node
    puts in attn2's place stays and this is added to it. x: [B, N, C]; cross: B rows; prior: [B, N, 7] or None."""
    q = split_heads(attn2.to_q(x), attn2.heads)
    out, _ = caa_attention(q, cross.k, cross.v, cross.regions, cross.shown, prior=prior, kappa=cross.kappa)
    out = cross.scale * merge_heads(out)
    # Without the bias, which the block's own output has already.
    return attn2.to_out(out) - attn2.to_out(torch.zeros_like(out[:1, :1]))
