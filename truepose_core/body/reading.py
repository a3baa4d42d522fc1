"""Bodies in files: our own json and npz, and those of the tools that estimate bodies from photographs.

All of these tools look along z with y down; a `BodyPose` has y up and z towards the camera, so the root is turned by
half a turn about x. Their cameras are perspective; ours is orthographic and magnifies everything as they magnify the
pelvis. SMPL and SMPL-X turn about a pelvis that is away from the origin of their translations: by the place of their
neutral mean shape's pelvis, where the file does not say where the pelvis is.
"""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from truepose_core.body.arrays import read_npz
from truepose_core.body.mhr import KEYPOINTS, smpl_pose_of_keypoints
from truepose_core.body.pose import JOINTS, SHAPE, BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.json_text import read_json
from truepose_core.mannequin.body import axis_angle_to_matrix, matrix_to_axis_angle
from truepose_core.pictures.files import atomic_write, check_output

_log = logging.getLogger(__name__)

SUFFIXES = (".json", ".npz")

# Pelvis of the neutral mean shape, metres from the origin of the model, by the number of body joints in the file.
_PELVIS = {23: (-0.001795, -0.223333, 0.028219), 21: (0.003123, -0.351407, 0.012037)}
_MODELS = {23: "SMPL", 21: "SMPL-X"}
# 4D-Humans' focal length for a crop of 256 pixels; on a whole picture it grows with the longer side.
_HMR_FOCAL = 5000 / 256
# Its 44 keypoints start with OpenPose's 25, of which this one is SMPL's pelvis.
_HMR_KEYPOINTS, _MID_HIP = 44, 8
_NESTED = ("pred_smpl_params", "smpl_params", "smpls", "smpl", "smplx")
_TRANSLATIONS = ("pred_cam_t_full", "cam_t", "cam_trans", "transl")
_FOCALS = ("scaled_focal_length", "focal_length", "focal")
_SIZES = ("canvas", "img_size", "render_res")
_MHR_KEYS = ("mhr_model_params", "body_pose_params", "pred_pose_raw", "shape_params", "pred_joint_coords")
_BOX = ("pred_cam", "box_center", "box_size")
_AMASS = ("mocap_framerate", "mocap_frame_rate")
_KEYS = (
    *("theta", "beta", "camera", "global_orient", "body_pose", "betas", "shapes", "poses", "Rh", "princpt"),
    *("pred_keypoints_3d", "pred_keypoints_2d", "pred_cam_t"),
    *(_TRANSLATIONS + _FOCALS + _SIZES + _BOX + _AMASS),
)
_MOST_SHAPE = 400
# Where a body whose file has no camera stands: whole, in the middle.
_MIDDLE = (0.5, 0.0, -0.05)


@dataclass(frozen=True)
class _Record:
    """One entry of a file: its values by key, and what to call it in errors."""

    values: dict[str, Any]
    where: str
    path: Path

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def first(self, keys: tuple[str, ...]) -> str | None:
        """The first of these keys that is there."""
        return next((key for key in keys if key in self), None)

    def numbers(self, key: str) -> Tensor:
        """The value as float64. Raises TruePoseError when it is missing, no array of numbers, or not finite."""
        if key not in self:
            raise TruePoseError(f"{self.where} has no {key}; it holds {', '.join(sorted(self.values)) or 'nothing'}")
        try:
            array = np.asarray(self.values[key], dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise TruePoseError(f"{key} of {self.where} is no array of numbers ({error})") from error
        if not array.size:
            raise TruePoseError(f"{key} of {self.where} is empty: it holds nobody")
        if not np.isfinite(array).all():
            raise TruePoseError(f"{key} of {self.where} holds NaN or infinite values")
        return torch.from_numpy(array)

    def rows(self, key: str, count: int, width: int, most: int | None = None) -> Tensor:
        """The value as [count, width]: the first `width` of at most `most` columns. One row serves all people."""
        array = self.numbers(key)
        rows = array.reshape(-1, array.shape[-1]) if array.ndim and width > 1 else array.reshape(-1, 1)
        if rows.shape[0] not in (1, count) or not width <= rows.shape[1] <= (most or width):
            raise TruePoseError(
                f"{key} of {self.where} is {list(array.shape)}; expected {width} numbers for each of {count} people"
            )
        return rows[:, :width].expand(count, -1)


def read_body(
    path: str | os.PathLike[str], canvas: tuple[int, int] | None = None, person: int | None = None
) -> tuple[BodyPose, tuple[int, int] | None]:
    """One person of an npz or json file, and the (width, height) of the picture when the file says it.

    canvas: (width, height) of the picture, for files that do not say it. person: which one of several, from 0; without
    it the largest in the picture is taken, and a log warning says so. A list of dictionaries in json is a list of
    people; in arrays people are the first axis. Pickles are never opened. What is understood:

    Ours: theta [N, 24, 3], beta [N, 10] and camera [N, 3] as in `BodyPose`; canvas [2], width and height.

    4D-Humans (HMR2), and Champ's results of it: global_orient [N, 1, 3, 3], body_pose [N, 23, 3, 3] (or axis-angle) and
    betas [N, 10], in json also inside pred_smpl_params, smpl_params, smpls or smpl. The camera is pred_cam (scale, x,
    y) in the square box of box_center and box_size, with img_size (width, height); or a translation (pred_cam_t_full,
    cam_t) with scaled_focal_length or focal_length in pixels and img_size or render_res. With pred_keypoints_3d
    [N, 44, 3] the pelvis is exactly where the tool has it.

    SMPLer-X: global_orient [N, 3], body_pose [21, 3] or [N, 63], betas [N, 10], transl (or cam_trans); focal and
    princpt in pixels from the same file, or from where the tool writes them: ../meta/<name>.json. No file of it says
    the picture's size: give canvas. SMPL-X's 21 body joints are SMPL's first ones; the hands (22, 23) stay straight.
    betas are kept, but they are SMPL-X's, as a warning says.

    SAM 3D Body: pred_keypoints_3d [N, 70, 3], pred_cam_t [N, 3], focal_length [N]; give canvas. Its rig (MHR) has other
    joints and shapes than SMPL. So rotations come from the keypoints (`mhr.smpl_pose_of_keypoints`), the shape is the
    mean one, and size goes into the camera's scale. With pred_keypoints_2d the canvas is checked against them.

    AMASS and plain SMPL: poses [N, 72] or [N, 24, 3] (of SMPL-H's [N, 156] and SMPL-X's [N, 165] the body), and betas
    or shapes. There is no camera: the body stands whole in the middle, as a warning says. Axes are the body's own (y
    up, z to the viewer); in AMASS, recognised by mocap_framerate, z is up. EasyMocap's Rh is refused: it is in the axes
    of a rig that the file does not know.

    Of more than ten shape numbers the first ten are taken. Raises TruePoseError, naming the file, for files that cannot
    be read, other joint counts, degrees, matrices that are no rotations, NaN, impossible cameras, nobody, and a person
    who is not there.
    """
    path = Path(path)
    where = f"body file {path}"
    if canvas is not None:
        canvas = _checked_canvas(canvas, where)
    people, sizes = [], []
    for record in _records(path, where):
        size = _canvas_of(record)
        people.append(_read_record(record, size or canvas))
        sizes += [size] * len(people[-1])
    bodies = BodyPose(*(torch.cat([getattr(b, name) for b in people]) for name in ("theta", "beta", "camera")))
    index = _choose(bodies, person, where)
    return bodies.select([index]), sizes[index]


def write_body(
    path: str | os.PathLike[str], body: BodyPose, canvas: tuple[int, int] | None, overwrite: bool = False
) -> Path:
    """Write people as our own npz or json, by the suffix, whole or not at all; `read_body` reads it back exactly.

    canvas: (width, height) in pixels of the picture that the cameras belong to, None when there is none. Returns the
    path. Raises TruePoseError for another suffix or canvas, and as `images.check_output`.
    """
    path = check_output(path, overwrite, SUFFIXES)
    if canvas is not None:
        canvas = _checked_canvas(canvas, f"body file {path}")
    arrays = {name: getattr(body, name).cpu() for name in ("theta", "beta", "camera")}
    if path.suffix.lower() == ".json":
        content = {name: value.tolist() for name, value in arrays.items()} | {"canvas": canvas}
        return atomic_write(path, json.dumps(content), overwrite)
    buffer = io.BytesIO()
    size = {} if canvas is None else {"canvas": np.array(canvas)}
    np.savez(buffer, **{name: value.numpy() for name, value in arrays.items()}, **size)
    return atomic_write(path, buffer.getvalue(), overwrite)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says which file it was in errors that cannot know."""
    try:
        yield
    except TruePoseError as error:
        raise TruePoseError(f"{where}: {error}") from error


def _records(path: Path, where: str) -> list[_Record]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TruePoseError(
            f"{where} has the suffix {path.suffix!r}; expected .npz or .json. Pickles (.pkl, .npy of dictionaries) are "
            "never opened: where you trust one, load it there and save its arrays with numpy.savez or as json"
        )
    if suffix == ".npz":
        return [_Record(read_npz(path, _KEYS, where), where, path)]
    data = read_json(path, where)
    entries = data if isinstance(data, list) else [data]
    if not entries:
        raise TruePoseError(
            f"{where} is an empty list: it holds nobody. Give a picture in which the tool finds a person"
        )
    records = []
    for i, entry in enumerate(entries):
        label = f"{where}, person {i}" if len(entries) > 1 else where
        if not isinstance(entry, dict):
            raise TruePoseError(f"{label} is a {type(entry).__name__}; expected a dictionary of a body's numbers")
        nested = [entry[key] for key in _NESTED if isinstance(entry.get(key), dict)]
        records.append(_Record({k: v for part in (entry, *nested) for k, v in part.items()}, label, path))
    return records


def _read_record(record: _Record, canvas: tuple[int, int] | None) -> BodyPose:
    if "theta" in record or "beta" in record:
        arrays = [record.numbers(name) for name in ("theta", "beta", "camera")]
        with _naming(record.where):
            return BodyPose(*arrays)
    if "body_pose" in record:
        return _from_smpl(record, canvas)
    if "poses" in record:
        return _from_poses(record)
    if "pred_keypoints_3d" in record or any(key in record.values for key in _MHR_KEYS):
        return _from_sam(record, canvas)
    if "people" in record:
        raise TruePoseError(f"{record.where} holds OpenPose keypoints, not a body; lift them instead")
    raise TruePoseError(
        f"{record.where} holds {', '.join(sorted(record.values)) or 'nothing'}; expected theta, beta, camera (ours), "
        "global_orient, body_pose and betas (4D-Humans, SMPLer-X), pred_keypoints_3d (SAM 3D Body), or poses and betas"
    )


def _from_smpl(record: _Record, canvas: tuple[int, int] | None) -> BodyPose:
    theta = _joint_rotations(record, "body_pose")
    count, joints = theta.shape[:2]
    if "global_orient" in record:
        theta = torch.cat([_root(record, count), theta], 1)
    else:
        joints -= 1
    if joints not in _PELVIS:
        raise TruePoseError(
            f"body_pose of {record.where} has {joints} joints below the root; expected 23 (SMPL) or 21 (SMPL-X)"
        )
    if joints == 21:
        theta = torch.cat([theta, theta.new_zeros(count, 2, 3)], 1)
        _log.warning(
            "%s holds an SMPL-X body: its betas are kept, but SMPL and the generic body read them as another shape",
            record.where,
        )
    beta = record.rows("betas", count, SHAPE, _MOST_SHAPE)
    where = record.where
    if canvas is None:
        raise TruePoseError(f"{where} does not say how large the picture is; give canvas, (width, height) in pixels")
    size = theta.new_tensor(canvas)
    pelvis = theta.new_tensor(_PELVIS[joints]).expand(count, -1)
    if "pred_keypoints_3d" in record:
        points = record.numbers("pred_keypoints_3d")
        if points.shape[-2:] == (_HMR_KEYPOINTS, 3) and points.numel() == count * _HMR_KEYPOINTS * 3:
            pelvis = points.reshape(count, _HMR_KEYPOINTS, 3)[:, _MID_HIP]
    if all(key in record for key in _BOX):
        focal = size.max().expand(count, 1) * _HMR_FOCAL
        if "scaled_focal_length" in record:
            focal = _focal(record, "scaled_focal_length", count)
        scale, shift = record.rows("pred_cam", count, 3).split([1, 2], 1)
        box = record.rows("box_size", count, 1) * scale
        _check_camera(box, "pred_cam times box_size", where)
        middle = record.rows("box_center", count, 2) - size / 2
        translation = torch.cat([2 * middle / box + shift, 2 * focal / box], 1)
        return _placed(theta, beta, translation + pelvis, focal, size / 2, size, where)
    record = _with_meta(record)
    found = record.first(_TRANSLATIONS), record.first(_FOCALS)
    if None in found:
        raise TruePoseError(
            f"{where} has no camera: expected {', '.join(_BOX)}, or a translation ({', '.join(_TRANSLATIONS)}) with a "
            f"focal length in pixels ({', '.join(_FOCALS)}; SMPLer-X writes it to ../meta/{record.path.stem}.json: "
            f"keep its folders together). It holds {', '.join(sorted(record.values))}"
        )
    centre = record.rows("princpt", count, 2) if "princpt" in record else size / 2
    translation = record.rows(found[0], count, 3)
    return _placed(theta, beta, translation + pelvis, _focal(record, found[1], count), centre, size, where)


def _from_poses(record: _Record) -> BodyPose:
    if "Rh" in record:
        raise TruePoseError(
            f"{record.where} turns its body by Rh (EasyMocap), in the axes of a calibrated rig that the file does not "
            "know; turn Rh into the camera's axes (y up, z to the viewer), put it first in poses, and leave Rh out"
        )
    array = record.numbers("poses")
    if array.ndim and array.shape[-1] in (156, 165):
        body = array.reshape(-1, array.shape[-1])[:, :66].unflatten(1, (22, 3))
        theta = torch.cat([body, body.new_zeros(len(body), 2, 3)], 1)
    else:
        theta = _joint_rotations(record, "poses")
    if theta.shape[1] != JOINTS:
        raise TruePoseError(
            f"poses of {record.where} has {theta.shape[1]} joints; expected {JOINTS} (72 numbers), or 52 (SMPL-H) or "
            "55 (SMPL-X), of which the body is taken"
        )
    beta = record.rows("shapes" if "shapes" in record else "betas", len(theta), SHAPE, _MOST_SHAPE)
    with _naming(record.where):
        body = BodyPose(theta, beta, theta.new_tensor(_MIDDLE).expand(len(theta), -1))
    _log.warning("%s has no camera: the body stands whole in the middle of the picture", record.where)
    if record.first(_AMASS):
        return _turned(body, theta.new_tensor([-torch.pi / 2, 0, 0]))
    return body


def _from_sam(record: _Record, canvas: tuple[int, int] | None) -> BodyPose:
    where = record.where
    if "pred_keypoints_3d" not in record:
        raise TruePoseError(
            f"{where} holds parameters of SAM 3D Body's rig (MHR), which SMPL does not share; save pred_keypoints_3d, "
            "pred_cam_t and focal_length of the same output too, or turn it into SMPL with the converter of MHR"
        )
    points = record.numbers("pred_keypoints_3d")
    if points.shape[-2:] != (KEYPOINTS, 3):
        raise TruePoseError(f"pred_keypoints_3d of {where} is {list(points.shape)}; expected [N, {KEYPOINTS}, 3]")
    points = points.reshape(-1, KEYPOINTS, 3)
    count = len(points)
    if canvas is None:
        raise TruePoseError(f"{where} does not say how large the picture is; give canvas, (width, height) in pixels")
    size = points.new_tensor(canvas)
    translation, focal = record.rows("pred_cam_t", count, 3), record.rows("focal_length", count, 1)
    _check_camera(translation[:, 2:], "depth in pred_cam_t", where)
    if "pred_keypoints_2d" in record:
        given = record.numbers("pred_keypoints_2d")
        seen = points + translation[:, None]
        seen = size / 2 + focal[:, None] * seen[..., :2] / seen[..., 2:]
        if given.numel() != seen.numel() or (given.reshape(seen.shape) - seen).abs().median() > 0.02 * size.max():
            raise TruePoseError(
                f"pred_keypoints_2d of {where} do not lie where a picture of {canvas[0]}x{canvas[1]} has them; give "
                "the canvas (width, height) of the picture that the tool saw"
            )
    flip = points.new_tensor([1, -1, -1])
    with _naming(where):
        theta, pelvis, grown = smpl_pose_of_keypoints(points * flip)
    camera = _orthographic(translation + pelvis * flip, focal, size / 2, size, where)
    camera[:, 0] *= grown
    with _naming(where):
        return BodyPose(theta, theta.new_zeros(count, SHAPE), camera)


def _joint_rotations(record: _Record, key: str) -> Tensor:
    """Axis-angle [P, J, 3] of [.., J, 3, 3], [.., J, 3] or [.., 3 J]."""
    array = record.numbers(key)
    shape = list(array.shape)
    if array.ndim >= 3 and shape[-2:] == [3, 3]:
        return _of_matrices(array.reshape(-1, *shape[-3:]), key, record.where)
    if array.ndim >= 2 and shape[-1] == 3:
        return array.reshape(-1, *shape[-2:])
    if not array.ndim or not shape[-1] or shape[-1] % 3:
        raise TruePoseError(
            f"{key} of {record.where} is {shape}; expected three numbers or a 3x3 matrix for each joint"
        )
    return array.reshape(-1, shape[-1] // 3, 3)


def _root(record: _Record, count: int) -> Tensor:
    array = record.numbers("global_orient")
    if array.numel() == 9 * count:
        return _of_matrices(array.reshape(count, 1, 3, 3), "global_orient", record.where)
    if array.numel() == 3 * count:
        return array.reshape(count, 1, 3)
    raise TruePoseError(
        f"global_orient of {record.where} is {list(array.shape)}; expected one rotation for each of {count} people"
    )


def _of_matrices(matrices: Tensor, key: str, where: str) -> Tensor:
    wrong = (matrices @ matrices.mT - torch.eye(3).to(matrices)).abs().max().item()
    if wrong > 0.02 or (torch.linalg.det(matrices) < 0).any():
        raise TruePoseError(f"{key} of {where} holds 3x3 matrices that are no rotations (off by {wrong:.2g})")
    return matrix_to_axis_angle(matrices)


def _focal(record: _Record, key: str, count: int) -> Tensor:
    """[P, 1] pixels, of one number or of one for x and one for y that agree."""
    array = record.numbers(key)
    if array.ndim and array.shape[-1] == 2:
        both = record.rows(key, count, 2)
        if (both[:, 0] / both[:, 1] - 1).abs().max() > 0.02:
            raise TruePoseError(f"{key} of {record.where} is {both[0].tolist()}; expected square pixels, x and y alike")
        return both.mean(1, keepdim=True)
    return record.rows(key, count, 1)


def _with_meta(record: _Record) -> _Record:
    """The record with focal and princpt from SMPLer-X's meta folder, where it has none of its own."""
    meta = record.path.parent.parent / "meta" / f"{record.path.stem}.json"
    if record.first(_FOCALS) or not meta.is_file():
        return record
    found = read_json(meta, f"meta file {meta}")
    if not isinstance(found, dict):
        raise TruePoseError(f"meta file {meta} is a {type(found).__name__}; expected SMPLer-X's dictionary")
    return replace(record, values=record.values | {key: found.get(key) for key in ("focal", "princpt")})


def _placed(
    theta: Tensor, beta: Tensor, pelvis: Tensor, focal: Tensor, centre: Tensor, size: Tensor, where: str
) -> BodyPose:
    camera = _orthographic(pelvis, focal, centre, size, where)
    with _naming(where):
        return _turned(BodyPose(theta, beta, camera), theta.new_tensor([torch.pi, 0, 0]))


def _orthographic(pelvis: Tensor, focal: Tensor, centre: Tensor, size: Tensor, where: str) -> Tensor:
    """The camera [P, 3] in frame heights that shows the surroundings of the pelvis as a perspective one does.

    pelvis: [P, 3] metres in the camera's axes (y down, z forward). focal: [P, 1], centre: [P, 2] or [2], size: [2]
    (width, height), pixels.
    """
    depth = pelvis[:, 2:]
    _check_camera(depth, "depth of the pelvis", where)
    _check_camera(focal, "focal length", where)
    magnified = focal / depth
    return torch.cat([magnified, magnified * pelvis[:, :2] + centre - size / 2], 1) / size[1]


def _turned(body: BodyPose, by: Tensor) -> BodyPose:
    """The bodies turned as a whole by an axis-angle vector [3]."""
    root = matrix_to_axis_angle(axis_angle_to_matrix(by) @ axis_angle_to_matrix(body.theta[:, 0].to(by)))
    return replace(body, theta=torch.cat([root[:, None].to(body.theta), body.theta[:, 1:]], 1))


def _check_camera(value: Tensor, what: str, where: str) -> None:
    if value.min() <= 0:
        raise TruePoseError(f"the {what} of {where} is {value.min().item():g}; expected more than 0: nobody is seen so")


def _canvas_of(record: _Record) -> tuple[int, int] | None:
    """What the record itself says of the picture's (width, height)."""
    key = record.first(_SIZES)
    if key is None:
        return None
    sizes = record.numbers(key)
    rows = sizes.reshape(-1, sizes.shape[-1]) if sizes.ndim else sizes.reshape(1, 1)
    if (rows != rows[0]).any():
        raise TruePoseError(f"{key} of {record.where} says several sizes; expected one picture, (width, height)")
    return _checked_canvas(rows[0].tolist(), record.where)


def _checked_canvas(canvas: Any, where: str) -> tuple[int, int]:
    try:
        width, height = (float(side) for side in canvas)
    except (TypeError, ValueError):
        width = height = 0.5
    if not all(1 <= side < 2**24 and side % 1 == 0 for side in (width, height)):
        raise TruePoseError(f"the canvas of {where} is {canvas!r}; expected (width, height), whole numbers of pixels")
    return int(width), int(height)


def _choose(bodies: BodyPose, person: int | None, where: str) -> int:
    if person is None:
        index = int(bodies.camera[:, 0].argmax())
        if len(bodies) > 1:
            _log.warning(
                "%s holds %d people; taking person %d, the largest. Choose another by its index, 0 to %d",
                where,
                len(bodies),
                index,
                len(bodies) - 1,
            )
        return index
    if not 0 <= person < len(bodies):
        raise TruePoseError(
            f"person {person} was asked for, but {where} has {len(bodies)}; expected an index from 0 to "
            f"{len(bodies) - 1}"
        )
    return person
