"""`Person` and `Pose`: OpenPose keypoints.

Sources: the keypoint orders are OpenPose's (Cao et al., arXiv 1812.08008); the dictionary is
ComfyUI's POSE_KEYPOINT, which is OpenPose's JSON with a canvas size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

BODY_KEYPOINTS: tuple[str, ...] = (
    "nose",
    "neck",
    "r_shoulder",
    "r_elbow",
    "r_wrist",
    "l_shoulder",
    "l_elbow",
    "l_wrist",
    "r_hip",
    "r_knee",
    "r_ankle",
    "l_hip",
    "l_knee",
    "l_ankle",
    "r_eye",
    "l_eye",
    "r_ear",
    "l_ear",
)

# The body's keypoints by number, the only place where they stand; pairs are (right, left).
NOSE, NECK = 0, 1
R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = 2, 3, 4, 5, 6, 7
R_HIP, R_KNEE, R_ANKLE, L_HIP, L_KNEE, L_ANKLE = 8, 9, 10, 11, 12, 13
R_EYE, L_EYE, R_EAR, L_EAR = 14, 15, 16, 17
SHOULDERS, ELBOWS, WRISTS = (R_SHOULDER, L_SHOULDER), (R_ELBOW, L_ELBOW), (R_WRIST, L_WRIST)
HIPS, KNEES, ANKLES = (R_HIP, L_HIP), (R_KNEE, L_KNEE), (R_ANKLE, L_ANKLE)
EYES, EARS = (R_EYE, L_EYE), (R_EAR, L_EAR)
FACE_POINTS = (NOSE, *EYES, *EARS)

# The limbs in drawing order, as indices into BODY_KEYPOINTS.
LIMBS: tuple[tuple[int, int], ...] = (
    (1, 2),
    (1, 5),
    (2, 3),
    (3, 4),
    (5, 6),
    (6, 7),
    (1, 8),
    (8, 9),
    (9, 10),
    (1, 11),
    (11, 12),
    (12, 13),
    (1, 0),
    (0, 14),
    (14, 16),
    (0, 15),
    (15, 17),
)

# The bones of a hand: from the wrist (0) up each of the five fingers.
HAND_EDGES: tuple[tuple[int, int], ...] = tuple(
    (0 if joint == 0 else 4 * finger + joint, 4 * finger + joint + 1) for finger in range(5) for joint in range(4)
)

N_BODY, N_HAND, N_FACE = 18, 21, 70

_ARRAYS: tuple[tuple[str, str, tuple[int, ...]], ...] = (
    # our field, key in the dictionary, accepted numbers of keypoints
    ("body", "pose_keypoints_2d", (N_BODY, 25)),
    ("hand_left", "hand_left_keypoints_2d", (N_HAND,)),
    ("hand_right", "hand_right_keypoints_2d", (N_HAND,)),
    ("face", "face_keypoints_2d", (68, N_FACE)),
)


@dataclass(frozen=True, eq=False)
class Person:
    """The keypoints of one person.

    body: [18, 3] in the order of `BODY_KEYPOINTS`; hand_left, hand_right: [21, 3] or None; face:
    [70, 3] or None. Each row is x / width, y / height (0..1 inside the canvas, may lie outside) and
    a confidence in 0..1, where 0 means missing (its x and y become 0). Arrays are stored as
    read-only float32. Raises `TruePoseError` for other shapes, NaN, or other confidences.
    """

    body: np.ndarray
    hand_left: np.ndarray | None = None
    hand_right: np.ndarray | None = None
    face: np.ndarray | None = None

    def __post_init__(self) -> None:
        for field, _, counts in _ARRAYS:
            value = getattr(self, field)
            if value is None and field != "body":
                continue
            array = np.array(value, dtype=np.float32)
            shape = (N_BODY if field == "body" else counts[-1], 3)
            if array.shape != shape:
                raise TruePoseError(f"{field} keypoints are {array.shape}; expected {shape}")
            if not np.isfinite(array).all():
                raise TruePoseError(f"{field} keypoints hold NaN or infinite values")
            if array[:, 2].min() < 0 or array[:, 2].max() > 1:
                raise TruePoseError(f"{field} confidences are outside 0..1")
            array[array[:, 2] == 0] = 0
            array.setflags(write=False)
            object.__setattr__(self, field, array)

    @property
    def is_visible(self) -> bool:
        """True when at least one body keypoint is there."""
        return bool(self.body[:, 2].any())


@dataclass(frozen=True, eq=False)
class Pose:
    """The people of one frame on a canvas of width x height pixels; there may be none."""

    width: int
    height: int
    people: tuple[Person, ...] = ()

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise TruePoseError(f"canvas {name} is {value!r}; expected a whole number of pixels")
            object.__setattr__(self, name, int(value))
        object.__setattr__(self, "people", tuple(self.people))
        for person in self.people:
            if not isinstance(person, Person):
                raise TruePoseError(f"people holds a {type(person).__name__}; expected Person")

    def largest(self) -> int:
        """The index of the largest person: the longest diagonal, in pixels, of the box around
        the visible body keypoints; the first of equals.

        Raises `TruePoseError` when there is no person with a visible body keypoint.
        """
        seen = [i for i, person in enumerate(self.people) if person.is_visible]
        if not seen:
            raise TruePoseError(
                "the pose has no person: no body keypoint is visible. Give a pose with at least one detected person"
            )
        return max(seen, key=lambda i: self._diagonal(self.people[i]))

    def person(self, index: int | None = None) -> Person:
        """The person with this index (from 0), or the largest.

        With several people and no index, a log warning says which one was taken. Raises
        `TruePoseError` when there is no such person.
        """
        if index is None:
            index = self.largest()
            if len(self.people) > 1:
                _log.warning(
                    "the pose has %d people; taking person %d, the largest. Choose another by its index, 0 to %d",
                    len(self.people),
                    index,
                    len(self.people) - 1,
                )
            return self.people[index]
        if not self.people:
            raise TruePoseError(f"person {index} was asked for, but the pose has no person")
        if not 0 <= index < len(self.people):
            raise TruePoseError(
                f"person {index} was asked for, but the pose has {len(self.people)}; "
                f"expected an index from 0 to {len(self.people) - 1}"
            )
        if not self.people[index].is_visible:
            raise TruePoseError(f"person {index} has no visible body keypoint")
        return self.people[index]

    def _diagonal(self, person: Person) -> float:
        xy = person.body[person.body[:, 2] > 0, :2]
        extent = np.ptp(xy.astype(np.float64), axis=0)
        return math.hypot(extent[0] * self.width, extent[1] * self.height)


def body_tensor(persons: Sequence[Person]) -> torch.Tensor:
    """The bodies of these people: float32 [B, 18, 3] on the CPU, as in `Person.body`."""
    import torch

    if not persons:
        raise TruePoseError("no person was given; expected at least one")
    return torch.from_numpy(np.stack([person.body for person in persons]))
