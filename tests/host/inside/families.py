"""Weights of other systems through the host: read as they are published, and one step against this package's pipeline
(which is compared with the originals in tests/core and docs/parity.md)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import comfy.clip_vision
import comfy.model_management
import comfy.samplers
import folder_paths
import pytest
import torch
from bench import split
from pack.nodes.host import model as host_model
from pack.nodes.host import nets as host_nets
from pack.nodes.host import patch as host_patch
from pack.nodes.model import ApplyPoseEncoder, EmptyLatent, LoadModel, PictureContext
from pack.nodes.source import ApplyHPFA, CombineSources, SourceNetEncode
from torch import Tensor

pytest.importorskip("diffusers", reason="the small checkpoints are made with diffusers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "core"))
import systems as fam
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from truepose_core.errors import TruePoseError
from truepose_core.importing.convert import convert
from truepose_core.models.codec import VAECodec
from truepose_core.models.config import SD_SCHEDULE, TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import load_model, save_model
from truepose_core.pipeline import TruePosePipeline
from truepose_core.regions import REGION_NAMES
from truepose_core.weights.strict import load_strict, read_metadata

ONES = dict.fromkeys(REGION_NAMES, 1.0)
LEFFA = ("leffa-sd15", "leffa-sdxl")
STEPS = 4
CHAMP = ("depth", "normal", "semantic_map", "dwpose")
LIMIT = 1e-4


def folder() -> Path:
    path = Path(folder_paths.get_folder_paths("truepose")[0])
    path.mkdir(parents=True, exist_ok=True)
    return path


def unets(settings: dict, channels: int = 4) -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    source = fam.randomised(UNet2DConditionModel(**settings), 1)
    return source, fam.randomised(UNet2DConditionModel(**settings, in_channels=channels), 2)


@lru_cache
def small_vae() -> AutoencoderKL:
    return fam.randomised(AutoencoderKL(**fam.SMALL_VAE), 7)


@lru_cache
def files(kind: str) -> tuple[Path, ...]:
    """A small checkpoint of that system, as it is published."""
    if kind.startswith("leffa"):
        source, target = unets(fam.SMALL_XL if kind == "leffa-sdxl" else fam.SMALL, 12)
        parts = {"vae": small_vae(), "unet_encoder": source, "unet": target}
        weights = {f"{name}.{key}": x for name, part in parts.items() for key, x in part.state_dict().items()}
        return tuple(fam.saved(folder(), **{kind: weights}))
    source, target = unets(fam.SMALL)
    encoders = {"pose_guider": fam.pose_guider(32)}
    if kind == "champ":
        encoders = {f"guidance_{name}": fam.GuidanceEncoder(32) for name in CHAMP}
    weights = {
        f"{kind}_reference_unet": fam.without_output(source.state_dict()),
        f"{kind}_denoising_unet": target.state_dict(),
        **{name: fam.randomised(net, 3 + i).state_dict() for i, (name, net) in enumerate(encoders.items())},
    }
    return tuple(fam.saved(folder(), **weights))


def choices(kind: str) -> str:
    return f"maps={','.join(CHAMP)}" if kind == "champ" else ""


def run(node: type, **inputs: object) -> tuple:
    return node.execute(**inputs).result


@dataclass(frozen=True)
class Both:
    """The same weights in the host and in the core."""

    target: object
    source: object
    vae: object
    adapter: host_model.Adapter
    empty: list
    core: TruePoseModel


@lru_cache
def both(kind: str) -> Both:
    first, *rest = (path.name for path in files(kind))
    outputs = run(LoadModel, file=first, more_files="\n".join(rest), choices=choices(kind), width=64, height=64)
    target, source, vae, adapter, empty = outputs
    known = {"maps": ",".join(CHAMP)} if kind == "champ" else {}
    out = folder() / f"{kind}_core.safetensors"
    convert(files(kind), out, choices=known, overwrite=True)
    if kind.startswith("leffa"):
        core = load_model(out)
    else:
        vae = host_vae(adapter.config)
        core = with_vae(out)
    return Both(target, source, vae, adapter, empty, core.requires_grad_(False))


def host_vae(config: TruePoseConfig) -> object:
    """What the host's Load VAE would give."""
    settings = {**fam.SMALL_VAE, "norm_num_groups": 32, "scaling_factor": 0.18215}
    return host_nets._make_vae(replace(config, vae=settings), small_vae().state_dict(), "test")


def with_vae(path: Path) -> TruePoseModel:
    from safetensors.torch import load_file

    model = TruePoseModel(TruePoseConfig.from_json(read_metadata(path)["config"]), codec=VAECodec(small_vae()))
    load_strict(model, load_file(path), path.name, ignore=("codec.",))
    return model.eval()


def image(seed: int) -> Tensor:
    """IMAGE."""
    return fam.picture(seed).movedim(1, -1)


def embedding() -> Tensor:
    return torch.randn((1, fam.CONTEXT), generator=torch.Generator().manual_seed(4))


def contexts(made: Both) -> tuple[list, list]:
    if made.adapter.config.behaviour.context != "image":
        return made.empty, made.empty
    output = comfy.clip_vision.Output()
    output["image_embeds"] = embedding()
    return run(PictureContext, adapter=made.adapter, clip_vision_output=output)


def encoded(made: Both, **more: object) -> object:
    inputs = {"model": made.source, "vae": made.vae, "image": image(1), "parsing": fam.dressed(), **more}
    return run(SourceNetEncode, conditioning=contexts(made)[0], **inputs)[0]


def posed(made: Both) -> object:
    pictures = {"skeleton": image(23)}
    if len(made.adapter.config.behaviour.pose_maps) > 1:
        pictures |= {name: image(20 + i) for i, name in enumerate(CHAMP[:3])}
    if made.adapter.config.behaviour.channels:
        pictures = {"densepose": image(23), "vae": made.vae}
    return run(ApplyPoseEncoder, model=made.target, **pictures)[0]


def prediction(made: Both, model: object, x: Tensor, sigma: Tensor, scale: float) -> Tensor:
    """What the host's guidance makes of the net's predictions, as the net predicts."""
    found = {}

    class Probe(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs):
            found["out"] = model_wrap(x, sigma.expand(x.shape[0]), **extra_args)
            return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*contexts(made))
    guider.set_cfg(scale)
    guider.sample(x, torch.zeros_like(x), Probe(), torch.tensor([float(sigma), 0.0]), disable_pbar=True)
    clean = found["out"]
    if made.core.config.prediction_type == "v_prediction":
        return (x / (sigma**2 + 1) - clean) * (sigma**2 + 1).sqrt() / sigma
    return (x - clean) / sigma


def core_prediction(made: Both, latent: Tensor, t: int, scale: float) -> Tensor:
    """The same by the pipeline's own parts."""
    model, behaviour = made.core, made.core.config.behaviour
    context = embedding()[:, None] if behaviour.context == "image" else None
    features = model.encode_source(fam.picture(1), fam.dressed(), context=context)
    if behaviour.keeps_latent:
        full, nothing = model.source_at(features, t), model.source_at(features, t, nothing=True)
    else:
        full, nothing = features, None
    pose = channels = None
    if behaviour.channels:
        grey = torch.full((1, 3, *fam.SIZE), 0.5)
        channels = model.encode_channels(fam.picture(23), grey, torch.ones(1, 1, *fam.SIZE))
    else:
        names = behaviour.pose_maps
        seeds = {**{name: 20 + i for i, name in enumerate(CHAMP[:3])}, "skeleton": 23}
        pose = model.encode_pose({name: fam.picture(seeds[name]) for name in names})
    when = torch.tensor([t])
    rows = []
    for source, text in ((nothing, None), (full, context)):
        call = model.target_pass(fam.LATENT, source)
        rows.append(model.denoise(latent, when, call, pose, text, channels=channels))
    without, full = rows
    guided = without + scale * (full - without)
    phi = behaviour.guidance_rescale * scale
    return guided * (phi * full.std() / guided.std() + 1 - phi)


@pytest.mark.parametrize("kind", ["animate-anyone", "champ", "leffa-sd15", "leffa-sdxl"])
def test_a_guided_step_is_the_pipelines(kind: str) -> None:
    made, t = both(kind), 481
    sigma = made.target.model.model_sampling.sigma(torch.tensor(float(t)))
    noise = torch.randn((1, 4, *fam.LATENT), generator=torch.Generator().manual_seed(0))
    x = noise * (sigma**2 + 1).sqrt()
    model = run(ApplyHPFA, model=posed(made), source=encoded(made), **ONES)[0]
    scale = made.core.config.behaviour.guidance
    ours, theirs = prediction(made, model, x, sigma, scale), core_prediction(made, noise, t, scale)
    worst = float((ours - theirs).abs().max())
    print(f"parity, {kind}: max abs difference {worst:.2e} at a scale of {float(theirs.abs().max()):.2f}")
    assert worst < LIMIT * max(1.0, float(theirs.abs().max()))


class Steps(comfy.samplers.Sampler):
    """The system's own sampler, by the timestep as it counts them; `after` is the latent after each step."""

    def __init__(self, made: Both) -> None:
        self.scheduler = TruePosePipeline.from_model(made.core).scheduler
        self.scheduler.set_timesteps(STEPS)
        self.after: list[Tensor] = []

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
        sampling, latent = model_wrap.inner_model.model_sampling, noise
        generator = torch.Generator().manual_seed(0)
        for t in self.scheduler.timesteps:
            sigma = sampling.sigma(t.float())
            x = latent * (sigma**2 + 1).sqrt()
            clean = model_wrap(x, sigma.expand(x.shape[0]), **extra_args)
            latent = self.scheduler.step((x - clean) / sigma, t, latent, generator=generator).prev_sample
            self.after.append(latent)
        return latent


def noise(batch: int = 1) -> Tensor:
    return torch.randn((batch, 4, *fam.LATENT), generator=torch.Generator().manual_seed(0))


def sampled(made: Both, model: object, scale: float = 2.5, batch: int = 1) -> list[Tensor]:
    """The latents after each of `STEPS` steps through the host."""
    steps, first = Steps(made), noise(batch)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*contexts(made))
    guider.set_cfg(scale)
    guider.sample(first, torch.zeros_like(first), steps, torch.tensor([1.0, 0.0]), disable_pbar=True)
    return steps.after


@lru_cache
def published(kind: str, once: bool = False) -> list[Tensor]:
    """The same by the pipeline."""
    pipe = TruePosePipeline.from_model(both(kind).core)
    pipe.set_progress_bar_config(disable=True)
    after: list[Tensor] = []

    def keep(pipe, step, t, given):
        after.append(given["latents"])
        return given

    pipe(
        fam.picture(1),
        fam.body(),
        fam.dressed(),
        num_inference_steps=STEPS,
        pose_map={"densepose": fam.picture(23)},
        latents=noise(),
        callback_on_step_end=keep,
        source_once=once,
    )
    return after


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs) == STEPS
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


class TestReadAtEveryStep:
    @pytest.mark.parametrize("kind", LEFFA)
    def test_every_step_is_the_pipelines(self, kind: str) -> None:
        made = both(kind)
        posed_model, source = posed(made), encoded(made)
        model = run(ApplyHPFA, model=posed_model, source=source, **ONES)[0]
        bare, ours = sampled(made, posed_model), sampled(made, model)
        far = worst(ours, published(kind))
        once = encoded(made, source_reading="once")
        faster = sampled(made, run(ApplyHPFA, model=posed_model, source=once, **ONES)[0])
        print(
            f"{STEPS} steps, {kind}: max abs difference {far:.2e}, largest {float(torch.stack(ours).abs().max()):.1f}; "
            f"read once it would be {worst(faster, published(kind)):.2g}"
        )
        assert far < LIMIT < 0.01 < worst(faster, published(kind))
        assert worst(sampled(made, model), ours) == 0
        # Nothing stays: without the node it is what it was, and strength 0 is no node.
        assert worst(sampled(made, posed_model), bare) == 0
        assert worst(sampled(made, host_patch.without_hpfa(model)), bare) == 0
        assert (
            worst(sampled(made, run(ApplyHPFA, model=posed_model, source=source, **ONES, strength=0.0)[0]), bare) == 0
        )
        assert not host_patch.without_hpfa(model).get_additional_models() and len(model.get_additional_models()) == 1

    def test_source_net_runs_once_for_each_row_that_is_there(self) -> None:
        """A guided step reads the source and the zeros, a step without guidance the source; at that step's timestep."""
        made, seen = both("leffa-sd15"), []
        source = encoded(made)
        made.source.model.diffusion_model.register_forward_pre_hook(lambda net, args: seen.append(float(args[1][0])))
        model = run(ApplyHPFA, model=posed(made), source=source, **ONES)[0]
        times = Steps(made).scheduler.timesteps.tolist()
        try:
            sampled(made, model, batch=2)
            assert seen == [t for t in times for _ in range(2)]
            seen.clear()
            sampled(made, model, scale=1.0)
            assert seen == times
            seen.clear()
            sampled(made, run(ApplyHPFA, model=model, source=source, **ONES)[0])
            assert seen == [t for t in times for _ in range(2)]
        finally:
            made.source.model.diffusion_model._forward_pre_hooks.clear()

    def test_rows_in_calls_of_their_own_read_the_same(self) -> None:
        """Little memory: the host makes a call for the prompt and one for the negative prompt."""
        made = both("leffa-sd15")
        model = run(ApplyHPFA, model=posed(made), source=encoded(made), **ONES)[0]
        for one, other in zip(split(model, noise(), 3.0), split(model, noise(), 3.0, apart=True), strict=True):
            assert float((one - other).abs().max()) < LIMIT

    def test_it_can_be_cancelled(self) -> None:
        source = encoded(both("leffa-sd15"))
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            source.reader.read(torch.tensor([3.0]))
        assert not comfy.model_management.processing_interrupted()

    def test_regions_are_those_of_a_source_read_once(self) -> None:
        """Pruning, region match and strength work on fresh tokens: at the first reading's timestep all is equal."""
        made = both("leffa-sd15")
        sigma = made.target.model.model_sampling.sigma(torch.tensor(481.0))
        anew, once = encoded(made), encoded(made, source_reading="once")
        assert once.reader is None and anew.reader is not None and anew.get_ram_usage() > once.get_ram_usage()
        x = noise() * (sigma**2 + 1).sqrt()
        for more in (
            {"background": 0.0, "upper": 0.5},
            {"strength": 0.3},
            {"match": "as set", "region_match": 4.0, "target_parsing": fam.dressed()},
        ):
            one, other = (
                prediction(made, run(ApplyHPFA, model=posed(made), source=s, **{**ONES, **more})[0], x, sigma, 2.0)
                for s in (anew, once)
            )
            assert float((one - other).abs().max()) < 1e-5, more

    def test_other_families_read_once(self) -> None:
        assert encoded(both("animate-anyone")).reader is None

    def test_lora_on_source_net_stays_in_force(self) -> None:
        made = both("leffa-sd15")
        key = "diffusion_model.input_blocks.0.0.weight"
        changed = made.source.clone()
        changed.add_patches({key: ("diff", (0.1 * torch.ones_like(made.source.model.get_parameter(key)),))})
        posed_model, plain, other = posed(made), encoded(made), encoded(made, model=changed)
        models = [run(ApplyHPFA, model=posed_model, source=source, **ONES)[0] for source in (plain, other)]
        before, moved = (sampled(made, model) for model in models)
        assert worst(moved, before) > 1e-3
        assert worst(sampled(made, models[0]), before) == 0
        with pytest.raises(TruePoseError, match="different LoRA"):
            run(ApplyHPFA, model=models[0], source=other, **ONES)

    def test_what_cannot_be_is_refused(self) -> None:
        made = both("leffa-sd15")
        source = encoded(made)
        with pytest.raises(TruePoseError, match="set source_reading to once"):
            run(CombineSources, source=source, donor=encoded(made, image=image(2)), upper=1.0)
        once = encoded(made, source_reading="once")
        assert len(run(CombineSources, source=once, donor=once, upper=1.0)[0].parts) == 2
        with pytest.raises(TruePoseError, match="this is the SourceNet"):
            run(ApplyHPFA, model=made.source, source=source, **ONES)
        with pytest.raises(TruePoseError, match="different timesteps"):
            source.reader.read(torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("kind", ["animate-anyone", "leffa-sd15"])
def test_regions_work_without_training(kind: str) -> None:
    made = both(kind)
    sigma, x = torch.tensor(1.0), torch.randn((1, 4, *fam.LATENT), generator=torch.Generator().manual_seed(1))
    source = encoded(made)

    def shown(**more: object) -> Tensor:
        model = run(ApplyHPFA, model=posed(made), source=source, **{**ONES, **more})[0]
        return prediction(made, model, x, sigma, 2.0)

    plain = shown()
    for more in (
        {"background": 0.0},
        {"strength": 0.3},
        {"match": "as set", "region_match": 4.0, "target_parsing": fam.dressed()},
    ):
        assert float((shown(**more) - plain).abs().max()) > 1e-3, more


def test_the_source_net_reads_what_the_core_reads() -> None:
    made = both("animate-anyone")
    ours = encoded(made)
    theirs = made.core.encode_source(fam.picture(1), fam.dressed(), context=embedding()[:, None])
    names = host_nets.host_sites(made.source.model.model_config.unet_config)
    assert {names[site] for site in theirs.sites} == set(ours.sites)
    for site, tokens in theirs.sites.items():
        assert float((ours.sites[names[site]] - tokens).abs().max()) < 1e-4, site


def test_the_noise_schedule_is_the_systems() -> None:
    """Zero terminal SNR, and betas that grow linearly."""
    config = both("animate-anyone").core.config
    alphas = DDIMScheduler(**config.scheduler).alphas_cumprod
    sigmas = both("animate-anyone").target.model.model_sampling.sigmas
    wanted = ((1 - alphas) / alphas).sqrt()[:-1]
    assert float((sigmas[:-1] / wanted - 1).abs().max()) < 1e-3 and float(sigmas[-1]) > 1000


def test_leffas_own_vae_comes_with_the_file() -> None:
    made = both("leffa-sd15")
    latent = made.vae.encode(image(1))
    wanted = small_vae().encode(2 * fam.picture(1) - 1).latent_dist.mean
    assert float((latent - wanted).abs().max()) < 1e-4
    assert made.vae.decode(latent).shape == (1, 64, 64, 3)


def test_a_converted_copy_is_kept_only_if_asked() -> None:
    first, *rest = (path.name for path in files("animate-anyone"))
    before = set(folder().iterdir())
    run(LoadModel, file=first, more_files="\n".join(rest))
    assert set(folder().iterdir()) == before
    run(LoadModel, file=first, more_files="\n".join(rest), keep_as="mine")
    assert set(folder().iterdir()) - before == {folder() / "mine.safetensors"}
    adapter = run(LoadModel, file="mine.safetensors")[3]
    assert adapter.config.family == "animate-anyone" and adapter.size == (768, 512)
    (latent,) = run(EmptyLatent, adapter=adapter)
    assert latent["samples"].shape == (1, 4, 96, 64)
    (folder() / "mine.safetensors").unlink()


def test_a_model_trained_on_latents_loads() -> None:
    """TruePose's own, as `truepose train` makes it from a Stable Diffusion folder."""
    unet = {k: v for k, v in UNet2DConditionModel(**fam.SMALL).config.items() if not k.startswith("_")}
    config = TruePoseConfig("sd15", unet, fusion="hpfa", size=fam.SIZE, scheduler=dict(SD_SCHEDULE), beta=1.0)
    core = fam.randomised(TruePoseModel(config, codec=VAECodec(small_vae())), 5)
    path = save_model(core, folder() / "own.safetensors", overwrite=True)
    target, source, missing, adapter, empty = run(LoadModel, file="own.safetensors")
    with pytest.raises(TruePoseError, match="Load VAE"):
        missing.encode(image(1))
    vae = host_vae(config)
    features = run(SourceNetEncode, model=source, vae=vae, image=image(1), parsing=fam.dressed(), conditioning=empty)[0]
    made = Both(target, source, vae, adapter, empty, core)
    model = run(ApplyHPFA, model=posed(made), source=features, target_parsing=fam.dressed(), **ONES)[0]
    noise, sigma = torch.randn(1, 4, *fam.LATENT), torch.tensor(2.0)
    t = int(target.model.model_sampling.timestep(sigma))
    ours = prediction(made, model, noise * (sigma**2 + 1).sqrt(), sigma, 1.0)
    call = core.target_pass(fam.LATENT, core.encode_source(fam.picture(1), fam.dressed()), None, fam.dressed())
    theirs = core.denoise(noise, torch.tensor([t]), call, core.encode_pose(fam.picture(23)))
    assert float((ours - theirs).abs().max()) < LIMIT * max(1.0, float(theirs.abs().max()))
    path.unlink()


class TestRefuses:
    def test_a_set_that_is_not_whole(self) -> None:
        first = files("animate-anyone")[0].name
        with pytest.raises(TruePoseError, match="denoising net is missing"):
            run(LoadModel, file=first)

    def test_a_source_without_its_embedding(self) -> None:
        made = both("animate-anyone")
        with pytest.raises(TruePoseError, match="connect Picture Context"):
            run(SourceNetEncode, model=made.source, vae=made.vae, image=image(1), parsing=fam.dressed())

    def test_an_embedding_that_nobody_reads(self) -> None:
        output = comfy.clip_vision.Output()
        output["image_embeds"] = embedding()
        with pytest.raises(TruePoseError, match="reads no CLIP embedding"):
            run(PictureContext, adapter=both("leffa-sd15").adapter, clip_vision_output=output)

    def test_a_missing_densepose(self) -> None:
        made = both("leffa-sd15")
        with pytest.raises(TruePoseError, match="connect densepose, and the vae"):
            run(ApplyPoseEncoder, model=made.target, densepose=image(2))
        with pytest.raises(TruePoseError, match="leave the other poses unconnected"):
            run(ApplyPoseEncoder, model=made.target, skeleton=image(2))

    def test_a_map_that_the_model_does_not_read(self) -> None:
        with pytest.raises(TruePoseError, match="reads the pose maps skeleton"):
            run(ApplyPoseEncoder, model=both("animate-anyone").target, depth=image(2))

    def test_choices_and_names(self) -> None:
        first, *rest = (path.name for path in files("champ"))
        for more, match in (
            ({"choices": "maps"}, "name=value"),
            ({"keep_as": "../out", "choices": choices("champ")}, "plain file name"),
            ({"width": 64}, "give both"),
        ):
            with pytest.raises(TruePoseError, match=match):
                run(LoadModel, file=first, more_files="\n".join(rest), **more)
