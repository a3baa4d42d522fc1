"""`KeypointPredictor`: reads the keypoints off an estimate of the clean picture, however blurred, in milliseconds.

It is there to be differentiated: guidance asks where the picture should change for a joint to move. For keypoints of
photographs see `truepose_core.pose.estimation`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, silu

from truepose_core.errors import TruePoseError
from truepose_core.pose.edit import BODY_MIRROR

KIND = "keypoints"
JOINTS = 18
PICTURES = "pixels"


SIZE = (64, 48)
WIDTHS = (32, 56, 88)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(silu(self.first(silu(self.norm(x)))))


class KeypointPredictor(nn.Module):
    """Picture or latent -> 18 OpenPose keypoints: a place each, the mean of a heat map, and how sure it is seen."""

    def __init__(
        self,
        space: str = PICTURES,
        channels: int = 3,
        size: tuple[int, int] = SIZE,
        widths: tuple[int, int, int] = WIDTHS,
    ):
        """space: what it reads: "pixels" (pictures in [-1, 1]) or "vae" (a VAE's scaled latents). channels: how many
        that has. size: (height, width) that everything is brought to first. widths: of the grids at 1/2, 1/4, 1/8."""
        super().__init__()
        self.space, self.channels, self.size = space, channels, tuple(size)
        self.sizes = {"space": space, "channels": channels, "size": list(size), "widths": list(widths)}
        fine, middle, coarse = widths
        self.stem = nn.Conv2d(channels, fine, 4, stride=2, padding=1)
        self.fine = _Block(fine)
        self.down = nn.Conv2d(fine, middle, 4, stride=2, padding=1)
        self.middle = _Block(middle)
        self.further_down = nn.Conv2d(middle, coarse, 4, stride=2, padding=1)
        self.coarse = _Block(coarse)
        # Which hand is the left one, the whole picture tells.
        self.whole = nn.Linear(coarse, coarse)
        self.coarse_again = _Block(coarse)
        self.seen = nn.Linear(coarse, JOINTS)
        self.seen_there = nn.Conv2d(fine, JOINTS, 1)
        self.up = nn.Conv2d(coarse, middle, 1)
        self.middle_again = _Block(middle)
        self.further_up = nn.Conv2d(middle, fine, 1)
        self.fine_again = _Block(fine)
        self.heat = nn.Conv2d(fine, JOINTS, 3, padding=1)

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """picture: [B, channels, H, W] of any size -> (places [B, 18, 2], x and y normalised to the picture, logits
        [B, 18] of being seen). Raises TruePoseError for another number of channels."""
        heat, seen = self.heat_maps(picture)
        return place_of(heat), seen

    def heat_maps(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """(heat maps [B, 18, h, w] that sum to 1, logits [B, 18] of being seen). picture: as for `forward`."""
        if picture.ndim != 4 or picture.shape[1] != self.channels:
            raise TruePoseError(
                f"the keypoint predictor was given {tuple(picture.shape)}; expected [B, {self.channels}, H, W]"
            )
        if tuple(picture.shape[2:]) != self.size:
            picture = interpolate(picture, self.size, mode="bilinear", antialias=True)
        fine = self.fine(self.stem(picture))
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.further_down(middle))
        coarse = self.coarse_again(coarse + self.whole(silu(coarse).mean((2, 3)))[..., None, None])
        middle = self.middle_again(middle + interpolate(self.up(coarse), middle.shape[2:]))
        fine = silu(self.fine_again(fine + interpolate(self.further_up(middle), fine.shape[2:])))
        heat = self.heat(fine)
        heat = heat.flatten(2).softmax(-1).view(heat.shape)
        seen = self.seen(silu(coarse).mean((2, 3))) + (heat * self.seen_there(fine)).sum((2, 3))
        return heat, seen

    def body(self, picture: Tensor) -> Tensor:
        """The same as keypoints [B, 18, 3], zeros where a joint is not seen."""
        places, seen = self(picture)
        visible = (seen > 0).to(places)[..., None]
        return torch.cat([places, torch.ones_like(visible)], -1) * visible


def place_of(heat: Tensor) -> Tensor:
    """The mean place [B, J, 2] of heat maps [B, J, h, w], x and y normalised."""
    height, width = heat.shape[2:]
    xs = (torch.arange(width, device=heat.device) + 0.5) / width
    ys = (torch.arange(height, device=heat.device) + 0.5) / height
    return torch.stack([(heat.sum(2) * xs).sum(-1), (heat.sum(3) * ys).sum(-1)], -1)


def nearer_sides(places: Tensor, target: Tensor, aspect: float) -> Tensor:
    """The target [B, 18, 3], left and right exchanged in those pictures where the places [B, 18, 2] lie nearer to that.

    A small predictor takes some backs for fronts, and tells one profile's arms apart by chance. That is no reason to
    turn anybody round. aspect: width / height of the pictures.
    """
    both = torch.stack([target, target[:, list(BODY_MIRROR)]])
    wanted = (both[..., 2] > 0).to(places)
    off = ((places.detach() - both[..., :2]) * places.new_tensor([aspect, 1.0])).square().sum(-1)
    mean = (off * wanted).sum(-1) / wanted.sum(-1).clamp(min=1)
    return torch.where((mean[1] < mean[0])[:, None, None], both[1], both[0])


def picture_of(latent: Tensor, patch: int) -> Tensor:
    """A latent of pixel patches [B, 3 p^2, h, w] as a picture [B, 3, h p, w p] in [-1, 1], not clamped: where a clamp
    holds there is no gradient."""
    return pixel_shuffle(latent, patch)


def load_predictor(path: str | Path | None = None) -> KeypointPredictor:
    """A predictor that `truepose train --row keypoints` wrote; None for the one that ships, which knows mannequins.
    Raises TruePoseError for a file that is none."""
    from truepose_core.weights.small import load_small
    from truepose_core.weights.strict import bundled_path

    return load_small(path or bundled_path("keypoints"), KIND, KeypointPredictor)
