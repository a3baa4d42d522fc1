"""What changes from step to step of a run: how the source is read, and where the pose field moves the estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from truepose_core.guidance.field import (
    FieldGuidance,
    PoseEnergy,
    clean_estimate,
    field_step,
    moved_prediction,
    signal_share,
)
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.processors import TargetPass
from truepose_core.source.features import SourceFeatures, nearest_level


class Passes:
    """How TargetNet reads the source at each step: nothing, the pose alone, and all of it. Where the source is read
    anew, or at noise levels, the passes of a step are not those of the one before, and K and V are projected again."""

    def __init__(
        self,
        model: TruePoseModel,
        features: SourceFeatures,
        passes: tuple[TargetPass, TargetPass, TargetPass],
        sigma: Callable[[Tensor], float],
        context: Tensor | None,
        pooled: Tensor | None,
        once_at: Tensor | None = None,
        guided: bool = True,
    ) -> None:
        """passes: (nothing, the pose alone, all). sigma: of a timestep, the noise beside a picture of 1. once_at: the
        only timestep to read at, for a model that reads anew at every step. guided: whether the first two are used."""
        self.model, self.features, self.passes, self.sigma = model, features, passes, sigma
        self.context, self.pooled, self.once_at, self.guided = context, pooled, once_at, guided
        self._level: int | None = None
        self._read = False

    def at(self, t: Tensor) -> tuple[TargetPass, TargetPass, TargetPass]:
        """The passes of the step at timestep t []."""
        features, (alone, posed, full) = self.features, self.passes
        if full.source is None:
            return self.passes
        if self.model.config.behaviour.keeps_latent:
            if not (self._read and self.once_at is not None):
                when = t if self.once_at is None else self.once_at
                if self.guided:
                    alone = posed = replace(full, source=self.model.source_at(features, when, nothing=True), kv={})
                full = replace(full, source=self.model.source_at(features, when), kv={})
        elif features.latent is not None:
            read = self.model.read_noised(features, t, self.sigma(t), self.context, self.pooled)
            full = replace(full, source=full.source.with_level(read), kv={})
        elif features.levels:
            near = nearest_level(features.levels, self.sigma(t))
            if near != self._level:
                self._level, full = near, replace(full, source=full.source.at(self.sigma(t)), kv={})
        self._read, self.passes = True, (alone, posed, full)
        return self.passes


class FieldSteps:
    """The pose interaction field in one run: moves predictions towards the target pose."""

    def __init__(
        self,
        energy: PoseEnergy,
        options: FieldGuidance,
        scheduler: Any,
        config: TruePoseConfig,
        body: Tensor,
        size: tuple[int, int],
    ) -> None:
        """body: the target's keypoints [B, 18, 3] in the model's canvas of `size` (height, width)."""
        self.energy, self.options, self.scheduler, self.config = energy, options, scheduler, config
        self.body, self.aspect = body, size[1] / size[0]

    def __call__(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The prediction with its estimate of the clean latent moved by the field. x: the network's input."""
        # How much of the sampling is done, as the hosts count it.
        share = 1 - float(t) / (self.scheduler.config.num_train_timesteps - 1)
        if not self.options.works_at(share):
            return prediction
        kind, alpha = self.config.prediction_type, signal_share(self.scheduler.alphas_cumprod, t)
        step = field_step(
            self.energy,
            clean_estimate(prediction, x, alpha, kind),
            self.options,
            aspect=self.aspect,
            patch=self.config.patch if self.config.codec == "pixels" else None,
            target=self.body,
        )
        return moved_prediction(prediction, step, alpha, kind)
