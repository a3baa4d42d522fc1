"""Leffa (github.com/franciszzj/Leffa), virtual try-on and pose transfer, beside this package: see README.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import common
import numpy as np
import torch
from common import CONTEXT, HEIGHT, SD15, SMALL, STEPS, WIDTH, FullSize, Row, Watched
from PIL import Image

GUIDANCE = 2.5
SEED = 5
TRY_ON, POSE_TRANSFER = "virtual_tryon", "pose_transfer"
SDXL = {
    "sample_size": 128,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL_SDXL = {
    **SDXL,
    "sample_size": 16,
    "block_out_channels": (64, 128, 256),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": CONTEXT,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
SCHEDULER = {**common.BETAS, "beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
# Leffa tells the two apart by the name of what it starts from.
BASES = {TRY_ON: "stable-diffusion-inpainting", POSE_TRANSFER: "stable-diffusion-xl-1.0-inpainting-0.1"}
UNETS = {TRY_ON: (SMALL, SD15), POSE_TRANSFER: (SMALL_SDXL, SDXL)}
SCALING = {TRY_ON: 0.18215, POSE_TRANSFER: 0.13025}
ROUNDED = 0.5 / 255 + common.LIMIT


@dataclass(frozen=True)
class Case:
    """whole: the mask is everywhere. once: the source is read once. parts: DensePose's third channel is a number of 24
    parts."""

    name: str
    weights: str
    whole: bool = False
    once: bool = False
    parts: bool = False

    @property
    def file(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


CASES = (
    Case("try-on", TRY_ON),
    Case("try-on, source read once", TRY_ON, once=True),
    Case("try-on, DensePose over 24", TRY_ON, parts=True),
    Case("pose transfer", POSE_TRANSFER, whole=True),
)


def original(clone: Path, work: Path) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from leffa.model import LeffaModel

    # This package always takes the mean.
    DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
    full = []
    for weights, (small, large) in UNETS.items():
        model = LeffaModel(configs(work / "small", weights, small, common.SMALL_VAE), dtype="float32")
        for seed, part in enumerate((model.vae, model.unet_encoder, model.unet), 1):
            common.randomised(part, seed)
        common.save_parts(work, {weights: model})
        for case in CASES:
            if case.weights == weights:
                run_case(work, model, case)
        with torch.device("meta"):
            model = LeffaModel(configs(work / "full", weights, large, common.VAE), dtype="float32")
        full.append(FullSize(f"Leffa on {'SD1.5' if weights == TRY_ON else 'SDXL'}", "leffa", {weights: model}))
    common.save_full_size(work, *full)


def configs(folder: Path, weights: str, unet: Mapping[str, object], vae: Mapping[str, object]) -> str:
    """The inpainting model that Leffa starts from, as far as it reads it."""
    folder = folder / BASES[weights]
    files = {
        "unet/config.json": {**unet, "in_channels": 9},
        "vae/config.json": {**vae, "scaling_factor": SCALING[weights]},
        "scheduler/scheduler_config.json": SCHEDULER,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return str(folder)


def run_case(work: Path, model: torch.nn.Module, case: Case) -> None:
    from leffa.pipeline import LeffaPipeline
    from leffa.transform import LeffaTransform

    canvas, source, densepose = (common.picture(seed) for seed in (1, 2, 3))
    if case.parts:
        pixels = np.array(densepose)
        pixels[..., 2] %= 25
        densepose = Image.fromarray(pixels)
    mask = np.full((HEIGHT, WIDTH), 255 if case.whole else 0, np.uint8)
    mask[40:100, 16:48] = 255
    mask = Image.fromarray(mask)
    transform = LeffaTransform(HEIGHT, WIDTH, "pose_transfer" if case.parts else "virtual_tryon")
    pictures = {"src_image": [canvas], "ref_image": [source], "mask": [mask], "densepose": [densepose]}
    inputs = transform(pictures)
    step, watched = model.noise_scheduler.step, Watched(model.noise_scheduler)
    torch.manual_seed(0)
    ((image,),) = LeffaPipeline(model, device="cpu")(
        **inputs,
        ref_acceleration=case.once,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
    )
    model.noise_scheduler.step = step
    given = {"canvas": canvas, "source": source, "densepose": densepose, "mask": mask, "images": image}
    common.save(work, case.file, watched, **{name: common.as_tensor(x) for name, x in given.items()})


def ours(work: Path) -> list[Row]:
    from truepose_core.models.store import load_model
    from truepose_core.parsing import HumanParsing
    from truepose_core.pipeline import TruePosePipeline

    rows = []
    for case in CASES:
        choices = ["densepose=24"] if case.parts else []
        out = common.convert([work / f"{case.weights}.pth"], work / f"{case.file}.safetensors", *choices)
        pipe = TruePosePipeline.from_model(load_model(out, verify=True))
        pipe.set_progress_bar_config(disable=True)
        run, watched = common.load(work, case.file), Watched(pipe.scheduler)
        images = pipe(
            run["source"],
            torch.full((1, 18, 3), 0.5),
            HumanParsing.from_labels(torch.full((1, HEIGHT, WIDTH), 3)),
            num_inference_steps=STEPS,
            pose_map={"densepose": run["densepose"]},
            source_once=case.once,
            latents=run["latents"][0],
            seed=SEED,
            **({} if case.whole else {"canvas": run["canvas"], "mask": run["mask"]}),
        ).images
        rows += common.step_rows(watched, run, case.name)
        rows.append(Row(f"{case.name}: finished picture, theirs on 8 bits", [images], [run["images"]], ROUNDED))
    return rows


if __name__ == "__main__":
    sys.exit(common.main("Leffa", original, ours))
