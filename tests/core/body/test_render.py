"""Laws of the generic body: what its maps show, where its surface goes, and how wide it is drawn."""

import math
from dataclasses import fields, replace

import pytest
import torch
from small import standing

from truepose_core.body import render as body_render
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import MIRRORS, BodyMaps, GenericBody, Girth, relative_depth, surface_tokens
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import JOINTS, render, sample_identities, sample_poses
from truepose_core.mannequin.body import SWAPPED
from truepose_core.regions import Region

SIZE = (64, 48)


@pytest.fixture(scope="module")
def world():
    """Five people of the world, their picture by the world's own renderer (one ray a pixel), and their bodies."""
    people = sample_identities(range(5), 5)
    shown = render(people, sample_poses(range(5), 5), *SIZE, supersample=1)
    return people, shown, BodyPose(shown.theta, shown.beta, shown.camera)


def turned(degrees, camera=(0.42, 0.0, -0.06)):
    """The T-pose, turned about the vertical axis."""
    theta = torch.zeros(1, 24, 3)
    theta[0, 0, 1] = math.radians(degrees)
    return BodyPose(theta, torch.zeros(1, 10), torch.tensor([camera]))


def maps_equal(one, other):
    for field in fields(BodyMaps):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None and b is None) or torch.equal(a, b), field.name


def test_a_person_in_their_own_clothes_is_the_worlds_own_picture(world):
    people, shown, body = world
    maps = GenericBody(people=people).render(body, *SIZE)
    assert maps.size == SIZE and len(maps) == 5
    labels = shown.parsing.argmax(1)
    assert torch.equal(maps.mask[:, 0] > 0, labels != Region.BACKGROUND)
    assert torch.equal(maps.region, labels)
    assert torch.equal(relative_depth(maps), shown.depth)


def test_what_the_maps_show(world):
    maps = GenericBody().render(world[2], *SIZE)
    on = maps.mask[:, 0] > 0
    assert set(maps.mask.unique().tolist()) == {0.0, 1.0}
    assert (maps.part[~on] == -1).all() and (maps.part[on] >= 0).all() and (maps.part < 24).all()
    for name in ("rest", "normal", "depth"):
        assert not getattr(maps, name).permute(0, 2, 3, 1)[~on].any(), name
    assert not maps.region[~on].any() and (maps.region[on] > 0).all()
    torch.testing.assert_close(maps.normal.norm(dim=1)[on], torch.ones(int(on.sum())))
    # The camera sees what is turned to it; an open sleeve shows its far inside.
    assert (maps.normal[:, 2][on] > 0).float().mean() > 0.97
    assert maps.face is None and maps.barycentric is None
    depth = relative_depth(maps)
    assert torch.equal(depth.flatten(1).amax(1), torch.ones(5))
    assert depth[maps.mask > 0].min() == pytest.approx(0.2) and not depth[maps.mask == 0].any()


def test_a_surface_point_in_its_own_pose_lies_on_its_own_pixel(world):
    height, width = SIZE
    body = world[2]
    maps = GenericBody().render(body, *SIZE)
    found = GenericBody().locate(maps, body)
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    expected = torch.stack([x, y])[None] * maps.mask
    torch.testing.assert_close(found[:, :2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 2:], maps.depth, atol=1e-5, rtol=0)


def test_places_at_rest_are_the_same_in_every_pose():
    """Where a surface point of one pose is seen in another, the other's map names the same place, up to a pixel."""
    (height, width), one, other = (96, 72), standing(4, 0), standing(4, 9)
    maps, others = GenericBody().render(one, height, width), GenericBody().render(other, height, width)
    x, y, z = GenericBody().locate(maps, other).unbind(1)
    column, row = (x * width).long(), (y * height).long()
    inside = (maps.mask[:, 0] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    person = torch.arange(4)[:, None, None].expand_as(row)
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    seen = inside & ((others.depth[:, 0][person, row, column] - z).abs() < 0.01)
    seen &= others.part[person, row, column] == maps.part
    there = others.rest.permute(0, 2, 3, 1)[person, row, column][seen]
    distance = (there - maps.rest.permute(0, 2, 3, 1)[seen]).norm(dim=-1)
    # A pixel is 1 / (96 * 0.42) = 2.5 cm of a surface that faces the camera.
    assert seen.sum() > 1500
    assert distance.median() < 0.025 and distance.quantile(0.9) < 0.05


def test_a_body_outside_the_frame_is_refused_by_its_number():
    inside, outside = turned(0), turned(0, (0.42, 3.0, 0.0))
    both = BodyPose(*(torch.cat([a, b]) for a, b in zip(vars(inside).values(), vars(outside).values(), strict=True)))
    with pytest.raises(TruePoseError, match=r"body 1 of 2 is outside the picture.*check its camera"):
        GenericBody().render(both, *SIZE)


def test_chunks_change_nothing(world, monkeypatch):
    people, _, body = world
    model = GenericBody(Girth(*(torch.linspace(0.9, 1.5, 5) for _ in range(4))), people)
    whole = model.render(body, *SIZE)
    monkeypatch.setattr(body_render, "_CHUNK", 2)
    maps_equal(model.render(body, *SIZE), whole)


def test_selected_people_are_drawn_as_in_the_batch(world):
    people, _, body = world
    index = torch.tensor([3, 0, 3])
    model = GenericBody(Girth(*(torch.linspace(0.9, 1.5, 5) for _ in range(4))), people)
    maps_equal(
        model.select(index).render(body.select(index), *SIZE),
        model.render(body, *SIZE).select(index),
    )


@pytest.mark.parametrize(
    "model",
    [GenericBody(Girth.neutral(3)), GenericBody(people=sample_identities(range(7), 0))],
    ids=["girth", "people"],
)
def test_girths_and_people_of_another_count_are_refused(world, model):
    with pytest.raises(TruePoseError, match=r"drawn with .* of (3|7) people; there are 5 bodies"):
        model.render(world[2], *SIZE)


# Girth


def test_the_neutral_girth_is_none_and_one_is_for_all(world):
    body = world[2]
    plain = GenericBody().render(body, *SIZE)
    maps_equal(GenericBody(Girth.neutral(5)).render(body, *SIZE), plain)
    maps_equal(GenericBody(Girth.neutral(1)).render(body, *SIZE), plain)
    wide = Girth(*(torch.full((1,), 1.3) for _ in range(4)))
    maps_equal(
        GenericBody(wide).render(body, *SIZE), GenericBody(wide.select(torch.zeros(5).long())).render(body, *SIZE)
    )


@pytest.mark.parametrize(
    ("part", "region"),
    [("trunk", Region.UPPER), ("arms", Region.UPPER), ("legs", Region.LOWER), ("hair", Region.HAIR)],
)
def test_a_wider_part_covers_more_and_only_its_region_grows(part, region):
    body = turned(0)
    wide = replace(Girth.neutral(1), **{part: torch.full((1,), 1.4)})
    plain, wider = GenericBody().render(body, 96, 96), GenericBody(wide).render(body, 96, 96)
    counts, grown = (torch.bincount(maps.region.flatten(), minlength=7) for maps in (plain, wider))
    assert grown[region] > counts[region] and wider.mask.sum() > plain.mask.sum()
    new = (wider.mask > plain.mask)[:, 0]
    # Hips and thighs are both of the lower garment; a shirt hangs over them.
    assert set(wider.region[new].tolist()) <= {int(region), int(Region.LOWER) if part == "trunk" else int(region)}


# Look-alikes


def test_the_joint_on_the_other_side_is_the_one_that_is_named_so():
    other = {"left": "right", "right": "left"}
    for joint, swapped in enumerate(SWAPPED):
        side, _, name = JOINTS[joint].partition("_")
        assert JOINTS[swapped] == (f"{other[side]}_{name}" if side in other else JOINTS[joint])


@pytest.mark.parametrize("mirror", MIRRORS)
def test_the_look_alike_of_the_look_alike_is_the_place_itself(world, mirror):
    body = world[2]
    maps = GenericBody().render(body, *SIZE)
    x, z = MIRRORS[mirror]
    on = maps.mask[:, 0] > 0
    part = torch.where(on, torch.tensor(SWAPPED)[maps.part.clamp(min=0)], -1) if x < 0 else maps.part
    mirrored = replace(maps, rest=maps.rest * torch.tensor([x, 1, z])[:, None, None], part=part)
    expected = GenericBody().locate(maps, body)
    torch.testing.assert_close(GenericBody().locate(mirrored, body, mirror), expected, atol=1e-6, rtol=0)
    if mirror != "none":
        assert (GenericBody().locate(maps, body, mirror) - expected).abs().max() > 0.05


def test_the_t_pose_is_its_own_mirror_picture():
    body = turned(0)
    maps = GenericBody().render(body, *SIZE)
    plain = GenericBody().locate(maps, body)
    left_right, front_back, both = (GenericBody().locate(maps, body, name) for name in list(MIRRORS)[1:])
    flip = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    torch.testing.assert_close(left_right, (plain * flip + torch.tensor([1.0, 0, 0])[:, None, None]) * maps.mask)
    torch.testing.assert_close(front_back[:, :2], plain[:, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(front_back[:, 2], -plain[:, 2], atol=1e-6, rtol=0)
    torch.testing.assert_close(both[:, 0], left_right[:, 0], atol=1e-6, rtol=0)


# Tokens


def test_tokens_of_single_pixels_are_the_map_itself(world):
    maps = GenericBody().render(world[2], *SIZE)
    expected = torch.cat([maps.rest, maps.mask], 1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(surface_tokens(maps, *SIZE), expected, atol=1e-6, rtol=0)


def test_a_cell_takes_the_mean_of_the_part_that_fills_most_of_it():
    """A cell with five pixels of a hand and eleven of a trunk is a place on the trunk; one with three pixels in all is
    off the body."""
    part = torch.full((1, 4, 8), -1)
    part[0, :, :4] = 9
    part[0, 0, :4], part[0, 1, 0] = 20, 20
    part[0, 0, 4:7] = 9
    rest = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0)) * (part >= 0)[:, None]
    zeros = torch.zeros(1, 1, 4, 8)
    maps = BodyMaps(rest, part, rest, zeros, (part >= 0).float()[:, None], part.clamp(min=0))
    tokens = surface_tokens(maps, 1, 2)[0]
    torch.testing.assert_close(tokens[0, :3], rest[0][:, part[0] == 9].view(3, 14)[:, 3:].mean(1), atol=1e-6, rtol=0)
    assert tokens[0, 3] == 1 and not tokens[1].any()
