"""Human parsing: from masks or a label map, edited, back to masks and SEGS, and as what of a latent may change."""

from __future__ import annotations

from collections import namedtuple

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fits_cells
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.editing import (
    MASK_MODES,
    MAX_BLUR,
    MAX_GROW,
    blur_region,
    fill_region,
    grow_region,
    mask_region,
    soften_mask,
)
from truepose_core.regions import LABEL_TABLES, REGION_NAMES, Region

from .schema import Parsing, schema, supported, to_core, to_host, to_mask

# From the body outwards: what is given later covers what is under it.
PAINTED = (Region.SKIN, Region.LOWER, Region.UPPER, Region.FACE, Region.HAIR, Region.ACCESSORY)

MASK_HINTS = {
    Region.FACE: "The face.",
    Region.HAIR: "The hair.",
    Region.UPPER: "What is worn above: shirt, jacket, the whole of a dress.",
    Region.LOWER: "What is worn below: trousers, skirt.",
    Region.SKIN: "Bare arms, hands, legs and feet.",
    Region.ACCESSORY: "Shoes, bag, hat, belt, scarf, glasses.",
}


def shown(parsing: HumanParsing, cls: type[io.ComfyNode]) -> tuple[Tensor, ui.PreviewImage]:
    """The coloured preview as IMAGE, and the same for the node's face."""
    image = to_host(parsing.preview()).cpu()
    return image, ui.PreviewImage(image, cls=cls)


def parsing_outputs() -> list[io.Output]:
    return [
        Parsing.Output(display_name="parsing", tooltip="Which region of the person each pixel shows."),
        io.Image.Output(
            display_name="preview",
            tooltip=(
                "The regions in colours: face red, hair pink, upper blue, lower green, skin orange, accessory yellow."
            ),
        ),
    ]


class ParsingFromMasks(io.ComfyNode):
    """MASKs -> TRUEPOSE_PARSING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseParsingFromMasks",
            display_name="Parsing from Masks",
            description=(
                "Makes a human parsing from masks of any origin: painted, SAM, RMBG, Florence. What has no mask is "
                "background."
            ),
            search_aliases=["segmentation", "human parsing", "masks to parsing"],
            inputs=[
                io.Mask.Input(REGION_NAMES[region], optional=True, tooltip=MASK_HINTS[region])
                for region in (
                    Region.FACE,
                    Region.HAIR,
                    Region.UPPER,
                    Region.LOWER,
                    Region.SKIN,
                    Region.ACCESSORY,
                )
            ],
            outputs=parsing_outputs(),
        )

    @classmethod
    def execute(cls, **masks: Tensor | None) -> io.NodeOutput:
        given = {
            region: to_mask(masks[REGION_NAMES[region]], f"the mask of {REGION_NAMES[region]}")
            for region in PAINTED
            if masks.get(REGION_NAMES[region]) is not None
        }
        if not given:
            raise TruePoseError(
                "no mask is connected; connect at least one, for example a mask of the clothes to upper"
            )
        parsing = HumanParsing.from_masks(given)
        image, face = shown(parsing, cls)
        return io.NodeOutput(parsing, image, ui=face)


class ParsingFromLabels(io.ComfyNode):
    """A label-map IMAGE -> TRUEPOSE_PARSING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseParsingFromLabels",
            display_name="Parsing from Label Map",
            description=(
                "Reads a label map that a human parser saved as an image: grey values that are labels, or the colours "
                "of this pack's preview."
            ),
            search_aliases=["segmentation map", "ATR", "LIP", "CIHP"],
            inputs=[
                io.Image.Input(
                    "label_map",
                    tooltip="The label map, loaded from a PNG and never smoothed or resized with blending.",
                ),
                io.Combo.Input(
                    "labels",
                    options=list(LABEL_TABLES),
                    default="regions",
                    tooltip=(
                        "What the grey values mean: the label set of the parser that made the map. A "
                        "coloured map needs no "
                        "choice."
                    ),
                ),
            ],
            outputs=parsing_outputs(),
        )

    @classmethod
    def execute(cls, label_map: Tensor, labels: str = "regions") -> io.NodeOutput:
        parsing = HumanParsing.from_label_image(to_core(label_map, "the label map").cpu(), labels)
        image, face = shown(parsing, cls)
        return io.NodeOutput(parsing, image, ui=face)


class ParsingToMasks(io.ComfyNode):
    """TRUEPOSE_PARSING -> MASKs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseParsingToMasks",
            display_name="Parsing to Masks",
            description="One mask of the regions chosen, and a mask of each region.",
            search_aliases=["region mask", "person mask"],
            inputs=[
                Parsing.Input("parsing", tooltip="A human parsing."),
                *(
                    io.Boolean.Input(name, default=name != "background", tooltip=f"Whether the mask covers the {name}.")
                    for name in REGION_NAMES
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="The chosen regions together."),
                *(
                    io.Mask.Output(display_name=name, tooltip=f"The {name} alone, chosen or not.")
                    for name in REGION_NAMES
                ),
                io.Image.Output(display_name="preview", tooltip="The regions in colours."),
            ],
        )

    @classmethod
    def execute(cls, parsing: HumanParsing, **chosen: bool) -> io.NodeOutput:
        wanted = [name for name in REGION_NAMES if chosen.get(name, name != "background")]
        masks = parsing.masks.float().cpu()
        together = parsing.mask(wanted).float().cpu() if wanted else torch.zeros_like(masks[:, 0])
        image, face = shown(parsing, cls)
        return io.NodeOutput(together, *masks.unbind(1), image, ui=face)


# The Impact Pack's own fields: its nodes read them by name.
SEG = namedtuple(
    "SEG",
    ["cropped_image", "cropped_mask", "confidence", "crop_region", "bbox", "label", "control_net_wrapper"],
    defaults=[None],
)


def to_segs(parsing: HumanParsing, names: list[str], grow: float) -> tuple[tuple[int, int], list[SEG]]:
    """Impact's SEGS of one picture: ((H, W), one SEG per region that is there). `grow`: crop size over box size."""
    height, width = parsing.size
    segs = []
    for name in names:
        mask = parsing.mask(name)[0].float().cpu()
        rows, columns = (mask > 0.5).any(1).nonzero().flatten(), (mask > 0.5).any(0).nonzero().flatten()
        if not len(rows):
            continue
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        left, right = int(columns[0]), int(columns[-1]) + 1
        more_x, more_y = (round((grow - 1) / 2 * size) for size in (right - left, bottom - top))
        crop = [
            max(0, left - more_x),
            max(0, top - more_y),
            min(width, right + more_x),
            min(height, bottom + more_y),
        ]
        inside = mask[crop[1] : crop[3], crop[0] : crop[2]].numpy()
        segs.append(SEG(None, inside, 1.0, crop, (left, top, right, bottom), name))
    return (height, width), segs


class ParsingToSEGS(io.ComfyNode):
    """TRUEPOSE_PARSING -> SEGS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseParsingToSEGS",
            display_name="Parsing to SEGS",
            description="One SEG per region, for the Impact Pack's detailers.",
            search_aliases=["impact pack", "detailer"],
            inputs=[
                Parsing.Input("parsing", tooltip="A human parsing of one picture."),
                *(
                    io.Boolean.Input(
                        name,
                        default=name in ("face", "upper", "lower"),
                        tooltip=f"Whether the {name} becomes a SEG.",
                    )
                    for name in REGION_NAMES[1:]
                ),
                supported(
                    io.Float.Input,
                    id="crop_factor",
                    default=1.5,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How much of the surroundings a SEG shows: 1 is the region's own box.",
                ),
            ],
            outputs=[io.SEGS.Output(display_name="segs", tooltip="SEGS as the Impact Pack uses them.")],
        )

    @classmethod
    def execute(cls, parsing: HumanParsing, crop_factor: float = 1.5, **chosen: bool) -> io.NodeOutput:
        if parsing.batch != 1:
            raise TruePoseError(f"SEGS are of one picture and the parsing holds {parsing.batch}; take one of them")
        names = [n for n in REGION_NAMES[1:] if chosen.get(n, n in ("face", "upper", "lower"))]
        return io.NodeOutput(to_segs(parsing, names, crop_factor))


class EditParsing(io.ComfyNode):
    """TRUEPOSE_PARSING -> TRUEPOSE_PARSING with one region changed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseEditParsing",
            display_name="Edit Parsing",
            description=(
                "Changes one region of a parsing: put a mask in its place, fill its holes, grow or shrink it, soften "
                "its edge. In this order; the other regions make room."
            ),
            search_aliases=["grow mask", "blur mask", "fill holes", "fix segmentation", "hands"],
            inputs=[
                Parsing.Input("parsing", tooltip="A human parsing."),
                io.Combo.Input("region", options=list(REGION_NAMES), default="upper", tooltip="The region to change."),
                io.Mask.Input("mask", optional=True, tooltip="A mask of the picture's size, for example painted."),
                io.Combo.Input(
                    "mask_mode",
                    options=list(MASK_MODES),
                    default="add",
                    tooltip="The mask becomes the region, is added to it, or is taken away from it.",
                ),
                io.Boolean.Input(
                    "fill_holes", default=False, tooltip="Whether everything that the region encloses joins it."
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-MAX_GROW,
                    max=MAX_GROW,
                    tooltip="Grow the region outwards by so many pixels; below 0 it shrinks.",
                ),
                io.Float.Input(
                    "blur",
                    default=0.0,
                    min=0.0,
                    max=MAX_BLUR,
                    step=0.5,
                    tooltip="Soften the region's edge by so many pixels.",
                ),
            ],
            outputs=[
                Parsing.Output(display_name="parsing", tooltip="The changed parsing."),
                io.Mask.Output(display_name="mask", tooltip="The region after the change."),
                io.Image.Output(display_name="preview", tooltip="The regions in colours."),
            ],
        )

    @classmethod
    def execute(
        cls,
        parsing: HumanParsing,
        region: str = "upper",
        mask: Tensor | None = None,
        mask_mode: str = "add",
        fill_holes: bool = False,
        grow: int = 0,
        blur: float = 0.0,
    ) -> io.NodeOutput:
        if mask is not None:
            parsing = mask_region(parsing, region, to_mask(mask, "the mask"), mask_mode)
        if fill_holes:
            parsing = fill_region(parsing, region)
        parsing = blur_region(grow_region(parsing, region, grow), region, blur)
        image, face = shown(parsing, cls)
        return io.NodeOutput(parsing, parsing.mask(region).float().cpu(), image, ui=face)


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


NODES = [ParsingFromMasks, ParsingFromLabels, ParsingToMasks, ParsingToSEGS, EditParsing, FreezeRegions]
