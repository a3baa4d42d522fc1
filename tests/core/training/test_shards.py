"""Training from prepared shards: the samples of the folder they were made of, read by processes without overlap."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets_fixture import HEIGHT, WIDTH, People
from safetensors.torch import load_file

from truepose_core.datasets.layouts import read_folder
from truepose_core.datasets.prepare import Options, prepare
from truepose_core.datasets.shards import Shards
from truepose_core.errors import TruePoseError
from truepose_core.training.folder import FolderPairs, ShardPairs, pairs_of
from truepose_core.weights.strict import read_metadata

pytest.importorskip("webdataset", reason="webdataset is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight pictures of two people as a folder with pairs.csv, and prepared; every one is the source of a pair."""
    root = tmp_path_factory.mktemp("data")
    people = People(2)
    for n in range(people.count):
        people.save(root / "folder" / "images" / f"p{n}.png", n)
        people.beside(root / "folder", f"p{n}", n)
    rows = [f"p{n}.png,p{n // 4 * 4 + (n + 1) % 4}.png\n" for n in range(8)]
    (root / "folder" / "pairs.csv").write_text("from,to\n" + "".join(rows))
    prepare(read_folder(root / "folder"), root / "shards", Options(), shard_size=3)
    return root


def test_shards_hold_what_the_folder_holds(folders):
    size = (64, 48)
    folder, shards = (pairs_of(str(folders / name), size, 0, 0, 1) for name in ("folder", "shards"))
    assert (type(folder), type(shards)) == (FolderPairs, ShardPairs)
    assert [name.removesuffix(".png") for name in folder.sources] == shards.sources
    for name in shards.sources:
        for one, other in zip(folder.load(f"{name}.png"), shards.load(name), strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_processes_read_an_epoch_once_and_together_what_one_reads(folders):
    def names(processes: int, rank: int, steps: int, sources: int):
        pool = ShardPairs(folders / "shards", (64, 48), seed=5, processes=processes)
        found = []
        for _ in range(steps):
            found.append(pool.chosen(sources, 1, rank))
            pool.advance()
        return found

    alone = names(1, 0, 2, 4)
    assert sorted(name for step in alone for name in step[0]) == [f"p{n}" for n in range(8)]
    two = [names(2, rank, 2, 2) for rank in range(2)]
    for step in range(2):
        for part in range(2):
            assert alone[step][part] == two[0][step][part] + two[1][step][part]
    # The next epoch has another order, and a run that goes on is where it was.
    assert names(1, 0, 4, 4)[2:] != alone
    resumed = ShardPairs(folders / "shards", (64, 48), seed=5, step=1)
    assert resumed.chosen(4, 1, 0) == alone[1]


def gradients(out) -> dict[str, torch.Tensor]:
    """After one step Adam's first moment is a tenth of the gradient."""
    tensors = load_file(out / "checkpoint" / "state.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("optimizer.exp_avg.")}


def test_two_processes_have_the_gradients_of_one_with_twice_the_batch(folders, tmp_path):
    train = ["-m", "truepose_core.cli", "train", "--row", "HPFA", "--steps", "1", "--targets", "1", "--warmup", "1"]
    train += ["--data", str(folders / "shards"), "--height", "32", "--width", "24", "--clip", "1e9", "--quiet"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # What `accelerate launch` starts on several GPUs; on CPUs it would want MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    for name, start, sources in (("one", [], "4"), ("two", launch, "2")):
        argv = [sys.executable, *start, *train, "--out", str(tmp_path / name), "--sources", sources]
        done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (gradients(tmp_path / name) for name in ("one", "two"))
    assert json.loads(read_metadata(tmp_path / "two" / "weights.safetensors")["training"])["processes"] == 2
    assert one.keys() == two.keys() and len(one) > 100
    scale = max(value.abs().max().item() for value in one.values())
    assert scale > 0
    for name, value in one.items():
        assert (value - two[name]).abs().max().item() < 1e-5 * scale, name


def test_damaged_shards_are_told(folders, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folders / "shards", copy)
    with pytest.raises(TruePoseError, match="holds no sample 'p9'"):
        Shards(copy).load("p9")
    path = copy / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(TruePoseError, match=r"shard-000001\.tar is missing or cut short; run truepose data prepare"):
        Shards(copy).keys()


def test_samples_are_of_the_pictures_size(folders):
    sample = Shards(folders / "shards").load("p0")
    assert sample.image.shape == (1, 3, HEIGHT, WIDTH)
    assert sample.parsing.size == (HEIGHT, WIDTH)
