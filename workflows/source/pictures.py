"""The picture that goes with a workflow: what its nodes show, above the graph as ComfyUI's page draws it."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from browser import Browser
from graph import to_api
from server import Server

WIDTH, QUALITY = 1000, 85
SHOWN = 300
"""Height of the nodes' pictures in pixels, where they fit side by side."""
ROW = 9
"""Pictures side by side."""
SHOWS = {
    "LoadImage": 0,
    "TruePoseMannequin": 0,
    "TruePoseEstimatePose": None,
    "TruePoseHumanParsing": 2,
    "TruePoseFramePerson": 0,
    "TruePoseRetargetPose": 1,
    "TruePoseDrawSkeleton": 0,
    "TruePoseCarryAlongBody": 0,
    "TruePoseAttentionView": 0,
    "ImageScale": 0,
}
"""The nodes whose pictures are shown, and the outputs that give them; None is the node's own face."""
LARGE = (
    "CheckpointLoaderSimple",
    "ControlNetLoader",
    "LoraLoader",
    "CLIPVisionLoader",
    "TruePoseLoadCAAAdapter",
    "UNETLoader",
    "CLIPLoader",
    "DualCLIPLoader",
    "VAELoader",
)
"""Nodes that read files which are not here; what comes after them is not run."""

# Only the canvas and what lies on it: bars and panels of the page differ between versions.
FIT = """
const style = document.createElement('style');
style.textContent = 'body * {visibility: hidden} #graph-canvas, .dom-widget, .dom-widget * {visibility: visible}';
document.head.appendChild(style);
app.graph._nodes.forEach(n => { n.has_errors = false; });
const canvas = app.canvas, groups = app.graph._groups;
const boxes = groups.map(g => g._bounding || g.bounding);
const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
const room = arguments[0];
const scale = Math.min(room[2] / (right - left), room[3] / (bottom - top));
canvas.ds.scale = scale;
canvas.ds.offset[0] = room[0] / scale - left;
canvas.ds.offset[1] = room[1] / scale - top;
canvas.show_info = false;
canvas.low_quality_zoom_threshold = 0;
if ('min_font_size_for_lod' in canvas) canvas.min_font_size_for_lod = 0;
canvas.setDirty(true, true);
return [(right - left) * scale, (bottom - top) * scale];
"""
ROOM = (0, 50, 1600, 790)
"""Left, top, width and height in the window."""


def graph_picture(server: Server, file: Path) -> object:
    """The graph alone, as a PIL image."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, Browser(server, Path(folder) / "profile") as page:
        page.drop(file, wait_for_node="SaveImage")
        time.sleep(2)
        width, height = page.script(FIT, list(ROOM))
        time.sleep(3)
        shot = Path(folder) / "page.png"
        page.screenshot(shot)
        left, top = ROOM[:2]
        return Image.open(shot).convert("RGB").crop((left, top, left + round(width), top + round(height)))


def without_files(prompt: dict) -> dict:
    """What of a prompt can run without large files."""
    lacking = {key for key, node in prompt.items() if node["class_type"] in LARGE}
    while True:
        more = {
            key
            for key, node in prompt.items()
            if any(isinstance(value, list) and value[0] in lacking for value in node["inputs"].values())
        }
        if more <= lacking:
            return {key: node for key, node in prompt.items() if key not in lacking}
        lacking |= more


def shown(server: Server, workflow: dict) -> list:
    """What the nodes of a workflow show, as PIL images: all of them where it runs, else those before the models."""
    from PIL import Image

    prompt = without_files(to_api(workflow, server.object_info()))
    prompt = {key: node for key, node in prompt.items() if not node["class_type"].startswith("Save")}
    seen = []
    for key, node in list(prompt.items()):
        slot = SHOWS.get(node["class_type"], -1)
        if slot is None:
            seen.append(key)
        elif slot >= 0:
            seen.append(f"{key} seen")
            prompt[seen[-1]] = {"class_type": "PreviewImage", "inputs": {"images": [key, slot]}}
    # What comes out of the cache is listed under the node that first made it; the server empties it when idle.
    server.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(2)
    entry = server.run(prompt)
    found = [one for key in seen if key in entry["outputs"] for one in server.images(entry, key)]
    first = {one.tobytes(): one for one in reversed(found)}  # a photo that is loaded twice is shown once
    return [Image.fromarray(one) for one in reversed(first.values())]


def row(pictures: list, width: int, gap: int) -> object:
    """Pictures side by side at one height, centred, as a PIL image of that width."""
    from PIL import Image

    across = sum(one.width / one.height for one in pictures)
    high = min(SHOWN, int((width - gap * (len(pictures) + 1)) / across))
    small = [one.resize((round(one.width * high / one.height), high), Image.LANCZOS) for one in pictures]
    sheet = Image.new("RGB", (width, high + gap), (32, 32, 32))
    x = max(0, (width - sum(one.width for one in small) - gap * (len(small) - 1)) // 2)
    for one in small:
        sheet.paste(one, (x, gap))
        x += one.width + gap
    return sheet


def take(server: Server, file: Path) -> Path:
    """Draw the picture of a workflow beside it, as NAME.jpg."""
    from PIL import Image

    pictures, gap = shown(server, json.loads(file.read_text(encoding="utf-8"))), 10
    rows = [row(pictures[at : at + ROW], WIDTH, gap) for at in range(0, len(pictures), ROW)]
    graph = graph_picture(server, file)
    graph = graph.resize((WIDTH, round(graph.height * WIDTH / graph.width)), Image.LANCZOS)
    sheet = Image.new("RGB", (WIDTH, sum(one.height for one in rows) + gap + graph.height), (32, 32, 32))
    y = 0
    for one in rows:
        sheet.paste(one, (0, y))
        y += one.height
    sheet.paste(graph, (0, y + gap))
    out = file.with_suffix(".jpg")
    sheet.save(out, quality=QUALITY)
    return out
