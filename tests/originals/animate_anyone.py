"""AnimateAnyone (github.com/MooreThreads/Moore-AnimateAnyone) beside this package: see README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import common
import torch
from common import HEIGHT, SD15, SMALL, STEPS, WIDTH, WIDTHS, FullSize, Row, Watched

GUIDANCE = 3.5
GUIDER = (16, 32, 96, 256)
SAMPLING = {
    **common.BETAS,
    "beta_schedule": "linear",
    "clip_sample": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
STILL = {
    "use_inflated_groupnorm": True,
    "unet_use_cross_frame_attention": False,
    "unet_use_temporal_attention": False,
}
MOVING = {
    **STILL,
    "use_motion_module": True,
    "motion_module_resolutions": [1, 2, 4, 8],
    "motion_module_mid_block": True,
    "motion_module_decoder_only": False,
    "motion_module_type": "Vanilla",
    "motion_module_kwargs": {
        "num_attention_heads": 8,
        "num_transformer_block": 1,
        "attention_block_types": ["Temporal_Self", "Temporal_Self"],
        "temporal_position_encoding": True,
        "temporal_position_encoding_max_len": 32,
        "temporal_attention_dim_div": 1,
    },
}
PARTS = ("reference_unet", "denoising_unet", "pose_guider")


def original(clone: Path, work: Path) -> None:
    from diffusers import DDIMScheduler
    from src.models.mutual_self_attention import ReferenceAttentionControl
    from src.models.pose_guider import PoseGuider
    from src.models.unet_2d_condition import UNet2DConditionModel
    from src.models.unet_3d import UNet3DConditionModel
    from src.pipelines.pipeline_pose2img import Pose2ImagePipeline

    in_float32(ReferenceAttentionControl)
    modules = (
        common.randomised(UNet2DConditionModel(**SMALL), 1),
        common.randomised(UNet3DConditionModel(**SMALL, **STILL), 2),
        common.randomised(PoseGuider(WIDTHS[0], block_out_channels=GUIDER), 3),
    )
    parts = dict(zip(PARTS, modules, strict=True))
    common.save_parts(work, parts)
    pipe = Pose2ImagePipeline(
        vae=common.small_vae(work / "vae"),
        image_encoder=common.small_image_encoder(work / "image_encoder"),
        scheduler=DDIMScheduler(**SAMPLING),
        **parts,
    )
    source, pose, watched = common.picture(1), common.picture(2), Watched(pipe.scheduler)
    generator = torch.Generator().manual_seed(0)
    images = pipe(source, pose, WIDTH, HEIGHT, STEPS, GUIDANCE, generator=generator).images
    save_run(work, watched, images, source=common.as_tensor(source), pose=common.as_tensor(pose))

    with torch.device("meta"):
        reference, guider = UNet2DConditionModel(**SD15), PoseGuider(320, block_out_channels=GUIDER)
        still, moving = (UNet3DConditionModel(**SD15, **more) for more in (STILL, MOVING))
    models = {"AnimateAnyone": still, "AnimateAnyone, motion modules in the denoising net": moving}
    full = [
        FullSize(title, "animate-anyone", dict(zip(PARTS, (reference, net, guider), strict=True)))
        for title, net in models.items()
    ]
    common.save_full_size(work, *full)


def in_float32(control: type) -> None:
    """The source's tokens are handed on in float16 whatever the nets are, unless it is said otherwise."""
    control.update.__defaults__ = (torch.float32,)


def save_run(work: Path, watched: Watched, images: torch.Tensor, **inputs: object) -> None:
    """As pictures, which the original makes as films of one picture."""
    for kept in (watched.predictions, watched.latents):
        kept[:] = [x.squeeze(2) for x in kept]
    common.save(work, "run", watched, images=images.squeeze(2), **inputs)


def ours(work: Path) -> list[Row]:
    out = common.convert([work / f"{name}.pth" for name in PARTS], work / "animate-anyone.safetensors")
    return compare(work, out, common.load(work, "run")["pose"])


def compare(work: Path, converted: Path, pose: object) -> list[Row]:
    """The converted model on the original's source and first noise."""
    from truepose_core.models.folder import load_image_encoder
    from truepose_core.models.store import load_model
    from truepose_core.parsing import HumanParsing
    from truepose_core.pipeline import TruePosePipeline

    run = common.load(work, "run")
    model = load_model(converted, vae=work / "vae", verify=True)
    pipe = TruePosePipeline.from_model(model, image_encoder=load_image_encoder(work / "image_encoder"))
    pipe.set_progress_bar_config(disable=True)
    watched = Watched(pipe.scheduler)
    body = torch.full((1, 18, 3), 0.5)
    clothes = HumanParsing.from_labels(torch.full((1, HEIGHT, WIDTH), 3))
    first = run["latents"][0]
    images = pipe(run["source"], body, clothes, num_inference_steps=STEPS, pose_map=pose, latents=first).images
    return [*common.step_rows(watched, run), Row("finished picture", [images], [run["images"]])]


if __name__ == "__main__":
    sys.exit(common.main("AnimateAnyone", original, ours))
