"""CFLD's sampling (Lu et al., arXiv 2402.18078), with HPFA on top where asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from truepose_core.errors import TruePoseError
from truepose_core.guidance.scales import combine_guidance, guidance_factors
from truepose_core.models.cfld.encoder import (
    cfld_frame,
    pose_maps,
    squash,
)
from truepose_core.models.cfld.model import CFLDModel, CFLDSource
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline.base import TransferPipeline, check_call
from truepose_core.pipeline.sampling import start_noise
from truepose_core.pipeline.schedulers import cfld_scheduler
from truepose_core.source.person import SourcePerson


@dataclass(frozen=True)
class CFLDOutput:
    """images: [B, 3, H, W] float in [0, 1], of the size asked for. source: what was computed of it, to use again."""

    images: Tensor
    source: CFLDSource


class CFLDPipeline(TransferPipeline):
    """See `__call__`. `scheduler` is any diffusers scheduler, by default DDPM as in CFLD's own test run."""

    model_cpu_offload_seq = "target_net->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    # It is not called as a module, so no hook would fetch it.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["encoder"]

    def __init__(self, target_net: nn.Module, encoder: nn.Module, scheduler: Any, vae: nn.Module | None = None):
        super().__init__()
        self.register_modules(target_net=target_net, encoder=encoder, scheduler=scheduler, vae=vae)

    @classmethod
    def from_model(cls, model: CFLDModel, scheduler: Any | None = None) -> CFLDPipeline:
        """A pipeline around a model (shared, not copied). Raises TruePoseError for a model without its VAE."""
        if model.codec is None:
            raise TruePoseError("CFLD makes latents of Stable Diffusion 1.5; load the model with its VAE")
        if scheduler is None:
            scheduler = cfld_scheduler(model.config)
        pipe = cls(model.target_net, model.encoder, scheduler, getattr(model.codec, "vae", None))
        pipe.model = model
        return pipe

    @torch.no_grad()
    def encode_source(
        self,
        image: Tensor,
        parsing: HumanParsing | None = None,
        body: Tensor | None = None,
    ) -> CFLDSource:
        """Read the source once. image [S, 3, H, W] in [0, 1]. parsing of the same size: also read what HPFA needs.
        body [S, 18, 3]: normalised keypoints of the source person, or None."""
        person = SourcePerson(image, parsing, body)
        model, device = self.model, self._execution_device
        config = model.config
        size = person.size
        condition = model.encoder.encode_source(squash(image, config.encoder_size).to(device))
        features = None
        if parsing is not None:
            frame = cfld_frame(size, config.size)
            body = None if person.body is None else frame.apply_keypoints(person.body.float()).to(device)
            picture = squash(image, config.size).to(device)
            parsing = frame.apply_parsing(person.parsing).to(device)
            features = model.encode_features(picture, parsing, body, condition)
        return CFLDSource(condition, size, features)

    @torch.no_grad()
    def __call__(
        self,
        source: Tensor | CFLDSource,
        target_body: Tensor,
        source_parsing: HumanParsing | None = None,
        source_body: Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_pose: float | None = None,
        guidance_source: float | None = None,
        region_weights: Tensor | None = None,
        beta: float = 0.0,
        gamma: float = 0.0,
        strength: float = 0.0,
        target_parsing: HumanParsing | None = None,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
    ) -> CFLDOutput:
        """Show the source person in the target poses.

        source: image [S, 3, H, W] in [0, 1], or the CFLDSource of an earlier call. S sources serve S r target poses, r
            each in a row. Pictures that are not about 11:16 are padded to it (`cfld_frame`).
        target_body: [B, 18, 3] keypoints, normalised to the output picture.
        height, width: of the output in pixels; by default the source image's.
        num_inference_steps, guidance_pose, guidance_source: by default the model's own (50, 2 and 2).
        strength in [0, 1]: of HPFA; 0 is CFLD as published, above 0 the source needs its parsing.
        region_weights: omega [7] in [0, 1]; None is all ones. beta, gamma >= 0: region and body match of HPFA.
        target_parsing: of the output picture, if known.
        seed: one for the batch (picture i uses seed + i) or one each. latents: the starting noise, instead of seeds.

        Raises TruePoseError for inputs that do not fit together.
        """
        model, device = self.model, self._execution_device
        config = model.config
        steps = config.steps if num_inference_steps is None else num_inference_steps
        w_pose = config.guidance_pose if guidance_pose is None else guidance_pose
        w_source = config.guidance_source if guidance_source is None else guidance_source
        batch = target_body.shape[0]
        sources = source.condition.tokens.shape[0] if isinstance(source, CFLDSource) else source.shape[0]
        numbers = {"guidance_pose": w_pose, "guidance_source": w_source, "beta": beta, "gamma": gamma}
        check_call(target_body, sources, steps, strength, numbers)
        if not isinstance(source, CFLDSource):
            if strength > 0 and source_parsing is None:
                raise TruePoseError("HPFA (strength above 0) needs the source's human parsing; none was given")
            source = self.encode_source(source, source_parsing if strength > 0 else None, source_body)
        elif strength > 0 and source.features is None:
            raise TruePoseError(
                "this source was read without its parsing; read it again with one, or set strength to 0"
            )
        if (height is None) != (width is None):
            raise TruePoseError("give both height and width, or neither (the source image's size)")
        frame = cfld_frame(source.size if height is None else (height, width), config.size)

        body = frame.apply_keypoints(target_body.float()).to(device)
        if target_parsing is not None:
            target_parsing = frame.apply_parsing(target_parsing).to(device)
        pose = model.encoder.encode_pose(pose_maps(body, config.encoder_size))
        shown, hidden = source.condition.repeat(batch // sources), model.no_source(batch)
        full = model.target_pass(
            shown,
            source.features,
            body,
            target_parsing,
            omega=None if region_weights is None else region_weights.to(device),
            beta=beta,
            gamma=gamma,
            strength=strength,
            kv={},
        )
        alone = model.target_pass(hidden)
        calls = ((alone, hidden.tokens, None), (alone, hidden.tokens, pose), (full, shown.tokens, pose))
        factors = guidance_factors(w_pose, w_source)

        shape = (batch, self.target_net.config.in_channels, *model.latent_size)
        noise, generators = start_noise(shape, seed, latents)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            predictions = [
                model.denoise(x.to(model.dtype), t.expand(batch), *call).float() if factor != 0 else None
                for factor, call in zip(factors, calls, strict=True)
            ]
            return combine_guidance(*predictions, w_pose, w_source)

        self.scheduler.set_timesteps(steps, device=device)
        images = self.sample(predict, noise, generators, callback_on_step_end)
        return CFLDOutput(frame.restore(images), source)
