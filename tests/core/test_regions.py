"""Laws of the regions, the label tables and the region weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from truepose_core import regions
from truepose_core.errors import TruePoseError
from truepose_core.regions import (
    LABEL_TABLES,
    REGION_COLORS,
    REGION_NAMES,
    Region,
    parse_region_weights,
    region_weights,
    to_region,
)

NAMED_TABLES = {
    "atr": (regions.ATR_LABELS, 18),
    "lip": (regions.LIP_LABELS, 20),
    "cihp": (regions.CIHP_LABELS, 20),
    "pascal": (regions.PASCAL_LABELS, 7),
    "segformer_clothes": (regions.ATR_LABELS, 18),
}

# What a word in a parser's label means, written independently of the tables.
MEANING = {
    Region.BACKGROUND: ("background",),
    Region.FACE: ("face", "head"),
    Region.HAIR: ("hair",),
    Region.UPPER: ("upper-clothes", "dress", "coat", "jumpsuits", "torso", "upper-arms"),
    Region.LOWER: ("skirt", "pants", "upper-legs", "lower-legs"),
    Region.SKIN: (*("left-arm", "right-arm", "left-leg", "right-leg", "torso-skin", "lower-arms"),),
    Region.ACCESSORY: (
        *("hat", "sunglasses", "glove", "scarf", "belt", "bag", "socks"),
        *("left-shoe", "right-shoe"),
    ),
}


def test_regions_are_in_the_order_of_the_design():
    assert REGION_NAMES == ("background", "face", "hair", "upper", "lower", "skin", "accessory")
    assert [int(region) for region in Region] == list(range(7))


@pytest.mark.parametrize("name", NAMED_TABLES)
def test_tables_have_the_published_number_of_labels_and_mean_what_they_say(name):
    labels, count = NAMED_TABLES[name]
    table = LABEL_TABLES[name]
    assert table == tuple(labels.values())
    assert len(table) == count
    assert table[0] is Region.BACKGROUND
    for label, region in labels.items():
        assert label.lower() in MEANING[region], label


def test_published_indices_of_labels_that_readers_rely_on():
    atr, lip, cihp, pascal = (list(table) for table, _ in (NAMED_TABLES[n] for n in ("atr", "lip", "cihp", "pascal")))
    assert [atr.index(n) for n in ("Hair", "Upper-clothes", "Pants", "Face", "Bag")] == [*(2, 4, 6, 11, 16)]
    assert [lip.index(n) for n in ("Upper-clothes", "Jumpsuits", "Face", "Right-shoe")] == [*(5, 10, 13, 19)]
    assert cihp.index("Torso-skin") == 10
    assert [i for i in range(20) if lip[i] != cihp[i]] == [10]
    assert pascal == [*("Background", "Head", "Torso", "Upper-arms", "Lower-arms", "Upper-legs", "Lower-legs")]


def test_every_region_has_a_label_in_the_clothes_sets():
    for name in ("atr", "lip", "cihp", "segformer_clothes"):
        assert set(LABEL_TABLES[name]) == set(Region)


def test_colors_are_distinct_even_after_jpeg_like_errors():
    for i, a in enumerate(REGION_COLORS):
        for b in REGION_COLORS[:i]:
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) > 32


def test_no_weights_means_one_everywhere():
    assert torch.equal(region_weights(), torch.ones(7))
    assert torch.equal(region_weights({}), torch.ones(7))


@given(st.dictionaries(st.sampled_from(list(Region)), st.floats(0, 1)))
def test_weights_by_region_name_and_command_line_agree(weights):
    expected = torch.tensor([weights.get(region, 1.0) for region in Region])
    assert torch.equal(region_weights(weights), expected)
    assert torch.equal(region_weights({r.name: w for r, w in weights.items()}), expected)
    items = [f"{region.name.lower()}={weight!r}" for region, weight in weights.items()]
    assert torch.equal(region_weights(parse_region_weights(items)), expected)


@given(st.one_of(st.floats(max_value=-1e-9), st.floats(min_value=1 + 1e-9), st.just(float("nan"))))
def test_weights_outside_0_to_1_are_refused(weight):
    with pytest.raises(TruePoseError, match="face"):
        region_weights({"face": weight})


@pytest.mark.parametrize("weight", [None, "much", [1.0]])
def test_weights_that_are_not_numbers_are_refused(weight):
    with pytest.raises(TruePoseError, match="face"):
        region_weights({"face": weight})


@pytest.mark.parametrize("name", ["nose", "", 7, -1, 1.0, None])
def test_unknown_regions_are_refused_with_the_known_ones(name):
    for call in (to_region, lambda n: region_weights({n: 1.0})):
        with pytest.raises(TruePoseError) as caught:
            call(name)
        assert all(known in str(caught.value) for known in REGION_NAMES)


def test_a_region_twice_is_refused():
    with pytest.raises(TruePoseError, match="twice"):
        region_weights({"face": 1.0, Region.FACE: 0.5})
    with pytest.raises(TruePoseError, match="twice"):
        parse_region_weights(["face=1", "FACE=1"])


@pytest.mark.parametrize("item", ["face", "face=", "=1", "face=high", "nose=1", "face=2", "face=nan"])
def test_bad_command_line_weights_are_refused(item):
    with pytest.raises(TruePoseError):
        parse_region_weights([item])
