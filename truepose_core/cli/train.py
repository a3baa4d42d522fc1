"""`truepose train`: every field of TrainingConfig, and of the small networks' settings, is an option."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from truepose_core.cli.console import (
    Console,
    add_report_arguments,
    check_folder,
    choose_device,
    memory_text,
    number,
    peak_memory,
    whole,
)
from truepose_core.errors import TruePoseError

HELP = "train a model, on the mannequin world or on pairs of photographs"
DESCRIPTION = """\
Train on the mannequin world from scratch, or on a folder of pairs from Stable Diffusion weights (--base, --data),
on a CPU, a GPU, or several through accelerate.
Needs: pip install "comfyui-truepose[train]"

DIR holds weights.safetensors at the end (averaged, float16: what --model and truepose eval take), sample-*.png and
TensorBoard curves on the way, and a checkpoint. Ctrl-C writes a checkpoint and stops; the same command goes on from
there, to the same state as a run that was never stopped.

The rows lift, alignment, field and keypoints are small networks that stand beside the models; DIR gets
weights.safetensors, a checkpoint and log.jsonl.
"""
EPILOG = """\
examples:
  truepose train --out run --steps 200 --sources 4                          a first look on a CPU, some minutes
  truepose train --out run --row full --steps 20000 --precision bf16
  truepose train --out run --base stable-diffusion-v1-5 --data my-pairs --row HPFA --height 512 --width 384 \\
      --precision bf16 --gradient-checkpointing
  accelerate launch --num_processes 2 -m truepose_core.cli train --out run
  truepose train --out lift --row lift                                      keypoints to bodies
  truepose train --out align --row alignment --height 64 --width 48 --steps 1300
  truepose train --out field --row field                                    the pose field, some minutes
  truepose train --out field --row field --data AMASS --every 30            on real people's poses
  truepose train --out reader --row keypoints --vae stable-diffusion-v1-5 --data my-pairs
  tensorboard --logdir run/curves
  truepose eval --pairs 64 --rows copy mine --model mine=run/weights.safetensors
"""

MOST = 10**9

# TrainingConfig's field -> (what reads it, placeholder, meaning).
OPTIONS: dict[str, tuple[Any, str, str]] = {
    "row": (
        str,
        "ROW",
        "what is trained: pose, concat, HPFA or HPFA+CAA, the rows of the table; full, the bundled model; depth-base, "
        "depth-decoupled, depth-2d, depth-3d or depth-3d-found, the ablation of relative depth guidance; or lift, "
        "alignment, field or keypoints, small networks",
    ),
    "steps": (whole(1, MOST), "N", "optimiser steps"),
    "sources": (whole(1, 4096), "N", "people per step"),
    "targets": (whole(1, 4096), "N", "target poses of each of them"),
    "learning_rate": (number(), "LR", "AdamW's learning rate"),
    "warmup": (whole(1, MOST), "N", "steps over which it rises from 0"),
    "decay": (number(0, 1), "SHARE", "share of the steps, at the end, over which it falls to 0"),
    "weight_decay": (number(), "X", "AdamW's weight decay"),
    "ema": (number(0, 1), "X", "decay of the averaged weights, which are what is kept"),
    "drop_source": (number(0, 1), "P", "how often the source alone is dropped, for guidance"),
    "drop_all": (number(0, 1), "P", "how often source and pose are dropped together, for guidance"),
    "alignment": (number(), "X", "weight of the alignment loss, where the model has CAA"),
    "human_prior": (number(), "X", "weight of L_HPL, where the model has 3D guidance"),
    "twin_weight": (number(), "X", "weight of the loss on what differs between two targets that differ in depth alone"),
    "timestep_power": (number(0.01, 100), "X", "timesteps are drawn as u^X: 1 is uniform, less prefers noisy ones"),
    "accumulate": (whole(1, MOST), "N", "batches summed up per step"),
    "clip": (number(), "X", "largest norm of the gradient"),
    "seed": (whole(0, 2**31), "N", "fixes weights, data and noise"),
    "people": (whole(1, MOST), "N", "people held ready, rendered"),
    "poses": (whole(2, 1 << 20), "N", "poses of each of them"),
    "fresh": (whole(0, MOST), "N", "people replaced by new ones after each batch"),
    "precision": (str, "KIND", "no (float32), fp16 or bf16 mixed precision"),
    "sample_every": (whole(1, MOST), "N", "steps between sample sheets"),
    "save_every": (whole(1, MOST), "N", "steps between checkpoints"),
    "keep": (whole(1, MOST), "STEP", "steps whose averaged weights are written aside as weights-STEP.safetensors"),
    "start": (str, "FILE", "weights of the same row to go on from, with a fresh optimiser"),
    "base": (
        str,
        "FOLDER",
        "a Stable Diffusion folder in diffusers format that both nets start from, instead of scratch",
    ),
    "data": (str, "DATA", "mannequin, or a folder with pairs.csv, images/, parsing/ and poses/"),
    "first_source": (
        None,
        "",
        "a person's first pose is always the source, so that its alignment to the others is made once",
    ),
    "aligned_tokens": (
        None,
        "",
        "the source's tokens are also read aligned to the target pose, beside its own (rows concat and HPFA; with "
        "--base for photographs)",
    ),
    "twins": (number(0, 1), "SHARE", "share of the mannequin's target pairs that differ in depth alone; odd --poses"),
    "height": (whole(0, 4096), "PX", "height of the training pictures; 0 is the model's own"),
    "width": (whole(0, 4096), "PX", "width of the training pictures; 0 is the model's own"),
    "gradient_checkpointing": (None, "", "less memory, more time"),
    "lora": (
        whole(0, 1024),
        "RANK",
        "trains low-rank updates of the nets' attentions, not the nets; 0 trains the nets",
    ),
}


# The same for what only the small networks have.
SMALL_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "batch": (whole(1, MOST), "N", "samples per step"),
    "device": (str, "NAME", "cpu, cuda ..."),
    "depth": (whole(1, 16), "N", "hidden layers; their size is --width"),
    "hypotheses": (whole(1, 16), "N", "bodies that the network offers"),
    "refill": (whole(1, MOST), "N", "people replaced at once, as often as one person a step makes it"),
    "longer": (number(0, 1), "SHARE", "share of the steps that go from pose to pose in two steps, not one"),
    "lift": (str, "FILE", "the lifting network, if not the one that ships"),
    "channels": (whole(8, 1024), "N", "channels at half the picture's size"),
    "varied": (number(0, 1), "SHARE", "share of the people who stand in a light of their own, from anywhere above"),
    "square": (number(), "X", "weight of the loss on squared differences of pixels"),
    "edges": (number(), "X", "weight of the loss on differences between neighbouring pixels"),
    "recolored": (number(0, 1), "SHARE", "share of the pairs in other colours, the same on both sides"),
    "valid": (whole(16, MOST), "N", "valid poses drawn from the mannequin world"),
    "noised": (whole(1, MOST), "N", "noised poses, labelled with their distance to the nearest valid one"),
    "every": (whole(1, MOST), "N", "takes each N-th frame of --data, a folder of AMASS-style npz files"),
    "vae": (str, "FOLDER", "reads the latents of the VAE in this folder, in diffusers format, instead of pictures"),
    "widths": (whole(8, 1024), "N", "channels at a half, a quarter and an eighth of the size"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose train`, with TrainingConfig's defaults; what is not given is not set."""
    from truepose_core.training.rows import SMALL_ROWS
    from truepose_core.training.train import TrainingConfig

    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run; made if need be")
    add_report_arguments(parser)
    group = parser.add_argument_group("the run")
    for field in fields(TrainingConfig):
        read, placeholder, meaning = OPTIONS[field.name]
        if isinstance(field.default, bool):
            group.add_argument(
                _option(field.name), action="store_true", default=argparse.SUPPRESS, help=f"{meaning} (default: off)"
            )
            continue
        several = isinstance(field.default, tuple)
        default = "none" if field.default in ((), "") else field.default
        _add_option(group, field.name, read, placeholder, f"{meaning} (default: {default})", "*" if several else None)
    settings = {row: {f.name: f.default for f in fields(small.load()[0])} for row, small in SMALL_ROWS.items()}
    told = [
        f"{row}, {SMALL_ROWS[row].about}: "
        + ", ".join(f"{_option(name)} {_shown(own[name])}" for name in own if name in OPTIONS)
        for row, own in settings.items()
    ]
    group = parser.add_argument_group(
        "small networks", "options above that they share, with their defaults: " + "; ".join(told)
    )
    for name, (read, placeholder, meaning) in SMALL_OPTIONS.items():
        defaults = ", ".join(f"{row} {_shown(own[name])}" for row, own in settings.items() if name in own)
        _add_option(group, name, read, placeholder, f"{meaning} (default: {defaults})", 3 if name == "widths" else None)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    if default in ((), ""):
        return "none"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _add_option(
    group: argparse._ArgumentGroup, name: str, read: Any, placeholder: str, told: str, several: str | int | None
) -> None:
    group.add_argument(
        _option(name), type=read, nargs=several, default=argparse.SUPPRESS, metavar=placeholder, help=told
    )


def read_config(args: argparse.Namespace, kind: type, row: str) -> Any:
    """The settings of a row, `kind`'s defaults where nothing was given. Raises TruePoseError for an option that the row
    does not have."""
    given = {name: vars(args)[name] for name in (*OPTIONS, *SMALL_OPTIONS) if name in vars(args)}
    known = {field.name for field in fields(kind)} | {"row"}
    strange = sorted(_option(name) for name in given if name not in known)
    if strange:
        raise TruePoseError(
            f"{', '.join(strange)} has no meaning for row {row}; its options are "
            f"{', '.join(sorted(map(_option, known)))}"
        )
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if "row" not in {field.name for field in fields(kind)}:
        given.pop("row", None)
    return kind(**given)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Train, or go on training. Returns the report that --json prints."""
    from truepose_core.training.rows import SMALL_ROWS

    row = getattr(args, "row", None)
    if row in SMALL_ROWS:
        return _run_small(args, row, console)
    for library, extra in (("accelerate", ""), ("tensorboard", "[train]")):
        if find_spec(library) is None:
            raise TruePoseError(f'training needs {library}; install it with: pip install "comfyui-truepose{extra}"')
    from truepose_core.training.train import ROWS, Trainer, TrainingConfig, checkpoint_of, trainable

    if row is not None and row not in ROWS:
        raise TruePoseError(f"unknown row {row!r}; expected one of {', '.join((*ROWS, *SMALL_ROWS))}")
    config = read_config(args, TrainingConfig, row or TrainingConfig.row)
    _check(config)
    out = Path(args.out)
    # A finished run may be trained on: its own files are its own to replace.
    check_folder(out, ["weights.safetensors"], overwrite=True)
    console.doing("making the network and its data")
    trainer: Trainer | None = None
    try:
        trainer = Trainer(config, out, quiet=args.quiet)
        main = trainer.accelerator.is_main_process
        if main:
            start = (
                f"going on from step {trainer.step}"
                if trainer.step
                else f"from {config.start or config.base or 'scratch'}"
            )
            console.say(
                f"{config.row}, {trainable(trainer.model):,} weights, {config.steps} steps {start}, on "
                f"{trainer.accelerator.num_processes} x {trainer.accelerator.device}"
            )
        weights = trainer.run()
    except KeyboardInterrupt:
        done = 0 if trainer is None else trainer.step
        raise _stopped(checkpoint_of(out), config.steps, done) from None
    memory = peak_memory(trainer.accelerator.device)
    report = {
        "weights": str(weights),
        "row": config.row,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "device": str(trainer.accelerator.device),
        "processes": trainer.accelerator.num_processes,
        **memory,
    }
    if main:
        console.say(f"{trainer.seconds:.0f} s of training; {memory_text(memory)}\nwrote {weights}")
        console.report(report)
    return report


def _run_small(args: argparse.Namespace, row: str, console: Console) -> dict[str, Any]:
    """Train one of the small networks."""
    from truepose_core.training.rows import SMALL_ROWS
    from truepose_core.training.small import SmallTrainer, checkpoint_of

    kind, make = SMALL_ROWS[row].load()
    config = read_config(args, kind, row)
    config = replace(config, device=str(choose_device(config.device)))
    out = Path(args.out)
    check_folder(out, ["weights.safetensors"], overwrite=True)
    console.doing("making the network and its data")
    trainer: SmallTrainer | None = None
    try:
        trainer = make(config, out, quiet=args.quiet)
        count = sum(p.numel() for p in trainer.net.parameters())
        begun = getattr(config, "start", "") or "scratch"
        start = f"going on from step {trainer.step}" if trainer.step else f"from {begun}"
        console.say(f"{row}, {count:,} weights, {config.steps} steps {start}, on {config.device}")
        weights = trainer.run()
    except KeyboardInterrupt:
        done = 0 if trainer is None else trainer.step
        raise _stopped(checkpoint_of(out), config.steps, done) from None
    memory = peak_memory(choose_device(config.device))
    report = {
        "weights": str(weights),
        "row": row,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "device": config.device,
        **memory,
    }
    console.say(f"{trainer.seconds:.0f} s of training; {memory_text(memory)}\nwrote {weights}")
    console.report(report)
    return report


def _stopped(checkpoint: Path, steps: int, done: int) -> KeyboardInterrupt:
    """Ctrl-C, with what is saved, after looking: a second one may have come before the checkpoint was whole."""
    from truepose_core.training.checkpoint import what_is_saved

    return KeyboardInterrupt(*what_is_saved(checkpoint, steps, done))


def _check(config: Any) -> None:
    """What only shows when options meet. Raises TruePoseError."""
    if config.data == "mannequin" and config.poses <= config.targets:
        raise TruePoseError(
            f"--poses {config.poses} leaves no pose for the source beside --targets {config.targets}; expected more "
            "poses than targets"
        )
    if config.drop_source + config.drop_all > 1:
        raise TruePoseError(
            f"--drop-source {config.drop_source} and --drop-all {config.drop_all} make more than 1; lower one"
        )
    if config.precision not in ("no", "fp16", "bf16"):
        raise TruePoseError(f"--precision {config.precision!r}; expected no, fp16 or bf16")
    if config.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            raise TruePoseError("--precision fp16 needs a CUDA device; take bf16 or no")
