"""`truepose transfer`: one source image, any number of poses."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from truepose_core.cli.console import (
    MAX_SIDE,
    Console,
    make_folder,
    memory_text,
    peak_memory,
    write_outputs,
)
from truepose_core.cli.convert import parse_choices
from truepose_core.cli.opening import (
    MANNEQUINS_ONLY,
    ModelChoice,
    Opened,
    choose_model,
    memory_errors,
    open_model,
    progress,
)
from truepose_core.cli.transfer.bodies import check_body_options, load_smpl, posed_targets
from truepose_core.cli.transfer.inputs import Target, read_targets
from truepose_core.cli.transfer.maps import (
    Guidance,
    PoseMaps,
    canvas_size,
    check_condition_options,
    check_keypoints,
    choose_guidance,
    choose_maps,
    default_strength,
    read_canvas,
    reads_parsing,
)
from truepose_core.cli.transfer.options import LEVELS, STEPS, check_options
from truepose_core.cli.transfer.person import (
    Donor,
    Networks,
    PersonPhoto,
    find_crop,
    fitted,
    frame_sizes,
    read_donor,
    read_donors,
    read_person,
    tell_cut,
)
from truepose_core.errors import TruePoseError

if TYPE_CHECKING:
    from torch import Tensor

    from truepose_core.body.person import PosedBody
    from truepose_core.framing.crop import Crop
    from truepose_core.guidance.field import FieldGuidance
    from truepose_core.models.cfld.model import CFLDSource
    from truepose_core.parsing import HumanParsing
    from truepose_core.source.features import SourceFeatures


@dataclass(frozen=True)
class Inputs:
    """Everything that was given, read and checked.

    photo: the person of SOURCE. source: what the model reads of it: the photo, or its crop. targets: the poses, on the
    picture that the model makes, which is `made` (width, height); the output is `size`. posed: their bodies, where maps
    are rendered. maps: their pictures. canvas:
    what the pipeline takes of --canvas and --mask. donors: the --from options and their persons. cut: edges of the
    photo that the person reaches.
    """

    photo: PersonPhoto
    source: PersonPhoto
    crop: Crop | None
    targets: list[Target]
    posed: list[PosedBody]
    maps: PoseMaps
    canvas: dict[str, Tensor]
    size: tuple[int, int]
    donors: list[tuple[Donor, PersonPhoto]]
    cut: list[str]

    @property
    def made(self) -> tuple[int, int]:
        return self.size if self.crop is None else self.crop.size_model[::-1]


def prepare(args: argparse.Namespace, model: ModelChoice, console: Console) -> Inputs:
    """Read and check all pictures and poses. Raises TruePoseError for the first that does not do."""
    networks = Networks(args)
    wanted = read_donors(args)
    maps = choose_maps(args.pose_map, model, posed=bool(args.pose or args.body))
    check_keypoints(args, model, maps)
    check_body_options(args)
    if args.smpl is not None and not maps.rendered:
        raise TruePoseError(
            f"--smpl draws the pose maps of a body, and --model {model.name} is not given any; leave it out"
        )
    smpl = load_smpl(args)
    photo = read_person(
        args.source,
        networks,
        console,
        parsing=args.parsing,
        pose=args.source_pose,
        index=args.source_person,
        option="--source-person",
    )
    cut = tell_cut(photo, console)
    donors = [(donor, read_donor(donor, photo, networks, console)) for donor in wanted]
    source, crop = photo, None
    if args.frame is not None and args.paste_back is None:
        crop = find_crop(photo, frame_sizes(args.frame, model))
        source = photo.cropped(crop)
    size = output_size(args, source)
    targets = read_targets(args, size, source, maps, networks, console, smpl)
    canvas = read_canvas(args, size[::-1])
    if args.paste_back is not None:
        # Poses lie on the photo, and the crop shows the person as they were and as they will be.
        crop = find_crop(photo, frame_sizes(args.frame, model), [target.body for target in targets])
        source = photo.cropped(crop)
        targets = [replace(target, body=crop.apply_keypoints(target.body)) for target in targets]
    networks.close()
    posed: list[PosedBody] = []
    if maps.rendered:
        made = size if crop is None else crop.size_model[::-1]
        posed = posed_targets(targets, made, source.body, source.size[1] / source.size[0], smpl)
        console.note(f"{', '.join(maps.rendered)}: drawn from the poses' bodies; --pose-map takes pictures instead")
    return Inputs(photo, source, crop, targets, posed, maps, canvas, size, donors, cut)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Read and check everything, then work, then write. Returns the report that --json prints."""
    started = time.perf_counter()
    console.doing(f"reading {args.source}")
    plan = make_plan(args)
    model, guidance, field = plan.model, plan.guidance, plan.field
    given = prepare(args, model, console)

    console.doing(f"opening the model {model.name}")
    opened = open_model(model, args.device, args.dtype)
    tell_about(args, plan, given, opened, console)
    steps = steps_of(args, plan, opened)
    with memory_errors(opened.device):
        before = time.perf_counter()
        features = read_source(args, plan, given, opened, console)
        encoded = time.perf_counter()
        pictures = list(make_pictures(args, plan, given, opened, features))
    sampled = time.perf_counter()
    _write(pictures, given.targets, Path(args.out), args.overwrite)

    memory = peak_memory(opened.device)
    seconds = {
        "model": opened.seconds,
        "source": encoded - before,
        "sampling": sampled - encoded,
        "total": time.perf_counter() - started,
    }
    done = _what_was_done(args, given)
    _tell_what_was_done(done, console)
    console.say(guidance.told)
    size = given.size
    for target in given.targets:
        console.say(f"wrote {target.out} ({size[0]}x{size[1]})")
    count = len(given.targets)
    work = f"{count} pose{'s' * (count > 1)} x {steps} steps"
    console.say(
        f"{seconds['total']:.1f} s in all: model {seconds['model']:.1f} s, source {seconds['source']:.1f} s, "
        f"{work} {seconds['sampling']:.1f} s; {memory_text(memory)}"
    )
    report = {
        **done,
        **opened.description,
        "size": list(size),
        "steps": steps,
        "seed": args.seed,
        "guidance": guidance.report,
        "strength": args.strength,
        "style": args.style,
        "field_guidance": None if field is None else asdict(field),
        "outputs": [
            {
                "path": str(t.out),
                "pose": t.pose,
                "frame": t.frame,
                "person": t.person,
                "maps": {name: str(path) for name, path in t.maps.items()},
            }
            for t in given.targets
        ],
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **memory,
    }
    console.report(report)
    return report


@dataclass(frozen=True)
class Plan:
    """What the options say before any picture is read. needs_parsing: whether the model reads the source's parsing.
    omega: the weight of each region, or None for 1."""

    model: ModelChoice
    guidance: Guidance
    field: FieldGuidance | None
    omega: Tensor | None
    needs_parsing: bool


def make_plan(args: argparse.Namespace) -> Plan:
    """Check the options against each other and the model. Raises TruePoseError."""
    from truepose_core.regions import parse_region_weights, region_weights

    model = choose_model(
        args.model,
        parse_choices(args.choose),
        prompt=args.prompt,
        controlnet=args.controlnet,
        vae=args.vae,
        image_encoder=args.image_encoder,
    )
    if args.strength is None:
        args.strength = default_strength(model)
    check_condition_options(args, model)
    needs_parsing = reads_parsing(args, model)
    check_options(args, needs_parsing)
    field = choose_field(args, model)
    guidance = choose_guidance(args.guidance_pose, args.guidance_source, model)
    omega = region_weights(parse_region_weights(args.region)) if args.region else None
    return Plan(model, guidance, field, omega, needs_parsing)


def steps_of(args: argparse.Namespace, plan: Plan, opened: Opened) -> int:
    """Sampling steps: --steps, or the model's own."""
    return args.steps or (plan.model.config.steps if plan.model.is_cfld else STEPS[opened.pipe.model.config.codec])


def read_source(
    args: argparse.Namespace, plan: Plan, given: Inputs, opened: Opened, console: Console
) -> SourceFeatures | CFLDSource:
    """The source's features, once for all poses."""
    reading = None if args.source_reading is None else args.source_reading.replace("-", " ")
    how = {"source_reading": reading, "levels": args.levels or LEVELS}
    return _encode(opened, given, plan.needs_parsing, console, how if plan.model.is_folder else {})


def make_pictures(
    args: argparse.Namespace, plan: Plan, given: Inputs, opened: Opened, features: SourceFeatures | CFLDSource
) -> Iterator[Tensor]:
    """The picture [1, 3, H, W] of each target, as it is done."""
    from truepose_core.framing.crop import paste_back

    options = {
        "guidance_pose": plan.guidance.pose,
        "guidance_source": plan.guidance.source,
        "strength": args.strength,
        "region_weights": plan.omega,
        "beta": args.beta,
        "gamma": args.gamma,
        "context": opened.context,
        "pooled": opened.pooled,
        **given.canvas,
    }
    if args.source_once:
        options["source_once"] = True
    if args.style:
        options["style"] = args.style
    if plan.field is not None:
        options["field_guidance"] = plan.field
    for picture in _sample(
        opened, features, given, steps_of(args, plan, opened), args.seed, args.batch, options, args.quiet
    ):
        if args.paste_back is None:
            yield picture
        else:
            yield paste_back(given.photo.image, picture, [given.crop], feather=args.paste_back)[0]


def choose_field(args: argparse.Namespace, model: ModelChoice) -> FieldGuidance | None:
    """How the pose field guides, None where it does not. Raises TruePoseError for options that nobody reads, and for a
    model that it cannot guide."""
    from truepose_core.guidance.field import FieldGuidance, check_predictor

    given = {"mu": args.field_mu, "predictor": args.field_predictor}
    if args.field_window is not None:
        given["start"], given["end"] = args.field_window
    given = {name: value for name, value in given.items() if value is not None}
    if args.field_scale == 0:
        if given:
            raise TruePoseError("--field-mu, --field-window and --field-predictor need --field-scale above 0")
        return None
    if model.is_cfld:
        raise TruePoseError(
            "the pose field does not guide CFLD, which has a pipeline of its own; leave --field-scale out"
        )
    options = FieldGuidance(scale=args.field_scale, **given)
    check_predictor(options.predictor, model.config is not None and model.config.codec == "pixels")
    if not args.pose:
        raise TruePoseError(
            "the pose field needs the keypoints of the pose asked for; add --pose, or leave --field-scale out"
        )
    return options


def output_size(args: argparse.Namespace, source: PersonPhoto) -> tuple[int, int]:
    """(width, height) of the pictures to make: a canvas's or the source's, unless it is given. Raises TruePoseError
    when that is too large."""
    height, width = source.size
    if args.frame is not None and args.paste_back is None:
        return width, height
    if args.size is None and args.canvas is not None:
        width, height = canvas_size(args.canvas)
        if max(width, height) > MAX_SIDE:
            raise TruePoseError(
                f"the canvas is {width}x{height} pixels and a result may have {MAX_SIDE} a side; give --size WxH"
            )
        return width, height
    if args.size is None and max(source.size_in_file) > MAX_SIDE:
        what = f"the source is {source.size_in_file[0]}x{source.size_in_file[1]} pixels"
        way = "make the photo smaller first" if args.paste_back is not None else "give --size WxH, or --frame"
        raise TruePoseError(f"{what} and a result may have {MAX_SIDE} a side; {way}")
    return args.size or (width, height)


def tell_about(args: argparse.Namespace, plan: Plan, given: Inputs, opened: Opened, console: Console) -> None:
    """Notes of what has no effect, and of what the model does not do."""
    if given.photo.person is None and args.gamma:
        console.note("--gamma has no effect without --source-pose")
    if given.photo.parsing is not None and not plan.needs_parsing and args.frame is None:
        console.note("the parsing has no effect here: nothing was asked for by region")
    config = opened.pipe.model.config
    if opened.is_mannequin:
        height, width = config.size
        console.note(MANNEQUINS_ONLY.format(w=width, h=height))
    elif plan.model.is_folder and plan.model.controlnet is None:
        console.note("without --controlnet this model sees the pose through the regions only, so it may not follow it")


def _what_was_done(args: argparse.Namespace, given: Inputs) -> dict[str, Any]:
    """The part of the report about the pictures of people."""
    crop = given.crop
    return {
        "source": args.source,
        "parsing": given.photo.parsing_from,
        "source_pose": given.photo.pose_from,
        "cut": given.cut,
        "from": [
            {"picture": x.picture, "regions": x.names, "parsing": read.parsing_from, "pose": read.pose_from}
            for x, read in given.donors
        ],
        "canvas": args.canvas,
        "mask": args.mask,
        "retarget": args.retarget,
        "frame": None if crop is None else {"box": crop.box, "size": crop.size_model[::-1], "told": crop.describe()},
        "paste_back": args.paste_back,
    }


def _tell_what_was_done(done: dict[str, Any], console: Console) -> None:
    """`_what_was_done`, for people."""
    console.say(f"{done['source']}: parsing {done['parsing'] or 'none'}, pose {done['source_pose'] or 'unknown'}")
    for each in done["from"]:
        told = f"parsing {each['parsing']}, pose {each['pose'] or 'unknown'}"
        console.say(f"{', '.join(each['regions'])} from {each['picture']}: {told}")
    if done["retarget"] is not None:
        console.say(f"poses on the proportions of the person in {done['source']}, by the {done['retarget']}")
    if done["frame"] is not None:
        console.say(f"crop: {done['frame']['told']}{'; pasted back' if done['paste_back'] is not None else ''}")


def _shrink(source: PersonPhoto, size: tuple[int, int], opened: Opened, console: Console) -> PersonPhoto:
    """A source with more pixels than the result says more than the result can show, at a price: scale it down."""
    import torch.nn.functional as F

    height, width = source.size
    scale = math.sqrt(size[0] * size[1] / (width * height))
    # A model of one size reads the source at that.
    if scale >= 1 or opened.is_cfld or opened.pipe.model.config.codec == "pixels":
        return source
    small = (max(16, round(height * scale)), max(16, round(width * scale)))
    console.note(f"the source is read at {small[1]}x{small[0]} pixels, as many as the result has")
    image = F.interpolate(source.image, small, mode="bicubic", antialias=True).clamp(0, 1)
    return replace(source, image=image, parsing=None if source.parsing is None else source.parsing.resize(*small))


def _encode(
    opened: Opened, given: Inputs, needs_parsing: bool, console: Console, how: dict[str, Any]
) -> SourceFeatures | CFLDSource:
    """The source's features, with the regions that are taken from donors. how: it is read, for `encode_source`."""
    from truepose_core.source.combine import combine_sources

    def read(person: PersonPhoto) -> SourceFeatures:
        parsing = person.parsing if needs_parsing else everywhere(person.size)
        return opened.pipe.encode_source(person.image, parsing, person.body, opened.context, opened.pooled, **how)

    source = _shrink(given.source, given.made, opened, console)
    if opened.is_cfld:
        return opened.pipe.encode_source(source.image, source.parsing if needs_parsing else None, source.body)
    features = read(source)
    for donor, person in given.donors:
        fresh = read(fitted(person, source.size, framed=given.crop is not None))
        features = combine_sources(features, fresh, donor.shares)
    return features


def everywhere(size: tuple[int, int]) -> HumanParsing:
    """The parsing of a picture of (height, width) in which every pixel counts alike."""
    import torch

    from truepose_core.parsing import HumanParsing
    from truepose_core.regions import Region

    return HumanParsing.from_labels(torch.full((1, *size), Region.UPPER, dtype=torch.long))


def _sample(
    opened: Opened,
    features: SourceFeatures | CFLDSource,
    given: Inputs,
    steps: int,
    seed: int,
    batch: int,
    options: dict[str, Any],
    quiet: bool,
) -> Iterator[Tensor]:
    """One picture [1, 3, H, W] per target. All have the same seed: a picture depends on its own pose only."""
    import torch
    from tqdm.auto import tqdm

    width, height = given.made
    # The two pipelines have defaults of their own, and CFLD's knows fewer options.
    options = {name: value for name, value in options.items() if value is not None}
    with tqdm(total=len(given.targets) * steps, desc="sampling", unit="step", disable=quiet) as bar:
        for first in range(0, len(given.targets), batch):
            chunk = given.targets[first : first + batch]
            bodies = given.posed[first : first + batch]
            maps = given.maps.pipeline_maps([target.maps for target in chunk], (height, width), bodies)
            images = opened.pipe(
                features,
                torch.stack([standing() if target.body is None else target.body for target in chunk]),
                height=height,
                width=width,
                num_inference_steps=steps,
                seed=[seed] * len(chunk),
                callback_on_step_end=progress(bar, len(chunk)),
                **({} if maps is None else {"pose_map": maps}),
                **options,
            ).images
            yield from images.split(1)


def standing() -> Tensor:
    """Keypoints [18, 3] for a model that has its pose from maps alone: the pipeline wants some, and reads none."""
    from truepose_core.pose import body_tensor
    from truepose_core.pose.gallery import NAMES, gallery_pose

    return body_tensor(gallery_pose(NAMES[0], 512, 512).people)[0]


def _write(pictures: list[Tensor], targets: list[Target], out: Path, overwrite: bool) -> None:
    from truepose_core.pictures.files import save_image

    if len(targets) > 1:
        make_folder(out)
    write_outputs(
        (target.out, lambda path, picture=picture: save_image(picture, path, overwrite))
        for picture, target in zip(pictures, targets, strict=True)
    )
