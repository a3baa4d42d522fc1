"""Prepared data sets: every published layout gives the same samples, done once, whole, and told in a manifest."""

from __future__ import annotations

import csv
import errno
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets_fixture import HEIGHT, POSES, WIDTH, People
from PIL import Image

from truepose_core.cli import main
from truepose_core.datasets import layouts
from truepose_core.datasets.layouts import key_of
from truepose_core.datasets.pairs import Pair, in_shop_name, read_pair_list
from truepose_core.datasets.prepare import Options, prepare
from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.workers import Workers

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def people():
    return People()


@pytest.fixture(scope="module")
def fashion(people, tmp_path_factory):
    """The whole fixture, 200 pictures, as CFLD lays them out."""
    root = tmp_path_factory.mktemp("cfld") / "fashion"
    people.cfld(root)
    return root


@pytest.fixture(scope="module")
def prepared(fashion, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "shards"
    manifest = prepare(layouts.read_deepfashion(fashion), out, Options(), shard_size=64)
    return out, manifest


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    shards = [str(path) for path in sorted(out.glob("*.tar"))]
    return {sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)}


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_every_picture_is_there_once_with_all_its_parts(people, prepared):
    out, manifest = prepared
    assert manifest["counts"] == {
        "pictures": 200,
        "failures": 0,
        "shards": 4,
        "pairs": {"train": 135, "test": 15},
        "pairs left out": {"train": 0, "test": 0},
    }
    found = samples(out)
    assert sorted(found) == sorted(key_of("img/" + people.listed(n)) for n in range(people.count))
    for n in (0, 77, 199):
        sample = found[key_of(people.listed(n))]
        assert set(sample) >= {"jpg", "parsing.png", "pose.json", "body.npy", "json"}
        assert np.asarray(Image.open(io.BytesIO(sample["jpg"]))).shape == (HEIGHT, WIDTH, 3)
        labels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(sample["parsing.png"]))).copy())
        assert not HumanParsing.from_labels(labels).is_empty
        assert np.load(io.BytesIO(sample["body.npy"])).shape == (85,)
        (person,) = json.loads(sample["pose.json"])["people"]
        points = np.array(person["pose_keypoints_2d"]).reshape(18, 3)
        there = people.keypoints[n][:, 2] > 0
        assert ((points[:, 2] > 0) == there).all()
        # The table rounds to pixels of 256x176.
        assert np.abs(points[there, :2] / (WIDTH, HEIGHT) - people.keypoints[n][there, :2]).max() < 0.6 / 176
        about = json.loads(sample["json"])
        assert (about["width"], about["height"], about["group"]) == (WIDTH, HEIGHT, f"{n // POSES:08d}")
    with (out / "pairs-train.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert rows[0] == {"from": key_of(people.listed(0)), "to": key_of(people.listed(1))}
    assert {name for row in rows for name in row.values()} <= set(found)


def test_again_does_nothing_and_ends_with_the_same_bytes(fashion, prepared, tmp_path, monkeypatch):
    out, _ = prepared
    before = files(out)
    monkeypatch.setattr("truepose_core.datasets.prepare.run_jobs", None)
    prepare(layouts.read_deepfashion(fashion), out, Options(), shard_size=64)
    assert files(out) == before


def test_an_interrupted_shard_is_done_again_and_the_others_are_not(fashion, prepared, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(prepared[0], out)
    wanted = files(out)
    # Killed while it wrote: a shard cut short, one without its note, what a temporary file leaves, no manifest.
    (out / "shard-000001.tar").write_bytes(wanted["shard-000001.tar"][:1000])
    (out / "shard-000003.json").unlink()
    (out / "manifest.json").unlink()
    from truepose_core.datasets import prepare as room

    done, run_jobs = [], room.run_jobs

    def watched(make, jobs, workers):
        done.extend(job.name for job in jobs)
        return run_jobs(make, jobs, workers)

    monkeypatch.setattr(room, "run_jobs", watched)
    prepare(layouts.read_deepfashion(fashion), out, Options(), shard_size=64)
    assert done == ["shard-000001", "shard-000003"]
    assert files(out) == wanted


@pytest.mark.parametrize("layout", ["pidm", "pcdms", "fasion"])
def test_the_layouts_say_the_same(layout, fashion, tmp_path):
    small = People(2)
    root = tmp_path / layout
    small.cfld(root, layout) if layout == "fasion" else getattr(small, layout)(root)
    source = layouts.read_deepfashion(root)
    assert source.layout == ("cfld" if layout == "fasion" else layout)
    keys = [key_of(small.listed(n)) for n in range(small.count)]
    assert list(source.records) == sorted(keys)
    pairs = [pair for listed in source.pairs.values() for pair in listed]
    assert sorted(pairs) == sorted((keys[a], keys[b]) for a, b in small.pairs())
    assert all(r.picture and r.picture.parent.name != "train_lst_256_png" for r in source.records.values())
    prepare(source, tmp_path / "out", Options(), shard_size=5)
    found = samples(tmp_path / "out")
    for n, key in enumerate(keys):
        points = np.array(json.loads(found[key]["pose.json"])["people"][0]["pose_keypoints_2d"]).reshape(18, 3)
        there = small.keypoints[n][:, 2] > 0
        assert np.abs(points[there, :2] / (WIDTH, HEIGHT) - small.keypoints[n][there, :2]).max() < 0.6 / 176


def test_photos_in_folders_are_pairs_within_their_folder(tmp_path):
    small = People(2)
    small.groups(tmp_path / "shop", small.count)
    out = tmp_path / "out"
    assert main(["data", "prepare", "folder", str(tmp_path / "shop"), "--out", str(out), "--quiet"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["pictures"] == 8
    assert manifest["counts"]["pairs"] == {"train": 2 * 4 * 3}
    sample = samples(out)["garment 1-view_2"]
    # The label map beside the photo is taken, not made.
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample["parsing.png"]))), small.labels[6])
    assert sample["png"] == (tmp_path / "shop" / "garment 1" / "view.2.png").read_bytes()


def test_a_folder_with_pairs_csv_is_read_as_training_reads_it(tmp_path):
    small = People(1)
    for n in range(2):
        small.save(tmp_path / "images" / f"p{n}.png", n)
        small.beside(tmp_path, f"p{n}", n)
    (tmp_path / "pairs.csv").write_text("from,to\np0.png,p1.png\np1.png,gone.png\n")
    manifest = prepare(layouts.read_folder(tmp_path), tmp_path / "out", Options())
    assert manifest["counts"]["pairs"] == {"train": 1}
    assert manifest["counts"]["pairs left out"] == {"train": 1}
    assert manifest["failures"] == [{"name": "gone.png", "reason": "the picture does not exist"}]


def test_mannequins_have_their_true_bodies(tmp_path):
    from truepose_core.mannequin import render_people

    argv = ["data", "prepare", "mannequin", "--people", "2", "--poses", "2", "--size", "48x32", "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    made = render_people([1], 2, "train", height=48, width=32)
    sample = samples(tmp_path / "out")["person000001-pose01"]
    numbers = np.load(io.BytesIO(sample["body.npy"]))
    truth = torch.cat([x[1].flatten() for x in (made.theta, made.beta, made.camera)]).numpy()
    assert np.allclose(numbers, truth, atol=1e-6)
    seen = torch.from_numpy(np.asarray(Image.open(io.BytesIO(sample["png"]))).copy()).permute(2, 0, 1) / 255
    assert (seen - made.image[1]).abs().max() <= 0.5 / 255 + 1e-6


def test_what_cannot_be_prepared_is_left_out_and_told(tmp_path):
    small = People(3)
    root = tmp_path / "root"
    small.cfld(root)
    names = [root / "img" / small.listed(n) for n in range(small.count)]
    names[0].unlink()
    names[5].write_bytes(b"no picture")
    table = root / "fashion-resize-annotation-train.csv"
    lines = table.read_text().splitlines()
    few = str([10, 20] + [-1] * 16)
    lines = [f"{line.split(':')[0]}: {few}: {few}" if in_shop_name(small.listed(1)) in line else line for line in lines]
    table.write_text("\n".join(line for line in lines if in_shop_name(small.listed(2)) not in line) + "\n")
    manifest = prepare(layouts.read_deepfashion(root), tmp_path / "out", Options())
    reasons = {failure["name"]: failure["reason"] for failure in manifest["failures"]}
    assert set(reasons) == {in_shop_name(small.listed(n)) for n in (0, 1, 2, 5)}
    assert "does not exist" in reasons[in_shop_name(small.listed(0))]
    assert "no keypoints" in reasons[in_shop_name(small.listed(2))]
    assert "is not an image" in reasons[in_shop_name(small.listed(5))]
    # Of the first person's three pairs none is whole, of the second's two.
    assert sum(manifest["counts"]["pairs"].values()) == 2 + 3
    assert manifest["counts"]["pictures"] == 8


def test_a_full_disk_stops_with_what_is_written(tmp_path, monkeypatch, capsys):
    small = People(2)
    small.groups(tmp_path / "shop", 8)
    from truepose_core.datasets import prepare as room

    real = room._write_shard

    def full(shard, sampler, writer):
        if shard.number == 1:
            raise TruePoseError(f"output {shard.name}.tar cannot be written: {errno.errorcode[errno.ENOSPC]}")
        return real(shard, sampler, writer)

    argv = ["data", "prepare", "folder", str(tmp_path / "shop"), "--out", str(tmp_path / "out"), "--shard-size", "3"]
    monkeypatch.setattr(room, "_write_shard", full)
    assert main([*argv, "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "1 of 3 shards could not be written, first shard-000001: " in err
    assert "ENOSPC" in err and "the same command goes on" in err
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(room, "_write_shard", real)
    assert main([*argv, "--quiet"]) == 0
    assert len(samples(tmp_path / "out")) == 8


def test_a_disk_that_refuses_leaves_no_part_of_a_shard(tmp_path, monkeypatch):
    small = People(1)
    small.groups(tmp_path / "shop", 4)

    class Full(webdataset.TarWriter):
        def write(self, sample):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("truepose_core.datasets.prepare._tar_writer", lambda: Full)
    with pytest.raises(TruePoseError, match=r"shards could not be written.*No space left on device"):
        prepare(layouts.read_folder(tmp_path / "shop"), tmp_path / "out", Options())
    assert list((tmp_path / "out").iterdir()) == []


def test_other_data_in_the_folder_is_kept(prepared, tmp_path):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(prepared[0], out)
    source = layouts.mannequin_source(1, 2)
    with pytest.raises(TruePoseError, match="holds a data set of other pictures or options"):
        prepare(source, out, Options(size=(48, 32)))
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "version": 7}))
    with pytest.raises(TruePoseError, match="of version 7; this truepose reads and writes version 1"):
        prepare(source, out, Options(size=(48, 32)))
    (out / "manifest.json").unlink()
    with pytest.raises(TruePoseError, match="holds shards of other pictures or options"):
        prepare(source, out, Options(size=(48, 32)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(TruePoseError, match=r"holds letter\.txt, which is no shard"):
        prepare(source, tmp_path / "mine", Options(size=(48, 32)))


def test_two_pictures_of_one_key_are_refused(tmp_path):
    small = People(1)
    for name in ("g/a.b.png", "g/a_b.png"):
        small.save(tmp_path / name, 0)
    with pytest.raises(TruePoseError, match="would both be called g-a_b"):
        layouts.read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "pairs"),
    [
        ("a.csv", "from,to\nx.jpg,y.jpg\n", [Pair("x.jpg", "y.jpg")]),
        ("a.csv", "to,from,result\nx.jpg,y.jpg,r.png\n", [Pair("y.jpg", "x.jpg", "r.png")]),
        ("train_pairs.txt", "t.jpg,s.jpg,u.jpg\n\n", [Pair("s.jpg", "t.jpg"), Pair("u.jpg", "t.jpg")]),
        ("a.json", '[{"source_image": "s.jpg", "target_image": "t.jpg"}]', [Pair("s.jpg", "t.jpg")]),
    ],
)
def test_lists_of_pairs(tmp_path, name, text, pairs):
    (tmp_path / name).write_text(text)
    assert read_pair_list(tmp_path / name) == pairs


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{}", "is not a list"),
        ("a.json", '[{"source_image": "s"}]', "entry 0: expected"),
        ("a.json", "[]", "lists no pair"),
        ("a.txt", "alone\n", "line 1: 'alone'; expected target,source"),
        ("a.xml", "", "has the suffix '.xml'"),
        ("a.csv", "from\nx\n", "has the columns"),
    ],
)
def test_bad_lists_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(TruePoseError, match=message):
        read_pair_list(tmp_path / name)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["folder"], "data prepare folder needs the folder of the data"),
        (["mannequin", "here"], "takes no folder (here)"),
        (["mannequin", "--estimate-pose"], "--estimate-pose is for photographs"),
        (["folder", ".", "--layout", "cfld"], "--layout belongs to deepfashion"),
        (["folder", "."], "holds neither pairs.csv nor folders of pictures"),
        (["deepfashion", "."], "holds no list of pairs; expected"),
        (["mannequin", "--gpus", "1"], "--address and --gpus are of Ray workers"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", *argv, "--out", "out", "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ray_workers_write_the_same_bytes(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    source = layouts.mannequin_source(4, 2)
    options = Options(size=(48, 32), poses=2)
    for name, count in (("alone", 0), ("two", 2)):
        prepare(source, tmp_path / name, options, shard_size=2, workers=Workers(count, cpus=0.5))
    assert files(tmp_path / "alone") == files(tmp_path / "two")
