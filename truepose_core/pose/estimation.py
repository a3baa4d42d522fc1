"""Poses of photographs: YOLOX finds the people, DWPose their 133 keypoints; both are ONNX networks.

What the two networks are given and what their outputs mean are facts of their publications: YOLOX (Ge et al., arXiv
2107.08430), RTMPose's SimCC head (Jiang et al., arXiv 2303.07399), DWPose (Yang et al., arXiv 2307.15880), keypoints of
COCO-WholeBody (Jin et al., arXiv 2007.11858). Pixels are sampled as OpenCV does it, so that keypoints come out as from
DWPose's own code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.networks.known import Progress, default_folder, find, get, locate
from truepose_core.networks.onnx import OnnxSession, check_runtime, open_session, shape_text
from truepose_core.pictures.files import MAX_PIXELS
from truepose_core.pose.keypoints import Person, Pose

POSE_MODEL, DETECTOR_MODEL = "dwpose", "yolox-l"
N_WHOLEBODY = 133

THRESHOLD = 0.3
"""Keypoints and people of a lower score are left out."""

_OVERLAP = 0.45
_DETECTOR_SIZE, _GREY, _STRIDES, _PERSON = (640, 640), 114.0, (8, 16, 32), 0
_PADDING = 1.25
# From this many pixels per sample on the picture is averaged first (ours): bilinear sampling alone would skip pixels.
_SKIPPING = 2
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# Where each of OpenPose's 18 is among COCO's 17; the neck is made of the shoulders.
_SHOULDERS = [5, 6]
_OPENPOSE = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_FACE, _LEFT_HAND, _RIGHT_HAND = slice(23, 91), slice(91, 112), slice(112, 133)
_EYES = [2, 1]


@dataclass(frozen=True, eq=False)
class PoseEstimator:
    """DWPose and, where people shall be found, a detector. Sessions are shared, see `onnx_runtime`."""

    pose: OnnxSession
    detector: OnnxSession | None = None

    @property
    def description(self) -> str:
        """For people: the files and the providers in use."""
        sessions = [self.pose] if self.detector is None else [self.detector, self.pose]
        return " and ".join(f"{session.path.name} on {session.provider}" for session in sessions)


def open_estimator(pose: Path | str, detector: Path | str | None = None, *, provider: str = "auto") -> PoseEstimator:
    """Open the networks. Raises `TruePoseError` as `open_session`, and for files that are not such networks."""
    session = open_session(pose, provider=provider)
    if len(session.inputs) != 1 or len(session.outputs) != 2 or len(_shape(session)) != 4:
        raise TruePoseError(
            f"{session.path} is no DWPose network: it takes {_texts(session.inputs)} and gives "
            f"{_texts(session.outputs)}; expected one picture, and the two outputs simcc_x and simcc_y"
        )
    if None in _shape(session)[2:]:
        raise TruePoseError(f"{session.path} takes {_texts(session.inputs)}; expected a fixed height and width")
    if detector is None:
        return PoseEstimator(session)
    finder = open_session(detector, provider=provider)
    if len(finder.inputs) != 1 or len(_shape(finder)) != 4:
        raise TruePoseError(
            f"{finder.path} is no YOLOX detector: it takes {_texts(finder.inputs)}; expected one picture"
        )
    return PoseEstimator(session, finder)


def choose_estimator(
    folders: Iterable[Path | str] = (),
    *,
    detect: bool = True,
    provider: str = "auto",
    download: bool = False,
    progress: Progress | None = None,
) -> PoseEstimator:
    """DWPose, with the YOLOX detector if people shall be detected, from the first of the folders that has them.

    folders: `default_folder()` if there are none. download: fetch what is missing into the first folder. Raises
    `TruePoseError` without onnxruntime, and one that says which file to put where.
    """
    check_runtime(provider)
    folders = [Path(folder) for folder in folders] or [default_folder()]
    names = [POSE_MODEL, DETECTOR_MODEL] if detect else [POSE_MODEL]
    for name in names:
        if download and find(name, folders) is None:
            get(name, folders[0], progress=progress)
    return open_estimator(*(locate(name, folders) for name in names), provider=provider)


def estimate_pose(
    image: Tensor,
    estimator: PoseEstimator,
    *,
    box: Sequence[float] | None = None,
    threshold: float = THRESHOLD,
) -> list[Pose]:
    """The people in each picture, the largest first -> one Pose per picture.

    image: [B, 3, H, W] in [0, 1], RGB. box: left, top, right, bottom in pixels of the one person wanted, the same in
    all pictures; without it the detector's boxes, and without a detector the whole picture. threshold: the least score
    in 0..1 of a keypoint, and of a detected person.

    Raises `TruePoseError` for a picture that shows nobody, a box outside it, a picture of more than `MAX_PIXELS`, and
    networks whose outputs are of another kind.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise TruePoseError(f"the image is {tuple(image.shape)}; expected [B, 3, H, W]")
    if image.shape[2] * image.shape[3] > MAX_PIXELS:
        raise TruePoseError(f"the image is {image.shape[3]}x{image.shape[2]}; expected at most {MAX_PIXELS} pixels")
    if not 0 < threshold <= 1:
        raise TruePoseError(f"threshold is {threshold}; expected above 0 and at most 1")
    return [_pose_of(one, number, estimator, box, threshold) for number, one in enumerate(image)]


def _pose_of(
    image: Tensor, number: int, estimator: PoseEstimator, box: Sequence[float] | None, threshold: float
) -> Pose:
    height, width = image.shape[1:]
    pixels = image.detach().float().cpu() * 255
    if box is not None:
        boxes = np.array([_checked(box, width, height)])
    elif estimator.detector is not None:
        boxes = detect_people(pixels, estimator.detector, threshold)
    else:
        boxes = np.array([[0.0, 0.0, width, height]])
    found = [wholebody_person(keypoints(pixels, one, estimator.pose), width, height, threshold) for one in boxes]
    people = tuple(person for person in found if person.is_visible)
    if not people:
        sure = "no person was detected" if not len(boxes) else "no body keypoint is sure enough"
        raise TruePoseError(
            f"nobody was found in picture {number}: {sure} at the threshold {threshold:g}. Give a picture of a person, "
            "lower the threshold, or give a box around the person"
        )
    return Pose(width, height, people)


def detect_people(pixels: Tensor, detector: OnnxSession, threshold: float = THRESHOLD) -> np.ndarray:
    """Boxes [N, 4] (left, top, right, bottom in pixels) of the people, the largest first.

    pixels: [3, H, W] RGB in 0..255. detector: YOLOX with its raw output [1, cells, 5 + classes], or with non-maximum
    suppression inside, [1, N, 5].
    """
    fixed = _shape(detector)[2:]
    size = tuple(given or usual for given, usual in zip(fixed, _DETECTOR_SIZE, strict=True))
    picture, ratio = _letterbox(pixels, size)
    output = next(iter(_run(detector, picture).values()))
    if output.ndim != 3 or output.shape[-1] < 5:
        raise TruePoseError(
            f"{detector.path} gives {shape_text(output.shape)}; expected YOLOX's [1, cells, 85] or [1, boxes, 5]"
        )
    rows = output[0].astype(np.float64)
    if rows.shape[1] == 5:
        boxes, scores = rows[:, :4], rows[:, 4]
    else:
        boxes, scores = _decoded(rows, size, detector)
    sure = scores > threshold
    boxes, scores = boxes[sure] / ratio, scores[sure]
    boxes = boxes[_suppressed(boxes, scores)]
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes[np.argsort(-sides.prod(1), kind="stable")]


def keypoints(pixels: Tensor, box: np.ndarray, network: OnnxSession) -> np.ndarray:
    """The 133 keypoints [133, 3] of the person in a box (left, top, right, bottom): x, y in pixels, and score.

    pixels: [3, H, W] RGB in 0..255. Keypoints without a response have score 0.
    """
    height, width = _shape(network)[2:]
    centre, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * _PADDING
    size = np.maximum(size, size[::-1] * (width / height, height / width))
    crop = _crop(pixels, centre, size, height, width)
    crop = (crop - pixels.new_tensor(_MEAN)[:, None, None]) / pixels.new_tensor(_STD)[:, None, None]
    outputs = _run(network, crop)
    names = ("simcc_x", "simcc_y") if {"simcc_x", "simcc_y"} <= set(outputs) else tuple(outputs)
    responses = [outputs[name] for name in names]
    for name, response, side in zip(names, responses, (width, height), strict=True):
        if response.ndim != 3 or response.shape[1] != N_WHOLEBODY or response.shape[2] % side:
            raise TruePoseError(
                f"output {name!r} of {network.path} is {shape_text(response.shape)}; expected [1, {N_WHOLEBODY}, a "
                f"multiple of {side}], the keypoints of COCO-WholeBody"
            )
    best = np.stack([response[0].argmax(1) for response in responses], 1)
    scores = np.minimum(*(response[0].max(1) for response in responses)).astype(np.float64)
    bins = np.array([response.shape[2] for response in responses])
    xy = best / bins * size + centre - size / 2
    return np.concatenate([xy, scores.clip(0)[:, None]], 1) * (scores > 0)[:, None]


def wholebody_person(points: np.ndarray, width: int, height: int, threshold: float = THRESHOLD) -> Person:
    """A Person from keypoints [133, 3] of COCO-WholeBody in pixels; scores below the threshold count as missing.

    The neck is the middle of the shoulders, where both are there. The face's last two points are the eyes. Feet are
    left out. A hand or a face without any keypoint is None.
    """
    if points.shape != (N_WHOLEBODY, 3):
        raise TruePoseError(f"keypoints are {points.shape}; expected ({N_WHOLEBODY}, 3)")
    points = points.astype(np.float64) / (width, height, 1)
    points[:, 2] = np.where(points[:, 2] >= threshold, points[:, 2].clip(0, 1), 0)
    shoulders = points[_SHOULDERS]
    neck = np.array([*shoulders[:, :2].mean(0), shoulders[:, 2].min()])
    body = np.stack([neck if at is None else points[at] for at in _OPENPOSE])

    def part(rows: np.ndarray) -> np.ndarray | None:
        return rows if rows[:, 2].any() else None

    face = part(points[_FACE])
    face = None if face is None else np.concatenate([face, points[_EYES]])
    return Person(body, part(points[_LEFT_HAND]), part(points[_RIGHT_HAND]), face)


def _shape(session: OnnxSession) -> tuple[int | None, ...]:
    return next(iter(session.inputs.values()))


def _texts(sides: dict[str, tuple[int | None, ...]]) -> str:
    return ", ".join(f"{name} {shape_text(shape)}" for name, shape in sides.items()) or "nothing"


def _run(session: OnnxSession, picture: Tensor) -> dict[str, np.ndarray]:
    return session.run({next(iter(session.inputs)): picture[None].numpy()})


def _checked(box: Sequence[float], width: int, height: int) -> np.ndarray:
    array = np.array(box, dtype=np.float64)
    if array.shape != (4,) or not np.isfinite(array).all():
        raise TruePoseError(f"the box is {box}; expected left, top, right, bottom in pixels")
    left, top, right, bottom = array
    if left >= right or top >= bottom or right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise TruePoseError(
            f"the box {left:g}, {top:g}, {right:g}, {bottom:g} (left, top, right, bottom) shows nothing of the "
            f"{width}x{height} picture"
        )
    return array


def _letterbox(pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, float]:
    """(the picture at the top left of a grey one of this size, as BGR [3, *size]; network pixels per pixel)."""
    ratio = min(size[0] / pixels.shape[1], size[1] / pixels.shape[2])
    inner = tuple(max(1, int(side * ratio)) for side in pixels.shape[1:])
    picture = pixels.new_full((3, *size), _GREY)
    smooth = ratio * _SKIPPING < 1
    scaled = F.interpolate(pixels[None], size=inner, mode="bilinear", align_corners=False, antialias=smooth)[0]
    picture[:, : inner[0], : inner[1]] = scaled.flip(0).round()
    return picture, ratio


def _decoded(rows: np.ndarray, size: tuple[int, int], detector: OnnxSession) -> tuple[np.ndarray, np.ndarray]:
    """(boxes [cells, 4], scores of "person" [cells]) of YOLOX's raw output [cells, 5 + classes]."""
    cells, strides = [], []
    for stride in _STRIDES:
        high, wide = (side // stride for side in size)
        y, x = np.mgrid[:high, :wide]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((high * wide, 1), stride))
    cell, stride = np.concatenate(cells), np.concatenate(strides)
    if len(rows) != len(cell):
        raise TruePoseError(f"{detector.path} gives {len(rows)} cells; expected YOLOX's {len(cell)} for {size} pixels")
    centre, half = (rows[:, :2] + cell) * stride, np.exp(rows[:, 2:4]) * stride / 2
    return np.concatenate([centre - half, centre + half], 1), rows[:, 4] * rows[:, 5 + _PERSON]


def _suppressed(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """The boxes to keep, best first: each drops those that overlap it by more than `_OVERLAP`. Sizes count both border
    pixels, as in the detector's own code."""
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    order, kept = np.argsort(scores)[::-1], []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(int(best))
        sides = np.minimum(boxes[best, 2:], boxes[rest, 2:]) - np.maximum(boxes[best, :2], boxes[rest, :2]) + 1
        shared = sides.clip(0).prod(1)
        order = rest[shared <= _OVERLAP * (areas[best] + areas[rest] - shared)]
    return kept


def _crop(pixels: Tensor, centre: np.ndarray, size: np.ndarray, height: int, width: int) -> Tensor:
    """The box of this centre and size (x, y) as [3, height, width]; black outside the picture."""
    block = int(size[0] / width)
    if block >= _SKIPPING:
        rows, columns = -pixels.shape[1] % block, -pixels.shape[2] % block
        pixels = F.avg_pool2d(F.pad(pixels[None], (0, columns, 0, rows)), block)[0]
        centre, size = (centre + 0.5) / block - 0.5, size / block
    lines = []
    for axis, (count, extent) in enumerate(((width, pixels.shape[2]), (height, pixels.shape[1]))):
        at = centre[axis] + (np.arange(count) - count / 2) * (size[axis] / count)
        lines.append(torch.from_numpy((2 * at + 1) / extent - 1).float())
    grid = torch.stack(torch.meshgrid(lines[1], lines[0], indexing="ij")[::-1], -1)
    return F.grid_sample(pixels[None], grid[None], padding_mode="zeros", align_corners=False)[0].round()
