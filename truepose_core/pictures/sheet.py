"""Pictures side by side, and labels on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

_TEXT = 15
"""Height of the letters of a label, in pixels."""


def tile(rows: Sequence[Sequence[Tensor]], scale: int = 1, gap: int = 2) -> Tensor:
    """Pictures [3, H, W] of one size, rows of columns, on white with gaps between: [1, 3, H', W'] in [0, 1].

    scale: every pixel becomes scale x scale. gap: in pixels of the result.
    """
    grid = torch.stack([torch.stack(list(row)) for row in rows]).float()
    grid = grid.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    grid = pad(grid, (gap, 0, gap, 0), value=1.0)
    sheet = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return pad(sheet, (0, gap, 0, gap), value=1.0)[None].clamp(0, 1)


def label_strip(labels: Sequence[str], width: int) -> Tensor:
    """Labels centred in equal parts of a white strip: [1, 3, H, width]. A label too wide for its part is cut."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT)
    height = _TEXT + 8
    strip = Image.new("RGB", (width, height), "white")
    for i, label in enumerate(labels):
        left, right = width * i // len(labels), width * (i + 1) // len(labels)
        # Drawn in a box of its own, so that a long label cannot run into the next.
        box = Image.new("RGB", (right - left, height), "white")
        ImageDraw.Draw(box).text(((right - left) / 2, height / 2), label, fill="black", font=font, anchor="mm")
        strip.paste(box, (left, 0))
    return torch.from_numpy(np.array(strip)).permute(2, 0, 1)[None].float() / 255


def labelled_sheet(columns: dict[str, Tensor], captions: Sequence[str], least_height: int = 192) -> Tensor:
    """A sheet with a named column for each entry and a caption over each row: [1, 3, H, W] in [0, 1].

    columns: name -> pictures [N, 3, h, w] of one size. captions: N of them. Pictures are enlarged by the smallest
    whole number that makes them at least `least_height` pixels high.
    """
    pictures = list(columns.values())
    scale = max(1, -(-least_height // pictures[0].shape[-2]))
    strips: list[Tensor] = []
    for caption, *row in zip(captions, *pictures, strict=True):
        picture = tile([row], scale)
        if not strips:
            strips.append(label_strip(list(columns), picture.shape[-1]))
        strips += [label_strip([caption], picture.shape[-1]), picture]
    return torch.cat(strips, 2)
