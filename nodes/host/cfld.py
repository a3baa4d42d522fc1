"""CFLD in the host: its UNet as a MODEL, its encoders, and the patch that brings source and pose to the UNet.

Rows that read the source's tokens (the positive conditioning) get the biases
on their cross-attention's queries and the pose; all other rows get what CFLD learned for "no source".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame
from truepose_core.models.cfld.encoder import CFLDConfig, CFLDEncoder, cfld_frame, is_cfld, pose_maps, squash
from truepose_core.weights.strict import load_strict, read_metadata

from .base import UNetCall, UNetPatch, dressed
from .batch import Batch
from .nets import host_sites, unet_settings
from .unet import GUIDANCE, NOTHING, POSE_ONLY, Block, with_patches

KEY = "truepose_cfld"
POSITIVE = 0
"""The host's number for positive rows in `cond_or_uncond`."""


@dataclass(frozen=True, eq=False)
class CFLDCondition:
    """What a source and a pose give to every call. Never changed once made.

    tokens [n, T, c], none [1, T, c]: the context with and without a source. biases: the host's block -> [n, N, C].
    pose: number of the input block -> [n, C, h, w]. n pictures, each with its source and its pose. cells: (height,
    width) of the latent.
    """

    tokens: Tensor
    none: Tensor
    biases: Mapping[Block, Tensor]
    pose: Mapping[int, Tensor]
    cells: tuple[int, int]

    def to(self, device: torch.device, dtype: torch.dtype) -> CFLDCondition:
        def put(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype)

        biases, pose = ({k: put(x) for k, x in part.items()} for part in (self.biases, self.pose))
        return CFLDCondition(put(self.tokens), put(self.none), biases, pose, self.cells)


class CFLDEncoders:
    """CFLD's source and pose encoders, as they flow through a TRUEPOSE_CFLD socket. Never changed once made."""

    def __init__(self, config: CFLDConfig, encoder: CFLDEncoder, sites: Mapping[str, str]) -> None:
        """sites: diffusers' name of a block -> the host's ("output.11.0")."""
        self.config = config
        self._encoder = encoder.eval().requires_grad_(False)
        self._blocks: dict[str, Block] = {}
        for site, _ in config.sites:
            part, number, index = sites[site].split(".")
            self._blocks[site] = (part, int(number), int(index))
        self._patcher = comfy.model_patcher.ModelPatcher(
            self._encoder,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __deepcopy__(self, memo: dict) -> CFLDEncoders:
        return self

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache."""
        return sum(x.numel() * x.element_size() for x in self._encoder.parameters())

    def frame(self, size: tuple[int, int]) -> Frame:
        """How a picture of (height, width) lies in CFLD's square."""
        return cfld_frame(size, self.config.size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of its latents."""
        side = self.config.size // 8
        return self.config.unet["in_channels"], side, side

    def encode(self, image: Tensor, body: Tensor) -> CFLDCondition:
        """Source images [S, 3, H, W] in [0, 1] and poses [T, 18, 3] in CFLD's square; S and T are equal, or one of them
        is 1."""
        sources, poses = image.shape[0], body.shape[0]
        if sources != poses and 1 not in (sources, poses):
            raise TruePoseError(
                f"{sources} source images and {poses} target poses; expected as many of one as of the other, or one"
            )
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        device, side, count = self._patcher.load_device, self.config.encoder_size, max(sources, poses)
        condition = self._encoder.encode_source(squash(image, side).to(device))
        features = self._encoder.encode_pose(pose_maps(body.to(device), side))
        keep_on = comfy.model_management.intermediate_device()

        def every(x: Tensor) -> Tensor:
            return x.to(keep_on).expand(count, *x.shape[1:])

        per_level = self.config.unet["layers_per_block"] + 1
        return CFLDCondition(
            every(condition.tokens),
            self._encoder.learnable_vector.detach().to(keep_on),
            {self._blocks[site]: every(x) for site, x in condition.biases.items()},
            {per_level * (level + 1) - 1: every(x) for level, x in enumerate(features)},
            self.latent_shape[1:],
        )


class CFLDPatch(UNetPatch):
    """One Apply CFLD."""

    key = KEY

    def __init__(self, condition: CFLDCondition) -> None:
        super().__init__()
        self.condition = condition

    def around(self, call: UNetCall) -> Tensor:
        x, context, options = call.x, call.context, call.options
        if tuple(x.shape[2:]) != self.condition.cells:
            (height, width), side = x.shape[2:], 8 * self.condition.cells[0]
            raise TruePoseError(
                f"the latent is {width}x{height} cells; CFLD makes pictures of {side}x{side} pixels only. Connect the "
                "latent of Apply CFLD, and set no area on the conditioning"
            )
        where = (x.device, context.dtype)
        condition = self.cache.of(where, lambda: self.condition.to(*where))
        batch, count = Batch.of(x, options), condition.tokens.shape[0]
        batch.check({"pairs of source and pose": count})
        index = batch.index(count, x.device)
        tokens = condition.tokens[index]
        known = (context[:, : tokens.shape[1]] == tokens).flatten(1).all(1) if _fits(context, tokens) else None
        known = context.new_zeros(x.shape[0], dtype=torch.bool) if known is None else known
        sees = options.get(GUIDANCE)
        if sees is None:
            positive = torch.tensor([kind == POSITIVE for kind in batch.kinds], device=x.device)
            positive = positive.repeat_interleave(batch.rows)
            if bool((positive & ~known).any()):
                raise TruePoseError(
                    "the positive conditioning is not that of this Apply CFLD; connect both of its conditionings to "
                    "the sampler. (SourceNet Encode takes the model of Load CFLD, before Apply CFLD)"
                )
        shown = known if sees is None else torch.zeros_like(known)
        posed = {None: known, NOTHING: torch.zeros_like(known), POSE_ONLY: torch.ones_like(known)}[sees]
        context = torch.where(shown[:, None, None], tokens, condition.none)
        here = _Call(condition, index, shown.to(context), posed.to(context))
        patches = with_patches(options, {"input_block_patch": [here.add_pose]})
        options = {**options, "patches": patches, "patches_replace": here.replaced(options)}
        return call.run(context=context, options=options)


def _fits(context: Tensor, tokens: Tensor) -> bool:
    return context.shape[1] >= tokens.shape[1] and context.shape[2] == tokens.shape[2]


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of the UNet: which pair each row has, and 1 or 0 for what it sees of it."""

    condition: CFLDCondition
    index: Tensor
    shown: Tensor
    posed: Tensor

    def __deepcopy__(self, memo: dict) -> _Call:
        return self

    def add_pose(self, h: Tensor, options: dict) -> Tensor:
        part, number = options["block"]
        if part != "input" or number not in self.condition.pose:
            return h
        return h + (self.condition.pose[number][self.index] * self.posed[:, None, None, None]).to(h)

    def replaced(self, options: Mapping) -> dict[str, dict]:
        every = dict(options.get("patches_replace", {}))
        own = dict(every.get("attn2", {}))
        for block, bias in self.condition.biases.items():
            # Another node's replacement, of the block or of its layer, computes with the biased queries.
            inner = own.get(block, own.get(block[:2]))
            own[block] = _Biased(self, bias, inner)
        return {**every, "attn2": own}


@dataclass(frozen=True, eq=False)
class _Biased:
    """The attn2 replace of one block. Takes projected q, k, v [rows, tokens, heads * D]."""

    call: _Call
    bias: Tensor
    inner: Callable | None

    def __deepcopy__(self, memo: dict) -> _Biased:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        if q.shape[:2] != (self.call.index.shape[0], self.bias.shape[1]):
            raise TruePoseError(
                f"a cross-attention has {q.shape[1]} queries in {q.shape[0]} rows, and CFLD knows "
                f"{self.bias.shape[1]} in {self.call.index.shape[0]}; take off the node that cuts or merges tokens"
            )
        q = q + (self.bias[self.call.index] * self.call.shown[:, None, None]).to(q)
        if self.inner is not None:
            return self.inner(q, k, v, extra)
        return host_attention.optimized_attention(
            q, k, v, extra["n_heads"], attn_precision=extra.get("attn_precision"), transformer_options=extra
        )


def with_cfld(model: object, condition: CFLDCondition) -> object:
    """A clone of MODEL that makes this source in this pose; another Apply CFLD on it is replaced. Raises TruePoseError
    for a model that is not CFLD's."""
    if vars(model.model.model_config).get("truepose_kind") != KEY:
        raise TruePoseError("the model is not CFLD's UNet; connect the model of Load CFLD")
    return dressed(model, CFLDPatch(condition))


def conditionings(condition: CFLDCondition) -> tuple[list, list]:
    """(positive, negative) CONDITIONING."""
    return [[condition.tokens, {}]], [[condition.none, {}]]


class _HostConfig(comfy.supported_models.SD15):
    """What the host needs to know of CFLD's UNet: it is Stable Diffusion 1.5's."""

    unet_config: dict = {}  # noqa: RUF012 - the host's own way
    unet_extra_config: dict = {}  # noqa: RUF012

    def __init__(self, config: CFLDConfig) -> None:
        super().__init__(unet_settings(config))
        self.truepose_kind = KEY

    def inpaint_model(self) -> bool:
        return False


def load(paths: Sequence[Path]) -> tuple[object, CFLDEncoders]:
    """(MODEL, encoders) of a converted CFLD file, or of its two files as published. Raises TruePoseError when one is
    missing, truncated or of another kind, or when a weight is missing, unknown or of another shape."""
    from safetensors.torch import load_file

    path = paths[0]
    if len(paths) == 1 and path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if not is_cfld(metadata):
            raise TruePoseError(
                f"{path.name} is no CFLD model file; choose a converted one, or CFLD's two files: pytorch_model.bin "
                "here and pytorch_model_1.bin in more_files"
            )
        return _make(CFLDConfig.from_json(metadata["config"]), load_file(path), path.name)
    from truepose_core.importing.convert import opened

    with opened(paths, whole=False) as (found, weights):
        config = json.dumps(found.plan.config)
        if not is_cfld({"config": config}):
            raise TruePoseError(f"these files are of {found.title}; load them with Load TruePose Model")
        return _make(CFLDConfig.from_json(config), weights, " and ".join(p.name for p in paths))


def _make(config: CFLDConfig, found: Mapping[str, Tensor], where: str) -> tuple[object, CFLDEncoders]:
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "target_net": {}}
    for name, x in found.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = x
    strange = sorted(set(parts) - {"encoder", "target_net"})
    if strange:
        raise TruePoseError(f"{where} has weights of unknown parts: {', '.join(strange)}; convert it again")
    settings = _HostConfig(config)
    device = comfy.model_management.get_torch_device()
    count = sum(x.numel() for x in parts["target_net"].values())
    dtype = comfy.model_management.unet_dtype(
        device=device, model_params=count, supported_dtypes=settings.supported_inference_dtypes
    )
    cast = comfy.model_management.unet_manual_cast(dtype, device, settings.supported_inference_dtypes)
    settings.set_inference_dtype(dtype, cast)
    offload = comfy.model_management.unet_offload_device()
    model = settings.get_model({}, "", device=offload)
    names = comfy.utils.unet_to_diffusers(settings.unet_config)
    # A name that the host's UNet lacks keeps its own, so that the message can show it.
    weights = {names.get(k, k): x for k, x in parts["target_net"].items()}
    load_strict(model.diffusion_model, weights, f"{where}, target_net")
    encoder = CFLDEncoder(config)
    load_strict(encoder, parts["encoder"], f"{where}, encoder")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=offload)
    return patcher, CFLDEncoders(config, encoder, host_sites(settings.unet_config))
