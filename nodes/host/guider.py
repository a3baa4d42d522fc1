"""Sampling with a guidance scale of its own for the pose and for the source, in the host's way."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.guidance.scales import combine_guidance, guidance_factors

from .model import adapter_of
from .unet import GUIDANCE, NOTHING, POSE_ONLY

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS


class PoseSourceGuider(comfy.samplers.CFGGuider):
    """e = e0 + w_pose (e_pose - e0) + w_source (e_full - e_pose); a call whose factor is 0 is not made.

    e0: the negative conditioning without ControlNet, pose encoder and source. e_pose: the positive without the source.
    e_full: the positive with all. pictured: the positive is an embedding of the source picture, so e_pose reads the
    negative's in its place.
    """

    pictured = False

    def set_scales(self, w_pose: float, w_source: float) -> None:
        """Scales >= 0; 1 and 1 is no guidance and one call per step."""
        for name, value in (("guidance_pose", w_pose), ("guidance_source", w_source)):
            if not 0 <= value < float("inf"):
                raise TruePoseError(f"{name} is {value}; expected a number of at least 0 (1 is no guidance)")
        self.scales = (w_pose, w_source)
        self.cfg = w_source

    def set_conds(self, positive: list, negative: list | None) -> None:
        """negative: None for the positive's own prompt."""
        plain = [[tokens, _without_control(settings)] for tokens, settings in (negative or positive)]
        conds = {"positive": positive, "negative": plain}
        if self.pictured:
            if not negative:
                raise TruePoseError(
                    "this model's positive is an embedding of the source picture; connect the negative output of "
                    "Picture Context too"
                )
            conds["pose"] = [[negative[0][0], settings] for _, settings in positive]
        self.inner_set_conds(conds)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict = {}, seed: int | None = None) -> Tensor:  # noqa: B006
        """The guided prediction of the clean latent. (The host's name and arguments.)"""
        positive, negative = self.conds["positive"], self.conds["negative"]
        nothing, pose, full = (factor != 0 for factor in guidance_factors(*self.scales))

        def predict(conds: list, sees: str | None) -> Tensor:
            options = model_options
            if sees is not None:
                inner = {**model_options.get("transformer_options", {}), GUIDANCE: sees}
                options = {**model_options, "transformer_options": inner}
            return next(
                out
                for cond, out in zip(
                    conds,
                    comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options),
                    strict=True,
                )
                if cond is not None
            )

        # The second place is the negative one, also for other nodes' patches.
        e0 = predict([None, negative], NOTHING) if nothing else None
        e_pose = predict([self.conds.get("pose", positive)], POSE_ONLY) if pose else None
        e_full = predict([positive], None) if full else None
        out = combine_guidance(e0, e_pose, e_full, *self.scales)
        most = next(e for e in (e_full, e_pose, e0) if e is not None)
        least = next(e for e in (e0, e_pose, e_full) if e is not None)
        for function in model_options.get("sampler_post_cfg_function", []):
            out = function(
                {
                    "denoised": out,
                    "cond": positive,
                    "uncond": negative,
                    "cond_scale": self.scales[1],
                    "model": self.inner_model,
                    "cond_denoised": most,
                    "uncond_denoised": least,
                    "sigma": timestep,
                    "model_options": model_options,
                    "input": x,
                }
            )
        return out


def _without_control(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k not in ("control", "control_apply_to_uncond")}


def make_guider(
    model: object, positive: list, negative: list | None, w_pose: float, w_source: float
) -> PoseSourceGuider:
    """A GUIDER. positive, negative: CONDITIONING; negative None for the positive's own prompt."""
    adapter = adapter_of(model)
    guider = PoseSourceGuider(model)
    if adapter is not None:
        if adapter.config.behaviour.unconditional == "zero latent":
            raise TruePoseError(
                f"a {adapter.config.family} model has one guidance scale, for pose and source together; "
                "sample it with KSampler or CFGGuider"
            )
        guider.pictured = adapter.config.behaviour.context == "image"
    guider.set_conds(positive, negative)
    guider.set_scales(w_pose, w_source)
    return guider


def sample(
    guider: PoseSourceGuider,
    latent: dict,
    seed: int,
    steps: int,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
) -> dict:
    """LATENT -> LATENT with the host's progress bar, preview and cancel. Raises TruePoseError for NaN."""
    model = guider.model_patcher
    start = latent["samples"]
    if not bool(start.isfinite().all()):
        raise TruePoseError("the latent holds NaN; look at the node that made it")
    start = comfy.sample.fix_empty_latent_channels(model, start)
    plan = comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=sampler_name,
        scheduler=scheduler,
        denoise=denoise,
        model_options=model.model_options,
    )
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    out = guider.sample(
        noise,
        start,
        comfy.samplers.sampler_object(sampler_name),
        plan.sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, plan.sigmas.shape[-1] - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    out = out.to(comfy.model_management.intermediate_device())
    if not bool(out.isfinite().all()):
        raise TruePoseError(
            "the sampled latent holds NaN; take another sampler or scheduler, or start with --force-fp32"
        )
    return {**{k: v for k, v in latent.items() if k != "downscale_ratio_spacial"}, "samples": out}


def empty_latent(shape: tuple[int, int, int], batch: int) -> dict:
    """LATENT of zeros. shape: (channels, height, width)."""
    return {"samples": torch.zeros(batch, *shape, device=comfy.model_management.intermediate_device())}
