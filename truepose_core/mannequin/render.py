"""Analytic ray casting of the mannequin: image, exact parsing, keypoints, depth.

The body is a set of primitives, each a sweep of ellipsoids: centres run along a segment, radii
change linearly, the ellipsoid's shape is fixed in the limb's frame. Capsules, rounded cones and
ellipsoids are special cases. Under an orthographic camera the nearest hit has a closed form (ours):
a shear and a 2 x 2 map turn the ellipsoids into spheres, and the depth of a sphere sweep along one
ray, ``s dz + sqrt(Q(s))`` with a quadratic Q, is a concave function of s whose maximum is known.

Primitives are tested against the screen tiles they can reach only, and surfaces are coloured once,
after visibility is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.regions import Region

from .body import BodyPoses
from .identity import Identities
from .paint import paint, soften
from .scene import Grid, Scene, extent, find_keypoints, make_scene, tile_grid

__all__ = ["Rendering", "Surface", "paint_surface", "pool_samples", "render", "trace"]

LIGHT = (-0.36, 0.58, 0.73)
# Supersampled pixels worked on at once: about 300 MB at the peak on a CPU.
_PIXELS_CPU = 1_000_000
_PIXELS_GPU = 24_000_000
_FAR = -1e4


@dataclass(frozen=True)
class Rendering:
    """N pictures with their ground truth.

    Attributes:
        image: RGB [N, 3, H, W] in 0..1, area averaged.
        parsing: share of each `Region` in each pixel [N, 7, H, W], sums to 1.
        keypoints: OpenPose-18 [N, 18, 3]: x / W, y / H, and 1 where the point is in the frame and a
            detector would see it (face points turned away are 0), else 0 with x = y = 0.
        depth: [N, 1, H, W], 1 at the nearest point of the body, 0.2 at the farthest visible one,
            0 in the background.
        theta: axis-angle [N, 24, 3]. beta: shape [N, 10].
        camera: absolute camera [N, 3] (scale, tx, ty) in units of the frame height H: a world point
            (X, Y, .) in metres from the pelvis is seen at x / H = W / (2 H) + scale X + tx and
            y / H = 1 / 2 - scale Y + ty.
    """

    image: Tensor
    parsing: Tensor
    keypoints: Tensor
    depth: Tensor
    theta: Tensor
    beta: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return self.image.shape[0]

    def select(self, index: Tensor | Sequence[int]) -> Rendering:
        """The pictures at ``index`` (positions in this batch, repeats allowed)."""
        index = torch.as_tensor(index, device=self.image.device)
        return Rendering(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Rendering:
        """The same pictures on another device."""
        return Rendering(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Surface:
    """The K visible surface samples of a batch, one per supersample that hits a body.

    Attributes:
        where: flat index of the sample in the tiled frame buffer [K].
        person: position in the batch [K]. primitive: which part was hit [K].
        rest: the point in the T-pose, metres [3, K]: the same spot of the cloth in every pose.
        normal: unit normal in camera axes [3, K]. depth: towards the camera, frame heights [K].
        inside_out: the inside of the cloth is seen there, at an open end [K] bool.
    """

    where: Tensor
    person: Tensor
    primitive: Tensor
    rest: Tensor
    normal: Tensor
    depth: Tensor
    inside_out: Tensor


# --------------------------------------------------------------------------- visibility


def trace(scene: Scene, grid: Grid) -> Surface:
    """The visible surface of a scene; the ground everything else is computed from."""
    people, parts = scene.people, scene.parts
    n, p = parts.radius.shape[:2]
    device = parts.radius.device
    scale = scene.camera[:, 0]
    shift = torch.stack([scene.camera[:, 1], -scene.camera[:, 2], torch.zeros_like(scale)], -1)

    _, _, start, end = extent(parts, scene.rotation, scene.position)
    start = start * scale[:, None, None] + shift[:, None]
    delta = end * scale[:, None, None] + shift[:, None] - start
    radius = parts.radius * scale[:, None, None]
    r0, dr = radius[..., 0], radius[..., 1] - radius[..., 0]
    turn = scene.rotation[:, parts.joint]
    metric = (turn / (parts.shape**2)[:, :, None, :]) @ turn.transpose(-1, -2)
    mzz = metric[..., 2, 2]
    gx, gy = metric[..., 0, 2] / mzz, metric[..., 1, 2] / mzz
    b11 = (metric[..., 0, 0] - gx * metric[..., 0, 2]).clamp_min(1e-9).sqrt()
    b12 = (metric[..., 0, 1] - gx * metric[..., 1, 2]) / b11
    b22 = (metric[..., 1, 1] - gy * metric[..., 1, 2] - b12 * b12).clamp_min(1e-9).sqrt()
    root = mzz.sqrt()
    du = b11 * delta[..., 0] + b12 * delta[..., 1]
    dv = b22 * delta[..., 1]
    dz = root * (delta[..., 2] + gx * delta[..., 0] + gy * delta[..., 1])
    # Where a limb points along the ray, k would vanish; the floor moves its surface by less than a
    # hundredth of its radius.
    k = (du * du + dv * dv - dr * dr).clamp_min(1e-8)
    eu = -b11 * start[..., 0] - b12 * start[..., 1]
    ev = -b22 * start[..., 1]
    ez = start[..., 2] + gx * start[..., 0] + gy * start[..., 1]
    table = torch.stack(
        [
            b11,
            b12,
            b22,
            eu,
            ev,
            r0 * r0,
            r0 * dr,
            du,
            dv,
            1 / k,
            k,
            dz / (k * (k + dz * dz)).sqrt(),
            dz / root,
            1 / root,
            -gx,
            -gy,
            ez,
            radius[..., 1] ** 2,
            torch.where(dz.abs() > 1e-6, 1 / dz, torch.zeros_like(dz)),
        ],
        -1,
    )

    # Tiles that a part can reach: the distance of the tile's centre to the part's axis, in the
    # space where the part is round.
    step = 1.0 / (grid.height * grid.supersample)
    edge = grid.tile * step
    column = torch.arange(grid.columns, device=device) * edge - grid.width / (2 * grid.height)
    row = 0.5 - torch.arange(grid.rows, device=device) * edge
    cx = (column + edge / 2)[None, None, None, :]
    cy = (row - edge / 2)[None, None, :, None]

    def grown(x: Tensor) -> Tensor:
        return x[:, :, None, None]

    v = grown(b22) * cy + grown(ev)
    u = grown(b11) * cx + (grown(b12) * cy + grown(eu))
    flat = (du * du + dv * dv).clamp_min(1e-12)
    along = ((u * grown(du / flat)) + v * grown(dv / flat)).clamp(0, 1)
    u -= along * grown(du)
    v = v - along * grown(dv)
    reach = edge / math.sqrt(2) * (b11**2 + b12**2 + b22**2).sqrt() + radius.amax(-1)
    touched = (u * u + v * v) < grown(reach * reach)
    touched &= grown(radius.amax(-1) > 0)
    # [P, N, tiles]: sorted by part, so that one part's tiles never meet each other.
    touched = touched.flatten(2).transpose(0, 1)
    counts = touched.sum((1, 2)).tolist()
    which = touched.nonzero()
    body, tile = which[:, 1], which[:, 2]
    slot = body * grid.tiles + tile

    inside = torch.arange(grid.tile, device=device)
    offset = (inside + 0.5) * step
    depth = torch.full((n * grid.tiles, grid.tile, grid.tile), _FAR, device=device)
    place = torch.zeros_like(depth)
    owner = torch.full(depth.shape, -1, dtype=torch.int32, device=device)
    column_of, row_of = column[tile % grid.columns], row[tile // grid.columns]
    cut = parts.cut.tolist()
    first = 0
    for part, count in enumerate(counts):
        if not count:
            continue
        chosen = slice(first, first + count)
        first += count
        slots = slot[chosen]
        row_values = table[:, part].index_select(0, body[chosen])
        (a11, a12, a22, au, av, rr, rd, u1, v1, ik, kk, cc, zs, iz, zx, zy, z0, rm, tilt) = row_values.t()[
            ..., None, None
        ]
        x = column_of[chosen, None, None] + offset[None, None, :]
        y = row_of[chosen, None, None] - offset[None, :, None]
        u = a11 * x + (a12 * y + au)
        v = a22 * y + av
        q1 = u * u1 + (v * v1 + rd)
        q0 = (rr - v * v) - u * u
        middle = q1 * ik
        disc = q0 + q1 * middle
        s = middle + cc * disc.clamp_min(0).sqrt()
        hit = disc >= 0
        if cut[part][0]:
            hit &= s >= 0
        if cut[part][1]:
            hit &= s <= 1
        s = s.clamp_(0, 1)
        q = q0 + s * (2 * q1 - kk * s)
        hit &= q >= 0
        base = zx * x + (zy * y + z0)
        z = s * zs + q.clamp_min_(0).sqrt_() * iz + base
        for end in (0, 1):
            if not cut[part][end]:
                continue
            # An open end that faces the camera shows the inside of the cloth: the disc that closes
            # it, marked by a place outside 0..1. The limb inside comes out in front of the disc.
            du1, dv1 = u - end * u1, v - end * v1
            lift = (du1 * u1 + dv1 * v1) * -tilt
            inner = ((2 * end - 1) * tilt > 0) & (du1 * du1 + dv1 * dv1 + lift * lift < (rm if end else rr))
            inner &= ~hit
            z = torch.where(inner, (end * zs + lift * iz) + base, z)
            s = torch.where(inner, 3.0 * end - 1.0, s)
            hit |= inner
        old = depth.index_select(0, slots)
        nearer = hit & (z > old)
        depth.index_copy_(0, slots, torch.where(nearer, z, old))
        place.index_copy_(0, slots, torch.where(nearer, s, place.index_select(0, slots)))
        owner.index_copy_(0, slots, torch.where(nearer, part, owner.index_select(0, slots)).to(torch.int32))

    where = (owner.view(-1) >= 0).nonzero()[:, 0]
    primitive = owner.view(-1)[where].long()
    z = depth.view(-1)[where]
    s = place.view(-1)[where]
    inside_out = (s < -0.5) | (s > 1.5)
    s = s.clamp(0, 1)
    area = grid.tile**2
    person = where // grid.samples
    inner = where % area
    tile_at = (where // area) % grid.tiles
    x = column[tile_at % grid.columns] + offset[inner % grid.tile]
    y = row[tile_at // grid.columns] - offset[inner // grid.tile]

    base = scene.position[:, parts.joint] * scale[:, None, None] + shift[:, None]
    shading = torch.cat(
        [
            turn.flatten(2),
            base,
            parts.start,
            parts.end - parts.start,
            1 / parts.shape**2,
            scene.rest[:, parts.joint],
            (1 / scale)[:, None, None].expand(n, p, 1),
        ],
        -1,
    )
    shading = shading.flatten(0, 1).t().contiguous()
    values = shading.index_select(1, person * p + primitive).unbind(0)
    m = values[:9]
    zoom = values[24]
    dx, dy, dzz = (x - values[9]) * zoom, (y - values[10]) * zoom, (z - values[11]) * zoom
    rest, slope = [], []
    for axis in range(3):
        local = m[axis] * dx + m[3 + axis] * dy + m[6 + axis] * dzz
        slope.append((local - values[12 + axis] - s * values[15 + axis]) * values[18 + axis])
        rest.append(local + values[21 + axis])
    slope = soften(people, scene.rest, parts, person, primitive, rest, slope)
    normal = torch.stack([m[3 * a] * slope[0] + m[3 * a + 1] * slope[1] + m[3 * a + 2] * slope[2] for a in range(3)])
    normal = normal * (normal * normal).sum(0).clamp_min(1e-20).rsqrt()
    return Surface(where, person, primitive, torch.stack(rest), normal, z, inside_out)


# --------------------------------------------------------------------------- pictures


def pool_samples(samples: Tensor, grid: Grid, n: int) -> Tensor:
    """Sum over the supersamples of a plane [C, n * samples] -> [n, C, H, W]."""
    ss, inner = grid.supersample, grid.tile // grid.supersample
    view = samples.view(samples.shape[0], n, grid.rows, grid.columns, inner, ss, inner, ss)
    total = None
    for i in range(ss):
        for j in range(ss):
            layer = view[..., i, :, j]
            total = layer.clone() if total is None else total.add_(layer)
    total = total.permute(1, 0, 2, 4, 3, 5)
    full = total.reshape(n, len(samples), grid.rows * inner, grid.columns * inner)
    return full[..., : grid.height, : grid.width]


def paint_surface(surface: Surface, scene: Scene) -> tuple[Tensor, Tensor]:
    """Unshaded colour [3, K] and `Region` [K] of the visible samples."""
    albedo, label = paint(scene.people, scene.rest, scene.parts, surface.person, surface.primitive, surface.rest)
    return torch.where(surface.inside_out, albedo * 0.55, albedo), label


def _develop(
    surface: Surface, scene: Scene, grid: Grid, light: tuple[float, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    people = scene.people
    n = len(people)
    device = people.skin.device
    towards = surface.normal.new_tensor(light)
    towards = towards / towards.norm()
    lambert = (surface.normal * towards[:, None]).sum(0).clamp_min(0)
    facing = surface.normal[2].clamp(0, 1)
    sky = surface.normal[1] * 0.05
    shade = (0.56 + 0.47 * lambert + sky) * (0.84 + 0.16 * facing)
    albedo, label = paint_surface(surface, scene)
    lit = (albedo * shade).clamp_(0, 1)

    area = grid.tile**2
    line = torch.arange(grid.rows * grid.tile, device=device).view(grid.rows, 1, grid.tile, 1)
    fall = ((line + 0.5) / (grid.height * grid.supersample)).clamp(0, 1)
    ends = people.background.permute(2, 1, 0)[:, :, :, None, None, None, None]
    backdrop = ends[:, 0] + (ends[:, 1] - ends[:, 0]) * fall
    planes = backdrop.expand(3, n, grid.rows, grid.columns, grid.tile, grid.tile).reshape(3, -1)
    planes[:, surface.where] = lit

    # Seven counters of eight bits each in one integer: one pooling pass instead of seven.
    packed = torch.ones(1, n * grid.samples, dtype=torch.int64, device=device)
    packed[0, surface.where] = torch.ones_like(label) << (8 * label)

    far = torch.full((n,), 1e4, device=device)
    near = torch.full((n,), _FAR, device=device)
    far = far.scatter_reduce(0, surface.person, surface.depth, "amin")
    near = near.scatter_reduce(0, surface.person, surface.depth, "amax")
    span = (near - far).clamp_min(1e-6)
    relative = 0.2 + 0.8 * (surface.depth - far[surface.person]) / span[surface.person]
    depth = torch.zeros(1, n * area * grid.tiles, device=device)
    depth[0, surface.where] = relative

    share = 1.0 / grid.supersample**2
    image = pool_samples(planes, grid, n) * share
    counts = pool_samples(packed, grid, n)
    parsing = torch.cat([((counts >> (8 * r)) & 255) for r in range(len(Region))], 1)
    return (
        image.contiguous(),
        parsing.to(torch.float32) * share,
        (pool_samples(depth, grid, n) * share).contiguous(),
    )


def render(
    identities: Identities,
    poses: BodyPoses,
    height: int = 64,
    width: int = 48,
    supersample: int = 2,
    device: torch.device | str | None = None,
    chunk: int | None = None,
    camera: Tensor | None = None,
    light: tuple[float, float, float] = LIGHT,
) -> Rendering:
    """Pictures of people [N] in poses [N] with their ground truth.

    Args:
        identities, poses: N people and N poses.
        light: where it comes from, (right, up, towards the viewer), of any length.
        camera: absolute cameras [N, 3] in place of the poses' framing (see `Rendering.camera`).
        height, width: size of the pictures in pixels, 8 to 4096.
        supersample: rays per pixel along each axis, 1 to 8. Parsing is exact to 1 / supersample^2.
        device: where to render and leave the result; default: where the identities are.
        chunk: pictures worked on at once; default: what fits into some 300 MB (a few GB on a GPU).

    Returns:
        A Rendering of N pictures, float32.

    Raises:
        TruePoseError: for unequal counts or sizes out of range.
    """
    if len(identities) != len(poses):
        raise TruePoseError(
            f"render got {len(identities)} identities and {len(poses)} poses; expected as many of "
            "both. Use .select() to repeat or choose."
        )
    if not (8 <= height <= 4096 and 8 <= width <= 4096):
        raise TruePoseError(f"picture size is {height}x{width}; expected 8 to 4096 pixels a side.")
    if not 1 <= supersample <= 8:
        raise TruePoseError(f"supersample is {supersample}; expected 1 to 8.")
    if chunk is not None and chunk < 1:
        raise TruePoseError(f"chunk is {chunk}; expected at least 1.")
    target = torch.device(device) if device is not None else identities.skin.device
    grid = tile_grid(height, width, supersample)
    budget = _PIXELS_CPU if target.type == "cpu" else _PIXELS_GPU
    size = chunk or max(1, budget // grid.samples)
    pieces: list[Rendering] = []
    with torch.no_grad():
        for first in range(0, max(1, len(identities)), size):
            index = torch.arange(first, min(first + size, len(identities)))
            people = identities.select(index.to(identities.skin.device)).to(target)
            taken = poses.select(index.to(poses.theta.device)).to(target)
            scene = make_scene(people, taken, width / height)
            if camera is not None:
                scene = replace(scene, camera=camera[index.to(camera.device)].to(target))
            surface = trace(scene, grid)
            image, parsing, depth = _develop(surface, scene, grid, light)
            pieces.append(
                Rendering(
                    image=image,
                    parsing=parsing,
                    keypoints=find_keypoints(scene, height, width),
                    depth=depth,
                    theta=taken.theta,
                    beta=people.beta,
                    camera=scene.camera,
                )
            )
    if len(pieces) == 1:
        return pieces[0]
    return Rendering(**{f.name: torch.cat([getattr(p, f.name) for p in pieces]) for f in fields(Rendering)})
