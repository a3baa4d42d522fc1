"""A batch on ComfyUI servers that work, die, hang and answer rubbish. The servers here speak ComfyUI's API and draw
nothing; `tests/host/test_batch.py` asks a real one."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from PIL import Image

from truepose_core.cli import main
from truepose_core.cli.batch.store import Store

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
WORKFLOW = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "{{source}}"}},
    "2": {"class_type": "Pose", "inputs": {"json": "{{pose:text}}", "seed": "{{seed}}", "note": "of {{id}}"}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
}


class Server:
    """One that makes a picture of what a workflow says. behave(n) is called for the n-th workflow, from 1, and may give
    "die" (closes for good), "hang", "rubbish", "error" or "away" (does not answer for a second)."""

    def __init__(self, behave=lambda n: "work"):
        self.behave, self.prompts, self.uploads, self.closed, self.away = behave, [], {}, False, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, data, code=200):
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def gone(self):
                if outer.closed or time.monotonic() < outer.away:
                    self.close_connection = True
                    return True
                return False

            def do_GET(self):
                if not self.gone():
                    outer.get(self, urlparse(self.path))

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.gone():
                    outer.post(self, self.path, body)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def post(self, handler, path, body):
        if path == "/upload/image":
            _, _, rest = body.partition(b'filename="')
            name = rest.partition(b'"')[0].decode()
            self.uploads[name] = rest.partition(b"\r\n\r\n")[2].rpartition(b"\r\n--")[0]
            return handler.answer({"name": name, "subfolder": "", "type": "input"})
        workflow = json.loads(body)["prompt"]
        self.prompts.append(workflow)
        what = self.behave(len(self.prompts))
        if what == "die":
            self.closed = True
            return None
        if what == "away":
            self.away = time.monotonic() + 1
            return None
        if what == "rubbish":
            return handler.answer(b"<html>Bad gateway</html>")
        if what == "refuse":
            errors = [{"message": "Value not in list", "details": "ckpt_name"}]
            return handler.answer({"error": {}, "node_errors": {"1": {"class_type": "LoadX", "errors": errors}}}, 400)
        return handler.answer({"prompt_id": f"{what}-{len(self.prompts) - 1}", "number": 1, "node_errors": {}})

    def get(self, handler, url):
        if url.path == "/system_stats":
            return handler.answer({"system": {}, "devices": []})
        if url.path.startswith("/history/"):
            number = url.path.rpartition("/")[2]
            what, _, n = number.partition("-")
            if what == "hang":
                return handler.answer({})
            if what == "error":
                message = ["execution_error", {"node_type": "KSampler", "exception_message": "no memory\n"}]
                return handler.answer(
                    {number: {"outputs": {}, "status": {"status_str": "error", "messages": [message]}}}
                )
            images = [{"filename": n, "subfolder": "", "type": "output"}]
            return handler.answer({number: {"outputs": {"3": {"images": images}}, "status": {"status_str": "success"}}})
        workflow = self.prompts[int(parse_qs(url.query)["filename"][0])]
        return handler.answer(drawn(self.uploads[workflow["1"]["inputs"]["image"]], workflow["2"]["inputs"]))

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def drawn(source: bytes, inputs) -> bytes:
    digest = hashlib.sha256(source + json.dumps(inputs, sort_keys=True).encode()).digest()
    buffer = io.BytesIO()
    Image.frombytes("RGB", (16, 16), digest * 24).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def servers():
    made = []

    def start(*behaviours):
        made.extend(Server(b) if b else Server() for b in behaviours)
        return made

    yield start
    for server in made:
        server.close()


@pytest.fixture
def shop(tmp_path):
    """Ten rows of two sources and five poses, and the workflow."""
    for i in range(2):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"p{i}.png")
    for k in range(5):
        (tmp_path / f"pose{k}.json").write_text(json.dumps({"pose": k}))
    rows = [f"r{i}{k},{tmp_path}/p{i}.png,{tmp_path}/pose{k}.json,{k}" for i in range(2) for k in range(5)]
    (tmp_path / "t.csv").write_text("id,source,pose,seed\n" + "\n".join(rows) + "\n")
    (tmp_path / "api.json").write_text(json.dumps(WORKFLOW))
    return tmp_path


def run(shop, pool, *extra: str) -> int:
    argv = ["batch", str(shop / "t.csv"), "--out", str(shop / "out"), "--workflow", str(shop / "api.json"), "--quiet"]
    return main([*argv, "--comfyui", *(server.url for server in pool), *extra])


def expected(shop) -> dict[str, bytes]:
    wanted = {}
    for i in range(2):
        for k in range(5):
            inputs = {"json": json.dumps({"pose": k}), "seed": k, "note": f"of r{i}{k}"}
            wanted[f"r{i}{k}.png"] = drawn((shop / f"p{i}.png").read_bytes(), inputs)
    return wanted


def made(shop) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (shop / "out" / "pictures").iterdir()}


def test_two_servers_share_the_rows(shop, servers):
    pool = servers(None, None)
    assert run(shop, pool) == 0
    assert made(shop) == expected(shop)
    assert sum(len(server.prompts) for server in pool) == 10
    assert all(server.prompts for server in pool)
    # A source is uploaded once to a server.
    assert all(len(server.uploads) <= 2 for server in pool)
    assert run(shop, pool) == 0
    assert sum(len(server.prompts) for server in pool) == 10


@pytest.mark.parametrize("fault", ["die", "rubbish", "hang"])
def test_a_server_that_fails_leaves_its_rows_to_the_other(shop, servers, fault):
    pool = servers(None, lambda n: fault if n >= 2 else "work")
    assert run(shop, pool, "--timeout", "1", "--patience", "2", "--retries", "9") == 0
    assert made(shop) == expected(shop)


def test_a_server_that_comes_back_goes_on(shop, servers):
    (server,) = servers(lambda n: "away" if n == 3 else "work")
    assert run(shop, [server], "--patience", "30") == 0
    assert made(shop) == expected(shop)
    assert len(server.prompts) == 11


def test_when_all_servers_are_gone_the_rest_fails_and_can_go_on(shop, servers, capsys):
    pool = servers(lambda n: "die" if n == 4 else "work")
    assert run(shop, pool, "--patience", "1") == 2
    assert "7 of 10 rows failed" in capsys.readouterr().err
    assert {r["error"] for r in Store(str(shop / "out")).records().values() if r["status"] == "failed"} == {
        "every ComfyUI server failed and none came back"
    }
    assert run(shop, servers(None)[1:]) == 0
    assert made(shop) == expected(shop)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("error", "ComfyUI could not do it: KSampler: no memory"),
        ("refuse", "ComfyUI refuses the workflow: LoadX: Value not in list (ckpt_name)"),
    ],
)
def test_a_row_that_comfyui_cannot_do_is_not_tried_again(shop, servers, what, message):
    (server,) = servers(lambda n: what if n == 1 else "work")
    assert run(shop, [server]) == 2
    assert len(server.prompts) == 10
    failed = [r["error"] for r in Store(str(shop / "out")).records().values() if r["status"] == "failed"]
    assert failed == [message]


def test_a_missing_picture_fails_its_row_alone(shop, servers):
    (shop / "pose4.json").unlink()
    assert run(shop, servers(None)) == 2
    records = Store(str(shop / "out")).records()
    assert sorted(name for name, r in records.items() if r["status"] == "failed") == ["r04", "r14"]


def test_wrong_options_are_one_line(shop, servers, capsys):
    (server,) = servers(None)
    drawing = shop / "drawing.json"
    drawing.write_text(json.dumps({"nodes": [], "links": []}))
    strange = shop / "strange.json"
    strange.write_text(json.dumps({"1": {"class_type": "X", "inputs": {"a": "{{garment}}"}}}))
    fixed = shop / "fixed.json"
    fixed.write_text(json.dumps({"1": {"class_type": "X", "inputs": {"a": "b"}}}))
    base = ["batch", str(shop / "t.csv"), "--out", str(shop / "out"), "--quiet"]
    for argv, message in (
        (["--comfyui", server.url], "--comfyui and --workflow belong together"),
        (["--comfyui", server.url, "--workflow", str(drawing)], "is no workflow in API format"),
        (["--comfyui", server.url, "--workflow", str(strange)], "the workflow asks for {{garment}}"),
        (["--comfyui", server.url, "--workflow", str(fixed)], "has neither {{source}} nor {{pose}}"),
        (["--comfyui", "gpu1", "--workflow", str(shop / "api.json")], "gpu1 is no address"),
        (["--comfyui", "http://127.0.0.1:9", "--workflow", str(shop / "api.json")], "no ComfyUI server answers at"),
        (["--comfyui", server.url, "--workflow", str(fixed), "--workers", "2"], "with --comfyui the servers work"),
    ):
        assert main([*base, *argv]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
