"""`HumanParsing`: soft masks of the seven regions, made once, checked once, trusted afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.regions import LABEL_TABLES, N_REGIONS, REGION_COLORS, REGION_NAMES, Region, to_region

MAX_MASK_PIXELS = 1 << 25
"""Of a label map that becomes masks at its own size, 28 bytes per pixel: 0.9 GB."""

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
        masks = torch.zeros(labels.shape[0], N_REGIONS, *labels.shape[1:], device=labels.device)
        for label, region in enumerate(regions):
            if low <= label <= high:
                masks[:, region] += labels == label
        return cls(masks)

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
        size: tuple[int, int] | None = None,
    ) -> HumanParsing:
        """Read a label-map image: grey (or palette) values that are labels, or region colours.

        image: a file, or a tensor [B, 1 or 3, H, W] float in [0, 1] as `load_image` gives.
        table: what grey values mean (see `from_label_map`); by default they are `Region` numbers.
        A coloured image uses `REGION_COLORS`. size: (height, width) of the parsing, as `resize`
        gives it, but in the memory of one region's mask; the map's own by default. Raises
        `TruePoseError` for other values or colours, and for a map of more than `MAX_MASK_PIXELS`
        without a size: a label map must not be smoothed, so save it as PNG and resize it by
        nearest neighbour.
        """
        regions = _label_table(table)
        if isinstance(image, Tensor):
            what, pixels = "the label map", _label_pixels(image)
        else:
            what = f"label map {Path(image)}"
            pixels = _read_label_pixels(Path(image), what, size)
        expected = f"expected labels 0 to {len(regions) - 1}"
        labels, painted = pixels.labels, pixels.painted
        all_painted = painted is not None and bool(painted.all())
        if all_painted:
            shown = _translated(painted, _BIT_TO_REGION)
            if shown.any():
                return cls._from_label_pixels(shown, LABEL_TABLES["regions"], size)
        if labels is not None and labels.min() >= 0 and labels.max() < len(regions):
            return cls._from_label_pixels(labels, regions, size)
        if painted is None or all_painted:
            black = ", and every colour of its palette that it uses is black" if all_painted else ""
            raise TruePoseError(
                f"{what} has values from {labels.min()} to {labels.max()}{black}; {expected}. The known label sets "
                f"are {', '.join(LABEL_TABLES)}"
            )
        at = np.unravel_index(painted.argmin(), painted.shape)
        names = ", ".join(f"{name} {color}" for name, color in zip(REGION_NAMES, REGION_COLORS, strict=True))
        raise TruePoseError(
            f"{what} has {(painted == 0).sum()} pixels of an unknown colour, the first at x={at[2]} y={at[1]} "
            f"with RGB {tuple(pixels.colours[pixels.colour_of(at)].tolist())}; {expected} in grey, or the colours "
            f"{names}. Save it as PNG, without smoothing"
        )

    @classmethod
    def _from_label_pixels(
        cls, labels: np.ndarray, regions: Sequence[Region], size: tuple[int, int] | None
    ) -> HumanParsing:
        """labels: [B, H, W], all in the table."""
        height, width = labels.shape[1:]
        if size is None or size == (height, width):
            return cls.from_label_map(torch.from_numpy(labels.astype(np.uint8, copy=False)), regions)
        masks = torch.zeros(labels.shape[0], N_REGIONS, *size)
        for region in sorted(set(regions)):
            table = np.array([r == region for r in regions] + [False] * (256 - len(regions)), np.uint8)
            own = _translated(labels.astype(np.uint8, copy=False), table)
            if own.any():
                mask = torch.from_numpy(own)[:, None].float()
                masks[:, region] = F.interpolate(mask, size, mode="bilinear", antialias=True)[:, 0]
        return cls(masks)

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


def _near_region_colours() -> np.ndarray:
    """uint8 [3, 256]: for a value of a channel, one bit for each region whose colour is near it."""
    near = np.abs(np.arange(256)[:, None, None] - np.array(REGION_COLORS)) <= _COLOR_TOLERANCE
    return (near << np.arange(N_REGIONS)[:, None]).sum(1).astype(np.uint8).T.copy()


_NEAR = _near_region_colours()
# A region's bit -> the region. The colours are so far apart that no pixel is near two of them.
_BIT_TO_REGION = np.zeros(256, np.uint8)
_BIT_TO_REGION[1 << np.arange(N_REGIONS)] = np.arange(N_REGIONS)


def _translated(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[values], both uint8, in no more memory than three copies of the values."""
    return np.frombuffer(bytearray(values.tobytes().translate(table.tobytes())), np.uint8).reshape(values.shape)


def _painted_regions(colours: np.ndarray) -> np.ndarray:
    """The bit of the region whose colour a pixel has, 0 for none: uint8 [...].

    colours: uint8 [..., 3]. Every channel is within `_COLOR_TOLERANCE`.
    """
    bits = _translated(colours[..., 0], _NEAR[0])
    for channel in (1, 2):
        bits &= _translated(colours[..., channel], _NEAR[channel])
    return bits


@dataclass(frozen=True, eq=False)
class _LabelPixels:
    """labels: integers [B, H, W] where the picture is grey or a palette's indices. painted: the pixels' region bits
    where it may be coloured. colours: [B, H, W, 3], or [256, 3] of the palette whose indices the labels are."""

    labels: np.ndarray | None
    painted: np.ndarray | None = None
    colours: np.ndarray | None = None

    def colour_of(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Where in `colours` a pixel's is."""
        return at if self.colours.ndim == 4 else (self.labels[at],)


def _label_pixels(image: Tensor) -> _LabelPixels:
    if image.dim() != 4 or image.shape[1] not in (1, 3) or not image.is_floating_point():
        raise TruePoseError(
            f"the label map is {image.dtype} {tuple(image.shape)}; expected float [B, 1 or 3, H, W] in 0..1"
        )
    values = (image * 255).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).cpu().numpy()
    return _LabelPixels(values[..., 0]) if image.shape[1] == 1 else _colour_pixels(values)


def _colour_pixels(values: np.ndarray) -> _LabelPixels:
    """values: uint8 [B, H, W, 3]."""
    grey = all(np.array_equal(values[..., 0], values[..., channel]) for channel in (1, 2))
    return _LabelPixels(values[..., 0] if grey else None, _painted_regions(values), values)


def _read_label_pixels(path: Path, what: str, size: tuple[int, int] | None) -> _LabelPixels:
    """The stored values of a label image file; labels of 16 bits stay whole."""
    from truepose_core.pictures.files import decode, image_size, refusing_damage

    width, height = image_size(path)
    if size in (None, (height, width)) and width * height > MAX_MASK_PIXELS:
        raise TruePoseError(
            f"{what} is {width}x{height} pixels, and its masks would take {width * height * 28 >> 20} MiB; expected at "
            f"most {MAX_MASK_PIXELS} pixels in all. Make it smaller by nearest neighbour first"
        )
    image = decode(path)
    with refusing_damage(what):
        if image.mode == "P":
            # Parsers write palette files whose indices are the labels.
            labels, swatch = np.array(image)[None], image.crop((0, 0, 256, 1))
            swatch.putdata(range(256))
            palette = np.array(swatch.convert("RGB"))[0]
            return _LabelPixels(labels, _translated(labels, _painted_regions(palette)), palette)
        if image.mode == "L" or image.mode.startswith("I"):
            return _LabelPixels(np.array(image)[None])
        return _colour_pixels(np.array(image.convert("RGB"))[None])
