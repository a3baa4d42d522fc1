"""`truepose demo`: what the bundled networks do, on people they have never seen."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import (
    Console,
    add_device_arguments,
    add_report_arguments,
    check_folder,
    make_folder,
    memory_text,
    peak_memory,
    to_json,
    whole,
    write_outputs,
)
from truepose_core.cli.opening import Opened, add_model_argument, memory_errors, open_model, progress
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.mannequin import Rendering

HELP = "a picture of what the bundled model does, in under a minute on a CPU"
DESCRIPTION = """\
Show four mannequins, which no network has seen, in two new poses each. No download, no GPU. "aligned" is the source
carried along a lifted body and corrected by recurrent alignment; "sampled" is the bundled diffusion model on top of
that.

Writes DIR/demo.png (source | skeleton | aligned | sampled | truth), DIR/demo.json (how close each result is, and how
long it took), and DIR/inputs with a picture, its parsing and poses to try `truepose transfer` with.
"""
EPILOG = """\
examples:
  truepose demo --out demo-out
  truepose demo --out demo-out --overwrite --steps 30 --seed 1
  truepose demo --out demo-out --json | jq .mean.foreground_psnr
"""

FIGURES = ("aligned_foreground_psnr", "foreground_psnr", "copy_foreground_psnr")
SHEET = "demo.png"
REPORT = "demo.json"
INPUTS = "inputs"
HEIGHT = 256
"""Pictures on the sheet are about this high, in pixels."""


@dataclass(frozen=True)
class Scene:
    """One person of the test split: number, pose of the source picture, poses to show. Names of `ready_poses`."""

    person: int
    source: str
    targets: tuple[str, str]


# One for each kind of patterned top, the pattern to follow from the front, from the side and behind.
SCENES = (
    Scene(0, "turn", ("wave", "side")),
    Scene(5, "stand", ("arms up", "walk")),
    Scene(6, "akimbo", ("kick", "wave")),
    Scene(23, "stand", ("sit", "back")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose demo`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to; made if need be")
    parser.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    parser.add_argument("--steps", type=whole(1, 1000), default=1, metavar="N", help="sampling steps (default: 1)")
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="fixes the pictures (default: 0)")
    add_report_arguments(parser)
    add_model_argument(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check the outputs, work, then write. Returns what is in demo.json."""
    started = time.perf_counter()
    from truepose_core.mannequin import ready_poses

    out = Path(args.out)
    inputs = input_names(list(ready_poses()))
    sheet_path, report_path = check_folder(out, [SHEET, REPORT], args.overwrite)
    check_folder(out / INPUTS, inputs, args.overwrite)

    console.doing(f"opening the model {args.model}")
    opened = open_model(args.model, args.device, args.dtype)
    if not opened.is_mannequin:
        raise TruePoseError(
            f"--model {args.model} is of family {opened.pipe.model.config.family!r}; the demo shows mannequins, so it "
            "needs a model of family 'mannequin'. For others use truepose transfer"
        )
    with memory_errors(opened.device):
        sheet, pairs = _show(opened, args.steps, args.seed, args.quiet)
    made = render_inputs()
    memory = peak_memory(opened.device)
    report = {
        **opened.description,
        "steps": args.steps,
        "seed": args.seed,
        "size": list(opened.pipe.model.config.size[::-1]),
        "pairs": pairs,
        "mean": {key: sum(p[key] for p in pairs) / len(pairs) for key in FIGURES},
        "seconds": {"model": round(opened.seconds, 3), "total": round(time.perf_counter() - started, 3)},
        **memory,
    }
    _write(sheet, report, made, sheet_path, report_path, args.overwrite)

    mean = report["mean"]
    console.say(
        f"foreground PSNR {mean['aligned_foreground_psnr']:.2f} dB aligned, {mean['foreground_psnr']:.2f} dB sampled "
        f"on average; copying the source has {mean['copy_foreground_psnr']:.2f} dB"
    )
    console.say(f"{report['seconds']['total']:.1f} s in all; {memory_text(memory)}")
    console.say(f"wrote {sheet_path}\nwrote {report_path}")
    folder = out / INPUTS
    console.say(
        f"try next: truepose transfer {folder / 'person.png'} --parsing {folder / 'person-parsing.png'} "
        f"--source-pose {folder / 'person-pose.json'} --pose {folder / 'kick.json'} --out {out / 'kick.png'}"
    )
    console.report(report)
    return report


def _show(opened: Opened, steps: int, seed: int, quiet: bool) -> tuple[Tensor, list[dict[str, Any]]]:
    """The contact sheet [1, 3, H, W] and the figures of each pair."""
    import torch
    from tqdm.auto import tqdm

    from truepose_core.alignment.recurrent import align_person
    from truepose_core.evaluation.metrics import area_masks
    from truepose_core.mannequin import BOTTOM_PATTERNS, TOP_PATTERNS, sample_identities
    from truepose_core.mannequin.world import split_seed
    from truepose_core.parsing import HumanParsing
    from truepose_core.pictures.sheet import label_strip, tile
    from truepose_core.pose.skeleton import draw_skeleton

    height, width = opened.pipe.model.config.size
    scale = max(1, round(HEIGHT / height))
    large = (height * scale, width * scale)
    strips: list[Tensor] = []
    pairs: list[dict[str, Any]] = []
    with tqdm(total=len(SCENES) * steps, desc="demo", unit="step", disable=quiet) as bar:
        for scene in SCENES:
            views = render_person(scene.person, (scene.source, *scene.targets), large)
            source, targets = views.select([0]), views.select([1, 2])
            parsing = HumanParsing(source.parsing)
            aligned = align_person(source.image, parsing, source.keypoints, targets.keypoints).picture
            person = area_masks(HumanParsing(targets.parsing))["foreground"]
            before = time.perf_counter()
            result = opened.pipe(
                source.image,
                targets.keypoints,
                parsing,
                source.keypoints,
                height=large[0],
                width=large[1],
                num_inference_steps=steps,
                seed=seed,
                callback_on_step_end=progress(bar),
            ).images
            seconds = (time.perf_counter() - before) / len(scene.targets)
            ours, carried, copied = (
                foreground_psnr(images, targets.image, person)
                for images in (result, aligned, source.image.expand_as(result))
            )
            who = sample_identities([scene.person], split_seed("test", 0))
            top, bottom = TOP_PATTERNS[int(who.top_pattern)], BOTTOM_PATTERNS[int(who.bottom_pattern)]
            for pose, a, b, c in zip(scene.targets, ours, copied, carried, strict=True):
                pairs.append(
                    {
                        "person": scene.person,
                        "top": top,
                        "bottom": bottom,
                        "source_pose": scene.source,
                        "target_pose": pose,
                        "aligned_foreground_psnr": c,
                        "foreground_psnr": a,
                        "copy_foreground_psnr": b,
                        "seconds": round(seconds, 4),
                    }
                )
            shown = [source.image[0]]
            words = [f"{top}, {scene.source}"]
            skeletons = draw_skeleton(targets.keypoints, *large)
            for i, pose in enumerate(scene.targets):
                shown += [skeletons[i], aligned[i], result[i], targets.image[i]]
                words += [pose, f"{carried[i]:.1f} dB", f"{ours[i]:.1f} dB", f"copying: {copied[i]:.1f} dB"]
            row = tile([shown])
            if not strips:
                strips.append(label_strip(["source", *["skeleton", "aligned", "sampled", "truth"] * 2], row.shape[-1]))
            strips += [row, label_strip(words, row.shape[-1])]
    note = (
        f"dB is PSNR on the person at {large[1]}x{large[0]} pixels; copying is the source as it is; model: "
        f"{Path(opened.name).name}, which works at {width}x{height}"
    )
    strips.append(label_strip([note], strips[0].shape[-1]))
    return torch.cat(strips, 2), pairs


def foreground_psnr(images: Tensor, truth: Tensor, mask: Tensor) -> list[float]:
    """PSNR in dB over the masked pixels and all colours, one per picture.

    images, truth: [B, 3, H, W] in [0, 1]; mask: bool [B, H, W]. The evaluation's `masked_psnr`, without its library.
    """
    values = []
    for image, true, pixels in zip(images, truth, mask, strict=True):
        error = (image[:, pixels].double() - true[:, pixels].double()).square().mean()
        values.append(float(-10 * error.clamp(min=1e-6).log10()))
    return values


def render_person(person: int, poses: tuple[str, ...], size: tuple[int, int]) -> Rendering:
    """A person of the test split in ready poses, at (height, width), on the CPU."""
    import torch

    from truepose_core.mannequin import BodyPoses, ready_poses, render, sample_identities
    from truepose_core.mannequin.world import split_seed

    ready = ready_poses()
    people = sample_identities([person] * len(poses), split_seed("test", 0))
    chosen = BodyPoses(
        torch.cat([ready[name].theta for name in poses]), torch.cat([ready[name].camera for name in poses])
    )
    return render(people, chosen, *size)


def input_names(poses: list[str]) -> list[str]:
    """The files of DIR/inputs."""
    return ["person.png", "person-parsing.png", "person-pose.json", *(f"{file_name(pose)}.json" for pose in poses)]


def file_name(pose: str) -> str:
    """A ready pose's name as a file name."""
    return pose.replace(" ", "-")


def render_inputs() -> dict[str, Any]:
    """File name -> picture [1, 3, H, W] or JSON text: one person in the first pose, and every ready pose."""
    import json

    from truepose_core.mannequin import ready_poses
    from truepose_core.parsing import HumanParsing
    from truepose_core.pose import Person, Pose, write_pose

    names = list(ready_poses())
    size = (HEIGHT, HEIGHT * 3 // 4)
    views = render_person(SCENES[1].person, tuple(names), size)
    poses = [
        json.dumps(write_pose(Pose(size[1], size[0], (Person(body.numpy()),))), indent=1) for body in views.keypoints
    ]
    labels = HumanParsing(views.parsing[:1]).labels()
    files = {
        "person.png": views.image[:1],
        "person-parsing.png": HumanParsing.from_labels(labels).preview(),
        "person-pose.json": poses[0],
    }
    return files | {f"{file_name(name)}.json": text for name, text in zip(names, poses, strict=True)}


def _write(
    sheet: Tensor,
    report: dict[str, Any],
    inputs: dict[str, Any],
    sheet_path: Path,
    report_path: Path,
    overwrite: bool,
) -> None:
    from truepose_core.pictures.files import atomic_write, save_image

    folder = sheet_path.parent / INPUTS
    make_folder(folder)

    def writing(content: Tensor | str) -> Callable[[Path], Path]:
        if isinstance(content, str):
            return lambda path: atomic_write(path, content, overwrite)
        return lambda path: save_image(content, path, overwrite)

    outputs = {folder / name: content for name, content in inputs.items()}
    outputs |= {report_path: to_json(report) + "\n", sheet_path: sheet}
    write_outputs((path, writing(content)) for path, content in outputs.items())
