"""IP-Adapter as a CAA: with one region it is the original, with several each region is read alone."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, one_hot

from truepose_core.errors import TruePoseError
from truepose_core.models import ip_adapter
from truepose_core.models.ip_adapter import (
    RegionAdapter,
    adapter_order,
    layer_of_site,
    load_adapter,
    patch_rows,
    person_square,
    recognise,
    region_pictures,
)
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

CONTEXT, EMBED, TOKENS = 48, 24, 4
WIDTHS = (32, 64, 64, 32, 64)
FACE, HAIR, UPPER = int(Region.FACE), int(Region.HAIR), int(Region.UPPER)


def shapes(plus: bool, embed=EMBED, context=CONTEXT, tokens=TOKENS, widths=WIDTHS, dim=128, depth=2) -> dict:
    """Key -> shape, as the original's state dict has them."""
    found = {}
    for i, width in enumerate(widths):
        for part in "kv":
            found[f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight"] = (width, context)
    if not plus:
        found["image_proj.proj.weight"] = (tokens * context, embed)
        found["image_proj.proj.bias"] = (tokens * context,)
        found["image_proj.norm.weight"] = found["image_proj.norm.bias"] = (context,)
        return found
    found["image_proj.latents"] = (1, tokens, dim)
    found["image_proj.proj_in.weight"], found["image_proj.proj_in.bias"] = (dim, embed), (dim,)
    found["image_proj.proj_out.weight"], found["image_proj.proj_out.bias"] = (context, dim), (context,)
    found["image_proj.norm_out.weight"] = found["image_proj.norm_out.bias"] = (context,)
    for i in range(depth):
        layer = f"image_proj.layers.{i}"
        for name in ("0.norm1", "0.norm2", "1.0"):
            found[f"{layer}.{name}.weight"] = found[f"{layer}.{name}.bias"] = (dim,)
        found[f"{layer}.0.to_q.weight"] = found[f"{layer}.0.to_out.weight"] = (dim, dim)
        found[f"{layer}.0.to_kv.weight"] = (2 * dim, dim)
        found[f"{layer}.1.1.weight"], found[f"{layer}.1.3.weight"] = (4 * dim, dim), (dim, 4 * dim)
    return found


def tensors(plus: bool, seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes(plus, **sizes).items():
        spread = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        made[name] = torch.randn(shape, generator=g) * spread + (len(shape) == 1 and name.endswith("weight"))
    return made


def seen(plus: bool, batch: int = 2, count: int = 17, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn((batch, count if plus else 7, EMBED), generator=g)


def whole(region: int, count: int = 16, batch: int = 2) -> torch.Tensor:
    return one_hot(torch.full((batch, count), region), 7).float()


def resampler_by_hand(w: dict[str, torch.Tensor], x: torch.Tensor, times: int = 1) -> torch.Tensor:
    """The published resampler, in plain arithmetic. times: how often the queries stand among what is read."""
    w = {name.removeprefix("image_proj."): value for name, value in w.items()}

    def norm(name: str, value: torch.Tensor) -> torch.Tensor:
        return layer_norm(value, value.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    latents = w["latents"].expand(x.shape[0], -1, -1)
    x = x @ w["proj_in.weight"].T + w["proj_in.bias"]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    for i in range(depth):
        at = f"layers.{i}"
        a, b = norm(f"{at}.0.norm1", x), norm(f"{at}.0.norm2", latents)
        q = b @ w[f"{at}.0.to_q.weight"].T
        k, v = (torch.cat([a] + times * [b], 1) @ w[f"{at}.0.to_kv.weight"].T).chunk(2, -1)
        heads = []
        for part in range(q.shape[-1] // 64):
            at_head = slice(64 * part, 64 * part + 64)
            logits = q[..., at_head] @ k[..., at_head].mT / 8
            heads.append(logits.softmax(-1) @ v[..., at_head])
        latents = latents + torch.cat(heads, -1) @ w[f"{at}.0.to_out.weight"].T
        inner = gelu(norm(f"{at}.1.0", latents) @ w[f"{at}.1.1.weight"].T)
        latents = latents + inner @ w[f"{at}.1.3.weight"].T
    return norm("norm_out", latents @ w["proj_out.weight"].T + w["proj_out.bias"])


def original(plus: bool, w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The original's tokens of one picture: x [B, P, embed] or [B, embed]."""
    if plus:
        return resampler_by_hand(w, x)
    tokens = (x @ w["image_proj.proj.weight"].T + w["image_proj.proj.bias"]).unflatten(-1, (TOKENS, CONTEXT))
    return layer_norm(tokens, (CONTEXT,), w["image_proj.norm.weight"], w["image_proj.norm.bias"])


@pytest.mark.parametrize("plus", [True, False])
def test_one_region_over_the_whole_picture_is_the_original(plus: bool) -> None:
    w, x = tensors(plus), seen(plus)
    tokens = RegionAdapter.from_tensors(w)(x, whole(UPPER))
    by_region = tokens.tokens.unflatten(1, (7, TOKENS))
    expected = original(plus, w, x if plus else x[:, UPPER])
    assert (by_region[:, UPPER] - expected).abs().max() < 1e-5
    others = [r for r in range(7) if r != UPPER]
    assert (by_region[:, others] == 0).all()
    shown = tokens.shown.unflatten(1, (7, TOKENS))
    assert shown[:, UPPER].all() and not shown[:, others].any()


@pytest.mark.parametrize("plus", [True, False])
def test_one_region_is_what_diffusers_computes(plus: bool) -> None:
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    w, x = tensors(plus, depth=4), seen(plus)  # diffusers knows resamplers of four layers
    half = {name.removeprefix("image_proj."): value for name, value in w.items() if name.startswith("image_proj.")}
    theirs = UNet2DConditionLoadersMixin()._convert_ip_adapter_image_proj_to_diffusers(half, low_cpu_mem_usage=False)
    tokens = RegionAdapter.from_tensors(w)(x, whole(FACE)).tokens.unflatten(1, (7, TOKENS))[:, FACE]
    with torch.no_grad():
        assert (tokens - theirs(x if plus else x[:, FACE])).abs().max() < 1e-5


def two_regions() -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.tensor([FACE, UPPER] * 8)
    return one_hot(index, 7).float().expand(2, -1, -1), index


def test_a_region_is_read_as_if_its_patches_were_the_picture() -> None:
    w, x, (rows, index) = tensors(True), seen(True, count=16), two_regions()
    tokens = RegionAdapter.from_tensors(w)(x, rows).tokens.unflatten(1, (7, TOKENS))
    for region in (FACE, UPPER):
        alone = resampler_by_hand(w, x[:, index == region])
        assert (tokens[:, region] - alone).abs().max() < 1e-5


def test_a_row_is_a_weight_of_its_patch() -> None:
    """A patch of row 1/2 counts as one of two copies does."""
    w, x = tensors(True), seen(True, count=16)
    rows = whole(UPPER)
    rows[:, :4, UPPER], rows[:, :4, HAIR] = 0.5, 0.5
    halved = RegionAdapter.from_tensors(w)(x, rows).tokens.unflatten(1, (7, TOKENS))[:, UPPER]
    doubled = resampler_by_hand(w, torch.cat([x, x[:, 4:]], 1), times=2)
    assert (halved - doubled).abs().max() < 1e-5


def test_the_class_token_belongs_to_a_region_by_its_share_of_the_picture() -> None:
    w, (rows, index) = tensors(True), two_regions()
    x = seen(True, count=17)
    tokens = RegionAdapter.from_tensors(w)(x, rows).tokens.unflatten(1, (7, TOKENS))[:, FACE]
    patches = x[:, 1:][:, index == FACE]
    # Half the picture is the face: the class token once, each patch twice.
    expected = resampler_by_hand(w, torch.cat([x[:, :1], patches, patches], 1), times=2)
    assert (tokens - expected).abs().max() < 1e-5


@pytest.mark.parametrize("plus", [True, False])
def test_the_background_is_never_shown(plus: bool) -> None:
    rows = whole(int(Region.BACKGROUND))
    rows[:, :8], rows[:, 8:10] = whole(FACE)[:, :8], whole(HAIR)[:, 8:10]
    tokens = RegionAdapter.from_tensors(tensors(plus))(seen(plus), rows)
    shown = tokens.shown.unflatten(1, (7, TOKENS)).all(2)
    assert shown[0].tolist() == [r in (FACE, HAIR) for r in range(7)]
    assert (tokens.tokens[~tokens.shown] == 0).all()
    assert (tokens.tokens[tokens.shown] != 0).any(-1).all()


@pytest.mark.parametrize("plus", [True, False])
def test_a_batch_is_its_items_one_by_one(plus: bool) -> None:
    adapter, x = RegionAdapter.from_tensors(tensors(plus)), seen(plus)
    rows = torch.rand((2, 16, 7), generator=torch.Generator().manual_seed(3)).softmax(-1)
    both = adapter(x, rows).tokens
    for i in range(2):
        assert (adapter(x[i : i + 1], rows[i : i + 1]).tokens - both[i : i + 1]).abs().max() < 1e-5


def test_no_picture_is_what_training_dropped_to() -> None:
    plain, plus = tensors(False), tensors(True)
    nothing = RegionAdapter.from_tensors(plain).no_picture()
    assert (nothing - original(False, plain, torch.zeros(1, EMBED))).abs().max() < 1e-6
    x = seen(True, batch=1)
    assert (RegionAdapter.from_tensors(plus).no_picture(x) - resampler_by_hand(plus, x)).abs().max() < 1e-5


def test_keys_and_values_are_the_layers_in_the_files_order() -> None:
    w = tensors(True)
    adapter, tokens = RegionAdapter.from_tensors(w), torch.randn(1, 3, CONTEXT)
    for number, width in enumerate(WIDTHS):
        k, v = adapter.keys_values(tokens, number)
        assert k.shape == (1, 3, width)
        assert torch.allclose(k, tokens @ w[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"].T)
        assert torch.allclose(v, tokens @ w[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"].T)


def test_the_order_is_that_of_diffusers_processors() -> None:
    from diffusers import UNet2DConditionModel

    from truepose_core.models.processors import attention_sites

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=2,
        transformer_layers_per_block=2,
    )
    theirs = [name.removesuffix(".attn2.processor") for name in unet.attn_processors if "attn2" in name]
    assert adapter_order(attention_sites(unet)) == theirs
    # The original numbers every processor, self-attentions included.
    numbers = [i for i, name in enumerate(unet.attn_processors) if "attn2" in name]
    assert numbers == list(range(1, 2 * len(theirs), 2))
    host = ["input.1.0", "input.2.0", "middle.0.0", "output.3.0", "output.3.1"]
    assert adapter_order(host) == ["input.1.0", "input.2.0", "output.3.0", "output.3.1", "middle.0.0"]


def test_every_site_gets_the_layer_of_its_width() -> None:
    config = recognise(shapes(True))
    names = ["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a", "up_blocks.1.a"]
    sites = dict(zip(names, [(w, CONTEXT) for w in (32, 64, 64, 64, 32)], strict=True))
    assert layer_of_site(config, sites) == dict(zip(adapter_order(names), range(5), strict=True))
    with pytest.raises(TruePoseError, match="made for another model"):
        layer_of_site(config, {**sites, "mid_block.a": (32, CONTEXT)})
    with pytest.raises(TruePoseError, match=r"context width 48.*context width 64"):
        layer_of_site(config, {name: (width, 64) for name, (width, _) in sites.items()})


SD15 = (320, 320, 640, 640, 1280, 1280, *(1280,) * 3, *(640,) * 3, *(320,) * 3, 1280)
SDXL = (*(640,) * 4, *(1280,) * 20, *(1280,) * 30, *(640,) * 6, *(1280,) * 10)
FULL_SIZE = {
    "ip-adapter_sd15": dict(plus=False, embed=1024, context=768, tokens=4, widths=SD15),
    "ip-adapter-plus_sd15": dict(plus=True, embed=1280, context=768, tokens=16, widths=SD15, dim=768, depth=4),
    "ip-adapter_sdxl": dict(plus=False, embed=1280, context=2048, tokens=4, widths=SDXL),
    "ip-adapter-plus_sdxl_vit-h": dict(plus=True, embed=1280, context=2048, tokens=16, widths=SDXL, dim=1280, depth=4),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_sizes_are_recognised_with_every_key(name: str) -> None:
    sizes = FULL_SIZE[name]
    manifest = shapes(**sizes)
    config = recognise(manifest)
    assert config.reads_patches == sizes["plus"]
    assert (config.embed, config.context, config.tokens) == (sizes["embed"], sizes["context"], sizes["tokens"])
    assert config.widths == sizes["widths"]
    assert ip_adapter.SITES[len(config.widths)].startswith("SDXL" if "sdxl" in name else "SD1.5")
    with torch.device("meta"):
        weights = RegionAdapter(config).state_dict()
    assert {key: tuple(x.shape) for key, x in weights.items()} == manifest


def without(plus: bool, *names: str) -> dict:
    return {name: shape for name, shape in shapes(plus).items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (without(True, "image_proj."), "ip_adapter half.*not its image_proj half"),
        (without(True, "ip_adapter."), "image_proj half.*not its ip_adapter half"),
        (without(True, "ip_adapter.3."), "numbered 1, 5, 7, 9; expected 1, 3, 5"),
        (without(True, "image_proj.latents"), "lacks image_proj.latents"),
        ({**shapes(False), "ip_adapter.0.to_q_lora.down.weight": (4, 4)}, "FaceID"),
        ({**without(False, "image_proj.proj"), "image_proj.proj.0.weight": (8, 8)}, "FaceID"),
        ({**without(False, "image_proj"), "image_proj.proj.0.weight": (8, 8)}, "IP-Adapter Full"),
    ],
)
def test_what_cannot_serve_is_named(found: dict, message: str) -> None:
    with pytest.raises(TruePoseError, match=message):
        recognise(found)


def test_other_files_are_not_recognised() -> None:
    assert recognise({"conv_in.weight": (320, 4, 3, 3)}) is None
    with pytest.raises(TruePoseError, match=r"my\.safetensors holds no IP-Adapter.*conv_in\.weight"):
        RegionAdapter.from_tensors({"conv_in.weight": torch.zeros(1)}, "my.safetensors")


def test_loading_is_strict() -> None:
    w = tensors(True)
    with pytest.raises(TruePoseError, match=r"1 missing: image_proj\.layers\.0\.0\.norm1\.bias"):
        RegionAdapter.from_tensors({k: v for k, v in w.items() if k != "image_proj.layers.0.0.norm1.bias"})
    with pytest.raises(TruePoseError, match=r"1 unknown: image_proj\.extra"):
        RegionAdapter.from_tensors({**w, "image_proj.extra": torch.zeros(1)})
    with pytest.raises(TruePoseError, match=r"ip_adapter\.1\.to_v_ip\.weight is"):
        RegionAdapter.from_tensors({**w, "ip_adapter.1.to_v_ip.weight": torch.zeros(8, CONTEXT)})


def test_another_tower_is_named() -> None:
    adapter = RegionAdapter.from_tensors(tensors(True, embed=1280))
    with pytest.raises(TruePoseError, match=r"width 1280 and got 24.*ViT-H/14"):
        adapter(seen(True), whole(FACE))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_of_both_kinds(tmp_path, suffix: str) -> None:
    from safetensors.torch import save_file

    w, path = tensors(True), tmp_path / f"adapter{suffix}"
    if suffix == ".bin":
        halves = {"image_proj": {}, "ip_adapter": {}}
        for name, value in w.items():
            half, _, rest = name.partition(".")
            halves[half][rest] = value
        torch.save(halves, path)
    else:
        save_file({name: value.half() for name, value in w.items()}, path)
    adapter = load_adapter(path)
    assert adapter.dtype == torch.float32
    x, expected = seen(True), RegionAdapter.from_tensors(w)
    tolerance = 1e-5 if suffix == ".bin" else 3e-2
    assert (adapter(x, whole(FACE)).tokens - expected(x, whole(FACE)).tokens).abs().max() < tolerance
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TruePoseError, match="truncated"):
        load_adapter(path)


def figure(height: int, width: int, box: tuple[int, int, int, int]) -> tuple[torch.Tensor, HumanParsing]:
    top, bottom, left, right = box
    labels = torch.zeros(1, height, width, dtype=torch.int64)
    labels[:, top:bottom, left:right] = UPPER
    return torch.rand((1, 3, height, width)), HumanParsing.from_labels(labels)


def test_a_person_that_fills_a_square_picture_is_the_picture() -> None:
    image, parsing = figure(24, 24, (0, 24, 0, 24))
    square, rows = person_square(image, parsing)
    assert torch.equal(square, image) and torch.equal(rows.masks, parsing.masks)
    assert torch.equal(region_pictures(square, rows)[UPPER : UPPER + 1], image)


@pytest.mark.parametrize("box", [(2, 30, 5, 12), (0, 32, 0, 20), (10, 14, 1, 19), (31, 32, 19, 20)])
def test_the_square_holds_the_whole_person(box: tuple[int, int, int, int]) -> None:
    image, parsing = figure(32, 20, box)
    square, rows = person_square(image, parsing)
    side = max(box[1] - box[0], box[3] - box[2])
    assert square.shape == (1, 3, side, side) and rows.size == (side, side)
    inside = rows.masks[0, UPPER] == 1
    assert torch.equal(square[0][:, inside].flatten(), image[0, :, box[0] : box[1], box[2] : box[3]].flatten())
    assert (rows.masks.sum(1) == 1).all()


def test_region_pictures_share_the_picture_out() -> None:
    image, parsing = figure(16, 16, (2, 12, 3, 9))
    pictures = region_pictures(image, parsing)
    assert pictures.shape == (7, 3, 16, 16)
    assert ((pictures - ip_adapter.GREY).sum(0) - (image[0] - ip_adapter.GREY)).abs().max() < 1e-6
    assert (pictures[HAIR] == ip_adapter.GREY).all()


def test_patch_rows_are_those_of_the_towers_grid() -> None:
    _, parsing = figure(16, 16, (0, 8, 0, 16))
    for count in (16, 17):
        assert torch.equal(patch_rows(parsing, count), parsing.tokens(4, 4))
    with pytest.raises(TruePoseError, match="12 tokens; expected a square grid"):
        patch_rows(parsing, 12)
