"""Laws of the skeleton prior: limb coordinates, body coordinates, carrying, and what they are worth on people."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from truepose_core.mannequin import sample_pairs
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.carry import carry, region_colors, region_prior, warp
from truepose_core.pose.keypoints import (
    BODY_KEYPOINTS,
    L_ELBOW,
    L_SHOULDER,
    L_WRIST,
    NECK,
    NOSE,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    R_WRIST,
)
from truepose_core.pose.limbs import (
    HEAD_LIMB,
    LIMB_ENDS,
    TORSO_LIMB,
    LimbFrames,
    body_coordinates,
    from_limbs,
    limb_frames,
    to_limbs,
)
from truepose_core.regions import Region

# A front view on a square picture: (x, y) by name. x to the right of the picture is the person's left.
STANDING = {
    "nose": (0.50, 0.18),
    "neck": (0.50, 0.26),
    "r_shoulder": (0.42, 0.265),
    "r_elbow": (0.35, 0.38),
    "r_wrist": (0.26, 0.47),
    "l_shoulder": (0.58, 0.265),
    "l_elbow": (0.66, 0.37),
    "l_wrist": (0.76, 0.45),
    "r_hip": (0.45, 0.50),
    "r_knee": (0.43, 0.68),
    "r_ankle": (0.41, 0.86),
    "l_hip": (0.55, 0.50),
    "l_knee": (0.59, 0.67),
    "l_ankle": (0.60, 0.85),
    "r_eye": (0.485, 0.165),
    "l_eye": (0.515, 0.165),
    "r_ear": (0.465, 0.175),
    "l_ear": (0.535, 0.175),
}
SWAP = [
    BODY_KEYPOINTS.index({"r": "l", "l": "r"}.get(n[0], n[0]) + n[1:] if n[:2] in ("r_", "l_") else n)
    for n in BODY_KEYPOINTS
]


def standing(dtype=torch.float64):
    return torch.tensor([[(*STANDING[name], 1.0) for name in BODY_KEYPOINTS]], dtype=dtype)


def posed(seed, batch=1):
    """Standing people with every joint moved a little; limbs keep a length."""
    g = torch.Generator().manual_seed(seed)
    body = standing().repeat(batch, 1, 1)
    body[..., :2] += 0.03 * torch.randn(batch, 18, 2, generator=g, dtype=torch.float64)
    return body


def without(body, *joints):
    body = body.clone()
    body[:, list(joints)] = 0
    return body


def move(body, scale=1.0, angle=0.0, shift=(0.0, 0.0), aspect=1.0):
    """The person scaled and turned (radians) about the picture's middle, then shifted, in image heights."""
    unit = body.new_tensor([aspect, 1.0])
    turn = body.new_tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    xy = (body[..., :2] - 0.5) * unit @ turn.mT * scale + body.new_tensor(shift)
    return torch.cat([xy / unit + 0.5, body[..., 2:]], -1)


def clear_of_ties(frames, points, margin=0.02):
    """[B, P] bool: the nearest limb is nearer than the next by a margin (in limb widths)."""
    distance = to_limbs(frames, points)[2].sort(-1).values
    return distance[..., 1] - distance[..., 0] > margin


def centres(height, width, aspect):
    y = (torch.arange(height, dtype=torch.float64) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float64) + 0.5) / width * aspect
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], -1)[None]


@pytest.fixture(scope="module")
def pairs():
    return sample_pairs(32, "test")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), aspect=st.floats(0.4, 2.5))
def test_limb_coordinates_and_points_are_inverse(seed, aspect):
    frames = limb_frames(posed(seed), aspect)
    points = torch.rand(1, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    t, d, _ = to_limbs(frames, points)
    # A limb that points at the camera has coordinates of its own (see `to_limbs`); all others must come back.
    long_enough = frames.axis.norm(dim=-1) >= 0.5 * frames.width
    for limb in range(10):
        if long_enough[0, limb]:
            back = from_limbs(frames, torch.full((1, 50), limb), t[..., limb], d[..., limb])
            assert (back - points).abs().max() < 1e-9


def test_a_limb_runs_from_0_to_1_along_its_bone():
    body = standing()
    frames = limb_frames(body, 1.0)
    for limb, (a, b) in enumerate(LIMB_ENDS):
        if limb in (HEAD_LIMB, TORSO_LIMB):
            continue
        t, d, distance = to_limbs(frames, body[:, [a, b], :2])
        assert (t[0, :, limb] - torch.tensor([0.0, 1.0])).abs().max() < 1e-12
        assert d[0, :, limb].abs().max() < 1e-12 and distance[0, :, limb].abs().max() < 1e-12


def test_side_points_to_the_persons_left():
    for body, sign in ((standing(), 1.0), (move(standing(), angle=2.0), 1.0)):
        frames = limb_frames(body, 1.0)
        assert frames.facing.item() == sign
        _, d, _ = to_limbs(frames, body[:, [L_SHOULDER, R_SHOULDER], :2])
        assert d[0, 0, TORSO_LIMB] > 0 > d[0, 1, TORSO_LIMB]
    back = standing()[:, SWAP]
    frames = limb_frames(back, 1.0)
    assert frames.facing.item() == -1
    _, d, _ = to_limbs(frames, back[:, [L_SHOULDER, R_SHOULDER], :2])
    assert d[0, 0, TORSO_LIMB] > 0 > d[0, 1, TORSO_LIMB], "left stays left when the back is seen"


def test_a_missing_limb_is_infinitely_far():
    distance = to_limbs(limb_frames(without(standing(), L_WRIST), 1.0), centres(8, 8, 1.0))[2]
    lost = [i for i, ends in enumerate(LIMB_ENDS) if L_WRIST in ends]
    assert distance[..., lost].isinf().all()
    assert distance[..., [i for i in range(10) if i not in lost]].isfinite().all()


def test_carrying_to_the_same_pose_is_the_identity_on_the_body():
    body = posed(1, batch=3)
    grid, certain = carry(body, body, 24, 32)
    identity = (centres(24, 32, 1.0).unflatten(1, (24, 32)) * 2 - 1).expand_as(grid)
    assert (grid - identity).abs().max() < 1e-9
    on_body = body_coordinates(body, 24, 32)[..., 2].unflatten(1, (24, 32))
    assert (certain - on_body).abs().max() < 1e-12
    assert (certain > 0.99).any() and (certain == 0).any()


@pytest.mark.parametrize(
    ("scale", "angle", "shift"), [(0.6, 0.0, (0.1, -0.1)), (1.0, 0.7, (0.0, 0.0)), (0.8, -2.5, (0.05, 0.1))]
)
@pytest.mark.parametrize("aspect", [1.0, 0.75, 1.5])
def test_a_place_on_the_body_keeps_its_coordinates_when_the_person_moves(scale, angle, shift, aspect):
    """Scale, rotation and shift of the person change nothing: coordinates belong to the body."""
    body = standing()
    moved = move(body, scale, angle, shift, aspect)
    points = torch.rand(1, 400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before, after = limb_frames(body, aspect), limb_frames(moved, aspect)
    unit = body.new_tensor([aspect, 1.0])
    there = move(torch.cat([points, torch.ones(1, 400, 1)], -1), scale, angle, shift, aspect)[..., :2]
    one, two = to_limbs(before, points * unit), to_limbs(after, there * unit)
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() < 1e-9
    assert torch.equal(before.facing, after.facing)


def test_body_coordinates_of_a_moved_person_are_the_moved_coordinates():
    """On the grid itself: half the scale is every second cell, seen through a grid of half the spacing."""
    body = standing()
    small = body_coordinates(move(body, scale=0.5), 64, 64).unflatten(1, (64, 64))[:, 16:48, 16:48]
    full = body_coordinates(body, 32, 32).unflatten(1, (32, 32))
    assert (small - full).abs().max() < 1e-9


def test_a_mirrored_pose_has_mirrored_coordinates():
    body = posed(3)
    mirrored = body[:, SWAP].clone()
    mirrored[..., 0] = 1 - mirrored[..., 0]
    one = body_coordinates(body, 30, 31).unflatten(1, (30, 31)).flip(2).flatten(1, 2)
    two = body_coordinates(mirrored, 30, 31)
    clear = clear_of_ties(limb_frames(mirrored, 31 / 30), centres(30, 31, 31 / 30))
    expected = one * one.new_tensor([-1.0, 1.0, 1.0])
    assert clear.float().mean() > 0.9
    assert (two - expected)[clear].abs().max() < 1e-9


def test_body_coordinates_of_the_rest_pose_are_places():
    """At a joint the coordinates are that joint's place in the rest pose, whatever the pose."""
    expected = {
        R_ELBOW: (-1.0, -1.0),
        L_WRIST: (1.55, -1.0),
        R_KNEE: (-0.32, 0.85),
        R_ANKLE: (-0.4, 1.7),
        NECK: (0.0, -1.0),
    }
    for joint, place in expected.items():
        body = posed(5)
        # A one-cell picture around the joint.
        body[..., :2] += 0.5 - body[:, joint : joint + 1, :2]
        x, y, on_body = body_coordinates(body, 1, 1)[0, 0].tolist()
        assert on_body == 1
        assert (x, y) == pytest.approx(place, abs=0.15), BODY_KEYPOINTS[joint]


def test_off_the_body_nothing_is_said():
    coordinates = body_coordinates(standing(), 32, 32).unflatten(1, (32, 32))
    assert (coordinates[0, :, 0] == 0).all() and (coordinates[0, -1] == 0).all()
    assert coordinates[..., 2].min() == 0 and coordinates[..., 2].max() == 1


def test_a_grid_that_does_not_share_the_pictures_shape_is_measured_in_the_picture():
    body = standing()
    fine = body_coordinates(body, 32, 64, aspect=2.0).unflatten(1, (32, 64))
    coarse = body_coordinates(body, 32, 32, aspect=2.0).unflatten(1, (32, 32))
    nearby = (fine[:, :, 0::2] + fine[:, :, 1::2]) / 2
    assert (coarse - nearby).abs().median() < 1e-2


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_source_and_target_may_have_pictures_of_other_shapes(aspect):
    """Carrying between two crops of one scene finds the same point of the scene."""
    body = standing()
    wide = body.clone()
    wide[..., 0] = (body[..., 0] - 0.5) / aspect + 0.5  # the same person in a picture `aspect` times as wide
    grid, certain = carry(wide, body, 32, 32, aspect=1.0, source_aspect=aspect)
    scene = centres(32, 32, 1.0).unflatten(1, (32, 32))
    expected = torch.stack([(scene[..., 0] - 0.5) / aspect + 0.5, scene[..., 1]], -1) * 2 - 1
    assert (grid - expected)[certain > 0].abs().max() < 1e-9
    masks = one_hot(torch.full((1, 32, int(32 * aspect)), int(Region.UPPER)), 7).permute(0, 3, 1, 2).double()
    prior = region_prior(HumanParsing(masks), wide, body, 32, 32).labels()
    on_body = body_coordinates(body, 32, 32, 1.0)[0, :, 2].reshape(32, 32) > 0
    assert torch.equal(prior[0] == int(Region.UPPER), on_body)


ODD = {
    "nothing at all": lambda b: torch.zeros_like(b),
    "no neck": lambda b: without(b, NECK),
    "no hips": lambda b: without(b, R_HIP, R_HIP + 3),
    "a nose alone": lambda b: without(b, *range(1, 18)),
    "no shoulders": lambda b: without(b, R_SHOULDER, L_SHOULDER),
    "outside the picture": lambda b: b + b.new_tensor([3.0, -2.0, 0.0]),
    "far outside": lambda b: b * b.new_tensor([1e6, 1e6, 1.0]),
    "all in one point": lambda b: torch.cat([torch.full_like(b[..., :2], 0.5), b[..., 2:]], -1),
    "without confidence": lambda b: b * b.new_tensor([1.0, 1.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("odd", ODD)
def test_odd_keypoints_give_finite_numbers(odd, dtype):
    normal, strange = standing(dtype), ODD[odd](standing(dtype))
    parsing = HumanParsing(torch.full((1, 7, 16, 16), 1 / 7, dtype=dtype))
    image = torch.rand(1, 3, 16, 16, dtype=dtype)
    for source, target in ((normal, strange), (strange, normal), (strange, strange)):
        assert body_coordinates(target, 16, 16).isfinite().all()
        grid, certain = carry(source, target, 16, 16)
        assert grid.isfinite().all() and ((certain >= 0) & (certain <= 1)).all()
        assert region_prior(parsing, source, target, 16, 16).masks.isfinite().all()
        assert warp(image, parsing, source, target)[0].isfinite().all()


def test_without_keypoints_nothing_is_certain():
    nobody = torch.zeros(1, 18, 3)
    parsing = HumanParsing(torch.full((1, 7, 16, 16), 1 / 7))
    assert (body_coordinates(nobody, 16, 16) == 0).all()
    for source, target in ((standing(torch.float32), nobody), (nobody, standing(torch.float32))):
        assert (carry(source, target, 16, 16)[1] == 0).all()
        on_body = body_coordinates(target, 16, 16)[0, :, 2].reshape(16, 16) > 0
        rows = region_prior(parsing, source, target, 16, 16).masks[0]
        assert (rows[int(Region.BACKGROUND)] == 1)[~on_body].all()
        # A limb that the source does not show: the source's person on the whole, here the same share of each region.
        assert torch.allclose(rows[1:, on_body], torch.full_like(rows[1:, on_body], 1 / 6))


def test_a_limb_that_the_source_hides_is_uncertain_and_the_others_are_not():
    target = standing()
    on_arm = body_coordinates(without(target, *(j for j in range(18) if j not in (NECK, R_ELBOW, R_WRIST))), 48, 48)
    arm = on_arm[..., 2].unflatten(1, (48, 48)) > 0.99
    _, with_arm = carry(target, target, 48, 48)
    _, certain = carry(without(target, R_WRIST), target, 48, 48)
    nearest = to_limbs(limb_frames(target, 1.0), centres(48, 48, 1.0))[2].argmin(-1).unflatten(1, (48, 48))
    forearm = nearest == LIMB_ENDS.index((R_ELBOW, R_WRIST))
    assert (arm & forearm).any()
    assert (certain[forearm] == 0).all()
    assert torch.equal(certain[~forearm], with_arm[~forearm])


def test_where_the_source_picture_ends_the_prior_is_uncertain():
    source = move(standing(), shift=(0.0, 0.45))  # the legs are below the picture
    grid, certain = carry(source, standing(), 48, 48)
    legs = body_coordinates(standing(), 48, 48)[..., 1].unflatten(1, (48, 48)) > 0.5
    assert (certain[legs] == 0).all()
    assert certain[~legs].max() == 1
    assert grid[certain > 0].abs().max() <= 1


def test_from_behind_there_is_no_face():
    front, back = standing(), without(standing()[:, SWAP], NOSE, 14, 15)
    labels = torch.full((1, 32, 32), int(Region.FACE))
    parsing = HumanParsing(one_hot(labels, 7).permute(0, 3, 1, 2).double())
    seen_from_behind = region_prior(parsing, front, back, 32, 32).masks
    assert (seen_from_behind[:, int(Region.FACE)] == 0).all()
    assert (seen_from_behind[:, int(Region.HAIR)] > 0.5).any()
    assert (region_prior(parsing, front, front, 32, 32).masks[:, int(Region.FACE)] > 0.5).any()
    assert carry(front, back, 32, 32)[1].max() == 0.5, "the other side of the body is half certain"
    assert carry(back, back, 32, 32)[1].max() == 1


def test_a_batch_equals_its_items():
    source, target = posed(8, 3), posed(9, 3)
    parsing = HumanParsing(torch.rand(3, 7, 20, 16, dtype=torch.float64).softmax(1))
    image = torch.rand(3, 3, 20, 16, dtype=torch.float64)
    prior, (picture, certain) = region_prior(parsing, source, target, 10, 8).masks, warp(image, parsing, source, target)
    for b in range(3):
        one = slice(b, b + 1)
        alone = warp(image[one], parsing[one], source[one], target[one])
        assert (prior[one] - region_prior(parsing[one], source[one], target[one], 10, 8).masks).abs().max() < 1e-12
        assert (picture[one] - alone[0]).abs().max() < 1e-12 and (certain[one] - alone[1]).abs().max() < 1e-12


def test_region_colors_are_means_and_unseen_regions_get_the_persons():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[:, 1:3], labels[:, 3] = int(Region.UPPER), int(Region.LOWER)
    image = one_hot(labels, 7).permute(0, 3, 1, 2)[:, [0, int(Region.UPPER), int(Region.LOWER)]].float()
    colors, seen = region_colors(image, HumanParsing.from_labels(labels))
    assert seen[0].nonzero().flatten().tolist() == [0, int(Region.UPPER), int(Region.LOWER)]
    assert torch.allclose(colors[0, int(Region.UPPER)], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.allclose(colors[0, int(Region.FACE)], torch.tensor([0.0, 2 / 3, 1 / 3]))


def foreground_psnr(image, pairs):
    person = 1 - pairs.target.parsing[:, :1]
    error = ((image - pairs.target.image).square() * person).sum((1, 2, 3)) / (3 * person.sum((1, 2, 3)))
    return -10 * error.log10()


def mean_iou(masks, truth):
    return (torch.minimum(masks, truth).sum((0, 2, 3)) / torch.maximum(masks, truth).sum((0, 2, 3))).mean()


def test_the_warp_beats_copying_the_source(pairs):
    source = pairs.source
    carried, certain = warp(source.image, HumanParsing(source.parsing), source.keypoints, pairs.target.keypoints)
    assert carried.shape == source.image.shape and certain.shape == source.image[:, :1].shape
    assert carried.min() >= 0 and carried.max() <= 1
    gain = foreground_psnr(carried, pairs) - foreground_psnr(source.image, pairs)
    assert gain.mean() > 3 and (gain > 0).float().mean() > 0.9


def test_the_prior_beats_the_sources_parsing(pairs):
    source, target = pairs.source, pairs.target
    prior = region_prior(HumanParsing(source.parsing), source.keypoints, target.keypoints, 64, 48)
    assert mean_iou(prior.masks, target.parsing) > 2 * mean_iou(source.parsing, target.parsing)


@pytest.mark.parametrize("joint", [R_SHOULDER, R_ELBOW, L_ELBOW, R_WRIST, R_KNEE, R_ANKLE])
def test_a_joint_has_the_same_coordinates_in_both_poses(pairs, joint):
    """The median over people: a limb in front of another one takes its place."""
    places = []
    for body in (pairs.source.keypoints, pairs.target.keypoints):
        grid = body_coordinates(body, 64, 48).unflatten(1, (64, 48))
        column, row = (body[:, joint, :2] * body.new_tensor([48, 64])).long().clamp(min=0).unbind(-1)
        places.append(grid[torch.arange(32), row.clamp(max=63), column.clamp(max=47)])
    both = (pairs.source.keypoints[:, joint, 2] > 0) & (pairs.target.keypoints[:, joint, 2] > 0)
    assert both.sum() > 10
    assert (places[0] - places[1])[both, :2].norm(dim=-1).median() < 0.1, "in torso lengths"
    assert (places[0][both, 2] == 1).all()


def test_frames_are_what_they_say():
    frames = limb_frames(posed(11, 4), 0.75)
    assert isinstance(frames, LimbFrames)
    assert (frames.side.norm(dim=-1) - 1).abs().max() < 1e-9
    assert (frames.side * frames.axis).sum(-1).abs().max() < 1e-12
    assert (frames.width > 0).all() and frames.valid.all()
