"""`HumanParsing`: soft masks of the seven regions, made once, checked once, trusted afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.regions import (
    LABEL_TABLES,
    REGION_COLORS,
    REGION_NAMES,
    Region,
    to_region,
)

N_REGIONS = len(Region)

# How far sums may be from 1 and values below 0: rounding of the number format, and no more.
_TOLERANCE = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}

# A coloured label map may be off by this much per channel (0..255) before it is refused.
_COLOR_TOLERANCE = 8


@dataclass(frozen=True, eq=False)
class HumanParsing:
    """Soft region masks of a batch of images.

    masks: [B, 7, H, W] float, non-negative, summing to 1 over the regions, in `Region` order.
    Raises `TruePoseError` when they are anything else.
    """

    masks: Tensor

    def __post_init__(self) -> None:
        masks = self.masks
        if not isinstance(masks, Tensor) or masks.dim() != 4 or masks.shape[1] != N_REGIONS:
            given = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise TruePoseError(f"parsing masks are {given}; expected a tensor [B, 7, H, W]")
        if 0 in masks.shape:
            raise TruePoseError(f"parsing masks are empty: {tuple(masks.shape)}")
        if masks.dtype not in _TOLERANCE:
            raise TruePoseError(
                f"parsing masks are {masks.dtype}; expected a float type. "
                "Label maps go through HumanParsing.from_labels"
            )
        tolerance = _TOLERANCE[masks.dtype]
        low = masks.amin().item()
        error = (masks.sum(1, dtype=_at_least_float32(masks.dtype)) - 1).abs().amax().item()
        # Written so that NaN fails too.
        if not (low >= -tolerance and error <= tolerance):
            raise TruePoseError(
                f"parsing masks have a smallest value of {low:.4g} and sums over the regions up to "
                f"{error:.4g} away from 1; expected no negative values and sums of 1"
            )

    @classmethod
    def from_labels(cls, labels: Tensor) -> HumanParsing:
        """Make a parsing from `Region` numbers: integer [B, H, W] (or [H, W]), values 0..6."""
        return cls.from_label_map(labels, LABEL_TABLES["regions"])

    @classmethod
    def from_label_map(cls, labels: Tensor, table: Sequence[Region] | str) -> HumanParsing:
        """Make a parsing from a parser's label map.

        labels: integer [B, H, W] (or [H, W]). table: label -> `Region`, one of the tables of
        `truepose_core.regions` or its name ("atr", "lip", "cihp", "pascal", "segformer_clothes").
        Raises `TruePoseError` for a label that the table does not have.
        """
        regions = _label_table(table)
        if labels.dim() == 2:
            labels = labels[None]
        if labels.dim() != 3:
            raise TruePoseError(f"labels are {tuple(labels.shape)}; expected [B, H, W]")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TruePoseError(f"labels are {labels.dtype}; expected integers")
        if 0 in labels.shape:
            raise TruePoseError(f"labels are empty: {tuple(labels.shape)}")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(regions):
            raise TruePoseError(
                f"labels run from {low} to {high}; this label set has 0 to {len(regions) - 1}. "
                f"The known sets are {', '.join(LABEL_TABLES)}"
            )
        rows = torch.eye(N_REGIONS, device=labels.device)[
            torch.tensor([int(region) for region in regions], device=labels.device)
        ]
        return cls(rows[labels.long()].permute(0, 3, 1, 2).contiguous())

    @classmethod
    def from_masks(cls, masks: Mapping[Region | str, Tensor]) -> HumanParsing:
        """Compose masks, painted over a background in the order of the mapping.

        masks: {region or its name: [B, H, W] or [H, W] in [0, 1]}, all of one size. A later mask m
        covers what is under it: rows <- (1 - m) rows + m e_region, so rows always sum to 1 and
        background is the rest. A batch of 1 is shared by the others. Raises `TruePoseError` for
        masks of another size, of values outside [0, 1], or for no mask at all.
        """
        if not masks:
            raise TruePoseError("no mask was given; expected at least one region's mask")
        named = {}
        for key, mask in masks.items():
            name = to_region(key).name.lower()
            mask = mask[None] if mask.dim() == 2 else mask
            if mask.dim() != 3:
                raise TruePoseError(f"the mask of {name!r} is {tuple(mask.shape)}; expected [B, H, W] or [H, W]")
            if name in named:
                raise TruePoseError(f"region {name!r} is given twice")
            named[name] = mask.float()
        first = next(iter(named))
        batch = max(mask.shape[0] for mask in named.values())
        size = named[first].shape[1:]
        for name, mask in named.items():
            if mask.shape[1:] != size:
                raise TruePoseError(
                    f"the mask of {name!r} is {mask.shape[2]}x{mask.shape[1]} and that of "
                    f"{first!r} is {size[1]}x{size[0]} (width x height); make them one size"
                )
            if mask.shape[0] not in (1, batch):
                raise TruePoseError(f"the mask of {name!r} has a batch of {mask.shape[0]}; expected 1 or {batch}")
            slack = _TOLERANCE[torch.float32]  # what resizing a mask may add
            if mask.numel() == 0 or not (mask.amin() >= -slack and mask.amax() <= 1 + slack):
                raise TruePoseError(f"the mask of {name!r} has values outside 0..1")
        rows = named[first].new_zeros(batch, N_REGIONS, *size)
        rows[:, Region.BACKGROUND] = 1
        for name, mask in named.items():
            mask = mask.clamp(0, 1)
            rows *= 1 - mask[:, None]
            rows[:, to_region(name)] += mask
        return cls(rows)

    @classmethod
    def from_label_image(
        cls,
        image: str | os.PathLike[str] | Tensor,
        table: Sequence[Region] | str = "regions",
    ) -> HumanParsing:
        """Read a label-map image: grey (or palette) values that are labels, or region colours.

        image: a file, or a tensor [B, 1 or 3, H, W] float in [0, 1] as `load_image` gives.
        table: what grey values mean (see `from_label_map`); by default they are `Region` numbers.
        A coloured image uses `REGION_COLORS`. Raises `TruePoseError` for other values or colours:
        a label map must not be smoothed, so save it as PNG and resize it by nearest neighbour.
        """
        regions = _label_table(table)
        if isinstance(image, Tensor):
            what, (labels, colors) = "the label map", _label_pixels(image)
        else:
            what, (labels, colors) = f"label map {Path(image)}", _read_label_pixels(Path(image))
        expected = f"expected labels 0 to {len(regions) - 1}"
        if colors is not None:
            nearest, region_labels = _nearest_region(colors)
            if int(nearest.max()) <= _COLOR_TOLERANCE and bool(region_labels.any()):
                return cls.from_labels(region_labels)
        if labels is not None and int(labels.min()) >= 0 and int(labels.max()) < len(regions):
            return cls.from_label_map(labels, regions)
        if colors is None:
            raise TruePoseError(f"{what} has values from {int(labels.min())} to {int(labels.max())}; {expected}")
        far = nearest > _COLOR_TOLERANCE
        b, y, x = (int(i) for i in far.nonzero()[0])
        names = ", ".join(f"{name} {color}" for name, color in zip(REGION_NAMES, REGION_COLORS, strict=True))
        raise TruePoseError(
            f"{what} has {int(far.sum())} pixels of an unknown colour, the first at x={x} y={y} "
            f"with RGB {tuple(colors[b, :, y, x].tolist())}; {expected} in grey, or the colours "
            f"{names}. Save it as PNG, without smoothing"
        )

    @property
    def batch(self) -> int:
        """How many images: B."""
        return self.masks.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.masks.shape[2], self.masks.shape[3]

    @property
    def is_empty(self) -> bool:
        """True when nobody is there: background is the strongest region everywhere."""
        return not bool(self.labels().any())

    def __len__(self) -> int:
        return self.batch

    def __getitem__(self, index: int | slice) -> HumanParsing:
        """The parsing of one image (still a batch, of 1) or of a slice of the batch."""
        if isinstance(index, int):
            if not -self.batch <= index < self.batch:
                raise IndexError(f"index {index} of a parsing with a batch of {self.batch}")
            index = slice(index % self.batch, index % self.batch + 1)
        return HumanParsing(self.masks[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> HumanParsing:
        """The same parsing on another device or in another float type."""
        return HumanParsing(self.masks.to(device=device, dtype=dtype))

    def tokens(self, height: int, width: int) -> Tensor:
        """Region rows of a token grid: [B, height * width, 7], row major, summing to 1.

        Each token is the exact area average of the pixels under it, also where the grid does not
        divide the image (a pixel on a border counts by its share) and where it is finer.
        """
        size_h, size_w = self.size
        masks = self.masks.to(_at_least_float32(self.masks.dtype))
        # Autocast would round the sums of a parsing to half precision.
        with torch.autocast(masks.device.type, enabled=False):
            grid = _overlap(size_h, height, masks) @ masks @ _overlap(size_w, width, masks).mT
        return grid.flatten(2).mT.to(self.masks.dtype)

    def resize(self, height: int, width: int) -> HumanParsing:
        """The parsing at another size, by antialiased bilinear resampling."""
        if (height, width) == self.size:
            return self
        masks = self.masks.to(_at_least_float32(self.masks.dtype))
        masks = F.interpolate(masks, (height, width), mode="bilinear", antialias=True)
        return HumanParsing(masks.to(self.masks.dtype))

    def labels(self) -> Tensor:
        """The strongest region of every pixel: int64 [B, H, W], values 0..6."""
        return self.masks.argmax(1)

    def mask(self, regions: Region | str | Iterable[Region | str]) -> Tensor:
        """How much of a pixel is any of these regions: [B, H, W] in [0, 1]."""
        if isinstance(regions, (Region, str)):
            regions = (regions,)
        chosen = sorted({to_region(region) for region in regions})
        return self.masks[:, [int(region) for region in chosen]].sum(1)

    def preview(self) -> Tensor:
        """The parsing in `REGION_COLORS`: float [B, 3, H, W] in [0, 1]; soft masks mix colours."""
        colors = self.masks.new_tensor(REGION_COLORS) / 255
        return torch.einsum("brhw,rc->bchw", self.masks, colors)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _overlap(size: int, cells: int, like: Tensor) -> Tensor:
    """[cells, size]: the share of each cell's length that each pixel covers; rows sum to 1."""
    if cells < 1:
        raise TruePoseError(f"a token grid needs at least one row and column, not {cells}")
    # Integer edges in units of 1 / (size * cells), so that shares are exact.
    cell = torch.arange(cells) * size
    pixel = torch.arange(size) * cells
    low = torch.maximum(cell[:, None], pixel[None])
    high = torch.minimum(cell[:, None] + size, pixel[None] + cells)
    return ((high - low).clamp_min(0).double() / size).to(like)


def _label_table(table: Sequence[Region] | str) -> Sequence[Region]:
    if not isinstance(table, str):
        return table
    if table.lower() not in LABEL_TABLES:
        raise TruePoseError(f"unknown label set {table!r}; known are {', '.join(LABEL_TABLES)}")
    return LABEL_TABLES[table.lower()]


def _nearest_region(colors: Tensor) -> tuple[Tensor, Tensor]:
    """The largest channel difference to the nearest region colour, and that region: [B, H, W].

    colors: int16 [B, 3, H, W]. One region at a time: photographs have many pixels.
    """
    nearest = colors.new_full(colors[:, 0].shape, 256)
    labels = torch.zeros_like(nearest)
    for region, color in zip(Region, REGION_COLORS, strict=True):
        distance = (colors - colors.new_tensor(color)[:, None, None]).abs().amax(1)
        labels[distance < nearest] = int(region)
        nearest = torch.minimum(nearest, distance)
    return nearest, labels


def _label_pixels(image: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """A label image as (labels [B, H, W] or None, RGB 0..255 int16 [B, 3, H, W] or None)."""
    if image.dim() != 4 or image.shape[1] not in (1, 3) or not image.is_floating_point():
        raise TruePoseError(
            f"the label map is {image.dtype} {tuple(image.shape)}; expected float [B, 1 or 3, H, W] in 0..1"
        )
    values = (image * 255).round().clamp(0, 255).to(torch.int16)
    grey = bool((values == values[:, :1]).all())
    return values[:, 0] if grey else None, values if image.shape[1] == 3 else None


def _read_label_pixels(path: Path) -> tuple[Tensor | None, Tensor | None]:
    """The stored values of a label image file, as `_label_pixels` gives them."""
    import numpy as np

    from truepose_core.images import decode

    image = decode(path)
    if image.mode == "L" or image.mode.startswith("I"):
        return torch.from_numpy(np.array(image, dtype=np.int64))[None], None
    rgb = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.int16))
    rgb = rgb.permute(2, 0, 1)[None]
    # Parsers write palette files whose indices are the labels.
    if image.mode == "P":
        return torch.from_numpy(np.array(image, dtype=np.int64))[None], rgb
    grey = bool((rgb == rgb[:, :1]).all())
    return rgb[:, 0] if grey else None, rgb
