"""ComfyUI's inside, first part: reading a source with a MODEL, and patching a MODEL with HPFA.

(host_caa.py has CAA's part of a block, host_model.py makes MODELs of TruePose files, host_guider.py samples. Only the
files named host*.py know the host's inside.)

Reading (`read_source`): one UNet pass over the clean source latent at timestep 0, or one over the noised latent for
each of a few noise levels, through the host's own sampling path, so that loading, offload, latent scaling, data types
and LoRA are the host's. A net that reads its source at every step (`SourceReader`) runs in front of each call; one that
is not the model itself is loaded beside it by the host.

Patching (`with_hpfa`): a `DIFFUSION_MODEL` wrapper that puts, for the time of one call, an attn1 `replace` on each
block the source knows. The replace projects the source's tokens with the block's own to_k and to_v and hands
longer keys and values to the host's attention. Nothing stays in the options between calls, patch objects never
change once made, and what a call needs lives in the call, so several threads may run at once.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import CallbacksMP, WrappersMP, merge_nested_dicts
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

from truepose_core.attention.caa import RegionTokens, caa_attention
from truepose_core.attention.hpfa import (
    SourceTokens,
    augment,
    gather_tokens,
    kept_tokens,
    match_channels,
)
from truepose_core.attention.style import moments, restyled
from truepose_core.body.places import places_of
from truepose_core.combine import CombinedFeatures
from truepose_core.errors import TruePoseError
from truepose_core.features import NOISE_SEED, Level, SourceFeatures, nearest_level
from truepose_core.parsing import HumanParsing

from .host_caa import (
    CROSS_INPUT,
    SELF_INPUT,
    AppliedCAA,
    CrossTokens,
    beside_attention,
    keep_cross_input,
    keep_self_input,
    merge_heads,
    row_index,
    split_heads,
)

KEY = "truepose_hpfa"
SOURCE_KEY = "truepose_source"
AREAS = "truepose_areas"
POSE_KEY = "truepose_pose"
GUIDANCE = "truepose_guidance"
NOTHING, POSE_ONLY = "nothing", "pose"
"""What a call of the guider may see; without a word it sees all."""
BLOCKS = ("all", "encoder", "middle", "decoder", "middle and decoder")
_PARTS = {
    "all": ("input", "middle", "output"),
    "encoder": ("input",),
    "middle": ("middle",),
    "decoder": ("output",),
    "middle and decoder": ("middle", "output"),
}
UNCONDITIONAL = 1
"""The host's number for negative rows in `cond_or_uncond`."""

Block = tuple[str, int, int]
Area = tuple[int, int, int, int]
"""(height, width, top, left) in latent cells."""

log = logging.getLogger("truepose")


@lru_cache(maxsize=256)
def say_once(message: str) -> None:
    """Log a warning the first time it is said; sampling would repeat it at every block and step."""
    log.warning(message)


Style = Mapping[str, tuple[Tensor, Tensor]]
"""As of a `Level`."""


@dataclass(frozen=True, eq=False)
class HostFeatures(SourceFeatures):
    """SourceFeatures keyed by the host's blocks ("input.1.0"), as it flows through a TRUEPOSE_SOURCE socket.

    nothing: what rows without the source read in its place, for models that read a latent of zeros there; else None.
    reader: reads the source anew at every step, and `sites` are then what it reads in the middle of the sampling; None
    where what was read before is all. style: of the one reading that `sites` are.
    """

    nothing: HostFeatures | None = None
    reader: SourceReader | None = None
    style: Style = field(default_factory=dict)

    def get_ram_usage(self) -> int:
        """Bytes, for the host's cache that evicts by memory."""
        more = [self.parsing.masks, self.image, None if self.caa is None else self.caa.tokens]
        more.append(None if self.reader is None else self.reader.latent)
        more += [x for level in self.levels for x in level.sites.values()]
        # The middle level's tensors are counted among the levels.
        own = 0 if self.levels else self.nbytes
        own += sum(x.numel() * x.element_size() for x in more if x is not None)
        return own if self.nothing is None else own + self.nothing.nbytes


class CombinedHostFeatures(CombinedFeatures, HostFeatures):
    """Several sources in one, as `combine_sources` makes them of HostFeatures. Raises TruePoseError for sources that
    are read anew at every step."""

    def __init__(self, *args: object, parts: tuple[HostFeatures, ...] = (), **more: object) -> None:
        if any(part.reader is not None for part in parts):
            raise TruePoseError(
                "this model reads its source anew at every step, so sources cannot be combined; leave the donor out, "
                "or set source_reading to once or noise levels"
            )
        super().__init__(*args, parts=parts, **more)
        object.__setattr__(self, "style", parts[0].style)

    @property
    def nothing(self) -> HostFeatures | None:
        """The first part's: a picture of zeros is nobody's."""
        return self.parts[0].nothing

    def get_ram_usage(self) -> int:
        """Bytes: the joined tokens, and the parts', which other nodes may hold too."""
        joined = sum(x.numel() * x.element_size() for level in self.levels for x in level.sites.values())
        return (joined or self.nbytes) + sum(part.get_ram_usage() for part in self.parts)


@dataclass(frozen=True, eq=False)
class SiteWeights:
    """How HPFA matches at one site: beta, gamma (a number or [H], >= 0), region_log_weight [H, 7] or None."""

    beta: float | Tensor
    gamma: float | Tensor
    region_log_weight: Tensor | None = None


# ---------------------------------------------------------------------------------------------- what a model is


def site_name(block: Block) -> str:
    """("input", 1, 0) -> "input.1.0"."""
    return ".".join(str(part) for part in block)


def place_name(block: tuple[str, int]) -> str:
    """("output", 1) -> "output.1"."""
    return f"{block[0]}.{block[1]}"


def transformer_blocks(unet: UNetModel) -> dict[str, tuple[Block, torch.nn.Module]]:
    """Site name -> (the host's block, its module) of blocks with self-attention, in the order of the forward pass."""
    found: dict[str, tuple[Block, torch.nn.Module]] = {}
    middle = [] if unet.middle_block is None else [unet.middle_block]
    for part, layers in (("input", unet.input_blocks), ("middle", middle), ("output", unet.output_blocks)):
        for number, layer in enumerate(layers):
            for module in layer:
                if not isinstance(module, host_attention.SpatialTransformer):
                    continue
                for index, block in enumerate(module.transformer_blocks):
                    if not block.disable_self_attn:
                        at = (part, number, index)
                        found[site_name(at)] = (at, block)
    return found


def self_attentions(unet: UNetModel) -> dict[str, tuple[Block, torch.nn.Module]]:
    """Site name -> (the host's block, its attn1)."""
    return {site: (at, block.attn1) for site, (at, block) in transformer_blocks(unet).items()}


def style_places(unet: UNetModel) -> frozenset[tuple[str, int]]:
    """Where style is read and put: behind the last sixth of the input blocks, the middle, and the first third of the
    output blocks (as "reference only" weighs them). ("output", n) is in front of that block."""
    inputs, outputs = len(unet.input_blocks), len(unet.output_blocks)
    behind = {("input", n) for n in range(inputs - inputs // 6, inputs)}
    return frozenset(behind | {("output", n) for n in range(outputs // 3 + 1)})


def unet_of(model: object, what: str) -> UNetModel:
    """The UNet of a MODEL. Raises for a model of another kind, saying which node input is meant by `what`."""
    unet = model.model.diffusion_model
    if not isinstance(unet, UNetModel):
        raise TruePoseError(
            f"{what} is a {type(unet).__name__} ({type(model.model.model_config).__name__}), not a UNet; "
            "HPFA needs a UNet with self-attention: use an SD1.5, SD2.x or SDXL checkpoint"
        )
    if any(isinstance(m, host_attention.SpatialVideoTransformer) for m in unet.modules()):
        raise TruePoseError(f"{what} is a video UNet; use an SD1.5, SD2.x or SDXL checkpoint")
    if not self_attentions(unet):
        raise TruePoseError(f"{what} has no self-attention to read or to patch; use an SD1.5, SD2.x or SDXL model")
    return unet


def family_of(model: object) -> str:
    """Which models can share sources: "sd15", "sd21", "sdxl", a TruePose model's own, or the configuration's name."""
    config = model.model.model_config
    # Asked through vars: the host's configurations warn about every name that they do not have.
    own = vars(config).get("truepose_family")
    if own is not None:
        return own
    widths = {768: "sd15", 1024: "sd21", 2048: "sdxl", 1280: "sdxl-refiner"}
    return widths.get(config.unet_config.get("context_dim"), type(config).__name__.lower())


def cell_size(vae: object) -> int:
    """Pixels along one side of a latent cell of this VAE."""
    return int(vae.spacial_compression_encode())


# ------------------------------------------------------------------------------------------- reading the source


class _ReadOnce(comfy.samplers.Sampler):
    """A sampler of no steps: one pass over the clean latent at sigma 0, which every UNet takes as timestep 0, or at
    another timestep."""

    def __init__(self, timestep: int = 0) -> None:
        self.timestep = timestep

    def sample(
        self,
        model_wrap: object,
        sigmas: Tensor,
        extra_args: dict,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        x, sigma = latent_image, latent_image.new_zeros(latent_image.shape[0])
        if self.timestep:
            sampling = model_wrap.inner_model.model_sampling
            x, sigma = _clean_input(sampling, x, torch.tensor(float(self.timestep)))
        positive = model_wrap.conds["positive"]
        options = extra_args["model_options"]
        comfy.samplers.calc_cond_batch(model_wrap.inner_model, [positive], x, sigma, options)
        return latent_image


def _clean_input(sampling: object, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """What the host must be given so that the UNet sees the clean latent [B, C, h, w] as it is at a timestep []:
    (x, sigma [B])."""
    sigma = sampling.sigma(timestep).to(latent)
    # The host scales its input down by the noise that it takes to be in it; here is none.
    return latent * (sigma**2 + sampling.sigma_data**2) ** 0.5, sigma.expand(latent.shape[0])


class _ReadLevels(comfy.samplers.Sampler):
    """A sampler of no steps: one pass over the noised latent at each of the noise levels, kept in `levels`."""

    def __init__(self, sigmas: Sequence[float], noise: Tensor, recorder: _Recorder) -> None:
        self.sigmas, self.noise, self.recorder = sigmas, noise, recorder
        self.levels: list[Level] = []

    def sample(
        self,
        model_wrap: object,
        sigmas: Tensor,
        extra_args: dict,
        callback: object,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        sampling, positive = model_wrap.inner_model.model_sampling, model_wrap.conds["positive"]
        for level in self.sigmas:
            comfy.model_management.throw_exception_if_processing_interrupted()
            sigma = latent_image.new_full((latent_image.shape[0],), level)
            x = _noised(sampling, latent_image, self.noise, sigma)
            comfy.samplers.calc_cond_batch(model_wrap.inner_model, [positive], x, sigma, extra_args["model_options"])
            self.levels.append(self.recorder.take(level))
        return latent_image


def _noised(sampling: object, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The latent [B, C, h, w] as the sampler has a picture at the noise level sigma [B]."""
    return sampling.noise_scaling(sigma[:, None, None, None], noise.to(latent), latent)


class _Recorder:
    """The `DIFFUSION_MODEL` wrapper of a source's pass: what stands in front of every self-attention, in `sites`, and
    the moments at every `style_places`."""

    def __init__(self, unet: UNetModel, keep_on: torch.device, cross: Mapping[str, CrossTokens]) -> None:
        """cross: region tokens per site, which the pass reads; {} for none."""
        self.unet, self.keep_on, self.cross = unet, keep_on, cross
        self.places = style_places(unet)
        self.sites: dict[str, Tensor] = {}
        self.style: dict[str, tuple[Tensor, Tensor]] = {}

    def take(self, sigma: float) -> Level:
        """What was recorded, which is forgotten here."""
        level = Level(sigma, self.sites, self.style)
        self.sites, self.style = {}, {}
        return level

    def _look(self, h: Tensor, options: dict) -> Tensor:
        if options["block"] in self.places:
            kept = (x.to(self.keep_on, torch.float32) for x in moments(h.detach().float()))
            self.style[place_name(options["block"])] = tuple(kept)
        return h

    def _look_output(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return self._look(h, options), skip

    def __deepcopy__(self, memo: dict) -> _Recorder:
        return self

    def _record(self, n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        block = (*extra["block"], extra["block_index"])
        self.sites[site_name(block)] = n.detach().to(self.keep_on, copy=True)
        return n, context, value

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
        """The wrapper."""
        options = dict(transformer_options or {})
        patches = dict(options.get("patches", {}))
        # In front of the others, so that what is stored is what the block was given.
        patches["attn1_patch"] = [self._record, *patches.get("attn1_patch", [])]
        patches["input_block_patch"] = [self._look, *patches.get("input_block_patch", [])]
        patches["output_block_patch"] = [self._look_output, *patches.get("output_block_patch", [])]
        if self.cross:
            put = {site: tokens.to(x.device, x.dtype) for site, tokens in self.cross.items()}
            reads = _SourceCross(put, {site: block.attn2 for site, (_, block) in transformer_blocks(self.unet).items()})
            patches["attn2_patch"] = [*patches.get("attn2_patch", []), keep_cross_input]
            patches["attn2_output_patch"] = [*patches.get("attn2_output_patch", []), reads]
        options["patches"] = patches
        return executor(x, timesteps, context, y, control, options, **kwargs)


@dataclass(frozen=True, eq=False)
class SourceReader:
    """A net and what it reads anew at every step. Never changed once made.

    model: the MODEL, without HPFA, CAA and pose. latent: [B, C, h, w], scaled as the UNet takes it. conditioning: one
    entry. cross: region tokens per site, which it also reads. noise: what the latent is noised with, [B, C, h, w]; None
    for a SourceNet that was trained to read the clean latent at the sampler's timestep.
    """

    model: object
    latent: Tensor
    conditioning: list
    cross: Mapping[str, CrossTokens]
    noise: Tensor | None = None

    def read(self, timesteps: Tensor, sigmas: Tensor | None = None) -> Level:
        """What it reads at the timestep of a call [rows] and its noise level, on the net's device, which the host has
        loaded it on. Raises TruePoseError where the rows are at different timesteps."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bool((timesteps != timesteps[0]).any()):
            raise TruePoseError(
                "the pictures of this batch are at different timesteps, and this model reads its source at one; "
                "use another sampler, or set source_reading to once"
            )
        net, device = self.model.model, self.model.load_device
        latent = self.latent.to(device, torch.float32)
        if self.noise is None:
            x, sigma = _clean_input(net.model_sampling, latent, timesteps[0].to(device))
        else:
            # The timestep is the nearest that the net knows; the noise is what the sampler has.
            now = net.model_sampling.sigma(timesteps[:1]) if sigmas is None else sigmas.flatten()[:1]
            sigma = now.to(latent).expand(latent.shape[0])
            x = _noised(net.model_sampling, latent, self.noise, sigma)
        conds = comfy.sampler_helpers.convert_cond(self.conditioning)
        (cond,) = comfy.samplers.encode_model_conds(net.extra_conds, conds, latent, device, "positive")
        batch = {k: c.process_cond(batch_size=x.shape[0], area=None) for k, c in cond["model_conds"].items()}
        recorder = _Recorder(net.diffusion_model, device, self.cross)
        wrappers = {WrappersMP.DIFFUSION_MODEL: {SOURCE_KEY: [recorder.on_model_call]}}
        options = dict(self.model.model_options["transformer_options"])
        options |= {"cond_or_uncond": [0], "sigmas": sigma}
        options["wrappers"] = merge_nested_dicts(
            merge_nested_dicts(options.get("wrappers", {}), self.model.wrappers), wrappers
        )
        net.apply_model(x, sigma, transformer_options=options, **comfy.samplers.cond_cat([batch]))
        return recorder.take(float("nan"))


def _source_conditioning(model: object, latent: Tensor, conditioning: list | None) -> list:
    """The first entry of the conditioning without what places it in a picture; zeros where there is none."""
    config = model.model.model_config.unet_config
    if conditioning:
        tokens, settings = conditioning[0][0], conditioning[0][1]
    else:
        tokens, settings = torch.zeros(1, 77, config.get("context_dim") or 768), {}
    place = ("area", "mask", "set_area_to_bounds", "control", "control_apply_to_uncond", "gligen", "strength")
    schedule = ("start_percent", "end_percent", "timestep_start", "timestep_end", "default")
    settings = {k: v for k, v in settings.items() if k not in place + schedule}
    if settings.get("pooled_output") is None:
        settings["pooled_output"] = torch.zeros(1, 1280)
    if model.model.concat_keys:
        # Inpainting models: nothing is masked, and the picture they are told to keep is the source itself.
        settings["concat_mask"] = latent.new_zeros(1, 1, *latent.shape[2:])
        settings["concat_latent_image"] = latent
    return [[tokens, settings]]


def read_source(
    model: object,
    latent: Tensor,
    parsing: HumanParsing,
    conditioning: list | None = None,
    body: Tensor | None = None,
    *,
    caa: RegionTokens | None = None,
    cross: Mapping[str, CrossTokens] | None = None,
    image: Tensor | None = None,
    timestep: int = 0,
    nothing: HostFeatures | None = None,
    anew: bool = False,
    match: str = "surface",
    levels: int = 0,
) -> HostFeatures:
    """Read the source person: the normed hidden state in front of every self-attention.

    model: a MODEL (LoRA and other patches of it stay in force, HPFA and pose are taken off). latent: [B, C, h, w] as
    the VAE gives it. parsing: of the same pictures. conditioning: CONDITIONING or None for zeros. body: [B, 18, 3].
    caa: the region tokens, which travel on; cross: the same for each site of this model, which reads them.
    image: kept for models that carry the source along the skeleton. timestep: at which SourceNet reads. nothing: the
    same of a latent of zeros, for models whose unconditional rows read that. anew: whether the source shall be read
    again at every step. levels: 0 for a source that is read clean; else it is noised, and read at that many noise
    levels, evenly spaced in the sampling. With anew and levels 1 it is also noised at every step, as untrained
    checkpoints want it. match: what places on the body are, as in `TruePoseConfig`.
    """
    unet = unet_of(model, "the model")
    channels = model.model.latent_format.latent_channels
    if latent.shape[1] != channels:
        raise TruePoseError(
            f"the VAE gives {latent.shape[1]} channels and the model reads {channels}; connect the VAE of that model"
        )
    if not bool(latent.isfinite().all()):
        raise TruePoseError(
            "the source's latent holds NaN: the VAE overflowed. Start ComfyUI with --fp32-vae or use another VAE"
        )
    conditioning, cross = _source_conditioning(model, latent, conditioning), cross or {}
    recorder = _Recorder(unet, comfy.model_management.intermediate_device(), cross)
    bare = without_pose(without_caa(without_hpfa(model)))
    reader = bare.clone()
    reader.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, SOURCE_KEY, recorder.on_model_call)
    guider = comfy.samplers.CFGGuider(reader)
    guider.inner_set_conds({"positive": conditioning})
    noise, sampler = None, _ReadOnce(timestep)
    if levels:
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        sampler = _ReadLevels(level_sigmas(model, levels), noise, recorder)
    guider.sample(torch.zeros_like(latent), latent, sampler, torch.zeros(1), disable_pbar=True)
    found = tuple(sampler.levels) if levels else (recorder.take(0.0),)
    middle = found[len(found) // 2]
    again = None
    if anew:
        # As the host's guider does it: a latent of zeros stays one.
        scaled = model.model.process_latent_in(latent) if bool(latent.any()) else latent
        again = SourceReader(bare, scaled, conditioning, cross, noise)
    size = (latent.shape[2], latent.shape[3])
    places = places_of(match, body, size[1] / size[0])
    return HostFeatures(
        family_of(model),
        dict(middle.sites),
        size,
        parsing,
        body,
        caa,
        image,
        surface=places,
        nothing=nothing,
        reader=again,
        levels=found if levels and not anew else (),
        style=middle.style,
    )


def level_sigmas(model: object, count: int) -> list[float]:
    """Noise levels in the middle of `count` equal parts of the sampling, from the highest."""
    if count < 1:
        raise TruePoseError(f"levels is {count}; expected 1 or more")
    sampling = model.get_model_object("model_sampling")
    return [float(sampling.percent_to_sigma((i + 0.5) / count)) for i in range(count)]


class _SourceCross:
    """The attn2 output patch of the source's pass: every row reads its own region tokens."""

    def __init__(self, cross: Mapping[str, CrossTokens], modules: Mapping[str, torch.nn.Module]) -> None:
        self.cross, self.modules = cross, modules

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        site = site_name((*extra["block"], extra["block_index"]))
        return n + beside_attention(self.modules[site], extra.pop(CROSS_INPUT), self.cross[site], None)


# ------------------------------------------------------------------------------------------------ the patch


@dataclass(frozen=True, eq=False)
class AppliedSource:
    """One Apply HPFA: a source and how it is read. Checked and pruned when made, never changed afterwards.

    omega: weight per region, 7 numbers in [0, 1]. beta, gamma: region match and body match, >= 0. strength: (0, 1].
    sigmas: (highest, lowest) noise at which it works, or None for always. blocks: one of `BLOCKS`.
    keep_unconditional: whether negative rows see the source too; only_unconditional: whether nobody else does. target:
    P, or None. target_body: [T, 18, 3]. style: in [0, 1], how far the picture's moments become the source's.

    From a TruePose model's adapter: weights per site take the place of beta and gamma; cross are CAA's region tokens
    per site, which also give P unless the target parsing is `given`; aligned is what the carried source adds after
    conv_in and to the prediction, [T, C, h, w] each.
    """

    source: SourceFeatures
    omega: tuple[float, ...]
    beta: float = 0.0
    gamma: float = 0.0
    strength: float = 1.0
    sigmas: tuple[float, float] | None = None
    blocks: str = "all"
    keep_unconditional: bool = False
    only_unconditional: bool = False
    target: HumanParsing | None = None
    target_body: Tensor | None = None
    style: float = 0.0
    weights: Mapping[str, SiteWeights] | None = None
    cross: Mapping[str, CrossTokens] = field(default_factory=dict)
    given: bool = False
    aligned: tuple[Tensor, Tensor] | None = None
    kept: dict[str, tuple[Tensor, Tensor] | None] = field(init=False, repr=False)
    _copies: dict = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        weights = torch.tensor(self.omega)
        kept: dict[str, tuple[Tensor, Tensor] | None] = {}
        by_count: dict[int, tuple[Tensor, Tensor] | None] = {}
        for site in self.source.sites:
            if site.split(".")[0] not in _PARTS[self.blocks] or self.strength == 0:
                continue
            wanted = self.source.token_weights(site, weights)
            if wanted is None:
                kept[site] = None
                continue
            count = wanted.shape[1]
            if count not in by_count:
                by_count[count] = kept_tokens(wanted)
            if by_count[count] is not None:
                kept[site] = by_count[count]
        object.__setattr__(self, "kept", kept)

    def __deepcopy__(self, memo: dict) -> AppliedSource:
        # Older hosts copy a model's options deeply at every clone; this object never changes, so it is its own copy.
        return self

    @property
    def reader(self) -> SourceReader | None:
        """What reads the source anew at every step, or None."""
        return getattr(self.source, "reader", None)

    def seen_by(self, kind: int) -> bool:
        """Whether rows of this kind (`cond_or_uncond`) see the source."""
        if kind == UNCONDITIONAL:
            return self.keep_unconditional or self.only_unconditional
        return not self.only_unconditional

    @property
    def has_effect(self) -> bool:
        """False where strength or the region weights leave nothing to read, and no style is put on."""
        return bool(self.kept) or self.styles

    @property
    def styles(self) -> bool:
        """Whether the picture gets the source's style."""
        return self.style > 0 and self.strength > 0

    @property
    def matches(self) -> bool:
        """Whether anything depends on the target's position."""
        return (
            (self.has_beta and self.target is not None)
            or (self.has_gamma and self.target_body is not None and self.source.body is not None)
            or bool(self.cross)
            or self.aligned is not None
        )

    @property
    def has_beta(self) -> bool:
        """Whether region match is on at any site."""
        return self.beta > 0 if self.weights is None else any(_is_on(w.beta) for w in self.weights.values())

    @property
    def has_gamma(self) -> bool:
        """Whether body match is on at any site."""
        return self.gamma > 0 if self.weights is None else any(_is_on(w.gamma) for w in self.weights.values())

    @property
    def aligns(self) -> bool:
        """Whether P comes from CAA."""
        return bool(self.cross) and not self.given and self.has_beta

    def site_weights(self, site: str) -> SiteWeights:
        """How this site matches."""
        return SiteWeights(self.beta, self.gamma) if self.weights is None else self.weights[site]

    def in_window(self, sigma: Tensor | None) -> bool:
        """Whether it works at this noise level."""
        return in_window(self.sigmas, sigma)

    def nbytes(self, itemsize: int) -> int:
        """Device memory of a run: all kept tokens, and the keys and values of the widest site."""
        total = widest = 0
        for site, kept in self.kept.items():
            tokens = self.source.sites[site]
            count = tokens.shape[0] * (tokens.shape[1] if kept is None else kept[0].shape[1])
            total += (count if self.reader is None else tokens.shape[:2].numel()) * tokens.shape[2] * itemsize
            widest = max(widest, count * tokens.shape[2] * itemsize)
        return total + 4 * widest

    def on(self, device: torch.device, dtype: torch.dtype, site: str, level: int = 0) -> _Kept:
        """The kept tokens of a site at a level of the source on the device, copied at first use and freed by `release`,
        or when another level is asked for: a sampler does not come back."""
        key = (device, dtype, site, level)
        with self._lock:
            if key not in self._copies:
                for other in [k for k in self._copies if len(k) == 4 and k[3] != level]:
                    del self._copies[other]
                self._copies[key] = self._copy(device, dtype, site, level)
            return self._copies[key]

    def _copy(self, device: torch.device, dtype: torch.dtype, site: str, level: int) -> _Kept:
        levels = self.source.levels
        tokens, kept = (levels[level].sites if levels else self.source.sites)[site], self.kept[site]
        how, cross = self.site_weights(site), self.cross.get(site)
        matched = _is_on(how.beta) and (self.target is not None or cross is not None)
        rows = self.source.regions(site) if matched or how.region_log_weight is not None else None
        body = self.source.coordinates(site) if _is_on(how.gamma) and self.target_body is not None else None
        index = log_w = None
        if kept is not None:
            index, log_w = kept
            tokens = gather_tokens(tokens, index)
            rows = None if rows is None else gather_tokens(rows, index)
            body = None if body is None else gather_tokens(body, index)
        if self.strength < 1:
            base = tokens.new_zeros(tokens.shape[:2], dtype=torch.float32) if log_w is None else log_w
            log_w = base + math.log(self.strength)
        if log_w is not None and not bool((log_w != 0).any()):
            log_w = None

        def put(x: float | Tensor | None, kind: torch.dtype = torch.float32) -> float | Tensor | None:
            return x.to(device=device, dtype=kind) if isinstance(x, Tensor) else x

        # Weights and coordinates stay float32 here: they are rounded once, when they enter the keys.
        return _Kept(
            None if self.reader is not None else put(tokens, dtype),
            None if index is None or self.reader is None else index.to(device),
            put(rows),
            put(log_w),
            put(body),
            # Numbers that match nothing become a plain 0, so that no call has to look at them on the GPU.
            SiteWeights(
                put(how.beta) if _is_on(how.beta) else 0.0,
                put(how.gamma) if _is_on(how.gamma) else 0.0,
                put(how.region_log_weight),
            ),
            None if cross is None else cross.to(device, dtype),
        )

    def aligned_on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The two parts of `aligned` on the device."""
        key = (device, dtype, "")
        with self._lock:
            if key not in self._copies:
                self._copies[key] = tuple(x.to(device=device, dtype=dtype) for x in self.aligned)
            return self._copies[key]

    def release(self) -> None:
        """Free the device copies."""
        with self._lock:
            self._copies.clear()


@dataclass(frozen=True)
class _Kept:
    """What one site reads: tokens [S, K, C], regions [S, K, 7], log_w [S, K], body [S, K, 3] (or None), and how. Where
    each call reads the source anew: no tokens, but which of them to keep, index [S, K] (None for all)."""

    tokens: Tensor | None
    index: Tensor | None
    regions: Tensor | None
    log_w: Tensor | None
    body: Tensor | None
    how: SiteWeights
    cross: CrossTokens | None


def in_window(window: tuple[float, float] | None, sigma: Tensor | None) -> bool:
    """Whether a noise level is in (highest, lowest). Without a window it is not read: that would wait for the GPU."""
    if window is None or sigma is None:
        return True
    return window[0] >= float(sigma.flatten()[0]) >= window[1]


def _is_on(strength: float | Tensor) -> bool:
    return bool((strength > 0).any()) if isinstance(strength, Tensor) else strength > 0


class HPFAPatch:
    """The sources of a model and its CAAs, in the order they were applied. Made anew by every Apply, never changed."""

    def __init__(self, applied: tuple[AppliedSource, ...], caas: tuple[AppliedCAA, ...] = ()) -> None:
        self.applied, self.caas = applied, caas

    def __deepcopy__(self, memo: dict) -> HPFAPatch:
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
        hidden = options.get(GUIDANCE) in (NOTHING, POSE_ONLY)
        sigma = options.get("sigmas")
        active = [] if hidden else [a for a in self.applied if a.in_window(sigma)]
        caas = [c for c in self.caas if (c.empty or not hidden) and in_window(c.sigmas, sigma)]
        if not active and not caas:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        trained = next((c for c in self.caas if c.trained), None)
        call = _Call(active, x, options, caas, trained, hidden)
        call.read_sources(timesteps)
        options = call.install(executor.class_obj)
        return call.carried(executor(x, timesteps, context, y, control, options, **kwargs), 1)

    def on_cond_batch(
        self, executor: Callable, model: object, conds: list, x: Tensor, timestep: Tensor, options: dict
    ) -> list:
        """The `CALC_COND_BATCH` wrapper: a prompt for an area sees a crop of the latent. Remember which crop."""
        if self.caas or any(a.matches for a in self.applied):
            options = with_areas(conds, x, options)
        return executor(model, conds, x, timestep, options)

    def on_prepare(
        self, executor: Callable, model: object, noise_shape: Sequence[int], *args: object, **kwargs: object
    ) -> object:
        """The `PREPARE_SAMPLING` wrapper: ask for the memory the sources need, as a larger latent would."""
        inference = model.model.manual_cast_dtype or model.model.get_dtype()
        itemsize = comfy.model_management.dtype_size(inference)
        more = sum(a.nbytes(itemsize) for a in (*self.applied, *self.caas))
        shape = list(noise_shape)
        need = model.model.memory_required([2 * shape[0], *shape[1:]])
        shape[-1] = math.ceil(shape[-1] * (1 + more / max(need, 1)))
        return executor(model, shape, *args, **kwargs)

    def on_cleanup(self, model: object) -> None:
        """The `ON_CLEANUP` callback, at the end of every run, failed ones included."""
        for applied in (*self.applied, *self.caas):
            applied.release()


def with_areas(conds: list, x: Tensor, options: dict) -> dict:
    """Model options that remember which crop of the latents x each prompt for an area sees; as they are without any."""
    entries = [entry for cond in conds if cond is not None for entry in cond]
    areas = {e["uuid"]: _clip_area(e["area"], x.shape[2:]) for e in entries if e.get("area") is not None}
    if not areas:
        return options
    inner = {**options.get("transformer_options", {}), AREAS: (tuple(x.shape[2:]), areas)}
    return {**options, "transformer_options": inner}


def _clip_area(area: Sequence[int], size: Sequence[int]) -> Area:
    height, width, top, left = area
    return min(height, size[0] - top), min(width, size[1] - left), top, left


def applied_sources(model: object) -> tuple[AppliedSource, ...]:
    """The sources that Apply HPFA put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.applied


def applied_caas(model: object) -> tuple[AppliedCAA, ...]:
    """What Apply CAA put on this MODEL."""
    patch = model.attachments.get(KEY)
    return () if patch is None else patch.caas


def with_hpfa(model: object, applied: AppliedSource) -> object:
    """A clone of MODEL that also reads this source. Without effect (strength 0, all weights 0) it is the same model."""
    unet = unet_of(model, "the model")
    _check_fits(model, unet, applied.source)
    reader = applied.reader
    if reader is not None and reader.noise is None and reader.model.model is model.model:
        raise TruePoseError(
            "this is the SourceNet that reads the source; connect the model output of Load TruePose Model"
        )
    if not applied.has_effect:
        return model
    added = [applied]
    nothing = getattr(applied.source, "nothing", None)
    if nothing is not None:
        added = [
            replace(applied, keep_unconditional=False),
            replace(applied, source=nothing, keep_unconditional=False, only_unconditional=True),
        ]
    return _patched(model, (*applied_sources(model), *added), applied_caas(model))


def without_hpfa(model: object) -> object:
    """A clone of MODEL that reads no source. What Apply CAA put on it stays."""
    return _patched(model, (), applied_caas(model))


def with_caa(model: object, applied: AppliedCAA) -> object:
    """A clone of MODEL that also reads these region tokens. Tokens that the model learned with take the place of those
    of another Apply CAA; others add up."""
    others = [c for c in applied_caas(model) if not (c.trained and applied.trained)]
    return _patched(model, applied_sources(model), (*others, applied))


def without_caa(model: object) -> object:
    """A clone of MODEL without Apply CAA."""
    return _patched(model, applied_sources(model), ())


def _source_nets(model: object, sources: Sequence[AppliedSource]) -> list:
    """The MODELs beside this one that read these sources anew at every step, each net once. Raises TruePoseError where
    a net would have to be patched in two ways."""
    found: dict[int, object] = {}
    for applied in sources:
        # A checkpoint that reads for itself is loaded already, and reads with the weights that it samples with.
        if applied.reader is None or applied.reader.model.model is model.model:
            continue
        net = applied.reader.model
        if found.setdefault(id(net.model), net).patches_uuid != net.patches_uuid:
            raise TruePoseError(
                "two sources are read at every step by one SourceNet with different LoRA or other patches; read both "
                "with the same, or set source_reading to once"
            )
    return list(found.values())


def _patched(model: object, sources: tuple[AppliedSource, ...], caas: tuple[AppliedCAA, ...]) -> object:
    patch = HPFAPatch(sources, caas) if sources or caas else None
    clone = model.clone()
    wrappers = (
        {}
        if patch is None
        else {
            WrappersMP.DIFFUSION_MODEL: patch.on_model_call,
            WrappersMP.CALC_COND_BATCH: patch.on_cond_batch,
            WrappersMP.PREPARE_SAMPLING: patch.on_prepare,
        }
    )
    for kind in (WrappersMP.DIFFUSION_MODEL, WrappersMP.CALC_COND_BATCH, WrappersMP.PREPARE_SAMPLING):
        clone.remove_wrappers_with_key(kind, KEY)
    clone.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, KEY)
    clone.remove_attachments(KEY)
    clone.remove_additional_models(KEY)
    nets = _source_nets(model, sources)
    if nets:
        clone.set_additional_models(KEY, nets)
    for kind, wrapper in wrappers.items():
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    if patch is not None:
        clone.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, patch.on_cleanup)
        clone.set_attachments(KEY, patch)
    return clone


class PosePatch:
    """The pose of a model: what is added after conv_in, [T, C0, h, w]. Never changed once made."""

    def __init__(self, embedding: Tensor) -> None:
        self.embedding = embedding

    def __deepcopy__(self, memo: dict) -> PosePatch:
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
        if options.get(GUIDANCE) != NOTHING:
            options = {**options, "patches": with_patches(options, {"input_block_patch": [self._add]})}
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def _add(self, h: Tensor, options: dict) -> Tensor:
        if options["block"] != ("input", 0):
            return h
        chunks = len(options.get("cond_or_uncond") or [0])
        count, size = self.embedding.shape[0], tuple(self.embedding.shape[2:])
        if tuple(h.shape[2:]) != size:
            raise TruePoseError(
                f"the latent is {h.shape[3]}x{h.shape[2]} cells and this TruePose model makes pictures of "
                f"{size[1]}x{size[0]} cells; connect Empty TruePose Latent"
            )
        rows, rest = divmod(h.shape[0], chunks)
        if rest or rows % count:
            raise TruePoseError(
                f"there are {count} target poses and {h.shape[0] // chunks} latents in the batch; "
                "expected 1 pose or a number that divides the latents"
            )
        index = row_index(count, h.shape[0], chunks, self.embedding.device)
        return h + self.embedding[index].to(h)


def with_pose(model: object, embedding: Tensor) -> object:
    """A clone of MODEL that makes its pictures in this pose; another pose on it is replaced."""
    patch = PosePatch(embedding)
    clone = without_pose(model)
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, POSE_KEY, patch.on_model_call)
    clone.set_attachments(POSE_KEY, patch)
    return clone


def without_pose(model: object) -> object:
    """A clone of MODEL without Apply Pose Encoder."""
    clone = model.clone()
    clone.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, POSE_KEY)
    clone.remove_attachments(POSE_KEY)
    return clone


def _check_fits(model: object, unet: UNetModel, source: SourceFeatures) -> None:
    family = family_of(model)
    widths = {site: attn.to_k.in_features for site, (_, attn) in self_attentions(unet).items()}
    theirs = {site: tokens.shape[2] for site, tokens in source.sites.items()}
    if family != source.family or widths != theirs:
        raise TruePoseError(
            f"the source was read with a {source.family} model ({len(theirs)} attention sites), and this model is "
            f"{family} ({len(widths)} sites); connect a model of the same family to SourceNet Encode and Apply HPFA"
        )


def same_shape(picture: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether a picture of (height, width) pixels can be that of a latent of (rows, columns) cells: their proportions
    agree up to less than one cell, and half a pixel, on each side."""
    (height, width), (rows, columns) = picture, cells
    tallest = (rows + 1) / (columns - 1) if columns > 1 else float("inf")
    flattest = (rows - 1) / (columns + 1)
    return (height - 0.5) / (width + 0.5) < tallest and (height + 0.5) / (width - 0.5) > flattest


def sigma_window(model: object, start: float, end: float) -> tuple[float, float] | None:
    """(highest, lowest) sigma of a range of the sampling, given as fractions 0..1; None for all of it. Raises
    TruePoseError for a start after the end."""
    if start > end:
        raise TruePoseError(f"start_percent {start:g} is after end_percent {end:g}; expected start <= end")
    if start <= 0 and end >= 1:
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


# ------------------------------------------------------------------------------------- one call of the UNet


class _Call:
    """What one call of the UNet needs to know: who is in the batch, and which part of the picture they see."""

    def __init__(
        self,
        active: list[AppliedSource],
        x: Tensor,
        options: dict,
        caas: Sequence[AppliedCAA] = (),
        trained: AppliedCAA | None = None,
        hidden: bool = False,
    ) -> None:
        """active, caas: what works at this noise level. trained: the Apply CAA in place of what the sources bring.
        hidden: whether no row may see the source."""
        self.active, self.options = active, options
        self.caas, self.trained, self.hidden = caas, trained, hidden
        self.batch = x.shape[0]
        self.chunks: list[int] = list(options.get("cond_or_uncond") or [0])
        if self.batch % len(self.chunks):
            self.chunks = [0]
        self.rows = self.batch // len(self.chunks)
        self.size, areas = options.get(AREAS, (tuple(x.shape[2:]), {}))
        uuids = options.get("uuids") or []
        self.areas: list[Area | None] = [
            areas.get(uuids[i]) if i < len(uuids) else None for i in range(len(self.chunks))
        ]
        if tuple(x.shape[2:]) != tuple(self.size) and not any(self.areas):
            self.size = tuple(x.shape[2:])
        self.visible = [a for a in active if any(a.seen_by(kind) for kind in self.chunks)]
        """The sources that any row sees."""
        self._fresh: dict[SourceReader, Level] = {}
        self.levels = {id(a): self._level(a.source) for a in self.visible}
        """Which level of a source this call reads."""
        self._targets: dict = {}
        for applied in active:
            self._check_batch(applied)
            if applied.matches:
                self._check_target(applied)
        for caa in (*caas, *([] if trained is None else [trained])):
            counts = {"CAA source images": caa.batch}
            if caa.target is not None:
                counts["target parsings"] = caa.target.batch
            self._check_counts(counts)
            self._check_target(caa)

    def _check_batch(self, applied: AppliedSource) -> None:
        counts = {"source images": applied.source.batch}
        if applied.aligned is not None:
            counts["carried sources"] = applied.aligned[0].shape[0]
        if applied.target is not None and (applied.has_beta or applied.cross or self.caas):
            counts["target parsings"] = applied.target.batch
        if applied.target_body is not None and applied.has_gamma:
            counts["target poses"] = applied.target_body.shape[0]
        self._check_counts(counts)

    def _check_counts(self, counts: Mapping[str, int]) -> None:
        for what, count in counts.items():
            if self.rows % count:
                raise TruePoseError(
                    f"there are {count} {what} and {self.rows} latents in the batch; "
                    f"expected 1 or a number that divides {self.rows}"
                )

    def _check_target(self, applied: AppliedSource | AppliedCAA) -> None:
        """A target parsing that the user gave must have the picture's shape, but for rounding to whole cells."""
        if not applied.given or applied.target is None or same_shape(applied.target.size, tuple(self.size)):
            return
        (height, width), (rows, columns) = applied.target.size, self.size
        raise TruePoseError(
            f"the target parsing is {width}x{height} (width x height) and the latent {columns}x{rows} cells, another "
            "shape; make the parsing from a picture of the shape that is sampled, or crop it to that"
        )

    def install(self, unet: UNetModel) -> dict:
        """New transformer options with our replace on every block that a source knows and nobody else owns."""
        options = dict(self.options)
        replaces = dict(options.get("patches_replace", {}))
        attn1 = dict(replaces.get("attn1", {}))
        wanted = {site for applied in self.active for site in applied.kept}
        blocks = transformer_blocks(unet)
        for site, (block, module) in blocks.items():
            if site not in wanted:
                continue
            if block in attn1 or block[:2] in attn1:
                say_once(f"HPFA leaves block {site} alone: another node replaces its self-attention")
                continue
            attn1[block] = _Replace(self, site, module)
        replaces["attn1"] = attn1
        options["patches_replace"] = replaces
        more: dict[str, list] = {}
        if any(a.aligns for a in self.active):
            more["attn1_patch"] = [keep_self_input]
        if self.caas or (self.trained is None and any(a.cross for a in self.active)):
            more["attn2_patch"] = [keep_cross_input]
            more["attn2_output_patch"] = [_TargetCross(self, {s: module for s, (_, module) in blocks.items()})]
        if any(a.aligned is not None for a in self.active):
            more["input_block_patch"] = [self._after_first]
        if any(a.styles for a in self.visible):
            more["input_block_patch"] = [*more.get("input_block_patch", []), self._style_input]
            more["output_block_patch"] = [self._style_output]
        options["patches"] = with_patches(options, more)
        return options

    def _level(self, source: SourceFeatures) -> int:
        if len(source.levels) < 2:
            return 0
        sigmas = self.options.get("sigmas")
        return len(source.levels) // 2 if sigmas is None else nearest_level(source.levels, float(sigmas.flatten()[0]))

    def read_sources(self, timesteps: Tensor | None) -> None:
        """Read what is read anew at every step, for this call's timesteps [rows]."""
        for reader in dict.fromkeys(a.reader for a in self.visible if a.reader is not None):
            self._fresh[reader] = reader.read(timesteps, self.options.get("sigmas"))

    def style_of(self, applied: AppliedSource) -> Style:
        """The moments of a source that this call goes by."""
        if applied.reader is not None:
            return self._fresh[applied.reader].style
        levels = applied.source.levels
        return levels[self.levels[id(applied)]].style if levels else getattr(applied.source, "style", {})

    def _style_input(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: the sources' moments in place of the picture's own, for the rows that see them."""
        place, parts = place_name(options["block"]), list(h.split(self.rows))
        for number, kind in enumerate(self.chunks):
            styles = [(a, self.style_of(a)) for a in self.visible if a.styles and a.seen_by(kind)]
            styles = [(a, style[place]) for a, style in styles if place in style]
            own = parts[number]
            for applied, found in styles:
                mean, deviation = (x.to(own).repeat_interleave(self.rows // x.shape[0], 0) for x in found)
                share = applied.style / len(styles)
                parts[number] = parts[number] + share * (restyled(own, mean, deviation) - own)
        return torch.cat(parts)

    def _style_output(self, h: Tensor, skip: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        return self._style_input(h, options), skip

    def tokens(self, applied: AppliedSource, kept: _Kept, site: str, like: Tensor) -> Tensor:
        """The tokens of a source that one site reads in this call: [S, K, C]."""
        if applied.reader is None:
            return kept.tokens
        tokens = self._fresh[applied.reader].sites[site].to(like)
        return tokens if kept.index is None else gather_tokens(tokens, kept.index)

    def _after_first(self, h: Tensor, options: dict) -> Tensor:
        """An input block patch: what the carried source adds after conv_in."""
        return self.carried(h, 0) if options["block"] == ("input", 0) else h

    def carried(self, x: Tensor, part: int) -> Tensor:
        """x [rows, C, h, w] plus what carried sources add there, for the rows that see them. part: 0 after conv_in,
        1 to the prediction."""
        for applied in self.active:
            if applied.aligned is None:
                continue
            added = applied.aligned_on(x.device, x.dtype)[part]
            if tuple(added.shape[2:]) != tuple(self.size):
                raise TruePoseError(
                    f"the latent is {self.size[1]}x{self.size[0]} cells and this TruePose model makes pictures of "
                    f"{added.shape[3]}x{added.shape[2]} cells; connect Empty TruePose Latent"
                )
            parts = list(x.split(self.rows))
            for number, kind in enumerate(self.chunks):
                if not applied.seen_by(kind):
                    continue
                crop = added
                if self.areas[number] is not None:
                    height, width, top, left = self.areas[number]
                    crop = added[:, :, top : top + height, left : left + width]
                parts[number] = parts[number] + crop.repeat_interleave(self.rows // crop.shape[0], 0)
            x = torch.cat(parts)
        return x

    def groups(self) -> Iterator[tuple[list[int], list[AppliedSource]]]:
        """Chunks of the batch that see the same sources: (chunk numbers, sources)."""
        seen: dict[tuple[int, ...], list[int]] = {}
        for number, kind in enumerate(self.chunks):
            visible = tuple(i for i, a in enumerate(self.active) if a.seen_by(kind))
            seen.setdefault(visible, []).append(number)
        for visible, numbers in seen.items():
            yield numbers, [self.active[i] for i in visible]

    def readers(self, site: str, device: torch.device, dtype: torch.dtype) -> Iterator[_Reader]:
        """Which chunks read which region tokens at a site."""
        if self.trained is None:
            for chunks, sources in self.groups():
                for applied in sources:
                    if site in applied.kept and site in applied.cross:
                        kept = applied.on(device, dtype, site, self.levels[id(applied)])
                        yield _Reader(chunks, kept.cross, applied, None)
        for caa in self.caas:
            sees = [not self.hidden and (caa.keep_unconditional or kind != UNCONDITIONAL) for kind in self.chunks]
            for empty in (False, True):
                chunks = [number for number, sees_it in enumerate(sees) if sees_it != empty]
                if chunks and site in (caa.empty if empty else caa.cross):
                    yield _Reader(chunks, caa.on(device, dtype, site, empty), self._knows_target(caa), caa)

    def _knows_target(self, caa: AppliedCAA) -> AppliedSource | AppliedCAA:
        """Whose target parsing a CAA goes by: its own, else that of a source."""
        return next((a for a in (caa, *self.active) if a.target is not None), caa)

    def target_rows(
        self, applied: AppliedSource | AppliedCAA, grid: tuple[int, int], chunks: list[int]
    ) -> Tensor | None:
        """The target's regions for these chunks, one after the other: [rows, N, 7], or None."""
        if applied.target is None:
            return None
        return self._rows_for(applied, "regions", grid, chunks)

    def target_places(self, applied: AppliedSource, grid: tuple[int, int], chunks: list[int]) -> Tensor | None:
        """Places on the body for these chunks: [rows, N, 3 or 4], or None."""
        if not applied.has_gamma or applied.target_body is None or applied.source.body is None:
            return None
        if applied.source.target_coordinates(applied.target_body, 1, 1, self.size[1] / self.size[0]) is None:
            return None
        return self._rows_for(applied, "body", grid, chunks)

    def _rows_for(
        self, applied: AppliedSource | AppliedCAA, what: str, grid: tuple[int, int], chunks: list[int]
    ) -> Tensor:
        parts = []
        for chunk in chunks:
            key = (id(applied), what, grid, self.areas[chunk])
            if key not in self._targets:
                self._targets[key] = self._sample(applied, what, grid, self.areas[chunk])
            rows = self._targets[key]
            parts.append(rows.repeat_interleave(self.rows // rows.shape[0], 0))
        return torch.cat(parts)

    def _sample(
        self, applied: AppliedSource | AppliedCAA, what: str, grid: tuple[int, int], area: Area | None
    ) -> Tensor:
        aspect = self.size[1] / self.size[0]

        def rows(height: int, width: int) -> Tensor:
            if what == "body":
                return applied.source.target_coordinates(applied.target_body, height, width, aspect)
            return applied.target.tokens(height, width)

        if area is None:
            return rows(*grid)
        height, width, top, left = area
        whole = rows(*self.size).mT.unflatten(2, tuple(self.size))
        crop = whole[:, :, top : top + height, left : left + width]
        return adaptive_avg_pool2d(crop, grid).flatten(2).mT


@dataclass(frozen=True)
class _Reader:
    """Chunks that read region tokens. target: whose target parsing they go by. caa: the Apply CAA, None for what a
    source brings."""

    chunks: list[int]
    cross: CrossTokens
    target: AppliedSource | AppliedCAA
    caa: AppliedCAA | None


class _Replace:
    """The attn1 replace of one block in one call. Takes projected q, k, v [rows, tokens, heads * D]."""

    def __init__(self, call: _Call, site: str, block: torch.nn.Module) -> None:
        self.call, self.site, self.attn, self.attn2 = call, site, block.attn1, block.attn2

    def __deepcopy__(self, memo: dict) -> _Replace:
        return self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra: dict, mask: Tensor | None = None) -> Tensor:
        call = self.call
        n = extra.pop(SELF_INPUT, None)
        if k.shape[0] != q.shape[0]:
            # HyperTile folds tiles of the queries into the batch; the host's attention would fold k and v the same way.
            k, v = (x.reshape(q.shape[0], -1, x.shape[-1]) for x in (k, v))
        height, width = extra["activations_shape"][-2:]
        folds, rest = divmod(q.shape[0], call.batch)
        whole = folds >= 1 and rest == 0
        in_place = folds == 1 and rest == 0 and q.shape[1] == height * width
        if not in_place and any(a.matches for a in call.active):
            say_once("region match and body match are off where another node (HyperTile, ToMe) cuts or merges tokens")
        projected: dict[int, tuple[Tensor, Tensor]] = {}
        if not whole:
            # Another node hands over some of the rows and does not say which: all of them read what fits any row.
            sources = [a for a in call.visible if a.source.batch == 1]
            return self._attend(q, k, v, extra, sources, None, None, None, projected)
        groups = list(call.groups())
        grid = (height, width) if in_place else None
        if len(groups) == 1:
            return self._attend(q, k, v, extra, groups[0][1], groups[0][0], grid, n, projected)
        size = call.rows * folds
        parts: dict[int, Tensor] = {}
        for chunks, sources in groups:
            a, b, c = (torch.cat([x[i * size : (i + 1) * size] for i in chunks]) for x in (q, k, v))
            d = None if n is None or grid is None else torch.cat([n[i * size : (i + 1) * size] for i in chunks])
            out = self._attend(a, b, c, extra, sources, chunks, grid, d, projected)
            parts.update(zip(chunks, out.split(size), strict=True))
        return torch.cat([parts[i] for i in range(len(call.chunks))])

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: dict,
        sources: list[AppliedSource],
        chunks: list[int] | None,
        grid: tuple[int, int] | None,
        n: Tensor | None,
        projected: dict[int, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Attention of rows that all see `sources`. chunks: which chunks they are, None for unknown rows.
        grid: the token grid, None where tokens are not one per cell. n: the block's input, if CAA wants it."""
        heads = self.attn.heads
        width = q.shape[-1] // heads
        precision = extra.get("attn_precision", self.attn.attn_precision)
        tokens, channels = [], []
        for applied in sources:
            if self.site not in applied.kept:
                continue
            kept = applied.on(q.device, q.dtype, self.site, self.call.levels[id(applied)])
            if id(applied) not in projected:
                read = self.call.tokens(applied, kept, self.site, q)
                projected[id(applied)] = (self.attn.to_k(read), self.attn.to_v(read))
            ks, vs = projected[id(applied)]
            regions = places = None
            if grid is not None and chunks is not None:
                regions = self._target_regions(applied, kept, grid, chunks, n)
                places = self.call.target_places(applied, grid, chunks)
            source = SourceTokens(split_heads(ks, heads), split_heads(vs, heads), kept.regions, kept.log_w, kept.body)
            source = _spread(source, q.shape[0], chunks)
            channels.append(
                match_channels(
                    source,
                    split_heads(q, heads),
                    target_regions=None if regions is None else regions.to(q.device),
                    beta=kept.how.beta,
                    region_log_weight=kept.how.region_log_weight,
                    target_body=None if places is None else places.to(q.device),
                    gamma=kept.how.gamma,
                )
            )
            tokens.append(source)
        if all(c is None for c in channels):
            for source in tokens:
                k = torch.cat([k, merge_heads(source.k).expand(k.shape[0], -1, -1)], 1)
                v = torch.cat([v, merge_heads(source.v).expand(v.shape[0], -1, -1)], 1)
            return host_attention.optimized_attention(
                q, k, v, heads, attn_precision=precision, transformer_options=extra
            )
        joined = SourceTokens(
            torch.cat([s.k.expand(q.shape[0], -1, -1, -1) for s in tokens], 2),
            torch.cat([s.v.expand(q.shape[0], -1, -1, -1) for s in tokens], 2),
        )
        counts = [s.k.shape[2] for s in tokens]
        q, k, v = augment(*(split_heads(x, heads) for x in (q, k, v)), joined, _side_by_side(channels, counts))
        # The host's attention scales by the width it is given; the formula wants that of the unpadded head.
        q = q * (q.shape[-1] / width) ** 0.5
        out = host_attention.optimized_attention(
            q, k, v, heads, attn_precision=precision, skip_reshape=True, transformer_options=extra
        )
        return out.unflatten(-1, (heads, -1))[..., :width].flatten(-2)

    def _target_regions(
        self, applied: AppliedSource, kept: _Kept, grid: tuple[int, int], chunks: list[int], n: Tensor | None
    ) -> Tensor | None:
        """P: what the user gave, else CAA's alignment, else the carried parsing. [rows, N, 7] or None."""
        if isinstance(kept.how.beta, float | int) and kept.how.beta == 0:
            return None
        prior = self.call.target_rows(applied, grid, chunks)
        if applied.given or kept.cross is None or n is None:
            return prior
        trained = self.call.trained
        cross = kept.cross if trained is None else trained.on(n.device, n.dtype, self.site)
        cross = cross.rows(row_index(cross.batch, n.shape[0], len(chunks), n.device))
        prior = None if prior is None else prior.to(n.device)
        q = split_heads(self.attn2.to_q(n), self.attn2.heads)
        return caa_attention(q, cross.k, cross.v, cross.regions, cross.shown, prior=prior, kappa=cross.kappa)[1]


class _TargetCross:
    """The attn2 output patch of one call: rows that see a source also read its region tokens."""

    def __init__(self, call: _Call, blocks: Mapping[str, torch.nn.Module]) -> None:
        self.call, self.blocks = call, blocks

    def __deepcopy__(self, memo: dict) -> _TargetCross:
        return self

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        call, x = self.call, extra.pop(CROSS_INPUT)
        site = site_name((*extra["block"], extra["block_index"]))
        if site not in self.blocks:
            return n
        if n.shape[0] != call.batch:
            say_once("CAA's cross-attention is off where another node hands over some of the rows")
            return n
        height, width = extra["activations_shape"][-2:]
        grid = (height, width) if n.shape[1] == height * width else None
        parts = list(n.split(call.rows))
        for reader in call.readers(site, n.device, n.dtype):
            chunks = reader.chunks
            rows = torch.cat([x[i * call.rows : (i + 1) * call.rows] for i in chunks])
            cross = reader.cross.rows(row_index(reader.cross.batch, rows.shape[0], len(chunks), n.device))
            prior = None if grid is None else call.target_rows(reader.target, grid, chunks)
            prior = None if prior is None else prior.to(n)
            added = beside_attention(self.blocks[site].attn2, rows, cross, prior)
            gate = None if reader.caa is None else reader.caa.gate(prior)
            added = added if gate is None else gate * added
            for chunk, more in zip(chunks, added.split(call.rows), strict=True):
                parts[chunk] = parts[chunk] + more
        return torch.cat(parts)


def with_patches(options: Mapping, more: Mapping[str, list]) -> dict[str, list]:
    """New lists of patches: those in the options, and ours behind them."""
    patches = dict(options.get("patches", {}))
    for name, ours in more.items():
        patches[name] = [*patches.get(name, []), *ours]
    return patches


def _spread(source: SourceTokens, rows: int, chunks: list[int] | None) -> SourceTokens:
    """A batch of sources repeated to the rows: within every chunk, each source serves the same number of rows."""
    batch = source.k.shape[0]
    if batch == 1:
        return source
    index = row_index(batch, rows, len(chunks), source.k.device)

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index]

    return SourceTokens(*(pick(x) for x in (source.k, source.v, source.regions, source.log_w, source.body)))


def _side_by_side(channels: list[tuple[Tensor, Tensor] | None], counts: list[int]) -> tuple[Tensor, Tensor]:
    """Spare channels of several sources as one pair: each source has channels of its own, zero for the others."""
    present = [c for c in channels if c is not None]
    if len(channels) == 1:
        return present[0]
    query = torch.cat([q for q, _ in present], -1)
    batch = max(k.shape[0] for _, k in present)
    keys, left = [], 0
    for pair, count in zip(channels, counts, strict=True):
        if pair is None:
            keys.append(query.new_zeros((batch, 1, count, query.shape[-1])))
            continue
        width = pair[1].shape[-1]
        key = pair[1].expand(batch, -1, -1, -1)
        keys.append(pad(key, (left, query.shape[-1] - left - width)))
        left += width
    return query, torch.cat(keys, 2)
