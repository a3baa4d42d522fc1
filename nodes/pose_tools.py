"""Estimate Pose, Retarget Pose, Interpolate Poses, Transform Pose, Edit Pose, Pose Gallery."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.networks.known import KNOWN, by_hand, find
from truepose_core.networks.onnx import PROVIDERS, check_runtime
from truepose_core.pose import Person, Pose, read_pose, write_pose
from truepose_core.pose.edit import ABOUT, FOLLOW, edit_joint, interpolate_poses, mirror_pose, transform_pose
from truepose_core.pose.estimation import DETECTOR_MODEL, POSE_MODEL, THRESHOLD, choose_estimator, estimate_pose
from truepose_core.pose.gallery import FILL, NAMES, gallery_pose
from truepose_core.pose.keypoints import BODY_KEYPOINTS
from truepose_core.pose.retarget import (
    ANCHORS,
    SIZES,
    missing_parts,
    retarget_as_shown,
    retarget_pose,
    retarget_video,
)
from truepose_core.pose.skeleton import draw_pose

from .host import files as host_files
from .host.checks import warn_on_node
from .schema import PoseKeypoint, known, schema, to_core, to_host, to_mask

ALL_PEOPLE, WHOLE_PICTURE = "all people", "whole picture"
ONE_PERSON, EVERYBODY, VIDEO = "one person", "everybody by index", "one person in a video"
WHOLE_POSE, AS_SOURCE = "whole pose", "what the source shows"
SHOWS = (WHOLE_POSE, AS_SOURCE)
MOVE_BY, MOVE_TO = "by", "to"
LARGEST_SIDE = 16384
# How bright the photo shows behind the skeleton on the node.
DIMMED = 0.4


def drawn(poses: list[Pose]) -> Tensor:
    """The skeletons as IMAGE, one per frame, at the size of the first frame's canvas."""
    height, width = poses[0].height, poses[0].width
    return to_host(torch.cat([draw_pose(pose, height, width) for pose in poses]))


def finished(poses: list[Pose], cls: type[io.ComfyNode]) -> io.NodeOutput:
    """POSE_KEYPOINT, the drawn skeletons, and the same on the node."""
    image = drawn(poses)
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


def index(person: int) -> int | None:
    """-1 is the core's None: the largest person, or everybody."""
    return None if person < 0 else person


def pose_outputs(what: str) -> list[io.Output]:
    return [
        PoseKeypoint.Output(display_name="pose", tooltip=what),
        io.Image.Output(display_name="image", tooltip="The skeletons drawn, for an OpenPose ControlNet."),
    ]


def person_input(id: str, default_is: str, whose: str) -> io.Input:
    return io.Int.Input(id, default=-1, min=-1, max=99, tooltip=f"Which person of {whose}, from 0. -1: {default_is}.")


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
                known(
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
        skeletons = drawn(poses)
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


class RetargetPose(io.ComfyNode):
    """POSE_KEYPOINT, POSE_KEYPOINT -> POSE_KEYPOINT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseRetargetPose",
            display_name="Retarget Pose",
            description=(
                "The target's pose on the proportions of the source person: lengths of arms, legs and trunk, width of "
                "shoulders and hips, size of the head. Foreshortening stays."
            ),
            search_aliases=["proportions", "bone lengths", "align pose", "rescale pose"],
            inputs=[
                PoseKeypoint.Input("target", tooltip="The pose wanted."),
                PoseKeypoint.Input("source", tooltip="The pose of the source image: whose proportions are taken."),
                io.Combo.Input(
                    "anchor",
                    options=list(ANCHORS),
                    default="feet",
                    tooltip="What stays where it is: the foot that is lower, or the hips.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default="target",
                    tooltip=(
                        "target: the person stays as tall as the target's. source: becomes as tall, in heights of the "
                        "picture, as in the source image."
                    ),
                ),
                io.Combo.Input(
                    "people",
                    options=[ONE_PERSON, EVERYBODY, VIDEO],
                    default=ONE_PERSON,
                    tooltip=(
                        f"{ONE_PERSON}: the others stay. {EVERYBODY}: person 0 of the target gets the proportions of "
                        f"person 0 of the source, and so on. {VIDEO}: the frames show one person, whose proportions "
                        "are measured over all of them and do not flicker."
                    ),
                ),
                person_input("target_person", "the largest", "the target"),
                person_input("source_person", "the largest", "the source"),
                known(
                    io.Combo.Input,
                    id="shows",
                    options=list(SHOWS),
                    default=WHOLE_POSE,
                    optional=True,
                    tooltip=(
                        f"{WHOLE_POSE}: all of it, where the source is cut too. {AS_SOURCE}: as large and as far cut "
                        "as the person in the source, for portraits; anchor and size are not read."
                    ),
                ),
            ],
            outputs=pose_outputs("The target's pose on the source's proportions."),
        )

    @classmethod
    def execute(
        cls,
        target: object,
        source: object,
        anchor: str = "feet",
        size: str = "target",
        people: str = ONE_PERSON,
        target_person: int = -1,
        source_person: int = -1,
        shows: str = WHOLE_POSE,
    ) -> io.NodeOutput:
        sources = read_pose(source)
        count = len(read_pose(target))
        chosen = {"target_person": index(target_person), "source_person": index(source_person)}
        if shows == AS_SOURCE and people != ONE_PERSON:
            raise TruePoseError(f"shows {AS_SOURCE!r} is for one person; set people to {ONE_PERSON!r}")
        if shows == WHOLE_POSE and people != EVERYBODY:
            tell_missing(sources[0].person(chosen["source_person"]), read_pose(target)[0], chosen["target_person"])
        if people == VIDEO:
            if len(sources) != 1:
                raise TruePoseError(f"the source has {len(sources)} frames; for a video expected one")
            return finished(retarget_video(read_pose(target), sources[0], **chosen, anchor=anchor, size=size), cls)
        if len(sources) not in (1, count):
            raise TruePoseError(f"the target has {count} frames and the source {len(sources)}; expected 1 or {count}")
        own = iter(sources * count if len(sources) == 1 else sources)
        if shows == AS_SOURCE:
            return finished(each_frame(target, lambda pose: retarget_as_shown(pose, next(own), **chosen)), cls)
        return finished(
            each_frame(
                target,
                lambda pose: retarget_pose(
                    pose, next(own), **chosen, everybody=people == EVERYBODY, anchor=anchor, size=size
                ),
            ),
            cls,
        )


def tell_missing(source: Person, target: Pose, person: int | None) -> None:
    """Warn where a pose has parts that its source does not show."""
    missing = missing_parts(source)
    wanted = missing_parts(target.person(person))
    made_up = [part for part in missing if part not in wanted]
    if made_up:
        warn_on_node(
            f"the source shows no {', no '.join(made_up)}, and the pose has them: they will be made up. Set shows to "
            f"{AS_SOURCE!r} to keep to what the source shows"
        )


class InterpolatePoses(io.ComfyNode):
    """POSE_KEYPOINT, POSE_KEYPOINT -> POSE_KEYPOINT of n frames."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseInterpolatePoses",
            display_name="Interpolate Poses",
            description=(
                "The way from one pose to another, frame by frame: each limb turns the shortest way round, and its "
                "length changes evenly."
            ),
            search_aliases=["pose sequence", "animate pose", "in-between", "tween"],
            inputs=[
                PoseKeypoint.Input("first", tooltip="The pose of the first frame."),
                PoseKeypoint.Input("second", tooltip="The pose of the last frame, on a canvas of the same size."),
                io.Int.Input(
                    "steps", default=8, min=2, max=1024, tooltip="How many frames, the two poses themselves included."
                ),
            ],
            outputs=pose_outputs("One pose per frame."),
        )

    @classmethod
    def execute(cls, first: object, second: object, steps: int = 8) -> io.NodeOutput:
        ends = {"first": read_pose(first), "second": read_pose(second)}
        for name, poses in ends.items():
            if len(poses) != 1:
                raise TruePoseError(f"the {name} pose has {len(poses)} frames; expected one")
        return finished(interpolate_poses(ends["first"][0], ends["second"][0], steps), cls)


class TransformPose(io.ComfyNode):
    """POSE_KEYPOINT -> POSE_KEYPOINT, mirrored, moved, scaled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseTransformPose",
            display_name="Transform Pose",
            description="Mirrors, scales and moves a pose, hands and face included.",
            search_aliases=["flip pose", "mirror pose", "scale pose", "move pose"],
            inputs=[
                PoseKeypoint.Input("pose", tooltip="The pose to change; every frame is changed alike."),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Left and right change places, as in a mirror: of the whole canvas, or of one person.",
                ),
                io.Float.Input("scale", default=1.0, min=0.05, max=10.0, step=0.01, tooltip="Size; 1 changes nothing."),
                io.Combo.Input(
                    "about",
                    options=list(ABOUT),
                    default="feet",
                    tooltip="What stays where it is when the size changes.",
                ),
                *(
                    io.Float.Input(
                        f"move_{axis}",
                        default=0.0,
                        min=-2.0,
                        max=2.0,
                        step=0.01,
                        tooltip=f"How far to move {way}, in {what} of the canvas.",
                    )
                    for axis, way, what in (("x", "to the right", "widths"), ("y", "down", "heights"))
                ),
                person_input("person", "everybody", "the pose"),
            ],
            outputs=pose_outputs("The changed pose, on the same canvas."),
        )

    @classmethod
    def execute(
        cls,
        pose: object,
        mirror: bool = False,
        scale: float = 1.0,
        about: str = "feet",
        move_x: float = 0.0,
        move_y: float = 0.0,
        person: int = -1,
    ) -> io.NodeOutput:
        def change(one: Pose) -> Pose:
            one.largest()
            one = mirror_pose(one, index(person)) if mirror else one
            # Nothing to scale, no need for the joints that scaling goes about.
            fixed = about if scale != 1 else "centre"
            return transform_pose(one, scale=scale, move=(move_x, move_y), about=fixed, person=index(person))

        return finished(each_frame(pose, change), cls)


class EditPose(io.ComfyNode):
    """POSE_KEYPOINT -> POSE_KEYPOINT with one joint elsewhere."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseEditPose",
            display_name="Edit Pose",
            description="Moves one joint of a person; what hangs on it can follow.",
            search_aliases=["move joint", "fix pose", "pose editor"],
            inputs=[
                PoseKeypoint.Input("pose", tooltip="The pose to change; every frame is changed alike."),
                io.Combo.Input(
                    "joint",
                    options=list(BODY_KEYPOINTS),
                    default="r_wrist",
                    tooltip="r_ and l_ are the person's own right and left.",
                ),
                io.Combo.Input(
                    "move",
                    options=[MOVE_BY, MOVE_TO],
                    default=MOVE_BY,
                    tooltip="by: x and y are a distance. to: they are the joint's new place; a missing joint appears.",
                ),
                *(
                    io.Float.Input(
                        axis,
                        default=0.0,
                        min=-LARGEST_SIDE,
                        max=LARGEST_SIDE,
                        step=1.0,
                        tooltip=f"Pixels of the canvas, {way}.",
                    )
                    for axis, way in (("x", "to the right"), ("y", "down"))
                ),
                io.Combo.Input(
                    "children",
                    options=list(FOLLOW),
                    default=FOLLOW[0],
                    tooltip=(
                        "What hangs on the joint, for an elbow the forearm and the hand: turns along as if the upper "
                        "arm swung, moves along without turning, or stays."
                    ),
                ),
                person_input("person", "the largest", "the pose"),
            ],
            outputs=pose_outputs("The changed pose."),
        )

    @classmethod
    def execute(
        cls,
        pose: object,
        joint: str = "r_wrist",
        move: str = MOVE_BY,
        x: float = 0.0,
        y: float = 0.0,
        children: str = FOLLOW[0],
        person: int = -1,
    ) -> io.NodeOutput:
        def change(one: Pose) -> Pose:
            place = {move: (x / one.width, y / one.height)}
            return edit_joint(one, joint, **place, follow=children, person=index(person))

        return finished(each_frame(pose, change), cls)


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
        return finished([mirror_pose(pose) if mirror else pose], cls)


NODES = [EstimatePose, RetargetPose, InterpolatePoses, TransformPose, EditPose, PoseGallery]
