"""Photo parsers: pre- and postprocessing equal their originals, run here beside ours on the same weights."""

from __future__ import annotations

import json

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from onnx_models import save_add_one, save_parser, save_schp, save_segformer
from PIL import Image
from scipy.ndimage import map_coordinates

from truepose_core.errors import TruePoseError
from truepose_core.networks.onnx import close_sessions
from truepose_core.parsing import onnx as onnx_parser
from truepose_core.parsing.onnx import (
    ATR_LIP,
    MergedParser,
    choose_parser,
    keep_scale,
    label_masks,
    merge_atr_lip,
    open_parser,
    parse_image,
    prepare,
    to_picture,
)
from truepose_core.parsing.spec import BUILT_IN, ParserSpec
from truepose_core.regions import LABEL_SETS, Region

SCHP = {"atr": BUILT_IN["schp-atr"], "lip": BUILT_IN["schp-lip"]}


@pytest.fixture(autouse=True)
def _released():
    yield
    close_sessions()


def picture(height: int, width: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Smooth colours with a little noise, in 8 bits as a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (batch, 12, 9, 3)).astype(np.uint8)
    smooth = [cv2.resize(x, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.float32) for x in coarse]
    noisy = np.stack(smooth) + rng.normal(0, 4, (batch, height, width, 3))
    return torch.from_numpy(noisy.round().clip(0, 255) / 255).float().movedim(-1, 1)


def run(path, array):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})


def every_label(image, parser):
    """Each label's own probability."""
    count = len(parser.spec.labels)
    return label_masks(image, parser, range(count), count)


# ------------------------------------------------------------------------------------------------------- SCHP


def schp_transform(width: int, height: int, inside: tuple[int, int]) -> np.ndarray:
    """SCHP's affine map from picture to input, from three pairs of points as its code builds it: the middle of the
    box, half its width above that, and the third corner of the right angle."""
    aspect = inside[1] / inside[0]
    box = np.float32([width - 1, height - 1])
    centre = box / 2
    wide = box[0] if box[0] > aspect * box[1] else box[1] * aspect

    def points(middle, half):
        middle = np.float32(middle)
        above = middle + np.float32([0, -half])
        return np.stack([middle, above, above + np.float32([-half, 0])]).astype(np.float32)

    target = points([(inside[1] - 1) / 2, (inside[0] - 1) / 2], (inside[1] - 1) / 2)
    return cv2.getAffineTransform(points(centre, wide / 2), target)


def warp(array: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """cv2.warpAffine(INTER_LINEAR, black border) of [H, W] without its rounding to 1/32 of a pixel."""
    inverse = cv2.invertAffineTransform(matrix)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    at = inverse @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    return map_coordinates(array.astype(np.float64), at[::-1], order=1, mode="grid-constant").reshape(size)


@pytest.mark.parametrize("kind", SCHP)
@pytest.mark.parametrize("size", [(700, 500), (500, 700), (300, 200), (512, 512), (60, 900)])
def test_schp_sees_what_its_own_code_makes(kind, size):
    spec, image = SCHP[kind], picture(*size)
    bgr = image[0].flip(0).movedim(0, -1).numpy()
    matrix = schp_transform(size[1], size[0], spec.input_size)
    mean, std = np.float32([0.406, 0.456, 0.485]), np.float32([0.225, 0.224, 0.229])
    exact = np.stack([warp(bgr[..., c], matrix, spec.input_size) for c in range(3)], -1)
    ours = prepare(image, spec)[0].movedim(0, -1).numpy()
    np.testing.assert_allclose(ours, (exact - mean) / std, atol=3e-4)
    # Its own call rounds colours to 8 bits and positions to 1/32 pixel.
    theirs = cv2.warpAffine((bgr * 255).round().astype(np.uint8), matrix, spec.input_size[::-1], flags=cv2.INTER_LINEAR)
    assert np.abs(ours - (theirs / np.float32(255) - mean) / std).mean() < 0.01


@pytest.mark.parametrize("kind", SCHP)
@pytest.mark.parametrize("size", [(384, 256), (200, 300)])
def test_schp_labels_equal_those_of_its_own_code(kind, size, tmp_path):
    spec, image = SCHP[kind], picture(*size, seed=1)
    path = save_schp(tmp_path, kind)
    given = prepare(image, spec)
    fused = torch.from_numpy(run(path, given.numpy())[1])
    assert fused.shape[2:] == ((128, 128) if kind == "atr" else (119, 119))
    large = torch.nn.Upsample(size=spec.input_size, mode="bilinear", align_corners=True)(fused)[0].numpy()
    back = cv2.invertAffineTransform(schp_transform(size[1], size[0], spec.input_size))
    logits = np.stack([warp(channel, back, size) for channel in large])
    rows, columns = to_picture(spec, size, fused.shape[2:])
    np.testing.assert_allclose((rows @ fused[0] @ columns.T).numpy(), logits, atol=2e-3)
    ours = every_label(image, open_parser(path))[0]
    np.testing.assert_allclose(ours.numpy(), torch.from_numpy(logits).softmax(0).numpy(), atol=1e-3)
    theirs = np.stack([cv2.warpAffine(x, back, size[::-1], flags=cv2.INTER_LINEAR) for x in large]).argmax(0)
    assert (ours.argmax(0).numpy() == theirs).mean() > 0.99


@pytest.mark.parametrize("size", [(1536, 1024), (1600, 2000)])
def test_a_large_photo_is_averaged_before_it_is_sampled(size):
    """Sampling alone would keep a fine pattern's full contrast; a smooth picture looks the same either way."""
    spec = SCHP["atr"]
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")
    smooth = torch.stack([y, x, (x + y) / 2])[None]
    matrix = schp_transform(size[1], size[0], spec.input_size)
    plain = np.stack([warp(c.numpy(), matrix, spec.input_size) for c in smooth[0]])
    ours = prepare(smooth, spec)[0] * torch.tensor(spec.std)[:, None, None] + torch.tensor(spec.mean)[:, None, None]
    inner = np.abs(ours.flip(0).numpy() - plain)[:, 4:-4, 4:-4]
    inside = plain.max(0)[4:-4, 4:-4] > 0.02
    assert inner[:, inside].max() < 0.01
    pixels = ((torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2).float().expand(1, 3, -1, -1)
    seen = prepare(pixels, spec)[0, 0, 200:300, 200:300]
    assert seen.std() < 0.3 * (0.5 / 0.225)


def test_the_way_back_has_one_scale_for_both_axes():
    spec = SCHP["atr"]
    for size in ((900, 600), (333, 512)):
        scale = keep_scale(spec.input_size, size)
        rows, columns = to_picture(spec, size, spec.input_size)
        assert rows.shape == (size[0], 512) and columns.shape == (size[1], 512)
        at = rows.double() @ torch.arange(512, dtype=torch.float64)
        torch.testing.assert_close(at.diff(), torch.full((size[0] - 1,), scale, dtype=torch.float64), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------- SegFormer


@pytest.mark.parametrize("size", [(768, 512), (300, 400), (900, 1300)])
def test_segformer_sees_what_its_processor_makes(size):
    from transformers import SegformerImageProcessor

    spec, image = BUILT_IN["segformer-b2-clothes"], picture(*size, seed=2)
    pixels = (image[0].movedim(0, -1) * 255).round().to(torch.uint8).numpy()
    processor = SegformerImageProcessor(size={"height": 512, "width": 512}, do_reduce_labels=False)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    # The processor rounds to 8 bits after the resize: half a step, over the smallest standard deviation, and Pillow's
    # own rounding between its two passes.
    assert (prepare(image, spec) - theirs).abs().max() < 2 / 255 / 0.224


def test_segformer_labels_equal_those_of_its_processor(tmp_path):
    from transformers import SegformerImageProcessor
    from transformers.modeling_outputs import SemanticSegmenterOutput

    spec, image = BUILT_IN["segformer-b2-clothes"], picture(420, 300, seed=3)
    path = save_segformer(tmp_path)
    logits = torch.from_numpy(run(path, prepare(image, spec).numpy())[0])
    theirs = SegformerImageProcessor().post_process_semantic_segmentation(
        SemanticSegmenterOutput(logits=logits), target_sizes=[(420, 300)]
    )[0]
    ours = every_label(image, open_parser(path))[0]
    assert (ours.argmax(0) == theirs).float().mean() > 0.9999


# ------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("kind", SCHP)
def test_regions_are_the_sums_of_their_labels(kind, tmp_path):
    parser, image = open_parser(save_schp(tmp_path, kind)), picture(120, 90)
    labels = every_label(image, parser)
    parsing = parse_image(image, parser)
    for region in Region:
        mine = [i for i, (_, r) in enumerate(parser.spec.labels) if r is region]
        torch.testing.assert_close(parsing.masks[:, region], labels[:, mine].sum(1), atol=1e-5, rtol=0)
    assert parsing.size == (120, 90)


def test_a_batch_equals_its_pictures_one_by_one(tmp_path):
    image = picture(100, 140, batch=6)
    for folder, batch in (("one", 1), ("any", None), ("four", 4)):
        (tmp_path / folder).mkdir()
        parser = open_parser(save_schp(tmp_path / folder, "atr", batch=batch))
        together = parse_image(image, parser).masks
        alone = torch.cat([parse_image(x[None], parser).masks for x in image])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_rows_in_slices_change_nothing(tmp_path, monkeypatch):
    parser, image = open_parser(save_schp(tmp_path, "atr")), picture(150, 110)
    whole = parse_image(image, parser).masks
    monkeypatch.setattr(onnx_parser, "_SCORES", 18 * 110 * 7)
    torch.testing.assert_close(parse_image(image, parser).masks, whole, atol=1e-6, rtol=0)


def test_edges_are_smooth_not_blocks(tmp_path):
    """A network whose cells differ: nearest-neighbour labels would jump in steps of four input pixels."""
    parser, image = open_parser(save_segformer(tmp_path)), picture(1024, 1024, seed=5)
    face = parse_image(image, parser).mask("face")[0]
    assert (face.diff(dim=0).abs() > 0).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------ JSON beside it

OWN = {"labels": {"nothing": "background", "face": "face", "clothes": "upper"}, "input_size": [96, 64]}


def own_parser(tmp_path, spec, heads, **options):
    path = save_parser(tmp_path / "mine.onnx", heads, (96, 64), **options)
    (tmp_path / "mine.json").write_text(json.dumps(spec))
    return path


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("output", [None, 0, "scores"])
def test_any_parser_with_a_json_beside_it_works(tmp_path, layout, output):
    spec = {**OWN, "layout": layout, "output": output, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    path = own_parser(tmp_path, spec, {"scores": 3}, layout=layout)
    image = picture(96, 64)
    given = (
        (image - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1)
    ).numpy()
    scores = torch.from_numpy(run(path, given if layout == "NCHW" else np.moveaxis(given, 1, -1))[0])
    scores = scores if layout == "NCHW" else scores.movedim(-1, 1)
    expected = torch.nn.functional.interpolate(scores, (96, 64), mode="bilinear", align_corners=True).softmax(1)
    masks = parse_image(image, open_parser(path)).masks
    for channel, region in enumerate((Region.BACKGROUND, Region.FACE, Region.UPPER)):
        torch.testing.assert_close(masks[:, region], expected[:, channel], atol=1e-4, rtol=0)


def test_bgr_is_rgb_with_the_colours_turned_round(tmp_path):
    image = picture(96, 64)
    rgb = prepare(image, ParserSpec.from_json(json.dumps({**OWN, "channels": "RGB"}), "x"))
    bgr = prepare(image.flip(1), ParserSpec.from_json(json.dumps({**OWN, "channels": "BGR"}), "x"))
    assert torch.equal(rgb, bgr)


def test_probabilities_stay_what_they_are(tmp_path):
    image = picture(96, 64)
    path = own_parser(tmp_path, {**OWN, "scores": "probabilities"}, {"scores": 3}, softmax=True)
    given = run(path, prepare(image, open_parser(path).spec).numpy())[0]
    ours = parse_image(image, open_parser(path)).masks[0, [0, 1, 3], ::95, ::63]
    np.testing.assert_allclose(ours, given[0][:, ::23, ::15], atol=1e-3)


@pytest.mark.parametrize("name", LABEL_SETS)
def test_a_label_set_may_be_named(name):
    spec = ParserSpec.from_json(json.dumps({"labels": name, "input_size": [64, 64]}), "x")
    assert spec.labels == tuple(LABEL_SETS[name].items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "coco"}, "unknown label set 'coco'"),
        ({"labels": {"a": "background", "b": "nose"}}, "unknown region 'nose'"),
        ({"labels": ["a", "b"]}, "labels is a list"),
        ({"labels": {"a": "background"}}, "at least two labels"),
        ({"labels": None}, "labels is a NoneType"),
        ({"input_size": 512}, "input_size is 512"),
        ({"input_size": [512]}, "[height, width]"),
        ({"input_size": [512, -1]}, "[height, width]"),
        ({"mean": [0.5]}, "three numbers"),
        ({"std": [1, 1, 0]}, "above 0"),
        ({"std": ["a", 1, 1]}, "three numbers"),
        ({"channels": "GBR"}, "'RGB' or 'BGR'"),
        ({"layout": "CHW"}, "'NCHW' or 'NHWC'"),
        ({"resize": "crop"}, "'keep' or 'stretch'"),
        ({"scores": "labels"}, "'logits' or 'probabilities'"),
        ({"output": 1.5}, "name or the number"),
        ({"outputs": 1}, "unknown entries: outputs"),
    ],
)
def test_a_wrong_json_says_what_is_wrong(change, message):
    with pytest.raises(TruePoseError) as caught:
        ParserSpec.from_json(json.dumps({**OWN, **change}), "mine.json")
    assert message in str(caught.value) and "mine.json" in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[]", "holds a list"), ("{}", "lacks")])
def test_a_json_that_is_none_is_refused_with_an_example(text, message):
    with pytest.raises(TruePoseError, match=message) as caught:
        ParserSpec.from_json(text, "mine.json")
    assert '"input_size": [512, 512]' in str(caught.value)


def test_an_unreadable_json_is_named(tmp_path):
    path = own_parser(tmp_path, OWN, {"scores": 3})
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TruePoseError, match=r"mine.json cannot be read"):
        open_parser(path)


# ------------------------------------------------------------------------------------------------ refusals


def test_a_file_of_an_unknown_name_asks_for_a_json(tmp_path):
    path = save_parser(tmp_path / "mystery.onnx", {"scores": 18})
    with pytest.raises(TruePoseError, match=r"labels are unknown.*Write mystery.json beside it"):
        open_parser(path)


@pytest.mark.parametrize(
    ("heads", "size", "said"),
    [
        ({"scores": 19}, (512, 512), "18 labels"),
        ({"scores": 18}, (256, 256), "512, 512"),
        ({"edge": 2}, (512, 512), "18"),
    ],
)
def test_a_known_name_with_other_shapes_is_refused(tmp_path, heads, size, said):
    path = save_parser(tmp_path / "parsing_atr.onnx", heads, size)
    with pytest.raises(TruePoseError, match="does not fit parser schp-atr") as caught:
        open_parser(path)
    assert said in str(caught.value) and "parsing_atr.json" in str(caught.value)


@pytest.mark.parametrize("output", [3, -1, "other"])
def test_an_output_that_is_not_there_is_refused(tmp_path, output):
    with pytest.raises(TruePoseError, match="called or numbered"):
        open_parser(own_parser(tmp_path, {**OWN, "output": output}, {"scores": 3}))


def test_a_network_that_is_no_parser_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(OWN))
    with pytest.raises(TruePoseError, match="does not fit parser"):
        open_parser(save_add_one(tmp_path / "mine.onnx"))


def test_scores_of_another_shape_or_nan_are_refused(tmp_path):
    parser = open_parser(save_parser(tmp_path / "parsing_atr.onnx", {"scores": 18}, strength=float("nan")))
    with pytest.raises(TruePoseError, match="NaN or infinite"):
        parse_image(picture(64, 64), parser)


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)]
)
def test_what_is_no_image_is_refused(tmp_path, image):
    with pytest.raises(TruePoseError, match="expected float"):
        parse_image(image, open_parser(save_schp(tmp_path, "atr")))


def test_a_photo_beyond_the_limit_is_refused_before_any_work(tmp_path):
    parser = open_parser(save_schp(tmp_path, "atr"))
    for size in ((12_000, 8_000), (20_000, 16)):
        with pytest.raises(TruePoseError, match="Make it smaller"):
            parse_image(torch.zeros(1, 1, 1, 1).expand(1, 3, *size), parser)


def test_a_photo_of_12000_pixels_is_parsed(tmp_path):
    parser = open_parser(save_schp(tmp_path, "atr"))
    image = torch.zeros(1, 3, 1, 1).expand(1, 3, 100, 12_000)
    assert parse_image(image, parser).size == (100, 12_000)


# ------------------------------------------------------------------------------------------------- ATR and LIP


def rows(**shares: float) -> torch.Tensor:
    return torch.tensor(list(shares.values())).view(1, -1, 1, 1)


def atr_row(**shares: float) -> torch.Tensor:
    names = ("background", "face", "hair", "upper", "lower", "skin", "accessory", "arms")
    return rows(**{name: shares.get(name, 0.0) for name in names})


def lip_row(**shares: float) -> torch.Tensor:
    return rows(**{name: shares.get(name, 0.0) for name in ("rest", "face", "head", "arms")})


@pytest.mark.parametrize(
    ("atr", "lip", "expected"),
    [
        ({"face": 1.0}, {"face": 1.0}, {"face": 1.0}),
        ({"face": 1.0}, {"rest": 1.0}, {"skin": 1.0}),  # the neck
        ({"face": 1.0}, {"head": 1.0}, {"face": 1.0}),  # hair and glasses are no neck
        ({"face": 0.8, "hair": 0.2}, {"rest": 0.5, "face": 0.5}, {"face": 0.4, "hair": 0.2, "skin": 0.4}),
        ({"arms": 1.0}, {"rest": 1.0}, {"skin": 1.0}),
        ({"background": 1.0}, {"arms": 1.0}, {"skin": 1.0}),
        ({"upper": 0.6, "arms": 0.4}, {"arms": 0.7, "rest": 0.3}, {"upper": 0.3, "skin": 0.7}),
        ({"upper": 0.6, "arms": 0.4}, {"arms": 0.1, "rest": 0.9}, {"upper": 0.6, "skin": 0.4}),
        ({"upper": 1.0}, {"rest": 1.0}, {"upper": 1.0}),
    ],
)
def test_the_rule_of_the_merge(atr, lip, expected):
    merged = merge_atr_lip(atr_row(**atr), lip_row(**lip)).masks.flatten()
    wanted = torch.zeros(7)
    for name, share in expected.items():
        wanted[Region[name.upper()]] = share
    torch.testing.assert_close(merged, wanted, atol=1e-5, rtol=0)


def test_the_merge_of_the_two_networks(tmp_path):
    save_schp(tmp_path, "atr"), save_schp(tmp_path, "lip", seed=1)
    image = picture(90, 70)
    parser = choose_parser(ATR_LIP, [tmp_path])
    assert isinstance(parser, MergedParser)
    merged = parse_image(image, parser)
    atr = every_label(image, parser.atr)
    lip = every_label(image, parser.lip)
    # The same rule in words of single labels.
    index = {kind: {n: i for i, (n, _) in enumerate(spec.labels)} for kind, spec in SCHP.items()}
    head = sum(lip[:, index["lip"][name]] for name in ("Face", "Hair", "Hat", "Sunglasses"))
    arms = torch.maximum(
        *(x[:, index[kind]["Left-arm"]] + x[:, index[kind]["Right-arm"]] for kind, x in (("atr", atr), ("lip", lip)))
    )
    own = atr[:, index["atr"]["Left-arm"]] + atr[:, index["atr"]["Right-arm"]]
    face = atr[:, index["atr"]["Face"]] * head * (1 - arms) / (1 - own)
    torch.testing.assert_close(merged.mask("face"), face, atol=1e-4, rtol=1e-3)


def test_other_label_sets_are_not_merged(tmp_path):
    save_schp(tmp_path, "atr"), save_schp(tmp_path, "lip")
    spec = {"labels": "cihp", "input_size": [473, 473]}
    (tmp_path / "parsing_lip.json").write_text(json.dumps(spec))
    with pytest.raises(TruePoseError, match=r"parsing_lip.onnx has other labels"):
        choose_parser(ATR_LIP, [tmp_path])


# ------------------------------------------------------------------------------------------------- choosing


def test_a_parser_is_found_by_known_name_file_name_and_path(tmp_path):
    path = save_schp(tmp_path, "atr")
    for name in ("schp-atr", "parsing_atr.onnx", str(path)):
        assert choose_parser(name, [tmp_path / "empty", tmp_path]).spec.name == "schp-atr"


def test_a_missing_known_parser_says_which_file_goes_where(tmp_path):
    with pytest.raises(TruePoseError, match="truepose models get schp-lip") as caught:
        choose_parser("schp-lip", [tmp_path])
    assert str(tmp_path / "parsing_lip.onnx") in str(caught.value)


def test_an_unknown_name_lists_what_there_is(tmp_path):
    with pytest.raises(TruePoseError, match=r"no parser 'mystery'.*atr\+lip, schp-atr"):
        choose_parser("mystery", [tmp_path])


def test_the_description_names_file_settings_and_provider(tmp_path):
    parser = open_parser(save_schp(tmp_path, "atr"), provider="CPU")
    assert parser.description == "parsing_atr.onnx (as schp-atr) on CPU"
