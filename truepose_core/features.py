"""SourceFeatures: what SourceNet knows of the source person, computed once and used for every pose and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from truepose_core.alignment.skeleton_prior import body_coordinates, region_prior, warp
from truepose_core.attention.caa import RegionTokens
from truepose_core.attention.hpfa import region_rows_weight
from truepose_core.body.places import SurfacePlaces
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing


def grid_of(tokens: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """The (rows, columns) of a UNet level with that many tokens over a latent of (height, width).

    Each level halves the one above, rounding up, as a stride-2 convolution does. Raises TruePoseError for a count
    that no level has.
    """
    height, width = latent_size
    while height * width > tokens and height * width > 1:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise TruePoseError(
            f"an attention site has {tokens} tokens, which is no level of a {latent_size[0]}x{latent_size[1]} latent; "
            "expected a UNet that halves its grid at each level"
        )
    return height, width


def _paired(target_body: Tensor, *of_sources: Tensor) -> tuple[Tensor, ...]:
    """Tensors of S sources and target poses [T, 18, 3], repeated to one row each: T / S poses for each source."""
    count, sources = target_body.shape[0], of_sources[0].shape[0]
    if count == 1:
        return *of_sources, target_body.expand(sources, -1, -1)
    if count % sources:
        raise TruePoseError(
            f"there are {count} target poses and {sources} source images; expected as many, or 1 of either, or a "
            "number of poses that the sources divide"
        )
    return *(x.repeat_interleave(count // sources, 0) for x in of_sources), target_body


NOISE_SEED = 0
"""Of the noise that a source is read with: always the same, so that what is read is."""
_LEAST_SIGMA = 1e-6


@dataclass(frozen=True, eq=False)
class Level:
    """What was read of a source at one noise level.

    sigma: standard deviation of the noise beside a picture of 1; 0 for the clean source. sites: as in SourceFeatures.
    style: place between two blocks -> mean and deviation of each channel there, [B, C, 1, 1] each.
    """

    sigma: float
    sites: Mapping[str, Tensor]
    style: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def nearest_level(levels: tuple[Level, ...], sigma: float) -> int:
    """The level that is nearest to a noise level in log-SNR, which is nearest in log sigma."""
    at = math.log(max(sigma, _LEAST_SIGMA))
    return min(range(len(levels)), key=lambda i: abs(math.log(max(levels[i].sigma, _LEAST_SIGMA)) - at))


@dataclass(frozen=True, eq=False)
class SourceFeatures:
    """Per attention site the source's normed hidden states, and where they lie on the person.

    family: the model family that made them ("sd15", "sdxl", "mannequin", ...); another family's are refused.
    sites: site name -> [B, M, C], the input of that self-attention; empty for a model that reads no source.
    latent_size: (h, w) of the source latent. parsing: the source's, [B, 7, H, W]. body: its keypoints [B, 18, 3], or
    None (no body match, no skeleton prior).
    caa: the region tokens of the source, or None. image: the source [B, 3, H, W] in [0, 1] at the model's size, where
    the model also reads the source carried to the target pose; else None.
    context: what cross-attention reads, [B, T, c], where that is an embedding of the source picture; else None.
    latent: the source's [B, C, h, w], where SourceNet runs during sampling (`sites` is then empty); else None.
    surface: the source people's bodies, where places and priors go by the body's surface; None: by the skeleton.
    levels: what was read at each noise level, from the highest, of which `sites` are the middle one; empty where the
    source was read once.
    """

    family: str
    sites: dict[str, Tensor]
    latent_size: tuple[int, int]
    parsing: HumanParsing
    body: Tensor | None = None
    caa: RegionTokens | None = None
    image: Tensor | None = None
    context: Tensor | None = None
    latent: Tensor | None = None
    surface: SurfacePlaces | None = None
    levels: tuple[Level, ...] = ()
    # Not an argument, so that `dataclasses.replace` never carries rows of another parsing along.
    _rows: dict[tuple[str, Any], Any] = field(init=False, default_factory=dict, repr=False)

    def grid(self, site: str) -> tuple[int, int]:
        """(rows, columns) of a site's tokens."""
        return grid_of(self.sites[site].shape[1], self.latent_size)

    def regions(self, site: str) -> Tensor:
        """Region rows R: [B, M, 7], summing to 1. Computed once per token count."""
        h, w = self.grid(site)
        key = ("regions", h * w)
        if key not in self._rows:
            self._rows[key] = self.parsing.tokens(h, w)
        return self._rows[key]

    def coordinates(self, site: str) -> Tensor | None:
        """Places on the body of a site's tokens: [B, M, 3] on the skeleton (see `body_coordinates`) or [B, M, 4] on the
        surface (`body.places`); None without keypoints."""
        if self.body is None:
            return None
        h, w = self.grid(site)
        key = ("body", h * w)
        if key not in self._rows:
            aspect = self.latent_size[1] / self.latent_size[0]
            if self.surface is None:
                self._rows[key] = body_coordinates(self.body, h, w, aspect)
            else:
                self._rows[key] = self.surface.tokens(self.surface.bodies, h, w, aspect).to(self.body)
        return self._rows[key]

    def bodies_in(self, target_body: Tensor, aspect: float) -> BodyPose | None:
        """The source people in the poses of keypoints [T, 18, 3], lifted once; None where they go by the skeleton."""
        if self.surface is None:
            return None
        key = ("pose", (round(aspect, 6), target_body.detach().cpu().numpy().tobytes()))
        if key not in self._rows:
            self._rows[key] = self.surface.target(target_body, aspect)
        return self._rows[key]

    def target_coordinates(self, target_body: Tensor, height: int, width: int, aspect: float) -> Tensor | None:
        """Places on the body of a height x width grid over the target pictures, as `coordinates` has them for the
        source: [T, height * width, 3 or 4]. None where the source goes by the surface and the pose shows too little."""
        if self.surface is None:
            return body_coordinates(target_body, height, width, aspect)
        bodies = self.bodies_in(target_body, aspect)
        return None if bodies is None else self.surface.tokens(bodies, height, width, aspect).to(target_body)

    def token_weights(self, site: str, omega: Tensor | None) -> Tensor | None:
        """w(j) of a site's tokens, [B, M] in [0, 1], by the region weights omega [7]; None where all are 1."""
        if omega is None or bool((omega == 1).all()):
            return None
        return region_rows_weight(self.regions(site), omega)

    def prior(self, target_body: Tensor, height: int, width: int) -> HumanParsing | None:
        """The parsing carried to the target poses [T, 18, 3], along the body's surface or along the skeleton:
        P [max(S, T), 7, height, width].

        S sources serve T poses, T / S each in a row, or one pose serves all sources. None without keypoints.
        """
        if self.body is None:
            return None
        masks, body, poses = _paired(target_body, self.parsing.masks, self.body)
        bodies = self.bodies_in(poses, width / height)
        if bodies is None:
            return region_prior(HumanParsing(masks), body, poses, height, width)
        return self.surface.carry_parsing(self.parsing, bodies, (height, width)).to(masks.device)

    def carried(self, target_body: Tensor, omega: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The source picture carried to the target poses, and how certain each pixel is: ([max(S, T), 3, H, W] in
        [0, 1], [max(S, T), 1, H, W]). omega: region weights [7]; what is not taken is grey and uncertain. None without
        keypoints or picture."""
        if self.body is None or self.image is None:
            return None
        masks, body, image, poses = _paired(target_body, self.parsing.masks, self.body, self.image)
        picture, certain = warp(image, HumanParsing(masks), body, poses)
        if omega is not None:
            prior = region_prior(HumanParsing(masks), body, poses, *image.shape[-2:])
            weight = torch.einsum("r,brhw->bhw", omega.to(image), prior.masks)[:, None]
            picture, certain = 0.5 + weight * (picture - 0.5), weight * certain
        return picture, certain

    def with_sites(self, sites: dict[str, Tensor]) -> SourceFeatures:
        """The same source with other hidden states of the same grids, whose rows are not computed again."""
        other = replace(self, sites=sites)
        object.__setattr__(other, "_rows", self._rows)
        return other

    def at(self, sigma: float) -> SourceFeatures:
        """The source as it was read at the level nearest to this one."""
        return self.with_sites(dict(self.levels[nearest_level(self.levels, sigma)].sites))

    @property
    def batch(self) -> int:
        """How many sources: B."""
        return self.parsing.batch

    @property
    def nbytes(self) -> int:
        """Bytes held by the hidden states."""
        return sum(x.numel() * x.element_size() for x in self.sites.values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SourceFeatures:
        """The same features elsewhere. dtype: of hidden states and region tokens; all else keeps its own."""
        sites = {k: v.to(device=device, dtype=dtype) for k, v in self.sites.items()}
        caa = self.caa
        if caa is not None:
            caa = RegionTokens(caa.tokens.to(device=device, dtype=dtype), caa.shown.to(device=device))
        body = None if self.body is None else self.body.to(device=device)
        image = None if self.image is None else self.image.to(device=device)
        context, latent = (None if x is None else x.to(device=device, dtype=dtype) for x in (self.context, self.latent))
        parsing = self.parsing.to(device)
        levels = tuple(
            Level(
                level.sigma,
                {k: v.to(device=device, dtype=dtype) for k, v in level.sites.items()},
                {k: tuple(x.to(device) for x in v) for k, v in level.style.items()},
            )
            for level in self.levels
        )
        return SourceFeatures(
            self.family,
            sites,
            self.latent_size,
            parsing,
            body,
            caa,
            image,
            context,
            latent,
            surface=self.surface,
            levels=levels,
        )
