"""Load Pose and Draw Skeleton."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json
from truepose_core.pose import read_pose, write_pose
from truepose_core.pose.skeleton import draw_pose

from .schema import PoseKeypoint, schema, to_host

PASTED = "(pasted below)"


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


NODES = [LoadPose, DrawSkeleton]
