"""Human parsing of photographs: from a parser in models/truepose, or from keypoints."""

from __future__ import annotations

import logging
import sys
from pathlib import Path, PurePath

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.networks.known import KNOWN, by_hand, find
from truepose_core.networks.onnx import PROVIDERS, check_runtime, close_sessions
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.from_keypoints import has_opencv, parse_from_keypoints
from truepose_core.parsing.onnx import ATR_LIP, ATR_LIP_PARTS, choose_parser, parse_image
from truepose_core.parsing.spec import BUILT_IN
from truepose_core.regions import REGION_NAMES

from .host import files as host_files
from .host.unet import say_once
from .parsing import shown
from .schema import Parsing, PoseKeypoint, check_canvas, read_bodies, schema, supported, to_core

KEYPOINTS = "from keypoints (no model)"
MERGED = "ATR + LIP merged"
DOWNLOAD = " (download)"

_log = logging.getLogger(__name__)


def parser_options() -> list[str]:
    """What the node offers: keypoints, the merge, the ONNX files there are, and the known ones to download."""
    there = host_files.files(".onnx")
    names = {PurePath(name).name for name in there}
    poses = {file for name, model in KNOWN.items() if name not in BUILT_IN for file in model.files}
    missing = [name for name in BUILT_IN if KNOWN[name].url and not names & set(KNOWN[name].files)]
    found = [name for name in there if PurePath(name).name not in poses]
    return [KEYPOINTS, MERGED, *found, *(f"{name}{DOWNLOAD}" for name in missing)]


def parser_name(option: str) -> str:
    """An entry of `parser_options` as `choose_parser` names it."""
    return ATR_LIP if option == MERGED else option.removesuffix(DOWNLOAD)


def from_onnx(image: Tensor, option: str, provider: str, download: bool) -> tuple[HumanParsing, str]:
    """Parse with a network: the parsing, and in words what computed it."""
    check_runtime(provider)
    name, folders = parser_name(option), host_files.folders()
    parts = ATR_LIP_PARTS if name == ATR_LIP else (name,)
    for missing in (part for part in parts if part in BUILT_IN and find(part, folders) is None):
        model = KNOWN[missing]
        if not download or model.url is None:
            ask = "; or switch download on in this node" if model.url else ""
            raise TruePoseError(f"the parser {missing} is not there yet. {by_hand(model, folders[0])}{ask}")
    parser = choose_parser(name, folders, provider=provider, download=download, progress=host_files.download_progress())
    masks = [parse_image(image[index : index + 1], parser).masks for index in host_files.steps(len(image))]
    return HumanParsing(torch.cat(masks) if len(masks) > 1 else masks[0]), parser.description


def from_keypoints(image: Tensor, pose: object) -> tuple[HumanParsing, str]:
    """Parse without a network: the parsing, and in words how."""
    if pose is None:
        raise TruePoseError(
            f"{KEYPOINTS!r} needs the pose of the same image: connect one, for example from DWPose or Load Pose, or "
            "choose a parser"
        )
    check_canvas(pose, image.movedim(1, -1), "the pose")
    body = read_bodies(pose, "the pose")
    if len(body) not in (1, len(image)):
        raise TruePoseError(f"the pose has {len(body)} frames and the image {len(image)} pictures; expected as many")
    how = "from keypoints, without a model"
    refine = has_opencv()
    if not refine:
        how += ", by shapes alone (without OpenCV)"
        say_once(
            "Human Parsing guesses the person's outline from shapes alone. Better: install OpenCV "
            f"({sys.executable} -m pip install opencv-python-headless) and restart ComfyUI, or choose a parser"
        )
    return parse_from_keypoints(image, body.expand(len(image), -1, -1), refine=refine), how


def shares(parsing: HumanParsing) -> str:
    """How much of the picture each region takes, in words."""
    means = parsing.masks.float().mean((0, 2, 3)).tolist()
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in zip(REGION_NAMES[1:], means[1:], strict=True))


class HumanParsingNode(io.ComfyNode):
    """IMAGE -> TRUEPOSE_PARSING, MASK, IMAGE, STRING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseHumanParsing",
            display_name="Human Parsing",
            description="Finds face, hair, clothes, skin and accessories of the person in a photo.",
            search_aliases=["SCHP", "ATR", "LIP", "SegFormer clothes", "segmentation", "clothes mask", "person mask"],
            inputs=[
                io.Image.Input("image", tooltip="Photos with one person each, of any size."),
                io.Combo.Input(
                    "parser",
                    options=parser_options(),
                    default=KEYPOINTS,
                    tooltip=(
                        "What finds the regions: a network in models/truepose, SCHP's two networks merged (the best "
                        "for neck and arms), or shapes on the keypoints, which need no file and are less exact."
                    ),
                ),
                PoseKeypoint.Input(
                    "pose",
                    optional=True,
                    tooltip="The pose in the same image. Only 'from keypoints' uses it; it takes the largest person.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="Whether a parser marked (download) may be fetched. Off: it says which file to put where.",
                ),
                *(
                    io.Boolean.Input(name, default=name != "background", tooltip=f"Whether the mask covers the {name}.")
                    for name in REGION_NAMES
                ),
                supported(
                    io.Combo.Input,
                    id="provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="What computes the network. auto: the GPU where onnxruntime can use it, else the CPU.",
                ),
                supported(
                    io.Boolean.Input,
                    id="keep_loaded",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Whether the network stays in memory for the next run. Off frees it.",
                ),
            ],
            outputs=[
                Parsing.Output(display_name="parsing", tooltip="Which region of the person each pixel shows."),
                io.Mask.Output(display_name="mask", tooltip="The chosen regions together."),
                io.Image.Output(
                    display_name="preview",
                    tooltip=(
                        "The regions in colours: face red, hair pink, upper blue, lower green, skin orange, accessory "
                        "yellow."
                    ),
                ),
                io.String.Output(
                    display_name="info", tooltip="Which file computed it, on what, and how large each region is."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, parser: str | None = None) -> bool | str:
        # A saved choice of "NAME (download)" is no longer in the list once the file is there.
        if parser is None or parser in parser_options() or parser_name(parser) in BUILT_IN:
            return True
        return f"there is no parser {parser!r}; choose one of: {', '.join(parser_options())}"

    @classmethod
    def fingerprint_inputs(cls, parser: str | None = None, **_: object) -> str:
        if parser in (None, KEYPOINTS):
            return ""
        name, folders = parser_name(parser), host_files.folders()
        known_names = ATR_LIP_PARTS if name == ATR_LIP else (name,) if name in BUILT_IN else ()
        paths = [find(part, folders) for part in known_names] or [folder / name for folder in folders]
        return " ".join(_stamp(path.with_suffix(end)) for path in paths if path for end in (".onnx", ".json"))

    @classmethod
    def execute(
        cls,
        image: Tensor,
        parser: str = KEYPOINTS,
        pose: object = None,
        download: bool = False,
        provider: str = "auto",
        keep_loaded: bool = True,
        **chosen: bool,
    ) -> io.NodeOutput:
        pictures = to_core(image, "the image").cpu()
        try:
            if parser == KEYPOINTS:
                parsing, how = from_keypoints(pictures, pose)
            else:
                parsing, how = from_onnx(pictures, parser, provider, download)
        finally:
            if not keep_loaded:
                close_sessions()
        empty = [number for number in range(parsing.batch) if parsing[number].is_empty]
        if len(empty) == parsing.batch:
            raise TruePoseError(
                f"nobody is found in the image ({how}); give a photo in which a person is large and whole, or crop it "
                "with Frame Person"
            )
        if empty:
            _log.warning("Human Parsing finds nobody in pictures %s of the batch", ", ".join(map(str, empty)))
        wanted = [name for name in REGION_NAMES if chosen.get(name, name != "background")]
        mask = parsing.mask(wanted) if wanted else torch.zeros_like(parsing.masks[:, 0])
        info = f"{how}: {shares(parsing)}"
        _log.info("Human Parsing %s", info)
        preview, face = shown(parsing, cls)
        return io.NodeOutput(parsing, mask, preview, info, ui=face)


def _stamp(path: Path) -> str:
    return f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" if path.is_file() else ""


NODES = [HumanParsingNode]
