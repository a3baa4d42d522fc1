"""Workflows in the page's own format (version 0.4), built from /object_info so that slots and widgets are right.

graph = Graph(info, "demo")
with graph.group("Source"):
    person = graph.add("TruePoseMannequin", seed=3)
    source = graph.add("TruePoseSourceNetEncode", image=person["image"], ...)
graph.workflow()            # what is saved in workflows/*.json
to_api(workflow, info)      # what the page would post to /prompt

block = Block(info, "Photo to Source", "what it does")
block.graph.add("TruePoseFramePerson", image=block.takes("photo", "IMAGE"), margin=block.widget(...))
graph.add_block(block, photo=...)   # a node of a graph that is a graph itself: the page's subgraph
blueprint(block)            # what is saved in subgraphs/*.json, for the page's node library
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
INPUTS, OUTPUTS = -10, -20
"""Where the links of a subgraph begin and end: the page's numbers for its two sides."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
GAP, HEAD, ROW, WIDGET = 60, 10, 20, 24
SCREEN = 1100
"""How high a column may be: about a screen at the size in which one reads."""
EXAMPLES = ("truepose/person.jpg [temp]", "truepose/other.jpg [temp]")
"""The photos that workflows start on, as the host names them: the pack lays them there (nodes/host/files.py)."""
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


def kind_of(declaration: list) -> str:
    """The type of an input; older notation lists the choices of a combo in its place."""
    return declaration[0] if isinstance(declaration[0], str) else "COMBO"


def fits(kind: str, declaration: list) -> bool:
    """Whether an output of this type may go into an input; an input of several types names them with commas."""
    return kind in kind_of(declaration).split(",")


def is_widget(declaration: list) -> bool:
    settings = declaration[1] if len(declaration) > 1 else {}
    return kind_of(declaration) in WIDGETS and not settings.get("forceInput")


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
    """An output of a node. value: what a widget shows that is linked to it."""

    node: int
    slot: int
    kind: str
    value: object = None


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
    block: Block | None = None

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
    ends: list[tuple[Out, int]] = field(default_factory=list)
    """Of a block: what goes to its outputs, (output of a node, slot)."""
    before: int = 0
    """Nodes are numbered from the next number on."""

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        self.groups.append((title, []))
        yield

    def note(self, text: str, height: int) -> None:
        """A note in the graph, in Markdown. Lines of a paragraph or of an item are joined."""
        info = {"output": [], "output_name": []}
        self._place(Node(self.before + len(self.nodes) + 1, NOTE, None, info, {}, [], joined_lines(text), height))

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
        node = Node(self.before + len(self.nodes) + 1, type_, title, info, dict(inputs), list(models), "", room)
        self._place(node)
        return node

    def add_block(self, block: Block, title: str | None = None, **inputs: object) -> Node:
        """Add a block as one node. inputs: as for `add`, by the block's names."""
        self.info = {**self.info, block.id: block.info}
        node = self.add(block.id, title or block.name, block.models, **inputs)
        node.block = block
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
            offered = (*options, *(m["name"] for m in models), *EXAMPLES)
            assert given in offered, f"{where}: {given!r} is not offered"
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
        drawn = self.drawn()
        blocks = {node.block.id: node.block for node in self.nodes if node.block is not None}
        found = {
            "id": _uuid(self.name),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(drawn["links"]),
            **drawn,
            "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 120]}},
            "version": 0.4,
        }
        if blocks:
            found["definitions"] = {"subgraphs": [block.definition() for block in blocks.values()]}
        return found

    def drawn(self) -> dict[str, list]:
        """Nodes, links and groups, placed."""
        groups = self._lay_out()
        links: list[list] = []
        outgoing: dict[tuple[int, int], list[int]] = {}
        saved = []
        for node in self.nodes:
            saved.append(self._save(node, links, outgoing))
        for out, slot in self.ends:
            links.append([len(links) + 1, out.node, out.slot, OUTPUTS, slot, out.kind])
            outgoing.setdefault((out.node, out.slot), []).append(len(links))
        for one in saved:
            for slot, output in enumerate(one["outputs"]):
                output["links"] = outgoing.get((one["id"], slot), [])
        return {"nodes": saved, "links": links, "groups": groups}

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
        ours = node.type.startswith("TruePose") or node.block is not None
        name, version = pack_identity() if ours else ("comfy-core", CORE_VERSION)
        one["properties"] = {"cnr_id": name, "ver": version, "Node name for S&R": node.type}
        if node.models and node.block is None:
            one["properties"]["models"] = node.models
        # The page knows inputs by name, but in and of a block by their number: sockets first, then every widget.
        numbered = self.before > 0 or node.block is not None
        inputs = declared(node.info)
        for key, declaration, _ in sorted(inputs, key=lambda one: is_widget(one[1])) if numbered else inputs:
            given = node.values.get(key)
            linked = isinstance(given, Out)
            slot = {"name": key, "type": kind_of(declaration), "link": None}
            if is_widget(declaration):
                value = given.value if linked else given
                one["widgets_values"].append(_value(declaration) if value is None else value)
                if has_control(key, declaration):
                    one["widgets_values"].append("fixed")
                if not linked and not numbered:
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


@dataclass
class Block:
    """A graph that is one node of another one: what the page calls a subgraph, and saves as a blueprint."""

    host: dict
    name: str
    text: str
    """Shown in the page's node library."""
    before: int
    """The page wants numbers that no other node of a workflow has, in its blocks or around them."""
    graph: Graph = field(init=False)
    info: dict = field(init=False)

    def __post_init__(self) -> None:
        self.graph = Graph(self.host, self.name, before=self.before)
        self.info = {"input": {"required": {}}, "input_order": {"required": []}, "output": [], "output_name": []}
        self.info["description"] = self.text

    @property
    def id(self) -> str:
        return _uuid(f"subgraphs/{self.name}")

    @property
    def models(self) -> tuple[dict, ...]:
        """Files that nodes in it want."""
        return tuple(model for node in self.graph.nodes for model in node.models)

    def takes(self, name: str, kind: str) -> Out:
        """A socket of the block; its other end, for nodes inside. Sockets come before widgets."""
        return self._input(name, [kind, {}], None)

    def widget(self, type_: str, widget: str, value: object, name: str | None = None) -> Out:
        """A widget of a node inside as the block's own, by another name if given; for that node's input."""
        known = {name: declaration for name, declaration, _ in declared(self.host[type_])}
        settings = {**_settings(known[widget]), "default": value, "control_after_generate": False}
        return self._input(name or widget, [known[widget][0], settings], value)

    def _input(self, name: str, declaration: list, value: object) -> Out:
        order = self.info["input_order"]["required"]
        order.append(name)
        self.info["input"]["required"][name] = declaration
        return Out(INPUTS, len(order) - 1, kind_of(declaration), value)

    def gives(self, name: str, out: Out) -> None:
        """An output of the block."""
        self.graph.ends.append((out, len(self.info["output"])))
        self.info["output"].append(out.kind)
        self.info["output_name"].append(name)

    def definition(self) -> dict:
        """The subgraph as the page saves it."""
        drawn = self.graph.drawn()
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        links = [dict(zip(names, link, strict=True)) for link in drawn["links"]]
        boxes = [group["bounding"] for group in drawn["groups"]]
        left, right = min(box[0] for box in boxes) - 240, max(box[0] + box[2] for box in boxes) + 80
        inputs, outputs = ([], [])
        for slot, (name, declaration, _) in enumerate(declared(self.info)):
            ids = [link["id"] for link in links if link["origin_id"] == INPUTS and link["origin_slot"] == slot]
            assert ids, f"nothing in {self.name} takes {name}"
            inputs.append(self._side("in", slot, name, kind_of(declaration), ids, left + 140))
        for slot, (name, kind) in enumerate(zip(self.info["output_name"], self.info["output"], strict=True)):
            ids = [link["id"] for link in links if link["target_id"] == OUTPUTS and link["target_slot"] == slot]
            outputs.append(self._side("out", slot, name, kind, ids, right + 20))
        return {
            "id": self.id,
            "version": 1,
            "state": {
                "lastGroupId": len(drawn["groups"]),
                "lastNodeId": drawn["nodes"][-1]["id"],
                "lastLinkId": len(links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "category": "TruePose",
            "inputNode": {"id": INPUTS, "bounding": [left, 0, 160, 40 + 20 * len(inputs)]},
            "outputNode": {"id": OUTPUTS, "bounding": [right, 0, 160, 40 + 20 * len(outputs)]},
            "inputs": inputs,
            "outputs": outputs,
            "widgets": [],
            **drawn,
            "links": links,
            "extra": {"BlueprintDescription": self.text},
        }

    def _side(self, side: str, slot: int, name: str, kind: str, links: list[int], x: float) -> dict:
        number = _uuid(f"subgraphs/{self.name}/{side}/{name}")
        return {"id": number, "name": name, "type": kind, "linkIds": links, "pos": [x, 20 + 20 * slot]}


def blueprint(block: Block) -> dict:
    """A workflow that is nothing but the block: what the page's node library offers."""
    graph = Graph(block.host, f"subgraphs/{block.name}.json", groups=[("", [])])
    node = Node(1, block.id, block.name, block.info, {}, [], block=block)
    graph._place(node)
    extra = {"BlueprintDescription": block.text, "BlueprintSearchAliases": ["TruePose", "pose transfer", "same person"]}
    return graph.workflow() | {"groups": [], "extra": extra}


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{pack_identity()[0]}/{name}"))


def all_nodes(workflow: dict) -> list[dict]:
    """The nodes of a workflow and of its blocks, without the nodes that stand for blocks."""
    blocks = workflow.get("definitions", {}).get("subgraphs", [])
    ids = {block["id"] for block in blocks}
    return [node for graph in (workflow, *blocks) for node in graph["nodes"] if node["type"] not in ids]


@dataclass(frozen=True)
class _Scope:
    """A graph, or one use of a block, on the way to what the page posts."""

    prefix: str
    nodes: dict[int, dict]
    links: dict[int, tuple[int, int]]
    ends: dict[int, int]
    outer: _Scope | None = None
    user: dict | None = None


def to_api(workflow: dict, info: dict) -> dict[str, dict]:
    """A workflow as POST /prompt takes it, its blocks opened: their nodes are "NODE:NODE INSIDE".

    Raises KeyError for a node type that the host does not have.
    """
    blocks = {block["id"]: block for block in workflow.get("definitions", {}).get("subgraphs", [])}
    prompt: dict[str, dict] = {}

    def inside(scope: _Scope, node: dict) -> _Scope:
        block = blocks[node["type"]]
        links = {link["id"]: (link["origin_id"], link["origin_slot"]) for link in block["links"]}
        ends = {link["target_slot"]: link["id"] for link in block["links"] if link["target_id"] == OUTPUTS}
        nodes = {one["id"]: one for one in block["nodes"]}
        return _Scope(f"{scope.prefix}{node['id']}:", nodes, links, ends, scope, node)

    def origin(scope: _Scope, link: int) -> object:
        """[node, output] that a link comes from, or the value of a block's widget."""
        number, slot = scope.links[link]
        if number == INPUTS:
            socket = scope.user["inputs"][slot]
            if socket["link"] is not None:
                return origin(scope.outer, socket["link"])
            named = [one["name"] for one in scope.user["inputs"] if "widget" in one]
            return scope.user["widgets_values"][named.index(socket["name"])]
        node = scope.nodes[number]
        if node["type"] in blocks:
            within = inside(scope, node)
            return origin(within, within.ends[slot])
        return [f"{scope.prefix}{number}", slot]

    def add(scope: _Scope) -> None:
        for node in scope.nodes.values():
            if node["type"] == NOTE:
                continue
            if node["type"] in blocks:
                add(inside(scope, node))
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
                    inputs[slot["name"]] = origin(scope, slot["link"])
            prompt[f"{scope.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": inputs}

    links = {number: (source, output) for number, source, output, *_ in workflow["links"]}
    add(_Scope("", {node["id"]: node for node in workflow["nodes"]}, links, {}))
    return prompt
