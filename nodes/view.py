"""Attention View: where the target looked in the source, with HPFA and without."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn.functional import interpolate, pad

from truepose_core.attention.view import figure
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.source.features import SourceFeatures

from .host import features as host_features
from .host import view as host_view
from .schema import schema, supported, to_core, to_host

WITH, WITHOUT = "with HPFA", "without HPFA"
SHOWN = 320
"""Height of a heat map in pixels."""


def backdrop(image: Tensor | None, source: SourceFeatures) -> Tensor:
    """What the heat is drawn on, [S, 3, H, W]: the source images, or the colours of their parsing."""
    height, width = source.parsing.size
    if image is not None:
        picture = to_core(image, "the image").cpu()
        # Padding to whole latent cells changes the shape a little.
        if not fits_cells(tuple(picture.shape[2:]), source.latent_size):
            raise TruePoseError(
                f"the image is {picture.shape[3]}x{picture.shape[2]} and the source was read at {width}x{height} "
                "(width x height), another shape; connect the image that was given to SourceNet Encode, or none"
            )
    elif source.image is not None:
        picture = source.image.float().cpu()
    else:
        picture = source.parsing.preview().float().cpu()
    if picture.shape[0] not in (1, source.batch):
        raise TruePoseError(
            f"there are {picture.shape[0]} images and {source.batch} sources; connect the image that was given to "
            "SourceNet Encode"
        )
    size = (SHOWN, max(1, round(SHOWN * width / height)))
    picture = interpolate(picture, size, mode="bilinear", antialias=True).clamp(0, 1)
    return picture.expand(source.batch, -1, -1, -1)


class AttentionView(io.ComfyNode):
    """MODEL from Apply HPFA, CONDITIONING, LATENT -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseAttentionView",
            display_name="Attention View",
            is_output_node=True,
            description=(
                "Shows where in the source the picture looks: heat maps, and the mean attention per region, with HPFA "
                "and without."
            ),
            search_aliases=["attention map", "heat map", "debug HPFA"],
            inputs=[
                io.Model.Input("model", tooltip="The model from Apply HPFA, as the sampler gets it."),
                io.Conditioning.Input("positive", tooltip="The positive prompt that the sampler gets."),
                io.Latent.Input(
                    "latent",
                    tooltip="What the model looks at: the sampler's result. Noise is added to it up to percent.",
                ),
                io.Float.Input(
                    "percent",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="At which share of the sampling to look: 0 is pure noise, near 1 the finished picture.",
                ),
                io.Int.Input(
                    "source_number",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="Which source, where several Apply HPFA follow each other: 1 is nearest the loader.",
                ),
                supported(
                    io.Int.Input,
                    id="seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,
                    advanced=True,
                    tooltip="Fixes the noise that is added.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The source image, to draw the heat on. Not connected: the colours of its parsing.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="One figure for each latent of the batch: heat maps above, bars below.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        positive: list,
        latent: dict,
        percent: float = 0.4,
        source_number: int = 1,
        seed: int = 0,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        applied = host_view.sources_of(model)
        if source_number > len(applied):
            raise TruePoseError(
                f"source_number is {source_number} and the model reads {len(applied)}; expected 1 to {len(applied)}"
            )
        chosen = applied[source_number - 1]
        if isinstance(chosen.source, host_features.CombinedHostFeatures):
            raise TruePoseError(
                "the model reads a combined source, whose tokens lie in several pictures; Attention View draws on one. "
                "Connect one source, or apply each person with an Apply HPFA of its own"
            )
        target, batch = chosen.target, chosen.source.batch
        seen = {
            name: host_view.look(who, positive, latent, source_number - 1, percent, seed, target)
            for name, who in ((WITHOUT, host_view.without_guidance(model)), (WITH, model))
        }
        behind = backdrop(image, chosen.source)
        figures = []
        rows = len(seen[WITH])
        for row in range(rows):
            cover = None
            if target is not None:
                cover = target.masks[row * target.batch // rows].mean((1, 2))
            looks = {name: found[row] for name, found in seen.items()}
            figures.append(figure(behind[row * batch // rows], looks, cover))
        # Figures of a batch differ in width where regions are missing; the host wants one size.
        width = max(one.shape[-1] for one in figures)
        figures = [pad(one, (0, width - one.shape[-1]), value=1.0) for one in figures]
        sheet = to_host(torch.cat(figures))
        return io.NodeOutput(sheet, ui=ui.PreviewImage(sheet, cls=cls))


NODES = [AttentionView]
