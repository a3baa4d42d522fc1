"""A real photograph through `truepose transfer`: any size asked for comes out, from both kinds of model."""

from __future__ import annotations

import json

import photo
import pytest
from PIL import Image

from truepose_core.cli import main

pytest.importorskip("skimage")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return photo.make(tmp_path_factory.mktemp("photo"))


def sd_folder(path):
    """Stable Diffusion 1.5's topology at small widths, random weights, in diffusers format."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=64, block_out_channels=(32, 64, 64, 64), cross_attention_dim=768, attention_head_dim=8
    ).save_pretrained(path / "unet")
    AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        sample_size=512,
    ).save_pretrained(path / "vae")
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(path / "scheduler")
    return path


def transfer(files, out, capsys, *options):
    source, parsing, pose, target = map(str, files)
    arguments = [source, "--parsing", parsing, "--source-pose", pose, "--pose", target, "--size", "512x768"]
    code = main(["transfer", *arguments, "--steps", "2", "--out", str(out), *options])
    return code, capsys.readouterr()


def test_the_bundled_model_says_that_it_knows_mannequins_only(files, tmp_path, capsys):
    code, said = transfer(files, tmp_path / "a.png", capsys)
    assert code == 0, said.err
    assert Image.open(tmp_path / "a.png").size == (512, 768)
    text = said.out + said.err
    assert "mannequin" in text and "peak memory" in text


def test_from_keypoints_alone(files, tmp_path, capsys):
    pytest.importorskip("cv2")
    source, _, pose, target = map(str, files)
    words = ["transfer", source, "--source-pose", pose, "--parser", "keypoints", "--retarget", "--frame", "--json"]
    out = tmp_path / "waving.png"
    assert main([*words, "--pose", "gallery:waving", "--steps", "1", "--out", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["size"], report["parsing"], report["cut"]) == ([192, 256], "from keypoints", ["left", "bottom"])
    assert Image.open(out).size == (192, 256)
    out = tmp_path / "whole.png"
    assert main([*words, "--paste-back", "--pose", target, "--steps", "1", "--out", str(out)]) == 0
    assert Image.open(out).size == (512, 512)


def test_a_stable_diffusion_folder(files, tmp_path, capsys):
    folder = sd_folder(tmp_path / "sd")
    code, said = transfer(files, tmp_path / "b.png", capsys, "--model", str(folder), "--json")
    assert code == 0, said.err
    assert Image.open(tmp_path / "b.png").size == (512, 768)
    assert json.loads(said.out)
