"""Laws of parsing from keypoints, and how close it comes to the mannequin's true parsing."""

import sys
from functools import cache

import pytest
import torch
from photo import KEYPOINTS

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.surroundings import region_iou
from truepose_core.mannequin import render, sample_identities, sample_poses
from truepose_core.parsing import HumanParsing
from truepose_core.parsing.from_keypoints import WORK_SIDE, parse_from_keypoints
from truepose_core.regions import Region

# OpenPose-18 with left and right exchanged.
SWAPPED = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]


@cache
def people(count=8, height=256, width=192):
    index = torch.arange(count)
    return render(sample_identities(index, 1), sample_poses(index, 1, view="front"), height, width)


def refining():
    pytest.importorskip("cv2")
    return True


@pytest.mark.parametrize(("refine", "least"), [(False, 0.68), (True, 0.75)])
def test_it_comes_close_to_the_true_parsing(refine, least):
    if refine:
        refining()
    scene = people()
    found = parse_from_keypoints(scene.image, scene.keypoints, refine=refine)
    assert found.size == (256, 192) and found.batch == 8
    assert region_iou(found, HumanParsing(scene.parsing)).nanmean(0).mean() > least


def test_grab_cut_makes_the_outline_better():
    refining()
    scene, true = people(), HumanParsing(people().parsing)
    background = [
        region_iou(parse_from_keypoints(scene.image, scene.keypoints, refine=refine), true)[:, 0].mean()
        for refine in (False, True)
    ]
    assert background[1] > background[0]


def test_sleeves_are_as_long_as_they_look():
    index = torch.arange(12)
    identities = sample_identities(index, 1)
    scene = render(identities, sample_poses(index, 1, view="front"), 256, 192)
    labels = parse_from_keypoints(scene.image, scene.keypoints, refine=False).labels()
    true = HumanParsing(scene.parsing).labels()
    right, counted = 0, 0
    for elbow, wrist in ((3, 4), (6, 7)):
        middle = (scene.keypoints[:, elbow] + scene.keypoints[:, wrist]) / 2
        x, y = (middle[:, 0] * 192).long(), (middle[:, 1] * 256).long()
        seen = (scene.keypoints[:, elbow, 2] > 0) & (scene.keypoints[:, wrist, 2] > 0)
        expected = torch.where(identities.sleeve_long.bool(), int(Region.UPPER), int(Region.SKIN))
        seen &= true[index, y.clamp(0, 255), x.clamp(0, 191)] == expected
        right += int((labels[index, y.clamp(0, 255), x.clamp(0, 191)] == expected)[seen].sum())
        counted += int(seen.sum())
    assert counted > 10 and right / counted > 0.85


def test_a_mirrored_picture_has_the_mirrored_parsing():
    scene = people(4)
    found = parse_from_keypoints(scene.image, scene.keypoints, refine=False)
    body = scene.keypoints[:, SWAPPED].clone()
    body[..., 0] = torch.where(body[..., 2] > 0, 1 - body[..., 0], 0)
    mirrored = parse_from_keypoints(scene.image.flip(-1), body, refine=False)
    assert (mirrored.labels().flip(-1) != found.labels()).float().mean() < 0.01


def test_a_batch_equals_its_items():
    scene = people(2)
    found = parse_from_keypoints(scene.image, scene.keypoints, refine=False)
    for i in range(2):
        one = parse_from_keypoints(scene.image[i : i + 1], scene.keypoints[i : i + 1], refine=False)
        assert torch.equal(one.masks, found[i].masks)


def test_one_person_serves_all_pictures():
    scene = people(1)
    found = parse_from_keypoints(scene.image.expand(2, -1, -1, -1), scene.keypoints, refine=False)
    assert torch.equal(found.masks[0], found.masks[1])


def test_large_pictures_have_the_parsing_of_small_ones():
    scene = people(1)
    large = torch.nn.functional.interpolate(scene.image, scale_factor=4, mode="bilinear")
    assert large.shape[2] > 2 * WORK_SIDE
    small = parse_from_keypoints(scene.image, scene.keypoints, refine=False)
    found = parse_from_keypoints(large, scene.keypoints, refine=False)
    assert found.size == (1024, 768)
    assert (found.resize(256, 192).labels() != small.labels()).float().mean() < 0.02


def test_edges_are_soft():
    scene = people(1)
    masks = parse_from_keypoints(scene.image, scene.keypoints, refine=False).masks
    assert ((masks > 0.01) & (masks < 0.99)).any(1).float().mean() > 0.01


def test_a_limb_with_missing_keypoints_is_left_out():
    scene = people()
    for i, (elbow, wrist) in enumerate(((3, 4), (6, 7))):
        body = scene.keypoints[i : i + 1].clone()
        x, y = (body[0, wrist, :2] * torch.tensor([192, 256])).long().tolist()
        body[0, [elbow, wrist]] = 0
        found = parse_from_keypoints(scene.image[i : i + 1], body, refine=False)
        distance = (scene.keypoints[i, [8, 11, 9, 12], :2] * torch.tensor([192, 256]) - torch.tensor([x, y])).norm(
            dim=-1
        )
        if distance.min() > 40:
            assert found.labels()[0, y, x] == Region.BACKGROUND


@pytest.mark.parametrize("seen", [[0, 1, 2, 5], [2, 3, 4], [8, 9, 10, 11, 12, 13], [0, 14, 15, 16, 17], [1, 8], [11]])
def test_parts_of_a_person_are_enough(seen):
    scene = people(1)
    body = torch.zeros_like(scene.keypoints)
    body[:, seen] = scene.keypoints[:, seen]
    assert not parse_from_keypoints(scene.image, body, refine=False).is_empty


def test_a_head_from_behind_has_hair_and_no_face():
    scene = people(1)
    body = scene.keypoints.clone()
    body[:, [0, 14, 15]] = 0
    found = parse_from_keypoints(scene.image, body, refine=False)
    assert not found.mask("face").any() and (found.mask("hair") > 0.5).any()


def test_an_astronaut():
    refining()
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    body = torch.zeros(1, 18, 3)
    for i, (x, y) in KEYPOINTS.items():
        body[0, i] = torch.tensor([x / 512, y / 512, 1.0])
    labels = parse_from_keypoints(image, body).labels()[0]
    spots = {
        Region.FACE: [(215, 140), (240, 150)],
        Region.HAIR: [(180, 60), (220, 40)],
        Region.UPPER: [(100, 330), (230, 350)],
        Region.BACKGROUND: [(20, 100), (460, 100), (330, 60)],
    }
    for region, places in spots.items():
        for x, y in places:
            assert labels[y, x] == region, (region, x, y)


def test_what_is_refused(monkeypatch):
    image, body = torch.rand(2, 3, 64, 48), torch.rand(2, 18, 3)
    for bad_image, bad_body, match in (
        (image, torch.zeros(2, 18, 3), "shows nobody"),
        (image, torch.rand(3, 18, 3), "one person for each picture"),
        (image, torch.rand(2, 25, 3), "one person for each picture"),
        (image, torch.full((2, 18, 3), torch.nan), "NaN"),
        (image[0], body, "expected float"),
        ((image * 255).to(torch.uint8), body, "expected float"),
    ):
        with pytest.raises(TruePoseError, match=match):
            parse_from_keypoints(bad_image, bad_body, refine=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(TruePoseError, match="pip install opencv-python-headless"):
        parse_from_keypoints(image, body)
