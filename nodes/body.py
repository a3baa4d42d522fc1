"""Load Body Pose, Body Pose from Keypoints, Render Body, Carry Along Body."""

from __future__ import annotations

import math
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from truepose_core.body.lift import FIT_STEPS, HYPOTHESES
from truepose_core.body.person import METHODS, SKELETON, PosedBody, carry_person, girth_of, lift_person
from truepose_core.body.pictures import CONVENTIONS, coordinate_picture, depth_picture, normal_picture, semantic_picture
from truepose_core.body.reading import SUFFIXES, read_body
from truepose_core.body.render import MIRRORS
from truepose_core.body.smpl import SmplModel
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Pose, body_tensor, read_pose

from .host import body as host_body
from .host import files as host_files
from .photo import same_shape
from .schema import Parsing, PoseKeypoint, check_parsing, joined_batch, schema, supported, to_core, to_host

BodyType = io.Custom("TRUEPOSE_BODY")

NO_FILE = "(none)"
GENERIC = "generic body"
LARGEST_SIDE = 4096
_PREVIEW = 512
"""Height of the body that a node shows, in pixels."""


def body_files() -> list[str]:
    """npz and json files in the host's input folder, sub-folders included, as paths relative to it."""
    folder = Path(folder_paths.get_input_directory())
    return sorted(file.relative_to(folder).as_posix() for suffix in SUFFIXES for file in folder.rglob(f"*{suffix}"))


def shown(body: PosedBody, cls: type[io.ComfyNode]) -> ui.PreviewImage:
    """The bodies as normals, on the node."""
    width, height = body.canvas
    scale = min(1.0, _PREVIEW / height)
    maps = body.render(max(1, round(height * scale)), max(1, round(width * scale)))
    return ui.PreviewImage(to_host(normal_picture(maps)), cls=cls)


def frames_of(pose: object, what: str, person: int = -1) -> tuple[Tensor, tuple[int, int]]:
    """POSE_KEYPOINT -> one person of every frame [N, 18, 3], normalised, and the canvas (width, height) of all."""
    poses = read_pose(pose)
    sizes = {(one.width, one.height) for one in poses}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise TruePoseError(f"the frames of {what} have canvases of {listed}; expected one size")
    people = []
    for number, one in enumerate(poses):
        where = f"{what}, frame {number}" if len(poses) > 1 else what
        try:
            people.append(one.people[one.largest()] if person < 0 else one.person(person))
        except TruePoseError as error:
            raise TruePoseError(f"{where}: {error}") from error
    return body_tensor(people), sizes.pop()


def either(pose: object, body: PosedBody | None, what: str) -> tuple[Tensor | PosedBody, tuple[int, int]]:
    """What is connected of two inputs, and its canvas. Raises unless it is one."""
    if (pose is None) == (body is None):
        given = "neither a pose nor a body" if pose is None else "both a pose and a body"
        raise TruePoseError(f"the {what} has {given}; connect one of them")
    return frames_of(pose, f"the {what} pose") if body is None else (body, body.canvas)


def side(name: str, what: str) -> io.Input:
    """A side of a picture in pixels, 0 for the canvas's."""
    return io.Int.Input(name, default=0, min=0, max=LARGEST_SIDE, step=8, tooltip=what)


class LoadBodyPose(io.ComfyNode):
    """A body file -> TRUEPOSE_BODY."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseLoadBodyPose",
            display_name="Load Body Pose",
            description="Reads a 3D body from a file: ours, 4D-Humans, SMPLer-X, SAM 3D Body, AMASS.",
            search_aliases=["SMPL", "HMR2", "4D-Humans", "3D pose", "body parameters"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *body_files()],
                    default=NO_FILE,
                    tooltip="An npz or json file in ComfyUI's input folder. Pickles are never opened.",
                ),
                io.Combo.Input(
                    "smpl",
                    options=[GENERIC, *host_files.files(".npz")],
                    default=GENERIC,
                    tooltip="What draws the body: the generic one, or your own SMPL model, an npz in models/truepose.",
                ),
                io.Int.Input(
                    "person", default=-1, min=-1, max=9999, tooltip="Which person of the file, from 0. -1: the largest."
                ),
                *(
                    side(name, f"{name.capitalize()} of the picture the body belongs to, for files that do not say it.")
                    for name in ("width", "height")
                ),
            ],
            outputs=[
                BodyType.Output(display_name="body", tooltip="The body, with its camera."),
                io.Int.Output(display_name="width", tooltip="Width of its picture in pixels."),
                io.Int.Output(display_name="height", tooltip="Height of its picture in pixels."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, smpl: str | None = None, **_: object) -> str:
        paths = [cls._path(file)] if file and file != NO_FILE else []
        paths += [host_files.find(smpl)] if smpl and smpl != GENERIC else []
        return " ".join(f"{path} {path.stat().st_mtime_ns if path.is_file() else 'missing'}" for path in paths)

    @classmethod
    def _path(cls, file: str) -> Path:
        folder = Path(folder_paths.get_input_directory()).resolve()
        path = (folder / file).resolve()
        if not path.is_relative_to(folder):
            raise TruePoseError(f"body file {file!r} is outside ComfyUI's input folder; copy it there")
        return path

    @classmethod
    def execute(
        cls, file: str = NO_FILE, smpl: str = GENERIC, person: int = -1, width: int = 0, height: int = 0
    ) -> io.NodeOutput:
        if file == NO_FILE:
            raise TruePoseError("no body file is chosen; put an npz or json file into ComfyUI's input folder")
        if bool(width) != bool(height):
            raise TruePoseError(f"width is {width} and height {height}; give both, or neither")
        given = (width, height) if width else None
        pose, said = read_body(cls._path(file), given, None if person < 0 else person)
        canvas = said or given
        if canvas is None:
            raise TruePoseError(f"{file} does not say how large its picture is; set width and height")
        model = None if smpl == GENERIC else SmplModel.load(host_files.find(smpl))
        body = PosedBody(pose, canvas, model)
        return io.NodeOutput(body, *canvas, ui=shown(body, cls))


class BodyPoseFromKeypoints(io.ComfyNode):
    """POSE_KEYPOINT -> TRUEPOSE_BODY."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseBodyPoseFromKeypoints",
            display_name="Body Pose from Keypoints",
            description="Lifts 2D keypoints to a 3D body: what is near, what is far, and how each limb is turned.",
            search_aliases=["lift pose", "2D to 3D", "SMPL from openpose"],
            inputs=[
                PoseKeypoint.Input("pose", tooltip="The keypoints, of one frame or many."),
                BodyType.Input(
                    "body",
                    optional=True,
                    tooltip="Another body of the same person: its shape, girth and model are kept.",
                ),
                Parsing.Input(
                    "parsing",
                    optional=True,
                    tooltip="The parsing of the same picture: loose clothes and long hair make the body wider.",
                ),
                io.Int.Input(
                    "person", default=-1, min=-1, max=99, tooltip="Which person of the pose, from 0. -1: the largest."
                ),
                io.Int.Input(
                    "hypothesis",
                    default=0,
                    min=0,
                    max=HYPOTHESES - 1,
                    tooltip="0 is the likeliest body. 1 and 2 are the next ones: try them where depth came out wrong.",
                ),
                supported(
                    io.Int.Input,
                    id="steps",
                    default=FIT_STEPS,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="How long the body is moved until its keypoints lie on the given ones. 0: not at all.",
                ),
            ],
            outputs=[
                BodyType.Output(display_name="body", tooltip="One body per frame."),
                io.Float.Output(
                    display_name="doubt", tooltip="How far joint angles are expected to be off, in degrees; the most."
                ),
                io.Float.Output(
                    display_name="error", tooltip="How far keypoints lie off the given ones, in pixels; the most."
                ),
                io.String.Output(display_name="info", tooltip="Both numbers for every frame."),
            ],
        )

    @classmethod
    def execute(
        cls,
        pose: object,
        body: PosedBody | None = None,
        parsing: HumanParsing | None = None,
        person: int = -1,
        hypothesis: int = 0,
        steps: int = FIT_STEPS,
    ) -> io.NodeOutput:
        points, canvas = frames_of(pose, "the pose", person)
        lifted = lift_person(points, canvas, hypothesis=hypothesis, steps=steps, like=body)
        found = lifted.body
        if parsing is not None:
            found = with_girth(found, parsing)
        doubt = [math.degrees(value) for value in lifted.doubt.tolist()]
        error = [value * canvas[1] for value in lifted.error.tolist()]
        info = "\n".join(
            f"{f'frame {number}: ' if len(doubt) > 1 else ''}joint angles off by about {angle:.1f} degrees, keypoints "
            f"by {pixels:.1f} pixels"
            for number, (angle, pixels) in enumerate(zip(doubt, error, strict=True))
        )
        return io.NodeOutput(found, max(doubt), max(error), info, ui=shown(found, cls))


def with_girth(body: PosedBody, parsing: HumanParsing) -> PosedBody:
    """The bodies as wide as the clothes and hair of a parsing of their picture."""
    if body.smpl is not None:
        raise TruePoseError("an SMPL model has no girth of clothes; leave the parsing unconnected")
    height, width = parsing.size
    same_shape(Pose(*body.canvas), (height, width))
    if parsing.batch not in (1, len(body)):
        raise TruePoseError(f"the parsing holds {parsing.batch} pictures and the pose {len(body)} frames")
    return PosedBody(body.pose, body.canvas, girth=girth_of(body, joined_batch(parsing.to("cpu"), len(body))))


class RenderBody(io.ComfyNode):
    """TRUEPOSE_BODY -> IMAGEs and MASK."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseRenderBody",
            display_name="Render Body",
            description="Draws a 3D body as depth, normals, body parts and surface coordinates.",
            search_aliases=["depth map", "normal map", "semantic map", "champ", "SMPL render", "densepose"],
            inputs=[
                BodyType.Input("body", tooltip="From Load Body Pose or Body Pose from Keypoints."),
                side("width", "Width of the pictures in pixels; 0 takes the body's canvas."),
                side("height", "Height of the pictures in pixels; 0 takes the body's canvas."),
                io.Combo.Input(
                    "convention",
                    options=list(CONVENTIONS),
                    default=CONVENTIONS[0],
                    tooltip=(
                        "How depth and normals are drawn. ControlNet: for depth and normal ControlNets. champ: for "
                        "the pose maps of champ models."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="depth", tooltip="Near is white, the background black."),
                io.Image.Output(display_name="normal", tooltip="Which way the surface faces, as colours."),
                io.Image.Output(display_name="semantic_map", tooltip="Body parts in champ's colours."),
                io.Image.Output(
                    display_name="coordinates",
                    tooltip="Where on the body at rest each pixel is: red to the person's left, green up, blue front.",
                ),
                io.Mask.Output(display_name="mask", tooltip="1 on the body."),
            ],
        )

    @classmethod
    def execute(
        cls, body: PosedBody, width: int = 0, height: int = 0, convention: str = CONVENTIONS[0]
    ) -> io.NodeOutput:
        maps = body.render(height or body.canvas[1], width or body.canvas[0])
        normal = to_host(normal_picture(maps, convention))
        return io.NodeOutput(
            to_host(depth_picture(maps, convention)),
            normal,
            to_host(semantic_picture(maps)),
            to_host(coordinate_picture(maps)),
            maps.mask[:, 0],
            ui=ui.PreviewImage(normal, cls=cls),
        )


class CarryAlongBody(io.ComfyNode):
    """IMAGE, TRUEPOSE_PARSING and two poses or bodies -> what of the IMAGE arrives."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TruePoseCarryAlongBody",
            display_name="Carry Along Body",
            description="Brings the pixels of a person to another pose along the body's surface, as far as they show.",
            search_aliases=["warp person", "pose warp", "surface correspondence", "texture transfer", "reproject"],
            inputs=[
                io.Image.Input("image", tooltip="The source person."),
                Parsing.Input("parsing", tooltip="Which region of the person each pixel of the image shows."),
                PoseKeypoint.Input("pose", optional=True, tooltip="The source person's keypoints; or connect body."),
                BodyType.Input("body", optional=True, tooltip="The source person's body, in place of the pose."),
                PoseKeypoint.Input(
                    "target_pose",
                    optional=True,
                    tooltip="The new pose; several frames make several pictures. Or connect target_body.",
                ),
                BodyType.Input("target_body", optional=True, tooltip="The new body, in place of target_pose."),
                side("width", "Width of the result in pixels; 0 takes the target's canvas."),
                side("height", "Height of the result in pixels; 0 takes the target's canvas."),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip=(
                        "body: along the surface of a 3D body, with what hides what. skeleton: flat, along limb lines, "
                        "where few keypoints are known; without depth and normals."
                    ),
                ),
                io.Combo.Input(
                    "mirror",
                    options=list(MIRRORS),
                    default="none",
                    tooltip=(
                        "Take each place from its look-alike instead: the other side of the body, the other face of "
                        "it, or both. For a back that the photo does not show, or a sleeve."
                    ),
                ),
                io.Boolean.Input(
                    "girth",
                    default=True,
                    tooltip="Make the generic body as wide as the source's clothes and hair. Not for SMPL models.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="What arrives; black where the source shows nothing."),
                io.Mask.Output(display_name="seen", tooltip="1 where the source shows that place of the body."),
                Parsing.Output(
                    display_name="parsing",
                    tooltip="The regions on the target. Connect it to Apply HPFA's target_parsing.",
                ),
                io.Image.Output(display_name="depth", tooltip="Depth of the target body, for a depth ControlNet."),
                io.Image.Output(display_name="normal", tooltip="Its normals, for a normal ControlNet."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        parsing: HumanParsing,
        pose: object = None,
        body: PosedBody | None = None,
        target_pose: object = None,
        target_body: PosedBody | None = None,
        width: int = 0,
        height: int = 0,
        method: str = METHODS[0],
        mirror: str = "none",
        girth: bool = True,
    ) -> io.NodeOutput:
        check_parsing(parsing, image, "the parsing")
        pictures = to_core(image, "the image").cpu()
        source, canvas = either(pose, body, "source")
        same_shape(Pose(*canvas), tuple(pictures.shape[2:]))
        target, canvas = either(target_pose, target_body, "target")
        size = (height or canvas[1], width or canvas[0])
        same_shape(Pose(*canvas), size)
        result = carry_person(
            pictures,
            joined_batch(parsing.to("cpu"), len(pictures)),
            source,
            target,
            size,
            method=method,
            mirror=mirror,
            girth=girth,
        )
        picture = to_host(result.picture)
        if method == SKELETON:
            nothing = host_body.blocked(
                "Carry Along Body: the skeleton has no depth and no normals; choose the method body, or leave these "
                "outputs unconnected"
            )
            maps = (nothing, nothing)
        else:
            maps = (to_host(result.depth), to_host(result.normal))
        return io.NodeOutput(picture, result.seen[:, 0], result.parsing, *maps, ui=ui.PreviewImage(picture, cls=cls))


NODES = [LoadBodyPose, BodyPoseFromKeypoints, RenderBody, CarryAlongBody]
