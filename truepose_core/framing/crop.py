"""`Crop`: as `Frame`, for the part of a photo that shows a person. `crop_person` chooses it, `paste_back` puts the
result into the photo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame, _move_person, _whole
from truepose_core.parsing.human_parsing import HumanParsing
from truepose_core.pose import Person
from truepose_core.pose.keypoints import FACE_POINTS, L_ELBOW, L_SHOULDER, L_WRIST, R_ELBOW, R_SHOULDER, R_WRIST
from truepose_core.pose.limbs import LIMB_RANGE, limb_frames
from truepose_core.regions import Region

BUCKETS: dict[str, tuple[tuple[int, int], ...]] = {
    "SD1.5": ((768, 512), (640, 512), (512, 512), (512, 640), (512, 768)),
    "SDXL": (
        (1536, 640),
        (1344, 768),
        (1216, 832),
        (1152, 896),
        (1024, 1024),
        (896, 1152),
        (832, 1216),
        (768, 1344),
        (640, 1536),
    ),
}
"""(height, width) that model families are at home with: those of SD1.5's usual fine-tunes, and SDXL's (Podell et al.,
arXiv 2307.01952, appendix I) between 2.4 : 1 and 1 : 2.4."""


Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""


@dataclass(frozen=True)
class Crop:
    """The part of a photo that a model works on; made by `crop_person`. All sizes are (height, width) in pixels.

    size_photo: the photo. corner: (top, left) of what the crop shows of the photo. frame: how that part sits in the
    model's canvas; where the crop reaches out of the photo the frame pads.
    """

    size_photo: tuple[int, int]
    corner: tuple[int, int]
    frame: Frame

    @property
    def size_model(self) -> tuple[int, int]:
        """The crop as the model sees it."""
        return self.frame.size_model

    @property
    def box(self) -> Box:
        """(left, top, right, bottom) in the photo's pixels, padding included: may lie outside of the photo."""
        (top, left), (more_top, more_left) = self.corner, self.frame.offset
        height, width = self.frame.size_padded
        return left - more_left, top - more_top, left - more_left + width, top - more_top + height

    @property
    def padded(self) -> float:
        """The share of the crop that lies outside of the photo."""
        return 1 - math.prod(self.frame.size_in) / math.prod(self.frame.size_padded)

    def apply(self, photo: Tensor, fill: float | Sequence[float] = 1.0) -> Tensor:
        """The crop of a photo, at the model's size.

        photo: float [B, C, *size_photo] in [0, 1]. fill: what lies outside of the photo, as in `Frame.apply`. Returns
        [B, C, *size_model]; at scale 1 its pixels are the photo's own, bit for bit.
        """
        return self.frame.apply(self.view(photo), fill)

    def view(self, photo: Tensor) -> Tensor:
        """What the crop shows of a photo [B, C, *size_photo], at its own scale and without padding; no copy."""
        if photo.dim() != 4 or tuple(photo.shape[2:]) != self.size_photo:
            height, width = self.size_photo
            raise TruePoseError(
                f"the photo is {tuple(photo.shape)}; this crop was taken from a photo of {width}x{height} pixels "
                f"(width x height), so expected [B, C, {height}, {width}]"
            )
        (top, left), (height, width) = self.corner, self.frame.size_in
        return photo[:, :, top : top + height, left : left + width]

    def apply_parsing(self, parsing: HumanParsing) -> HumanParsing:
        """The crop of a photo's parsing; outside of the photo it is background."""
        return HumanParsing(self.frame._masks(self.view(parsing.masks)))

    def apply_keypoints(self, keypoints: Tensor) -> Tensor:
        """Keypoints [..., 3], normalised to the photo, normalised to the crop instead."""
        return self.frame.apply_keypoints(self._shift(keypoints, forward=True))

    def restore_keypoints(self, keypoints: Tensor) -> Tensor:
        """The inverse of `apply_keypoints`."""
        return self._shift(self.frame.restore_keypoints(keypoints), forward=False)

    def apply_person(self, person: Person) -> Person:
        """A person of the photo in the crop's canvas."""
        return _move_person(person, self.apply_keypoints)

    def describe(self) -> str:
        """What a user wants to know: where the crop lies, its scale, and what of it is padding."""
        (height, width), (photo_h, photo_w), (model_h, model_w) = (
            self.frame.size_padded,
            self.size_photo,
            self.size_model,
        )
        left, top, _, _ = self.box
        text = f"{width}x{height} at ({left}, {top}) of {photo_w}x{photo_h}, shown at {model_w}x{model_h}"
        text += f" (scale {self.frame.scale:.2f})"
        return text + (f"; {self.padded:.0%} of it lies outside of the photo" if self.padded else "")

    def _shift(self, keypoints: Tensor, forward: bool) -> Tensor:
        xy, visible = keypoints[..., :2].double(), keypoints[..., 2:]
        photo, seen, corner = (xy.new_tensor(p[::-1]) for p in (self.size_photo, self.frame.size_in, self.corner))
        moved = (xy * photo - corner) / seen if forward else (xy * seen + corner) / photo
        return torch.cat((torch.where(visible > 0, moved, xy).to(keypoints.dtype), visible), -1)


def person_box(size: tuple[int, int], parsing: HumanParsing | None = None, person: Person | None = None) -> Box:
    """(left, top, right, bottom) around a person in a photo of size (height, width), in pixels, inside the photo.

    parsing: of the photo, a batch of 1. person: keypoints normalised to the photo; alone, they give the box of the
    limbs with guessed widths, hands, feet and head. With both, it is the box of the keypoints and of what the parsing
    shows near them: clothes and hair of this person, and not the others of a group.

    Raises TruePoseError when neither is given, or nobody is there.
    """
    if parsing is None and person is None:
        raise TruePoseError(
            "neither a parsing nor keypoints were given; expected one of them, to know where the person is"
        )
    height, width = size
    limits = (0.0, 0.0, float(width), float(height))
    box = None
    if person is not None:
        points, limbs = _person_boxes(size, person)
        box = _inside(limbs, limits)
        if box is None:
            raise TruePoseError(
                "the person's keypoints are missing or all outside of the photo; check the pose and the photo"
            )
    if parsing is None:
        return box
    if parsing.size != tuple(size) or parsing.batch != 1:
        raise TruePoseError(
            f"the parsing is of {parsing.batch} pictures of {parsing.size[1]}x{parsing.size[0]} and the photo "
            f"{width}x{height} (width x height); expected one picture of that size"
        )
    if box is not None:
        more = _NEAR * max(box[2] - box[0], box[3] - box[1])
        limits = _inside((box[0] - more, box[1] - more, box[2] + more, box[3] + more), limits)
    left, top, right, bottom = (round(x) for x in limits)
    shown = parsing.masks[0, Region.BACKGROUND, top:bottom, left:right] < 0.5
    rows, columns = shown.any(1).nonzero().flatten().tolist(), shown.any(0).nonzero().flatten().tolist()
    if not rows:
        if box is None:
            raise TruePoseError("the parsing shows nobody: it is background everywhere. Check what it was made from")
        return box
    found = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
    if box is None:
        return tuple(float(x) for x in found)
    around = (min(points[0], found[0]), min(points[1], found[1]), max(points[2], found[2]), max(points[3], found[3]))
    return _inside(around, (0.0, 0.0, float(width), float(height)))


_NEAR = 0.15
"""How far from the keypoints' box clothes and hair are looked for, in its longer side."""


def _person_boxes(size: tuple[int, int], person: Person) -> tuple[Box, Box]:
    """The box around all visible keypoints, and the one around the limbs with their widths too; (inf, inf, -inf, -inf)
    where nothing is visible."""
    height, width = size
    frames = limb_frames(torch.tensor(person.body)[None].double(), width / height)
    reach = torch.tensor(LIMB_RANGE, dtype=torch.float64)
    ends = frames.start[0, :, None] + reach[..., None] * frames.axis[0, :, None]
    corners = ends[:, None] + frames.width[0, :, None, None, None] * ends.new_tensor([-1.0, 1.0])[:, None, None]
    limbs = corners[frames.valid[0]].reshape(-1, 2) * height
    arrays = [a for a in (person.body, person.hand_left, person.hand_right, person.face) if a is not None]
    seen = torch.cat([torch.tensor(a[a[:, 2] > 0, :2]).double() for a in arrays]) * limbs.new_tensor([width, height])
    if not len(seen):
        nothing = (math.inf, math.inf, -math.inf, -math.inf)
        return nothing, nothing
    points = torch.cat([limbs, seen])
    return (*seen.amin(0).tolist(), *seen.amax(0).tolist()), (*points.amin(0).tolist(), *points.amax(0).tolist())


def _inside(box: tuple[float, ...], limits: tuple[float, ...]) -> Box | None:
    """The part of a box that lies in another; None where there is none."""
    left, top = max(box[0], limits[0]), max(box[1], limits[1])
    right, bottom = min(box[2], limits[2]), min(box[3], limits[3])
    return (left, top, right, bottom) if left < right and top < bottom else None


def best_bucket(boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) of `sizes` whose canvas people fill best.

    boxes: of the people who shall share the size. The box that fills its canvas least decides; of sizes that differ by
    less than a hundredth in it, the largest wins.
    """

    def filled(size: tuple[int, int]) -> float:
        height, width = size
        shares = [(b[3] - b[1]) * (b[2] - b[0]) / _enclosing(b, height / width) for b in boxes]
        return round(min(shares), 2)

    return max(sizes, key=lambda size: (filled(size), size[0] * size[1]))


def _enclosing(box: Box, aspect: float) -> float:
    """The area of the smallest box of this height / width around another."""
    height = max(box[3] - box[1], (box[2] - box[0]) * aspect)
    return height * height / aspect


_NEARLY_OWN_SCALE = 0.9
"""A crop that would be enlarged by less than 1 / this shows a little more instead, and keeps the photo's pixels."""


def crop_person(
    size: tuple[int, int],
    box: Box,
    size_model: tuple[int, int],
    *,
    margin: float = 0.1,
    enlarge: bool = True,
) -> Crop:
    """The crop around a person that fills a model's canvas, without stretching.

    size: the photo's (height, width). box: (left, top, right, bottom) of the person in pixels, as from `person_box`.
    size_model: (height, width) of the canvas, for example from `best_bucket`. margin: what is left free on each side,
    in the box's longer side. enlarge: allow a scale above 1; without it the crop shows more of the photo instead, at
    its own scale; so does a crop that would be enlarged by a tenth at most, whose pixels are then the photo's own.

    The box with its margin is made larger to the canvas's aspect ratio and moved into the photo where it fits; only
    what does not fit is padding. Raises TruePoseError for an empty box, one outside of the photo, or a margin that is
    negative.
    """
    size, size_model = _whole(size, "size"), _whole(size_model, "size_model")
    if not margin >= 0:
        raise TruePoseError(f"the margin is {margin}; expected 0 or more")
    if _inside(box, (0.0, 0.0, float(size[1]), float(size[0]))) is None:
        raise TruePoseError(f"the box {box} shows nothing of the photo of {size[1]}x{size[0]} (width x height)")
    left, top, right, bottom = grow(box, margin)
    divisor = math.gcd(*size_model)
    units = [side // divisor for side in size_model]
    # Rounded first, so that a box of exactly the canvas's size is not one unit too large.
    needed = max(
        math.ceil(round(side / unit, 6)) for side, unit in zip((bottom - top, right - left), units, strict=True)
    )
    count = max(needed, divisor) if not enlarge or needed >= _NEARLY_OWN_SCALE * divisor else needed
    padded = (count * units[0], count * units[1])
    corner, seen, place = [], [], []
    for side, limit, middle in zip(padded, size, ((top + bottom) / 2, (left + right) / 2), strict=True):
        start = min(max(round(middle - side / 2), min(0, limit - side)), max(0, limit - side))
        corner.append(max(start, 0))
        seen.append(min(start + side, limit) - corner[-1])
        place.append(corner[-1] - start)
    return Crop(size, tuple(corner), Frame(tuple(seen), padded, size_model, tuple(place)))


def grow(box: Box, margin: float) -> Box:
    """A box (left, top, right, bottom) with a margin on each side, in its longer side."""
    more = margin * max(box[2] - box[0], box[3] - box[1])
    return box[0] - more, box[1] - more, box[2] + more, box[3] + more


def cut_sides(box: Box, size: tuple[int, int]) -> list[str]:
    """The edges of the photo, of size (height, width), that a person's box reaches, within a pixel: there the person
    may go on."""
    sides = {"left": box[0] < 1, "top": box[1] < 1, "right": box[2] > size[1] - 1, "bottom": box[3] > size[0] - 1}
    return [name for name, reached in sides.items() if reached]


def detail_boxes(person: Person, size: tuple[int, int]) -> dict[str, Box]:
    """Where the face and the hands of a person are, in a photo of size (height, width): {"face" | "hand_left" |
    "hand_right": box}; what is not seen, or lies outside of the photo, is left out.

    From the points of the hands and the face where there are enough, otherwise from wrist and elbow, and from nose,
    eyes and ears. left and right are the person's.
    """
    height, width = size
    body = person.body * np.array([width, height, 1.0])
    found: dict[str, Box | None] = {"face": _points_box(person.face, size, 0.12) or _head_box(body)}
    for name, points, elbow, wrist in (
        ("hand_left", person.hand_left, L_ELBOW, L_WRIST),
        ("hand_right", person.hand_right, R_ELBOW, R_WRIST),
    ):
        found[name] = _points_box(points, size, 0.2) or _hand_box(body, elbow, wrist)
    limits = (0.0, 0.0, float(width), float(height))
    inside = {name: _inside(box, limits) for name, box in found.items() if box is not None}
    return {name: box for name, box in inside.items() if box is not None}


_ENOUGH = 6
"""Fewer points of a face or a hand than this say little about its size."""


def _points_box(points: np.ndarray | None, size: tuple[int, int], margin: float) -> Box | None:
    if points is None or (points[:, 2] > 0).sum() < _ENOUGH:
        return None
    xy = points[points[:, 2] > 0, :2] * (size[1], size[0])
    return grow((*xy.min(0).tolist(), *xy.max(0).tolist()), margin)


def _hand_box(body: np.ndarray, elbow: int, wrist: int) -> Box | None:
    """A square beyond the wrist: a hand is about 0.7 of its forearm, also where the forearm is seen end on."""
    if body[elbow, 2] == 0 or body[wrist, 2] == 0:
        return None
    along = body[wrist, :2] - body[elbow, :2]
    half = max(0.45 * float(np.hypot(*along)), 0.15 * _body_scale(body))
    x, y = (body[wrist, :2] + 0.3 * along).tolist()
    return x - half, y - half, x + half, y + half


def _head_box(body: np.ndarray) -> Box | None:
    """From forehead to chin and from ear to ear; None for a head seen from behind."""
    seen = [i for i in FACE_POINTS if body[i, 2] > 0]
    if len(seen) < 2 or not body[list(FACE_POINTS[:3]), 2].any():
        return None
    xy = body[seen, :2]
    half = max(float(np.ptp(xy, 0).max()) * 0.65, 0.16 * _body_scale(body))
    x, y = ((xy.min(0) + xy.max(0)) / 2).tolist()
    return x - half, y - 1.05 * half, x + half, y + 1.35 * half


def _body_scale(body: np.ndarray) -> float:
    """The torso's length in pixels as far as the shoulders tell it; 0 where they are not seen."""
    shoulders = body[[R_SHOULDER, L_SHOULDER]]
    return 1.3 * float(np.hypot(*(shoulders[0] - shoulders[1])[:2])) if shoulders[:, 2].all() else 0.0


def box_mask(box: Box, size: tuple[int, int]) -> Tensor:
    """The ellipse that fills a box, with an edge of a pixel: [H, W] in [0, 1]."""
    height, width = size
    x = (torch.arange(width) + 0.5 - (box[0] + box[2]) / 2) / max((box[2] - box[0]) / 2, 0.5)
    y = (torch.arange(height) + 0.5 - (box[1] + box[3]) / 2) / max((box[3] - box[1]) / 2, 0.5)
    pixel = min(box[2] - box[0], box[3] - box[1]) / 2
    return ((1 - torch.hypot(x, y[:, None])) * pixel + 0.5).clamp(0, 1)


def paste_back(
    photo: Tensor,
    image: Tensor,
    crops: Sequence[Crop],
    *,
    feather: float = 16.0,
    mask: Tensor | None = None,
    color: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Put pictures back into the photos that they were cropped from.

    photo: float [B, C, H, W] in [0, 1], or [1, C, H, W] for all. image: [B, C, h, w] in [0, 1]: the crops at the
    model's size, or enlarged since, in the same aspect ratio. crops: one per picture, or one for all. feather: over how
    many pixels of the photo the picture fades in from the crop's edge; edges that are the photo's own do not fade.
    mask: [B, h', w'] in [0, 1], which part of the crop to paste, for example the person; all of it by default. color:
    what is shown around the mask in place of the photo, one value per channel.

    Returns (photos [B, C, H, W], weight [B, H, W] in [0, 1]: how much of a pixel is the pasted picture). At scale 1 an
    untouched crop changes no bit of the photo. Raises TruePoseError when sizes or batches do not belong together, or a
    colour comes without a mask.
    """
    batch = image.shape[0]
    if photo.shape[0] not in (1, batch) or len(crops) not in (1, batch):
        raise TruePoseError(
            f"there are {photo.shape[0]} photos, {batch} pictures and {len(crops)} crops; "
            f"expected 1 or {batch} photos and 1 or {batch} crops"
        )
    if color is not None and mask is None:
        raise TruePoseError("a plain background needs to know where the person is; give a mask or the result's parsing")
    if not feather >= 0:
        raise TruePoseError(f"the feather is {feather} pixels; expected 0 or more")
    height, width = photo.shape[-2:]
    weight = photo.new_zeros(batch, height, width)
    if color is None:
        result = photo.expand(batch, -1, -1, -1).clone()
    else:
        result = photo.new_tensor(color).reshape(1, -1, 1, 1).expand(batch, -1, height, width).clone()
    for i in range(batch):
        crop = crops[i if len(crops) > 1 else 0]
        part = crop.view(result[i : i + 1])
        shown = _restored(crop, image[i : i + 1].to(photo), "the picture")
        share = _edge_weight(crop, feather).to(photo)
        if mask is not None:
            inside = mask[i if len(mask) > 1 else 0][None, None].to(photo)
            share = torch.minimum(share, _restored(crop, inside, "the mask")[0, 0])
        # lerp: exact where the share is 1, and where both pictures are equal.
        part.copy_(torch.lerp(part, shown, share))
        crop.view(weight[i : i + 1, None])[0, 0] = share
    return result, weight


def _restored(crop: Crop, image: Tensor, what: str) -> Tensor:
    """What a crop's picture [1, C, h, w] shows of the photo, at the photo's scale."""
    height, width = image.shape[-2:]
    model_h, model_w = crop.size_model
    if height * model_w != width * model_h:
        raise TruePoseError(
            f"{what} is {width}x{height} and the crop {model_w}x{model_h} (width x height); "
            "expected that size or one of the same aspect ratio, as after an upscaler"
        )
    frame = crop.frame
    return Frame(frame.size_in, frame.size_padded, (height, width), frame.place).restore(image)


def _edge_weight(crop: Crop, feather: float) -> Tensor:
    """How much of the crop shows at each pixel of the photo that it covers: 1 from `feather` pixels inside on."""
    sides = []
    for side, limit, start in zip(crop.frame.size_in, crop.size_photo, crop.corner, strict=True):
        place = torch.arange(side) + 0.5
        weight = torch.ones(side)
        if feather > 0:
            if start > 0:
                weight = torch.minimum(weight, place / feather)
            if start + side < limit:
                weight = torch.minimum(weight, (side - place) / feather)
        sides.append(weight)
    return torch.minimum(sides[0][:, None], sides[1])


def uncovered(weight: Tensor, person: Tensor | None = None) -> Tensor:
    """What an inpainting model should paint anew after `paste_back`: [B, H, W] in [0, 1].

    weight: [B, H, W] from `paste_back`. person: [B, H, W] or [1, H, W] in [0, 1], where the photo showed the person.
    That is where the old person shows and the new one does not, and the seam, where both pictures mix.
    """
    seam = 4 * weight * (1 - weight)
    return seam if person is None else torch.maximum(seam, person * (1 - weight))
