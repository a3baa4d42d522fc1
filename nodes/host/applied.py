"""A source and CAA as they are applied to a MODEL: what is read of them at each block."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from truepose_core.attention.fusion import KeptTokens, keep_tokens
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.source.features import SourceFeatures

from .caa import CrossTokens
from .features import SourceReader
from .unet import _PARTS, UNCONDITIONAL, _is_on, in_window


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
    _copies: dict = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        weights = torch.tensor(self.omega)
        kept: dict[str, KeptTokens] = {}
        by_count: dict[int, KeptTokens | None] = {}
        for site, tokens in self.source.sites.items():
            if site.split(".")[0] not in _PARTS[self.blocks] or self.strength == 0:
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
        return self.beta > 0 if self.weights is None else any(_is_on(w.beta) for w in self.weights.values())

    @property
    def has_gamma(self) -> bool:
        """Whether body match is on at any site."""
        return self.gamma > 0 if self.weights is None else any(_is_on(w.gamma) for w in self.weights.values())

    @property
    def aligns(self) -> bool:
        """Whether P comes from CAA."""
        return bool(self.cross) and not self.given and self.has_beta

    def site_weights(self, site: str) -> SiteWeights:
        """How this site matches."""
        return SiteWeights(self.beta, self.gamma) if self.weights is None else self.weights[site]

    def in_window(self, sigma: Tensor | None) -> bool:
        """Whether it works at this noise level."""
        return in_window(self.sigmas, sigma)

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run: all kept tokens, and the keys and values of the widest site."""
        total = widest = 0
        for site, kept in self.kept.items():
            tokens = self.source.sites[site]
            count = tokens.shape[0] * (tokens.shape[1] if kept.index is None else kept.index.shape[1])
            total += (count if self.reader is None else tokens.shape[:2].numel()) * tokens.shape[2] * itemsize
            widest = max(widest, count * tokens.shape[2] * itemsize)
        return total + 4 * widest

    def on(self, device: torch.device, dtype: torch.dtype, site: str, level: int = 0) -> _Kept:
        """The kept tokens of a site at a level of the source on the device, copied at first use and freed by `release`,
        or when another level is asked for: a sampler does not come back."""
        key = (device, dtype, site, level)
        with self._lock:
            if key not in self._copies:
                for other in [k for k in self._copies if len(k) == 4 and k[3] != level]:
                    del self._copies[other]
                self._copies[key] = self._copy(device, dtype, site, level)
            return self._copies[key]

    def _copy(self, device: torch.device, dtype: torch.dtype, site: str, level: int) -> _Kept:
        levels = self.source.levels
        tokens, kept = (levels[level].sites if levels else self.source.sites)[site], self.kept[site]
        how, cross = self.site_weights(site), self.cross.get(site)
        matched = _is_on(how.beta) and (self.target is not None or cross is not None)
        rows = self.source.regions(site) if matched or how.region_log_weight is not None else None
        body = self.source.coordinates(site) if _is_on(how.gamma) and self.target_body is not None else None

        def put(x: float | Tensor | None, kind: torch.dtype = torch.float32) -> float | Tensor | None:
            return x.to(device=device, dtype=kind) if isinstance(x, Tensor) else x

        # Weights and coordinates stay float32 here: they are rounded once, when they enter the keys.
        return _Kept(
            None if self.reader is not None else put(kept.of(tokens), dtype),
            None if kept.index is None or self.reader is None else kept.index.to(device),
            None if rows is None else put(kept.of(rows)),
            put(kept.log_w),
            None if body is None else put(kept.of(body)),
            # Numbers that match nothing become a plain 0, so that no call has to look at them on the GPU.
            SiteWeights(
                put(how.beta) if _is_on(how.beta) else 0.0,
                put(how.gamma) if _is_on(how.gamma) else 0.0,
                put(how.region_log_weight),
            ),
            None if cross is None else cross.to(device, dtype),
        )

    def aligned_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two parts of `aligned` on the device."""
        key = (device, dtype, "")
        with self._lock:
            if key not in self._copies:
                self._copies[key] = tuple(x.to(device=device, dtype=dtype) for x in self.aligned)
            return self._copies[key]

    def release(self) -> None:
        """Free the device copies."""
        with self._lock:
            self._copies.clear()


@dataclass(frozen=True)
class _Kept:
    """What one site reads: tokens [S, K, C], regions [S, K, 7], log_w [S, K], body [S, K, 3] (or None), and how. Where
    each call reads the source anew: no tokens, but which of them to keep, index [S, K] (None for all)."""

    tokens: Tensor | None
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
    _copies: dict = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __deepcopy__(self, memo: dict) -> AppliedCAA:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def batch(self) -> int:
        """How many sources."""
        return next(iter(self.cross.values())).batch

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run."""
        return itemsize * sum(x.numel for side in (self.cross, self.empty) for x in side.values())

    def on(self, device: torch.device, dtype: torch.dtype, site: str, empty: bool = False) -> CrossTokens:
        """The tokens of a site on the device, copied at first use and freed by `release`."""
        key = (device, dtype, site, empty)
        with self._lock:
            if key not in self._copies:
                self._copies[key] = (self.empty if empty else self.cross)[site].to(device, dtype)
            return self._copies[key]

    def release(self) -> None:
        """Free the device copies."""
        with self._lock:
            self._copies.clear()

    def gate(self, prior: Tensor | None) -> Tensor | None:
        """How much of what is added each place gets: [B, N, 1], or None for all of it. prior: P [B, N, 7] or None."""
        if prior is None or self.background == 1:
            return None
        return 1 - (1 - self.background) * prior[..., Region.BACKGROUND, None]
