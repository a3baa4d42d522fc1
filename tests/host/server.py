"""A real ComfyUI for tests: find it, start it hermetically, talk to it.

    host = find_host(PACK)      # of truepose_core.benchmark.host; None where there is no ComfyUI
    with Server(host, folder) as comfy:
        comfy.object_info()
        entry = comfy.run({"1": {"class_type": "...", "inputs": {...}}})

The server gets a base directory of its own (models, input, output, custom_nodes), a database of its own and a free
port, so a user's installation is read and never written.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from truepose_core.benchmark.host import Host

PACK = Path(__file__).resolve().parents[2]
PACK_NAME = "ComfyUI-TruePose"
FIXTURE_PACK = Path(__file__).resolve().parent / "fixture_pack"


class PromptFailed(AssertionError):
    """The host refused a prompt or a node raised. `.node`, `.kind` and `.text` say which and why."""

    def __init__(self, node: str | None, kind: str, text: str) -> None:
        super().__init__(f"node {node}: {kind}: {text}")
        self.node, self.kind, self.text = node, kind, text


class Server:
    """A running ComfyUI. `folder` becomes its base directory; `args` are more command line arguments."""

    def __init__(
        self,
        host: Host,
        folder: Path,
        args: tuple[str, ...] = (),
        pack: Path = PACK,
        boot_seconds: float = 600,
    ) -> None:
        self.host, self.folder, self.args = host, folder, args
        self.pack, self.boot_seconds = pack, boot_seconds
        self.log_file = folder / "server.log"
        self.process: subprocess.Popen | None = None
        self.port = 0

    def __enter__(self) -> Server:
        nodes = self.folder / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        for name in ("input", "output", "models"):
            (self.folder / name).mkdir(exist_ok=True)
        for source, name in ((self.pack, PACK_NAME), (FIXTURE_PACK, "truepose_test_fixtures")):
            if not (nodes / name).exists():
                _place(source, nodes / name)
        self.port = _free_port()
        command = [str(self.host.python), "-u", "main.py", "--port", str(self.port)]
        command += ["--listen", "127.0.0.1", "--base-directory", str(self.folder)]
        # In a file: SQLAlchemy gives each thread its own database in memory, and fails to close another thread's.
        command += ["--database-url", f"sqlite:///{self.folder / 'comfyui.db'}", "--disable-auto-launch"]
        if not _has_cuda(self.host):
            command.append("--cpu")
        environment = dict(os.environ, PYTHONUNBUFFERED="1", NO_PROXY="127.0.0.1,localhost")
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen(
                command + list(self.args),
                cwd=self.host.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        end = time.monotonic() + self.boot_seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while starting:\n{self.log()[-4000:]}")
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return self
        self.__exit__()
        raise RuntimeError(f"ComfyUI did not answer in {self.boot_seconds} s:\n{self.log()[-4000:]}")

    def __exit__(self, *exc: object) -> None:
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        """Everything the server printed so far."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    @staticmethod
    def our_lines(log: str) -> list[str]:
        """Lines of a log that speak of the pack, without the ones that list import times and folders."""
        lines = [line for line in log.splitlines() if "truepose" in line.lower()]
        return [line for line in lines if "seconds" not in line and "base directory" not in line.lower()]

    def raw(self, path: str, data: bytes | None = None, timeout: float = 60) -> bytes:
        request = urllib.request.Request(self.url + path, data=data)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        # No proxy: the server is on the loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        return json.loads(self.raw(path))

    def post(self, path: str, body: object) -> dict:
        answer = self.raw(path, json.dumps(body).encode())
        return json.loads(answer) if answer.strip() else {}

    def object_info(self) -> dict:
        return self.get("/object_info")

    def run(self, prompt: dict, timeout: float = 300) -> dict:
        """Run an API-format prompt and return its history entry. Raises PromptFailed with the node's message."""
        body = {"prompt": prompt, "client_id": uuid.uuid4().hex}
        try:
            prompt_id = self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise _refused(json.loads(error.read())) from None
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                break
            if self.process is not None and self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI died:\n{self.log()[-4000:]}")
            time.sleep(0.1)
        else:
            raise TimeoutError(f"no result after {timeout} s:\n{self.log()[-4000:]}")
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_error":
                raise PromptFailed(message["node_id"], message["exception_type"], message["exception_message"].strip())
        return entry

    def images(self, entry: dict, node: str) -> list:
        """The images a node showed or saved, as a list of uint8 arrays [H, W, C]."""
        import io

        import numpy
        from PIL import Image

        out = []
        for image in entry["outputs"][node]["images"]:
            data = self.raw("/view?" + urllib.parse.urlencode(image))
            out.append(numpy.array(Image.open(io.BytesIO(data))))
        return out

    def executed(self, entry: dict) -> set[str]:
        """Ids of the nodes that ran, i.e. were not taken from the cache."""
        cached: set[str] = set()
        for kind, message in entry["status"]["messages"]:
            if kind == "execution_cached":
                cached |= set(message["nodes"])
        return set(entry["prompt"][2]) - cached


def _refused(answer: dict) -> PromptFailed:
    for node, errors in answer.get("node_errors", {}).items():
        first = errors["errors"][0]
        return PromptFailed(node, first["type"], f"{first['message']}: {first['details']}")
    error = answer["error"]
    return PromptFailed(None, error["type"], f"{error['message']}: {error['details']}")


def _place(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without the right to make links
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_CUDA: dict[Path, bool] = {}


def _has_cuda(host: Host) -> bool:
    if host.python not in _CUDA:
        code = "import torch; print(torch.cuda.is_available())"
        answer = subprocess.run([str(host.python), "-c", code], capture_output=True, text=True, check=True)
        _CUDA[host.python] = "True" in answer.stdout
    return _CUDA[host.python]
