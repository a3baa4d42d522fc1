"""Reading checkpoints: however the weights are wrapped, they come out the same; what is unsafe or broken is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import zipfile

import pytest
import torch
from foreign import animate_anyone
from safetensors.torch import save_file

from truepose_core.errors import TruePoseError
from truepose_core.importing.plan import describe
from truepose_core.weights.reading import CheckpointReader, TensorInfo, refuse_quantised

WEIGHTS = {
    "net.weight": torch.arange(6.0).reshape(2, 3),
    "net.half": torch.ones(2, dtype=torch.float16),
    "net.brain": torch.ones(2, 2, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
}


def parallel(tensors):
    return {f"module._orig_mod.{name}": x for name, x in tensors.items()}


def nested(tensors):
    return {"net": {k.removeprefix("net."): x for k, x in tensors.items() if k != "steps"}, "steps": tensors["steps"]}


def legacy(raw, path):
    torch.save(raw, path, _use_new_zipfile_serialization=False)


def compressed(raw, path):
    torch.save(raw, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


FORMS = {
    "safetensors": (save_file, WEIGHTS),
    "safetensors of DDP": (save_file, parallel(WEIGHTS)),
    "zip": (torch.save, WEIGHTS),
    "compressed zip": (compressed, WEIGHTS),
    "legacy": (legacy, WEIGHTS),
    "state_dict": (torch.save, {"state_dict": WEIGHTS, "epoch": 3}),
    "model of DDP": (torch.save, {"model": parallel(WEIGHTS), "optimizer": {"state": {0: torch.ones(3)}}}),
    "twice wrapped": (torch.save, {"ema": {"module": WEIGHTS}, "args": None}),
    "nested": (torch.save, nested(WEIGHTS)),
    "parameters": (torch.save, {k: torch.nn.Parameter(x, x.is_floating_point()) for k, x in WEIGHTS.items()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same(form, tmp_path):
    save, raw = FORMS[form]
    path = tmp_path / "x.safetensors" if save is save_file else tmp_path / "x.pth"
    save(raw, path)
    with CheckpointReader(path) as reader:
        infos = reader.infos()
        assert set(infos) == set(WEIGHTS)
        for name, x in WEIGHTS.items():
            y = reader.tensor(name)
            assert y.dtype == x.dtype
            assert torch.equal(y, x)
            assert not y.requires_grad
        assert infos["net.weight"] == TensorInfo((2, 3), "F32")
        assert {infos[name].dtype for name in ("net.half", "net.brain", "steps")} == {"F16", "BF16", "I64"}
        assert reader.sha256() == {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("size", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_another_format(size, tmp_path):
    """0x80 starts a pickle, 0x50 0x4B ("PK") a zip archive."""
    path = tmp_path / "x.bin"
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'.ljust(size)
    path.write_bytes(size.to_bytes(8, "little") + header + torch.ones(1).numpy().tobytes())
    with CheckpointReader(path) as reader:
        assert reader.kind == "safetensors"
        assert reader.tensor("a").item() == 1


def test_what_stands_beside_the_weights_is_named(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "optimizer_states": [1], "epoch": 3}, tmp_path / "x.ckpt")
    with CheckpointReader(tmp_path / "x.ckpt") as reader:
        assert reader.skipped == {"optimizer_states": "training state", "epoch": "no weights (int)"}


def test_tied_weights_and_views_are_whole_tensors(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    torch.save({"in": table, "out": table, "turned": table.T, "row": table[1]}, tmp_path / "x.pth")
    with CheckpointReader(tmp_path / "x.pth") as reader:
        assert torch.equal(reader.tensor("in"), reader.tensor("out"))
        assert reader.tensor("turned").is_contiguous()
        assert torch.equal(reader.tensor("turned"), table.T)
        assert torch.equal(reader.tensor("row"), table[1])


def test_several_sets_of_weights_need_a_choice(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}, "step": 3}, path)
    with pytest.raises(TruePoseError, match=r"state_dict, ema; say which with --choose weights=state_dict"):
        CheckpointReader(path)
    with pytest.raises(TruePoseError, match=r"has no weights 'best'; it has state_dict, ema"):
        CheckpointReader(path, "best")
    with CheckpointReader(path, "ema") as reader:
        assert reader.tensor("a").item() == 1
        assert set(reader.skipped) == {"state_dict", "step"}


def test_nets_side_by_side_are_one_set(tmp_path):
    """A dict of nets is not a wrapper, whatever one of them is called."""
    torch.save({"model": parallel({"a": torch.zeros(1)}), "guider": {"a": torch.ones(1)}}, tmp_path / "x.pth")
    with CheckpointReader(tmp_path / "x.pth") as reader:
        assert set(reader.infos()) == {"model.a", "guider.a"}


def sharded(folder, shards, weight_map=None, save=save_file, ending="safetensors"):
    names = {}
    for i, tensors in enumerate(shards, 1):
        path = folder / f"model-{i:05}-of-{len(shards):05}.{ending}"
        save(tensors, path)
        names |= dict.fromkeys(tensors, path.name)
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map or names}))
    return index


@pytest.mark.parametrize(("save", "ending"), [(save_file, "safetensors"), (torch.save, "bin")])
def test_shards_are_one_checkpoint(tmp_path, save, ending):
    items = list(WEIGHTS.items())
    index = sharded(tmp_path, [dict(items[:2]), dict(items[2:])], None, save, ending)
    with CheckpointReader(index) as reader:
        assert set(reader.infos()) == set(WEIGHTS)
        assert all(torch.equal(reader.tensor(name), x) for name, x in items)
        assert set(reader.sha256()) == {path.name for path in tmp_path.iterdir()}
    shard = tmp_path / f"model-00001-of-00002.{ending}"
    with pytest.raises(TruePoseError, match=rf"is one shard of several; give .*{index.name}"):
        CheckpointReader(shard)


def test_broken_shards_are_refused(tmp_path):
    a, b = {"a": torch.ones(1)}, {"b": torch.ones(1)}
    index = sharded(tmp_path, [a, b], {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"})
    with pytest.raises(TruePoseError, match=r"no file at .*gone.safetensors"):
        CheckpointReader(index)
    index = sharded(tmp_path, [a, b], {"a": "../secret.safetensors"})
    with pytest.raises(TruePoseError, match=r"names the shard '\.\./secret\.safetensors'; expected names"):
        CheckpointReader(index)
    index = sharded(tmp_path, [a, b], {"c": "model-00001-of-00002.safetensors"})
    with pytest.raises(TruePoseError, match="1 tensors are not in their shards: c"):
        CheckpointReader(index)
    index = sharded(tmp_path, [a, a], {n: f"model-0000{i}-of-00002.safetensors" for i, n in ((1, "a"), (2, "b"))})
    with pytest.raises(TruePoseError, match=r"a is in two shards, model-00001-of-00002.safetensors and model-00002"):
        CheckpointReader(index)
    for text in ("{}", "[1]", "not json", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(TruePoseError, match="is no index of a sharded checkpoint"):
            CheckpointReader(index)


class Opens:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_named_and_not_run(form, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "x.pth"
    raw = {"a": torch.ones(2), "b": Opens(victim)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"b": Opens(victim)}, protocol=4))
    else:
        torch.save(raw, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(TruePoseError, match=r"x\.pth is a pickle that calls io\.open .*refused and nothing of it ran"):
        CheckpointReader(path)
    assert not victim.exists()


def test_a_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(TruePoseError, match=r"calls torch\.nn\.modules\.linear\.Linear"):
        CheckpointReader(tmp_path / "x.pt")


def broken_files(folder):
    """(name, what the error says) of files that are no whole checkpoint."""
    torch.save({"a": torch.ones(3000)}, folder / "zip.pth")
    legacy({"a": torch.ones(3000)}, folder / "legacy.pth")
    save_file({"a": torch.ones(3000)}, folder / "whole.safetensors")
    for name in ("zip.pth", "legacy.pth", "whole.safetensors"):
        data = (folder / name).read_bytes()
        (folder / f"half-{name}").write_bytes(data[: len(data) // 2])
        (folder / f"start-{name}").write_bytes(data[:40])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "text.ckpt").write_text("<html>sign in to download</html>")
    (folder / "q4.gguf").write_bytes(b"GGUF" + bytes(100))
    (folder / "list.bin").write_bytes(b"")
    torch.save([torch.ones(1)], folder / "list.bin")
    torch.save({"a": 1}, folder / "numbers.pt")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("folder/x.txt", "hello")
    with zipfile.ZipFile(folder / "program.pt", "w") as archive:
        archive.writestr("program/constants.pkl", b"")
    (folder / "plain.pkl").write_bytes(pickle.dumps({"a": [1, 2]}))
    (folder / "sub").mkdir()
    return [
        ("half-zip.pth", "end is missing, so it is truncated"),
        ("start-zip.pth", "end is missing, so it is truncated"),
        ("half-legacy.pth", "may be truncated"),
        ("start-legacy.pth", "may be truncated"),
        ("half-whole.safetensors", "may be truncated"),
        ("start-whole.safetensors", "may be truncated"),
        ("empty.pth", r"is empty \(0 bytes\)"),
        ("text.ckpt", r"is no checkpoint \(it starts with b'<html>"),
        ("q4.gguf", "is a GGUF file, which is quantised; get the float32"),
        ("list.bin", "holds a list; expected a dict of tensors"),
        ("numbers.pt", "holds no tensors"),
        ("archive.zip", "is a zip archive without a checkpoint"),
        ("program.pt", "is a TorchScript program"),
        ("plain.pkl", "or one that torch.save did not write"),
        ("sub", "is a folder; name the weight files in it"),
        ("nowhere.pth", "no file at"),
    ]


def test_what_is_no_checkpoint_says_why(tmp_path):
    for name, text in broken_files(tmp_path):
        with pytest.raises(TruePoseError, match=text) as error:
            CheckpointReader(tmp_path / name)
        assert name in str(error.value)


def test_fp8_and_quantised_tensors_are_refused_by_name(tmp_path):
    quantised = {
        "a.weight": torch.ones(2).to(torch.float8_e4m3fn),
        "b.weight": torch.ones(2, dtype=torch.int8),
        "c.weight.absmax": torch.ones(2),
        "d.SCB": torch.ones(2),
        "e.scale_weight": torch.ones(1),
    }
    for name, x in quantised.items():
        save_file({"fine": torch.ones(2), name: x}, tmp_path / "x.safetensors")
        torch.save({"fine": torch.ones(2), name: x}, tmp_path / "x.pth")
        for path in (tmp_path / "x.safetensors", tmp_path / "x.pth"):
            with (
                CheckpointReader(path) as reader,
                pytest.raises(TruePoseError, match=rf"holds fp8, quantised .* 1 of them: {name}.*; get the float32"),
            ):
                refuse_quantised(reader.infos(), str(path))
    torch.save({"a": torch.ones(2, 2).to_sparse()}, tmp_path / "sparse.pth")
    with CheckpointReader(tmp_path / "sparse.pth") as reader, pytest.raises(TruePoseError, match=r"a \(sparse_coo\)"):
        refuse_quantised(reader.infos(), "it")


def test_whole_and_half_floats_are_no_quantised_tensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    with CheckpointReader(tmp_path / "x.safetensors") as reader:
        refuse_quantised(reader.infos(), "it")


def test_common_kinds_have_a_name():
    def kind(tensors):
        found = describe({k: TensorInfo(tuple(x.shape), "F32") for k, x in tensors.items()})
        return None if found is None else found.name

    nets = animate_anyone(context=768)
    assert kind(nets["denoising"]) == "a plain SD1.5 UNet"
    assert kind({f"unet.{k}": x for k, x in nets["denoising"].items()}) == "a plain SD1.5 UNet"
    assert kind(animate_anyone(context=2048)["denoising"]) == "a plain SDXL UNet"
    assert kind(nets["reference"]) == "an SD1.5 UNet without its output layer: a reference net"
    assert kind(nets["denoising"] | nets["motion"]) == "an SD1.5 UNet with a motion module"
    assert kind(nets["motion"]) == "a motion module alone"
    assert kind({f"{n}.{k}": x for n in "ab" for k, x in nets["denoising"].items()}) == "2 UNets in one file"
    wide = {**nets["denoising"], "conv_in.weight": torch.ones(32, 9, 3, 3)}
    assert kind(wide) == "an SD1.5 UNet with 9 input channels"
    one = torch.ones(1)
    for name, names in {
        "a LoRA": ("lora_unet_down_blocks_0.lora_down.weight",),
        "an IP-Adapter FaceID": ("image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight"),
        "a ControlNet": ("controlnet_cond_embedding.conv_in.weight",),
        "a VAE": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
        "a CLIP vision tower": ("vision_model.encoder.layers.0.mlp.fc1.weight",),
        "a CLIP text encoder": ("text_model.encoder.layers.0.mlp.fc1.weight",),
        "a diffusion transformer": ("double_blocks.0.img_attn.qkv.weight",),
        "a whole Stable Diffusion checkpoint": ("model.diffusion_model.input_blocks.0.0.weight",),
        None: ("some.weight",),
    }.items():
        assert kind(dict.fromkeys(names, one)) == name


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": ".."}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ' + "1" * 5_000 + "}}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "\ufeff{}",
    ],
)
def test_an_index_of_another_making_is_refused(tmp_path, text):
    path = tmp_path / "model.index.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TruePoseError, match=r"index\.json.*expected"), CheckpointReader(path):
        pass


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_checkpoint_cut_or_damaged_anywhere_is_read_or_refused(tmp_path, form):
    path, rng = tmp_path / "weights.pth", random.Random(0)
    tensors = {"a": torch.zeros(3), "b": {"c": torch.ones(2, 2)}}
    torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    refused = 0
    for number in range(400):
        damaged = bytearray(whole[: rng.randrange(1, len(whole))] if number % 2 else whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            with CheckpointReader(path) as reader:
                read = {name: reader.tensor(name) for name in reader.infos()}
        except TruePoseError as error:
            refused += "weights.pth" in str(error)
        else:
            assert sum(x.numel() for x in read.values()) < 100
    assert refused > 100


def test_tensors_larger_than_the_file_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    for tensor in (torch.zeros(1).expand(1 << 40), torch.empty(1 << 20, 1 << 20, device="meta")):
        torch.save({"weight": tensor}, path)
        with pytest.raises(TruePoseError, match=r"weight is \(.*does not hold as many"), CheckpointReader(path):
            pass


def test_a_small_file_that_unpacks_to_gigabytes_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for entry in whole.infolist():
            bomb.writestr(entry.filename, whole.read(entry))
        bomb.writestr("whole/data/1", bytes(300 << 20))
    assert (tmp_path / "bomb.pth").stat().st_size < 2**22
    with (
        pytest.raises(TruePoseError, match=r"bomb\.pth is compressed.*0\.3 GiB"),
        CheckpointReader(tmp_path / "bomb.pth"),
    ):
        pass
