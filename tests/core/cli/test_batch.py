"""Batches: every row once, the source read once for all its poses, and the same pictures whatever happens."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

from truepose_core.cli import main
from truepose_core.cli.batch.command import run_batch
from truepose_core.cli.batch.spec import Row, group_rows, option_words, read_spec
from truepose_core.cli.batch.store import Store
from truepose_core.cli.batch.work import on_workers
from truepose_core.cli.console import Console
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import render_people
from truepose_core.pictures.files import save_image
from truepose_core.pose import Person, Pose, write_pose
from truepose_core.workers import Workers

parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def table(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ the real thing


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Two mannequins with parsing and keypoints, and two poses."""
    folder = tmp_path_factory.mktemp("shop")
    made = render_people([3, 4], 1, "train", height=128, width=96)
    poses = render_people([5, 6], 1, "train", height=128, width=96)
    for i in range(2):
        save_image(made.image[i : i + 1], folder / f"p{i}.png")
        Image.fromarray(made.parsing[i].argmax(0).byte().numpy()).save(folder / f"p{i}-map.png")
        for name, points in ((f"p{i}", made.keypoints[i]), (f"pose{i}", poses.keypoints[i])):
            pose = Pose(96, 128, (Person(points.numpy()),))
            (folder / f"{name}.json").write_text(json.dumps(write_pose(pose)[0]))
    return folder


def rows_of(shop: Path) -> list[str]:
    person = [f"{shop}/p{i}.png,{shop}/p{i}-map.png,{shop}/p{i}.json" for i in range(2)]
    return [f"r{i}{k},{person[i]},{shop}/pose{k}.json" for i in range(2) for k in range(2)]


HEADER = "id,source,parsing,source-pose,pose"


def test_a_batch_makes_what_transfer_makes_and_reads_each_source_once(shop, tmp_path, monkeypatch, capsys):
    from truepose_core.pipeline import TruePosePipeline

    read = []
    encode = TruePosePipeline.encode_source
    monkeypatch.setattr(
        TruePosePipeline, "encode_source", lambda self, *args, **more: read.append(1) or encode(self, *args, **more)
    )
    spec = table(tmp_path / "spec.csv", HEADER, *rows_of(shop), f"bad,{shop}/p0.png,,{shop}/p0.json,{shop}/gone.json")
    out = tmp_path / "out"
    assert main(["batch", str(spec), "--out", str(out), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "1 of 5 rows failed, first bad: " in err and "the same command tries the failed ones again" in err
    assert len(read) == 2
    one = tmp_path / "one.png"
    argv = ["transfer", str(shop / "p1.png"), "--parsing", str(shop / "p1-map.png"), "--source-pose"]
    assert main([*argv, str(shop / "p1.json"), "--pose", str(shop / "pose0.json"), "--out", str(one), "--quiet"]) == 0
    assert (out / "pictures" / "r10.png").read_bytes() == one.read_bytes()
    report = parquet.read_table(out / "report.parquet").to_pylist()
    assert [row["status"] for row in report] == ["done"] * 4 + ["failed"]
    assert report[4]["error"]
    assert "mannequins" in report[0]["notes"]
    assert report[2]["sha256"] == hashlib.sha256(one.read_bytes()).hexdigest()
    assert "r10" in (out / "report.html").read_text()
    # Started again with a better row, it does that alone.
    read.clear()
    capsys.readouterr()
    table(spec, HEADER, *rows_of(shop), rows_of(shop)[0].replace("r00", "bad"))
    assert main(["batch", str(spec), "--out", str(out), "--json", "--quiet"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["done"], told["done before"], len(read)) == (5, 4, 1)
    assert (out / "pictures" / "bad.png").read_bytes() == (out / "pictures" / "r00.png").read_bytes()


def test_one_bad_pose_of_a_source_does_not_spoil_the_others(shop, tmp_path):
    rows = rows_of(shop)[:1]
    spec = table(tmp_path / "s.csv", HEADER, rows[0].replace("pose0", "gone").replace("r00", "a"), rows[0])
    assert main(["batch", str(spec), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    records = Store(str(tmp_path / "out")).records()
    assert records["r00"]["status"] == "done"
    assert "gone.json" in records["a"]["error"]


# ------------------------------------------------------------------------------------ the engine, on quick pictures


def small_picture(row: Row) -> bytes:
    """A picture that depends on the row alone."""
    digest = hashlib.sha256(f"{row.source}/{row.pose}".encode()).digest()
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), digest * 24).save(buffer, "PNG")
    return buffer.getvalue()


class Quick:
    """A painter whose worker dies at random, less often as time goes on; it notes each picture it made."""

    def __init__(self, folder: str, deadly: bool):
        self.folder, self.deadly = folder, deadly

    def __call__(self, base: tuple[str, ...]):
        self.chance = random.Random(os.getpid())
        return self.paint

    def paint(self, rows):
        for row in rows:
            if row.pose == "broken":
                raise TruePoseError("the pose is broken")
            if self.deadly and self.chance.random() < 0.004:
                os._exit(9)
            with open(Path(self.folder) / f"{row.id}.made", "ab") as note:
                note.write(b"x")
            yield row, small_picture(row), []


def jobs(sources: int, poses: int) -> list[Row]:
    return [Row(f"s{s}-p{p}", f"source{s}", f"pose{p}") for s in range(sources) for p in range(poses)]


def pictures(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "pictures").iterdir())}


def batch(rows, out, painter, *, base=(), poses=64, workers=None):
    """`run_batch` on workers, without a word."""
    console = Console(json_on_stdout=False, quiet=True)
    return run_batch(rows, str(out), base, on_workers(painter, workers or Workers()), poses, console)


def test_a_thousand_rows_whose_workers_are_killed_are_each_made_once(tmp_path):
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    # Workers cannot import tests.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rows = jobs(125, 8)
    for name in ("calm", "notes-a", "notes-b"):
        (tmp_path / name).mkdir()
    calm, wild = tmp_path / "calm-out", tmp_path / "wild-out"
    batch(rows, calm, Quick(str(tmp_path / "notes-a"), False), poses=8)
    painter = Quick(str(tmp_path / "notes-b"), True)
    report = batch(rows, wild, painter, poses=8, workers=Workers(2, cpus=0.5, retries=9))
    assert report["tried again"] > 0
    assert report["done"] == 1000
    assert pictures(wild) == pictures(calm) and len(pictures(calm)) == 1000
    made = [path.stat().st_size for path in (tmp_path / "notes-b").iterdir()]
    # A picture is made again only where its worker died between it and its record: never more often than workers died.
    assert len(made) == 1000 and sum(made) - 1000 <= report["tried again"]
    records = parquet.read_table(wild / "report.parquet").to_pylist()
    assert [r["id"] for r in records] == [row.id for row in rows]


def test_a_killed_batch_goes_on_where_it_was(tmp_path):
    rows = jobs(6, 4)
    (tmp_path / "notes").mkdir()
    out = tmp_path / "out"

    class Stopped(Quick):
        def paint(self, rows):
            for row, data, notes in super().paint(rows):
                if row.id == "s3-p2":
                    raise KeyboardInterrupt
                yield row, data, notes

    with pytest.raises(KeyboardInterrupt):
        batch(rows, out, Stopped(str(tmp_path / "notes"), False), poses=64)
    assert len(pictures(out)) == 14
    report = batch(rows, out, Quick(str(tmp_path / "notes"), False), poses=64)
    assert (report["done"], report["done before"]) == (24, 14)
    twice = {path.stem for path in (tmp_path / "notes").iterdir() if path.stat().st_size > 1}
    assert twice == {"s3-p2"}
    # Nothing is left to do; a lost picture, and rows with other options, are done again.
    assert batch(rows, out, Quick("", False), poses=64)["sources read"] == 0
    (out / "pictures" / "s0-p0.png").unlink()
    report = batch(rows, out, Quick(str(tmp_path / "notes"), False), poses=64)
    assert (report["done before"], report["sources read"]) == (23, 1)
    report = batch(rows, out, Quick(str(tmp_path / "notes"), False), base=("--seed=1",))
    assert report["done before"] == 0


def test_an_object_store_gets_the_same_files(tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    rows = [*jobs(2, 2), Row("bad", "source0", "broken")]
    (tmp_path / "notes").mkdir()
    for out in ("memory://shop/run", str(tmp_path / "run")):
        with pytest.raises(TruePoseError, match="1 of 5 rows failed, first bad: the pose is broken"):
            batch(rows, out, Quick(str(tmp_path / "notes"), False))
    system = fsspec.filesystem("memory")
    stored = {path.rpartition("/")[2]: system.cat_file(path) for path in system.ls("/shop/run/pictures", detail=False)}
    assert stored == pictures(tmp_path / "run")
    assert system.exists("/shop/run/report.parquet")
    report = batch(rows[:4], "memory://shop/run", Quick("", False))
    assert report["done before"] == 4


def test_memory_does_not_grow_with_the_batch(tmp_path):
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    (tmp_path / "notes").mkdir()
    seen = []

    class Weighed(Quick):
        def paint(self, rows):
            seen.append(psutil.Process().memory_info().rss)
            yield from super().paint(rows)

    batch(jobs(1000, 1), tmp_path / "out", Weighed(str(tmp_path / "notes"), False), poses=1)
    assert len(seen) == 1000
    assert max(seen[500:]) - max(seen[100:200]) < 8 * 2**20


# ------------------------------------------------------------------------------------------------------ the table


def test_tables_are_read_alike(tmp_path):
    import pyarrow as pa

    cells = {"id": ["a", "b"], "source": ["x.png", "x.png"], "pose": ["p", "q"], "seed": [None, 7]}
    parquet.write_table(pa.table(cells), tmp_path / "t.parquet")
    table(tmp_path / "t.csv", "id,source,pose,seed", "a,x.png,p,", "b, x.png ,q,7")
    expected = [Row("a", "x.png", "p"), Row("b", "x.png", "q", (("seed", "7"),))]
    assert read_spec(tmp_path / "t.csv") == read_spec(tmp_path / "t.parquet") == expected


def test_rows_are_grouped_by_source_and_options():
    seven = (("seed", "7"),)
    rows = [Row("1", "a", "p"), Row("2", "b", "p"), Row("3", "a", "q"), Row("4", "a", "r", seven), Row("5", "a", "s")]
    assert [[row.id for row in job.rows] for job in group_rows(rows, 2)] == [["1", "3"], ["5"], ["2"], ["4"]]


def test_cells_become_options():
    assert option_words("seed", "7") == ["--seed=7"]
    assert option_words("region", "face=1 'upper=0.5'") == ["--region", "face=1", "upper=0.5"]
    assert option_words("estimate-pose", "yes") == ["--estimate-pose"]
    assert option_words("estimate-pose", "no") == []
    with pytest.raises(TruePoseError, match="estimate-pose is 'perhaps'; expected yes or no"):
        option_words("estimate-pose", "perhaps")


def test_a_bad_row_of_the_table_is_told_and_the_rest_is_made(tmp_path):
    path = table(tmp_path / "t.csv", "id,source,pose,estimate-pose", "a,x,p,", "b,x", "../c,x,p,", "d,,p,", "e,x,p,hm")
    (tmp_path / "notes").mkdir()
    with pytest.raises(TruePoseError, match="4 of 5 rows failed, first row-000002: 2 cells"):
        batch(read_spec(path), tmp_path / "out", Quick(str(tmp_path / "notes"), False))
    records = Store(str(tmp_path / "out")).records()
    assert {name: record["status"] for name, record in records.items()} == {
        "a": "done",
        "row-000002": "failed",
        "row-000003": "failed",
        "d": "failed",
        "e": "failed",
    }
    assert "cannot be a file's name" in records["row-000003"]["error"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "id,source,pose\na,x,p\nA,x,q\n", "the id 'A' stands twice, in rows 1 and 2"),
        ("t.csv", "source\nx\n", "has the columns ['source']; expected source and pose"),
        ("t.csv", "source,pose,sparkle\n", "a column 'sparkle', which is no option of truepose transfer"),
        ("t.csv", "source,pose,out\n", "a column 'out'"),
        ("t.csv", "source,pose\n", "has no rows"),
        ("t.parquet", "no", "cannot be read as parquet"),
        ("t.xlsx", "", "has the suffix '.xlsx'; expected .csv or .parquet"),
    ],
)
def test_a_bad_table_is_one_line(tmp_path, capsys, name, text, message):
    (tmp_path / name).write_text(text)
    assert main(["batch", str(tmp_path / name), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (["--sparkle"], "unrecognized arguments: --sparkle"),
        (["--out", "x"], "--out behind --: the batch sets it itself"),
        (["photo.png"], "'photo.png' is no option; sources stand in the table"),
        (["--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
    ],
)
def test_bad_options_for_all_rows_are_one_line(tmp_path, capsys, base, message):
    spec = table(tmp_path / "t.csv", "source,pose", "x,p")
    assert main(["batch", str(spec), "--out", str(tmp_path / "out"), "--quiet", "--", *base]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    spec = table(tmp_path / "t.csv", "source,pose", "x,p")
    for module, extra, message in (
        ("pyarrow", [], "batches write and read parquet with pyarrow; install it with"),
        ("ray", ["--workers", "2"], "--workers needs Ray; install it with"),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert main(["batch", str(spec), "--out", str(tmp_path / "out"), "--quiet", *extra]) == 2
        assert message in capsys.readouterr().err


def test_a_full_disk_fails_rows_and_not_the_batch(tmp_path, monkeypatch):
    (tmp_path / "notes").mkdir()
    write = Store.write

    def full(self, name, data):
        if name == "pictures/s0-p1.png":
            raise TruePoseError(f"output {name} cannot be written: No space left on device")
        write(self, name, data)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(TruePoseError, match=r"1 of 4 rows failed, first s0-p1: .*No space left on device"):
        batch(jobs(2, 2), tmp_path / "out", Quick(str(tmp_path / "notes"), False))
    assert sorted(pictures(tmp_path / "out")) == ["s0-p0.png", "s1-p0.png", "s1-p1.png"]
