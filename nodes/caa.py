"""CAA as nodes: what a CLIP tower sees of the source person, region by region, beside the prompt."""

from __future__ import annotations

import os

from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.models.vision_tower import architectures
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import prior_for_poses
from truepose_core.regions import REGION_NAMES

from .host import applied as host_applied
from .host import model as host_model
from .host import patch as host_patch
from .host import unet as host_unet
from .host import vision as host_vision
from .schema import (
    CAA,
    Adapter,
    CAAAdapter,
    Parsing,
    PoseKeypoint,
    percent_window,
    read_bodies,
    schema,
    source_person,
    supported,
    unconditional_input,
)

FROM_SHAPES = "from the file"


def _stamp(path: object) -> str:
    """Changes when a file does."""
    status = os.stat(path)
    return f"{path}:{status.st_mtime_ns}:{status.st_size}"


class LoadOpenCLIPVision(io.ComfyNode):
    """A file -> CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadOpenCLIPVision",
            display_name="Load OpenCLIP Vision",
            description="Loads a CLIP vision tower in open_clip's layout, for example FashionSigLIP.",
            search_aliases=["clip vision", "siglip", "fashionsiglip", "open_clip"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_vision.tower_files(),
                    tooltip=(
                        "A .safetensors file in models/clip_vision or models/truepose: a whole model of open_clip, or "
                        "its vision tower alone."
                    ),
                ),
                io.Combo.Input(
                    "architecture",
                    options=[FROM_SHAPES, *architectures()],
                    default=FROM_SHAPES,
                    tooltip=(
                        "open_clip's name of the architecture. Usually told by the shapes in the file; where several "
                        "have the same shapes, the message names them and you choose."
                    ),
                ),
            ],
            outputs=[
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="For CAA Encode, and for every other node that takes a CLIP_VISION.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str, architecture: str = FROM_SHAPES) -> str:
        return _stamp(host_vision.tower_path(file)) + architecture

    @classmethod
    def execute(cls, file: str, architecture: str = FROM_SHAPES) -> io.NodeOutput:
        return io.NodeOutput(host_vision.load_vision(file, None if architecture == FROM_SHAPES else architecture))


class LoadCAAAdapter(io.ComfyNode):
    """A file -> TRUEPOSE_CAA_ADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadCAAAdapter",
            display_name="Load CAA Adapter",
            description="Loads IP-Adapter or IP-Adapter Plus weights, to read a person region by region with them.",
            search_aliases=["ip-adapter", "ipadapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host_vision.adapter_files(),
                    tooltip="An IP-Adapter file in models/ipadapter or models/truepose, for the model you sample with.",
                )
            ],
            outputs=[CAAAdapter.Output(display_name="adapter", tooltip="Connect it to CAA Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return _stamp(host_vision.adapter_path(file))

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(host_vision.load_adapter(file))


class CAAEncode(io.ComfyNode):
    """IMAGE, TRUEPOSE_PARSING, adapter -> TRUEPOSE_CAA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseCAAEncode",
            display_name="CAA Encode",
            description="Reads the source person with a CLIP vision model: a few tokens for each region of the person.",
            search_aliases=["ip-adapter", "clip vision", "region tokens"],
            inputs=[
                io.MultiType.Input(
                    "adapter",
                    types=[Adapter, CAAAdapter],
                    tooltip="From Load CAA Adapter, or the adapter of Load TruePose Model.",
                ),
                io.Image.Input("image", tooltip="The source person."),
                Parsing.Input("parsing", tooltip="Which region of the person each pixel of the image shows."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip=(
                        "The CLIP vision model that the IP-Adapter was trained with. TruePose models bring their own "
                        "and need none."
                    ),
                ),
                PoseKeypoint.Input(
                    "pose",
                    optional=True,
                    tooltip="Keypoints of the source person, to carry the regions to a target pose in Apply CAA.",
                ),
            ],
            outputs=[CAA.Output(display_name="caa", tooltip="Connect it to Apply CAA, and to SourceNet Encode.")],
        )

    @classmethod
    def execute(
        cls,
        adapter: host_model.Adapter | host_vision.CAAAdapter,
        image: Tensor,
        parsing: HumanParsing,
        clip_vision: object = None,
        pose: object = None,
    ) -> io.NodeOutput:
        person = source_person(image, parsing, pose)
        if isinstance(adapter, host_vision.CAAAdapter):
            if clip_vision is None:
                raise TruePoseError("connect clip_vision: an IP-Adapter reads what a CLIP vision model sees")
            tokens, nothing = adapter.region_tokens(clip_vision, person.image, person.parsing)
            return io.NodeOutput(host_vision.SourceCAA(adapter, tokens, nothing, person.parsing, person.body))
        person = person.framed(adapter.frame(person.size))
        tokens = adapter.region_tokens(person.image, person.parsing)
        if tokens is None:
            raise TruePoseError("this TruePose model was trained without CAA; choose another, or an IP-Adapter file")
        return io.NodeOutput(host_vision.SourceCAA(adapter, tokens, None, person.parsing, person.body))


def _weights() -> list[io.Input]:
    """An input for the weight of each region, the background's behind those of the person."""
    person = [
        io.Float.Input(
            name,
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip=f"How much of the {name} that CLIP saw is given to the places that look at it, 0 to 1.",
        )
        for name in REGION_NAMES[1:]
    ]
    background = io.Float.Input(
        "background",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.05,
        tooltip=(
            "How much the background of the new picture gets, 0 to 1, where the target's regions are known. Not read "
            "for TruePose models."
        ),
    )
    return [*person, background]


class ApplyCAA(io.ComfyNode):
    """MODEL, TRUEPOSE_CAA -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseApplyCAA",
            display_name="Apply CAA",
            description="Gives the model the source person's region tokens beside the prompt. Works with any sampler.",
            search_aliases=["ip-adapter", "CLIP-guided attention alignment", "decoupled cross-attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture, before or after Apply HPFA."),
                CAA.Input("caa", tooltip="From CAA Encode. Apply the node twice for two persons."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Factor lambda of what is added. 0 is exactly the model without the node.",
                ),
                *_weights(),
                supported(
                    io.Float.Input,
                    id="region_match",
                    default=4.0,
                    min=0.0,
                    max=32.0,
                    step=0.5,
                    advanced=True,
                    tooltip=(
                        "How strongly a place looks at the tokens of its own region (kappa), where the target's "
                        "regions are known. TruePose models match as they learned and do not read it."
                    ),
                ),
                *percent_window("the tokens are read"),
                unconditional_input(
                    "drop: the negative prompt does not see the person (an IP-Adapter then gives it the tokens of "
                    "no picture, as in its training), so guidance strengthens the person. keep: both see it."
                ),
                Parsing.Input(
                    "target_parsing",
                    optional=True,
                    tooltip="Where the regions shall be in the new picture. Not connected: what Apply HPFA knows.",
                ),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip="The new pose. With the pose given to CAA Encode it tells where the regions will be.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model with CAA. Connect it to Apply HPFA or a sampler."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        caa: host_vision.SourceCAA,
        strength: float = 1.0,
        face: float = 1.0,
        hair: float = 1.0,
        upper: float = 1.0,
        lower: float = 1.0,
        skin: float = 1.0,
        accessory: float = 1.0,
        background: float = 0.0,
        region_match: float = 4.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        unconditional: str = "drop",
        target_parsing: HumanParsing | None = None,
        target_pose: object = None,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        person = (face, hair, upper, lower, skin, accessory)
        cross = caa.cross(model, "target")
        window = host_unet.sigma_window(model, start_percent, end_percent)
        if strength == 0 or not any(person):
            return io.NodeOutput(model)
        # A trained model's background tokens read the whole person, so they weigh what the least of its regions does.
        omega = (min(person), *person)
        kappa = None if caa.trained else region_match
        applied = host_applied.AppliedCAA(
            cross={site: tokens.weighed(omega, strength, kappa) for site, tokens in cross.items()},
            empty={site: tokens.weighed(omega, strength, kappa) for site, tokens in caa.empty(model).items()},
            sigmas=window,
            keep_unconditional=unconditional == "keep",
            target=_target(model, caa, target_parsing, target_pose),
            given=target_parsing is not None,
            background=1.0 if caa.trained else background,
            trained=caa.trained,
        )
        return io.NodeOutput(host_patch.with_caa(model, applied))


def _target(
    model: object, caa: host_vision.SourceCAA, target_parsing: HumanParsing | None, target_pose: object
) -> HumanParsing | None:
    """Where the regions will be: as given, else the source's parsing carried to the target pose, else None."""
    adapter = host_model.adapter_of(model)
    if target_parsing is not None:
        parsing = target_parsing.to("cpu")
        return parsing if adapter is None else adapter.frame(parsing.size).apply_parsing(parsing)
    if target_pose is None:
        return None
    body = read_bodies(target_pose, "the target pose", adapter)
    if caa.body is None:
        raise TruePoseError("a target pose needs the source's: connect pose to CAA Encode, or leave target_pose out")
    size = adapter.latent_shape[1:] if caa.trained else None
    return prior_for_poses(caa.parsing, caa.body, body, size)


NODES = [LoadOpenCLIPVision, LoadCAAAdapter, CAAEncode, ApplyCAA]
