"""TruePose's nets as the host's own objects: its UNetModel, its VAE."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.processors import PassOn
from truepose_core.weights.strict import load_strict

from .unet import transformer_blocks

# ------------------------------------------------------------------------------------------------ the two MODELs


class _Times(float):
    """A channel multiplier such as 1.5 whose products are whole: the host multiplies and wants integers."""

    def __mul__(self, other: float) -> int:
        return round(float(self) * other)

    __rmul__ = __mul__


class _PixelLatent(comfy.latent_formats.LatentFormat):
    """Blocks of patch x patch pixels in [-1, 1], as they are. The preview is the mean colour of each block."""

    def __init__(self, patch: int) -> None:
        self.latent_channels = 3 * patch**2
        self.spacial_downscale_ratio = patch
        share = 1 / patch**2
        rows = torch.eye(3).repeat_interleave(patch**2, 0) * share
        self.latent_rgb_factors = rows.tolist()


class _X0Sampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.X0):
    """A net that predicts the clean latent."""


class _OwnConfig:
    """What the host needs to know of one of our nets; the rest is that of the base it stands in front of."""

    unet_config: dict = {}  # noqa: RUF012 - the host's own way
    unet_extra_config: dict = {}  # noqa: RUF012

    def __init__(self, config: TruePoseConfig, unet: Mapping, count: int) -> None:
        """unet: diffusers' arguments of this net. count: its weights."""
        super().__init__(unet_settings(config, unet))
        self.truepose_family = config.family
        self.latent_format = _latent_format(config)
        schedule = config.scheduler
        self.sampling_settings = {
            "beta_schedule": _BETAS[schedule.get("beta_schedule", "scaled_linear")],
            "linear_start": schedule.get("beta_start", 0.00085),
            "linear_end": schedule.get("beta_end", 0.012),
            "timesteps": schedule.get("num_train_timesteps", 1000),
            "zsnr": schedule.get("rescale_betas_zero_snr", False),
        }
        dtype, cast = torch.float32, None
        if config.codec == "vae":
            device = comfy.model_management.get_torch_device()
            kinds = self.supported_inference_dtypes
            dtype = comfy.model_management.unet_dtype(device=device, model_params=count, supported_dtypes=kinds)
            cast = comfy.model_management.unet_manual_cast(dtype, device, kinds)
        self.set_inference_dtype(dtype, cast)
        groups = unet.get("norm_num_groups", 32)
        if groups != 32:
            self.custom_operations = _operations(groups, dtype, cast)

    def inpaint_model(self) -> bool:
        return False


class _SDConfig(_OwnConfig, comfy.supported_models.SD15):
    pass


class _SDXLConfig(_OwnConfig, comfy.supported_models.SDXL):
    pass


def _latent_format(config: TruePoseConfig) -> comfy.latent_formats.LatentFormat:
    """How the host scales and previews the model's latents."""
    if config.codec == "pixels":
        return _PixelLatent(config.patch)
    wide = len(config.unet["block_out_channels"]) == 3
    made = comfy.latent_formats.SDXL() if wide else comfy.latent_formats.SD15()
    if config.vae is not None:
        made.scale_factor = config.vae["scaling_factor"]
    return made


_BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear"}
"""diffusers' names of noise schedules -> the host's."""


def _operations(groups: int, dtype: torch.dtype, cast: torch.dtype | None) -> type:
    """The host's layers with another number of groups than the 32 that its UNet asks for."""
    base = comfy.ops.pick_operations(dtype, cast)

    class Operations(base):
        class GroupNorm(base.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **keywords: object) -> None:
                super().__init__(groups, num_channels, **keywords)

    return Operations


_KNOWN = {
    "transformer_layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "addition_embed_type_num_heads",
    "upcast_attention",
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "norm_num_groups",
    "use_linear_projection",
}
_USUAL = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
"""What a folder in diffusers format says besides, as the host's UNet does it anyway. Everything else must be None."""


def unet_settings(config: TruePoseConfig, unet: Mapping | None = None) -> dict:
    """diffusers' arguments of a UNet as the host's. unet: other arguments than TargetNet's. Raises TruePoseError for
    what the host's UNet does not have."""
    unet = config.unet if unet is None else unet
    unknown = sorted(k for k, v in unet.items() if k not in _KNOWN and v is not None and v != _USUAL.get(k, ()))
    widths, layers = unet["block_out_channels"], unet.get("layers_per_block", 2)
    heads = unet.get("attention_head_dim", 8)
    if isinstance(heads, int):
        head_width = -1
    else:
        # The name is diffusers' own mistake: these are the numbers of heads.
        head_width, rest = divmod(widths[0], heads[0])
        if rest or any(width != head_width * number for width, number in zip(widths, heads, strict=True)):
            unknown.append(f"attention_head_dim {heads}")
    embedding = unet.get("addition_embed_type")
    if embedding not in (None, "text_time"):
        unknown.append(f"addition_embed_type {embedding}")
    if unknown:
        raise TruePoseError(f"this TruePose model's UNet has settings that ComfyUI's UNet lacks: {', '.join(unknown)}")
    betas = config.scheduler.get("beta_schedule", "scaled_linear")
    if betas not in _BETAS:
        raise TruePoseError(f"this TruePose model has the noise schedule {betas!r}; expected {' or '.join(_BETAS)}")
    depths = unet.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    down = [depth * ("CrossAttn" in kind) for kind, depth in zip(unet["down_block_types"], depths, strict=True)]
    up_kinds = list(reversed(unet["up_block_types"]))
    up = [depth * ("CrossAttn" in kind) for kind, depth in zip(up_kinds, depths, strict=True)]
    return {
        "image_size": 32,
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [_Times(width / widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "transformer_depth_middle": depths[-1],
        "num_heads": heads if head_width < 0 else -1,
        "num_head_channels": head_width,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "context_dim": unet["cross_attention_dim"],
        "adm_in_channels": unet["projection_class_embeddings_input_dim"] if embedding else None,
        **({"num_classes": "sequential"} if embedding else {}),
        "use_temporal_attention": False,
        "legacy": False,
        "dtype": torch.float32,
    }


def host_sites(settings: dict) -> dict[str, str]:
    """diffusers' name of every transformer block -> the host's site: "mid_block.attentions.0.transformer_blocks.0" ->
    "middle.0.0". settings: the host's unet_config."""
    table = {}
    mark = ".attn1.to_q.weight"
    for theirs, ours in comfy.utils.unet_to_diffusers(settings).items():
        if not theirs.endswith(mark):
            continue
        part, number, *_, index = ours.removesuffix(mark).split(".")
        part = part.removesuffix("_blocks").removesuffix("_block")
        table[theirs.removesuffix(mark)] = ".".join((part, "0" if part == "middle" else number, index))
    return table


def _make_model(config: TruePoseConfig, part: str, weights: Mapping[str, Tensor], where: str) -> object:
    """A MODEL of diffusers' weights. part: "target_net" or "source_net". Raises TruePoseError when they do not fit."""
    unet = config.unet if part == "target_net" else config.source_unet
    kind = _SDXLConfig if unet.get("addition_embed_type") else _SDConfig
    settings = kind(config, unet, sum(x.numel() for x in weights.values()))
    model = settings.get_model({}, "", device=torch.device("cpu"))
    if config.behaviour.cross_attention == "pass":
        for _, block in transformer_blocks(model.diffusion_model).values():
            block.attn2 = PassOn()
    if config.prediction_type == "sample":
        model.model_sampling = _X0Sampling(settings)
    elif config.prediction_type == "v_prediction":
        model.model_sampling = comfy.model_base.model_sampling(settings, comfy.model_base.ModelType.V_PREDICTION)
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    # A name that the host's UNet lacks keeps its own, so that the message below can show it.
    weights = {names.get(k, k): v for k, v in weights.items()}
    if part == "source_net" and not config.behaviour.source_head:
        # SourceNet's output is never read; the host's UNet has the layers all the same.
        weights |= {k: torch.zeros_like(v) for k, v in model.diffusion_model.out.state_dict(prefix="out.").items()}
    load_strict(model.diffusion_model, weights, where)
    return comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


# ------------------------------------------------------------------------------------------------------- the VAE


class PixelVAE(comfy.sd.VAE):
    """The host's VAE for a model on pixel patches: no weights, exact. Sizes that do not divide are cropped evenly at
    the edges, as the host's other VAEs do."""

    def __init__(self, patch: int) -> None:
        # The host's own constructor looks for weights and there are none.
        self.first_stage_model = PixelCodec(patch).eval()
        self.downscale_ratio = self.upscale_ratio = patch
        self.downscale_index_formula = self.upscale_index_formula = None
        self.latent_channels, self.latent_dim, self.output_channels = 3 * patch**2, 2, 3
        self.crop_input, self.pad_channel_value, self.extra_1d_channel = True, None, None
        self.not_video, self.disable_offload, self.size = False, True, 0
        self.process_input = self.process_output = lambda image: image
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 0
        self.vae_dtype, self.working_dtypes = torch.float32, [torch.float32]
        self.device = comfy.model_management.vae_device()
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """IMAGE [B, H, W, C] in [0, 1] -> latent [B, 3 p^2, H/p, W/p] in [-1, 1]."""
        image = self.vae_encode_crop_pixels(pixel_samples).movedim(-1, 1)[:, :3]
        if 0 in image.shape:
            size = f"{pixel_samples.shape[2]}x{pixel_samples.shape[1]}"
            raise TruePoseError(f"the image is {size}; expected at least one block of {self.downscale_ratio} pixels")
        return self.first_stage_model.encode(image.to(self.output_device, torch.float32))

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """Latent -> IMAGE [B, H, W, 3] in [0, 1]."""
        if samples_in.shape[1] != self.latent_channels:
            raise TruePoseError(
                f"the latent has {samples_in.shape[1]} channels and this VAE reads {self.latent_channels}; "
                "take the VAE of the model that made the latent"
            )
        image = self.first_stage_model.decode(samples_in.to(self.output_device, torch.float32))
        return image.movedim(1, -1).contiguous()

    def encode_tiled(self, pixel_samples: Tensor, *args: object, **keywords: object) -> Tensor:
        """The same as `encode`: it needs no tiles."""
        return self.encode(pixel_samples)

    def decode_tiled(self, samples: Tensor, *args: object, **keywords: object) -> Tensor:
        """The same as `decode`."""
        return self.decode(samples)


def _make_vae(config: TruePoseConfig, weights: Mapping[str, Tensor], where: str) -> object:
    """The VAE of the file as the host's own. weights: diffusers' names."""
    unet = config.vae
    widths = unet["block_out_channels"]
    settings = {
        "double_z": True,
        "z_channels": unet["latent_channels"],
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": unet["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"ddconfig": settings, "embed_dim": unet["latent_channels"]}
    converted = comfy.diffusers_convert.convert_vae_state_dict(dict(weights))
    vae = comfy.sd.VAE(sd=converted, config={"params": params})
    load_strict(vae.first_stage_model, converted, f"{where}, VAE")
    return vae


class MissingVAE:
    """Stands where a file brings no VAE, and says so when it is used."""

    def __init__(self, where: str) -> None:
        self._where = where

    def _missing(self, *_: object, **__: object) -> None:
        raise TruePoseError(
            f"{self._where} brings no VAE: connect Load VAE, with the VAE that the model was trained on"
        )

    encode = decode = encode_tiled = decode_tiled = _missing
    spacial_compression_encode = spacial_compression_decode = _missing
