"""CFLD: its encoders and its guided step against plain torch, its two files, HPFA on top."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.functional import avg_pool2d, gelu, group_norm, layer_norm, silu

from truepose_core.errors import TruePoseError
from truepose_core.importing.convert import convert, find
from truepose_core.importing.families.cfld import CFLD, shapes_of
from truepose_core.models.cfld.encoder import CFLDConfig, CFLDEncoder, cfld_frame, pose_maps
from truepose_core.models.cfld.model import CFLDModel, load_cfld
from truepose_core.models.codec import VAECodec
from truepose_core.models.config import SD_SCHEDULE
from truepose_core.models.store import save_model
from truepose_core.parsing import HumanParsing
from truepose_core.pipeline.cfld import CFLDPipeline
from truepose_core.weights.reading import TensorInfo
from truepose_core.weights.strict import read_metadata

CLOSE = 1e-4
SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
}
FULL = CFLDConfig(unet=SD15, scheduler=dict(SD_SCHEDULE))
SMALL = CFLDConfig(
    unet={
        **SD15,
        "sample_size": 16,
        "block_out_channels": [32, 64, 64, 64],
        "cross_attention_dim": 64,
        "layers_per_block": 1,
    },
    size=128,
    swin_width=32,
    swin_depths=(2, 2, 2, 1),
    swin_window=4,
    detail_widths=(32, 32, 64),
    detail_depth=1,
    tokens=4,
    decoder_depth=1,
    pose_widths=(32, 64, 64),
    scheduler=dict(SD_SCHEDULE),
)


@cache
def vae() -> VAECodec:
    from diffusers import AutoencoderKL

    torch.manual_seed(5)
    return VAECodec(
        AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
        ).eval()
    )


@cache
def model() -> CFLDModel:
    torch.manual_seed(0)
    made = CFLDModel(SMALL, vae()).eval()
    with torch.no_grad():
        for name, x in made.encoder.named_parameters():
            # Training starts some of them at zero; here everything has a say.
            x.normal_(std=x[0].numel() ** -0.5 if x.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                x.add_(1)
    return made.requires_grad_(False)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bodies(count: int, seed: int = 0) -> torch.Tensor:
    return torch.cat([0.1 + 0.8 * random(count, 18, 2, seed=seed), torch.ones(count, 18, 1)], -1)


def parsing(count: int, height: int, width: int) -> HumanParsing:
    labels = torch.zeros(count, height, width, dtype=torch.long)
    labels[:, height // 4 :, width // 4 :] = 3
    return HumanParsing.from_labels(labels)


# The encoders, in a few lines of plain torch over the same weights.


def attention(w: dict, x: torch.Tensor, source: torch.Tensor, width: int = 32) -> torch.Tensor:
    q, k, v = x @ w["to_q.weight"].mT, source @ w["to_k.weight"].mT, source @ w["to_v.weight"].mT
    heads = [
        (a @ b.mT / width**0.5).softmax(-1) @ c
        for a, b, c in zip(*(t.split(width, -1) for t in (q, k, v)), strict=True)
    ]
    return torch.cat(heads, -1) @ w["to_out.0.weight"].mT + w["to_out.0.bias"]


def norm(w: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def feed_forward(w: dict, x: torch.Tensor) -> torch.Tensor:
    x, gate = (x @ w["net.0.proj.weight"].mT + w["net.0.proj.bias"]).chunk(2, -1)
    return (x * gelu(gate)) @ w["net.2.weight"].mT + w["net.2.bias"]


def part(w: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): x for k, x in w.items() if k.startswith(prefix)}


def swin_block(w: dict, x: torch.Tensor, side: int, heads: int, shift: bool) -> torch.Tensor:
    """Windows by a mask over all pairs: two cells see each other if they lie in the same window of the shifted grid,
    which does not wrap around the edge. A window is never larger than the grid, and one window is not shifted."""
    window = min(SMALL.swin_window, side)
    offset = window // 2 if shift and side > window else 0
    y, x_ = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([y.flatten(), x_.flatten()], -1)
    cell = (place - offset).div(window, rounding_mode="floor")
    apart = (cell[:, None] != cell).any(-1)
    step = (place[:, None] - place + window - 1).clamp(0, 2 * window - 2)
    bias = w["attn.relative_position_bias_table"][step[..., 0] * (2 * window - 1) + step[..., 1]]
    qkv = norm(w, "norm1", x) @ w["attn.qkv.weight"].mT + w["attn.qkv.bias"]
    out = []
    for h, (q, k, v) in enumerate(zip(*(t.chunk(heads, -1) for t in qkv.chunk(3, -1)), strict=True)):
        logits = q @ k.mT / q.shape[-1] ** 0.5 + bias[..., h]
        out.append(logits.masked_fill(apart, -torch.inf).softmax(-1) @ v)
    x = x + torch.cat(out, -1) @ w["attn.proj.weight"].mT + w["attn.proj.bias"]
    y = gelu(norm(w, "norm2", x) @ w["mlp.fc1.weight"].mT + w["mlp.fc1.bias"])
    return x + y @ w["mlp.fc2.weight"].mT + w["mlp.fc2.bias"]


def swin(w: dict, image: torch.Tensor) -> list[torch.Tensor]:
    """The features of every stage [B, N, C], before its downsampling."""
    x = nn.functional.conv2d(image * 2 - 1, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=4)
    side, features = x.shape[-1], []
    x = norm(w, "patch_embed.norm", x.flatten(2).mT)
    for stage, depth in enumerate(SMALL.swin_depths):
        if stage:
            grid = x.unflatten(1, (side, side))
            quarters = [grid[:, i::2, j::2].flatten(1, 2) for j in (0, 1) for i in (0, 1)]
            side //= 2
            down = part(w, f"layers.{stage}.downsample.")
            x = norm(down, "norm", torch.cat(quarters, -1)) @ down["reduction.weight"].mT
        for i in range(depth):
            x = swin_block(part(w, f"layers.{stage}.blocks.{i}."), x, side, 2**stage, shift=i % 2 == 1)
        features.append(x)
    return features


@torch.no_grad()
def test_the_source_encoder_is_its_formulas():
    image, weights = random(2, 3, 64, 64), dict(model().encoder.named_parameters())
    condition = model().encoder.encode_source(image)
    features = swin(part(weights, "backbone."), image)
    for i, (site, level) in enumerate(SMALL.sites):
        w = part(weights, "appearance_encoder.")
        x = features[level] @ w[f"zero_conv_ins.{i}.weight"][..., 0, 0].mT + w[f"zero_conv_ins.{i}.bias"]
        block = part(w, f"blocks.{i}.0.")
        for name in ("1", "2"):
            y = norm(block, f"norm{name}", x)
            x = x + attention(part(block, f"attn{name}."), y, y)
        x = x + feed_forward(part(block, "ff."), norm(block, "norm3", x))
        x = x @ w[f"zero_conv_outs.{i}.weight"][..., 0, 0].mT + w[f"zero_conv_outs.{i}.bias"]
        assert (condition.biases[site] - x).abs().max() < CLOSE, site
    w = part(weights, "decoder.")
    block, source, x = part(w, "blocks.0."), features[-1] + w["kv_pos_embed"], w["query_feat"].expand(2, -1, -1)
    x = x + w["pos_embed"]
    x = x + attention(part(block, "attn2."), norm(block, "norm2", x), source)
    x = x + w["pos_embed"]
    y = norm(block, "norm1", x)
    x = x + attention(part(block, "attn1."), y, y)
    x = x + feed_forward(part(block, "ff."), norm(block, "norm3", x))
    assert (condition.tokens - x).abs().max() < CLOSE


@torch.no_grad()
def test_the_pose_encoder_is_its_formulas():
    maps, w = random(2, 21, 64, 64), part(dict(model().encoder.named_parameters()), "pose_encoder.")

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = w[f"{name}.weight"]
        return nn.functional.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    blocks = maps.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    x = conv("conv_in", blocks)
    for i, found in enumerate(model().encoder.encode_pose(maps)):
        x, name = avg_pool2d(x, 2) if i else x, f"resnets.{i}"
        y = conv(f"{name}.conv1", silu(group_norm(x, 32, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"], 1e-6)))
        y = conv(f"{name}.conv2", silu(group_norm(y, 32, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"], 1e-6)))
        x = (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x) + y
        assert (found - x).abs().max() < CLOSE


@torch.no_grad()
def test_a_guided_step_is_the_plain_unet_with_three_rows():
    """Rows: nothing; pose; pose and source. The bias goes on what to_q gives, the pose on each level's last block."""
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(**SMALL.unet).eval()
    net.load_state_dict(model().target_net.state_dict())
    condition = model().encoder.encode_source(random(1, 3, 64, 64))
    body = bodies(1)
    features = model().encoder.encode_pose(pose_maps(body, 64))
    for site, bias in condition.biases.items():
        rows = torch.cat([torch.zeros_like(bias), torch.zeros_like(bias), bias])
        net.get_submodule(site).attn2.to_q.register_forward_hook(lambda _, args, out, rows=rows: out + rows)
    for level, x in enumerate(features):
        rows = torch.cat([torch.zeros_like(x), x, x])
        net.down_blocks[level].attentions[-1].register_forward_hook(
            lambda _, args, out, rows=rows: (out[0] + rows,) if isinstance(out, tuple) else out + rows
        )
    null = model().encoder.learnable_vector
    latent = random(1, 4, 16, 16, seed=1) * 2 - 1
    e0, e_pose, e_full = net(
        latent.expand(3, -1, -1, -1), torch.tensor(500), torch.cat([null, null, condition.tokens])
    ).sample.chunk(3)
    expected = e0 + 1.7 * (e_pose - e0) + 2.6 * (e_full - e_pose)

    seen = []
    pipe = quiet()
    scheduler_step = pipe.scheduler.step
    pipe.scheduler.step = lambda e, t, x, **extra: (seen.append((e, int(t))), scheduler_step(e, t, x, **extra))[1]
    pipe.scheduler.set_timesteps = lambda steps, device: setattr(pipe.scheduler, "timesteps", torch.tensor([500]))
    source = pipe.encode_source(random(1, 3, 64, 44))
    source = replace(source, condition=condition)
    pipe(source, body, guidance_pose=1.7, guidance_source=2.6, latents=latent)
    ((found, t),) = seen
    assert t == 500 and (found - expected).abs().max() < CLOSE
    assert min((a - b).abs().max() for a, b in ((e0, e_pose), (e_pose, e_full))) > 1e-2


def quiet() -> CFLDPipeline:
    pipe = CFLDPipeline.from_model(model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_steps_are_those_of_its_test_run():
    pipe = quiet()
    pipe.scheduler.set_timesteps(FULL.steps)
    assert pipe.scheduler.timesteps.tolist() == [20 * i + 1 for i in reversed(range(50))]
    assert (FULL.guidance_pose, FULL.guidance_source) == (2.0, 2.0)


# Pose maps.


def test_pose_maps_have_a_bump_per_keypoint_and_nothing_for_a_missing_one():
    body = bodies(2)
    body[1, 4, 2] = 0
    maps = pose_maps(body, 256)
    x, y = (int(v) for v in body[0, 7, :2] * 256)
    heat = maps[0, 3 + 7]
    assert heat[y, x] == 1 and heat.argmax() == 256 * y + x
    assert abs(heat[y, x - 6 if x > 6 else x + 6].item() - torch.tensor(-0.5).exp().item()) < 1e-6
    assert not maps[1, 3 + 4].any() and maps[0, 3 + 4].any()
    assert maps[:, :3].amax() <= 1 and maps[:, :3].amin() == 0


def test_pose_maps_look_as_opencv_draws_them():
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    from truepose_core.pose.keypoints import LIMBS

    # A wheel of 18 hues: from red over green and blue back to red, in steps of a third of 255.
    up, full, none = [0, 85, 170], [255] * 3, [0] * 3
    down = [255, 170, 85]
    red = [*full, *down, *none, *none, *up, *full]
    green = [*up, *full, *full, *down, *none, *none]
    blue = [*none, *none, *up, *full, *full, *down]
    colors = list(zip(red, green, blue, strict=True))
    body = bodies(1, seed=3)
    points = [(int(x), int(y)) for x, y in (body[0, :, :2] * 256).tolist()]
    picture = np.zeros((256, 256, 3), np.uint8)
    for (a, b), color in zip(LIMBS, colors, strict=False):
        cv2.line(picture, points[a], points[b], [int(0.6 * c) for c in color], 2, cv2.LINE_AA)
    for point, color in zip(points, colors, strict=True):
        cv2.circle(picture, point, 3, color, -1, cv2.LINE_AA)
    drawn = torch.tensor(picture).permute(2, 0, 1) / 255
    assert (pose_maps(body, 256)[0, :3] - drawn).abs().mean() < 0.05 * drawn.mean()


def test_pictures_of_its_aspect_ratio_are_squashed_and_others_padded_to_it():
    for size in ((256, 176), (1101, 750), (512, 352)):
        assert cfld_frame(size, 512).size_padded == size
    for size in ((512, 512), (768, 512), (400, 900)):
        height, width = cfld_frame(size, 512).size_padded
        assert width / height == 11 / 16 and height >= size[0] and width >= size[1]
    frame = cfld_frame((300, 300), 512)
    picture = torch.nn.functional.interpolate(random(1, 3, 10, 10), (300, 300), mode="bicubic").clamp(0, 1)
    assert (frame.restore(frame.apply(picture)) - picture).abs().mean() < 0.02


# The pipeline and HPFA.


def run(source: object, target: torch.Tensor, **options: object) -> torch.Tensor:
    options = {"num_inference_steps": 2, "seed": 3, **options}
    return quiet()(source, target, **options).images


def test_the_picture_has_the_size_asked_for_and_depends_on_source_pose_and_seed():
    image = random(1, 3, 96, 66)
    first = run(image, bodies(1))
    assert first.shape == (1, 3, 96, 66) and torch.equal(first, run(image, bodies(1)))
    assert run(image, bodies(1), height=50, width=70).shape == (1, 3, 50, 70)
    for other in (run(image.flip(1), bodies(1)), run(image, bodies(1, seed=1)), run(image, bodies(1), seed=4)):
        assert (first - other).abs().max() > 1e-3


def test_sources_times_poses_equal_one_by_one():
    images, poses = random(2, 3, 64, 44), bodies(4)
    options = dict(strength=1.0, beta=1.0, source_parsing=parsing(2, 64, 44), source_body=bodies(2, seed=2))
    together = run(images, poses, seed=[0, 1, 2, 3], **options)
    for i in (0, 3):
        s = slice(i // 2, i // 2 + 1)
        alone = dict(options, source_parsing=options["source_parsing"][i // 2], source_body=options["source_body"][s])
        assert (run(images[s], poses[i : i + 1], seed=i, **alone) - together[i]).abs().max() < 1e-3


@pytest.mark.parametrize("off", [dict(strength=0.0), dict(strength=1.0, region_weights=torch.zeros(7))])
def test_hpfa_that_weighs_nothing_is_cfld_bit_for_bit(off):
    image = random(1, 3, 64, 44)
    given = dict(source_parsing=parsing(1, 64, 44), source_body=bodies(1, seed=2))
    plain = run(image, bodies(1))
    assert torch.equal(run(image, bodies(1), **given, **off), plain)
    assert (run(image, bodies(1), **given, strength=1.0) - plain).abs().max() > 1e-4


@torch.no_grad()
def test_hpfa_at_beta_0_joins_keys_and_values_of_the_source():
    """K/V concatenation (AnimateAnyone's), by hand in every self-attention of a plain UNet."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention import BasicTransformerBlock

    condition = model().encoder.encode_source(random(1, 3, 64, 64))
    features = model().encode_features(random(1, 3, 128, 128), parsing(1, 128, 128), None, condition)
    call = model().target_pass(condition, features, bodies(1))
    latent, when = random(1, 4, 16, 16), torch.tensor([300])
    found = model().denoise(latent, when, call, condition.tokens, None)

    net = UNet2DConditionModel(**SMALL.unet).eval()
    net.load_state_dict(model().target_net.state_dict())

    class Joined:
        def __init__(self, source: torch.Tensor):
            self.source = source

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            both = torch.cat([hidden_states, self.source], 1)
            q, k, v = attn.to_q(hidden_states), attn.to_k(both), attn.to_v(both)
            heads = zip(*(t.chunk(attn.heads, -1) for t in (q, k, v)), strict=True)
            out = torch.cat([(a @ b.mT * attn.scale).softmax(-1) @ c for a, b, c in heads], -1)
            return attn.to_out[0](out)

    for name, block in net.named_modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1.set_processor(Joined(features.sites[name]))
            if name in condition.biases:
                block.attn2.to_q.register_forward_hook(lambda _, a, out, bias=condition.biases[name]: out + bias)
    assert (net(latent, when, condition.tokens).sample - found).abs().max() < CLOSE


# The two files.


def original(config: CFLDConfig) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the two published files of a model of this size."""
    encoders, unet, window = {}, {}, config.swin_window
    for name, shape in shapes_of(config).items():
        net, _, key = name.partition(".")
        if net == "target_net":
            unet[f"model.{key}"] = shape
            continue
        for i in range(1, 4):
            key = key.replace(f"layers.{i}.downsample", f"layers.{i - 1}.downsample")
        encoders[key] = shape
    for stage, depth in enumerate(config.swin_depths):
        side = config.encoder_size // 4 // 2**stage
        tokens = min(window, side) ** 2
        for i in range(depth):
            stem = f"backbone.layers.{stage}.blocks.{i}"
            encoders[f"{stem}.attn.relative_position_index"] = (tokens, tokens)
            if i % 2 and side > window:
                encoders[f"{stem}.attn_mask"] = ((side // window) ** 2, tokens, tokens)
    return [encoders, unet]


def infos(*files: dict[str, tuple[int, ...]]) -> list[dict[str, TensorInfo]]:
    return [{key: TensorInfo(shape, "F32") for key, shape in file.items()} for file in files]


def planned(files: list[dict[str, TensorInfo]]):
    family = CFLD()
    return family.plan([p for i, f in enumerate(files) for p in family.recognise(i, f)], files, {})


@pytest.mark.parametrize("config", [SMALL, FULL])
def test_the_published_files_convert_with_nothing_missing_and_nothing_unexplained(config):
    files = infos(*original(config))
    plan = planned(files)
    assert CFLDConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in plan.config.items()}) == config
    assert {name: files[f][key].shape for name, (f, key) in plan.tensors.items()} == plan.expected
    every = {(i, key) for i, file in enumerate(files) for key in file}
    assert set(plan.tensors.values()) | set(plan.ignored) == every
    assert all(key.endswith(("relative_position_index", "attn_mask")) for _, key in plan.ignored)
    if config is FULL:
        # As counted in the published model's own modules.
        assert (len(files[0]), len(files[1]), len(plan.ignored)) == (1301, 686, 26)
        assert files[0]["learnable_vector"].shape == (1, 16, 768)
        assert files[0]["pose_encoder.conv_in.weight"].shape == (320, 336, 1, 1)


def test_the_order_of_the_files_and_a_prefix_do_not_matter():
    encoders, unet = original(SMALL)
    there = planned(infos(encoders, unet))
    back = planned(
        infos({f"student.{k}": v for k, v in unet.items()}, {f"student.{k}": v for k, v in encoders.items()})
    )
    assert there.config == back.config and list(there.tensors) == list(back.tensors)
    assert all(back.tensors[name] == (1 - file, f"student.{key}") for name, (file, key) in there.tensors.items())


def without(files: list[dict], file: int, *names: str) -> list[dict]:
    files[file] = {k: v for k, v in files[file].items() if not k.startswith(names)}
    return files


def changed(files: list[dict], file: int, name: str, shape: tuple[int, ...]) -> list[dict]:
    assert name in files[file]
    files[file][name] = shape
    return files


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda f: f[:1], r"two files.*only its encoders.*add its UNet"),
        (lambda f: f[1:], r"two files.*only its UNet.*add its encoders"),
        (lambda f: [*f, f[0]], r"file 0 and file 2 each"),
        (lambda f: without(f, 0, "decoder.kv_pos_embed"), r"lack decoder.kv_pos_embed.*ablation"),
        (lambda f: without(f, 1, "model.up_blocks.1", "model.down_blocks.3"), r"3 levels.*expected"),
        (lambda f: changed(f, 0, "learnable_vector", (1, 4, 96)), r"width 96.*reads 64.*do not belong together"),
        (lambda f: changed(f, 0, "pose_encoder.conv_in.weight", (32, 48, 1, 1)), r"48 channels; expected 336"),
        (lambda f: changed(f, 0, "pose_encoder.resnets.1.conv2.weight", (32, 32, 3, 3)), r"widths \(32, 32, 64\)"),
        (lambda f: changed(f, 1, "model.conv_in.weight", (32, 9, 3, 3)), r"9 input channels; expected"),
    ],
)
def test_wrong_files_are_named(wrong, message):
    with pytest.raises(TruePoseError, match=message):
        planned(infos(*wrong(original(SMALL))))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The small model as two pickles, a VAE folder, and the converted file."""
    folder = tmp_path_factory.mktemp("cfld")
    state = {k: v for k, v in model().state_dict().items() if not k.startswith("codec.")}
    plan = planned(infos(*original(SMALL)))
    files = [{}, {}]
    for name, (file, key) in plan.tensors.items():
        files[file][key] = state[name]
    for file, key in plan.ignored:
        files[file][key] = torch.zeros(1, dtype=torch.long)
    paths = [folder / "one.bin", folder / "two.bin"]
    for path, tensors in zip(paths, files, strict=True):
        torch.save(tensors, path)
    vae().vae.save_pretrained(folder / "sd" / "vae", safe_serialization=True)
    convert(paths, folder / "cfld.safetensors")
    return folder, paths, state


def test_convert_load_save_load_keeps_tensors_and_hash(pair):
    folder, _, state = pair
    loaded = load_cfld(folder / "cfld.safetensors", vae=folder / "sd")
    for name, x in loaded.state_dict().items():
        assert name.startswith("codec.") or torch.equal(x, state[name]), name
    assert loaded.config == SMALL
    save_model(loaded, folder / "again.safetensors")
    again = read_metadata(folder / "again.safetensors")
    first = read_metadata(folder / "cfld.safetensors")
    assert again["sha256"] == first["sha256"] and first["family"] == "cfld"
    with safe_open(str(folder / "again.safetensors"), framework="pt") as file:
        assert set(file.keys()) == set(state)
    images = CFLDPipeline.from_model(load_cfld(folder / "again.safetensors", vae=folder / "sd"))
    images.set_progress_bar_config(disable=True)
    image = random(1, 3, 64, 44)
    options = dict(num_inference_steps=2, seed=3)
    assert torch.equal(images(image, bodies(1), **options).images, run(image, bodies(1)))


def test_files_are_told_from_others(pair):
    _, paths, _ = pair
    assert find(paths).plan.family == "cfld"
    for path, words in zip(paths, ("pytorch_model_1.bin", "learnable_vector"), strict=True):
        with pytest.raises(TruePoseError, match=words):
            find([path])


def test_loading_says_what_is_missing(pair, tmp_path):
    folder, _, _ = pair
    with pytest.raises(TruePoseError, match="--vae FOLDER"):
        load_cfld(folder / "cfld.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TruePoseError, match="convert CFLD's two files"):
        load_cfld(tmp_path / "other.safetensors", vae=folder / "sd")
    with pytest.raises(TruePoseError, match="kind 'x'"):
        replace(SMALL, kind="x")
    with pytest.raises(TruePoseError, match="unknown settings: what"):
        CFLDConfig.from_json('{"unet": {}, "what": 1}')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(strength=1.0), "needs the source's human parsing"),
        (dict(strength=2.0), "strength is 2.0"),
        (dict(guidance_pose=-1.0), "guidance_pose is -1.0"),
        (dict(num_inference_steps=0), "0 sampling steps"),
        (dict(height=64), "both height and width"),
        (dict(seed=[1, 2, 3]), "3 seeds for 1"),
        (dict(latents=torch.zeros(1, 4, 8, 8)), r"latents are \(1, 4, 8, 8\)"),
        (dict(strength=1.0, source_parsing=parsing(1, 60, 44)), "44x60"),
    ],
)
def test_wrong_calls_are_named(options, message):
    with pytest.raises(TruePoseError, match=message):
        run(random(1, 3, 64, 44), bodies(1), **options)


def test_wrong_shapes_are_named():
    encoder: CFLDEncoder = model().encoder
    with pytest.raises(TruePoseError, match=r"\(1, 3, 32, 64\); expected \[B, 3, 64, 64\]"):
        encoder.encode_source(random(1, 3, 32, 64))
    with pytest.raises(TruePoseError, match=r"expected \[B, 21, 64, 64\]"):
        encoder.encode_pose(random(1, 3, 64, 64))
    with pytest.raises(TruePoseError, match=r"expected \[B, 18, 3\]"):
        pose_maps(torch.zeros(18, 3), 64)
    with pytest.raises(TruePoseError, match="without its parsing"):
        pipe = quiet()
        pipe(pipe.encode_source(random(1, 3, 64, 44)), bodies(1), strength=1.0)
