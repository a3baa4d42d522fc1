"""Small random checkpoints of other systems, as they lie on disk, and references in plain torch for the tests.

The nets are stock diffusers ones: what makes a system itself is written out here, apart from the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from truepose_core.parsing import HumanParsing
from truepose_core.weights.reading import TensorInfo

SIZE = (64, 64)
LATENT = (8, 8)
CONTEXT = 32
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {**SD15, "block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "cross_attention_dim": CONTEXT}
SMALL_XL = {
    **SDXL,
    "block_out_channels": (64, 64, 128),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": CONTEXT,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL_VAE = {**SD_VAE, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
GUIDER = (16, 32, 96, 256)


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module with weights of which none is special: nothing is zero, no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            spread = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * noise + (1.0 if parameter.ndim == 1 else 0.0))
    return module.eval().requires_grad_(False)


def pose_guider(width: int, widths: tuple[int, ...] = GUIDER) -> nn.Module:
    return ControlNetConditioningEmbedding(width, 3, widths)


class GuidanceEncoder(nn.Module):
    """champ's, whose attentions but the last are never run."""

    def __init__(self, width: int, widths: tuple[int, ...] = GUIDER):
        super().__init__()
        trunk = pose_guider(width, widths)
        self.conv_in, self.blocks, self.conv_out = trunk.conv_in, trunk.blocks, trunk.conv_out
        inner = [width for a, b in pairwise(widths) for width in (a, b)]
        self.attentions = nn.ModuleList(
            Transformer2DModel(8, width // 8, width, norm_num_groups=32 if i % 2 else 1)
            for i, width in enumerate(inner)
        )
        self.guidance_attention = Transformer2DModel(8, widths[-1] // 8, widths[-1])

    def forward(self, picture: Tensor) -> Tensor:
        x = nn.functional.silu(self.conv_in(picture))
        for block in self.blocks:
            x = nn.functional.silu(block(x))
        return self.conv_out(self.attentions[-1](x).sample)


def without_output(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A UNet's weights as a reference net's trainer writes them."""
    return {name: x for name, x in weights.items() if not name.startswith(("conv_norm_out", "conv_out"))}


def motion_module() -> dict[str, Tensor]:
    stem = "down_blocks.0.motion_modules.0.temporal_transformer."
    return {
        f"{stem}norm.weight": torch.zeros(4),
        f"{stem}transformer_blocks.0.attention_blocks.0.pos_encoder.pe": torch.zeros(1, 4, 4),
    }


def infos(weights: dict[str, Tensor], prefix: str = "") -> dict[str, TensorInfo]:
    return {prefix + name: TensorInfo(tuple(x.shape), "F32") for name, x in weights.items()}


def meta(kind: type, *args: object, **settings: object) -> dict[str, Tensor]:
    """The weights of a full-size module, without their values."""
    with torch.device("meta"):
        return kind(*args, **settings).state_dict()


def saved(folder: Path, **files: dict[str, Tensor]) -> list[Path]:
    """Pickles as these systems publish them."""
    paths = []
    for name, weights in files.items():
        paths.append(folder / f"{name}.pth")
        torch.save(weights, paths[-1])
    return paths


def vae_folder(folder: Path, seed: int = 7) -> Path:
    randomised(AutoencoderKL(**SMALL_VAE), seed).save_pretrained(folder)
    return folder


def image_encoder_folder(folder: Path, width: int = CONTEXT) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    settings = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = CLIPVisionConfig(hidden_size=16, projection_dim=width, patch_size=16, **settings)
    randomised(CLIPVisionModelWithProjection(config), 8).save_pretrained(folder)
    return folder


def picture(seed: int, channels: int = 3) -> Tensor:
    """[1, C, *SIZE] on 8 bits, smooth."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand((1, channels, 5, 4), generator=generator)
    return (nn.functional.interpolate(small, SIZE, mode="bicubic").clamp(0, 1) * 255).round() / 255


def dressed() -> HumanParsing:
    """Everything is the upper clothes, but a strip of background."""
    masks = torch.zeros(1, 7, *SIZE)
    masks[:, 3, :, 16:], masks[:, 0, :, :16] = 1, 1
    return HumanParsing(masks)


def body() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(0.2, 0.8, (1, 18, 3))).float().clamp(max=1)


# ------------------------------------------------------------------------------------------- plain references


def blocks_of(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    return {name: module for name, module in unet.named_modules() if type(module).__name__ == "BasicTransformerBlock"}


@contextmanager
def reading(unet: UNet2DConditionModel) -> Iterator[dict[str, Tensor]]:
    """While open, the norm1 output of every block is kept."""
    bank: dict[str, Tensor] = {}
    hooks = [
        block.norm1.register_forward_hook(lambda _, __, out, name=name: bank.__setitem__(name, out))
        for name, block in blocks_of(unet).items()
    ]
    yield bank
    for hook in hooks:
        hook.remove()


class Concatenated:
    """attn1 whose keys and values go on with the source's tokens."""

    def __init__(self, tokens: Tensor):
        self.tokens = tokens

    def __call__(self, attn: nn.Module, x: Tensor, *_: object, **__: object) -> Tensor:
        both = torch.cat([x, self.tokens], 1)
        q, k, v = (
            f(y).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for f, y in ((attn.to_q, x), (attn.to_k, both), (attn.to_v, both))
        )
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


class Passed:
    """Leffa's attn2: what it is given."""

    def __call__(self, attn: nn.Module, x: Tensor, *_: object, **__: object) -> Tensor:
        return x


def predict(
    unet: UNet2DConditionModel,
    latent: Tensor,
    timestep: int,
    context: Tensor,
    bank: dict[str, Tensor] | None = None,
    pose: Tensor | None = None,
) -> Tensor:
    """The net's output with the source's tokens in its self-attention and a pose added after conv_in."""
    before = dict(unet.attn_processors)
    if bank is not None:
        for name, block in blocks_of(unet).items():
            block.attn1.set_processor(Concatenated(bank[name]))
    hook = unet.conv_in.register_forward_hook(lambda _, __, out: out if pose is None else out + pose)
    try:
        return unet(latent, timestep, context).sample
    finally:
        hook.remove()
        unet.set_attn_processor(before)


def watch(pipe: object) -> tuple[list[Tensor], list[Tensor]]:
    """Keeps every prediction after guidance, and the latents it was made for."""
    from functools import wraps

    predictions, latents, step = [], [], pipe.scheduler.step

    @wraps(step)
    def watched(prediction: Tensor, t: Tensor, x: Tensor, **more: object) -> object:
        predictions.append(prediction)
        latents.append(x)
        return step(prediction, t, x, **more)

    pipe.scheduler.step = watched
    return predictions, latents
