"""The options of `truepose transfer`, some of which other commands have too."""

from __future__ import annotations

import argparse

from truepose_core.cli.console import (
    add_device_arguments,
    add_report_arguments,
    number,
    picture_size,
    whole,
)
from truepose_core.cli.models import add_models_argument
from truepose_core.cli.opening import add_folder_arguments, add_model_arguments
from truepose_core.cli.transfer.bodies import add_body_arguments
from truepose_core.cli.transfer.maps import add_condition_arguments
from truepose_core.cli.transfer.person import AUTO, KEYPOINTS
from truepose_core.errors import TruePoseError

HELP = "show the person of one picture in one or more poses"
DESCRIPTION = """\
Show the person of SOURCE in the poses of one or more files. The source is read once, whatever the number of poses.

Needed beside the picture: its human parsing (which pixel shows the face, the hair, the clothes ...), as a file or made
by --parser. Better results come with the person's own keypoints (--source-pose, or --estimate-pose). Models of other
systems (AnimateAnyone, champ, Leffa, CFLD) work as published without either; with them, regions can be weighed.
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

models of other systems:
  --model takes their weight files as they were published, or what truepose convert wrote; `truepose inspect FILE...`
  says the command line for a file. Guidance scales are the published ones unless given
  --pose-map NAME=PICTURE  what a model reads beside or instead of --pose; of the picture's aspect ratio. champ's depth,
                           normal and semantic_map are drawn from --pose or --body where they are not given
  --pose-map NAME=FOLDER   for several poses: pictures of one pose have the same name in every folder, and the name of
                           the pose's result where --pose is given too (wave.json: wave.png)

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
  truepose transfer photo.jpg --pose dancer.json --out dance.png --vae ./sd15 --image-encoder ./image_encoder \\
      --model reference_unet.pth denoising_unet.pth pose_guider.pth
  truepose transfer photo.jpg --pose-map densepose=pose.png --out pose-of-it.png --model leffa.safetensors
  truepose transfer a.png --source-pose a.json --parser keypoints --from upper,lower=b.png --from-pose b.json \\
      --pose gallery:walking --out swap.png
"""

FEATHER = 16
LEVELS = 4
"""Noise levels that an untrained checkpoint reads its source at."""
STEPS = {"pixels": 1, "vae": 30}
"""Sampling steps when --steps is not given."""

NO_PARSING = (
    "the source needs its human parsing; give one of --parser keypoints (no model, with --source-pose or "
    "--estimate-pose), --parser NAME (a network: schp-atr, schp-lip, atr+lip, segformer-b2-clothes, "
    "segformer-b3-clothes, or an .onnx file) and --parsing MAP.png (a label map of the same picture, saved as PNG with "
    "grey values 0 background, 1 face, 2 hair, 3 upper clothes, 4 lower clothes, 5 skin, 6 accessory, or the map of a "
    "human parser together with --parsing-labels); see truepose transfer --help"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `truepose transfer`."""
    inputs = add_pose_arguments(parser, "truepose transfer", "; not needed where --pose-map says it all")
    add_body_arguments(inputs, "poses as 3D bodies")
    add_condition_arguments(inputs)
    person = parser.add_argument_group("the person in SOURCE")
    add_person_arguments(person)
    add_frame_arguments(parser.add_argument_group("crop"))
    add_donor_arguments(parser.add_argument_group("regions of other pictures"))
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="PATH", help="a picture, or a folder for several poses")
    output.add_argument(
        "--size",
        type=picture_size,
        metavar="WxH",
        help="size of the pictures in pixels (default: those of --canvas, else SOURCE's)",
    )
    output.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    add_report_arguments(output)
    model = parser.add_argument_group("model")
    add_model_arguments(model)
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
        help="sampling steps (default: 1 for a mannequin model, 50 for CFLD, 30 for others)",
    )
    sampling.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="fixes the pictures; every pose uses it (default: 0)"
    )
    sampling.add_argument(
        "--guidance-pose",
        type=number(),
        metavar="W",
        help="above 1 follows the pose harder (default: the model's own, 2 for CFLD; else 1)",
    )
    sampling.add_argument(
        "--guidance-source",
        type=number(),
        metavar="W",
        help="above 1 holds on to the source harder; each scale other than 1 costs another network call (default: the "
        "model's own, 3.5 for AnimateAnyone and champ, 2.5 for Leffa, 2 for CFLD; else 1)",
    )
    field = parser.add_argument_group("guidance by the pose field (off unless --field-scale is given)")
    field.add_argument(
        "--field-scale",
        type=number(),
        default=0.0,
        metavar="S",
        help="how far each step moves the picture towards a possible pose and the one asked for; 10 is a start, "
        "0 is off (default: 0)",
    )
    field.add_argument(
        "--field-mu",
        type=number(),
        metavar="M",
        help="how strongly joints are drawn to the pose asked for, beside the field (default: 20)",
    )
    field.add_argument(
        "--field-window",
        type=number(0, 1),
        nargs=2,
        metavar=("START", "END"),
        help="the part of the sampling in which it guides (default: 0 1)",
    )
    field.add_argument(
        "--field-predictor",
        metavar="FILE",
        help="what reads the pose off the picture in the making, from truepose train --row keypoints; needed for "
        "models on a VAE's latents (default: the bundled one, for the bundled model)",
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
        "--strength",
        type=number(0, 1),
        metavar="S",
        help="0 leaves out what HPFA takes from the source, 1 uses it all (default: 1; 0 for CFLD, which has a way of "
        "its own)",
    )
    fusion.add_argument(
        "--style",
        type=number(0, 1),
        default=0.0,
        metavar="S",
        help="how far the picture takes on the light and colours of the whole SOURCE, whatever --region says: the mean "
        "and contrast of its features (AdaIN); 0 is off (default: 0)",
    )
    fusion.add_argument(
        "--beta",
        type=number(),
        metavar="B",
        help="how strictly regions must match, 0 is not at all (default: what the model learned; 2 for a folder; 0 for "
        "models of other systems)",
    )
    fusion.add_argument(
        "--gamma",
        type=number(),
        metavar="G",
        help="how strictly places on the body must match (default: what the model learned; else 0)",
    )


def add_pose_arguments(parser: argparse.ArgumentParser, command: str, more: str = "") -> argparse._ActionsContainer:
    """SOURCE, the poses to show, and whose proportions they have; the group that they are in. more: said of --pose."""
    # SOURCE stands first: behind an option that takes several values it would be one of them.
    parser.usage = f"{command} SOURCE --pose POSE ... --out PATH [options]"
    parser.add_argument("source", metavar="SOURCE", help="the picture of the person")
    inputs = parser.add_argument_group("what to show")
    inputs.add_argument(
        "--pose",
        nargs="+",
        action="extend",
        default=[],
        metavar="POSE",
        help="the poses to show, one or more: POSE.json, a ready pose such as gallery:waving, or with --estimate-pose "
        f"a picture of somebody{more}",
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
    return inputs


def add_person_arguments(parser: argparse._ActionsContainer) -> None:
    """Where the parsing and the keypoints of SOURCE come from."""
    parser.add_argument("--parsing", metavar="MAP.png", help="human parsing of SOURCE as a file: see below")
    parser.add_argument(
        "--parsing-labels",
        default="regions",
        metavar="NAME",
        help="what the label map's numbers mean: regions, atr, lip, cihp, pascal, segformer_clothes (default: regions)",
    )
    parser.add_argument(
        "--parser",
        metavar="NAME",
        help="make the parsing instead: keypoints (no model, needs OpenCV and the person's keypoints), a network "
        "(schp-atr, schp-lip, atr+lip, segformer-b2-clothes, segformer-b3-clothes), or an .onnx file",
    )
    parser.add_argument(
        "--source-pose", metavar="POSE.json", help="keypoints of SOURCE; with them patterns find their place better"
    )
    parser.add_argument(
        "--estimate-pose",
        action="store_true",
        help="find keypoints with DWPose where none are given: of SOURCE, of --from pictures, and of --pose pictures",
    )
    parser.add_argument(
        "--source-person",
        type=whole(0),
        metavar="N",
        help="which person of SOURCE, from 0 (default: the largest)",
    )
    add_models_argument(parser)


def add_frame_arguments(parser: argparse._ActionsContainer) -> None:
    """The crop around the person."""
    parser.add_argument(
        "--frame",
        nargs="?",
        const=AUTO,
        type=frame_size,
        metavar="WxH",
        help="crop SOURCE around the person to this size, or without one to the size that suits the model and the "
        "person best; the crop is the output",
    )
    parser.add_argument(
        "--paste-back",
        nargs="?",
        const=FEATHER,
        type=whole(0, 512),
        metavar="PIXELS",
        help="with --frame: put the result back into SOURCE, so that the output is the whole photo; its edge fades in "
        f"over so many pixels (--paste-back alone: {FEATHER})",
    )


def add_donor_arguments(parser: argparse._ActionsContainer) -> None:
    """Regions of other pictures."""
    parser.add_argument(
        "--from",
        dest="donors",
        action="append",
        default=[],
        metavar="REGION[,REGION]=PICTURE",
        help="take regions from the person of another picture, such as upper=b.png; once for each picture",
    )
    parser.add_argument(
        "--from-parsing",
        nargs="+",
        action="extend",
        default=[],
        metavar="MAP.png",
        help="parsings of the --from pictures, in their order (default: --parser makes them)",
    )
    parser.add_argument(
        "--from-pose",
        nargs="+",
        action="extend",
        default=[],
        metavar="POSE.json",
        help="keypoints of the --from pictures, in their order (default: --estimate-pose finds them)",
    )


def frame_size(text: str) -> str | tuple[int, int]:
    """An argparse type: auto, or WxH in pixels -> (width, height)."""
    return AUTO if text == AUTO else picture_size(text)


def check_options(args: argparse.Namespace, needs_parsing: bool = True) -> None:
    """Raise TruePoseError for options that contradict each other, before any file is read."""
    finds_pose = args.source_pose is not None or args.estimate_pose
    if needs_parsing and args.parsing is None and args.parser is None:
        raise TruePoseError(NO_PARSING)
    if args.parsing is not None and args.parser is not None:
        raise TruePoseError(
            f"both --parsing {args.parsing} and --parser {args.parser} say where the parsing comes from; give one"
        )
    needs = {
        "--parser keypoints": args.parser == KEYPOINTS,
        "--retarget": args.retarget is not None,
        "--source-person": args.source_person is not None and getattr(args, "source_body", None) is None,
    }
    for option, used in needs.items():
        if used and not finds_pose:
            raise TruePoseError(
                f"{option} needs the keypoints of SOURCE, and neither --source-pose nor --estimate-pose was given"
            )
    if args.paste_back is not None and args.frame is None:
        raise TruePoseError("--paste-back puts a framed picture back, and --frame was not given")
    if args.frame is not None and args.size is not None:
        raise TruePoseError("--frame and --size both say the size of the pictures; leave out --size")
