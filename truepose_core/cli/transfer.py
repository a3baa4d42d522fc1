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
    Donor,
    Networks,
    PersonPhoto,
    add_donor_arguments,
    add_frame_arguments,
    add_person_arguments,
    check_options,
    find_crop,
    fitted,
    frame_sizes,
    read_donor,
    read_donors,
    read_person,
    tell_cut,
)
from truepose_core.cli.targets import Target, read_targets
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.features import SourceFeatures
    from truepose_core.framing import Crop

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
  --from upper=b.png       the top of another person; where a garment is shorter, take their skin too: upper,skin=b.png

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
        "them (--retarget alone: feet)",
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
class Inputs:
    """Everything that was given, read and checked.

    photo: the person of SOURCE. source: what the model reads of it: the photo, or its crop. targets: the poses, on the
    picture that the model makes, which is `made` (width, height); the output is `size`. donors: the --from options and
    their persons. cut: edges of the photo that the person reaches.
    """

    photo: PersonPhoto
    source: PersonPhoto
    crop: Crop | None
    targets: list[Target]
    size: tuple[int, int]
    donors: list[tuple[Donor, PersonPhoto]]
    cut: list[str]

    @property
    def made(self) -> tuple[int, int]:
        return self.size if self.crop is None else self.crop.size_model[::-1]


def prepare(args: argparse.Namespace, console: Console) -> Inputs:
    """Read and check all pictures and poses. Raises TruePoseError for the first that does not do."""
    networks = Networks(args)
    wanted = read_donors(args)
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
    donors = [(donor, read_donor(donor, photo, networks, console)) for donor in wanted]
    source, crop = photo, None
    if args.frame is not None and args.paste_back is None:
        crop = find_crop(photo, frame_sizes(args.frame, args.model))
        source = photo.cropped(crop)
    size = output_size(args, source)
    targets = read_targets(args, size, source, networks, console)
    if args.paste_back is not None:
        # Poses lie on the photo, and the crop shows the person as they were and as they will be.
        crop = find_crop(photo, frame_sizes(args.frame, args.model), [target.body for target in targets])
        source = photo.cropped(crop)
        targets = [replace(target, body=crop.apply_keypoints(target.body)) for target in targets]
    networks.close()
    return Inputs(photo, source, crop, targets, size, donors, cut)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and check everything, then work, then write. Returns the report that --json prints."""
    started = time.perf_counter()
    check_options(args)
    from truepose_core.framing import paste_back
    from truepose_core.regions import parse_region_weights, region_weights

    omega = region_weights(parse_region_weights(args.region)) if args.region else None
    given = prepare(args, console)
    if given.photo.person is None and args.gamma:
        console.note("--gamma has no effect without --source-pose")

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
    with memory_errors(opened.device):
        before = time.perf_counter()
        features = _encode(opened, given, console)
        encoded = time.perf_counter()
        pictures = _sample(opened, features, given.targets, given.made, steps, args.seed, args.batch, options)
    sampled = time.perf_counter()
    if args.paste_back is not None:
        pictures = [
            paste_back(given.photo.image, picture, [given.crop], feather=args.paste_back)[0] for picture in pictures
        ]
    _write(pictures, given.targets, Path(args.out), args.overwrite)

    memory = peak_memory(opened.device)
    seconds = {
        "model": opened.seconds,
        "source": encoded - before,
        "sampling": sampled - encoded,
        "total": time.perf_counter() - started,
    }
    done = _what_was_done(args, given)
    _tell_what_was_done(done, console)
    size = given.size
    for target in given.targets:
        console.say(f"wrote {target.out} ({size[0]}x{size[1]})")
    count = len(given.targets)
    work = f"{count} pose{'s' * (count > 1)} x {steps} steps"
    console.say(
        f"{seconds['total']:.1f} s in all: model {seconds['model']:.1f} s, source {seconds['source']:.1f} s, "
        f"{work} {seconds['sampling']:.1f} s; {memory_text(memory)}"
    )
    report = {
        **done,
        **opened.description,
        "size": list(size),
        "steps": steps,
        "seed": args.seed,
        "outputs": [{"path": str(t.out), "pose": t.pose, "frame": t.frame, "person": t.person} for t in given.targets],
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


def _tell_about_model(opened: Opened, console: Console) -> None:
    config = opened.pipe.model.config
    if opened.is_mannequin:
        height, width = config.size
        console.note(MANNEQUINS_ONLY.format(w=width, h=height))
    elif Path(opened.name).is_dir() and opened.pipe.model.controlnet is None:
        console.note("without --controlnet this model sees the pose through the regions only, so it may not follow it")


def _what_was_done(args: argparse.Namespace, given: Inputs) -> dict[str, Any]:
    """The part of the report about the pictures of people."""
    crop = given.crop
    return {
        "source": args.source,
        "parsing": given.photo.parsing_from,
        "source_pose": given.photo.pose_from,
        "cut": given.cut,
        "from": [
            {"picture": x.picture, "regions": x.names, "parsing": read.parsing_from, "pose": read.pose_from}
            for x, read in given.donors
        ],
        "retarget": args.retarget,
        "frame": None if crop is None else {"box": crop.box, "size": crop.size_model[::-1], "told": crop.describe()},
        "paste_back": args.paste_back,
    }


def _tell_what_was_done(done: dict[str, Any], console: Console) -> None:
    """`_what_was_done`, for people."""
    console.say(f"{done['source']}: parsing {done['parsing']}, pose {done['source_pose'] or 'unknown'}")
    for each in done["from"]:
        told = f"parsing {each['parsing']}, pose {each['pose'] or 'unknown'}"
        console.say(f"{', '.join(each['regions'])} from {each['picture']}: {told}")
    if done["retarget"] is not None:
        console.say(f"poses on the proportions of the person in {done['source']}, by the {done['retarget']}")
    if done["frame"] is not None:
        console.say(f"crop: {done['frame']['told']}{'; pasted back' if done['paste_back'] is not None else ''}")


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


def _encode(opened: Opened, given: Inputs, console: Console) -> SourceFeatures:
    """The source's features, with the regions that are taken from donors."""
    from truepose_core.combine import combine_sources

    def read(person: PersonPhoto) -> SourceFeatures:
        return opened.pipe.encode_source(person.image, person.parsing, person.body, opened.context, opened.pooled)

    source = _shrink(given.source, given.made, opened, console)
    features = read(source)
    for donor, person in given.donors:
        fresh = read(fitted(person, source.size, framed=given.crop is not None))
        features = combine_sources(features, fresh, donor.shares)
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


def _write(pictures: list[Tensor], targets: list[Target], out: Path, overwrite: bool) -> None:
    from truepose_core.images import save_image

    if len(targets) > 1:
        make_folder(out)
    for picture, target in zip(pictures, targets, strict=True):
        save_image(picture, target.out, overwrite)
