"""Known models: found on disk under any of their names, fetched only when asked, whole and right or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
import threading
from collections import namedtuple
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from truepose_core.errors import TruePoseError
from truepose_core.networks import known
from truepose_core.networks.known import KNOWN, KnownModel, by_hand, default_folder, download, find, get, locate

CONTENT = bytes(range(256)) * 20_000  # 5 MB: several chunks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT. cut: stop after that many bytes of an answer. asked: the Range header of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.cut, self.ranges, self.status, self.content = [], None, True, None, CONTENT

    def model(self, **changes) -> KnownModel:
        base = KnownModel("toy", ("toy.onnx", "old.onnx"), "tests", "http://page", "none")
        url = f"http://127.0.0.1:{self.server_address[1]}/path/model.onnx"
        return replace(base, **{"url": url, "size": len(CONTENT), "sha256": SHA256, **changes})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            self.send_error(server.status)
            return
        content, start = server.content, 0
        if asked and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : None if server.cut is None else start + server.cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_comes_whole_under_its_own_name_with_progress(server, tmp_path):
    seen = []
    path = download(
        server.model(), tmp_path / "new" / "folder", progress=lambda done, total: seen.append((done, total))
    )
    assert path == tmp_path / "new" / "folder" / "toy.onnx" and path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["toy.onnx"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and sorted(seen) == seen and len(seen) > 2


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    download(server.model(), tmp_path)
    download(server.model(), tmp_path)
    assert len(server.asked) == 1


def test_a_cut_connection_keeps_what_came_and_the_next_call_goes_on(server, tmp_path):
    server.cut = 3_000_000
    with pytest.raises(TruePoseError, match=r"broke off.*are kept, start it again to go on"):
        download(server.model(), tmp_path)
    assert not (tmp_path / "toy.onnx").exists()
    kept = (tmp_path / "toy.onnx.part").stat().st_size
    assert 0 < kept <= 3_000_000
    server.cut = None
    assert download(server.model(), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_server_that_cannot_resume_starts_over(server, tmp_path):
    (tmp_path / "toy.onnx.part").write_bytes(b"x" * 1000)
    server.ranges = False
    assert download(server.model(), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("length", [len(CONTENT), len(CONTENT) + 7])
@pytest.mark.parametrize("size", [len(CONTENT), None])
def test_a_part_that_is_whole_or_too_long_ends_right(server, tmp_path, length, size):
    (tmp_path / "toy.onnx.part").write_bytes((CONTENT + b"surplus")[:length])
    assert download(server.model(size=size), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(TruePoseError, match=rf"sha256 is {SHA256}, expected 0000.*was deleted"):
        download(server.model(sha256="0" * 64), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_file_is_caught_by_the_hash(server, tmp_path):
    (tmp_path / "toy.onnx.part").write_bytes(b"x" * 1000)
    with pytest.raises(TruePoseError, match="not the published toy"):
        download(server.model(), tmp_path)
    assert download(server.model(), tmp_path).read_bytes() == CONTENT


def test_without_a_published_hash_the_file_is_taken_as_it_is(server, tmp_path):
    assert download(server.model(sha256=None, size=None), tmp_path).read_bytes() == CONTENT


def test_a_web_page_in_place_of_the_file_is_refused_before_it_is_stored(server, tmp_path):
    server.content = b"<html>sign in first</html>"
    with pytest.raises(TruePoseError, match="the answer is a web page"):
        download(server.model(), tmp_path)
    assert not (tmp_path / "toy.onnx").exists()


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_refusal_says_how_to_get_the_file_by_hand(server, tmp_path, status):
    server.status = status
    with pytest.raises(TruePoseError, match=f"answers {status}") as caught:
        download(server.model(), tmp_path)
    assert f"download model.onnx and put it at {tmp_path / 'toy.onnx'}" in str(caught.value)


def test_without_network_it_says_which_file_to_put_where(server, tmp_path):
    model = server.model(url="http://127.0.0.1:9/path/model.onnx")
    with pytest.raises(TruePoseError, match="could not start") as caught:
        download(model, tmp_path)
    assert f"Open http://page, download model.onnx and put it at {tmp_path / 'toy.onnx'}" in str(caught.value)


def test_a_full_disk_is_told_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "total used free")(9, 9, 2 << 20))
    with pytest.raises(TruePoseError, match=r"toy needs 4 MiB .* 2 MiB free"):
        download(server.model(), tmp_path)
    assert not server.asked


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TruePoseError, match="cannot be written"):
        download(server.model(), tmp_path / "file" / "folder")


def test_ctrl_c_keeps_what_came(server, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.model(), tmp_path, progress=stop)
    assert (tmp_path / "toy.onnx.part").exists() and not (tmp_path / "toy.onnx").exists()
    assert download(server.model(), tmp_path).read_bytes() == CONTENT


def test_a_model_without_a_file_says_how_to_make_it(tmp_path):
    with pytest.raises(TruePoseError, match=r"cannot be downloaded.*optimum-cli export onnx"):
        get("segformer-b3-clothes", tmp_path)


# ---------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("name", KNOWN)
def test_every_known_model_is_told_in_full(name):
    model = KNOWN[name]
    assert model.name == name and model.purpose and model.licence and model.page.startswith("https://")
    assert all(file.endswith(".onnx") for file in model.files)
    if model.url is None:
        assert model.how and model.size is None and model.sha256 is None
    else:
        assert model.url.startswith("https://") and model.url.endswith(".onnx") and model.size > 10**8
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
    assert str(default_folder() / model.file) in by_hand(model, default_folder())


def test_no_two_known_models_share_a_file_name():
    names = [file for model in KNOWN.values() for file in model.files]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", KNOWN["schp-atr"].files)
@pytest.mark.parametrize("inside", [".", "humanparsing"])
def test_a_model_is_found_under_each_of_its_names_at_any_depth(tmp_path, file, inside):
    (tmp_path / "b" / inside).mkdir(parents=True, exist_ok=True)
    (tmp_path / "b" / inside / file).write_bytes(b"")
    assert locate("schp-atr", [tmp_path / "a", tmp_path / "b"]) == tmp_path / "b" / inside / file


def test_a_missing_model_says_which_file_goes_where_and_what_fetches_it(tmp_path):
    assert find("dwpose", [tmp_path]) is None
    with pytest.raises(TruePoseError, match="truepose models get dwpose") as caught:
        locate("dwpose", [tmp_path, tmp_path / "b"])
    assert f"put it at {tmp_path / 'dw-ll_ucoco_384.onnx'}" in str(caught.value)
    with pytest.raises(TruePoseError) as caught:
        locate("segformer-b3-clothes", [tmp_path])
    assert "models get" not in str(caught.value)


@pytest.mark.parametrize("call", [lambda: get("nose", "."), lambda: find("nose", []), lambda: locate("nose", [])])
def test_an_unknown_name_lists_the_known_ones(call):
    with pytest.raises(TruePoseError, match="schp-atr, schp-lip"):
        call()


def test_the_default_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv(known.MODELS_VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv(known.MODELS_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert default_folder() == tmp_path / "cache" / "truepose" / "models"
