"""SourceNet Encode and Apply HPFA: read the source person once, and let any sampler look at it."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import check_shape
from truepose_core.guidance.scales import weigh_region_tokens
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_prior
from truepose_core.pose import body_tensor, read_pose
from truepose_core.regions import REGION_NAMES, Region
from truepose_core.source.align import with_aligned_tokens
from truepose_core.source.person import SourcePerson

from .host import applied as host_applied
from .host import checks as host_checks
from .host import features as host_features
from .host import model as host_model
from .host import patch as host_patch
from .host import source as host_source
from .host import unet as host_unet
from .host import vision as host_vision
from .schema import (
    CAA,
    Adapter,
    Parsing,
    PoseKeypoint,
    Source,
    joined_batch,
    known,
    percent_window,
    schema,
    to_core,
)

LEARNED = "learned"
MATCHES = (LEARNED, "as set")
AS_PUBLISHED = "as published"
ONCE, LEVELS, EVERY_STEP = "once", "noise levels", "every step"
READINGS = (AS_PUBLISHED, ONCE, LEVELS, EVERY_STEP)
ADAPTER_HINT = (
    "Only for a model that does not carry its adapter along. Models of Load TruePose Model need no connection here."
)


def bodies(keypoints: object, what: str, adapter: host_model.Adapter | None = None) -> Tensor:
    """POSE_KEYPOINT -> [B, 18, 3], the largest person of every frame, normalised to the frame's canvas or, with an
    adapter, to the model's canvas that the frame is fitted into."""
    people = []
    for number, pose in enumerate(read_pose(keypoints)):
        if not any(person.is_visible for person in pose.people):
            raise TruePoseError(f"{what} shows nobody in frame {number}; expected a person with visible keypoints")
        if adapter is not None:
            pose = adapter.frame((pose.height, pose.width)).apply_pose(pose)
        people.append(pose.people[pose.largest()])
    return body_tensor(people)


def source_person(image: Tensor, parsing: HumanParsing, keypoints: object) -> SourcePerson:
    """The people of an IMAGE [B, H, W, C], with a parsing of it (one for each picture, or one for all) and their
    keypoints (likewise, or None). Raises TruePoseError for a parsing or a pose of another picture."""
    picture = to_core(image, "the image").cpu()
    check_canvas(keypoints, image, "the pose")
    if keypoints is not None:
        body = bodies(keypoints, "the source pose")
        if body.shape[0] not in (1, len(picture)):
            raise TruePoseError(
                f"there are {body.shape[0]} source poses and {len(picture)} images; expected 1 or {len(picture)}"
            )
    return SourcePerson(picture, parsing.to("cpu"), None if keypoints is None else body)


def check_canvas(keypoints: object, image: Tensor, what: str) -> None:
    """Raise TruePoseError for a POSE_KEYPOINT whose canvas has not the proportions of the IMAGE [B, H, W, C] it is said
    to be of; None is fine."""
    for pose in () if keypoints is None else read_pose(keypoints):
        check_shape(what, (pose.height, pose.width), "the image", tuple(image.shape[1:3]))


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
                known(
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
                known(
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


REGION_HINTS = {
    Region.BACKGROUND: "0 keeps the source's background out of the picture.",
    Region.FACE: "Keeps the face.",
    Region.HAIR: "Keeps the hair.",
    Region.UPPER: "Keeps the top, its pattern included.",
    Region.LOWER: "Keeps trousers or skirt.",
    Region.SKIN: "Keeps the skin of arms and legs.",
    Region.ACCESSORY: "Keeps shoes, bag, hat, belt, scarf and glasses.",
}


def region_weights(background: float = 1.0) -> list[io.Input]:
    """An input for the weight of each region."""
    return [
        io.Float.Input(
            name,
            default=background if region == Region.BACKGROUND else 1.0,
            min=0.0,
            max=1.0,
            step=0.05,
            tooltip=(
                f"Weight of the source's {name}, 0 to 1. {REGION_HINTS[region]} At 0 its tokens "
                "are not read at all, which also saves time."
            ),
        )
        for region, name in zip(Region, REGION_NAMES, strict=True)
    ]


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
                io.Float.Input(
                    "region_match",
                    default=2.0,
                    min=0.0,
                    max=16.0,
                    step=0.1,
                    tooltip=(
                        "How strongly a place in the target looks at the same region of the source "
                        "(beta). Needs a target "
                        "parsing, or a target pose and a source pose."
                    ),
                ),
                known(
                    io.Float.Input,
                    id="body_match",
                    default=0.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    advanced=True,
                    tooltip=(
                        "How strongly a place looks at the same place on the source's body (gamma). "
                        "Needs a source pose and a "
                        "target pose."
                    ),
                ),
                *percent_window("the source is seen"),
                known(
                    io.Combo.Input,
                    id="blocks",
                    options=list(host_unet.BLOCKS),
                    default="all",
                    advanced=True,
                    tooltip="Which parts of the UNet see the source. The decoder alone keeps texture and costs less.",
                ),
                known(
                    io.Combo.Input,
                    id="unconditional",
                    options=["drop", "keep"],
                    default="drop",
                    tooltip=(
                        "Whether the negative prompt sees the source too. drop: guidance also "
                        "strengthens the source, and it "
                        "is faster."
                    ),
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
                known(
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
                known(
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
        applied = applied_source(
            adapter,
            source,
            (background, face, hair, upper, lower, skin, accessory),
            strength,
            None if match == LEARNED else (region_match, body_match),
            target_parsing,
            target_pose,
            beta=region_match,
            gamma=body_match,
            sigmas=host_unet.sigma_window(model, start_percent, end_percent),
            blocks=blocks,
            keep_unconditional=unconditional == "keep",
            style=style,
        )
        return io.NodeOutput(host_patch.with_hpfa(model, applied))


def applied_source(
    adapter: host_model.Adapter | None,
    source: host_features.HostFeatures,
    omega: tuple[float, ...],
    strength: float,
    set_match: tuple[float, float] | None,
    target_parsing: HumanParsing | None,
    target_pose: object,
    **more: object,
) -> host_applied.AppliedSource:
    """One source as a model shall read it. set_match: (region match, body match) in place of what an adapter learned;
    more: see `AppliedSource`."""
    body = None if target_pose is None else bodies(target_pose, "the target pose", adapter)
    source = with_aligned_tokens(source, body, host_features.CombinedHostFeatures)
    given = target_parsing is not None
    parsing = target_parsing.to("cpu") if given else None
    if given and adapter is not None:
        parsing = adapter.frame(parsing.size).apply_parsing(parsing)
    wants_regions = more.get("beta", 0) > 0 or adapter is not None
    if not given and body is not None and source.body is not None and wants_regions:
        # A TruePose model has learned with the parsing carried at its latent's size.
        parsing = source.prior(body, *(source.parsing.size if adapter is None else source.latent_size))
    learned: dict = {}
    if adapter is not None and source.family == adapter.config.family and strength > 0 and any(omega):
        weights = torch.tensor(omega)
        weights = None if bool((weights == 1).all()) else weights
        beta, gamma = set_match or (None, None)
        weighed = weigh_region_tokens(source, weights, strength)
        learned = {
            "weights": adapter.site_weights(beta, gamma),
            "cross": adapter.cross_tokens(weighed.caa, "target"),
            "aligned": adapter.aligned(source, body, weights, strength),
        }
    return host_applied.AppliedSource(
        source=source,
        omega=omega,
        strength=strength,
        target=parsing,
        target_body=body,
        given=given,
        **learned,
        **more,
    )


def carried_parsing(
    parsing: HumanParsing, body: Tensor, target_body: Tensor, size: tuple[int, int] | None = None
) -> HumanParsing:
    """The sources' parsing carried along the skeleton from their keypoints body [S, 18, 3] to the target poses
    [T, 18, 3]. size: (height, width) of the result, by default the parsing's own."""
    count, batch = target_body.shape[0], parsing.batch
    if count > 1 and batch > 1 and count != batch:
        raise TruePoseError(
            f"there are {count} target poses and {batch} source images; expected as many, or 1 of either"
        )
    total = max(count, batch)
    masks = joined_batch(parsing, total)
    return region_prior(masks, body.expand(total, -1, -1), target_body.expand(total, -1, -1), *(size or parsing.size))


NODES = [SourceNetEncode, ApplyHPFA]
