"""SourceNet Encode, Apply HPFA and Combine Sources: read the source person once, and let any sampler look at it."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.regions import REGION_NAMES
from truepose_core.source.combine import combine_sources

from .host import applied as host_applied
from .host import checks as host_checks
from .host import features as host_features
from .host import model as host_model
from .host import patch as host_patch
from .host import source as host_source
from .host import unet as host_unet
from .host import vision as host_vision
from .schema import (
    ADAPTER_HINT,
    CAA,
    Adapter,
    Parsing,
    PoseKeypoint,
    Source,
    match_inputs,
    percent_window,
    read_bodies,
    region_weights,
    schema,
    source_person,
    supported,
    unconditional_input,
)

LEARNED = "learned"
MATCHES = (LEARNED, "as set")
AS_PUBLISHED = "as published"
ONCE, LEVELS, EVERY_STEP = "once", "noise levels", "every step"
READINGS = (AS_PUBLISHED, ONCE, LEVELS, EVERY_STEP)


def needs_pose(adapter: host_model.Adapter, name: str) -> None:
    """What to say where a TruePose model's source or target has no pose. Raises TruePoseError where the model carries
    the source along the pose; others match by it, and the node warns."""
    if adapter.config.aligned:
        raise TruePoseError(
            f"this {adapter.config.family} model carries the source to the new pose, and knows only one of the two: "
            f"connect {name} (keypoints, for example from Estimate Pose)"
        )
    if adapter.config.fusion == "hpfa":
        host_checks.warn_on_node(
            f"{name} is not connected: this model matches places on the body, and does without it poorly"
        )


class SourceNetEncode(io.ComfyNode):
    """IMAGE -> TRUEPOSE_SOURCE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseSourceNetEncode",
            display_name="SourceNet Encode",
            description="Reads the source person, at every self-attention of the model.",
            search_aliases=["reference", "source person", "AnimateAnyone", "Leffa"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model that reads the source. Without a trained TruePose model, the "
                        "checkpoint you sample with."
                    ),
                ),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                io.Image.Input("image", tooltip="The source person. Best at the size of the picture you want to make."),
                Parsing.Input("parsing", tooltip="Which region of the person each pixel of the image shows."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "A prompt that describes the source. Only its first part is used. Not connected: "
                        "an empty prompt of "
                        "zeros."
                    ),
                ),
                PoseKeypoint.Input(
                    "pose",
                    optional=True,
                    tooltip=(
                        "Keypoints of the source person. Needed for body match and for carrying the "
                        "parsing to a target pose."
                    ),
                ),
                Adapter.Input("adapter", optional=True, tooltip=ADAPTER_HINT),
                CAA.Input(
                    "caa",
                    optional=True,
                    tooltip=(
                        "From CAA Encode: the model reads the source with these region tokens beside it. TruePose "
                        "models read their own without it."
                    ),
                ),
                supported(
                    io.Combo.Input,
                    id="source_reading",
                    options=list(READINGS),
                    default=AS_PUBLISHED,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How often and how noisy the source is read. as published: as the model was trained (Leffa at "
                        "every step, the others once and clean); checkpoints without training at noise levels. noise "
                        "levels: noised, and read now at a few levels; each step uses the nearest. every step: noised "
                        "to the step, and read again there. once: clean; for Leffa its own faster mode."
                    ),
                ),
                supported(
                    io.Int.Input,
                    id="levels",
                    default=4,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How many noise levels the source is read at, for noise levels. Each costs a pass and the "
                        "memory of one reading, once for all poses, seeds and steps."
                    ),
                ),
            ],
            outputs=[
                Source.Output(
                    display_name="source",
                    tooltip="What the model knows of the source person. Connect it to Apply HPFA.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        vae: object,
        image: Tensor,
        parsing: HumanParsing,
        conditioning: list | None = None,
        pose: object = None,
        adapter: host_model.Adapter | None = None,
        caa: host_vision.SourceCAA | None = None,
        source_reading: str = AS_PUBLISHED,
        levels: int = 4,
    ) -> io.NodeOutput:
        person = source_person(image, parsing, pose)
        host_unet.unet_of(model, "the model")
        adapter = host_model.adapter_of(model, adapter)
        if person.body is None and adapter is not None:
            needs_pose(adapter, "pose")
        caa = None if caa is None else caa.repeated(len(person.image))
        cross = {} if caa is None else caa.cross(model, "source")
        if adapter is None:
            # The host's VAE would crop to whole cells, and the parsing would slide off the picture.
            person = person.padded(host_unet.cell_size(vae))
            parsing, body = person.parsing, person.body
            latent = vae.encode(person.image.movedim(1, -1))
            reading = LEVELS if source_reading == AS_PUBLISHED else source_reading
            noisy = {ONCE: {}, LEVELS: {"levels": levels}, EVERY_STEP: {"levels": 1, "anew": True}}[reading]
            return io.NodeOutput(
                host_source.read_source(model, latent, parsing, conditioning, body, cross=cross, **noisy)
            )
        if source_reading in (LEVELS, EVERY_STEP):
            raise TruePoseError(
                f"this {adapter.config.family} model says how it was trained to read its source; set source_reading to "
                f"{AS_PUBLISHED} or {ONCE}"
            )
        person = person.framed(adapter.frame(person.size))
        picture, parsing, body = person.image, person.parsing, person.body
        latent = vae.encode(picture.movedim(1, -1))
        tokens = adapter.region_tokens(picture, parsing) if caa is None or not caa.trained else caa.tokens
        if tokens is not None:
            if cross and not caa.trained:
                raise TruePoseError(
                    "this TruePose model reads region tokens of its own; leave caa unconnected, or give CAA Encode the "
                    "model's adapter"
                )
            cross = adapter.cross_tokens(tokens, "source")
        adapter.check_conditioning(conditioning)
        again = adapter.reads_anew and source_reading == AS_PUBLISHED
        nothing = None
        if adapter.config.behaviour.unconditional == "zero latent":
            zeros = torch.zeros_like(latent)
            nothing = host_source.read_source(
                model, zeros, parsing, conditioning, body, cross=cross, timestep=adapter.source_timestep, anew=again
            )
        source = host_source.read_source(
            model,
            latent,
            parsing,
            conditioning,
            body,
            caa=tokens,
            cross=cross,
            image=picture if adapter.config.aligned or adapter.config.aligned_tokens else None,
            timestep=adapter.source_timestep,
            nothing=nothing,
            anew=again,
            match=adapter.config.match,
            align=adapter.config.aligns,
            beside=adapter.config.aligned_tokens,
        )
        return io.NodeOutput(source)


class ApplyHPFA(io.ComfyNode):
    """MODEL, TRUEPOSE_SOURCE -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseApplyHPFA",
            display_name="Apply HPFA",
            description="Lets the model look at the source person while it samples. Works with any sampler.",
            search_aliases=["human parsing fusion attention", "reference attention"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that makes the picture, of the same family as the one that read the source.",
                ),
                Source.Input("source", tooltip="From SourceNet Encode. Apply the node twice for two sources."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much attention the source gets. 0 is exactly the unpatched model.",
                ),
                *region_weights(),
                *match_inputs(
                    (
                        "How strongly a place in the target looks at the same region of the source "
                        "(beta). Needs a target "
                        "parsing, or a target pose and a source pose."
                    ),
                    (
                        "How strongly a place looks at the same place on the source's body (gamma). "
                        "Needs a source pose and a "
                        "target pose."
                    ),
                ),
                *percent_window("the source is seen"),
                supported(
                    io.Combo.Input,
                    id="blocks",
                    options=list(host_unet.BLOCKS),
                    default="all",
                    advanced=True,
                    tooltip="Which parts of the UNet see the source. The decoder alone keeps texture and costs less.",
                ),
                unconditional_input(
                    "Whether the negative prompt sees the source too. drop: guidance also "
                    "strengthens the source, and it "
                    "is faster."
                ),
                Parsing.Input(
                    "target_parsing", optional=True, tooltip="Where the regions shall be in the new picture."
                ),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip="The new pose. With a source pose it tells where the regions will be.",
                ),
                Adapter.Input("adapter", optional=True, tooltip=ADAPTER_HINT),
                supported(
                    io.Combo.Input,
                    id="match",
                    options=list(MATCHES),
                    default=LEARNED,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "learned: a TruePose model matches as it learned, and region_match and body_match are not "
                        "read. as set: the two numbers, for every head. Other models always use the numbers."
                    ),
                ),
                supported(
                    io.Float.Input,
                    id="style",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How far the picture takes on the source's mean and contrast of features (AdaIN, as in "
                        "reference only): light and colours of the whole source, whatever the region weights."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the source. Connect it to any sampler.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        source: host_features.HostFeatures,
        strength: float = 1.0,
        background: float = 1.0,
        face: float = 1.0,
        hair: float = 1.0,
        upper: float = 1.0,
        lower: float = 1.0,
        skin: float = 1.0,
        accessory: float = 1.0,
        region_match: float = 2.0,
        body_match: float = 0.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "all",
        unconditional: str = "drop",
        target_parsing: HumanParsing | None = None,
        target_pose: object = None,
        adapter: host_model.Adapter | None = None,
        match: str = LEARNED,
        style: float = 0.0,
    ) -> io.NodeOutput:
        adapter = host_model.adapter_of(model, adapter)
        if adapter is not None and target_pose is None and strength > 0:
            needs_pose(adapter, "target_pose")
        applied = host_applied.applied_source(
            adapter,
            source,
            (background, face, hair, upper, lower, skin, accessory),
            strength,
            None if match == LEARNED else (region_match, body_match),
            target_parsing,
            None if target_pose is None else read_bodies(target_pose, "the target pose", adapter),
            beta=region_match,
            gamma=body_match,
            sigmas=host_unet.sigma_window(model, start_percent, end_percent),
            blocks=blocks,
            keep_unconditional=unconditional == "keep",
            style=style,
        )
        return io.NodeOutput(host_patch.with_hpfa(model, applied))


class CombineSources(io.ComfyNode):
    """Two TRUEPOSE_SOURCEs -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseCombineSources",
            display_name="Combine Sources",
            description=(
                "The source person with regions of another: the face of A, the top of B. Chain it for more people. "
                "Shares between 0 and 1 blend."
            ),
            search_aliases=["swap garment", "virtual try-on", "style blend", "mix references"],
            inputs=[
                Source.Input("source", tooltip="The person. From SourceNet Encode, or from another Combine Sources."),
                Source.Input("donor", tooltip="Who the regions below are taken from, read with the same model."),
                *(
                    io.Float.Input(
                        name,
                        default=1.0 if name == "upper" else 0.0,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip=f"How much of the {name} comes from the donor: 0 none, 1 all of it.",
                    )
                    for name in REGION_NAMES
                ),
            ],
            outputs=[Source.Output(display_name="source", tooltip="Connect it wherever a source goes.")],
        )

    @classmethod
    def execute(
        cls, source: host_features.HostFeatures, donor: host_features.HostFeatures, **shares: float
    ) -> io.NodeOutput:
        table = [float(shares.get(name, 0.0)) for name in REGION_NAMES]
        return io.NodeOutput(combine_sources(source, donor, table, host_features.CombinedHostFeatures))


NODES = [SourceNetEncode, ApplyHPFA, CombineSources]
