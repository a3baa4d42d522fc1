"""What the comparisons share: random weights and pictures, the original in a process of its own, tables.

A script has two sides. `original(clone, work)` runs in a second process, with the original's code and its libraries:
it writes weights as that system publishes them, what it made of them, and the names and shapes of its weights at full
size. `ours(work)` runs in the first process: it converts those files, makes the same, and returns a row per result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

LIMIT = 1e-4
STEPS = 3
HEIGHT, WIDTH = 128, 64
CONTEXT = 32
WIDTHS = (32, 64, 128, 128)
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SMALL = {**SD15, "sample_size": 16, "block_out_channels": WIDTHS, "cross_attention_dim": CONTEXT}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
SMALL_VAE = {**VAE, "block_out_channels": (32, 32, 64, 64)}
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Row:
    """One thing that both sides made, at one step or at several. limit: of the largest absolute difference."""

    what: str
    ours: Sequence[Tensor]
    theirs: Sequence[Tensor]
    limit: float = LIMIT

    @property
    def differences(self) -> list[float]:
        if any(a.shape != b.shape for a, b in zip(self.ours, self.theirs, strict=True)):
            raise ValueError(f"{self.what}: the two sides have other shapes")
        return [float((a - b).abs().max()) for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def largest(self) -> float:
        return max(float(x.abs().max()) for x in self.theirs)

    @property
    def within(self) -> bool:
        return all(d <= self.limit for d in self.differences)


def main(title: str, original: Callable[[Path, Path], None], ours: Callable[[Path], list[Row]]) -> int:
    """Run both sides and print the tables. Returns the exit code: 1 above a limit or with a weight left over."""
    parser = argparse.ArgumentParser(description=f"{title}: the original's own code beside this package")
    parser.add_argument("--original", type=Path, required=True, metavar="CLONE", help="a clone of its repository")
    parser.add_argument("--libraries", type=Path, metavar="FOLDER", help="made by pip install --target; see README.md")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for folder in filter(None, (args.original, args.libraries)):
        if not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    torch.set_grad_enabled(False)
    if args.work is not None:
        sys.path.insert(0, str(args.original))
        torch.manual_seed(0)
        original(args.original, args.work)
        (args.work / "versions").write_text(versions(), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        command = [sys.executable, "-W", "ignore", sys.argv[0], "--original", str(args.original.resolve())]
        environment = {**os.environ, "TQDM_DISABLE": "1"}
        if args.libraries is not None:
            environment["PYTHONPATH"] = str(args.libraries.resolve())
        if subprocess.run([*command, "--work", folder], env=environment).returncode:
            sys.exit("the original's side did not run")
        # The tree that this file is in, not an installed copy.
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        rows = ours(work)
        print(f"\n## {title}\n\nOriginal: commit {commit(args.original)}, {(work / 'versions').read_text('utf-8')}.")
        print(f"This package: {versions()}.\n")
        good = print_rows(rows)
        good &= print_keys(json.loads((work / "full_size.json").read_text("utf-8")))
    print(f"\n{'all within the limits' if good else 'NOT WITHIN THE LIMITS'}")
    return 0 if good else 1


def print_rows(rows: Sequence[Row]) -> bool:
    """The table of what was compared: whether all is within its limit."""
    print("| | max abs difference | largest value | limit |\n|---|---|---|---|")
    for row in rows:
        found = ", ".join(f"{d:.1e}" if d else "0" for d in row.differences)
        print(f"| {row.what} | {found} | {row.largest:.3g} | {row.limit:.2g} |")
    return all(row.within for row in rows)


def versions() -> str:
    """Of what this process runs with."""
    names = ("torch", "diffusers", "transformers", "numpy")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def commit(clone: Path) -> str:
    """The clone's commit."""
    command = ["git", "-C", str(clone), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


# ------------------------------------------------------------------------------------------- random weights, pictures


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """The module with weights of which none is special: nothing is zero, no norm is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(parameter + 0.2 * noise if parameter.ndim == 1 else noise * parameter[0].numel() ** -0.5)
    return module.eval()


def small_vae(folder: Path) -> nn.Module:
    """Written to the folder in diffusers format."""
    from diffusers import AutoencoderKL

    vae = randomised(AutoencoderKL(**SMALL_VAE), 7)
    vae.save_pretrained(folder, safe_serialization=True)
    return vae


def small_image_encoder(folder: Path) -> nn.Module:
    """CLIP's, for pictures of 224 pixels. Written to the folder in transformers format."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPVisionConfig(**sizes, projection_dim=CONTEXT, image_size=224, patch_size=32)
    encoder = randomised(CLIPVisionModelWithProjection(config), 8)
    encoder.save_pretrained(folder, safe_serialization=True)
    return encoder


def picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.BICUBIC)


def as_tensor(image: Image.Image) -> Tensor:
    """[1, C, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)[None]


class Watched:
    """Keeps what a scheduler's step() is given (predictions after guidance) and all latents, the first included."""

    def __init__(self, scheduler: object):
        self.scheduler, self.predictions, self.latents = scheduler, [], []
        step = scheduler.step

        @wraps(step)
        def watched(prediction: Tensor, t: Tensor, x: Tensor, **more: object) -> object:
            out = step(prediction, t, x, **more)
            self.predictions.append(prediction.clone())
            self.latents += [x.clone(), out[0].clone()] if not self.latents else [out[0].clone()]
            return out

        scheduler.step = watched

    def results(self) -> dict[str, Tensor | list[Tensor]]:
        """For `save`."""
        return {"predictions": self.predictions, "latents": self.latents, "timesteps": self.scheduler.timesteps}


# ------------------------------------------------------------------------------------------------ between the two sides


def save(work: Path, name: str, watched: Watched, **more: object) -> None:
    """What a run of the original gave; `load` reads it."""
    torch.save({**watched.results(), **more}, work / f"{name}.pt")


def load(work: Path, name: str) -> dict[str, object]:
    return torch.load(work / f"{name}.pt", weights_only=True)


def save_parts(work: Path, parts: Mapping[str, nn.Module], suffix: str = ".pth") -> None:
    """A file of weights for each, as these systems publish them."""
    for name, part in parts.items():
        torch.save(part.state_dict(), work / (name + suffix))


@dataclass(frozen=True)
class FullSize:
    """The files of a model at full size: name -> module on the meta device, or its weights."""

    title: str
    family: str
    files: Mapping[str, nn.Module | Mapping[str, Tensor]]
    choices: Mapping[str, str] | None = None


def save_full_size(work: Path, *models: FullSize) -> None:
    """Names and shapes, for `print_keys`."""
    found = []
    for model in models:
        weights = {n: x.state_dict() if isinstance(x, nn.Module) else x for n, x in model.files.items()}
        shapes = {n: {key: list(x.shape) for key, x in own.items()} for n, own in weights.items()}
        found.append({**vars(model), "files": shapes, "choices": dict(model.choices or {})})
    (work / "full_size.json").write_text(json.dumps(found), encoding="utf-8")


def convert(files: Sequence[Path], out: Path, *choices: str) -> Path:
    """`truepose convert`, with all that it prints."""
    from truepose_core.cli import main as truepose

    more = ["--choose", *choices] if choices else []
    print("\n$ truepose convert", *(path.name for path in files), "--out", out.name, *more, flush=True)
    if truepose(["convert", *map(str, files), "--out", str(out), "--quiet", *more]):
        sys.exit("the original's files were not converted")
    return out


def step_rows(watched: Watched, run: Mapping[str, object], name: str = "") -> list[Row]:
    """The steps of both sides."""
    results = watched.results()
    before = f"{name}: " if name else ""
    return [
        Row(f"{before}timesteps", [results["timesteps"].float()], [run["timesteps"].float()], 0.0),
        Row(f"{before}guided prediction at each step", results["predictions"], run["predictions"]),
        Row(f"{before}latents after each step", results["latents"][1:], run["latents"][1:]),
    ]


def print_keys(models: Sequence[Mapping[str, object]]) -> bool:
    """How the original's own names and shapes at full size convert: whether nothing is missing or unexplained."""
    from truepose_core.importing.convert import expected_shapes
    from truepose_core.importing.families import FAMILIES
    from truepose_core.weights.reading import TensorInfo

    print("\n| weights at full size | tensors | taken | ignored | missing | unexplained | other shape |")
    print("|---|---|---|---|---|---|---|")
    good, reasons = True, []
    for model in models:
        family = next(family for family in FAMILIES if family.name == model["family"])
        files = [{k: TensorInfo(tuple(s), "F32") for k, s in own.items()} for own in model["files"].values()]
        parts = [part for i, own in enumerate(files) for part in family.recognise(i, own)]
        plan = family.plan(parts, files, model["choices"])
        expected = expected_shapes(plan.config) if plan.expected is None else plan.expected
        explained = {*plan.tensors.values(), *plan.ignored}
        unexplained = [key for i, own in enumerate(files) for key in own if (i, key) not in explained]
        unexplained += set(plan.tensors) - set(expected)
        missing = set(expected) - set(plan.tensors)
        shapes = [n for n, (i, k) in plan.tensors.items() if n in expected and files[i][k].shape != expected[n]]
        good &= not (missing or unexplained or shapes)
        found = ", ".join(f"{name} {len(own):,}" for name, own in zip(model["files"], files, strict=True))
        counts = (sum(map(len, files)), *map(len, (plan.tensors, plan.ignored, missing, unexplained, shapes)))
        print(f"| {model['title']}: {found} | " + " | ".join(f"{n:,}" for n in counts) + " |")
        reasons += [f"* {model['title']}, {n:,} ignored: {why}" for why, n in Counter(plan.ignored.values()).items()]
    print("\n".join(["", *reasons] if reasons else []))
    return good
