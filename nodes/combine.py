"""Regions of several sources in one, and regions of a photo that must not change."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.editing import MAX_BLUR, MAX_GROW, soften_mask
from truepose_core.regions import REGION_NAMES
from truepose_core.source.combine import combine_sources

from .host import features as host_features
from .schema import Parsing, Source, schema


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


class FreezeRegions(io.ComfyNode):
    """LATENT of a photo and its TRUEPOSE_PARSING -> LATENT in which only some regions may change."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseFreezeRegions",
            display_name="Freeze Regions",
            description=(
                "Everything but the regions chosen stays as in the photo: sets the latent's noise mask from the "
                "parsing. Connect the latent to any sampler."
            ),
            search_aliases=["inpaint region", "restyle clothes", "noise mask", "keep face"],
            inputs=[
                io.Latent.Input("samples", tooltip="The photo as a latent, from VAE Encode."),
                Parsing.Input("parsing", tooltip="The human parsing of that photo."),
                *(
                    io.Boolean.Input(
                        name, default=name == "upper", tooltip=f"Whether the {name} may change. Off: it is frozen."
                    )
                    for name in REGION_NAMES
                ),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=-MAX_GROW,
                    max=MAX_GROW,
                    tooltip="Pixels by which the part that may change reaches over its border; below 0 it shrinks.",
                ),
                io.Float.Input(
                    "blur",
                    default=4.0,
                    min=0.0,
                    max=MAX_BLUR,
                    step=0.5,
                    tooltip="Softness of the border in pixels (the Gaussian's standard deviation).",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="samples", tooltip="The latent with its noise mask."),
                io.Mask.Output(display_name="mask", tooltip="What may change, 1, and what is frozen, 0."),
            ],
        )

    @classmethod
    def execute(
        cls, samples: dict, parsing: HumanParsing, grow: int = 8, blur: float = 4.0, **free: bool
    ) -> io.NodeOutput:
        chosen = [name for name in REGION_NAMES if free.get(name, name == "upper")]
        if not chosen:
            raise TruePoseError("every region is frozen, so nothing could change; switch on at least one region")
        mask = parsing.mask(chosen).float().cpu()
        if not bool((mask > 0.5).any()):
            raise TruePoseError(
                f"the picture shows no {' or '.join(chosen)}, so nothing could change; choose another region"
            )
        latent = samples["samples"]
        check_latent(latent, parsing)
        mask = soften_mask(mask, grow, blur)
        if mask.shape[0] == 1:
            mask = mask.expand(latent.shape[0], -1, -1)
        return io.NodeOutput({**samples, "noise_mask": mask[:, None].contiguous()}, mask.contiguous())


def check_latent(latent: Tensor, parsing: HumanParsing) -> None:
    """Raise unless the parsing can be of the picture of this latent [B, C, h, w]: same shape, same batch or 1."""
    if latent.dim() != 4:
        raise TruePoseError(f"the latent is {tuple(latent.shape)}; expected that of a picture, [B, C, h, w]")
    height, width = parsing.size
    h, w = latent.shape[2:]
    if not fits_cells(parsing.size, (h, w)):
        raise TruePoseError(
            f"the parsing is {width}x{height} and the latent {w}x{h} cells: another shape; "
            "make both from the same picture"
        )
    if parsing.batch not in (1, latent.shape[0]):
        raise TruePoseError(
            f"the parsing holds {parsing.batch} pictures and the latent {latent.shape[0]}; "
            f"expected 1 or {latent.shape[0]}"
        )


NODES = [CombineSources, FreezeRegions]
