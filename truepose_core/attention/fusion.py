"""What stands around HPFA's formula in a UNet, the same for both hosts.

Which of a source's tokens a site reads and how much of each, whose word on the target's regions counts, and how S
sources serve the rows of a batch, one beside another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from truepose_core.attention.hpfa import SHUT, SourceTokens, augment, gather_tokens, kept_tokens

Channels = tuple[Tensor, Tensor]
"""What `match_channels` gives: (query part, key part)."""


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """Which of a source's M tokens a site reads, and how much of each.

    index: [S, K] of int64; None for all of them. log_w: [S, K], log of region weight times strength; None where all
    are 1.
    """

    index: Tensor | None
    log_w: Tensor | None

    def of(self, rows: Tensor) -> Tensor:
        """What is kept of [S or 1, M, C]: [S, K, C]."""
        return rows if self.index is None else gather_tokens(rows, self.index)


def keep_tokens(tokens: Tensor, weights: Tensor | None, strength: float = 1.0) -> KeptTokens | None:
    """What a site reads of tokens [S, M, C]; None where the weights leave nothing. weights: w(j), [S, M] in [0, 1], or
    None for all ones. strength: in (0, 1], a factor on every w(j)."""
    index = log_w = None
    if weights is not None:
        kept = kept_tokens(weights)
        if kept is None:
            return None
        index, log_w = kept
    if strength < 1:
        wide = torch.promote_types(tokens.dtype, torch.float32)
        base = tokens.new_zeros(tokens.shape[:2], dtype=wide) if log_w is None else log_w
        log_w = (base + math.log(strength)).clamp(min=SHUT)
    if log_w is not None and not bool((log_w != 0).any()):
        log_w = None
    return KeptTokens(index, log_w)


def is_off(match: float | Tensor) -> bool:
    """Whether a strength of match (a number or [H]) is a plain 0: it costs no channels. Learned ones are not looked at,
    which would wait for the device."""
    return isinstance(match, float | int) and match == 0


def target_regions(prior: Tensor | None, given: bool, align: Callable[[Tensor | None], Tensor] | None) -> Tensor | None:
    """P [B, N, 7]: what the user gave, else CAA's alignment, else the parsing carried to the target; None where none is
    known. prior: what the user gave (`given`), or what was carried. align: prior -> CAA's P, or None without CAA."""
    return prior if given or align is None else align(prior)


def row_index(sources: int, rows: int, chunks: int = 1, device: torch.device | None = None) -> Tensor:
    """Which of `sources` each row of a batch reads: [rows]. Within every chunk, each serves the same number of rows."""
    size = rows // chunks
    return (torch.arange(size, device=device) * sources // size).repeat(chunks)


def spread(source: SourceTokens, rows: int, chunks: int = 1) -> SourceTokens:
    """A batch of sources repeated to the rows that read them, as `row_index` has it; a single one is left to
    broadcasting."""
    count = source.k.shape[0]
    if count in (1, rows):
        return source

    def repeat(x: Tensor | None) -> Tensor | None:
        # Not by index: a gather's gradient is summed in no fixed order on a GPU.
        if x is None:
            return None
        each = x.repeat_interleave(rows // (chunks * count), 0)
        return each if chunks == 1 else torch.cat([each] * chunks)

    return SourceTokens(*(repeat(x) for x in (source.k, source.v, source.regions, source.log_w, source.body)))


def fuse(
    q: Tensor, k: Tensor, v: Tensor, sources: Sequence[SourceTokens], channels: Sequence[Channels | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """`augment` with several sources, each with spare channels of its own: q, k, v [B, H, N, D], for a kernel called
    with the scale 1/sqrt(D) of the unpadded width. channels: `match_channels` of each source."""
    if len(sources) == 1:
        return augment(q, k, v, sources[0], channels[0])
    b = q.shape[0]
    joined = SourceTokens(
        torch.cat([s.k.expand(b, -1, -1, -1) for s in sources], 2),
        torch.cat([s.v.expand(b, -1, -1, -1) for s in sources], 2),
    )
    return augment(q, k, v, joined, side_by_side(channels, [s.k.shape[2] for s in sources]))


def side_by_side(channels: Sequence[Channels | None], counts: Sequence[int]) -> Channels | None:
    """Spare channels of several sources of `counts` tokens as one pair, each zero for the tokens of the others; None
    where no source needs any."""
    present = [pair for pair in channels if pair is not None]
    if not present:
        return None
    query = torch.cat([q for q, _ in present], -1)
    batch = max(k.shape[0] for _, k in present)
    keys, left = [], 0
    for pair, count in zip(channels, counts, strict=True):
        if pair is None:
            keys.append(query.new_zeros((batch, 1, count, query.shape[-1])))
            continue
        width = pair[1].shape[-1]
        key = pair[1].expand(batch, -1, -1, -1)
        keys.append(pad(key, (left, query.shape[-1] - left - width)))
        left += width
    return query, torch.cat(keys, 2)
