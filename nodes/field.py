"""Pose Field Guidance."""

from __future__ import annotations

from comfy_api.latest import io

from truepose_core.guidance.field import FieldGuidance

from .host import field as host_field
from .host import model as host_model
from .host import unet as host_unet
from .schema import PoseKeypoint, percent_window, read_bodies, schema, supported


class PoseFieldGuidance(io.ComfyNode):
    """MODEL -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePosePoseFieldGuidance",
            display_name="Pose Field Guidance",
            description=(
                "Moves the picture at every step towards a pose that a body can take, and the one asked for. "
                "Works with every sampler."
            ),
            search_aliases=["pose interaction field", "RePoseDM", "gradient guidance", "pose prior"],
            inputs=[
                io.Model.Input("model", tooltip="Any place in the chain: the field works on the result of CFG."),
                io.Float.Input(
                    "scale",
                    default=FieldGuidance.scale,
                    min=0.0,
                    max=10000.0,
                    step=1.0,
                    tooltip="How far each step moves. 0 is off: the model is handed on as it came.",
                ),
                io.Float.Input(
                    "target_weight",
                    default=FieldGuidance.mu,
                    min=0.0,
                    max=100000.0,
                    step=1.0,
                    tooltip="How strongly joints are drawn to the target pose, beside the field (mu).",
                ),
                *percent_window("the field guides"),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip="The pose asked for. Not connected: only impossible poses are corrected.",
                ),
                supported(
                    io.Combo.Input,
                    id="predictor",
                    options=host_field.predictor_files(),
                    default=host_field.BUNDLED,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What reads the pose off a picture in the making: the one that comes with the pack, for the "
                        "bundled model, or a file in models/truepose that truepose train --row keypoints wrote."
                    ),
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The guided model. Connect it to a sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        scale: float = FieldGuidance.scale,
        target_weight: float = FieldGuidance.mu,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        target_pose: object = None,
        predictor: str = host_field.BUNDLED,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        options = FieldGuidance(scale, target_weight, start_percent, end_percent, host_field.predictor_path(predictor))
        target = None
        if target_pose is not None:
            target = read_bodies(target_pose, "the target pose", host_model.adapter_of(model))
        return io.NodeOutput(host_field.with_field(model, options, target))


NODES = [PoseFieldGuidance]
