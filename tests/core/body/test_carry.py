"""Laws of carrying along the body: what was seen arrives where it belongs, and nothing else does."""

import math

import pytest
import torch
from small import body_of, people, standing

from truepose_core.body.carry import Correspondence, carried_parsing, carry, correspond
from truepose_core.body.pose import BodyPose
from truepose_core.body.render import BodyMaps, GenericBody
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import axis_angle_to_matrix, matrix_to_axis_angle
from truepose_core.parsing import HumanParsing
from truepose_core.regions import Region

SIZE = (96, 72)


@pytest.fixture(scope="module")
def pair():
    """Six people of one shape each in two poses, with their maps."""
    source, target = standing(6, 0), standing(6, 9)
    return source, target, GenericBody().render(source, *SIZE), GenericBody().render(target, *SIZE)


def parsing_of(maps: BodyMaps) -> HumanParsing:
    return HumanParsing.from_labels(maps.region)


def t_pose(*degrees):
    theta = torch.zeros(len(degrees), 24, 3)
    theta[:, 0, 1] = torch.deg2rad(torch.tensor(degrees))
    return BodyPose(theta, torch.zeros(len(degrees), 10), torch.tensor([[0.42, 0.0, -0.06]]).repeat(len(degrees), 1))


def centres(height, width):
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)


def test_the_same_pose_is_the_identity_on_the_body(pair):
    source, _, maps, _ = pair
    found = correspond(source, source, maps, maps)
    assert torch.equal(found.seen, maps.mask)
    on = maps.mask[:, 0] > 0
    torch.testing.assert_close(found.grid[on], (2 * centres(*SIZE) - 1).expand(6, -1, -1, -1)[on], atol=1e-5, rtol=0)
    assert not found.grid[~on].any()
    torch.testing.assert_close(found.facing, maps.normal[:, 2:].clamp(0, 1))


def test_a_carried_picture_in_the_same_pose_is_the_person(pair):
    source, _, maps, _ = pair
    image = torch.rand(6, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    made = carry(image, parsing_of(maps), source, source)
    assert torch.equal(made.seen, maps.mask)
    torch.testing.assert_close(made.picture, image * maps.mask, atol=1e-4, rtol=0)
    assert torch.equal(made.parsing.labels(), maps.region)


def test_what_is_painted_on_the_surface_arrives_on_the_same_surface(pair):
    """Each surface point wears its own place at rest as colour: the carried colours are the target's own."""
    source, target, maps, target_maps = pair
    made = carry(maps.rest, parsing_of(maps), source, target)
    seen = made.seen[:, 0] > 0
    assert made.seen.sum() > 0.4 * target_maps.mask.sum()
    miss = (made.picture - target_maps.rest).norm(dim=1)[seen]
    assert miss.median() < 0.005
    # A pixel is 2.5 cm. At edges a bilinear mean is of two parts, the nearest pixel is of one.
    nearest = made.correspondence.sample(maps.rest, "nearest")
    miss = (nearest - target_maps.rest).norm(dim=1)[seen]
    assert miss.median() < 0.025 and (miss < 0.05).float().mean() > 0.95
    # Flat cloth keeps its colour exactly, but for pixels at its edges.
    flat = carry(parsing_of(maps).masks, parsing_of(maps), source, target)
    right = (flat.picture.argmax(1) == target_maps.region)[seen]
    assert right.float().mean() > 0.95


def test_the_true_person_of_flat_light_is_carried_to_the_true_picture():
    """The world's own people on their own surface: region colours of the source are those of the target."""
    pairs = people()
    source, target = body_of(pairs.source), body_of(pairs.target)
    made = carry(pairs.source.parsing, HumanParsing(pairs.source.parsing), source, target)
    seen = made.seen[:, 0] > 0
    assert seen.sum() > 500
    assert (made.picture.argmax(1) == pairs.target.parsing.argmax(1))[seen].float().mean() > 0.8


def test_what_is_not_seen_lies_behind_what_the_source_shows(pair):
    source, target, maps, target_maps = pair
    found = correspond(source, target, maps, target_maps)
    place = GenericBody().locate(target_maps, source)
    grid = (2 * place[:, :2] - 1).permute(0, 2, 3, 1)
    at = torch.nn.functional.grid_sample(
        torch.cat([maps.depth, maps.mask], 1), grid, mode="nearest", align_corners=False
    )
    gap = at[:, :1] - place[:, 2:]
    on_both = (target_maps.mask > 0) & (at[:, 1:] > 0)
    hidden, seen = on_both & (found.seen == 0), found.seen > 0
    assert hidden.sum() > 1000
    # Rims, where a pixel's centre misses what lies beside it, are the exception.
    assert (gap[hidden] > 0).float().mean() > 0.95
    assert gap[seen].abs().max() < 0.03 * 1.75 * 0.42 + 1e-6
    assert not (seen & ~on_both).any()


def test_an_arm_in_front_hides_the_trunk():
    """A person with both forearms across the belly, carried to the T-pose: the trunk behind them is not seen."""

    def turn(*steps):
        matrix = torch.eye(3)
        for axis, degrees in steps:
            vector = torch.zeros(3)
            vector[axis] = math.radians(degrees)
            matrix = matrix @ axis_angle_to_matrix(vector)
        return matrix_to_axis_angle(matrix)

    target = t_pose(0)
    theta = target.theta.clone()
    flip = torch.tensor([1.0, -1.0, -1.0])
    for joint, turned in ((16, turn((0, -30), (2, -70), (0, 70))), (18, turn((1, -110)))):
        theta[0, joint], theta[0, joint + 1] = turned, turned * flip
    source = BodyPose(theta, target.beta, target.camera)
    maps, target_maps = GenericBody().render(source, *SIZE), GenericBody().render(target, *SIZE)
    arms = torch.isin(maps.part, torch.tensor([18, 19, 20, 21, 22, 23]))[0]
    trunk = torch.isin(target_maps.part, torch.tensor([0, 3, 6, 9]))[0]
    found = correspond(source, target, maps, target_maps)
    # In both pictures the trunk stands on the same pixels.
    before = arms & trunk
    assert before.sum() > 20
    assert found.seen[0, 0][before].mean() < 0.1
    away = trunk & (torch.nn.functional.max_pool2d(arms.float()[None, None], 5, 1, 2)[0, 0] == 0)
    assert found.seen[0, 0][away].mean() > 0.9


def test_behind_a_person_who_turns_round_only_the_look_alike_is_there():
    body = t_pose(0, 180)
    maps = GenericBody().render(body, *SIZE)
    shown = [maps.select(torch.tensor([i])) for i in range(2)]

    def share(source, target, mirror):
        found = correspond(body.select([source]), body.select([target]), shown[source], shown[target], mirror=mirror)
        return (found.seen.sum() / shown[target].mask.sum()).item()

    assert share(0, 0, "none") == 1
    assert share(0, 1, "none") < 0.15
    # A face for a back of the head, at the same height and width.
    assert share(0, 1, "front-back") > 0.9
    # The T-pose is symmetrical: its other side shows as much as it does.
    assert share(0, 0, "left-right") > 0.95


def test_values_of_any_grid_over_the_picture_are_carried_alike(pair):
    """A ramp over the picture is the same ramp on a coarser grid."""
    source, target, maps, _ = pair
    parsing = parsing_of(maps)

    def ramp(height, width):
        return centres(height, width).permute(2, 0, 1).expand(6, -1, -1, -1)

    fine, coarse = (carry(ramp(*size), parsing, source, target) for size in (SIZE, (24, 18)))
    assert torch.equal(fine.seen, coarse.seen)
    place = (fine.correspondence.grid + 1) / 2
    # Beyond the outermost centres of the coarse grid its border is repeated.
    inside = ((place > 1 / 36) & (place < 1 - 1 / 36)).all(-1)[:, None] & (fine.seen > 0)
    assert inside.sum() > 1000
    torch.testing.assert_close(
        fine.picture[inside.expand_as(fine.picture)], coarse.picture[inside.expand_as(fine.picture)], atol=1e-4, rtol=0
    )


def test_the_target_picture_may_have_another_size(pair):
    source, target, maps, _ = pair
    made = carry(maps.rest, parsing_of(maps), source, target, size=(48, 36))
    large = carry(maps.rest, parsing_of(maps), source, target)
    assert made.picture.shape == (6, 3, 48, 36) and made.seen.shape == (6, 1, 48, 36)
    assert made.parsing.size == (48, 36)
    shrunk = torch.nn.functional.avg_pool2d(large.seen, 2)
    assert (made.seen - shrunk).abs().mean() < 0.05


def test_where_the_source_parsing_says_nobody_nothing_was_seen(pair):
    source, target, maps, target_maps = pair
    labels = maps.region.clone()
    labels[:, :, : SIZE[1] // 2] = Region.BACKGROUND
    made = carry(maps.rest, HumanParsing.from_labels(labels), source, target)
    found = correspond(source, target, maps, target_maps)
    left = found.grid[..., 0][:, None] < -0.05
    assert (found.seen * left).sum() > 500
    assert not (made.seen * left).any() and not (made.picture * left).any()


def test_a_batch_equals_its_items(pair):
    source, target, maps, _ = pair
    whole = carry(maps.rest, parsing_of(maps), source, target, mirror="left-right")
    for i in range(0, 6, 2):
        one = maps.select(torch.tensor([i]))
        alone = carry(one.rest, parsing_of(one), source.select([i]), target.select([i]), mirror="left-right")
        torch.testing.assert_close(alone.picture[0], whole.picture[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.parsing.masks[0], whole.parsing.masks[i], atol=1e-4, rtol=0)


# The carried parsing


def test_region_rows_are_the_sources_own_where_seen_and_background_off_the_body(pair):
    source, target, maps, target_maps = pair
    masks = torch.rand(6, 7, *SIZE, generator=torch.Generator().manual_seed(1)).softmax(1)
    found = correspond(source, target, maps, target_maps)
    rows = carried_parsing(found, masks, found.seen).masks
    torch.testing.assert_close(rows.sum(1), torch.ones(6, *SIZE))
    off = (target_maps.mask == 0).expand_as(rows)
    background = torch.zeros_like(rows)
    background[:, Region.BACKGROUND] = 1
    assert torch.equal(rows[off], background[off])
    # On the body nothing is background: the drawn body stands there.
    assert not (rows[:, :1] * target_maps.mask).any()
    own = found.sample(masks)[:, 1:]
    own = own / own.sum(1, keepdim=True).clamp(min=1e-6)
    seen = (found.seen > 0).expand_as(own)
    torch.testing.assert_close(rows[:, 1:][seen], own[seen], atol=1e-5, rtol=0)


def one_row(part, region, seen, masks):
    """carried_parsing on a picture of one row, whose source is the same picture."""
    part, region = torch.tensor([[part]]), torch.tensor([[region]])
    width = part.shape[-1]
    on = (part >= 0).float()[:, None]
    zeros = torch.zeros(1, 3, 1, width)
    maps = BodyMaps(zeros, part, zeros, zeros[:, :1], on, region)
    grid = 2 * centres(1, width)[None] - 1
    found = Correspondence(grid, on, on, maps)
    return carried_parsing(found, masks, torch.tensor([[[seen]]], dtype=torch.float32)).labels()[0, 0].tolist()


def test_hidden_places_take_what_their_part_shows_elsewhere_or_the_bodys_own_wardrobe():
    upper, skin, hair, lower = Region.UPPER, Region.SKIN, Region.HAIR, Region.LOWER
    part = [18] * 10 + [4] * 3 + [15] * 8 + [-1]
    region = [upper] * 10 + [lower] * 3 + [hair] * 8 + [0]
    # A bare forearm in the source, seen at half of its pixels; knees that it does not show; a bald head.
    seen = [1] * 5 + [0] * 5 + [0] * 3 + [1] * 4 + [0] * 4 + [0]
    labels = torch.tensor([[[skin] * 10 + [lower] * 3 + [skin] * 8 + [0]]])
    rows = one_row(part, region, seen, HumanParsing.from_labels(labels).masks)
    assert rows == [skin] * 10 + [lower] * 3 + [skin] * 4 + [hair] * 4 + [0]


# What is refused


def test_counts_that_do_not_match_are_refused(pair):
    source, target, maps, target_maps = pair
    parsing = parsing_of(maps)
    image = maps.rest
    with pytest.raises(TruePoseError, match="5 pictures, 6 parsings and 6 source bodies"):
        carry(image[:5], parsing, source, target)
    with pytest.raises(TruePoseError, match="6 pictures, 2 parsings"):
        carry(image, HumanParsing(parsing.masks[:2]), source, target)
    with pytest.raises(TruePoseError, match="6 pictures, 6 parsings and 2 source bodies"):
        carry(image, parsing, source.select([0, 1]), target)
    with pytest.raises(TruePoseError, match="6 source bodies and 4 target bodies"):
        carry(image, parsing, source, target.select([0, 1, 2, 3]))
    with pytest.raises(TruePoseError, match="6 source bodies and 2 target bodies"):
        correspond(source, target.select([0, 1]), maps, target_maps)


def test_unknown_look_alikes_are_refused(pair):
    source, target, maps, target_maps = pair
    with pytest.raises(TruePoseError, match="mirror is 'top-down'; expected one of none, left-right, front-back, both"):
        correspond(source, target, maps, target_maps, mirror="top-down")


def test_a_body_outside_its_picture_is_refused(pair):
    source, target, maps, _ = pair
    away = BodyPose(target.theta, target.beta, target.camera + torch.tensor([0, 5.0, 0]))
    with pytest.raises(TruePoseError, match="outside the picture"):
        carry(maps.rest, parsing_of(maps), source, away)


def test_the_person_may_be_nearer_in_the_other_picture():
    """Depth is compared in the source's own scale, so a camera that comes nearer hides nothing."""
    body = t_pose(0, 0)
    near = BodyPose(body.theta, body.beta, torch.tensor([[0.42, 0.0, -0.06], [0.84, 0.05, 0.3]]))
    maps = GenericBody().render(near, *SIZE)
    far, close = (maps.select(torch.tensor([i])) for i in range(2))
    for source, target, shown, wanted in ((0, 1, far, close), (1, 0, close, far)):
        found = correspond(near.select([source]), near.select([target]), shown, wanted)
        place = found.grid.abs().amax(-1)[:, None]
        inside = (wanted.mask > 0) & (place < 1)
        assert found.seen[inside].mean() > 0.95
