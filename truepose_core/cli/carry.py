"""`truepose carry`: the pixels of a person on another pose, without an image model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import (
    Console,
    add_report_arguments,
    choose_device,
    make_folder,
    picture_size,
    write_outputs,
)
from truepose_core.cli.transfer.bodies import add_body_arguments, check_body_options, load_smpl, read_posed
from truepose_core.cli.transfer.command import output_size
from truepose_core.cli.transfer.inputs import Target, output_paths, read_targets
from truepose_core.cli.transfer.maps import PoseMaps
from truepose_core.cli.transfer.options import add_person_arguments, add_pose_arguments, check_options, frame_size
from truepose_core.cli.transfer.person import (
    AUTO,
    Networks,
    PersonPhoto,
    find_crop,
    read_person,
    tell_cut,
    told_where,
)
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from truepose_core.body.person import CarriedPerson, PosedBody
    from truepose_core.body.smpl import SmplModel

HELP = "carry the pixels of a person to other poses along the body's surface, without an image model"
DESCRIPTION = """\
Show what the picture SOURCE knows of a person in one or more poses, and where it knows nothing. Each pixel of the new
pose is looked up at the same place of the person's body in SOURCE. No image model is needed: an inpainting model can
go on from there.

Needed beside the picture: its human parsing (a file, or --parser), the person's keypoints (--source-pose, or
--estimate-pose) or body (--source-body), and the poses to show (--pose or --body).
"""
EPILOG = """\
output:
  one pose in all          --out and the other outputs are pictures
  two or more poses        they are folders; each picture is named after its pose file (wave.json -> wave.png)
  --out is black where SOURCE shows nothing; --seen is white where it does. --parsing-out can be read by --parsing

bodies:
  keypoints are lifted to 3D bodies by a small network and a short fit. Files of tools that estimate bodies from
  photographs are read as they are. A target has the shape of the source's body: it is one person
  --mirror front-back shows a back that the photo hides as the front: a hypothesis of its own, to lay under the result

parsing and poses are as for truepose transfer: see its --help

examples:
  truepose carry person.png --parsing map.png --source-pose person.json --pose wave.json --out carried.png
  truepose carry photo.jpg --parser keypoints --estimate-pose --frame --pose gallery:walking gallery:waving \\
      --out carried --seen seen --parsing-out parsing
  truepose carry photo.jpg --parser schp-atr --source-body photo.npz --body dancer.npz --smpl smpl.npz \\
      --out dance.png --depth depth.png --normal normal.png
"""

PICTURES = {"seen": "--seen", "depth": "--depth", "normal": "--normal", "parsing": "--parsing-out"}
"""What can be written beside the carried picture -> its option."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose carry`."""
    inputs = add_pose_arguments(parser, "truepose carry")
    add_body_arguments(inputs, "poses as 3D bodies")
    person = parser.add_argument_group("the person in SOURCE")
    add_person_arguments(person)
    person.add_argument(
        "--source-body", metavar="FILE", help="the person's 3D body, in place of keypoints; files as for --body"
    )
    person.add_argument(
        "--frame",
        nargs="?",
        const=AUTO,
        type=frame_size,
        metavar="WxH",
        help="crop SOURCE around the person to this size, or without one to the SD1.5 size that suits the person best",
    )
    how = parser.add_argument_group("how to carry")
    how.add_argument(
        "--method",
        choices=("body", "skeleton"),
        default="body",
        help="along the surface of a body, or flat along limb lines, where few keypoints are known (default: body)",
    )
    how.add_argument(
        "--mirror",
        choices=("none", "left-right", "front-back", "both"),
        default="none",
        help="take each place from its look-alike on the other side or the other face of the body (default: none)",
    )
    how.add_argument(
        "--no-girth",
        action="store_true",
        help="keep the generic body slim; else it gets as wide as the clothes and hair of SOURCE",
    )
    how.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, mps ...; auto takes an accelerator if there is one (default: auto)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="PATH", help="the carried picture, or a folder for several")
    output.add_argument("--seen", metavar="PATH", help="white where SOURCE shows that place of the body")
    output.add_argument(
        "--depth", metavar="PATH", help="depth of the body in the new pose, as depth ControlNets read it"
    )
    output.add_argument("--normal", metavar="PATH", help="its normals, as normal ControlNets read them")
    output.add_argument("--parsing-out", metavar="PATH", help="the parsing of the person in the new pose, as .png")
    output.add_argument(
        "--size", type=picture_size, metavar="WxH", help="size of the pictures in pixels (default: SOURCE's)"
    )
    output.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    add_report_arguments(output)
    # What the shared readers ask for, and this command has not got.
    parser.set_defaults(paste_back=None, canvas=None)


@dataclass(frozen=True)
class Inputs:
    """Everything that was given, read and checked. source: the person that is carried, of the photo or its crop. body:
    their keypoints [1, 18, 3] or 3D body. size: (width, height) of the results. paths: where they go, by kind."""

    source: PersonPhoto
    body: Tensor | PosedBody
    targets: list[Target]
    size: tuple[int, int]
    paths: dict[str, list[Path]]
    smpl: SmplModel | None
    told: dict[str, Any]


def prepare(args: argparse.Namespace, console: Console) -> Inputs:
    """Read and check all pictures, poses and bodies. Raises TruePoseError for the first that does not do."""
    check_options(args)
    check_body_options(args)
    if not args.pose and not args.body:
        raise TruePoseError("--pose is missing: name the poses to show, such as gallery:waving, or --body FILE")
    if args.source_pose is None and not args.estimate_pose and args.source_body is None:
        raise TruePoseError(
            "carrying needs the person's keypoints or body: give --source-pose POSE.json, --estimate-pose, or "
            "--source-body FILE"
        )
    if args.method == "skeleton":
        for option, given in (("--depth", args.depth), ("--normal", args.normal), ("--smpl", args.smpl)):
            if given is not None:
                raise TruePoseError(f"{option} needs a body, and --method skeleton has none; leave one of them out")
    networks, smpl = Networks(args), load_smpl(args)
    photo = read_person(
        args.source,
        networks,
        console,
        parsing=args.parsing,
        pose=args.source_pose,
        index=args.source_person,
        option="--source-person",
    )
    cut = tell_cut(photo, console)
    posed = None
    if args.source_body is not None:
        size = (photo.size[1], photo.size[0])
        posed = _on_photo(read_posed(args.source_body, size, args.source_person, smpl, console), args, size)
    source, crop = photo, None
    if args.frame is not None:
        crop = find_crop(photo, _sizes(args.frame))
        source = photo.cropped(crop)
        posed = None if posed is None else posed.cropped(crop.box, crop.size_model[::-1])
    made = output_size(args, source)
    targets = read_targets(args, made, source, PoseMaps(), networks, console, smpl)
    networks.close()
    told = {
        "parsing": photo.parsing_from,
        "source_pose": photo.pose_from,
        "source_body": args.source_body,
        "cut": cut,
        "frame": None if crop is None else {"box": crop.box, "size": made, "told": crop.describe()},
    }
    return Inputs(source, source.body if posed is None else posed, targets, made, _paths(args, targets), smpl, told)


def _on_photo(body: PosedBody, args: argparse.Namespace, size: tuple[int, int]) -> PosedBody:
    from truepose_core.body.person import check_canvas

    check_canvas(body, size, f"body file {args.source_body}")
    return body.fitted(size)


def _sizes(frame: str | tuple[int, int]) -> tuple[tuple[int, int], ...]:
    from truepose_core.framing.crop import BUCKETS

    return BUCKETS["SD1.5"] if frame == AUTO else (frame[::-1],)


def _paths(args: argparse.Namespace, targets: list[Target]) -> dict[str, list[Path]]:
    """Where everything goes, checked. Raises TruePoseError, also for two outputs of one path."""
    paths = {"picture": [target.out for target in targets]}
    names = [target.name for target in targets]
    for kind, option in PICTURES.items():
        given = getattr(args, option.strip("-").replace("-", "_"))
        if given is None:
            continue
        paths[kind] = output_paths(option, given, names, args.overwrite)
        if kind == "parsing" and paths[kind][0].suffix.lower() != ".png":
            raise TruePoseError(f"{option} {given}: a label map must not be smoothed; save it as .png")
    taken: dict[Path, str] = {}
    for kind, files in paths.items():
        for path in files:
            if path.resolve() in taken:
                raise TruePoseError(
                    f"{path} is named for the {taken[path.resolve()]} and the {kind}; give each its own"
                )
            taken[path.resolve()] = kind
    return paths


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and check everything, then carry, then write. Returns the report that --json prints."""
    started = time.perf_counter()
    console.doing(f"reading {args.source}")
    device = choose_device(args.device)
    given = prepare(args, console)
    ready = time.perf_counter()
    console.doing(f"carrying to {len(given.targets)} poses")
    results = carry_all(given, device, method=args.method, mirror=args.mirror, girth=not args.no_girth)
    carried = time.perf_counter()
    _write(results, given.paths, args.overwrite)
    console.say(f"{args.source}: parsing {given.told['parsing']}, pose {given.told['source_pose'] or args.source_body}")
    if given.told["frame"] is not None:
        console.say(f"crop: {given.told['frame']['told']}")
    outputs = []
    for i, (target, result) in enumerate(zip(given.targets, results, strict=True)):
        share = shown(result)
        files = {kind: str(paths[i]) for kind, paths in given.paths.items()}
        console.say(f"wrote {target.out} ({given.size[0]}x{given.size[1]}): {share:.0%} of the person is seen")
        outputs.append({"pose": target.pose, "frame": target.frame, "seen": share, **files})
    seconds = {"carry": carried - ready, "total": time.perf_counter() - started}
    console.say(f"{seconds['total']:.1f} s in all, {seconds['carry']:.1f} s of it carrying")
    report = {
        "source": args.source,
        **given.told,
        "retarget": args.retarget,
        "method": args.method,
        "mirror": args.mirror,
        "girth": not args.no_girth,
        "device": str(device),
        "size": list(given.size),
        "outputs": outputs,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    console.report(report)
    return report


def carry_all(given: Inputs, device: torch.device, **options: Any) -> list[CarriedPerson]:
    """The person in every pose, one result each: keypoints together, so that they are fitted at once."""
    import torch

    from truepose_core.body.person import carry_person

    source = given.source
    body = given.body.to(device)
    keypoints = [i for i, target in enumerate(given.targets) if target.posed is None]
    groups = [(keypoints, torch.stack([given.targets[i].body for i in keypoints]))] if keypoints else []
    groups += [([i], target.posed) for i, target in enumerate(given.targets) if target.posed is not None]
    found: dict[int, CarriedPerson] = {}
    for numbers, target in groups:
        result = told_where(
            f"pose {', '.join(given.targets[i].pose for i in numbers)}",
            lambda target=target: carry_person(
                source.image.to(device),
                source.parsing.to(device),
                body,
                target.to(device),
                given.size[::-1],
                smpl=given.smpl,
                **options,
            ),
        )
        for row, number in enumerate(numbers):
            found[number] = _one(result, row)
    return [found[i] for i in range(len(given.targets))]


def _one(result: CarriedPerson, row: int) -> CarriedPerson:
    rows = slice(row, row + 1)
    return replace(
        result,
        picture=result.picture[rows],
        seen=result.seen[rows],
        parsing=result.parsing[row],
        depth=None if result.depth is None else result.depth[rows],
        normal=None if result.normal is None else result.normal[rows],
    )


def shown(result: CarriedPerson) -> float:
    """The share of the target's person that the source shows."""
    person = 1 - result.parsing.mask("background")
    return float(result.seen.sum() / person.sum().clamp(min=1))


def _write(results: list[CarriedPerson], paths: dict[str, list[Path]], overwrite: bool) -> None:
    from truepose_core.parsing import HumanParsing
    from truepose_core.pictures.files import save_image

    def writing(result: CarriedPerson, kind: str) -> Callable[[Path], Path]:
        picture = getattr(result, kind)
        if kind == "parsing":
            picture = HumanParsing.from_labels(picture.labels()).preview()
        return lambda path: save_image(picture, path, overwrite)

    for files in paths.values():
        if len(files) > 1:
            make_folder(files[0].parent)
    write_outputs(
        (path, writing(result, kind))
        for kind, files in paths.items()
        for result, path in zip(results, files, strict=True)
    )
