"""Laws of `Frame`: exact sizes, one scale, and a way back."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import (
    BUCKETS,
    best_bucket,
    box_mask,
    crop_person,
    cut_sides,
    detail_boxes,
    paste_back,
    person_box,
    uncovered,
)
from truepose_core.framing.frame import fit
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


# Crops.

crop_box = st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(10, 60), st.integers(10, 60)).map(
    lambda b: (float(b[0]), float(b[1]), float(b[0] + b[2]), float(b[1] + b[3]))
)


@given(crop_box, model_size, st.floats(0, 0.5), st.booleans())
@quick
def test_a_crop_shows_the_box_without_stretching(box, size_model, margin, enlarge):
    crop = crop_person((150, 150), box, size_model, margin=margin, enlarge=enlarge)
    left, top, right, bottom = crop.box
    assert (right - left) * size_model[0] == (bottom - top) * size_model[1]
    assert left <= box[0] and top <= box[1] and right >= box[2] and bottom >= box[3]
    wide, high = right - left, bottom - top
    # As much of the photo as fits, and no padding where the crop fits in.
    assert (wide > 150 or left >= 0) and (high > 150 or top >= 0)
    assert (wide > 150 or right <= 150) and (high > 150 or bottom <= 150)
    assert enlarge or crop.frame.scale <= 1
    assert crop.apply(rand(1, 3, 150, 150)).shape == (1, 3, *size_model)


@given(crop_box, model_size)
@quick
def test_keypoints_of_a_crop_return_to_where_they_were(box, size_model):
    crop = crop_person((150, 170), box, size_model)
    keypoints = rand(2, 18, 3)
    keypoints[0, 3] = 0
    torch.testing.assert_close(crop.restore_keypoints(crop.apply_keypoints(keypoints)), keypoints, atol=1e-5, rtol=0)


def test_keypoints_of_a_crop_go_where_the_pixels_go():
    photo = torch.zeros(1, 1, 150, 170)
    photo[0, 0, 60, 40] = 1
    for size_model in ((64, 48), (300, 200), (17, 13)):
        crop = crop_person((150, 170), (20, 30, 70, 140), size_model)
        inside = crop.apply(photo, 0.0)[0, 0].double()
        y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size_model)
        found = torch.stack([(inside * x).sum() / size_model[1], (inside * y[:, None]).sum() / size_model[0]])
        moved = crop.apply_keypoints(torch.tensor([40.5 / 170, 60.5 / 150, 1.0]))
        torch.testing.assert_close(found.float() / inside.sum().float(), moved[:2], atol=0.01, rtol=0)


@given(crop_box, st.floats(0, 20))
@quick
def test_an_untouched_crop_at_scale_one_changes_no_bit(box, feather):
    photo = rand(1, 3, 90, 120)
    box = tuple(min(v, limit) for v, limit in zip(box, (100, 70, 120, 90), strict=True))
    crop = crop_person((90, 120), box, (64, 48), enlarge=False)
    if crop.frame.scale == 1:
        result, _ = paste_back(photo, crop.apply(photo), [crop], feather=feather)
        assert torch.equal(result, photo)


@given(crop_box, st.integers(0, 8))
@quick
def test_the_result_is_the_picture_inside_and_the_photo_outside(box, feather):
    photo = rand(1, 3, 150, 150)
    crop = crop_person((150, 150), box, (64, 48))
    result, weight = paste_back(photo, torch.zeros(1, 3, 64, 48), [crop], feather=feather)
    left, top, right, bottom = (min(max(v, 0), 150) for v in crop.box)
    outside = torch.ones(150, 150, dtype=torch.bool)
    outside[top:bottom, left:right] = False
    assert bool((weight[0, outside] == 0).all()) and torch.equal(result[0][:, outside], photo[0][:, outside])
    # An edge of the crop that is an edge of the photo does not fade.
    edges = [
        side + step * feather * (side not in (0, 150))
        for side, step in ((left, 1), (top, 1), (right, -1), (bottom, -1))
    ]
    inner = (slice(edges[1], max(edges[3], edges[1])), slice(edges[0], max(edges[2], edges[0])))
    assert bool((weight[0][inner] == 1).all()) and not result[0][:, inner[0], inner[1]].any()


def test_round_trip_of_a_scaled_crop_is_close_on_smooth_pictures():
    y, x = torch.meshgrid(torch.linspace(0, 1, 200), torch.linspace(0, 1, 160), indexing="ij")
    photo = torch.stack([y, x, (6 * y).sin() * (5 * x).cos() / 2 + 0.5])[None]
    for size_model in ((64, 48), (256, 192)):
        crop = crop_person((200, 160), (40.0, 30.0, 110.0, 150.0), size_model)
        result, _ = paste_back(photo, crop.apply(photo), [crop])
        assert (result - photo).abs().max() < 0.01


def test_paste_back_of_a_batch_is_its_items_one_by_one():
    photos, pictures = rand(2, 3, 100, 90), rand(2, 3, 64, 48)
    crops = [crop_person((100, 90), box, (64, 48)) for box in ((10, 10, 40, 80), (50, 20, 80, 60))]
    both, weights = paste_back(photos, pictures, crops)
    for i in range(2):
        one, weight = paste_back(photos[i : i + 1], pictures[i : i + 1], crops[i : i + 1])
        assert torch.equal(both[i : i + 1], one) and torch.equal(weights[i : i + 1], weight)
    same, _ = paste_back(photos[:1], pictures, crops[:1])
    assert torch.equal(same[0], both[0])


def test_only_the_mask_is_pasted_and_a_colour_covers_the_rest():
    photo, picture = rand(1, 3, 100, 90), rand(1, 3, 64, 48)
    crop = crop_person((100, 90), (10, 10, 40, 80), (64, 48))
    mask = torch.zeros(1, 64, 48)
    kept, weight = paste_back(photo, picture, [crop], mask=mask)
    assert torch.equal(kept, photo) and not weight.any()
    plain, _ = paste_back(photo, picture, [crop], mask=mask, color=(0.1, 0.2, 0.3))
    assert torch.equal(plain, torch.tensor([0.1, 0.2, 0.3])[:, None, None].expand(1, 3, 100, 90))
    person = rand(1, 100, 90)
    assert torch.equal(uncovered(weight, person), person) and not uncovered(weight).any()
    assert not uncovered(torch.ones(1, 2, 2), torch.ones(1, 2, 2)).any()


def test_the_bucket_that_a_person_fills_best():
    sizes = BUCKETS["SD1.5"]
    assert best_bucket([(0, 0, 20, 60)], sizes) == (768, 512)
    assert best_bucket([(0, 0, 60, 20)], sizes) == (512, 768)
    assert best_bucket([(0, 0, 50, 50)], sizes) == (512, 512)
    for size_model in sizes:
        assert best_bucket([(0.0, 0.0, float(size_model[1]), float(size_model[0]))], sizes) == size_model
    # Shared by a tall and a wide person.
    assert best_bucket([(0, 0, 20, 60), (0, 0, 60, 20)], sizes) == (512, 512)


def _standing(shift=0.0):
    """A person of 0.5 picture heights, in a picture twice as wide as high."""
    points = torch.tensor(
        [(0, 0.2), (0, 0.27), (-0.03, 0.27), (-0.04, 0.35), (-0.04, 0.42), (0.03, 0.27), (0.04, 0.35), (0.04, 0.42),
         (-0.02, 0.45), (-0.02, 0.55), (-0.02, 0.65), (0.02, 0.45), (0.02, 0.55), (0.02, 0.65),
         (-0.01, 0.19), (0.01, 0.19), (-0.02, 0.2), (0.02, 0.2)]
    )  # fmt: skip
    return Person(torch.cat([points + torch.tensor([0.3 + shift, 0.0]), torch.ones(18, 1)], 1).numpy())


def test_the_box_holds_the_keypoints_and_the_clothes_near_them():
    size = (200, 400)
    box = person_box(size, person=_standing())
    xy = _standing().body[:, :2] * (400, 200)
    assert box[0] < xy[:, 0].min() and box[2] > xy[:, 0].max() and box[1] < xy[:, 1].min() and box[3] > xy[:, 1].max()
    labels = torch.zeros(1, *size, dtype=torch.int64)
    labels[0, 100:152, 95:150] = int(Region.LOWER)  # a wide skirt
    labels[0, 50:150, 300:380] = int(Region.UPPER)  # somebody else
    both = person_box(size, HumanParsing.from_labels(labels), _standing())
    top, bottom = xy[:, 1].min(), max(152, xy[:, 1].max())
    assert both == pytest.approx((95, top, 150, bottom), abs=1e-4)
    # Alone, the keypoints leave room for head, hands and feet.
    assert box[1] < top and box[3] > bottom - 22
    assert person_box(size, HumanParsing.from_labels(labels)) == (95, 50, 380, 152)


def test_a_person_at_the_photos_edge_is_said_to_be_cut():
    assert cut_sides((10, 10, 90, 100), (100, 100)) == ["bottom"]
    assert cut_sides((0, 0.5, 50, 50), (100, 100)) == ["left", "top"]
    assert cut_sides(person_box((200, 400), person=_standing(-0.28)), (200, 400)) == ["left"]


def test_hands_and_face_are_where_their_points_are():
    size = (200, 400)
    found = detail_boxes(_standing(), size)
    body = _standing().body[:, :2] * (400, 200)
    assert set(found) == {"face", "hand_left", "hand_right"}
    for name, (x, y) in (("face", body[0]), ("hand_left", body[7]), ("hand_right", body[4])):
        left, top, right, bottom = found[name]
        assert left < x < right and top < y < bottom
    hand = torch.rand(21, 3, generator=torch.Generator().manual_seed(1)) * 0.1 + torch.tensor([0.5, 0.5, 0.5])
    left, top, right, bottom = detail_boxes(Person(_standing().body, hand_left=hand.numpy()), size)["hand_left"]
    xy = hand[:, :2] * torch.tensor([400, 200])
    assert left < xy[:, 0].min() and right > xy[:, 0].max() and top < xy[:, 1].min() and bottom > xy[:, 1].max()
    behind = _standing().body.copy()
    behind[[0, 14, 15]] = 0
    assert set(detail_boxes(Person(behind), size)) == {"hand_left", "hand_right"}
    assert detail_boxes(Person(torch.zeros(18, 3).numpy()), size) == {}


def test_a_box_mask_is_an_ellipse():
    mask = box_mask((20.0, 10.0, 60.0, 90.0), (100, 100))
    assert mask[50, 40] == 1 and mask[5, 40] == 0 and mask[12, 22] == 0
    assert mask.sum().item() == pytest.approx(torch.pi * 20 * 40, rel=0.02)


def test_a_photo_of_12000_pixels_is_cropped_as_a_view():
    photo = torch.zeros(1, 1, 1, 1).expand(1, 3, 12000, 9000)
    crop = crop_person((12000, 9000), (4000.0, 3000.0, 5000.0, 6000.0), (768, 512))
    assert crop.view(photo).data_ptr() == photo.data_ptr()
    assert crop.apply(photo).shape == (1, 3, 768, 512)


@pytest.mark.parametrize(
    "call",
    [
        lambda: crop_person((50, 50), (60, 60, 70, 70), (64, 48)),
        lambda: crop_person((50, 50), (10, 10, 20, 20), (64, 48), margin=-1),
        lambda: person_box((50, 50)),
        lambda: person_box((50, 50), person=Person(torch.zeros(18, 3).numpy())),
        lambda: person_box((50, 50), HumanParsing.from_labels(torch.zeros(1, 50, 51, dtype=torch.int64))),
        lambda: person_box((50, 50), HumanParsing.from_labels(torch.zeros(1, 50, 50, dtype=torch.int64))),
        lambda: _crop().view(rand(1, 3, 51, 50)),
        lambda: paste_back(rand(1, 3, 50, 50), rand(1, 3, 64, 64), [_crop()]),
        lambda: paste_back(rand(3, 3, 50, 50), rand(2, 3, 64, 48), [_crop()]),
        lambda: paste_back(rand(1, 3, 50, 50), rand(1, 3, 64, 48), [_crop()], color=(1, 1, 1)),
        lambda: paste_back(rand(1, 3, 50, 50), rand(1, 3, 64, 48), [_crop()], feather=-1),
    ],
)
def test_wrong_crops_are_refused(call):
    with pytest.raises(TruePoseError, match=r"(?i)expect|check|nothing|give a mask"):
        call()


def _crop():
    return crop_person((50, 50), (10, 10, 30, 40), (64, 48))


def test_a_crop_of_nearly_its_own_scale_keeps_the_photos_pixels():
    for height in (58, 60, 64):
        assert crop_person((150, 150), (20.0, 20.0, 50.0, 20.0 + height), (64, 48), margin=0).frame.scale == 1
    assert crop_person((150, 150), (20.0, 20.0, 50.0, 70.0), (64, 48), margin=0).frame.scale > 1
    assert crop_person((150, 150), (20.0, 20.0, 50.0, 86.0), (64, 48), margin=0).frame.scale < 1
