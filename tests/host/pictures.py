"""The picture that goes with a workflow: what its nodes show, above the graph as ComfyUI's page draws it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from browser import Browser
from graph import to_api
from server import Server

WIDTH, QUALITY = 1000, 85
SHOWN = 300
"""Height of the nodes' pictures in pixels, where they fit side by side."""
SHOWS = ("TruePoseMannequin", "TruePoseDrawSkeleton", "TruePoseAttentionView")

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
    import time

    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, Browser(server, Path(folder) / "profile") as page:
        page.drop(file, wait_for_node="TruePoseApplyHPFA")
        time.sleep(2)
        width, height = page.script(FIT, list(ROOM))
        time.sleep(3)
        shot = Path(folder) / "page.png"
        page.screenshot(shot)
        left, top = ROOM[:2]
        return Image.open(shot).convert("RGB").crop((left, top, left + round(width), top + round(height)))


def shown(server: Server, workflow: dict) -> list:
    """What the nodes of a workflow show, as PIL images: all of them where it runs, else those before the models."""
    from PIL import Image

    prompt = to_api(workflow, server.object_info())
    if any(node["class_type"] == "CheckpointLoaderSimple" for node in prompt.values()):
        free = ("TruePoseMannequin", "TruePoseDrawSkeleton", "TruePoseLoadPose")
        prompt = {key: node for key, node in prompt.items() if node["class_type"] in free}
    else:
        prompt = {key: node for key, node in prompt.items() if node["class_type"] != "SaveImage"}
    ends = ("ImageScale", *SHOWS)
    for key in [key for key, node in prompt.items() if node["class_type"] in ends]:
        prompt[f"{key} seen"] = {"class_type": "PreviewImage", "inputs": {"images": [key, 0]}}
    entry = server.run(prompt)
    keys = [key for key in prompt if key.endswith(" seen")]
    return [Image.fromarray(one) for key in keys for one in server.images(entry, key)]


def take(server: Server, file: Path) -> Path:
    """Draw the picture of a workflow beside it, as NAME.jpg."""
    import json

    from PIL import Image

    pictures = shown(server, json.loads(file.read_text(encoding="utf-8")))
    gap = 10
    across = sum(one.width / one.height for one in pictures)
    high = min(SHOWN, int((WIDTH - gap * (len(pictures) + 1)) / across))
    small = [one.resize((round(one.width * high / one.height), high), Image.LANCZOS) for one in pictures]
    graph = graph_picture(server, file)
    graph = graph.resize((WIDTH, round(graph.height * WIDTH / graph.width)), Image.LANCZOS)
    sheet = Image.new("RGB", (WIDTH, high + 2 * gap + graph.height), (32, 32, 32))
    x = max(0, (WIDTH - sum(one.width for one in small) - gap * (len(small) - 1)) // 2)
    for one in small:
        sheet.paste(one, (x, gap))
        x += one.width + gap
    sheet.paste(graph, (0, high + 2 * gap))
    out = file.with_suffix(".jpg")
    sheet.save(out, quality=QUALITY)
    return out
