"""People in photographs for the commands: their keypoints, parsing and crop, from files or from networks.

Everything here happens before a model is opened, so that a picture that does not do is refused early.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from truepose_core.cli.console import MAX_SIDE, Console
from truepose_core.cli.models import models_folder
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.cli.opening import ModelChoice
    from truepose_core.framing.crop import Box, Crop
    from truepose_core.parsing import HumanParsing
    from truepose_core.parsing.onnx import MergedParser, PhotoParser
    from truepose_core.pose import Person, Pose
    from truepose_core.pose.estimation import PoseEstimator
    from truepose_core.regions import Region

T = TypeVar("T")

KEYPOINTS = "keypoints"
"""The parser that needs no network."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
AUTO = "auto"
MARGIN = 0.1
"""What a crop leaves free around a person on each side, in the longer side."""
SHOWN_HEIGHT = 256
"""Crops for a mannequin model, whose own pictures are tiny, are about this high, in pixels."""


# ---------------------------------------------------------------------------------------------------- one person


@dataclass(frozen=True, eq=False)
class PersonPhoto:
    """A picture of a person. image: [1, 3, H, W] in [0, 1]. parsing: of the same size. person: normalised keypoints.
    Both are None where they are not known. parsing_from, pose_from: where these come from, for people. size_in_file:
    (width, height) of the file."""

    path: str
    image: Tensor
    parsing: HumanParsing | None
    person: Person | None
    parsing_from: str | None
    pose_from: str | None
    size_in_file: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[2], self.image.shape[3]

    @property
    def body(self) -> Tensor | None:
        """[1, 18, 3], or None without keypoints."""
        from truepose_core.pose import body_tensor

        return None if self.person is None else body_tensor([self.person])

    @property
    def box(self) -> Box:
        """(left, top, right, bottom) around the person, in pixels."""
        from truepose_core.framing.crop import person_box

        return told_where(f"picture {self.path}", lambda: person_box(self.size, self.parsing, self.person))

    def cropped(self, crop: Crop) -> PersonPhoto:
        """The crop; outside of the photo it shows the crop's own mean colour."""
        from truepose_core.source.person import SourcePerson

        shown = SourcePerson(self.image, self.parsing).cropped(crop)
        person = None if self.person is None else crop.apply_person(self.person)
        return replace(self, image=shown.image, parsing=shown.parsing, person=person)


class Networks:
    """The networks that the options name, opened when they are first needed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        # Who asks for the CPU means all networks.
        self.provider = "CPU" if args.device == "cpu" else AUTO

    @cached_property
    def parser(self) -> PhotoParser | MergedParser:
        """The network of --parser. Raises TruePoseError as `choose_parser`."""
        from truepose_core.parsing.onnx import choose_parser

        try:
            return choose_parser(self.args.parser, [models_folder(self.args)], provider=self.provider)
        except TruePoseError as error:
            raise TruePoseError(f"--parser {self.args.parser}: {error}. --parser keypoints needs no model") from error

    @cached_property
    def estimator(self) -> PoseEstimator:
        """DWPose and its detector. Raises TruePoseError that says which file to put where."""
        from truepose_core.pose.estimation import choose_estimator

        try:
            return choose_estimator([models_folder(self.args)], provider=self.provider)
        except TruePoseError as error:
            raise TruePoseError(f"--estimate-pose: {error}") from error

    def pose(self, image: Tensor, where: str) -> Pose:
        """The people of a picture [1, 3, H, W], the largest first."""
        from truepose_core.pose.estimation import estimate_pose

        estimator = self.estimator
        return told_where(where, lambda: estimate_pose(image, estimator)[0])

    def close(self) -> None:
        """Free the networks' memory."""
        from truepose_core.networks.onnx import close_sessions

        close_sessions()


def told_where(where: str, work: Callable[[], T]) -> T:
    """work(), whose errors begin with what it was about."""
    try:
        return work()
    except TruePoseError as error:
        raise TruePoseError(f"{where}: {error}") from error


def read_person(
    path: str,
    networks: Networks,
    console: Console,
    *,
    parsing: str | None,
    pose: str | None,
    index: int | None = None,
    option: str | None = None,
) -> PersonPhoto:
    """The person of a picture. parsing, pose: their files, or None for what --parser and --estimate-pose give, if
    anything. index: which person, the largest by default. option: the one that chooses another.

    Raises TruePoseError when the picture shows nobody, or files are of another picture.
    """
    image, in_file = load_photo(path, console)
    size = (image.shape[3], image.shape[2])
    person, pose_from = None, pose
    if pose is not None:
        person = read_source_person(pose, index, in_file, console, option)
    elif networks.args.estimate_pose:
        found = networks.pose(image, f"picture {path}")
        person = found.people[choose_person(found, index, f"picture {path}", console, option)]
        pose_from = f"estimated by {networks.estimator.description}"
        if len(found.people) > 1 and networks.args.parser not in (None, KEYPOINTS):
            console.note(f"the parser shows all {len(found.people)} people of {path}; add --frame to crop to one")
    if person is not None:
        _tell_missing(person, path, console)
    if parsing is not None:
        masks, parsing_from = read_parsing(parsing, networks.args.parsing_labels, path, in_file, size, console), parsing
    elif networks.args.parser is None:
        masks = parsing_from = None
    else:
        masks, parsing_from = make_parsing(image, person, path, networks)
    return PersonPhoto(path, image, masks, person, parsing_from, pose_from, in_file)


def load_photo(path: str, console: Console) -> tuple[Tensor, tuple[int, int]]:
    """(image [1, 3, H, W], (width, height) in the file); a photo of more than `MAX_SIDE` is made smaller."""
    from truepose_core.pictures.files import image_size, load_image

    in_file = image_size(path)
    image = load_image(path, largest_side=MAX_SIDE)
    height, width = image.shape[2:]
    if (width, height) != in_file:
        console.note(
            f"{path} is {in_file[0]}x{in_file[1]} pixels; it is read at {width}x{height}, the largest worked on"
        )
    return image, in_file


def make_parsing(image: Tensor, person: Person | None, path: str, networks: Networks) -> tuple[HumanParsing, str]:
    """(the parsing that --parser makes, how it was made)."""
    from truepose_core.parsing.from_keypoints import parse_from_keypoints
    from truepose_core.parsing.onnx import parse_image
    from truepose_core.pose import body_tensor

    if networks.args.parser == KEYPOINTS:
        if person is None:
            raise TruePoseError(
                f"--parser keypoints needs the keypoints of {path}; give --from-pose for each --from picture, or "
                "--estimate-pose"
            )
        parsing = told_where(f"picture {path}", lambda: parse_from_keypoints(image, body_tensor([person])))
        told = "from keypoints"
    else:
        network = networks.parser
        parsing = told_where(f"picture {path}", lambda: parse_image(image, network))
        told = f"by {network.description}"
    if parsing.is_empty:
        raise TruePoseError(
            f"nobody was found in picture {path}: its parsing {told} is background everywhere. Give a picture of a "
            "person, or another --parser"
        )
    return parsing, told


def read_parsing(
    path: str, labels: str, source: str, in_file: tuple[int, int], size: tuple[int, int], console: Console
) -> HumanParsing:
    """The parsing of a picture that is in_file, (width, height), in its file, at `size` (width, height). Raises
    TruePoseError when it is another picture's."""
    from truepose_core.framing.frame import check_shape
    from truepose_core.parsing import HumanParsing
    from truepose_core.pictures.files import image_size

    own_w, own_h = image_size(path)
    check_shape(f"label map {path}", (own_h, own_w), source, in_file[::-1])
    parsing = HumanParsing.from_label_image(path, labels, size=size[::-1])
    if parsing.is_empty:
        raise TruePoseError(f"label map {path} shows nobody: every pixel is background. Check it, or --parsing-labels")
    if (own_w, own_h) not in (size, in_file):
        console.note(f"label map {path} is {own_w}x{own_h} pixels; it is scaled to the source's {size[0]}x{size[1]}")
    return parsing


def read_source_person(
    path: str, index: int | None, size: tuple[int, int], console: Console, option: str | None
) -> Person:
    """The person of a pose file of a picture of `size` (width, height). Raises TruePoseError when the canvas has
    another shape than the picture."""
    from truepose_core.framing.frame import check_shape
    from truepose_core.pose import read_pose

    pose = read_pose(path, canvas=size)[0]
    check_shape(f"pose file {path}", (pose.height, pose.width), "the source", size[::-1])
    return pose.people[choose_person(pose, index, f"pose file {path}", console, option)]


def choose_person(pose: Pose, index: int | None, where: str, console: Console, option: str | None) -> int:
    """The person asked for, or the largest, which is said when there are others, with the option that chooses."""

    def find() -> int:
        if index is None:
            return pose.largest()
        pose.person(index)
        return index

    chosen = told_where(where, find)
    if index is None and len(pose.people) > 1:
        choice = f". Choose with {option} N, 0 to {len(pose.people) - 1}" if option is not None else ""
        console.note(f"{where} has {len(pose.people)} people; taking person {chosen}, the largest{choice}")
    return chosen


def _tell_missing(person: Person, path: str, console: Console) -> None:
    from truepose_core.pose.keypoints import BODY_KEYPOINTS

    joints = [i for i, name in enumerate(BODY_KEYPOINTS) if name.endswith(("elbow", "wrist", "knee", "ankle"))]
    missing = [BODY_KEYPOINTS[i] for i in joints if person.body[i, 2] == 0]
    if missing:
        console.note(f"the pose of {path} lacks {', '.join(missing)}; what hangs on them is not taken from the picture")


# ---------------------------------------------------------------------------------------------------- framing


def frame_sizes(frame: str | tuple[int, int], model: ModelChoice) -> tuple[tuple[int, int], ...]:
    """The (height, width) that --frame chooses from. auto: what suits the model. Raises TruePoseError when it does not
    say."""
    return model_sizes(model) if frame == AUTO else (frame[::-1],)


def model_sizes(model: str | ModelChoice) -> tuple[tuple[int, int], ...]:
    """The (height, width) of pictures that suit a model, or what --model names. Raises TruePoseError when its files do
    not say."""
    import json

    from truepose_core.cli.opening import find_model
    from truepose_core.framing.crop import BUCKETS
    from truepose_core.models.cfld.encoder import PICTURE

    model = find_model([model]) if isinstance(model, str) else model
    config = model.config
    if model.is_folder:
        from truepose_core.models.folder import family_of

        file = Path(model.name) / "unet" / "config.json"
        try:
            unet = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TruePoseError(
                f"{file.parent} has no config.json that can be read; expected a folder in diffusers format"
            ) from error
        return BUCKETS["SDXL" if family_of(unet) == "sdxl" else "SD1.5"]
    if model.is_cfld:
        return ((config.size, config.size * PICTURE[1] // PICTURE[0]),)
    height, width = config.size
    scale = max(1, round(SHOWN_HEIGHT / height)) if config.codec == "pixels" else 1
    return ((height * scale, width * scale),)


def find_crop(photo: PersonPhoto, sizes: Sequence[tuple[int, int]], others: Sequence[Tensor] = ()) -> Crop:
    """The crop around a person, at the best of these (height, width). others: bodies [18, 3] that it shows too."""
    from truepose_core.framing.crop import best_bucket, crop_person, grow, person_box
    from truepose_core.pose import Person

    boxes = [photo.box, *(person_box(photo.size, None, Person(body.numpy())) for body in others)]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    box: Box = (min(lefts), min(tops), max(rights), max(bottoms))
    return crop_person(photo.size, box, best_bucket([grow(box, MARGIN)], sizes), margin=MARGIN)


def tell_cut(photo: PersonPhoto, console: Console) -> list[str]:
    """The edges that the person reaches, as far as is known, which are said."""
    from truepose_core.framing.crop import cut_sides

    if photo.parsing is None and photo.person is None:
        return []
    sides = cut_sides(photo.box, photo.size)
    if sides:
        console.note(
            f"the person of {photo.path} reaches the {' and '.join(sides)} edge of the picture; what lies beyond is "
            "made up where a pose shows it"
        )
    return sides


# ---------------------------------------------------------------------------------------------------- donors


@dataclass(frozen=True)
class Donor:
    """What one --from asks for: regions, the picture, and the files of its parsing and pose, if given."""

    regions: tuple[Region, ...]
    picture: str
    parsing: str | None
    pose: str | None

    @property
    def shares(self) -> list[float]:
        """1 for the regions taken, 0 for the others."""
        from truepose_core.regions import Region

        return [float(region in self.regions) for region in Region]

    @property
    def names(self) -> list[str]:
        """The regions' names."""
        return [region.name.lower() for region in self.regions]


def read_donors(args: argparse.Namespace) -> list[Donor]:
    """The --from options. Raises TruePoseError for one that cannot be read, a region that comes from two pictures, and
    parsings or poses that are not one for each."""
    from truepose_core.regions import to_region

    taken: dict[Region, str] = {}
    found = []
    for text in args.donors:
        names, equals, picture = text.partition("=")
        if not equals or not picture:
            raise TruePoseError(f"--from {text!r} is not REGION[,REGION]=PICTURE; write for example upper=b.png")
        regions = tuple(told_where(f"--from {text!r}", lambda names=names: [to_region(x) for x in names.split(",")]))
        for region in regions:
            if region in taken:
                raise TruePoseError(
                    f"{region.name.lower()} is taken from both {taken[region]} and {picture}; name each region once"
                )
            taken[region] = picture
        found.append((regions, picture))
    for option, files in (("--from-parsing", args.from_parsing), ("--from-pose", args.from_pose)):
        if files and len(files) != len(found):
            raise TruePoseError(
                f"{option} names {len(files)} files for {len(found)} --from pictures; give one for each, in their order"
            )
    parsings, poses = (files or [None] * len(found) for files in (args.from_parsing, args.from_pose))
    if found and args.parser is None and not args.from_parsing:
        raise TruePoseError(
            "the --from pictures need their human parsing too: give --from-parsing MAP.png for each, or --parser NAME "
            "for all pictures in place of --parsing"
        )
    return [Donor(*each, *files) for each, files in zip(found, zip(parsings, poses, strict=True), strict=True)]


def read_donor(donor: Donor, source: PersonPhoto, networks: Networks, console: Console) -> PersonPhoto:
    """The person of a --from picture. Raises TruePoseError when they do not show what is taken."""
    from truepose_core.regions import REGION_NAMES, Region

    photo = read_person(
        donor.picture,
        networks,
        console,
        parsing=donor.parsing,
        pose=donor.pose,
    )
    shown = [region for region in Region if bool((photo.parsing.masks[:, region] > 0.5).any())]
    lacking = [region.name.lower() for region in donor.regions if region not in shown]
    if lacking:
        raise TruePoseError(
            f"{donor.picture} shows none of {', '.join(lacking)}, only {', '.join(REGION_NAMES[r] for r in shown)}; "
            "take what it shows, or check its parsing"
        )
    if source.person is not None and photo.person is None:
        console.note(
            f"without keypoints of {donor.picture} patterns do not find their place on the body; give --from-pose or "
            "--estimate-pose"
        )
    return photo


def fitted(photo: PersonPhoto, size: tuple[int, int], framed: bool) -> PersonPhoto:
    """A donor at the (height, width) that the source is read at: cropped around the person where the source is too,
    otherwise padded."""
    from truepose_core.framing.crop import Crop
    from truepose_core.framing.frame import fit

    if framed:
        return photo.cropped(find_crop(photo, [size]))
    return photo.cropped(Crop(photo.size, (0, 0), fit(photo.size, size)))
