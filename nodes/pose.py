"""Load Pose, Draw Skeleton, Estimate Pose and Pose Gallery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json
from truepose_core.networks.known import KNOWN, by_hand, find
from truepose_core.networks.onnx import PROVIDERS, check_runtime
from truepose_core.pose import Pose, read_pose, write_pose
from truepose_core.pose.edit import mirror_pose
from truepose_core.pose.estimation import DETECTOR_MODEL, POSE_MODEL, THRESHOLD, choose_estimator, estimate_pose
from truepose_core.pose.gallery import FILL, NAMES, gallery_pose
from truepose_core.pose.skeleton import draw_pose

from .host import files as host_files
from .schema import PoseKeypoint, schema, supported, to_core, to_host, to_mask

PASTED = "(pasted below)"
ALL_PEOPLE, WHOLE_PICTURE = "all people", "whole picture"
LARGEST_SIDE = 16384
# How bright the photo shows behind the skeleton on the node.
DIMMED = 0.4


def draw_frames(poses: list[Pose]) -> Tensor:
    """The skeletons as IMAGE, one per frame, at the size of the first frame's canvas."""
    height, width = poses[0].height, poses[0].width
    return to_host(torch.cat([draw_pose(pose, height, width) for pose in poses]))


def pose_result(poses: list[Pose], cls: type[io.ComfyNode]) -> io.NodeOutput:
    """POSE_KEYPOINT, the drawn skeletons, and the same on the node."""
    image = draw_frames(poses)
    return io.NodeOutput(write_pose(poses), image, ui=ui.PreviewImage(image, cls=cls))


def each_frame(pose: object, change: Callable[[Pose], Pose]) -> list[Pose]:
    """Every frame of POSE_KEYPOINT changed; an error says which frame it was."""
    poses = read_pose(pose)
    changed = []
    for number, one in enumerate(poses):
        try:
            changed.append(change(one))
        except TruePoseError as error:
            raise TruePoseError(f"frame {number}: {error}" if len(poses) > 1 else str(error)) from error
    return changed


def person_index(person: int) -> int | None:
    """-1 is the core's None: the largest person, or everybody."""
    return None if person < 0 else person


def pose_outputs(what: str) -> list[io.Output]:
    return [
        PoseKeypoint.Output(display_name="pose", tooltip=what),
        io.Image.Output(display_name="image", tooltip="The skeletons drawn, for an OpenPose ControlNet."),
    ]


def person_input(id: str, default_is: str, whose: str) -> io.Input:
    return io.Int.Input(id, default=-1, min=-1, max=99, tooltip=f"Which person of {whose}, from 0. -1: {default_is}.")


def pose_files() -> list[str]:
    """JSON files in the host's input folder, sub-folders included, as paths relative to it."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.json"))


class LoadPose(io.ComfyNode):
    """OpenPose JSON -> POSE_KEYPOINT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadPose",
            display_name="Load Pose",
            description=(
                "Reads keypoints from an OpenPose JSON file or from pasted JSON. Tolerates what different tools write."
            ),
            search_aliases=["openpose json", "keypoints"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[PASTED, *pose_files()],
                    default=PASTED,
                    tooltip="A JSON file in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "json",
                    default="",
                    multiline=True,
                    placeholder='[{"canvas_width": 512, ...}]',
                    tooltip="OpenPose JSON, read when no file is chosen.",
                ),
            ],
            outputs=[
                PoseKeypoint.Output(display_name="pose", tooltip="The keypoints of every frame, in pixels."),
                io.Int.Output(display_name="width", tooltip="Width of the first frame's canvas in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of the first frame's canvas in pixels."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, json: str | None = None) -> str:
        if not file or file == PASTED:
            return f"text {json}"
        path = cls._path(file)
        return f"{path} {path.stat().st_mtime_ns if path.is_file() else 'missing'}"

    @classmethod
    def _path(cls, file: str) -> Path:
        folder = Path(folder_paths.get_input_directory()).resolve()
        path = (folder / file).resolve()
        if not path.is_relative_to(folder):
            raise TruePoseError(f"pose file {file!r} is outside ComfyUI's input folder; copy it there")
        return path

    @classmethod
    def execute(cls, file: str = PASTED, json: str = "") -> io.NodeOutput:
        poses = read_pose(pasted(json)) if file == PASTED else read_pose(cls._path(file))
        first = poses[0]
        face = ui.PreviewImage(to_host(draw_pose(first, first.height, first.width)), cls=cls)
        return io.NodeOutput(write_pose(poses), first.width, first.height, ui=face)


def pasted(text: str) -> object:
    """The pasted text as an object. Raises with the place of the mistake."""
    if not text.strip():
        raise TruePoseError("no pose was given; choose a file from the input folder or paste OpenPose JSON")
    return parse_json(text, "the pasted pose")


class DrawSkeleton(io.ComfyNode):
    """POSE_KEYPOINT -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseDrawSkeleton",
            display_name="Draw Skeleton",
            description="Draws keypoints as OpenPose ControlNets expect them, smooth at any size.",
            search_aliases=["openpose image", "render pose", "keypoints to image"],
            inputs=[
                PoseKeypoint.Input("pose", tooltip="Keypoints from Load Pose, OpenPose, DWPose or SDPose."),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Width of the picture in pixels; 0 takes the canvas's.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Height of the picture in pixels; 0 takes the canvas's.",
                ),
                io.Boolean.Input("hands", default=True, tooltip="Draw hands where they are known."),
                io.Boolean.Input("face", default=True, tooltip="Draw face points where they are known."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="One picture per frame. Connect it to an OpenPose ControlNet.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, pose: object, width: int = 0, height: int = 0, hands: bool = True, face: bool = True
    ) -> io.NodeOutput:
        poses = read_pose(pose)
        for number, one in enumerate(poses):
            if not any(person.is_visible for person in one.people):
                raise TruePoseError(
                    f"frame {number} of the pose shows nobody; expected a person with visible keypoints"
                )
        size = (height or poses[0].height, width or poses[0].width)
        image = to_host(torch.cat([draw_pose(one, *size, hands=hands, face=face) for one in poses]))
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class EstimatePose(io.ComfyNode):
    """IMAGE -> POSE_KEYPOINT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseEstimatePose",
            display_name="Estimate Pose",
            description="Finds the keypoints of the people in a photo with DWPose: body, hands and face.",
            search_aliases=["DWPose", "openpose preprocessor", "keypoints", "pose detection"],
            inputs=[
                io.Image.Input("image", tooltip="Photos of people."),
                io.Combo.Input(
                    "find",
                    options=[ALL_PEOPLE, WHOLE_PICTURE],
                    default=ALL_PEOPLE,
                    tooltip=(
                        f"{ALL_PEOPLE}: a detector finds them, the largest comes first. {WHOLE_PICTURE}: one person "
                        "who fills it; needs no detector."
                    ),
                ),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.05,
                    max=0.95,
                    step=0.05,
                    tooltip="How sure the networks must be of a person and of a keypoint; the rest is left out.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip="Whether networks that are not there may be fetched. Off: it says which file to put where.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="A mask of the one person wanted; the box around it is read, and nobody is detected.",
                ),
                supported(
                    io.Combo.Input,
                    id="provider",
                    options=["auto", *PROVIDERS],
                    default="auto",
                    optional=True,
                    advanced=True,
                    tooltip="What computes the networks. auto: the GPU where onnxruntime can use it, else the CPU.",
                ),
            ],
            outputs=[
                *pose_outputs("The keypoints of everybody in every picture, in pixels, the largest person first."),
                io.Int.Output(display_name="people", tooltip="How many people the first picture shows."),
                io.String.Output(display_name="info", tooltip="What computed the pose."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        find: str = ALL_PEOPLE,
        threshold: float = THRESHOLD,
        download: bool = False,
        mask: Tensor | None = None,
        provider: str = "auto",
    ) -> io.NodeOutput:
        pixels = to_core(image, "the image").cpu()
        boxes = [None] * len(pixels) if mask is None else mask_boxes(mask, pixels)
        detect = find == ALL_PEOPLE and mask is None
        estimator = open_networks(detect, provider, download)
        poses = []
        for number in host_files.steps(len(pixels)):
            try:
                poses += estimate_pose(pixels[number : number + 1], estimator, box=boxes[number], threshold=threshold)
            except TruePoseError as error:
                raise TruePoseError(str(error).replace("picture 0", f"picture {number}")) from error
        skeletons = draw_frames(poses)
        face = torch.maximum(skeletons, DIMMED * to_host(pixels))
        return io.NodeOutput(
            write_pose(poses),
            skeletons,
            len(poses[0].people),
            estimator.description,
            ui=ui.PreviewImage(face, cls=cls),
        )


def open_networks(detect: bool, provider: str, download: bool) -> object:
    """The estimator; what is missing is named, with the switch that fetches it."""
    check_runtime(provider)
    folders = host_files.folders()
    for name in (POSE_MODEL, DETECTOR_MODEL) if detect else (POSE_MODEL,):
        if not download and find(name, folders) is None:
            other = f", or find: {WHOLE_PICTURE!r}, which needs no detector" if name == DETECTOR_MODEL else ""
            raise TruePoseError(
                f"the network {name} is not there yet. {by_hand(KNOWN[name], folders[0])}; or switch download on in "
                f"this node{other}"
            )
    return choose_estimator(
        folders, detect=detect, provider=provider, download=download, progress=host_files.download_progress()
    )


def mask_boxes(mask: Tensor, image: Tensor) -> list[tuple[float, float, float, float]]:
    """The box (left, top, right, bottom) around each mask, for an image [B, 3, H, W]."""
    masks = to_mask(mask, "the mask")
    if masks.shape[1:] != image.shape[2:]:
        raise TruePoseError(
            f"the mask is {masks.shape[2]}x{masks.shape[1]} and the image {image.shape[3]}x{image.shape[2]} "
            "(width x height); expected the same size"
        )
    if len(masks) not in (1, len(image)):
        raise TruePoseError(f"there are {len(masks)} masks and {len(image)} pictures; expected 1 or as many")
    boxes = []
    for number, one in enumerate(masks):
        rows, columns = (one > 0.5).any(1).nonzero().flatten(), (one > 0.5).any(0).nonzero().flatten()
        if not len(rows):
            raise TruePoseError(f"mask {number} is empty; paint over the person whose pose is wanted")
        boxes.append((float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1))
    return boxes * len(image) if len(boxes) == 1 else boxes


class PoseGallery(io.ComfyNode):
    """A ready pose -> POSE_KEYPOINT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePosePoseGallery",
            display_name="Pose Gallery",
            description="Ready poses: standing, walking, sitting, from the front, the side and behind.",
            search_aliases=["preset pose", "pose library", "openpose template"],
            inputs=[
                io.Combo.Input("name", options=list(NAMES), default=NAMES[0], tooltip="The pose; the node shows it."),
                *(
                    io.Int.Input(
                        side,
                        default=default,
                        min=64,
                        max=LARGEST_SIDE,
                        step=8,
                        tooltip=f"The canvas's {side} in pixels.",
                    )
                    for side, default in (("width", 512), ("height", 768))
                ),
                io.Float.Input(
                    "fill",
                    default=FILL,
                    min=0.1,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the canvas's height somebody takes who stands. All poses are as large.",
                ),
                io.Boolean.Input("mirror", default=False, tooltip="The pose as in a mirror."),
            ],
            outputs=pose_outputs("The pose, one person with the body's 18 keypoints."),
        )

    @classmethod
    def execute(
        cls, name: str = NAMES[0], width: int = 512, height: int = 768, fill: float = FILL, mirror: bool = False
    ) -> io.NodeOutput:
        pose = gallery_pose(name, width, height, fill)
        return pose_result([mirror_pose(pose) if mirror else pose], cls)


NODES = [LoadPose, DrawSkeleton, EstimatePose, PoseGallery]
