"""Model files: what is written is what is read, and everything else is refused by name."""

from __future__ import annotations

import json
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import people, small_model, source_of

from truepose_core.body.lift import LiftNet
from truepose_core.errors import TruePoseError
from truepose_core.models.store import load_model, save_model
from truepose_core.weights.small import load_small, read_small
from truepose_core.weights.strict import BUNDLED, bundled_path, load_strict, read_metadata, weights_hash


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("store") / "small.safetensors", training={"steps": 7, "seed": 3})


def rewritten(file, path, change, metadata=None):
    """A copy of a model file with its tensors (a dict) changed in place."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, path, read_metadata(file) if metadata is None else metadata)
    return path


def test_round_trip_is_exact(model, file):
    again = load_model(file, verify=True)
    assert again.config.to_json() == model.config.to_json()
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inputs = source_of(people(), slice(1))
    with torch.no_grad():
        a, b = model.encode_source(*inputs), again.encode_source(*inputs)
    assert all(torch.equal(a.sites[site], b.sites[site]) for site in a.sites)


@pytest.mark.parametrize("fusion", ["none", "concat"])
def test_round_trip_of_smaller_models(fusion, tmp_path):
    model = small_model(fusion, caa=False, aligned=fusion == "concat")
    again = load_model(save_model(model, tmp_path / "m.safetensors"))
    assert model.state_dict().keys() == again.state_dict().keys()


def test_metadata_tells_what_the_file_is(model, file):
    metadata = read_metadata(file)
    assert metadata["architecture"] == "truepose"
    assert json.loads(metadata["config"])["size"] == [64, 48]
    assert metadata["prediction_type"] == "sample"
    assert json.loads(metadata["scheduler"])["num_train_timesteps"] == 1000
    assert json.loads(metadata["training"]) == {"steps": 7, "seed": 3}
    assert metadata["sha256"] == weights_hash(load_file(file))


def test_half_precision_file_loads_as_float32(model, tmp_path):
    path = save_model(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert path.stat().st_size < sum(4 * x.numel() for x in model.state_dict().values())
    again = load_model(path, verify=True)
    assert again.dtype == torch.float32
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(theirs[name], value.half().float()) for name, value in ours.items())


def test_hash_depends_on_names_types_shapes_and_values():
    x = torch.arange(6.0)
    hashes = [
        weights_hash(t)
        for t in ({"a": x}, {"b": x}, {"a": x.double()}, {"a": x.view(2, 3)}, {"a": x + 1}, {"a": x, "b": x})
    ]
    assert len(set(hashes)) == len(hashes)
    assert weights_hash({"a": x, "b": x + 1}) == weights_hash({"b": x + 1, "a": x})


def test_changed_weights_are_noticed(file, tmp_path):
    def change(tensors):
        tensors["target_net.conv_in.bias"][0] += 1

    path = rewritten(file, tmp_path / "changed.safetensors", change)
    load_model(path)
    with pytest.raises(TruePoseError, match="do not match the hash"):
        load_model(path, verify=True)


def test_loading_is_strict_and_names_the_weights(file, tmp_path):
    def change(tensors):
        del tensors["target_net.conv_in.bias"]
        tensors["target_net.sparkle"] = torch.zeros(1)
        tensors["target_net.conv_out.bias"] = torch.zeros(5)

    path = rewritten(file, tmp_path / "other.safetensors", change)
    with pytest.raises(TruePoseError) as error:
        load_model(path)
    text = str(error.value)
    assert str(path) in text
    assert "1 missing: target_net.conv_in.bias" in text
    assert "1 unknown: target_net.sparkle" in text
    assert "target_net.conv_out.bias is (5,), expected (48,)" in text


def test_strict_loading_may_leave_a_vae_out():
    net = torch.nn.ModuleDict({"codec": torch.nn.Linear(2, 2), "net": torch.nn.Linear(2, 2)})
    tensors = {"net.weight": torch.ones(2, 2), "net.bias": torch.zeros(2)}
    load_strict(net, tensors, "here", ignore=("codec.",))
    assert torch.equal(net["net"].weight, tensors["net.weight"])
    with pytest.raises(TruePoseError, match=r"here: .* 2 missing: codec"):
        load_strict(net, tensors, "here")


def test_a_refused_file_leaves_the_module_as_it_was():
    net = torch.nn.Linear(2, 2)
    before = net.weight.clone()
    with pytest.raises(TruePoseError):
        load_strict(net, {"weight": torch.ones(2, 2)}, "here")
    assert torch.equal(net.weight, before)


def test_weights_of_another_architecture_are_refused(file, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({"lora_unet.down.weight": torch.zeros(2)}, path)
    with pytest.raises(TruePoseError, match=r"lora.safetensors holds another architecture .*lora_unet.down.weight"):
        load_model(path)
    rewritten(file, path, lambda _: None, {"architecture": "truepose"})
    with pytest.raises(TruePoseError, match="does not say its configuration"):
        load_model(path)


def described(change):
    """The metadata of a file whose configuration is changed in place."""

    def edit(metadata):
        config = json.loads(metadata["config"])
        change(config)
        return {**metadata, "config": json.dumps(config)}

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["unet"].update(block_out_channels=[65536, 65536]), "do not fit the model"),
        (lambda c: c["unet"].update(down_block_types=["SparkleBlock2D"] * 2), "cannot be built .*SparkleBlock2D"),
        (lambda c: c["unet"].update(down_block_types=7), "cannot be built"),
        (lambda c: c["unet"].update(layers_per_block=60_000), "many more weights than the file holds"),
        (lambda c: c["unet"].update(attention_head_dim=0), "cannot be built .*ZeroDivision"),
        (lambda c: c["unet"].update(norm_num_groups=7), "cannot be built"),
        (lambda c: c["unet"].update(sparkle=1), "cannot be built .*sparkle"),
        (lambda c: c["unet"].pop("in_channels"), "cannot be built .*in_channels"),
        (lambda c: c["caa"].update(heads=0), "cannot be built"),
        (lambda c: c["caa"].update(width=60_000), "do not fit the model"),
        (lambda c: c["scheduler"].update(beta_schedule="sparkling"), "cannot be built .*sparkling"),
        (lambda c: c.update(pose_widths=[65536] * 3), "do not fit the model"),
    ],
)
def test_a_description_of_another_network_is_refused_before_it_is_made(file, tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    save_file(load_file(file), path, described(change)(read_metadata(file)))
    started = time.process_time()
    with pytest.raises(TruePoseError, match=rf"(?s)other\.safetensors.*{message}"):
        load_model(path)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"width": 65536, "depth": 50000}', "many more weights"),
        ('{"width": 65536}', "do not fit"),
        ('{"width": "wide"}', "cannot be built"),
        ('{"breadth": 4}', "cannot be built .*breadth"),
        ('{"width": 1e9}', "cannot be built"),
    ],
)
def test_a_small_network_of_another_description_is_refused(tmp_path, config, message):
    path = tmp_path / "lift.safetensors"
    metadata, tensors = read_small(bundled_path("lift"), "lift")
    save_file(tensors, path, {**metadata, "config": config})
    with pytest.raises(TruePoseError, match=rf"lift\.safetensors.*{message}"):
        load_small(path, "lift", LiftNet)


def test_files_that_are_no_model(file, tmp_path):
    whole = file.read_bytes()
    for name, data in (
        ("half.safetensors", whole[: len(whole) // 2]),
        ("header.safetensors", whole[:100]),
        ("empty.safetensors", b""),
        ("text.safetensors", b"these are not weights at all"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(TruePoseError, match=rf"{name} is not a complete safetensors file"):
            load_model(path)
    with pytest.raises(TruePoseError, match=r"no model file at .*nowhere"):
        load_model(tmp_path / "nowhere.safetensors")
    with pytest.raises(TruePoseError, match="no model file at"):
        load_model(tmp_path)


def test_an_existing_file_is_kept(model, tmp_path):
    path = tmp_path / "kept.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(TruePoseError, match="exists already"):
        save_model(model, path)
    assert path.read_bytes() == b"mine"
    save_model(model, path, overwrite=True)
    load_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]


def test_bundled_models_are_named_and_whole():
    with pytest.raises(TruePoseError, match=r"unicorn\.safetensors is missing from this installation"):
        bundled_path("unicorn")
    assert bundled_path().stat().st_size <= 40e6
    model = load_model(BUNDLED, verify=True)
    assert model.config.family == "mannequin"
    assert json.loads(read_metadata(bundled_path())["training"])["steps_done"] > 0
