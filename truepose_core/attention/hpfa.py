"""HPFA: human-parsing-guided fusion attention, as pure functions over tensors.

At a self-attention site the target also attends to the source's tokens. With s = 1/sqrt(D),

    logit(i, j) = s <q_i, k_j>                                                       j a target token
    logit(i, j) = s <q_i, k_j> + log w(j) + <beta P(i) + lambda, R(j)> - gamma m(i, j)   j a source token

where R(j) and P(i) are region rows, w(j) = <omega, R(j)> is what the user's region weights leave of the
token, lambda are learned region log weights, and m is the squared distance of the two positions on the body
(zero where either is not on the body). Every extra term is an inner product, so it rides in a few spare
channels of q and k: any fused attention kernel computes it, and no N x M bias exists in memory.

The equations are ours. They follow the description of human-parsing-guided attention in TruePose
(arXiv 2502.03426); region match and body match are our way to write it down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from truepose_core.errors import TruePoseError
from truepose_core.regions import N_REGIONS

SHUT = -1.0e4
"""A logit that closes a token: exp(SHUT) is exactly 0 in every float type, and SHUT is finite in float16."""


@dataclass(frozen=True)
class SourceTokens:
    """What a self-attention site needs to know of the source's M tokens.

    k, v: [B or 1, H, M, D], projected by the target's own weights.
    regions: [B or 1, M, 7], region rows R(j), or None when neither beta nor lambda is used.
    log_w: [B or 1, M], log of the region weight, or None for all ones.
    body: [B or 1, M, 3 or 4], place on the body (x, y on the skeleton or x, y, z on the surface; then 1 on the body to
        0 off it), or None.
    """

    k: Tensor
    v: Tensor
    regions: Tensor | None = None
    log_w: Tensor | None = None
    body: Tensor | None = None


def region_rows_weight(regions: Tensor, omega: Tensor) -> Tensor:
    """w(j) = sum_r omega_r R(j, r). regions [..., M, 7], omega [7] in [0, 1] -> [..., M] in [0, 1]."""
    if omega.shape != (N_REGIONS,):
        raise TruePoseError(
            f"region weights have shape {tuple(omega.shape)}; expected one weight for each of {N_REGIONS} regions"
        )
    return (regions * omega.to(regions)).sum(-1).clamp(0, 1)


def kept_tokens(weight: Tensor, floor: float = 1e-6) -> tuple[Tensor, Tensor] | None:
    """Which tokens attention has to read, and the log weight of each.

    weight: [B, M] in [0, 1]. Returns (index [B, K] of int64, log_w [B, K]), or None when no token is left.
    Tokens of weight <= floor are dropped. Rows that keep fewer than K repeat their last kept token and
    share its weight among the copies, which changes nothing; a row that keeps none is shut.
    """
    keep = weight > floor
    count = keep.sum(-1)
    most = int(count.max())
    if most == 0:
        return None
    # A stable sort brings the kept tokens to the front, in their own order.
    order = torch.argsort(keep.to(torch.uint8), dim=-1, descending=True, stable=True)
    last = (count - 1).clamp(min=0)
    slot = torch.minimum(torch.arange(most, device=weight.device)[None], last[:, None])
    index = torch.gather(order, 1, slot)
    log_w = torch.gather(weight, 1, index).clamp(min=floor).log()
    copies = (most - last).to(log_w.dtype)
    log_w = torch.where(slot == last[:, None], log_w - copies.log()[:, None], log_w)
    return index, torch.where((count == 0)[:, None], torch.full_like(log_w, SHUT), log_w)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B or 1, M, C], index [B, K] -> [B, K, C]."""
    tokens = tokens.expand(index.shape[0], -1, -1)
    return torch.gather(tokens, 1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _per_head(value: float | Tensor, like: Tensor) -> Tensor:
    """A scalar or [H] -> [1, H, 1, 1] of like's dtype and device."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)


def match_channels(
    source: SourceTokens,
    q: Tensor,
    *,
    target_regions: Tensor | None = None,
    beta: float | Tensor = 0.0,
    region_log_weight: Tensor | None = None,
    target_body: Tensor | None = None,
    gamma: float | Tensor = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The spare channels: (query part [B, H, N, C], key part [B or 1, 1, M, C]), or None when none is needed.

    q: [B, H, N, D], for sizes and type only. target_regions P: [B, N, 7]. beta, gamma: number or [H], >= 0.
    region_log_weight lambda: [H, 7]. target_body: [B, N, 3 or 4], as wide as the source's. scale: the kernel's own
    factor s, by default 1/sqrt(D). The product of the two parts, times s, is everything that is added to <q, k>.
    C is 8 without body match and 16 with it, so D + C stays a multiple of 8 where D is. Raises TruePoseError for
    places of unequal width.
    """
    b, h, n, d = q.shape
    s = d**-0.5 if scale is None else scale
    with_regions = source.regions is not None and (target_regions is not None or region_log_weight is not None)
    with_body = source.body is not None and target_body is not None
    if not (with_regions or with_body or source.log_w is not None):
        return None
    like = q.new_zeros(())
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    if with_regions:
        row = q.new_zeros((1, h, 1, N_REGIONS))
        if target_regions is not None:
            row = row + _per_head(beta, like) * target_regions.to(q)[:, None]
        if region_log_weight is not None:
            row = row + region_log_weight.to(q)[None, :, None, :]
        queries.append(row)
        keys.append(source.regions.to(q)[:, None])
    if source.log_w is not None:
        queries.append(q.new_ones((1, 1, 1, 1)))
        keys.append(source.log_w.to(q)[:, None, :, None])
    if with_body:
        if target_body.shape[-1] != source.body.shape[-1]:
            raise TruePoseError(
                f"places on the target's body have {target_body.shape[-1]} numbers and the source's "
                f"{source.body.shape[-1]}; expected both on the skeleton (3) or both on the surface (4)"
            )
        g = _per_head(gamma, like)
        ci, ui = target_body.to(q)[:, None, :, :-1], target_body.to(q)[:, None, :, -1:]
        cj, uj = source.body.to(q)[:, None, :, :-1], source.body.to(q)[:, None, :, -1:]
        # -g u_i u_j |c_i - c_j|^2, written as an inner product of four channels (five on the surface).
        queries += [2 * g * ui * ci, -g * ui * ci.square().sum(-1, keepdim=True), -g * ui]
        keys += [uj * cj, uj, uj * cj.square().sum(-1, keepdim=True)]
    query = torch.cat([x.expand(b, h, n, -1) for x in queries], -1) / s
    m, kb = source.k.shape[2], source.k.shape[0]
    key = torch.cat([x.expand(max(kb, x.shape[0]), 1, m, -1) for x in _same_batch(keys)], -1)
    spare = -query.shape[-1] % 8
    return pad(query, (0, spare)), pad(key, (0, spare))


def _same_batch(parts: list[Tensor]) -> list[Tensor]:
    batch = max(x.shape[0] for x in parts)
    return [x.expand(batch, -1, -1, -1) for x in parts]


def augment(
    q: Tensor, k: Tensor, v: Tensor, source: SourceTokens, channels: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Append the source's tokens and the spare channels: (q', k', v') for any attention kernel called with the
    scale 1/sqrt(D) of the *unpadded* width. q, k, v: [B, H, N, D]. The result's first D columns are the answer."""
    b, h = q.shape[:2]
    k_all = torch.cat([k, source.k.to(k).expand(b, -1, -1, -1)], 2)
    v_all = torch.cat([v, source.v.to(v).expand(b, -1, -1, -1)], 2)
    if channels is None:
        return q, k_all, v_all
    query, key = channels
    zeros = k.new_zeros((b, h, k.shape[2], key.shape[-1]))
    key_all = torch.cat([zeros, key.to(k).expand(b, h, -1, -1)], 2)
    return torch.cat([q, query], -1), torch.cat([k_all, key_all], -1), pad(v_all, (0, key.shape[-1]))


def hpfa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: SourceTokens | None,
    *,
    target_regions: Tensor | None = None,
    beta: float | Tensor = 0.0,
    region_log_weight: Tensor | None = None,
    target_body: Tensor | None = None,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """Self-attention that also reads the source. q, k, v: [B, H, N, D] -> [B, H, N, D].

    Without a source this is plain attention, the very same call. Terms and ranges: see `match_channels`.
    """
    if source is None:
        return scaled_dot_product_attention(q, k, v)
    channels = match_channels(
        source,
        q,
        target_regions=target_regions,
        beta=beta,
        region_log_weight=region_log_weight,
        target_body=target_body,
        gamma=gamma,
    )
    d = q.shape[-1]
    q, k, v = augment(q, k, v, source, channels)
    return scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d]


def hpfa_attention_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    source: SourceTokens,
    *,
    target_regions: Tensor | None = None,
    beta: float | Tensor = 0.0,
    region_log_weight: Tensor | None = None,
    target_body: Tensor | None = None,
    gamma: float | Tensor = 0.0,
) -> Tensor:
    """The same formula with an explicit [B, H, N, N + M] bias: the reference for tests and for the benchmark."""
    b, h, n, _ = q.shape
    m = source.k.shape[2]
    bias = q.new_zeros((b, h, n, m))
    if source.log_w is not None:
        bias = bias + source.log_w.to(q)[:, None, None, :]
    if source.regions is not None:
        rows = source.regions.to(q)[:, None]
        if target_regions is not None:
            bias = bias + _per_head(beta, q.new_zeros(())) * (target_regions.to(q)[:, None] @ rows.mT)
        if region_log_weight is not None:
            bias = bias + (region_log_weight.to(q)[None, :, None, :] @ rows.mT)
    if source.body is not None and target_body is not None:
        ti, sj = target_body.to(q), source.body.to(q)
        distance = (ti[:, :, None, :-1] - sj[:, None, :, :-1]).square().sum(-1)
        on_body = ti[:, :, None, -1] * sj[:, None, :, -1]
        bias = bias - _per_head(gamma, q.new_zeros(())) * (on_body * distance)[:, None]
    bias = torch.cat([q.new_zeros((b, h, n, k.shape[2])), bias], -1)
    k = torch.cat([k, source.k.to(k).expand(b, -1, -1, -1)], 2)
    v = torch.cat([v, source.v.to(v).expand(b, -1, -1, -1)], 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias)


def prune(source: SourceTokens, index: Tensor, log_w: Tensor) -> SourceTokens:
    """The source with only the tokens `kept_tokens` chose. index, log_w: [B, K]."""

    def heads(x: Tensor) -> Tensor:
        x = x.expand(index.shape[0], -1, -1, -1)
        return torch.gather(x, 2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

    return replace(
        source,
        k=heads(source.k),
        v=heads(source.v),
        regions=None if source.regions is None else gather_tokens(source.regions, index),
        body=None if source.body is None else gather_tokens(source.body, index),
        log_w=log_w if bool((log_w != 0).any()) else None,
    )
