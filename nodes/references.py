"""Guide References: weights per body region, for editors that hold their references as tokens."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import prior_for_poses
from truepose_core.pose import read_pose

from .host import references as host_references
from .host import unet as host_unet
from .schema import (
    Parsing,
    PoseKeypoint,
    check_parsing,
    match_inputs,
    percent_window,
    read_bodies,
    region_weights,
    schema,
    supported,
    to_core,
    to_host,
)

NO_PHOTO = "connect the reference's photo to the image input of Guide References to use its image output"


class GuideReferences(io.ComfyNode):
    """MODEL, TRUEPOSE_PARSING -> MODEL, IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseGuideReferences",
            display_name="Guide References",
            description=(
                "How much of one reference an editing model reads, region by region: FLUX.1 Kontext, FLUX.2, "
                "LongCat-Image-Edit, Qwen-Image-Edit, OmniGen2, Z-Image Omni. One node for each reference."
            ),
            search_aliases=["kontext", "flux", "klein", "qwen image edit", "reference latent", "mask reference"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="An editing model. Chain the node for several references, in any order."
                ),
                Parsing.Input(
                    "parsing",
                    tooltip=(
                        "Which region of the person each pixel of the reference shows. Of the picture as it was "
                        "encoded, after any cropping; its size does not matter."
                    ),
                ),
                io.Int.Input(
                    "reference",
                    default=1,
                    min=1,
                    max=host_references.MOST,
                    tooltip="Which reference of the conditioning: 1 is the one that was put into it first.",
                ),
                *region_weights(background=0.0),
                *match_inputs(
                    (
                        "How strongly a place in the new picture looks at the same region of the reference (beta). "
                        "Needs target_parsing, or pose and target_pose."
                    ),
                    (
                        "How strongly a place looks at the same place on the reference's body (gamma). Needs pose and "
                        "target_pose."
                    ),
                    default=0.0,
                ),
                *percent_window("the weights and matches work"),
                supported(
                    io.Combo.Input,
                    id="blocks",
                    options=list(host_references.BLOCKS),
                    default="all",
                    advanced=True,
                    tooltip="Which half of the network they work in. Tokens are left out only with all.",
                ),
                supported(
                    io.Boolean.Input,
                    id="keep_positions",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Whether tokens of weight 0 stay in the sequence, where nobody reads them: slower, the same "
                        "picture. For other nodes that infer a grid from the number of tokens."
                    ),
                ),
                Parsing.Input(
                    "target_parsing", optional=True, tooltip="Where the regions shall be in the new picture."
                ),
                PoseKeypoint.Input("pose", optional=True, tooltip="Keypoints of the person in the reference."),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip="The new pose. With pose it tells where the regions will be.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The reference's photo, of the parsing's size. Only for the image output.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The guided model. Connect it to any sampler."),
                io.Image.Output(
                    display_name="image",
                    tooltip=(
                        "The photo with the regions of weight 0 painted grey, for a text encoder that looks at the "
                        "references too."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: object,
        parsing: HumanParsing,
        reference: int = 1,
        background: float = 0.0,
        face: float = 1.0,
        hair: float = 1.0,
        upper: float = 1.0,
        lower: float = 1.0,
        skin: float = 1.0,
        accessory: float = 1.0,
        region_match: float = 0.0,
        body_match: float = 0.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        blocks: str = "all",
        keep_positions: bool = False,
        target_parsing: HumanParsing | None = None,
        pose: object = None,
        target_pose: object = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        omega = (background, face, hair, upper, lower, skin, accessory)
        parsing = parsing.to("cpu")
        shown = host_references.nothing_to_show(NO_PHOTO)
        if image is not None:
            check_parsing(parsing, image, "the parsing")
            shown = to_host(host_references.hide_regions(to_core(image, "the image").cpu(), parsing, omega))
        body = None if pose is None else read_bodies(pose, "the pose")
        target_body = None if target_pose is None else read_bodies(target_pose, "the target pose")
        given = target_parsing is not None
        if region_match > 0 and not given and body is not None and target_body is not None:
            target_parsing = _carried(parsing, body, target_body, target_pose)
        guide = host_references.ReferenceGuide(
            reference=reference,
            parsing=parsing,
            omega=omega,
            beta=region_match,
            gamma=body_match,
            target=None if target_parsing is None else target_parsing.to("cpu"),
            given=given,
            body=body,
            target_body=target_body,
            sigmas=host_unet.sigma_window(model, start_percent, end_percent),
            blocks=blocks,
            keep_positions=keep_positions,
        )
        return io.NodeOutput(host_references.with_guide(model, guide), shown)


def _carried(parsing: HumanParsing, body: Tensor, target_body: Tensor, target_pose: object) -> HumanParsing:
    """The reference's parsing carried along the skeleton into the target pose's canvas."""
    if body.shape[0] not in (1, parsing.batch):
        raise TruePoseError(
            f"there are {body.shape[0]} poses of the reference and {parsing.batch} parsings; expected 1 or as many"
        )
    canvas = read_pose(target_pose)[0]
    # A token covers 16 pixels of most editors: half that is fine enough.
    size = (max(1, round(canvas.height / 8)), max(1, round(canvas.width / 8)))
    return prior_for_poses(parsing, body, target_body, size)


NODES = [GuideReferences]
