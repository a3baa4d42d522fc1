"""`truepose transfer`: one source image, any number of poses."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
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
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.parsing import HumanParsing
    from truepose_core.pose import Pose

HELP = "show the person of one picture in one or more poses"
DESCRIPTION = """\
Show the person of SOURCE in the poses of one or more files. The source is read once, whatever the number of poses.

Needed beside the picture: its human parsing (which pixel shows the face, the hair, the clothes ...), and better
results come with the person's own keypoints (--source-pose).
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

poses:
  OpenPose JSON or ComfyUI's POSE_KEYPOINT. A pose is fitted into the picture without distortion. A file that does not
  say its canvas size is taken to be drawn on the output picture. Of several people the largest is taken (see --person)

examples:
  truepose demo --out demo-out                   writes inputs to try the next line with
  truepose transfer demo-out/inputs/person.png --parsing demo-out/inputs/person-parsing.png \\
      --source-pose demo-out/inputs/person-pose.json --pose demo-out/inputs/wave.json --out wave.png
  truepose transfer person.png --parsing map.png --pose poses/*.json --out results --size 512x768 --seed 7
  truepose transfer person.png --parsing map.png --pose wave.json --out wave.png --region face=1 upper=1 background=0
  truepose transfer photo.jpg --parsing map.png --parsing-labels atr --pose wave.json --out wave.png \\
      --model ./sd15 --controlnet ./openpose --prompt "a photograph of a person" --steps 30
"""

STEPS = {"pixels": 12, "vae": 30}
"""Sampling steps when --steps is not given."""
CANVAS_SLACK = 0.02
"""How much the aspect ratio of a source pose's canvas may differ from the source's: rounding of a resize."""

NO_PARSING = (
    "--parsing is missing: the source needs its human parsing, a label map of the same picture. Save one as PNG with "
    "grey values 0 background, 1 face, 2 hair, 3 upper clothes, 4 lower clothes, 5 skin, 6 accessory, or give the map "
    "of a human parser together with --parsing-labels (atr, lip, cihp, pascal, segformer_clothes); see truepose "
    "transfer --help"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose transfer`."""
    parser.add_argument("source", metavar="SOURCE", help="the picture of the person")
    inputs = parser.add_argument_group("what to show")
    inputs.add_argument(
        "--pose", nargs="+", required=True, action="extend", metavar="POSE.json", help="the poses to show, one or more"
    )
    inputs.add_argument("--parsing", metavar="MAP.png", help="human parsing of SOURCE: see below")
    inputs.add_argument(
        "--parsing-labels",
        default="regions",
        metavar="NAME",
        help="what the label map's numbers mean: regions, atr, lip, cihp, pascal, segformer_clothes (default: regions)",
    )
    inputs.add_argument(
        "--source-pose", metavar="POSE.json", help="keypoints of SOURCE; with them patterns find their place better"
    )
    inputs.add_argument(
        "--person", type=whole(0), metavar="N", help="which person of the pose files, from 0 (default: the largest)"
    )
    inputs.add_argument(
        "--source-person", type=whole(0), metavar="N", help="which person of --source-pose (default: the largest)"
    )
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
    """One pose to show. body: [18, 3] keypoints, normalised to the output picture."""

    file: Path
    frame: int
    person: int
    body: Tensor
    out: Path


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and check everything, then work, then write. Returns the report that --json prints."""
    if args.parsing is None:
        raise TruePoseError(NO_PARSING)
    started = time.perf_counter()
    from truepose_core.images import load_image
    from truepose_core.regions import parse_region_weights, region_weights

    omega = region_weights(parse_region_weights(args.region)) if args.region else None
    image = load_image(args.source)
    source_size = (image.shape[3], image.shape[2])
    size = output_size(args.size, source_size)
    parsing = read_parsing(args.parsing, args.parsing_labels, args.source, source_size, console)
    body = None
    if args.source_pose is not None:
        body = read_source_body(args.source_pose, args.source_person, source_size, console)[None]
    elif args.source_person is not None:
        raise TruePoseError("--source-person chooses among the people of --source-pose, which was not given")
    if body is None and args.gamma:
        console.note("--gamma has no effect without --source-pose")
    targets = read_targets(args.pose, args.person, size, Path(args.out), args.overwrite, console)

    opened = open_model(
        args.model, args.device, args.dtype, prompt=args.prompt, controlnet=args.controlnet, vae=args.vae
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
        image, parsing = _shrink(image, parsing, size, opened, console)
        before = time.perf_counter()
        features = opened.pipe.encode_source(image, parsing, body, opened.context, opened.pooled)
        encoded = time.perf_counter()
        pictures = _sample(opened, features, targets, size, steps, args.seed, args.batch, options)
    sampled = time.perf_counter()
    _write(pictures, targets, Path(args.out), args.overwrite)

    memory = peak_memory(opened.device)
    seconds = {
        "model": opened.seconds,
        "source": encoded - before,
        "sampling": sampled - encoded,
        "total": time.perf_counter() - started,
    }
    for target in targets:
        console.say(f"wrote {target.out} ({size[0]}x{size[1]})")
    work = f"{len(targets)} pose{'s' * (len(targets) > 1)} x {steps} steps"
    console.say(
        f"{seconds['total']:.1f} s in all: model {seconds['model']:.1f} s, source {seconds['source']:.1f} s, "
        f"{work} {seconds['sampling']:.1f} s; {memory_text(memory)}"
    )
    report = {
        "source": args.source,
        **opened.description,
        "size": list(size),
        "steps": steps,
        "seed": args.seed,
        "outputs": [{"path": str(t.out), "pose": str(t.file), "frame": t.frame, "person": t.person} for t in targets],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **memory,
    }
    console.report(report)
    return report


def output_size(asked: tuple[int, int] | None, source: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of the pictures to make. Raises TruePoseError when the source's own size is too large."""
    if asked is None and max(source) > MAX_SIDE:
        raise TruePoseError(
            f"the source is {source[0]}x{source[1]} pixels and a result may have {MAX_SIDE} a side; give --size WxH"
        )
    return asked or source


def read_parsing(path: str, labels: str, source: str, source_size: tuple[int, int], console: Console) -> HumanParsing:
    """The source's parsing, at the source's size (width, height). Raises TruePoseError when it is another picture's."""
    from truepose_core.parsing import HumanParsing

    parsing = HumanParsing.from_label_image(path, labels)
    if parsing.is_empty:
        raise TruePoseError(f"label map {path} shows nobody: every pixel is background. Check it, or --parsing-labels")
    width, height = source_size
    own_h, own_w = parsing.size
    if (own_w, own_h) == source_size:
        return parsing
    if abs(math.log((own_w / own_h) / (width / height))) > CANVAS_SLACK:
        raise TruePoseError(
            f"label map {path} is {own_w}x{own_h} pixels and {source} is {width}x{height}; "
            "expected a map of that picture, of the same shape"
        )
    console.note(f"label map {path} is {own_w}x{own_h} pixels; it is scaled to the source's {width}x{height}")
    return parsing.resize(height, width)


def read_source_body(path: str, person: int | None, source_size: tuple[int, int], console: Console) -> Tensor:
    """The source person's keypoints [18, 3]. Raises TruePoseError when the canvas has another shape than the source."""
    from truepose_core.pose import body_tensor, read_pose

    pose = read_pose(path, canvas=source_size)[0]
    width, height = source_size
    if abs(math.log((pose.width / pose.height) / (width / height))) > CANVAS_SLACK:
        raise TruePoseError(
            f"pose file {path} has a canvas of {pose.width}x{pose.height} and the source is {width}x{height}; "
            "expected the pose of that picture"
        )
    index = choose_person(pose, person, "--source-person", f"pose file {path}", console)
    return body_tensor([pose.people[index]])[0]


def choose_person(pose: Pose, index: int | None, option: str, where: str, console: Console) -> int:
    """The person asked for, or the largest, which is said when there are others."""
    try:
        chosen = pose.largest() if index is None else index
        if index is not None:
            pose.person(index)
    except TruePoseError as error:
        raise TruePoseError(f"{where}: {error}") from error
    if index is None and len(pose.people) > 1:
        console.note(
            f"{where} has {len(pose.people)} people; taking person {chosen}, the largest. Choose with {option} N, "
            f"0 to {len(pose.people) - 1}"
        )
    return chosen


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
    files: list[str], person: int | None, size: tuple[int, int], out: Path, overwrite: bool, console: Console
) -> list[Target]:
    """The poses of all files with the paths of their pictures, which are checked. Raises TruePoseError."""
    from truepose_core.images import IMAGE_SUFFIXES
    from truepose_core.pose import body_tensor, read_pose

    found: list[tuple[Path, int, int, Tensor, str]] = []
    for file in files:
        poses = read_pose(file, canvas=size)
        for frame, pose in enumerate(poses):
            where = f"pose file {file}" + (f", frame {frame}" if len(poses) > 1 else "")
            index = choose_person(pose, person, "--person", where, console)
            body = fit_body(body_tensor([pose.people[index]])[0], (pose.width, pose.height), size)
            _check_inside(body, where, size, console)
            name = Path(file).stem + (f"-{frame}" if len(poses) > 1 else "")
            found.append((Path(file), frame, index, body, name))
    if len(found) == 1:
        if out.is_dir():
            raise TruePoseError(
                f"--out {out} is a folder, and there is one pose in all; give the picture's path, such as "
                f"{out / (found[0][4] + '.png')}"
            )
        paths = [check_file(out, overwrite, IMAGE_SUFFIXES)]
    else:
        if out.suffix.lower() in IMAGE_SUFFIXES and not out.is_dir():
            raise TruePoseError(f"--out {out} is one picture's name, and there are {len(found)} poses; give a folder")
        paths = check_folder(out, unique_names([name for *_, name in found]), overwrite)
    return [Target(*each[:4], path) for each, path in zip(found, paths, strict=True)]


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


def _check_inside(body: Tensor, where: str, size: tuple[int, int], console: Console) -> None:
    visible = body[body[:, 2] > 0, :2]
    inside = int(((visible >= 0) & (visible <= 1)).all(1).sum())
    picture = f"the {size[0]}x{size[1]} picture"
    hint = "Does the file lack canvas_width and canvas_height?"
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


def _shrink(
    image: Tensor, parsing: HumanParsing, size: tuple[int, int], opened: Opened, console: Console
) -> tuple[Tensor, HumanParsing]:
    """A source with more pixels than the result says more than the result can show, at a price: scale it down."""
    import torch.nn.functional as F

    height, width = image.shape[2:]
    scale = math.sqrt(size[0] * size[1] / (width * height))
    if scale >= 1 or opened.pipe.model.config.codec == "pixels":
        return image, parsing
    small = (max(16, round(height * scale)), max(16, round(width * scale)))
    console.note(f"the source is read at {small[1]}x{small[0]} pixels, as many as the result has")
    image = F.interpolate(image, small, mode="bicubic", antialias=True).clamp(0, 1)
    return image, parsing.resize(*small)


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
