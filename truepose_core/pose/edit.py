"""Editing poses: mirror, move and scale, one joint, and the way from one pose to another.

Everything works on `Pose` and `Person` and keeps hands and face. Coordinates are x/width, y/height; angles and lengths
are those on the picture, so they need its aspect, width / height. The constructions are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from truepose_core.errors import TruePoseError
from truepose_core.pose.keypoints import (
    ANKLES,
    BODY_KEYPOINTS,
    FACE_POINTS,
    HAND_EDGES,
    HIPS,
    L_WRIST,
    N_FACE,
    NECK,
    NOSE,
    R_WRIST,
    SHOULDERS,
    Person,
    Pose,
)

PARENTS: tuple[int, ...] = (1, -1, 1, 2, 3, 1, 5, 6, 1, 8, 9, 1, 11, 12, 0, 0, 14, 15)
"""The parent of each body keypoint; the neck has none."""

FOLLOW = ("turn along", "move along", "stay")
"""What the children of a moved joint do."""

ABOUT = ("feet", "hips", "centre")

BODY_MIRROR = tuple(
    BODY_KEYPOINTS.index({"r": "l", "l": "r"}[name[0]] + name[1:] if name[1] == "_" else name)
    for name in BODY_KEYPOINTS
)


def _face_mirror() -> tuple[int, ...]:
    """Where each of the 70 face points goes: the 68 of the iBUG markup and the two pupils."""
    places = list(range(N_FACE))
    # Of each run first..last, the points change places from its ends inwards.
    for first, last in ((0, 16), (17, 26), (31, 35), (48, 54), (55, 59), (60, 64), (65, 67), (68, 69)):
        for point in range(first, last + 1):
            places[point] = first + last - point
    for one, other in ((36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46)):
        places[one], places[other] = other, one
    return tuple(places)


FACE_MIRROR = _face_mirror()

_Move = Callable[[np.ndarray], np.ndarray]


def _mapped(person: Person, move: _Move) -> Person:
    """The person with `move` applied to the coordinates [N, 2] of every visible keypoint."""

    def one(points: np.ndarray | None) -> np.ndarray | None:
        if points is None:
            return None
        return np.concatenate([move(points[:, :2].astype(np.float64)), points[:, 2:]], 1) * (points[:, 2:] > 0)

    return Person(one(person.body), one(person.hand_left), one(person.hand_right), one(person.face))


def mirror_person(person: Person, axis: float = 0.5) -> Person:
    """The person in a mirror at x = axis: left and right change names, hands included. Twice is the person again."""

    def swapped(points: np.ndarray | None, order: Sequence[int] | None = None) -> np.ndarray | None:
        return points if points is None or order is None else points[list(order)]

    named = Person(
        swapped(person.body, BODY_MIRROR),
        swapped(person.hand_right),
        swapped(person.hand_left),
        swapped(person.face, FACE_MIRROR),
    )
    return _mapped(named, lambda xy: np.stack([2 * axis - xy[:, 0], xy[:, 1]], 1))


def mirror_pose(pose: Pose, person: int | None = None) -> Pose:
    """Everybody mirrored as the picture would be, or one person (an index from 0) on the spot."""
    if person is None:
        return Pose(pose.width, pose.height, tuple(mirror_person(one) for one in pose.people))
    low, high = bounds(pose.person(person))
    return _with(pose, person, mirror_person(pose.people[person], float(low[0] + high[0]) / 2))


def bounds(person: Person) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high corner [2] of the box around the visible body keypoints."""
    xy = person.body[person.body[:, 2] > 0, :2].astype(np.float64)
    if not len(xy):
        raise TruePoseError("the person has no visible body keypoint")
    return xy.min(0), xy.max(0)


def anchor_point(person: Person, about: str) -> np.ndarray:
    """The place [2] that scaling leaves alone: "feet" (between the ankles, as low as the lower one), "hips" (their
    middle), or "centre" (of the box around the body). Raises `TruePoseError` where the joints are missing."""
    if about not in ABOUT:
        raise TruePoseError(f"about is {about!r}; expected one of {', '.join(ABOUT)}")
    low, high = bounds(person)
    if about == "centre":
        return (low + high) / 2
    joints = person.body[list(ANKLES if about == "feet" else HIPS)].astype(np.float64)
    joints = joints[joints[:, 2] > 0, :2]
    if not len(joints):
        names = "the ankles are" if about == "feet" else "the hips are"
        raise TruePoseError(f"{names} missing, so the pose cannot be scaled about the {about}; choose centre")
    place = joints.mean(0)
    return np.array([place[0], joints[:, 1].max()]) if about == "feet" else place


def transform_pose(
    pose: Pose,
    *,
    scale: float = 1.0,
    move: tuple[float, float] = (0.0, 0.0),
    about: str = "feet",
    person: int | None = None,
) -> Pose:
    """Scale by a factor above 0 about a point of the body, then move by (x, y) in canvas widths and heights.

    person: an index from 0; by default everybody, each about their own point. Raises `TruePoseError` for a scale that
    is not above 0, and where the point's joints are missing.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise TruePoseError(f"scale is {scale}; expected a number above 0")
    shift = np.asarray(move, dtype=np.float64)
    if shift.shape != (2,) or not np.isfinite(shift).all():
        raise TruePoseError(f"move is {move}; expected two numbers, x and y")
    chosen = [i for i, one in enumerate(pose.people) if one.is_visible] if person is None else [person]
    for index in chosen:
        one = pose.person(index)
        fixed = anchor_point(one, about)
        pose = _with(pose, index, _mapped(one, lambda xy, fixed=fixed: (xy - fixed) * scale + fixed + shift))
    return pose


def edit_joint(
    pose: Pose,
    joint: str,
    *,
    to: tuple[float, float] | None = None,
    by: tuple[float, float] | None = None,
    follow: str = "turn along",
    person: int | None = None,
) -> Pose:
    """Move one joint of one person (the largest by default) to a place or by a distance, in canvas widths and heights.

    follow: "turn along" turns and moves the joint's children (from an elbow: wrist and hand) rigidly as the bone to
    the joint turns, "move along" only moves them, "stay" leaves them. The neck is the root: all of the body follows it.
    A missing joint can be moved `to` a place and is then visible; its children stay. Raises `TruePoseError` for an
    unknown joint and for moving a missing one `by` a distance.
    """
    if joint not in BODY_KEYPOINTS:
        raise TruePoseError(f"there is no joint {joint!r}; expected one of {', '.join(BODY_KEYPOINTS)}")
    if follow not in FOLLOW:
        raise TruePoseError(f"follow is {follow!r}; expected one of {', '.join(FOLLOW)}")
    if (to is None) == (by is None):
        raise TruePoseError("give either a place to move the joint to or a distance to move it by")
    index = pose.largest() if person is None else person
    one = pose.person(index)
    number = BODY_KEYPOINTS.index(joint)
    seen = one.body[number, 2] > 0
    if by is not None and not seen:
        raise TruePoseError(
            f"{joint} of person {index} is missing, so it cannot be moved by a distance; give its place"
        )
    old = one.body[number, :2].astype(np.float64)
    new = np.asarray(to, np.float64) if to is not None else old + np.asarray(by, np.float64)
    if new.shape != (2,) or not np.isfinite(new).all():
        raise TruePoseError(f"the new place of {joint} is {new}; expected two numbers, x and y")
    body = one.body.astype(np.float64)
    parts = {"body": body, "hand_left": one.hand_left, "hand_right": one.hand_right, "face": one.face}
    if seen and follow != "stay":
        stretch = np.array([pose.width / pose.height, 1.0])
        turn = np.eye(2)
        parent = PARENTS[number]
        if follow == "turn along" and parent >= 0 and body[parent, 2] > 0:
            turn = _turn((old - body[parent, :2]) * stretch, (new - body[parent, :2]) * stretch)
        moved = _descendants(number)

        def along(points: np.ndarray) -> np.ndarray:
            xy = ((points[:, :2] - old) * stretch) @ turn.T / stretch + new
            return np.concatenate([xy, points[:, 2:]], 1) * (points[:, 2:] > 0)

        body[moved] = along(body[moved])
        for name, carrier in (("hand_left", L_WRIST), ("hand_right", R_WRIST), ("face", NOSE)):
            if parts[name] is not None and carrier in (*moved, number):
                parts[name] = along(parts[name].astype(np.float64))
    body[number] = (*new, body[number, 2] if seen else 1.0)
    return _with(pose, index, Person(**parts))


def interpolate_persons(first: Person, second: Person, t: float, *, aspect: float) -> Person:
    """The person at t in [0, 1] on the way from `first` (t = 0) to `second` (t = 1), both exactly themselves.

    Arms, legs and fingers: the angle of each bone goes the shortest way round and its length linearly. The trunk turns
    as a whole, the shortest way; within it, widths of shoulders and hips and the places of the face go linearly, so
    that somebody who turns around does so about the vertical. A keypoint that only one of the two shows is carried
    along and shown in that one's half of the way.
    """
    if not 0 <= t <= 1:
        raise TruePoseError(f"t is {t}; expected a number from 0 to 1")
    if t in (0, 1):
        return second if t else first
    nearer = second if t > 0.5 else first
    stretch = np.array([aspect, 1.0])
    (a, b), body, turn = _body_between(first, second, t, stretch)

    def part(name: str, carrier: int, between: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray | None:
        """A hand or the face, relative to the joint that carries it."""
        given = getattr(nearer, name)
        if given is None:
            return None
        ends = [
            (points, points[:, :2] * stretch - origin[carrier])
            for points, origin in ((getattr(first, name), a), (getattr(second, name), b))
            if points is not None
        ]
        (one, offset), (other, offset_b) = ends[0], ends[-1]
        here, there = one[:, 2:] > 0, other[:, 2:] > 0
        offset, offset_b = np.where(here, offset, offset_b), np.where(there, offset_b, offset)
        xy = body[carrier] + (offset if len(ends) == 1 else between(offset, offset_b))
        return np.concatenate([xy / stretch, given[:, 2:]], 1) * (given[:, 2:] > 0)

    return Person(
        np.concatenate([body / stretch, nearer.body[:, 2:]], 1) * (nearer.body[:, 2:] > 0),
        part("hand_left", L_WRIST, lambda x, y: _hand_between(x, y, t)),
        part("hand_right", R_WRIST, lambda x, y: _hand_between(x, y, t)),
        part("face", NOSE, lambda x, y: _turned_between(x, y, turn, t)),
    )


def interpolate_poses(first: Pose, second: Pose, steps: int) -> list[Pose]:
    """`steps` poses (at least 2) from `first` to `second`, both included and exactly themselves; see
    `interpolate_persons`. People are matched by their index.

    Raises `TruePoseError` for canvases of another shape, another number of people, or fewer than 2 steps.
    """
    if steps < 2:
        raise TruePoseError(f"steps is {steps}; expected at least 2, the two poses themselves")
    if not first.people or not second.people:
        raise TruePoseError(f"the {'second' if first.people else 'first'} pose has no person")
    if len(first.people) != len(second.people):
        raise TruePoseError(
            f"the first pose has {len(first.people)} people and the second {len(second.people)}; expected as many"
        )
    if (first.width, first.height) != (second.width, second.height):
        raise TruePoseError(
            f"the first canvas is {first.width}x{first.height} and the second {second.width}x{second.height} "
            "(width x height); expected the same"
        )
    aspect = first.width / first.height
    return [
        Pose(
            first.width,
            first.height,
            tuple(
                interpolate_persons(a, b, step / (steps - 1), aspect=aspect)
                for a, b in zip(first.people, second.people, strict=True)
            ),
        )
        for step in range(steps)
    ]


def _with(pose: Pose, index: int, person: Person) -> Pose:
    people = (*pose.people[:index], person, *pose.people[index + 1 :])
    return Pose(pose.width, pose.height, people)


def _turn(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The rotation [2, 2] from the direction of `old` to that of `new`; none where either has no length."""
    if not (old.any() and new.any()):
        return np.eye(2)
    return _rotation(math.atan2(new[1], new[0]) - math.atan2(old[1], old[0]))


def _rotation(angle: float) -> np.ndarray:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _shortest(angle: np.ndarray) -> np.ndarray:
    """Angles brought into -pi..pi."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _descendants(joint: int) -> list[int]:
    below = [child for child, parent in enumerate(PARENTS) if parent == joint]
    return below + [deeper for child in below for deeper in _descendants(child)]


# Parents before children. The trunk's joints hang on the neck; arms and legs on each other.
_TRUNK = (2, 5, 8, 11, *FACE_POINTS)
_LIMBS = (3, 4, 6, 7, 9, 10, 12, 13)


def _body_between(
    first: Person, second: Person, t: float, stretch: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, float]:
    """((the two bodies with all joints placed, [18, 2] each), the body between them, the turn of the trunk)."""
    a, b = _completed(first, second, stretch)
    trunks = [body[list(HIPS)].mean(0) - body[NECK] for body in (a, b)]
    angles = [math.atan2(y, x) if math.hypot(x, y) > 1e-6 else math.pi / 2 for x, y in trunks]
    turn = float(_shortest(np.array(angles[1] - angles[0])))
    body = (1 - t) * a + t * b
    trunk = list(_TRUNK)
    body[trunk] = body[NECK] + _turned_between(a[trunk] - a[NECK], b[trunk] - b[NECK], turn, t)
    for joint in _LIMBS:
        parent = PARENTS[joint]
        body[joint] = body[parent] + _swung(a[joint] - a[parent], b[joint] - b[parent], t)
    # Feet that stand still shall not slide: what the bodies stand on goes straight.
    seen = (first.body[:, 2] > 0) & (second.body[:, 2] > 0)
    for stand in (ANKLES, HIPS):
        if seen[list(stand)].all():
            straight = ((1 - t) * a + t * b)[list(stand)].mean(0)
            body += straight - body[list(stand)].mean(0)
            break
    return (a, b), body, turn


def _completed(first: Person, second: Person, stretch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both bodies [18, 2] with a place for every joint: what one misses hangs on it as on the other."""
    bodies = [one.body[:, :2].astype(np.float64) * stretch for one in (first, second)]
    seen = [one.body[:, 2] > 0 for one in (first, second)]
    for xy, known, other in zip(bodies, seen, ("first", "second"), strict=True):
        if not known.any():
            raise TruePoseError(f"the {other} pose has no visible body keypoint")
        if not known[NECK]:
            near = [joint for joint in SHOULDERS if known[joint]] or known.nonzero()[0]
            xy[NECK] = xy[near].mean(0)
    for joint in (*_TRUNK, *_LIMBS):
        parent = PARENTS[joint]
        for i in (0, 1):
            if not seen[i][joint]:
                other = bodies[1 - i]
                way = other[joint] - other[parent] if seen[1 - i][joint] else np.zeros(2)
                bodies[i][joint] = bodies[i][parent] + way
    return bodies[0], bodies[1]


def _turned_between(a: np.ndarray, b: np.ndarray, turn: float, t: float) -> np.ndarray:
    """Between offsets a and b [N, 2], where b has turned by an angle: straight within what turns."""
    back = b @ _rotation(-turn).T
    return ((1 - t) * a + t * back) @ _rotation(t * turn).T


def _swung(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Between bones a and b [..., 2]: angle the shortest way, length linearly; a bone of no length has the other's
    angle."""
    lengths = [np.hypot(x[..., 0], x[..., 1]) for x in (a, b)]
    angles = [np.arctan2(x[..., 1], x[..., 0]) for x in (a, b)]
    start = np.where(lengths[0] > 0, angles[0], angles[1])
    end = np.where(lengths[1] > 0, angles[1], start)
    angle = start + t * _shortest(end - start)
    length = (1 - t) * lengths[0] + t * lengths[1]
    return np.stack([length * np.cos(angle), length * np.sin(angle)], -1)


def _hand_between(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Between two hands [21, 2], bone by bone."""
    hand = (1 - t) * a + t * b
    for parent, joint in HAND_EDGES:
        hand[joint] = hand[parent] + _swung(a[joint] - a[parent], b[joint] - b[parent], t)
    return hand
