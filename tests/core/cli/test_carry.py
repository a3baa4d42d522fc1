"""`truepose carry`: pictures, poses and bodies as files, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from body.test_smpl import box_body, saved

from truepose_core.body.person import PosedBody, carry_person, lift_person
from truepose_core.body.pose import BodyPose
from truepose_core.body.reading import write_body
from truepose_core.cli import carry, main
from truepose_core.cli.demo import render_person
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pose import Person, Pose, body_tensor, read_pose, write_pose
from truepose_core.pose.gallery import gallery_pose

HEIGHT, WIDTH = 128, 96
POSE = ("--source-pose", "a-pose.json")
MAP = ("--parsing", "a-map.png")
WAVE = ("--pose", "wave.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A mannequin (a.png, a-map.png, a-pose.json, a-body.npz), a pose and a body, an SMPL file of boxes."""
    folder = tmp_path_factory.mktemp("carry")
    views = render_person(5, ("stand", "wave"), (HEIGHT, WIDTH))
    save_image(views.image[:1], folder / "a.png")
    save_image(HumanParsing.from_labels(views.parsing[:1].argmax(1)).preview(), folder / "a-map.png")
    bodies = PosedBody(BodyPose(views.theta, views.beta, views.camera), (WIDTH, HEIGHT))
    for i, name in enumerate(("a", "wave")):
        pose = write_pose(Pose(WIDTH, HEIGHT, (Person(views.keypoints[i].numpy()),)))
        (folder / ("a-pose.json" if name == "a" else "wave.json")).write_text(json.dumps(pose))
        write_body(folder / f"{name}-body.npz", bodies.pose.select([i]), bodies.canvas)
    saved(folder, box_body())
    return folder


class Command:
    """`truepose carry` in the folder: its report, and the tensors that it writes."""

    def __init__(self, folder: Path, out: Path, capsys, monkeypatch):
        self.folder, self.out, self.capsys, self.results = folder, out, capsys, []
        write = carry._write

        def kept(results, *more) -> None:
            self.results = results
            write(results, *more)

        monkeypatch.setattr(carry, "_write", kept)
        monkeypatch.chdir(folder)

    def argv(self, *words, out=None):
        return [str(x) for x in ("carry", "a.png", "--out", out or self.out, "--device", "cpu", *words)]

    def __call__(self, *words, **more) -> dict:
        code = main([*self.argv(*words, **more), "--json", "--overwrite"])
        said = self.capsys.readouterr()
        assert code == 0, said.err
        return json.loads(said.out)

    def refused(self, message, *words, **more) -> None:
        before = sorted(self.out.parent.rglob("*"))
        code = main(self.argv(*words, **more))
        said = self.capsys.readouterr()
        errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
        assert (code, said.out, len(errors)) == (2, "", 1), said.err
        assert message in errors[0]
        assert sorted(self.out.parent.rglob("*")) == before


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    return Command(folder, tmp_path / "out" / "result.png", capsys, monkeypatch)


def points(file) -> torch.Tensor:
    return body_tensor(read_pose(file)[0].people)


def test_the_command_is_the_core_function(run):
    report = run(*MAP, *POSE, *WAVE)
    image, parsing = load_image("a.png"), HumanParsing.from_label_image("a-map.png")
    wanted = carry_person(image, parsing, points("a-pose.json"), points("wave.json"))
    (made,) = run.results
    for name in ("picture", "seen", "depth", "normal"):
        torch.testing.assert_close(getattr(made, name), getattr(wanted, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.parsing.masks, wanted.parsing.masks, atol=1e-5, rtol=0)
    torch.testing.assert_close(load_image(run.out), wanted.picture, atol=0.51 / 255, rtol=0)
    assert report["outputs"][0]["seen"] == pytest.approx(carry.shown(wanted)) and 0.3 < carry.shown(wanted) < 1
    assert report["parsing"] == "a-map.png" and report["method"] == "body" and report["girth"] is True


def test_several_poses_fill_folders_and_all_outputs_are_written(run, tmp_path):
    kinds = ("seen", "depth", "normal", "parsing-out")
    asked = [word for kind in kinds for word in (f"--{kind}", tmp_path / kind)]
    poses = ("--pose", "wave.json", "gallery:walking", "--body", "wave-body.npz")
    report = run(*MAP, *POSE, *poses, *asked, out=tmp_path / "results")
    names = ["wave.png", "walking.png", "wave-body.png"]
    for kind in ("results", *kinds):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == sorted(names)
    assert [x["pose"] for x in report["outputs"]] == ["wave.json", "gallery:walking", "wave-body.npz"]
    for name, result in zip(names, run.results, strict=True):
        read = HumanParsing.from_label_image(tmp_path / "parsing-out" / name)
        assert torch.equal(read.labels(), result.parsing.labels())
        seen = load_image(tmp_path / "seen" / name)[:, :1]
        assert torch.equal(seen, result.seen)
    together = run.results[2].picture
    run(*MAP, *POSE, "--body", "wave-body.npz")
    assert torch.equal(run.results[0].picture, together)


def test_bodies_from_files_are_taken_as_they_are(run):
    run(*MAP, "--source-body", "a-body.npz", "--body", "wave-body.npz")
    (made,) = run.results
    source, target = (PosedBody(_body(f"{name}-body.npz"), (WIDTH, HEIGHT)) for name in ("a", "wave"))
    image, parsing = load_image("a.png"), HumanParsing.from_label_image("a-map.png")
    wanted = carry_person(image, parsing, source, target)
    assert torch.equal(made.picture, wanted.picture) and torch.equal(made.target.pose.theta, target.pose.theta)
    # Either side may be keypoints.
    for words in (("--source-body", "a-body.npz", *WAVE), (*POSE, "--body", "wave-body.npz")):
        run(*MAP, *words)
        assert float((run.results[0].seen * made.seen).sum() / made.seen.sum()) > 0.6


def test_a_framed_source_takes_its_body_along(run):
    """The crop of the picture with the body in it is the crop of the body."""
    frame = ("--frame", "192x256", "--pose", "gallery:standing", "--no-girth")
    run(*MAP, "--source-body", "a-body.npz", *frame)
    (made,) = run.results
    assert made.picture.shape == (1, 3, 256, 192) and made.source.canvas == (192, 256)
    share = float((made.source.render(256, 192).mask > 0).float().mean())
    assert 0.15 < share < 0.7 and carry.shown(made) > 0.5


def test_skeleton_mirror_and_girth(run):
    run(*MAP, *POSE, *WAVE, "--method", "skeleton", "--seen", run.out.with_name("seen.png"))
    assert run.results[0].depth is None and run.results[0].seen.any()
    run(*MAP, *POSE, "--pose", "gallery:back")
    plain = carry.shown(run.results[0])
    run(*MAP, *POSE, "--pose", "gallery:back", "--mirror", "front-back")
    assert carry.shown(run.results[0]) > plain
    run(*MAP, *POSE, *WAVE, "--no-girth")
    assert run.results[0].source.girth is None


def test_an_smpl_file_draws_the_bodies(run):
    run(*MAP, *POSE, *WAVE, "--smpl", "smpl.npz")
    (made,) = run.results
    assert made.source.smpl is not None and made.seen.any()
    wanted = lift_person(points("a-pose.json"), (WIDTH, HEIGHT), smpl=made.source.smpl)
    assert torch.equal(wanted.body.pose.theta, made.source.pose.theta)


def test_the_canvas_of_a_target_may_have_another_shape(run, tmp_path):
    (tmp_path / "square.json").write_text(json.dumps(write_pose(gallery_pose("waving", 256, 256))))
    report = run(*MAP, *POSE, "--pose", tmp_path / "square.json", "--size", "160x120")
    assert report["size"] == [160, 120] and run.results[0].picture.shape == (1, 3, 120, 160)


def test_what_is_refused(run, tmp_path):
    (tmp_path / "wide.json").write_text(json.dumps(write_pose(gallery_pose("waving", 256, 256))))
    few = read_pose("wave.json")[0].people[0].body.copy()
    few[4:] = 0
    (tmp_path / "few.json").write_text(json.dumps(write_pose(Pose(WIDTH, HEIGHT, (Person(few),)))))
    (tmp_path / "nobody.json").write_text(json.dumps(write_pose(Pose(WIDTH, HEIGHT, ()))))
    stored = json.loads(write_body(tmp_path / "b.json", _body("a-body.npz"), (WIDTH, HEIGHT)).read_text())
    degrees = stored | {"theta": [[[90.0, 0, 0]] * 24]}
    (tmp_path / "degrees.json").write_text(json.dumps(degrees))
    (tmp_path / "away.json").write_text(json.dumps(stored | {"camera": [[0.5, 5.0, 0.0]]}))
    (tmp_path / "square-body.json").write_text(json.dumps(stored | {"canvas": [128, 128]}))
    shutil.copy("a.png", tmp_path / "kept.png")
    for words, message in (
        ((*POSE, *WAVE), "the source needs its human parsing"),
        ((*MAP, *POSE), "--pose is missing"),
        ((*MAP, *WAVE), "carrying needs the person's keypoints or body"),
        ((*MAP, *POSE, "--pose", tmp_path / "nobody.json"), "no person"),
        ((*MAP, "--source-pose", tmp_path / "wide.json", *WAVE), "canvas of 256x256 and the source is 96x128"),
        ((*MAP, "--source-pose", tmp_path / "few.json", *WAVE), "4 visible keypoints in common"),
        ((*MAP, "--source-body", tmp_path / "square-body.json", *WAVE), "canvas of 128x128 and the picture is 96x128"),
        ((*MAP, *POSE, "--body", tmp_path / "degrees.json"), "look like degrees"),
        ((*MAP, *POSE, "--body", tmp_path / "away.json"), "lie outside the 96x128 picture"),
        ((*MAP, *POSE, "--body", "a.png"), "expected .npz or .json"),
        ((*MAP, *POSE, "--body", "wave-body.npz", "--retarget"), "--retarget moves keypoints"),
        ((*MAP, *POSE, *WAVE, "--smpl", "wave-body.npz"), "has no v_template"),
        ((*MAP, *POSE, *WAVE, "--method", "skeleton", "--depth", tmp_path / "d.png"), "--method skeleton has none"),
        ((*MAP, *POSE, *WAVE, "--method", "skeleton", "--mirror", "both"), "the skeleton knows no other side"),
        ((*MAP, *POSE, *WAVE, "--seen", run.out), "is named for the picture and the seen"),
        ((*MAP, *POSE, *WAVE, "--seen", tmp_path / "kept.png"), "exists already and is kept"),
        ((*MAP, *POSE, *WAVE, "--parsing-out", tmp_path / "p.jpg"), "a label map must not be smoothed"),
        ((*MAP, *POSE, *WAVE, "--pose", "gallery:walking"), "give a folder"),
    ):
        run.refused(message, *words)


def _body(file: str) -> BodyPose:
    from truepose_core.body.reading import read_body

    return read_body(file)[0]
