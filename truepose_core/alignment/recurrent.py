"""Recurrent pose alignment: a carried picture becomes a right one, step by step along the path from pose to pose.

RePoseDM (arXiv 2310.16074) aligns the source's texture features with the target pose by a recurrent module. Here every
step has its own exact geometry (bodies interpolated in joint angles, rendered), and one shared convolutional module
with a ConvGRU state corrects what geometry alone gets wrong: where the surface really is, what was really seen, which
region is where, and how the light changes as the surface turns. The picture is composed of what was carried,

    picture = sum_c w_c gain_c candidate_c + residual

with candidates c: the carried source, its mirrored look-alikes, and the region's mean colour; w sums to 1. So it is
as crisp as the source by construction. The composition and the network are ours.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    grid_sample,
    interpolate,
    pixel_shuffle,
    pixel_unshuffle,
    silu,
)

from truepose_core.body.carry import Correspondence, carried_parsing, correspond
from truepose_core.body.lift import keypoints_of, lift_each
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import MIRRORS, BodyMaps, BodyModel, GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import (
    axis_angle_to_matrix,
    chain_rotations,
    matrix_to_axis_angle,
    project,
    rest_joints,
)
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import region_colors
from truepose_core.pose.limbs import body_coordinates
from truepose_core.regions import Region

CANDIDATES = tuple(MIRRORS)
"""The carried source first, then its look-alikes; the region's colour comes last in every weight tensor."""
REGIONS = len(Region)
_PER_CANDIDATE = 3 + 1 + 3
CHANNELS = len(CANDIDATES) * _PER_CANDIDATE + 8 + REGIONS + 3 + 3
"""What the module reads of a pixel: per candidate colour, seen, the source's normal; the target's place, normal, depth,
mask; the carried parsing, its colours, and the place on the skeleton."""


@dataclass(frozen=True)
class AlignConfig:
    """width: channels at half the picture's size. state: channels of the ConvGRU, at a quarter. deep: at an eighth.
    head: at full size. reach: longest flow residual, in picture heights."""

    width: int = 64
    state: int = 128
    deep: int = 192
    head: int = 32
    reach: float = 0.06


@dataclass(frozen=True, eq=False)
class AlignInputs:
    """One step of the path, for B pairs. Made by `step_inputs`.

    maps: [B, CHANNELS, H, W]. colors: the candidates [B, 4, 3, H, W]. seen: theirs [B, 4, 1, H, W]. palette: the
    source's mean colour of each region [B, 7, 3]. prior: carried parsing [B, 7, H, W]. grid: where the first candidate
    lies in the source [B, H, W, 2]. mask: the body's [B, 1, H, W]. image: the source.
    """

    maps: Tensor
    colors: Tensor
    seen: Tensor
    palette: Tensor
    prior: Tensor
    grid: Tensor
    mask: Tensor
    image: Tensor


@dataclass(frozen=True, eq=False)
class Aligned:
    """What alignment gives for B pairs.

    picture: [B, 3, H, W], about 0..1. weights: of the 4 candidates and the region colour [B, 5, H, W], summing to 1;
    gain: what each is multiplied with [B, 5, H, W]; residual: what is added in the end [B, 3, H, W]. parsing: of the
    target. grid: where geometry alone looked each pixel up in the source [B, H, W, 2] in [-1, 1]. flow:
    what was added to it, in picture heights [B, 2, H, W]; looked_up: both together, as grid. state: the GRU's
    [B, S, H/4, W/4]. log_parsing: unnormalised logits [B, 7, H, W].
    """

    picture: Tensor
    weights: Tensor
    gain: Tensor
    residual: Tensor
    parsing: HumanParsing
    grid: Tensor
    flow: Tensor
    looked_up: Tensor
    state: Tensor
    log_parsing: Tensor

    @property
    def seen(self) -> Tensor:
        """Share of each pixel that comes from the source's own surface or its look-alikes [B, 1, H, W]."""
        return 1 - self.weights[:, -1:]


def _conv(a: int, b: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(a, b, size, padding=size // 2)


def in_grid(flow: Tensor, height: int, width: int) -> Tensor:
    """Shifts in picture heights [B, 2, H, W] in the units of a grid [B, H, W, 2] over a picture of height x width."""
    return torch.stack([flow[:, 0] * (2 * height / width), flow[:, 1] * 2], -1)


def compose(candidates: Tensor, weights: Tensor, gain: Tensor, residual: Tensor) -> Tensor:
    """sum_c w_c gain_c candidate_c + residual. candidates: [B, 5, 3, H, W], the region colour last; weights, gain:
    [B, 5, H, W]; residual: [B, 3, H, W]."""
    return ((weights * gain)[:, :, None] * candidates).sum(1) + residual


class _Block(nn.Module):
    """Two convolutions around a skip."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, a)
        self.first, self.second = _conv(a, b), _conv(b, b)
        self.skip = _conv(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.second(silu(self.first(silu(self.norm(x)))))


class ConvGRU(nn.Module):
    """A gated recurrent unit over a picture of features (Ballas et al., arXiv 1511.06432)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gates = _conv(2 * channels, 2 * channels)
        self.fresh = _conv(2 * channels, channels)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        update, reset = self.gates(torch.cat([x, state], 1)).sigmoid().chunk(2, 1)
        fresh = self.fresh(torch.cat([x, reset * state], 1)).tanh()
        return (1 - update) * state + update * fresh


class AlignNet(nn.Module):
    """The shared module of every step."""

    def __init__(self, config: AlignConfig | None = None):
        super().__init__()
        c = AlignConfig() if config is None else config
        self.config = c
        options = len(CANDIDATES) + 1
        self.read = _conv(4 * CHANNELS, c.width, 1)
        self.down1 = _Block(c.width, c.width)
        self.down2 = _Block(c.width, c.state)
        self.gru = ConvGRU(c.state)
        self.down3 = _Block(c.state, c.deep)
        # Where the light comes from is a matter of the whole picture.
        self.whole = nn.Linear(c.deep, c.deep)
        self.up2 = _Block(c.deep + c.state, c.state)
        self.up1 = _Block(c.state + c.width, c.width)
        self.coarse = _conv(c.width, 2 + REGIONS)
        self.widen = _conv(c.width, 4 * c.head, 1)
        self.look = _conv(c.head + options * 3 + len(CANDIDATES) * 4 + 3 + 1, c.head)
        self.judge = _conv(c.head, c.head)
        self.last = _conv(c.head, 2 * options + 3 + REGIONS)
        for module in (self.coarse, self.last):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, inputs: AlignInputs, state: Tensor | None = None) -> Aligned:
        """One step. state: the one before, already moved to this step's pose; None at the first."""
        c = self.config
        height, width = inputs.maps.shape[-2:]
        maps = pixel_unshuffle(inputs.maps, 2).contiguous(memory_format=torch.channels_last)
        half = silu(self.read(maps))
        a = self.down1(half)
        b = self.down2(nn.functional.avg_pool2d(a, 2))
        state = torch.zeros_like(b) if state is None else state
        state = self.gru(b, state)
        d = self.down3(nn.functional.avg_pool2d(state, 2))
        d = d + self.whole(d.mean((2, 3)))[:, :, None, None]
        b = self.up2(torch.cat([interpolate(d, b.shape[-2:], mode="nearest"), state], 1))
        a = self.up1(torch.cat([interpolate(b, a.shape[-2:], mode="nearest"), a], 1))

        coarse = interpolate(self.coarse(a).float(), (height, width), mode="bilinear", align_corners=False)
        flow = c.reach * coarse[:, :2].tanh() * inputs.mask
        looked_up = inputs.grid + in_grid(flow, *inputs.image.shape[-2:])
        moved = grid_sample(inputs.image, looked_up, padding_mode="border", align_corners=False)
        colors = torch.cat([moved[:, None], inputs.colors[:, 1:]], 1)

        x = pixel_shuffle(self.widen(a), 2)
        prior_logits = inputs.prior.clamp(min=1e-3).log()
        early = (prior_logits + coarse[:, 2:]).softmax(1)
        flat = torch.einsum("brc,brhw->bchw", inputs.palette, early)
        # Place, normal and depth of the target (8 channels behind the candidates): its normals say how light falls.
        first = len(CANDIDATES) * _PER_CANDIDATE
        normals = inputs.maps[:, : len(CANDIDATES) * _PER_CANDIDATE].unflatten(1, (len(CANDIDATES), _PER_CANDIDATE))
        x = torch.cat(
            [
                x,
                colors.flatten(1, 2),
                flat,
                normals[:, :, 3:].flatten(1, 2),
                inputs.maps[:, first + 3 : first + 6],
                inputs.mask,
            ],
            1,
        )
        x = silu(self.look(x))
        x = self.last(silu(self.judge(x)) + x).float()
        options = len(CANDIDATES) + 1
        # What the depth test says is where the weights start.
        seen = inputs.seen[:, :, 0]
        start = torch.cat([6 * seen[:, :1] - 2, 3 * seen[:, 1:] - 5, torch.zeros_like(seen[:, :1])], 1)
        weights = (start + x[:, :options]).softmax(1)
        gain = (0.5 * x[:, options : 2 * options]).clamp(-1.5, 1.5).exp()
        residual = 0.3 * x[:, 2 * options : 2 * options + 3].tanh()
        log_parsing = prior_logits + coarse[:, 2:] + x[:, 2 * options + 3 :]
        parsing = log_parsing.softmax(1)
        flat = torch.einsum("brc,brhw->bchw", inputs.palette, parsing)
        every = torch.cat([colors, flat[:, None]], 1)
        picture = compose(every, weights, gain, residual)
        shown = HumanParsing(parsing.detach())
        return Aligned(
            picture, weights, gain, residual, shown, inputs.grid, flow, looked_up, state.float(), log_parsing
        )


@torch.no_grad()
def step_inputs(
    image: Tensor,
    parsing: HumanParsing,
    source: BodyPose,
    target: BodyPose,
    source_maps: BodyMaps,
    target_maps: BodyMaps,
    target_body: Tensor,
    model: BodyModel | None = None,
) -> tuple[AlignInputs, Correspondence]:
    """What the module reads at one step, and the plain correspondence behind it.

    image [B, 3, H, W] in [0, 1] and its parsing: the source's. source, target: B bodies with their maps. target_body:
    OpenPose's 18 points of the step's pose [B, 18, 3].
    """
    model = GenericBody() if model is None else model
    height, width = target_maps.size
    masks = parsing.masks
    person = masks[:, 1:].sum(1, keepdim=True)
    packed = torch.cat([image, person, source_maps.normal], 1)
    parts, seens = [], []
    first: Correspondence | None = None
    for name in CANDIDATES:
        found = correspond(source, target, source_maps, target_maps, model, name)
        first = found if first is None else first
        sampled = found.sample(packed)
        seen = found.seen * (sampled[:, 3:4] > 0.5)
        parts.append(torch.cat([sampled[:, :3], seen, sampled[:, 4:7]], 1))
        seens.append(seen)
    prior = carried_parsing(first, masks, seens[0]).masks
    palette, _ = region_colors(image, parsing)
    middle = (target_maps.depth * target_maps.mask).sum((1, 2, 3), keepdim=True)
    middle = middle / target_maps.mask.sum((1, 2, 3), keepdim=True).clamp(min=1)
    # Depth in units of the person, so that a far person looks like a near one.
    depth = (target_maps.depth - middle) * target_maps.mask / target.camera[:, :1, None, None]
    limbs = body_coordinates(target_body, height, width).transpose(1, 2).unflatten(2, (height, width))
    maps = torch.cat(
        [
            *parts,
            target_maps.rest,
            target_maps.normal,
            depth,
            target_maps.mask,
            prior,
            torch.einsum("brc,brhw->bchw", palette, prior),
            limbs,
        ],
        1,
    )
    colors = torch.stack([part[:, :3] for part in parts], 1)
    return AlignInputs(maps, colors, torch.stack(seens, 1), palette, prior, first.grid, target_maps.mask, image), first


def pose_path(source: BodyPose, target: BodyPose, steps: int) -> list[BodyPose]:
    """`steps` bodies from source (left out) to target (the last), interpolated in joint angles along the shortest way,
    so that bone lengths are kept. Raises TruePoseError for fewer than 1 step."""
    if steps < 1:
        raise TruePoseError(f"{steps} alignment steps; expected at least 1")
    a, b = axis_angle_to_matrix(source.theta), axis_angle_to_matrix(target.theta)
    way = matrix_to_axis_angle(a.transpose(-1, -2) @ b)
    path = []
    for k in range(1, steps):
        t = k / steps
        theta = matrix_to_axis_angle(a @ axis_angle_to_matrix(t * way))
        path.append(
            BodyPose(theta, torch.lerp(source.beta, target.beta, t), torch.lerp(source.camera, target.camera, t))
        )
    return [*path, target]


def pose_distance(source: BodyPose, target: BodyPose) -> Tensor:
    """Mean angle between the joints' global rotations [N], radians."""
    worlds = [chain_rotations(axis_angle_to_matrix(x.theta), rest_joints(x.beta))[0] for x in (source, target)]
    trace = (worlds[0].transpose(-1, -2) @ worlds[1]).diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((trace - 1) / 2).clamp(-1, 1).acos().mean(1)


def move_state(state: Tensor, before: BodyPose, after_maps: BodyMaps, model: BodyModel) -> Tensor:
    """The GRU's state [B, S, h, w] at the pose before, looked up at the surface points of the next pose."""
    found = model.locate(after_maps, before)
    grid = (2 * found[:, :2] - 1).permute(0, 2, 3, 1)
    grid = interpolate(grid.permute(0, 3, 1, 2), state.shape[-2:], mode="nearest").permute(0, 2, 3, 1)
    mask = interpolate(after_maps.mask, state.shape[-2:], mode="nearest")
    return grid_sample(state, grid, padding_mode="zeros", align_corners=False) * mask


def align(
    net: AlignNet,
    image: Tensor,
    parsing: HumanParsing,
    source: BodyPose,
    target: BodyPose,
    target_body: Tensor,
    steps: int = 1,
    *,
    model: BodyModel | None = None,
    source_maps: BodyMaps | None = None,
    target_maps: BodyMaps | None = None,
    size: tuple[int, int] | None = None,
) -> list[Aligned]:
    """Every step of the path; the last one is the target's.

    image: the source [B, 3, H, W] in [0, 1], H and W multiples of 8, with its parsing. source, target: B bodies of one
    shape each. target_body: [B, 18, 3]. steps: K, at least 1. source_maps, target_maps: renderings of the bodies at
    the picture's size, where they are there already. size: (height, width) of the target picture, by default the
    source's. Raises TruePoseError for sides that 8 does not divide, and for counts or sizes that do not match.
    """
    if parsing.size != image.shape[-2:] or not len(image) == parsing.batch == len(source) == len(target):
        raise TruePoseError(
            f"the source is {tuple(image.shape)} and its parsing {tuple(parsing.masks.shape)}, with {len(source)} "
            f"source and {len(target)} target bodies; expected one parsing of the same size and two bodies for each "
            "picture"
        )
    height, width = image.shape[-2:] if size is None else size
    if height % 8 or width % 8:
        raise TruePoseError(f"the picture is {height}x{width}; expected sides that 8 divides")
    model = GenericBody() if model is None else model
    source_maps = model.render(source, *image.shape[-2:]) if source_maps is None else source_maps
    results: list[Aligned] = []
    before: BodyPose | None = None
    for body in pose_path(source, target, steps):
        last = body is target
        maps = target_maps if last and target_maps is not None else model.render(body, height, width)
        points = target_body if last else body_points(body, width / height)
        inputs, _ = step_inputs(image, parsing, source, body, source_maps, maps, points, model)
        state = None if before is None else move_state(results[-1].state, before, maps, model)
        results.append(net(inputs, state))
        before = body
    return results


@torch.no_grad()
def enlarge(
    aligned: Aligned,
    image: Tensor,
    parsing: HumanParsing,
    source: BodyPose,
    target: BodyPose,
    size: tuple[int, int],
    model: BodyModel | None = None,
) -> tuple[Tensor, Tensor, HumanParsing]:
    """The aligned picture at another size, composed anew of the full source: (picture [B, 3, height, width] in [0, 1],
    seen [B, 1, height, width], parsing). What the network decided (weights, gains, flow, residual, parsing) is
    enlarged; every candidate is looked up at full resolution, so that cloth stays as sharp as the photo.

    image, parsing: the source, of any size. source, target: the bodies. size: (height, width) of the result, of the
    aligned picture's shape.
    """
    model = GenericBody() if model is None else model
    source_maps, target_maps = model.render(source, *parsing.size), model.render(target, *size)

    def large(x: Tensor) -> Tensor:
        return interpolate(x, size, mode="bilinear", align_corners=False)

    palette, _ = region_colors(image, parsing)
    masks = large(aligned.parsing.masks)
    masks = masks / masks.sum(1, keepdim=True)
    flow = in_grid(large(aligned.flow), *image.shape[-2:])
    parts = []
    for name in CANDIDATES:
        found = correspond(source, target, source_maps, target_maps, model, name)
        grid = found.grid + flow if name == CANDIDATES[0] else found.grid
        parts.append(grid_sample(image, grid.to(image), padding_mode="border", align_corners=False))
    parts.append(torch.einsum("brc,brhw->bchw", palette, masks))
    # Off the drawn body nothing can be looked up.
    weights = large(aligned.weights)
    own = weights[:, :-1] * target_maps.mask
    weights = torch.cat([own, 1 - own.sum(1, keepdim=True)], 1)
    picture = compose(torch.stack(parts, 1), weights, large(aligned.gain), large(aligned.residual))
    return picture.clamp(0, 1), own.sum(1, keepdim=True), HumanParsing(masks)


WORKING_HEIGHT = 128
"""Pictures are aligned at this height, which the network was trained at, and composed at their own size."""


@dataclass(frozen=True, eq=False)
class AlignedPerson:
    """What `align_person` gives: picture [B, 3, H, W] in [0, 1], seen [B, 1, H, W], parsing of the target, bodies.

    grid: where each place of the target was looked up in the source [B, h, w, 2] in [-1, 1], and own: how much of it is
    the source's surface there, without look-alikes [B, 1, h, w], both at the size that the network works at; None where
    they were not kept."""

    picture: Tensor
    seen: Tensor
    parsing: HumanParsing
    source: BodyPose
    target: BodyPose
    grid: Tensor | None = None
    own: Tensor | None = None


@torch.no_grad()
def align_person(
    image: Tensor,
    parsing: HumanParsing,
    source_body: Tensor,
    target_body: Tensor,
    size: tuple[int, int] | None = None,
    *,
    source: BodyPose | None = None,
    target: BodyPose | None = None,
    steps: int | None = None,
    net: AlignNet | None = None,
) -> AlignedPerson:
    """A source picture aligned to target poses, from keypoints alone or with bodies that are known.

    image [S, 3, h, w] in [0, 1] with its parsing, source_body [S, 18, 3]: the sources. target_body: [B, 18, 3] on the
    target pictures, B a multiple of S, B / S in a row each. size: (height, width) of the result, by default the
    source's. source, target: the bodies [S] and [B], where they are known; else they are lifted from the keypoints.
    steps: K; None is what measured best. Raises TruePoseError for counts that do not fit, and as `lift`.
    """
    sources, count = image.shape[0], target_body.shape[0]
    known = {"source": (source, sources), "target": (target, count)}
    for name, (bodies, wanted) in known.items():
        if bodies is not None and len(bodies) != wanted:
            raise TruePoseError(f"there are {len(bodies)} {name} bodies; expected {wanted}, one for each {name} pose")
    if parsing.batch != sources or len(source_body) != sources or count % sources:
        raise TruePoseError(
            f"there are {sources} pictures, {parsing.batch} parsings, {len(source_body)} source poses and {count} "
            "target poses; expected one parsing and pose for each picture, and a number of target poses that the "
            "pictures divide"
        )
    height, width = image.shape[-2:]
    size = (height, width) if size is None else size
    first = lift_each(source_body, width / height) if source is None else source
    first = first.repeat(count // sources)
    second = lift_each(target_body, size[1] / size[0], first.beta) if target is None else target
    picture = image.repeat_interleave(count // sources, 0)
    regions = HumanParsing(parsing.masks.repeat_interleave(count // sources, 0))
    return align_bodies(picture, regions, first, second, target_body, size, steps=steps, net=net)


@torch.no_grad()
def align_bodies(
    image: Tensor,
    parsing: HumanParsing,
    source: BodyPose,
    target: BodyPose,
    target_body: Tensor,
    size: tuple[int, int] | None = None,
    *,
    steps: int | None = None,
    net: AlignNet | None = None,
) -> AlignedPerson:
    """`align_person` for B pairs of which the bodies are known. image: [B, 3, h, w]; target_body: [B, 18, 3]."""
    shape = (image.shape[-2], image.shape[-1])
    size = shape if size is None else size
    net = align_net() if net is None else net
    # The network sees both pictures on one canvas of its own height; shapes may differ by the bodies' cameras alone.
    small = [_working_size(*sides) for sides in (shape, size)]
    result = align(
        net,
        _area(image, small[0]),
        HumanParsing(_area(parsing.masks, small[0])),
        source,
        target,
        target_body,
        1 if steps is None else steps,
        size=small[1],
    )[-1]
    if small == [shape, size]:
        made, seen, found = result.picture.clamp(0, 1), result.seen, result.parsing
    else:
        made, seen, found = enlarge(result, image, parsing, source, target, size)
    return AlignedPerson(made, seen, found, source, target, result.looked_up, result.weights[:, :1])


def _working_size(height: int, width: int) -> tuple[int, int]:
    return WORKING_HEIGHT, max(16, 8 * round(WORKING_HEIGHT * width / height / 8))


def _area(x: Tensor, size: tuple[int, int]) -> Tensor:
    if x.shape[-2:] == size:
        return x
    small = interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    return small / small.sum(1, keepdim=True).clamp(min=1e-6) if x.shape[1] == REGIONS else small


def body_points(body: BodyPose, aspect: float) -> Tensor:
    """OpenPose's 18 points of bodies, [N, 18, 3] normalised. aspect: width / height of the frame."""
    points, seen = keypoints_of(axis_angle_to_matrix(body.theta), body.beta)
    x, y = project(points, body.camera, aspect)
    return torch.stack([x, y, torch.ones_like(x)], -1) * seen[..., None]


@lru_cache(maxsize=2)
def align_net(path: str | None = None) -> AlignNet:
    """The alignment network that ships (or a file of `truepose train --row alignment`), float32. Raises TruePoseError
    when the file is missing, damaged or of another kind."""
    from truepose_core.weights.small import load_small
    from truepose_core.weights.strict import bundled_path

    where = bundled_path("alignment") if path is None else path
    return load_small(where, "alignment", lambda **sizes: AlignNet(AlignConfig(**sizes)))


def describe(net: AlignNet) -> dict[str, float]:
    """The network's configuration, as JSON values."""
    return asdict(net.config)


def gradient(x: Tensor) -> Tensor:
    """Differences to the right and down [B, 2 C, H - 1, W - 1]."""
    here = x[..., :-1, :-1]
    return torch.cat([x[..., :-1, 1:] - here, x[..., 1:, :-1] - here], 1)
