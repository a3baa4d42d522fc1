"""Laws of a source person: checked where it is made, framed without moving anybody."""

from __future__ import annotations

import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.framing.crop import Crop
from truepose_core.framing.frame import check_shape, fit, same_shape
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region
from truepose_core.source.person import SourcePerson


def people(count=2, height=21, width=13, seed=0):
    """Random pictures; a block of each is somebody, and a keypoint lies on its corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, height, width, dtype=torch.int64)
    labels[:, 4:16, 3:10] = Region.UPPER
    body = torch.rand(count, 18, 3, generator=generator)
    body[:, :, 2] = 1
    body[:, 0, :2] = torch.tensor([3 / width, 4 / height])
    image = torch.rand(count, 3, height, width, generator=generator)
    return SourcePerson(image, HumanParsing.from_labels(labels), body)


def corner(person, number=0):
    """(x, y) of the first pixel of somebody."""
    rows, columns = (person.parsing.masks[number, Region.UPPER] > 0.5).nonzero().T
    return columns.min().item(), rows.min().item()


@pytest.mark.parametrize("multiple", [1, 8, 64])
def test_padding_is_background_of_the_mean_colour_and_moves_nobody(multiple):
    person = people()
    padded = person.padded(multiple)
    height, width = padded.size
    assert height % multiple == width % multiple == 0 and height - 21 < multiple and width - 13 < multiple
    top, left = (height - 21) // 2, (width - 13) // 2
    inside = (slice(None), slice(None), slice(top, top + 21), slice(left, left + 13))
    assert torch.equal(padded.image[inside], person.image)
    assert torch.equal(padded.parsing.masks[inside], person.parsing.masks)
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[inside[2:]] = False
    assert bool((padded.parsing.masks[:, Region.BACKGROUND, outside] == 1).all())
    mean = person.image.mean((2, 3))[:, :, None].expand(-1, -1, int(outside.sum()))
    assert torch.allclose(padded.image[:, :, outside], mean, atol=1e-6)
    for number in range(2):
        on_corner = padded.body[number, 0, :2] * torch.tensor([width, height])
        assert torch.allclose(on_corner, torch.tensor(corner(padded, number)).float(), atol=1e-4)


def test_a_person_that_fits_is_framed_as_it_is():
    person = people(height=16, width=8)
    padded = person.padded(8)
    assert torch.equal(padded.image, person.image) and torch.equal(padded.body, person.body)
    assert torch.equal(padded.parsing.masks, person.parsing.masks)


def test_the_padding_of_a_picture_does_not_depend_on_the_others():
    both = people().padded(8)
    for number in range(2):
        one = people()
        alone = SourcePerson(one.image[number : number + 1], one.parsing[number], one.body[number : number + 1]).padded(
            8
        )
        assert torch.equal(both.image[number : number + 1], alone.image)


def test_a_crop_moves_picture_parsing_and_keypoints_alike():
    crop = Crop((21, 13), (2, 1), fit((18, 12), (36, 24)))
    cropped = people().cropped(crop)
    assert cropped.size == (36, 24)
    on_corner = cropped.body[0, 0, :2] * torch.tensor([24.0, 36.0])
    assert torch.allclose(on_corner, torch.tensor(corner(cropped)).float(), atol=1.0)


def test_one_parsing_and_one_pose_serve_all_pictures():
    two = people()
    shared = SourcePerson(two.image, two.parsing[0], two.body[:1])
    assert shared.parsing.batch == 2 and torch.equal(shared.parsing.masks[1], two.parsing.masks[0])
    assert torch.equal(shared.body[1], two.body[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": torch.rand(2, 1, 21, 13)}, r"source image is \(2, 1, 21, 13\)"),
        ({"image": torch.rand(2, 3, 13, 21)}, "parsing is 13x21 and the image 21x13"),
        ({"image": torch.rand(3, 3, 21, 13)}, "holds 2 pictures and the image 3; expected 1 or 3"),
        ({"body": torch.rand(3, 18, 3)}, r"source keypoints are \(3, 18, 3\); expected \[2, 18, 3\]"),
        ({"body": torch.rand(2, 17, 3)}, r"source keypoints are \(2, 17, 3\)"),
        (
            {"parsing": HumanParsing.from_labels(torch.stack([torch.ones(21, 13), torch.zeros(21, 13)]).long())},
            "shows nobody in picture 1",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changed, message):
    with pytest.raises(TruePoseError, match=message):
        SourcePerson(**{**vars(people()), **changed})


def test_the_ruler_allows_for_rounding_and_says_both_sizes():
    assert same_shape((768, 512), (96, 64)) and same_shape((768, 512), (512, 341))
    assert not same_shape((768, 512), (512, 768)) and not same_shape((100, 100), (100, 103))
    with pytest.raises(TruePoseError, match="the pose is on a canvas of 512x768 and the image is 512x512"):
        check_shape("the pose", (768, 512), "the image", (512, 512))
