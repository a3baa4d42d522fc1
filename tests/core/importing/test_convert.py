"""Converting: nothing missing, nothing unexplained, nothing half-written, and every weight as it was."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from foreign import Toy, animate_anyone, flat, ip_adapter, toy_files, toy_model
from safetensors.torch import load_file, save_file

from truepose_core import __version__
from truepose_core.errors import TruePoseError
from truepose_core.importing import families as importing
from truepose_core.importing.convert import convert, find, opened
from truepose_core.importing.plan import Plan
from truepose_core.models.config import TruePoseConfig
from truepose_core.models.model import TruePoseModel
from truepose_core.models.store import load_model, save_model
from truepose_core.weights.reading import CheckpointReader
from truepose_core.weights.strict import load_strict, read_metadata, weights_hash


@pytest.fixture
def toy(monkeypatch):
    family = Toy()
    monkeypatch.setattr(importing, "FAMILIES", (*importing.FAMILIES, family))
    return family


@pytest.fixture
def files(toy, tmp_path):
    left, right = toy_files()
    torch.save({"state_dict": left, "epoch": 2}, tmp_path / "a.pth")
    save_file(right, tmp_path / "b.safetensors")
    return [tmp_path / "a.pth", tmp_path / "b.safetensors"]


def saved(folder, **nets):
    paths = []
    for name, tensors in nets.items():
        paths.append(folder / f"{name}.pth")
        torch.save(tensors, paths[-1])
    return paths


# ------------------------------------------------------------------------------------------------------ what is written


def test_round_trip_keeps_every_tensor_and_the_hash(files, tmp_path):
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    convert(files, out)
    model = load_model(out, verify=True)
    theirs = toy_model().state_dict()
    assert model.state_dict().keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in model.state_dict().items())
    save_model(model, again)
    once, twice = load_file(out), load_file(again)
    assert once.keys() == twice.keys()
    assert all(torch.equal(once[name], twice[name]) for name in once)
    assert read_metadata(out)["sha256"] == read_metadata(again)["sha256"] == weights_hash(once)
    assert load_model(again).config.to_json() == model.config.to_json() == toy_model().config.to_json()


def test_same_files_give_the_same_bytes_in_any_order(files, tmp_path):
    outs = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for out, order in zip(outs, (files, files, files[::-1]), strict=True):
        convert(order, out)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert weights_hash(load_file(outs[0])) == weights_hash(load_file(outs[2]))


def test_metadata_tells_where_it_comes_from(files, tmp_path):
    convert(files, tmp_path / "out.safetensors")
    metadata = read_metadata(tmp_path / "out.safetensors")
    assert metadata["architecture"] == "truepose"
    assert metadata["family"] == "toy"
    assert metadata["title"] == "Toy 1"
    assert metadata["licence"] == "not stated"
    assert metadata["converter"] == f"truepose {__version__}"
    assert metadata["prediction_type"] == "sample"
    assert metadata["config"] == toy_model().config.to_json()
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    assert json.loads(metadata["sources"]) == [
        {"file": "a.pth", "sha256": hashes[0]},
        {"file": "b.safetensors", "sha256": hashes[1]},
    ]


def test_a_licence_that_a_file_states_is_passed_on(files, tmp_path):
    save_file(load_file(files[1]), files[1], {"modelspec.license": "CC-BY-4.0"})
    convert(files, tmp_path / "out.safetensors")
    assert read_metadata(tmp_path / "out.safetensors")["licence"] == "CC-BY-4.0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_are_kept_unless_one_is_asked_for(toy, dtype, tmp_path):
    left, right = toy_files(dtype)
    files = saved(tmp_path, left=left, right=right)
    convert(files, tmp_path / "kept.safetensors")
    kept = load_file(tmp_path / "kept.safetensors")
    assert all(torch.equal(kept[k.removeprefix("right.")], x) for k, x in right.items())
    assert {x.dtype for x in kept.values()} == {dtype}
    convert(files, tmp_path / "wide.safetensors", dtype=torch.float32)
    wide = load_file(tmp_path / "wide.safetensors")
    assert all(x.dtype == torch.float32 and torch.equal(x, kept[name].float()) for name, x in wide.items())


def test_mixed_types_scalars_and_empty_tensors_are_written_as_they_are(toy, monkeypatch, tmp_path):
    tensors = {
        "left.flag": torch.tensor([True, False, True]),
        "left.half": torch.randn(3).half(),
        "left.brain": torch.randn(5).bfloat16(),
        "left.double": torch.randn(2, 2).double(),
        "left.count": torch.tensor(7),
        "left.none": torch.zeros(0, 3),
        "left.float": torch.randn(3, 2).T,
    }
    shapes = {name.removeprefix("left."): tuple(x.shape) for name, x in tensors.items()}

    def plan(parts, files, choices):
        names = {name: (0, f"left.{name}") for name in shapes}
        return Plan("toy", {}, names, expected=shapes)

    monkeypatch.setattr(toy, "plan", plan)
    convert(saved(tmp_path, x=tensors), tmp_path / "out.safetensors")
    again = load_file(tmp_path / "out.safetensors")
    assert again.keys() == shapes.keys()
    for name, x in again.items():
        assert x.dtype == tensors[f"left.{name}"].dtype
        assert torch.equal(x, tensors[f"left.{name}"])
        assert x.data_ptr() % x.element_size() == 0
    assert read_metadata(tmp_path / "out.safetensors")["sha256"] == weights_hash(again)
    convert([tmp_path / "x.pth"], tmp_path / "half.safetensors", dtype=torch.float16)
    types = {name: x.dtype for name, x in load_file(tmp_path / "half.safetensors").items()}
    assert (types["flag"], types["count"], types["double"]) == (torch.bool, torch.int64, torch.float16)


def test_a_value_that_does_not_fit_the_type_is_an_error(toy, tmp_path):
    left, right = toy_files()
    name = next(iter(right))
    right = {**right, name: torch.full_like(right[name], 1e6)}
    files = saved(tmp_path, left=left, right=right)
    with pytest.raises(TruePoseError, match=rf"right\.pth: {name} has values up to 1e\+06, too large for float16"):
        convert(files, tmp_path / "out.safetensors", dtype=torch.float16)
    assert {p.name for p in tmp_path.iterdir()} == {"left.pth", "right.pth"}
    convert(files, tmp_path / "out.safetensors", dtype=torch.bfloat16)


def test_one_tensor_at_a_time(files, monkeypatch, tmp_path):
    """At no moment do more than two of the tensors that were read live."""
    alive, most = weakref.WeakSet(), []
    read = CheckpointReader.tensor

    def watched(self, name):
        gc.collect(0)
        most.append(len(alive))
        x = read(self, name).clone()
        alive.add(x)
        return x

    monkeypatch.setattr(CheckpointReader, "tensor", watched)
    convert(files, tmp_path / "out.safetensors")
    assert len(most) == 2 * len(toy_model().state_dict())
    assert max(most) <= 1


def test_progress_counts_every_byte(files, tmp_path):
    seen = []
    convert(files, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_weights_can_be_read_without_a_converted_copy(files):
    with opened(files) as (found, weights):
        model = TruePoseModel(TruePoseConfig.from_json(json.dumps(found.plan.config)))
        load_strict(model, weights, "the toy")
    assert weights_hash(model.state_dict()) == weights_hash(toy_model().state_dict())


def test_what_was_found(files):
    found = find(files)
    left, right = found.files
    assert (found.title, found.licence) == ("Toy 1", "not stated")
    assert [part.role for part in left.parts] == ["left"]
    assert (left.tensors, left.mapped, left.ignored) == (left.mapped + 1, len(toy_files()[0]) - 1, {"a toy": 1})
    assert left.skipped == {"epoch": "no weights (int)"}
    assert (right.tensors, right.mapped, right.ignored) == (len(toy_files()[1]), len(toy_files()[1]), {})


# ---------------------------------------------------------------------------------------------------- what is refused


def test_an_output_that_exists_is_kept(files, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(TruePoseError, match=r"out\.safetensors exists already"):
        convert(files, out)
    assert out.read_bytes() == b"mine"
    convert(files, out, overwrite=True)
    load_model(out, verify=True)
    for wrong, text in (("x.pth", "expected one of .safetensors"), ("no/x.safetensors", "does not exist")):
        with pytest.raises(TruePoseError, match=text):
            convert(files, tmp_path / wrong)


def test_the_output_is_none_of_the_inputs(files):
    before = files[1].read_bytes()
    with pytest.raises(TruePoseError, match="is one of the files to convert"):
        convert(files, files[1], overwrite=True)
    assert files[1].read_bytes() == before


def test_a_full_disk_is_noticed_before_writing(files, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(TruePoseError, match=r"needs .* GiB and .* has 0\.0 GiB free"):
        convert(files, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_is_left_half_written(files, monkeypatch, stop, tmp_path):
    read, count = CheckpointReader.tensor, []
    half = 3 * len(toy_model().state_dict()) // 2

    def breaks(self, name):
        count.append(name)
        if len(count) > half:
            assert any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
            raise stop
        return read(self, name)

    monkeypatch.setattr(CheckpointReader, "tensor", breaks)
    error = KeyboardInterrupt if stop is KeyboardInterrupt else TruePoseError
    with pytest.raises(error):
        convert(files, tmp_path / "out.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", "b.safetensors"}


def test_a_key_that_nobody_knows_is_an_error(files):
    tensors = load_file(files[1])
    save_file({**tensors, "secret.weight": torch.ones(1)}, files[1])
    with pytest.raises(TruePoseError, match=r"b\.safetensors has 1 tensors that nobody knows: secret\.weight"):
        find(files)


def test_missing_and_misshapen_weights_are_named(files):
    tensors = load_file(files[1])
    name = "right.target_net.conv_out.bias"
    save_file({**tensors, name: torch.ones(5)}, files[1])
    with pytest.raises(TruePoseError, match=rf"not make up a whole .*: {name} is \(5,\), expected \(48,\)"):
        find(files)
    save_file({k: x for k, x in tensors.items() if k != name}, files[1])
    with pytest.raises(TruePoseError, match=r"of Toy system\. 1 missing: target_net\.conv_out\.bias"):
        find(files)


def test_whoever_loads_strictly_may_leave_the_comparison_out(files, monkeypatch, tmp_path):
    """The host has no diffusers, and its own networks to compare with."""
    monkeypatch.setattr("truepose_core.importing.convert.find_spec", lambda name: None)
    with pytest.raises(TruePoseError, match="checking the weights needs diffusers"):
        find(files)
    convert(files, tmp_path / "out.safetensors", whole=False)
    tensors = load_file(files[1])
    save_file({k: x for k, x in tensors.items() if not k.endswith("conv_out.bias")}, files[1])
    with opened(files, whole=False) as (_, weights), pytest.raises(TruePoseError, match=r"missing: .*conv_out\.bias"):
        load_strict(toy_model(), weights, "the toy")


def test_a_plan_cannot_name_what_is_not_there(toy, files, monkeypatch):
    plan = toy.plan

    def wrong(*args):
        found = plan(*args)
        return replace(found, tensors={**found.tensors, "dream": (1, "right.dream")})

    monkeypatch.setattr(toy, "plan", wrong)
    with pytest.raises(TruePoseError, match=r"b\.safetensors lacks 1 tensors: right\.dream"):
        find(files)


def test_choices_are_read_or_refused(files, toy, monkeypatch):
    assert find(files, {"taste": "sweet", "family": "toy"}).plan.family == "toy"
    for choices, text in (
        ({"taste": "sour"}, "taste knows sweet only"),
        ({"tasty": "sweet"}, r"the choice 'tasty' means nothing for these files \(Toy system\)"),
        ({"family": "duck"}, r"the family 'duck' is unknown; expected one of .*toy"),
        ({"family": "ip-adapter"}, "expected weights of: IP-Adapter$"),
        ({"weights": "ema"}, "'weights' means nothing here"),
    ):
        with pytest.raises(TruePoseError, match=text):
            find(files, choices)


def test_files_that_two_systems_could_read_need_a_choice(files, toy, monkeypatch):
    class Twin(Toy):
        name = "twin"
        title = "Twin system"

    monkeypatch.setattr(importing, "FAMILIES", (toy, Twin()))
    with pytest.raises(TruePoseError, match=r"Toy system or Twin system; .* family=toy or --choose family=twin"):
        find(files)
    assert find(files, {"family": "toy"}).plan.family == "toy"


def test_a_chosen_set_of_weights_is_converted(toy, tmp_path):
    left, right = toy_files()
    other = {k: x + 1 for k, x in left.items()}
    files = saved(tmp_path, a={"state_dict": other, "ema": left}, b=right)
    with pytest.raises(TruePoseError, match="say which with --choose weights="):
        find(files)
    convert(files, tmp_path / "out.safetensors", choices={"weights": "ema"})
    assert weights_hash(load_file(tmp_path / "out.safetensors")) == weights_hash(toy_model().state_dict())


def test_one_file_of_a_pair_is_not_enough(files):
    with pytest.raises(TruePoseError, match=r"a\.pth is the left half alone; give both"):
        find(files[:1])
    with pytest.raises(TruePoseError, match="is given twice"):
        find([files[0], files[0]])
    with pytest.raises(TruePoseError, match="no files were given"):
        find([])


def test_a_model_of_this_package_is_no_foreign_one(files, tmp_path):
    convert(files, tmp_path / "out.safetensors")
    with pytest.raises(TruePoseError, match="is a model of this package already"):
        find([tmp_path / "out.safetensors"])


def test_quantised_files_are_refused(files):
    tensors = {k: x.to(torch.float8_e4m3fn) for k, x in load_file(files[1]).items()}
    save_file(tensors, files[1])
    with pytest.raises(TruePoseError, match=r"b\.safetensors holds fp8, quantised .*F8_E4M3"):
        find(files)


def test_an_unknown_file_says_what_it_looks_like(files, tmp_path):
    lora, odd = saved(tmp_path, lora={"x.lora_down.weight": torch.ones(1)}, odd={"some.weight": torch.ones(1)})
    with pytest.raises(TruePoseError, match=r"lora\.pth looks like a LoRA, .*; expected weights of: .*Toy system"):
        find([*files, lora])
    with pytest.raises(TruePoseError, match=r"odd\.pth is not recognised \(keys such as some\.weight\)"):
        find([odd])


# ------------------------------------------------------------------------------- AnimateAnyone, as a user gets it wrong


@pytest.fixture(scope="module")
def nets():
    return animate_anyone()


def test_animate_anyone_is_converted_whole(nets, tmp_path):
    given = {**nets, "reference": {"state_dict": nets["reference"]}}
    found = convert(saved(tmp_path, **given), tmp_path / "out.safetensors")
    mapped = {file.path.stem: file.mapped for file in found.files}
    assert mapped == {**{name: len(net) for name, net in nets.items()}, "motion": 0}
    tensors = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(tensors[f"source_net.{k}"], x) for k, x in nets["reference"].items())
    assert all(torch.equal(tensors[f"target_net.{k}"], x) for k, x in nets["denoising"].items())
    config = TruePoseConfig.from_json(read_metadata(tmp_path / "out.safetensors")["config"])
    model = TruePoseModel(config, codec=torch.nn.Identity())
    load_strict(model, tensors, "it")
    save_model(model, tmp_path / "again.safetensors")
    assert read_metadata(tmp_path / "again.safetensors")["sha256"] == weights_hash(tensors)


def test_a_plain_unet_is_no_reference_net(nets, tmp_path):
    plain = {k: x + 1 for k, x in nets["denoising"].items()}
    files = saved(tmp_path, plain=plain, denoising=nets["denoising"], guider=nets["guider"])
    with pytest.raises(TruePoseError, match=r"reference net"):
        find(files)


def test_a_motion_module_alone(nets, tmp_path):
    with pytest.raises(TruePoseError, match=r"motion\.pth is a motion module alone"):
        find(saved(tmp_path, motion=nets["motion"]))


@pytest.mark.parametrize("missing", ["reference", "denoising", "guider"])
def test_one_file_of_the_set_is_missing(nets, missing, tmp_path):
    given = {name: nets[name] for name in ("reference", "denoising", "guider") if name != missing}
    with pytest.raises(TruePoseError, match="pose guider" if missing == "guider" else f"{missing} net"):
        find(saved(tmp_path, **given))


def test_systems_do_not_mix(nets, tmp_path):
    files = saved(tmp_path, denoising=nets["denoising"], adapter=flat(ip_adapter()))
    with pytest.raises(TruePoseError, match=r"systems \(denoising\.pth is of .*; adapter\.pth is of IP-Adapter\)"):
        find(files)


def test_nets_of_other_widths_do_not_belong_together(nets, tmp_path):
    wide = animate_anyone(widths=(64, 64))
    with pytest.raises(TruePoseError, match="do not belong together"):
        find(saved(tmp_path, a=nets["reference"], b=wide["denoising"], c=nets["guider"]))
    with pytest.raises(TruePoseError, match=r"of another shape: conv_out.weight is \(64, .*expected \(32, "):
        find(saved(tmp_path, a=nets["reference"], b=nets["denoising"], c=wide["guider"]))
