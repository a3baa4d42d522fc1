"""A source and CAA as they are applied to a MODEL: what is read of them at each block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from truepose_core.attention.fusion import KeptTokens, keep_tokens
from truepose_core.guidance.scales import weigh_region_tokens
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.source.align import with_aligned_tokens
from truepose_core.source.features import SourceFeatures

from .base import RunCache
from .batch import UNCONDITIONAL
from .caa import CrossTokens
from .features import CombinedHostFeatures, HostFeatures, SourceReader
from .unet import PARTS, in_window, is_on

if TYPE_CHECKING:
    from .model import Adapter


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """How HPFA matches at one site: beta, gamma (a number or [H], >= 0), region_log_weight [H, 7] or None."""

    beta: float | Tensor
    gamma: float | Tensor
    region_log_weight: Tensor | None = None


# ------------------------------------------------------------------------------------------------ the patch


@dataclass(frozen=True, eq=False)
class AppliedSource:
    """One Apply HPFA: a source and how it is read. Checked and pruned when made, never changed afterwards.

    omega: weight per region, 7 numbers in [0, 1]. beta, gamma: region match and body match, >= 0. strength: (0, 1].
    sigmas: (highest, lowest) noise at which it works, or None for always. blocks: one of `BLOCKS`.
    keep_unconditional: whether negative rows see the source too; only_unconditional: whether nobody else does. target:
    P, or None. target_body: [T, 18, 3]. style: in [0, 1], how far the picture's moments become the source's.

    From a TruePose model's adapter: weights per site take the place of beta and gamma; cross are CAA's region tokens
    per site, which also give P unless the target parsing is `given`; aligned is what the carried source adds after
    conv_in and to the prediction, [T, C, h, w] each.
    """

    source: SourceFeatures
    omega: tuple[float, ...]
    beta: float = 0.0
    gamma: float = 0.0
    strength: float = 1.0
    sigmas: tuple[float, float] | None = None
    blocks: str = "all"
    keep_unconditional: bool = False
    only_unconditional: bool = False
    target: HumanParsing | None = None
    target_body: Tensor | None = None
    style: float = 0.0
    weights: Mapping[str, SiteWeights] | None = None
    cross: Mapping[str, CrossTokens] = field(default_factory=dict)
    given: bool = False
    aligned: tuple[Tensor, Tensor] | None = None
    kept: dict[str, KeptTokens] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        weights = torch.tensor(self.omega)
        kept: dict[str, KeptTokens] = {}
        by_count: dict[int, KeptTokens | None] = {}
        for site, tokens in self.source.sites.items():
            if site.split(".")[0] not in PARTS[self.blocks] or self.strength == 0:
                continue
            count = tokens.shape[1]
            if count not in by_count:
                by_count[count] = keep_tokens(tokens, self.source.token_weights(site, weights), self.strength)
            if by_count[count] is not None:
                kept[site] = by_count[count]
        object.__setattr__(self, "kept", kept)

    def __deepcopy__(self, memo: dict) -> AppliedSource:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def reader(self) -> SourceReader | None:
        """What reads the source anew at every step, or None."""
        return getattr(self.source, "reader", None)

    def seen_by(self, kind: int) -> bool:
        """Whether rows of this kind (`cond_or_uncond`) see the source."""
        if kind == UNCONDITIONAL:
            return self.keep_unconditional or self.only_unconditional
        return not self.only_unconditional

    @property
    def has_effect(self) -> bool:
        """False where strength or the region weights leave nothing to read, and no style is put on."""
        return bool(self.kept) or self.styles

    @property
    def styles(self) -> bool:
        """Whether the picture gets the source's style."""
        return self.style > 0 and self.strength > 0

    @property
    def matches(self) -> bool:
        """Whether anything depends on the target's position."""
        return (
            (self.has_beta and self.target is not None)
            or (self.has_gamma and self.target_body is not None and self.source.body is not None)
            or bool(self.cross)
            or self.aligned is not None
        )

    @property
    def has_beta(self) -> bool:
        """Whether region match is on at any site."""
        return self.beta > 0 if self.weights is None else any(is_on(w.beta) for w in self.weights.values())

    @property
    def has_gamma(self) -> bool:
        """Whether body match is on at any site."""
        return self.gamma > 0 if self.weights is None else any(is_on(w.gamma) for w in self.weights.values())

    @property
    def aligns(self) -> bool:
        """Whether P comes from CAA."""
        return bool(self.cross) and not self.given and self.has_beta

    def counts(self, with_caa: bool) -> dict[str, int]:
        """What the latents of a batch share -> how many there are. with_caa: whether an Apply CAA reads its target."""
        counts = {"source images": self.source.batch}
        if self.aligned is not None:
            counts["carried sources"] = self.aligned[0].shape[0]
        if self.target is not None and (self.has_beta or self.cross or with_caa):
            counts["target parsings"] = self.target.batch
        if self.target_body is not None and self.has_gamma:
            counts["target poses"] = self.target_body.shape[0]
        return counts

    def site_weights(self, site: str) -> SiteWeights:
        """How this site matches."""
        return SiteWeights(self.beta, self.gamma) if self.weights is None else self.weights[site]

    def in_window(self, sigma: Tensor | None) -> bool:
        """Whether it works at this noise level."""
        return in_window(self.sigmas, sigma)

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run: keys and values of all kept tokens (the tokens, where they are read anew at every
        step), and what the widest site needs."""
        total = widest = 0
        for site, kept in self.kept.items():
            tokens = self.source.sites[site]
            count = tokens.shape[0] * (tokens.shape[1] if kept.index is None else kept.index.shape[1])
            total += (2 * count if self.reader is None else tokens.shape[:2].numel()) * tokens.shape[2] * itemsize
            widest = max(widest, count * tokens.shape[2] * itemsize)
        return total + 4 * widest

    def tokens(self, site: str, level: int) -> Tensor:
        """The kept tokens of a site at a level of the source: [S, K, C]."""
        levels = self.source.levels
        return self.kept[site].of((levels[level].sites if levels else self.source.sites)[site])

    def on(self, cache: RunCache, site: str, like: Tensor) -> SiteReading:
        """How a site reads the source, on the device and in the type of `like`."""
        return cache.of((self, site, like.device, like.dtype), lambda: self._read(site, like.device, like.dtype))

    def _read(self, site: str, device: torch.device, dtype: torch.dtype) -> SiteReading:
        kept, how, cross = self.kept[site], self.site_weights(site), self.cross.get(site)
        matched = is_on(how.beta) and (self.target is not None or cross is not None)
        rows = self.source.regions(site) if matched or how.region_log_weight is not None else None
        body = self.source.coordinates(site) if is_on(how.gamma) and self.target_body is not None else None

        def put(x: float | Tensor | None) -> float | Tensor | None:
            return x.to(device, torch.float32) if isinstance(x, Tensor) else x

        # Weights and coordinates stay float32 here: they are rounded once, when they enter the keys.
        return SiteReading(
            None if kept.index is None else kept.index.to(device),
            None if rows is None else put(kept.of(rows)),
            put(kept.log_w),
            None if body is None else put(kept.of(body)),
            # Numbers that match nothing become a plain 0, so that no call has to look at them on the GPU.
            SiteWeights(
                put(how.beta) if is_on(how.beta) else 0.0,
                put(how.gamma) if is_on(how.gamma) else 0.0,
                put(how.region_log_weight),
            ),
            None if cross is None else cross.to(device, dtype),
        )

    def aligned_on(self, cache: RunCache, like: Tensor) -> tuple[Tensor, Tensor]:
        """The two parts of `aligned` on the device and in the type of `like`."""
        return cache.of((self, like.device, like.dtype), lambda: tuple(x.to(like) for x in self.aligned))


def applied_source(
    adapter: Adapter | None,
    source: HostFeatures,
    omega: tuple[float, ...],
    strength: float,
    set_match: tuple[float, float] | None,
    target_parsing: HumanParsing | None,
    body: Tensor | None,
    **more: object,
) -> AppliedSource:
    """One source as a model shall read it. set_match: (region match, body match) in place of what an adapter learned;
    body: the target poses [T, 18, 3] on the model's canvas, or None; more: see `AppliedSource`."""
    source = with_aligned_tokens(source, body, CombinedHostFeatures)
    given = target_parsing is not None
    parsing = target_parsing.to("cpu") if given else None
    if given and adapter is not None:
        parsing = adapter.frame(parsing.size).apply_parsing(parsing)
    wants_regions = more.get("beta", 0) > 0 or adapter is not None
    if not given and body is not None and source.body is not None and wants_regions:
        # A TruePose model has learned with the parsing carried at its latent's size.
        parsing = source.prior(body, *(source.parsing.size if adapter is None else source.latent_size))
    learned: dict = {}
    if adapter is not None and source.family == adapter.config.family and strength > 0 and any(omega):
        weights = torch.tensor(omega)
        weights = None if bool((weights == 1).all()) else weights
        beta, gamma = set_match or (None, None)
        weighed = weigh_region_tokens(source, weights, strength)
        learned = {
            "weights": adapter.site_weights(beta, gamma),
            "cross": adapter.cross_tokens(weighed.caa, "target"),
            "aligned": adapter.aligned(source, body, weights, strength),
        }
    return AppliedSource(
        source=source,
        omega=omega,
        strength=strength,
        target=parsing,
        target_body=body,
        given=given,
        **learned,
        **more,
    )


@dataclass(frozen=True)
class SiteReading:
    """How one site reads a source: which of its tokens are kept, index [S, K] (None for all), their regions [S, K, 7],
    log_w [S, K] and body [S, K, 3] (or None), how they match, and CAA's tokens."""

    index: Tensor | None
    regions: Tensor | None
    log_w: Tensor | None
    body: Tensor | None
    how: SiteWeights
    cross: CrossTokens | None


@dataclass(frozen=True, eq=False)
class AppliedCAA:
    """One Apply CAA: region tokens and how they are read. Never changed once made.

    cross: site -> region tokens. empty: site -> the tokens of no picture, for rows that shall not see the source; {} to
    add nothing to them. sigmas: (highest, lowest) noise at which it works, or None for always. keep_unconditional:
    whether negative rows see the source too. target: P, or None for what Apply HPFA knows. background: share, 0 to 1,
    of what is added that places of the target's background get, where the target's regions are known.
    trained: whether the model learned with these tokens; then they take the place of those that Apply HPFA brings, and
    give HPFA its alignment.
    """

    cross: Mapping[str, CrossTokens]
    empty: Mapping[str, CrossTokens] = field(default_factory=dict)
    sigmas: tuple[float, float] | None = None
    keep_unconditional: bool = False
    target: HumanParsing | None = None
    given: bool = False
    background: float = 1.0
    trained: bool = False

    def __deepcopy__(self, memo: dict) -> AppliedCAA:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def batch(self) -> int:
        """How many sources."""
        return next(iter(self.cross.values())).batch

    @property
    def counts(self) -> dict[str, int]:
        """What the latents of a batch share -> how many there are."""
        own = {"CAA source images": self.batch}
        return own if self.target is None else {**own, "target parsings": self.target.batch}

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run."""
        return itemsize * sum(x.numel for side in (self.cross, self.empty) for x in side.values())

    def on(self, cache: RunCache, site: str, like: Tensor, empty: bool = False) -> CrossTokens:
        """The tokens of a site, on the device and in the type of `like`."""
        tokens = (self.empty if empty else self.cross)[site]
        return cache.of((self, site, like.device, like.dtype, empty), lambda: tokens.to(like.device, like.dtype))

    def gate(self, prior: Tensor | None) -> Tensor | None:
        """How much of what is added each place gets: [B, N, 1], or None for all of it. prior: P [B, N, 7] or None."""
        if prior is None or self.background == 1:
            return None
        return 1 - (1 - self.background) * prior[..., Region.BACKGROUND, None]
