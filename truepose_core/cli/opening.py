"""The model that `--model` names: the bundled one, a model file, the files of another system, or a folder in diffusers
format. First what it is, from names and shapes alone; then its weights."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import choose_device, choose_dtype
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from truepose_core.models.cfld.encoder import CFLDConfig
    from truepose_core.models.cfld.model import CFLDModel
    from truepose_core.models.config import Behaviour, TruePoseConfig
    from truepose_core.models.model import TruePoseModel
    from truepose_core.pipeline import TruePosePipeline
    from truepose_core.pipeline.cfld import CFLDPipeline

MANNEQUINS_ONLY = (
    "this model knows mannequins only, at {w}x{h} pixels: a photograph comes out as a mannequin in the person's "
    "colours. For people give --model a Stable Diffusion folder or trained weights"
)
LATENTS = "works on the latents of a VAE; name the folder that has it (--vae FOLDER)"


@dataclass(frozen=True)
class ModelChoice:
    """What --model names, and what is to be opened with it: checked, no weights read.

    names: as given. config: None for a Stable Diffusion folder. originals: files as another system published them,
    with `choices` where they alone do not tell what they are.
    """

    names: tuple[str, ...]
    config: TruePoseConfig | CFLDConfig | None
    originals: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    controlnet: str | None = None
    vae: str | None = None
    image_encoder: str | None = None

    @property
    def name(self) -> str:
        """For people."""
        return ", ".join(self.names)

    @property
    def is_folder(self) -> bool:
        return self.config is None

    @property
    def is_cfld(self) -> bool:
        from truepose_core.models.cfld.encoder import CFLDConfig

        return isinstance(self.config, CFLDConfig)

    @property
    def behaviour(self) -> Behaviour | None:
        """How its nets are run; None for CFLD, which has a pipeline of its own."""
        from truepose_core.models.config import Behaviour

        if self.is_cfld:
            return None
        return Behaviour() if self.config is None else self.config.behaviour


@dataclass(frozen=True)
class Opened:
    """A pipeline on its device, and what a prompt became (None without text). seconds: how long opening took."""

    name: str
    pipe: TruePosePipeline | CFLDPipeline
    device: torch.device
    dtype: torch.dtype
    seconds: float
    context: Tensor | None = None
    pooled: Tensor | None = None

    @property
    def is_mannequin(self) -> bool:
        return self.pipe.model.config.family == "mannequin"

    @property
    def is_cfld(self) -> bool:
        from truepose_core.models.cfld.encoder import KIND

        return self.pipe.model.config.family == KIND

    @property
    def description(self) -> dict[str, Any]:
        """For the JSON report."""
        config = self.pipe.model.config
        return {
            "model": self.name,
            "family": config.family,
            "fusion": None if self.is_cfld else config.fusion,
            "caa": not self.is_cfld and config.caa is not None,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def add_model_argument(parser: argparse._ActionsContainer) -> None:
    """--model, as one file or folder."""
    parser.add_argument(
        "--model",
        default="bundled",
        metavar="PATH",
        help="a .safetensors file of this package, a folder with an SD1.5 or SDXL model in diffusers format, or "
        "bundled, the small mannequin model that ships with the package (default: bundled)",
    )


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """--model, which may also be the files of another system, and --choose."""
    parser.add_argument(
        "--model",
        nargs="+",
        default=["bundled"],
        metavar="PATH",
        help="a .safetensors file of this package; the weight files of AnimateAnyone, champ, Leffa or CFLD as "
        "published; a folder with an SD1.5 or SDXL model in diffusers format; or bundled, the small mannequin model "
        "that ships with the package (default: bundled)",
    )
    parser.add_argument(
        "--choose",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="for published files, as for truepose convert: what they alone do not tell; an error says when it is "
        "needed",
    )


def add_folder_arguments(parser: argparse._ActionsContainer) -> None:
    """What is opened beside some models."""
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
        help="for a model without a VAE of its own (trained by truepose train, AnimateAnyone, champ, CFLD): a folder "
        "in diffusers format that has it",
    )
    parser.add_argument(
        "--image-encoder",
        metavar="FOLDER",
        help="for a model that reads a CLIP embedding of the source (AnimateAnyone, champ): a folder with its "
        "CLIPVisionModelWithProjection in transformers format",
    )


def choose_model(
    names: Sequence[str],
    choices: Mapping[str, str] | None = None,
    *,
    prompt: str | None = None,
    controlnet: str | None = None,
    vae: str | None = None,
    image_encoder: str | None = None,
) -> ModelChoice:
    """What these names are, told without reading weights. choices: as of `truepose convert`. prompt, controlnet: for a
    folder. vae: for a model without its own. image_encoder: for one whose cross-attention reads the source picture.

    Raises TruePoseError for a missing or damaged model, files that are none, or an option that is missing or that
    nobody reads.
    """
    model = find_model(names, choices)
    beside = {"--prompt": prompt, "--controlnet": controlnet, "--vae": vae, "--image-encoder": image_encoder}
    _check_beside(model, beside)
    return ModelChoice(
        model.names, model.config, model.originals, model.choices, prompt, controlnet, vae, image_encoder
    )


def find_model(names: Sequence[str], choices: Mapping[str, str] | None = None) -> ModelChoice:
    """`choose_model` without what is opened beside it, and without its checks."""
    from truepose_core.weights.strict import BUNDLED, bundled_path, read_metadata

    names, choices = tuple(map(str, names)), dict(choices or {})
    name = names[0]
    alone = len(names) == 1
    if not alone:
        strange = next((x for x in names if x == BUNDLED or Path(x).is_dir()), None)
        if strange is not None:
            raise TruePoseError(
                f"--model names {len(names)} things, which are the weight files of one system, and {strange} is no "
                "weight file; name it alone"
            )
    config = None
    folder = alone and Path(name).is_dir()
    if alone and not folder:
        path = bundled_path() if name == BUNDLED else Path(name)
        config = _own_config(path, read_metadata(path)) if path.suffix == ".safetensors" else None
    if folder or config is not None:
        if choices:
            raise TruePoseError(
                f"--choose is for weight files of other systems as they were published, and --model {name} is none; "
                "leave it out"
            )
        return ModelChoice(names, config)
    return ModelChoice(names, _published_config(names, choices), True, choices)


def _own_config(path: Path, metadata: Mapping[str, str]) -> TruePoseConfig | CFLDConfig | None:
    """The configuration of a model file of this package, None for another's. Raises TruePoseError for ours that is no
    model."""
    from truepose_core.weights.strict import ARCHITECTURE

    if metadata.get("architecture") != ARCHITECTURE:
        if "converter" in metadata:
            what = metadata.get("title") or metadata.get("architecture")
            raise TruePoseError(
                f"{path} is {what}, which goes on top of a model in ComfyUI and is none itself; give another --model"
            )
        return None
    if "config" not in metadata:
        raise TruePoseError(f"{path} does not say its configuration in its metadata; get or make it again")
    return parse_config(metadata["config"])


def parse_config(text: str) -> TruePoseConfig | CFLDConfig:
    """The configuration in a model file's metadata. Raises TruePoseError for another version's."""
    from truepose_core.models.cfld.encoder import CFLDConfig, is_cfld
    from truepose_core.models.config import TruePoseConfig

    kind = CFLDConfig if is_cfld({"config": text}) else TruePoseConfig
    return kind.from_json(text)


def _published_config(names: Sequence[str], choices: Mapping[str, str]) -> TruePoseConfig | CFLDConfig:
    """The configuration of what files of another system become."""
    from truepose_core.importing.convert import find
    from truepose_core.weights.strict import ARCHITECTURE

    try:
        found = find(names, choices)
    except TruePoseError as error:
        if len(names) > 1 or Path(names[0]).suffix != ".safetensors":
            raise
        raise TruePoseError(
            f"{names[0]} holds another architecture than this package's: {error}. Expected a model file of this "
            "package, all files of a system that can be converted, or a folder in diffusers format; truepose inspect "
            "says what a file is"
        ) from error
    if found.plan.metadata.get("architecture", ARCHITECTURE) != ARCHITECTURE:
        raise TruePoseError(
            f"{', '.join(names)} is {found.title}, which goes on top of a model in ComfyUI and is none itself; give "
            "another --model"
        )
    return parse_config(json.dumps(found.plan.config))


def _check_beside(model: ModelChoice, given: Mapping[str, str | None]) -> None:
    """Raise TruePoseError where an option is missing, or given to a model that does not read it."""
    name = model.name
    if model.is_folder:
        for option in ("--vae", "--image-encoder"):
            if given[option] is not None:
                raise TruePoseError(f"{option} is for model files, and --model {name} is a folder; leave it out")
        return
    for option in ("--prompt", "--controlnet"):
        if given[option] is not None:
            raise TruePoseError(f"{option} is for Stable Diffusion folders, and --model {name} is none; leave it out")
    needs_vae, why_not = wants_vae(model.config)
    if needs_vae and given["--vae"] is None:
        raise TruePoseError(f"{name} {LATENTS}")
    if not needs_vae and given["--vae"] is not None:
        raise TruePoseError(f"{name} {why_not}; leave out --vae {given['--vae']}")
    wanted = not model.is_cfld and model.behaviour.context == "image"
    if wanted and given["--image-encoder"] is None:
        raise TruePoseError(
            f"{name} is a {model.config.family} model, which reads a CLIP embedding of the source; name the folder of "
            "its image encoder (--image-encoder FOLDER)"
        )
    if not wanted and given["--image-encoder"] is not None:
        raise TruePoseError(
            f"{name} is a {model.config.family} model, which reads no picture embedding; leave out --image-encoder"
        )


def wants_vae(config: TruePoseConfig | CFLDConfig) -> tuple[bool, str]:
    """(whether a model's VAE has to be given, why not)."""
    if config.vae is not None:
        return False, "brings its own VAE"
    pixels = getattr(config, "codec", "vae") == "pixels"
    return not pixels, "works on pixels"


def open_model(model: str | ModelChoice, device_name: str, dtype_name: str) -> Opened:
    """Load a model and put it on its device.

    Raises TruePoseError as `choose_model` for a name, for a device this machine lacks, and where weights are damaged.
    """
    from truepose_core.pipeline import TruePosePipeline

    started = time.perf_counter()
    model = choose_model([model]) if isinstance(model, str) else model
    device = choose_device(device_name)
    large = model.is_folder or model.config.family != "mannequin"
    dtype = choose_dtype(dtype_name, device, large)
    context = pooled = None
    if model.is_folder:
        from truepose_core.models.folder import load_folder

        loaded = load_folder(model.name, controlnet=model.controlnet, prompt=model.prompt or "", dtype=dtype)
        pipe = TruePosePipeline.from_model(loaded.model, loaded.scheduler)
        context, pooled = loaded.context, loaded.pooled
    elif model.is_cfld:
        from truepose_core.pipeline.cfld import CFLDPipeline

        pipe = CFLDPipeline.from_model(_load(model))
    else:
        from truepose_core.models.folder import load_image_encoder

        encoder = None if model.image_encoder is None else load_image_encoder(model.image_encoder)
        pipe = TruePosePipeline.from_model(_load(model), image_encoder=encoder)
    pipe.to(device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return Opened(model.name, pipe, device, dtype, time.perf_counter() - started, context, pooled)


def _load(model: ModelChoice) -> TruePoseModel | CFLDModel:
    """The network of a model file, or of another system's files without a converted copy."""
    from truepose_core.models.cfld.model import CFLDModel, load_cfld
    from truepose_core.models.model import TruePoseModel
    from truepose_core.models.store import load_model
    from truepose_core.weights.strict import load_strict

    if not model.originals:
        return load_cfld(model.name, vae=model.vae) if model.is_cfld else load_model(model.name, vae=model.vae)
    from truepose_core.importing.convert import opened
    from truepose_core.models.folder import load_vae

    codec = None if model.vae is None else load_vae(model.vae)
    made = CFLDModel(model.config, codec) if model.is_cfld else TruePoseModel(model.config, codec=codec)
    with opened(model.names, model.choices, whole=False) as (_, weights):
        load_strict(made, weights, model.name, ignore=("codec.",) if model.vae is not None else ())
    return made.eval()


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
