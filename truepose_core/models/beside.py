"""What stands beside the nets of a model: the encoder of a carried source, and small functions of its inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.regions import Region
from truepose_core.source.features import NOISE_SEED


class AlignedEncoder(nn.Module):
    """Reads the source's latent carried to the target pose [B, C, h, w], how certain each cell is [B, 1, h, w] and,
    where the model goes by recurrent alignment, its regions [B, 7, h, w].

    Gives what is added after TargetNet's conv_in [B, C0, h, w], which starts at zero, and what is added to its x0
    prediction [B, C, h, w], which starts as the carried latent itself: the net learns what to change in it.
    """

    def __init__(self, latent: int, width: int, regions: bool = False):
        super().__init__()
        read = latent + 1 + (len(Region) if regions else 0)
        self.conv_in = nn.Conv2d(read, 2 * width, 3, padding=1)
        self.conv_out = nn.Conv2d(2 * width, width, 3, padding=1)
        self.skip = nn.Conv2d(read, latent, 1)
        for module in (self.conv_out, self.skip):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        nn.init.dirac_(self.skip.weight)

    def forward(self, latent: Tensor, certain: Tensor, regions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = torch.cat([latent, certain] if regions is None else [latent, certain, regions], 1)
        return self.conv_out(nn.functional.silu(self.conv_in(x))), self.skip(x)


def middle_site(sites: Iterable[str]) -> str:
    """The attention site in the middle of the UNet, whose tokens the 3D guidance lifts; names of diffusers or ComfyUI.
    Raises TruePoseError where there is none."""
    found = next((site for site in sites if site.startswith("mid")), None)
    if found is None:
        raise TruePoseError("3D guidance lifts the tokens of the UNet's middle block, which has no attention here")
    return found


def nearest(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] at another size, each cell the pixel at its corner: labels must not mix."""
    return nn.functional.interpolate(picture, tuple(size), mode="nearest")


def noised(latent: Tensor, sigma: float) -> Tensor:
    """The latent [B, C, h, w] with fixed noise, as a UNet takes it at this noise level: of a variance of about 1."""
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(NOISE_SEED)).to(latent)
    kept = 1 / (1 + sigma**2)
    return kept**0.5 * latent + (1 - kept) ** 0.5 * noise


def scale_densepose(picture: Tensor, scaling: str) -> Tensor:
    """A DensePose picture [B, 3, h, w] in [0, 1] as conv_in reads it; scaling as in `Behaviour`."""
    if scaling == "127.5":
        return 2 * picture - 1
    # The third channel is the part's number 0..24, not a shade.
    return 2 * picture * picture.new_tensor([1.0, 1.0, 255 / 24])[:, None, None] - 1
