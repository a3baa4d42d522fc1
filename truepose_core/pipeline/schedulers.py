"""The schedulers that models were trained or published with."""

from __future__ import annotations

from diffusers import DDIMScheduler, DDPMScheduler

from truepose_core.models.cfld.encoder import CFLDConfig
from truepose_core.models.model import TruePoseModel


def default_scheduler(model: TruePoseModel) -> DDIMScheduler | DDPMScheduler:
    """The model's kind of sampler with its schedule: DDIM (Song et al., arXiv 2010.02502), or DDPM (arXiv 2006.11239).
    Where the model does not say otherwise, steps are spaced from the last one down."""
    config = model.config
    settings = {
        "prediction_type": config.prediction_type,
        "timestep_spacing": "trailing",
        "clip_sample": config.codec == "pixels",
        **config.scheduler,
    }
    if config.behaviour.sampler == "ddpm":
        return DDPMScheduler(**settings)
    return DDIMScheduler(**{"set_alpha_to_one": True, **settings})


def cfld_scheduler(config: CFLDConfig) -> DDPMScheduler:
    """DDPM (Ho et al., arXiv 2006.11239) as CFLD's test run spaces its steps: leading, one step late."""
    return DDPMScheduler(
        **config.scheduler,
        prediction_type=config.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
    )
