"""Load TruePose Model, Empty TruePose Latent and Apply Pose Encoder."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.skeleton import draw_skeleton

from . import host, host_guider, host_model
from .schema import Adapter, PoseKeypoint, known, schema, to_core
from .source import bodies


class LoadModel(io.ComfyNode):
    """A file -> MODEL, MODEL, VAE, TRUEPOSE_ADAPTER, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadModel",
            display_name="Load TruePose Model",
            description="Loads a trained TruePose model. The bundled demo model needs no download.",
            search_aliases=["truepose checkpoint", "SourceNet", "TargetNet", "load model"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_model.model_files(),
                    default=host_model.BUNDLED,
                    tooltip="The model that comes with the pack, or a .safetensors file in models/truepose.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="target_net",
                    tooltip="Makes the picture. Connect it to Apply Pose Encoder and Apply HPFA, then to a sampler.",
                ),
                io.Model.Output(display_name="source_net", tooltip="Reads the source. Connect it to SourceNet Encode."),
                io.Vae.Output(display_name="vae", tooltip="Turns pictures into this model's latents and back."),
                Adapter.Output(
                    display_name="adapter",
                    tooltip=(
                        "Pose encoder, learned HPFA weights and CAA. Both models carry it along already; connect it "
                        "where a node asks for it."
                    ),
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="An empty prompt: this model reads no text. Connect it to positive and negative.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        if not file:
            return ""
        path = host_model.model_path(file)
        return f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, file: str = host_model.BUNDLED) -> io.NodeOutput:
        loaded = host_model.load(host_model.model_path(file))
        empty = host_model.empty_conditioning(loaded.adapter)
        return io.NodeOutput(loaded.target, loaded.source, loaded.vae, loaded.adapter, empty)


class EmptyLatent(io.ComfyNode):
    """TRUEPOSE_ADAPTER -> LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseEmptyLatent",
            display_name="Empty TruePose Latent",
            description="An empty latent of the size and channels that a TruePose model works at.",
            search_aliases=["latent"],
            inputs=[
                Adapter.Input("adapter", tooltip="From Load TruePose Model: it knows the size."),
                io.Int.Input("batch_size", default=1, min=1, max=4096, tooltip="How many pictures."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="Connect it to a sampler.")],
        )

    @classmethod
    def execute(cls, adapter: host_model.Adapter, batch_size: int = 1) -> io.NodeOutput:
        return io.NodeOutput(host_guider.empty_latent(adapter.latent_shape, batch_size))


class ApplyPoseEncoder(io.ComfyNode):
    """MODEL, POSE_KEYPOINT or a skeleton picture -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseApplyPoseEncoder",
            display_name="Apply Pose Encoder",
            description="Tells a TruePose model which pose to make. Other models take a pose ControlNet instead.",
            search_aliases=["pose guider", "openpose"],
            inputs=[
                io.Model.Input("model", tooltip="The target_net of Load TruePose Model."),
                PoseKeypoint.Input(
                    "pose", optional=True, tooltip="The new pose: the largest person of every frame is drawn."
                ),
                io.Image.Input(
                    "skeleton",
                    optional=True,
                    tooltip="A drawn OpenPose skeleton on black, in place of the pose.",
                ),
                known(
                    Adapter.Input,
                    id="adapter",
                    optional=True,
                    tooltip="Only for a model that does not carry its adapter along. From Load TruePose Model.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the pose. Connect it to Apply HPFA."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        pose: object = None,
        skeleton: Tensor | None = None,
        adapter: host_model.Adapter | None = None,
    ) -> io.NodeOutput:
        host.unet_of(model, "the model")
        adapter = host_model.adapter_of(model, adapter)
        if adapter is None:
            raise TruePoseError(
                "this model has no pose encoder; it comes with models of Load TruePose Model. "
                "For a checkpoint use Draw Skeleton and an OpenPose ControlNet"
            )
        if (pose is None) == (skeleton is None):
            raise TruePoseError("connect either pose or skeleton, and only one")
        if pose is not None:
            picture = draw_skeleton(bodies(pose, "the pose", adapter), *adapter.size)
        else:
            given = to_core(skeleton, "the skeleton")
            picture = adapter.frame((given.shape[2], given.shape[3])).apply(given, 0.0)
        return io.NodeOutput(host.with_pose(model, adapter.pose_embedding(picture)))


NODES = [LoadModel, EmptyLatent, ApplyPoseEncoder]
