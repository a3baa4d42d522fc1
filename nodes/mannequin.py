"""Mannequin: a person with exact parsing, keypoints and depth, made from a number, so that examples need no file."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import (
    VIEWS,
    BodyPoses,
    Rendering,
    axis_angle_to_matrix,
    matrix_to_axis_angle,
    ready_poses,
    render,
    sample_identities,
    sample_poses,
)
from truepose_core.mannequin.world import split_seed
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, write_pose
from truepose_core.regions import Region

from .schema import Parsing, PoseKeypoint, schema, to_host

# Written out, so that a schema computes nothing.
READY_POSES = ("stand", "turn", "akimbo", "wave", "walk", "arms up", "kick", "side", "back", "sit")
RANDOM = "random"
AS_POSED = "as in the pose"
YAW = {"front": 0.0, "side": 90.0, "back": 180.0}
"""Degrees about the upright axis, by the names of `VIEWS`."""

LARGEST = 2**32 - 1
# The bundled model was trained on the other split: it has seen nobody that this node shows.
WORLD = split_seed("test", 0)


def facing(poses: BodyPoses, yaw: float) -> BodyPoses:
    """The poses turned about the upright axis until the pelvis faces `yaw` degrees: 0 the camera, 90 the right."""
    pelvis = axis_angle_to_matrix(poses.theta[:, 0])
    turn = math.radians(yaw) - torch.atan2(-pelvis[:, 2, 0], pelvis[:, 0, 0])
    upright = torch.stack([torch.zeros_like(turn), turn, torch.zeros_like(turn)], -1)
    theta = poses.theta.clone()
    theta[:, 0] = matrix_to_axis_angle(axis_angle_to_matrix(upright) @ pelvis)
    return BodyPoses(theta, poses.camera)


def chosen_pose(pose: str, pose_seed: int, view: str) -> BodyPoses:
    """One pose: a ready pose by name, or a random one of that number. Raises for names that are not offered."""
    if view != AS_POSED and view not in VIEWS:
        raise TruePoseError(f"view is {view!r}; expected {AS_POSED!r} or one of {', '.join(VIEWS)}")
    if pose == RANDOM:
        return sample_poses([pose_seed], WORLD, None if view == AS_POSED else view)
    if pose not in READY_POSES:
        raise TruePoseError(f"pose is {pose!r}; expected {RANDOM!r} or one of {', '.join(READY_POSES)}")
    ready = ready_poses()[pose]
    return ready if view == AS_POSED else facing(ready, YAW[view])


def keypoints(rendering: Rendering) -> list[dict]:
    """POSE_KEYPOINT of the people shown, one frame for each."""
    height, width = rendering.image.shape[2:]
    return write_pose([Pose(width, height, (Person(body.numpy()),)) for body in rendering.keypoints])


def grey(values: Tensor) -> Tensor:
    """[B, 1, H, W] -> IMAGE [B, H, W, 3]."""
    return to_host(values.expand(-1, 3, -1, -1))


class Mannequin(io.ComfyNode):
    """A number and a pose -> IMAGE, TRUEPOSE_PARSING, POSE_KEYPOINT, MASK, depth IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseMannequin",
            display_name="Mannequin",
            description=(
                "A dressed figure in any pose, with its parsing, keypoints, mask and depth. A source or target that "
                "needs no file."
            ),
            search_aliases=["test person", "example person", "dummy", "figure"],
            inputs=[
                # Never drawn anew by the page: the person is a choice, and changing it reads the source again.
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=LARGEST,
                    control_after_generate=False,
                    tooltip="Who it is: face, hair, body and clothes. Another number is another person.",
                ),
                io.Combo.Input(
                    "pose",
                    options=[*READY_POSES, RANDOM],
                    default="stand",
                    tooltip="How the figure stands. random: a pose for each pose_seed.",
                ),
                io.Int.Input(
                    "pose_seed",
                    default=0,
                    min=0,
                    max=LARGEST,
                    control_after_generate=False,
                    tooltip="Which random pose. Has no effect with a named pose.",
                ),
                io.Combo.Input(
                    "view",
                    options=[AS_POSED, *VIEWS],
                    default=AS_POSED,
                    tooltip="From where the figure is seen. as in the pose: as named poses are meant to be seen.",
                ),
                io.Int.Input(
                    "width",
                    default=384,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Width of the picture in pixels. The bundled demo model works at 96 x 128.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=16,
                    max=4096,
                    step=8,
                    tooltip="Height of the picture in pixels. The figure fills most of it.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The figure in front of a plain background."),
                Parsing.Output(
                    display_name="parsing", tooltip="Which region of the figure each pixel shows, without any error."
                ),
                PoseKeypoint.Output(display_name="pose", tooltip="Its 18 body keypoints, in pixels of the picture."),
                io.Mask.Output(display_name="mask", tooltip="The figure: 1 on it, 0 in the background."),
                io.Image.Output(
                    display_name="depth",
                    tooltip="Near is white, background is black. Fits depth ControlNets.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        seed: int = 0,
        pose: str = "stand",
        pose_seed: int = 0,
        view: str = AS_POSED,
        width: int = 384,
        height: int = 512,
    ) -> io.NodeOutput:
        posed = chosen_pose(pose, pose_seed, view)
        shown = render(sample_identities([seed], WORLD), posed, height, width)
        image = to_host(shown.image)
        mask = 1 - shown.parsing[:, Region.BACKGROUND]
        return io.NodeOutput(
            image,
            HumanParsing(shown.parsing),
            keypoints(shown),
            mask,
            grey(shown.depth),
            ui=ui.PreviewImage(image, cls=cls),
        )


NODES = [Mannequin]
