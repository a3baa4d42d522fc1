"""CFLD (Lu et al., arXiv 2402.18078) for diffusers: its model, its pipeline, and HPFA on top of it.

Without HPFA this computes what the published code does. The source reaches the UNet as 16 tokens and as biases on the
queries of the cross-attention on the way up, the pose as features added on the way down. With `strength` above 0 the
same UNet also reads the clean source as SourceNet, and HPFA fuses it into every self-attention; that needs no training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from truepose_core.alignment.skeleton_prior import body_coordinates, region_prior
from truepose_core.errors import TruePoseError
from truepose_core.features import SourceFeatures
from truepose_core.guidance import combine_guidance, guidance_factors
from truepose_core.models.cfld_encoder import (
    CFLDConfig,
    CFLDEncoder,
    SourceCondition,
    cfld_frame,
    is_cfld,
    pose_maps,
    squash,
)
from truepose_core.models.codec import VAECodec
from truepose_core.models.processors import SourcePass, TargetPass, attention_sites, install, token_counts
from truepose_core.models.store import load_strict, read_metadata
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


@dataclass
class QueryBias:
    """biases: attention site -> [B, N, C], added to the queries of its cross-attention."""

    biases: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class CFLDSourcePass(QueryBias, SourcePass):
    """The UNet reads the clean source."""


@dataclass
class CFLDTargetPass(QueryBias, TargetPass):
    """The UNet denoises."""


class BiasedCrossAttention:
    """attn2 of one block, with the pass's bias on its queries."""

    def __init__(self, site: str):
        self.site = site

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        truepose: QueryBias | None = None,
    ) -> Tensor:
        q = attn.to_q(hidden_states)
        if truepose is not None and self.site in truepose.biases:
            q = q + truepose.biases[self.site].to(q)
        projected = (q, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        out = scaled_dot_product_attention(q, k, v, scale=attn.scale).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


@dataclass(frozen=True, eq=False)
class CFLDSource:
    """What is computed once per source: its condition, and the features that HPFA reads (None where it is off).

    size: (height, width) of the source image in pixels.
    """

    condition: SourceCondition
    size: tuple[int, int]
    features: SourceFeatures | None = None


class CFLDModel(nn.Module):
    """The encoders, the UNet and the VAE that its latents belong to. Weights are random until loaded."""

    def __init__(self, config: CFLDConfig, vae: VAECodec | None = None):
        super().__init__()
        self.config = config
        self.encoder = CFLDEncoder(config)
        self.target_net = UNet2DConditionModel(**config.unet)
        self.codec = vae
        install(self.target_net)
        sites = attention_sites(self.target_net)
        for site, _ in config.sites:
            sites[site].attn2.set_processor(BiasedCrossAttention(site))

    @property
    def dtype(self) -> torch.dtype:
        return self.target_net.dtype

    @property
    def latent_size(self) -> tuple[int, int]:
        side = self.config.encoder_size // 4
        return side, side

    def no_source(self, batch: int) -> SourceCondition:
        """The learned condition of a row that sees no source."""
        return SourceCondition(self.encoder.learnable_vector.expand(batch, -1, -1), {})

    def encode_features(
        self,
        image: Tensor,
        parsing: HumanParsing,
        body: Tensor | None,
        condition: SourceCondition,
    ) -> SourceFeatures:
        """One pass of the UNet over the clean source at timestep 0, as HPFA's SourceNet. Training had such pairs: a
        picture that is its own source, in its own pose. image [B, 3, size, size] in [0, 1] and its parsing, squashed;
        body [B, 18, 3] or None (no pose, no skeleton prior, no body match)."""
        if self.codec is None:
            raise TruePoseError("HPFA reads the source's latent, which needs the VAE; none was given")
        latent = self.codec.encode(image).to(self.dtype)
        call = CFLDSourcePass(self.latent_size, biases=condition.biases)
        pose = None if body is None else self.encoder.encode_pose(pose_maps(body, self.config.encoder_size))
        self.denoise(latent, latent.new_zeros(latent.shape[0]).long(), call, condition.tokens, pose)
        return SourceFeatures(self.config.family, call.sites, self.latent_size, parsing, body)

    def target_pass(
        self,
        condition: SourceCondition,
        source: SourceFeatures | None = None,
        target_body: Tensor | None = None,
        target_parsing: HumanParsing | None = None,
        *,
        omega: Tensor | None = None,
        beta: float = 0.0,
        gamma: float = 0.0,
        strength: float = 1.0,
        kv: dict | None = None,
    ) -> CFLDTargetPass:
        """What the UNet needs beside noise, step, tokens and pose features. See `TargetPass`; target_body [B, 18, 3],
        B a multiple of the sources. Strength 0 or region weights that are all 0 leave CFLD alone."""
        call = CFLDTargetPass(self.latent_size, biases=condition.biases)
        if source is None or strength == 0 or (omega is not None and not bool(omega.any())):
            return call
        if source.family != self.config.family:
            raise TruePoseError(
                f"the source was encoded by a {source.family!r} model; this one is {self.config.family!r}. "
                "Encode the source again with this model"
            )
        parsing = target_parsing
        if parsing is None and target_body is not None and source.body is not None:
            times = target_body.shape[0] // source.batch
            masks, body = (x.repeat_interleave(times, 0) for x in (source.parsing.masks, source.body))
            parsing = region_prior(HumanParsing(masks), body, target_body, *self.latent_size)
        grids = token_counts(self.target_net, self.latent_size)
        call.source, call.omega, call.beta, call.gamma, call.strength, call.kv = (
            source,
            omega,
            beta,
            gamma,
            strength,
            kv,
        )
        call.given = target_parsing is not None
        if parsing is not None:
            call.prior = {n: parsing.tokens(h, w) for n, (h, w) in grids.items()}
        if target_body is not None:
            call.body = {n: body_coordinates(target_body, h, w) for n, (h, w) in grids.items()}
        return call

    def denoise(
        self, latent: Tensor, timestep: Tensor, call: QueryBias, tokens: Tensor, pose: list[Tensor] | None
    ) -> Tensor:
        """The UNet's prediction for latents [B, C, h, w] at timesteps [B]. tokens [B, T, c]: `SourceCondition`'s.
        pose: features of `CFLDEncoder.encode_pose`, or None."""
        return self.target_net(
            latent,
            timestep,
            tokens.to(latent),
            cross_attention_kwargs={"truepose": call},
            # The UNet empties the list that it is given.
            down_intrablock_additional_residuals=None if pose is None else [x.to(latent) for x in pose],
        ).sample


def load_cfld(path: str | Path, vae: str | Path | None = None) -> CFLDModel:
    """Load a converted CFLD file in float32, ready for inference.

    vae: a folder in diffusers format with the VAE of Stable Diffusion 1.5, which CFLD's files do not hold. Raises
    TruePoseError when the file is missing, damaged or of another kind, or when a weight is missing or unknown.
    """
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    if not is_cfld(metadata):
        raise TruePoseError(f"{path} is no CFLD model file of this package; convert CFLD's two files first")
    config = CFLDConfig.from_json(metadata["config"])
    if vae is None:
        raise TruePoseError(
            f"{path} works on the latents of Stable Diffusion 1.5's VAE; name the folder that has it (--vae FOLDER)"
        )
    from truepose_core.models.folder import load_vae

    model = CFLDModel(config, load_vae(vae))
    load_strict(model, load_file(str(path)), str(path), ignore=("codec.",))
    return model.eval()


@dataclass(frozen=True)
class CFLDOutput:
    """images: [B, 3, H, W] float in [0, 1], of the size asked for. source: what was computed of it, to use again."""

    images: Tensor
    source: CFLDSource


class CFLDPipeline(DiffusionPipeline):
    """See `__call__`. `scheduler` is any diffusers scheduler, by default DDPM as in CFLD's own test run."""

    model_cpu_offload_seq = "target_net->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    # It is not called as a module, so no hook would fetch it.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["encoder"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, target_net: nn.Module, encoder: nn.Module, scheduler: Any, vae: nn.Module | None = None):
        super().__init__()
        self.register_modules(target_net=target_net, encoder=encoder, scheduler=scheduler, vae=vae)
        self.model: CFLDModel | None = None

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

    @property
    def device(self) -> torch.device:
        """Where the UNet's weights are."""
        return self.target_net.device

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's type."""
        return self.target_net.dtype

    def to(self, *args: Any, silence_dtype_warnings: bool = False, **kwargs: Any) -> CFLDPipeline:
        """Move every network to a device or type, as `torch.nn.Module.to`."""
        self.model.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def encode_source(
        self,
        image: Tensor,
        parsing: HumanParsing | None = None,
        body: Tensor | None = None,
    ) -> CFLDSource:
        """Read the source once. image [S, 3, H, W] in [0, 1]. parsing of the same size: also read what HPFA needs.
        body [S, 18, 3]: normalised keypoints of the source person, or None."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise TruePoseError(f"the source image is {tuple(image.shape)}; expected [S, 3, H, W]")
        if parsing is not None:
            _check_parsing(parsing, image)
        if body is not None and body.shape != (image.shape[0], 18, 3):
            raise TruePoseError(f"source keypoints are {tuple(body.shape)}; expected [{image.shape[0]}, 18, 3]")
        model, device = self.model, self._execution_device
        config = model.config
        size = (image.shape[-2], image.shape[-1])
        condition = model.encoder.encode_source(squash(image, config.encoder_size).to(device))
        features = None
        if parsing is not None:
            frame = cfld_frame(size, config.size)
            body = None if body is None else frame.apply_keypoints(body.float()).to(device)
            picture, parsing = squash(image, config.size).to(device), frame.apply_parsing(parsing).to(device)
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
        self._check_call(target_body, steps, w_pose, w_source, strength, beta, gamma)
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

        batch, sources = target_body.shape[0], source.condition.tokens.shape[0]
        if batch % sources:
            raise TruePoseError(
                f"{batch} target poses cannot be shared among {sources} sources; expected the same number for each"
            )
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
        latents, extra = self._noise(shape, seed, latents, device)
        self.scheduler.set_timesteps(steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                x, when = self.scheduler.scale_model_input(latents, t).to(model.dtype), t.expand(batch)
                predictions = [
                    model.denoise(x, when, *call).float() if factor != 0 else None
                    for factor, call in zip(factors, calls, strict=True)
                ]
                prediction = combine_guidance(*predictions, w_pose, w_source)
                latents = self.scheduler.step(prediction, t, latents, return_dict=False, **extra)[0]
                if callback_on_step_end is not None:
                    given = callback_on_step_end(self, i, int(t), {"latents": latents})
                    latents = given.get("latents", latents)
                bar.update()
        images = model.codec.decode(latents.to(model.dtype)).float().cpu()
        self.maybe_free_model_hooks()
        if not torch.isfinite(images).all():
            raise TruePoseError(
                f"the model produced NaN in {model.dtype}; try float32 or bfloat16, or check the weights"
            )
        return CFLDOutput(frame.restore(images), source)

    def _noise(
        self, shape: tuple[int, ...], seed: int | Sequence[int], latents: Tensor | None, device: torch.device
    ) -> tuple[Tensor, dict[str, Any]]:
        """The starting noise, and what the scheduler needs to draw more of it from the same seeds."""
        seeds = [seed + i for i in range(shape[0])] if isinstance(seed, int) else list(seed)
        if len(seeds) != shape[0]:
            raise TruePoseError(f"{len(seeds)} seeds for {shape[0]} pictures; give one seed, or one for each")
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        extra = {"generator": generators} if "generator" in signature(self.scheduler.step).parameters else {}
        if latents is None:
            latents = torch.stack([torch.randn(shape[1:], generator=g) for g in generators])
        elif tuple(latents.shape) != shape:
            raise TruePoseError(f"latents are {tuple(latents.shape)}; expected {shape}")
        return latents.to(device=device, dtype=torch.float32), extra

    def _check_call(
        self,
        target_body: Tensor,
        steps: int,
        w_pose: float,
        w_source: float,
        strength: float,
        beta: float,
        gamma: float,
    ) -> None:
        if target_body.ndim != 3 or target_body.shape[1:] != (18, 3):
            raise TruePoseError(f"target keypoints are {tuple(target_body.shape)}; expected [B, 18, 3]")
        if not bool((target_body[..., 2] > 0).any(1).all()):
            raise TruePoseError("a target pose has no keypoint at all; expected at least one person per pose")
        if steps < 1:
            raise TruePoseError(f"{steps} sampling steps; expected at least 1")
        for name, value in (
            ("guidance_pose", w_pose),
            ("guidance_source", w_source),
            ("beta", beta),
            ("gamma", gamma),
        ):
            if not 0 <= value < float("inf"):
                raise TruePoseError(f"{name} is {value}; expected a number of at least 0")
        if not 0 <= strength <= 1:
            raise TruePoseError(f"strength is {strength}; expected 0 to 1")


def _check_parsing(parsing: HumanParsing, image: Tensor) -> None:
    size = (image.shape[-2], image.shape[-1])
    if parsing.size != size or parsing.batch != image.shape[0]:
        raise TruePoseError(
            f"{parsing.batch} parsings of {parsing.size[1]}x{parsing.size[0]} for {image.shape[0]} source images of "
            f"{size[1]}x{size[0]}; expected one of the same size for each"
        )
    if bool((parsing.masks[:, Region.BACKGROUND] > 0.99).flatten(1).all(1).any()):
        raise TruePoseError("the parsing shows nobody: every pixel is background. Check the source's parsing")


def cfld_scheduler(config: CFLDConfig) -> DDPMScheduler:
    """DDPM (Ho et al., arXiv 2006.11239) as CFLD's test run spaces its steps: leading, one step late."""
    return DDPMScheduler(
        **config.scheduler,
        prediction_type=config.prediction_type,
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=False,
    )
