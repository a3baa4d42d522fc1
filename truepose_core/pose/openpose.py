"""Poses as OpenPose JSON: read in every dialect met, written in one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from truepose_core.errors import TruePoseError
from truepose_core.json_text import read_json
from truepose_core.pose.keypoints import _ARRAYS, BODY_KEYPOINTS, N_BODY, N_HAND, Person, Pose, _log

if TYPE_CHECKING:
    pass

# OpenPose's 25 body points hold ours at these places; the mid hip and the feet are left out.
BODY_25_TO_18: tuple[int, ...] = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
)

# A keypoint further outside than this many canvas sizes is a mistake, not a pose.
FAR_OUT = 4.0

# If no coordinate of a frame is larger than this, they are normalised: a person in pixels does
# not fit into 2x2 of them, and a normalised foot may well be a little below the canvas.
NORMALISED_UP_TO = 2.0

# A hand whose root is this near a wrist, in sizes of the hand, hangs on it.
ON_THE_WRIST = 0.5

# ComfyUI's SDPose alone writes this key. It keeps every keypoint; its own drawing leaves out lower confidences.
_SDPOSE_KEY, _SDPOSE_LEAST = "foot_keypoints_2d", 0.3

_MAX_INFERRED = 16384


def read_pose(
    source: str | os.PathLike[str] | dict[str, Any] | Sequence[dict[str, Any]],
    canvas: tuple[int, int] | None = None,
) -> list[Pose]:
    """Read poses from POSE_KEYPOINT, OpenPose JSON, or a JSON file of either; one per frame.

    Tolerated, because producers disagree: one frame or a list of them; 18 or 25 body points (of
    OpenPose's BODY_25 the mid hip and the feet are dropped), 68 or 70 face points; arrays that are
    missing, None or empty; keypoints flat or nested; missing keypoints as None, as (-1, -1), or
    with a confidence of 0 or less. Confidences above 1 become 1. Nobody at all is allowed here.

    Coordinates of a frame are taken as normalised when none is larger than `NORMALISED_UP_TO` in
    size, and as pixels of the frame's canvas otherwise. Hands that hang on the other side's wrist
    change sides: ComfyUI's SDPose names them the other way round. It also keeps keypoints that it
    did not see: those of its people with a confidence below 0.3 count as missing.

    canvas: (width, height) in pixels for frames that do not say their own. Without it the canvas
    is inferred, and a log warning says so: for pixels the smallest multiple of 8 that holds the
    visible keypoints, for normalised coordinates 512x512.

    Raises `TruePoseError`, naming the file and the keypoint, for anything else: a file that cannot
    be read, arrays of another length, NaN, or keypoints more than `FAR_OUT` canvas sizes away.
    """
    where = "the pose"
    data: Any = source
    if isinstance(source, (str, os.PathLike)):
        where = f"pose file {os.fspath(source)}"
        data = read_json(Path(source), where)
    if isinstance(data, dict):
        return [_read_frame(data, canvas, where)]
    if not isinstance(data, (list, tuple)):
        raise TruePoseError(
            f"{where} is a {type(data).__name__}; expected a frame "
            '{"people": [...], "canvas_width": ..., "canvas_height": ...} or a list of frames'
        )
    if not data:
        raise TruePoseError(f"{where} is an empty list; expected at least one frame")
    single = len(data) == 1
    return [_read_frame(frame, canvas, where if single else f"{where}, frame {i}") for i, frame in enumerate(data)]


def write_pose(poses: Pose | Sequence[Pose]) -> list[dict[str, Any]]:
    """Write poses as strict POSE_KEYPOINT, ready for `json.dumps`.

    One dictionary per pose: canvas size, and per person all four flat arrays in full length
    (18 / 70 / 21 / 21 keypoints), in pixels, with confidences 0 or 1; missing is 0, 0, 0.
    """
    frames = []
    for pose in [poses] if isinstance(poses, Pose) else poses:
        people = []
        for person in pose.people:
            arrays = {}
            for field, key, counts in _ARRAYS:
                count = N_BODY if field == "body" else counts[-1]
                array = getattr(person, field)
                array = np.zeros((count, 3)) if array is None else array.astype(np.float64)
                visible = array[:, 2:] > 0
                pixels = array[:, :2] * (pose.width, pose.height)
                arrays[key] = np.hstack([pixels * visible, visible]).ravel().tolist()
            people.append(arrays)
        frames.append({"canvas_width": pose.width, "canvas_height": pose.height, "people": people})
    return frames


def _read_frame(frame: Any, canvas: tuple[int, int] | None, where: str) -> Pose:
    if not isinstance(frame, dict) or "people" not in frame:
        given = f"keys {sorted(map(str, frame))}" if isinstance(frame, dict) else repr(type(frame))
        raise TruePoseError(f'{where} has {given}; expected a dictionary with "people"')
    listed = frame["people"] if frame["people"] is not None else []
    if not isinstance(listed, (list, tuple)):
        raise TruePoseError(f'"people" of {where} is a {type(listed).__name__}; expected a list')
    people = [
        _read_person(person, f"{where}, person {i}" if len(listed) > 1 else where) for i, person in enumerate(listed)
    ]
    arrays = [array for person in people for array in person.values()]
    seen = [array[array[:, 2] > 0, :2] for array in arrays]
    points = np.concatenate([*seen, np.zeros((0, 2))])
    normalised = bool((np.abs(points) <= NORMALISED_UP_TO).all())
    width, height = _canvas_size(frame, canvas, points, normalised, where)
    for i, person in enumerate(people):
        label = f"{where}, person {i}" if len(people) > 1 else where
        for field, array in person.items():
            if not normalised:
                array[:, :2] /= (width, height)
            _check_far_out(array, field, (width, height), label)
        _change_hands(person, np.array([width / height, 1.0]))
    return Pose(width, height, tuple(_make_person(person) for person in people))


def _change_hands(person: dict[str, np.ndarray], stretch: np.ndarray) -> None:
    """Give the hands of a person to the wrists that they hang on, in place; only where that is beyond doubt: the other
    wrist is near and the hand small, as hands are.

    stretch: what makes x as long as y, (width / height, 1).
    """
    if "body" not in person or not person["body"][:, 2].any():
        return

    def extent(points: np.ndarray) -> float:
        return math.hypot(*(np.ptp(points[:, :2], axis=0) * stretch))

    own, other, reach = 0.0, 0.0, math.inf
    for hand, side, opposite in (("hand_left", "l_wrist", "r_wrist"), ("hand_right", "r_wrist", "l_wrist")):
        points = person.get(hand, np.zeros((N_HAND, 3)))
        points = points[points[:, 2] > 0] if points[0, 2] else points[:0]
        if not len(points):
            continue
        lengths = []
        for wrist in (person["body"][BODY_KEYPOINTS.index(name)] for name in (side, opposite)):
            way = (points[0, :2] - wrist[:2]) * stretch
            lengths.append(math.hypot(*way) if wrist[2] else math.inf)
        own, other = own + lengths[0], other + lengths[1]
        reach = min(reach, ON_THE_WRIST * extent(points))
    body = person["body"]
    if other < own / 2 and other < reach < ON_THE_WRIST / 2 * extent(body[body[:, 2] > 0]):
        hands = [person.pop(hand, None) for hand in ("hand_right", "hand_left")]
        person.update({k: a for k, a in zip(("hand_left", "hand_right"), hands, strict=True) if a is not None})


def _make_person(arrays: dict[str, np.ndarray]) -> Person:
    body = arrays.pop("body", None)
    body = np.zeros((N_BODY, 3)) if body is None else body
    return Person(body, **{k: a for k, a in arrays.items() if a[:, 2].any()})


def _canvas_size(
    frame: dict[str, Any],
    canvas: tuple[int, int] | None,
    points: np.ndarray,
    normalised: bool,
    where: str,
) -> tuple[int, int]:
    given = frame.get("canvas_width"), frame.get("canvas_height")
    if given == (None, None):
        if canvas is None:
            return _inferred_canvas(points, normalised, where)
        given = canvas
    size = []
    for name, value in zip(("width", "height"), given, strict=True):
        is_number = isinstance(value, (int, float, np.integer, np.floating))
        if not is_number or isinstance(value, bool) or not 1 <= value < 2**24 or value % 1:
            raise TruePoseError(f"the canvas {name} of {where} is {value!r}; expected a whole number of pixels")
        size.append(int(value))
    return size[0], size[1]


def _inferred_canvas(points: np.ndarray, normalised: bool, where: str) -> tuple[int, int]:
    if normalised or not len(points):
        width = height = 512
    else:
        # The cap lets the check of far-out keypoints catch what no real canvas holds.
        high = points.max(0).clip(1, _MAX_INFERRED).tolist()
        width, height = (8 * math.ceil(side / 8) for side in high)
    _log.warning("%s says no canvas size; taking %dx%d (width x height)", where, width, height)
    return width, height


def _read_person(person: Any, where: str) -> dict[str, np.ndarray]:
    """The arrays of a person as [N, 3] float64 of our lengths; missing keypoints have c = 0."""
    if not isinstance(person, dict):
        raise TruePoseError(f"{where} is a {type(person).__name__}; expected a dictionary")
    arrays = {}
    for field, key, counts in _ARRAYS:
        values = person.get(key)
        if values is None or (isinstance(values, (list, tuple, np.ndarray)) and len(values) == 0):
            continue
        rows = _keypoint_rows(values, key, counts, where)
        if field == "body" and len(rows) == 25:
            rows = [rows[i] for i in BODY_25_TO_18]
        array = np.zeros((N_BODY if field == "body" else counts[-1], 3))
        for i, row in enumerate(rows):
            array[i] = _read_keypoint(row, _keypoint_name(field, i), where)
        if _SDPOSE_KEY in person:
            array[array[:, 2] < _SDPOSE_LEAST] = 0
        arrays[field] = array
    return arrays


def _keypoint_rows(values: Any, key: str, counts: tuple[int, ...], where: str) -> list[Sequence]:
    expected = f"expected x, y, confidence for each of {' or '.join(map(str, counts))} keypoints"
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise TruePoseError(f"{key} of {where} is a {type(values).__name__}; {expected}")
    if all(value is None or isinstance(value, (list, tuple)) for value in values):
        nested = len(values) in counts
        rows = [(None, None, None) if value is None else value for value in values]
        if nested and all(len(row) == 3 for row in rows):
            return rows
    if len(values) % 3 or len(values) // 3 not in counts:
        raise TruePoseError(f"{key} of {where} has {len(values)} values; {expected}")
    return [values[i : i + 3] for i in range(0, len(values), 3)]


def _read_keypoint(row: Sequence, name: str, where: str) -> tuple[float, float, float]:
    if any(value is None for value in row):
        return 0.0, 0.0, 0.0
    for value in row:
        if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
            raise TruePoseError(f"{name} of {where} holds {value!r}; expected three numbers")
    x, y, confidence = (_to_float(value) for value in row)
    if confidence <= 0 or (x == -1 and y == -1):
        return 0.0, 0.0, 0.0
    if not (math.isfinite(x) and math.isfinite(y) and math.isfinite(confidence)):
        raise TruePoseError(f"{name} of {where} is ({x}, {y}) with confidence {confidence}; expected finite numbers")
    return x, y, min(confidence, 1.0)


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_far_out(array: np.ndarray, field: str, size: tuple[int, int], where: str) -> None:
    far = (array[:, 2] > 0) & (np.abs(array[:, :2] - 0.5) > FAR_OUT + 0.5).any(1)
    for i in far.nonzero()[0].tolist():
        x, y = (array[i, :2] * size).tolist()
        raise TruePoseError(
            f"{_keypoint_name(field, i)} of {where} is at x={x:g} y={y:g} pixels, more than "
            f"{FAR_OUT:g} canvas sizes outside the {size[0]}x{size[1]} canvas; "
            "check the canvas size and the coordinates"
        )


def _keypoint_name(field: str, index: int) -> str:
    if field == "body":
        return f"body keypoint {index} ({BODY_KEYPOINTS[index]})"
    return f"{field.replace('_', ' ')} keypoint {index}"
