"""Images to latents and back: a VAE, or 4x4 pixel patches for the bundled model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class PixelCodec(nn.Module):
    """Space to depth: images [B, 3, H, W] in [0, 1] <-> latents [B, 3 p^2, H/p, W/p] in [-1, 1]. No weights, exact."""

    def __init__(self, patch: int = 4):
        super().__init__()
        self.patch = patch

    def encode(self, image: Tensor) -> Tensor:
        return pixel_unshuffle(image * 2 - 1, self.patch)

    def decode(self, latent: Tensor) -> Tensor:
        return ((pixel_shuffle(latent, self.patch) + 1) / 2).clamp(0, 1)


class VAECodec(nn.Module):
    """A diffusers AutoencoderKL: the latent mean times the scaling factor, as AnimateAnyone feeds its reference."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        # The codec is a fixed measure: training never changes it.
        self.vae = vae.requires_grad_(False)
        self.patch = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, image: Tensor) -> Tensor:
        vae = self.vae
        mean = vae.encode((image * 2 - 1).to(vae.dtype)).latent_dist.mean
        return mean * vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        vae = self.vae
        image = vae.decode((latent / vae.config.scaling_factor).to(vae.dtype)).sample
        return ((image + 1) / 2).clamp(0, 1)
