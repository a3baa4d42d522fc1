"""Triangles on a pixel grid: a batched z-buffer in torch. Ours."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError

_SAMPLES = 4_000_000
"""Pixels of bounding boxes tested at once: about 300 MB."""
_SLACK = 1e-5
"""Barycentric tolerance, so that no pixel centre falls between two triangles that share an edge."""


def rasterize(vertices: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which triangle each pixel's centre sees, under an orthographic camera.

    vertices: [N, V, 3] pixels right, pixels down, and depth, larger is nearer; the first pixel's centre is at
    (0.5, 0.5). faces: [F, 3] corners; both sides are seen. Returns face [N, H, W] (-1 where nothing is), barycentric
    [N, H, W, 3] and depth [N, H, W] (0 where nothing is). Of equally near triangles the first in `faces` is seen.
    Raises TruePoseError for other shapes and for vertices that are not finite.
    """
    if vertices.ndim != 3 or vertices.shape[-1] != 3 or faces.ndim != 2 or faces.shape[-1] != 3:
        raise TruePoseError(
            f"vertices are {tuple(vertices.shape)} and faces {tuple(faces.shape)}; expected [N, V, 3] and [F, 3]"
        )
    if not bool(vertices.isfinite().all()):
        raise TruePoseError("vertices hold NaN or infinite values")
    count, total = len(vertices), len(vertices) * len(faces)
    corners = vertices[:, faces].reshape(total, 3, 3)
    size = corners.new_tensor([width, height])
    # Pixels whose centres can be inside: from the first to one behind the last.
    low = (corners[..., :2].amin(1) - 0.5).ceil().clamp(min=0).minimum(size)
    high = (corners[..., :2].amax(1) + 0.5).floor().clamp(min=0).minimum(size)
    box = (high - low).clamp(min=0).long()
    plane, flat = _plane(corners, low + 0.5)
    samples = box.prod(1) * ~flat
    kept = samples.nonzero()[:, 0]
    samples, low, box, plane = samples[kept], low[kept].long(), box[kept], plane[kept]

    area = height * width
    depth = vertices.new_full((count * area,), -torch.inf)
    owner = torch.full((count * area,), total, dtype=torch.long, device=vertices.device)
    for part in _batches(samples):
        corner = kept[part] // len(faces) * area + low[part, 1] * width + low[part, 0]
        pixel, near, triangle = _samples(corner, samples[part], box[part], plane[part], width)
        first = kept[part][triangle]
        before = depth.clone()
        depth.scatter_reduce_(0, pixel, near, "amax")
        # Where something nearer came, what was seen before is forgotten.
        owner = torch.where(depth > before, total, owner)
        seen = near == depth[pixel]
        owner.scatter_reduce_(0, pixel[seen], first[seen], "amin")

    hit = (owner < total).nonzero()[:, 0]
    face = torch.full_like(owner, -1)
    barycentric = vertices.new_zeros((count * area, 3))
    place = kept.new_zeros(total).scatter_(0, kept, torch.arange(len(kept), device=kept.device))[owner[hit]]
    inside = torch.stack([hit % area % width, hit % area // width], -1) - low[place]
    weights = _weights(plane[place], *inside.to(plane).unbind(-1))[0].clamp(min=0)
    face[hit] = owner[hit] % max(len(faces), 1)
    barycentric[hit] = weights / weights.sum(-1, keepdim=True)
    depth = torch.where(owner < total, depth, torch.zeros_like(depth))
    shape = (count, height, width)
    return face.view(shape), barycentric.view(*shape, 3), depth.view(shape)


def _plane(corners: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Two barycentric weights and the depth as linear functions of the pixel offset from `origin`: [K, 3, 3] (right,
    down, constant); and which triangles are seen edge on [K]."""
    a, b, c = corners.unbind(1)
    xy = [corner[:, :2] - origin for corner in (a, b, c)]
    (ux, uy), (vx, vy) = (xy[0] - xy[2]).unbind(-1), (xy[1] - xy[2]).unbind(-1)
    area = ux * vy - uy * vx
    flat = area.abs() < 1e-6
    inverse = 1 / torch.where(flat, torch.ones_like(area), area)
    right = torch.stack([vy, -uy], -1) * inverse[:, None]
    down = torch.stack([-vx, ux], -1) * inverse[:, None]
    rows = torch.stack([right, down], -1)  # [K, 2 weights, 2 directions]
    constant = -(rows * xy[2][:, None]).sum(-1)
    weights = torch.cat([rows, constant[..., None]], -1)
    rise = torch.stack([a[:, 2] - c[:, 2], b[:, 2] - c[:, 2]], -1)
    depth = (rise[..., None] * weights).sum(1)
    depth[:, 2] += c[:, 2]
    return torch.cat([weights, depth[:, None]], 1), flat


def _weights(plane: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Barycentric weights [K, 3] and depth [K] at pixel offsets x, y [K] of linear functions [K, 3, 3]."""
    first, second, depth = (plane[:, i, 0] * x + plane[:, i, 1] * y + plane[:, i, 2] for i in range(3))
    return torch.stack([first, second, 1 - first - second], -1), depth


def _batches(samples: Tensor) -> list[slice]:
    """Runs of triangles with about `_SAMPLES` pixels together."""
    if not len(samples):
        return []
    lot = (samples.cumsum(0) - 1) // _SAMPLES
    starts = [0, *((lot[1:] != lot[:-1]).nonzero()[:, 0] + 1).tolist(), len(samples)]
    return [slice(a, b) for a, b in pairwise(starts)]


def _samples(corner: Tensor, samples: Tensor, box: Tensor, plane: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every pixel centre inside K triangles: (its place in the flat frame buffer, depth, triangle), each [S]."""
    triangle = torch.arange(len(samples), device=samples.device).repeat_interleave(samples)
    within = torch.arange(len(triangle), device=samples.device) - (samples.cumsum(0) - samples)[triangle]
    columns = box[:, 0][triangle]
    y = within // columns
    x = within - y * columns
    weights, depth = _weights(plane[triangle], x.to(plane), y.to(plane))
    inside = (weights.amin(-1) >= -_SLACK).nonzero()[:, 0]
    triangle, x, y = triangle[inside], x[inside], y[inside]
    pixel = corner[triangle] + y * width + x
    return pixel, depth[inside], triangle
