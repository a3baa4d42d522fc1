"""Combining sources: regions of several source persons in one (the face of A, the top of B), or blended by weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from truepose_core.attention.caa import RegionTokens
from truepose_core.attention.hpfa import region_rows_weight
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES, Region
from truepose_core.source.features import Level, SourceFeatures

OUTWARDS = (Region.SKIN, Region.LOWER, Region.UPPER, Region.FACE, Region.HAIR, Region.ACCESSORY)
"""From the body outwards: what comes later covers what is under it."""


@dataclass(frozen=True, eq=False)
class CombinedFeatures(SourceFeatures):
    """Features of several sources, one behind the other at every site; made by `combine_sources` (ours).

    sites: [B, M1 + M2 + ..., C]. parsing, body, image, context, surface, style, latent_size: those of the first
    part. parts: the sources.
    weights: [K, 7] in [0, 1], how much of each region is read from each part. A token's region row is scaled by its
    part's weights, so w(j) = sum_r omega_r weight_r R(j, r), and tokens of regions that are not taken are dropped.
    """

    parts: tuple[SourceFeatures, ...] = ()
    weights: Tensor | None = None

    def regions(self, site: str) -> Tensor:
        """[B, M1 + M2 + ..., 7]: each part's region rows times its weights."""
        key = ("regions", site)
        if key not in self._rows:
            rows = [p.regions(site) * w.to(p.parsing.masks) for p, w in zip(self.parts, self.weights, strict=True)]
            self._rows[key] = torch.cat([x.expand(self.batch, -1, -1) for x in rows], 1)
        return self._rows[key]

    def coordinates(self, site: str) -> Tensor | None:
        """Each part's, on its own body: [B, M1 + M2 + ..., 3 or 4]; None unless every part has keypoints."""
        places = [p.coordinates(site) for p in self.parts]
        if any(x is None for x in places):
            return None
        if len({x.shape[-1] for x in places}) > 1:
            raise TruePoseError(
                "one source goes by its body's surface and another by its skeleton; give all of them poses that show "
                "enough of the person, or none"
            )
        return torch.cat([x.expand(self.batch, -1, -1) for x in places], 1)

    def token_weights(self, site: str, omega: Tensor | None) -> Tensor:
        """w(j) [B, M]: by omega [7] or all ones, and by how much of a region is taken from the token's part."""
        return region_rows_weight(self.regions(site), torch.ones(len(Region)) if omega is None else omega)

    def prior(self, target_body: Tensor, height: int, width: int) -> HumanParsing | None:
        """The first part's parsing carried to the target pose, and on it the regions that are taken, from the body
        outwards, as far as they are taken. [B, 7, height, width]"""
        priors = [p.prior(target_body, height, width) for p in self.parts]
        if any(p is None for p in priors):
            return None
        masks = priors[0].masks
        for region in OUTWARDS:
            for weight, part in zip(self.weights, priors, strict=True):
                share = weight[region].to(masks) * part.masks[:, region : region + 1]
                painted = torch.zeros_like(masks)
                painted[:, region] = 1
                masks = masks + share * (painted - masks)
        return HumanParsing(masks / masks.sum(1, keepdim=True))

    def carried(self, target_body: Tensor, omega: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """What is taken of each part, carried to the target pose and laid one over the other from the body outwards:
        (image [B, 3, H, W], certain [B, 1, H, W])."""
        made = [p.carried(target_body) for p in self.parts]
        if any(x is None for x in made):
            return None
        size = made[0][0].shape[-2:]
        if any(image.shape[-2:] != size for image, _ in made):
            raise TruePoseError("the sources that are combined were read at other sizes; read them at the same size")
        priors = [p.prior(target_body, *size) for p in self.parts]
        omega = self.weights.new_ones(len(Region)) if omega is None else omega.to(self.weights)
        image, certain = torch.zeros_like(made[0][0]), torch.zeros_like(made[0][1])
        covered, total = torch.zeros_like(certain), torch.zeros_like(certain)
        for region in (Region.BACKGROUND, *OUTWARDS):
            for weight, prior, (picture, sure) in zip(self.weights, priors, made, strict=True):
                share = (omega[region] * weight[region]).to(image) * prior.masks[:, region : region + 1].to(image)
                image = image + share * (picture - image)
                certain = certain + share * (sure - certain)
                covered = covered + share * (1 - covered)
                total = total + share
        # Soft edges of neighbours add up to the whole, where laying one over the other would leave a gap.
        taken = total.clamp(max=1) / covered.clamp(min=1e-6)
        image, certain = 0.5 + taken * (image - covered * 0.5), taken * certain
        return image, certain

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CombinedFeatures:
        """The same elsewhere; see `SourceFeatures.to`."""
        plain = SourceFeatures.to(self, device, dtype)
        more = {f.name: getattr(plain, f.name) for f in fields(SourceFeatures) if f.init}
        return replace(self, **more, parts=tuple(p.to(device, dtype) for p in self.parts), weights=self.weights)


def combine_sources(
    source: SourceFeatures,
    donor: SourceFeatures,
    shares: Sequence[float] | Tensor,
    kind: type[CombinedFeatures] = CombinedFeatures,
) -> SourceFeatures:
    """`source` with regions of `donor` in place of its own.

    shares: 7 numbers in [0, 1], in the order of `Region`: 0 keeps the region, 1 takes the donor's, between them both
    are read with weights 1 - share and share. Either may be a combination itself. Shares that are all 0 give `source`,
    all 1 give `donor`. Raises TruePoseError for other families, batches that do not fit, or shares out of range.
    """
    share = torch.as_tensor(shares, dtype=torch.float32).flatten()
    if share.shape != (len(Region),) or not bool(((share >= 0) & (share <= 1)).all()):
        raise TruePoseError(f"shares are {share.tolist()}; expected {len(Region)} numbers from 0 to 1")
    if source.family != donor.family or set(source.sites) != set(donor.sites):
        raise TruePoseError(
            f"the source was read with a {source.family} model and the donor with a {donor.family} model; "
            "read both with the same model"
        )
    batch = max(source.batch, donor.batch)
    if {source.batch, donor.batch} - {1, batch}:
        raise TruePoseError(
            f"the source holds {source.batch} pictures and the donor {donor.batch}; expected as many, or 1 of either"
        )
    if source.latent is not None or donor.latent is not None:
        raise TruePoseError(
            "this model reads its source anew at every step, so sources cannot be combined; leave the donor out"
        )
    if [level.sigma for level in source.levels] != [level.sigma for level in donor.levels]:
        raise TruePoseError(
            "the source and the donor were read at other noise levels; read both in the same way, at as many levels"
        )
    if not bool(share.any()):
        return source
    if bool((share == 1).all()):
        return donor
    taken = {REGION_NAMES[r] for r in Region if r != Region.BACKGROUND and share[r] > 0}
    there = {REGION_NAMES[r] for r in Region if bool((donor.parsing.masks[:, r] > 0.5).any())}
    if taken and not taken & there:
        raise TruePoseError(
            f"the donor shows none of {', '.join(sorted(taken))}; it shows {', '.join(sorted(there))}. "
            "Choose regions that it shows, or check its parsing"
        )
    parts, weights = [], []
    for features, factor in ((source, 1 - share), (donor, share)):
        own = features.parts if isinstance(features, CombinedFeatures) else (features,)
        parts += own
        weights += [factor * w for w in features.weights] if isinstance(features, CombinedFeatures) else [factor]

    return stacked(parts, torch.stack(weights), batch, kind)


def stacked(
    parts: Sequence[SourceFeatures], table: Tensor, batch: int, kind: type[CombinedFeatures] = CombinedFeatures
) -> CombinedFeatures:
    """The parts [K], of `batch` sources or of one each, one behind the other. table: how much of each region is read of
    each part [K, 7]. Everything else is as in the first part."""

    def joined(sites: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([own[name].expand(batch, -1, -1) for own in sites], 1) for name in sites[0]}

    levels = tuple(
        Level(level.sigma, joined([p.levels[i].sites for p in parts]), level.style)
        for i, level in enumerate(parts[0].levels)
    )
    # The middle level's tensors, not a copy of them.
    sites = dict(levels[len(levels) // 2].sites) if levels else joined([p.sites for p in parts])
    # Everything that counts sources asks the first part, so it has them all.
    first = parts[0] if parts[0].batch == batch else _repeated(parts[0], batch)
    return kind(
        first.family,
        sites,
        first.latent_size,
        first.parsing,
        first.body,
        _region_tokens([p.caa for p in parts], table, batch),
        first.image,
        first.context,
        surface=first.surface,
        levels=levels,
        style=first.style,
        align=first.align,
        parts=(first, *parts[1:]),
        weights=table,
    )


def _repeated(features: SourceFeatures, batch: int) -> SourceFeatures:
    def many(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(batch, *x.shape[1:])

    caa = features.caa
    return replace(
        features,
        sites={k: many(x) for k, x in features.sites.items()},
        parsing=HumanParsing(many(features.parsing.masks).contiguous()),
        body=many(features.body),
        caa=None if caa is None else RegionTokens(many(caa.tokens), many(caa.shown)),
        image=many(features.image),
        context=many(features.context),
        surface=None if features.surface is None else features.surface.repeated(batch),
    )


def _region_tokens(found: Sequence[RegionTokens | None], weights: Tensor, batch: int) -> RegionTokens | None:
    """CAA's tokens of each region: the parts' by weight. weights: [K, 7]."""
    if any(x is None for x in found):
        return None
    per_token = weights.to(found[0].tokens) @ found[0].regions.to(found[0].tokens).T
    tokens = shown = 0
    for x, w in zip(found, per_token, strict=True):
        here = x.shown.to(w) * w
        tokens = tokens + here[..., None] * x.tokens
        shown = shown + here
    tokens, shown = tokens.expand(batch, -1, -1), shown.expand(batch, -1)
    return RegionTokens(tokens / shown.clamp(min=1e-6)[..., None] * (shown > 0)[..., None], shown > 0)
