"""champ (github.com/fudan-generative-vision/champ) beside this package: see README.md."""

from __future__ import annotations

import sys
from pathlib import Path

import common
import torch
from animate_anyone import GUIDANCE, GUIDER, SAMPLING, STILL, compare, in_float32, save_run
from common import HEIGHT, SD15, SMALL, STEPS, WIDTH, WIDTHS, FullSize, Row, Watched

MAPS = ("depth", "normal", "semantic_map", "dwpose")
ENCODERS = tuple(f"guidance_encoder_{name}" for name in MAPS)
NETS = ("reference_unet", "denoising_unet")


def original(clone: Path, work: Path) -> None:
    from diffusers import DDIMScheduler
    from models.guidance_encoder import GuidanceEncoder
    from models.mutual_self_attention import ReferenceAttentionControl
    from models.unet_2d_condition import UNet2DConditionModel
    from models.unet_3d import UNet3DConditionModel
    from pipelines.pipeline_guidance2image import MultiGuidance2ImagePipeline

    in_float32(ReferenceAttentionControl)
    nets = (
        common.randomised(UNet2DConditionModel(**SMALL), 1),
        common.randomised(UNet3DConditionModel(**SMALL, **STILL), 2),
    )
    encoders = [common.randomised(GuidanceEncoder(WIDTHS[0], 3, GUIDER), 10 + i) for i in range(len(MAPS))]
    parts = dict(zip((*NETS, *ENCODERS), (*nets, *encoders), strict=True))
    common.save_parts(work, parts)
    pipe = MultiGuidance2ImagePipeline(
        vae=common.small_vae(work / "vae"),
        image_encoder=common.small_image_encoder(work / "image_encoder"),
        scheduler=DDIMScheduler(**SAMPLING),
        **parts,
    )
    source, maps = common.picture(1), [common.picture(20 + i) for i in range(len(MAPS))]
    watched, generator = Watched(pipe.scheduler), torch.Generator().manual_seed(0)
    images = pipe(source, maps, list(MAPS), WIDTH, HEIGHT, STEPS, GUIDANCE, generator=generator).images
    pictures = {name: common.as_tensor(x) for name, x in zip(MAPS, maps, strict=True)}
    save_run(work, watched, images, source=common.as_tensor(source), maps=pictures)

    with torch.device("meta"):
        nets = UNet2DConditionModel(**SD15), UNet3DConditionModel(**SD15, **STILL)
        encoder = GuidanceEncoder(320, 3, GUIDER)
    files = dict(zip(NETS, nets, strict=True)) | dict.fromkeys(ENCODERS, encoder)
    common.save_full_size(work, FullSize("champ", "champ", files, {"maps": ",".join(MAPS)}))


def ours(work: Path) -> list[Row]:
    files = [work / f"{name}.pth" for name in (*NETS, *ENCODERS)]
    out = common.convert(files, work / "champ.safetensors", f"maps={','.join(MAPS)}")
    maps = common.load(work, "run")["maps"]
    maps["skeleton"] = maps.pop("dwpose")
    return compare(work, out, maps)


if __name__ == "__main__":
    sys.exit(common.main("champ", original, ours))
