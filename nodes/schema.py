"""What the schemas of all nodes share: socket types, the category, and keywords that older hosts do not know."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing

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


def known(factory: type, **keywords: Any) -> Any:
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
    return known(io.Schema, node_id=node_id, display_name=display_name, category=f"{CATEGORY}/{menu}", **keywords)


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
