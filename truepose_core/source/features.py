"""SourceFeatures: what SourceNet knows of the source person, computed once and used for every pose and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from truepose_core.alignment.control3d import is_liftable
from truepose_core.alignment.recurrent import AlignedPerson, align_bodies, align_person
from truepose_core.attention.caa import RegionTokens
from truepose_core.attention.hpfa import region_rows_weight
from truepose_core.body.places import SurfacePlaces
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior, warp
from truepose_core.pose.limbs import body_coordinates


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


def _key(target_body: Tensor, aspect: float) -> tuple[float, bytes]:
    """What the same target poses on pictures of the same shape are known by."""
    return round(aspect, 6), target_body.detach().cpu().numpy().tobytes()


NOISE_SEED = 0
"""Of the noise that a source is read with: always the same, so that what is read is."""
_LEAST_SIGMA = 1e-6

Style = Mapping[str, tuple[Tensor, Tensor]]
"""Place between two blocks of a UNet -> mean and standard deviation of each channel there, [B, C, 1, 1] each."""


@dataclass(frozen=True, eq=False)
class Level:
    """What was read of a source at one noise level.

    sigma: standard deviation of the noise beside a picture of 1; 0 for the clean source. sites: as in SourceFeatures.
    """

    sigma: float
    sites: Mapping[str, Tensor]
    style: Style = field(default_factory=dict)


def nearest_level(levels: tuple[Level, ...], sigma: float) -> int:
    """The level that is nearest to a noise level in log-SNR, which is nearest in log sigma."""
    at = math.log(max(sigma, _LEAST_SIGMA))
    return min(range(len(levels)), key=lambda i: abs(math.log(max(levels[i].sigma, _LEAST_SIGMA)) - at))


@dataclass(frozen=True, eq=False)
class WholeSource:
    """The source as it was given: image [S, 3, H, W] in [0, 1], its parsing, keypoints [S, 18, 3], and its bodies,
    where they are known. On the CPU."""

    image: Tensor
    parsing: HumanParsing
    body: Tensor
    pose: BodyPose | None = None


def faded(picture: Tensor, parsing: HumanParsing, omega: Tensor) -> tuple[Tensor, Tensor]:
    """A carried picture [B, 3, H, W] with what region weights omega [7] do not take in grey, and the weight of each
    pixel [B, 1, H, W]."""
    weight = torch.einsum("r,brhw->bhw", omega.to(picture), parsing.masks.to(picture))[:, None]
    return 0.5 + weight * (picture - 0.5), weight


@dataclass(frozen=True, eq=False)
class SourceFeatures:
    """Per attention site the source's normed hidden states, and where they lie on the person.

    family: the model family that made them ("sd15", "sdxl", "mannequin", ...); another family's are refused.
    sites: site name -> [B, M, C], the input of that self-attention; empty for a model that reads no source.
    latent_size: (h, w) of the source latent. parsing: the source's, [B, 7, H, W]. body: its keypoints [B, 18, 3], or
    None (no body match, no skeleton prior).
    caa: the region tokens of the source, or None. image: the source [B, 3, H, W] in [0, 1] at the model's size, where
    the model also reads the source carried or aligned to the target pose; else None.
    context: what cross-attention reads, [B, T, c], where that is an embedding of the source picture; else None.
    latent: the source's [B, C, h, w], where SourceNet runs during sampling (`sites` is then empty); else None.
    surface: the source people's bodies, where places and priors go by the body's surface; None: by the skeleton. align:
    whether recurrent alignment brings the source to the target pose (`aligned`), which needs those bodies. beside:
    whether what is read then is its tokens, beside its own (`source.align`), and not its picture. whole: with align,
    the source at its own size, so that pictures of any size can be composed of it (`aligned_at`).
    levels: what was read at each noise level, from the highest, of which `sites` are the middle one; empty where the
    source was read once. style: as of a `Level`, of the pass that `sites` are of.
    shown: how much of each place is really there [B, 1, h, w], for tokens that were aligned to another pose
    (`source.align`); None for all of it.
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
    style: Style = field(default_factory=dict)
    align: bool = False
    whole: WholeSource | None = None
    shown: Tensor | None = None
    beside: bool = False
    # Not an argument, so that `dataclasses.replace` never carries rows of another parsing along.
    _rows: dict[tuple[str, Any], Any] = field(init=False, default_factory=dict, repr=False)

    def grid(self, site: str) -> tuple[int, int]:
        """(rows, columns) of a site's tokens."""
        return grid_of(self.sites[site].shape[1], self.latent_size)

    def regions(self, site: str) -> Tensor:
        """Region rows R: [B, M, 7], summing to 1, or to what is `shown`. Computed once per token count."""
        h, w = self.grid(site)
        key = ("regions", h * w)
        if key not in self._rows:
            rows = self.parsing.tokens(h, w)
            if self.shown is not None:
                rows = rows * adaptive_avg_pool2d(self.shown.to(rows), (h, w)).flatten(1)[..., None]
            self._rows[key] = rows
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
        key = ("pose", _key(target_body, aspect))
        if key not in self._rows:
            self._rows[key] = self.surface.target(target_body, aspect)
        return self._rows[key]

    def know(self, target_body: Tensor, bodies: BodyPose, aligned: AlignedPerson | None = None) -> None:
        """Hand in what is known of target poses [T, 18, 3] before it is asked for: their bodies [T], and what alignment
        makes of the sources in these poses."""
        aspect = self.latent_size[1] / self.latent_size[0]
        self._rows["pose", _key(target_body, aspect)] = bodies
        if aligned is not None:
            self._rows["aligned", _key(target_body, aspect)] = aligned

    def aligned(self, target_body: Tensor) -> AlignedPerson | None:
        """The sources aligned to the poses of keypoints [T, 18, 3], made once: max(S, T) pictures of the source's size.
        None where the source is not carried so, or a pose shows too little of a person."""
        if not self.align or self.image is None or self.surface is None:
            return None
        masks, image, poses = _paired(target_body, self.parsing.masks, self.image)
        aspect = image.shape[-1] / image.shape[-2]
        key = ("aligned", _key(poses, aspect))
        if key not in self._rows:
            bodies = self.bodies_in(poses, aspect)
            sources = self.surface.bodies
            self._rows[key] = (
                None
                if bodies is None
                else align_bodies(
                    image.float().cpu(),
                    HumanParsing(masks.float().cpu()),
                    sources.repeat(len(bodies) // len(sources)),
                    bodies,
                    poses.float().cpu(),
                )
            )
        return self._rows[key]

    def target_coordinates(self, target_body: Tensor, height: int, width: int, aspect: float) -> Tensor | None:
        """Places on the body of a height x width grid over the target pictures, as `coordinates` has them for the
        source: [T, height * width, 3 or 4]. None where the source goes by the surface and the pose shows too little."""
        if self.surface is None:
            return body_coordinates(target_body, height, width, aspect)
        bodies = self.bodies_in(target_body, aspect)
        return None if bodies is None else self.surface.tokens(bodies, height, width, aspect).to(target_body)

    def aligned_at(
        self,
        size: tuple[int, int],
        target_body: Tensor,
        omega: Tensor | None = None,
        target: BodyPose | None = None,
    ) -> Tensor | None:
        """As `carried`, pictures [T, 3, *size] composed of the source at its own size. target_body: [T, 18, 3] on
        pictures of that size; target: their bodies, where they are known. None where `whole` is missing, or a pose
        shows too little of a person."""
        whole = self.whole
        if whole is None or not (is_liftable(whole.body) and is_liftable(target_body)):
            return None
        made = align_person(whole.image, whole.parsing, whole.body, target_body, size, source=whole.pose, target=target)
        return made.picture if omega is None else faded(made.picture, made.parsing, omega)[0]

    def token_weights(self, site: str, omega: Tensor | None) -> Tensor | None:
        """w(j) of a site's tokens, [B, M] in [0, 1], by the region weights omega [7]; None where all are 1."""
        if omega is None or bool((omega == 1).all()):
            return None if self.shown is None else self.regions(site).sum(-1)
        return region_rows_weight(self.regions(site), omega)

    def prior(self, target_body: Tensor, height: int, width: int) -> HumanParsing | None:
        """The parsing carried to the target poses [T, 18, 3], by alignment, along the body's surface or the skeleton:
        P [max(S, T), 7, height, width].

        S sources serve T poses, T / S each in a row, or one pose serves all sources. None without keypoints.
        """
        if self.body is None:
            return None
        aligned = self.aligned(target_body)
        if aligned is not None:
            pooled = adaptive_avg_pool2d(aligned.parsing.masks, (height, width)).to(self.parsing.masks)
            return HumanParsing(pooled / pooled.sum(1, keepdim=True))
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
        aligned = self.aligned(target_body)
        if aligned is None:
            picture, certain = warp(image, HumanParsing(masks), body, poses)
        else:
            picture, certain = aligned.picture.to(image), aligned.seen.to(image)
        if omega is not None:
            if aligned is None:
                prior = region_prior(HumanParsing(masks), body, poses, *image.shape[-2:])
            else:
                prior = aligned.parsing.to(image.device)
            picture, weight = faded(picture, prior, omega)
            certain = weight * certain
        return picture, certain

    def with_level(self, level: Level) -> SourceFeatures:
        """The same source as another pass read it, on the same grids, whose rows are not computed again."""
        other = replace(self, sites=dict(level.sites), style=level.style)
        object.__setattr__(other, "_rows", self._rows)
        return other

    def at(self, sigma: float) -> SourceFeatures:
        """The source as it was read at the level nearest to this one."""
        return self.with_level(self.levels[nearest_level(self.levels, sigma)])

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
                _moved(level.style, device),
            )
            for level in self.levels
        )
        made = SourceFeatures(
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
            style=_moved(self.style, device),
            align=self.align,
            whole=self.whole,
            shown=self.shown,
        )
        # Bodies and pictures of target poses are on the CPU, and good everywhere.
        made._rows.update({key: found for key, found in self._rows.items() if key[0] in ("pose", "aligned")})
        return made


def _moved(style: Style, device: torch.device | str | None) -> Style:
    return {place: tuple(x.to(device) for x in found) for place, found in style.items()}
