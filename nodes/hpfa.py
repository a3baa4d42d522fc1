"""HPFA Sampler, all in one, and TruePose Guider for SamplerCustomAdvanced."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pose.skeleton import draw_skeleton

from .control3d import guidance
from .host import applied as host_applied
from .host import control3d as host_control3d
from .host import features as host_features
from .host import guider as host_guider
from .host import model as host_model
from .host import patch as host_patch
from .host import unet as host_unet
from .schema import (
    ADAPTER_HINT,
    Adapter,
    Parsing,
    PoseKeypoint,
    Source,
    match_inputs,
    read_bodies,
    region_weights,
    schema,
    supported,
)
from .source import LEARNED, MATCHES


def scales() -> list[io.Input]:
    """The two guidance scales."""
    return [
        io.Float.Input(
            "guidance_pose",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="How strictly the picture keeps to the pose and the prompt. 1 is no guidance.",
        ),
        io.Float.Input(
            "guidance_source",
            default=1.0,
            min=0.0,
            max=30.0,
            step=0.1,
            tooltip="How strictly the picture keeps to the source person. 1 is no guidance.",
        ),
    ]


class Guider(io.ComfyNode):
    """MODEL, CONDITIONING -> GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseGuider",
            display_name="TruePose Guider",
            description=(
                "Guidance with a scale for the pose and another for the source. For SamplerCustomAdvanced, with a "
                "model that Apply HPFA patched."
            ),
            search_aliases=["cfg", "guidance", "SamplerCustomAdvanced"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model with Apply HPFA and, for TruePose models, Apply Pose Encoder."
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip="The prompt, with a pose ControlNet for models that have no pose encoder.",
                ),
                *scales(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What the pose's guidance leads away from. A ControlNet on it is not used. Not connected: the "
                        "positive prompt without its ControlNet."
                    ),
                ),
            ],
            outputs=[io.Guider.Output(display_name="guider", tooltip="Connect it to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        positive: list,
        guidance_pose: float = 1.0,
        guidance_source: float = 1.0,
        negative: list | None = None,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        return io.NodeOutput(host_guider.make_guider(model, positive, negative, guidance_pose, guidance_source))


class HPFASampler(io.ComfyNode):
    """MODEL, TRUEPOSE_SOURCE, POSE_KEYPOINT -> LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseHPFASampler",
            display_name="HPFA Sampler",
            description="Shows the source person in a new pose: pose encoder, HPFA, guidance and sampling in one node.",
            search_aliases=["pose transfer", "ksampler", "sampler"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The target_net of Load TruePose Model, or a checkpoint of the source's family."
                ),
                Source.Input("source", tooltip="From SourceNet Encode."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The number that the noise is drawn from. The same number is the same picture.",
                ),
                io.Int.Input("steps", default=12, min=1, max=10000, tooltip="Sampling steps."),
                *scales(),
                io.Combo.Input(
                    "sampler_name",
                    options=list(host_guider.SAMPLERS),
                    default="ddim",
                    tooltip="The sampling method.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(host_guider.SCHEDULERS),
                    default="ddim_uniform",
                    tooltip="How the noise falls over the steps.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much attention the source gets. 0 is the model without a source.",
                ),
                *region_weights(),
                PoseKeypoint.Input(
                    "target_pose", optional=True, tooltip="The new pose, the largest person of every frame."
                ),
                Parsing.Input(
                    "target_parsing", optional=True, tooltip="Where the regions shall be in the new picture, if known."
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    tooltip="The prompt. TruePose models that read no text need none.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What guidance leads away from. Not connected: the positive prompt without its ControlNet.",
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip=(
                        "Size and number of the pictures. Not connected: the TruePose model's own size, one picture "
                        "for each pose."
                    ),
                ),
                supported(
                    io.Combo.Input,
                    id="match",
                    options=list(MATCHES),
                    default=LEARNED,
                    optional=True,
                    advanced=True,
                    tooltip="learned: as the TruePose model learned. as set: region_match and body_match.",
                ),
                *match_inputs(
                    "How strongly a place in the target looks at the same region of the source (beta).",
                    "How strongly a place looks at the same place on the source's body (gamma).",
                    optional=True,
                    advanced=True,
                ),
                Adapter.Input("adapter", optional=True, tooltip=ADAPTER_HINT),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The pictures. Connect it to VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        source: host_features.HostFeatures,
        seed: int = 0,
        steps: int = 12,
        guidance_pose: float = 1.0,
        guidance_source: float = 1.0,
        sampler_name: str = "ddim",
        scheduler: str = "ddim_uniform",
        strength: float = 1.0,
        background: float = 1.0,
        face: float = 1.0,
        hair: float = 1.0,
        upper: float = 1.0,
        lower: float = 1.0,
        skin: float = 1.0,
        accessory: float = 1.0,
        target_pose: object = None,
        target_parsing: HumanParsing | None = None,
        positive: list | None = None,
        negative: list | None = None,
        latent: dict | None = None,
        match: str = LEARNED,
        region_match: float = 2.0,
        body_match: float = 0.0,
        adapter: host_model.Adapter | None = None,
    ) -> io.NodeOutput:
        host_unet.unet_of(model, "the model")
        adapter = host_model.adapter_of(model, adapter)
        if adapter is None and (latent is None or positive is None):
            raise TruePoseError(
                "connect latent and positive: only models of Load TruePose Model know their size and need no prompt"
            )
        if adapter is not None:
            adapter.check_conditioning(positive)
        if adapter is not None and target_pose is None:
            raise TruePoseError(
                f"nobody told this {adapter.config.family} model which pose to make: connect target_pose"
            )
        body = None if target_pose is None else read_bodies(target_pose, "the target pose", adapter)
        if adapter is not None:
            model = host_patch.with_pose(model, adapter.pose_embedding(draw_skeleton(body, *adapter.size)))
        applied = host_applied.applied_source(
            adapter,
            source,
            (background, face, hair, upper, lower, skin, accessory),
            strength,
            None if match == LEARNED else (region_match, body_match),
            target_parsing,
            body,
            beta=region_match,
            gamma=body_match,
        )
        if adapter is not None and adapter.control_query is not None:
            weights = torch.tensor(applied.omega)
            patch = guidance(adapter, source, body, None, reads_source=applied.has_effect, omega=weights)
            model = model if patch is None else host_control3d.with_control3d(model, patch)
        patched = host_patch.with_hpfa(model, applied)
        if latent is None:
            count = max(source.batch, len(body))
            latent = host_guider.empty_latent(adapter.latent_shape, count)
        positive = host_model.empty_conditioning(adapter) if positive is None else positive
        guider = host_guider.make_guider(patched, positive, negative, guidance_pose, guidance_source)
        return io.NodeOutput(host_guider.sample(guider, latent, seed, steps, sampler_name, scheduler))


NODES = [Guider, HPFASampler]
