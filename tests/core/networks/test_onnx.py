"""ONNX sessions: providers fall back loudly, sessions are shared and released, and every bad file is told apart."""

from __future__ import annotations

import logging
import os
import sys
import types

import numpy as np
import onnxruntime
import pytest
from onnx_models import save_add_one, save_parser, save_schp

from truepose_core.errors import TruePoseError
from truepose_core.networks import onnx as onnx_runtime
from truepose_core.networks.onnx import PROVIDERS, available_providers, close_sessions, open_session, shape_text

X = {"x": np.arange(3, dtype=np.float32)}


@pytest.fixture(autouse=True)
def _released():
    yield
    close_sessions()


@pytest.fixture
def network(tmp_path):
    return save_add_one(tmp_path / "add.onnx")


def offer(monkeypatch, *words):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [PROVIDERS[word] for word in words])


def test_it_runs_and_tells_its_shapes(tmp_path, network):
    session = open_session(network, provider="CPU")
    assert (session.provider, session.inputs, session.outputs) == ("CPU", {"x": (None,)}, {"y": (None,)})
    np.testing.assert_array_equal(session.run(X)["y"], [1, 2, 3])
    parser = open_session(save_schp(tmp_path, "lip"))
    assert parser.inputs == {"picture": (1, 3, 473, 473)}
    assert parser.outputs == {"coarse": (1, 20, 119, 119), "fused": (1, 20, 119, 119), "edge": (1, 2, 119, 119)}
    free = open_session(save_parser(tmp_path / "free.onnx", {"y": 2}, (None, None), batch=None))
    assert free.inputs == {"picture": (None, 3, None, None)}
    assert shape_text(free.inputs["picture"]) == "[any, 3, any, any]"


def test_floats_are_cast_and_nothing_else(network):
    session = open_session(network)
    np.testing.assert_array_equal(session.run({"x": X["x"].astype(np.float64)})["y"], [1, 2, 3])
    with pytest.raises(TruePoseError, match="is int64; expected float32"):
        session.run({"x": np.arange(3)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "takes the inputs"),
        ({"z": X["x"]}, "takes the inputs"),
        ({"x": np.zeros((2, 2), np.float32)}, "expected [any]"),
    ],
)
def test_wrong_inputs_are_refused(network, given, message):
    with pytest.raises(TruePoseError) as caught:
        open_session(network).run(given)
    assert message in str(caught.value)


# ------------------------------------------------------------------------------------------------ shared, released


def test_a_session_is_shared_until_its_file_changes(tmp_path, network):
    first = open_session(network)
    assert open_session(str(network)) is first
    assert open_session(network, provider="CPU") is first
    os.utime(network, ns=(1, 1))
    assert open_session(network) is not first


def test_closing_releases_and_the_next_run_opens_again(network, monkeypatch):
    opened = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(a) or real(*a, **k))
    session = open_session(network)
    session.close()
    np.testing.assert_array_equal(session.run(X)["y"], [1, 2, 3])
    assert len(opened) == 2
    close_sessions()
    assert open_session(network) is not session


def test_only_a_few_sessions_are_kept(tmp_path):
    sessions = [open_session(save_add_one(tmp_path / f"{i}.onnx")) for i in range(6)]
    assert len(onnx_runtime._kept) == onnx_runtime._KEPT
    assert open_session(tmp_path / "5.onnx") is sessions[5]
    assert open_session(tmp_path / "0.onnx") is not sessions[0]


# --------------------------------------------------------------------------------------------------- providers


def test_providers_come_in_our_order(monkeypatch):
    offer(monkeypatch, "CPU", "CoreML", "DirectML", "CUDA")
    assert available_providers() == ["CUDA", "DirectML", "CoreML", "CPU"]


def test_a_provider_that_does_not_start_falls_back_loudly(network, monkeypatch, caplog):
    offer(monkeypatch, "CUDA", "CoreML", "CPU")  # this onnxruntime has neither library
    with caplog.at_level(logging.WARNING, "truepose_core"):
        session = open_session(network)
    assert session.provider == "CPU"
    assert [record.getMessage()[:60] for record in caplog.records if "falling back" in record.getMessage()]
    words = " ".join(record.getMessage() for record in caplog.records)
    assert "CUDA does not start for add.onnx" in words and "falling back to CoreML" in words
    assert "CoreML does not start for add.onnx" in words and "falling back to CPU" in words
    np.testing.assert_array_equal(session.run(X)["y"], [1, 2, 3])


class Breaking:
    """A session that claims its provider and fails when it runs."""

    def __init__(self, path, options, providers, **rest):
        self.real = real_session(path, options, providers=["CPUExecutionProvider"], **rest)
        self.providers = providers

    def __getattr__(self, name):
        return getattr(self.real, name)

    def get_providers(self):
        return self.providers

    def run(self, names, fed):
        if self.providers[0] != "CPUExecutionProvider":
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("CUDA out of memory")
        return self.real.run(names, fed)


real_session = onnxruntime.InferenceSession


def test_a_provider_that_fails_in_a_run_falls_back_loudly(network, monkeypatch, caplog):
    offer(monkeypatch, "CUDA", "CPU")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Breaking)
    session = open_session(network)
    assert session.provider == "CUDA"
    with caplog.at_level(logging.WARNING, "truepose_core"):
        np.testing.assert_array_equal(session.run(X)["y"], [1, 2, 3])
    assert session.provider == "CPU"
    assert "CUDA failed for add.onnx (CUDA out of memory); falling back to CPU" in caplog.text
    caplog.clear()
    session.run(X)
    assert not caplog.records


def test_when_the_last_provider_fails_it_is_an_error(network, monkeypatch):
    class Failing(Breaking):
        def run(self, names, fed):
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("no memory\nsecond line")

    offer(monkeypatch, "CPU")
    monkeypatch.setattr(onnxruntime, "InferenceSession", Failing)
    with pytest.raises(TruePoseError, match=r"add.onnx failed while it ran: no memory$"):
        open_session(network).run(X)


def test_a_provider_asked_for_must_be_there(network, monkeypatch):
    offer(monkeypatch, "CPU")
    with pytest.raises(TruePoseError, match=r"no CUDA, only CPU.*onnxruntime-gpu"):
        open_session(network, provider="CUDA")
    with pytest.raises(TruePoseError, match="unknown provider 'TPU'"):
        open_session(network, provider="TPU")
    assert open_session(network, provider="cpu").provider == "CPU"


def test_a_gpu_that_is_not_used_is_told_once(network, monkeypatch, caplog):
    import torch

    onnx_runtime._tell_about_gpu.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING, "truepose_core"):
        open_session(network), open_session(network)
    assert caplog.text.count("does not use the NVIDIA GPU") == 1
    onnx_runtime._tell_about_gpu.cache_clear()


@pytest.mark.parametrize(
    ("module", "message"), [(None, "not installed"), (types.ModuleType("onnxruntime"), "installed but broken")]
)
def test_without_onnxruntime_it_says_what_to_install(network, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    with pytest.raises(TruePoseError, match=message) as caught:
        open_session(network)
    for package in ("onnxruntime-gpu", "onnxruntime-directml", "pip install onnxruntime", "Never two together"):
        assert package in str(caught.value)


# --------------------------------------------------------------------------------------------------- bad files


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TruePoseError, match="there is no ONNX file"):
        open_session(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"PK\x03\x04 weights", "a PyTorch or zip file"),
        (b"\x80\x02}q\x00", "a Python pickle"),
        (b"hello, this is no model", "it begins with b'hello, t'"),
    ],
)
def test_a_file_that_is_no_onnx_model_says_what_it_is(tmp_path, content, message):
    path = tmp_path / "other.onnx"
    path.write_bytes(content)
    with pytest.raises(TruePoseError) as caught:
        open_session(path)
    assert message in str(caught.value) and "other.onnx" in str(caught.value)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_model_is_told(tmp_path, share):
    path = save_schp(tmp_path, "atr")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TruePoseError, match="truncated or damaged"):
        open_session(path)


@pytest.mark.parametrize("versions", [{"opset": 999}, {"ir_version": 999}])
def test_a_model_for_a_newer_onnxruntime_is_told(tmp_path, versions):
    with pytest.raises(TruePoseError, match=r"newer onnxruntime than .*lower opset"):
        open_session(save_add_one(tmp_path / "new.onnx", **versions))


def test_an_unknown_operator_is_told(tmp_path):
    path = save_add_one(tmp_path / "odd.onnx")
    path.write_bytes(path.read_bytes().replace(b"\x22\x03Add", b"\x22\x03Xdd"))
    with pytest.raises(TruePoseError, match="cannot be used by this onnxruntime"):
        open_session(path)


def test_weights_in_a_file_that_is_missing_are_told(tmp_path):
    import onnx

    model = onnx.load(save_schp(tmp_path, "atr"))
    onnx.save_model(model, tmp_path / "split.onnx", save_as_external_data=True, location="split.data", size_threshold=0)
    (tmp_path / "split.data").unlink()
    with pytest.raises(TruePoseError, match="another file that is not beside it"):
        open_session(tmp_path / "split.onnx")
