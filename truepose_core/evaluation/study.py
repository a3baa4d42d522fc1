"""A user study on one static page: R2G, G2R and Jab, with intervals.

R2G: the share of real pictures that people take for generated. G2R: the share of a method's pictures that they take for
real. Jab: the share of trials in which a method's picture is chosen as the best of all methods', beside the source and
the true picture. (Bhunia et al., Person Image Synthesis via Denoising Diffusion Model, 2023, section 4.4.)

The page holds pictures and nothing about them: which is which stands in a key that stays with the experimenter, and
every picture is brought to one height and stored in the same way, so that neither size nor format tells.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from truepose_core.errors import TruePoseError
from truepose_core.evaluation.published import Item
from truepose_core.json_text import read_json
from truepose_core.pictures.files import load_image

VERSION = 1
REAL = "real"
"""The name of the truth among methods; no method may have it."""
_Z = 1.959963984540054
RESAMPLES = 2000


@dataclass(frozen=True)
class Study:
    """page: the html. key: what is behind each trial, for `score`."""

    page: str
    key: dict[str, Any]


def make_study(
    methods: Mapping[str, Sequence[Item]],
    sources: Mapping[str, Path],
    *,
    trials: int = 30,
    seed: int = 0,
    height: int = 256,
    title: str = "Which pictures are real?",
) -> Study:
    """A study of several methods' results on the same pairs.

    methods: name -> its `Item`s, the same pairs for all. sources: listed source -> its file. trials: real pictures, and
    pictures of each method, that are judged, and pairs on which methods are compared (with one method there is nothing
    to compare). seed: picks pairs and orders. height: of every picture shown, in pixels.

    Raises TruePoseError for fewer pairs than trials, methods with other pairs, or names that cannot be told apart.
    """
    names = list(methods)
    if not names or REAL in names or any(not name.strip() for name in names):
        raise TruePoseError(f"the methods are {names}; expected at least one, and none called {REAL!r}")
    by_pair = {name: {item.name: item for item in items} for name, items in methods.items()}
    pairs = sorted(by_pair[names[0]])
    for name in names[1:]:
        if sorted(by_pair[name]) != pairs:
            raise TruePoseError(f"{name} has results on other pairs than {names[0]}; expected the same pairs")
    if len(pairs) < trials:
        raise TruePoseError(
            f"{trials} trials need as many pairs; the list has {len(pairs)}. Give --trials {len(pairs)}"
        )
    chance = random.Random(seed)
    shown: list[dict[str, Any]] = []
    judged: dict[str, str] = {}
    compared: dict[str, list[str]] = {}

    def trial(kind: str, pictures: Sequence[Path], beside: Sequence[Path] = ()) -> str:
        number = f"{chance.getrandbits(48):012x}"
        shown.append(
            {
                "id": number,
                "kind": kind,
                "pictures": [_embedded(path, height) for path in pictures],
                "beside": [_embedded(path, height) for path in beside],
            }
        )
        return number

    real = {name: by_pair[names[0]][name].truth for name in pairs}
    for pair in chance.sample(pairs, trials):
        judged[trial("judge", [real[pair]])] = REAL
    for method in names:
        for pair in chance.sample(pairs, trials):
            judged[trial("judge", [by_pair[method][pair].samples[0]])] = method
    if len(names) > 1:
        for pair in chance.sample(pairs, trials):
            order = chance.sample(names, len(names))
            item = by_pair[names[0]][pair]
            pictures = [by_pair[name][pair].samples[0] for name in order]
            compared[trial("choose", pictures, [sources[item.source], item.truth])] = order
    # In the order of their numbers, which tell nothing; each participant's page shuffles them anew.
    shown.sort(key=lambda one: one["id"])
    about = {"version": VERSION, "methods": names, "trials": trials, "seed": seed, "height": height}
    content = {**about, "judged": judged, "compared": compared}
    study = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    data = json.dumps({"study": study, "trials": shown}).replace("</", "<\\/")
    page = (files("truepose_core") / "evaluation" / "study.html").read_text(encoding="utf-8")
    page = page.replace("{{title}}", _escaped(title)).replace("{{data}}", data)
    return Study(page, {"study": study, **content})


def _escaped(text: str) -> str:
    import html

    return html.escape(text)


def _embedded(path: Path, height: int) -> str:
    """A picture at this height, as a data address."""
    from PIL import Image

    picture = load_image(path)
    width = max(1, round(picture.shape[-1] * height / picture.shape[-2]))
    if tuple(picture.shape[-2:]) != (height, width):
        picture = F.interpolate(picture, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=95)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Share:
    """One figure. count of total answers; answers, people: the 95 % interval when every answer counts as independent
    (Wilson), and when people are resampled (bootstrap; None for one person). chance: what guessing gives."""

    name: str
    method: str
    count: int
    total: int
    answers: tuple[float, float]
    people: tuple[float, float] | None
    chance: float

    @property
    def value(self) -> float:
        return self.count / self.total


@dataclass(frozen=True)
class StudyReport:
    """The result of `score_study`. missing: trials that people left out, by person."""

    study: str
    people: list[str]
    shares: list[Share]
    missing: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        shares = [{**vars(share), "value": share.value} for share in self.shares]
        return {"study": self.study, "people": len(self.people), "missing": self.missing, "figures": shares}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def markdown(self) -> str:
        """A table with both intervals."""
        lines = [
            "| figure | method | share | 95 %, answers | 95 %, people | guessing | answers |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for s in self.shares:
            people = "-" if s.people is None else f"{s.people[0]:.3f} to {s.people[1]:.3f}"
            answers = f"{s.answers[0]:.3f} to {s.answers[1]:.3f}"
            lines.append(
                f"| {s.name} | {s.method} | {s.value:.3f} | {answers} | {people} | {s.chance:.3f} | {s.total} |"
            )
        told = (
            f"{len(self.people)} people. R2G: real pictures judged generated; G2R: generated ones judged real; Jab: "
            "judged the best. Of all of them more is better for a method. The second interval knows that one person's "
            "answers are alike."
        )
        return "\n".join([*lines, "", told]) + "\n"


def score_study(key: str | Path, answers: Sequence[str | Path], seed: int = 0) -> StudyReport:
    """Count the answers of a study.

    key: the file that `make_study` gave. answers: what the page saved, one file per person. seed: of the bootstrap.

    Raises TruePoseError, naming the file, for answers to another study, a person who stands twice, or answers that no
    trial has.
    """
    known = _read_key(Path(key))
    judged, compared = known["judged"], known["compared"]
    people: dict[str, dict[str, Any]] = {}
    for path in answers:
        person, given = _read_answers(Path(path), known)
        if person in people:
            raise TruePoseError(f"{path}: the participant {person!r} stands twice; keep one of the files")
        people[person] = given
    if not people:
        raise TruePoseError("no answers were given; expected the files that the page saves, one per person")
    everything = len(judged) + len(compared)
    missing = {name: everything - len(given) for name, given in people.items() if len(given) < everything}

    def share(name: str, method: str, votes: Mapping[str, tuple[int, int]], chance: float) -> Share | None:
        count, total = (sum(vote[i] for vote in votes.values()) for i in (0, 1))
        if not total:
            return None
        return Share(name, method, count, total, wilson(count, total), bootstrap(list(votes.values()), seed), chance)

    def judgements(method: str, answer: str) -> dict[str, tuple[int, int]]:
        trials = {t for t, behind in judged.items() if behind == method}
        votes = {}
        for person, given in people.items():
            mine = [given[t] for t in trials if t in given]
            votes[person] = (mine.count(answer), len(mine))
        return votes

    def choices(method: str) -> dict[str, tuple[int, int]]:
        votes = {}
        for person, given in people.items():
            mine = [compared[t][given[t]] for t in compared if t in given]
            votes[person] = (mine.count(method), len(mine))
        return votes

    methods = known["methods"]
    shares = [share("R2G", REAL, judgements(REAL, "generated"), 0.5)]
    shares += [share("G2R", method, judgements(method, "real"), 0.5) for method in methods]
    shares += [share("Jab", method, choices(method), 1 / len(methods)) for method in methods if compared]
    return StudyReport(known["study"], sorted(people), [one for one in shares if one is not None], missing)


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, Probable Inference, 1927)."""
    share, spread = count / total, _Z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(votes: Sequence[tuple[int, int]], seed: int) -> tuple[float, float] | None:
    """The 95 % interval of a share when people are drawn anew with replacement; votes: (count, total) of each person.
    None for fewer than two people with answers."""
    votes = [vote for vote in votes if vote[1]]
    if len(votes) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(votes), (RESAMPLES, len(votes)), generator=generator)
    counts, totals = torch.tensor(votes, dtype=torch.float64).T
    shares = counts[drawn].sum(1) / totals[drawn].sum(1)
    low, high = torch.quantile(shares, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _read_key(path: Path) -> dict[str, Any]:
    key = read_json(path, f"the study's key {path}")
    fields = {"study": str, "methods": list, "judged": dict, "compared": dict, "version": int}
    if not isinstance(key, dict) or any(not isinstance(key.get(name), kind) for name, kind in fields.items()):
        raise TruePoseError(f"{path} is no key of a study; expected the .json that `truepose study make` wrote")
    if key["version"] != VERSION:
        raise TruePoseError(f"{path} is of version {key['version']}; this truepose reads version {VERSION}")
    return key


def _read_answers(path: Path, key: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(participant, trial -> answer)."""
    values = read_json(path, f"the answers {path}")
    if not isinstance(values, dict) or not isinstance(values.get("answers"), dict):
        raise TruePoseError(f"{path} holds no answers; expected a file that the study's page saved")
    if values.get("study") != key["study"]:
        raise TruePoseError(f"{path} answers the study {values.get('study')!r}; the key is of {key['study']!r}")
    person = values.get("participant")
    if not isinstance(person, str) or not person.strip():
        raise TruePoseError(f"{path} names no participant")
    given = values["answers"]
    for trial, answer in given.items():
        if trial in key["judged"]:
            good = answer in ("real", "generated")
        elif trial in key["compared"]:
            good = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(key["methods"])
        else:
            raise TruePoseError(f"{path} answers a trial {trial!r} that the study does not have")
        if not good:
            raise TruePoseError(f"{path}: the answer to {trial} is {answer!r}, which the page does not offer")
    return person.strip(), given


def kinds(key: Mapping[str, Any]) -> dict[str, int]:
    """How many trials there are of each: real, a method's name, "choose"."""
    counts = dict(Counter(key["judged"].values()))
    return {**counts, "choose": len(key["compared"])} if key["compared"] else counts
