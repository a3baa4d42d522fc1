"""Lifting: keypoints on the picture -> the body that stands there, by a small network and a short fit.

The network reads OpenPose's 18 points, centred and scaled, and gives a few bodies with how sure it is of each: what is
near and what is far cannot be seen in keypoints alone. It is trained on poses, without pictures (`training.lift`).
The fit moves each body until its own keypoints lie on the given ones. Both are ours; the weak-perspective camera and
the continuous rotations are those of HMR (arXiv 1712.06584) and Zhou et al. (arXiv 1812.07035).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import (
    chain_rotations,
    matrix_to_axis_angle,
    openpose_points,
    rest_joints,
)

HYPOTHESES = 3
WIDTH, DEPTH = 512, 3
FEWEST = 5
"""Keypoints that have to be there before a body can be lifted."""
FIT_STEPS = 60


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


# Arms and legs follow the keypoints further than the trunk does: its keypoints say little about the spine.
_PRIOR = 2.0


def fit_bodies(
    rotation: Tensor,
    beta: Tensor,
    body: Tensor,
    aspect: float,
    *,
    steps: int = FIT_STEPS,
    people: Tensor | None = None,
    shape: Tensor | None = None,
    joints: Joints = rest_joints,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move bodies until their keypoints lie on the given ones.

    rotation [N, 24, 3, 3], beta [N, 10]: where to start, also the prior. body: keypoints [N, 18, 3]. aspect: width /
    height. people: [N] numbers; rows of one number are one person and keep one shape. shape: known shapes [N, 10],
    which stay as they are. joints: differentiable. Returns rotation, beta, camera [N, 3], and the root mean square
    distance that is left [N], in frame heights. Adam on the rotations' first two columns; squared distances of
    keypoints in units of the person's own height.
    """
    xy, weight = _in_heights(body, aspect)
    people = torch.arange(len(body), device=body.device) if people is None else people
    who, place = torch.unique(people, return_inverse=True)
    share = torch.zeros(len(who), len(body), device=body.device, dtype=body.dtype)
    share[place, torch.arange(len(body))] = 1
    start = (share @ (beta if shape is None else shape)) / share.sum(1, keepdim=True)
    known = shape is not None
    six0 = six_of_rotation(rotation).detach()
    with torch.inference_mode(False), torch.enable_grad():
        # Inputs may be inference tensors (ComfyUI runs nodes so); autograd wants ordinary ones.
        xy, weight, six0, start, rotation, place = (x.clone() for x in (xy, weight, six0, start, rotation, place))
        six = six0.clone().requires_grad_()
        shape = start.clone().requires_grad_(not known)
        groups = [{"params": [six], "lr": 0.04}] + ([] if known else [{"params": [shape], "lr": 0.05}])
        # So large an eps that joints which the keypoints hardly tell of stay where the network has them, and rounding is not
        # blown up to whole steps.
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=30.0)
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, (0.04, 0.05), strict=False):
                group["lr"] = rate * min(1.0, 1.25 * (1 - step / steps) + 0.02)
            local = rotation_of_six(six)
            points, _ = keypoints_of(local, shape[place], joints)
            camera = solve_camera(points, xy, weight)
            flat = points[..., :2] * points.new_tensor([1.0, -1.0])
            off = camera[:, None, :1] * flat + camera[:, None, 1:] - xy
            # In units of the person: a metre and three quarters times the camera's scale.
            off = off / (1.75 * camera[:, None, :1].detach())
            miss = (off.square().sum(-1) * weight).sum(1)
            stay = (local - rotation).square().sum((1, 2, 3))
            loss = (
                4000 * miss.sum()
                + _PRIOR * stay.sum()
                + 0.3 * (shape - start).square().sum()
                + 0.05 * shape.square().sum()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        local = rotation_of_six(six.detach())
        beta = shape.detach()[place]
        points, _ = keypoints_of(local, beta, joints)
        camera = solve_camera(points, xy, weight)
        flat = points[..., :2] * points.new_tensor([1.0, -1.0])
        off = camera[:, None, :1] * flat + camera[:, None, 1:] - xy
        error = ((off.square().sum(-1) * weight).sum(1) / weight.sum(1).clamp(min=1)).sqrt()
    return local, beta, camera, error


def check_liftable(body: Tensor) -> None:
    """Raises TruePoseError for keypoints of another shape, NaN, or too few of them."""
    if body.ndim != 3 or body.shape[1:] != (18, 3):
        raise TruePoseError(f"keypoints are {tuple(body.shape)}; expected [N, 18, 3]: OpenPose's 18 body points")
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
    people: Tensor | None = None,
    shape: Tensor | None = None,
    net: LiftNet | None = None,
) -> Lifted:
    """The bodies that stand behind keypoints.

    body: [N, 18, 3] normalised (0 confidence is missing). aspect: width / height of the picture. steps: of the fit
    (0: the network alone). hypotheses: how many bodies to fit for each person, at least 1; the one whose keypoints fit
    best, weighed with how likely it is, comes first. people: [N]; rows of one number are one person (a source and its
    targets) and share their shape. shape: [N, 10] where the people are known already: a target takes its source's.

    Raises TruePoseError for keypoints of another shape, NaN, fewer than `FEWEST` visible ones, or wrong counts.
    """
    most = (net or lift_net()).sizes["hypotheses"]
    if not 1 <= hypotheses <= most:
        raise TruePoseError(f"{hypotheses} bodies were asked for; expected 1 to {most}")
    rotation, beta, doubt = propose(body, aspect, net)
    found = []
    for k in range(hypotheses):
        local, beta_k, camera, error = fit_bodies(
            rotation[:, k], beta[:, k], body.float(), aspect, steps=steps, people=people, shape=shape
        )
        found.append((matrix_to_axis_angle(local), beta_k, camera, error))
    theta, shape, camera, error = (torch.stack(x, 1) for x in zip(*found, strict=True))
    # A body whose keypoints miss by 1 % of the person's height is doubted by another tenth of a radian.
    order = (doubt[:, :hypotheses] + 10 * error / (1.75 * camera[..., 0])).argsort(1)
    rows = torch.arange(len(body), device=body.device)[:, None]
    theta, shape, camera, error, doubt = (x[rows, order] for x in (theta, shape, camera, error, doubt))
    bodies = [BodyPose(theta[:, k], shape[:, k], camera[:, k]) for k in range(hypotheses)]
    return Lifted(bodies[0], tuple(bodies[1:]), doubt, error[:, 0])


def net_path() -> Path:
    """The lifting network that ships with the package."""
    from truepose_core.models.store import bundled_path

    return bundled_path("lift")


@lru_cache(maxsize=2)
def lift_net(path: str | None = None) -> LiftNet:
    """The lifting network (the one that ships, or a file of `truepose train --row lift`), in float32. Raises
    TruePoseError when the file is missing, damaged or of another kind."""
    from truepose_core.models.store import load_strict, read_small

    metadata, tensors = read_small(path or net_path(), "lift")
    # Weights made inside inference mode (ComfyUI's nodes) could never take part in a gradient.
    with torch.inference_mode(False):
        net = LiftNet(**json.loads(metadata["config"]))
        load_strict(net, {name: x.float() for name, x in tensors.items()}, str(path or net_path()))
        return net.eval().requires_grad_(False)
