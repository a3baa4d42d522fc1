"""Load CFLD, Apply CFLD and Restore CFLD Picture."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.cfld.encoder import cfld_frame

from .host import cfld as host_cfld
from .host import guider as host_guider
from .host import model as host_model
from .model import file_paths, file_stamps
from .schema import PoseKeypoint, read_bodies, schema, to_core, to_host

Encoders = io.Custom("TRUEPOSE_CFLD")
NO_FILE = "(no file in models/truepose)"


class LoadCFLD(io.ComfyNode):
    """A file -> MODEL, TRUEPOSE_CFLD."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadCFLD",
            display_name="Load CFLD",
            description="Loads a CFLD pose transfer model: its two files as published, or a converted one.",
            search_aliases=["coarse-to-fine latent diffusion", "pose transfer", "load model"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_model.model_files()[1:] or [NO_FILE],
                    tooltip="In models/truepose: a converted CFLD file, or pytorch_model.bin as published.",
                ),
                io.String.Input(
                    "more_files",
                    default="",
                    optional=True,
                    tooltip="The second published file, pytorch_model_1.bin. Leave it empty for a converted file.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="CFLD's UNet. Connect it to Apply CFLD, and to SourceNet Encode for HPFA.",
                ),
                Encoders.Output(
                    display_name="encoders", tooltip="CFLD's source and pose encoders. Connect them to Apply CFLD."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, more_files: str | None = "") -> str:
        if not file or file == NO_FILE:
            return ""
        return file_stamps(file_paths(file, more_files or ""))

    @classmethod
    def execute(cls, file: str, more_files: str = "") -> io.NodeOutput:
        return io.NodeOutput(*host_cfld.load(file_paths(file, more_files)))


class ApplyCFLD(io.ComfyNode):
    """MODEL, TRUEPOSE_CFLD, IMAGE, POSE_KEYPOINT -> MODEL, CONDITIONING, CONDITIONING, LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseApplyCFLD",
            display_name="Apply CFLD",
            description="Shows the source person in the target pose with CFLD.",
            search_aliases=["coarse-to-fine latent diffusion", "pose transfer"],
            inputs=[
                io.Model.Input("model", tooltip="From Load CFLD."),
                Encoders.Input("encoders", tooltip="From Load CFLD."),
                io.Image.Input(
                    "source",
                    tooltip="The source person. Pictures that are not about 11:16 (176x256) are padded to it.",
                ),
                PoseKeypoint.Input("pose", tooltip="The new pose: the largest person of every frame."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Connect it to a sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="The source's tokens. Connect it to positive."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="What CFLD learned for no source. Connect it to negative."
                ),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of CFLD's size, one per pose."),
            ],
        )

    @classmethod
    def execute(cls, model: object, encoders: host_cfld.CFLDEncoders, source: Tensor, pose: object) -> io.NodeOutput:
        condition = encoders.encode(to_core(source, "the source"), read_bodies(pose, "the pose", encoders))
        patched = host_cfld.with_cfld(model, condition)
        latent = host_guider.empty_latent(encoders.latent_shape, condition.tokens.shape[0])
        return io.NodeOutput(patched, *host_cfld.conditionings(condition), latent)


class RestoreCFLD(io.ComfyNode):
    """IMAGE -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseRestoreCFLD",
            display_name="Restore CFLD Picture",
            description="Takes CFLD's square picture back to a picture's size and proportions.",
            search_aliases=["unsquash", "aspect ratio"],
            inputs=[
                io.Image.Input("image", tooltip="The square picture, after VAE Decode."),
                io.Int.Input("width", default=352, min=16, max=16384, tooltip="Width of the pose's canvas in pixels."),
                io.Int.Input(
                    "height", default=512, min=16, max=16384, tooltip="Height of the pose's canvas in pixels."
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture of that size.")],
        )

    @classmethod
    def execute(cls, image: Tensor, width: int = 352, height: int = 512) -> io.NodeOutput:
        given = to_core(image, "the image")
        if given.shape[2] != given.shape[3]:
            raise TruePoseError(
                f"the image is {given.shape[3]}x{given.shape[2]}; expected CFLD's square picture after VAE Decode"
            )
        frame = cfld_frame((height, width), given.shape[2])
        return io.NodeOutput(to_host(torch.cat([frame.restore(x[None]) for x in given])))


NODES = [LoadCFLD, ApplyCFLD, RestoreCFLD]
