"""HPFA in a joint attention: editors that hold their references as tokens of one sequence with text and target.

Reference tokens are among the keys already, so nothing is added to the sequence. With s = 1/sqrt(D),

    logit(i, j) = s <q_i, k_j>                                            j a text or target token
    logit(i, j) = s <q_i, k_j> + log w(j)                                 j a reference token
                  + beta <P(i), R(j)> - gamma m(i, j)                     ... and i a target token

(terms as in `hpfa`). w acts on every query, so that w -> 0 is deletion of the token: text and other references
would hand on what they had read of it. The match acts on target queries only. Keys of weight 0 are taken out; where
no other weight than 1 is left and nothing matches, the attention is the model's own at its own width. Otherwise the
terms ride in spare channels (`hpfa.match_channels`), which are zero for everything that they do not concern.

The equations are ours; that dropping tokens of a reference keeps what is left of it is known from token pruning in
editors (ReCAST, Sparse Context, ToPi).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, one_hot, pad

from truepose_core.attention.hpfa import SourceTokens, augment, gather_tokens, kept_tokens, match_channels
from truepose_core.errors import TruePoseError
from truepose_core.regions import N_REGIONS


@dataclass(frozen=True, eq=False)
class Target:
    """What is known of the N target tokens: regions P [B or 1, N, 7], body [B or 1, N, 3], or None."""

    regions: Tensor | None = None
    body: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Match:
    """How one reference of M tokens matches a target. regions R: [B or 1, M, 7], body: [B or 1, M, 3] with "on the
    body" last, or None; beta, gamma: >= 0."""

    target: Target
    regions: Tensor | None = None
    body: Tensor | None = None
    beta: float = 0.0
    gamma: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """One reference: its number of tokens M, their weight [B or 1, M] in [0, 1] (None for all ones), and matches."""

    count: int
    weight: Tensor | None = None
    matches: tuple[Match, ...] = ()


@dataclass(frozen=True, eq=False)
class Joined:
    """Matches of all references with one target: keys regions [B or 1, K, 7] and body [B or 1, K, 3], already times
    beta and gamma and zero for references that do not match, or None."""

    target: Target
    regions: Tensor | None
    body: Tensor | None


@dataclass(frozen=True, eq=False)
class Guidance:
    """What a joint attention has to know of the R reference tokens, of which it reads K.

    counts: kept tokens of each reference. index: [B or 1, K] into the R tokens, None for all of them in their order.
    log_w: [B or 1, K], None for all zeros. matches: one for each target.
    """

    counts: tuple[int, ...]
    index: Tensor | None
    log_w: Tensor | None
    matches: tuple[Joined, ...]

    @property
    def widens(self) -> bool:
        """Whether the heads get spare channels."""
        return self.log_w is not None or bool(self.matches)

    def to(self, device: torch.device) -> Guidance:
        """The same on a device."""

        def put(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        joined = (
            Joined(Target(put(j.target.regions), put(j.target.body)), put(j.regions), put(j.body)) for j in self.matches
        )
        return Guidance(self.counts, put(self.index), put(self.log_w), tuple(joined))

    def dropped(self) -> Guidance:
        """The same for a sequence out of which the tokens of weight 0 were taken already."""
        return Guidance(self.counts, None, self.log_w, self.matches)


@dataclass(frozen=True)
class Layout:
    """Where the target and the references stand among the keys: (start, stop) each."""

    target: tuple[int, int]
    references: tuple[int, int]


def patch_rows(rows: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Rows of latent cells as rows of tokens of patch x patch cells.

    rows: [B, height * width, C] -> [B, ceil(height / patch) * ceil(width / patch), C], each the mean of its cells. An
    odd latent is continued by its last row and column.
    """
    cells = rows.mT.unflatten(2, (height, width))
    cells = pad(cells, (0, -width % patch, 0, -height % patch), mode="replicate")
    return avg_pool2d(cells, patch).flatten(2).mT


def strongest(rows: Tensor) -> Tensor:
    """Each token wholly of the region that it shows most of: [B, M, 7] -> [B, M, 7] of zeros and ones.

    With it a token's weight is the weight of one region, so region weights of 0 and 1 give token weights of 0 and 1.
    """
    return one_hot(rows.argmax(-1), rows.shape[-1]).to(rows)


def guide(references: Sequence[Reference]) -> Guidance | None:
    """What the references ask of the attention, or None where nothing differs from the model itself."""
    counts: list[int] = []
    indices: list[Tensor] = []
    logs: list[Tensor] = []
    start = 0
    for reference in references:
        weight = torch.ones(1, reference.count) if reference.weight is None else reference.weight
        if weight.shape[1] != reference.count:
            raise TruePoseError(f"a reference of {reference.count} tokens has {weight.shape[1]} weights")
        kept = kept_tokens(weight)
        empty = (weight.new_zeros((1, 0), dtype=torch.int64), weight.new_zeros((1, 0)))
        index, log_w = empty if kept is None else kept
        counts.append(index.shape[1])
        indices.append(index + start)
        logs.append(log_w)
        start += reference.count
    index, log_w = _side_by_side(indices), _side_by_side(logs)
    matches = _join(references, index) if index.shape[1] else ()
    whole = index.shape[1] == start and bool((index == torch.arange(start, device=index.device)).all())
    plain = not bool((log_w != 0).any())
    if whole and plain and not matches:
        return None
    return Guidance(tuple(counts), None if whole else index, None if plain else log_w, matches)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """[B or 1, M_i, ...] of each reference -> [B or 1, sum of M_i, ...]."""
    batch = max(x.shape[0] for x in parts)
    return torch.cat([x.expand(batch, *x.shape[1:]) for x in parts], 1)


def _join(references: Sequence[Reference], index: Tensor) -> tuple[Joined, ...]:
    """Matches grouped by target: references that match the same target share its channels."""
    targets = {id(m.target): m.target for r in references for m in r.matches}
    joined = []
    for target in targets.values():
        mine = [[m for m in r.matches if m.target is target] for r in references]
        regions = body = None
        if target.regions is not None and any(m.regions is not None for ms in mine for m in ms):
            regions = gather_rows(
                _side_by_side([_regions(ms, r) for ms, r in zip(mine, references, strict=True)]), index
            )
        if target.body is not None and any(m.body is not None for ms in mine for m in ms):
            body = gather_rows(_side_by_side(_places(mine, references)), index)
        if regions is not None or body is not None:
            joined.append(Joined(target, regions, body))
    return tuple(joined)


def _regions(matches: Sequence[Match], reference: Reference) -> Tensor:
    """beta R of one reference: [B or 1, M, 7]."""
    return sum(
        (m.beta * m.regions for m in matches if m.regions is not None), torch.zeros(1, reference.count, N_REGIONS)
    )


def _places(matches: Sequence[Sequence[Match]], references: Sequence[Reference]) -> list[Tensor]:
    """Body coordinates of every reference, zeros (nowhere on a body) where there are none."""
    found = [[_scaled(m.body, m.gamma) for m in ms if m.body is not None] for ms in matches]
    if any(len(places) > 1 for places in found):
        raise TruePoseError("a reference matches one target's body twice; set body match once for each reference")
    like = next(places[0] for places in found if places)
    return [
        places[0] if places else like.new_zeros(1, r.count, like.shape[-1])
        for places, r in zip(found, references, strict=True)
    ]


def _scaled(body: Tensor, gamma: float) -> Tensor:
    """Body coordinates whose "on the body" carries gamma: then gamma 1 is said to the kernel for all references."""
    return torch.cat([body[..., :-1], gamma * body[..., -1:]], -1)


def gather_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B or 1, M, C], index [B or 1, K] -> [B, K, C]."""
    return gather_tokens(rows, index.expand(max(rows.shape[0], index.shape[0]), -1))


def drop_tokens(tokens: Tensor, guidance: Guidance, references: tuple[int, int]) -> Tensor:
    """A sequence without the reference tokens that nobody reads: tokens [B, N, C], references (start, stop) in it."""
    if guidance.index is None:
        return tokens
    start, stop = references
    kept = gather_rows(tokens[:, start:stop], guidance.index)
    return torch.cat([tokens[:, :start], kept, tokens[:, stop:]], 1)


def guided(q: Tensor, k: Tensor, v: Tensor, layout: Layout, guidance: Guidance) -> tuple[Tensor, Tensor, Tensor]:
    """(q', k', v') of the joint attention, for a kernel called with the scale 1/sqrt(D) of the *unpadded* width; the
    result's first D columns are the answer.

    q: [B, H, N, D]. k, v: [B, H, L, D], where layout says what stands; reference keys come last in the result. The
    queries may lack the references if these stand last.
    """
    width = q.shape[-1]
    start, stop = layout.references
    reference = SourceTokens(_take(k, start, stop, guidance.index), _take(v, start, stop, guidance.index))
    rest_k, rest_v = (torch.cat([x[:, :, :start], x[:, :, stop:]], 2) for x in (k, v))
    if not guidance.widens:
        return augment(q, rest_k, rest_v, reference, None)
    parts = []
    for number, joined in enumerate(guidance.matches or (Joined(Target(), None, None),)):
        source = SourceTokens(
            reference.k, reference.v, joined.regions, guidance.log_w if number == 0 else None, joined.body
        )
        parts.append(
            match_channels(
                source,
                q,
                target_regions=_at_target(joined.target.regions, layout, q),
                beta=1.0,
                target_body=_at_target(joined.target.body, layout, q),
                gamma=1.0,
                scale=width**-0.5,
            )
        )
    query = torch.cat([p[0] for p in parts], -1)
    batch = max(p[1].shape[0] for p in parts)
    key = torch.cat([p[1].expand(batch, -1, -1, -1) for p in parts], -1)
    return augment(q, rest_k, rest_v, reference, (query, key))


def guided_mask(mask: Tensor, layout: Layout, guidance: Guidance) -> Tensor:
    """An attention mask [..., L], [N, L], [B, N, L] or [B, H, N, L], in the order of the keys that `guided` gives."""
    mask = mask if mask.dim() == 4 else mask.reshape(-1, 1, *mask.shape[-2:])
    start, stop = layout.references
    rest = torch.cat([mask[..., :start], mask[..., stop:]], -1)
    kept = mask[..., start:stop]
    if guidance.index is not None:
        index = guidance.index[:, None, None]
        batch = max(kept.shape[0], index.shape[0])
        kept = kept.expand(batch, -1, -1, -1).gather(-1, index.expand(batch, *kept.shape[1:3], -1))
        rest = rest.expand(batch, -1, -1, -1)
    return torch.cat([rest, kept], -1)


def _take(x: Tensor, start: int, stop: int, index: Tensor | None) -> Tensor:
    x = x[:, :, start:stop]
    if index is None:
        return x
    index = index.expand(x.shape[0], -1)[:, None, :, None]
    return torch.gather(x, 2, index.expand(-1, x.shape[1], -1, x.shape[-1]))


def _at_target(rows: Tensor | None, layout: Layout, q: Tensor) -> Tensor | None:
    """[B or 1, target tokens, C] -> [B or 1, N, C], zero for all other queries."""
    if rows is None:
        return None
    start, stop = layout.target
    return pad(rows, (0, 0, start, q.shape[2] - stop))
