"""`Frame`: put an image of any shape into a model's size and take it back, without distortion.

The image is padded, centred, to a size with exactly the model's aspect ratio, then resized: one
factor for both axes, whole pixels everywhere. Going back resizes and cuts the padding off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.pose import Person, Pose
from truepose_core.regions import Region


@dataclass(frozen=True)
class Frame:
    """How an image sits in a model's canvas; made by `fit`. All sizes are (height, width).

    size_in: the image. size_padded: the image with its padding, in the image's own pixels; it has
    exactly the aspect ratio of size_model, the size the model works at. place: (top, left) of the image in the
    padded canvas, in image pixels; None is centred.
    """

    size_in: tuple[int, int]
    size_padded: tuple[int, int]
    size_model: tuple[int, int]
    place: tuple[int, int] | None = None

    @property
    def scale(self) -> float:
        """Model pixels per image pixel, the same in x and y."""
        return self.size_model[0] / self.size_padded[0]

    @property
    def offset(self) -> tuple[int, int]:
        """(top, left): where the image starts in the padded canvas, in image pixels."""
        if self.place is not None:
            return self.place
        (h, w), (padded_h, padded_w) = self.size_in, self.size_padded
        return (padded_h - h) // 2, (padded_w - w) // 2

    @property
    def is_identity(self) -> bool:
        """True when nothing is padded and nothing resized."""
        return self.size_in == self.size_padded == self.size_model

    def apply(self, image: Tensor, fill: float | Sequence[float] = 1.0) -> Tensor:
        """Put an image into the model's canvas.

        image: float [B, C, *size_in] in [0, 1]. fill: what the padding shows, one value or one per
        channel; white by default, as behind transparent images. Returns [B, C, *size_model] in
        [0, 1]; an image that has the model's size already comes back as it is.
        """
        self._check(image, self.size_in, "the image")
        if self.is_identity:
            return image
        for axis in self._axes():
            image = self._pad(image, axis, fill)
            image = _resize(image, axis, self.size_model[axis], "bicubic")
        return image.clamp(0, 1)

    def apply_keypoints(self, keypoints: Tensor) -> Tensor:
        """Move keypoints [..., 3], normalised to the image, to the model's canvas (normalised).

        Missing keypoints (confidence 0) stay as they are.
        """
        return self._move(keypoints, forward=True)

    def restore_keypoints(self, keypoints: Tensor) -> Tensor:
        """The inverse of `apply_keypoints`."""
        return self._move(keypoints, forward=False)

    def apply_pose(self, pose: Pose) -> Pose:
        """Move all people of a pose, whose canvas is the image, to the model's canvas."""
        return Pose(
            width=self.size_model[1],
            height=self.size_model[0],
            people=tuple(_move_person(person, self.apply_keypoints) for person in pose.people),
        )

    def apply_parsing(self, parsing: HumanParsing) -> HumanParsing:
        """Put a parsing of size_in into the model's canvas; the padding is background."""
        return (
            parsing if self.is_identity and parsing.size == self.size_in else HumanParsing(self._masks(parsing.masks))
        )

    def restore(self, image: Tensor) -> Tensor:
        """Take an image out of the model's canvas, at exactly size_in.

        image: float [B, C, *size_model] in [0, 1]. Returns [B, C, *size_in] in [0, 1].
        """
        self._check(image, self.size_model, "the image")
        if self.is_identity:
            return image
        for axis in reversed(self._axes()):
            image = _resize(image, axis, self.size_padded[axis], "bicubic")
            image = image.narrow(2 + axis, self.offset[axis], self.size_in[axis])
        return image.clamp(0, 1)

    def _axes(self) -> tuple[int, int]:
        """The axis with less padding first: resized one by one in this order, an image of an
        extreme shape never exists at its full padded size."""
        tightness = [size / padded for size, padded in zip(self.size_in, self.size_padded, strict=True)]
        return (0, 1) if tightness[0] >= tightness[1] else (1, 0)

    def _masks(self, masks: Tensor) -> Tensor:
        """Region masks [B, 7, *size_in] in the model's canvas."""
        self._check(masks, self.size_in, "the parsing")
        fill = [float(region == Region.BACKGROUND) for region in Region]
        for axis in self._axes():
            masks = self._pad(masks, axis, fill)
            masks = _resize(masks, axis, self.size_model[axis], "bilinear")
        return masks

    def _check(self, image: Tensor, size: tuple[int, int], what: str) -> None:
        if image.dim() != 4 or tuple(image.shape[2:]) != size or not image.is_floating_point():
            raise TruePoseError(
                f"{what} is {image.dtype} {tuple(image.shape)}; this frame expects float [B, C, {size[0]}, {size[1]}]"
            )

    def _pad(self, image: Tensor, axis: int, fill: float | Sequence[float]) -> Tensor:
        before, size = self.offset[axis], self.size_in[axis]
        if size == self.size_padded[axis]:
            return image
        shape = list(image.shape)
        shape[2 + axis] = self.size_padded[axis]
        values = torch.as_tensor(fill, dtype=image.dtype, device=image.device).reshape(-1, 1, 1)
        if len(values) not in (1, shape[1]):
            raise TruePoseError(f"the fill has {len(values)} values; expected 1 or {shape[1]}")
        padded = values.expand(shape).clone()
        padded.narrow(2 + axis, before, size).copy_(image)
        return padded

    def _move(self, keypoints: Tensor, forward: bool) -> Tensor:
        if keypoints.shape[-1:] != (3,):
            raise TruePoseError(f"keypoints are {tuple(keypoints.shape)}; expected [..., 3]")
        xy, visible = keypoints[..., :2].double(), keypoints[..., 2:]
        size, padded, offset = (xy.new_tensor(pair[::-1]) for pair in (self.size_in, self.size_padded, self.offset))
        moved = (xy * size + offset) / padded if forward else (xy * padded - offset) / size
        moved = torch.where(visible > 0, moved, xy).to(keypoints.dtype)
        return torch.cat((moved, visible), -1)


def fit(
    size_in: tuple[int, int],
    size_model: tuple[int, int] | None = None,
    *,
    multiple: int | None = None,
) -> Frame:
    """The frame that puts an image of size_in, (height, width), into a model's canvas.

    Give one of: size_model, a fixed (height, width) that the image is scaled to; or multiple, to
    keep the scale and pad each side up to a multiple of it. Raises `TruePoseError` for sizes
    below 1.
    """
    if (size_model is None) == (multiple is None):
        raise TruePoseError("give either size_model or multiple, and only one")
    height, width = size_in = _whole(size_in, "size_in")
    if multiple is not None:
        (step,) = _whole((multiple,), "multiple")
        padded = (-(-height // step) * step, -(-width // step) * step)
        return Frame(size_in, padded, padded)
    size_model = _whole(size_model, "size_model")
    if size_in == size_model:
        return Frame(size_in, size_in, size_model)
    divisor = math.gcd(*size_model)
    unit_h, unit_w = size_model[0] // divisor, size_model[1] // divisor
    units = max(-(-height // unit_h), -(-width // unit_w))
    return Frame(size_in, (units * unit_h, units * unit_w), size_model)


SHAPE_SLACK = 0.02
"""How much the aspect ratios of a picture and of what was made from it may differ: sizes are rounded when resized."""


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (height, width) have one aspect ratio, up to the rounding of a resize."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0]))) <= SHAPE_SLACK


def check_shape(what: str, size: tuple[int, int], whose: str, picture: tuple[int, int]) -> None:
    """Raise TruePoseError unless `what`, on a canvas of `size` (height, width), can be of `whose` picture."""
    if not same_shape(size, picture):
        raise TruePoseError(
            f"{what} is on a canvas of {size[1]}x{size[0]} and {whose} is {picture[1]}x{picture[0]} (width x height): "
            "another picture, or another crop of it; expected one of the same shape"
        )


def fits_cells(picture: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether a picture of (height, width) pixels can be that of a latent of (rows, columns) cells: their proportions
    agree up to less than one cell, and half a pixel, on each side."""
    (height, width), (rows, columns) = picture, cells
    tallest = (rows + 1) / (columns - 1) if columns > 1 else float("inf")
    flattest = (rows - 1) / (columns + 1)
    return (height - 0.5) / (width + 0.5) < tallest and (height + 0.5) / (width - 0.5) > flattest


def _move_person(person: Person, move: Callable[[Tensor], Tensor]) -> Person:
    arrays = (person.body, person.hand_left, person.hand_right, person.face)
    return Person(*(None if a is None else move(torch.tensor(a)).numpy() for a in arrays))


def _whole(sizes: tuple[int, ...], name: str) -> tuple[int, ...]:
    values = tuple(int(size) for size in sizes)
    if values != tuple(sizes) or min(values) < 1:
        raise TruePoseError(f"{name} is {tuple(sizes)}; expected whole numbers of at least 1")
    return values


def _resize(image: Tensor, axis: int, size: int, mode: str) -> Tensor:
    """Antialiased resampling of one axis (0 = height, 1 = width), in at least float32."""
    shape = list(image.shape[2:])
    if shape[axis] == size:
        return image
    shape[axis] = size
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.interpolate(wide, tuple(shape), mode=mode, antialias=True).to(image.dtype)
