"""The source's style in diffusers' UNets, and `truepose transfer --style`."""

from __future__ import annotations

import json

import pytest
import torch
from cli.test_folder import make_folder
from PIL import Image
from pipeline.test_noise_levels import person, sigma_of
from small import small_model

from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.models.folder import load_folder
from truepose_core.models.store import save_model
from truepose_core.pictures.files import load_image, save_image
from truepose_core.pipeline import TruePosePipeline

PLACES = {"output.0", "output.1"}
"""Of a UNet of two levels with one layer each: a sixth of 4 input blocks is none."""


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def pipe(request, tmp_path_factory):
    opened = load_folder(make_folder(tmp_path_factory.mktemp("folder") / request.param, request.param))
    pipe = TruePosePipeline.from_model(opened.model, opened.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transfer(pipe, features, steps=2, **more):
    body = torch.full((1, 18, 3), 0.5)
    more = {"guidance_source": 1.0, "seed": 3, **more}
    return pipe(features, body, height=64, width=64, num_inference_steps=steps, **more).images


def spread(h):
    return h.mean((2, 3), keepdim=True), h.std((2, 3), keepdim=True, correction=0)


def test_moments_become_the_sources(pipe):
    """What the first up block's layers are given: the picture's channels first, then those of the skip connection."""
    features = pipe.encode_source(*person(), source_reading="once")
    assert set(features.style) == PLACES
    up, seen, hooks = pipe.model.target_net.up_blocks, {}, []
    resnets = [resnet for block in up for resnet in block.resnets][: len(PLACES)]
    for number, resnet in enumerate(resnets):

        def look(module, args, number=number):
            seen[f"output.{number}"] = args[0][:, : features.style[f"output.{number}"][0].shape[1]].clone()

        hooks.append(resnet.register_forward_pre_hook(look))
    try:
        transfer(pipe, features, steps=1, style=1.0, region_weights=torch.zeros(7))
    finally:
        for hook in hooks:
            hook.remove()
    assert set(seen) == PLACES
    for place, h in seen.items():
        for found, expected in zip(spread(h), features.style[place], strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_the_source_is_read_without_its_own_style(pipe):
    """The two nets of a folder are one: reading at every step in between must not put the style on."""
    once, anew = (pipe.encode_source(*person(), source_reading=how) for how in ("once", "every step"))
    before = pipe.model.read_noised(anew, 500, sigma_of(pipe, 500), None, None)
    transfer(pipe, anew, style=1.0)
    again = pipe.model.read_noised(anew, 500, sigma_of(pipe, 500), None, None)
    assert set(before.style) == set(once.style) == PLACES
    for place, found in before.style.items():
        assert all(torch.equal(a, b) for a, b in zip(found, again.style[place], strict=True))


def test_none_is_none_and_a_share_lies_between(pipe):
    for reading in ("once", "noise levels", "every step"):
        features = pipe.encode_source(*person(), source_reading=reading)
        none = transfer(pipe, features)
        assert torch.equal(transfer(pipe, features, style=0.0), none)
        assert torch.equal(transfer(pipe, features, style=1.0, strength=0.0), transfer(pipe, features, strength=0.0))
        away = [float((transfer(pipe, features, style=s) - none).norm()) for s in (0.01, 0.1, 1.0)]
        assert 0 < away[0] < away[1] < away[2]
        nobody = torch.zeros(7)
        assert not torch.equal(
            transfer(pipe, features, style=1.0, region_weights=nobody),
            transfer(pipe, features, region_weights=nobody),
        )


def test_each_pose_has_the_style_of_its_source(pipe):
    (image, parsing), (other, second) = person(0), person(1)
    both = pipe.encode_source(
        torch.cat([image, other]), type(parsing)(torch.cat([parsing.masks, second.masks])), source_reading="once"
    )
    body, more = torch.full((4, 18, 3), 0.5), {"height": 64, "width": 64, "num_inference_steps": 1, "style": 0.5}
    four = pipe(both, body, **more, seed=[3] * 4, guidance_source=1.0).images
    for rows, (picture, parsed) in ((four[:2], (image, parsing)), (four[2:], (other, second))):
        alone = pipe.encode_source(picture, parsed, source_reading="once")
        two = pipe(alone, body[:2], **more, seed=[3] * 2, guidance_source=1.0).images
        torch.testing.assert_close(rows, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("style", [-0.1, 1.1, float("nan")])
def test_a_style_out_of_range(pipe, style):
    with pytest.raises(TruePoseError, match="expected 0 to 1"):
        transfer(pipe, pipe.encode_source(*person()), style=style)


def refused(capsys, *more):
    code = main(["transfer", "person.png", "--pose", "gallery:waving", "--out", "out.png", "--style", "0.5", *more])
    assert code == 2
    return capsys.readouterr().err


def test_the_command_line_refuses_what_cannot_take_it(tmp_path, capsys):
    assert "--strength 0 leaves that out" in refused(capsys, "--strength", "0")
    path = str(tmp_path / "none.safetensors")
    save_model(small_model("none", caa=False), path)
    assert "reads no source at its attentions" in refused(capsys, "--model", path)


def test_the_command_line_takes_it(tmp_path, capsys):
    """0 is the picture without the option, and the report says the style."""
    make_folder(tmp_path / "sd", "sd15")
    image, parsing = person()
    save_image(image, tmp_path / "person.png")
    Image.fromarray(parsing.labels()[0].byte().numpy()).save(tmp_path / "map.png")
    pictures = {}
    for style in (None, 0.0, 0.8):
        out = str(tmp_path / f"{style}.png")
        line = ["transfer", str(tmp_path / "person.png"), "--parsing", str(tmp_path / "map.png"), "--model"]
        line += [str(tmp_path / "sd"), "--pose", "gallery:waving", "--out", out, "--steps", "2", "--json"]
        assert main(line if style is None else [*line, "--style", str(style)]) == 0
        assert json.loads(capsys.readouterr().out)["style"] == (style or 0)
        pictures[style] = load_image(out)
    assert torch.equal(pictures[0.0], pictures[None]) and not torch.equal(pictures[0.0], pictures[0.8])
