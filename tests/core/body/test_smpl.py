"""Laws of the SMPL file reader, linear blend skinning, the rasteriser, and surface points carried between poses."""

import itertools

import numpy as np
import pytest
import torch

from truepose_core.body.pose import BodyPose
from truepose_core.body.raster import rasterize
from truepose_core.body.render import BodyModel, GenericBody
from truepose_core.body.smpl import SmplModel, at_surface, to_pixels, vertex_normals
from truepose_core.errors import TruePoseError
from truepose_core.mannequin.body import PARENTS, axis_angle_to_matrix, forward_kinematics, rest_joints
from truepose_core.mannequin.poses import sample_poses
from truepose_core.regions import Region

TREE = np.array([[2**32 - 1, *PARENTS[1:]], range(24)], dtype=np.int64)


def random_file(seed=0, vertices=40, faces=60, betas=10, posedirs=True):
    """The arrays of a body that looks like nothing, but obeys the format."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(size=(vertices, 24)) ** 4
    regressor = rng.uniform(size=(24, vertices)) ** 4
    arrays = {
        "v_template": rng.normal(size=(vertices, 3)),
        "shapedirs": rng.normal(size=(vertices, 3, betas)) * 0.05,
        "posedirs": rng.normal(size=(vertices, 3, 207)) * 0.01,
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
        "weights": weights / weights.sum(1, keepdims=True),
        "f": rng.integers(0, vertices, (faces, 3)).astype(np.uint32),
        "kintree_table": TREE,
    }
    if not posedirs:
        del arrays["posedirs"]
    return arrays


def box_body():
    """A person of 24 boxes, one around each bone, each rigid with its joint; the pelvis is away from the origin."""
    joints = rest_joints(torch.zeros(1, 10))[0].numpy() + np.array([0.01, -0.22, 0.03])
    corners, faces, weights = [], [], []
    signs = np.array(list(itertools.product((-1, 1), repeat=3)))
    # Outward, counterclockwise seen from outside.
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    for joint in range(24):
        children = [c for c in range(24) if PARENTS[c] == joint]
        end = joints[children].mean(0) if children else joints[joint] + (0, 0.12 if joint == 15 else 0, 0)
        base = 8 * len(faces) // 12
        corners.append((joints[joint] + end) / 2 + signs * (np.abs(end - joints[joint]) / 2 + 0.04))
        faces += [[base + q[a] for a in t] for q in quads for t in ((0, 1, 2), (0, 2, 3))]
        weights += [np.eye(24)[joint]] * 8
    template = np.concatenate(corners)
    # A joint's place is the mean of corners chosen so that it comes out exactly.
    regressor = np.linalg.lstsq(np.c_[template, np.ones(len(template))].T, np.c_[joints, np.ones(24)].T, rcond=None)[
        0
    ].T
    return {
        "v_template": template,
        "shapedirs": np.zeros((len(template), 3, 10)),
        "J_regressor": regressor,
        "weights": np.array(weights),
        "f": np.array(faces),
        "kintree_table": TREE,
    }


def saved(tmp_path, arrays, name="smpl.npz"):
    path = tmp_path / name
    np.savez(path, **arrays)
    return path


@pytest.fixture
def boxes(tmp_path):
    return SmplModel.load(saved(tmp_path, box_body()))


def rodrigues(vector):
    angle = np.linalg.norm(vector)
    k = vector / angle
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def slow_skinning(arrays, theta, beta):
    """Loper et al. 2015, eq. 2 to 10, with loops and 4x4 matrices."""
    shaped = arrays["v_template"].copy()
    for b in range(10):
        shaped += beta[b] * arrays["shapedirs"][:, :, b]
    joints = arrays["J_regressor"] @ shaped
    local = [rodrigues(vector) for vector in theta]
    if "posedirs" in arrays:
        bent = np.concatenate([(rotation - np.eye(3)).ravel() for rotation in local[1:]])
        for p in range(207):
            shaped += bent[p] * arrays["posedirs"][:, :, p]
    world, rest = [], []
    for j in range(24):
        step = np.eye(4)
        step[:3, :3] = local[j]
        step[:3, 3] = joints[j] - (joints[PARENTS[j]] if j else 0)
        world.append(step if not j else world[PARENTS[j]] @ step)
        back = np.eye(4)
        back[:3, 3] = -joints[j]
        rest.append(world[j] @ back)
    posed = np.zeros_like(shaped)
    for v in range(len(shaped)):
        for j in range(24):
            posed[v] += arrays["weights"][v, j] * (rest[j] @ np.append(shaped[v], 1))[:3]
    return posed - joints[0], joints - joints[0]


def random_theta(count, seed=0, size=0.6):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 24, 3)) * size).float()


@pytest.mark.parametrize("posedirs", [True, False])
def test_skinning_equals_the_papers_equations_written_out(tmp_path, posedirs):
    arrays = random_file(1, betas=16, posedirs=posedirs)
    model = SmplModel.load(saved(tmp_path, arrays))
    theta, beta = random_theta(3), torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    posed, joints = model.vertices(theta, beta), model.joints(beta)
    for n in range(3):
        expected, places = slow_skinning(arrays, theta[n].double().numpy(), beta[n].double().numpy())
        np.testing.assert_allclose(posed[n].numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(joints[n].numpy(), places, atol=2e-6)


def test_at_rest_the_body_is_its_template(tmp_path):
    arrays = random_file(2)
    model = SmplModel.load(saved(tmp_path, arrays))
    posed = model.vertices(torch.zeros(1, 24, 3), torch.zeros(1, 10))[0]
    pelvis = arrays["J_regressor"][0] @ arrays["v_template"]
    np.testing.assert_allclose(posed.numpy(), arrays["v_template"] - pelvis, atol=1e-5)
    np.testing.assert_allclose(model.rest.numpy(), posed.numpy(), atol=1e-5)


def test_a_turn_of_the_root_turns_every_vertex(boxes):
    theta = random_theta(1, 3)
    theta[:, 0] = 0
    turned = theta.clone()
    turned[:, 0] = torch.tensor([0.4, -1.1, 0.3])
    beta = torch.zeros(1, 10)
    rotation = axis_angle_to_matrix(turned[:, 0])
    expected = boxes.vertices(theta, beta) @ rotation.transpose(1, 2)
    torch.testing.assert_close(boxes.vertices(turned, beta), expected, atol=2e-6, rtol=0)


def test_a_rigid_part_goes_where_forward_kinematics_takes_its_joint(boxes):
    theta, beta = random_theta(2, 4), torch.zeros(2, 10)
    rotation, position = forward_kinematics(theta, boxes.joints(beta))
    posed = boxes.vertices(theta, beta)
    rest = boxes.rest - boxes.joints(beta)[0].repeat_interleave(8, 0)
    joint = torch.arange(24).repeat_interleave(8)
    expected = (rotation[:, joint] @ rest[..., None])[..., 0] + position[:, joint]
    torch.testing.assert_close(posed, expected, atol=2e-6, rtol=0)


def test_skinning_is_differentiable(boxes):
    theta = random_theta(1, 5).requires_grad_()
    boxes.vertices(theta, torch.zeros(1, 10)).square().sum().backward()
    assert theta.grad.isfinite().all() and theta.grad.abs().amax(-1)[0].count_nonzero() >= 20


def slow_raster(vertices, faces, height, width):
    """Every pixel against every triangle, in double precision; also how far each decision was from the other side."""
    face = np.full((height, width), -1)
    depth = np.full((height, width), -np.inf)
    weights = np.zeros((height, width, 3))
    margin = np.full((height, width), np.inf)
    for y, x in itertools.product(range(height), range(width)):
        nearest = []
        for f, corner in enumerate(faces):
            a, b, c = vertices[corner].astype(np.float64)
            system = np.array([[a[0], b[0], c[0]], [a[1], b[1], c[1]], [1, 1, 1]])
            if abs(np.linalg.det(system)) < 1e-9:
                continue
            w = np.linalg.solve(system, (x + 0.5, y + 0.5, 1))
            margin[y, x] = min(margin[y, x], abs(w.min()))
            if w.min() < 0:
                continue
            z = w @ (a[2], b[2], c[2])
            nearest.append(z)
            if z > depth[y, x]:
                face[y, x], depth[y, x], weights[y, x] = f, z, w
        for z in nearest:
            if z != depth[y, x]:
                margin[y, x] = min(margin[y, x], depth[y, x] - z)
    return face, weights, depth, margin


@pytest.mark.parametrize("seed", range(4))
def test_the_rasteriser_equals_testing_every_pixel_against_every_triangle(seed):
    rng = np.random.default_rng(seed)
    height, width = 13, 17
    # Some corners lie outside the frame, some triangles are larger than it, some smaller than a pixel.
    vertices = rng.uniform((-8, -8, -1), (25, 21, 1), (2, 24, 3)).astype(np.float32)
    vertices[:, 12:, :2] = vertices[:, 12:, :2] * 0.05 + (8, 6)
    faces = rng.integers(0, 24, (20, 3))
    face, weights, depth = rasterize(torch.from_numpy(vertices), torch.from_numpy(faces), height, width)
    for n in range(2):
        expected, places, near, margin = slow_raster(vertices[n], faces, height, width)
        sure = margin > 1e-3
        assert sure.mean() > 0.8
        np.testing.assert_array_equal(face[n].numpy()[sure], expected[sure])
        hit = sure & (expected >= 0)
        assert hit.any() and (expected < 0).any()
        np.testing.assert_allclose(weights[n].numpy()[hit], places[hit], atol=1e-3)
        np.testing.assert_allclose(depth[n].numpy()[hit], near[hit], atol=1e-3)
        assert (depth[n].numpy()[expected < 0] == 0)[sure[expected < 0]].all()


def test_triangles_that_share_edges_leave_no_hole_and_the_first_of_equals_wins():
    """A square cut into many triangles, its edges through pixel centres."""
    side = torch.linspace(2.5, 30.5, 9)
    y, x = torch.meshgrid(side, side, indexing="ij")
    vertices = torch.stack([x, y, torch.zeros_like(x)], -1).reshape(1, -1, 3)
    i = torch.arange(72).view(8, 9)[:, :8].reshape(-1)
    faces = torch.cat([torch.stack([i, i + 1, i + 9], -1), torch.stack([i + 1, i + 10, i + 9], -1)])
    face, weights, _ = rasterize(vertices, faces, 33, 33)
    assert (face[0, 2:31, 2:31] >= 0).all()
    assert (face >= 0).sum() == 29 * 29
    doubled, _, _ = rasterize(vertices, torch.cat([faces, faces]), 33, 33)
    assert torch.equal(doubled, face)
    torch.testing.assert_close(weights.sum(-1), (face >= 0).float())


def test_many_triangles_in_several_batches_give_the_same_picture(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    vertices = torch.rand((2, 50, 3), generator=generator) * torch.tensor([40.0, 30.0, 1.0])
    faces = torch.randint(0, 50, (80, 3), generator=generator)
    whole = rasterize(vertices, faces, 30, 40)
    monkeypatch.setattr("truepose_core.body.raster._SAMPLES", 500)
    for one, other in zip(whole, rasterize(vertices, faces, 30, 40), strict=True):
        assert torch.equal(one, other)


def test_the_rasteriser_refuses_what_is_no_mesh():
    with pytest.raises(TruePoseError, match=r"expected \[N, V, 3\] and \[F, 3\]"):
        rasterize(torch.zeros(4, 3), torch.zeros(1, 3, dtype=torch.long), 4, 4)
    with pytest.raises(TruePoseError, match="NaN"):
        rasterize(torch.full((1, 3, 3), torch.nan), torch.tensor([[0, 1, 2]]), 4, 4)


def bodies(count, seed=0, scale=0.42):
    theta = sample_poses(range(count), seed).theta
    return BodyPose(theta, torch.zeros(count, 10), torch.tensor([[scale, 0.01, -0.06]]).repeat(count, 1))


def test_a_surface_point_in_its_own_pose_lies_on_its_own_pixel(boxes):
    body, (height, width) = bodies(3), (96, 72)
    maps = boxes.render(body, height, width)
    found = boxes.locate(maps, body)
    on = maps.mask[:, 0] > 0
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    for axis, expected in enumerate((x, y)):
        torch.testing.assert_close(found[:, axis][on], expected.expand(3, -1, -1)[on], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:, 2][on], maps.depth[:, 0][on], atol=1e-5, rtol=0)


def test_a_surface_point_goes_to_the_same_place_of_another_pose(boxes):
    """What a pixel of the target shows lies, in the source, where the source shows the same place on the body."""
    (height, width), source, target = (192, 144), bodies(1, 0), bodies(1, 6)
    seen, wanted = boxes.render(source, height, width), boxes.render(target, height, width)
    x, y, z = boxes.locate(wanted, source)[0]
    column, row = (x * width).long(), (y * height).long()
    inside = (wanted.mask[0, 0] > 0) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    column, row = column.clamp(0, width - 1), row.clamp(0, height - 1)
    visible = inside & ((seen.depth[0, 0][row, column] - z).abs() < 0.004) & (seen.mask[0, 0][row, column] > 0)
    assert visible.sum() > 400
    there = seen.rest[0].permute(1, 2, 0)[row, column][visible]
    distance = (there - wanted.rest[0].permute(1, 2, 0)[visible]).norm(dim=-1)
    # A pixel is 1.2 cm of an upright surface.
    assert distance.median() < 0.012
    assert (distance < 0.05).float().mean() > 0.95


def test_what_the_maps_show(boxes):
    body, (height, width) = bodies(2, 1), (96, 72)
    maps = boxes.render(body, height, width)
    on = maps.mask[:, 0] > 0
    assert maps.rest.shape == maps.normal.shape == (2, 3, height, width)
    assert maps.depth.shape == maps.mask.shape == (2, 1, height, width)
    assert (maps.part[~on] == -1).all() and (maps.part[on] >= 0).all() and (maps.part[on] <= 23).all()
    for name in ("rest", "normal", "depth", "barycentric"):
        value = getattr(maps, name)
        value = value if name == "barycentric" else value.permute(0, 2, 3, 1)
        assert not value[~on].any(), name
    # A box is rigid with one joint: eight corners each, twelve triangles each.
    assert torch.equal(maps.part[on], maps.face[on] // 12)
    torch.testing.assert_close(maps.normal.norm(dim=1)[on], torch.ones(int(on.sum())), atol=1e-5, rtol=0)
    assert set(maps.region[~on].tolist()) == {Region.BACKGROUND}
    assert set(maps.region[on & (maps.part == 15)].tolist()) <= {Region.FACE}
    assert set(maps.region[on & (maps.part == 4)].tolist()) == {Region.LOWER}


def test_normals_of_a_sphere_point_away_from_its_centre():
    """Also with the camera's eyes: the visible half looks towards it."""
    angle = torch.linspace(0, 2 * torch.pi, 25)[:-1]
    height = torch.linspace(0.02, torch.pi - 0.02, 20)
    v, u = torch.meshgrid(height, angle, indexing="ij")
    points = torch.stack([v.sin() * u.sin(), v.cos(), v.sin() * u.cos()], -1).reshape(1, -1, 3)
    i = (torch.arange(19)[:, None] * 24 + torch.arange(24)).reshape(-1)
    j = (torch.arange(19)[:, None] * 24 + (torch.arange(24) + 1) % 24).reshape(-1)
    faces = torch.cat([torch.stack([i, i + 24, j], -1), torch.stack([j, i + 24, j + 24], -1)])
    normals = vertex_normals(points, faces)
    assert (normals * points).sum(-1).min() > 0.98
    screen = to_pixels(points, torch.tensor([[0.4, 0.0, 0.0]]), 40, 40)
    face, weights, depth = rasterize(screen, faces, 40, 40)
    seen = at_surface(normals, faces, face, weights)[face >= 0]
    assert seen[:, 2].min() > -0.05 and seen[:, 2].max() > 0.98
    assert depth.max() == pytest.approx(0.4, abs=0.01)


def test_pixels_and_frame_heights_are_those_of_the_body_camera():
    """The formula of `BodyPose`, and the frame in which `GenericBody` draws."""
    points = torch.tensor([[[0.3, -0.2, 0.5]]])
    camera = torch.tensor([[0.4, 0.1, -0.05]])
    x, y, z = to_pixels(points, camera, 200, 100)[0, 0].tolist()
    assert x / 200 == pytest.approx(100 / 400 + 0.4 * 0.3 + 0.1)
    assert y / 200 == pytest.approx(0.5 + 0.4 * 0.2 - 0.05)
    assert z == pytest.approx(0.4 * 0.5)


def test_the_boxes_stand_where_the_generic_body_stands(boxes):
    """Both renderers, one camera: parts that both show overlap."""
    body = bodies(2, 2)
    own, generic = boxes.render(body, 96, 72), GenericBody().render(body, 96, 72)
    both = (own.mask * generic.mask).sum()
    assert both / (own.mask + generic.mask).clamp(max=1).sum() > 0.55
    on = (own.mask[:, 0] > 0) & (generic.mask[:, 0] > 0) & (own.part == generic.part)
    assert (own.rest - generic.rest).norm(dim=1)[on].median() < 0.08
    assert (own.depth - generic.depth)[:, 0][on].abs().median() < 0.04


def test_look_alikes_lie_on_the_other_side(boxes):
    body = BodyPose(torch.zeros(1, 24, 3), torch.zeros(1, 10), torch.tensor([[0.42, 0.0, -0.05]]))
    maps = boxes.render(body, 96, 96)
    on = maps.mask[0, 0] > 0
    plain, side, back = (boxes.locate(maps, body, name)[0] for name in ("none", "left-right", "front-back"))
    # Seen from the front at rest, left and right change places about the middle of the frame.
    torch.testing.assert_close(side[0][on], 1 - plain[0][on], atol=0.02, rtol=0)
    torch.testing.assert_close(side[1:, on], plain[1:, on], atol=0.02, rtol=0)
    # The back is behind the front.
    assert ((plain[2] - back[2])[on] > 0.01).float().mean() > 0.9


def test_a_generic_map_has_no_triangles_to_locate(boxes):
    body = bodies(1)
    with pytest.raises(TruePoseError, match="not rendered from a mesh"):
        boxes.locate(GenericBody().render(body, 32, 24), body)


def test_a_body_outside_the_frame_is_refused(boxes):
    away = BodyPose(torch.zeros(1, 24, 3), torch.zeros(1, 10), torch.tensor([[0.4, 5.0, 0.0]]))
    with pytest.raises(TruePoseError, match="outside the picture"):
        boxes.render(away, 32, 24)


def test_the_model_stands_in_for_the_generic_body(boxes):
    model: BodyModel = boxes
    maps = model.render(bodies(1), 48, 36)
    assert model.locate(maps, bodies(1)).shape == (1, 3, 48, 36)
    assert len(maps.select(torch.tensor([0, 0]))) == 2
    assert torch.equal(boxes.to("cpu").rest, boxes.rest)


def broken(key, value):
    arrays = random_file()
    arrays[key] = value
    return arrays


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken("weights", np.ones((40, 55)) / 55), "SMPL-X"),
        (broken("J_regressor", np.ones((24, 41)) / 41), r"J_regressor .* \[24, 41\]; expected \[24, 40\]"),
        (broken("shapedirs", np.ones((40, 3, 4))), r"\[40, 3, 4\]; expected \[40, 3, 10\]"),
        (broken("posedirs", np.ones((40, 3, 9))), "posedirs"),
        (broken("v_template", np.full((40, 3), np.nan)), "v_template .* NaN"),
        (broken("v_template", np.array("body")), "expected numbers"),
        (broken("f", np.full((3, 3), 40)), "names corners outside the 40 vertices"),
        (broken("weights", np.ones((40, 24))), "sum to 24 to 24"),
        (broken("kintree_table", np.zeros((2, 24), np.int64)), "not SMPL's tree"),
        (broken("J_regressor", np.array({"a": 1}, dtype=object)), "pickled object .*toarray"),
        ({k: v for k, v in random_file().items() if k != "f"}, "has no f; it holds J_regressor"),
    ],
)
def test_files_that_are_no_smpl_model(tmp_path, arrays, message):
    with pytest.raises(TruePoseError, match=message):
        SmplModel.load(saved(tmp_path, arrays))


def test_damaged_files(tmp_path):
    whole = saved(tmp_path, random_file()).read_bytes()
    for name, data in (("cut.npz", whole[: len(whole) // 2]), ("empty.npz", b""), ("text.npz", b"not a zip" * 9)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(TruePoseError, match=name):
            SmplModel.load(tmp_path / name)
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    with pytest.raises(TruePoseError, match="flipped"):
        SmplModel.load(tmp_path / "flipped.npz")
    with pytest.raises(TruePoseError, match="does not exist"):
        SmplModel.load(tmp_path / "none.npz")
    with pytest.raises(TruePoseError, match="Pickles are never opened"):
        SmplModel.load(tmp_path / "SMPL_NEUTRAL.pkl")
