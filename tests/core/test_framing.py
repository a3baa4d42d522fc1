"""Laws of `Frame`: exact sizes, one scale, and a way back."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truepose_core.errors import TruePoseError
from truepose_core.framing import fit
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose
from truepose_core.regions import Region

side = st.integers(1, 120)
size = st.tuples(side, side)
model_size = st.sampled_from([(64, 48), (128, 96), (48, 64), (96, 96), (72, 40), (17, 13)])
quick = settings(max_examples=40, deadline=None)


def rand(*shape, **options):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), **options)


def frames(size_in, size_model, multiple):
    return fit(size_in, size_model), fit(size_in, multiple=multiple)


@given(size, model_size, st.integers(1, 64))
@quick
def test_sizes_are_exact_there_and_back(size_in, size_model, multiple):
    for frame in frames(size_in, size_model, multiple):
        image = rand(1, 3, *size_in)
        inside = frame.apply(image)
        assert inside.shape == (1, 3, *frame.size_model)
        assert inside.min() >= 0 and inside.max() <= 1
        back = frame.restore(inside)
        assert back.shape == image.shape
        assert back.min() >= 0 and back.max() <= 1


@given(size, model_size, st.integers(1, 64))
@quick
def test_the_scale_is_one_for_both_axes(size_in, size_model, multiple):
    for frame in frames(size_in, size_model, multiple):
        (padded_h, padded_w), (model_h, model_w) = frame.size_padded, frame.size_model
        assert model_h * padded_w == model_w * padded_h
        assert padded_h >= size_in[0] and padded_w >= size_in[1]


@given(size, model_size)
@quick
def test_no_more_padding_than_the_aspect_ratio_needs(size_in, size_model):
    frame = fit(size_in, size_model)
    smaller = [
        padded - model // torch.gcd(*map(torch.tensor, size_model)).item()
        for padded, model in zip(frame.size_padded, size_model, strict=True)
    ]
    assert smaller[0] < size_in[0] or smaller[1] < size_in[1]


@given(size, model_size, st.integers(1, 64))
@quick
def test_keypoints_return_to_where_they_were(size_in, size_model, multiple):
    for frame in frames(size_in, size_model, multiple):
        keypoints = rand(2, 18, 3) * 3 - 1
        keypoints[..., 2] = (keypoints[..., 2] > 0).float()
        keypoints[keypoints[..., 2] == 0] = 0
        moved = frame.apply_keypoints(keypoints)
        torch.testing.assert_close(frame.restore_keypoints(moved), keypoints, atol=1e-5, rtol=1e-5)
        assert torch.equal(moved[keypoints[..., 2] == 0], keypoints[keypoints[..., 2] == 0])


@given(size, model_size)
@quick
def test_keypoints_keep_their_shape_in_pixels(size_in, size_model):
    frame = fit(size_in, size_model)
    keypoints = rand(1, 18, 3, dtype=torch.float64) + 0.1
    moved = frame.apply_keypoints(keypoints)

    def pixels(points, canvas):
        xy = points[0, :, :2] * torch.tensor(canvas[::-1], dtype=torch.float64)
        return torch.cdist(xy, xy)

    expected = pixels(keypoints, size_in) * frame.scale
    torch.testing.assert_close(pixels(moved, size_model), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("size_in", [(200, 100), (100, 200), (150, 150), (31, 47)])
def test_keypoints_go_where_the_pixels_go(size_in):
    frame = fit(size_in, (128, 96))
    height, width = size_in
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spot = (0.3 * width, 0.6 * height)
    sigma = 0.05 * min(size_in)
    blob = torch.exp(-((x + 0.5 - spot[0]) ** 2 + (y + 0.5 - spot[1]) ** 2) / (2 * sigma**2)).float()
    inside = frame.apply(blob[None, None], fill=0.0)[0, 0]
    ys, xs = torch.arange(128) + 0.5, torch.arange(96) + 0.5
    centre = torch.stack([(inside * xs).sum() / 96, (inside * ys[:, None]).sum() / 128])
    moved = frame.apply_keypoints(torch.tensor([0.3, 0.6, 1.0]))
    torch.testing.assert_close(centre / inside.sum(), moved[:2], atol=2e-3, rtol=0)


@given(model_size)
@quick
def test_the_models_own_size_is_returned_bit_equal(size_model):
    frame = fit(size_model, size_model)
    image = rand(1, 3, *size_model) * 3 - 1
    assert frame.apply(image) is image and frame.restore(image) is image
    body = rand(1, 18, 3)
    assert torch.equal(frame.apply_keypoints(body), body)


@given(size, st.integers(1, 64), st.floats(0, 1))
@quick
def test_rounding_up_pads_without_touching_a_pixel(size_in, multiple, fill):
    frame = fit(size_in, multiple=multiple)
    assert frame.scale == 1
    assert all(side % multiple == 0 for side in frame.size_model)
    assert all(m - s < multiple for m, s in zip(frame.size_model, size_in, strict=True))
    image = rand(1, 3, *size_in)
    inside = frame.apply(image, fill)
    assert torch.equal(frame.restore(inside), image)
    rest = inside.sum(dtype=torch.float64) - image.sum(dtype=torch.float64)
    padding = 3 * (inside[0, 0].numel() - image[0, 0].numel()) * fill
    assert rest.item() == pytest.approx(padding, rel=1e-6, abs=1e-9)


@given(size, model_size)
@quick
def test_a_constant_image_survives(size_in, size_model):
    frame = fit(size_in, size_model)
    image = torch.full((1, 3, *size_in), 0.25)
    inside = frame.apply(image, fill=0.25)
    torch.testing.assert_close(inside, torch.full_like(inside, 0.25))
    torch.testing.assert_close(frame.restore(inside), image)


def test_going_up_and_back_keeps_the_image():
    frame = fit((40, 21), (128, 96))
    y, x = torch.meshgrid(torch.linspace(0, 1, 40), torch.linspace(0, 1, 21), indexing="ij")
    image = torch.stack([y, x, (y + x) / 2])[None]
    assert (frame.restore(frame.apply(image)) - image)[..., 2:-2, 2:-2].abs().max() < 0.01


def test_the_fill_may_have_a_value_per_channel():
    frame = fit((64, 32), (64, 48))
    inside = frame.apply(torch.zeros(1, 3, 64, 32), fill=(0.1, 0.2, 0.3))
    torch.testing.assert_close(inside[0, :, 5, 0], torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(TruePoseError, match="fill"):
        frame.apply(torch.zeros(1, 3, 64, 32), fill=(0.1, 0.2))


@given(size, model_size, st.integers(1, 64))
@quick
def test_a_parsing_is_framed_with_background_around(size_in, size_model, multiple):
    parsing = HumanParsing.from_labels(torch.full((1, *size_in), int(Region.UPPER)))
    for frame in frames(size_in, size_model, multiple):
        framed = frame.apply_parsing(parsing)
        assert framed.size == frame.size_model
        torch.testing.assert_close(framed.mask(("upper", "background")), torch.ones(1, *frame.size_model))
        (padded_h, padded_w) = frame.size_padded
        share = size_in[0] * size_in[1] / (padded_h * padded_w)
        if frame.scale == 1:
            assert abs(framed.mask("upper").mean().item() - share) < 1e-5


def test_a_pose_takes_the_models_canvas():
    body = rand(18, 3).numpy()
    body[4] = 0
    hand = rand(21, 3).numpy()
    frame = fit((200, 100), (64, 48))
    pose = frame.apply_pose(Pose(100, 200, (Person(body, hand_left=hand), Person(body))))
    assert (pose.width, pose.height) == (48, 64)
    expected = frame.apply_keypoints(torch.tensor(body))
    torch.testing.assert_close(torch.tensor(pose.people[1].body), expected)
    assert pose.people[0].hand_left.shape == (21, 3) and pose.people[0].face is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types_are_kept(dtype):
    frame = fit((100, 40), (64, 48))
    image = rand(1, 3, 100, 40).to(dtype)
    assert frame.restore(frame.apply(image)).dtype == dtype


def test_extreme_shapes_stay_small():
    # The padded canvas would be 21848 x 16386: with a tensor of that size this takes minutes.
    for size_in in ((16, 16384), (16384, 16)):
        frame = fit(size_in, (64, 48))
        image = rand(1, 3, *size_in)
        start = time.process_time()
        assert frame.restore(frame.apply(image)).shape == image.shape
        assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "call",
    [
        lambda: fit((10, 10)),
        lambda: fit((10, 10), (64, 48), multiple=8),
        lambda: fit((0, 10), (64, 48)),
        lambda: fit((10, 10), (64, -48)),
        lambda: fit((10, 10.5), (64, 48)),
        lambda: fit((10, 10), multiple=0),
        lambda: fit((10, 10), (64, 48)).apply(rand(1, 3, 11, 10)),
        lambda: fit((10, 10), (64, 48)).apply(torch.zeros(1, 3, 10, 10, dtype=torch.uint8)),
        lambda: fit((10, 10), (64, 48)).restore(rand(1, 3, 10, 10)),
        lambda: fit((10, 10), (64, 48)).apply_keypoints(rand(18, 2)),
        lambda: fit((10, 10), (64, 48)).apply_parsing(
            HumanParsing.from_labels(torch.zeros(1, 10, 11, dtype=torch.int64))
        ),
    ],
)
def test_wrong_sizes_are_refused(call):
    with pytest.raises(TruePoseError, match=r"expect|give either"):
        call()
