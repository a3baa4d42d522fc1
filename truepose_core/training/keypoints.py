"""`truepose train --row keypoints`: the predictor that guidance reads poses with, on pictures made worse on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import (
    affine_grid,
    binary_cross_entropy_with_logits,
    conv2d,
    grid_sample,
    interpolate,
    pad,
)

from truepose_core.errors import TruePoseError
from truepose_core.guidance.keypoints import KIND, PICTURES, WIDTHS, KeypointPredictor, place_of
from truepose_core.training.data import MannequinPool
from truepose_core.training.folder import FolderPairs
from truepose_core.training.small import SmallConfig, SmallTrainer

SIZES = {PICTURES: (64, 48), "vae": (512, 384)}
"""(height, width) of the training pictures, in pixels."""
_LONGEST_BLUR = 3.0
"""Standard deviation in pixels of a picture 64 high: about what the estimate is at the first steps."""
_GRAIN = 0.25
_LARGEST_POOL = 4 * 2**30


@dataclass(frozen=True)
class KeypointConfig(SmallConfig):
    """people, poses, fresh: the pool of pictures, as for the models. data: "mannequin", or a folder of pairs. vae: a
    folder in diffusers format whose latents to read, "" for pictures. widths: as `KeypointPredictor`."""

    steps: int = 1800
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    ema: float = 0.99
    save_every: int = 250
    people: int = 768
    poses: int = 4
    fresh: int = 2
    data: str = "mannequin"
    vae: str = ""
    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        if len(self.widths) != 3 or any(w < 8 or w % 8 for w in self.widths):
            raise TruePoseError(f"widths are {self.widths}; expected three multiples of 8")
        height, width = SIZES["vae" if self.vae else PICTURES]
        pool = self.people * self.poses * 10 * height * width
        if self.data == "mannequin" and pool > _LARGEST_POOL:
            raise TruePoseError(
                f"{self.people} people in {self.poses} poses at {width}x{height} take {pool / 2**30:.1f} GiB; expected "
                f"at most {_LARGEST_POOL / 2**30:.0f}: lower --people"
            )


def turned_away(body: Tensor) -> Tensor:
    """How often to draw each of the people [N, 18, 3]: those seen from behind, few in the world, as often as others.
    Without that, the predictor takes everybody to be seen from the front, and their left hand for their right."""
    behind = (body[:, 2, 0] > body[:, 5, 0]) & (body[:, (2, 5), 2] > 0).all(1)
    share = behind.float().mean().clamp(0.02, 0.5)
    return torch.where(behind, (1 - share) / share, 1.0)


def blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of pictures [B, C, H, W], each with its own standard deviation [B] in pixels."""
    reach = math.ceil(3 * max(float(sigma.max()), 0.3))
    x = torch.arange(-reach, reach + 1, device=pictures.device)
    kernel = torch.exp(-x.square() / (2 * sigma.clamp_min(1e-3).square()[:, None]))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(pictures.shape[1], 0)
    flat = pictures.flatten(0, 1)[None]
    for shape, margin in (
        ((-1, 1, 1, 2 * reach + 1), (reach, reach, 0, 0)),
        ((-1, 1, 2 * reach + 1, 1), (0, 0, reach, reach)),
    ):
        flat = conv2d(pad(flat, margin, mode="replicate"), kernel.reshape(shape), groups=len(kernel))
    return flat[0].unflatten(0, pictures.shape[:2])


def place(pictures: Tensor, body: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the people smaller and elsewhere in the frame. pictures: [B, 3, H, W]; body: [B, 18, 3] -> the same."""
    count = len(pictures)
    scale = 1 + 0.6 * torch.rand(count, generator=generator) * (torch.rand(count, generator=generator) < 0.5)
    shift = (torch.rand((count, 2), generator=generator) * 2 - 1) * (scale - 1)[:, None]
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = scale
    matrix[:, :, 2] = shift
    grid = affine_grid(matrix, list(pictures.shape), align_corners=False)
    moved = grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    at = ((body[..., :2] * 2 - 1 - shift[:, None]) / scale[:, None, None] + 1) / 2
    return moved, torch.cat([at * body[..., 2:], body[..., 2:]], -1)


def degrade(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [0, 1] as an early estimate shows them: blurred, with grain of one and of four pixels, paler."""
    count, _, height, width = pictures.shape

    def draw(most: float, often: float) -> Tensor:
        amount = torch.rand(count, generator=generator) * most
        return amount * (torch.rand(count, generator=generator) < often)

    # Few are very blurred: a face that tells front from back is soon gone.
    out = blur(pictures, draw(1.0, 0.75).square() * (_LONGEST_BLUR * height / 64))
    pale = draw(0.6, 0.4)[:, None, None, None]
    out = out + pale * (out.mean((1, 2, 3), keepdim=True) - out)
    for cell in (1, 4):
        grain = torch.randn((count, 3, height // cell, width // cell), generator=generator)
        grain = interpolate(grain, (height, width), mode="nearest")
        out = out + draw(_GRAIN, 0.5)[:, None, None, None] * grain
    return out


class KeypointTrainer(SmallTrainer):
    """The run of `--row keypoints`."""

    kind: ClassVar[str] = KIND
    config: KeypointConfig

    def build(self) -> KeypointPredictor:
        c = self.config
        space = "vae" if c.vae else PICTURES
        self.codec = None
        if c.vae:
            from truepose_core.models.folder import load_vae

            self.codec = load_vae(c.vae).to(self.config.device)
        self.pool: MannequinPool | FolderPairs | None = None
        channels = 3 if self.codec is None else self.codec.vae.config.latent_channels
        return KeypointPredictor(space, channels, widths=tuple(c.widths))

    def describe(self) -> dict[str, Any]:
        return dict(self.net.sizes)

    def _pictures(self, step: int) -> tuple[Tensor, Tensor]:
        """(pictures [B, 3, H, W] in [0, 1], keypoints [B, 18, 3]) of a step."""
        c = self.config
        size = SIZES[self.net.space]
        if self.pool is None or self.pool.step != step:
            if c.data == "mannequin":
                self.pool = MannequinPool(
                    c.people, c.poses, size, c.seed, c.fresh, step, self.config.device, quiet=self.quiet
                )
            else:
                self.pool = FolderPairs(c.data, size, c.seed, step)
        pool = self.pool
        if isinstance(pool, FolderPairs):
            batch = pool.batch(c.batch, 1)
            pictures, body = batch.target_image, batch.target_body
        else:
            generator = self.generator(2 * step + 1)
            chosen = torch.multinomial(turned_away(pool.body.flatten(0, 1)), c.batch, True, generator=generator)
            pictures, body = pool.image.flatten(0, 1)[chosen].float() / 255, pool.body.flatten(0, 1)[chosen]
        pool.advance()
        return pictures, body

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Distance of the seen joints in picture heights, and cross-entropy of their heat maps and of being seen."""
        generator = self.generator(2 * step)
        pictures, body = place(*self._pictures(step), generator)
        pictures, body = degrade(pictures, generator).to(self.config.device), body.to(self.config.device)
        with torch.no_grad():
            given = pictures * 2 - 1 if self.codec is None else self.codec.encode(pictures.clamp(0, 1)).float()
        heat, logits = self.net.heat_maps(given)
        places = place_of(heat)
        seen = (body[..., 2] > 0).float()
        aspect = pictures.shape[3] / pictures.shape[2]
        way = (places - body[..., :2]) * places.new_tensor([aspect, 1.0])
        distance = (way.square().sum(-1) + 1e-6).sqrt()
        error = (distance * seen).sum() / seen.sum().clamp(min=1)
        miss = -(spots(body, heat.shape[2:]) * heat.clamp(min=1e-8).log()).sum((2, 3))
        sharp = (miss * seen).sum() / seen.sum().clamp(min=1)
        sure = binary_cross_entropy_with_logits(logits, seen)
        return error + 0.01 * sharp + 0.1 * sure, {"heights": error.item(), "seen": sure.item()}


def spots(body: Tensor, size: tuple[int, int]) -> Tensor:
    """Heat maps [B, 18, h, w] that sum to 1, a spot of one cell's spread around each keypoint [B, 18, 3]."""
    height, width = size
    xs = torch.arange(width, device=body.device) + 0.5 - body[..., :1] * width
    ys = torch.arange(height, device=body.device) + 0.5 - body[..., 1:2] * height
    return (-xs.square() / 2).softmax(-1)[..., None, :] * (-ys.square() / 2).softmax(-1)[..., None]
