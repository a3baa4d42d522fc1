"""CFLD (github.com/YanzuoLu/CFLD) beside this package: see README.md."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import common
import numpy as np
import torch
from common import STEPS, WIDTHS, FullSize, Row, Watched

SIDE = 256
PICTURE = (256, 176)
SEED = 99
SCALES = (1.7, 2.6)
TOKENS = 96
ENCODERS, UNET = "pytorch_model", "pytorch_model_1"


def original(clone: Path, work: Path) -> None:
    import diffusers

    # Only its metrics and its data sets need them.
    for name in ("lpips", "pandas"):
        sys.modules[name] = Unused(name)
    from defaults import pose_transfer_C as config
    from models import UNet, VariationalAutoencoder
    from pose_transfer_test import sample
    from pose_transfer_train import build_model
    from pose_utils import cords_to_map, draw_pose_from_cords

    config.defrost()
    config.MODEL.COND_STAGE_CONFIG.PRETRAINED_PATH = ""
    settings = json.loads((clone / config.MODEL.UNET_CONFIG.PRETRAINED_PATH / "config.json").read_text("utf-8"))
    cpu_attention(settings)
    # Swin spaces its drop rates by torch.linspace and reads them.
    with torch.device("meta"), patch("torch.linspace", partial(torch.linspace, device="cpu")):
        full = {ENCODERS: build_model(config), UNET: UNet(config)}
    common.save_full_size(work, FullSize("CFLD", "cfld", full))

    reduce(config)
    settings.update(block_out_channels=WIDTHS, cross_attention_dim=TOKENS)
    encoders, unet = common.randomised(build_model(config), 1), common.randomised(UNet(config), 2)
    common.save_parts(work, {ENCODERS: encoders, UNET: unet}, ".bin")
    common.small_vae(work / "vae")
    vae = VariationalAutoencoder(str(work / "vae"))

    rng = np.random.default_rng(0)
    points = np.stack([rng.integers(5, 250, 18), rng.integers(5, 170, 18)], 1)
    points[rng.random(18) < 0.15] = -1
    drawn, heat = (f(points, (SIDE, SIDE), PICTURE) for f in (draw_pose_from_cords, cords_to_map))
    maps = torch.from_numpy(np.concatenate([drawn / 255, heat], -1)).float().permute(2, 0, 1)[None]
    seen = torch.from_numpy(points[:, :1] >= 0)
    body = torch.cat([torch.from_numpy(points[:, ::-1] / PICTURE[::-1]) * seen, seen], -1)[None].float()

    generator = torch.Generator().manual_seed(1)
    image = torch.rand((1, 3, SIDE, SIDE), generator=generator)
    noise = torch.randn((1, 4, SIDE // 4, SIDE // 4), generator=generator)
    scheduler = diffusers.DDPMScheduler.from_pretrained(str(clone / config.MODEL.SCHEDULER_CONFIG.PRETRAINED_PATH))
    watched, accelerator = Watched(scheduler), SimpleNamespace(autocast=nullcontext)
    config.TEST.NUM_INFERENCE_STEPS = STEPS
    config.TEST.DOWN_BLOCK_GUIDANCE_SCALE, config.TEST.FULL_GUIDANCE_SCALE = SCALES
    tokens, pose, biases = encoders({"img_cond": image * 2 - 1, "pose_img": maps})
    torch.manual_seed(SEED)
    decoded = sample(config, torch.float32, accelerator, scheduler, vae, unet, noise, tokens, pose, biases)
    results = {"tokens": tokens, "pose": pose, "biases": biases, "decoded": decoded}
    common.save(work, "run", watched, image=image, maps=maps, body=body, **results)


class Unused(ModuleType):
    """A module of which nothing is used: whatever is imported from it is an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def cpu_attention(settings: dict) -> None:
    """CFLD's UNet from settings, not from a download; on plain torch, not on xformers' kernel, which needs a GPU."""
    import models.unet as module
    from diffusers.models.attention_processor import Attention

    def attend(q, k, v, attn_bias, op, scale):
        return torch.stack([torch.softmax(scale * a @ b.mT, -1) @ c for a, b, c in zip(q, k, v, strict=True)])

    def switch_on(unet):
        for part in unet.modules():
            if isinstance(part, module.ResidualAttention):
                part.set_processor(module.ResidualXFormersAttnProcessor())

    Attention.set_use_memory_efficient_attention_xformers = lambda *_, **__: None
    net = module.ResidualUNet2DConditionModel
    net.from_pretrained = lambda *_, **__: net.from_config(settings)
    net.enable_xformers_memory_efficient_attention = switch_on
    module.xformers = SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attend))


def reduce(config: SimpleNamespace) -> None:
    """Its widths and depths; sizes in pixels and the topology stay."""
    backbone, detail = config.MODEL.COND_STAGE_CONFIG, config.MODEL.APPEARANCE_GUIDANCE_CONFIG
    pose, decoder = config.MODEL.POSE_GUIDANCE_CONFIG, config.MODEL.DECODER_CONFIG
    backbone.EMBED_DIM, backbone.DEPTHS, backbone.NUM_HEADS = 32, [2, 2, 2, 2], [1, 2, 4, 8]
    levels = {"INNER_DIMS": (32, 64, 128), "CTX_DIMS": WIDTHS[:3], "EMBED_DIMS": (32, 64, 64), "HEADS": (1, 2, 2)}
    for name, widths in levels.items():
        setattr(detail, name, [width for width in widths for _ in range(3)])
    detail.DEPTH = decoder.DEPTH = 2
    pose.IN_CHANNELS, pose.CHANNELS = WIDTHS[0], list(WIDTHS[:3])
    decoder.CTX_DIM, decoder.HEADS = TOKENS, TOKENS // 32


def ours(work: Path) -> list[Row]:
    from truepose_core.models.cfld.encoder import pose_maps
    from truepose_core.models.cfld.model import CFLDSource, load_cfld
    from truepose_core.pipeline.cfld import CFLDPipeline

    out = common.convert([work / f"{name}.bin" for name in (ENCODERS, UNET)], work / "cfld.safetensors")
    run, model = common.load(work, "run"), load_cfld(out, work / "vae")
    condition, pose = model.encoder.encode_source(run["image"]), model.encoder.encode_pose(run["maps"])
    # The original's rows: without the source, and with it. It counts blocks from the end.
    tokens = [model.no_source(1).tokens, condition.tokens]
    theirs = [run["biases"][f"block_{11 - i}_cross_attn_q"] for i in range(len(model.config.sites))]

    pipe = CFLDPipeline.from_model(model)
    pipe.set_progress_bar_config(disable=True)
    watched = Watched(pipe.scheduler)
    # Both sides read the original's drawing of the pose; ours is compared in a row of its own.
    with patch("truepose_core.models.cfld.model.pose_maps", lambda body, side: run["maps"]):
        pipe(
            CFLDSource(condition, PICTURE),
            run["body"],
            num_inference_steps=STEPS,
            guidance_pose=SCALES[0],
            guidance_source=SCALES[1],
            latents=run["latents"][0],
            seed=SEED,
        )
    maps = pose_maps(run["body"], SIDE)
    drawing = (maps - run["maps"])[:, :3].abs().mean() / run["maps"][:, :3].mean()
    moved = [(a - b).norm() / b.norm() for a, b in zip(model.encoder.encode_pose(maps), pose, strict=True)]
    print(
        f"\nThe drawn skeleton, which this package paints without OpenCV, differs by {drawing:.1%} of its mean and "
        f"moves the pose features by {', '.join(f'{x:.1%}' for x in moved)}."
    )
    return [
        Row("source tokens, without and with a source", tokens, list(run["tokens"].split(1))),
        Row("query biases, 9 sites", [condition.biases[site] for site, _ in model.config.sites], theirs),
        Row("pose features, 3 levels", pose, run["pose"]),
        *common.step_rows(watched, run),
        Row("decoded picture", [model.codec.decode(watched.latents[-1])], [run["decoded"]]),
        Row("heat maps of the pose", [maps[:, 3:]], [run["maps"][:, 3:]]),
    ]


if __name__ == "__main__":
    sys.exit(common.main("CFLD", original, ours))
