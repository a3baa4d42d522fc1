"""A user's own SMPL file in place of the generic body: linear blend skinning, and its surface in a picture.

The model is SMPL's (Loper et al. 2015, section 3); no file of it comes with us. What is rendered and where a surface
point went speak the language of `body.render`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from truepose_core.body.arrays import read_npz
from truepose_core.body.pose import SHAPE, BodyPose
from truepose_core.body.raster import rasterize
from truepose_core.body.render import MIRRORS, BodyMaps, check_visible, on_screen
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import JOINTS, PARENTS, axis_angle_to_matrix, chain_rotations
from truepose_core.regions import Region

_KEYS = ("v_template", "shapedirs", "posedirs", "J_regressor", "weights", "f", "kintree_table")
_POSE = 9 * (len(JOINTS) - 1)
_CHUNK = 8
# What each joint's skin usually wears: a mesh has no wardrobe of its own.
_SKIN = {"head": Region.FACE, "neck": Region.SKIN}
_LOWER = ("hip", "pelvis", "knee", "ankle")


def _region(joint: str) -> int:
    if joint in _SKIN:
        return _SKIN[joint]
    if joint.endswith(("wrist", "hand")):
        return Region.SKIN
    if joint.endswith("foot"):
        return Region.ACCESSORY
    return Region.LOWER if joint.endswith(_LOWER) else Region.UPPER


@dataclass(frozen=True, eq=False)
class SmplModel:
    """A skinned body of V vertices and F triangles on SMPL's 24 joints. Lengths in metres; see `load`.

    template: [V, 3]. shapes: [V, 3, 10] change per unit of beta. pose_shapes: [V, 3, 207] change per entry of the
    rotations of joints 1..23 minus identity, or None. regressor: [24, V]. weights: [V, 24], rows sum to 1. faces:
    [F, 3], outside is where the corners run counterclockwise.
    """

    template: Tensor
    shapes: Tensor
    pose_shapes: Tensor | None
    regressor: Tensor
    weights: Tensor
    faces: Tensor

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SmplModel:
        """Read a model from an npz file with SMPL's own keys.

        v_template [V, 3], shapedirs [V, 3, 10 or more] (the first ten are used), J_regressor [24, V], weights [V, 24],
        f [F, 3], kintree_table [2, 24]; posedirs [V, 3, 207] may be missing. Pickles are never opened: a .pkl file, or
        a sparse J_regressor, is turned into such an npz once, where the file is trusted:
        `numpy.savez("smpl.npz", J_regressor=model["J_regressor"].toarray(), v_template=..., ...)`.

        Raises TruePoseError, naming the file and the array, for anything else, SMPL-X and SMPL-H among it.
        """
        path = Path(path)
        where = f"SMPL file {path}"
        if path.suffix.lower() != ".npz":
            raise TruePoseError(
                f"{where} has the suffix {path.suffix!r}; expected .npz. Pickles are never opened: where you trust the "
                f"file, load it there and save {', '.join(_KEYS)} as plain arrays with numpy.savez"
            )
        found = read_npz(path, _KEYS, where)
        missing = [key for key in _KEYS if key not in found and key != "posedirs"]
        if missing:
            raise TruePoseError(f"{where} has no {', '.join(missing)}; it holds {', '.join(sorted(found))}")
        arrays = {key: _checked(found[key], key, where) for key in _KEYS if key in found}

        vertices = len(arrays["v_template"]) if arrays["v_template"].ndim else 0
        faces, shapes = arrays["f"], arrays["shapedirs"]
        expected = {
            "v_template": (vertices, 3),
            "shapedirs": (vertices, 3, max(shapes.shape[-1] if shapes.ndim else 0, SHAPE)),
            "J_regressor": (len(JOINTS), vertices),
            "weights": (vertices, len(JOINTS)),
            "f": (len(faces) if faces.ndim else 0, 3),
            "kintree_table": (2, len(JOINTS)),
            "posedirs": (vertices, 3, _POSE),
        }
        for key, array in arrays.items():
            if array.shape != expected[key] or not array.size:
                raise TruePoseError(
                    f"{key} of {where} is {list(array.shape)}; expected {list(expected[key])} for SMPL's 24 joints and "
                    f"{vertices} vertices. Models with other joints (SMPL-X, SMPL-H, MANO) do not fit"
                )
        if tuple(arrays["kintree_table"][0, 1:].astype(np.int64)) != PARENTS[1:]:
            raise TruePoseError(f"kintree_table of {where} is not SMPL's tree of 24 joints; expected {PARENTS[1:]}")
        if faces.min() < 0 or faces.max() >= vertices or (faces % 1).any():
            raise TruePoseError(f"f of {where} names corners outside the {vertices} vertices")
        total = arrays["weights"].sum(1)
        if arrays["weights"].min() < 0 or np.abs(total - 1).max() > 1e-2:
            raise TruePoseError(
                f"weights of {where} are {arrays['weights'].min():g} or more and sum to {total.min():g} to "
                f"{total.max():g} per vertex; expected shares that sum to 1"
            )

        def tensor(key: str) -> Tensor:
            return torch.from_numpy(arrays[key].astype(np.float32))

        return cls(
            template=tensor("v_template"),
            shapes=tensor("shapedirs")[..., :SHAPE],
            pose_shapes=tensor("posedirs") if "posedirs" in arrays else None,
            regressor=tensor("J_regressor"),
            weights=tensor("weights") / tensor("weights").sum(1, keepdim=True),
            faces=torch.from_numpy(faces.astype(np.int64)),
        )

    def to(self, device: torch.device | str) -> SmplModel:
        """The same model on another device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: None if x is None else x.to(device) for name, x in moved.items()})

    def joints(self, beta: Tensor) -> Tensor:
        """Joints of the T-pose [N, 24, 3] in metres, pelvis at 0, of shapes beta [N, 10] (Loper et al., eq. 8, 10)."""
        joints = self._joints(self._shaped(beta))
        return joints - joints[:, :1]

    def vertices(self, theta: Tensor, beta: Tensor) -> Tensor:
        """The posed surface [N, V, 3] in metres, pelvis at 0 (Loper et al., eq. 2 to 9).

        theta: axis-angle [N, 24, 3] in radians. beta: [N, 10].
        """
        shaped = self._shaped(beta)
        joints = self._joints(shaped)
        local = axis_angle_to_matrix(theta)
        rotation, position = chain_rotations(local, joints - joints[:, :1])
        if self.pose_shapes is not None:
            bent = (local[:, 1:] - torch.eye(3).to(local)).flatten(1)
            shaped = shaped + torch.einsum("vkp,np->nvk", self.pose_shapes, bent)
        shift = position - (rotation @ joints[..., None])[..., 0]
        blended = torch.einsum("vj,njab->nvab", self.weights, rotation)
        return (blended @ shaped[..., None])[..., 0] + self.weights @ shift

    def _shaped(self, beta: Tensor) -> Tensor:
        return self.template + torch.einsum("vkb,nb->nvk", self.shapes, beta)

    def _joints(self, shaped: Tensor) -> Tensor:
        return self.regressor @ shaped

    @cached_property
    def rest(self) -> Tensor:
        """The template [V, 3] with its pelvis at 0: one place for a spot of skin, whoever wears it and however."""
        return self.template - self.regressor[:1] @ self.template

    @torch.no_grad()
    def render(self, body: BodyPose, height: int, width: int) -> BodyMaps:
        """The visible surface of N bodies in a frame of height x width pixels, with face and barycentric.

        rest is the place on the mean shape. part is the joint with the largest blend weight, region what is usually
        worn there. Raises TruePoseError where a body is wholly outside the frame.
        """
        pieces = [
            self._maps(body.select(chosen), height, width)
            for chosen in torch.arange(len(body), device=body.theta.device).split(_CHUNK)
        ]
        maps = BodyMaps(**{name: torch.cat([getattr(piece, name) for piece in pieces]) for name in vars(pieces[0])})
        check_visible(maps)
        return maps

    def _maps(self, body: BodyPose, height: int, width: int) -> BodyMaps:
        vertices = self.vertices(body.theta, body.beta)
        face, barycentric, depth = rasterize(to_pixels(vertices, body.camera, height, width), self.faces, height, width)
        on = (face >= 0)[:, None]
        visible = on[:, 0]
        normal = at_surface(vertex_normals(vertices, self.faces), self.faces, face, barycentric)
        normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        shares = (self.weights[self.faces[face[visible]]] * barycentric[visible][..., None]).sum(1)
        part = face.masked_fill(visible, 0)
        part[visible] = shares.argmax(-1)
        # Where nobody is, -1 takes the last entry.
        regions = torch.tensor([*map(_region, JOINTS), Region.BACKGROUND], device=part.device)
        rest = at_surface(self.rest.expand(len(body), -1, -1), self.faces, face, barycentric)
        return BodyMaps(
            rest=rest.permute(0, 3, 1, 2),
            part=part,
            normal=normal.permute(0, 3, 1, 2),
            depth=depth[:, None],
            mask=on.to(depth),
            region=regions[part],
            face=face,
            barycentric=barycentric,
        )

    @torch.no_grad()
    def locate(self, maps: BodyMaps, body: BodyPose, mirror: str = "none") -> Tensor:
        """Where the surface points of maps [N] are on bodies [N], seen or hidden: [N, 3, H, W] as
        `GenericBody.locate` gives it, for maps that `render` of a model with these faces made.

        mirror: a name of `MIRRORS`. A corner's look-alike is the corner that is nearest to its mirrored place.
        """
        if maps.face is None or maps.barycentric is None:
            raise TruePoseError("these maps were not rendered from a mesh; locate them with the body that made them")
        vertices = self.vertices(body.theta, body.beta)
        if mirror != "none":
            vertices = vertices[:, self._look_alikes[mirror]]
        world = at_surface(vertices, self.faces, maps.face, maps.barycentric)
        return on_screen(world.flatten(1, 2), body.camera, maps)

    @cached_property
    def _look_alikes(self) -> dict[str, Tensor]:
        tables = {}
        for name, (x, z) in MIRRORS.items():
            if name == "none":
                continue
            mirrored = self.rest * self.rest.new_tensor([x, 1.0, z])
            tables[name] = torch.cat([torch.cdist(some, self.rest).argmin(1) for some in mirrored.split(1024)])
        return tables


def to_pixels(points: Tensor, camera: Tensor, height: int, width: int) -> Tensor:
    """Metres [N, K, 3] -> pixels right, pixels down, and depth in frame heights [N, K, 3]; camera as in `BodyPose`."""
    scale, right, down = (c[:, None] for c in camera.unbind(-1))
    x = width / 2 + height * (scale * points[..., 0] + right)
    y = height * (0.5 - scale * points[..., 1] + down)
    return torch.stack([x, y, scale * points[..., 2]], -1)


def at_surface(values: Tensor, faces: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
    """What the corners carry [N, V, C], at surface points: [N, ..., C]; 0 where face is -1.

    faces: [F, 3]. face: [N, ...] and barycentric: [N, ..., 3], as `rasterize` gives them. With the vertices of another
    pose as values this is where the points went.
    """
    on = face >= 0
    corners = values[on.nonzero()[:, :1], faces[face[on]]]
    found = values.new_zeros((*face.shape, values.shape[-1]))
    found[on] = (corners * barycentric[on][..., None]).sum(1)
    return found


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Outward unit normals [N, V, 3] of a mesh [N, V, 3], [F, 3]: the mean of the faces around, weighted by area."""
    a, b, c = vertices[:, faces].unbind(2)
    across = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in faces.unbind(1):
        total.index_add_(1, corner, across)
    return total / total.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _checked(array: np.ndarray, key: str, where: str) -> np.ndarray:
    if array.dtype.kind not in "iuf":
        raise TruePoseError(f"{key} of {where} holds {array.dtype}; expected numbers")
    if not np.isfinite(array).all():
        raise TruePoseError(f"{key} of {where} holds NaN or infinite values")
    return array
