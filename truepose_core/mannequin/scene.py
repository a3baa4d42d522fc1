"""People posed in front of the camera, and the picture that is traced of them, cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .body import BodyPoses, forward_kinematics, openpose_points, project, rest_joints
from .identity import Identities
from .solids import Parts, body_parts

__all__ = ["Grid", "Scene", "extent", "find_keypoints", "make_scene", "tile_grid"]


@dataclass(frozen=True)
class Scene:
    """N people posed in front of the camera.

    parts: their primitives. rest: joints of the T-pose [N, 24, 3]; rotation [N, 24, 3, 3] and position [N, 24, 3] in
    metres from the pelvis, of every joint. camera: absolute [N, 3], as `Rendering.camera`.
    """

    parts: Parts
    people: Identities
    rest: Tensor
    rotation: Tensor
    position: Tensor
    camera: Tensor


def extent(parts: Parts, rotation: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact low and high corner [N, 2] of the bodies on the screen, metres; also part ends."""
    turn = rotation[:, parts.joint]
    base = position[:, parts.joint]
    start = base + (turn @ parts.start[..., None])[..., 0]
    end = base + (turn @ parts.end[..., None])[..., 0]
    # Half width of an ellipsoid along a screen axis: the length of its scaled rotation row.
    half = (turn[..., :2, :] * parts.shape[:, :, None, :]).norm(dim=-1)
    worn = (parts.radius.amax(-1) > 0)[..., None]
    low = torch.minimum(start[..., :2] - half * parts.radius[..., :1], end[..., :2] - half * parts.radius[..., 1:])
    high = torch.maximum(start[..., :2] + half * parts.radius[..., :1], end[..., :2] + half * parts.radius[..., 1:])
    low = torch.where(worn, low, torch.full_like(low, 1e3)).amin(1)
    high = torch.where(worn, high, torch.full_like(high, -1e3)).amax(1)
    return low, high, start, end


def make_scene(people: Identities, poses: BodyPoses, aspect: float) -> Scene:
    """People [N] in poses [N], framed as the poses say. aspect: width / height of the frame."""
    rest = rest_joints(people.beta)
    rotation, position = forward_kinematics(poses.theta, rest)
    parts = body_parts(people)
    low, high, _, _ = extent(parts, rotation, position)
    size = high - low
    # Height of the same person standing upright: a sitting or bowing one is not blown up to it.
    head = rest[:, 15, 1] + 0.25 * (1 + 0.03 * people.beta[:, 8])
    standing = head - rest[:, 7, 1] + 0.09
    fit = torch.minimum(0.94 / size[:, 1], 0.94 * aspect / size[:, 0])
    scale = poses.camera[:, 0] * torch.minimum(fit, 0.94 * 1.15 / standing)
    centre = (low + high) / 2 * scale[:, None]
    free = (torch.stack([torch.full_like(scale, aspect), torch.ones_like(scale)], -1) / 2) - (size * scale[:, None] / 2)
    shift = poses.camera[:, 1:] * free.clamp_min(0)
    camera = torch.stack([scale, shift[:, 0] - centre[:, 0], shift[:, 1] + centre[:, 1]], -1)
    return Scene(parts, people, rest, rotation, position, camera)


def find_keypoints(scene: Scene, height: int, width: int) -> Tensor:
    """OpenPose's points [N, 18, 3] of the people on a picture, normalised; hidden ones are 0."""
    points, seen = openpose_points(scene.rotation, scene.position, scene.people.beta)
    x, y = project(points, scene.camera, width / height)
    seen = seen & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return torch.stack([x, y, torch.ones_like(x)], -1) * seen[..., None]


@dataclass(frozen=True)
class Grid:
    """Supersampled frame cut into square tiles. Samples are numbered tile by tile."""

    height: int
    width: int
    supersample: int
    tile: int
    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        return self.rows * self.columns

    @property
    def samples(self) -> int:
        return self.tiles * self.tile**2


def tile_grid(height: int, width: int, supersample: int = 1) -> Grid:
    """The tiled frame buffer of a picture; one sample a pixel sits at the pixel's centre."""
    tile = supersample * max(1, round((8 if height * supersample <= 256 else 16) / supersample))
    rows = -(-height * supersample // tile)
    columns = -(-width * supersample // tile)
    return Grid(height, width, supersample, tile, rows, columns)
