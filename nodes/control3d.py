"""Apply 3D Guidance: what no 2D pose says, who is in front."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.alignment.control3d import framed_body, target_bodies
from truepose_core.body.person import PosedBody
from truepose_core.body.pose import BodyPose
from truepose_core.errors import TruePoseError

from .body import BodyType
from .host import control3d as host_control3d
from .host import features as host_features
from .host import model as host_model
from .host import unet as host_unet
from .schema import (
    ADAPTER_HINT,
    Adapter,
    PoseKeypoint,
    Source,
    percent_window,
    read_bodies,
    schema,
    unconditional_input,
)


class Apply3DGuidance(io.ComfyNode):
    """MODEL, TRUEPOSE_SOURCE, TRUEPOSE_BODY or POSE_KEYPOINT -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseApply3DGuidance",
            display_name="Apply 3D Guidance",
            description=(
                "Tells a TruePose model with 3D guidance where the new body is in depth: what is in front, which way "
                "it is turned."
            ),
            search_aliases=["relative depth guidance", "SMPL", "depth order", "control3d"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The target_net of Load TruePose Model, before or after the other Apply nodes."
                ),
                Source.Input("source", tooltip="From SourceNet Encode, the same as for Apply HPFA."),
                BodyType.Input(
                    "target_body",
                    optional=True,
                    tooltip="The new body, from Load Body Pose or Body Pose from Keypoints: it says what is in front.",
                ),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip=(
                        "The new pose. Without target_body a body is lifted from it, with the source's shape: what the "
                        "keypoints leave open is then guessed."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor lambda of what is added. 0 is exactly the model without the node.",
                ),
                *percent_window("the guidance works"),
                unconditional_input(
                    "drop: the negative prompt reads the body, but nothing of the source. keep: both read both."
                ),
                Adapter.Input("adapter", optional=True, tooltip=ADAPTER_HINT),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with 3D guidance. Connect it to Apply HPFA or a sampler."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        source: host_features.HostFeatures,
        target_body: PosedBody | None = None,
        target_pose: object = None,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        unconditional: str = "drop",
        adapter: host_model.Adapter | None = None,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        adapter = host_model.adapter_of(model, adapter)
        if adapter is None or adapter.control_query is None:
            raise TruePoseError(
                "this model was trained without 3D guidance; load a TruePose model that has it, or leave this node out"
            )
        if source.family != adapter.config.family:
            raise TruePoseError(
                f"the source was read with a {source.family} model, and this is a {adapter.config.family} model; "
                "connect the source_net of the same Load TruePose Model to SourceNet Encode"
            )
        if strength == 0:
            return io.NodeOutput(model)
        keypoints = None if target_pose is None else read_bodies(target_pose, "the target pose", adapter)
        patch = guidance(
            adapter,
            source,
            keypoints,
            target_body,
            strength=strength,
            sigmas=host_unet.sigma_window(model, start_percent, end_percent),
            keep_unconditional=unconditional == "keep",
        )
        return io.NodeOutput(host_control3d.with_control3d(model, patch))


def guidance(
    adapter: host_model.Adapter,
    source: host_features.HostFeatures,
    keypoints: Tensor | None,
    placed: PosedBody | None,
    *,
    reads_source: bool = True,
    **more: object,
) -> host_control3d.Control3DPatch | None:
    """The 3D guidance of a source for targets: keypoints [T, 18, 3] in the model's canvas, or bodies with their own
    canvas. reads_source: False for what the pose alone says. more: see `Adapter.control3d`. Raises TruePoseError where
    what the model reads is missing, or the numbers of sources and targets do not match."""
    query = adapter.control_query
    pose = None
    if query == "keypoints" and keypoints is None:
        raise TruePoseError("this model's guidance reads keypoints alone; connect target_pose")
    if query == "body":
        if keypoints is None and placed is None:
            raise TruePoseError("connect target_body or target_pose: the guidance is told where the new body is")
        if keypoints is not None:
            keypoints = _matched(keypoints, source.batch)
        if placed is not None:
            width, height = placed.canvas
            pose = framed_body(placed.pose, adapter.frame((height, width)))
            if placed.smpl is not None:
                # The model learned the generic body's shapes; those of another body's mean something else.
                pose = BodyPose(pose.theta, torch.zeros_like(pose.beta), pose.camera)
            pose = pose.select(_matched(torch.arange(len(pose)), source.batch))
            keypoints = None
        else:
            height, width = adapter.size
            pose = target_bodies(keypoints, width / height, source.body)
    return adapter.control3d(source if reads_source else None, keypoints, pose, **more)


def _matched(targets: Tensor, sources: int) -> Tensor:
    """T targets for S sources: T / S each, or one for all of them."""
    if len(targets) == 1:
        return targets.expand(sources, *targets.shape[1:])
    if len(targets) % sources:
        raise TruePoseError(
            f"there are {len(targets)} targets and {sources} source images; expected 1 or a multiple of {sources}"
        )
    return targets


NODES = [Apply3DGuidance]
