"""A TruePose model file as the host's own objects: two MODELs, a VAE, and the adapter with what lies beside the nets.

The nets become the host's UNetModel, so everything that works on a MODEL works on them. The adapter (pose encoder,
HPFA's learned weights, CAA, aligned encoder) travels in an attachment of both MODELs, so nothing needs wiring.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

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
from torch import Tensor, nn
from torch.nn.functional import silu

from truepose_core.attention.caa import CAASite, RegionTokens
from truepose_core.errors import TruePoseError
from truepose_core.features import SourceFeatures
from truepose_core.framing import Frame, fit
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import AlignedEncoder, RegionReader, TruePoseModel
from truepose_core.models.store import ARCHITECTURE, bundled_path, load_strict, read_metadata
from truepose_core.parsing import HumanParsing

from .host import CrossTokens, SiteWeights, transformer_blocks

FOLDER = "truepose"
BUNDLED = "bundled demo"
ATTACHMENT = "truepose_adapter"


def register_folder() -> None:
    """Make models/truepose a folder of the host (and of its extra_model_paths.yaml), for .safetensors files."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, ".safetensors"})


def model_files() -> list[str]:
    """What Load TruePose Model offers: the bundled model, then the files in models/truepose."""
    return [BUNDLED, *folder_paths.get_filename_list(FOLDER)]


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


class _HostConfig(comfy.supported_models.SD15):
    """What the host needs to know of one of our nets."""

    unet_config: dict = {}  # noqa: RUF012 - the host's own way
    unet_extra_config: dict = {}  # noqa: RUF012

    def __init__(self, config: TruePoseConfig) -> None:
        super().__init__(unet_settings(config))
        self.truepose_family = config.family
        self.latent_format = _PixelLatent(config.patch)
        schedule = config.scheduler
        self.sampling_settings = {
            "beta_schedule": "linear",  # the host's name for what diffusers calls scaled_linear
            "linear_start": schedule.get("beta_start", 0.00085),
            "linear_end": schedule.get("beta_end", 0.012),
            "timesteps": schedule.get("num_train_timesteps", 1000),
        }
        self.custom_operations = _operations(config.unet.get("norm_num_groups", 32))

    def inpaint_model(self) -> bool:
        return False


def _operations(groups: int) -> type:
    """The host's layers with another number of groups than the 32 that its UNet asks for."""
    base = comfy.ops.pick_operations(torch.float32, None)

    class Operations(base):
        class GroupNorm(base.GroupNorm):
            def __init__(self, num_groups: int, num_channels: int, **keywords: object) -> None:
                super().__init__(groups, num_channels, **keywords)

    return Operations


_KNOWN = {
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


def unet_settings(config: TruePoseConfig) -> dict:
    """diffusers' arguments of a UNet as the host's. Raises TruePoseError for what the host's UNet does not have."""
    unet = config.unet
    unknown = sorted(set(unet) - _KNOWN)
    heads = unet.get("attention_head_dim", 8)
    if unknown or not isinstance(heads, int):
        what = ", ".join(unknown) or f"attention_head_dim {heads}"
        raise TruePoseError(f"this TruePose model's UNet has settings that ComfyUI's UNet lacks: {what}")
    if config.scheduler.get("beta_schedule", "scaled_linear") != "scaled_linear":
        raise TruePoseError(
            f"this TruePose model has the noise schedule {config.scheduler['beta_schedule']!r}; expected scaled_linear"
        )
    widths, layers = unet["block_out_channels"], unet.get("layers_per_block", 2)
    down = ["CrossAttn" in kind for kind in unet["down_block_types"]]
    up = ["CrossAttn" in kind for kind in reversed(unet["up_block_types"])]
    return {
        "image_size": 32,
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [_Times(width / widths[0]) for width in widths],
        "num_res_blocks": [layers] * len(widths),
        "transformer_depth": [int(has) for has in down for _ in range(layers)],
        "transformer_depth_output": [int(has) for has in up for _ in range(layers + 1)],
        "transformer_depth_middle": 1,
        "num_heads": heads,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": unet.get("use_linear_projection", False),
        "context_dim": unet["cross_attention_dim"],
        "adm_in_channels": None,
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


def _make_model(config: TruePoseConfig, weights: Mapping[str, Tensor], where: str) -> object:
    """A MODEL of diffusers' weights. Raises TruePoseError when they do not fit."""
    settings = _HostConfig(config)
    model = settings.get_model({}, "", device=torch.device("cpu"))
    if config.prediction_type == "sample":
        model.model_sampling = _X0Sampling(settings)
    elif config.prediction_type == "v_prediction":
        model.model_sampling = comfy.model_base.model_sampling(settings, comfy.model_base.ModelType.V_PREDICTION)
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    # A name that the host's UNet lacks keeps its own, so that the message below can show it.
    load_strict(model.diffusion_model, {names.get(k, k): v for k, v in weights.items()}, where)
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


# --------------------------------------------------------------------------------------------------- the adapter


class _PoseEncoder(nn.Module):
    """Skeleton picture [B, 3, H, W] -> what is added after conv_in. The layers and names of ControlNet's conditioning
    embedding (arXiv 2302.05543) as diffusers saves it."""

    def __init__(self, width: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for a, b in pairwise(widths):
            self.blocks.append(nn.Conv2d(a, a, 3, padding=1))
            self.blocks.append(nn.Conv2d(a, b, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], width, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = silu(self.conv_in(picture))
        for block in self.blocks:
            x = silu(block(x))
        return self.conv_out(x)


class _Parts(nn.Module):
    """What an adapter computes with, as one module that the host moves. Names are those of the file."""

    dtype = torch.float32
    encode_aligned = TruePoseModel.encode_aligned

    def __init__(self, config: TruePoseConfig, sites: Mapping[str, tuple[int, int]]) -> None:
        """sites: key -> (width of its attention, heads)."""
        super().__init__()
        unet = config.unet
        width, context = unet["block_out_channels"][0], unet["cross_attention_dim"]
        self.codec = PixelCodec(config.patch)
        self.pose_encoder = _PoseEncoder(width, config.pose_widths)
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

    def __init__(self, config: TruePoseConfig, parts: _Parts, sites: Mapping[str, str]) -> None:
        self.config, self.sites = config, dict(sites)
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
        return self.config.size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of its latents."""
        height, width = self.size
        return self.config.unet["out_channels"], height // self.config.patch, width // self.config.patch

    def frame(self, size: tuple[int, int]) -> Frame:
        """How a picture of (height, width) lies in the model's canvas."""
        return fit(size, self.size)

    def pose_embedding(self, picture: Tensor) -> Tensor:
        """Skeleton [B, 3, *size] in [0, 1] -> what is added after TargetNet's conv_in, [B, C0, h, w], on the CPU."""
        parts, device = self._loaded()
        return parts.pose_encoder(picture.to(device, torch.float32)).cpu()

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
    vae: PixelVAE
    adapter: Adapter


def load(path: Path) -> Loaded:
    """Read a TruePose model file. Raises TruePoseError when it is missing, truncated, of another kind, or when a weight
    is missing, unknown or of another shape."""
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    if metadata.get("architecture") != ARCHITECTURE or "config" not in metadata:
        raise TruePoseError(
            f"{path.name} is no TruePose model file (its metadata says {metadata.get('architecture')!r}); "
            "for a checkpoint use Load Checkpoint: Apply HPFA works with it as it is"
        )
    config = TruePoseConfig.from_json(metadata["config"])
    if config.codec != "pixels":
        raise TruePoseError(
            f"{path.name} was trained on the latents of a VAE; this node reads models on pixel patches. "
            "Use `truepose transfer` for this one"
        )
    if config.fusion == "none":
        raise TruePoseError(f"{path.name} reads no source person (fusion 'none'), so there is nothing to load it for")
    groups: dict[str, dict[str, Tensor]] = {"target_net": {}, "source_net": {}, "": {}}
    for name, x in load_file(path).items():
        head, _, rest = name.partition(".")
        if head in ("target_net", "source_net"):
            groups[head][rest] = x
        else:
            groups[""][name] = x
    nets = [_make_model(config, groups[part], f"{path.name}, {part}") for part in ("target_net", "source_net")]
    table = host_sites(nets[0].model.model_config.unet_config)
    keys = {ours: theirs.replace(".", "_") for theirs, ours in table.items()}
    blocks = transformer_blocks(nets[0].model.diffusion_model)
    inner = {site: block.attn2 for site, (_, block) in blocks.items()}
    parts = _Parts(config, {key: (inner[site].to_q.out_features, inner[site].heads) for site, key in keys.items()})
    load_strict(parts, groups[""], path.name)
    adapter = Adapter(config, parts, keys)
    for net in nets:
        net.set_attachments(ATTACHMENT, adapter)
    return Loaded(nets[0], nets[1], PixelVAE(config.patch), adapter)


def empty_conditioning(adapter: Adapter) -> list:
    """CONDITIONING for a model that reads no text: one zero token."""
    return [[torch.zeros(1, 1, adapter.config.unet["cross_attention_dim"]), {}]]


register_folder()
