"""Laws of skeleton drawing."""

import colorsys
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from truepose_core.errors import TruePoseError
from truepose_core.pose import Person, Pose
from truepose_core.pose.keypoints import HAND_EDGES, LIMBS
from truepose_core.pose.skeleton import (
    BODY_COLORS,
    BODY_FLOOR,
    JOINT_RADIUS,
    LIMB_BRIGHTNESS,
    LIMB_RADIUS,
    draw_pose,
    draw_skeleton,
)

quick = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def random_body(seed, batch=1, missing=0.2):
    generator = torch.Generator().manual_seed(seed)
    body = torch.rand(batch, 18, 3, generator=generator) * 1.2 - 0.1
    body[..., 2] = (torch.rand(batch, 18, generator=generator) > missing).float()
    return body


def only(points):
    """A body with these keypoints {index: (x, y)} visible."""
    body = torch.zeros(1, 18, 3)
    for index, (x, y) in points.items():
        body[0, index] = torch.tensor([x, y, 1.0])
    return body


def test_colours_are_the_rainbow_of_the_controlnets():
    assert len(set(BODY_COLORS)) == 18
    for i, color in enumerate(BODY_COLORS):
        hue = colorsys.rgb_to_hsv(*(c / 255 for c in color))
        assert hue[1:] == (1.0, 1.0)
        assert hue[0] * 18 == pytest.approx(i, abs=0.01)


@given(seeds, st.integers(1, 90), st.integers(1, 90))
@quick
def test_any_size_gives_an_image(seed, height, width):
    image = draw_skeleton(random_body(seed, 2), height, width)
    assert image.shape == (2, 3, height, width) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1


def test_nobody_is_black():
    assert not draw_skeleton(torch.zeros(2, 18, 3), 64, 48).any()
    assert not draw_pose(Pose(48, 64), 64, 48).any()


@pytest.mark.parametrize("size", [(64, 48), (200, 150)])
def test_a_batch_equals_its_items(size):
    body = random_body(1, 5)
    together = draw_skeleton(body, *size)
    apart = torch.cat([draw_skeleton(one[None], *size) for one in body])
    # Pixel coordinates of up to 100 in float32 are exact to 1e-5; a batch may be summed in another order.
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


@given(seeds)
@quick
def test_mirrored_keypoints_draw_the_mirrored_image(seed):
    body = random_body(seed)
    mirrored = body * torch.tensor([-1.0, 1, 1]) + torch.tensor([1.0, 0, 0])
    expected = draw_skeleton(body, 64, 48).flip(-1)
    torch.testing.assert_close(draw_skeleton(mirrored, 64, 48), expected, atol=1e-3, rtol=0)


@given(seeds)
@quick
def test_transposed_keypoints_draw_the_transposed_image(seed):
    body = random_body(seed)
    expected = draw_skeleton(body, 64, 48).mT
    transposed = draw_skeleton(body[..., [1, 0, 2]], 48, 64)
    torch.testing.assert_close(transposed, expected, atol=1e-3, rtol=0)


def test_moving_by_whole_pixels_moves_the_image():
    body = random_body(2, missing=0)
    body[..., :2] = 0.3 + 0.3 * body[..., :2]
    moved = body + torch.tensor([5 / 64, -3 / 64, 0])
    expected = draw_skeleton(body, 64, 64).roll((-3, 5), (-2, -1))
    torch.testing.assert_close(draw_skeleton(moved, 64, 64), expected, atol=1e-3, rtol=0)


def test_a_large_drawing_averages_to_a_small_one():
    body = random_body(3, missing=0)
    large = F.avg_pool2d(draw_skeleton(body, 1024, 1024), 4)
    small = draw_skeleton(body, 256, 256)
    assert (large - small).abs().max() < 0.15
    assert (large - small).abs().mean() < 1e-3


def painted_by_hand(body, height, width, fine=6):
    """The definition, in numpy: `fine` x `fine` points per pixel, inside or outside each shape."""
    scale = min(height, width) / 512
    limb, joint = max(LIMB_RADIUS * scale, BODY_FLOOR), max(JOINT_RADIUS * scale, BODY_FLOOR)
    y, x = (np.mgrid[: height * fine, : width * fine] + 0.5) / fine
    image = np.zeros((height * fine, width * fine, 3))
    points = body[0].double().numpy() * (width, height, 1)
    for (a, b), color in zip(LIMBS, BODY_COLORS, strict=False):
        if points[a, 2] and points[b, 2]:
            dx, dy = points[b, :2] - points[a, :2]
            length = math.hypot(dx, dy)
            mx, my = (points[a, :2] + points[b, :2]) / 2
            along = ((x - mx) * dx + (y - my) * dy) / length
            across = ((y - my) * dx - (x - mx) * dy) / length
            inside = (along / max(length / 2, limb)) ** 2 + (across / limb) ** 2 < 1
            image[inside] = np.array(color) / 255 * LIMB_BRIGHTNESS
    for (px, py, c), color in zip(points, BODY_COLORS, strict=True):
        if c:
            image[(x - px) ** 2 + (y - py) ** 2 < joint**2] = np.array(color) / 255
    return image.reshape(height, fine, width, fine, 3).mean((1, 3)).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(64, 48), (128, 200), (384, 256)])
@pytest.mark.parametrize("seed", range(3))
def test_the_drawing_is_the_definition(seed, size):
    body = random_body(seed)
    difference = np.abs(draw_skeleton(body, *size)[0].numpy() - painted_by_hand(body, *size))
    assert difference.max() < 0.3
    assert difference.mean() < 0.04 * painted_by_hand(body, *size).mean() + 1e-4


@pytest.mark.parametrize("size", [64, 128, 512, 1024])
def test_a_joint_has_its_area(size):
    radius = max(JOINT_RADIUS * size / 512, BODY_FLOOR)
    joint = draw_skeleton(only({0: (0.5, 0.5)}), size, size)
    assert joint[0, 0].sum().item() == pytest.approx(math.pi * radius**2, rel=0.1)


def test_a_thin_limb_still_reads_at_64x48():
    image = draw_skeleton(only({9: (0.25, 0.5), 10: (0.75, 0.5)}), 64, 48)
    across = image[0, :, :, 24].amax(0)
    full = max(BODY_COLORS[LIMBS.index((9, 10))]) / 255 * LIMB_BRIGHTNESS
    assert across.max() == pytest.approx(full, abs=1e-3)
    assert (across / full).sum().item() == pytest.approx(2 * 1.2, abs=0.15)


def test_limbs_dim_joints_bright_and_later_over_earlier():
    image = draw_skeleton(only({1: (0.2, 0.5), 2: (0.8, 0.5)}), 512, 512)[0]
    assert image[:, 256, 256].tolist() == pytest.approx([0.6, 0, 0], abs=1e-3)
    assert image[:, 256, 102].tolist() == pytest.approx([1, 85 / 255, 0], abs=1e-3)
    both = draw_skeleton(only({1: (0.2, 0.5), 2: (0.8, 0.5), 5: (0.8, 0.5)}), 512, 512)[0]
    assert both[:, 256, 256].tolist() == pytest.approx([0.6, 0.6 * 85 / 255, 0], abs=1e-3)


@given(seeds)
@quick
def test_a_limb_with_a_missing_end_is_not_drawn(seed):
    body = random_body(seed, missing=0.5)
    shown = body[0, :, 2] > 0
    joints_only = torch.zeros_like(body).repeat(int(shown.sum()) + 1, 1, 1)
    for row, index in enumerate(shown.nonzero()[:, 0].tolist()):
        joints_only[row, index] = body[0, index]
    limbs = [pair for pair in LIMBS if shown[pair[0]] and shown[pair[1]]]
    image = draw_skeleton(body, 64, 48)
    if not limbs:
        painted = draw_skeleton(joints_only, 64, 48).amax(0)
        torch.testing.assert_close(image[0].amax(0), painted.amax(0), atol=1e-3, rtol=0)
    # Where a missing keypoint claims to be does not matter.
    body[0, ~shown, :2] = 0.123
    assert torch.equal(draw_skeleton(body, 64, 48), image)


def test_a_limb_of_no_length_is_hidden_by_its_joint():
    both = draw_skeleton(only({9: (0.5, 0.5), 10: (0.5, 0.5)}), 256, 256)
    alone = draw_skeleton(only({10: (0.5, 0.5)}), 256, 256)
    assert both.isfinite().all()
    core = alone.amax(1) > 0.999
    assert core.any()
    torch.testing.assert_close(both.amax(1)[core], alone.amax(1)[core])
    # The limb is a disc, not a bar across: at most half a pixel wider than the joint.
    assert both.amax(1).sum() < 1.5 * alone.amax(1).sum()


def test_points_outside_the_canvas_are_cut_off():
    outside = only({9: (-3.0, 0.5), 10: (4.0, 0.5)})
    assert draw_skeleton(outside, 64, 48)[0].amax(0)[32].min() > 0.3
    assert not draw_skeleton(only({0: (3.0, -2.0)}), 64, 48).any()


@pytest.mark.parametrize("body", [torch.zeros(18, 3), torch.zeros(1, 25, 3), torch.zeros(1, 18, 2)])
def test_wrong_shapes_are_refused(body):
    with pytest.raises(TruePoseError, match=r"\[B, 18, 3\]"):
        draw_skeleton(body, 64, 48)


def test_nan_and_empty_canvases_are_refused():
    with pytest.raises(TruePoseError, match="NaN"):
        draw_skeleton(only({0: (float("nan"), 0.5)}), 64, 48)
    with pytest.raises(TruePoseError, match="1x1"):
        draw_skeleton(torch.zeros(1, 18, 3), 0, 48)


# draw_pose


def person(seed, hands=True, face=True):
    rng = np.random.default_rng(seed)

    def points(n):
        xy = rng.uniform(0.1, 0.9, (n, 2))
        return np.concatenate([xy, np.ones((n, 1))], 1)

    hand = (points(21), points(21)) if hands else (None, None)
    return Person(points(18), *hand, points(70) if face else None)


def test_a_body_alone_is_draw_skeleton():
    one = person(0, hands=False, face=False)
    drawn = draw_pose(Pose(48, 64, (one,)), 64, 48)
    assert torch.equal(drawn, draw_skeleton(torch.tensor(one.body)[None], 64, 48))


def test_hands_and_faces_can_be_left_out():
    full = person(1)
    plain = draw_skeleton(torch.tensor(full.body)[None], 64, 48)
    assert torch.equal(draw_pose(Pose(48, 64, (full,)), 64, 48, hands=False, face=False), plain)


def test_a_face_is_white_paint_over_the_skeleton():
    """Where it covers a share a of a pixel it leaves 1 - a of what was there."""
    full = person(1, hands=False)
    alone = Person(np.zeros((18, 3)), face=full.face)
    share = draw_pose(Pose(48, 64, (alone,)), 64, 48)
    plain = draw_skeleton(torch.tensor(full.body)[None], 64, 48)
    assert share.amax() > 0.5
    torch.testing.assert_close(draw_pose(Pose(48, 64, (full,)), 64, 48), plain * (1 - share) + share)


def test_all_joints_lie_over_all_limbs():
    # The second person's limb crosses the first one's joint.
    first = Person(only({0: (0.5, 0.5)})[0].numpy())
    second = Person(only({9: (0.2, 0.5), 10: (0.8, 0.5)})[0].numpy())
    for people in ((first, second), (second, first)):
        image = draw_pose(Pose(256, 256, people), 256, 256)
        assert image[0, :, 128, 128].tolist() == pytest.approx([1, 0, 0], abs=1e-3)


def test_hand_and_face_colours():
    hand, face = np.zeros((21, 3)), np.zeros((70, 3))
    hand[0], hand[1], face[30] = (0.2, 0.2, 1), (0.8, 0.2, 1), (0.5, 0.8, 1)
    pose = Pose(512, 512, (Person(np.zeros((18, 3)), hand_left=hand, face=face),))
    image = draw_pose(pose, 512, 512)[0]
    assert image[:, 102, 102].tolist() == [0, 0, 1]
    assert image[:, 409, 256].tolist() == [1, 1, 1]
    line = image[:, 96:110, 256].sum(1)
    assert line[0].item() == pytest.approx(3, abs=0.01) and not line[1:].any()


def test_a_hand_has_five_fingers_of_four_bones():
    assert len(HAND_EDGES) == 20 and len(set(HAND_EDGES)) == 20
    assert sorted(end for _, end in HAND_EDGES) == list(range(1, 21))
    assert [start for start, _ in HAND_EDGES].count(0) == 5


def test_speed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for body, size, limit in (
            (random_body(0, 16, 0), (64, 48), 0.015),
            (random_body(0, 1, 0), (1024, 768), 1.0),
        ):
            times = []
            for _ in range(5):
                start = time.process_time()
                draw_skeleton(body, *size)
                times.append(time.process_time() - start)
            assert min(times) < 2 * limit, (size, times)
    finally:
        torch.set_num_threads(threads)
