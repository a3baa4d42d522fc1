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

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from truepose_core.alignment.control3d import Control3D
from truepose_core.attention.caa import CAASite, RegionTokens
from truepose_core.attention.heads import split_heads
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame, fit
from truepose_core.guidance.scales import rescale_guidance
from truepose_core.models.beside import AlignedEncoder, middle_site, nearest, scale_densepose
from truepose_core.models.cfld.encoder import is_cfld
from truepose_core.models.codec import PixelCodec
from truepose_core.models.config import SKELETON, TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.pose_encoder import encode_maps, make_pose_encoder
from truepose_core.models.region_reader import RegionReader
from truepose_core.parsing import HumanParsing
from truepose_core.source.features import SourceFeatures
from truepose_core.weights.strict import ARCHITECTURE, bundled_path, load_strict, read_metadata

from . import checks as host_checks
from .applied import SiteWeights
from .caa import CrossTokens
from .control3d import Control3DPatch, site_tokens
from .files import FOLDER, files, folders
from .nets import MissingVAE, PixelVAE, _make_model, _make_vae, host_sites
from .unet import transformer_blocks

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


# --------------------------------------------------------------------------------------------------- the adapter


class _Parts(nn.Module):
    """What an adapter computes with, as one module that the host moves. Names are those of the file."""

    dtype = torch.float32
    encode_aligned = TruePoseModel.encode_aligned
    control_tokens = TruePoseModel.control_tokens

    def __init__(self, config: TruePoseConfig, sites: Mapping[str, tuple[int, int]]) -> None:
        """sites: key -> (width of its attention, heads)."""
        super().__init__()
        self.config = config
        self.control3d: nn.Module | None = None
        if config.control3d is not None:
            self.control3d = Control3D(config.control3d, sites[middle_site(sites)][0], sites)
        unet = config.unet
        width, context = unet["block_out_channels"][0], unet["cross_attention_dim"]
        self.codec = PixelCodec(config.patch)
        self.pose_encoder = make_pose_encoder(width, config.pose_widths, config.behaviour)
        self.aligned_encoder: AlignedEncoder | None = None
        if config.aligned:
            self.aligned_encoder = AlignedEncoder(unet["out_channels"], width, config.recurrent)
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

    @property
    def has_pose_encoder(self) -> bool:
        """Whether its pictures are made in a pose that Apply Pose Encoder says."""
        return self._parts.pose_encoder is not None

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
            k, v = (split_heads(f(x), heads).cpu() for f in (module.to_k, module.to_v))
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
    where files do not tell (see `truepose_core.importing.convert.find`). keep: where to write the converted
    file, None for nowhere. Raises as `load`, and as `find` and `convert`."""
    from truepose_core.importing.convert import convert, find, opened

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
    for net, part in zip(nets, (host_checks.TARGET_NET, host_checks.SOURCE_NET), strict=True):
        net.set_attachments(ATTACHMENT, adapter)
        host_checks.check_when_used(net, part, adapter)
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
