"""A TruePose model file as the host's own objects: two MODELs, a VAE, and the adapter with what lies beside the nets.
Files of other systems (AnimateAnyone, champ, Leffa) are read the same way, as they are or converted.

The nets become the host's UNetModel, so everything that works on a MODEL works on them. The adapter (pose encoder,
HPFA's learned weights, CAA, aligned encoder) travels in an attachment of both MODELs, so nothing needs wiring.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn.functional import pad

from truepose_core.alignment.control3d import Control3D
from truepose_core.attention.caa import CAASite, RegionTokens
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.features import SourceFeatures
from truepose_core.framing import Frame, fit
from truepose_core.guidance import rescale_guidance
from truepose_core.models.cfld_encoder import is_cfld
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import SKELETON, TruePoseConfig
from truepose_core.models.model import (
    AlignedEncoder,
    RegionReader,
    TruePoseModel,
    middle_site,
    nearest,
    scale_densepose,
)
from truepose_core.models.pose_encoder import encode_maps, make_pose_encoder
from truepose_core.models.processors import PassOn
from truepose_core.models.store import ARCHITECTURE, bundled_path, load_strict, read_metadata
from truepose_core.parsing import HumanParsing

from .host import GUIDANCE, NOTHING, CrossTokens, SiteWeights, row_index, transformer_blocks
from .host_control3d import Control3DPatch, site_tokens
from .host_files import FOLDER, files, folders

BUNDLED = "bundled demo"
SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
ATTACHMENT = "truepose_adapter"


def model_files() -> list[str]:
    """What Load TruePose Model offers: the bundled model, then the files in models/truepose."""
    return [BUNDLED, *(name for suffix in SUFFIXES for name in files(suffix))]


def model_path(name: str) -> Path:
    """The file of an entry of `model_files`. Raises TruePoseError for one that is not there."""
    if name == BUNDLED:
        return bundled_path()
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not os.path.isfile(path):
        raise TruePoseError(
            f"there is no model file {name!r} in models/{FOLDER}; put it there, or choose {BUNDLED!r}, and refresh"
        )
    return Path(path)


def kept_path(name: str) -> Path:
    """Where a converted model of that name is written. Raises TruePoseError for a name that leaves the folder."""
    name = name.strip()
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    folder = folders()[0]
    path = (folder / name).resolve()
    if path.parent != folder.resolve():
        raise TruePoseError(f"keep_as is {name!r}; expected a plain file name")
    folder.mkdir(parents=True, exist_ok=True)
    return path


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


# --------------------------------------------------------------------------------------------------- the adapter


class _Parts(nn.Module):
    """What an adapter computes with, as one module that the host moves. Names are those of the file."""

    dtype = torch.float32
    encode_aligned = TruePoseModel.encode_aligned
    control_tokens = TruePoseModel.control_tokens

    def __init__(self, config: TruePoseConfig, sites: Mapping[str, tuple[int, int]]) -> None:
        """sites: key -> (width of its attention, heads)."""
        super().__init__()
        self.control3d: nn.Module | None = None
        if config.control3d is not None:
            self.control3d = Control3D(config.control3d, sites[middle_site(sites)][0], sites)
        unet = config.unet
        width, context = unet["block_out_channels"][0], unet["cross_attention_dim"]
        self.codec = PixelCodec(config.patch)
        self.pose_encoder = make_pose_encoder(width, config.pose_widths, config.behaviour)
        self.aligned_encoder = AlignedEncoder(unet["out_channels"], width) if config.aligned else None
        self.hpfa = nn.ModuleDict()
        if config.fusion == "hpfa":
            from truepose_core.models.processors import HPFASite

            self.hpfa.update({key: HPFASite(heads) for key, (_, heads) in sites.items()})
        self.caa: nn.Module | None = None
        if config.caa is not None:
            self.caa = RegionReader(config.caa, context)
            for name in ("source_sites", "target_sites"):
                made = {key: CAASite(context, inner, heads) for key, (inner, heads) in sites.items()}
                self.caa.add_module(name, nn.ModuleDict(made))


class Adapter:
    """What a TruePose model knows beside its two nets. Never changed once made.

    config: the model's. sites: the host's site -> key in the file.
    """

    def __init__(
        self, config: TruePoseConfig, parts: _Parts, sites: Mapping[str, str], size: tuple[int, int] | None = None
    ) -> None:
        """size: (height, width) in pixels of its pictures, where that is not the one it was trained at."""
        self.config, self.sites, self._size = config, dict(sites), size or config.size
        self._parts = parts.eval().requires_grad_(False)
        self._patcher = comfy.model_patcher.ModelPatcher(
            self._parts,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __deepcopy__(self, memo: dict) -> Adapter:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        return sum(x.numel() * x.element_size() for x in self._parts.parameters())

    def _loaded(self) -> tuple[_Parts, torch.device]:
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        return self._parts, self._patcher.load_device

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the pictures it makes."""
        return self._size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of its latents."""
        height, width = self.size
        return self.config.unet["out_channels"], height // self.config.patch, width // self.config.patch

    def frame(self, size: tuple[int, int]) -> Frame:
        """How a picture of (height, width) lies in the model's canvas."""
        return fit(size, self.size)

    @property
    def source_timestep(self) -> int:
        """Where SourceNet reads the source before the sampling: 0, or the middle of it for a model that reads at the
        sampler's timestep (Leffa's own faster mode; 50 steps, evenly spaced from 1)."""
        return 481 if self.reads_anew else 0

    @property
    def reads_anew(self) -> bool:
        """Whether SourceNet reads the source again at every step, as the system was published."""
        return self.config.behaviour.source_timestep == "step"

    def check_conditioning(self, conditioning: list | None) -> None:
        """Raises TruePoseError where SourceNet needs the picture's embedding and there is none."""
        if self.config.behaviour.context == "image" and not conditioning:
            raise TruePoseError(
                f"a {self.config.family} model reads the source's CLIP embedding: connect Picture Context"
            )

    def pose_embedding(self, pictures: Tensor | Mapping[str, Tensor]) -> Tensor:
        """Pose pictures [B, 3, *size] in [0, 1], by name or the skeleton alone -> what is added after TargetNet's
        conv_in, [B, C0, h, w], on the CPU. Raises TruePoseError for a picture that the model does not read."""
        parts, device = self._loaded()
        if parts.pose_encoder is None:
            raise TruePoseError(
                "this model reads a DensePose picture: use Apply Pose Encoder, and a sampler of the host"
            )
        pictures = pictures if isinstance(pictures, Mapping) else {SKELETON: pictures}
        return encode_maps(parts.pose_encoder, {k: x.to(device, torch.float32) for k, x in pictures.items()}).cpu()

    def labels(self, picture: Tensor) -> Tensor:
        """A picture of labels [B, C, H, W] in the model's canvas, 0 around it; every pixel one of the picture's own."""
        frame = self.frame((picture.shape[2], picture.shape[3]))
        (height, width), (top, left) = frame.size_in, frame.offset
        tall, wide = frame.size_padded
        padded = pad(picture, (left, wide - width - left, top, tall - height - top))
        return nearest(padded, frame.size_model)

    def channels(self, densepose: Tensor, canvas: Tensor, mask: Tensor, vae: object) -> tuple[Tensor, Tensor]:
        """What conv_in reads beside the noisy latent, [B, C, h, w], with the pose and without it.

        densepose, canvas: [B, 3, *size] in [0, 1]; mask: [B, 1, *size], 1 where the picture is made. vae: the model's.
        """
        behaviour = self.config.behaviour
        latent = vae.encode(torch.where(mask < 0.5, canvas, 0.5).movedim(1, -1)).cpu()
        latent = latent * self.config.vae["scaling_factor"]
        cells = latent.shape[-2:]
        made = []
        for picture in (densepose, torch.zeros_like(densepose)):
            known = {
                "mask": (nearest(mask, cells) >= 0.5).float(),
                "masked latent": latent,
                "densepose": scale_densepose(nearest(picture, cells), behaviour.densepose),
            }
            rows = max(x.shape[0] for x in known.values())
            made.append(torch.cat([known[name].expand(rows, -1, -1, -1) for name in behaviour.channels], 1))
        return made[0], made[1]

    def region_tokens(self, image: Tensor, parsing: HumanParsing) -> RegionTokens | None:
        """CAA's tokens of the source [S, 3, *size] in [0, 1]; None for a model without CAA."""
        if self._parts.caa is None:
            return None
        parts, device = self._loaded()
        tokens = parts.caa(image.to(device, torch.float32), parsing.to(device))
        return RegionTokens(tokens.tokens.cpu(), tokens.shown.cpu())

    def cross_tokens(self, tokens: RegionTokens | None, net: str) -> dict[str, CrossTokens]:
        """Site -> keys and values of the region tokens for "source" or "target" net; {} for none."""
        if tokens is None or self._parts.caa is None:
            return {}
        modules = getattr(self._loaded()[0].caa, f"{net}_sites")
        regions = tokens.regions.cpu()
        found = {}
        for site, key in self.sites.items():
            module = modules[key]
            heads = module.kappa.numel()
            x = tokens.tokens.to(module.to_k.weight)
            k, v = (f(x).unflatten(-1, (heads, -1)).transpose(1, 2).cpu() for f in (module.to_k, module.to_v))
            found[site] = CrossTokens(k, v, regions, tokens.shown, module.kappa.cpu(), module.scale.cpu())
        return found

    @property
    def control_query(self) -> str | None:
        """What the model's 3D guidance reads of a target ("body", "keypoints", "source": nothing); None without it."""
        return None if self.config.control3d is None else self.config.control3d.query

    def control3d(
        self,
        source: SourceFeatures | None,
        target_body: Tensor | None,
        target_pose: BodyPose | None,
        omega: Tensor | None = None,
        strength: float = 1.0,
        sigmas: tuple[float, float] | None = None,
        keep_unconditional: bool = False,
    ) -> Control3DPatch | None:
        """The 3D guidance of a source (None: of the pose alone) for targets as the model reads them, keypoints
        [T, 18, 3] or bodies in the model's canvas. For the rest see `TruePoseModel.control_tokens` and
        `Control3DPatch`. None where there is nothing to add."""
        if self._parts.control3d is None or strength == 0:
            return None
        parts, device = self._loaded()
        cells = self.latent_shape[1:]
        target_body = None if target_body is None else target_body.to(device)
        made = [
            parts.control_tokens(who, target_body, cells, target_pose, omega=omega, strength=strength)
            for who in (None if source is None else source.to(device), None)
        ]
        sites = {site: parts.control3d.target_sites[key] for site, key in self.sites.items()}
        full, posed = (site_tokens(sites, tokens) for tokens in made)
        return Control3DPatch(full, posed, sigmas, keep_unconditional) if full or posed else None

    def site_weights(self, beta: float | None = None, gamma: float | None = None) -> dict[str, SiteWeights]:
        """Site -> how it matches: what was learned, or one number for every head in its place."""
        found = {}
        for site, key in self.sites.items():
            if key not in self._parts.hpfa:
                own = self.config
                found[site] = SiteWeights(own.beta if beta is None else beta, own.gamma if gamma is None else gamma)
                continue
            learned = self._parts.hpfa[key]
            found[site] = SiteWeights(
                learned.beta.clamp(min=0).cpu() if beta is None else beta,
                learned.gamma.clamp(min=0).cpu() if gamma is None else gamma,
                learned.region_log_weight.cpu(),
            )
        return found

    def aligned(
        self, source: SourceFeatures, target_body: Tensor | None, omega: Tensor | None, strength: float
    ) -> tuple[Tensor, Tensor] | None:
        """What the source carried to the target pose adds after conv_in [T, C0, h, w] and to the prediction
        [T, C, h, w]; None where the model does not use it or keypoints are missing. omega: [7] or None for ones."""
        if self._parts.aligned_encoder is None or target_body is None:
            return None
        parts, device = self._loaded()
        source = source.to(device)
        if target_body.shape[0] == 1:
            target_body = target_body.expand(source.batch, -1, -1)
        omega = None if omega is None else omega.to(device)
        made = parts.encode_aligned(source, target_body.to(device), omega)
        return None if made is None else (strength * made[0].cpu(), strength * made[1].cpu())


def adapter_of(model: object, given: Adapter | None = None) -> Adapter | None:
    """The adapter given, else the one that the MODEL brings, else None. Raises when it is another family's."""
    adapter = given or model.attachments.get(ATTACHMENT)
    if adapter is None:
        return None
    family = vars(model.model.model_config).get("truepose_family")
    if family != adapter.config.family:
        raise TruePoseError(
            f"the adapter belongs to a {adapter.config.family} model and the model connected is not one; "
            "take model and adapter from the same Load TruePose Model"
        )
    return adapter


# --------------------------------------------------------------------------------------------------- loading


@dataclass(frozen=True, eq=False)
class Loaded:
    """What Load TruePose Model gives."""

    target: object
    source: object
    vae: object
    adapter: Adapter


def load(path: Path, size: tuple[int, int] | None = None) -> Loaded:
    """Read a TruePose model file. size: (height, width) in pixels of the pictures to make, for models on the latents of
    a VAE. Raises TruePoseError when the file is missing, truncated, of another kind, or when a weight is missing,
    unknown or of another shape."""
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    if metadata.get("architecture") != ARCHITECTURE or "config" not in metadata:
        raise TruePoseError(
            f"{path.name} is no TruePose model file (its metadata says {metadata.get('architecture')!r}); "
            "for a checkpoint use Load Checkpoint: Apply HPFA works with it as it is"
        )
    if is_cfld(metadata):
        raise TruePoseError(f"{path.name} is a CFLD model, which has no SourceNet; load it with Load CFLD")
    return make(TruePoseConfig.from_json(metadata["config"]), load_file(path), path.name, size)


def load_files(
    paths: Sequence[Path],
    choices: Mapping[str, str] | None = None,
    keep: Path | None = None,
    size: tuple[int, int] | None = None,
) -> Loaded:
    """Read a TruePose model file, or the files of another system as they were published. choices: what the user says
    where files do not tell (see `truepose_core.models.importing.convert.find`). keep: where to write the converted
    file, None for nowhere. Raises as `load`, and as `find` and `convert`."""
    from truepose_core.models.importing.convert import convert, find, opened

    first = paths[0]
    if len(paths) == 1 and first.suffix == ".safetensors" and "architecture" in read_metadata(first):
        if choices or keep:
            raise TruePoseError(f"{first.name} is converted already; leave choices and keep_as empty")
        return load(first, size)
    try:
        found = find(paths, choices, whole=False)
    except TruePoseError as error:
        names = ", ".join(path.name for path in paths)
        raise TruePoseError(
            f"{names} is no TruePose model file, nor what one is made of: {error}. For a checkpoint use Load "
            "Checkpoint: Apply HPFA works with it as it is"
        ) from error
    if found.plan.metadata.get("architecture", ARCHITECTURE) != ARCHITECTURE:
        raise TruePoseError(f"{first.name} is of {found.title}, which this node does not load")
    if keep is not None:
        convert(paths, keep, choices=choices, whole=False)
        return load(keep, size)
    config = TruePoseConfig.from_json(json.dumps(found.plan.config))
    with opened(paths, choices, whole=False) as (_, weights):
        return make(config, weights, found.title, size)


def make(
    config: TruePoseConfig, weights: Mapping[str, Tensor], where: str, size: tuple[int, int] | None = None
) -> Loaded:
    """The host's objects of a model's weights, under the names of this package's files. Raises as `load`."""
    if config.fusion == "none":
        raise TruePoseError(f"{where} reads no source person (fusion 'none'), so there is nothing to load it for")
    if size is not None and config.codec == "pixels":
        raise TruePoseError(
            f"{where} makes pictures of {config.size[1]}x{config.size[0]} only; leave width and height 0"
        )
    groups: dict[str, dict[str, Tensor]] = {"target_net.": {}, "source_net.": {}, _VAE: {}, "": {}}
    for name, x in weights.items():
        head = next(head for head in groups if name.startswith(head))
        groups[head][name.removeprefix(head)] = x
    nets = [_make_model(config, part, groups[f"{part}."], f"{where}, {part}") for part in ("target_net", "source_net")]
    table = host_sites(nets[0].model.model_config.unet_config)
    keys = {ours: theirs.replace(".", "_") for theirs, ours in table.items()}
    blocks = transformer_blocks(nets[0].model.diffusion_model)
    inner = {site: block.attn1 for site, (_, block) in blocks.items()}
    parts = _Parts(config, {key: (inner[site].to_q.out_features, inner[site].heads) for site, key in keys.items()})
    load_strict(parts, groups[""], where)
    adapter = Adapter(config, parts, keys, size)
    for net in nets:
        net.set_attachments(ATTACHMENT, adapter)
    if config.behaviour.guidance_rescale > 0:
        nets[0].set_model_sampler_cfg_function(_rescaled(config.behaviour.guidance_rescale))
    if config.codec == "pixels":
        vae = PixelVAE(config.patch)
    else:
        vae = MissingVAE(where) if config.vae is None else _make_vae(config, groups[_VAE], where)
    return Loaded(nets[0], nets[1], vae, adapter)


_VAE = "codec.vae."


def _rescaled(share: float) -> Callable[[dict], Tensor]:
    """The host's guidance with rescaling (`rescale_guidance`), phi = share * scale, on the net's own prediction."""

    def guide(args: dict) -> Tensor:
        full, without, scale = args["cond"], args["uncond"], args["cond_scale"]
        guided = without + scale * (full - without)
        return rescale_guidance(guided, full, share * scale)

    return guide


def empty_conditioning(adapter: Adapter) -> list:
    """CONDITIONING for a model that reads no text, and for rows that see no source: one zero token."""
    wide = adapter.config.unet.get("addition_embed_type") == "text_time"
    pooled = {"pooled_output": torch.zeros(1, 1280)} if wide else {}
    return [[torch.zeros(1, 1, adapter.config.unet["cross_attention_dim"]), pooled]]


def picture_conditioning(adapter: Adapter, embedding: Tensor) -> list:
    """CONDITIONING of a CLIP embedding of the source picture [S, c]. Raises TruePoseError if the model reads none."""
    if adapter.config.behaviour.context != "image":
        raise TruePoseError(
            f"a {adapter.config.family} model reads no CLIP embedding of the source; leave this node out"
        )
    width = adapter.config.unet["cross_attention_dim"]
    if embedding.ndim != 2 or embedding.shape[1] != width:
        raise TruePoseError(
            f"the CLIP embedding is {tuple(embedding.shape)} and the model reads [S, {width}]; load the CLIP vision "
            "model that it was trained with"
        )
    return [[embedding[:, None].float(), {}]]


# ------------------------------------------------------------------------------------- channels beside the latent

CHANNELS_KEY = "truepose_channels"


class ChannelsPatch:
    """What TargetNet's conv_in reads beside the noisy latent, [T, C, h, w]. Never changed once made."""

    def __init__(self, channels: Tensor, without_pose: Tensor) -> None:
        self.channels, self.without_pose = channels, without_pose

    def __deepcopy__(self, memo: dict) -> ChannelsPatch:
        return self

    def on_model_call(
        self,
        executor: Callable,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        y: Tensor | None = None,
        control: object = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        """The `DIFFUSION_MODEL` wrapper."""
        options = {} if transformer_options is None else transformer_options
        added = self.without_pose if options.get(GUIDANCE) == NOTHING else self.channels
        chunks, count = len(options.get("cond_or_uncond") or [0]), added.shape[0]
        if tuple(x.shape[2:]) != tuple(added.shape[2:]):
            raise TruePoseError(
                f"the latent is {x.shape[3]}x{x.shape[2]} cells and this model was given a pose of "
                f"{added.shape[3]}x{added.shape[2]} cells; connect Empty TruePose Latent"
            )
        rows, rest = divmod(x.shape[0], chunks)
        if rest or rows % count:
            raise TruePoseError(
                f"there are {count} target poses and {x.shape[0] // chunks} latents in the batch; "
                "expected 1 pose or a number that divides the latents"
            )
        index = row_index(count, x.shape[0], chunks, added.device)
        return executor(torch.cat([x, added[index].to(x)], 1), timesteps, context, y, control, options, **kwargs)


def with_channels(model: object, channels: tuple[Tensor, Tensor]) -> object:
    """A clone of MODEL whose conv_in also reads these (see `Adapter.channels`); others on it are replaced."""
    patch = ChannelsPatch(*channels)
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, CHANNELS_KEY)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, CHANNELS_KEY, patch.on_model_call)
    return clone
