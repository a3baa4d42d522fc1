"""HPFA and CAA inside diffusers' UNet2DConditionModel, as attention processors.

Processors hold no state of a run. What a forward pass needs travels in its `cross_attention_kwargs` as one
`SourcePass` or `TargetPass`, so several threads may use one model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.alignment.control3d import Control3DSite, ControlTokens
from truepose_core.attention.caa import CAASite, RegionTokens
from truepose_core.attention.fusion import fuse, is_off, keep_tokens, spread, target_regions
from truepose_core.attention.heads import merge_heads, split_heads
from truepose_core.attention.hpfa import SHUT, SourceTokens, match_channels
from truepose_core.source.features import SourceFeatures, grid_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


class HPFASite(nn.Module):
    """Learned beta, gamma [H] and region log weights [H, 7] of one self-attention site.

    beta and gamma are kept as they are and clamped at 0 where used.
    """

    def __init__(self, heads: int, beta: float = 0.0, gamma: float = 0.0):
        super().__init__()
        self.beta = nn.Parameter(torch.full((heads,), float(beta)))
        # Heads start at different reaches on the body, from a quarter of gamma to four times it.
        reach = torch.logspace(-1, 1, heads, base=4.0) if heads > 1 else torch.ones(1)
        self.gamma = nn.Parameter(gamma * reach)
        self.region_log_weight = nn.Parameter(torch.zeros(heads, 7))


@dataclass
class SourcePass:
    """A forward pass of SourceNet: `sites` fills with the input [B, M, C] of every self-attention, `style` with the
    moments at every place that `styling` looks at."""

    latent_size: tuple[int, int]
    caa: RegionTokens | None = None
    sites: dict[str, Tensor] = field(default_factory=dict)
    style: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class TargetPass:
    """A forward pass of TargetNet.

    source: what HPFA reads, or None. omega: region weights [7] in [0, 1], or None for all ones. keep: [B] bool, rows
    that see the source at all (None: all of them). beta, gamma >= 0: one value for every head, or None for what the
    model learned (0 where it learned none). strength in [0, 1]: a factor on every w(j).
    prior: token count -> P [B, N, 7]; given: it is the user's parsing, which CAA must not replace. body: token count ->
    the target's body coordinates [B, N, 3]. caa: the source's region tokens. kv: K and V of the source per site, kept
    between passes whose weights do not change. alignments: site -> CAA's P [B, N, 7], filled when not None.
    control: tokens of the 3D guidance, or None. style: in [0, 1], how far the picture's moments become the source's.
    """

    latent_size: tuple[int, int]
    source: SourceFeatures | None = None
    omega: Tensor | None = None
    keep: Tensor | None = None
    beta: float | None = None
    gamma: float | None = None
    strength: float = 1.0
    prior: dict[int, Tensor] = field(default_factory=dict)
    given: bool = False
    body: dict[int, Tensor] = field(default_factory=dict)
    caa: RegionTokens | None = None
    kv: dict[str, SourceTokens | None] | None = None
    alignments: dict[str, Tensor] | None = None
    control: ControlTokens | None = None
    style: float = 0.0


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, heads_at_once: int | None) -> Tensor:
    if heads_at_once is None or heads_at_once >= q.shape[1]:
        return scaled_dot_product_attention(q, k, v, scale=scale)
    parts = zip(*(x.split(heads_at_once, 1) for x in (q, k, v)), strict=True)
    return torch.cat([scaled_dot_product_attention(a, b, c, scale=scale) for a, b, c in parts], 1)


class SelfAttention:
    """attn1 of one block: records the source, or reads it."""

    def __init__(self, site: str, hpfa: HPFASite | None, caa: CAASite | None, attn2: Attention | None):
        self.site, self.hpfa, self.caa, self.attn2 = site, hpfa, caa, attn2
        self.heads_at_once: int | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        truepose: SourcePass | TargetPass | None = None,
    ) -> Tensor:
        x = hidden_states
        q, k, v = (split_heads(f(x), attn.heads) for f in (attn.to_q, attn.to_k, attn.to_v))
        d = q.shape[-1]
        if isinstance(truepose, SourcePass):
            truepose.sites[self.site] = x
        if isinstance(truepose, TargetPass) and truepose.source is not None and truepose.strength > 0:
            q, k, v = self._fuse(attn, x, q, k, v, truepose)
        out = merge_heads(_attend(q, k, v, d**-0.5, self.heads_at_once)[..., :d])
        return attn.to_out[1](attn.to_out[0](out))

    def _source(self, attn: Attention, call: TargetPass) -> SourceTokens | None:
        """The source's K and V and rows at this site; None when the region weights leave nothing."""
        if call.kv is None:
            return self._project(attn, call)
        if self.site not in call.kv:
            call.kv[self.site] = self._project(attn, call)
        return call.kv[self.site]

    def _project(self, attn: Attention, call: TargetPass) -> SourceTokens | None:
        source, tokens = call.source, call.source.sites[self.site]
        kept = keep_tokens(tokens, source.token_weights(self.site, call.omega), call.strength)
        if kept is None:
            return None
        x = kept.of(tokens).to(attn.to_k.weight.dtype)
        k, v = (split_heads(f(x), attn.heads) for f in (attn.to_k, attn.to_v))
        body = source.coordinates(self.site)
        return SourceTokens(
            k, v, kept.of(source.regions(self.site)), kept.log_w, None if body is None else kept.of(body)
        )

    def _fuse(
        self, attn: Attention, x: Tensor, q: Tensor, k: Tensor, v: Tensor, call: TargetPass
    ) -> tuple[Tensor, Tensor, Tensor]:
        source = self._source(attn, call)
        if source is None:
            return q, k, v
        batch, n = x.shape[:2]
        source = _hidden(spread(source, batch), call.keep)
        learned = self.hpfa
        beta = learned.beta.clamp(min=0) if call.beta is None and learned is not None else call.beta or 0.0
        gamma = learned.gamma.clamp(min=0) if call.gamma is None and learned is not None else call.gamma or 0.0
        channels = match_channels(
            source,
            q,
            target_regions=None if is_off(beta) else self._target_regions(attn, x, call),
            beta=beta,
            region_log_weight=learned.region_log_weight if learned is not None else None,
            target_body=None if is_off(gamma) else call.body.get(n),
            gamma=gamma,
        )
        return fuse(q, k, v, [source], [channels])

    def _target_regions(self, attn: Attention, x: Tensor, call: TargetPass) -> Tensor | None:
        def align(prior: Tensor | None) -> Tensor:
            # attn2 comes after attn1 in the block; its query projection reads attn1's input here.
            rows = self.caa(split_heads(self.attn2.to_q(x), attn.heads), call.caa, prior)[1]
            if call.alignments is not None:
                call.alignments[self.site] = rows
            return rows

        with_caa = self.caa is not None and call.caa is not None
        return target_regions(call.prior.get(x.shape[1]), call.given, align if with_caa else None)


def _hidden(source: SourceTokens, keep: Tensor | None) -> SourceTokens:
    """The source's rows, shut where keep [B] is False; None is all open."""
    if keep is None:
        return source
    shut = torch.where(keep, 0.0, SHUT).to(source.k)[:, None]
    base = source.k.new_zeros((1, source.k.shape[2])) if source.log_w is None else source.log_w
    return replace(source, log_w=(base + shut).clamp(min=SHUT))


class CrossAttention:
    """attn2 of one block: the context, and beside it the source's region tokens and the 3D guidance's."""

    def __init__(self, site: str, caa: CAASite | None, control: Control3DSite | None = None):
        self.site, self.caa, self.control = site, caa, control
        self.heads_at_once: int | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        truepose: SourcePass | TargetPass | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = split_heads(attn.to_q(hidden_states), attn.heads)
        k, v = split_heads(attn.to_k(context), attn.heads), split_heads(attn.to_v(context), attn.heads)
        out = _attend(q, k, v, q.shape[-1] ** -0.5, self.heads_at_once)
        if self.caa is not None and truepose is not None and truepose.caa is not None:
            prior = truepose.prior.get(q.shape[2]) if isinstance(truepose, TargetPass) else None
            extra, _ = self.caa(q, truepose.caa, prior)
            out = out + self.caa.scale.to(out) * extra
        if self.control is not None and isinstance(truepose, TargetPass) and truepose.control is not None:
            out = out + self.control(q, truepose.control, grid_of(q.shape[2], truepose.latent_size))
        return attn.to_out[1](attn.to_out[0](merge_heads(out)))


class PassOn(nn.Module):
    """In attn2's place: hands its input on, so that the block adds norm2(h) (Leffa)."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states


def attention_sites(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """Name -> transformer block of every block with self-attention, in the order of the forward pass."""
    from diffusers.models.attention import BasicTransformerBlock

    found = {name: m for name, m in unet.named_modules() if isinstance(m, BasicTransformerBlock)}
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return dict(sorted(found.items(), key=lambda item: order[item[0].split(".")[0]]))


def key_of(site: str) -> str:
    """A site's name as a ModuleDict key."""
    return site.replace(".", "_")


def install(
    unet: UNet2DConditionModel,
    hpfa: nn.ModuleDict | None = None,
    caa: nn.ModuleDict | None = None,
    control: nn.ModuleDict | None = None,
) -> None:
    """Give every attention of the UNet our processors. hpfa, caa, control: modules per site (`key_of`)."""
    for site, block in attention_sites(unet).items():
        key = key_of(site)
        h = hpfa[key] if hpfa is not None else None
        c = caa[key] if caa is not None else None
        block.attn1.set_processor(SelfAttention(site, h, c, block.attn2))
        if not isinstance(block.attn2, PassOn):
            block.attn2.set_processor(CrossAttention(site, c, None if control is None else control[key]))


def token_counts(unet: UNet2DConditionModel, latent_size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Token count -> grid, for the levels that a latent of that size passes."""
    grids = {}
    height, width = latent_size
    for _ in unet.config.block_out_channels:
        grids[height * width] = grid_of(height * width, latent_size)
        height, width = (height + 1) // 2, (width + 1) // 2
    return grids
