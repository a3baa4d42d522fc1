"""AnimateAnyone: its files become one of ours, and the pipeline does what the original does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import systems as fam
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from truepose_core.errors import TruePoseError
from truepose_core.importing.convert import convert, expected_shapes
from truepose_core.importing.families.animate_anyone import AnimateAnyone
from truepose_core.models.config import Behaviour, TruePoseConfig, mannequin_config
from truepose_core.models.folder import load_image_encoder
from truepose_core.models.store import load_model, save_model
from truepose_core.pipeline import TruePosePipeline
from truepose_core.weights.strict import read_metadata

FAMILY = AnimateAnyone()


def plan(*files: dict, **choices: str):
    parts = [part for i, file in enumerate(files) for part in FAMILY.recognise(i, file)]
    return FAMILY.plan(parts, files, choices)


def full_size() -> list[dict]:
    unet = fam.meta(UNet2DConditionModel, **fam.SD15)
    guider = fam.meta(fam.pose_guider, 320)
    return [fam.infos(fam.without_output(unet)), fam.infos(unet), fam.infos(guider)]


@dataclass
class Original:
    """The system's parts, and the folder with its files."""

    source: UNet2DConditionModel
    target: UNet2DConditionModel
    guider: torch.nn.Module
    folder: Path
    files: list[Path]

    def step(
        self, image_embedding: Tensor, latent: Tensor, t: int, source: Tensor, pose: Tensor, scale: float
    ) -> Tensor:
        """Moore's denoising step: the unconditional row has the pose, zeros for a context and no source."""
        added, zeros = self.guider(pose), torch.zeros_like(image_embedding)
        with fam.reading(self.source) as bank:
            self.source(source, 0, image_embedding)
        full = fam.predict(self.target, latent, t, image_embedding, bank, added)
        without = fam.predict(self.target, latent, t, zeros, None, added)
        return without + scale * (full - without)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    folder = tmp_path_factory.mktemp("moore")
    source = fam.randomised(UNet2DConditionModel(**fam.SMALL), 1)
    target = fam.randomised(UNet2DConditionModel(**fam.SMALL), 2)
    guider = fam.randomised(fam.pose_guider(32), 3)
    files = fam.saved(
        folder,
        denoising_unet={**target.state_dict(), **fam.motion_module()},
        pose_guider=guider.state_dict(),
        reference_unet=fam.without_output(source.state_dict()),
    )
    fam.vae_folder(folder / "vae")
    fam.image_encoder_folder(folder / "image_encoder")
    convert(files, folder / "ours.safetensors")
    return Original(source, target, guider, folder, files)


def pipeline(original: Original) -> TruePosePipeline:
    model = load_model(original.folder / "ours.safetensors", vae=original.folder / "vae", verify=True)
    pipe = TruePosePipeline.from_model(model, image_encoder=load_image_encoder(original.folder / "image_encoder"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_full_size_files_convert_whole() -> None:
    files = full_size()
    assert [len(file) for file in files] == [682, 686, 16]
    made = plan(*files)
    assert expected_shapes(made.config) == {name: files[i][key].shape for name, (i, key) in made.tensors.items()}
    assert set(made.tensors.values()) == {(i, key) for i, file in enumerate(files) for key in file} and not made.ignored


def test_a_training_checkpoint_is_the_same_model() -> None:
    files, prefixes = full_size(), ("reference_unet.", "denoising_unet.", "pose_guider.")
    one = {prefix + key: info for prefix, file in zip(prefixes, files, strict=True) for key, info in file.items()}
    apart, together = plan(*files), plan(one)
    assert together.config == apart.config and together.tensors.keys() == apart.tensors.keys()


def test_the_motion_module_is_left_out() -> None:
    files = full_size()
    files[1] |= fam.infos(fam.motion_module())
    made = plan(*files, fam.infos(fam.motion_module()))
    assert len(made.ignored) == 4 and all("still pictures" in reason for reason in made.ignored.values())


def test_the_widths_of_the_pose_guider_are_read() -> None:
    *nets, _ = full_size()
    made = plan(*nets, fam.infos(fam.meta(fam.pose_guider, 320, (16, 32, 64, 128))))
    assert made.config["pose_widths"] == [16, 32, 64, 128]
    assert expected_shapes(made.config).keys() == made.tensors.keys()


def test_what_the_file_says(original: Original) -> None:
    metadata = read_metadata(original.folder / "ours.safetensors")
    config = TruePoseConfig.from_json(metadata["config"])
    assert metadata["licence"] == "not stated" and config.prediction_type == "v_prediction"
    assert config.behaviour == Behaviour(context="image", source_head=False, guidance=3.5)
    assert config.scheduler["rescale_betas_zero_snr"] and config.scheduler["beta_schedule"] == "linear"


def test_a_guided_step_is_the_originals(original: Original) -> None:
    pipe = pipeline(original)
    image, pose, noise = fam.picture(1), fam.picture(2), torch.randn(1, 4, *fam.LATENT)
    predictions, latents = fam.watch(pipe)
    pipe(image, fam.body(), fam.dressed(), num_inference_steps=3, pose_map=pose, latents=noise)
    embedding, source = pipe.encode_image(image), pipe.model.codec.encode(image)
    assert pipe.scheduler.timesteps.tolist() == [999, 666, 332]
    for prediction, latent, t in zip(predictions, latents, (999, 666, 332), strict=True):
        wanted = original.step(embedding, latent, t, source, pose, 3.5)
        assert float((prediction - wanted).abs().max()) < 1e-4


def test_hpfa_starts_as_the_original_and_can_be_turned(original: Original) -> None:
    pipe = pipeline(original)
    features = pipe.encode_source(fam.picture(1), fam.dressed(), fam.body())
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "pose_map": fam.picture(2)}

    def made(**more: object) -> Tensor:
        return pipe(features, fam.body(), **options, **more).images

    plain, ones = made(), torch.ones(7)
    assert torch.equal(made(beta=0.0, region_weights=ones), plain)
    no_background = torch.tensor([0.0, 1, 1, 1, 1, 1, 1])
    for more in ({"region_weights": no_background}, {"beta": 4.0}, {"strength": 0.3}):
        assert float((made(**more) - plain).abs().max()) > 1e-3, more


def test_the_embedding_is_transformers_own(original: Original) -> None:
    from transformers import CLIPImageProcessor

    pipe = pipeline(original)
    image = (fam.picture(1)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    side = pipe.image_encoder.config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    pixels = processor(Image.fromarray(image).resize((side, side)), return_tensors="pt").pixel_values
    wanted = pipe.image_encoder(pixels).image_embeds[:, None]
    torch.testing.assert_close(pipe.encode_image(fam.picture(1)), wanted, atol=1e-4, rtol=0)


def test_features_carry_the_embedding(original: Original) -> None:
    pipe = pipeline(original)
    features = pipe.encode_source(fam.picture(1), fam.dressed())
    torch.testing.assert_close(features.context, pipe.encode_image(fam.picture(1)))
    moved = features.to(dtype=torch.float64)
    assert moved.context.dtype == torch.float64 and moved.latent is None


def test_it_comes_back_from_a_save(original: Original, tmp_path: Path) -> None:
    model = pipeline(original).model
    again = save_model(model, tmp_path / "again.safetensors")
    assert read_metadata(again)["sha256"] == read_metadata(original.folder / "ours.safetensors")["sha256"]
    assert load_model(again, vae=original.folder / "vae").config == model.config


def test_older_files_have_the_behaviour_of_this_package() -> None:
    text = json.loads(mannequin_config().to_json())
    del text["behaviour"], text["vae"]
    assert TruePoseConfig.from_json(json.dumps(text)).to_json() == mannequin_config().to_json()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: [f[1], f[1], f[2]], "file 0 and file 1 are both a denoising net|reference net is missing"),
        (lambda f: [f[0], f[1]], "pose guider is missing"),
        (lambda f: [f[0], f[2]], "denoising net is missing"),
        (lambda f: [fam.infos(fam.motion_module())], "motion module alone"),
    ],
)
def test_a_set_that_is_not_whole_is_refused(change, words: str) -> None:
    with pytest.raises(TruePoseError, match=words):
        plan(*change(full_size()))


def test_nets_of_other_widths_are_refused() -> None:
    reference, _, guider = full_size()
    other = fam.infos(fam.meta(UNet2DConditionModel, **fam.SMALL))
    with pytest.raises(TruePoseError, match="block_out_channels"):
        plan(reference, other, guider)


def test_a_wrong_image_encoder_is_said(original: Original, tmp_path: Path) -> None:
    pipe = pipeline(original)
    pipe.register_modules(image_encoder=load_image_encoder(fam.image_encoder_folder(tmp_path, width=16)))
    with pytest.raises(TruePoseError, match="width 16 and the model reads 32"):
        pipe.encode_source(fam.picture(1), fam.dressed())
    pipe.register_modules(image_encoder=None)
    with pytest.raises(TruePoseError, match="--image-encoder"):
        pipe.encode_source(fam.picture(1), fam.dressed())


def test_training_goes_by_this_packages_rules(original: Original) -> None:
    with pytest.raises(TruePoseError, match="animate-anyone"):
        pipeline(original).model(*[None] * 9)
