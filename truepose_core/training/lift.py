"""Training of the lifting network: poses of the mannequin world, no pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from truepose_core.body.lift import DEPTH, HYPOTHESES, WIDTH, LiftNet, normalise
from truepose_core.mannequin.body import (
    axis_angle_to_matrix,
    chain_rotations,
    matrix_to_axis_angle,
    openpose_points,
    project,
    rest_joints,
)
from truepose_core.mannequin.identity import sample_identities
from truepose_core.mannequin.poses import sample_poses
from truepose_core.mannequin.world import split_seed
from truepose_core.pose.keypoints import FACE_POINTS
from truepose_core.training.small import SmallConfig, SmallTrainer

ASPECT = 0.75
_FACE = list(FACE_POINTS)


@dataclass(frozen=True)
class LiftConfig(SmallConfig):
    """width, depth: of the hidden layers. hypotheses: bodies that the network offers."""

    steps: int = 11000
    batch: int = 768
    learning_rate: float = 2e-3
    warmup: int = 200
    save_every: int = 1000
    width: int = WIDTH
    depth: int = DEPTH
    hypotheses: int = HYPOTHESES


@dataclass(frozen=True)
class LiftBatch:
    """points: keypoints [N, 18, 3]. local, world: rotations [N, 24, 3, 3]. beta: [N, 10]."""

    points: Tensor
    local: Tensor
    world: Tensor
    beta: Tensor


def draw_bodies(indices: Tensor, seed: int, generator: torch.Generator | None) -> LiftBatch:
    """People `indices` of the world `seed` as keypoints and truth. generator: draws what makes them harder than the
    world's own pictures (None: nothing does): noise, missing joints, cropped people, a tilted camera, other shapes."""
    people, poses = sample_identities(indices, seed), sample_poses(indices, seed)
    beta, local = people.beta, axis_angle_to_matrix(poses.theta)
    count = len(indices)

    def u(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    if generator is not None:
        # Proportions of photographs reach further than the world's.
        beta = torch.where(u(1) < 0.3, beta * 1.6, beta)
        # A camera that is rolled or looks down.
        tilt = torch.zeros(count, 3)
        tilt[:, 2] = (u() < 0.25) * torch.randn(count, generator=generator) * math.radians(12)
        tilt[:, 0] = (u() < 0.3) * torch.randn(count, generator=generator) * math.radians(10)
        root = axis_angle_to_matrix(tilt) @ local[:, 0]
        local = torch.cat([root[:, None], local[:, 1:]], 1)
    world, position = chain_rotations(local, rest_joints(beta))
    points, seen = openpose_points(world, position, beta)
    # Where the frame is does not matter: the network centres what it reads.
    camera = torch.tensor([0.5, 0.0, 0.0]).expand(count, 3)
    x, y = project(points, camera, ASPECT)
    seen = seen.float()
    if generator is not None:
        noise = torch.where(u(1) < 0.75, 0.01 * u(1).square() + 0.001, torch.zeros(count, 1))
        x = x + noise / ASPECT * torch.randn(x.shape, generator=generator)
        y = y + noise * torch.randn(y.shape, generator=generator)
        kind = u(1)
        missing = (u(18) < 0.4 * u(1)) & (kind < 0.3)
        low = y.amin(1, keepdim=True) + (0.25 + 0.75 * u(1)) * (y.amax(1, keepdim=True) - y.amin(1, keepdim=True))
        missing |= (y > low) & (kind > 0.85)
        missing[:, _FACE] |= (u(5) < 0.15) & (u(1) < 0.3)
        kept = seen * ~missing
        # A person of whom next to nothing is left teaches nothing.
        seen = torch.where(kept.sum(1, keepdim=True) >= 6, kept, seen)
    return LiftBatch(torch.stack([x, y, torch.ones_like(x)], -1) * seen[..., None], local, world, beta)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum((-2, -1)).mean(-1)


def angles(a: Tensor, b: Tensor) -> Tensor:
    """Angle between rotations [..., 3, 3] -> [...], radians."""
    trace = (a.transpose(-1, -2) @ b).diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((trace - 1) / 2).clamp(-1, 1).acos()


def world_rotations(local: Tensor) -> Tensor:
    """Global rotations of local ones [..., 24, 3, 3]."""
    flat = local.flatten(0, -4)
    return chain_rotations(flat, flat.new_zeros(len(flat), 24, 3))[0].view(local.shape)


class LiftTrainer(SmallTrainer):
    """The first body learns from every sample, the others from those that they are nearest to (multiple choice
    learning, Guzman-Rivera et al. 2012); the doubts learn each body's mean joint angle error."""

    kind = "lift"
    config: LiftConfig

    def build(self) -> nn.Module:
        c = self.config
        return LiftNet(c.width, c.depth, c.hypotheses)

    def describe(self) -> dict[str, Any]:
        return dict(self.net.sizes)

    def tensors(self) -> dict[str, Tensor]:
        covariance, doubt = calibrate(self.average.eval(), seed=self.config.seed)
        return {**super().tensors(), "covariance": covariance, "usual_doubt": torch.tensor([doubt])}

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        c = self.config
        indices = torch.arange(step * c.batch, (step + 1) * c.batch)
        batch = draw_bodies(indices, split_seed("train", c.seed), self.generator(step))
        local, beta, doubt = self.net(normalise(batch.points, ASPECT))
        world = world_rotations(local)
        far = _distance(world, batch.world[:, None])
        far = far + 0.5 * _distance(local, batch.local[:, None]) + 0.02 * (beta - batch.beta[:, None]).square().mean(-1)
        best = far.min(1).values
        angle = angles(world, batch.world[:, None]).mean(-1).detach()
        loss = far[:, 0].mean() + 0.5 * (0.9 * best.mean() + 0.1 * far.mean()) + 0.2 * (doubt - angle).square().mean()
        return loss, {"first": far[:, 0].mean().item(), "best": best.mean().item(), "angle": angle[:, 0].mean().item()}


def calibrate(net: LiftNet, people: int = 20_000, seed: int = 0) -> tuple[Tensor, float]:
    """How far the likeliest bodies are from the truth, on new poses of the training world without noise: the mean outer
    product [82, 82] of (rotation of each joint about its own axis, shape), and the mean doubt, radians."""
    batch = draw_bodies(torch.arange(10**9, 10**9 + people), split_seed("train", seed), None)
    with torch.no_grad():
        local, beta, doubt = net(normalise(batch.points, ASPECT))
        which = doubt.argmin(1)
        rows = torch.arange(people)
        turn = matrix_to_axis_angle(local[rows, which].transpose(-1, -2) @ batch.local)
        off = torch.cat([turn.flatten(1), batch.beta - beta[rows, which]], 1)
        return off.T @ off / people, doubt[rows, which].mean().item()


def angle_errors(net: LiftNet, people: int = 2000, seed: int = 0) -> dict[str, float]:
    """Mean angle between true and lifted global rotations on test people, degrees: of the first body, the likeliest,
    the best of all, and the likeliest one's root; beside them the mean doubt, which should be the likeliest's error."""
    batch = draw_bodies(torch.arange(people), split_seed("test", seed), None)
    with torch.no_grad():
        local, _, doubt = net(normalise(batch.points, ASPECT))
        angle = torch.rad2deg(angles(world_rotations(local), batch.world[:, None]))
    likeliest = angle[torch.arange(people), doubt.argmin(1)]
    return {
        "first": angle[:, 0].mean().item(),
        "likeliest": likeliest.mean().item(),
        "best": angle.mean(-1).min(1).values.mean().item(),
        "root": likeliest[:, 0].mean().item(),
        "doubt": torch.rad2deg(doubt.min(1).values).mean().item(),
    }
