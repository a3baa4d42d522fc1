"""The rows of a batch on a pool of ComfyUI servers: one at a time each, and a server that fails gets no more of them
until it answers again.

The workflow is one in API format. Where a text of it is {{COLUMN}}, the row's cell is put: a number as a number, a
picture or another file by its name on the server after it is uploaded; {{COLUMN:text}} puts what a file holds.
"""

from __future__ import annotations

import http.client
import io
import json
import queue
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from truepose_core.cli.batch.spec import Job, Row
from truepose_core.cli.batch.store import PICTURES, Store
from truepose_core.cli.batch.work import record_of
from truepose_core.errors import TruePoseError
from truepose_core.json_text import parse_json, read_json
from truepose_core.workers import Outcome

_HOLE = re.compile(r"\{\{\s*([\w -]+?)\s*(:text)?\s*\}\}")
_MAX_ANSWER = 256 * 2**20


class ServerFault(Exception):
    """The server's fault, not the row's: another one may do it."""


@dataclass(frozen=True)
class Pool:
    """servers: their addresses. workflow: in API format, as `read_workflow` gives it. timeout: seconds that a row may
    take, answer that a server has for each request, patience that a server which fails is waited for, poll between two
    looks whether it is done. retries: how often a row is tried again, on whatever server is free."""

    servers: tuple[str, ...]
    workflow: Mapping[str, Any]
    timeout: float = 600.0
    answer: float = 30.0
    patience: float = 60.0
    poll: float = 0.5
    retries: int = 2


def read_workflow(path: str | Path) -> dict[str, Any]:
    """A workflow in API format. Raises TruePoseError for another file, such as one that is saved to be drawn."""
    values = read_json(Path(path), f"the workflow {path}")
    good = isinstance(values, dict) and values
    if not good or not all(isinstance(n, dict) and "class_type" in n and "inputs" in n for n in values.values()):
        raise TruePoseError(
            f"{path} is no workflow in API format; open it in ComfyUI and choose Workflow, Export (API)"
        )
    return values


def holes(workflow: Any) -> set[str]:
    """The columns that a workflow asks for."""
    return {match[0] for match in _HOLE.findall(json.dumps(workflow))}


def check_columns(pool: Pool, rows: Sequence[Row]) -> None:
    """Raises TruePoseError where the workflow asks for what no row has, or for nothing of a row."""
    wanted = holes(pool.workflow)
    there = {"id", "source", "pose"}.union(*({name for name, _ in row.options} for row in rows))
    if wanted - there:
        raise TruePoseError(
            f"the workflow asks for {{{{{min(wanted - there)}}}}}, and the table has the columns "
            f"{', '.join(sorted(there))}"
        )
    if not wanted & {"source", "pose"}:
        raise TruePoseError("the workflow has neither {{source}} nor {{pose}}; every row would be the same picture")


def run_pool(jobs: Sequence[Job], pool: Pool, store: Store, base: Sequence[str]) -> Iterator[Outcome[Job]]:
    """Do jobs of one row each on the servers, and yield each as it ends.

    Raises TruePoseError before the first when no server answers. When all have failed for `patience` seconds, what is
    left ends with an error.
    """
    if not jobs:
        return
    alive = [server for server in pool.servers if _healthy(server, pool.answer)]
    if not alive:
        raise TruePoseError(f"no ComfyUI server answers at {', '.join(pool.servers)}; start one, or check --comfyui")
    state = _State(len(jobs))
    for job in jobs:
        state.waiting.put((job, 1))
    threads = [
        threading.Thread(target=_serve, args=(server, pool, store, base, state), daemon=True) for server in pool.servers
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in range(len(jobs)):
            while True:
                try:
                    yield state.ended.get(timeout=0.2)
                    break
                except queue.Empty:
                    if not any(thread.is_alive() for thread in threads):
                        yield from _abandoned(state)
                        return
    finally:
        state.stop.set()


@dataclass
class _State:
    """What the servers' threads share."""

    left: int
    waiting: queue.Queue = field(default_factory=queue.Queue)
    ended: queue.Queue = field(default_factory=queue.Queue)
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self, outcome: Outcome[Job]) -> None:
        with self.lock:
            self.left -= 1
        self.ended.put(outcome)


def _abandoned(state: _State) -> Iterator[Outcome[Job]]:
    """What is left when no server is."""
    while not state.ended.empty():
        yield state.ended.get()
    while not state.waiting.empty():
        job, tries = state.waiting.get()
        yield Outcome(job, None, "every ComfyUI server failed and none came back", tries)


def _serve(server: str, pool: Pool, store: Store, base: Sequence[str], state: _State) -> None:
    """The thread of one server: a row at a time, until all are done or the server stays away."""
    uploads: dict[str, str] = {}
    while state.left and not state.stop.is_set():
        try:
            job, tries = state.waiting.get(timeout=0.2)
        except queue.Empty:
            continue
        row = job.rows[0]
        try:
            since = time.perf_counter()
            data = _make(server, pool, row, uploads)
            store.write(f"{PICTURES}/{row.id}.png", data)
            store.record(record_of(row, base, data=data, seconds=time.perf_counter() - since))
            state.end(Outcome(job, {"server": server}, None, tries))
        except TruePoseError as error:
            state.end(Outcome(job, None, str(error), tries))
        except ServerFault as fault:
            if tries > pool.retries:
                state.end(Outcome(job, None, f"{server}: {fault}", tries))
            else:
                state.waiting.put((job, tries + 1))
            uploads.clear()
            if not _comes_back(server, pool, state):
                return


def _comes_back(server: str, pool: Pool, state: _State) -> bool:
    until, pause = time.monotonic() + pool.patience, pool.poll
    while not state.stop.is_set() and state.left:
        # A server that answers at once may have failed for one row alone.
        state.stop.wait(pause)
        if _healthy(server, pool.answer):
            return True
        if time.monotonic() > until:
            return False
        pause = min(2 * pause, 10.0)
    return False


def _healthy(server: str, seconds: float) -> bool:
    try:
        return "system" in _json(server, "/system_stats", seconds)
    except ServerFault:
        return False


def _make(server: str, pool: Pool, row: Row, uploads: dict[str, str]) -> bytes:
    """One row's picture as PNG."""
    workflow = _filled(pool.workflow, row, lambda path: _uploaded(server, path, pool.answer, uploads))
    answer = _json(server, "/prompt", pool.answer, {"prompt": workflow, "client_id": uuid.uuid4().hex})
    number = answer.get("prompt_id")
    if not isinstance(number, str):
        raise ServerFault(f"answered {str(answer)[:200]} to a workflow")
    until = time.monotonic() + pool.timeout
    while True:
        history = _json(server, f"/history/{urllib.parse.quote(number)}", pool.answer).get(number)
        if isinstance(history, dict):
            break
        if time.monotonic() > until:
            raise ServerFault(f"did not finish a row in {pool.timeout:g} s")
        time.sleep(pool.poll)
    status = history.get("status")
    if isinstance(status, dict) and status.get("status_str") == "error":
        raise TruePoseError(f"ComfyUI could not do it: {_told(status)}")
    outputs = history.get("outputs")
    images = [
        image
        for node in (outputs.values() if isinstance(outputs, dict) else ())
        for image in (node.get("images", ()) if isinstance(node, dict) else ())
        if isinstance(image, dict) and image.get("type") == "output"
    ]
    if len(images) != 1:
        raise TruePoseError(f"the workflow saved {len(images)} pictures; expected one Save Image with one picture")
    words = {name: str(images[0].get(name, "")) for name in ("filename", "subfolder", "type")}
    return _png(_request(server, "/view?" + urllib.parse.urlencode(words), pool.answer))


def _told(status: Mapping[str, Any]) -> str:
    for kind, about in status.get("messages", ()):
        if kind == "execution_error" and isinstance(about, dict):
            return f"{about.get('node_type')}: {str(about.get('exception_message', '')).strip()}"
    return "it does not say why"


def _png(data: bytes) -> bytes:
    """A whole PNG of what the server gave, without the workflow that it writes into its files."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = image.convert("RGB")
    except Exception as error:
        raise ServerFault(f"gave a picture that cannot be read ({error})") from error
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    return buffer.getvalue()


def _filled(workflow: Mapping[str, Any], row: Row, upload: Callable[[Path], str]) -> dict[str, Any]:
    """The workflow with the row's cells in its holes."""
    cells = {"id": row.id, "source": row.source, "pose": row.pose, **dict(row.options)}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: fill(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [fill(inner) for inner in value]
        if not isinstance(value, str):
            return value
        whole = _HOLE.fullmatch(value)
        if whole is None:
            return _HOLE.sub(lambda hole: str(cells.get(hole[1], "")), value)
        cell = cells.get(whole[1])
        if cell is None:
            raise TruePoseError(f"the workflow asks for {whole[1]}, and this row has none")
        path = Path(cell)
        if whole[2]:
            return _text(path)
        if whole[1] in ("source", "pose") and path.suffix and not path.is_file():
            raise TruePoseError(f"{whole[1]} {cell} does not exist; check the path")
        return upload(path) if path.suffix and path.is_file() else _number(cell)

    return fill(workflow)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TruePoseError(f"{path} cannot be read as text: {error}") from error


def _number(cell: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _uploaded(server: str, path: Path, seconds: float, uploads: dict[str, str]) -> str:
    """The file's name on the server; a file is uploaded once."""
    import hashlib

    if str(path) in uploads:
        return uploads[str(path)]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TruePoseError(f"{path} cannot be read: {error.strerror}") from error
    # Two files of one name would be one on the server.
    name = f"{hashlib.sha256(data).hexdigest()[:16]}{path.suffix.lower()}"
    mark = uuid.uuid4().hex
    lines = [f'--{mark}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'.encode()]
    head = f'--{mark}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
    lines += [head.encode(), b"Content-Type: application/octet-stream\r\n\r\n", data, f"\r\n--{mark}--\r\n".encode()]
    kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    answer = _parsed(server, _request(server, "/upload/image", seconds, b"".join(lines), kind))
    if not isinstance(answer.get("name"), str):
        raise ServerFault(f"answered {str(answer)[:200]} to a picture")
    uploads[str(path)] = answer["name"]
    return answer["name"]


def _json(server: str, path: str, seconds: float, body: Any = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    return _parsed(server, _request(server, path, seconds, data, {"Content-Type": "application/json"}))


def _parsed(server: str, data: bytes) -> dict[str, Any]:
    try:
        values = parse_json(data.decode("utf-8"), "its answer")
    except (TruePoseError, UnicodeDecodeError) as error:
        raise ServerFault(f"answered what is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise ServerFault("answered what is no JSON object")
    return values


def _request(
    server: str, path: str, seconds: float, data: bytes | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    request = urllib.request.Request(server.rstrip("/") + path, data, dict(headers or {}) if data else {})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer = response.read(_MAX_ANSWER + 1)
    except urllib.error.HTTPError as error:
        text = error.read(2000).decode("utf-8", "replace")
        if error.code == http.client.BAD_REQUEST and path == "/prompt":
            raise TruePoseError(f"ComfyUI refuses the workflow: {_refusal(text)}") from error
        raise ServerFault(f"answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerFault(f"does not answer ({error})") from error
    if len(answer) > _MAX_ANSWER:
        raise ServerFault(f"answered more than {_MAX_ANSWER >> 20} MiB")
    return answer


def _refusal(text: str) -> str:
    try:
        values = json.loads(text)
        details = [
            f"{about.get('class_type')}: {error.get('message')} ({error.get('details')})"
            for about in values.get("node_errors", {}).values()
            for error in about.get("errors", ())
        ]
        return "; ".join(details[:3]) or str(values["error"]["message"])
    except (ValueError, KeyError, AttributeError, TypeError):
        return text[:300]
