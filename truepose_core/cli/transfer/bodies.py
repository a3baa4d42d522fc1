"""3D bodies for the commands: from body files, or lifted from keypoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from truepose_core.cli.console import Console
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from truepose_core.body.person import PosedBody
    from truepose_core.body.smpl import SmplModel
    from truepose_core.cli.transfer.inputs import Target


def add_body_arguments(parser: argparse._ActionsContainer, what: str) -> None:
    """--body and --smpl. what: what a body is for."""
    parser.add_argument(
        "--body",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help=f"{what}: .npz or .json of this package, 4D-Humans, SMPLer-X, SAM 3D Body or AMASS; beside --pose or "
        "instead of it",
    )
    parser.add_argument(
        "--smpl",
        metavar="FILE.npz",
        help="your own SMPL model, which bodies are drawn with (default: the generic body)",
    )


def load_smpl(args: argparse.Namespace) -> SmplModel | None:
    """The model of --smpl. Raises TruePoseError as `SmplModel.load`."""
    if args.smpl is None:
        return None
    from truepose_core.body.smpl import SmplModel

    return SmplModel.load(args.smpl)


def read_posed(
    path: str, size: tuple[int, int], person: int | None, smpl: SmplModel | None, console: Console
) -> PosedBody:
    """The body of a file. size: (width, height) of the picture that it is on, where the file does not say it."""
    from truepose_core.body.person import PosedBody
    from truepose_core.body.reading import read_body

    pose, canvas = read_body(path, size, person)
    if canvas is None:
        console.note(
            f"body file {path} does not say its picture's size; it is taken to be on {size[0]}x{size[1]} pixels"
        )
    return PosedBody(pose, canvas or size, smpl)


def posed_targets(
    targets: Sequence[Target], size: tuple[int, int], source: Tensor | None, aspect: float, smpl: SmplModel | None
) -> list[PosedBody]:
    """The body of every pose on a picture of `size` (width, height): of its file, or lifted from its keypoints.

    source: keypoints [1, 18, 3] of the source person, whose shape lifted bodies get where enough of them are known.
    aspect: width / height of its picture. Raises TruePoseError, naming the pose, for too few keypoints.
    """
    from truepose_core.body.lift import FEWEST
    from truepose_core.body.person import lift_person
    from truepose_core.cli.transfer.person import told_where

    like = None
    if source is not None and int((source[..., 2] > 0).sum()) >= FEWEST:
        like = lift_person(source, (round(1000 * aspect), 1000), smpl=smpl).body
    found = []
    for target in targets:
        found.append(
            target.posed
            if target.posed is not None
            else told_where(
                f"pose {target.pose}",
                lambda target=target: lift_person(target.body[None], size, like=like, smpl=smpl).body,
            )
        )
    return found


def check_body_options(args: argparse.Namespace) -> None:
    """Raise TruePoseError for options that work on keypoints, where bodies come from files."""
    for option, given in (("--retarget", args.retarget), ("--paste-back", args.paste_back)):
        if args.body and given is not None:
            raise TruePoseError(f"{option} moves keypoints, and --body is a body of its own; leave one out")
    if args.smpl is not None and not Path(args.smpl).is_file():
        raise TruePoseError(f"--smpl {args.smpl} does not exist or is not a file; check the path")
