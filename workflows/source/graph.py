"""Workflows in the page's own format (version 0.4), built from /object_info so that slots and widgets are right.

graph = Graph(info, "demo")
with graph.group("Source"):
    person = graph.add("TruePoseMannequin", seed=3)
    source = graph.add("TruePoseSourceNetEncode", image=person["image"], ...)
graph.workflow()            # what is saved in workflows/*.json
to_api(workflow, info)      # what the page would post to /prompt
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE_VERSION = "0.19.3"
NOTE = "MarkdownNote"
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
GAP, HEAD, ROW, WIDGET = 60, 10, 20, 24
SCREEN = 1100
"""How high a column may be: about a screen at the size in which one reads."""
FACES = frozenset(
    {
        "LoadImage",
        "MaskPreview",
        "PreviewImage",
        "SaveAnimatedWEBP",
        "SaveImage",
        "TruePoseAlignSource",
        "TruePoseAttentionView",
        "TruePoseCarryAlongBody",
        "TruePoseDrawSkeleton",
        "TruePoseEditParsing",
        "TruePoseEditPose",
        "TruePoseEstimatePose",
        "TruePoseHumanParsing",
        "TruePoseInterpolatePoses",
        "TruePoseLoadPose",
        "TruePoseMannequin",
        "TruePosePoseGallery",
        "TruePoseRenderBody",
        "TruePoseRetargetPose",
        "TruePoseTransformPose",
    }
)
"""Nodes that show a picture once they have run; without room for it they grow over what is below."""
FACE = 220
"""What the page takes for a picture, at least."""
WIDTH = 320


def pack_identity() -> tuple[str, str]:
    """(name, version) of the pack, as the registry knows it."""
    text = (ROOT / "pyproject.toml").read_text()
    return tuple(re.search(rf'^{key} = "(.+)"$', text, re.MULTILINE).group(1) for key in ("name", "version"))


def declared(node: dict) -> list[tuple[str, list, bool]]:
    """(name, declaration, whether it is required) of every input of a node, in the page's order."""
    return [
        (name, node["input"][kind][name], kind == "required")
        for kind in ("required", "optional")
        for name in node.get("input_order", {}).get(kind, [])
    ]


def fits(kind: str, declaration: list) -> bool:
    """Whether an output of this type may go into an input; an input of several types names them with commas."""
    return isinstance(declaration[0], str) and kind in declaration[0].split(",")


def is_widget(declaration: list) -> bool:
    settings = declaration[1] if len(declaration) > 1 else {}
    return (isinstance(declaration[0], list) or declaration[0] in WIDGETS) and not settings.get("forceInput")


def options_of(declaration: list) -> list | None:
    """The choices of a combo, in either of the two notations; None for other inputs."""
    if isinstance(declaration[0], list):
        return declaration[0]
    return declaration[1].get("options") if declaration[0] == "COMBO" else None


def has_control(name: str, declaration: list) -> bool:
    """Whether the page adds "control after generate" below this widget, which takes a place among the values."""
    settings = declaration[1] if len(declaration) > 1 else {}
    named = declaration[0] == "INT" and name in ("seed", "noise_seed")
    return bool(settings.get("control_after_generate", named))


def joined_lines(text: str) -> str:
    """Markdown without the line breaks that only keep a source file narrow."""
    lines: list[str] = []
    for line in (line.strip() for line in text.strip().splitlines()):
        item = re.match(r"#|\* |\d+\. ", line)
        begins = not line or item or not lines or not lines[-1] or lines[-1].startswith("#")
        if begins:
            lines.append(line)
        else:
            lines[-1] += " " + line
    return "\n".join(lines)


@dataclass(frozen=True)
class Out:
    """An output of a node."""

    node: int
    slot: int
    kind: str


@dataclass
class Node:
    """A node of a graph. `node["image"]` is its output of that name (or type)."""

    number: int
    type: str
    title: str | None
    info: dict
    values: dict
    models: list[dict]
    text: str = ""
    room: int = 0
    width: int = WIDTH
    at: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Out:
        names = [n.lower() for n in self.info["output_name"]]
        slot = names.index(name.lower()) if name.lower() in names else self.info["output"].index(name)
        return Out(self.number, slot, self.info["output"][slot])

    @property
    def height(self) -> int:
        """Enough for slots, widgets and what the node shows."""
        if self.type == NOTE:
            return self.room
        inputs = declared(self.info)
        sockets = sum(not is_widget(d) for _, d, _ in inputs)
        widgets = [(n, d) for n, d, _ in inputs if is_widget(d)]
        high = sum((4 if _settings(d).get("multiline") else 1) + has_control(n, d) for n, d in widgets)
        return HEAD + max(sockets, len(self.info["output"])) * ROW + high * WIDGET + self.room + 6


def _settings(declaration: list) -> dict:
    return declaration[1] if len(declaration) > 1 else {}


def columns(nodes: list[Node]) -> list[list[Node]]:
    """The nodes in order, in the fewest columns that are no higher than a screen, and those as low as can be."""

    def filled(limit: int) -> list[list[Node]]:
        found, y = [[]], 0
        for node in nodes:
            if found[-1] and y + node.height > limit:
                found.append([])
                y = 0
            found[-1].append(node)
            y += node.height + GAP
        return found

    count = len(filled(SCREEN))
    lowest = next(limit for limit in range(0, SCREEN + 1, 10) if len(filled(limit)) <= count)
    return filled(lowest)


@dataclass
class Graph:
    """A workflow in the making. The nodes of a group stand one below the other, in as many columns as they need."""

    info: dict
    name: str
    nodes: list[Node] = field(default_factory=list)
    links: list[list] = field(default_factory=list)
    groups: list[tuple[str, list[Node]]] = field(default_factory=list)

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        self.groups.append((title, []))
        yield

    def note(self, text: str, height: int) -> None:
        """A note in the graph, in Markdown. Lines of a paragraph or of an item are joined."""
        info = {"output": [], "output_name": []}
        self._place(Node(len(self.nodes) + 1, NOTE, None, info, {}, [], joined_lines(text), height))

    def add(
        self,
        type_: str,
        title: str | None = None,
        models: tuple[dict, ...] = (),
        room: int = 0,
        **inputs: object,
    ) -> Node:
        """Add a node. inputs: outputs of other nodes, or values of widgets; those not given keep their default.

        models: files that it wants, {"name", "url", "directory"}. room: pixels for what the node shows. A widget may
        be given an output too: it then shows as a socket beside the widget.
        """
        info = self.info[type_]
        known = {name: declaration for name, declaration, _ in declared(info)}
        for name, given in inputs.items():
            assert name in known, f"{type_} has no input {name}"
            self._check(type_, name, known[name], given, models)
        for name, declaration, required in declared(info):
            linked = not is_widget(declaration)
            assert not (required and linked and name not in inputs), f"{type_}.{name} is not connected"
        assert room >= FACE or type_ not in FACES, f"{type_} shows a picture; leave room for it"
        node = Node(len(self.nodes) + 1, type_, title, info, dict(inputs), list(models), "", room)
        self._place(node)
        return node

    def _place(self, node: Node) -> None:
        self.nodes.append(node)
        self.groups[-1][1].append(node)

    @staticmethod
    def _check(type_: str, name: str, declaration: list, given: object, models: tuple[dict, ...]) -> None:
        where = f"{type_}.{name}"
        if isinstance(given, Out):
            assert fits(given.kind, declaration), f"{where} takes {declaration[0]}, not {given.kind}"
            return
        assert is_widget(declaration), f"{where} needs a link"
        options, settings = options_of(declaration), _settings(declaration)
        if options is not None:
            assert given in options or given in [m["name"] for m in models], f"{where}: {given!r} is not offered"
        elif declaration[0] in ("INT", "FLOAT"):
            assert settings.get("min", given) <= given <= settings.get("max", given), (
                f"{where}: {given} is out of range"
            )

    def _lay_out(self) -> list[dict]:
        boxes, x = [], 0
        for title, nodes in self.groups:
            left, bottom = x, 0
            for column in columns(nodes):
                y = 0
                for node in column:
                    node.at = (x, y)
                    y += node.height + GAP
                bottom = max(bottom, y - GAP)
                x += max(node.width for node in column) + GAP
            bounds = [left - 20, -80, x - GAP - left + 40, bottom + 110]
            boxes.append({"id": len(boxes) + 1, "title": title, "bounding": bounds, "color": "#3f789e"})
            boxes[-1] |= {"font_size": 24, "flags": {}}
            x += 80 - GAP
        return boxes

    def workflow(self) -> dict:
        """The workflow as the page saves it."""
        groups = self._lay_out()
        links: list[list] = []
        outgoing: dict[tuple[int, int], list[int]] = {}
        saved = []
        for node in self.nodes:
            saved.append(self._save(node, links, outgoing))
        for one in saved:
            for slot, output in enumerate(one["outputs"]):
                output["links"] = outgoing.get((one["id"], slot), [])
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{pack_identity()[0]}/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": saved,
            "links": links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 120]}},
            "version": 0.4,
        }

    def _save(self, node: Node, links: list[list], outgoing: dict) -> dict:
        one = {
            "id": node.number,
            "type": node.type,
            "pos": list(node.at),
            "size": [node.width, node.height],
            "flags": {},
            "order": node.number - 1,
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": name, "type": kind, "slot_index": slot}
                for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True))
            ],
            "properties": {},
            "widgets_values": [],
        }
        if node.title:
            one["title"] = node.title
        if node.type == NOTE:
            return one | {"widgets_values": [node.text], "color": "#2a2520", "bgcolor": "#3a3328"}
        ours = node.type.startswith("TruePose")
        name, version = pack_identity() if ours else ("comfy-core", CORE_VERSION)
        one["properties"] = {"cnr_id": name, "ver": version, "Node name for S&R": node.type}
        if node.models:
            one["properties"]["models"] = node.models
        for key, declaration, _ in declared(node.info):
            given = node.values.get(key)
            linked = isinstance(given, Out)
            slot = {"name": key, "type": declaration[0], "link": None}
            if is_widget(declaration):
                one["widgets_values"].append(_value(declaration) if given is None or linked else given)
                if has_control(key, declaration):
                    one["widgets_values"].append("fixed")
                if not linked:
                    continue
                slot["widget"] = {"name": key}
            if linked:
                slot["link"] = len(links) + 1
                links.append([slot["link"], given.node, given.slot, node.number, len(one["inputs"]), given.kind])
                outgoing.setdefault((given.node, given.slot), []).append(slot["link"])
            one["inputs"].append(slot)
        return one


def _value(declaration: list) -> object:
    """What a widget shows before anybody touches it."""
    settings, options = _settings(declaration), options_of(declaration)
    if "default" in settings:
        return settings["default"]
    if options is not None:
        return options[0] if options else None
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[declaration[0]]


def to_api(workflow: dict, info: dict) -> dict[str, dict]:
    """A workflow as POST /prompt takes it. Raises KeyError for a node type that the host does not have."""
    links = {link[0]: link for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == NOTE:
            continue
        values = iter(node["widgets_values"])
        inputs: dict[str, object] = {}
        for name, declaration, _ in declared(info[node["type"]]):
            if is_widget(declaration):
                inputs[name] = next(values)
                if has_control(name, declaration):
                    next(values)
        assert next(values, None) is None, f"{node['type']} has values left over"
        for slot in node["inputs"]:
            if slot["link"] is not None:
                _, source, output, *_ = links[slot["link"]]
                inputs[slot["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
