"""SAM 3D Body's keypoints as SMPL's joint rotations, in closed form. Ours.

SAM 3D Body poses another body, the Momentum Human Rig: its 127 joints have other axes than SMPL's 24, and turning one
into the other needs the rig's own file. Its 70 keypoints need none: the bones between them say how every limb is
turned, the bend of elbow and knee says how it is twisted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import JOINTS, PARENTS, axis_angle_to_matrix, matrix_to_axis_angle, rest_joints

KEYPOINTS = 70
# Places in the 70 keypoints (MHR70 of SAM 3D Body), left and right.
_EYES, _EARS, _SHOULDERS, _ELBOWS, _HIPS, _KNEES, _ANKLES = (1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14)
_BIG_TOES, _SMALL_TOES, _HEELS, _WRISTS, _NECK = (15, 18), (16, 19), (17, 20), (62, 41), 69
_INDEX, _MIDDLE, _PINKY = (49, 28), (53, 32), (61, 40)  # the knuckles
_STRAIGHT = 0.14
"""Below this sine of the bend (8 degrees) a limb says nothing about its twist."""
_X, _Y, _Z = torch.eye(3, dtype=torch.float64)
# Eyes from ears in the mannequin's head.
_GAZE = torch.tensor([0.0, 0.012, 0.109], dtype=torch.float64)


def smpl_pose_of_keypoints(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(theta [P, 24, 3], pelvis [P, 3], size [P]) of MHR70 keypoints [P, 70, 3].

    points: metres, x to the viewer's right, y up, z towards the camera. Every limb, hand, foot and the head takes
    exactly the direction that its keypoints have. The trunk's turn from hips to shoulders is shared by the spine's
    joints, the head's by neck and head; collar bones and toes stay at rest. A straight arm takes its twist from the
    shoulders, a straight leg from its foot. pelvis: SMPL's pelvis, as far up from the hips as in our skeleton.
    size: length of the limbs as a share of our skeleton's at rest.

    Raises TruePoseError where keypoints that make a bone coincide.
    """
    points = points.double()
    rest = rest_joints(points.new_zeros(1, 10))[0]
    hips, neck = points[:, _HIPS].mean(1), points[:, _NECK]
    up = neck - hips
    turn: dict[int, Tensor] = {}
    turn[0] = _turn(_X, _Y, points[:, _HIPS[0]] - points[:, _HIPS[1]], up, "hips")
    chest = _turn(_X, _Y, points[:, _SHOULDERS[0]] - points[:, _SHOULDERS[1]], up, "shoulders")
    third = _power(turn[0].mT @ chest, 1 / 3)
    turn[3] = turn[0] @ third
    turn[6] = turn[3] @ third
    turn[9] = turn[13] = turn[14] = chest
    ears = points[:, _EARS[0]] - points[:, _EARS[1]]
    head = _turn(_X, _GAZE, ears, points[:, _EYES].mean(1) - points[:, _EARS].mean(1), "head")
    turn[12], turn[15] = chest @ _power(chest.mT @ head, 1 / 2), head

    lengths, expected = [], []
    for side, sign in ((0, 1.0), (1, -1.0)):
        shoulder, elbow, wrist = (points[:, pair[side]] for pair in (_SHOULDERS, _ELBOWS, _WRISTS))
        upper, fore = elbow - shoulder, wrist - elbow
        bone = sign * _X
        # A bent elbow brings the forearm to the front of the arm.
        front = _bend(upper, fore, _carried(chest, bone, upper)[..., 2])
        turn[16 + side] = _turn(bone, _Z, upper, front, "upper arm")
        hinge = turn[16 + side][..., 1]
        turn[18 + side] = _turn(bone, _Y, fore, hinge, "forearm")
        across = points[:, _INDEX[side]] - points[:, _PINKY[side]]
        turn[20 + side] = _turn(bone, _Z, points[:, _MIDDLE[side]] - wrist, across, "hand")
        turn[22 + side] = turn[20 + side]

        hip, knee, ankle = (points[:, pair[side]] for pair in (_HIPS, _KNEES, _ANKLES))
        toes = (points[:, _BIG_TOES[side]] + points[:, _SMALL_TOES[side]]) / 2
        thigh, shin, foot = knee - hip, ankle - knee, toes - points[:, _HEELS[side]]
        # A bent knee brings the shin to the back of the thigh.
        front = _bend(thigh, -shin, foot)
        turn[1 + side] = _turn(rest[4 + side] - rest[1 + side], _Z, thigh, front, "thigh")
        turn[4 + side] = _turn(rest[7 + side] - rest[4 + side], _X, shin, turn[1 + side][..., 0], "shin")
        outwards = sign * (points[:, _SMALL_TOES[side]] - points[:, _BIG_TOES[side]])
        turn[7 + side] = turn[10 + side] = _turn(_Z, _X, foot, outwards, "foot")
        lengths += [bone.norm(dim=-1) for bone in (upper, fore, thigh, shin)]
        expected += [(rest[a + side] - rest[b + side]).norm() for a, b in ((18, 16), (20, 18), (4, 1), (7, 4))]

    # [P, 24, 3, 3]
    world = torch.stack([turn[joint] for joint in range(len(JOINTS))], 1)
    local = torch.cat([world[:, :1], world[:, list(PARENTS[1:])].mT @ world[:, 1:]], 1)
    low, high = rest[[1, 2], 1].mean(), rest[12, 1]
    pelvis = hips - up * (low / (high - low))
    return matrix_to_axis_angle(local), pelvis, torch.stack(lengths).sum(0) / torch.stack(expected).sum()


def _frame(main: Tensor, side: Tensor, name: str) -> Tensor:
    """A right-handed frame [..., 3, 3]: its first axis along `main`, its second as near to `side` as can be."""
    first = normalize(main, dim=-1)
    second = side - (side * first).sum(-1, keepdim=True) * first
    least = min(main.norm(dim=-1).min().item(), second.norm(dim=-1).min().item())
    if not least > 1e-6:
        raise TruePoseError(f"keypoints of the {name} coincide or lie on one line; expected the keypoints of a body")
    second = normalize(second, dim=-1)
    return torch.stack([first, second, torch.linalg.cross(first, second)], -1)


def _turn(rest_main: Tensor, rest_side: Tensor, main: Tensor, side: Tensor, name: str) -> Tensor:
    """The rotation [P, 3, 3] that takes `rest_main` to the direction of `main`, and `rest_side` as near to `side` as
    can be."""
    return _frame(main, side, name) @ _frame(rest_main, rest_side, name).mT


def _bend(upper: Tensor, lower: Tensor, otherwise: Tensor) -> Tensor:
    """Where the bend of two bones [P, 3] points, across the upper one; `otherwise` where they are nearly straight."""
    along = normalize(upper, dim=-1)
    across = lower - (lower * along).sum(-1, keepdim=True) * along
    return torch.where(
        across.norm(dim=-1, keepdim=True) < _STRAIGHT * lower.norm(dim=-1, keepdim=True), otherwise, across
    )


def _carried(frame: Tensor, bone: Tensor, direction: Tensor) -> Tensor:
    """`frame` [P, 3, 3] turned the shortest way so that its `bone` [3] points in `direction` [P, 3]."""
    before, after = frame @ bone, normalize(direction, dim=-1)
    axis = torch.linalg.cross(before, after)
    angle = torch.atan2(axis.norm(dim=-1, keepdim=True), (before * after).sum(-1, keepdim=True))
    return axis_angle_to_matrix(normalize(axis, dim=-1) * angle) @ frame


def _power(rotation: Tensor, share: float) -> Tensor:
    return axis_angle_to_matrix(matrix_to_axis_angle(rotation) * share)
