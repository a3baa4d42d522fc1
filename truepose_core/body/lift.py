"""Lifting: keypoints on the picture -> the body that stands there, by a small network and a short fit.

The network reads OpenPose's 18 points, centred and scaled, and gives a few bodies with how sure it is of each: what is
near and what is far cannot be seen in keypoints alone. It is trained on poses, without pictures (`training.lift`).
The fit moves each body until its own keypoints lie on the given ones. Both are ours; the weak-perspective camera and
the continuous rotations are those of HMR (arXiv 1712.06584) and Zhou et al. (arXiv 1812.07035).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from truepose_core.body.pose import HEIGHT, BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import (
    OPENPOSE_JOINTS,
    PARENTS,
    axis_angle_to_matrix,
    chain_rotations,
    matrix_to_axis_angle,
    openpose_points,
    rest_joints,
)

HYPOTHESES = 3
WIDTH, DEPTH = 640, 3
FEWEST = 5
"""Keypoints that have to be there before a body can be lifted."""
FIT_STEPS = 4


@dataclass(frozen=True)
class Lifted:
    """bodies: the likeliest body of each of N people. others: the next likeliest ones, most likely first.
    doubt: the mean joint angle error that the network expects of each [N, 1 + len(others)], radians. error: root mean
    square distance [N] of the likeliest body's keypoints from the given ones, in frame heights."""

    bodies: BodyPose
    others: tuple[BodyPose, ...]
    doubt: Tensor
    error: Tensor


def rotation_of_six(six: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of the first two columns [..., 6], by Gram-Schmidt (arXiv 1812.07035)."""
    a, b = six.unflatten(-1, (2, 3)).unbind(-2)
    x = nn.functional.normalize(a, dim=-1)
    y = nn.functional.normalize(b - (x * b).sum(-1, keepdim=True) * x, dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], -1)


def six_of_rotation(matrix: Tensor) -> Tensor:
    """The first two columns [..., 6] of rotation matrices [..., 3, 3]."""
    return matrix[..., :2].transpose(-1, -2).flatten(-2)


def normalise(body: Tensor, aspect: float | Tensor) -> Tensor:
    """Keypoints [N, 18, 3] -> what the network reads [N, 54]: x, y in units of the visible points' spread around
    their mean, 0 where missing, and 18 visibilities. aspect: width / height of the picture, a number or [N]."""
    seen = (body[..., 2] > 0).to(body)
    aspect = torch.as_tensor(aspect, dtype=body.dtype, device=body.device).reshape(-1, 1).expand(len(body), 1)
    xy = body[..., :2] * torch.stack([aspect, torch.ones_like(aspect)], -1)
    count = seen.sum(1).clamp(min=1)[:, None, None]
    centre = (xy * seen[..., None]).sum(1, keepdim=True) / count
    offset = (xy - centre) * seen[..., None]
    spread = (offset.square().sum((1, 2), keepdim=True) / count).sqrt().clamp(min=1e-4)
    return torch.cat([(offset / spread).flatten(1), seen], 1)


class LiftNet(nn.Module):
    """[N, 54] (`normalise`) -> rotations [N, K, 24, 3, 3] in the parents' frames, shapes [N, K, 10], and the
    doubt about each [N, K]: the mean joint angle error that it expects, radians."""

    def __init__(self, width: int = WIDTH, depth: int = DEPTH, hypotheses: int = HYPOTHESES):
        super().__init__()
        self.sizes = {"width": width, "depth": depth, "hypotheses": hypotheses}
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(54 if i == 0 else width, width), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(width, hypotheses * (24 * 6 + 10) + hypotheses)
        # How far its bodies usually are from the truth (`training.lift.calibrate`): rotations of the joints about their
        # own axes and shape, [82, 82], and the mean doubt that goes with it, radians.
        spread = torch.cat([torch.full((72,), 0.04), torch.full((10,), 0.5)])
        self.register_buffer("covariance", torch.diag(spread))
        self.register_buffer("usual_doubt", torch.tensor([0.2]))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.head(self.trunk(points))
        k = self.sizes["hypotheses"]
        doubt, rest = nn.functional.softplus(out[:, :k]), out[:, k:].unflatten(1, (k, 24 * 6 + 10))
        six = rest[..., : 24 * 6].unflatten(-1, (24, 6)) + out.new_tensor([1.0, 0, 0, 0, 1, 0])
        return rotation_of_six(six), rest[..., 24 * 6 :], doubt


def solve_camera(points: Tensor, xy: Tensor, weight: Tensor) -> Tensor:
    """The camera [N, 3] that lays points [N, P, 3] (metres) best on xy [N, P, 2] (frame heights from the frame's
    middle, y down), by weighted least squares. weight: [N, P] >= 0. Differentiable."""
    total = weight.sum(1, keepdim=True).clamp(min=1e-6)
    flat = points[..., :2] * points.new_tensor([1.0, -1.0])
    a = flat - ((flat * weight[..., None]).sum(1) / total)[:, None]
    mean = (xy * weight[..., None]).sum(1) / total
    b = xy - mean[:, None]
    above = (a * b * weight[..., None]).sum((1, 2))
    scale = above / (a.square() * weight[..., None]).sum((1, 2)).clamp(min=1e-8)
    scale = scale.clamp(min=1e-3)
    shift = mean - scale[:, None] * (flat * weight[..., None]).sum(1) / total
    return torch.cat([scale[:, None], shift], 1)


Joints = Callable[[Tensor], Tensor]
"""Joints of the T-pose [N, 24, 3], metres, pelvis at 0, of shapes [N, 10]: a body model's proportions."""


def keypoints_of(rotation: Tensor, beta: Tensor, joints: Joints = rest_joints) -> tuple[Tensor, Tensor]:
    """OpenPose's 18 points of bodies: metres [N, 18, 3] and whether a detector would see them [N, 18]. rotation:
    local [N, 24, 3, 3]; beta: [N, 10]."""
    world, position = chain_rotations(rotation, joints(beta))
    return openpose_points(world, position, beta)


def _in_heights(body: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """Keypoints -> (frame heights from the middle [N, 18, 2], weights [N, 18])."""
    return (body[..., :2] - 0.5) * body.new_tensor([aspect, 1.0]), (body[..., 2] > 0).to(body)


def _ancestors() -> Tensor:
    """[24, 24]: 1 where the second joint's rotation moves what is fixed to the first."""
    moved = torch.zeros(24, 24)
    for joint in range(24):
        above = joint
        while above >= 0:
            moved[joint, above] = 1
            above = PARENTS[above]
    return moved


_ANCESTORS = _ancestors()
# What each of the 19 points is fixed to: OpenPose's 18 with two shoulders in the neck's place.
_HOLDERS = [15, 16, 17, *OPENPOSE_JOINTS, 15, 15, 15, 15]


def _jacobian(world: Tensor, position: Tensor, points: Tensor) -> Tensor:
    """How the 18 points [N, 18, 3] move with small rotations of the joints about their own axes: [N, 18, 3, 72]."""
    # The neck lies between two shoulders: each has its own lever.
    points = torch.cat([points[:, :1], position[:, 16:18], points[:, 2:]], 1)
    arm = points[:, :, None] - position[:, None]
    # A rotation about the joint's own axis e at o moves p by (R e) x (p - o).
    axes = world.transpose(-1, -2)[:, None].expand(-1, points.shape[1], -1, -1, -1)
    moves = torch.linalg.cross(axes, arm[..., None, :].expand_as(axes))
    moves = moves * _ANCESTORS[_HOLDERS].to(moves)[None, :, :, None, None]
    moves = moves.flatten(2, 3).transpose(-1, -2)
    return torch.cat([moves[:, :1], moves[:, 1:3].mean(1, keepdim=True), moves[:, 3:]], 1)


_SIGMA = 0.002
"""How far keypoints are off, in units of a person's height: what the fit weighs against the prior."""


def fit_bodies(
    rotation: Tensor,
    beta: Tensor,
    body: Tensor,
    aspect: float,
    *,
    covariance: Tensor,
    steps: int = FIT_STEPS,
    shape: Tensor | None = None,
    joints: Joints = rest_joints,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The likeliest bodies, given where the keypoints are and what is thought of the bodies beforehand.

    rotation [N, 24, 3, 3], beta [N, 10]: the prior's mean, where the fit starts. covariance: the prior's, [82, 82] or
    [N, 82, 82]: joint rotations about their own axes (72, radians) and shape (10). body: keypoints [N, 18, 3]. aspect:
    width / height. shape: known shapes [N, 10], which stay as they are. steps: of Gauss-Newton, damped. joints: rest
    joints [N, 24, 3] of shapes [N, 10].

    Returns rotation, beta, camera [N, 3], and the root mean square distance that is left [N], in frame heights.
    """
    xy, weight = _in_heights(body, aspect)
    count = len(body)
    cov = covariance.to(rotation).expand(count, -1, -1)
    if shape is not None:
        cov, beta = cov[:, :72, :72], shape.to(rotation)
    size = cov.shape[-1]
    precision = torch.linalg.inv(cov + 1e-6 * torch.eye(size).to(cov))
    local, start = rotation.clone(), beta.clone()
    shift = rotation.new_zeros(count, size)
    camera = rotation.new_zeros(count, 3)
    for step in range(steps + 1):
        world, position = chain_rotations(local, joints(beta))
        points, _ = openpose_points(world, position, beta)
        if step == 0:
            camera = solve_camera(points, xy, weight)
        flat = points[..., :2] * points.new_tensor([1.0, -1.0])
        scale = camera[:, None, :1]
        miss = scale * flat + camera[:, None, 1:] - xy
        if step == steps:
            break
        parts = [_jacobian(world, position, points)]
        if shape is None:
            parts.append(_shape_jacobian(local, beta, points, joints))
        moves = torch.cat(parts, -1)[:, :, :2] * points.new_tensor([1.0, -1.0])[:, None] * scale[..., None]
        of_camera = torch.stack([flat, *(points.new_tensor(v).expand_as(flat) for v in ((1.0, 0.0), (0.0, 1.0)))], -1)
        jacobian = torch.cat([moves, of_camera], -1).flatten(1, 2)
        # Keypoints are off by a share of the person's height, which the camera tells.
        sure = (weight / (_SIGMA * HEIGHT * camera[:, :1]).square()).repeat_interleave(2, 1)
        normal = jacobian.transpose(1, 2) @ (jacobian * sure[..., None])
        normal[:, :size, :size] += precision
        normal.diagonal(dim1=1, dim2=2).add_(1e-4)
        pull = (jacobian.transpose(1, 2) @ (miss.flatten(1) * sure)[..., None])[..., 0]
        pull[:, :size] += (precision @ shift[..., None])[..., 0]
        change = -torch.linalg.solve(normal, pull)
        # A step of more than half a radian is further than its straight line holds.
        longest = change[:, :72].unflatten(1, (24, 3)).norm(dim=-1).amax(1, keepdim=True)
        change = change * (0.5 / longest.clamp(min=0.5))
        shift = shift + change[:, :size]
        local = rotation @ axis_angle_to_matrix(shift[:, :72].unflatten(1, (24, 3)))
        if shape is None:
            beta = (start + shift[:, 72:]).clamp(-3, 3)
        camera = camera + change[:, size:]
        camera = torch.cat([camera[:, :1].clamp(min=1e-3), camera[:, 1:]], 1)
    error = ((miss.square().sum(-1) * weight).sum(1) / weight.sum(1).clamp(min=1)).sqrt()
    return local, beta, camera, error


def _shape_jacobian(local: Tensor, beta: Tensor, points: Tensor, joints: Joints = rest_joints) -> Tensor:
    """How the 18 points [N, 18, 3] move with the shape numbers: [N, 18, 3, 10], by differences (nearly linear)."""
    step = 0.05
    other = (beta[:, None] + step * torch.eye(10).to(beta)).flatten(0, 1)
    moved, _ = keypoints_of(local.repeat_interleave(10, 0), other, joints)
    return ((moved.unflatten(0, (len(beta), 10)) - points[:, None]) / step).permute(0, 2, 3, 1)


def prior_covariance(net: LiftNet, doubt: Tensor, foreign_shape: bool = False) -> Tensor:
    """What the fit may change in bodies that the network doubts by `doubt` [N], radians: [N, 82, 82]. foreign_shape:
    the shape numbers are another model's, of variance 1 and unknown to the network."""
    # What is uncertain beforehand may move further.
    covariance = net.covariance * (doubt / net.usual_doubt).square()[:, None, None]
    if foreign_shape:
        covariance = covariance.clone()
        covariance[:, 72:], covariance[:, :, 72:] = 0, 0
        covariance[:, 72:, 72:] = torch.eye(10).to(covariance)
    return covariance


def check_liftable(body: Tensor) -> None:
    """Raises TruePoseError for keypoints of another shape, NaN, or too few of them."""
    if body.ndim != 3 or body.shape[1:] != (18, 3) or not len(body):
        raise TruePoseError(
            f"keypoints are {tuple(body.shape)}; expected [N, 18, 3], OpenPose's 18 body points, N at least 1"
        )
    if not torch.isfinite(body).all():
        raise TruePoseError("keypoints hold NaN or infinite values")
    counts = (body[..., 2] > 0).sum(1)
    if int(counts.min()) < FEWEST:
        raise TruePoseError(
            f"person {int(counts.argmin())} has {int(counts.min())} visible body keypoints; expected at least {FEWEST} "
            "to lift a body. Use the skeleton instead, or give keypoints of more of the person"
        )


@torch.no_grad()
def propose(body: Tensor, aspect: float, net: LiftNet | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the network makes of keypoints [N, 18, 3]: rotations [N, K, 24, 3, 3], shapes [N, K, 10] and its doubts
    [N, K] in radians, the likeliest first."""
    check_liftable(body)
    net = lift_net().to(body.device) if net is None else net
    rotation, beta, doubt = net(normalise(body.float(), aspect))
    doubt, order = doubt.sort(1)
    rows = torch.arange(len(body), device=body.device)[:, None]
    return rotation[rows, order], beta[rows, order].clamp(-2.5, 2.5), doubt


@torch.no_grad()
def lift(
    body: Tensor,
    aspect: float,
    *,
    steps: int = FIT_STEPS,
    hypotheses: int = 1,
    shape: Tensor | None = None,
    net: LiftNet | None = None,
) -> Lifted:
    """The bodies that stand behind keypoints.

    body: [N, 18, 3] normalised (0 confidence is missing). aspect: width / height of the picture. steps: of the fit
    (0: the network alone). hypotheses: how many bodies to fit for each person; the one that is least doubtful and whose
    keypoints fit best comes first. shape: [N, 10] where the people are known already: a target takes its source's.

    Raises TruePoseError for keypoints of another shape, NaN, fewer than `FEWEST` visible ones, or wrong counts.
    """
    net = lift_net().to(body.device) if net is None else net
    if not 1 <= hypotheses <= net.sizes["hypotheses"]:
        raise TruePoseError(f"{hypotheses} bodies were asked for; expected 1 to {net.sizes['hypotheses']}")
    rotation, beta, doubt = propose(body, aspect, net)
    if shape is not None and shape.shape != beta[:, 0].shape:
        raise TruePoseError(f"known shapes are {tuple(shape.shape)}; expected [{len(body)}, 10], one for each person")
    found = []
    for k in range(hypotheses):
        local, beta_k, camera, error = fit_bodies(
            rotation[:, k],
            beta[:, k],
            body.float(),
            aspect,
            covariance=prior_covariance(net, doubt[:, k]),
            steps=steps,
            shape=shape,
        )
        found.append((matrix_to_axis_angle(local), beta_k, camera, error))
    theta, betas, camera, error = (torch.stack(x, 1) for x in zip(*found, strict=True))
    # A body whose keypoints miss by 1 % of the person's height is doubted by another tenth of a radian.
    order = (doubt[:, :hypotheses] + 10 * error / (HEIGHT * camera[..., 0])).argsort(1)
    rows = torch.arange(len(body), device=body.device)[:, None]
    theta, betas, camera, error, doubt = (x[rows, order] for x in (theta, betas, camera, error, doubt))
    bodies = [BodyPose(theta[:, k], betas[:, k], camera[:, k]) for k in range(hypotheses)]
    return Lifted(bodies[0], tuple(bodies[1:]), doubt, error[:, 0])


def lift_each(body: Tensor, aspect: float, shape: Tensor | None = None) -> BodyPose:
    """The likeliest body of each person, as `lift` gives it, one at a time: sums over a batch end in other digits than
    sums over one, and a pixel at the edge of a body would tell who else was in the batch. Raises what `lift` raises."""
    if body.ndim != 3 or not len(body) or (shape is not None and shape.shape[:1] != body.shape[:1]):
        return lift(body, aspect, shape=shape).bodies  # which says what is wrong
    shapes = [None] * len(body) if shape is None else shape.split(1)
    found = [lift(one, aspect, shape=known).bodies for one, known in zip(body.split(1), shapes, strict=True)]
    return BodyPose(*(torch.cat([getattr(x, name) for x in found]) for name in ("theta", "beta", "camera")))


def net_path() -> Path:
    """The lifting network that ships with the package."""
    from truepose_core.weights.strict import bundled_path

    return bundled_path("lift")


@lru_cache(maxsize=2)
def lift_net(path: str | None = None) -> LiftNet:
    """The lifting network (the one that ships, or a file of `truepose train --row lift`), in float32. Raises
    TruePoseError when the file is missing, damaged or of another kind."""
    from truepose_core.weights.small import load_small

    return load_small(path or net_path(), "lift", LiftNet)
