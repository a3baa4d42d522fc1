"""Laws of the mannequin world: seeded, exact, the same cloth in every pose."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from truepose_core.errors import TruePoseError
from truepose_core.mannequin import (
    BOTTOM_PATTERNS,
    HAIR_LENGTHS,
    LOGO_SHAPES,
    TOP_PATTERNS,
    BodyPoses,
    axis_angle_to_matrix,
    forward_kinematics,
    matrix_to_axis_angle,
    mirror_poses,
    ready_poses,
    render,
    render_people,
    rest_joints,
    sample_identities,
    sample_pairs,
    sample_poses,
)
from truepose_core.mannequin.body import PARENTS, chain_rotations, openpose_points, project
from truepose_core.mannequin.identity import luminance
from truepose_core.mannequin.render import paint_surface, trace
from truepose_core.mannequin.scene import make_scene, tile_grid
from truepose_core.mannequin.shifted import shift_people
from truepose_core.mannequin.solids import body_parts
from truepose_core.regions import Region


@pytest.fixture(scope="module")
def crowd():
    torch.set_num_threads(1)
    people, poses = sample_identities(range(64), 7), sample_poses(range(64), 7)
    return people, poses, render(people, poses)


def _fields(item):
    return [(f.name, getattr(item, f.name)) for f in dataclasses.fields(item)]


# ------------------------------------------------------------------ seeds and batches


def test_a_person_and_a_pose_depend_on_their_index_only():
    people, poses = sample_identities(range(40), 3), sample_poses(range(40), 3)
    alone, pose = sample_identities([17], 3), sample_poses(torch.tensor([17]), 3)
    for name, value in _fields(alone):
        assert torch.equal(value[0], getattr(people, name)[17]), name
    assert torch.allclose(pose.theta[0], poses.theta[17], atol=1e-6)
    assert torch.equal(pose.camera[0], poses.camera[17])


def test_seeds_give_other_people():
    a, b = sample_identities(range(32), 0), sample_identities(range(32), 1)
    assert (a.beta - b.beta).abs().amin(1).max() > 0
    assert not torch.isclose(a.skin, b.skin).all(1).any()
    assert torch.equal(a.beta, sample_identities(range(32), 0).beta)


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    first = sample_pairs(1, "train").source.image
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, sample_pairs(1, "train").source.image)
    assert torch.equal(state, torch.get_rng_state())


def test_a_batch_equals_its_items_one_by_one(crowd):
    people, poses, whole = crowd
    chunked = render(people, poses, chunk=7)
    for name, value in _fields(whole):
        other = getattr(chunked, name)
        # A ray that grazes an edge may fall on either side: a rounding error is one sample.
        assert (value - other).abs().gt(1e-4).float().mean() < 1e-4, name
    one = render(people.select([5]), poses.select([5]))
    assert (one.image[0] - whole.image[5]).abs().gt(1e-4).float().mean() < 1e-3


def test_splits_are_disjoint_in_people_and_poses():
    train, test = (
        sample_pairs(200, "train", height=8, width=8),
        sample_pairs(200, "test", height=8, width=8),
    )
    for a, b in ((train.source, test.source), (train.target, test.target)):
        assert torch.cdist(a.beta, b.beta).min() > 1e-3
    theta = [x.theta.flatten(1) for p in (train, test) for x in (p.source, p.target)]
    both = torch.cat(theta)
    distance = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.fill_diagonal_(1).min() > 1e-3


def test_pairs_share_the_person_and_differ_in_pose():
    pairs = sample_pairs([3, 9], "test", seed=4)
    assert torch.equal(pairs.source.beta, pairs.target.beta)
    assert (pairs.source.theta - pairs.target.theta).abs().amax((1, 2)).min() > 0.1
    assert pairs.identity.tolist() == [3, 9]
    cache = render_people([9], 3, "test", seed=4)
    assert len(cache) == 3
    assert (cache.image[:2] - torch.stack([pairs.source.image[1], pairs.target.image[1]])).abs().mean() < 1e-4


# ------------------------------------------------------------------ ranges and variety


def test_every_kind_occurs():
    people = sample_identities(range(400), 0)
    for values, names in (
        (people.top_pattern, TOP_PATTERNS),
        (people.bottom_pattern, BOTTOM_PATTERNS),
        (people.hair_length, HAIR_LENGTHS),
        (people.logo_shape, LOGO_SHAPES),
        (people.sleeve_long, "01"),
        (people.bottom_long, "01"),
    ):
        share = torch.bincount(values, minlength=len(names)) / 400
        assert len(share) == len(names)
        assert share.min() > 0.5 / len(names)
    assert torch.unique(people.eyes, dim=0).shape[0] == 6


def test_colours_are_valid_and_patterns_contrast():
    people = sample_identities(range(500), 2)
    for name in ("skin", "hair", "eyes", "shoe", "top_a", "top_b", "top_accent", "background"):
        value = getattr(people, name)
        assert value.min() >= 0 and value.max() <= 1, name
    for a, b in (("top_a", "top_b"), ("top_b", "top_accent"), ("bottom_a", "bottom_b")):
        gap = luminance(getattr(people, a)) - luminance(getattr(people, b))
        assert gap.abs().min() > 0.29
    assert people.beta.abs().max() <= 2
    assert people.beta.std() == pytest.approx(0.9, abs=0.05)


def _yaw(poses: BodyPoses) -> torch.Tensor:
    forward = axis_angle_to_matrix(poses.theta[:, 0])[:, :, 2]
    return torch.rad2deg(torch.atan2(forward[:, 0], forward[:, 2])).abs()


def test_views_and_their_mix():
    assert _yaw(sample_poses(range(200), 0, "front")).max() < 42
    side = _yaw(sample_poses(range(200), 0, "side"))
    assert side.min() > 58 and side.max() < 122
    assert _yaw(sample_poses(range(200), 0, "back")).min() > 143
    mixed = _yaw(sample_poses(range(2000), 0))
    assert (mixed < 45).float().mean() == pytest.approx(0.7, abs=0.04)
    assert (mixed > 140).float().mean() == pytest.approx(0.15, abs=0.03)


def test_standing_people_fill_the_frame_and_nobody_leaves_it(crowd):
    people, _, whole = crowd
    body = 1 - whole.parsing[:, Region.BACKGROUND]
    assert body[:, 0].max() == 0 and body[:, -1].max() == 0
    assert body[..., 0].max() == 0 and body[..., -1].max() == 0
    stand = ready_poses()["stand"]
    picture = render(people, stand.select([0] * 64))
    rows = (picture.parsing[:, Region.BACKGROUND] < 0.99).any(2).sum(1) / 64
    assert rows.min() >= 0.86 and rows.max() <= 0.97


# ------------------------------------------------------------------ ground truth


def test_parsing_is_a_partition(crowd):
    parsing = crowd[2].parsing
    assert parsing.min() >= 0
    assert torch.equal(parsing.sum(1), torch.ones(64, 64, 48))
    assert (parsing.amax((0, 2, 3)) > 0.9).all()


def test_shapes_types_and_ranges(crowd):
    whole = crowd[2]
    shapes = {
        "image": (64, 3, 64, 48),
        "parsing": (64, 7, 64, 48),
        "keypoints": (64, 18, 3),
        "depth": (64, 1, 64, 48),
        "theta": (64, 24, 3),
        "beta": (64, 10),
        "camera": (64, 3),
    }
    for name, value in _fields(whole):
        assert tuple(value.shape) == shapes[name]
        assert value.dtype == torch.float32 and torch.isfinite(value).all()
    assert whole.image.min() >= 0 and whole.image.max() <= 1


def test_parsing_and_image_are_area_averages_of_finer_ones():
    people, poses = sample_identities(range(4), 1), sample_poses(range(4), 1)
    fine = render(people, poses, 128, 96, supersample=1)
    coarse = render(people, poses, 64, 48, supersample=2)
    pool = torch.nn.functional.avg_pool2d
    for name in ("image", "parsing", "depth"):
        difference = pool(getattr(fine, name), 2) - getattr(coarse, name)
        assert difference.abs().gt(1e-3).float().mean() < 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(64, 48), (50, 70), (33, 17), (96, 96)])
def test_any_size(height, width):
    people, poses = sample_identities(range(2), 1), sample_poses(range(2), 1)
    picture = render(people, poses, height, width, supersample=3)
    assert picture.image.shape == (2, 3, height, width)
    assert torch.allclose(picture.parsing.sum(1), torch.ones(2, height, width))
    assert (picture.parsing[:, 1:].sum((1, 2, 3)) > 0.02 * height * width).all()


def test_keypoints_lie_on_the_rendered_limbs(crowd):
    whole = crowd[2]
    x, y, seen = whole.keypoints.unbind(-1)
    column, row = (x * 48).long().clamp(0, 47), (y * 64).long().clamp(0, 63)
    body = 1 - whole.parsing[:, Region.BACKGROUND]
    hit = body[torch.arange(64)[:, None], row, column]
    assert (hit[seen > 0] > 0.25).float().mean() > 0.97
    at = whole.parsing[torch.arange(64)[:, None], :, row, column]
    wrist = at[:, [4, 7]]
    limb = wrist[..., Region.SKIN] + wrist[..., Region.UPPER]
    assert (limb > 0.3).float().mean() > 0.8
    ankle = at[:, [10, 13]]
    limb = ankle[..., [Region.SKIN, Region.LOWER, Region.ACCESSORY]].sum(-1)
    assert (limb > 0.3).float().mean() > 0.9


def test_openpose_sides_are_the_persons(crowd):
    people = crowd[0].select(range(8))
    front = render(people, sample_poses(range(8), 0, "front")).keypoints
    back = render(people, sample_poses(range(8), 0, "back")).keypoints
    assert (front[:, 2, 0] < front[:, 5, 0]).all()
    assert (back[:, 2, 0] > back[:, 5, 0]).all()


def test_face_points_seen_depend_on_the_view():
    rest = ready_poses()["stand"].theta
    people = sample_identities([0, 0, 0, 0], 0)
    turned = torch.zeros(4, 24, 3)
    turned[:] = rest
    turned[:, [12, 15]] = 0
    for slot, angle in enumerate((0.0, 90.0, 180.0, -90.0)):
        turned[slot, 0] = torch.tensor([0.0, angle, 0.0]) * torch.pi / 180
    camera = torch.tensor([[0.95, 0.0, 0.0]]).expand(4, 3)
    seen = render(people, BodyPoses(turned, camera)).keypoints[..., 2] > 0
    face = seen[:, [0, 14, 15, 16, 17]].tolist()  # nose, right eye, left eye, right ear, left ear
    assert face[0] == [True] * 5
    assert face[1] == [True, True, False, True, False]
    assert face[2] == [False, False, False, True, True]
    assert face[3] == [True, False, True, False, True]
    assert seen[:, 1:14].all()


def test_no_face_from_behind():
    people = sample_identities(range(16), 0)
    behind = render(people, sample_poses(range(16), 0, "back")).parsing[:, Region.FACE]
    front = render(people, sample_poses(range(16), 0, "front")).parsing[:, Region.FACE]
    assert behind.sum((1, 2)).mean() < 0.2 * front.sum((1, 2)).mean()


def test_mirrored_pose_is_the_mirrored_picture():
    people = sample_identities(range(12), 5)
    # The parting of the hair is the one thing on a mannequin that is not symmetric by itself.
    people = dataclasses.replace(people, hair_tilt=torch.zeros(12))
    poses = sample_poses(range(12), 5)
    a, b = render(people, poses), render(people, mirror_poses(poses))
    for name in ("parsing", "depth"):
        difference = getattr(a, name) - getattr(b, name).flip(-1)
        assert difference.abs().gt(0.01).float().mean() < 2e-3, name
    swap = [0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16]
    mirrored = b.keypoints[:, swap]
    assert torch.equal(a.keypoints[..., 2], mirrored[..., 2])
    there = a.keypoints[..., 2] > 0
    assert torch.allclose(a.keypoints[..., 0][there], 1 - mirrored[..., 0][there], atol=1e-4)
    assert torch.allclose(a.keypoints[..., 1], mirrored[..., 1], atol=1e-4)


def test_the_nearest_part_is_seen():
    people = sample_identities([2], 0)
    pose = ready_poses()["stand"]
    theta = pose.theta.clone()
    theta[:, 17] = torch.tensor([0.0, 1.35, 0.0])  # the right arm straight at the camera
    picture = render(people, BodyPoses(theta, pose.camera), 128, 96)
    x, y, _ = picture.keypoints[0, 4].tolist()
    row, column = int(y * 128), int(x * 96)
    assert picture.parsing[0, Region.SKIN, row, column] > 0.5
    assert picture.depth[0, 0, row, column] > 0.85
    body = picture.parsing[0, Region.BACKGROUND] == 0
    assert picture.depth[0, 0][body].min() >= 0.2 - 1e-4
    assert picture.depth.max() <= 1 + 1e-5
    assert (picture.depth[0, 0][picture.parsing[0, Region.BACKGROUND] == 1] == 0).all()


def test_hits_lie_on_the_nearest_surface_of_an_independent_ray_march():
    """The closed form against marching along rays through the union of sampled ellipsoids."""
    people, poses = sample_identities(range(3), 11), sample_poses(range(3), 11)
    grid = tile_grid(24, 18, 1)
    scene = make_scene(people, poses, 18 / 24)
    surface = trace(scene, grid)
    parts = body_parts(people)
    body = 1
    scale, tx, ty = scene.camera[body].double().tolist()
    centres, radii, inverse = [], [], []
    for p in range(parts.joint.shape[0]):
        if parts.radius[body, p].max() <= 0:
            continue
        joint = parts.joint[p]
        turn, base = scene.rotation[body, joint].double(), scene.position[body, joint].double()
        metric = turn @ torch.diag(parts.shape[body, p].double() ** -2) @ turn.T
        for t in torch.linspace(0, 1, 41).double():
            local = parts.start[body, p].double() * (1 - t) + parts.end[body, p].double() * t
            centres.append(base + turn @ local)
            radii.append(parts.radius[body, p, 0].double() * (1 - t) + parts.radius[body, p, 1] * t)
            inverse.append(metric)
    centres, radii = torch.stack(centres), torch.stack(radii)
    inverse = torch.stack(inverse)
    mine = surface.person == body
    where = surface.where[mine] - body * grid.samples
    area = grid.tile**2
    tile, inner = where // area, where % area
    column = (tile % grid.columns) * grid.tile + inner % grid.tile
    row = (tile // grid.columns) * grid.tile + inner // grid.tile
    x = ((column + 0.5) / 24 - 18 / 48 - tx).double() / scale
    y = (0.5 - (row + 0.5) / 24 + ty).double() / scale
    z = surface.depth[mine].double() / scale

    def outside(point):
        d = point[:, None] - centres[None]
        value = torch.einsum("kpi,pij,kpj->kp", d, inverse, d).sqrt() - radii
        return value.amin(1)

    # On the surface ...
    assert len(z) > 40
    assert outside(torch.stack([x, y, z], -1)).abs().quantile(0.9) < 2e-3
    # ... and nothing between it and the camera, open ends apart.
    gap = torch.stack([outside(torch.stack([x, y, z + h], -1)) for h in (0.02, 0.1, 0.2, 0.4)])
    assert (gap > -2e-3).float().mean() > 0.97


# ------------------------------------------------------------------ cloth


def test_patterns_move_with_the_cloth():
    """The same spot of a garment has the same colour in two poses."""
    people = sample_identities(range(12), 21)
    grid = tile_grid(96, 72, 2)
    seen = []
    for seed in (0, 1):
        scene = make_scene(people, sample_poses(range(12), seed, "front"), 72 / 96)
        surface = trace(scene, grid)
        albedo, label = paint_surface(surface, scene)
        cell = (surface.rest * 250).round().long() + 1000
        key = ((surface.person * 64 + surface.primitive) * 2000 + cell[0]) * 2000 + cell[1]
        key = key * 2000 + cell[2]
        order = key.argsort()
        seen.append((key[order], albedo[:, order], label[order]))
    (key_a, albedo_a, label_a), (key_b, albedo_b, label_b) = seen
    place = torch.searchsorted(key_b, key_a).clamp_max(len(key_b) - 1)
    same = key_b[place] == key_a
    assert same.sum() > 5000
    assert (label_a[same] == label_b[place[same]]).float().mean() > 0.98
    # Cells of 4 mm that a pattern's edge runs through may differ.
    equal = (albedo_a[:, same] - albedo_b[:, place[same]]).abs().amax(0) < 0.05
    assert equal.float().mean() > 0.93


def test_patterned_tops_show_two_colours_and_plain_ones_one():
    people = sample_identities(range(200), 0)
    poses = ready_poses()["stand"].select([0] * 200)
    scene = make_scene(people, poses, 48 / 64)
    surface = trace(scene, tile_grid(64, 48, 1))
    albedo, label = paint_surface(surface, scene)
    upper = label == Region.UPPER
    collarless = upper & (surface.rest[1] < 0.42)
    for person in range(200):
        mine = collarless & (surface.person == person)
        colours = torch.unique((albedo[:, mine] * 255).round(), dim=1).shape[1]
        # The inside of an open hem or sleeve is a darker tone of the same cloth.
        if people.top_pattern[person] == 0:
            base = people.top_a[person][:, None]
            share = ((albedo[:, mine] - base).abs().amax(0) < 0.01).float().mean()
            assert share > 0.9
        else:
            assert colours >= 2


def test_sleeves_and_trousers_have_their_length():
    people = sample_identities(range(16), 0)
    stand = ready_poses()["stand"].select([0] * 16)
    area = {}
    for name in ("sleeve_long", "bottom_long"):
        for value in (0, 1):
            dressed = dataclasses.replace(people, **{name: torch.full((16,), value)})
            area[name, value] = render(dressed, stand).parsing.sum((2, 3))
    for name, region in (("sleeve_long", Region.UPPER), ("bottom_long", Region.LOWER)):
        assert (area[name, 1][:, region] > area[name, 0][:, region] + 10).all()
        assert (area[name, 1][:, Region.SKIN] < area[name, 0][:, Region.SKIN] - 10).all()


# ------------------------------------------------------------------ the body


def test_axis_angle_and_matrix_are_inverse():
    axis = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    axis = axis / axis.norm(dim=1, keepdim=True)
    for angle in (0.0, 1e-4, 0.5, 1.5, 3.0, 3.141):
        vector = axis * angle
        assert torch.allclose(matrix_to_axis_angle(axis_angle_to_matrix(vector)), vector, atol=1e-6)


def test_bones_keep_their_length_and_the_rest_pose_is_the_rest_pose():
    people, poses = sample_identities(range(20), 0), sample_poses(range(20), 0)
    rest = rest_joints(people.beta)
    _, still = forward_kinematics(torch.zeros(20, 24, 3), rest)
    assert torch.allclose(still, rest, atol=1e-6)
    _, moved = forward_kinematics(poses.theta, rest)
    parents = list(PARENTS[1:])
    a = (rest[:, 1:] - rest[:, parents]).norm(dim=-1)
    b = (moved[:, 1:] - moved[:, parents]).norm(dim=-1)
    assert torch.allclose(a, b, atol=1e-5)


def test_chained_rotations_are_products_joint_by_joint():
    generator = torch.Generator().manual_seed(0)
    local = axis_angle_to_matrix(torch.randn(5, 24, 3, generator=generator, dtype=torch.float64))
    rest = torch.randn(5, 24, 3, generator=generator, dtype=torch.float64)
    rotation, position = chain_rotations(local, rest)
    for n in range(5):
        world, place = [], []
        for joint, parent in enumerate(PARENTS):
            if joint == 0:
                world.append(local[n, 0])
                place.append(rest[n, 0])
            else:
                world.append(world[parent] @ local[n, joint])
                place.append(place[parent] + world[parent] @ (rest[n, joint] - rest[n, parent]))
        assert torch.allclose(rotation[n], torch.stack(world), atol=1e-12)
        assert torch.allclose(position[n], torch.stack(place), atol=1e-12)


def test_chained_rotations_are_those_of_axis_angles_and_have_a_gradient():
    poses, rest = sample_poses(range(4), 1), rest_joints(sample_identities(range(4), 1).beta)
    local = axis_angle_to_matrix(poses.theta).requires_grad_()
    made = chain_rotations(local, rest)
    for one, other in zip(made, forward_kinematics(poses.theta, rest), strict=True):
        assert torch.equal(one, other)
    made[1].square().sum().backward()
    # The last joint of each limb moves nothing but itself.
    ends = [joint for joint in range(24) if joint not in PARENTS]
    moved = local.grad.abs().amax((0, 2, 3)) > 0
    assert not moved[ends].any() and moved.sum() == 24 - len(ends)


def test_projected_points_are_the_renderings_keypoints(crowd):
    people, poses, whole = crowd
    rotation, position = forward_kinematics(poses.theta, rest_joints(people.beta))
    points, seen = openpose_points(rotation, position, people.beta)
    x, y = project(points, whole.camera, 48 / 64)
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    expected = torch.stack([x, y, torch.ones_like(x)], -1) * (seen & inside)[..., None]
    assert torch.equal(whole.keypoints, expected)
    assert seen[:, 1:14].all() and not seen.all()
    # The neck is between the shoulders.
    assert torch.allclose(points[:, 1], (points[:, 2] + points[:, 5]) / 2, atol=1e-6)


def test_the_camera_says_where_joints_are_seen(crowd):
    people, poses, whole = crowd
    _, joints = forward_kinematics(poses.theta, rest_joints(people.beta))
    scale, tx, ty = whole.camera.unbind(-1)
    x = (48 / 64 / 2 + scale * joints[:, 4, 0] + tx) * 64 / 48
    y = 0.5 - scale * joints[:, 4, 1] + ty
    knee = whole.keypoints[:, 12]
    assert torch.allclose(torch.stack([x, y], -1), knee[:, :2], atol=1e-4)


def test_ready_poses_render():
    poses = ready_poses()
    assert len(poses) >= 8
    for pose in poses.values():
        picture = render(sample_identities([1], 0), pose)
        assert (picture.parsing[:, Region.UPPER].sum() > 50).all()


# ------------------------------------------------------------------ errors and devices


def test_nobody_is_a_valid_batch():
    picture = render(sample_identities([], 0), sample_poses([], 0))
    assert picture.image.shape == (0, 3, 64, 48)
    assert picture.parsing.shape == (0, 7, 64, 48)


def test_errors_say_what_is_wrong():
    people, poses = sample_identities(range(2), 0), sample_poses(range(2), 0)
    with pytest.raises(TruePoseError, match="2 identities and 1 poses"):
        render(people, poses.select([0]))
    with pytest.raises(TruePoseError, match="4x48"):
        render(people, poses, height=4)
    with pytest.raises(TruePoseError, match="supersample is 0"):
        render(people, poses, supersample=0)
    with pytest.raises(TruePoseError, match="view is 'top'"):
        sample_poses([0], 0, view="top")
    with pytest.raises(TruePoseError, match="split is 'val'"):
        sample_pairs(2, "val")
    with pytest.raises(TruePoseError, match="whole numbers"):
        sample_identities(torch.tensor([0.5]), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_renders_the_same_picture(crowd):
    people, poses, whole = crowd
    other = render(people, poses, device="cuda")
    for name, value in _fields(other):
        assert value.device.type == "cuda"
        difference = (value.cpu() - getattr(whole, name)).abs()
        assert difference.gt(1e-3).float().mean() < 1e-3, name


def test_the_shifted_world_is_outside_of_the_usual_one():
    usual, shifted = (sample_pairs(4, "test", kind=kind) for kind in ("usual", "shifted"))
    assert torch.equal(usual.source.theta, shifted.source.theta) and shifted.world == "shifted"
    assert (shifted.source.beta.abs() >= 1.2).all() and shifted.source.beta.abs().max() > 2
    assert (usual.source.image - shifted.source.image).abs().mean() > 0.1
    many = sample_identities(range(500), 0)
    moved = shift_people(many)
    assert moved.top_period.min() > many.top_period.max() * 0.99 and moved.logo_size.min() > many.logo_size.max()
    # Contrasts stay, and so does what a pattern score can see.
    assert torch.allclose((moved.top_a - moved.top_b).abs(), (many.top_a - many.top_b).abs(), atol=1e-6)
    with pytest.raises(TruePoseError, match="the world is 'strange'"):
        sample_pairs(1, "test", kind="strange")
