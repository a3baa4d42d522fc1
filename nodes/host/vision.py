"""What reads a source person for CAA: CLIP vision towers of open_clip, and IP-Adapter files, as the host's own objects.

A tower looks to other nodes like the host's CLIP_VISION. Both are ModelPatchers, which the host loads and offloads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor

from truepose_core.attention.caa import RegionTokens
from truepose_core.attention.heads import split_heads
from truepose_core.errors import TruePoseError
from truepose_core.models import ip_adapter
from truepose_core.models.ip_adapter import RegionAdapter
from truepose_core.models.vision_tower import VisionTower, load_tower
from truepose_core.parsing import HumanParsing

from . import model as host_model
from . import unet as host_unet
from .caa import CrossTokens
from .files import FOLDER

ADAPTERS = "ipadapter"
"""The folder that IP-Adapter packs use."""
ADAPTER_FILES = (".safetensors", ".bin", ".pth", ".pt")


def register_folder() -> None:
    """Make models/ipadapter a folder of the host, beside what other packs registered for it."""
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS))
    paths, extensions = folder_paths.folder_names_and_paths[ADAPTERS]
    folder_paths.folder_names_and_paths[ADAPTERS] = (paths, {*extensions, *ADAPTER_FILES})


def _listed(folders: tuple[str, ...], endings: tuple[str, ...]) -> list[str]:
    found = [name for folder in folders for name in folder_paths.get_filename_list(folder)]
    return [name for name in dict.fromkeys(found) if name.lower().endswith(endings)]


def _found(name: str, folders: tuple[str, ...]) -> Path:
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None and os.path.isfile(path):
            return Path(path)
    where = " or ".join(f"models/{folder}" for folder in folders)
    raise TruePoseError(f"there is no file {name!r} in {where}; put it there and refresh")


# -------------------------------------------------------------------------------------------------- vision towers

TOWERS = ("clip_vision", FOLDER)


def tower_files() -> list[str]:
    """What Load OpenCLIP Vision offers."""
    return _listed(TOWERS, (".safetensors",))


def tower_path(name: str) -> Path:
    """The file of an entry of `tower_files`."""
    return _found(name, TOWERS)


class OpenCLIPVision:
    """A tower of open_clip that serves wherever the host's CLIP_VISION does."""

    def __init__(self, tower: VisionTower) -> None:
        self.load_device = comfy.model_management.text_encoder_device()
        # The host keeps its towers in half precision and casts every layer; this one computes in what it is kept in.
        half = comfy.model_management.should_use_fp16(self.load_device)
        self.dtype = torch.float16 if half else torch.float32
        self.model = tower.to(self.dtype)
        self.image_size, self.image_mean, self.image_std = tower.image_size[0], list(tower.mean), list(tower.std)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.model,
            load_device=self.load_device,
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        return sum(x.numel() * x.element_size() for x in self.model.parameters())

    def get_sd(self) -> dict[str, Tensor]:
        """The weights, as CLIP Vision Save wants them."""
        return self.model.visual.state_dict()

    def encode_image(self, image: Tensor, crop: bool = True) -> comfy.clip_vision.Output:
        """IMAGE [B, H, W, C] -> CLIP_VISION_OUTPUT, as the host's own. crop: cut a centred square, else squash."""
        comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        pixels = comfy.clip_vision.clip_preprocess(
            image.to(self.load_device), size=self.image_size, mean=self.image_mean, std=self.image_std, crop=crop
        )
        seen = self.model(pixels.to(self.dtype))
        keep_on = comfy.model_management.intermediate_device()
        output = comfy.clip_vision.Output()
        output["last_hidden_state"] = seen.last.float().to(keep_on)
        output["penultimate_hidden_states"] = seen.before.float().to(keep_on)
        output["image_embeds"] = seen.embedding.float().to(keep_on)
        output["image_sizes"] = [pixels.shape[1:]] * pixels.shape[0]
        output["mm_projected"] = None
        return output


def load_vision(name: str, architecture: str | None) -> OpenCLIPVision:
    """A tower from an entry of `tower_files`. architecture: open_clip's name, or None to tell it from the shapes."""
    from truepose_core.weights.reading import CheckpointReader, refuse_quantised

    with CheckpointReader(tower_path(name)) as reader:
        refuse_quantised(reader.infos(), name)
        tower = load_tower({key: reader.tensor(key) for key in reader.infos()}, name, architecture)
    height, width = tower.image_size
    if height != width:
        raise TruePoseError(f"{tower.name} reads pictures of {width}x{height}; expected a tower that reads squares")
    return OpenCLIPVision(tower)


# ---------------------------------------------------------------------------------------------------- IP-Adapter

ADAPTER_FOLDERS = (ADAPTERS, FOLDER)


def adapter_files() -> list[str]:
    """What Load CAA Adapter offers."""
    return _listed(ADAPTER_FOLDERS, ADAPTER_FILES)


def adapter_path(name: str) -> Path:
    """The file of an entry of `adapter_files`."""
    return _found(name, ADAPTER_FOLDERS)


class CAAAdapter:
    """An IP-Adapter that reads region by region, under the host's memory management. Never changed once made."""

    def __init__(self, adapter: RegionAdapter) -> None:
        self.config = adapter.config
        self._adapter = adapter
        self._patcher = comfy.model_patcher.ModelPatcher(
            adapter,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __deepcopy__(self, memo: dict) -> CAAAdapter:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        return sum(x.numel() * x.element_size() for x in self._adapter.parameters())

    def _loaded(self) -> tuple[RegionAdapter, torch.device]:
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        return self._adapter, self._patcher.load_device

    def region_tokens(self, vision: object, image: Tensor, parsing: HumanParsing) -> tuple[RegionTokens, Tensor]:
        """The region tokens of the persons in image [B, 3, H, W] in [0, 1], and the tokens of no picture [1, n, c].

        vision: a CLIP_VISION. parsing: of the same pictures.
        """
        seen, rows = zip(*(self._see(vision, image[i : i + 1], parsing[i]) for i in range(len(image))), strict=True)
        nothing_seen = self._see_nothing(vision) if self.config.reads_patches else None
        # Only now: loading the tower may have sent the adapter away.
        adapter, device = self._loaded()
        tokens = adapter(torch.cat(seen).to(device, adapter.dtype), torch.cat(rows).to(device))
        nothing = adapter.no_picture(None if nothing_seen is None else nothing_seen.to(device, adapter.dtype))
        return RegionTokens(tokens.tokens.float().cpu(), tokens.shown.cpu()), nothing.float().cpu()

    def _see(self, vision: object, image: Tensor, parsing: HumanParsing) -> tuple[Tensor, Tensor]:
        """What the tower says of one person, and the region rows of its patches."""
        image, parsing = ip_adapter.person_square(image, parsing)
        if self.config.reads_patches:
            picture = ip_adapter.on_grey(image, 1 - parsing.masks[:, 0])
            seen = vision.encode_image(picture.movedim(1, -1)).penultimate_hidden_states
            return seen, ip_adapter.patch_rows(parsing, seen.shape[1])
        pictures = ip_adapter.region_pictures(image, parsing).movedim(1, -1)
        # Which regions are shown is told at the fineness of the towers that the published weights were trained with.
        return vision.encode_image(pictures).image_embeds[None], parsing.tokens(16, 16)

    @staticmethod
    def _see_nothing(vision: object) -> Tensor:
        """The tower's hidden states of a picture that is zero once it is normalised: its mean colour everywhere."""
        size = vision.image_size
        picture = torch.tensor(vision.image_mean).expand(1, size, size, 3)
        return vision.encode_image(picture).penultimate_hidden_states

    def cross_tokens(self, tokens: RegionTokens, model: object) -> dict[str, CrossTokens]:
        """Site -> keys and values of the region tokens for every cross-attention of MODEL. Raises TruePoseError where
        the adapter was made for another model."""
        unet = host_unet.unet_of(model, "the model")
        blocks = {site: block.attn2 for site, (_, block) in host_unet.transformer_blocks(unet).items()}
        if not all(hasattr(attn2, "to_k") for attn2 in blocks.values()):
            raise TruePoseError(
                "this model reads no text, so there is no cross-attention beside which an IP-Adapter could stand"
            )
        sizes = {site: (attn2.to_k.out_features, attn2.to_k.in_features) for site, attn2 in blocks.items()}
        layers = ip_adapter.layer_of_site(self.config, sizes)
        adapter, device = self._loaded()
        x = tokens.tokens.to(device, adapter.dtype)
        found = {}
        for site, number in layers.items():
            heads = blocks[site].heads
            k, v = (split_heads(y.float().cpu(), heads) for y in adapter.keys_values(x, number))
            one = torch.ones(())
            found[site] = CrossTokens(k, v, tokens.regions, tokens.shown, torch.zeros(heads), one)
        return found


def load_adapter(name: str) -> CAAAdapter:
    """An IP-Adapter from an entry of `adapter_files`."""
    device = comfy.model_management.get_torch_device()
    half = comfy.model_management.should_use_fp16(device)
    return CAAAdapter(ip_adapter.load_adapter(adapter_path(name), torch.float16 if half else torch.float32))


# ------------------------------------------------------------------------------------------------ region tokens


@dataclass(frozen=True, eq=False)
class SourceCAA:
    """What CAA Encode gives: the region tokens of B source persons, and what made them.

    adapter: of a TruePose model, or of an IP-Adapter file. nothing: the tokens of no picture [1, n, c], or None where
    leaving the source out adds nothing. parsing, body [B, 18, 3] or None: of the sources, to carry to a target pose.
    """

    adapter: host_model.Adapter | CAAAdapter
    tokens: RegionTokens
    nothing: Tensor | None
    parsing: HumanParsing
    body: Tensor | None = None

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        parts = [self.tokens.tokens, self.nothing, self.parsing.masks]
        return sum(x.numel() * x.element_size() for x in parts if x is not None)

    @property
    def trained(self) -> bool:
        """Whether the tokens are those that a TruePose model learned with."""
        return isinstance(self.adapter, host_model.Adapter)

    @property
    def batch(self) -> int:
        return self.tokens.tokens.shape[0]

    def repeated(self, batch: int) -> SourceCAA:
        """One person for every picture of a batch."""
        if self.batch == batch:
            return self
        if self.batch != 1:
            raise TruePoseError(f"CAA was read from {self.batch} images and there are {batch}; expected 1 or {batch}")
        body = None if self.body is None else self.body.expand(batch, -1, -1)
        parsing = HumanParsing(self.parsing.masks.expand(batch, -1, -1, -1))
        return SourceCAA(self.adapter, self.tokens.repeat(batch), self.nothing, parsing, body)

    def cross(self, model: object, net: str) -> dict[str, CrossTokens]:
        """Site -> region tokens for MODEL as "source" or "target" net. Raises TruePoseError where they do not fit."""
        if isinstance(self.adapter, CAAAdapter):
            return self.adapter.cross_tokens(self.tokens, model)
        host_model.adapter_of(model, self.adapter)
        return self.adapter.cross_tokens(self.tokens, net)

    def empty(self, model: object) -> dict[str, CrossTokens]:
        """Site -> the tokens of no picture, in the place of every region shown; {} where nothing is added."""
        if self.nothing is None or not isinstance(self.adapter, CAAAdapter):
            return {}
        tokens = self.nothing.repeat(self.batch, 7, 1) * self.tokens.shown[..., None]
        return self.adapter.cross_tokens(RegionTokens(tokens, self.tokens.shown), model)


register_folder()
