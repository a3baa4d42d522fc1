"""champ: four guidance encoders beside AnimateAnyone's nets, and the pipeline does what the original does."""

from __future__ import annotations

from pathlib import Path

import pytest
import systems as fam
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.importing.convert import convert, expected_shapes
from truepose_core.importing.families.champ import NOT_RUN, Champ
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.folder import load_image_encoder
from truepose_core.models.store import load_model
from truepose_core.pipeline import TruePosePipeline
from truepose_core.weights.strict import read_metadata

FAMILY = Champ()
THEIRS = ("depth", "normal", "semantic_map", "dwpose")
OURS = ("depth", "normal", "semantic_map", "skeleton")


def plan(*files: dict, **choices: str):
    parts = [part for i, file in enumerate(files) for part in FAMILY.recognise(i, file)]
    return FAMILY.plan(parts, files, choices)


def full_size(encoders: int = 4) -> list[dict]:
    unet = fam.meta(UNet2DConditionModel, **fam.SD15)
    encoder = fam.infos(fam.meta(fam.GuidanceEncoder, 320))
    return [fam.infos(fam.without_output(unet)), fam.infos(unet), *[encoder] * encoders]


@pytest.fixture(scope="module")
def nets() -> dict[str, torch.nn.Module]:
    parts = {
        "reference_unet": UNet2DConditionModel(**fam.SMALL),
        "denoising_unet": UNet2DConditionModel(**fam.SMALL),
        **{f"guidance_encoder_{name}": fam.GuidanceEncoder(32) for name in THEIRS},
    }
    return {name: fam.randomised(net, seed) for seed, (name, net) in enumerate(parts.items())}


@pytest.fixture(scope="module")
def folder(nets: dict[str, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("champ")
    weights = {name: net.state_dict() for name, net in nets.items()}
    weights["reference_unet"] = fam.without_output(weights["reference_unet"])
    files = fam.saved(path, **weights)
    fam.vae_folder(path / "vae")
    fam.image_encoder_folder(path / "image_encoder")
    convert(files, path / "ours.safetensors", choices={"maps": ",".join(THEIRS)})
    return path


def pipeline(folder: Path) -> TruePosePipeline:
    model = load_model(folder / "ours.safetensors", vae=folder / "vae", verify=True)
    pipe = TruePosePipeline.from_model(model, image_encoder=load_image_encoder(folder / "image_encoder"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def maps() -> dict[str, Tensor]:
    return {name: fam.picture(20 + i) for i, name in enumerate(OURS)}


def test_the_full_size_files_convert_whole() -> None:
    files = full_size()
    assert [len(file) for file in files] == [682, 686, 149, 149, 149, 149]
    made = plan(*files, maps=",".join(THEIRS))
    assert expected_shapes(made.config) == {name: files[i][key].shape for name, (i, key) in made.tensors.items()}
    used, everything = set(made.tensors.values()), {(i, key) for i, file in enumerate(files) for key in file}
    assert used | set(made.ignored) == everything and not used & set(made.ignored)
    assert [sum(i == file for i, _ in used) for file in range(2, 6)] == [35] * 4
    assert set(made.ignored.values()) == {NOT_RUN}


def test_a_training_checkpoint_names_its_encoders() -> None:
    files = full_size()
    prefixes = ("reference_unet.", "denoising_unet.", *(f"guidance_encoder_{name}." for name in THEIRS))
    one = {prefix + key: info for prefix, file in zip(prefixes, files, strict=True) for key, info in file.items()}
    apart, together = plan(*files, maps=",".join(THEIRS)), plan(one)
    assert together.config == apart.config and together.tensors.keys() == apart.tensors.keys()
    with pytest.raises(TruePoseError, match="leave out the choice maps"):
        plan(one, maps="depth,normal,semantic_map,dwpose")


def test_the_user_says_which_encoder_is_which() -> None:
    files = full_size()
    made = plan(*files, maps="dwpose,depth,semantic_map,normal")
    assert {name: made.tensors[f"pose_encoder.{name}.conv_in.weight"][0] for name in OURS} == {
        "skeleton": 2,
        "depth": 3,
        "semantic_map": 4,
        "normal": 5,
    }
    assert tuple(made.config["behaviour"]["pose_maps"]) == OURS


@pytest.mark.parametrize("maps", [None, "depth,normal", "depth,depth,normal,dwpose", "depth,normal,semantic_map,shade"])
def test_an_unclear_choice_of_maps_is_refused(maps: str | None) -> None:
    choices = {} if maps is None else {"maps": maps}
    with pytest.raises(TruePoseError, match="--choose maps=depth,normal,semantic_map,dwpose"):
        plan(*full_size(), **choices)


def test_one_encoder_alone_is_a_model_too() -> None:
    made = plan(*full_size(1), maps="dwpose")
    assert expected_shapes(made.config).keys() == made.tensors.keys()


def test_no_encoder_is_refused() -> None:
    with pytest.raises(TruePoseError, match="no guidance encoder"):
        plan(*full_size(0))


def test_what_the_file_says(folder: Path) -> None:
    config = TruePoseConfig.from_json(read_metadata(folder / "ours.safetensors")["config"])
    assert config.behaviour.pose_maps == OURS and config.behaviour.pose_attention
    assert config.behaviour.context == "image" and config.scheduler["rescale_betas_zero_snr"]


def test_an_encoder_is_the_originals(folder: Path, nets: dict[str, torch.nn.Module]) -> None:
    model = pipeline(folder).model
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        wanted = nets[f"guidance_encoder_{theirs}"](fam.picture(3))
        torch.testing.assert_close(model.encode_pose({ours: fam.picture(3)}), wanted, atol=1e-5, rtol=1e-5)


def test_a_guided_step_is_the_originals(folder: Path, nets: dict[str, torch.nn.Module]) -> None:
    pipe, image, noise = pipeline(folder), fam.picture(1), torch.randn(1, 4, *fam.LATENT)
    predictions, latents = fam.watch(pipe)
    pipe(image, fam.body(), fam.dressed(), num_inference_steps=2, pose_map=maps(), latents=noise)
    embedding, source = pipe.encode_image(image), pipe.model.codec.encode(image)
    pictures = zip(THEIRS, maps().values(), strict=True)
    added = sum(nets[f"guidance_encoder_{name}"](picture) for name, picture in pictures)
    target = nets["denoising_unet"]
    with fam.reading(nets["reference_unet"]) as bank:
        nets["reference_unet"](source, 0, embedding)
    for prediction, latent, t in zip(predictions, latents, (999, 499), strict=True):
        full = fam.predict(target, latent, t, embedding, bank, added)
        without = fam.predict(target, latent, t, torch.zeros_like(embedding), None, added)
        assert float((prediction - (without + 3.5 * (full - without))).abs().max()) < 1e-4


def test_maps_are_named_or_left_out_in_words(folder: Path) -> None:
    pipe = pipeline(folder)
    features = pipe.encode_source(fam.picture(1), fam.dressed())

    def made(pose_map: object) -> Tensor:
        return pipe(features, fam.body(), height=64, width=64, num_inference_steps=1, pose_map=pose_map).images

    with pytest.raises(TruePoseError, match="depth, normal, semantic_map missing"):
        made(None)
    with pytest.raises(TruePoseError, match="densepose unknown"):
        made({**maps(), "densepose": fam.picture(1)})
    with pytest.raises(TruePoseError, match="at least one"):
        made(dict.fromkeys(OURS))
    # Each map adds its own part, so one that is left out takes its part with it.
    encode = pipe.model.encode_pose
    parts = {name: encode({name: picture}) for name, picture in maps().items()}
    some = {name: maps()[name] for name in ("semantic_map", "skeleton")}
    torch.testing.assert_close(encode(some), encode(maps()) - parts["depth"] - parts["normal"], atol=1e-5, rtol=1e-5)
    # The skeleton is drawn where it is not given.
    assert made({"depth": None, "normal": None, "semantic_map": None}).shape == (1, 3, 64, 64)
