"""`truepose transfer` with Stable Diffusion folders: small ones of the real shapes, random weights."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from truepose_core.cli import main
from truepose_core.cli.demo import render_inputs
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pipeline import TruePosePipeline

UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}
KINDS = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    },
}


def make_folder(path, kind):
    """A folder in diffusers format with small random nets."""
    torch.manual_seed(0)
    UNet2DConditionModel(**UNET, **KINDS[kind]).save_pretrained(path / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
    )
    vae.save_pretrained(path / "vae")
    # SDXL folders come with Euler.
    scheduler = DDIMScheduler if kind == "sd15" else EulerDiscreteScheduler
    scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").save_pretrained(path / "scheduler")
    return path


def add_text(path):
    """A text encoder that knows the letters a to e."""
    words = ["<|startoftext|>", "<|endoftext|>", *(c + end for c in "abcde" for end in ("", "</w>"))]
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 8, "pad_token": "<|endoftext|>"})
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(path / "text_encoder")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, content in render_inputs().items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            save_image(content, folder / name)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_folder(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def command(inputs, model, out, *more):
    words = ["transfer", inputs / "person.png", "--parsing", inputs / "person-parsing.png", "--model", model]
    words += ["--pose", inputs / "wave.json", "--source-pose", inputs / "person-pose.json", "--out", out]
    return [str(word) for word in [*words, "--device", "cpu", "--size", "72x100", "--steps", "2", *more]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_size_asked_for(capsys, inputs, folders, tmp_path, kind):
    out = tmp_path / "out.png"
    assert main(command(inputs, folders[kind], out, "--json")) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["family"] == kind
    assert load_image(out).shape == (1, 3, 100, 72)
    assert "mannequins only" not in captured.err
    assert any("without --controlnet" in note for note in report["notes"])
    assert any("the source is read at 73x98 pixels" in note for note in report["notes"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_with_regions_of_another_picture(monkeypatch, inputs, folders, tmp_path, kind):
    call, read = TruePosePipeline.__call__, []
    monkeypatch.setattr(TruePosePipeline, "__call__", lambda pipe, x, *a, **k: read.append(x) or call(pipe, x, *a, **k))
    photo, parsing, pose = (inputs / name for name in ("person.png", "person-parsing.png", "person-pose.json"))
    donor = tmp_path / "large.png"
    save_image(torch.nn.functional.interpolate(load_image(photo), scale_factor=2), donor)
    words = ["transfer", photo, "--parsing", parsing, "--source-pose", pose, "--pose", inputs / "wave.json", "--frame"]
    words += ["72x104", "--model", folders[kind], "--device", "cpu", "--steps", "1", "--retarget"]
    words += ["--from", f"upper={donor}", "--from-parsing", parsing, "--from-pose", pose]
    for name, more in {"crop": (), "whole": ("--paste-back",)}.items():
        assert main([str(word) for word in (*words, "--out", tmp_path / f"{name}.png", *more)]) == 0
    assert load_image(tmp_path / "crop.png").shape == (1, 3, 104, 72)
    assert load_image(tmp_path / "whole.png").shape == load_image(photo).shape
    # The same person at another scale, cropped to the same size, is the same picture but for resampling.
    own, other = read[0].parts
    assert own.latent_size == other.latent_size
    for site in own.sites:
        torch.testing.assert_close(own.regions(site), other.regions(site), atol=0.1, rtol=0)
    torch.testing.assert_close(own.body, other.body, atol=0.02, rtol=0)


def test_options_reach_a_folders_model(inputs, folders, tmp_path):
    def picture(*options):
        assert main(command(inputs, folders["sd15"], tmp_path / "out.png", "--overwrite", *options)) == 0
        return (tmp_path / "out.png").read_bytes()

    plain = picture()
    assert picture() == plain
    for options in (
        ("--beta", "0"),
        ("--gamma", "8"),
        ("--region", "background=0"),
        ("--strength", "0"),
        ("--guidance-source", "2"),
        ("--seed", "1"),
        ("--dtype", "bfloat16"),
        ("--source-reading", "once"),
        ("--source-reading", "every-step"),
        ("--levels", "1"),
    ):
        assert picture(*options) != plain, options


def test_how_a_source_is_read_is_refused_where_it_has_no_say(capsys, inputs, folders, tmp_path):
    out = tmp_path / "out.png"
    for options, words in (
        (("--source-reading", "once", "--levels", "2"), "--levels is for --source-reading noise-levels"),
        (("--source-reading", "every-step", "--from", f"upper={inputs / 'person.png'}"), "--from is not for"),
    ):
        assert main(command(inputs, folders["sd15"], out, *options)) == 2
        assert words in capsys.readouterr().err
    assert main(command(inputs, "bundled", out, "--levels", "2")) == 2
    assert "says how it was trained to read its source" in capsys.readouterr().err


def test_a_controlnet_carries_the_pose(capsys, inputs, folders, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folders["sd15"] / "unet")
    controlnet = ControlNetModel.from_unet(unet)
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight)
    torch.nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight)
    controlnet.save_pretrained(tmp_path / "controlnet")
    option = ("--controlnet", tmp_path / "controlnet")
    assert main(command(inputs, folders["sd15"], tmp_path / "a.png", *option)) == 0
    assert "without --controlnet" not in capsys.readouterr().err
    assert main(command(inputs, folders["sd15"], tmp_path / "b.png")) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_prompt_is_read_by_folders_that_read_text(capsys, inputs, folders, tmp_path):
    out = tmp_path / "out.png"
    assert main(command(inputs, folders["sd15"], out, "--prompt", "a cab")) == 2
    assert "has no text_encoder, so it cannot read the prompt 'a cab'" in capsys.readouterr().err
    assert not out.exists()
    folder = make_folder(tmp_path / "with-text", "sd15")
    add_text(folder)
    pictures = []
    for prompt in ("a cab", "bed"):
        assert main(command(inputs, folder, out, "--overwrite", "--prompt", prompt)) == 0
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


def test_incomplete_folders_are_refused(capsys, inputs, tmp_path):
    import shutil

    folder = make_folder(tmp_path / "model", "sd15")
    out = tmp_path / "out.png"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    cases = []

    def check(message):
        assert main(command(inputs, folder, out)) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "error: " in err
        assert not out.exists()
        cases.append(message)

    weights.write_bytes(whole[: len(whole) // 2])
    check("cannot be loaded as UNet2DConditionModel")
    weights.unlink()
    check("cannot be loaded as UNet2DConditionModel")
    weights.write_bytes(whole)
    shutil.rmtree(folder / "scheduler")
    check("has no scheduler/scheduler_config.json")
    shutil.rmtree(folder / "vae")
    check("has no config.json; expected a AutoencoderKL folder")
