"""Frame Person, Paste Back, Hands and Face: called as the host calls them."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.photo import OWN_SIZE, FramePerson, HandsAndFace, PasteBack

from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import BUCKETS
from truepose_core.parsing import HumanParsing
from truepose_core.pose import read_pose

HEIGHT, WIDTH = 300, 400
# A standing person of 200 pixels around x = 100, in OpenPose's order.
STANDING = (
    (100, 70), (100, 90), (85, 92), (80, 120), (78, 145), (115, 92), (120, 120), (122, 145), (91, 150), (91, 190),
    (91, 230), (109, 150), (109, 190), (109, 230), (96, 66), (104, 66), (90, 68), (110, 68),
)  # fmt: skip


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


def photo(batch: int = 1) -> torch.Tensor:
    return torch.rand((batch, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(0))


def pose(*shifts: int) -> list[dict]:
    """One frame: a person for each shift to the right, the first one larger by nothing."""
    people = [{"pose_keypoints_2d": [v for x, y in STANDING for v in (x + shift, y, 1.0)]} for shift in shifts]
    return [{"canvas_width": WIDTH, "canvas_height": HEIGHT, "people": people}]


def parsing(batch: int = 1) -> HumanParsing:
    labels = torch.zeros(batch, HEIGHT, WIDTH, dtype=torch.int64)
    labels[:, 50:250, 70:130] = 3
    return HumanParsing.from_labels(labels)


def test_round_trip_at_own_scale_is_exact() -> None:
    image = photo()
    framed, regions, points, crop, outside, width, height, info = run(
        FramePerson, image=image, parsing=parsing(), pose=pose(0), sizes=OWN_SIZE, width=192, height=288, enlarge=False
    )
    assert framed.shape == (1, height, width, 3) == (1, 288, 192, 3) and regions.size == (288, 192)
    assert "scale 1.00" in info and not outside.any()
    left, top, right, bottom = crop[0].box
    assert torch.equal(framed, image[:, top:bottom, left:right])
    back, pasted, uncovered = run(PasteBack, photo=image, image=framed, crop=crop)
    assert torch.equal(back, image) and uncovered.shape == pasted.shape == (1, HEIGHT, WIDTH)
    changed, pasted, _ = run(PasteBack, photo=image, image=1 - framed, crop=crop, feather=8)
    inner = (slice(None), slice(top + 8, bottom - 8), slice(left + 8, right - 8))
    assert torch.equal(changed[inner], 1 - image[inner]) and bool((pasted[inner] == 1).all())
    around = pasted == 0
    assert around.any() and torch.equal(changed[around], image[around])
    moved = read_pose(points)[0]
    expected = (torch.tensor(STANDING) - torch.tensor([left, top])) / torch.tensor([192, 288])
    assert torch.allclose(torch.tensor(moved.people[0].body[:, :2]), expected, atol=1e-4)


def test_the_person_that_is_meant() -> None:
    both = pose(0, 200)
    boxes = []
    for index in (0, 1):
        *_, crop, _, _, _, _ = run(FramePerson, image=photo(), pose=both, person=index)
        boxes.append(crop[0].box)
    assert boxes[1][0] - boxes[0][0] > 150
    with pytest.raises(TruePoseError, match="person 2 was asked for"):
        run(FramePerson, image=photo(), pose=both, person=2)


def test_sizes_come_from_the_family() -> None:
    for family, sizes in BUCKETS.items():
        image, regions, _, _, _, width, height, _ = run(FramePerson, image=photo(), parsing=parsing(), sizes=family)
        assert (height, width) in sizes and image.shape[1:3] == (height, width) == regions.size
        assert height > width


def test_batches_and_steady() -> None:
    frames = pose(0) + pose(150)
    image, regions, points, crop, *_, info = run(FramePerson, image=photo(2), pose=frames)
    assert len(image) == len(regions) == len(points) == len(crop) == 2 and crop[0].box != crop[1].box
    assert len(info.splitlines()) == 2
    steady = run(FramePerson, image=photo(2), pose=frames, steady=True)[3]
    assert steady[0] == steady[1]
    back, *_ = run(PasteBack, photo=photo(2), image=image, crop=crop)
    assert back.shape == (2, HEIGHT, WIDTH, 3)


def test_a_person_cut_by_the_frame_is_padded_and_said() -> None:
    labels = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.int64)
    labels[:, 20:, 100:300] = 3
    image, _, _, crop, outside, *_, info = run(FramePerson, image=photo(), parsing=HumanParsing.from_labels(labels))
    assert "bottom edge" in info and "outside of the photo" in info
    assert outside.any() and bool((image[outside > 0.999] > 0.99).all())
    assert run(PasteBack, photo=photo(), image=image, crop=crop)[0].shape == (1, HEIGHT, WIDTH, 3)


def test_plain_background_and_what_is_uncovered() -> None:
    image, old = photo(), parsing()
    framed, regions, _, crop, *_ = run(FramePerson, image=image, parsing=old)
    plain, pasted, _ = run(
        PasteBack, photo=image, image=framed, crop=crop, parsing=regions, background="plain", color="#00ff00"
    )
    assert torch.equal(plain[0, 0, 0], torch.tensor([0.0, 1.0, 0.0])) and float(pasted.max()) == 1
    empty = torch.zeros(1, *framed.shape[1:3])
    kept, _, uncovered = run(PasteBack, photo=image, image=framed, crop=crop, mask=empty, photo_parsing=old)
    assert torch.equal(kept, image) and torch.equal(uncovered, 1 - old.mask("background"))
    for bad, match in (
        ({"background": "plain"}, "where the person is"),
        ({"mask": empty, "parsing": regions}, "connect one of them"),
        ({"background": "plain", "mask": empty, "color": "beautiful"}, "expected #rrggbb"),
        ({"image": framed[:, :-1]}, "same aspect ratio"),
        ({"photo": image[:, :-1]}, "taken from a photo of 400x300"),
        ({"photo_parsing": regions}, "the parsing of the whole photo"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(PasteBack, **{"photo": image, "image": framed, "crop": crop, **bad})


def test_an_enlarged_result_is_pasted_too() -> None:
    framed, _, _, crop, *_ = run(FramePerson, image=photo(), parsing=parsing())
    large = framed.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert run(PasteBack, photo=photo(), image=large, crop=crop)[0].shape == (1, HEIGHT, WIDTH, 3)


def test_hands_and_face() -> None:
    (size, segs), hands, face = run(HandsAndFace, image=photo(), pose=pose(0, 200))
    assert size == (HEIGHT, WIDTH)
    assert [s.label for s in segs] == ["face", "hand_left", "hand_right"] * 2
    # Beyond the wrist, and around the nose.
    assert hands[0, 150, 78] > 0.9 and hands[0, 150, 122] > 0.9 and face[0, 70, 100] > 0.9
    for one in segs:
        x1, y1, x2, y2 = one.crop_region
        assert one.cropped_mask.shape == (y2 - y1, x2 - x1)
    (_, segs), *_ = run(HandsAndFace, image=photo(), pose=pose(0, 200), person=0, hands=False)
    assert [s.label for s in segs] == ["face"]
    regions = HumanParsing.from_masks({"face": torch.nn.functional.pad(torch.ones(20, 14), (93, 293, 58, 222))})
    assert not bool((run(HandsAndFace, image=photo(), pose=pose(0), parsing=regions)[2] > regions.mask("face")).any())
    for bad, match in (
        ({"image": photo(2)}, "one picture"),
        ({"image": photo()[:, :200]}, "canvas"),
        ({"pose": pose()}, "no person"),
        ({"parsing": parsing(2)}, "parsing of this picture"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(HandsAndFace, **{"image": photo(), "pose": pose(0), **bad})


def test_what_is_refused() -> None:
    for bad, match in (
        ({}, "to know where the person is"),
        ({"pose": pose()}, "no person"),
        ({"pose": pose(0), "image": photo()[:, :200]}, "canvas"),
        ({"pose": pose(0) * 3}, "3 frames and there are 1 pictures"),
        ({"parsing": parsing(2)}, "holds 2 pictures"),
        ({"parsing": HumanParsing.from_labels(torch.zeros(1, HEIGHT, WIDTH, dtype=torch.int64))}, "shows nobody"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(FramePerson, **{"image": photo(), **bad})
