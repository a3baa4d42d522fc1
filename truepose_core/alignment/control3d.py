"""Relative depth guidance: source features lifted to the body, asked for by the target's body.

    F_med = act(MLP(F_2D))                  F_2D: SourceNet's tokens in its middle block
    F_3D = LN(MLP(F_med))
    (theta~, beta~) = heads(mean F_med)     of the source's body, with L_HPL = |(theta, beta) - (theta~, beta~)|_2
    F_p = Fourier(theta, beta, camera)      of the target's body, projected: one token a joint, one for shape and camera
    found = softmax(phi_Q(F_p) phi_K(F_3D)^T / sqrt(d)) phi_V(F_3D)

and a decoupled cross-attention to the tokens in every block of TargetNet, x + CrossAttn(x, context) + lambda
CrossAttn(x, tokens), lambda starting at 0. A place i of the picture and a joint j have the logit s <q_i, k_j> - gamma
|i - j|^2, with the distance in the picture and a gamma learned per head, as HPFA's body match.

The equations are those of the design page, after its account of "Learning Relative Depth Guidance for Human Pose
Transfer", whose text is not public here: nothing more is claimed of that paper. Four things are ours:
* Rotations are given and regressed as the first two columns of their matrices (arXiv 1812.07035): axis-angle jumps at
  half a turn, where neither a distance nor a Fourier series can follow it.
* theta, beta and camera enter as what they mean: each joint's rotation in camera axes and its place in the picture and
  in depth, by the body's own kinematics. A token of one joint could not know where the joints above it have put it.
* tokens = F_p + found. `found` alone, which is all of the published formula, holds nothing but values of the source:
  where the body is in depth could only be said by what is picked. `Control3DConfig.keep_query` is the choice.
* gamma: without it a place first has to learn which of the joints it is near to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from truepose_core.attention.heads import split_heads
from truepose_core.attention.hpfa import SHUT
from truepose_core.body.lift import FEWEST, lift_each, rotation_of_six, six_of_rotation
from truepose_core.body.pose import JOINTS, SHAPE, BodyPose
from truepose_core.errors import TruePoseError
from truepose_core.framing.frame import Frame
from truepose_core.mannequin.body import axis_angle_to_matrix, forward_kinematics, rest_joints

PLACE_REACH, DEPTH_REACH, SHAPE_REACH, CAMERA_REACH = 1.0, 0.5, 5.0, 4.0
"""How far joints (frame heights from the frame's middle; in depth from the pelvis), shape numbers and camera may go
before the Fourier embedding holds them there. A short reach makes small differences large."""


QUERIES = ("source", "keypoints", "body")
NOWHERE = 0.02
"""Squared distance, in frame heights, that tokens without a place have from every place: that of a joint .14 away."""
GAMMA = 100.0
"""gamma at the start, of a middle head: a joint a tenth of the height away loses 1."""


@dataclass(frozen=True)
class Control3DConfig:
    """query: what asks the lifted source features, the target's "body" or its "keypoints"; "source": nothing does, they
    are the tokens. keep_query: the tokens are what asks plus what it finds; else what it finds alone. width: of the
    tokens. frequencies: of the Fourier embedding. scale: lambda at the start of training; 0 leaves TargetNet as it was.
    Raises TruePoseError for a query that does not exist.
    """

    query: str = "body"
    keep_query: bool = True
    width: int = 96
    frequencies: int = 4
    scale: float = 0.0

    def __post_init__(self) -> None:
        if self.query not in QUERIES:
            raise TruePoseError(f"query is {self.query!r}; expected one of {', '.join(QUERIES)}")


@dataclass(frozen=True)
class ControlTokens:
    """tokens: [B, K, width]. shown: [B], the factor on what each row reads of them: 1, or 0 for nothing. log_w: [B, K],
    added to the logits of tokens that region weights reach, or None. places: [B, K, 3], where the tokens are in the
    picture, (x, y) in frame heights from its middle and 1, or zeros for nowhere; None for no token anywhere."""

    tokens: Tensor
    shown: Tensor
    log_w: Tensor | None = None
    places: Tensor | None = None


def fourier(x: Tensor, frequencies: int, reach: float = 1.0) -> Tensor:
    """sin and cos of 2^k pi x / (2 reach), k = 0 .. frequencies - 1: [..., n] -> [..., 2 n frequencies].

    No two x in [-reach, reach] look the same (the slowest sine rises all the way); beyond it x is held at the end."""
    octaves = 2.0 ** torch.arange(frequencies, device=x.device)
    angle = x.clamp(-reach, reach)[..., None] * (math.pi / (2 * reach)) * octaves
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


def body_numbers(body: BodyPose, frequencies: int) -> tuple[Tensor, Tensor]:
    """What the embedding reads of N bodies: (joints [N, 24, 18 frequencies]: six numbers of the rotation in camera
    axes, the place x, y and depth in frame heights; whole [N, 26 frequencies]: shape and camera)."""
    rotation, position = forward_kinematics(body.theta, rest_joints(body.beta))
    place = position * body.camera[:, None, :1]
    shift = body.camera[:, 1:] * body.camera.new_tensor([1.0, -1.0])
    joints = torch.cat(
        [
            fourier(six_of_rotation(rotation), frequencies),
            fourier(place[..., :2] + shift[:, None], frequencies, PLACE_REACH),
            fourier(place[..., 2:], frequencies, DEPTH_REACH),
        ],
        -1,
    )
    whole = [fourier(body.beta, frequencies, SHAPE_REACH), fourier(body.camera, frequencies, CAMERA_REACH)]
    return joints, torch.cat(whole, -1)


def body_places(body: BodyPose) -> Tensor:
    """Where the tokens of `BodyQuery` are, as `ControlTokens.places`: [N, 25, 3]."""
    _, position = forward_kinematics(body.theta, rest_joints(body.beta))
    flat = position[..., :2] * position.new_tensor([1.0, -1.0])
    at = body.camera[:, None, :1] * flat + body.camera[:, None, 1:]
    return pad(torch.cat([at, torch.ones_like(at[..., :1])], -1), (0, 0, 0, 1))


def keypoint_places(keypoints: Tensor, aspect: float) -> Tensor:
    """Where keypoints [N, 18, 3] are, as `ControlTokens.places`."""
    seen = (keypoints[..., 2:] > 0).to(keypoints)
    at = (keypoints[..., :2] - 0.5) * keypoints.new_tensor([aspect, 1.0])
    return torch.cat([at, torch.ones_like(seen)], -1) * seen


def cells(height: int, width: int, like: Tensor) -> Tensor:
    """The middles of a grid's cells [height * width, 2], (x, y) in frame heights from the frame's middle."""
    y = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height - 0.5
    x = ((torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width - 0.5) * (width / height)
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)


def place_bias(at: Tensor, places: Tensor, gamma: Tensor) -> Tensor:
    """-gamma |i - j|^2: [B, H, N, K]. at: [N, 2] or [B, N, 2]; places: [B, K, 3]; gamma: [H]."""
    apart = (at[..., :, None, :] - places[:, None, :, :2]).square().sum(-1)
    apart = torch.where(places[:, None, :, 2] > 0, apart, torch.full_like(apart, NOWHERE))
    return -gamma[:, None, None] * apart[:, None]


def human_prior_loss(regressed: tuple[Tensor, Tensor], body: BodyPose) -> Tensor:
    """L_HPL, the mean over S people of |(theta, beta) - (theta~, beta~)|_2. regressed: six numbers a joint's rotation
    in its parent's frame [S, 24, 6], and shapes [S, 10]; body: the truth. The six become a rotation first."""
    six, beta = regressed
    theta = six_of_rotation(rotation_of_six(six)) - six_of_rotation(axis_angle_to_matrix(body.theta))
    return torch.linalg.vector_norm(torch.cat([theta.flatten(1), beta - body.beta], 1), dim=1).mean()


class BodyQuery(nn.Module):
    """N bodies -> F_p [N, 25, width]."""

    def __init__(self, width: int, frequencies: int):
        super().__init__()
        self.frequencies = frequencies
        self.joints = nn.Linear(18 * frequencies, width)
        self.whole = nn.Linear(2 * (SHAPE + 3) * frequencies, width)
        self.names = nn.Parameter(torch.randn(JOINTS + 1, width) * 0.5)
        self.norm = nn.LayerNorm(width)

    def forward(self, body: BodyPose) -> Tensor:
        joints, whole = body_numbers(body, self.frequencies)
        weight = self.joints.weight
        made = torch.cat([self.joints(joints.to(weight)), self.whole(whole.to(weight))[:, None]], 1)
        return self.norm(made + self.names)


class KeypointQuery(nn.Module):
    """OpenPose's points [N, 18, 3] on pictures of that width / height -> F_p [N, 18, width]: the same without depth."""

    def __init__(self, width: int, frequencies: int):
        super().__init__()
        self.frequencies = frequencies
        self.points = nn.Linear(6 * frequencies, width)
        self.names = nn.Parameter(torch.randn(18, width) * 0.5)
        self.norm = nn.LayerNorm(width)

    def forward(self, keypoints: Tensor, aspect: float) -> Tensor:
        seen = (keypoints[..., 2:] > 0).to(keypoints)
        place = keypoint_places(keypoints, aspect)[..., :2]
        numbers = torch.cat([fourier(place, self.frequencies, PLACE_REACH), fourier(seen, self.frequencies)], -1)
        return self.norm(self.points(numbers.to(self.points.weight)) + self.names)


class Control3DSite(nn.Module):
    """The decoupled cross-attention of one attn2: its own K and V projections of the tokens, and lambda."""

    def __init__(self, width: int, inner: int, heads: int, scale: float = 0.0):
        super().__init__()
        self.heads = heads
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        # Heads start at different reaches, from a quarter of GAMMA to four times it.
        reach = torch.logspace(-1, 1, heads, base=4.0) if heads > 1 else torch.ones(1)
        self.log_gamma = nn.Parameter((GAMMA * reach).log())

    def keys(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K and V [B, H, K, D] of tokens [B, K, width]."""
        return tuple(split_heads(f(tokens), self.heads) for f in (self.to_k, self.to_v))

    def forward(self, q: Tensor, control: ControlTokens, grid: tuple[int, int]) -> Tensor:
        """lambda CrossAttn(x, tokens), before the block's output projection. q: [B, H, N, D], grid: (rows, columns)."""
        k, v = self.keys(control.tokens.to(q))
        bias = None if control.log_w is None else control.log_w.to(q)[:, None, None]
        if control.places is not None:
            bias = place_bias(cells(*grid, q), control.places.to(q), self.log_gamma.exp().to(q))
        return control_attention(q, k, v, self.scale.to(q) * control.shown.to(q), bias)


def control_attention(q: Tensor, k: Tensor, v: Tensor, factor: Tensor, bias: Tensor | None = None) -> Tensor:
    """factor softmax(q k^T / sqrt(D) + bias) v: [B, H, N, D]. k, v: [B, H, K, D]; factor: [B]; bias: [B, H, N, K], or 1
    for any of these, or None."""
    return factor[:, None, None, None] * scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Control3D(nn.Module):
    """The guidance of a model: lifting, heads, query, and a site for every block of TargetNet."""

    def __init__(self, config: Control3DConfig, features: int, sites: Mapping[str, tuple[int, int]]):
        """features: channels of F_2D. sites: key -> (width of its attention, heads)."""
        super().__init__()
        self.config = config
        width = config.width
        self.medium = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.lifted = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.query: nn.Module | None = None
        self.heads: nn.Module | None = None
        if config.query == "body":
            self.query = BodyQuery(width, config.frequencies)
            self.heads = nn.Linear(width, JOINTS * 6 + SHAPE)
        elif config.query == "keypoints":
            self.query = KeypointQuery(width, config.frequencies)
        if self.query is not None:
            self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.target_sites = nn.ModuleDict(
            {key: Control3DSite(width, inner, heads, config.scale) for key, (inner, heads) in sites.items()}
        )

    def regress(self, features: Tensor) -> tuple[Tensor, Tensor] | None:
        """The source's body from F_2D [S, M, C]: six numbers a joint [S, 24, 6], shape [S, 10]; None without heads."""
        if self.heads is None:
            return None
        made = self.heads(self.medium(features).mean(1))
        six = made[:, : JOINTS * 6].unflatten(1, (JOINTS, 6))
        return six + six.new_tensor([1.0, 0, 0, 0, 1, 0]), made[:, JOINTS * 6 :]

    def ask(self, keypoints: Tensor | None, aspect: float, body: BodyPose | None) -> tuple[Tensor, Tensor] | None:
        """F_p [B, K, width] of the targets and where they are (`ControlTokens.places`): of keypoints [B, 18, 3] on
        pictures of that aspect, or of bodies, whichever the model reads; None where nothing asks. Raises TruePoseError
        where that is missing."""
        if self.query is None:
            return None
        wanted = body if self.config.query == "body" else keypoints
        if wanted is None:
            raise TruePoseError(f"this model's guidance reads the target's {self.config.query}, and none was given")
        wanted = wanted.to(self.to_q.weight.device)
        if self.config.query == "body":
            return self.query(wanted), body_places(wanted)
        return self.query(wanted, aspect), keypoint_places(wanted, aspect)

    def tokens(
        self,
        features: Tensor | None,
        asked: tuple[Tensor, Tensor] | None,
        keep_source: Tensor | None = None,
        keep: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> ControlTokens | None:
        """features: F_2D [S, M, C] or None for no source; asked: F_p [B, K, width] and its places, S a divisor of B, or
        None. keep_source, keep: [B] bool, rows that see the source, and rows that see anything (None: all). weights:
        w(j) [S, M] in [0, 1], how much of each source token is read. None where nothing is left."""
        if asked is None:
            return None if features is None else self._of_source(features, keep_source, keep, weights)
        query, places = asked
        rows = query.new_ones(len(query))
        seen = rows if keep_source is None else keep_source.to(query)
        shown = rows if keep is None else keep.to(query)
        if features is None:
            return ControlTokens(query, shown, places=places) if self.config.keep_query else None
        source, log_w = self._lift(features, weights, len(query))
        bias = None if log_w is None else log_w[:, None]
        found = scaled_dot_product_attention(self.to_q(query), self.to_k(source), self.to_v(source), attn_mask=bias)
        if self.config.keep_query:
            return ControlTokens(query + found * seen[:, None, None], shown, places=places)
        return ControlTokens(found, shown * seen, places=places)

    def _lift(self, features: Tensor, weights: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
        """F_3D [rows, M, width] and log w(j) [rows, M] or None."""
        times = rows // len(features)
        source = self.lifted(self.medium(features.to(self.medium[0].weight)))
        log_w = None if weights is None else weights.to(source).log().clamp(min=SHUT).repeat_interleave(times, 0)
        return source.repeat_interleave(times, 0), log_w

    def _of_source(
        self, features: Tensor, keep_source: Tensor | None, keep: Tensor | None, weights: Tensor | None
    ) -> ControlTokens:
        """F_3D itself: what there is without a query."""
        source, log_w = self._lift(features, weights, len(features if keep_source is None else keep_source))
        shown = source.new_ones(len(source))
        for kept in (keep_source, keep):
            shown = shown if kept is None else shown * kept.to(shown)
        return ControlTokens(source, shown, log_w)


def framed_body(body: BodyPose, frame: Frame) -> BodyPose:
    """Bodies whose camera is of a picture (`frame.size_in`), with that of the model's canvas."""
    (height, width), (tall, wide), (top, left) = frame.size_in, frame.size_padded, frame.offset
    scale, x, y = body.camera.unbind(-1)
    moved = torch.stack(
        [
            scale * height / tall,
            (width / 2 + left - wide / 2 + height * x) / tall,
            (height / 2 + top - tall / 2 + height * y) / tall,
        ],
        -1,
    )
    return BodyPose(body.theta, body.beta, moved)


def target_bodies(
    keypoints: Tensor,
    aspect: float,
    source_keypoints: Tensor | None = None,
    *,
    given: BodyPose | None = None,
    source: BodyPose | None = None,
) -> BodyPose:
    """The targets' bodies [B], for both hosts: as given (one for all, or B), else lifted from keypoints [B, 18, 3] with
    their source's shape: that of `source` where it is given, else as lifted from its keypoints [S, 18, 3], else theirs.

    aspect: width / height of the pictures, source and target. Raises TruePoseError for counts that do not match, and as
    `body.lift.lift`.
    """
    count = len(keypoints)
    if given is not None:
        if count % len(given):
            raise TruePoseError(f"there are {len(given)} target bodies and {count} target poses; expected 1 or {count}")
        return given.repeat(count // len(given))
    # A source of whom next to nothing is seen says nothing of its shape.
    if source is None and source_keypoints is not None and is_liftable(source_keypoints):
        source = lift_each(source_keypoints, aspect)
    if source is None:
        return lift_each(keypoints, aspect)
    if count % len(source):
        raise TruePoseError(f"there are {len(source)} source bodies and {count} target poses; expected a divisor")
    shape = source.beta.to(keypoints).repeat_interleave(count // len(source), 0)
    return lift_each(keypoints, aspect, shape)


def is_liftable(keypoints: Tensor) -> bool:
    """Whether each of these people [N, 18, 3] shows enough for a body to be lifted."""
    return int((keypoints[..., 2] > 0).sum(1).min()) >= FEWEST
