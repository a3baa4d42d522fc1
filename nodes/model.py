"""Load TruePose Model, Picture Context, Empty TruePose Latent and Apply Pose Encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.config import SKELETON
from truepose_core.pose.skeleton import draw_skeleton

from .host import guider as host_guider
from .host import model as host_model
from .host import patch as host_patch
from .host import unet as host_unet
from .schema import Adapter, PoseKeypoint, read_bodies, schema, supported, to_core


class LoadModel(io.ComfyNode):
    """A file -> MODEL, MODEL, VAE, TRUEPOSE_ADAPTER, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadModel",
            display_name="Load TruePose Model",
            description=(
                "Loads a trained TruePose model, or the weights of AnimateAnyone, champ or Leffa as published. "
                "The bundled demo model needs no download."
            ),
            search_aliases=["truepose checkpoint", "SourceNet", "TargetNet", "load model", "AnimateAnyone", "Leffa"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_model.model_files(),
                    default=host_model.BUNDLED,
                    tooltip=(
                        "The model that comes with the pack, or a file in models/truepose: a TruePose model, or one "
                        "file of another system."
                    ),
                ),
                supported(
                    io.String.Input,
                    id="more_files",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip=(
                        "The other files of a system published in several, one name a line, in models/truepose. "
                        "AnimateAnyone: reference_unet, denoising_unet, pose_guider."
                    ),
                ),
                supported(
                    io.String.Input,
                    id="choices",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What files alone do not tell, as name=value, separated by spaces. champ: "
                        "maps=depth,normal,semantic_map,dwpose, in the order of the files."
                    ),
                ),
                supported(
                    io.String.Input,
                    id="keep_as",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Write the converted model under this name into models/truepose, to load it faster. "
                        "Empty: nothing is written."
                    ),
                ),
                supported(
                    io.Int.Input,
                    id="width",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Width of the pictures in pixels, together with height. 0: what the model was trained at.",
                ),
                supported(
                    io.Int.Input,
                    id="height",
                    default=0,
                    min=0,
                    max=4096,
                    step=64,
                    optional=True,
                    advanced=True,
                    tooltip="Height of the pictures in pixels, together with width. 0: what the model was trained at.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="target_net",
                    tooltip="Makes the picture. Connect it to Apply Pose Encoder and Apply HPFA, then to a sampler.",
                ),
                io.Model.Output(display_name="source_net", tooltip="Reads the source. Connect it to SourceNet Encode."),
                io.Vae.Output(
                    display_name="vae",
                    tooltip=(
                        "Turns pictures into this model's latents and back. AnimateAnyone and champ bring none: use "
                        "Load VAE with Stable Diffusion 1.5's."
                    ),
                ),
                Adapter.Output(
                    display_name="adapter",
                    tooltip=(
                        "Pose encoder, learned HPFA weights and CAA. Both models carry it along already; connect it "
                        "where a node asks for it."
                    ),
                ),
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip=(
                        "An empty prompt: this model reads no text. Connect it to positive and negative. AnimateAnyone "
                        "and champ take Picture Context in its place."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, more_files: str | None = "", **_: object) -> str:
        if not file:
            return ""
        return file_stamps(file_paths(file, more_files or ""))

    @classmethod
    def execute(
        cls,
        file: str = host_model.BUNDLED,
        more_files: str = "",
        choices: str = "",
        keep_as: str = "",
        width: int = 0,
        height: int = 0,
    ) -> io.NodeOutput:
        if (width == 0) != (height == 0):
            raise TruePoseError(f"width is {width} and height {height}; give both, or 0 for both")
        loaded = host_model.load_files(
            file_paths(file, more_files),
            _choices(choices),
            host_model.kept_path(keep_as) if keep_as.strip() else None,
            (height, width) if width else None,
        )
        empty = host_model.empty_conditioning(loaded.adapter)
        return io.NodeOutput(loaded.target, loaded.source, loaded.vae, loaded.adapter, empty)


def file_paths(file: str, more_files: str) -> list[Path]:
    """The files named, one and more of them a line each. Raises TruePoseError for one that is not there."""
    names = [file, *(line.strip() for line in more_files.splitlines() if line.strip())]
    return [host_model.model_path(name) for name in names]


def file_stamps(paths: list[Path]) -> str:
    """What changes when a file does."""
    return " ".join(f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}" for path in paths)


def _choices(text: str) -> dict[str, str]:
    """ "a=b c=d" -> {"a": "b", "c": "d"}. Raises TruePoseError for anything else."""
    pairs = [word.partition("=") for word in text.split()]
    wrong = [name for name, sign, value in pairs if not (name and sign and value)]
    if wrong:
        raise TruePoseError(f"choices has {wrong[0]!r}; expected name=value, separated by spaces")
    return {name: value for name, _, value in pairs}


class PictureContext(io.ComfyNode):
    """CLIP_VISION_OUTPUT -> CONDITIONING, CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePosePictureContext",
            display_name="Picture Context",
            description=(
                "What AnimateAnyone and champ read in place of a prompt: the CLIP embedding of the source picture."
            ),
            search_aliases=["clip vision", "image prompt", "AnimateAnyone", "champ"],
            inputs=[
                Adapter.Input("adapter", tooltip="From Load TruePose Model."),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    tooltip=(
                        "From CLIP Vision Encode of the source picture, with crop none. These models want the CLIP "
                        "ViT-L/14 that came with them."
                    ),
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="Connect it to SourceNet Encode, and to positive of the sampler."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="Zeros. Connect it to negative of the sampler."
                ),
            ],
        )

    @classmethod
    def execute(cls, adapter: host_model.Adapter, clip_vision_output: object) -> io.NodeOutput:
        positive = host_model.picture_conditioning(adapter, clip_vision_output["image_embeds"])
        negative = [[torch.zeros_like(tokens), dict(settings)] for tokens, settings in positive]
        return io.NodeOutput(positive, negative)


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
            search_aliases=["pose guider", "openpose", "densepose", "champ", "Leffa"],
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
                supported(
                    Adapter.Input,
                    id="adapter",
                    optional=True,
                    tooltip="Only for a model that does not carry its adapter along. From Load TruePose Model.",
                ),
                io.Image.Input("depth", optional=True, tooltip="champ: the depth map of the body in the new pose."),
                io.Image.Input("normal", optional=True, tooltip="champ: the normal map of the body in the new pose."),
                io.Image.Input(
                    "semantic_map",
                    optional=True,
                    tooltip="champ: the body parts of the new pose in champ's colours, black around the body.",
                ),
                io.Image.Input(
                    "densepose",
                    optional=True,
                    tooltip=(
                        "Leffa: the DensePose picture of the new pose, as its demo makes it: the parts' colours for "
                        "try-on, V, U and the part's number as red, green and blue for pose transfer."
                    ),
                ),
                io.Vae.Input("vae", optional=True, tooltip="Leffa: the vae of Load TruePose Model."),
                io.Image.Input(
                    "canvas", optional=True, tooltip="Leffa: the picture to keep outside of mask, for try-on."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Leffa: where the picture is made. Without it, everywhere."
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
        depth: Tensor | None = None,
        normal: Tensor | None = None,
        semantic_map: Tensor | None = None,
        densepose: Tensor | None = None,
        vae: object = None,
        canvas: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        adapter = host_model.adapter_of(model, adapter)
        if adapter is None:
            raise TruePoseError(
                "this model has no pose encoder; it comes with models of Load TruePose Model. "
                "For a checkpoint use Draw Skeleton and an OpenPose ControlNet"
            )
        maps = {"depth": depth, "normal": normal, "semantic_map": semantic_map}
        given = {name: _fitted(x, adapter, name) for name, x in maps.items() if x is not None}
        if adapter.config.behaviour.channels:
            if pose is not None or skeleton is not None or given:
                raise TruePoseError("this model reads a DensePose picture; leave the other poses unconnected")
            return io.NodeOutput(_with_densepose(model, adapter, densepose, vae, canvas, mask))
        if densepose is not None or canvas is not None or mask is not None:
            raise TruePoseError("this model reads no DensePose, canvas or mask; leave them unconnected")
        if (pose is not None and skeleton is not None) or (pose is None and skeleton is None and not given):
            raise TruePoseError("connect either pose or skeleton, and only one")
        if pose is not None:
            given[SKELETON] = draw_skeleton(read_bodies(pose, "the pose", adapter), *adapter.size)
        elif skeleton is not None:
            given[SKELETON] = _fitted(skeleton, adapter, "the skeleton")
        left_out = [name for name in adapter.config.behaviour.pose_maps if name not in given]
        if left_out:
            host_unet.say_once(f"this model was trained with more pose maps: {', '.join(left_out)} left out")
        return io.NodeOutput(host_patch.with_pose(model, adapter.pose_embedding(given)))


def _fitted(picture: Tensor, adapter: host_model.Adapter, what: str) -> Tensor:
    """IMAGE -> [B, 3, *size] in the model's canvas."""
    given = to_core(picture, what)
    return adapter.frame((given.shape[2], given.shape[3])).apply(given, 0.0)


def _with_densepose(
    model: object,
    adapter: host_model.Adapter,
    densepose: Tensor | None,
    vae: object,
    canvas: Tensor | None,
    mask: Tensor | None,
) -> object:
    if densepose is None or vae is None:
        raise TruePoseError(
            "this model reads a DensePose picture: connect densepose, and the vae of Load TruePose Model"
        )
    if (canvas is None) != (mask is None):
        raise TruePoseError("canvas and mask belong together: connect both, or neither to make the whole picture")
    height, width = adapter.size
    if canvas is None:
        picture, where = torch.full((1, 3, height, width), 0.5), torch.ones(1, 1, height, width)
    else:
        picture = _fitted(canvas, adapter, "the canvas").cpu()
        where = mask.reshape(-1, 1, *mask.shape[-2:]).float().cpu()
        where = adapter.frame((where.shape[2], where.shape[3])).apply(where, 0.0)
    parts = adapter.labels(to_core(densepose, "the DensePose picture").cpu())
    return host_patch.with_channels(model, adapter.channels(parts, picture, where, vae))


NODES = [LoadModel, PictureContext, EmptyLatent, ApplyPoseEncoder]
