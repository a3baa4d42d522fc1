"""CAA: CLIP-guided attention alignment.

A CLIP vision tower reads the source person without its background. A resampler turns its patch tokens into a few
tokens per region, E [B, 7 n, c]; both nets read E through a decoupled cross-attention,

    x + CrossAttn(x, context) + lambda CrossAttn(x, E),

and the probability that target position i puts on region r's tokens is its region row P(i), which HPFA uses. The
logit of position i and token j of region r is s <q_i, k_j> + kappa P0(i, r), where P0 is what is known beforehand
(the skeleton prior). P comes out of the same attention call as seven more value columns; no map is materialised.

The equations are ours, after the description of CLIP-guided attention alignment in TruePose (arXiv 2502.03426). The
resampler is the Perceiver of IP-Adapter Plus (arXiv 2308.06721) with queries per region.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot, pad, scaled_dot_product_attention

from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import SHUT
from truepose_core.regions import N_REGIONS

BACKGROUND = 0


@dataclass(frozen=True)
class RegionTokens:
    """tokens: [B, 7 n, c], region by region. shown: [B, 7 n] bool, False where the source does not show the region
    (such tokens are zero and no query reads them). The background's tokens are always shown: a target position
    must be able to say that it is background."""

    tokens: Tensor
    shown: Tensor

    @property
    def regions(self) -> Tensor:
        """[7 n, 7] one-hot: the region of each token."""
        n = self.tokens.shape[1] // N_REGIONS
        index = torch.arange(N_REGIONS, device=self.tokens.device).repeat_interleave(n)
        return one_hot(index, N_REGIONS).to(self.tokens)

    def rows(self, keep: Tensor) -> RegionTokens:
        """The same tokens; rows with keep [B] == False say nothing of the source (zeros, background alone open)."""
        n = self.tokens.shape[1] // N_REGIONS
        shown = self.shown & keep[:, None]
        tokens = self.tokens * shown[..., None].to(self.tokens)
        background = torch.arange(self.tokens.shape[1], device=shown.device) < n
        return RegionTokens(tokens, shown | background)

    def repeat(self, times: int) -> RegionTokens:
        return RegionTokens(self.tokens.repeat_interleave(times, 0), self.shown.repeat_interleave(times, 0))


def caa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_regions: Tensor,
    shown: Tensor,
    *,
    prior: Tensor | None = None,
    kappa: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-attention to the region tokens: (out [B, H, N, D], alignment P [B, N, 7], rows sum to 1).

    q: [B, H, N, D]; k, v: [B, H, T, D]; token_regions: [T, 7] one-hot; shown: [B, T] bool, at least one True per
    row; prior P0: [B, N, 7] or None; kappa: number or [H], >= 0. P is averaged over heads.
    """
    b, h, n, d = q.shape
    s = d**-0.5
    shut = torch.where(shown, 0.0, SHUT).to(q)
    hot = token_regions.to(q)
    kappa = torch.as_tensor(kappa, dtype=q.dtype, device=q.device).reshape(1, -1, 1, 1)
    known = kappa * prior.to(q)[:, None] if prior is not None else q.new_zeros((1, 1, n, N_REGIONS))
    known = known.expand(b, h, -1, -1)
    query = torch.cat([q, known / s, q.new_full((b, h, n, 1), 1 / s)], -1)
    key = torch.cat([k, hot.expand(b, h, -1, -1), shut[:, None, :, None].expand(b, h, -1, 1)], -1)
    value = pad(torch.cat([v, hot.expand(b, h, -1, -1)], -1), (0, 1))
    out = scaled_dot_product_attention(query, key, value, scale=s)
    return out[..., :d], out[..., d : d + N_REGIONS].mean(1)


class CAASite(nn.Module):
    """The decoupled cross-attention of one attn2: its own K and V projections of E, lambda and kappa."""

    def __init__(self, context: int, inner: int, heads: int, scale: float = 0.0, kappa: float = 4.0):
        super().__init__()
        self.to_k = nn.Linear(context, inner, bias=False)
        self.to_v = nn.Linear(context, inner, bias=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.kappa = nn.Parameter(torch.full((heads,), float(kappa)))

    def forward(self, q: Tensor, region_tokens: RegionTokens, prior: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [B, H, N, D] -> (out [B, H, N, D], P [B, N, 7]); `scale` is left to the caller."""
        tokens = region_tokens.tokens.to(q)
        k, v = (split_heads(f(tokens), q.shape[1]) for f in (self.to_k, self.to_v))
        return caa_attention(q, k, v, region_tokens.regions, region_tokens.shown, prior=prior, kappa=self.kappa.to(q))


class PerceiverAttention(nn.Module):
    """Learned queries read patch tokens and each other (IP-Adapter Plus, arXiv 2308.06721)."""

    def __init__(self, dim: int, dim_head: int, heads: int):
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor, bias: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([x, latents], 1)).chunk(2, -1)
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None].to(q))
        return self.to_out(merge_heads(out))


class PerceiverLayer(nn.Module):
    def __init__(self, dim: int, dim_head: int, heads: int, mult: int = 4):
        super().__init__()
        self.attention = PerceiverAttention(dim, dim_head, heads)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, mult * dim, bias=False)
        self.down = nn.Linear(mult * dim, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor, bias: Tensor) -> Tensor:
        latents = latents + self.attention(x, latents, bias)
        return latents + self.down(gelu(self.up(self.norm(latents))))


def region_bias(rows: Tensor, per_region: int, leak: float = 0.0) -> Tensor:
    """Bias [B, R n, P + R n] of a resampler's logits: log(leak + R(j, r)) between a query of region r and patch j, and
    queries see each other within their own region only, so one region's tokens say nothing of another's.

    rows: [B, P, R]; n = per_region.
    """
    bias = (rows + leak).log().clamp(min=SHUT).mT.repeat_interleave(per_region, 1)
    region = torch.arange(rows.shape[2], device=rows.device).repeat_interleave(per_region)
    own_queries = torch.where(region[:, None] == region[None], 0.0, SHUT).to(bias)
    return torch.cat([bias, own_queries.expand(rows.shape[0], -1, -1)], -1)


def shown_regions(rows: Tensor) -> Tensor:
    """Which regions a picture shows, [B, 7] bool: those with more than a fiftieth of an even share of the patches."""
    return rows.sum(1) > 0.02 * rows.shape[1] / N_REGIONS


class RegionResampler(nn.Module):
    """Patch tokens [B, P, c_in] and their region rows [B, P, 7] -> RegionTokens [B, 7 n, c_out].

    The logit of a query of region r and patch j gets log(leak + R(j, r)): a query reads mainly its own region.
    The background's queries read the whole picture.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        dim: int = 64,
        per_region: int = 4,
        depth: int = 1,
        heads: int = 4,
        leak: float = 1e-3,
    ):
        super().__init__()
        self.per_region, self.leak = per_region, leak
        self.latents = nn.Parameter(torch.randn(N_REGIONS * per_region, dim) * dim**-0.5)
        self.proj_in = nn.Linear(dim_in, dim)
        self.layers = nn.ModuleList(PerceiverLayer(dim, dim // heads, heads) for _ in range(depth))
        self.proj_out = nn.Linear(dim, dim_out)
        self.norm_out = nn.LayerNorm(dim_out)

    def forward(self, patches: Tensor, rows: Tensor) -> RegionTokens:
        own = torch.cat([torch.ones_like(rows[..., :1]), rows[..., 1:]], -1)
        bias = region_bias(own, self.per_region, self.leak)
        x = self.proj_in(patches)
        latents = self.latents.expand(patches.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(x, latents, bias)
        tokens = self.norm_out(self.proj_out(latents))
        shown = shown_regions(rows)
        shown = torch.cat([torch.ones_like(shown[:, :1]), shown[:, 1:]], 1).repeat_interleave(self.per_region, 1)
        return RegionTokens(tokens * shown[..., None].to(tokens), shown)
