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

    Each level halves the one above, rounding up, as a stride-2 convolution does.
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


@dataclass(frozen=True)
class SourceFeatures:
    """Per attention site the source's normed hidden states, and where they lie on the person.

    family: the model family that made them ("sd15", "sdxl", "mannequin", ...); another family's are refused.
    sites: site name -> [B, M, C], the input of that self-attention. latent_size: (h, w) of the source latent.
    parsing: the source's. body: its keypoints [B, 18, 3], or None (no body match, no skeleton prior).
    caa: the region tokens of the source, or None.
    """

    family: str
    sites: dict[str, Tensor]
    latent_size: tuple[int, int]
    parsing: HumanParsing
    body: Tensor | None = None
    caa: RegionTokens | None = None
    _rows: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def grid(self, site: str) -> tuple[int, int]:
        return grid_of(self.sites[site].shape[1], self.latent_size)

    def regions(self, site: str) -> Tensor:
        """Region rows R: [B, M, 7]."""
        h, w = self.grid(site)
        key = ("regions", h * w)
        if key not in self._rows:
            self._rows[key] = self.parsing.tokens(h, w)
        return self._rows[key]

    def coordinates(self, site: str) -> Tensor | None:
        """Body coordinates: [B, M, 3], or None without keypoints."""
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
        return next(iter(self.sites.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held by the hidden states."""
        return sum(x.numel() * x.element_size() for x in self.sites.values())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SourceFeatures:
        sites = {k: v.to(device=device, dtype=dtype) for k, v in self.sites.items()}
        caa = self.caa
        if caa is not None:
            caa = RegionTokens(caa.tokens.to(device=device, dtype=dtype), caa.shown.to(device=device))
        body = None if self.body is None else self.body.to(device=device)
        return SourceFeatures(self.family, sites, self.latent_size, self.parsing.to(device), body, caa)
