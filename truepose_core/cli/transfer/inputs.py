"""The poses to show: from pose files, the gallery or pictures, on the source person's proportions if asked for; or from
pose maps alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from truepose_core.cli.console import Console, check_file, check_folder
from truepose_core.cli.transfer.bodies import read_posed
from truepose_core.cli.transfer.maps import PoseMaps, load_map
from truepose_core.cli.transfer.person import PICTURES, Networks, PersonPhoto, choose_person, load_photo, told_where
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.body.person import PosedBody
    from truepose_core.body.smpl import SmplModel
    from truepose_core.pose import Pose

GALLERY = "gallery:"
"""How a --pose begins that names a ready pose."""


@dataclass(frozen=True)
class Target:
    """One pose to show. pose, frame, person: what --pose or --body says, and which of it. body: [18, 3] keypoints,
    normalised to the picture that is made. All are None where the maps, name -> file, say everything. name: the stem of
    its pictures. posed: the body on the picture that is made, where --body gives it."""

    pose: str | None
    frame: int | None
    person: int | None
    body: Tensor | None
    out: Path
    maps: dict[str, Path]
    name: str
    posed: PosedBody | None = None


def fit_body(body: Tensor, canvas: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Keypoints [18, 3] normalised to a canvas (width, height) -> normalised to a picture of `size`.

    The canvas is scaled by one factor until it fits, and centred; missing keypoints stay as they are.
    """
    if canvas == size:
        return body
    scale = min(size[0] / canvas[0], size[1] / canvas[1])
    share = body.new_tensor([canvas[0] * scale / size[0], canvas[1] * scale / size[1]])
    fitted = body.clone()
    fitted[:, :2] = (body[:, :2] - 0.5) * share + 0.5
    return fitted.where(body[:, 2:] > 0, body)


def read_targets(
    args: argparse.Namespace,
    size: tuple[int, int],
    source: PersonPhoto,
    maps: PoseMaps,
    networks: Networks,
    console: Console,
    smpl: SmplModel | None = None,
) -> list[Target]:
    """All poses on the canvas of `size` (width, height), with their maps and the paths of their pictures, which are
    checked. source: the person as on that canvas, or as in the whole photo. smpl: what bodies are drawn with. Raises
    TruePoseError."""
    from truepose_core.pose import body_tensor

    found: list[tuple[str | None, int | None, int | None, Tensor | None, PosedBody | None]] = []
    names: list[str] = []
    if not args.pose and not args.body:
        names = list(maps.poses)
        found = [(None, None, None, None, None)] * len(names)
    for text in args.pose:
        poses, what, stem = read_poses(text, size, args.estimate_pose, networks, console)
        wheres = [what + (f", frame {frame}" if len(poses) > 1 else "") for frame in range(len(poses))]
        people = [
            choose_person(pose, args.person, where, console, "--person")
            for pose, where in zip(poses, wheres, strict=True)
        ]
        bodies = [
            fit_body(body_tensor([pose.people[i]])[0], (pose.width, pose.height), size)
            for pose, i in zip(poses, people, strict=True)
        ]
        for body, where in zip(bodies, wheres, strict=True):
            _check_inside(body, where, size, console, "Does the file lack canvas_width and canvas_height?")
        if args.retarget is not None:
            bodies = retargeted(bodies, source, size, args.retarget, args.paste_back is not None, what)
            for body, where in zip(bodies, wheres, strict=True):
                _check_inside(
                    body, f"{where}, retargeted,", size, console, "Give another pose, or leave out --retarget"
                )
        found += [(text, *each, None) for each in zip(range(len(poses)), people, bodies, strict=True)]
        names += [stem + (f"-{frame}" if len(poses) > 1 else "") for frame in range(len(poses))]
    for text in args.body:
        posed = read_posed(text, size, args.person, smpl, console).fitted(size)
        body = posed.keypoints()[0]
        _check_inside(body, f"body file {text}", size, console, "Is its camera of another picture?")
        found.append((text, None, args.person, body, posed))
        names.append(Path(text).stem)
    paths = output_paths("--out", args.out, names, args.overwrite)
    files = [maps.of(name, len(names)) for name in names]
    for each in files:
        for name, path in each.items():
            load_map(path, name, size[::-1])
    return [
        Target(*each, path, own, name, posed)
        for (*each, posed), path, own, name in zip(found, paths, files, names, strict=True)
    ]


def output_paths(option: str, out: str, names: list[str], overwrite: bool) -> list[Path]:
    """Where the pictures of the poses called so go: one picture, or a folder for several. Raises TruePoseError for the
    wrong one of these, or where it cannot be written."""
    from truepose_core.pictures.files import IMAGE_SUFFIXES

    path = Path(out)
    if len(names) == 1:
        if path.is_dir():
            raise TruePoseError(
                f"{option} {path} is a folder, and there is one pose in all; give the picture's path, such as "
                f"{path / (names[0] + '.png')}"
            )
        return [check_file(path, overwrite, IMAGE_SUFFIXES)]
    if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir():
        raise TruePoseError(f"{option} {path} is one picture's name, and there are {len(names)} poses; give a folder")
    return check_folder(path, unique_names(names), overwrite)


def read_poses(
    text: str, size: tuple[int, int], estimate: bool, networks: Networks, console: Console
) -> tuple[list[Pose], str, str]:
    """(the frames of one --pose, what to call it in messages, the stem of its pictures' names)."""
    from truepose_core.pose import read_pose

    if text.startswith(GALLERY):
        from truepose_core.pose.gallery import NAMES, gallery_pose

        name = text.removeprefix(GALLERY)
        found = next((n for n in NAMES if n.replace(" ", "-") == name.strip().lower().replace(" ", "-")), None)
        if found is None:
            listed = ", ".join(GALLERY + n.replace(" ", "-") for n in NAMES)
            raise TruePoseError(f"--pose {text}: there is no such pose in the gallery; expected one of {listed}")
        return [gallery_pose(found, *size)], f"pose {text}", found.replace(" ", "-")
    path = Path(text)
    if path.suffix.lower() in PICTURES:
        if not estimate:
            raise TruePoseError(f"--pose {text} is a picture; add --estimate-pose, or give its keypoints as JSON")
        return [networks.pose(load_photo(text, console)[0], f"picture {text}")], f"picture {text}", path.stem
    return read_pose(text, canvas=size), f"pose file {text}", path.stem


def retargeted(
    bodies: list[Tensor], source: PersonPhoto, size: tuple[int, int], anchor: str, in_photo: bool, where: str
) -> list[Tensor]:
    """Bodies [18, 3] on a canvas of `size` (width, height), of one person, on the source person's proportions.

    in_photo: the canvas is the photo of the source, in which the person also keeps their size and place: the anchor of
    the first body comes to where the source's is. Raises TruePoseError where nothing can be measured.
    """
    import torch

    from truepose_core.pose.retarget import retarget

    height, width = source.size
    fresh = told_where(
        f"{where} on the proportions of {source.path}",
        lambda: retarget(
            torch.stack(bodies),
            source.body,
            aspect=size[0] / size[1],
            source_aspect=width / height,
            anchor=anchor,
            size="source" if in_photo else "target",
            one_person=True,
        ),
    )
    if in_photo:
        way = torch.zeros(3)
        way[:2] = anchor_way(fresh[0], source.body[0], anchor)
        fresh = torch.where(fresh[..., 2:] > 0, fresh + way, fresh)
    return list(fresh)


def anchor_way(body: Tensor, source: Tensor, anchor: str) -> Tensor:
    """The way [2] from the anchor of a body [18, 3] to the source's: the lower ankle, the middle of the hips, or the
    neck; the first that both show."""
    from truepose_core.pose.keypoints import ANKLES, HIPS, NECK

    anchors = {"feet": ANKLES, "hips": HIPS, "neck": (NECK,)}
    for name in list(anchors)[list(anchors).index(anchor) :]:
        places = []
        for points in (body, source):
            joints = points[list(anchors[name])]
            seen = joints[joints[:, 2] > 0, :2]
            if len(seen):
                places.append(seen[seen[:, 1].argmax()] if name == "feet" else seen.mean(0))
        if len(places) == 2:
            return places[1] - places[0]
    raise TruePoseError(
        "the pose and the person of SOURCE have neither ankles, hips nor neck in common, so nobody knows where to put "
        "the person; leave out --paste-back, or give more keypoints"
    )


def unique_names(stems: list[str]) -> list[str]:
    """File names for the pictures: <stem>.png, and <stem>-2.png ... for stems that come again."""
    taken: set[str] = set()
    names = []
    for stem in stems:
        name, copy = stem, 1
        # Some file systems do not tell upper from lower case.
        while name.lower() in taken:
            copy += 1
            name = f"{stem}-{copy}"
        taken.add(name.lower())
        names.append(f"{name}.png")
    return names


def _check_inside(body: Tensor, where: str, size: tuple[int, int], console: Console, hint: str) -> None:
    visible = body[body[:, 2] > 0, :2]
    inside = int(((visible >= 0) & (visible <= 1)).all(1).sum())
    picture = f"the {size[0]}x{size[1]} picture"
    if not inside:
        raise TruePoseError(f"all {len(visible)} keypoints of {where} lie outside {picture}. {hint}")
    if inside < len(visible) / 2:
        console.note(f"{len(visible) - inside} of {len(visible)} keypoints of {where} lie outside {picture}. {hint}")
