"""What a model reads beside the source picture and keypoints: named pose maps, a canvas with its mask, and the guidance
it was published with. Told from the model's configuration, before its weights are read."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import whole
from truepose_core.cli.opening import ModelChoice, wants_vae
from truepose_core.cli.transfer.person import PICTURES
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.body.person import PosedBody

LEFT_OUT = "none"
"""What --pose-map NAME= says of a map that is left out."""
TRY_ON = "leffa-sd15"
"""The family that puts the garment of SOURCE on the person of a canvas."""
RENDERED = ("depth", "normal", "semantic_map")
"""The maps that a body gives, so that a pose is enough."""
DENSEPOSE = "densepose"
"""The map that is no picture but numbers, so its pixels must not mix."""


def add_condition_arguments(parser: argparse._ActionsContainer) -> None:
    """Pose maps, canvas and mask."""
    parser.add_argument(
        "--pose-map",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PICTURE",
        help="a picture of the pose, for models that read one: depth, normal, semantic_map (champ) and skeleton, which "
        "are drawn from --pose or --body unless given, and densepose (Leffa). NAME=FOLDER for several poses, "
        f"NAME={LEFT_OUT} to do without one",
    )
    parser.add_argument(
        "--canvas",
        metavar="PICTURE",
        help="for a model that fills a mask (Leffa): the picture to keep where --mask is black; it also says the size",
    )
    parser.add_argument("--mask", metavar="PICTURE", help="with --canvas: white where the picture is to be made anew")
    parser.add_argument(
        "--source-once",
        action="store_true",
        help="for a model that reads the source anew at every step (Leffa): only at the middle one, which is faster",
    )
    parser.add_argument(
        "--source-reading",
        choices=("once", "noise-levels", "every-step"),
        help="for a Stable Diffusion folder, which was not trained to read a source: clean and once; noised, at "
        "--levels noise levels, for all poses (the default); or noised to every step and read there, which costs most",
    )
    parser.add_argument(
        "--levels", type=whole(1), metavar="N", help="noise levels that the source is read at (default: 4)"
    )


# ---------------------------------------------------------------------------------------------------- options


def check_condition_options(args: argparse.Namespace, model: ModelChoice) -> None:
    """Raise TruePoseError for options that this model does not read."""
    behaviour, name = model.behaviour, f"--model {model.name}"
    if model.is_cfld:
        for option, given in (
            ("--pose-map", args.pose_map),
            ("--canvas", args.canvas),
            ("--mask", args.mask),
            ("--source-once", args.source_once),
            ("--from", args.donors),
            ("--style", args.style),
        ):
            if given:
                raise TruePoseError(f"{option} is not for a CFLD model, which {name} is; leave it out")
        for option, given in (("--region", args.region), ("--beta", args.beta), ("--gamma", args.gamma)):
            if given and not args.strength:
                raise TruePoseError(
                    f"{option} is part of HPFA, which a CFLD model runs without unless --strength is above 0; add "
                    "--strength 1, or leave it out"
                )
        return
    if args.style and not args.strength:
        raise TruePoseError("--style is part of what is taken from the source, and --strength 0 leaves that out")
    if args.style and model.config is not None and model.config.fusion == "none":
        raise TruePoseError(f"--style is not for {name}, which reads no source at its attentions; leave it out")
    for option, given in (("--canvas", args.canvas), ("--mask", args.mask)):
        if given is not None and "mask" not in behaviour.channels:
            raise TruePoseError(f"{option} is for models that fill a mask, and {name} makes whole pictures")
    if (args.canvas is None) != (args.mask is None):
        raise TruePoseError("--canvas and --mask belong together: give both, or neither to make the whole picture anew")
    if args.source_once and behaviour.source_timestep != "step":
        raise TruePoseError(f"--source-once is not for {name}, which reads the source once as it is; leave it out")
    for option, given in (("--source-reading", args.source_reading), ("--levels", args.levels)):
        if given is not None and not model.is_folder:
            raise TruePoseError(
                f"{option} is for a Stable Diffusion folder; {name} says how it was trained to read its source. Leave "
                "it out"
            )
    if args.levels is not None and args.source_reading in ("once", "every-step"):
        raise TruePoseError(f"--levels is for --source-reading noise-levels, not {args.source_reading}; leave it out")
    if args.donors and args.source_reading == "every-step":
        raise TruePoseError("--from is not for --source-reading every-step; leave one of them out")
    if args.donors and behaviour.keeps_latent:
        raise TruePoseError(f"--from is not for {name}, which reads its source anew at every step; leave it out")


def default_strength(model: ModelChoice) -> float:
    """The strength that makes the model what it was published as."""
    return 0.0 if model.is_cfld else 1.0


def reads_parsing(args: argparse.Namespace, model: ModelChoice) -> bool:
    """Whether the source's parsing has a say in the picture."""
    if model.is_cfld:
        return bool(args.strength)
    return bool(args.region or args.donors or args.beta) or _follows_body(model) or model.config.caa is not None


def _follows_body(model: ModelChoice) -> bool:
    """Whether the model matches regions or places on the body without being asked to."""
    config = model.config
    return config is None or config.fusion == "hpfa" or config.aligned or config.beta > 0 or config.gamma > 0


@dataclass(frozen=True)
class Guidance:
    """The scales of a run. rescale: phi of guidance rescaling. whose: where they are from, for people."""

    pose: float
    source: float
    rescale: float
    whose: str

    @property
    def told(self) -> str:
        """For people."""
        rescaled = f", rescaled by {self.rescale:g}" if self.rescale else ""
        return f"guidance: pose {self.pose:g}, source {self.source:g}{rescaled} ({self.whose})"

    @property
    def report(self) -> dict[str, Any]:
        """For machines."""
        return {"pose": self.pose, "source": self.source, "rescale": self.rescale, "from": self.whose}


def choose_guidance(pose: float | None, source: float | None, model: ModelChoice) -> Guidance:
    """The scales that are given, otherwise what the model was published with, otherwise 1."""
    own_pose, own_source, share = 1.0, 1.0, 0.0
    if model.is_cfld:
        own_pose, own_source = model.config.guidance_pose, model.config.guidance_source
    else:
        own_source, share = model.behaviour.guidance, model.behaviour.guidance_rescale
    whose = "as given"
    if pose is None and source is None:
        whose = "none" if own_pose == own_source == 1 else "as published"
    chosen = own_source if source is None else source
    return Guidance(own_pose if pose is None else pose, chosen, share * chosen, whose)


# ---------------------------------------------------------------------------------------------------- pose maps


@dataclass(frozen=True)
class PoseMaps:
    """The pictures of --pose-map, by the pose they show.

    names: of the maps that are given as pictures. left_out: of those that the model does without. rendered: of those
    that the pose's body is drawn as. poses: the stem of a pose's pictures -> map -> file. one: they show a single pose,
    whatever it is called.
    """

    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    poses: dict[str, dict[str, Path]] | None = None
    one: bool = False
    rendered: tuple[str, ...] = ()

    @property
    def given(self) -> tuple[str, ...]:
        return self.names + self.left_out

    def of(self, stem: str, count: int) -> dict[str, Path]:
        """The pictures of the pose called `stem`, one of `count`. Raises TruePoseError where there are none."""
        if not self.names:
            return {}
        if self.one:
            if count == 1:
                return next(iter(self.poses.values()))
            raise TruePoseError(
                f"--pose-map names one picture for each map, and there are {count} poses; give NAME=FOLDER with a "
                f"picture for each pose, such as {stem}.png"
            )
        if stem not in self.poses:
            listed = ", ".join(list(self.poses)[:4])
            raise TruePoseError(
                f"--pose-map: no picture is called {stem}, like the pose; the folders have {listed} and so on"
            )
        return self.poses[stem]

    def pipeline_maps(
        self, chunk: Sequence[dict[str, Path]], size: tuple[int, int], bodies: Sequence[PosedBody] = ()
    ) -> dict[str, Tensor | None] | None:
        """What the pipeline takes for a chunk of poses, at the (height, width) of the pictures; None for no maps.
        bodies: those of the chunk, for maps that are rendered."""
        import torch

        if not self.given and not self.rendered:
            return None
        maps = {name: torch.cat([load_map(files[name], name, size) for files in chunk]) for name in self.names}
        if self.rendered:
            from truepose_core.body.pictures import CHAMP_MAPS

            drawn = [body.render(*size) for body in bodies]
            maps |= {name: torch.cat([CHAMP_MAPS[name](one) for one in drawn]) for name in self.rendered}
        return maps | dict.fromkeys(self.left_out)


def maps_read(model: ModelChoice) -> tuple[str, ...]:
    """Names of the pose maps that the model reads; () for CFLD, which draws its own."""
    behaviour = model.behaviour
    if behaviour is None:
        return ()
    return behaviour.pose_maps + ((DENSEPOSE,) if DENSEPOSE in behaviour.channels else ())


def choose_maps(items: Sequence[str], model: ModelChoice, posed: bool = False) -> PoseMaps:
    """The --pose-map options, checked against what the model reads; pictures are found, not read. posed: whether there
    are poses that the maps of a body can be rendered from.

    Raises TruePoseError for another form, a map twice, one that the model does not read, one that it needs and that is
    not given, a folder that is missing or empty, and folders that do not have the same pictures.
    """
    from truepose_core.models.config import SKELETON

    read = maps_read(model)
    values: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise TruePoseError(f"--pose-map {item!r} is not NAME=PICTURE; write for example depth=depth.png")
        if name not in read:
            raise TruePoseError(
                f"--pose-map {name}: --model {model.name} reads no such map; it reads {', '.join(read) or 'none'}"
            )
        if name in values:
            raise TruePoseError(f"--pose-map: {name} is given twice; for several poses give {name}=FOLDER")
        values[name] = value
    missing = [name for name in read if name not in values and name != SKELETON]
    rendered = tuple(name for name in missing if posed and name in RENDERED)
    missing = [name for name in missing if name not in rendered]
    if missing:
        example = " ".join(f"{name}=PICTURE" for name in missing)
        without = "" if missing == [DENSEPOSE] else f", or {missing[0]}={LEFT_OUT} to do without"
        if set(missing) <= set(RENDERED):
            without += "; or give --pose or --body, which they are drawn from"
        raise TruePoseError(
            f"--model {model.name} reads the pose maps {', '.join(read)}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; add --pose-map {example}{without}"
        )
    left_out = tuple(name for name in read if values.get(name) == LEFT_OUT)
    if read and set(left_out) == set(read):
        raise TruePoseError(f"every pose map is left out; --model {model.name} needs one of {', '.join(read)}")
    files = {name: Path(values[name]) for name in read if name in values and name not in left_out}
    if not files:
        return PoseMaps(left_out=left_out, rendered=rendered)
    folders = {name: path for name, path in files.items() if path.is_dir()}
    if not folders:
        return PoseMaps(tuple(files), left_out, {next(iter(files.values())).stem: files}, one=True, rendered=rendered)
    single = next((name for name in files if name not in folders), None)
    if single is not None:
        raise TruePoseError(
            f"--pose-map: {next(iter(folders))} is a folder and {single} is not ({files[single]}); give folders for "
            "several poses, or a picture for each map"
        )
    return PoseMaps(tuple(files), left_out, _same_pictures(folders), rendered=rendered)


def _same_pictures(folders: dict[str, Path]) -> dict[str, dict[str, Path]]:
    """The pictures of folders, by name and then by map. Raises TruePoseError where one has others than the rest."""
    found: dict[str, dict[str, Path]] = {}
    for name, folder in folders.items():
        pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
        if not pictures:
            raise TruePoseError(f"--pose-map {name}: folder {folder} has no pictures")
        for path in pictures:
            if name in found.setdefault(path.stem, {}):
                raise TruePoseError(f"--pose-map {name}: {found[path.stem][name]} and {path} are of the same pose")
            found[path.stem][name] = path
    for stem, files in found.items():
        lacking = [name for name in folders if name not in files]
        if lacking:
            raise TruePoseError(
                f"--pose-map: folder {folders[lacking[0]]} has no picture called {stem}, as "
                f"{next(iter(files.values()))} is; pictures of one pose have the same name in every folder"
            )
    return found


def why_keypoints(model: ModelChoice, maps: PoseMaps) -> str | None:
    """Why the model needs --pose, None where its maps say everything."""
    from truepose_core.models.config import SKELETON

    if model.is_cfld or _follows_body(model):
        return "this model follows keypoints"
    if SKELETON in maps_read(model) and SKELETON not in maps.given:
        return f"this model reads a skeleton, which is drawn from it; or give --pose-map {SKELETON}=PICTURE"
    drawn = [name for name in maps_read(model) if name in RENDERED and name not in maps.given]
    if drawn:
        return f"this model reads {', '.join(drawn)}, which are drawn from it; or give --pose-map {drawn[0]}=PICTURE"
    return None


def check_keypoints(args: argparse.Namespace, model: ModelChoice, maps: PoseMaps) -> None:
    """Raise TruePoseError where --pose is missing: for the model, or for an option."""
    if args.paste_back is not None and (maps.names or args.canvas is not None):
        raise TruePoseError(
            "--paste-back moves the pose with the photo, and --pose-map and --canvas are pictures of their own; leave "
            "it out"
        )
    if args.pose or args.body:
        return
    reason = why_keypoints(model, maps)
    if reason is not None:
        raise TruePoseError(f"--pose is missing: name the poses to show, such as gallery:waving ({reason})")
    for option, given in (
        ("--person", args.person is not None),
        ("--retarget", args.retarget is not None),
        ("--paste-back", args.paste_back is not None),
        ("--beta", args.beta),
        ("--gamma", args.gamma),
    ):
        if given:
            raise TruePoseError(f"{option} works on the keypoints of the pose, and no --pose was given")


# ---------------------------------------------------------------------------------------------------- pictures


def load_beside(path: str | Path, what: str, size: tuple[int, int], *, numbers: bool = False) -> Tensor:
    """A picture [1, 3, height, width] in [0, 1] that lies on the one that is made, of size (height, width). numbers:
    its pixels are not mixed. Raises TruePoseError for one of another aspect ratio."""
    import torch.nn.functional as F

    from truepose_core.framing.frame import same_shape
    from truepose_core.pictures.files import image_size, load_image

    width, height = image_size(path)
    if not same_shape((height, width), size):
        raise TruePoseError(
            f"{what} {path} is {width}x{height} pixels and the picture that is made {size[1]}x{size[0]}; give one of "
            f"the same aspect ratio, or make it {width}x{height} (--size, or --frame)"
        )
    picture = load_image(path)
    if (height, width) == size:
        return picture
    if numbers:
        return F.interpolate(picture, size, mode="nearest-exact")
    return F.interpolate(picture, size, mode="bicubic", antialias=True).clamp(0, 1)


def load_map(path: Path, name: str, size: tuple[int, int]) -> Tensor:
    """A pose map [1, 3, height, width]. Raises TruePoseError as `load_beside`."""
    return load_beside(path, f"--pose-map {name}", size, numbers=name == DENSEPOSE)


def read_canvas(args: argparse.Namespace, size: tuple[int, int]) -> dict[str, Tensor]:
    """canvas [1, 3, height, width] and mask [1, 1, height, width] for the pipeline; {} where neither is given. Raises
    TruePoseError for a mask that is black everywhere, and as `load_beside`."""
    if args.canvas is None:
        return {}
    canvas = load_beside(args.canvas, "--canvas", size)
    mask = (load_beside(args.mask, "--mask", size, numbers=True).mean(1, keepdim=True) >= 0.5).float()
    if not bool(mask.any()):
        raise TruePoseError(f"--mask {args.mask} is black everywhere; paint white what is to be made anew")
    return {"canvas": canvas, "mask": mask}


def canvas_size(path: str) -> tuple[int, int]:
    """(width, height) of a canvas."""
    from truepose_core.pictures.files import image_size

    return image_size(path)


# ---------------------------------------------------------------------------------------------------- command line


def command_line(model: ModelChoice) -> str:
    """The command that uses a model, with what it needs and capitals for what the user fills in."""
    from truepose_core.models.config import SKELETON

    maps = tuple(name for name in maps_read(model) if name != SKELETON and name not in RENDERED)
    words = ["truepose transfer SOURCE.png"]
    if why_keypoints(model, PoseMaps(names=maps)) is not None:
        words.append("--pose POSE.json")
    if maps:
        words.append("--pose-map " + " ".join(f"{name}={name.upper()}.png" for name in maps))
    config = model.config
    if config.family == TRY_ON:
        words.append("--canvas CANVAS.png --mask MASK.png")
    if not model.is_cfld and (_follows_body(model) or config.caa is not None):
        words.append("--parsing PARSING.png --source-pose SOURCE.json")
    words.append("--model " + " ".join(shlex.quote(name) for name in model.names))
    if model.choices:
        words.append("--choose " + " ".join(shlex.quote(f"{name}={value}") for name, value in model.choices.items()))
    if wants_vae(config)[0]:
        words.append("--vae VAE_FOLDER")
    if not model.is_cfld and config.behaviour.context == "image":
        words.append("--image-encoder CLIP_FOLDER")
    return " ".join([*words, "--out RESULT.png"])
