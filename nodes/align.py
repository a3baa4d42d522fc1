"""Align Source: a source picture, and what a model has read of it, brought to a new pose by recurrent alignment."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.alignment.recurrent import align_person
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import fit
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Pose
from truepose_core.source.align import align_source
from truepose_core.source.person import SourcePerson

from .body import frames_of, side
from .host.body import blocked
from .host.features import CombinedHostFeatures, HostFeatures
from .photo import same_shape
from .schema import Parsing, PoseKeypoint, Source, check_parsing, joined_batch, schema, supported, to_core, to_host

MOST_STEPS = 8
CELL = 8
"""SourceNet Encode pads a photo to whole cells of this many pixels."""


class AlignSource(io.ComfyNode):
    """IMAGE, TRUEPOSE_PARSING, two poses, TRUEPOSE_SOURCE -> IMAGE, MASK, TRUEPOSE_PARSING, TRUEPOSE_SOURCE."""

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
                supported(
                    io.Int.Input,
                    id="steps",
                    default=1,
                    min=1,
                    max=MOST_STEPS,
                    advanced=True,
                    tooltip="Steps along the path from pose to pose. 1 measures as well as more.",
                ),
                Source.Input(
                    "source",
                    optional=True,
                    tooltip="What SourceNet Encode read of this image, to align it as well. Not for the bundled model, "
                    "which does so by itself.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The person in the new pose."),
                io.Mask.Output(
                    display_name="seen",
                    tooltip="How much of each place comes from the source's surface; the rest is its region's colour.",
                ),
                Parsing.Output(display_name="parsing", tooltip="The regions of the result, for Apply HPFA."),
                Source.Output(
                    display_name="source",
                    tooltip="The source with its tokens aligned to the new pose beside its own, for Apply HPFA.",
                ),
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
        source: HostFeatures | None = None,
    ) -> io.NodeOutput:
        check_parsing(parsing, image, "the parsing")
        pictures = to_core(image, "the image").cpu()
        count = len(pictures)
        body, canvas = frames_of(pose, "the source pose")
        same_shape(Pose(*canvas), tuple(pictures.shape[2:]))
        target, canvas = frames_of(target_pose, "the target pose")
        size = (height or canvas[1], width or canvas[0])
        same_shape(Pose(*canvas), size)
        target = target if len(target) > 1 or count == 1 else target.expand(count, -1, -1)
        result = align_person(
            pictures,
            joined_batch(parsing.to("cpu"), count),
            body if len(body) == count else body.expand(count, -1, -1),
            target,
            size,
            steps=steps,
        )
        aligned = blocked("Align Source gives a source only where one is connected to it")
        if source is not None:
            same_shape(Pose(*canvas), tuple(pictures.shape[2:]))
            whole, there = as_read(pictures, target, source.parsing.size)
            aligned, _ = align_source(source, whole, there, steps=steps, kind=CombinedHostFeatures)
        picture = to_host(result.picture)
        return io.NodeOutput(picture, result.seen[:, 0], result.parsing, aligned, ui=ui.PreviewImage(picture, cls=cls))


def as_read(image: Tensor, target: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The picture [B, 3, H, W] and keypoints on pictures of its shape, in the canvas of (height, width) in which
    SourceNet Encode read it. Raises TruePoseError where it cannot be the picture that was read."""
    frame = fit((image.shape[2], image.shape[3]), multiple=CELL)
    if frame.size_model != size:
        raise TruePoseError(
            f"the source was read from a picture of {size[1]}x{size[0]}, and the image here is "
            f"{image.shape[3]}x{image.shape[2]}; connect the image that SourceNet Encode read"
        )
    return SourcePerson(image, None).framed(frame).image, frame.apply_keypoints(target)


NODES = [AlignSource]
