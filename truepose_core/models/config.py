"""Sizes and choices of a TruePose model, in one frozen dataclass that travels in the weights' metadata."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from truepose_core.alignment.control3d import Control3DConfig
from truepose_core.errors import TruePoseError
from truepose_core.pictures.files import MAX_SIDE, MIN_SIDE
from truepose_core.weights.settings import read_settings

CODECS = ("pixels", "vae")
MAX_PATCH = 64
FUSIONS = ("none", "concat", "hpfa")
MATCHES = ("skeleton", "surface")
ALIGNED_BY = ("skeleton", "recurrent")
PREDICTIONS = ("sample", "epsilon", "v_prediction")
SKELETON = "skeleton"
CHANNELS = {"mask": 1, "masked latent": 4, "densepose": 3}
"""What conv_in can read beside the noisy latent, and how many channels each is."""


@dataclass(frozen=True)
class CAAConfig:
    """The CLIP vision tower (an open_clip `VisionTransformer`) and the resampler behind it."""

    image_size: tuple[int, int] = (64, 48)
    patch_size: int = 8
    width: int = 96
    layers: int = 2
    heads: int = 4
    per_region: int = 4
    resampler_dim: int = 96
    resampler_depth: int = 1
    scale: float = 0.0
    """lambda at the start of training. 0 leaves the nets as they were."""


@dataclass(frozen=True)
class Behaviour:
    """How the nets want to be run, where systems of this kind differ. The defaults are this package's own models.

    source_timestep: SourceNet reads the clean source once, at timestep "zero", or anew at every "step"'s timestep;
    "noised": it was not trained to read, and sees the source with as much noise as the sampler has.
    context: what cross-attention reads, "text" or "image": one CLIP embedding of the source picture; cross_attention
    "pass": it reads nothing and hands its input on, so that a block adds norm2(h) there (Leffa); else "context".
    unconditional: what a row without the source reads. "drop": no source tokens, and zeros for an image context;
    "zero latent": the tokens that SourceNet gives for a latent of zeros.
    channels: what TargetNet's conv_in reads behind the noisy latent, in this order (see `CHANNELS`).
    densepose: how its channels 0..255 are scaled to -1..1: "127.5" (x / 127.5 - 1, every channel) or "24" (the third,
    the part's number, is x / 12 - 1).
    pose_maps: pictures that tell the pose, in [0, 1]; each has its pose encoder, and their sum is added after conv_in.
    pose_attention: an encoder ends with one transformer block (champ).
    source_head: SourceNet's file has its output layers, which are never read.
    sampler: "ddim" or "ddpm". guidance: the scale the system was published with; guidance_rescale: its share that is
    the phi of guidance rescaling (arXiv 2305.08891, section 3.4; Leffa's phi is the scale itself, so 1).
    """

    source_timestep: str = "zero"
    context: str = "text"
    unconditional: str = "drop"
    cross_attention: str = "context"
    channels: tuple[str, ...] = ()
    densepose: str = "127.5"
    pose_maps: tuple[str, ...] = (SKELETON,)
    pose_attention: bool = False
    source_head: bool = True
    sampler: str = "ddim"
    guidance: float = 1.0
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        for name, known in _BEHAVIOURS.items():
            if getattr(self, name) not in known:
                raise TruePoseError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        strange = sorted(set(self.channels) - set(CHANNELS))
        if strange:
            raise TruePoseError(f"unknown channels {', '.join(strange)}; expected some of {', '.join(CHANNELS)}")

    @property
    def extra_channels(self) -> int:
        """How many channels conv_in reads beside the noisy latent's."""
        return sum(CHANNELS[name] for name in self.channels)

    @property
    def keeps_latent(self) -> bool:
        """Whether SourceNet runs during sampling, from the source's latent."""
        return self.source_timestep == "step" or self.unconditional == "zero latent"


_BEHAVIOURS = {
    "source_timestep": ("zero", "step", "noised"),
    "context": ("text", "image"),
    "unconditional": ("drop", "zero latent"),
    "cross_attention": ("context", "pass"),
    "densepose": ("127.5", "24"),
    "sampler": ("ddim", "ddpm"),
}


@dataclass(frozen=True)
class TruePoseConfig:
    """family: who can use whose SourceFeatures. unet: keyword arguments of diffusers' UNet2DConditionModel.

    codec: "pixels" (space to depth with `patch`, no VAE) or "vae". fusion: "none" (pose only), "concat"
    (omega = 1, beta = 0: AnimateAnyone's fusion) or "hpfa". beta and gamma are HPFA's values at the start of
    training; 0 is plain concatenation. match: what places on the body are, "skeleton" (on limb lines) or "surface" (of
    a body lifted from the keypoints). aligned (x0 prediction only): TargetNet also sees the source carried to the
    target pose and predicts what to change in it; aligned_by: carried along the "skeleton", a coarse warp without
    weights, or by "recurrent" alignment (`alignment.recurrent`, frozen), whose parsing is also P and read.
    aligned_tokens: the source's tokens are also read aligned to the target pose, beside its own (`source.align`). size:
    (height, width) of the training images, in pixels. scheduler: keyword arguments of the sampler. vae: keyword
    arguments of diffusers' AutoencoderKL where the file brings its own VAE. behaviour: how the nets are run. control3d:
    relative depth guidance, or None.
    Raises TruePoseError for a choice that does not exist.
    """

    family: str
    unet: dict[str, Any]
    codec: str = "vae"
    patch: int = 8
    fusion: str = "hpfa"
    caa: CAAConfig | None = None
    pose_widths: tuple[int, ...] = (16, 32, 96, 256)
    prediction_type: str = "epsilon"
    scheduler: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (512, 512)
    beta: float = 0.0
    gamma: float = 0.0
    aligned: bool = False
    aligned_by: str = "skeleton"
    aligned_tokens: bool = False
    match: str = "skeleton"
    vae: dict[str, Any] | None = None
    behaviour: Behaviour = Behaviour()
    control3d: Control3DConfig | None = None

    def __post_init__(self) -> None:
        if self.control3d is not None and (self.fusion == "none" or self.behaviour != Behaviour()):
            raise TruePoseError(
                "3D guidance reads SourceNet's tokens of a clean source: fusion must not be 'none', and the behaviour "
                "this package's own"
            )
        if self.codec not in CODECS:
            raise TruePoseError(f"codec is {self.codec!r}; expected one of {', '.join(CODECS)}")
        if not (1 <= self.patch <= MAX_PATCH and all(MIN_SIDE <= side <= MAX_SIDE for side in self.size)):
            raise TruePoseError(
                f"patch is {self.patch} and size {self.size}; expected a patch of 1 to {MAX_PATCH} pixels, and sides "
                f"of {MIN_SIDE} to {MAX_SIDE}"
            )
        if self.fusion not in FUSIONS:
            raise TruePoseError(f"fusion is {self.fusion!r}; expected one of {', '.join(FUSIONS)}")
        if self.prediction_type not in PREDICTIONS:
            raise TruePoseError(
                f"prediction type is {self.prediction_type!r}; expected one of {', '.join(PREDICTIONS)}"
            )
        if self.match not in MATCHES:
            raise TruePoseError(f"match is {self.match!r}; expected one of {', '.join(MATCHES)}")
        if self.aligned_by not in ALIGNED_BY:
            raise TruePoseError(f"aligned_by is {self.aligned_by!r}; expected one of {', '.join(ALIGNED_BY)}")
        if self.recurrent and self.match != "surface":
            raise TruePoseError("recurrent alignment needs the source's bodies: match must be 'surface'")
        if self.aligned_tokens and (self.match != "surface" or self.fusion == "none" or self.aligned):
            raise TruePoseError(
                "aligned tokens stand beside those that SourceNet read, at places on the body's surface: match must be "
                "'surface', fusion 'concat' or 'hpfa', and aligned off"
            )
        if self.aligned and self.prediction_type != "sample":
            raise TruePoseError(
                f"aligned predicts what to change in a picture, which prediction type {self.prediction_type!r} is not; "
                "expected 'sample'"
            )

    @property
    def recurrent(self) -> bool:
        """Whether the source is carried by recurrent alignment."""
        return self.aligned and self.aligned_by == "recurrent"

    @property
    def aligns(self) -> bool:
        """Whether recurrent alignment brings the source, as a picture or as tokens, to the target pose."""
        return self.recurrent or self.aligned_tokens

    @property
    def source_unet(self) -> dict[str, Any]:
        """SourceNet's keyword arguments: it reads a clean latent alone."""
        return {**self.unet, "in_channels": self.unet["in_channels"] - self.behaviour.extra_channels}

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TruePoseConfig:
        """Raises TruePoseError for anything but what `to_json` writes."""
        return read_settings(cls, text, "the model's configuration")


SD_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
"""Stable Diffusion 1.5's noise schedule (its scheduler_config.json)."""


def large_config(
    fusion: str = "hpfa",
    caa: bool = True,
    widths: tuple[int, ...] = (48, 64, 96),
    *,
    aligned: bool = False,
    match: str = "surface",
    control3d: Control3DConfig | None = None,
) -> TruePoseConfig:
    """The bundled model: 4x4 pixel patches of a 128x96 image (height x width), x0 prediction, no VAE. Plain
    convolutions on the finest grid, attention at 16x12 and 8x6. aligned: by recurrent alignment."""
    config = mannequin_config(fusion, caa, widths, aligned=aligned, control3d=control3d)
    inner = len(widths) - 1
    unet = {
        **config.unet,
        "sample_size": (32, 24),
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * inner],
        "up_block_types": [*["CrossAttnUpBlock2D"] * inner, "UpBlock2D"],
    }
    return replace(
        config,
        unet=unet,
        size=(128, 96),
        match=match,
        aligned_by="recurrent" if aligned else "skeleton",
        caa=None if config.caa is None else replace(config.caa, image_size=(128, 96), patch_size=16),
    )


def mannequin_config(
    fusion: str = "hpfa",
    caa: bool = True,
    widths: tuple[int, ...] = (64, 96),
    aligned: bool = False,
    control3d: Control3DConfig | None = None,
) -> TruePoseConfig:
    """A small model: 4x4 pixel patches of a 64x48 image (height x width), x0 prediction, no VAE."""
    unet = {
        "sample_size": (16, 12),
        "in_channels": 48,
        "out_channels": 48,
        "block_out_channels": list(widths),
        "down_block_types": ["CrossAttnDownBlock2D"] * len(widths),
        "up_block_types": ["CrossAttnUpBlock2D"] * len(widths),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
        "norm_num_groups": 16,
    }
    return TruePoseConfig(
        family="mannequin",
        unet=unet,
        codec="pixels",
        patch=4,
        fusion=fusion,
        caa=CAAConfig(scale=0.1) if caa else None,
        pose_widths=(16, 32, 64),
        prediction_type="sample",
        scheduler=dict(SD_SCHEDULE),
        size=(64, 48),
        beta=2.0 if fusion == "hpfa" else 0.0,
        gamma=16.0 if fusion == "hpfa" else 0.0,
        aligned=aligned,
        control3d=control3d,
    )
