"""The pose field's guidance in the host's own hook behind CFG, so that any sampler and any guider takes it."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path

import folder_paths
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.guidance.field import FieldGuidance, PoseEnergy, field_step, load_energy

from .base import RunCache
from .files import FOLDER, files
from .model import adapter_of
from .unet import in_window, sigma_window

BUNDLED = "bundled (mannequins)"


def predictor_files() -> list[str]:
    """What the node offers: the predictor that ships, then the safetensors files in models/truepose."""
    return [BUNDLED, *files(".safetensors")]


def predictor_path(name: str) -> Path | None:
    """The file of an entry of `predictor_files`, None for the one that ships. Raises TruePoseError if missing."""
    if name == BUNDLED:
        return None
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not os.path.isfile(path):
        raise TruePoseError(
            f"there is no predictor {name!r} in models/{FOLDER}; put it there, or choose {BUNDLED!r}, and refresh"
        )
    return Path(path)


class FieldPatch:
    """The post-CFG function of one Pose Field Guidance. Never changed once made; device copies are kept for its life.

    target: [T, 18, 3] or None. patch: of a model on pixel patches, else None. window: sigmas, None for always.
    """

    def __init__(
        self,
        energy: PoseEnergy,
        options: FieldGuidance,
        target: Tensor | None,
        patch: int | None,
        window: tuple[float, float] | None,
    ) -> None:
        self.energy, self.options, self.target, self.patch, self.window = energy, options, target, patch, window
        self._copies = RunCache()

    def __deepcopy__(self, memo: dict) -> FieldPatch:
        return self

    def _on(self, device: torch.device) -> PoseEnergy:
        if device.type == "cpu":
            return self.energy

        def copied() -> PoseEnergy:
            # Made outside of inference mode: weights made inside may not be differentiated through.
            with torch.inference_mode(False):
                return copy.deepcopy(self.energy).to(device)

        return self._copies.of(device, copied)

    def __call__(self, args: Mapping) -> Tensor:
        """args: the host's. Returns the moved estimate."""
        x0: Tensor = args["denoised"]
        if not in_window(self.window, args["sigma"]):
            return x0
        if self.target is not None and x0.shape[0] % len(self.target):
            raise TruePoseError(
                f"{len(self.target)} target poses cannot be shared among {x0.shape[0]} pictures; "
                "expected the same number for each"
            )
        height, width = x0.shape[-2:]
        step = field_step(
            self._on(x0.device), x0, self.options, aspect=width / height, patch=self.patch, target=self.target
        )
        return x0 - step


def with_field(model: object, options: FieldGuidance, target: Tensor | None) -> object:
    """A clone of MODEL guided by the field, or the MODEL itself where the scale is 0. target: [T, 18, 3] on the model's
    canvas, or None. Raises TruePoseError for a predictor that reads other latents, and a window that ends before it
    starts."""
    if options.scale == 0:
        return model
    adapter = adapter_of(model)
    pixels = adapter is not None and adapter.config.codec == "pixels"
    energy = load_energy(options.predictor, pixels)
    channels = model.model.latent_format.latent_channels
    if not pixels and energy.predictor.channels != channels:
        raise TruePoseError(
            f"the predictor reads latents of {energy.predictor.channels} channels and the model's have {channels}; "
            "train one with this model's VAE: truepose train --row keypoints --vae FOLDER"
        )
    window = sigma_window(model, options.start, options.end)
    patched = model.clone()
    patch = FieldPatch(energy, options, target, adapter.config.patch if pixels else None, window)
    patched.set_model_sampler_post_cfg_function(patch)
    return patched
