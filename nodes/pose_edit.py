"""Retarget Pose, Interpolate Poses, Transform Pose, Edit Pose."""

from __future__ import annotations

from comfy_api.latest import io

from truepose_core.errors import TruePoseError
from truepose_core.pose import Person, Pose, read_pose
from truepose_core.pose.edit import ABOUT, FOLLOW, edit_joint, interpolate_poses, mirror_pose, transform_pose
from truepose_core.pose.keypoints import BODY_KEYPOINTS
from truepose_core.pose.retarget import (
    ANCHORS,
    SIZES,
    missing_parts,
    retarget_as_shown,
    retarget_pose,
    retarget_video,
)

from .host.checks import warn_on_node
from .pose import LARGEST_SIDE, each_frame, person_index, person_input, pose_outputs, pose_result
from .schema import PoseKeypoint, schema, supported

ONE_PERSON, EVERYBODY, VIDEO = "one person", "everybody by index", "one person in a video"
WHOLE_POSE, AS_SOURCE = "whole pose", "what the source shows"
SHOWS = (WHOLE_POSE, AS_SOURCE)
MOVE_BY, MOVE_TO = "by", "to"


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
                supported(
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
        chosen = {"target_person": person_index(target_person), "source_person": person_index(source_person)}
        if shows == AS_SOURCE and people != ONE_PERSON:
            raise TruePoseError(f"shows {AS_SOURCE!r} is for one person; set people to {ONE_PERSON!r}")
        if shows == WHOLE_POSE and people != EVERYBODY:
            tell_missing(sources[0].person(chosen["source_person"]), read_pose(target)[0], chosen["target_person"])
        if people == VIDEO:
            if len(sources) != 1:
                raise TruePoseError(f"the source has {len(sources)} frames; for a video expected one")
            return pose_result(retarget_video(read_pose(target), sources[0], **chosen, anchor=anchor, size=size), cls)
        if len(sources) not in (1, count):
            raise TruePoseError(f"the target has {count} frames and the source {len(sources)}; expected 1 or {count}")
        own = iter(sources * count if len(sources) == 1 else sources)
        if shows == AS_SOURCE:
            return pose_result(each_frame(target, lambda pose: retarget_as_shown(pose, next(own), **chosen)), cls)
        return pose_result(
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
        return pose_result(interpolate_poses(ends["first"][0], ends["second"][0], steps), cls)


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
            one = mirror_pose(one, person_index(person)) if mirror else one
            # Nothing to scale, no need for the joints that scaling goes about.
            fixed = about if scale != 1 else "centre"
            return transform_pose(one, scale=scale, move=(move_x, move_y), about=fixed, person=person_index(person))

        return pose_result(each_frame(pose, change), cls)


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
            return edit_joint(one, joint, **place, follow=children, person=person_index(person))

        return pose_result(each_frame(pose, change), cls)


NODES = [RetargetPose, InterpolatePoses, TransformPose, EditPose]
