"""The sampling loop of every pipeline: noise from seeds; at each timestep a prediction, and a step of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError


def start_noise(
    shape: tuple[int, ...], seed: int | Sequence[int], latents: Tensor | None = None
) -> tuple[Tensor, list[torch.Generator]]:
    """(the starting noise, float32 on the CPU, and what draws more of it from the same seeds, one for each picture).

    seed: one for the batch (picture i uses seed + i) or one each. latents: the starting noise, where it is given.
    Raises TruePoseError for another number of seeds than pictures, and for latents of another shape.
    """
    seeds = [seed + i for i in range(shape[0])] if isinstance(seed, int) else list(seed)
    if len(seeds) != shape[0]:
        raise TruePoseError(f"{len(seeds)} seeds for {shape[0]} pictures; give one seed, or one for each")
    # Drawn on the CPU: the same seed is the same picture on any device.
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    if latents is None:
        latents = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
    elif tuple(latents.shape) != shape:
        raise TruePoseError(f"latents are {tuple(latents.shape)}; expected {shape}")
    return latents.float(), generators


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    *,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    progress: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """The sampled latents [B, C, h, w].

    predict: (latents as the network takes them, timestep []) -> what the scheduler expects, [B, C, h, w] in float32.
    scheduler: any of diffusers', with its timesteps set. noise: from `start_noise`, on the scheduler's device.
    generators: of the noise that some schedulers draw on the way. on_step: (number of the step, timestep, latents) ->
    the latents to go on with. progress: shows the timesteps as they pass.
    """
    extra = {"generator": list(generators)} if "generator" in signature(scheduler.step).parameters else {}
    latents = noise * scheduler.init_noise_sigma
    for i, t in enumerate(progress(scheduler.timesteps)):
        prediction = predict(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
        if on_step is not None:
            latents = on_step(i, t, latents)
    return latents


def step_callback(
    pipeline: Any, callback: Callable[[Any, int, int, dict], dict] | None
) -> Callable[[int, Tensor, Tensor], Tensor] | None:
    """diffusers' `callback_on_step_end` as an `on_step` of `denoise`."""
    if callback is None:
        return None
    return lambda i, t, latents: callback(pipeline, i, int(t), {"latents": latents}).get("latents", latents)
