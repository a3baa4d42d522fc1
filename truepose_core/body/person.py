"""The person of a picture on another pose: keypoints or bodies in, the carried picture out. ComfyUI's nodes and the
command line both call `carry_person`, so both give the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from truepose_core.body.carry import carry
from truepose_core.body.lift import (
    FEWEST,
    FIT_STEPS,
    HYPOTHESES,
    Joints,
    fit_bodies,
    keypoints_of,
    lift_net,
    prior_covariance,
    propose,
)
from truepose_core.body.pictures import depth_picture, normal_picture
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyMaps, BodyModel, GenericBody, Girth, fit_girth
from truepose_core.body.smpl import SmplModel
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import check_shape
from truepose_core.mannequin.body import axis_angle_to_matrix, matrix_to_axis_angle, project, rest_joints
from truepose_core.parsing import HumanParsing
from truepose_core.parsing import carry as skeleton_prior
from truepose_core.regions import Region

BODY, SKELETON = "body", "skeleton"
METHODS = (BODY, SKELETON)
_GIRTH_SIDE = 128
"""Silhouettes are compared at this height, in pixels."""
_CHUNK = 2**22
"""About so many pixels are carried at once."""
_CERTAIN = 0.75
"""From here on the skeleton warp counts a place as seen, as `skeleton_prior.warp` does."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PosedBody:
    """Bodies and what they are drawn on.

    pose: N bodies, of one person or of several. canvas: (width, height) in pixels of the picture that the cameras
    belong to. smpl: the user's own model that pose is of; None is the generic body. girth: of the generic body, of N
    or of one. Raises TruePoseError for an impossible canvas.
    """

    pose: BodyPose
    canvas: tuple[int, int]
    smpl: SmplModel | None = None
    girth: Girth | None = None

    def __post_init__(self) -> None:
        if len(self.canvas) != 2 or min(self.canvas) < 1:
            raise TruePoseError(f"the canvas of a body is {self.canvas}; expected (width, height) in pixels")

    def __len__(self) -> int:
        return len(self.pose)

    @property
    def model(self) -> BodyModel:
        """What draws it."""
        return GenericBody(self.girth) if self.smpl is None else self.smpl

    @property
    def joints(self) -> Joints:
        """Its proportions."""
        return joints_of(self.smpl)

    def render(self, height: int, width: int) -> BodyMaps:
        """The visible surface in height x width pixels of the canvas's shape. Raises TruePoseError for another shape,
        or a body outside of it."""
        check_canvas(self, (width, height), "the body")
        return self.model.render(self.pose, height, width)

    def fitted(self, size: tuple[int, int]) -> PosedBody:
        """The same bodies with their canvas scaled by one factor until it fits into `size` (width, height), and
        centred."""
        scale = min(size[0] / self.canvas[0], size[1] / self.canvas[1]) * self.canvas[1] / size[1]
        return replace(self, pose=replace(self.pose, camera=self.pose.camera * scale), canvas=size)

    def cropped(self, box: tuple[float, float, float, float], size: tuple[int, int]) -> PosedBody:
        """The same bodies in the part of their canvas inside box (left, top, right, bottom), pixels of the canvas,
        shown at `size` (width, height) of its shape."""
        (width, height), (left, top, right, _) = self.canvas, box
        scale, x, y = self.pose.camera.unbind(1)
        zoom = size[0] / (right - left)
        camera = [
            scale * height * zoom,
            (width / 2 + height * x - left) * zoom - size[0] / 2,
            (height / 2 + height * y - top) * zoom - size[1] / 2,
        ]
        return replace(self, pose=replace(self.pose, camera=torch.stack(camera, 1) / size[1]), canvas=size)

    def keypoints(self) -> Tensor:
        """OpenPose's 18 points [N, 18, 3], normalised to the canvas; face points that look away are missing."""
        points, seen = keypoints_of(axis_angle_to_matrix(self.pose.theta), self.pose.beta, self.joints)
        x, y = project(points, self.pose.camera, self.canvas[0] / self.canvas[1])
        found = torch.stack([x, y, seen.to(x)], -1)
        return found * seen[..., None]

    def repeated(self, count: int) -> PosedBody:
        """`count` bodies, where there is one or as many."""
        if len(self) == count:
            return self
        return replace(self, pose=self.pose.repeat(count))

    def of(self, index: Tensor) -> PosedBody:
        """The bodies at `index`."""
        one = self.girth is None or len(self.girth.trunk) == 1
        girth = self.girth if one else self.girth.select(index)
        return PosedBody(self.pose.select(index), self.canvas, self.smpl, girth)

    def to(self, device: torch.device | str) -> PosedBody:
        """The same on another device."""
        smpl = None if self.smpl is None else self.smpl.to(device)
        return PosedBody(self.pose.to(device), self.canvas, smpl, None if self.girth is None else self.girth.to(device))


@dataclass(frozen=True)
class LiftedBody:
    """body: one for each row of keypoints. doubt: the mean joint angle error that the network expects [N], radians.
    error: root mean square distance of the body's keypoints from the given ones [N], in picture heights."""

    body: PosedBody
    doubt: Tensor
    error: Tensor


@dataclass(frozen=True, eq=False)
class CarriedPerson:
    """T pictures. picture: [T, 3, H, W] in [0, 1], 0 where nothing was seen. seen: [T, 1, H, W], 0 or 1. parsing: the
    source's regions on the target. depth, normal: [T, 3, H, W] of the target body as ControlNets read them. source,
    target: the bodies. The last four are None where the skeleton carried."""

    picture: Tensor
    seen: Tensor
    parsing: HumanParsing
    depth: Tensor | None = None
    normal: Tensor | None = None
    source: PosedBody | None = None
    target: PosedBody | None = None


def joints_of(smpl: SmplModel | None) -> Joints:
    """The proportions of an SMPL file, or of the generic body. Differentiable, in inference mode too."""
    if smpl is None:
        return rest_joints
    shapes = torch.eye(smpl.shapes.shape[-1], device=smpl.template.device)
    mean = smpl.joints(torch.zeros_like(shapes[:1]))
    # Joints are linear in the shape (Loper et al. 2015, eq. 10), which saves the fit the whole surface.
    slope = smpl.joints(shapes) - mean
    with torch.inference_mode(False):
        mean, slope = mean.clone(), slope.clone()
    return lambda beta: mean + torch.einsum("nb,bjk->njk", beta, slope)


def lift_person(
    keypoints: Tensor,
    canvas: tuple[int, int],
    *,
    hypothesis: int = 0,
    steps: int = FIT_STEPS,
    like: PosedBody | None = None,
    smpl: SmplModel | None = None,
) -> LiftedBody:
    """The bodies behind keypoints, each fitted by itself.

    keypoints: [N, 18, 3], normalised to the canvas (width, height). hypothesis: 0 the likeliest body, 1 and 2 the next
    ones: what is near and what is far is not in keypoints. steps: of the fit, 0 for the network alone. like: the same
    person, of whom shape, girth and model are kept. smpl: without `like`, the user's model to lift to; its shape starts
    at the mean.

    Raises TruePoseError as `lift.check_liftable`, and for a hypothesis or counts that there are not.
    """
    if not 0 <= hypothesis < HYPOTHESES:
        raise TruePoseError(f"hypothesis is {hypothesis}; expected 0 to {HYPOTHESES - 1}")
    if like is not None and len(like) not in (1, len(keypoints)):
        raise TruePoseError(f"there are {len(like)} bodies to keep the shape of and {len(keypoints)} poses")
    aspect = canvas[0] / canvas[1]
    smpl = smpl if like is None else like.smpl
    net = lift_net().to(keypoints.device)
    rotation, beta, doubt = (x[:, hypothesis] for x in propose(keypoints, aspect, net))
    shape = None
    if like is not None:
        shape = like.pose.beta.to(keypoints.device).expand(len(keypoints), -1)
    elif smpl is not None:
        # The network's shapes are the generic body's.
        beta = torch.zeros_like(beta)
    rotation, beta, camera, error = fit_bodies(
        rotation,
        beta,
        keypoints.float(),
        aspect,
        covariance=prior_covariance(net, doubt, foreign_shape=smpl is not None),
        steps=steps,
        shape=shape,
        joints=joints_of(smpl),
    )
    pose = BodyPose(matrix_to_axis_angle(rotation), beta, camera)
    return LiftedBody(PosedBody(pose, canvas, smpl, None if like is None else like.girth), doubt, error)


def girth_of(body: PosedBody, parsing: HumanParsing) -> Girth:
    """How wide the clothes and the hair of the people are that a picture's parsing [N, 7, H, W] shows."""
    height = min(_GIRTH_SIDE, parsing.size[0])
    size = (height, max(1, round(height * parsing.size[1] / parsing.size[0])))
    masks = interpolate(parsing.masks.float(), size, mode="area").to(body.pose.theta.device)
    return fit_girth(body.pose, {"trunk": masks[:, [Region.UPPER, Region.LOWER]].sum(1), "hair": masks[:, Region.HAIR]})


def carry_person(
    image: Tensor,
    parsing: HumanParsing,
    source: Tensor | PosedBody,
    target: Tensor | PosedBody,
    size: tuple[int, int] | None = None,
    *,
    method: str = BODY,
    mirror: str = "none",
    girth: bool = True,
    smpl: SmplModel | None = None,
) -> CarriedPerson:
    """The person of a picture on other poses, as far as the picture shows them.

    image: [B, 3, H, W] in [0, 1]. parsing: of the same size and B. source: their keypoints [B or 1, 18, 3], normalised
    to the picture, or their bodies on a canvas of its shape. target: keypoints [T, 18, 3], normalised to the picture
    that is made, or bodies on a canvas of its shape; T and B are equal, or one of them is 1. size: (height, width) of
    what is made, by default the image's.

    method: the surface of a body, or the skeleton warp, for people of whom few joints are known. mirror: see
    `carry.correspond`; of the body alone. girth: whether the generic body gets the girth of the source's clothes and
    hair. smpl: the user's model that keypoints are lifted to.

    The target has the source's shape: one person is carried. Raises TruePoseError for sizes and counts that do not
    match, for too few keypoints or too few in common, bodies of two models, or a body outside its picture.
    """
    size = tuple(image.shape[2:]) if size is None else size
    if image.ndim != 4 or parsing.size != tuple(image.shape[2:]) or parsing.batch != len(image):
        raise TruePoseError(
            f"the image is {tuple(image.shape)} and the parsing {tuple(parsing.masks.shape)}; expected [B, 3, H, W] "
            "and its parsing [B, 7, H, W]"
        )
    if method not in METHODS:
        raise TruePoseError(f"the method is {method!r}; expected one of {', '.join(METHODS)}")
    parsing = parsing.to(image.device)
    for what, given, its_size in (("source", source, image.shape[2:]), ("target", target, size)):
        if isinstance(given, PosedBody):
            check_canvas(given, (its_size[1], its_size[0]), f"the {what} body")
    _check_counts(len(image), len(source), len(target))
    if method == SKELETON:
        if mirror != "none":
            raise TruePoseError(f"mirror is {mirror!r}, and the skeleton knows no other side; choose the method {BODY}")
        return _by_skeleton(image, parsing, _keypoints(source), _keypoints(target), size)
    return _by_body(image, parsing, source, target, size, mirror, girth, _common_model(source, target, smpl))


def check_canvas(body: PosedBody, size: tuple[int, int], what: str) -> None:
    """Raise TruePoseError unless a body's canvas has the shape of a picture of `size` (width, height)."""
    check_shape(what, body.canvas[::-1], "the picture", size[::-1])


def _by_body(
    image: Tensor,
    parsing: HumanParsing,
    source: Tensor | PosedBody,
    target: Tensor | PosedBody,
    size: tuple[int, int],
    mirror: str,
    girth: bool,
    smpl: SmplModel | None,
) -> CarriedPerson:
    if isinstance(source, Tensor) and isinstance(target, Tensor):
        _check_common(source, target)
    if isinstance(source, Tensor):
        points, canvas = source, (image.shape[3], image.shape[2])
        source = _told("the source pose", lambda: lift_person(points, canvas, smpl=smpl).body)
    source = replace(source.to(image.device), girth=source.girth if girth else None)
    if isinstance(target, Tensor):
        poses = target.expand(max(len(source), len(target)), -1, -1)
        target = _told("the target pose", lambda: lift_person(poses, (size[1], size[0]), like=source).body)
    source = source.repeated(len(image))
    if girth and smpl is None and source.girth is None:
        source = replace(source, girth=girth_of(source, parsing))
    count = max(len(image), len(target))
    # The target is the source's person, whatever body it was given with.
    beta = source.pose.beta.expand(count, -1)
    pose = replace(
        target.pose.to(image.device).select(torch.arange(len(target)).repeat(count // len(target))), beta=beta
    )
    target = PosedBody(pose, target.canvas, smpl, source.girth)
    pieces = []
    for chosen in torch.arange(count).split(max(1, _CHUNK // (size[0] * size[1]))):
        sources = chosen if len(image) > 1 else chosen[:1] * 0
        made = carry(
            image[sources],
            HumanParsing(parsing.masks[sources]),
            source.pose.select(sources),
            target.pose.select(chosen),
            size,
            model=source.of(sources).model,
            mirror=mirror,
        )
        maps = made.correspondence.target
        pieces.append((made.picture, made.seen, made.parsing.masks, depth_picture(maps), normal_picture(maps)))
    picture, seen, masks, depth, normal = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return CarriedPerson(picture, seen, HumanParsing(masks), depth, normal, source, target)


def _by_skeleton(
    image: Tensor, parsing: HumanParsing, source: Tensor, target: Tensor, size: tuple[int, int]
) -> CarriedPerson:
    count = max(len(image), len(target))
    image, masks = image.expand(count, -1, -1, -1), parsing.masks.to(image).expand(count, -1, -1, -1)
    source, target = (x.to(image).expand(count, -1, -1) for x in (source, target))
    aspect = image.shape[3] / image.shape[2]
    grid, certain = skeleton_prior.carry(source, target, *size, source_aspect=aspect)
    if not bool((certain > 0).flatten(1).any(1).all()):
        raise TruePoseError(
            "the skeleton carries nothing: source and target have no limb in common, or one of them is outside its "
            "picture. Give keypoints of both ends of a limb in both poses"
        )
    person = grid_sample(1 - masks[:, :1], grid, padding_mode="border", align_corners=False)
    seen = ((certain[:, None] > _CERTAIN) & (person > 0.5)).to(image)
    picture = grid_sample(image, grid, padding_mode="border", align_corners=False) * seen
    return CarriedPerson(picture, seen, skeleton_prior.region_prior(HumanParsing(masks), source, target, *size))


def _keypoints(given: Tensor | PosedBody) -> Tensor:
    return given.keypoints() if isinstance(given, PosedBody) else given


def _check_counts(images: int, sources: int, targets: int) -> None:
    if sources not in (1, images):
        raise TruePoseError(f"there are {images} pictures and {sources} source people; expected one person per picture")
    if images != targets and 1 not in (images, targets):
        raise TruePoseError(f"there are {images} pictures and {targets} target poses; expected as many, or 1 of either")


def _check_common(source: Tensor, target: Tensor) -> None:
    common = ((source[..., 2] > 0) & (target[..., 2] > 0)).sum(1)
    if int(common.min()) < FEWEST:
        raise TruePoseError(
            f"source and target pose {int(common.argmin())} have {int(common.min())} visible keypoints in common; "
            f"expected at least {FEWEST}. Give poses that show the same parts of the person, or choose the method "
            f"{SKELETON}"
        )


def _common_model(source: Tensor | PosedBody, target: Tensor | PosedBody, smpl: SmplModel | None) -> SmplModel | None:
    """The model of all bodies that are given. Raises TruePoseError where they are of two."""
    models = [given.smpl for given in (source, target) if isinstance(given, PosedBody)]
    models = models if smpl is None else [smpl, *models]
    first = models[0] if models else None
    for other in models[1:]:
        same = other is first
        if not same and first is not None and other is not None:
            same = first.template.shape == other.template.shape and torch.equal(first.template, other.template)
        if not same:
            raise TruePoseError(
                "source and target are bodies of two models: one SMPL file has to serve both, or the generic body"
            )
    return first


def _told(where: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except TruePoseError as error:
        raise TruePoseError(f"{where}: {error}") from error
