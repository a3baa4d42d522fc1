"""`truepose transfer`: one source image, any number of poses."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import (
    MAX_SIDE,
    Console,
    add_device_arguments,
    check_file,
    check_folder,
    make_folder,
    memory_text,
    number,
    peak_memory,
    picture_size,
    whole,
)
from truepose_core.cli.opening import (
    MANNEQUINS_ONLY,
    Opened,
    add_folder_arguments,
    add_model_argument,
    memory_errors,
    open_model,
    progress,
)
from truepose_core.cli.photo import (
    PICTURES,
    Donor,
    Networks,
    PersonPhoto,
    add_donor_arguments,
    add_frame_arguments,
    add_person_arguments,
    check_options,
    choose_person,
    find_crop,
    fitted,
    frame_sizes,
    load_photo,
    read_donor,
    read_donors,
    read_person,
    tell_cut,
    told_where,
)
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.features import SourceFeatures
    from truepose_core.framing import Crop
    from truepose_core.pose import Pose

HELP = "show the person of one picture in one or more poses"
DESCRIPTION = """\
Show the person of SOURCE in the poses of one or more files. The source is read once, whatever the number of poses.

Needed beside the picture: its human parsing (which pixel shows the face, the hair, the clothes ...), as a file or made
by --parser. Better results come with the person's own keypoints (--source-pose, or --estimate-pose).
"""
EPILOG = """\
output:
  one pose in all          --out is the picture to write: .png, .jpg or .webp
  two or more poses        --out is a folder, made if need be; each picture is named after its pose file
                           (wave.json -> wave.png; a file of several frames -> walk-0.png, walk-1.png ...)
  files that exist are kept unless --overwrite is given

parsing:
  a label map of SOURCE, saved as PNG without smoothing: grey values 0 background, 1 face, 2 hair, 3 upper clothes,
  4 lower clothes, 5 skin, 6 accessory, or the colours of our parsing preview. Maps of common human parsers can be
  given as they are: --parsing-labels atr, lip, cihp, pascal or segformer_clothes
  or --parser: a network (`truepose models` lists them and fetches one), or keypoints, which guesses the parsing from
  the person's keypoints and the colours around them

poses:
  OpenPose JSON or ComfyUI's POSE_KEYPOINT. A pose is fitted into the picture without distortion. A file that does not
  say its canvas size is taken to be drawn on the output picture. Of several people the largest is taken (see --person)
  gallery:NAME is a ready pose, such as gallery:walking or gallery:hands-on-hips; a wrong name lists them all
  with --estimate-pose a picture of somebody is a pose too

photographs:
  --frame                  the person fills the picture that the model makes; the crop is the output
  --frame --paste-back     the output is the whole photo with the crop made anew; poses lie on the photo, and with
                           --retarget the person keeps their size and stands where they stood

examples:
  truepose demo --out demo-out                   writes inputs to try the next line with
  truepose transfer demo-out/inputs/person.png --parsing demo-out/inputs/person-parsing.png \\
      --source-pose demo-out/inputs/person-pose.json --pose demo-out/inputs/wave.json --out wave.png
  truepose transfer person.png --parsing map.png --pose poses/*.json --out results --size 512x768 --seed 7
  truepose transfer person.png --parsing map.png --pose wave.json --out wave.png --region face=1 upper=1 background=0
  truepose transfer photo.jpg --parsing map.png --parsing-labels atr --pose wave.json --out wave.png \\
      --model ./sd15 --controlnet ./openpose --prompt "a photograph of a person" --steps 30
  truepose transfer photo.jpg --parser schp-atr --estimate-pose --frame --retarget --pose dancer.jpg --out dance.png \\
      --model ./sd15 --controlnet ./openpose
  truepose transfer a.png --source-pose a.json --parser keypoints --from upper,lower=b.png --from-pose b.json \\
      --pose gallery:walking --out swap.png
"""

STEPS = {"pixels": 12, "vae": 30}
"""Sampling steps when --steps is not given."""
GALLERY = "gallery:"
"""How a --pose begins that names a ready pose."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose transfer`."""
    parser.add_argument("source", metavar="SOURCE", help="the picture of the person")
    inputs = parser.add_argument_group("what to show")
    inputs.add_argument(
        "--pose",
        nargs="+",
        required=True,
        action="extend",
        metavar="POSE",
        help="the poses to show, one or more: POSE.json, a ready pose such as gallery:waving, or with --estimate-pose "
        "a picture of somebody",
    )
    inputs.add_argument(
        "--person", type=whole(0), metavar="N", help="which person of the poses, from 0 (default: the largest)"
    )
    inputs.add_argument(
        "--retarget",
        nargs="?",
        const="feet",
        choices=("feet", "hips"),
        help="put the poses on the proportions of the person in SOURCE; the feet, or the hips, stay where the pose has "
        "them (default: feet)",
    )
    person = parser.add_argument_group("the person in SOURCE")
    add_person_arguments(person)
    add_frame_arguments(parser.add_argument_group("crop"))
    add_donor_arguments(parser.add_argument_group("regions of other pictures"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="PATH", help="a picture, or a folder for several poses")
    output.add_argument(
        "--size", type=picture_size, metavar="WxH", help="size of the pictures in pixels (default: SOURCE's)"
    )
    output.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    output.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of text")
    model = parser.add_argument_group("model")
    add_model_argument(model)
    add_folder_arguments(model)
    add_device_arguments(model)
    model.add_argument(
        "--batch", type=whole(1), default=1, metavar="N", help="poses worked on at once: more memory (default: 1)"
    )
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--steps",
        type=whole(1, 1000),
        metavar="N",
        help="sampling steps (default: 12 for a mannequin model, 30 for a Stable Diffusion folder)",
    )
    sampling.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="fixes the pictures; every pose uses it (default: 0)"
    )
    sampling.add_argument(
        "--guidance-pose", type=number(), default=1.0, metavar="W", help="above 1 follows the pose harder (default: 1)"
    )
    sampling.add_argument(
        "--guidance-source",
        type=number(),
        default=1.0,
        metavar="W",
        help="above 1 holds on to the source harder; each scale other than 1 costs another network call (default: 1)",
    )
    fusion = parser.add_argument_group("what to take from the source")
    fusion.add_argument(
        "--region",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=WEIGHT",
        help="0 leaves a region of the source out, 1 keeps it: background, face, hair, upper, lower, skin, accessory "
        "(default: 1 for all)",
    )
    fusion.add_argument(
        "--strength", type=number(0, 1), default=1.0, metavar="S", help="0 ignores the source, 1 uses it (default: 1)"
    )
    fusion.add_argument(
        "--beta",
        type=number(),
        metavar="B",
        help="how strictly regions must match, 0 is not at all (default: what the model learned; 2 for a folder)",
    )
    fusion.add_argument(
        "--gamma",
        type=number(),
        metavar="G",
        help="how strictly places on the body must match (default: what the model learned; 0 for a folder)",
    )


@dataclass(frozen=True)
class Target:
    """One pose to show. pose: what --pose says. body: [18, 3] keypoints, normalised to the picture that is made."""

    pose: str
    frame: int
    person: int
    body: Tensor
    out: Path


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and check everything, then work, then write. Returns the report that --json prints."""
    started = time.perf_counter()
    check_options(args)
    wanted = read_donors(args)
    from truepose_core.regions import parse_region_weights, region_weights

    omega = region_weights(parse_region_weights(args.region)) if args.region else None
    networks = Networks(args)
    source = read_person(
        args.source,
        networks,
        console,
        parsing=args.parsing,
        pose=args.source_pose,
        index=args.source_person,
        option="--source-person",
    )
    cut = tell_cut(source, console)
    donors = [read_donor(donor, source, networks, console) for donor in wanted]
    if source.person is None and args.gamma:
        console.note("--gamma has no effect without --source-pose")
    photo, crop = source, None
    if args.frame is not None and args.paste_back is None:
        crop = find_crop(source, frame_sizes(args.frame, args.model))
        source = source.cropped(crop)
    size = output_size(args, source)
    targets = read_targets(args, size, source, networks, console)
    if args.paste_back is not None:
        crop = find_crop(photo, frame_sizes(args.frame, args.model), [target.body for target in targets])
        source = photo.cropped(crop)
        targets = [replace(target, body=crop.apply_keypoints(target.body)) for target in targets]
    networks.close()

    opened = open_model(
        args.model,
        args.device,
        args.dtype,
        prompt=args.prompt,
        controlnet=args.controlnet,
        vae=args.vae,
        image_encoder=args.image_encoder,
    )
    _tell_about_model(opened, console)
    steps = args.steps or STEPS[opened.pipe.model.config.codec]
    options = {
        "guidance_pose": args.guidance_pose,
        "guidance_source": args.guidance_source,
        "strength": args.strength,
        "region_weights": omega,
        "beta": args.beta,
        "gamma": args.gamma,
    }
    made = size if crop is None else crop.size_model[::-1]
    with memory_errors(opened.device):
        before = time.perf_counter()
        features = _encode(opened, _shrink(source, made, opened, console), donors, wanted, crop is not None)
        encoded = time.perf_counter()
        pictures = _sample(opened, features, targets, made, steps, args.seed, args.batch, options)
    sampled = time.perf_counter()
    if args.paste_back is not None:
        pictures = _pasted(photo, pictures, crop, args.paste_back)
    _write(pictures, targets, Path(args.out), args.overwrite)

    memory = peak_memory(opened.device)
    seconds = {
        "model": opened.seconds,
        "source": encoded - before,
        "sampling": sampled - encoded,
        "total": time.perf_counter() - started,
    }
    taken = [
        {"picture": donor.picture, "regions": donor.names, **read.told}
        for donor, read in zip(wanted, donors, strict=True)
    ]
    _tell_about_person(photo, crop, taken, args, console)
    for target in targets:
        console.say(f"wrote {target.out} ({size[0]}x{size[1]})")
    work = f"{len(targets)} pose{'s' * (len(targets) > 1)} x {steps} steps"
    console.say(
        f"{seconds['total']:.1f} s in all: model {seconds['model']:.1f} s, source {seconds['source']:.1f} s, "
        f"{work} {seconds['sampling']:.1f} s; {memory_text(memory)}"
    )
    report = {
        "source": args.source,
        **photo.told,
        "cut": cut,
        "from": taken,
        "frame": None if crop is None else {"box": crop.box, "size": made, "padded": round(crop.padded, 4)},
        "paste_back": args.paste_back,
        "retarget": args.retarget,
        **opened.description,
        "size": list(size),
        "steps": steps,
        "seed": args.seed,
        "outputs": [{"path": str(t.out), "pose": t.pose, "frame": t.frame, "person": t.person} for t in targets],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **memory,
    }
    console.report(report)
    return report


def output_size(args: argparse.Namespace, source: PersonPhoto) -> tuple[int, int]:
    """(width, height) of the pictures to make. Raises TruePoseError when the source's own size is too large."""
    height, width = source.size
    if args.frame is not None and args.paste_back is None:
        return width, height
    if args.size is None and max(source.size_in_file) > MAX_SIDE:
        what = f"the source is {source.size_in_file[0]}x{source.size_in_file[1]} pixels"
        way = "make the photo smaller first" if args.paste_back is not None else "give --size WxH, or --frame"
        raise TruePoseError(f"{what} and a result may have {MAX_SIDE} a side; {way}")
    return args.size or (width, height)


def fit_body(body: Tensor, canvas: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Keypoints [18, 3] normalised to a canvas (width, height) -> normalised to a picture of `size`.

    The canvas is scaled by one factor until it fits, and centred; missing keypoints stay as they are.
    """
    scale = min(size[0] / canvas[0], size[1] / canvas[1])
    share = body.new_tensor([canvas[0] * scale / size[0], canvas[1] * scale / size[1]])
    fitted = body.clone()
    fitted[:, :2] = (body[:, :2] - 0.5) * share + 0.5
    return fitted.where(body[:, 2:] > 0, body)


def read_targets(
    args: argparse.Namespace, size: tuple[int, int], source: PersonPhoto, networks: Networks, console: Console
) -> list[Target]:
    """All poses on the canvas of `size` (width, height), with the paths of their pictures, which are checked. source:
    the person as on that canvas, or as in the whole photo. Raises TruePoseError."""
    from truepose_core.images import IMAGE_SUFFIXES
    from truepose_core.pose import body_tensor

    out = Path(args.out)
    found: list[tuple[str, int, int, Tensor]] = []
    names: list[str] = []
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
                _check_inside(body, f"{where}, retargeted,", size, console, "Is the person of SOURCE near its edge?")
        found += [(text, *each) for each in zip(range(len(poses)), people, bodies, strict=True)]
        names += [stem + (f"-{frame}" if len(poses) > 1 else "") for frame in range(len(poses))]
    if len(found) == 1:
        if out.is_dir():
            raise TruePoseError(
                f"--out {out} is a folder, and there is one pose in all; give the picture's path, such as "
                f"{out / (names[0] + '.png')}"
            )
        paths = [check_file(out, args.overwrite, IMAGE_SUFFIXES)]
    else:
        if out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir():
            raise TruePoseError(f"--out {out} is one picture's name, and there are {len(found)} poses; give a folder")
        paths = check_folder(out, unique_names(names), args.overwrite)
    return [Target(*each, path) for each, path in zip(found, paths, strict=True)]


def read_poses(
    text: str, size: tuple[int, int], estimate: bool, networks: Networks, console: Console
) -> tuple[list[Pose], str, str]:
    """(the frames of one --pose, what to call it in messages, the stem of its pictures' names)."""
    from truepose_core.pose import read_pose

    if text.startswith(GALLERY):
        from truepose_core.pose_gallery import NAMES, gallery_pose

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

    from truepose_core.retarget import retarget

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


ANCHOR_JOINTS = {"feet": (10, 13), "hips": (8, 11), "neck": (1,)}


def anchor_way(body: Tensor, source: Tensor, anchor: str) -> Tensor:
    """The way [2] from the anchor of a body [18, 3] to the source's: the lower ankle, the middle of the hips, or the
    neck; the first that both show."""
    for name in list(ANCHOR_JOINTS)[list(ANCHOR_JOINTS).index(anchor) :]:
        places = []
        for points in (body, source):
            joints = points[list(ANCHOR_JOINTS[name])]
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


def _tell_about_model(opened: Opened, console: Console) -> None:
    config = opened.pipe.model.config
    if opened.is_mannequin:
        height, width = config.size
        console.note(MANNEQUINS_ONLY.format(w=width, h=height))
    elif Path(opened.name).is_dir() and opened.pipe.model.controlnet is None:
        console.note("without --controlnet this model sees the pose through the regions only, so it may not follow it")


def _tell_about_person(
    photo: PersonPhoto, crop: Crop | None, taken: list[dict[str, Any]], args: argparse.Namespace, console: Console
) -> None:
    """What was done with the pictures of people, where it is more than reading files."""
    if args.parsing is None:
        console.say(f"parsing of {photo.path}: {photo.told['parsing']}")
    if args.source_pose is None and photo.person is not None:
        console.say(f"pose of {photo.path}: {photo.told['pose']}")
    for each in taken:
        ways = ", ".join(f"{name} {each[name]}" for name in ("parsing", "pose") if each[name] is not None)
        console.say(f"{', '.join(each['regions'])} from {each['picture']} ({ways})")
    if args.retarget is not None:
        console.say(f"poses on the proportions of the person in {photo.path}, by the {args.retarget}")
    if crop is not None:
        console.say(f"framed: {crop.describe()}" + ("; pasted back" if args.paste_back is not None else ""))


def _shrink(source: PersonPhoto, size: tuple[int, int], opened: Opened, console: Console) -> PersonPhoto:
    """A source with more pixels than the result says more than the result can show, at a price: scale it down."""
    import torch.nn.functional as F

    height, width = source.size
    scale = math.sqrt(size[0] * size[1] / (width * height))
    if scale >= 1 or opened.pipe.model.config.codec == "pixels":
        return source
    small = (max(16, round(height * scale)), max(16, round(width * scale)))
    console.note(f"the source is read at {small[1]}x{small[0]} pixels, as many as the result has")
    image = F.interpolate(source.image, small, mode="bicubic", antialias=True).clamp(0, 1)
    return replace(source, image=image, parsing=source.parsing.resize(*small))


def _encode(
    opened: Opened, source: PersonPhoto, donors: list[PersonPhoto], wanted: list[Donor], framed: bool
) -> SourceFeatures:
    """The source's features, with the regions that are taken from donors."""
    from truepose_core.combine import combine_sources

    def read(person: PersonPhoto) -> SourceFeatures:
        return opened.pipe.encode_source(person.image, person.parsing, person.body, opened.context, opened.pooled)

    features = read(source)
    for person, donor in zip(donors, wanted, strict=True):
        features = combine_sources(features, read(fitted(person, source.size, framed)), donor.shares)
    return features


def _sample(
    opened: Opened,
    features: Any,
    targets: list[Target],
    size: tuple[int, int],
    steps: int,
    seed: int,
    batch: int,
    options: dict[str, Any],
) -> list[Tensor]:
    """One picture [1, 3, H, W] per target. All have the same seed: a picture depends on its own pose only."""
    import torch
    from tqdm.auto import tqdm

    pictures: list[Tensor] = []
    with tqdm(total=len(targets) * steps, desc="sampling", unit="step") as bar:
        for first in range(0, len(targets), batch):
            chunk = targets[first : first + batch]
            images = opened.pipe(
                features,
                torch.stack([target.body for target in chunk]),
                height=size[1],
                width=size[0],
                num_inference_steps=steps,
                seed=[seed] * len(chunk),
                context=opened.context,
                pooled=opened.pooled,
                callback_on_step_end=progress(bar, len(chunk)),
                **options,
            ).images
            pictures += images.split(1)
    return pictures


def _pasted(photo: PersonPhoto, pictures: list[Tensor], crop: Crop, feather: int) -> list[Tensor]:
    """The photo with each of the pictures in it."""
    from truepose_core.framing import paste_back

    return [paste_back(photo.image, picture, [crop], feather=feather)[0] for picture in pictures]


def _write(pictures: list[Tensor], targets: list[Target], out: Path, overwrite: bool) -> None:
    from truepose_core.images import save_image

    if len(targets) > 1:
        make_folder(out)
    for picture, target in zip(pictures, targets, strict=True):
        save_image(picture, target.out, overwrite)
