"""Frame Person, Paste Back, and Hands and Face."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import (
    BUCKETS,
    Box,
    Crop,
    best_bucket,
    box_mask,
    crop_person,
    cut_sides,
    detail_boxes,
    grow,
    paste_back,
    person_box,
    uncovered,
)
from truepose_core.framing.frame import check_shape
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, read_pose, write_pose
from truepose_core.pose.retarget import missing_parts
from truepose_core.regions import Region

from .host import model as host_model
from .parsing import SEG, to_segs
from .pose_edit import AS_SOURCE
from .schema import Adapter, Parsing, PoseKeypoint, schema, supported, to_core, to_host, to_mask

CropType = io.Custom("TRUEPOSE_CROP")

OWN_SIZE = "own size"
PADDING = {"white": 1.0, "grey": 0.5, "black": 0.0}
KEEP, PLAIN = "keep", "plain"
HANDS = ("hand_left", "hand_right")


def one_per_picture(pose: object, batch: int) -> list[Pose]:
    """The frames of POSE_KEYPOINT, one for each picture of a batch; one frame serves all."""
    poses = read_pose(pose)
    if len(poses) not in (1, batch):
        raise TruePoseError(f"the pose has {len(poses)} frames and there are {batch} pictures; expected 1 or {batch}")
    return poses * batch if len(poses) == 1 else poses


def same_shape(pose: Pose, size: tuple[int, int]) -> None:
    """Raise unless a pose's canvas has the aspect ratio of a picture of size (height, width)."""
    check_shape("the pose", (pose.height, pose.width), "the picture", size)


class FramePerson(io.ComfyNode):
    """IMAGE, TRUEPOSE_PARSING or POSE_KEYPOINT -> the crop around the person, and TRUEPOSE_CROP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseFramePerson",
            display_name="Frame Person",
            description="Crops a photo around a person to a size that suits the model, without stretching.",
            search_aliases=["crop person", "bucket", "resize", "crop and stitch"],
            inputs=[
                io.Image.Input("image", tooltip="The photo, of any size."),
                Parsing.Input("parsing", optional=True, tooltip="The photo's parsing. This or the pose is needed."),
                PoseKeypoint.Input(
                    "pose", optional=True, tooltip="The photo's keypoints; in a group they say who is meant."
                ),
                Adapter.Input(
                    "adapter", optional=True, tooltip="Of a TruePose model: its own size is taken, whatever sizes says."
                ),
                io.Combo.Input(
                    "sizes",
                    options=[*BUCKETS, OWN_SIZE],
                    default="SD1.5",
                    tooltip="The best of this family's sizes is taken; own size takes width and height.",
                ),
                io.Int.Input("width", default=512, min=16, max=4096, step=8, tooltip="For own size: pixels."),
                io.Int.Input("height", default=768, min=16, max=4096, step=8, tooltip="For own size: pixels."),
                io.Float.Input(
                    "margin",
                    default=0.1,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="What is left free on each side, in the person's longer side. A new pose may need more.",
                ),
                io.Int.Input(
                    "person",
                    default=-1,
                    min=-1,
                    max=99,
                    tooltip="Which person of the pose, from 0; -1 is the largest.",
                ),
                io.Boolean.Input(
                    "enlarge",
                    default=True,
                    tooltip="Enlarge a small person to fill the size. Off shows more of the photo at its own scale.",
                ),
                supported(
                    io.Boolean.Input,
                    id="steady",
                    default=False,
                    advanced=True,
                    tooltip="One crop for the whole batch, so that frames of a video do not shake.",
                ),
                supported(
                    io.Combo.Input,
                    id="padding",
                    options=list(PADDING),
                    default="white",
                    advanced=True,
                    tooltip="What is shown where the crop reaches out of the photo.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The crop at the model's size."),
                Parsing.Output(display_name="parsing", tooltip="Its parsing; all background if none was given."),
                PoseKeypoint.Output(display_name="pose", tooltip="Its keypoints, of this person alone."),
                CropType.Output(display_name="crop", tooltip="Connect it to Paste Back."),
                io.Mask.Output(display_name="outside", tooltip="Where the crop lies outside of the photo."),
                io.Int.Output(display_name="width", tooltip="Width of the crop at the model's size."),
                io.Int.Output(display_name="height", tooltip="Height of the crop at the model's size."),
                io.String.Output(display_name="info", tooltip="What was done: who, where, the scale, what is cut."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        parsing: HumanParsing | None = None,
        pose: object = None,
        adapter: host_model.Adapter | None = None,
        sizes: str = "SD1.5",
        width: int = 512,
        height: int = 768,
        margin: float = 0.1,
        person: int = -1,
        enlarge: bool = True,
        steady: bool = False,
        padding: str = "white",
    ) -> io.NodeOutput:
        photos = to_core(image, "the image")
        batch, size = len(photos), tuple(photos.shape[2:])
        people = [None] * batch if pose is None else chosen_people(pose, batch, size, person)
        if parsing is not None and len(parsing) not in (1, batch):
            raise TruePoseError(
                f"the parsing holds {len(parsing)} pictures and the image {batch}; expected 1 or {batch}"
            )
        maps = [None if parsing is None else parsing[i if len(parsing) > 1 else 0] for i in range(batch)]
        boxes = [person_box(size, one, who) for one, who in zip(maps, people, strict=True)]
        if adapter is not None:
            candidates = (adapter.size,)
        else:
            candidates = ((height, width),) if sizes == OWN_SIZE else BUCKETS[sizes]
        used = [enclosing_box(boxes)] * batch if steady else boxes
        target = best_bucket([grow(box, margin) for box in used], candidates)
        crops = tuple(crop_person(size, box, target, margin=margin, enlarge=enlarge) for box in used)

        pictures = torch.cat([crop.apply(photos[i : i + 1], PADDING[padding]) for i, crop in enumerate(crops)])
        framed = [
            empty_parsing(target) if one is None else crop.apply_parsing(one)
            for crop, one in zip(crops, maps, strict=True)
        ]
        framed = HumanParsing(torch.cat([one.masks for one in framed]))
        poses = [
            Pose(target[1], target[0], () if who is None else (crop.apply_person(who),))
            for crop, who in zip(crops, people, strict=True)
        ]
        inside = torch.cat([crop.apply(photos.new_ones(1, 1, *size), 0.0) for crop in crops])[:, 0]
        info = "\n".join(crop_text(crop, box, size, who) for crop, box, who in zip(crops, boxes, people, strict=True))
        return io.NodeOutput(
            to_host(pictures), framed, write_pose(poses), crops, 1 - inside, target[1], target[0], info
        )


def chosen_people(pose: object, batch: int, size: tuple[int, int], index: int) -> list[Person]:
    """The person meant in each picture; -1 is the largest."""
    people = []
    for one in one_per_picture(pose, batch):
        same_shape(one, size)
        people.append(one.people[one.largest()] if index < 0 else one.person(index))
    return people


def empty_parsing(size: tuple[int, int]) -> HumanParsing:
    """A parsing of (height, width) that is background everywhere."""
    return HumanParsing.from_labels(torch.zeros(1, *size, dtype=torch.int64))


def enclosing_box(boxes: list[Box]) -> Box:
    """The box around boxes."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def crop_text(crop: Crop, box: Box, size: tuple[int, int], person: Person | None = None) -> str:
    """A line about a crop for the user."""
    sides = cut_sides(box, size)
    cut = f"; the person reaches the photo's {' and '.join(sides)} edge and may be cut there" if sides else ""
    missing = () if person is None else missing_parts(person)
    if missing:
        cut += f"; it shows no {', no '.join(missing)}: Retarget Pose can cut the new pose likewise ({AS_SOURCE})"
    return crop.describe() + cut


class PasteBack(io.ComfyNode):
    """Photo, picture and TRUEPOSE_CROP -> photo."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePosePasteBack",
            display_name="Paste Back",
            description="Puts a picture back into the photo that Frame Person cropped it from.",
            search_aliases=["stitch", "uncrop", "composite"],
            inputs=[
                io.Image.Input("photo", tooltip="The photo that went into Frame Person."),
                io.Image.Input("image", tooltip="The result, at the crop's size or enlarged since."),
                CropType.Input("crop", tooltip="From Frame Person."),
                Parsing.Input(
                    "parsing",
                    optional=True,
                    tooltip="The result's parsing: only the person is pasted, and the photo's background stays.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="What to paste, in place of the parsing."),
                Parsing.Input(
                    "photo_parsing",
                    optional=True,
                    tooltip="The photo's own parsing: says where the old person shows beside the new one.",
                ),
                io.Int.Input(
                    "feather",
                    default=16,
                    min=0,
                    max=512,
                    tooltip="Over how many pixels of the photo the picture fades in from the crop's edge.",
                ),
                io.Combo.Input(
                    "background",
                    options=[KEEP, PLAIN],
                    default=KEEP,
                    tooltip="Around what is pasted: keep the photo, or a plain colour (with parsing or mask).",
                ),
                io.String.Input("color", default="#ffffff", tooltip="The plain colour, as #rrggbb or by its name."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The photo with the picture in it."),
                io.Mask.Output(
                    display_name="pasted",
                    tooltip="How much of a pixel is the pasted picture. Inverted: the background, for inpainting.",
                ),
                io.Mask.Output(
                    display_name="uncovered",
                    tooltip="For inpainting: the seam and, with photo_parsing, where the old person still shows.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        photo: Tensor,
        image: Tensor,
        crop: tuple[Crop, ...],
        parsing: HumanParsing | None = None,
        mask: Tensor | None = None,
        photo_parsing: HumanParsing | None = None,
        feather: int = 16,
        background: str = KEEP,
        color: str = "#ffffff",
    ) -> io.NodeOutput:
        if parsing is not None and mask is not None:
            raise TruePoseError("both parsing and mask say what to paste; connect one of them")
        photos, pictures = to_core(photo, "the photo"), to_core(image, "the image")
        shape = None if mask is None else to_mask(mask, "the mask")
        if parsing is not None:
            shape = 1 - parsing.mask(Region.BACKGROUND)
        fill = read_color(color) if background == PLAIN else None
        result, weight = paste_back(photos, pictures, crop, feather=feather, mask=shape, color=fill)
        old = None
        if photo_parsing is not None:
            if photo_parsing.size != tuple(photos.shape[2:]) or len(photo_parsing) not in (1, len(result)):
                raise TruePoseError(
                    f"photo_parsing is {tuple(photo_parsing.masks.shape)} and the photo {tuple(photos.shape)}; "
                    "expected the parsing of the whole photo"
                )
            old = 1 - photo_parsing.mask(Region.BACKGROUND).to(weight)
        return io.NodeOutput(to_host(result), weight, uncovered(weight, old))


def read_color(text: str) -> list[float]:
    """#rrggbb or a colour's name -> three values in [0, 1]."""
    from PIL import ImageColor

    try:
        return [value / 255 for value in ImageColor.getrgb(text.strip())[:3]]
    except ValueError as error:
        raise TruePoseError(f"color is {text!r}; expected #rrggbb, for example #ffffff, or a colour's name") from error


class HandsAndFace(io.ComfyNode):
    """POSE_KEYPOINT -> SEGS and MASKs of hands and faces."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseHandsAndFace",
            display_name="Hands and Face",
            description="Finds hands and faces from keypoints, for detailer nodes.",
            search_aliases=["face detailer", "hand detailer", "SEGS", "hand mask", "face mask"],
            inputs=[
                io.Image.Input("image", tooltip="The picture that shows the pose: the masks get its size."),
                PoseKeypoint.Input("pose", tooltip="Its keypoints, with hands and face points if there are any."),
                Parsing.Input(
                    "parsing", optional=True, tooltip="Its parsing: the face's mask then follows the face's outline."
                ),
                io.Int.Input("person", default=-1, min=-1, max=99, tooltip="Whose, from 0; -1 is everybody."),
                io.Boolean.Input("hands", default=True, tooltip="Whether hands become SEGS."),
                io.Boolean.Input("face", default=True, tooltip="Whether faces become SEGS."),
                supported(
                    io.Float.Input,
                    id="crop_factor",
                    default=2.0,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    advanced=True,
                    tooltip="How much of the surroundings a SEG shows: 1 is the hand's or the face's own box.",
                ),
            ],
            outputs=[
                io.SEGS.Output(display_name="segs", tooltip="Hands and faces as the Impact Pack uses them."),
                io.Mask.Output(display_name="hands", tooltip="All hands."),
                io.Mask.Output(display_name="face", tooltip="All faces."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        pose: object,
        parsing: HumanParsing | None = None,
        person: int = -1,
        hands: bool = True,
        face: bool = True,
        crop_factor: float = 2.0,
    ) -> io.NodeOutput:
        size = tuple(image.shape[1:3])
        poses = read_pose(pose)
        if len(poses) != 1 or image.shape[0] != 1:
            raise TruePoseError(
                f"SEGS are of one picture; there are {image.shape[0]} pictures and {len(poses)} frames of the pose"
            )
        same_shape(poses[0], size)
        if parsing is not None and (parsing.size != size or len(parsing) != 1):
            raise TruePoseError(
                f"the parsing is {tuple(parsing.masks.shape)}; expected the parsing of this picture, "
                f"[1, 7, {size[0]}, {size[1]}]"
            )
        poses[0].largest()  # somebody has to be there
        people = poses[0].people if person < 0 else (poses[0].person(person),)
        segs, together = [], {name: torch.zeros(1, *size) for name in (*HANDS, "face")}
        for who in people:
            for name, box in detail_boxes(who, size).items():
                shape = box_mask(box, size)
                if name == "face" and parsing is not None:
                    shape = torch.minimum(box_mask(grow(box, 0.25), size), parsing.mask(Region.FACE)[0].float().cpu())
                together[name] = torch.maximum(together[name], shape)
                if (hands and name in HANDS) or (face and name == "face"):
                    segs += seg_of(shape, name, crop_factor)
        both = torch.maximum(together["hand_left"], together["hand_right"])
        return io.NodeOutput((size, segs), both, together["face"])


def seg_of(mask: Tensor, label: str, crop_factor: float) -> list[SEG]:
    """One SEG of a mask [H, W]; none where the mask is empty."""
    _, segs = to_segs(HumanParsing.from_masks({Region.SKIN: mask}), ["skin"], crop_factor)
    return [one._replace(label=label) for one in segs]


NODES = [FramePerson, PasteBack, HandsAndFace]
