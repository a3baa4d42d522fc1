"""`SourcePerson`: a source picture and what is known of whom it shows; checked once, framed alike for every host."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import Crop
from truepose_core.framing.frame import Frame, fit
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region


@dataclass(frozen=True, eq=False)
class SourcePerson:
    """One source picture, or S of them.

    image: float [S, 3, H, W] in [0, 1]. parsing: of the same size, S or 1 for all; None where nothing reads it. body:
    keypoints [S, 18, 3] normalised to the picture, or [1, 18, 3] for all; None where they are not known. Raises
    TruePoseError for what does not fit together, and for a parsing that shows nobody in one of the pictures.
    """

    image: Tensor
    parsing: HumanParsing | None
    body: Tensor | None = None

    def __post_init__(self) -> None:
        if self.image.ndim != 4 or self.image.shape[1] != 3:
            raise TruePoseError(f"the source image is {tuple(self.image.shape)}; expected [S, 3, H, W]")
        count, (height, width) = self.image.shape[0], self.size
        if self.parsing is not None:
            if self.parsing.size != (height, width):
                raise TruePoseError(
                    f"the parsing is {self.parsing.size[1]}x{self.parsing.size[0]} and the image {width}x{height} "
                    "(width x height), and must be of the same size; make the parsing from the same image, after any "
                    "resizing"
                )
            if self.parsing.batch not in (1, count):
                raise TruePoseError(
                    f"the parsing holds {self.parsing.batch} pictures and the image {count}; expected 1 or {count}"
                )
            empty = (self.parsing.masks[:, Region.BACKGROUND] > 0.99).flatten(1).all(1).nonzero().flatten().tolist()
            if empty:
                which = "" if self.parsing.batch == 1 else f" in picture {', '.join(map(str, empty))}"
                raise TruePoseError(
                    f"the parsing shows nobody{which}: every pixel is background. Check what it was made from"
                )
            if self.parsing.batch != count:
                shared = HumanParsing(self.parsing.masks.expand(count, -1, -1, -1))
                object.__setattr__(self, "parsing", shared)
        if self.body is not None:
            if self.body.shape[0] not in (1, count) or self.body.shape[1:] != (18, 3):
                raise TruePoseError(f"source keypoints are {tuple(self.body.shape)}; expected [{count}, 18, 3]")
            object.__setattr__(self, "body", self.body.expand(count, -1, -1))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[2], self.image.shape[3]

    def framed(self, frame: Frame) -> SourcePerson:
        """The same people in a model's canvas, whole and undistorted. The padding is background and has each picture's
        own mean colour, so the person's surroundings have no invented edge."""
        fills = self.image.float().mean((2, 3)).tolist()
        pictures = [frame.apply(x[None], fill) for x, fill in zip(self.image.float(), fills, strict=True)]
        return replace(
            self,
            image=torch.cat(pictures),
            parsing=None if self.parsing is None else frame.apply_parsing(self.parsing),
            body=None if self.body is None else frame.apply_keypoints(self.body.float()),
        )

    def padded(self, multiple: int) -> SourcePerson:
        """The same people at their own scale, padded to whole cells of `multiple` pixels."""
        return self.framed(fit(self.size, multiple=multiple))

    def cropped(self, crop: Crop) -> SourcePerson:
        """What a crop shows of them; outside of the picture it has the mean colour of what it shows."""
        fills = crop.view(self.image).float().mean((2, 3)).tolist()
        pictures = [crop.apply(x[None], fill) for x, fill in zip(self.image, fills, strict=True)]
        return replace(
            self,
            image=torch.cat(pictures),
            parsing=None if self.parsing is None else crop.apply_parsing(self.parsing),
            body=None if self.body is None else crop.apply_keypoints(self.body),
        )
