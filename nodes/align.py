"""Align Source: a source picture brought to a new pose by recurrent alignment."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.alignment.recurrent import align_person
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Pose

from .body import frames_of, side
from .framing import same_shape
from .schema import Parsing, PoseKeypoint, check_parsing, joined_batch, known, schema, to_core, to_host

MOST_STEPS = 8


class AlignSource(io.ComfyNode):
    """IMAGE, TRUEPOSE_PARSING, two poses -> IMAGE, MASK, TRUEPOSE_PARSING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseAlignSource",
            display_name="Align Source",
            description=(
                "Shows the source person in a new pose without diffusion: carried along the body's surface, then "
                "corrected by a small recurrent network that was trained on mannequins."
            ),
            search_aliases=["RePoseDM", "recurrent pose alignment", "warp"],
            inputs=[
                io.Image.Input("image", tooltip="The source person, one or a batch."),
                Parsing.Input("parsing", tooltip="Its human parsing."),
                PoseKeypoint.Input("pose", tooltip="The source person's keypoints, on the image."),
                PoseKeypoint.Input(
                    "target_pose", tooltip="The new pose. Several frames with one image make several pictures."
                ),
                side("width", "Width of the result in pixels; 0 is the target pose's canvas."),
                side("height", "Height of the result in pixels; 0 is the target pose's canvas."),
                known(
                    io.Int.Input,
                    id="steps",
                    default=1,
                    min=1,
                    max=MOST_STEPS,
                    advanced=True,
                    tooltip="Steps along the path from pose to pose. 1 measures as well as more.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The person in the new pose."),
                io.Mask.Output(
                    display_name="seen",
                    tooltip="How much of each place comes from the source's surface; the rest is its region's colour.",
                ),
                Parsing.Output(display_name="parsing", tooltip="The regions of the result, for Apply HPFA."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        parsing: HumanParsing,
        pose: object,
        target_pose: object,
        width: int = 0,
        height: int = 0,
        steps: int = 1,
    ) -> io.NodeOutput:
        check_parsing(parsing, image, "the parsing")
        pictures = to_core(image, "the image").cpu()
        count = len(pictures)
        source, canvas = frames_of(pose, "the source pose")
        same_shape(Pose(*canvas), tuple(pictures.shape[2:]))
        target, canvas = frames_of(target_pose, "the target pose")
        size = (height or canvas[1], width or canvas[0])
        same_shape(Pose(*canvas), size)
        result = align_person(
            pictures,
            joined_batch(parsing.to("cpu"), count),
            source if len(source) == count else source.expand(count, -1, -1),
            target if len(target) > 1 or count == 1 else target.expand(count, -1, -1),
            size,
            steps=steps,
        )
        picture = to_host(result.picture)
        return io.NodeOutput(picture, result.seen[:, 0], result.parsing, ui=ui.PreviewImage(picture, cls=cls))


NODES = [AlignSource]
