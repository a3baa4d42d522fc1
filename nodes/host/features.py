"""What was read of a source inside the host, and what reads it.

A net that reads its source at every step (`SourceReader`) runs in front of each call; one that is not the model itself
is loaded beside it by the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.patcher_extension import WrappersMP, merge_nested_dicts
from torch import Tensor

from truepose_core.attention.style import moments
from truepose_core.errors import TruePoseError
from truepose_core.source.combine import CombinedFeatures
from truepose_core.source.features import Level, SourceFeatures

from .base import UNetCall, UNetPatch
from .caa import CROSS_INPUT, CrossTokens, beside_attention, keep_cross_input
from .unet import place_name, site_name, style_places, transformer_blocks, with_patches

SOURCE_KEY = "truepose_source"


@dataclass(frozen=True, eq=False)
class HostFeatures(SourceFeatures):
    """SourceFeatures keyed by the host's blocks ("input.1.0"), as it flows through a TRUEPOSE_SOURCE socket.

    nothing: what rows without the source read in its place, for models that read a latent of zeros there; else None.
    reader: reads the source anew at every step, and `sites` are then what it reads in the middle of the sampling; None
    where what was read before is all.
    """

    nothing: HostFeatures | None = None
    reader: SourceReader | None = None

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

    @property
    def nothing(self) -> HostFeatures | None:
        """The first part's: a picture of zeros is nobody's."""
        return self.parts[0].nothing

    def get_ram_usage(self) -> int:
        """Bytes: the joined tokens, and the parts', which other nodes may hold too."""
        joined = sum(x.numel() * x.element_size() for level in self.levels for x in level.sites.values())
        return (joined or self.nbytes) + sum(part.get_ram_usage() for part in self.parts)


def clean_input(sampling: object, latent: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """What the host must be given so that the UNet sees the clean latent [B, C, h, w] as it is at a timestep []:
    (x, sigma [B])."""
    sigma = sampling.sigma(timestep).to(latent)
    # The host scales its input down by the noise that it takes to be in it; here is none.
    return latent * (sigma**2 + sampling.sigma_data**2) ** 0.5, sigma.expand(latent.shape[0])


def noised(sampling: object, latent: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The latent [B, C, h, w] as the sampler has a picture at the noise level sigma [B]."""
    return sampling.noise_scaling(sigma[:, None, None, None], noise.to(latent), latent)


class Recorder(UNetPatch):
    """Keeps what a source's pass shows: what stands in front of every self-attention, in `sites`, and the moments at
    every `style_places`."""

    key = SOURCE_KEY

    def __init__(self, unet: UNetModel, keep_on: torch.device, cross: Mapping[str, CrossTokens]) -> None:
        """cross: region tokens per site, which the pass reads; {} for none."""
        super().__init__()
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

    def _record(self, n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        block = (*extra["block"], extra["block_index"])
        self.sites[site_name(block)] = n.detach().to(self.keep_on, copy=True)
        return n, context, value

    def around(self, call: UNetCall) -> Tensor:
        more: dict[str, list] = {}
        if self.cross:
            put = {site: tokens.to(call.x.device, call.x.dtype) for site, tokens in self.cross.items()}
            reads = _SourceCross(put, {site: block.attn2 for site, (_, block) in transformer_blocks(self.unet).items()})
            more = {"attn2_patch": [keep_cross_input], "attn2_output_patch": [reads]}
        patches = with_patches(call.options, more)
        # In front of the others, so that what is stored is what the block was given.
        looks = {
            "attn1_patch": self._record,
            "input_block_patch": self._look,
            "output_block_patch": self._look_output,
        }
        patches |= {name: [look, *patches.get(name, [])] for name, look in looks.items()}
        return call.run(options={**call.options, "patches": patches})


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
            x, sigma = clean_input(net.model_sampling, latent, timesteps[0].to(device))
        else:
            # The timestep is the nearest that the net knows; the noise is what the sampler has.
            now = net.model_sampling.sigma(timesteps[:1]) if sigmas is None else sigmas.flatten()[:1]
            sigma = now.to(latent).expand(latent.shape[0])
            x = noised(net.model_sampling, latent, self.noise, sigma)
        conds = comfy.sampler_helpers.convert_cond(self.conditioning)
        (cond,) = comfy.samplers.encode_model_conds(net.extra_conds, conds, latent, device, "positive")
        batch = {k: c.process_cond(batch_size=x.shape[0], area=None) for k, c in cond["model_conds"].items()}
        recorder = Recorder(net.diffusion_model, device, self.cross)
        wrappers = {WrappersMP.DIFFUSION_MODEL: {SOURCE_KEY: [recorder.on_model_call]}}
        options = dict(self.model.model_options["transformer_options"])
        options |= {"cond_or_uncond": [0], "sigmas": sigma}
        options["wrappers"] = merge_nested_dicts(
            merge_nested_dicts(options.get("wrappers", {}), self.model.wrappers), wrappers
        )
        net.apply_model(x, sigma, transformer_options=options, **comfy.samplers.cond_cat([batch]))
        return recorder.take(float("nan"))


class _SourceCross:
    """The attn2 output patch of the source's pass: every row reads its own region tokens."""

    def __init__(self, cross: Mapping[str, CrossTokens], modules: Mapping[str, torch.nn.Module]) -> None:
        self.cross, self.modules = cross, modules

    def __call__(self, n: Tensor, extra: dict) -> Tensor:
        site = site_name((*extra["block"], extra["block_index"]))
        return n + beside_attention(self.modules[site], extra.pop(CROSS_INPUT), self.cross[site], None)
