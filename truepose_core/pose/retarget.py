"""Retargeting: the target's pose on the source person's proportions.

Two people in one pose differ by the lengths of their bones. Under a distant camera a bone of length L that leans out of
the picture by an angle a is seen L cos(a) long; a pose is the directions of its bones and their cos(a). So each bone of
the target is multiplied by (the source's full length) / (the target's full length): direction and foreshortening stay,
proportions change.

Full lengths are not seen, only bounded by what is seen. `full_lengths` estimates them from one picture by what is known
of people: their proportions vary little, a bone is never seen longer than it is and often shorter, and both sides are
alike.

Lengths are in image heights. Keypoints are [B, 18, 3]: x/width, y/height, confidence (0 = missing). The construction
is ours; the mean proportions are rounded anthropometric ones, in statures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.pose import keypoints
from truepose_core.pose.keypoints import (
    EARS,
    EYES,
    FACE_POINTS,
    L_ANKLE,
    L_ELBOW,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    L_WRIST,
    NECK,
    NOSE,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
    Person,
    Pose,
    body_tensor,
)

ANCHORS = ("feet", "hips")
PARTS = {"head": keypoints.FACE_POINTS, "hips": keypoints.HIPS, "knees": keypoints.KNEES, "feet": keypoints.ANKLES}
"""What a picture may leave out of a person -> its joints."""
SIZES = ("target", "source")

LENGTHS = ("shoulders", "hips", "torso", "upper arm", "forearm", "thigh", "shin", "neck", "head")
SHOULDERS, HIPS, TORSO, UPPER_ARM, FOREARM, THIGH, SHIN, NECK_LENGTH, HEAD_SIZE = range(9)

# Two joints of our own behind the 18: between the hips, and the nose or, where it is hidden, what is seen of the head.
_MID_HIP, _HEAD = 18, 19

# The tree that is rebuilt: (joint, its parent, the length that scales the way from the parent), parents first.
_BONES = (
    (R_SHOULDER, NECK, SHOULDERS),
    (L_SHOULDER, NECK, SHOULDERS),
    (R_ELBOW, R_SHOULDER, UPPER_ARM),
    (L_ELBOW, L_SHOULDER, UPPER_ARM),
    (R_WRIST, R_ELBOW, FOREARM),
    (L_WRIST, L_ELBOW, FOREARM),
    (_MID_HIP, NECK, TORSO),
    (R_HIP, _MID_HIP, HIPS),
    (L_HIP, _MID_HIP, HIPS),
    (R_KNEE, R_HIP, THIGH),
    (L_KNEE, L_HIP, THIGH),
    (R_ANKLE, R_KNEE, SHIN),
    (L_ANKLE, L_KNEE, SHIN),
    (_HEAD, NECK, NECK_LENGTH),
    *((joint, _HEAD, HEAD_SIZE) for joint in FACE_POINTS),
)
# A joint in the middle of a limb whose two ends are seen.
_MIDDLES = (
    (R_ELBOW, R_SHOULDER, R_WRIST),
    (L_ELBOW, L_SHOULDER, L_WRIST),
    (R_KNEE, R_HIP, R_ANKLE),
    (L_KNEE, L_HIP, L_ANKLE),
    (NECK, R_SHOULDER, L_SHOULDER),
)

# What is measured: (joint, joint, length, mean in statures, mean of -log(seen / full), relative noise).
_MEASURES = (
    (R_SHOULDER, L_SHOULDER, SHOULDERS, 0.195, 0.20, 0.04),
    (R_HIP, L_HIP, HIPS, 0.100, 0.25, 0.05),
    (NECK, _MID_HIP, TORSO, 0.290, 0.04, 0.025),
    (R_SHOULDER, R_ELBOW, UPPER_ARM, 0.160, 0.12, 0.025),
    (L_SHOULDER, L_ELBOW, UPPER_ARM, 0.160, 0.12, 0.025),
    (R_ELBOW, R_WRIST, FOREARM, 0.143, 0.15, 0.03),
    (L_ELBOW, L_WRIST, FOREARM, 0.143, 0.15, 0.03),
    (R_HIP, R_KNEE, THIGH, 0.238, 0.10, 0.02),
    (L_HIP, L_KNEE, THIGH, 0.238, 0.10, 0.02),
    (R_KNEE, R_ANKLE, SHIN, 0.238, 0.06, 0.02),
    (L_KNEE, L_ANKLE, SHIN, 0.238, 0.06, 0.02),
    (NECK, NOSE, NECK_LENGTH, 0.145, 0.20, 0.05),
    (*EARS, HEAD_SIZE, 0.100, 0.25, 0.12),
    (*EYES, HEAD_SIZE, 0.040, 0.25, 0.12),
    *((NOSE, eye, HEAD_SIZE, 0.032, 0.25, 0.12) for eye in EYES),
    *((NOSE, ear, HEAD_SIZE, 0.088, 0.25, 0.12) for ear in EARS),
    *((eye, ear, HEAD_SIZE, 0.067, 0.25, 0.12) for eye, ear in zip(EYES, EARS, strict=True)),
)
_MEAN = tuple(next(m[3] for m in _MEASURES if m[2] == length) for length in range(len(LENGTHS)))
# How people differ in shape: (the lengths that are longer together, relative spread, whether a few differ far more). Of
# arms that is not believed: both are often bent towards the camera.
_SHAPES = (
    ((SHOULDERS,), 0.07, True),
    ((HIPS,), 0.07, True),
    ((TORSO,), 0.045, False),
    ((UPPER_ARM,), 0.03, False),
    ((FOREARM,), 0.025, False),
    ((THIGH,), 0.02, False),
    ((SHIN,), 0.02, False),
    ((NECK_LENGTH,), 0.045, True),
    ((HEAD_SIZE,), 0.06, True),
    ((UPPER_ARM, FOREARM), 0.045, False),
    ((THIGH, SHIN), 0.05, True),
)
# Of Student's t, the distribution of what differs far more in a few: children, drawn figures.
_FREEDOM = 4.0
_SHORTEST = 1e-4  # image heights; two joints closer than this say nothing about a length
_NEWTON_STEPS, _LONGEST_STEP = 30, 0.3


def full_lengths(body: Tensor, aspect: float, *, one_person: bool = False) -> Tensor:
    """Full lengths [B, 9] of a person's parts in image heights, in the order of `LENGTHS`.

    body: [B, 18, 3] normalised keypoints; aspect: image width / height. one_person: the B poses show one person at one
    distance, whose lengths are estimated from all of them together; all rows are then the same.

    They are the most likely ones if a log length seen is the full one, less an exponentially distributed
    foreshortening, plus normal noise, and if people's log lengths are the mean person's, plus their size, of which
    nothing is known, plus what they differ in shape (`_SHAPES`). Newton's method finds them; Student's t enters as a
    normal distribution that widens with what it has to explain. A part that is not seen gets the mean person's share.

    Raises `TruePoseError` for a body of which no part can be measured, and for other shapes.
    """
    _check(body, aspect, "body")
    xy, seen = _joints(body.double(), aspect)
    first, second, length = ([m[k] for m in _MEASURES] for k in range(3))
    mean, tail, noise = (xy.new_tensor([m[k] for m in _MEASURES]) for k in range(3, 6))
    distance = (xy[:, first] - xy[:, second]).norm(dim=-1)
    seen = (seen[:, first] & seen[:, second] & (distance > _SHORTEST)).to(xy)
    value = distance.clamp(min=_SHORTEST).log() - mean.log()
    # x = shapes @ z: the log lengths, in those of the mean person, from the size and what differs in shape.
    shapes = torch.stack([_together(range(len(LENGTHS))), *(_together(shape[0]) for shape in _SHAPES)], 1).to(xy)
    spread = xy.new_tensor([shape[1] for shape in _SHAPES])
    wide = torch.tensor([shape[2] for shape in _SHAPES], device=xy.device)
    measured = shapes[length]
    if one_person:
        value, seen = value.reshape(1, -1), seen.reshape(1, -1)
        tail, noise, measured = tail.repeat(len(body)), noise.repeat(len(body)), measured.repeat(len(body), 1)
    if bool((seen.sum(1) == 0).any()):
        raise TruePoseError(
            f"no part of the body can be measured in pose {int(seen.sum(1).argmin())}; "
            "two joints of one limb must be seen"
        )
    z = xy.new_zeros(len(value), shapes.shape[1])
    z[:, 0] = (value * seen).sum(1) / seen.sum(1)
    for _ in range(_NEWTON_STEPS):
        # The log density of normal minus exponential, its slope and its curvature.
        u = (z @ measured.T - value) / noise - noise / tail
        ratio = (-0.5 * u.square() - torch.special.log_ndtr(u) - 0.5 * math.log(2 * math.pi)).exp()
        slope = (ratio / noise - 1 / tail) * seen
        curvature = ratio * (u + ratio) / noise.square() * seen
        differs = (z[:, 1:] / spread).square()
        precision = torch.where(wide, (_FREEDOM + 1) / (_FREEDOM + differs), 1) / spread.square()
        precision = torch.cat([torch.zeros_like(z[:, :1]), precision], 1)
        hessian = torch.diag_embed(precision) + torch.einsum("bm,mi,mj->bij", curvature, measured, measured)
        z = z - torch.linalg.solve(hessian, precision * z - slope @ measured).clamp(-_LONGEST_STEP, _LONGEST_STEP)
    return ((z @ shapes.T).exp() * xy.new_tensor(_MEAN)).to(body.dtype).expand(len(body), -1)


def _together(lengths: Sequence[int]) -> Tensor:
    row = torch.zeros(len(LENGTHS))
    row[list(lengths)] = 1
    return row


def stature(lengths: Tensor) -> Tensor:
    """Size of a person [B] from full lengths [B, 9]: shin, thigh, torso and neck one above the other."""
    return lengths[:, [SHIN, THIGH, TORSO, NECK_LENGTH]].sum(1)


def length_ratios(
    target: Tensor,
    source: Tensor,
    *,
    aspect: float,
    source_aspect: float | None = None,
    size: str = "target",
    one_person: bool = False,
) -> Tensor:
    """What each part of the target is multiplied by, [B, 9]; the arguments are those of `retarget`."""
    if size not in SIZES:
        raise TruePoseError(f"size is {size!r}; expected one of {', '.join(SIZES)}")
    _check(target, aspect, "target")
    source_aspect = aspect if source_aspect is None else source_aspect
    _check(source, source_aspect, "source")
    if len(source) not in (1, len(target)):
        raise TruePoseError(
            f"there are {len(target)} target poses and {len(source)} source poses; expected 1 or as many"
        )
    after, before = full_lengths(source, source_aspect), full_lengths(target, aspect, one_person=one_person)
    if size == "target":
        after = after * (stature(before) / stature(after))[:, None]
    return after / before


def retarget(
    target: Tensor,
    source: Tensor,
    *,
    aspect: float,
    anchor: str = "feet",
    source_aspect: float | None = None,
    size: str = "target",
    one_person: bool = False,
) -> Tensor:
    """The target's pose on the source person's proportions -> [B, 18, 3]; ours.

    target: [B, 18, 3] normalised keypoints; source: the same of the person whose proportions are taken, or [1, 18, 3].
    aspect, source_aspect: width / height of the two images, the same by default.
    anchor: what stays where it is: "feet" (the lower ankle, both where they are level; without ankles the hips) or
    "hips" (their middle; without hips the neck).
    size: "target" keeps the target's stature, "source" makes the person as large, in image heights, as in the source.
    one_person: the target's poses are frames of one person, whose lengths are estimated once.

    Missing joints stay missing, confidences stay. Raises `TruePoseError` for other shapes, an unknown choice, or a body
    of which no part can be measured.
    """
    if anchor not in ANCHORS:
        raise TruePoseError(f"anchor is {anchor!r}; expected one of {', '.join(ANCHORS)}")
    ratios = length_ratios(target, source, aspect=aspect, source_aspect=source_aspect, size=size, one_person=one_person)
    joints = _rebuilt(target, ratios, aspect, anchor)[1][:, :18] / target.new_tensor([aspect, 1.0])
    seen = target[..., 2:] > 0
    return torch.cat([torch.where(seen, joints, 0), target[..., 2:]], -1)


def retarget_person(
    target: Person,
    source: Person,
    *,
    aspect: float,
    anchor: str = "feet",
    source_aspect: float | None = None,
    size: str = "target",
) -> Person:
    """`retarget` of one person, hands and face included: they move with wrist and head and are scaled with forearm and
    head."""
    bodies = body_tensor([target]), body_tensor([source])
    ratios = length_ratios(*bodies, aspect=aspect, source_aspect=source_aspect, size=size)
    return rescaled(target, ratios[0], aspect=aspect, anchor=anchor)


def rescaled(person: Person, ratios: Tensor, *, aspect: float, anchor: str) -> Person:
    """A person whose parts are multiplied by ratios [9], hands and face included."""
    if anchor not in ANCHORS:
        raise TruePoseError(f"anchor is {anchor!r}; expected one of {', '.join(ANCHORS)}")
    body = body_tensor([person])
    before, after = (x[0].double().numpy() for x in _rebuilt(body, ratios[None], aspect, anchor))
    stretch = np.array([aspect, 1.0])
    known = body[0, :, 2].numpy() > 0

    def carried(points: np.ndarray | None, joints: Sequence[int], ratio: float) -> np.ndarray | None:
        """points [N, 3] that are fixed to the first of these joints that is seen."""
        if points is None:
            return None
        at = next((joint for joint in joints if joint >= 18 or known[joint]), NECK)
        xy = (points[:, :2] * stretch - before[at]) * ratio + after[at]
        return np.concatenate([xy / stretch, points[:, 2:]], 1) * (points[:, 2:] > 0)

    hand, head = float(ratios[FOREARM]), float(ratios[HEAD_SIZE])
    return Person(
        np.concatenate([after[:18] / stretch, person.body[:, 2:]], 1) * (person.body[:, 2:] > 0),
        carried(person.hand_left, (L_WRIST, 6, L_SHOULDER), hand),
        carried(person.hand_right, (R_WRIST, 3, R_SHOULDER), hand),
        carried(person.face, (_HEAD,), head),
    )


def retarget_pose(
    target: Pose,
    source: Pose,
    *,
    target_person: int | None = None,
    source_person: int | None = None,
    everybody: bool = False,
    anchor: str = "feet",
    size: str = "target",
) -> Pose:
    """`retarget_person` in a group: the other people of the target stay as they are.

    target_person, source_person: indices from 0, the largest person by default. everybody: instead each person of the
    target gets the proportions of the source's person with the same index. Raises `TruePoseError` for a person who
    is not there.
    """
    if everybody:
        chosen = [i for i, person in enumerate(target.people) if person.is_visible]
        if not chosen:
            raise TruePoseError("the target pose has no person: no body keypoint is visible")
        if len(source.people) <= chosen[-1]:
            raise TruePoseError(
                f"the target pose has {len(target.people)} people and the source {len(source.people)}; to retarget "
                "everybody, the source needs as many. Choose one person instead"
            )
        pairs = {i: source.person(i) for i in chosen}
    else:
        pairs = {_index(target, target_person): source.person(source_person)}
    people = list(target.people)
    for i, person in pairs.items():
        people[i] = retarget_person(
            people[i],
            person,
            aspect=target.width / target.height,
            anchor=anchor,
            source_aspect=source.width / source.height,
            size=size,
        )
    return Pose(target.width, target.height, tuple(people))


def missing_parts(person: Person) -> tuple[str, ...]:
    """Names of `PARTS` of which no joint is seen inside the picture."""
    x, y, confidence = person.body.T
    seen = (confidence > 0) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
    return tuple(name for name, joints in PARTS.items() if not seen[list(joints)].any())


def retarget_as_shown(
    target: Pose, source: Pose, *, target_person: int | None = None, source_person: int | None = None
) -> Pose:
    """`retarget_pose` with size "source", moved so that the neck is where the source's is (without necks, the middle of
    the joints that both show): the picture shows as much of the person as the source does, and what the source leaves
    out lies outside of it. Ours. Raises `TruePoseError` as `retarget_pose`, and where they have no joint in common."""
    index = _index(target, target_person)
    made = retarget_pose(target, source, target_person=index, source_person=source_person, size="source")
    person, own = made.people[index], source.person(source_person)
    both = (person.body[:, 2] > 0) & (own.body[:, 2] > 0)
    if not both.any():
        raise TruePoseError("the target pose and the source's have no joint in common; they cannot be laid on another")
    joints = [NECK] if both[NECK] else both
    by = own.body[joints, :2].mean(0) - person.body[joints, :2].mean(0)

    def moved(points: np.ndarray | None) -> np.ndarray | None:
        return None if points is None else np.concatenate([points[:, :2] + by, points[:, 2:]], 1) * (points[:, 2:] > 0)

    arrays = (person.body, person.hand_left, person.hand_right, person.face)
    people = list(made.people)
    people[index] = Person(*(moved(points) for points in arrays))
    return Pose(made.width, made.height, tuple(people))


def retarget_video(
    targets: Sequence[Pose],
    source: Pose,
    *,
    target_person: int | None = None,
    source_person: int | None = None,
    anchor: str = "feet",
    size: str = "target",
) -> list[Pose]:
    """`retarget_pose` for frames of one person seen from one distance, on canvases of one size: the person's lengths
    are estimated once, from all frames, so that the proportions do not flicker."""
    sizes = {(pose.width, pose.height) for pose in targets}
    if len(sizes) != 1:
        raise TruePoseError(f"the frames have canvases of {len(sizes)} sizes; expected all alike")
    aspect = targets[0].width / targets[0].height
    chosen = [_index(pose, target_person) for pose in targets]
    ratios = length_ratios(
        body_tensor([pose.people[i] for pose, i in zip(targets, chosen, strict=True)]),
        body_tensor([source.person(source_person)]),
        aspect=aspect,
        source_aspect=source.width / source.height,
        size=size,
        one_person=True,
    )
    frames = []
    for pose, i, ratio in zip(targets, chosen, ratios, strict=True):
        people = list(pose.people)
        people[i] = rescaled(people[i], ratio, aspect=aspect, anchor=anchor)
        frames.append(Pose(pose.width, pose.height, tuple(people)))
    return frames


def _index(pose: Pose, person: int | None) -> int:
    """The index of this person, or of the largest. Raises `TruePoseError` when there is no such person."""
    if person is not None:
        pose.person(person)
    return pose.largest() if person is None else person


def _check(body: Tensor, aspect: float, what: str) -> None:
    if body.dim() != 3 or body.shape[1:] != (18, 3) or not len(body):
        raise TruePoseError(f"{what} keypoints are {tuple(body.shape)}; expected [B, 18, 3]")
    if not bool(body.isfinite().all()):
        raise TruePoseError(f"{what} keypoints hold NaN or infinite values")
    if not (math.isfinite(aspect) and aspect > 0):
        raise TruePoseError(f"aspect of the {what} is {aspect}; expected width / height, above 0")


def _joints(body: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """(xy [B, 20, 2] in image heights, seen [B, 20] bool): the 18 and our two."""
    xy = body[..., :2] * body.new_tensor([aspect, 1.0])
    seen = body[..., 2] > 0
    hips = [R_HIP, L_HIP]

    def mean(joints: Sequence[int]) -> Tensor:
        weight = seen[:, joints].to(xy)[..., None]
        return (xy[:, joints] * weight).sum(1) / weight.sum(1).clamp(min=1)

    head = torch.where(seen[:, NOSE, None], xy[:, NOSE], mean(list(FACE_POINTS)))
    xy = torch.cat([xy, mean(hips)[:, None], head[:, None]], 1)
    seen = torch.cat([seen, seen[:, hips].any(1, True), seen[:, list(FACE_POINTS)].any(1, True)], 1)
    return xy, seen


def _filled(xy: Tensor, seen: Tensor) -> Tensor:
    """Places [B, 20, 2] for missing joints, so that what hangs on them has something to hang on: between the ends of
    their limb, else at their nearest relative."""
    known = seen.clone()

    def put(joint: int, place: Tensor, where: Tensor) -> None:
        where = where & ~known[:, joint]
        xy[:, joint] = torch.where(where[:, None], place, xy[:, joint])
        known[:, joint] |= where

    xy = xy.clone()
    for joint, one, other in _MIDDLES:
        put(joint, (xy[:, one] + xy[:, other]) / 2, seen[:, one] & seen[:, other])
    for joint, parent, _ in reversed(_BONES):
        put(parent, xy[:, joint], known[:, joint])
    for joint, parent, _ in _BONES:
        put(joint, xy[:, parent], known[:, parent])
    return xy


def _rebuilt(body: Tensor, ratios: Tensor, aspect: float, anchor: str) -> tuple[Tensor, Tensor]:
    """Joints [B, 20, 2] in image heights before and after multiplying the parts of body [B, 18, 3] by ratios [B, 9]."""
    xy, seen = _joints(body, aspect)
    old = _filled(xy, seen)
    new = old.clone()
    for joint, parent, length in _BONES:
        new[:, joint] = new[:, parent] + (old[:, joint] - old[:, parent]) * ratios[:, length, None]
    weight = _anchor_weights(old, seen, anchor)
    return old, new + ((old - new) * weight[..., None]).sum(1, keepdim=True)


def _anchor_weights(xy: Tensor, seen: Tensor, anchor: str) -> Tensor:
    """Weights [B, 20] of the joints whose mean stays in place."""
    weight = torch.zeros_like(xy[..., 0])
    weight[:, NECK] = 1

    def use(joints: list[int], share: Tensor) -> None:
        there = seen[:, joints].any(1, keepdim=True)
        row = torch.zeros_like(weight)
        row[:, joints] = share
        weight.copy_(torch.where(there, row, weight))

    use([_MID_HIP], torch.ones_like(weight[:, :1]))
    if anchor == "feet":
        ankles = [R_ANKLE, L_ANKLE]
        # Soft, so that the anchor does not jump from foot to foot as someone walks.
        level = 0.02 * (xy.amax(1) - xy.amin(1)).norm(dim=-1, keepdim=True).clamp(min=_SHORTEST)
        height = (xy[:, ankles, 1] / level).masked_fill(~seen[:, ankles], -torch.inf)
        use(ankles, torch.where(seen[:, ankles].any(1, keepdim=True), height, torch.zeros_like(height)).softmax(1))
    return weight
