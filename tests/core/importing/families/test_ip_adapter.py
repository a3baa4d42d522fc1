"""IP-Adapter files: recognised from keys and shapes, kept under their own names, refused when they are relatives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from foreign import flat, ip_adapter, unet
from safetensors.torch import load_file, save_file

from truepose_core.errors import TruePoseError
from truepose_core.importing.convert import convert, find
from truepose_core.importing.families.ip_adapter import IPAdapter, shapes_of
from truepose_core.models.ip_adapter import RegionAdapter, recognise
from truepose_core.weights.reading import TensorInfo
from truepose_core.weights.strict import read_metadata, weights_hash

KINDS = ("plain", "plus")


@pytest.fixture
def written(tmp_path):
    def write(tensors, name="x.bin"):
        path = tmp_path / name
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
        return path

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_both_published_forms_become_the_same_file(kind, written, tmp_path):
    nested = ip_adapter(kind)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    convert([written(nested)], a)
    convert([written(flat(nested), "x.safetensors")], b)
    tensors = load_file(a)
    assert tensors.keys() == flat(nested).keys()
    assert all(torch.equal(tensors[name], x) for name, x in flat(nested).items())
    assert weights_hash(tensors) == weights_hash(load_file(b)) == read_metadata(b)["sha256"]
    metadata = read_metadata(a)
    assert (metadata["architecture"], metadata["family"]) == ("ip-adapter", "ip-adapter")
    assert json.loads(metadata["config"])["widths"] == [32, 32, 64]
    assert find([a]).plan.tensors == find([written(nested)]).plan.tensors


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_loads_here_and_in_diffusers(kind, written, tmp_path):
    net = copy.deepcopy(unet())
    widths = [block.attn2.inner_dim for block in blocks(net)]
    nested = ip_adapter(kind, widths)
    out = tmp_path / "out.safetensors"
    convert([written(nested)], out)
    tensors = load_file(out)
    assert RegionAdapter.from_tensors(tensors).config.widths == tuple(widths)
    halves = {
        half: {k.removeprefix(f"{half}."): x for k, x in tensors.items() if k.startswith(half)} for half in nested
    }
    net._load_ip_adapter_weights([halves])
    processors = [processor for name, processor in net.attn_processors.items() if "attn2" in name]
    for n, processor in enumerate(processors):
        assert torch.equal(processor.to_k_ip[0].weight, nested["ip_adapter"][f"{2 * n + 1}.to_k_ip.weight"])
        assert torch.equal(processor.to_v_ip[0].weight, nested["ip_adapter"][f"{2 * n + 1}.to_v_ip.weight"])


def blocks(net):
    """Transformer blocks in the order of diffusers' attention processors."""
    modules = dict(net.named_modules())
    return [modules[name.removesuffix(".attn2.processor")] for name in net.attn_processors if "attn2" in name]


@pytest.mark.parametrize(
    ("widths", "context", "title"),
    [
        ([320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280], 768, "SD1.5"),
        ([640] * 4 + [1280] * 50 + [640] * 6 + [1280] * 10, 2048, "SDXL"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_full_size_manifests_are_explained(kind, widths, context, title):
    """Nothing missing and nothing unknown at published sizes, without a byte of weights."""
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in manifest(kind, widths, context).items()}
    infos = {name: TensorInfo(shape, "F16") for name, shape in shapes.items()}
    parts = IPAdapter().recognise(0, infos)
    assert {part.role for part in parts} == {"image projection", "cross-attention"}
    plan = IPAdapter().plan(parts, [infos], {})
    assert plan.expected == shapes
    assert set(plan.tensors) == set(infos)
    assert title in plan.metadata["title"]
    assert ("Plus" in plan.metadata["title"]) == (kind == "plus")


def manifest(kind, widths, context):
    image = plus_manifest(context)
    if kind == "plain":
        image = {"proj.weight": (4 * context, 1024), "proj.bias": (4 * context,)}
        image |= {"norm.weight": (context,), "norm.bias": (context,)}
    sites = {f"{2 * i + 1}.to_{p}_ip.weight": (w, context) for i, w in enumerate(widths) for p in "kv"}
    halves = {"image_proj": image, "ip_adapter": sites}
    return flat({half: {k: torch.empty(shape) for k, shape in part.items()} for half, part in halves.items()})


def plus_manifest(context, dim=768, inner=768, tokens=16, clip=1280):
    shapes = {"latents": (1, tokens, dim), "proj_in.weight": (dim, clip), "proj_in.bias": (dim,)}
    shapes |= {"proj_out.weight": (context, dim), "proj_out.bias": (context,)}
    shapes |= {"norm_out.weight": (context,), "norm_out.bias": (context,)}
    for i in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{norm}.weight": (dim,), f"layers.{i}.{norm}.bias": (dim,)}
        shapes |= {f"layers.{i}.0.to_q.weight": (inner, dim), f"layers.{i}.0.to_kv.weight": (2 * inner, dim)}
        shapes |= {f"layers.{i}.0.to_out.weight": (dim, inner)}
        shapes |= {f"layers.{i}.1.1.weight": (4 * dim, dim), f"layers.{i}.1.3.weight": (dim, 4 * dim)}
    return shapes


def test_expected_shapes_are_the_networks(written):
    for kind in KINDS:
        tensors = flat(ip_adapter(kind))
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        assert shapes_of(recognise(shapes)) == shapes


def without(tensors, text):
    return {name: x for name, x in tensors.items() if text not in name}


def test_bad_files_are_refused(written):
    plus = flat(ip_adapter("plus"))
    plain = flat(ip_adapter("plain"))
    gap = {k.replace("ip_adapter.5.", "ip_adapter.7."): x for k, x in plus.items()}
    face = {f"image_proj.{name}.weight": torch.ones(4, 4) for name in ("proj.0", "norm")}
    face |= without(plus, "image_proj")
    for tensors, text in (
        (without(plus, "image_proj"), "not its image_proj half"),
        (without(plus, "ip_adapter"), "not its ip_adapter half"),
        ({**plus, "ip_adapter.0.to_q_lora.down.weight": torch.ones(1)}, "is an IP-Adapter FaceID"),
        (face, "is an IP-Adapter FaceID"),
        (gap, "numbered 1, 3, 7"),
        (without(plus, "3.to_v_ip"), r"lacks 1 tensors: ip_adapter\.3\.to_v_ip\.weight"),
        (without(plus, "layers.1.0.norm2"), r"lacks 2 tensors: image_proj\.layers\.1\.0\.norm2\.bias"),
        ({**plus, "image_proj.more": torch.ones(1)}, r"1 tensors that nobody knows: image_proj\.more"),
        ({**plain, "image_proj.norm.weight": torch.ones(3)}, r"image_proj\.norm\.weight is \(3,\), expected \(16,\)"),
        ({**plus, "ip_adapter.3.to_k_ip.weight": torch.ones(32, 9)}, r"to_k_ip\.weight is \(32, 9\), expected \(32, "),
    ):
        with pytest.raises(TruePoseError, match=text):
            find([written(tensors)])


def test_two_ip_adapters_are_not_one(written):
    files = [written(ip_adapter("plus"), "a.bin"), written(ip_adapter("plus", seed=1), "b.bin")]
    with pytest.raises(TruePoseError, match=r"a\.bin and b\.bin each have an IP-Adapter's image projection"):
        find(files)


def test_halves_may_come_in_two_files(written, tmp_path):
    tensors = flat(ip_adapter("plus"))
    files = [written(without(tensors, "ip_adapter"), "a.bin"), written(without(tensors, "image_proj"), "b.safetensors")]
    convert(files, tmp_path / "out.safetensors")
    assert weights_hash(load_file(tmp_path / "out.safetensors")) == weights_hash(tensors)
