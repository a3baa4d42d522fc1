"""Load Body Pose, Body Pose from Keypoints, Render Body, Carry Along Body: called as the host calls them."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from pack.nodes.body import GENERIC, NO_FILE, BodyPoseFromKeypoints, CarryAlongBody, LoadBodyPose, RenderBody

from truepose_core.body.person import PosedBody, carry_person
from truepose_core.body.pictures import CHAMP_MAPS
from truepose_core.body.pose import BodyPose
from truepose_core.body.reading import write_body
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import ready_poses, render, sample_identities
from truepose_core.parsing import HumanParsing
from truepose_core.pose import Person, Pose, body_tensor, read_pose, write_pose
from truepose_core.pose.gallery import gallery_pose

WIDTH, HEIGHT = 96, 128


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


@pytest.fixture(scope="module")
def person() -> dict[str, object]:
    """A mannequin that stands: IMAGE, parsing, POSE_KEYPOINT, and the body it truly has."""
    shown = render(sample_identities([5], 1), ready_poses()["stand"], HEIGHT, WIDTH)
    pose = write_pose(Pose(WIDTH, HEIGHT, (Person(shown.keypoints[0].numpy()),)))
    body = PosedBody(BodyPose(shown.theta, shown.beta, shown.camera), (WIDTH, HEIGHT))
    return {
        "image": shown.image.movedim(1, -1),
        "parsing": HumanParsing(shown.parsing),
        "pose": pose,
        "true": body,
    }


def given(person: dict, *names: str) -> dict[str, object]:
    return {name: person[name] for name in names}


def target(*names: str) -> list[dict]:
    return write_pose([gallery_pose(name, WIDTH, HEIGHT) for name in names])


def test_lifting_says_how_sure_it_is(person: dict) -> None:
    body, doubt, error, info = run(BodyPoseFromKeypoints, pose=person["pose"])
    assert isinstance(body, PosedBody) and body.canvas == (WIDTH, HEIGHT) and len(body) == 1
    assert 0 < doubt < 45 and 0 <= error < 0.02 * HEIGHT and f"{doubt:.1f} degrees" in info
    unfitted = run(BodyPoseFromKeypoints, pose=person["pose"], steps=0)
    assert unfitted[2] > error
    others = [run(BodyPoseFromKeypoints, pose=person["pose"], hypothesis=i) for i in (1, 2)]
    assert doubt <= others[0][1] <= others[1][1]
    assert not torch.equal(others[0][0].pose.theta, body.pose.theta)


def test_lifting_keeps_the_shape_of_a_known_body(person: dict) -> None:
    body, *_, info = run(BodyPoseFromKeypoints, pose=target("walking", "waving"), body=person["true"])
    assert len(body) == 2 and len(info.splitlines()) == 2
    assert torch.equal(body.pose.beta, person["true"].pose.beta.expand(2, -1))
    wide = run(BodyPoseFromKeypoints, **given(person, "pose", "parsing"))[0]
    assert wide.girth is not None and len(wide.girth.trunk) == 1


def test_render_in_both_conventions(person: dict) -> None:
    body = person["true"]
    depth, normal, semantic, coordinates, mask = run(RenderBody, body=body)
    assert depth.shape == normal.shape == semantic.shape == coordinates.shape == (1, HEIGHT, WIDTH, 3)
    on = mask[0] > 0
    assert 0.1 < float(mask.mean()) < 0.6 and float(depth[0][on].min()) >= 0.2 - 1e-6 and not depth[0][~on].any()
    assert torch.allclose(normal[0][~on], torch.tensor([0.5, 0.5, 1.0]))
    of_champ = run(RenderBody, body=body, convention="champ")
    maps = body.render(HEIGHT, WIDTH)
    for image, draw in zip(of_champ, CHAMP_MAPS.values(), strict=False):
        assert torch.equal(image.movedim(-1, 1), draw(maps)) and not image[0][~on].any()
    # Left and right change places between the two, up and front do not.
    assert torch.allclose(of_champ[1][0][on], torch.tensor([1.0, 0, 0]) + normal[0][on] * torch.tensor([-1.0, 1, 1]))
    assert run(RenderBody, body=body, width=192, height=256)[0].shape == (1, 256, 192, 3)
    with pytest.raises(TruePoseError, match="96x128 and the picture is 128x128"):
        run(RenderBody, body=body, width=128)


def test_carry_is_the_core_function(person: dict) -> None:
    inputs = given(person, "image", "parsing", "pose")
    image, seen, parsing, depth, normal = run(CarryAlongBody, **inputs, target_pose=target("walking", "waving"))
    assert image.shape == depth.shape == normal.shape == (2, HEIGHT, WIDTH, 3) and seen.shape == (2, HEIGHT, WIDTH)
    assert parsing.size == (HEIGHT, WIDTH) and parsing.batch == 2
    assert not image[seen == 0].any() and 0.05 < float(seen.mean()) < 0.5
    points = [body_tensor(one.people) for one in (*read_pose(person["pose"]), *read_pose(target("walking", "waving")))]
    core = carry_person(
        person["image"].movedim(-1, 1), person["parsing"], points[0], torch.cat(points[1:]), (HEIGHT, WIDTH)
    )
    assert torch.allclose(image, core.picture.movedim(1, -1), atol=1e-5)
    assert torch.equal(seen, core.seen[:, 0]) and torch.equal(parsing.masks, core.parsing.masks)


def test_carry_to_its_own_pose_returns_the_person(person: dict) -> None:
    inputs = given(person, "image", "parsing")
    image, seen, *_ = run(CarryAlongBody, **inputs, body=person["true"], target_body=person["true"])
    on = seen[0] > 0
    inside = person["parsing"].masks[0, 0] < 0.5
    assert float((on & inside).sum() / inside.sum()) > 0.85
    assert float((image[0] - person["image"][0])[on].abs().mean()) < 0.01


def test_mirror_and_skeleton_are_other_hypotheses(person: dict) -> None:
    inputs = given(person, "image", "parsing", "pose") | {"target_pose": target("back")}
    plain, back = (run(CarryAlongBody, **inputs, mirror=mirror)[1] for mirror in ("none", "front-back"))
    assert float(back.sum()) > 2 * float(plain.sum())
    inputs |= {"target_pose": target("walking")}
    image, seen, parsing, *maps = run(CarryAlongBody, **inputs, method="skeleton")
    assert image.shape == (1, HEIGHT, WIDTH, 3) and seen.any() and parsing.size == (HEIGHT, WIDTH)
    assert all("no depth" in blocked.message for blocked in maps)
    # Two keypoints of a limb are enough for the skeleton, and not for a body.
    few = person["pose"][0]["people"][0]["pose_keypoints_2d"][:]
    few = [value if 2 <= i // 3 <= 4 else 0 for i, value in enumerate(few)]
    arm = [person["pose"][0] | {"people": [{"pose_keypoints_2d": few}]}]
    assert run(CarryAlongBody, **inputs | {"pose": arm}, method="skeleton")[1].any()
    with pytest.raises(TruePoseError, match=r"3 visible keypoints in common; expected at least 5.*skeleton"):
        run(CarryAlongBody, **inputs | {"pose": arm})


def test_a_batch_with_one_pose(person: dict) -> None:
    two = torch.cat([person["image"], 1 - person["image"]])
    inputs = given(person, "parsing", "pose") | {"target_pose": target("walking")}
    image, seen, *_ = run(CarryAlongBody, image=two, **inputs)
    alone = run(CarryAlongBody, image=two[1:], **inputs)
    assert len(image) == 2 and torch.allclose(image[1:], alone[0], atol=1e-4) and torch.equal(seen[0], seen[1])


def test_what_carry_refuses(person: dict) -> None:
    inputs = given(person, "image", "parsing", "pose") | {"target_pose": target("walking")}
    nobody = [{"canvas_width": WIDTH, "canvas_height": HEIGHT, "people": []}]
    away = [person["pose"][0] | {"canvas_width": WIDTH, "canvas_height": HEIGHT}]
    flat = away[0]["people"][0]["pose_keypoints_2d"]
    away[0]["people"] = [{"pose_keypoints_2d": [v + 3 * HEIGHT * (i % 3 < 2) for i, v in enumerate(flat)]}]
    for bad, match in (
        ({"pose": None}, "the source has neither a pose nor a body"),
        ({"body": person["true"]}, "the source has both a pose and a body"),
        ({"target_pose": None}, "the target has neither"),
        ({"image": person["image"][:, :96]}, "the parsing is 96x128 and the image 96x96"),
        ({"pose": write_pose(gallery_pose("walking", 128, 128))}, "canvas of 128x128 and the picture is 96x128"),
        ({"width": 128}, "canvas of 96x128 and the picture is 128x128"),
        ({"pose": nobody}, "the source pose: the pose has no person"),
        ({"target_pose": nobody}, "the target pose: the pose has no person"),
        ({"target_pose": away}, "outside the picture"),
        ({"image": person["image"].expand(2, -1, -1, -1), "target_pose": target("walking") * 3}, "2 pictures and 3"),
        ({"mirror": "front-back", "method": "skeleton"}, "the skeleton knows no other side"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(CarryAlongBody, **inputs | bad)


def test_load_body_pose(person: dict) -> None:
    folder = Path(folder_paths.get_input_directory()) / "bodies"
    folder.mkdir(parents=True, exist_ok=True)
    body = person["true"]
    for suffix in ("npz", "json"):
        write_body(folder / f"one.{suffix}", body.pose, body.canvas, overwrite=True)
        file = f"bodies/one.{suffix}"
        assert file in LoadBodyPose.define_schema().inputs[0].options
        loaded, width, height = run(LoadBodyPose, file=file)
        assert (width, height) == body.canvas == loaded.canvas and loaded.smpl is None
        assert torch.allclose(loaded.pose.theta, body.pose.theta)
    stamp = LoadBodyPose.fingerprint_inputs(file="bodies/one.json", smpl=GENERIC)
    write_body(folder / "one.json", body.pose, None, overwrite=True)
    assert LoadBodyPose.fingerprint_inputs(file="bodies/one.json", smpl=GENERIC) != stamp
    assert run(LoadBodyPose, file="bodies/one.json", width=48, height=64)[1:] == (48, 64)
    for bad, match in (
        ({"file": NO_FILE}, "no body file is chosen"),
        ({"file": "bodies/one.json"}, "does not say how large its picture is"),
        ({"file": "bodies/one.json", "width": 48}, "give both, or neither"),
        ({"file": "../../secret.npz"}, "outside ComfyUI's input folder"),
        ({"file": "bodies/none.npz"}, "does not exist"),
        ({"file": "bodies/one.npz", "person": 3}, "person 3 was asked for"),
    ):
        with pytest.raises(TruePoseError, match=match):
            run(LoadBodyPose, **bad)


def test_an_smpl_file_in_place_of_the_generic_body(person: dict) -> None:
    input_folder = Path(folder_paths.get_input_directory())
    input_folder.mkdir(parents=True, exist_ok=True)
    write_body(input_folder / "standing.npz", person["true"].pose, person["true"].canvas, overwrite=True)
    models = Path(folder_paths.get_folder_paths("truepose")[0])
    models.mkdir(parents=True, exist_ok=True)
    np.savez(models / "boxes.npz", **boxes())
    folder_paths.filename_list_cache.clear()
    assert "boxes.npz" in LoadBodyPose.define_schema().inputs[1].options
    body, *_ = run(LoadBodyPose, file="standing.npz", smpl="boxes.npz")
    assert body.smpl is not None
    lifted, _, error, _ = run(BodyPoseFromKeypoints, pose=target("walking"), body=body)
    assert lifted.smpl is body.smpl and error < 0.03 * HEIGHT
    image, seen, *_ = run(CarryAlongBody, **given(person, "image", "parsing"), body=body, target_body=lifted)
    assert seen.any() and not image[seen == 0].any()
    with pytest.raises(TruePoseError, match="bodies of two models"):
        run(CarryAlongBody, **given(person, "image", "parsing"), body=body, target_body=person["true"])
    with pytest.raises(TruePoseError, match="no girth"):
        run(BodyPoseFromKeypoints, **given(person, "pose", "parsing"), body=body)


def boxes() -> dict[str, np.ndarray]:
    """A person of 24 boxes in SMPL's format, each rigid with its joint."""
    from truepose_core.mannequin.body import PARENTS, rest_joints

    joints = rest_joints(torch.zeros(1, 10))[0].numpy()
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [[8 * box + q[a] for a in t] for box in range(24) for q in quads for t in ((0, 1, 2), (0, 2, 3))]
    template = np.concatenate([joint + 0.06 * signs for joint in joints])
    return {
        "v_template": template,
        "shapedirs": np.zeros((192, 3, 10)),
        # A joint is the middle of its box.
        "J_regressor": np.kron(np.eye(24), np.ones((1, 8)) / 8),
        "weights": np.kron(np.eye(24), np.ones((8, 1))),
        "f": np.array(faces),
        "kintree_table": np.array([[2**32 - 1, *PARENTS[1:]], range(24)], dtype=np.int64),
    }
