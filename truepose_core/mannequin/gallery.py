"""Makes the poses of `truepose_core.pose.gallery` and a sheet of them:
`python -m truepose_core.mannequin.gallery SHEET.png`."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from truepose_core.pose.gallery import FILE, gallery_pose
from truepose_core.pose.keypoints import BODY_KEYPOINTS

_Spec = dict[str, Any]

# What a pose is made of. yaw: degrees from facing the camera to the person's left (the viewer's right); bend, tilt (to
# the person's right), twist (to their left): the spine. nod, look (to the left), head_tilt (to the right): the head.
# hand, foot: where wrist and ankle are, from the shoulder and the hip, in metres (outwards, up, forwards); a name in
# front says from where else: "hip", "chest", "head". elbow, knee: where they point. l_ and r_ say a side; without it,
# both. hidden: joints behind the body. lift: metres above the ground.
_REST: _Spec = {
    "hand": (0.06, -0.49, 0.06),
    "elbow": (0.4, 0.0, -1.0),
    "foot": (0.02, -0.835, 0.0),
    "knee": (0.12, 0.0, 1.0),
}
_WALK: _Spec = {
    "l_hand": (0.03, -0.46, 0.18),
    "r_hand": (0.05, -0.45, -0.17),
    "l_foot": (0.01, -0.72, -0.34),
    "r_foot": (0.0, -0.79, 0.25),
    "knee": (0.05, 0.0, 1.0),
    "twist": -8,
}
_TABLE: dict[str, _Spec] = {
    "standing": {},
    "three-quarter": {"yaw": -40, "look": 12, "l_foot": (0.04, -0.83, 0.06)},
    "side": {"yaw": -88, "l_hand": (0.02, -0.49, 0.1), "r_hand": (0.02, -0.5, -0.02), "l_foot": (0, -0.835, 0.06)},
    "back": {"yaw": 180},
    "three-quarter back": {"yaw": 142, "look": -8, "l_foot": (0.04, -0.83, 0.05)},
    "over the shoulder": {
        "yaw": 155,
        "twist": -22,
        "look": -62,
        "r_foot": (0.05, -0.82, 0.08),
        "r_hand": ("hip", 0.09, 0.1, -0.02),
        "r_elbow": (1.0, 0.0, -0.6),
    },
    "weight on one leg": {
        "yaw": 14,
        "tilt": 6,
        "head_tilt": -7,
        "roll": -5,
        "l_foot": (0.1, -0.78, 0.16),
        "l_knee": (0.35, 0.0, 1.0),
        "r_foot": (-0.05, -0.84, 0.0),
    },
    "walking": {**_WALK, "yaw": 12},
    "walking sideways": {**_WALK, "yaw": 80},
    "running": {
        "yaw": 66,
        "bend": 12,
        "twist": -14,
        "lift": 0.04,
        "l_hand": (-0.02, -0.1, 0.3),
        "l_elbow": (0.25, -1.0, -0.6),
        "r_hand": (0.06, -0.32, -0.16),
        "r_elbow": (0.3, 0.1, -1.0),
        "l_foot": (-0.02, -0.45, -0.5),
        "l_knee": (0.0, -0.6, 1.0),
        "r_foot": (-0.02, -0.55, 0.22),
    },
    "jumping": {
        "yaw": 8,
        "lift": 0.22,
        "bend": -6,
        "hand": (0.34, 0.34, 0.05),
        "elbow": (1.0, -0.6, -0.2),
        "shrug": 18,
        "l_foot": (0.14, -0.62, -0.2),
        "r_foot": (0.2, -0.72, -0.02),
        "knee": (0.4, 0.0, 1.0),
    },
    "arms crossed": {
        "yaw": 8,
        "l_hand": ("chest", -0.13, -0.08, 0.2),
        "r_hand": ("chest", -0.12, -0.03, 0.17),
        "elbow": (0.7, -1.0, 0.25),
        "l_foot": (0.05, -0.83, 0.04),
        "look": -6,
    },
    "hands on hips": {"hand": ("hip", 0.09, 0.12, 0.03), "elbow": (1.0, 0.0, -0.45), "foot": (0.07, -0.83, 0.0)},
    "hand on hip": {
        "yaw": -16,
        "tilt": -5,
        "l_hand": ("hip", 0.09, 0.12, 0.02),
        "l_elbow": (1.0, 0.0, -0.5),
        "r_foot": (0.07, -0.81, 0.12),
        "r_knee": (0.3, 0.0, 1.0),
        "look": 10,
    },
    "hand in hair": {
        "yaw": 16,
        "tilt": -4,
        "head_tilt": 8,
        "l_hand": ("head", 0.09, 0.13, -0.02),
        "l_elbow": (1.0, 0.55, 0.1),
        "l_shrug": 20,
        "r_foot": (0.06, -0.82, 0.08),
    },
    "hands in pockets": {
        "yaw": -12,
        "hand": ("hip", 0.06, 0.0, 0.08),
        "elbow": (0.9, 0.0, -1.0),
        "l_foot": (0.06, -0.82, 0.07),
        "look": -10,
    },
    "hands behind the back": {
        "yaw": 6,
        "hand": ("hip", -0.05, 0.07, -0.17),
        "elbow": (0.8, 0.0, -1.0),
        "hidden": ("l_wrist", "r_wrist"),
    },
    "waving": {
        "yaw": -8,
        "r_hand": (0.2, 0.24, 0.14),
        "r_elbow": (1.0, -0.7, 0.0),
        "head_tilt": 6,
        "l_foot": (0.05, -0.83, 0.05),
    },
    "arms raised": {
        "hand": (0.12, 0.46, 0.03),
        "elbow": (1.0, 0.0, 0.1),
        "shrug": 24,
        "nod": -8,
        "foot": (0.06, -0.83, 0.0),
    },
    "thinking": {
        "yaw": 22,
        "nod": 8,
        "head_tilt": 5,
        "r_hand": ("head", -0.03, -0.03, 0.17),
        "r_elbow": (0.25, -1.0, 0.35),
        "l_hand": ("chest", -0.14, -0.12, 0.19),
        "l_elbow": (0.6, -1.0, 0.1),
        "look": -6,
    },
    "sitting": {
        "yaw": 24,
        "hand": ("hip", 0.02, 0.1, 0.3),
        "elbow": (0.6, -0.6, -0.6),
        "foot": (0.06, -0.4, 0.42),
        "knee": (0.15, 1.0, 0.6),
    },
    "sitting sideways": {
        "yaw": 82,
        "bend": 8,
        "l_hand": ("hip", 0.0, 0.1, 0.32),
        "r_hand": ("hip", 0.03, 0.1, 0.24),
        "elbow": (0.3, -0.8, -0.6),
        "l_foot": (0.0, -0.4, 0.46),
        "r_foot": (0.0, -0.4, 0.34),
        "knee": (0.05, 1.0, 0.6),
    },
    "kneeling": {
        "yaw": -34,
        "l_foot": (0.02, -0.42, -0.4),
        "l_knee": (0.05, -1.0, 0.6),
        "r_foot": (0.06, -0.44, 0.36),
        "r_knee": (0.12, 1.0, 0.8),
        "r_hand": ("hip", 0.05, 0.07, 0.36),
        "r_elbow": (0.6, -0.4, -0.8),
        "bend": 6,
    },
    "squatting": {
        "yaw": 30,
        "bend": 24,
        "nod": -14,
        "hand": ("hip", -0.02, 0.14, 0.42),
        "elbow": (0.8, -0.6, 0.1),
        "foot": (0.09, -0.33, 0.12),
        "knee": (0.35, 0.5, 1.0),
    },
}

_BONES = {"hand": (0.275, 0.25), "foot": (0.42, 0.42)}
_SOLE, _CROWN = 0.075, 0.2
"""Metres from the ankle down to the ground and from the middle of the ears up to the crown's height."""

# The face on the head, in metres from the head joint (left, up, forwards), and the least turn towards the camera of its
# side (left, forwards) at which it is seen.
_FACE = {
    "nose": ((0.0, 0.05, 0.115), (0.0, 1.0), -0.2),
    "r_eye": ((-0.032, 0.088, 0.085), (-0.5, 0.87), 0.0),
    "l_eye": ((0.032, 0.088, 0.085), (0.5, 0.87), 0.0),
    "r_ear": ((-0.078, 0.062, 0.0), (-1.0, 0.0), -0.3),
    "l_ear": ((0.078, 0.062, 0.0), (1.0, 0.0), -0.3),
}


def build() -> dict[str, list[list[float]]]:
    """All poses from the table: name -> 18 rows x, y (statures), visible; what `assets/poses.json` holds."""
    return {name: _keypoints(spec) for name, spec in _TABLE.items()}


def _turned(axis: int, degrees: float) -> np.ndarray:
    a, b = [i for i in range(3) if i != axis]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    matrix = np.eye(3)
    # x to y, y to z, z to x: the second axis of the three turns the other way round.
    sign = -1 if axis == 1 else 1
    matrix[a, a] = matrix[b, b] = cos
    matrix[a, b], matrix[b, a] = -sin * sign, sin * sign
    return matrix


def _posed(spec: _Spec) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(places in metres, turns [3, 3]) of the trunk, the shoulders, the hips and the head."""
    import torch

    from truepose_core.mannequin import JOINTS, forward_kinematics, matrix_to_axis_angle, rest_joints

    def at(name: str) -> float:
        return float(spec.get(name, 0.0))

    matrix = np.tile(np.eye(3), (24, 1, 1))
    matrix[0] = _turned(1, at("yaw")) @ _turned(2, at("roll"))
    third = 1 / 3
    spine = _turned(1, at("twist") * third) @ _turned(2, -at("tilt") * third) @ _turned(0, at("bend") * third)
    for joint in ("spine1", "spine2", "spine3"):
        matrix[JOINTS.index(joint)] = spine
    head = _turned(1, at("look") / 2) @ _turned(2, -at("head_tilt") / 2) @ _turned(0, at("nod") / 2)
    for joint in ("neck", "head"):
        matrix[JOINTS.index(joint)] = head
    for side, sign in (("left", 1), ("right", -1)):
        shrug = float(spec.get(f"{side[0]}_shrug", spec.get("shrug", -6.0)))
        matrix[JOINTS.index(f"{side}_collar")] = _turned(2, sign * shrug)
    theta = matrix_to_axis_angle(torch.from_numpy(matrix))[None]
    turns, places = forward_kinematics(theta, rest_joints(torch.zeros(1, 10, dtype=torch.float64)))
    return dict(zip(JOINTS, places[0].numpy(), strict=True)), dict(zip(JOINTS, turns[0].numpy(), strict=True))


def _bent(
    start: np.ndarray, end: np.ndarray, bones: tuple[float, float], pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(middle, end) of a limb of two bones from `start` to as near `end` as it reaches, bent towards `pole`."""
    way = end - start
    distance = min(max(float(np.linalg.norm(way)), abs(bones[0] - bones[1]) + 1e-3), sum(bones) - 1e-3)
    along = way / np.linalg.norm(way)
    across = pole - along * (pole @ along)
    across /= np.linalg.norm(across)
    reach = (bones[0] ** 2 - bones[1] ** 2 + distance**2) / (2 * distance)
    bulge = math.sqrt(max(bones[0] ** 2 - reach**2, 0.0))
    return start + reach * along + bulge * across, start + distance * along


def _keypoints(spec: _Spec) -> list[list[float]]:
    places, turns = _posed(spec)
    upright = _turned(1, float(spec.get("yaw", 0.0)))
    frames = {
        "chest": (places["spine3"], turns["spine3"]),
        "head": (places["head"], turns["head"]),
    }
    points = {"neck": (places["left_shoulder"] + places["right_shoulder"]) / 2}
    for side, sign in (("left", 1), ("right", -1)):
        short, flip = side[0], np.array([sign, 1, 1])
        limbs = (("hand", "shoulder", "elbow", "wrist"), ("foot", "hip", "knee", "ankle"))
        for end, root, middle, tip in limbs:
            start = places[f"{side}_{root}"]
            frame = turns["spine3"] if end == "hand" else upright
            target = spec.get(f"{short}_{end}", spec.get(end, _REST[end]))
            pole = spec.get(f"{short}_{middle}", spec.get(middle, _REST[middle]))
            origin, turn = start, frame
            if isinstance(target[0], str):
                origin, turn = frames.get(target[0], (places[f"{side}_hip"], turns["pelvis"]))
                target = target[1:]
            goal = origin + turn @ (flip * target)
            points[f"{short}_{root}"] = start
            points[f"{short}_{middle}"], points[f"{short}_{tip}"] = _bent(
                start, goal, _BONES[end], frame @ (flip * pole)
            )
    hidden = set(spec.get("hidden", ()))
    turn = turns["head"]
    for name, (place, side, least) in _FACE.items():
        points[name] = places["head"] + turn @ np.array(place)
        if turn[2, 0] * side[0] + turn[2, 2] * side[1] <= least:
            hidden.add(name)
    xyz = np.stack([points[name] for name in BODY_KEYPOINTS])
    ground = xyz[:, 1].min() - _SOLE - float(spec.get("lift", 0.0))
    middle = (places["left_hip"] + places["right_hip"])[0] / 2
    size = _stature()
    return [
        [round((x - middle) / size, 4), round((ground - y) / size, 4), 1.0] if name not in hidden else [0.0, 0.0, 0.0]
        for name, (x, y, _) in zip(BODY_KEYPOINTS, xyz.tolist(), strict=True)
    ]


def _stature() -> float:
    """Metres from sole to crown of the body at rest."""
    places, _ = _posed({})
    return float(places["head"][1] + _CROWN - (places["left_hip"][1] + _REST["foot"][1]) + _SOLE)


def contact_sheet(columns: int = 8, cell: tuple[int, int] = (192, 288)) -> np.ndarray:
    """All poses with their names on one picture: uint8 [H, W, 3]; cell: (width, height) of one in pixels."""
    from PIL import Image, ImageDraw, ImageFont

    from truepose_core.pose.skeleton import draw_pose

    width, height = cell
    caption = 24
    rows = -(-len(_TABLE) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + caption)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, name in enumerate(_TABLE):
        row, column = divmod(number, columns)
        left, top = column * width, row * (height + caption)
        # Drawn at twice the size: limbs as thick as in a picture of 512 pixels would hide each other here.
        picture = draw_pose(gallery_pose(name, 2 * width, 2 * height), 2 * height, 2 * width)[0]
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize(cell, Image.Resampling.LANCZOS), (left, top))
        draw.text((left + width / 2, top + height + caption / 2), name, "white", font, anchor="mm")
    return np.asarray(sheet)


def write_gallery(file: str | os.PathLike[str] = FILE) -> None:
    """Make the file of poses anew from the table."""
    poses = build()
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(points)}" for name, points in poses.items())
    target = Path(file)
    partial = target.with_name(target.name + ".part")
    partial.write_text("{\n" + rows + "\n}\n", encoding="utf-8")
    os.replace(partial, target)


def main(arguments: list[str]) -> int:
    """Write the poses, and the sheet to the file given."""
    from PIL import Image

    if len(arguments) != 1:
        print("usage: python -m truepose_core.mannequin.gallery SHEET.png", file=sys.stderr)
        return 2
    write_gallery()
    sheet = Path(arguments[0])
    partial = sheet.with_name(sheet.name + ".part")
    Image.fromarray(contact_sheet()).save(partial, "PNG", optimize=True)
    os.replace(partial, sheet)
    print(f"{len(_TABLE)} poses: {FILE} and {sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
