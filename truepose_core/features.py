"""SourceFeatures: what SourceNet knows of the source person, computed once and used for every pose and seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from truepose_core.alignment.skeleton_prior import body_coordinates
from truepose_core.attention.caa import RegionTokens
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


@dataclass(frozen=True, eq=False)
class SourceFeatures:
    """Per attention site the source's normed hidden states, and where they lie on the person.

    family: the model family that made them ("sd15", "sdxl", "mannequin", ...); another family's are refused.
    sites: site name -> [B, M, C], the input of that self-attention; empty for a model that reads no source.
    latent_size: (h, w) of the source latent. parsing: the source's, [B, 7, H, W]. body: its keypoints [B, 18, 3], or
    None (no body match, no skeleton prior).
    caa: the region tokens of the source, or None. image: the source [B, 3, H, W] in [0, 1] at the model's size, where
    the model also reads the source carried to the target pose; else None.
    """

    family: str
    sites: dict[str, Tensor]
    latent_size: tuple[int, int]
    parsing: HumanParsing
    body: Tensor | None = None
    caa: RegionTokens | None = None
    image: Tensor | None = None
    # Not an argument, so that `dataclasses.replace` never carries rows of another parsing along.
    _rows: dict[tuple[str, int], Tensor] = field(init=False, default_factory=dict, repr=False)

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
        """Body coordinates (see `body_coordinates`): [B, M, 3], or None without keypoints."""
        if self.body is None:
            return None
        h, w = self.grid(site)
        key = ("body", h * w)
        if key not in self._rows:
            aspect = self.latent_size[1] / self.latent_size[0]
            self._rows[key] = body_coordinates(self.body, h, w, aspect)
        return self._rows[key]

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
        return SourceFeatures(self.family, sites, self.latent_size, self.parsing.to(device), body, caa, image)
