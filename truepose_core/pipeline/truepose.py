"""`TruePosePipeline`: source image and target poses in, the same person in those poses out.

A diffusers `DiffusionPipeline`: any diffusers scheduler, seeds, batches, step callback, progress bar, CPU offload.
SourceNet runs once per source, whatever the number of poses, seeds and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from truepose_core.alignment.control3d import framed_body, target_bodies
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame, fit
from truepose_core.guidance.field import (
    FieldGuidance,
    PoseEnergy,
    load_energy,
)
from truepose_core.guidance.scales import combine_guidance, guidance_factors, rescale_guidance, weigh_region_tokens
from truepose_core.models.model import TruePoseModel
from truepose_core.models.processors import CrossAttention, SelfAttention, attention_sites
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline.base import TransferPipeline, check_call
from truepose_core.pipeline.inputs import DENSEPOSE, encode_channels, picture_embedding, pose_pictures
from truepose_core.pipeline.sampling import start_noise
from truepose_core.pipeline.schedulers import default_scheduler
from truepose_core.pipeline.steps import FieldSteps, Passes
from truepose_core.source.features import SourceFeatures, WholeSource
from truepose_core.source.person import SourcePerson

ONCE, NOISE_LEVELS, EVERY_STEP = "once", "noise levels", "every step"
READINGS = (ONCE, NOISE_LEVELS, EVERY_STEP)
"""How a net that was not trained to read a source may read it."""


@dataclass(frozen=True)
class TransferOutput:
    """images: [B, 3, H, W] float in [0, 1], of the size asked for. features: the source's, to use again."""

    images: Tensor
    features: SourceFeatures


class TruePosePipeline(TransferPipeline):
    """See `__call__`. `model` is a `TruePoseModel`; `scheduler` any diffusers scheduler, by default the model's own
    kind with its schedule and prediction type. `image_encoder`: a transformers CLIPVisionModelWithProjection, for
    models whose cross-attention reads the source picture."""

    model_cpu_offload_seq = "image_encoder->source_net->pose_encoder->target_net"
    _optional_components: ClassVar[list[str]] = ["caa", "source_net", "vae", "pose_encoder", "image_encoder"]
    # Its projections run inside the attention of both nets, where no hook would fetch them.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["caa"]

    def __init__(
        self,
        target_net: torch.nn.Module,
        pose_encoder: torch.nn.Module | None,
        scheduler: Any,
        source_net: torch.nn.Module | None = None,
        caa: torch.nn.Module | None = None,
        vae: torch.nn.Module | None = None,
        image_encoder: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.register_modules(
            target_net=target_net,
            pose_encoder=pose_encoder,
            scheduler=scheduler,
            source_net=source_net,
            caa=caa,
            vae=vae,
            image_encoder=image_encoder,
        )
        self._energy: tuple[str | Path | None, PoseEnergy] | None = None

    @classmethod
    def from_model(
        cls, model: TruePoseModel, scheduler: Any | None = None, image_encoder: torch.nn.Module | None = None
    ) -> TruePosePipeline:
        """A pipeline around a model (shared, not copied)."""
        if scheduler is None:
            scheduler = default_scheduler(model)
        pipe = cls(
            model.target_net,
            model.pose_encoder,
            scheduler,
            model.source_net,
            model.caa,
            getattr(model.codec, "vae", None),
            image_encoder,
        )
        pipe.model = model
        return pipe

    def to(self, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> TruePosePipeline:
        """Move every network to a device or type, as `torch.nn.Module.to`."""
        if self.image_encoder is not None:
            self.image_encoder.to(*args, **kwargs)
        return super().to(*args, **kwargs)

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention for some heads at a time ("auto": half of them, "max": one by one)."""
        for net in (self.target_net, self.source_net):
            if net is None:
                continue
            for block in attention_sites(net).values():
                for attention in (block.attn1, block.attn2):
                    # Where a net has no cross-attention there is none.
                    processor = getattr(attention, "processor", None)
                    if isinstance(processor, SelfAttention | CrossAttention):
                        sizes = {"auto": max(1, attention.heads // 2), "max": 1, None: None}
                        processor.heads_at_once = sizes.get(slice_size, slice_size)

    def disable_attention_slicing(self) -> None:
        """All heads at once again."""
        self.enable_attention_slicing(None)

    def frame(self, size: tuple[int, int]) -> Frame:
        """How a picture of (height, width) sits in the model: a fixed size for pixel models, else padded to whole cells
        of the latent."""
        config = self.model.config
        return fit(size, config.size) if config.codec == "pixels" else fit(size, multiple=self.model.codec.patch)

    @property
    def by_surface(self) -> bool:
        """Whether the model goes by the surface of the source's and the target's bodies."""
        return self.model.config.match == "surface"

    @torch.no_grad()
    def encode_source(
        self,
        image: Tensor,
        parsing: HumanParsing,
        body: Tensor | None = None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        source_reading: str | None = None,
        levels: int = 4,
        source_pose: BodyPose | None = None,
    ) -> SourceFeatures:
        """Run SourceNet. image [S, 3, H, W] in [0, 1]; parsing of the same size; body [S, 18, 3] normalised
        keypoints of the source person, or None (no skeleton prior and no body match then). context: text, or the
        picture's embedding [S, 1, c], which is read with the image encoder where it is not given.

        source_reading, for nets that were not trained to read a source: "once" (clean), "noise levels" (noised, at
        `levels` of them, of which each step of the sampling takes the nearest), "every step" (noised to the step, and
        read again there). None: as the model was trained, else "noise levels".

        source_pose: the sources' bodies [S] on the pictures, for a model that goes by the body's surface, where they
        are known; else they are lifted from the keypoints.
        """
        person = SourcePerson(image, parsing, body)
        reading = self._reading(source_reading)
        if context is None and self.model.config.behaviour.context == "image":
            context = self.encode_image(image)
        frame, device = self.frame(person.size), self._execution_device
        framed = person.framed(frame)
        features = self.model.encode_source(
            framed.image.to(device),
            framed.parsing.to(device),
            None if framed.body is None else framed.body.to(device),
            context,
            pooled,
            pose=None if source_pose is None else framed_body(source_pose, frame),
            noised_at=self._levels(levels) if reading == NOISE_LEVELS else (),
            keep_latent=reading == EVERY_STEP,
        )
        if self.model.config.recurrent and person.body is not None:
            whole = WholeSource(image.float().cpu(), person.parsing.to("cpu"), person.body.float().cpu(), source_pose)
            return replace(features, whole=whole)
        return features

    def _reading(self, asked: str | None) -> str:
        """How the source is read. Raises TruePoseError where the model says how it was trained."""
        untrained = self.model.config.behaviour.source_timestep == "noised"
        if asked is None:
            return NOISE_LEVELS if untrained else ONCE
        if asked not in READINGS:
            raise TruePoseError(f"source_reading is {asked!r}; expected one of {', '.join(READINGS)}")
        if not untrained:
            raise TruePoseError(
                f"this {self.model.config.family} model says how it was trained to read its source; leave "
                "source_reading out"
            )
        return asked

    def _levels(self, count: int) -> list[tuple[int, float]]:
        """(timestep, sigma) in the middle of `count` equal parts of the training timesteps, from the highest."""
        if count < 1:
            raise TruePoseError(f"levels is {count}; expected 1 or more")
        total = len(self.scheduler.alphas_cumprod)
        steps = [round((1 - (i + 0.5) / count) * (total - 1)) for i in range(count)]
        return [(step, self._sigma(step)) for step in steps]

    def _sigma(self, timestep: int | Tensor) -> float:
        """The noise at a timestep, beside a picture of 1."""
        kept = float(self.scheduler.alphas_cumprod[int(timestep)])
        return ((1 - kept) / kept) ** 0.5

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """The CLIP embedding of pictures [S, 3, H, W] in [0, 1], as one token each: [S, 1, c]. The whole picture is
        stretched to the encoder's square, as AnimateAnyone does. Raises TruePoseError without an image encoder."""
        if self.image_encoder is None:
            raise TruePoseError(
                f"a {self.model.config.family} model reads a CLIP embedding of the source picture; give the folder of "
                "its CLIPVisionModelWithProjection (--image-encoder FOLDER)"
            )
        return picture_embedding(self.image_encoder, image, self.model.context_width)

    @torch.no_grad()
    def __call__(
        self,
        source: Tensor | SourceFeatures,
        target_body: Tensor,
        source_parsing: HumanParsing | None = None,
        source_body: Tensor | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 12,
        guidance_pose: float = 1.0,
        guidance_source: float | None = None,
        region_weights: Tensor | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        strength: float = 1.0,
        target_parsing: HumanParsing | None = None,
        pose_map: Tensor | Mapping[str, Tensor | None] | None = None,
        seed: int | Sequence[int] = 0,
        latents: Tensor | None = None,
        context: Tensor | None = None,
        pooled: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        guidance_rescale: float | None = None,
        canvas: Tensor | None = None,
        mask: Tensor | None = None,
        source_once: bool = False,
        field_guidance: FieldGuidance | None = None,
        source_reading: str | None = None,
        levels: int = 4,
        target_pose: BodyPose | None = None,
        source_pose: BodyPose | None = None,
        control_strength: float = 1.0,
        style: float = 0.0,
    ) -> TransferOutput:
        """Show the source person in the target poses.

        source: image [S, 3, H, W] in [0, 1] with its parsing (and keypoints, if known), or the SourceFeatures of an
            earlier call. S sources serve S r target poses, r each in a row.
        target_body: [B, 18, 3] keypoints, normalised to the output picture.
        height, width: of the output in pixels; by default the source image's.
        guidance_pose, guidance_source: scales >= 0; 1 and 1 is no guidance and one network call per step. None is what
            the model was published with. guidance_rescale: phi of guidance rescaling (arXiv 2305.08891, section 3.4),
            None for the model's own.
        region_weights: omega [7] in [0, 1]; None is all ones. strength in [0, 1]: 0 is TargetNet without a source.
        beta, gamma: region and body match, >= 0, the same for every head; None is what the model learned, or its
            configuration's value where it learned none.
        target_parsing: of the output picture, if known. pose_map: [B, 3, height, width] in [0, 1] instead of the drawn
            skeleton; for models that read other maps, pictures by name (depth, normal, semantic_map, skeleton, or
            densepose), where None leaves one out.
        canvas, mask: for models that fill a mask: the picture [B, 3, height, width] in [0, 1] to keep outside of it,
            and where to make the picture, [B, 1, height, width]. Without them all of it is made.
        source_once: read the source at the middle step only, where the model reads it anew at every step.
        field_guidance: how the pose interaction field moves the estimates towards the target pose; None is not at all.
        source_reading, levels: see `encode_source`; SourceFeatures are read as they were encoded.
        style: in [0, 1], how far the picture takes on the source's mean and contrast of features (AdaIN), of the whole
            source, whatever the region weights.
        target_pose, source_pose: for models with 3D guidance or body match on the surface, the bodies [B or 1] on the
            output picture and [S] on the source, where they are known; else they are lifted from the keypoints.
        control_strength >= 0: a factor on what the 3D guidance adds.
        seed: one for the batch (picture i uses seed + i) or one each. latents: the starting noise, instead of seeds.
        context, pooled: text embeddings for models that read text.

        Raises TruePoseError for inputs that do not fit together.
        """
        model = self.model
        device = self._execution_device
        # Parts that are no component of the pipeline: offloading leaves them behind.
        for part in (model.hpfa, model.aligned_encoder, model.controlnet, model.control3d):
            if part is not None:
                part.to(device)
        features = source if isinstance(source, SourceFeatures) else None
        if height is None or width is None:
            if features is not None:
                raise TruePoseError("height and width are needed when the source is given as SourceFeatures")
            height, width = source.shape[-2:]
        if features is None:
            if source_parsing is None:
                raise TruePoseError("a source image needs its human parsing; none was given")
            features = self.encode_source(
                source,
                source_parsing,
                source_body,
                context,
                pooled,
                source_reading,
                levels,
                source_pose if self.by_surface else None,
            )
        behaviour = model.config.behaviour
        if guidance_source is None:
            guidance_source = behaviour.guidance
        if guidance_rescale is None:
            guidance_rescale = behaviour.guidance_rescale * guidance_source
        if (target_pose is not None or source_pose is not None) and not (self.by_surface or model.control3d):
            raise TruePoseError(
                "this model reads no bodies: it has no 3D guidance, and goes by the skeleton; leave target_pose and "
                "source_pose out"
            )
        scales = {"guidance_pose": guidance_pose, "guidance_source": guidance_source}
        sources = features.parsing.batch
        check_call(target_body, sources, num_inference_steps, strength, scales, " (1 is no guidance)")
        self._check_scheduler()
        if not 0 <= style <= 1:
            raise TruePoseError(f"style is {style}; expected 0 to 1")
        if style > 0 and model.config.fusion == "none":
            raise TruePoseError("this model reads no source at its attentions, so it has no style of it; leave style 0")
        if not 0 <= control_strength < float("inf"):
            raise TruePoseError(f"control_strength is {control_strength}; expected a number of at least 0")

        frame = self.frame((height, width))
        batch = target_body.shape[0]
        body = frame.apply_keypoints(target_body.float()).to(device)
        if target_parsing is not None:
            target_parsing = frame.apply_parsing(target_parsing).to(device)
        maps = pose_pictures(model, pose_map, body, frame, device)
        densepose = maps.pop(DENSEPOSE, None)
        pose = model.encode_pose(maps) if maps else None
        patch = model.codec.patch
        shape = (
            batch,
            self.target_net.config.out_channels,
            frame.size_model[0] // patch,
            frame.size_model[1] // patch,
        )
        channels, no_channels = encode_channels(model, densepose, canvas, mask, frame, batch, device)
        noise, generators = start_noise(shape, seed, latents)
        if self.by_surface and target_pose is not None:
            # A copy, so that what is given holds for this call alone.
            features = replace(features)
            given = framed_body(target_pose, frame)
            features.know(body, target_bodies(body, frame.size_model[1] / frame.size_model[0], given=given))
        full = model.target_pass(
            shape[-2:],
            weigh_region_tokens(features, region_weights, strength),
            body,
            target_parsing,
            kv={},
            omega=None if region_weights is None else region_weights.to(device),
            beta=beta if beta is not None or model.hpfa is not None else model.config.beta,
            gamma=gamma if gamma is not None or model.hpfa is not None else model.config.gamma,
            strength=strength,
            style=style,
        )
        alone = model.target_pass(shape[-2:], None)
        posed = alone
        if model.control3d is not None:
            people = self._target_pose(features, body, frame, target_pose, source_pose)
            omega = None if region_weights is None else region_weights.to(device)
            seen = features if full.source is not None else None
            control = [
                model.control_tokens(who, body, shape[-2:], people, omega=omega, strength=control_strength)
                for who in (None, seen)
            ]
            posed, full = replace(alone, control=control[0]), replace(full, control=control[1])
        elif control_strength != 1:
            raise TruePoseError("this model has no 3D guidance; leave control_strength out")
        aligned = model.encode_aligned(features, body, region_weights) if strength > 0 else None
        if aligned is not None:
            aligned = tuple(strength * x for x in aligned)
        with_context = without = context
        if features.context is not None:
            with_context = features.context.repeat_interleave(batch // features.context.shape[0], 0)
            without = torch.zeros_like(with_context)
        factors = guidance_factors(guidance_pose, guidance_source)
        energy = self._pose_energy(field_guidance, device)
        field = None
        if energy is not None:
            field = FieldSteps(energy, field_guidance, self.scheduler, model.config, body, frame.size_model)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        steps = self.scheduler.timesteps
        once_at = steps[len(steps) // 2] if source_once else None
        guided = factors[0] != 0 or factors[1] != 0
        passes = Passes(model, features, (alone, posed, full), self._sigma, context, pooled, once_at, guided)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            alone, posed, full = passes.at(t)
            calls = (
                (alone, None, without, None, no_channels),
                (posed, pose, without, None, channels),
                (full, pose, with_context, aligned, channels),
            )
            x, when = x.to(model.dtype), t.expand(batch)
            predictions = [
                model.denoise(x, when, call, p, text, pooled, a, c).float() if factor != 0 else None
                for factor, (call, p, text, a, c) in zip(factors, calls, strict=True)
            ]
            prediction = combine_guidance(*predictions, guidance_pose, guidance_source)
            if guidance_rescale > 0 and predictions[2] is not None:
                prediction = rescale_guidance(prediction, predictions[2], guidance_rescale)
            return prediction if field is None else field(prediction, x.float(), t)

        images = self.sample(predict, noise, generators, callback_on_step_end)
        restored = frame.restore(images)
        if features.whole is not None and strength > 0 and not frame.is_identity:
            restored = self._at_full_size(
                restored, features, frame, target_body.float().cpu(), body, region_weights, strength, target_pose
            )
        return TransferOutput(restored, features)

    def _check_scheduler(self) -> None:
        theirs, ours = self.scheduler.config.get("prediction_type"), self.model.config.prediction_type
        if theirs not in (None, ours):
            name = type(self.scheduler).__name__
            raise TruePoseError(
                f"the scheduler {name} expects the prediction {theirs!r} and the model predicts {ours!r}; "
                f"make it with {name}.from_config(pipe.scheduler.config)"
            )

    def _at_full_size(
        self,
        restored: Tensor,
        features: SourceFeatures,
        frame: Frame,
        target_body: Tensor,
        body: Tensor,
        omega: Tensor | None,
        strength: float,
        target_pose: BodyPose | None,
    ) -> Tensor:
        """The result [B, 3, *size_in], enlarged from the model's size, with the aligned source in it composed at full
        size: as sharp as the source. body: the target's keypoints in the model's canvas."""
        sharp = features.aligned_at(frame.size_in, target_body, omega, target_pose)
        carried = features.carried(body, omega)
        if sharp is None or carried is None:
            return restored
        return (restored + strength * (sharp - frame.restore(carried[0].float().cpu()))).clamp(0, 1)

    def _pose_energy(self, options: FieldGuidance | None, device: torch.device) -> PoseEnergy | None:
        """The networks of the field's guidance on the device; None where it does nothing."""
        if options is None or options.scale == 0:
            return None
        if self._energy is None or self._energy[0] != options.predictor:
            self._energy = options.predictor, load_energy(options.predictor, self.model.config.codec == "pixels")
        return self._energy[1].to(device)

    def _target_pose(
        self,
        features: SourceFeatures,
        keypoints: Tensor,
        frame: Frame,
        target: BodyPose | None,
        source: BodyPose | None,
    ) -> BodyPose | None:
        """The targets' bodies in the model's canvas, for a model whose 3D guidance reads them."""
        if self.model.config.control3d.query != "body":
            return None
        height, width = frame.size_model
        given = None if target is None else framed_body(target, frame).to(keypoints.device)
        return target_bodies(keypoints, width / height, features.body, given=given, source=source)
