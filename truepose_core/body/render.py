"""The generic body: the mannequin's own tracer with a neutral wardrobe, and what it shows of a posed surface.

Every pixel gets the place of its surface point on the body at rest. That place is the same in every pose, so two
renderings of one body say which pixel of the one is which pixel of the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, one_hot

from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import SWAPPED, axis_angle_to_matrix, chain_rotations, rest_joints
from truepose_core.mannequin.identity import Identities, sample_identities
from truepose_core.mannequin.render import paint_surface, pool_samples, trace
from truepose_core.mannequin.scene import Scene, tile_grid
from truepose_core.mannequin.solids import HAIR, HIP, LEG, SLEEVE, TORSO, Parts, body_parts

MIRRORS = {"none": (1, 1), "left-right": (-1, 1), "front-back": (1, -1), "both": (-1, -1)}
"""Which look-alike of a surface point is meant: the sign of x (the other side) and of z (the other face)."""
_CHUNK = 32


@dataclass(frozen=True, eq=False)
class BodyMaps:
    """What a picture of N bodies shows, without supersampling (one ray through each pixel's centre).

    rest: place on the body at rest [N, 3, H, W], metres from the pelvis in the T-pose. part: joint that the surface is
    fixed to [N, H, W], -1 where nobody is. normal: unit, camera axes [N, 3, H, W]. depth: towards the camera, in frame
    heights from the frame's plane [N, 1, H, W]. mask: 1 on the body [N, 1, H, W]. region: `Region` of the body's own
    neutral wardrobe [N, H, W]. Everything but part is 0 where nobody is.
    face, barycentric: of a mesh, the triangle [N, H, W] (-1 where nobody is) and the place in it [N, H, W, 3]; else
    None.
    """

    rest: Tensor
    part: Tensor
    normal: Tensor
    depth: Tensor
    mask: Tensor
    region: Tensor
    face: Tensor | None = None
    barycentric: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.part.shape[-2], self.part.shape[-1]

    def __len__(self) -> int:
        return self.part.shape[0]

    def select(self, index: Tensor) -> BodyMaps:
        """The pictures at `index`, repeats allowed."""
        return BodyMaps(**{name: None if x is None else x[index] for name, x in vars(self).items()})


class BodyModel(Protocol):
    """A body that can be rendered and asked where its surface went: ours (`GenericBody`) or a user's SMPL file."""

    def render(self, body: BodyPose, height: int, width: int) -> BodyMaps:
        """The visible surface of N bodies."""

    def locate(self, maps: BodyMaps, body: BodyPose, mirror: str = "none") -> Tensor:
        """Where the surface points of N maps are on other bodies [N]: [N, 3, H, W]."""


@dataclass(frozen=True, eq=False)
class Girth:
    """How much wider than the neutral body a person is drawn, as factors on the radius of its parts: loose tops, wide
    trousers, long hair. Each is [N]; `fit_girth` reads them off a silhouette."""

    trunk: Tensor
    arms: Tensor
    legs: Tensor
    hair: Tensor

    @classmethod
    def neutral(cls, count: int, device: torch.device | str = "cpu") -> Girth:
        """No change."""
        return cls(*(torch.ones(count, device=device) for _ in range(4)))

    def select(self, index: Tensor) -> Girth:
        """The people at `index`."""
        return Girth(*(x[index] for x in vars(self).values()))

    def to(self, device: torch.device | str) -> Girth:
        """The same numbers on another device."""
        return Girth(*(x.to(device) for x in vars(self).values()))


_MATERIALS = {"trunk": (TORSO, HIP), "arms": (SLEEVE,), "legs": (LEG,), "hair": (HAIR,)}


@lru_cache(maxsize=1)
def _neutral() -> Identities:
    """One person with long sleeves, long trousers and hair to the neck: what most photographs show."""
    person = sample_identities([0], 0)
    one = torch.ones_like(person.sleeve_long)
    return replace(person, sleeve_long=one, bottom_long=one, hair_length=one, top_pattern=0 * one)


def neutral_people(beta: Tensor) -> Identities:
    """The neutral wardrobe on bodies of shape beta [N, 10]."""
    people = _neutral().select([0] * len(beta)).to(beta.device)
    return replace(people, beta=beta)


def _widened(parts: Parts, girth: Girth) -> Parts:
    factor = parts.radius.new_ones(parts.radius.shape[:2])
    for name, materials in _MATERIALS.items():
        chosen = torch.isin(parts.material, torch.tensor(materials, device=parts.material.device))
        factor = torch.where(chosen[None], getattr(girth, name).to(factor)[:, None], factor)
    return replace(parts, radius=parts.radius * factor[..., None])


@dataclass(frozen=True, eq=False)
class GenericBody:
    """The mannequin in a neutral wardrobe. girth: of N people (or of one, for all); None is the neutral one's. people:
    N people of the mannequin world in their own clothes instead, for training and measuring."""

    girth: Girth | None = None
    people: Identities | None = None

    def _scene(self, body: BodyPose) -> Scene:
        people = neutral_people(body.beta) if self.people is None else replace(self.people, beta=body.beta)
        rest = rest_joints(body.beta)
        rotation, position = chain_rotations(axis_angle_to_matrix(body.theta), rest)
        parts = body_parts(people)
        if self.girth is not None:
            parts = _widened(parts, self.girth)
        return Scene(parts, people, rest, rotation, position, body.camera)

    def _check_count(self, count: int) -> None:
        girths = count if self.girth is None else len(self.girth.trunk)
        people = count if self.people is None else len(self.people)
        if girths not in (1, count) or people != count:
            what, given = ("the clothes", people) if people != count else ("the girths", girths)
            raise TruePoseError(
                f"the generic body is drawn with {what} of {given} people; there are {count} bodies: expected as many"
            )

    def select(self, index: Tensor) -> GenericBody:
        """The bodies of the people at `index`."""
        one = self.girth is not None and len(self.girth.trunk) == 1
        return GenericBody(
            self.girth if one or self.girth is None else self.girth.select(index),
            None if self.people is None else self.people.select(index),
        )

    @torch.no_grad()
    def render(self, body: BodyPose, height: int, width: int) -> BodyMaps:
        """The visible surface of N bodies in a frame of height x width pixels. Raises TruePoseError where a body is
        wholly outside the frame, and for girths or people of another count."""
        self._check_count(len(body))
        pieces = [
            _maps(self.select(chosen)._scene(body.select(chosen)), height, width)
            for chosen in torch.arange(len(body), device=body.theta.device).split(_CHUNK)
        ]
        maps = BodyMaps(
            **{
                name: None if value is None else torch.cat([getattr(piece, name) for piece in pieces])
                for name, value in vars(pieces[0]).items()
            }
        )
        check_visible(maps)
        return maps

    @torch.no_grad()
    def locate(self, maps: BodyMaps, body: BodyPose, mirror: str = "none") -> Tensor:
        """Where the surface points of maps [N] are on bodies [N], seen or hidden: [N, 3, H, W], x / width and
        y / height of a frame with the maps' aspect, and depth as in `BodyMaps`. Where nobody is: zeros.

        mirror: a name of `MIRRORS`: the point's look-alike on the other side or the other face of the body.
        """
        sign_x, sign_z = MIRRORS[mirror]
        swap = torch.tensor(SWAPPED if sign_x < 0 else range(len(SWAPPED)), device=maps.part.device)
        part = swap[maps.part.clamp(min=0)].flatten(1)
        rest = rest_joints(body.beta)
        rotation, position = chain_rotations(axis_angle_to_matrix(body.theta), rest)
        place = maps.rest.flatten(2).transpose(1, 2) * maps.rest.new_tensor([sign_x, 1.0, sign_z])

        def of_joint(values: Tensor) -> Tensor:
            index = part.view(*part.shape, *(1,) * (values.ndim - 2)).expand(*part.shape, *values.shape[2:])
            return values.gather(1, index)

        # One product per joint for the whole picture: point = R (place - rest) + position, all linear in place.
        shift = position - (rotation @ rest[..., None])[..., 0]
        world = (of_joint(rotation) @ place[..., None])[..., 0] + of_joint(shift)
        return on_screen(world, body.camera, maps)


def on_screen(world: Tensor, camera: Tensor, maps: BodyMaps) -> Tensor:
    """Metres [N, H W, 3] -> (x / width, y / height, depth in frame heights) [N, 3, H, W]; 0 where nobody is."""
    height, width = maps.size
    scale, right, down = (c[:, None] for c in camera.unbind(-1))
    x = 0.5 + (scale * world[..., 0] + right) * (height / width)
    y = 0.5 - scale * world[..., 1] + down
    found = torch.stack([x, y, scale * world[..., 2]], 1).unflatten(2, (height, width))
    return found * maps.mask


def check_visible(maps: BodyMaps) -> None:
    """Raises TruePoseError where a picture shows nobody."""
    empty = (maps.mask.flatten(1).sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise TruePoseError(
            f"body {empty[0]} of {len(maps)} is outside the picture or smaller than a pixel; check its camera (scale "
            "and shifts are in picture heights) and that pose and picture belong together"
        )


def _maps(scene: Scene, height: int, width: int) -> BodyMaps:
    grid = tile_grid(height, width)
    surface = trace(scene, grid)
    _, label = paint_surface(surface, scene)
    count = len(scene.camera)
    planes = surface.rest.new_zeros((10, count * grid.samples))
    planes[:3, surface.where] = surface.rest
    planes[3, surface.where] = scene.parts.joint[surface.primitive].to(planes) + 1
    planes[4:7, surface.where] = surface.normal
    planes[7, surface.where] = surface.depth
    planes[8, surface.where] = 1
    planes[9, surface.where] = label.to(planes)
    full = pool_samples(planes, grid, count)
    return BodyMaps(
        rest=full[:, :3],
        part=full[:, 3].long() - 1,
        normal=full[:, 4:7],
        depth=full[:, 7:8],
        mask=full[:, 8:9],
        region=full[:, 9].long(),
    )


_GIRTHS = (0.9, 1.0, 1.12, 1.25, 1.45, 1.7, 2.0)
_FITTED_JOINTS = {"trunk": (0, 3, 6, 9), "arms": (16, 17, 18, 19), "legs": (1, 2, 4, 5), "hair": (12, 15)}
_LEAST_SHOWN = 0.05
"""Parts that take less of the body's pixels than this stay neutral: their girth would make up for that of others."""


@torch.no_grad()
def fit_girth(body: BodyPose, silhouettes: dict[str, Tensor], rounds: int = 1) -> Girth:
    """The girths whose drawn body covers its own clothes best (largest IoU).

    body: N people. silhouettes: "trunk" (upper and lower garment count for trunk, arms and legs), "hair": masks
    [N, H, W] in [0, 1] of the person's clothes and hair in the picture. Parts that the picture does not show stay
    neutral. Ours.
    """
    height, width = next(iter(silhouettes.values())).shape[-2:]
    girth = Girth.neutral(len(body), body.theta.device)
    part = GenericBody().render(body, height, width).part.flatten(1)
    on_body = (part >= 0).sum(1).clamp(min=1)
    factors = girth.trunk.new_tensor(_GIRTHS)
    # Of equals the neutral one.
    handicap = 1e-4 * (factors != 1).to(factors)
    # All factors of all people in one batch: a person's stand in a row.
    row = torch.arange(len(body), device=factors.device).repeat_interleave(len(factors))
    for _ in range(rounds):
        for name in _MATERIALS:
            truth = silhouettes["hair" if name == "hair" else "trunk"][row]
            tried = replace(girth.select(row), **{name: factors.repeat(len(body))})
            region = GenericBody(tried).render(body.select(row), height, width).region
            drawn = (region == 2) if name == "hair" else (region == 3) | (region == 4)
            both = (drawn * truth).flatten(1).sum(1)
            either = torch.maximum(drawn.to(truth), truth).flatten(1).sum(1)
            score = (both / either.clamp(min=1)).unflatten(0, (len(body), len(factors))) - handicap
            joints = torch.tensor(_FITTED_JOINTS[name], device=part.device)
            shown = torch.isin(part, joints).sum(1) >= _LEAST_SHOWN * on_body
            girth = replace(girth, **{name: torch.where(shown, factors[score.argmax(1)], getattr(girth, name))})
    return girth


def relative_depth(maps: BodyMaps) -> Tensor:
    """Depth as a picture [N, 1, H, W]: 1 at each body's nearest point, 0.2 at its farthest visible one, 0 where nobody
    is, as `mannequin.Rendering.depth`."""
    on = maps.mask > 0
    near = maps.depth.masked_fill(~on, -torch.inf).flatten(1).amax(1)[:, None, None, None]
    far = maps.depth.masked_fill(~on, torch.inf).flatten(1).amin(1)[:, None, None, None]
    return (0.2 + 0.8 * (maps.depth - far) / (near - far).clamp(min=1e-6)) * maps.mask


def surface_tokens(maps: BodyMaps, height: int, width: int) -> Tensor:
    """Places on the body for attention on a height x width grid: [N, height * width, 4], metres at rest (x, y, z) and
    1 on the body, 0 off it. A cell takes the mean place of the part that fills most of it: an arm in front of the
    trunk must not end up between the two."""
    parts = one_hot((maps.part + 1), 25).permute(0, 3, 1, 2)[:, 1:].to(maps.rest)
    share = adaptive_avg_pool2d(parts, (height, width))
    most = share.argmax(1, keepdim=True)
    mine = (interpolate(most.float(), maps.size, mode="nearest").long() == maps.part[:, None]).to(maps.rest)
    place = adaptive_avg_pool2d(torch.cat([maps.rest * mine, mine], 1), (height, width))
    on_body = (share.sum(1, keepdim=True) >= 0.25) & (place[:, 3:] > 0)
    place = place[:, :3] / place[:, 3:].clamp(min=1e-6) * on_body
    return torch.cat([place, on_body.to(place)], 1).flatten(2).transpose(1, 2)
