"""Opening the model that `--model` names: the bundled one, a model file, or a folder in diffusers format."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import choose_device, choose_dtype
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from truepose_core.models.model import TruePoseModel
    from truepose_core.pipeline import TruePosePipeline

MANNEQUINS_ONLY = (
    "this model knows mannequins only, at {w}x{h} pixels: a photograph comes out as a mannequin in the person's "
    "colours. For people give --model a Stable Diffusion folder or trained weights"
)


@dataclass(frozen=True)
class Opened:
    """A pipeline on its device, and what a prompt became (None without text). seconds: how long opening took."""

    name: str
    pipe: TruePosePipeline
    device: torch.device
    dtype: torch.dtype
    seconds: float
    context: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def is_mannequin(self) -> bool:
        return self.pipe.model.config.family == "mannequin"

    @property
    def description(self) -> dict[str, Any]:
        """For the JSON report."""
        config = self.pipe.model.config
        return {
            "model": self.name,
            "family": config.family,
            "fusion": config.fusion,
            "caa": config.caa is not None,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def add_model_argument(parser: argparse._ActionsContainer) -> None:
    """--model."""
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="PATH",
        help="a .safetensors file of this package, a folder with an SD1.5 or SDXL model in diffusers format, or "
        "bundled, the small mannequin model that ships with the package (default: bundled)",
    )


def add_folder_arguments(parser: argparse._ActionsContainer) -> None:
    """What only a Stable Diffusion folder can use."""
    parser.add_argument("--prompt", metavar="TEXT", help="for a Stable Diffusion folder: its text (default: empty)")
    parser.add_argument(
        "--controlnet",
        metavar="PATH",
        help="for a Stable Diffusion folder: a folder with an OpenPose ControlNet in diffusers format, which carries "
        "the pose; without one such a model sees the pose through the regions only",
    )
    parser.add_argument(
        "--vae",
        metavar="FOLDER",
        help="for a model file without a VAE of its own (trained by truepose train, AnimateAnyone, champ): a folder "
        "in diffusers format that has it",
    )
    parser.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        help="for a model that reads a CLIP embedding of the source (AnimateAnyone, champ): a folder with its "
        "CLIPVisionModelWithProjection in transformers format",
    )


def open_model(
    name: str,
    device_name: str,
    dtype_name: str,
    *,
    prompt: str | None = None,
    controlnet: str | None = None,
    vae: str | None = None,
    image_encoder: str | None = None,
) -> Opened:
    """Load a model and put it on its device. prompt, controlnet: for a folder. vae: for a file trained on latents.
    image_encoder: for a file whose cross-attention reads the source picture.

    Raises TruePoseError for a missing or damaged model, a device this machine lacks, or a prompt nobody reads.
    """
    from truepose_core.models.store import load_model
    from truepose_core.pipeline import TruePosePipeline

    started = time.perf_counter()
    device = choose_device(device_name)
    folder = Path(name).is_dir()
    for option, value in (("--prompt", prompt), ("--controlnet", controlnet)):
        if value is not None and not folder:
            raise TruePoseError(f"{option} is for Stable Diffusion folders, and --model {name} is none; leave it out")
    if vae is not None and folder:
        raise TruePoseError(f"--vae is for model files, and --model {name} is a folder with its own; leave it out")
    if image_encoder is not None and folder:
        raise TruePoseError(f"--image-encoder is for model files, and --model {name} is a folder; leave it out")
    dtype = choose_dtype(dtype_name, device, large=folder)
    scheduler = context = pooled = None
    if folder:
        from truepose_core.models.folder import load_folder

        loaded = load_folder(name, controlnet=controlnet, prompt=prompt or "", dtype=dtype)
        model, scheduler, context, pooled = loaded.model, loaded.scheduler, loaded.context, loaded.pooled
    else:
        model = load_model(name, vae=vae)
    pipe = TruePosePipeline.from_model(model, scheduler, _image_encoder(model, image_encoder))
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return Opened(name, pipe, device, dtype, time.perf_counter() - started, context, pooled)


def _image_encoder(model: TruePoseModel, folder: str | None) -> Any:
    """The encoder that the model wants. Raises TruePoseError when it is not given, or nobody would read it."""
    wanted = model.config.behaviour.context == "image"
    if wanted and folder is None:
        raise TruePoseError(
            f"a {model.config.family} model reads a CLIP embedding of the source; name the folder of its image encoder "
            "(--image-encoder FOLDER)"
        )
    if not wanted and folder is not None:
        raise TruePoseError(f"a {model.config.family} model reads no picture embedding; leave out --image-encoder")
    if folder is None:
        return None
    from truepose_core.models.folder import load_image_encoder

    return load_image_encoder(folder)


def progress(bar: Any, pictures: int = 1) -> Callable[..., dict]:
    """A pipeline callback that moves a progress bar by `pictures` per step."""

    def step(*_: Any) -> dict:
        bar.update(pictures)
        return {}

    return step


@contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn "out of memory" into an error that says what to do."""
    import torch

    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise TruePoseError(
            f"not enough memory on {device} for this; try a smaller --size, --batch 1, or --dtype bfloat16"
        ) from error
