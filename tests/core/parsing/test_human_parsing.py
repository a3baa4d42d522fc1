"""Laws of `HumanParsing`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.human_parsing import _COLOR_TOLERANCE, MAX_MASK_PIXELS
from truepose_core.regions import LABEL_TABLES, REGION_COLORS, Region

sizes = st.integers(1, 24)
seeds = st.integers(0, 2**31 - 1)


def random_labels(seed, batch=2, height=12, width=9):
    return torch.randint(0, 7, (batch, height, width), generator=torch.Generator().manual_seed(seed))


def random_parsing(seed, batch=2, height=12, width=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(batch, 7, height, width, generator=generator, dtype=torch.float64)
    return HumanParsing((masks / masks.sum(1, keepdim=True)).to(dtype))


@given(seeds)
def test_labels_go_in_and_come_out(seed):
    labels = random_labels(seed)
    parsing = HumanParsing.from_labels(labels)
    assert torch.equal(parsing.labels(), labels)
    assert parsing.batch == len(parsing) == 2 and parsing.size == (12, 9)
    assert torch.equal(HumanParsing.from_labels(labels[0]).labels(), labels[:1])


@pytest.mark.parametrize("name", LABEL_TABLES)
def test_label_maps_go_through_their_table(name):
    table = LABEL_TABLES[name]
    labels = torch.arange(len(table), dtype=torch.uint8)[None, None]
    expected = [int(region) for region in table]
    for given_table in (name, name.upper(), table):
        assert HumanParsing.from_label_map(labels, given_table).labels()[0, 0].tolist() == expected


@pytest.mark.parametrize(
    "labels",
    [
        torch.full((1, 4, 4), 18),
        torch.full((1, 4, 4), 255, dtype=torch.uint8),
        torch.full((1, 4, 4), -1),
        torch.zeros(1, 4, 4),
        torch.zeros(1, 4, 4, dtype=torch.bool),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(1, 0, 4, dtype=torch.int64),
    ],
)
def test_bad_label_maps_are_refused(labels):
    with pytest.raises(TruePoseError):
        HumanParsing.from_label_map(labels, "atr")


def test_an_unknown_label_set_is_refused_with_the_known_ones():
    with pytest.raises(TruePoseError, match="atr, lip"):
        HumanParsing.from_label_map(torch.zeros(1, 2, 2, dtype=torch.int64), "coco")


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        (torch.full((1, 6, 4, 4), 1 / 6), r"\[B, 7, H, W\]"),
        (torch.full((7, 4, 4), 1 / 7), r"\[B, 7, H, W\]"),
        (torch.ones(1, 7, 4, 4), "sums"),
        (torch.full((1, 7, 4, 4), float("nan")), "sums"),
        (torch.tensor([1.5, -0.5, 0, 0, 0, 0, 0]).reshape(1, 7, 1, 1), "negative"),
        (torch.ones(1, 7, 1, 1, dtype=torch.int64), "float"),
        (torch.ones(1, 7, 0, 4), "empty"),
        ("masks", "str"),
    ],
)
def test_masks_that_are_no_parsing_are_refused(masks, said):
    with pytest.raises(TruePoseError, match=said):
        HumanParsing(masks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_to_any_float_type_is_still_a_parsing(dtype):
    parsing = random_parsing(0, dtype=dtype).to("cpu", dtype)
    assert parsing.masks.dtype == parsing.tokens(3, 3).dtype == parsing.resize(7, 5).masks.dtype
    assert parsing.masks.dtype == dtype


@given(seeds, sizes, sizes, sizes, sizes)
@settings(max_examples=60, deadline=None)
def test_tokens_keep_the_area_of_every_region_on_any_grid(seed, height, width, rows, columns):
    parsing = random_parsing(seed, 1, height, width)
    tokens = parsing.tokens(rows, columns)
    assert tokens.shape == (1, rows * columns, 7)
    assert tokens.min() >= 0
    torch.testing.assert_close(tokens.sum(-1), torch.ones_like(tokens[..., 0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(tokens.mean(1), parsing.masks.mean((2, 3)), atol=1e-12, rtol=0)


@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_tokens_are_average_pooling_where_the_grid_divides(seed, rows, columns, a, b):
    parsing = random_parsing(seed, 2, rows * a, columns * b)
    pooled = F.adaptive_avg_pool2d(parsing.masks, (rows, columns)).flatten(2).mT
    torch.testing.assert_close(parsing.tokens(rows, columns), pooled, atol=1e-12, rtol=0)


@given(seeds, sizes, sizes, sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_tokens_equal_pooling_of_a_fine_enough_copy(seed, height, width, rows, columns):
    parsing = random_parsing(seed, 1, height, width)
    fine = parsing.masks.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
    pooled = F.avg_pool2d(fine, (height, width)).flatten(2).mT
    torch.testing.assert_close(parsing.tokens(rows, columns), pooled, atol=1e-12, rtol=0)


def test_tokens_are_exact_under_autocast():
    parsing = random_parsing(3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = parsing.tokens(5, 4)
    assert torch.equal(tokens, parsing.tokens(5, 4))


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(TruePoseError, match="grid"):
        random_parsing(0).tokens(0, 3)


@given(seeds, sizes, sizes)
@settings(max_examples=30, deadline=None)
def test_resizing_gives_a_parsing_and_the_same_size_is_free(seed, height, width):
    parsing = random_parsing(seed)
    assert parsing.resize(height, width).size == (height, width)
    assert parsing.resize(12, 9) is parsing


def test_resizing_keeps_a_constant_parsing():
    one = HumanParsing.from_labels(torch.full((1, 8, 6), int(Region.UPPER)))
    assert torch.allclose(one.resize(17, 3).mask("upper"), torch.ones(1, 17, 3))


@given(seeds)
def test_masks_sum_up(seed):
    parsing = random_parsing(seed)
    torch.testing.assert_close(parsing.mask(Region), torch.ones(2, 12, 9, dtype=torch.float64))
    clothes = parsing.mask(["upper", Region.LOWER, "upper"])
    torch.testing.assert_close(clothes, parsing.mask("upper") + parsing.mask(Region.LOWER))
    assert torch.equal(parsing.mask(Region.FACE), parsing.masks[:, 1])


def test_indexing_keeps_a_batch():
    parsing = random_parsing(1, batch=3)
    assert torch.equal(parsing[1].masks, parsing.masks[1:2])
    assert torch.equal(parsing[-1].masks, parsing.masks[2:])
    assert torch.equal(parsing[1:].masks, parsing.masks[1:])
    assert [one.batch for one in parsing] == [1, 1, 1]
    with pytest.raises(IndexError):
        parsing[3]


def test_nobody_is_empty():
    labels = torch.zeros(2, 4, 4, dtype=torch.int64)
    assert HumanParsing.from_labels(labels).is_empty
    labels[1, 2, 2] = int(Region.FACE)
    parsing = HumanParsing.from_labels(labels)
    assert not parsing.is_empty and parsing[0].is_empty and not parsing[1].is_empty


# Composition of masks


def test_hard_masks_later_wins_and_background_is_the_rest():
    face, hair = torch.zeros(4, 4), torch.zeros(4, 4)
    face[:3], hair[:2] = 1, 1
    labels = HumanParsing.from_masks({"face": face, "hair": hair}).labels()
    assert labels[0, :, 0].tolist() == [2, 2, 1, 0]
    labels = HumanParsing.from_masks({"hair": hair, Region.FACE: face}).labels()
    assert labels[0, :, 0].tolist() == [1, 1, 1, 0]


@given(seeds, st.permutations(list(Region)))
def test_soft_masks_always_sum_to_one_and_disjoint_ones_do_not_mind_the_order(seed, order):
    generator = torch.Generator().manual_seed(seed)
    soft = {region: torch.rand(2, 5, 4, generator=generator) for region in order}
    HumanParsing.from_masks(soft)  # validated: sums to 1
    labels = random_labels(seed)
    disjoint = {region: (labels == region).double() for region in order}
    assert torch.equal(HumanParsing.from_masks(disjoint).labels(), labels)


def test_one_mask_is_shared_by_a_batch():
    parsing = HumanParsing.from_masks({"upper": torch.ones(4, 4), "face": torch.zeros(3, 4, 4)})
    assert parsing.batch == 3 and bool((parsing.labels() == Region.UPPER).all())


def test_masks_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(TruePoseError, match="'hair' is 6x4 and that of 'face' is 5x4"):
        HumanParsing.from_masks({"face": torch.zeros(4, 5), "hair": torch.zeros(4, 6)})


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"nose": torch.zeros(4, 4)},
        {"face": torch.full((4, 4), 1.5)},
        {"face": torch.full((4, 4), float("nan"))},
        {"face": torch.zeros(4)},
        {"face": torch.zeros(0, 4)},
        {"face": torch.zeros(4, 4), Region.FACE: torch.zeros(4, 4)},
        {"face": torch.zeros(2, 4, 4), "hair": torch.zeros(3, 4, 4)},
    ],
)
def test_bad_masks_are_refused(masks):
    with pytest.raises(TruePoseError):
        HumanParsing.from_masks(masks)


# Label images


@given(seeds)
@settings(max_examples=10, deadline=None)
def test_a_preview_reads_back_as_the_parsing(seed):
    labels = random_labels(seed)
    preview = HumanParsing.from_labels(labels).preview()
    assert preview.min() >= 0 and preview.max() <= 1
    assert torch.equal(HumanParsing.from_label_image(preview).labels(), labels)


def test_grey_label_files_in_every_mode_read_back(tmp_path):
    labels = random_labels(5, 1, 20, 16)
    array = labels[0].numpy().astype(np.uint8)
    palette = Image.fromarray(array, "P")
    palette.putpalette([8 * i for i in range(30)])
    files = {
        "grey.png": Image.fromarray(array),
        "rgb.png": Image.fromarray(array).convert("RGB"),
        "palette.png": palette,
        "deep.png": Image.fromarray(array.astype(np.uint16)),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
        parsing = HumanParsing.from_label_image(tmp_path / name)
        assert torch.equal(parsing.labels(), labels), name


def test_palette_files_of_a_parser_keep_their_indices(tmp_path):
    labels = np.arange(20, dtype=np.uint8).repeat(20).reshape(20, 20)
    image = Image.fromarray(labels, "P")
    image.putpalette([(37 * i) % 256 for i in range(60)])
    image.save(tmp_path / "lip.png")
    parsing = HumanParsing.from_label_image(tmp_path / "lip.png", "lip")
    expected = HumanParsing.from_label_map(torch.from_numpy(labels), "lip")
    assert torch.equal(parsing.masks, expected.masks)


def test_colours_win_over_the_order_of_a_palette(tmp_path):
    labels = random_labels(6, 1, 20, 16)
    colors = torch.tensor(REGION_COLORS, dtype=torch.uint8)[labels[0]].numpy()
    Image.fromarray(colors).save(tmp_path / "rgb.png")
    # A palette in reverse order: index i shows the colour of region 6 - i.
    image = Image.fromarray((6 - labels[0]).numpy().astype(np.uint8), "P")
    image.putpalette([value for color in REGION_COLORS[::-1] for value in color])
    image.save(tmp_path / "palette.png")
    for name in ("rgb.png", "palette.png"):
        assert torch.equal(HumanParsing.from_label_image(tmp_path / name).labels(), labels), name


def test_an_image_of_nobody_is_empty(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "black.png")
    assert HumanParsing.from_label_image(tmp_path / "black.png").is_empty


@pytest.mark.parametrize("name", ["grey.png", "palette.png", "preview.png"])
def test_a_map_read_at_a_size_is_the_map_resized(tmp_path, name):
    labels = random_labels(7, 1, 40, 32)
    grey = Image.fromarray(labels[0].numpy().astype(np.uint8))
    palette = Image.fromarray(labels[0].numpy().astype(np.uint8), "P")
    palette.putpalette([8 * i for i in range(30)])
    colors = torch.tensor(REGION_COLORS, dtype=torch.uint8)[labels[0]].numpy()
    {"grey.png": grey, "palette.png": palette, "preview.png": Image.fromarray(colors)}[name].save(tmp_path / name)
    for size in ((40, 32), (20, 16), (64, 48)):
        read = HumanParsing.from_label_image(tmp_path / name, size=size)
        torch.testing.assert_close(read.masks, HumanParsing.from_labels(labels).resize(*size).masks)


def test_a_map_whose_masks_would_be_too_large_is_refused_unread(tmp_path):
    side = int(MAX_MASK_PIXELS**0.5) + 1
    Image.new("L", (side, side), 1).save(tmp_path / "large.png")
    with pytest.raises(TruePoseError, match=rf"large\.png is {side}x{side} pixels.*smaller"):
        HumanParsing.from_label_image(tmp_path / "large.png")


def test_a_black_palette_with_other_labels_is_refused(tmp_path):
    image = Image.fromarray(np.full((16, 16), 9, np.uint8), "P")
    image.putpalette([0] * 768)
    image.save(tmp_path / "black.png")
    with pytest.raises(TruePoseError, match=r"black\.png has values from 9 to 9.*black.*0 to 6.*atr"):
        HumanParsing.from_label_image(tmp_path / "black.png")
    wanted = HumanParsing.from_label_map(torch.full((1, 16, 16), 9), "atr")
    assert torch.equal(HumanParsing.from_label_image(tmp_path / "black.png", "atr").masks, wanted.masks)


def test_no_colour_is_near_two_regions():
    colors = torch.tensor(REGION_COLORS)
    apart = (colors[:, None] - colors).abs().amax(-1) + 1000 * torch.eye(len(REGION_COLORS), dtype=torch.long)
    assert apart.min() > 2 * _COLOR_TOLERANCE


def test_other_label_images_are_refused_and_named(tmp_path):
    Image.new("L", (16, 16), 200).save(tmp_path / "grey.png")
    with pytest.raises(TruePoseError, match=r"grey\.png.*200"):
        HumanParsing.from_label_image(tmp_path / "grey.png")
    photo = Image.new("RGB", (16, 16))
    photo.putpixel((3, 5), (120, 130, 140))
    photo.save(tmp_path / "photo.png")
    with pytest.raises(TruePoseError, match=r"photo\.png.*1 pixels.*x=3 y=5.*120, 130, 140"):
        HumanParsing.from_label_image(tmp_path / "photo.png")
    with pytest.raises(TruePoseError, match="does not exist"):
        HumanParsing.from_label_image(tmp_path / "none.png")
    with pytest.raises(TruePoseError, match="unknown colour"):
        HumanParsing.from_label_image(torch.full((1, 3, 4, 4), 0.5))
    with pytest.raises(TruePoseError, match="128"):
        HumanParsing.from_label_image(torch.full((1, 1, 4, 4), 0.5))
    with pytest.raises(TruePoseError, match="1 or 3"):
        HumanParsing.from_label_image(torch.zeros(4, 4))
