"""Keypoints beside published pictures, in the spellings of the published systems.

CFLD (and the older systems whose files it uses): a csv `name:keypoints_y:keypoints_x` with two JSON lists of 18 numbers
in pixels of a picture of 256x176 (height x width), -1 where a joint is missing. PIDM: a .txt per picture with 18 lines
`x y` in pixels of 256x256, of which 40 columns on either side are white. PCDMs: the same with numbers of 0 to 1. Ours:
OpenPose JSON. The joints are OpenPose's 18 in all of them.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json
from truepose_core.pose import Person, Pose, read_pose

HEIGHT, WIDTH = 256, 176
"""The picture that CFLD's csv has its pixels in."""
WHITE = 40
"""White columns on either side of PIDM's pictures of 256x256."""
_COLUMNS = ("name", "keypoints_y", "keypoints_x")


def read_annotations(path: str | Path) -> dict[str, Person]:
    """Every person of a CFLD csv, by the name of the picture. A name that stands twice must say the same twice.

    Raises TruePoseError, naming the line, for a file that is missing or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise TruePoseError(f"the annotations {path} do not exist; check the path")
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    people: dict[str, Person] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter=":")
            header = tuple(name.strip() for name in next(rows, []))
            if header != _COLUMNS:
                raise TruePoseError(f"{path} has the columns {list(header)}; expected {':'.join(_COLUMNS)}")
            for row in rows:
                if not row:
                    continue
                where = f"{path}, line {rows.line_num}"
                if len(row) != len(_COLUMNS):
                    raise TruePoseError(f"{where}: {len(row)} columns; expected {':'.join(_COLUMNS)}")
                name = row[0].strip()
                y, x = (_numbers(text, where) for text in row[1:])
                person = _person(np.stack([x, y], 1), WIDTH, HEIGHT)
                if name in people and not np.array_equal(people[name].body, person.body):
                    raise TruePoseError(f"{where}: {name} stands twice, with different keypoints; keep one of them")
                people[name] = person
    except UnicodeDecodeError as error:
        raise TruePoseError(f"{path} is not text in UTF-8; expected {':'.join(_COLUMNS)}") from error
    except (csv.Error, OSError) as error:
        raise TruePoseError(f"{path} cannot be read: {error}") from error
    if not people:
        raise TruePoseError(f"{path} annotates no picture")
    return people


def read_pose_text(path: str | Path) -> Person:
    """The person of a PIDM or PCDMs .txt file: 18 lines `x y`. Which of them it is, is told by its numbers: PCDMs' are
    of 0 to 1. Raises TruePoseError for a file of another shape."""
    path = Path(path)
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        points = np.array([[float(word) for word in line] for line in lines if line], dtype=np.float64)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise TruePoseError(f"the keypoints {path} cannot be read ({error}); expected 18 lines 'x y'") from error
    if points.shape != (18, 2) or not np.isfinite(points).all():
        raise TruePoseError(f"{path} holds {points.shape} numbers; expected 18 lines 'x y'")
    missing = (points < 0).any(1)
    if (points[~missing] <= 1).all() and not missing.all():
        return _person(np.where(missing[:, None], -1, points), 1, 1)
    shifted = points - np.array([WHITE, 0])
    return _person(np.where(missing[:, None], -1, shifted), WIDTH, HEIGHT, inside=False)


def read_any_pose(path: str | Path, size: tuple[int, int]) -> Person:
    """The person of a pose file beside a picture of size (height, width): OpenPose JSON, else .txt as above."""
    if Path(path).suffix.lower() == ".txt":
        return read_pose_text(path)
    return read_pose(str(path), canvas=size[::-1])[0].person()


def pose_of(person: Person, size: tuple[int, int]) -> Pose:
    """The person on a canvas of (height, width)."""
    return Pose(size[1], size[0], (person,))


def _numbers(text: str, where: str) -> np.ndarray:
    values = parse_json(text, where)
    if (
        not isinstance(values, list)
        or len(values) != 18
        or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values)
    ):
        raise TruePoseError(f"{where}: {text[:60]!r}; expected a list of 18 numbers")
    return np.array(values, dtype=np.float64)


def _person(points: np.ndarray, width: int, height: int, inside: bool = True) -> Person:
    """points [18, 2] (x, y) in pixels, negative where missing. inside: a joint left of or above the picture is missing
    too (its coordinate could only be the mark -1)."""
    there = (points >= 0).all(1) if inside else (points != -1).any(1)
    scaled = points / np.array([width, height])
    return Person(np.concatenate([scaled, there[:, None]], 1) * there[:, None])


def visible(person: Person, joints: Sequence[int]) -> bool:
    """Whether all of these joints are there."""
    return bool((person.body[list(joints), 2] > 0).all())
