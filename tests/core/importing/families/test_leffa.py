"""Leffa: one file for VAE and nets, a DensePose picture in conv_in, and the pipeline does what the original does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import systems as fam
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.functional import interpolate

from truepose_core.errors import TruePoseError
from truepose_core.guidance.scales import rescale_guidance
from truepose_core.importing.convert import convert, expected_shapes
from truepose_core.importing.families.leffa import NO_CROSS, NO_EMBEDDING, NO_OUTPUT, Leffa
from truepose_core.models.beside import scale_densepose
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.store import load_model, save_model
from truepose_core.pipeline import TruePosePipeline
from truepose_core.weights.strict import read_metadata

FAMILY = Leffa()
SMALL_SETTINGS = {"sd15": fam.SMALL, "sdxl": fam.SMALL_XL}


def plan(*files: dict, **choices: str):
    parts = [part for i, file in enumerate(files) for part in FAMILY.recognise(i, file)]
    return FAMILY.plan(parts, files, choices)


def full_size(unet: dict) -> dict:
    parts = {
        "vae.": fam.meta(AutoencoderKL, **fam.SD_VAE),
        "unet_encoder.": fam.meta(UNet2DConditionModel, **unet),
        "unet.": fam.meta(UNet2DConditionModel, **unet, in_channels=12),
    }
    return {name: info for prefix, weights in parts.items() for name, info in fam.infos(weights, prefix).items()}


@dataclass
class Original:
    """The system's parts, and the folder with its file."""

    source: UNet2DConditionModel
    target: UNet2DConditionModel
    vae: AutoencoderKL
    folder: Path
    wide: bool

    def step(self, latent: Tensor, t: int, source: Tensor, beside: Tensor, scale: float, read_at: int) -> Tensor:
        """Leffa's denoising step: both rows read SourceNet, the unconditional one a latent of zeros."""
        rows = []
        for reference in (torch.zeros_like(source), source):
            with fam.reading(self.source) as bank:
                self._run(self.source, reference, read_at)
            rows.append(self._run(self.target, torch.cat([latent, beside], 1), t, bank))
        without, full = rows
        guided = without + scale * (full - without)
        dims = (1, 2, 3)
        rescaled = guided * full.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
        return scale * rescaled + (1 - scale) * guided

    def _run(self, net: UNet2DConditionModel, x: Tensor, t: int, bank: dict | None = None) -> Tensor:
        for block in fam.blocks_of(net).values():
            block.attn2.set_processor(fam.Passed())
        return fam.predict(net, x, t, torch.zeros(1, 1, fam.CONTEXT), bank)


def make_original(kind: str, folder: Path) -> Original:
    # Leffa switches SDXL's added embedding off after the nets are made; its weights stay in the file.
    settings = SMALL_SETTINGS[kind]
    source, target = (
        fam.randomised(UNet2DConditionModel(**settings, in_channels=n), seed) for seed, n in ((1, 4), (2, 12))
    )
    for net in (source, target):
        net.register_to_config(addition_embed_type=None)
    vae = fam.randomised(AutoencoderKL(**fam.SMALL_VAE), 3)
    parts = {"vae": vae, "unet_encoder": source, "unet": target}
    weights = {f"{name}.{key}": x for name, part in parts.items() for key, x in part.state_dict().items()}
    convert(fam.saved(folder, leffa=weights), folder / "ours.safetensors")
    return Original(source, target, vae, folder, kind == "sdxl")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make_original(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tryon(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make_original("sd15", tmp_path_factory.mktemp("tryon"))


def pipeline(original: Original) -> TruePosePipeline:
    pipe = TruePosePipeline.from_model(load_model(original.folder / "ours.safetensors", verify=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def beside(original: Original, canvas: Tensor, mask: Tensor, densepose: Tensor) -> Tensor:
    """Mask, masked latent and DensePose, on Leffa's own scale -1..1."""
    kept = (2 * canvas - 1) * (mask < 0.5)
    scaling = 0.13025 if original.wide else 0.18215
    latent = original.vae.encode(kept).latent_dist.mean * scaling
    cells = (interpolate(x, fam.LATENT, mode="nearest") for x in (mask, 2 * densepose - 1))
    mask, densepose = cells
    return torch.cat([mask, latent, densepose], 1)


@pytest.mark.parametrize(("unet", "keys"), [(fam.SD15, 686), (fam.SDXL, 1680)])
def test_the_full_size_file_converts_whole(unet: dict, keys: int) -> None:
    file = full_size(unet)
    assert len(file) == 2 * keys + 248
    made = plan(file)
    assert expected_shapes(made.config) == {name: file[key].shape for name, (_, key) in made.tensors.items()}
    assert sum(name.startswith("codec.vae.") for name in made.tensors) == 248
    used = set(made.tensors.values())
    assert used | set(made.ignored) == {(0, key) for key in file} and not used & set(made.ignored)
    expected = {NO_CROSS, NO_OUTPUT} | ({NO_EMBEDDING} if keys == 1680 else set())
    assert set(made.ignored.values()) == expected


def test_what_the_file_says(original: Original) -> None:
    metadata = read_metadata(original.folder / "ours.safetensors")
    config = TruePoseConfig.from_json(metadata["config"])
    assert metadata["licence"] == "not stated" and ("SDXL" in metadata["title"]) == original.wide
    assert config.vae["scaling_factor"] == (0.13025 if original.wide else 0.18215)
    assert config.scheduler["rescale_betas_zero_snr"] is original.wide
    assert config.behaviour.channels == ("mask", "masked latent", "densepose")


def test_every_guided_step_is_the_originals(original: Original) -> None:
    pipe, image, densepose = pipeline(original), fam.picture(1), fam.picture(2)
    predictions, latents = fam.watch(pipe)
    pipe(image, fam.body(), fam.dressed(), num_inference_steps=3, pose_map={"densepose": densepose})
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.scheduler.timesteps.tolist() == [667, 334, 1]
    everywhere = beside(original, torch.full_like(image, 0.5), torch.ones(1, 1, *fam.SIZE), densepose)
    source = pipe.model.codec.encode(image)
    for prediction, latent, t in zip(predictions, latents, (667, 334, 1), strict=True):
        wanted = original.step(latent, t, source, everywhere, 2.5, t)
        assert float((prediction - wanted).abs().max()) < 1e-4


def test_a_mask_keeps_the_canvas_and_the_source_can_be_read_once(tryon: Original) -> None:
    pipe, image, canvas, densepose = pipeline(tryon), fam.picture(1), fam.picture(4), fam.picture(2)
    mask = torch.zeros(1, 1, *fam.SIZE)
    mask[..., 16:48, 8:40] = 1
    predictions, latents = fam.watch(pipe)
    more = {"canvas": canvas, "mask": mask, "guidance_source": 1.5, "source_once": True}
    pipe(image, fam.body(), fam.dressed(), num_inference_steps=3, pose_map={"densepose": densepose}, **more)
    source, channels = pipe.model.codec.encode(image), beside(tryon, canvas, mask, densepose)
    for prediction, latent, t in zip(predictions, latents, (667, 334, 1), strict=True):
        wanted = tryon.step(latent, t, source, channels, 1.5, 334)
        assert float((prediction - wanted).abs().max()) < 1e-4


def test_without_the_added_norm_it_would_be_another_model(tryon: Original) -> None:
    pipe = pipeline(tryon)
    predictions, _ = fam.watch(pipe)
    arguments = (fam.picture(1), fam.body(), fam.dressed())
    options = {"num_inference_steps": 1, "pose_map": {"densepose": fam.picture(2)}}
    pipe(*arguments, **options)
    for net in (pipe.model.target_net, pipe.model.source_net):
        for block in fam.blocks_of(net).values():
            block.attn2.forward = lambda x, *_, **__: torch.zeros_like(x)
    pipe(*arguments, **options)
    with_norm, without = predictions
    assert float((with_norm - without).abs().max()) > 0.1


def test_region_weights_and_match_work_without_training(tryon: Original) -> None:
    pipe = pipeline(tryon)
    features = pipe.encode_source(fam.picture(1), fam.dressed(), fam.body())
    assert not features.sites and features.latent is not None
    options = {"height": 64, "width": 64, "num_inference_steps": 1, "pose_map": {"densepose": fam.picture(2)}}

    def made(**more: object) -> Tensor:
        return pipe(features, fam.body(), **options, **more).images

    plain = made()
    assert torch.equal(made(region_weights=torch.ones(7), beta=0.0), plain)
    for more in ({"region_weights": torch.tensor([0.0, 1, 1, 1, 1, 1, 1])}, {"beta": 4.0}, {"strength": 0.2}):
        assert float((made(**more) - plain).abs().max()) > 1e-3, more
    nothing = made(region_weights=torch.zeros(7))
    # No source in either row: guidance has nothing to strengthen.
    torch.testing.assert_close(nothing, made(region_weights=torch.zeros(7), guidance_source=1.0), atol=1e-4, rtol=0)


def test_densepose_is_scaled_as_chosen() -> None:
    """0..255 as it is, or the part's number 0..24 to -1..1."""
    u, v, part = torch.tensor(51.0), torch.tensor(204.0), torch.tensor(6.0)
    picture = (torch.stack([v, u, part]) / 255)[None, :, None, None]
    torch.testing.assert_close(scale_densepose(picture, "127.5").flatten(), torch.stack([v, u, part]) / 127.5 - 1)
    wanted = torch.stack([v / 127.5 - 1, u / 127.5 - 1, part / 12 - 1])
    torch.testing.assert_close(scale_densepose(picture, "24").flatten(), wanted)
    assert plan(full_size(fam.SD15), densepose="24").config["behaviour"]["densepose"] == "24"
    with pytest.raises(TruePoseError, match=r"expected 127\.5 or 24"):
        plan(full_size(fam.SD15), densepose="12")


def test_rescaling_keeps_the_spread_of_the_full_prediction() -> None:
    guided, full = 3 * torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(rescale_guidance(guided, full, 0.0), guided)
    torch.testing.assert_close(rescale_guidance(guided, full, 1.0).flatten(1).std(1), full.flatten(1).std(1))


def test_it_comes_back_from_a_save_with_its_vae(tryon: Original, tmp_path: Path) -> None:
    model = pipeline(tryon).model
    again = save_model(model, tmp_path / "again.safetensors")
    assert read_metadata(again)["sha256"] == read_metadata(tryon.folder / "ours.safetensors")["sha256"]
    back = load_model(again, verify=True).state_dict()
    for name, x in model.state_dict().items():
        assert torch.equal(back[name], x), name
    assert not any(".attn2." in name for name in model.state_dict())
    with pytest.raises(TruePoseError, match="brings its own VAE"):
        load_model(again, vae=fam.vae_folder(tmp_path / "vae"))


def test_bad_input_is_said(tryon: Original) -> None:
    pipe = pipeline(tryon)
    features = pipe.encode_source(fam.picture(1), fam.dressed())
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    mask = torch.ones(1, 1, *fam.SIZE)
    with pytest.raises(TruePoseError, match="densepose missing"):
        pipe(features, fam.body(), **call)
    with pytest.raises(TruePoseError, match="belong together"):
        pipe(features, fam.body(), pose_map={"densepose": fam.picture(2)}, mask=mask, **call)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: {k: v for k, v in f.items() if not k.startswith("vae.")}, "the VAE missing"),
        (lambda f: {k: v for k, v in f.items() if not k.startswith("unet_encoder.")}, "reference net"),
        (lambda f: {**f, "unet.conv_in.weight": f["unet_encoder.conv_in.weight"]}, "expected 12 and 4"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(change, words: str) -> None:
    with pytest.raises(TruePoseError, match=words):
        plan(change(full_size(fam.SD15)))


def test_a_plain_unet_is_not_leffa() -> None:
    assert not FAMILY.recognise(0, fam.infos(fam.meta(UNet2DConditionModel, **fam.SD15), "unet."))
