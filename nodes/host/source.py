"""Reading a source with a MODEL (`read_source`): one UNet pass over the clean source latent at timestep 0, or one over
the noised latent for each of a few noise levels, through the host's own sampling path, so that loading, offload, latent
scaling, data types and LoRA are the host's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from truepose_core.attention.caa import RegionTokens
from truepose_core.body.places import places_of
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.source.features import NOISE_SEED, Level

from .base import dressed, undressed
from .caa import CrossTokens
from .features import HostFeatures, Recorder, SourceReader, clean_input, noised
from .patch import KEY, POSE_KEY
from .unet import family_of, unet_of
from .visit import Call, Visit

# ------------------------------------------------------------------------------------------- reading the source


class _ReadOnce(Visit):
    """One pass over the clean latent at sigma 0, which every UNet takes as timestep 0, or at another timestep."""

    def __init__(self, timestep: int = 0) -> None:
        self.timestep = timestep

    def calls(self, sampling: object, latent: Tensor, noise: Tensor, sigmas: Tensor, call: Call) -> None:
        x, sigma = latent, latent.new_zeros(latent.shape[0])
        if self.timestep:
            x, sigma = clean_input(sampling, x, torch.tensor(float(self.timestep)))
        call(x, sigma)


class _ReadLevels(Visit):
    """One pass over the noised latent at each of the noise levels, kept in `levels`."""

    def __init__(self, sigmas: Sequence[float], noise: Tensor, recorder: Recorder) -> None:
        self.sigmas, self.noise, self.recorder = sigmas, noise, recorder
        self.levels: list[Level] = []

    def calls(self, sampling: object, latent: Tensor, noise: Tensor, sigmas: Tensor, call: Call) -> None:
        for level in self.sigmas:
            sigma = latent.new_full((latent.shape[0],), level)
            call(noised(sampling, latent, self.noise, sigma), sigma)
            self.levels.append(self.recorder.take(level))


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
    align: bool = False,
    beside: bool = False,
) -> HostFeatures:
    """Read the source person: the normed hidden state in front of every self-attention.

    model: a MODEL (LoRA and other patches of it stay in force, HPFA and pose are taken off). latent: [B, C, h, w] as
    the VAE gives it. parsing: of the same pictures. conditioning: CONDITIONING or None for zeros. body: [B, 18, 3].
    caa: the region tokens, which travel on; cross: the same for each site of this model, which reads them. image: kept
    for models that bring the source to the target pose; align: by recurrent alignment; beside: as tokens. timestep: at
    which SourceNet reads. nothing: the same of a latent of zeros, for models whose unconditional rows read that. anew:
    whether the source shall be read again at every step. levels: 0 for a source that is read clean; else it is noised,
    and read at that many noise levels, evenly spaced in the sampling. With anew and levels 1 it is also noised at every
    step, as untrained checkpoints want it. match: what places on the body are, as in `TruePoseConfig`.
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
    recorder = Recorder(unet, comfy.model_management.intermediate_device(), cross)
    bare = undressed(model, KEY, POSE_KEY)
    guider = comfy.samplers.CFGGuider(dressed(bare, recorder))
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
        align=align,
        beside=beside,
        style=middle.style,
    )


def level_sigmas(model: object, count: int) -> list[float]:
    """Noise levels in the middle of `count` equal parts of the sampling, from the highest."""
    if count < 1:
        raise TruePoseError(f"levels is {count}; expected 1 or more")
    sampling = model.get_model_object("model_sampling")
    return [float(sampling.percent_to_sigma((i + 0.5) / count)) for i in range(count)]
