"""Training on pairs of pictures, from Stable Diffusion weights."""

from __future__ import annotations

import json

import pytest
import torch
from cli.test_real_photo import sd_folder
from PIL import Image

from truepose_core.cli import main
from truepose_core.datasets.pairs import read_pairs
from truepose_core.errors import TruePoseError
from truepose_core.mannequin import render_people
from truepose_core.models.store import load_model
from truepose_core.pose import Person, Pose, write_pose
from truepose_core.training.folder import FolderPairs
from truepose_core.training.train import Trainer, TrainingConfig


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two people in two poses each, as a folder of photographs would be laid out; one of another shape."""
    folder = tmp_path_factory.mktemp("pairs")
    for part in ("images", "parsing", "poses"):
        (folder / part).mkdir()
    for number, (height, width) in enumerate([(96, 64), (64, 64)]):
        made = render_people([number], 2, "train", height=height, width=width)
        for k in range(2):
            name = f"p{number}-{k}"
            picture = (made.image[k].permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(picture).save(folder / "images" / f"{name}.png")
            Image.fromarray(made.parsing[k].argmax(0).byte().numpy()).save(folder / "parsing" / f"{name}.png")
            pose = Pose(width, height, (Person(made.keypoints[k].numpy()),))
            (folder / "poses" / f"{name}.json").write_text(json.dumps(write_pose(pose)[0]))
    (folder / "pairs.csv").write_text("from,to\np0-0.png,p0-1.png\np1-0.png,p1-1.png\np1-1.png,p1-0.png\n")
    return folder


def test_a_batch_depends_on_seed_and_step_alone(pairs):
    one, two = FolderPairs(pairs, (64, 48), seed=3), FolderPairs(pairs, (64, 48), seed=3, step=1)
    first = one.batch(2, 2)
    assert first.source_image.shape == (2, 3, 64, 48) and first.target_image.shape == (4, 3, 64, 48)
    assert torch.allclose(first.target_parsing.masks.sum(1), torch.ones(4, 64, 48))
    one.advance()
    assert torch.equal(one.batch(2, 2).target_image, two.batch(2, 2).target_image)


def test_targets_show_the_person_of_their_source(pairs):
    data = FolderPairs(pairs, (64, 48))
    batch = data.batch(3, 1)
    wanted = {name: [data.load(t)[0] for t in targets] for name, targets in data.targets.items()}
    for image, target in zip(batch.source_image, batch.target_image, strict=True):
        (name,) = [n for n in data.sources if torch.equal(data.load(n)[0], image)]
        assert any(torch.equal(target, t) for t in wanted[name])


@pytest.mark.parametrize("text", ["\ufefffrom,to\n{a},{b}\n", "from, to\r\n {a}, {b}\r\n\r\n", 'to,from\n"{b}","{a}"'])
def test_pairs_as_other_programs_write_them_are_read(tmp_path, text):
    (tmp_path / "pairs.csv").write_bytes(text.format(a="ä 1.png", b="b.png").encode())
    assert read_pairs(tmp_path / "pairs.csv") == [("ä 1.png", "b.png")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"from,to\na.png,b.png\na.png\n", "line 3: 1 columns.*has 2"),
        (b"from,to\na,1.png,b.png\n", "line 2: 3 columns.*quotes"),
        (b"from,to\n,b.png\n", "line 2: a name is empty"),
        ("from,to\nä.png,b.png\n".encode("latin-1"), "not text in UTF-8 .byte 0xe4.*save it"),
        ("from,to\na.png,b.png\n".encode("utf-16"), "not text in UTF-8"),
        (b'from,to\n"a.png,b.png\n', "line 2.*quote closed"),
        (b'from,to\n"a.png,b.png\n' + b"a.png,b.png\n" * 20_000, "line .*quote closed"),
        (b"from,to\n" + b"a" * 300 + b".png,b.png\n", r"pairs\.csv needs do not exist: .*\(304 characters\)"),
        (b"", "expected 'from' and 'to'"),
        (b"from,to\n", "lists no pair"),
    ],
)
def test_damaged_pairs_are_one_clear_line(tmp_path, content, said):
    for part, ending in (("images", "png"), ("parsing", "png"), ("poses", "json")):
        (tmp_path / part).mkdir()
        for stem in "ab":
            (tmp_path / part / f"{stem}.{ending}").touch()
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(TruePoseError, match=rf"{said}"):
        FolderPairs(tmp_path, (64, 48))


def test_missing_files_and_columns_are_named(pairs, tmp_path):
    with pytest.raises(TruePoseError, match=r"pairs\.csv does not exist"):
        FolderPairs(tmp_path, (64, 48))
    (tmp_path / "pairs.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TruePoseError, match="expected 'from' and 'to'"):
        FolderPairs(tmp_path, (64, 48))
    (tmp_path / "pairs.csv").write_text("from,to\nx.png,y.png\n")
    with pytest.raises(TruePoseError, match=r"6 files .* do not exist: .*x\.png"):
        FolderPairs(tmp_path, (64, 48))


def test_training_from_stable_diffusion_weights(pairs, tmp_path):
    base = sd_folder(tmp_path / "sd")
    config = TrainingConfig(
        row="HPFA", base=str(base), data=str(pairs), height=64, width=64, steps=2, sources=1, targets=1,
        sample_every=2, save_every=1, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run", quiet=True)
    model = trainer.model
    assert model.source_net is not model.target_net, "two nets that learn on their own"
    for a, b in zip(model.source_net.parameters(), model.target_net.parameters(), strict=True):
        assert torch.equal(a, b), "which start from the same weights"
    assert all(not p.requires_grad for p in model.codec.parameters()), "the VAE stays as it is"
    assert all(float(site.beta.abs().max()) == 0 == float(site.gamma.abs().max()) for site in model.hpfa.values())
    before = model.target_net.conv_in.weight.clone()
    weights = trainer.run()
    assert not torch.equal(before, model.target_net.conv_in.weight)
    assert (tmp_path / "run" / "sample-000002.png").is_file()
    again = load_model(weights, vae=base)
    assert again.config.fusion == "hpfa" and again.config.prediction_type == "epsilon"
    with pytest.raises(TruePoseError, match="latents of a VAE"):
        load_model(weights)


def test_a_clip_tower_from_scratch_is_refused_with_a_base():
    with pytest.raises(TruePoseError, match="take pose, concat or HPFA"):
        TrainingConfig(row="HPFA+CAA", base="somewhere").build()


def test_the_command_line_takes_a_trained_file_with_its_vae(pairs, tmp_path, capsys):
    base = sd_folder(tmp_path / "sd")
    config = TrainingConfig(
        row="concat", base=str(base), height=64, width=64, steps=1, sources=1, targets=1, people=1, poses=2, fresh=0
    )
    weights = Trainer(config, tmp_path / "run", quiet=True).run()
    source = ["transfer", str(pairs / "images" / "p1-0.png"), "--parsing", str(pairs / "parsing" / "p1-0.png")]
    poses = ["--source-pose", str(pairs / "poses" / "p1-0.json"), "--pose", str(pairs / "poses" / "p1-1.json")]
    out = tmp_path / "out.png"
    command = [*source, *poses, "--steps", "1", "--model", str(weights), "--out", str(out)]
    assert main([*command, "--vae", str(base)]) == 0, capsys.readouterr().err
    assert Image.open(out).size == (64, 64)
    assert main([*command, "--overwrite"]) == 2
    assert "--vae" in capsys.readouterr().err
