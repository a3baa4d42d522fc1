"""What all nodes share: socket types, the menu, inputs that several have, and pictures, parsings and poses as given."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import check_shape
from truepose_core.parsing import HumanParsing
from truepose_core.pose import body_tensor, read_pose
from truepose_core.regions import REGION_NAMES, Region
from truepose_core.source.person import SourcePerson

if TYPE_CHECKING:
    from .host.model import Adapter as TruePoseAdapter

CATEGORY = "TruePose"
MENU: dict[str, tuple[str, ...]] = {
    "model": (
        "LoadModel",
        "EmptyLatent",
        "ApplyPoseEncoder",
        "PictureContext",
        "LoadCAAAdapter",
        "LoadOpenCLIPVision",
        "LoadCFLD",
        "ApplyCFLD",
        "RestoreCFLD",
    ),
    "source": (
        "SourceNetEncode",
        "ApplyHPFA",
        "CombineSources",
        "CAAEncode",
        "ApplyCAA",
        "GuideReferences",
        "AttentionView",
    ),
    "sampling": ("HPFASampler", "Guider", "Apply3DGuidance", "PoseFieldGuidance"),
    "pose": (
        "LoadPose",
        "EstimatePose",
        "PoseGallery",
        "EditPose",
        "TransformPose",
        "RetargetPose",
        "InterpolatePoses",
        "DrawSkeleton",
    ),
    "parsing": (
        "HumanParsing",
        "ParsingFromMasks",
        "ParsingFromLabels",
        "EditParsing",
        "ParsingToMasks",
        "ParsingToSEGS",
        "FreezeRegions",
    ),
    "body": ("LoadBodyPose", "BodyPoseFromKeypoints", "RenderBody", "CarryAlongBody", "AlignSource"),
    "photo": ("FramePerson", "PasteBack", "HandsAndFace", "Mannequin"),
}
"""Submenu -> its nodes, without the prefix of their ids, as a user comes to them."""
COMMON_NAMES = frozenset(
    {
        "LoadPose",
        "EstimatePose",
        "PoseGallery",
        "EditPose",
        "TransformPose",
        "RetargetPose",
        "InterpolatePoses",
        "DrawSkeleton",
        "HumanParsing",
        "RenderBody",
        "PasteBack",
        "Mannequin",
    }
)
"""Nodes whose names other packs have too: ours say whose they are."""
Parsing = io.Custom("TRUEPOSE_PARSING")
Source = io.Custom("TRUEPOSE_SOURCE")
PoseKeypoint = io.Custom("POSE_KEYPOINT")
Adapter = io.Custom("TRUEPOSE_ADAPTER")
CAA = io.Custom("TRUEPOSE_CAA")
CAAAdapter = io.Custom("TRUEPOSE_CAA_ADAPTER")


ADAPTER_HINT = (
    "Only for a model that does not carry its adapter along. Models of Load TruePose Model need no connection here."
)
REGION_HINTS = {
    Region.BACKGROUND: "0 keeps the source's background out of the picture.",
    Region.FACE: "Keeps the face.",
    Region.HAIR: "Keeps the hair.",
    Region.UPPER: "Keeps the top, its pattern included.",
    Region.LOWER: "Keeps trousers or skirt.",
    Region.SKIN: "Keeps the skin of arms and legs.",
    Region.ACCESSORY: "Keeps shoes, bag, hat, belt, scarf and glasses.",
}


def supported(factory: type, **keywords: Any) -> Any:
    """Call with the keywords that this host's version takes: `advanced` and `search_aliases` came after 0.3.64.

    Only for keywords that change how a node is shown, never for what it does.
    """
    names = inspect.signature(factory).parameters
    return factory(**{k: v for k, v in keywords.items() if k in names})


def schema(*, node_id: str, display_name: str, **keywords: Any) -> io.Schema:
    """`io.Schema` in the node's submenu."""
    name = node_id.removeprefix(CATEGORY)
    menu = next(menu for menu, names in MENU.items() if name in names)
    if name in COMMON_NAMES:
        display_name = f"{display_name} ({CATEGORY})"
    return supported(io.Schema, node_id=node_id, display_name=display_name, category=f"{CATEGORY}/{menu}", **keywords)


def match_inputs(region: str, body: str, default: float = 2.0, **more: Any) -> list[io.Input]:
    """region_match (beta), with this default, and body_match (gamma). region, body: their tooltips. more: other
    keywords of the host's."""
    return [
        supported(
            io.Float.Input, id="region_match", default=default, min=0.0, max=16.0, step=0.1, tooltip=region, **more
        ),
        supported(
            io.Float.Input,
            id="body_match",
            min=0.0,
            max=64.0,
            step=0.5,
            tooltip=body,
            **{"default": 0.0, "advanced": True, **more},
        ),
    ]


def unconditional_input(tooltip: str) -> io.Input:
    """Whether the negative prompt is left without what a node brings."""
    return supported(io.Combo.Input, id="unconditional", options=["drop", "keep"], default="drop", tooltip=tooltip)


def percent_window(what: str) -> list[io.Input]:
    """start_percent and end_percent: the part of the sampling in which something happens ("the source is seen")."""
    return [
        io.Float.Input(
            f"{end}_percent",
            default=default,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip=f"Share of the sampling {word} which {what}.",
        )
        for end, default, word in (("start", 0.0, "after"), ("end", 1.0, "until"))
    ]


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


def to_core(image: Tensor, what: str) -> Tensor:
    """IMAGE [B, H, W, 1, 3 or 4] -> [B, 3, H, W] in [0, 1]; alpha is dropped, as the host's VAE does."""
    if image.dim() != 4 or image.shape[-1] not in (1, 3, 4):
        raise TruePoseError(f"{what} is {tuple(image.shape)}; expected an IMAGE [B, H, W, 3]")
    if not bool(image.isfinite().all()):
        raise TruePoseError(f"{what} holds NaN; look at the node that made it")
    image = image[..., :3] if image.shape[-1] == 4 else image.expand(*image.shape[:-1], 3)
    return image.movedim(-1, 1).float().clamp(0, 1)


def to_host(image: Tensor) -> Tensor:
    """[B, 3, H, W] -> IMAGE [B, H, W, 3]."""
    return image.movedim(1, -1).float().contiguous()


def to_mask(mask: Tensor, what: str) -> Tensor:
    """MASK [B, H, W], [H, W] or [B, 1, H, W] -> [B, H, W] in [0, 1]."""
    if mask.dim() == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.dim() == 2:
        mask = mask[None]
    if mask.dim() != 3:
        raise TruePoseError(f"{what} is {tuple(mask.shape)}; expected a MASK [B, H, W]")
    if not bool(mask.isfinite().all()):
        raise TruePoseError(f"{what} holds NaN; look at the node that made it")
    return mask.float().clamp(0, 1)


def check_parsing(parsing: HumanParsing, image: Tensor, what: str) -> None:
    """Raise unless the parsing is of the IMAGE [B, H, W, C]: its size, its batch or 1, and somebody in it."""
    height, width = image.shape[1:3]
    if parsing.size != (height, width):
        raise TruePoseError(
            f"{what} is {parsing.size[1]}x{parsing.size[0]} and the image {width}x{height} (width x height); "
            "make the parsing from the same image, after any resizing"
        )
    if parsing.batch not in (1, image.shape[0]):
        raise TruePoseError(
            f"{what} holds {parsing.batch} pictures and the image {image.shape[0]}; expected 1 or {image.shape[0]}"
        )
    if parsing.is_empty:
        raise TruePoseError(f"{what} shows nobody: it is background everywhere. Check the masks it was made from")


def joined_batch(parsing: HumanParsing, batch: int) -> HumanParsing:
    """A parsing of one picture repeated to a batch."""
    if parsing.batch == batch:
        return parsing
    return HumanParsing(torch.cat([parsing.masks] * batch))


def read_bodies(keypoints: object, what: str, adapter: TruePoseAdapter | None = None) -> Tensor:
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
        body = read_bodies(keypoints, "the source pose")
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
