"""The seven regions of a person, and how the label sets of public parsers map onto them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import IntEnum

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError


class Region(IntEnum):
    """A region of a person. The value is its channel in every region tensor."""

    BACKGROUND = 0
    FACE = 1
    HAIR = 2
    UPPER = 3
    LOWER = 4
    SKIN = 5
    ACCESSORY = 6


N_REGIONS = len(Region)
REGION_NAMES: tuple[str, ...] = tuple(region.name.lower() for region in Region)

# Preview colours, RGB 0..255. Background is black; the rest is the Okabe-Ito palette, which
# colour-blind readers can tell apart.
REGION_COLORS: tuple[tuple[int, int, int], ...] = (
    (0, 0, 0),  # background
    (213, 94, 0),  # face
    (204, 121, 167),  # hair
    (0, 114, 178),  # upper
    (0, 158, 115),  # lower
    (230, 159, 0),  # skin
    (240, 228, 66),  # accessory
)

_BACKGROUND, _FACE, _HAIR, _UPPER, _LOWER, _SKIN, _ACCESSORY = Region

# Each label set in the order of its indices: the parser's own name -> our region.

# ATR (Liang et al., Deep Human Parsing with Active Template Regression), 18 labels.
ATR_LABELS: dict[str, Region] = {
    "Background": _BACKGROUND,
    "Hat": _ACCESSORY,
    "Hair": _HAIR,
    "Sunglasses": _ACCESSORY,
    "Upper-clothes": _UPPER,
    "Skirt": _LOWER,
    "Pants": _LOWER,
    "Dress": _UPPER,
    "Belt": _ACCESSORY,
    "Left-shoe": _ACCESSORY,
    "Right-shoe": _ACCESSORY,
    "Face": _FACE,
    "Left-leg": _SKIN,
    "Right-leg": _SKIN,
    "Left-arm": _SKIN,
    "Right-arm": _SKIN,
    "Bag": _ACCESSORY,
    "Scarf": _ACCESSORY,
}

# LIP (Gong et al., Look into Person), 20 labels.
LIP_LABELS: dict[str, Region] = {
    "Background": _BACKGROUND,
    "Hat": _ACCESSORY,
    "Hair": _HAIR,
    "Glove": _ACCESSORY,
    "Sunglasses": _ACCESSORY,
    "Upper-clothes": _UPPER,
    "Dress": _UPPER,
    "Coat": _UPPER,
    "Socks": _ACCESSORY,
    "Pants": _LOWER,
    "Jumpsuits": _UPPER,
    "Scarf": _ACCESSORY,
    "Skirt": _LOWER,
    "Face": _FACE,
    "Left-arm": _SKIN,
    "Right-arm": _SKIN,
    "Left-leg": _SKIN,
    "Right-leg": _SKIN,
    "Left-shoe": _ACCESSORY,
    "Right-shoe": _ACCESSORY,
}

# CIHP (Gong et al., Instance-level Human Parsing): LIP with bare torso in place of jumpsuits.
CIHP_LABELS: dict[str, Region] = {
    name.replace("Jumpsuits", "Torso-skin"): _SKIN if name == "Jumpsuits" else region
    for name, region in LIP_LABELS.items()
}

# Pascal-Person-Part, 7 labels. It names body parts, not clothes: the head holds face and hair,
# and each limb goes to what usually covers it (sleeves to the elbow, trousers to the ankle).
PASCAL_LABELS: dict[str, Region] = {
    "Background": _BACKGROUND,
    "Head": _FACE,
    "Torso": _UPPER,
    "Upper-arms": _UPPER,
    "Lower-arms": _SKIN,
    "Upper-legs": _LOWER,
    "Lower-legs": _LOWER,
}

# The label sets by the name a user types.
LABEL_SETS: dict[str, dict[str, Region]] = {
    "atr": ATR_LABELS,
    "lip": LIP_LABELS,
    "cihp": CIHP_LABELS,
    "pascal": PASCAL_LABELS,
    # SegFormer-clothes (mattmdjaga/segformer_b2_clothes), trained on ATR with its label order.
    "segformer_clothes": ATR_LABELS,
}

# Label -> region by the name a user types; "regions" is our own.
LABEL_TABLES: dict[str, tuple[Region, ...]] = {
    "regions": tuple(Region),
    **{name: tuple(labels.values()) for name, labels in LABEL_SETS.items()},
}


def to_region(region: Region | str | int) -> Region:
    """Return the `Region` with this name (case does not matter) or number.

    Raises `TruePoseError` for an unknown one; the message lists the known names.
    """
    if isinstance(region, str):
        name = region.strip().lower()
        if name in REGION_NAMES:
            return Region(REGION_NAMES.index(name))
    elif isinstance(region, int) and 0 <= region < len(Region):
        return Region(region)
    raise TruePoseError(f"unknown region {region!r}; the regions are {', '.join(REGION_NAMES)}")


def region_weights(weights: Mapping[Region | str, float] | None = None) -> Tensor:
    """Region weights omega (design section 3) as one row.

    `weights` maps regions or their names to numbers in [0, 1]; regions not named weigh 1.
    Returns float32 [7]. Raises `TruePoseError` for an unknown region, a region named twice, or a
    weight that is not a number in [0, 1].
    """
    row = torch.ones(len(Region))
    seen: set[Region] = set()
    for key, value in (weights or {}).items():
        region = to_region(key)
        if region in seen:
            raise TruePoseError(f"region {region.name.lower()!r} is given twice")
        seen.add(region)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0.0 <= number <= 1.0:
            raise TruePoseError(
                f"the weight of region {region.name.lower()!r} is {value!r}; "
                "expected a number from 0 (leave it out) to 1 (keep it)"
            )
        row[region] = number
    return row


def parse_region_weights(items: Iterable[str]) -> dict[str, float]:
    """Read command-line region weights such as `["face=1", "upper=0.5"]`.

    Returns {region name: weight}, checked as in `region_weights`. Raises `TruePoseError` for an
    item that is not NAME=WEIGHT.
    """
    weights: dict[str, float] = {}
    for item in items:
        name, equals, text = item.partition("=")
        try:
            number = float(text)
        except ValueError:
            number = None
        if not equals or number is None:
            raise TruePoseError(f"region weight {item!r} is not NAME=WEIGHT; write for example face=1 or upper=0.5")
        key = to_region(name).name.lower()
        if key in weights:
            raise TruePoseError(f"region {key!r} is given twice")
        weights[key] = number
    region_weights(weights)
    return weights
