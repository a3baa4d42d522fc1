"""User studies: what the page shows and hides, and that planted answers come out as they were planted."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from truepose_core.cli import main
from truepose_core.errors import TruePoseError
from truepose_core.evaluation.study import REAL, bootstrap, score_study, wilson

N = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pairs, and two methods' results of other sizes and formats than the truth."""
    folder = tmp_path_factory.mktemp("study")
    rng = np.random.default_rng(0)
    for part, size, suffix in (("truth", (48, 64), "png"), ("one", (24, 32), "jpg"), ("two", (48, 64), "webp")):
        (folder / part).mkdir()
        for i in range(N):
            names = [f"p{i}_to_q{i}"] if part != "truth" else [f"p{i}", f"q{i}"]
            for name in names:
                pixels = Image.fromarray(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8)).resize(size)
                pixels.save(folder / part / f"{name}.{suffix}")
    (folder / "pairs.csv").write_text("from,to\n" + "".join(f"p{i}.png,q{i}.png\n" for i in range(N)))
    return folder


def make(folder, out, *extra: str) -> int:
    argv = ["study", "make", "--pairs-file", str(folder / "pairs.csv"), "--truth", str(folder / "truth")]
    argv += ["--results", f"one={folder / 'one'}", f"two={folder / 'two'}", "--trials", "3", "--height", "64"]
    return main([*argv, "--out", str(out), "--quiet", *extra])


def key_of(page):
    return json.loads(page.with_suffix(".key.json").read_text())


def answers(path, key, person, judge, choose, leave_out: int = 0):
    """judge(what is behind) and choose(order) give the answers."""
    given = {trial: judge(behind) for trial, behind in key["judged"].items()}
    given |= {trial: choose(order) for trial, order in key["compared"].items()}
    given = dict(list(given.items())[leave_out:])
    path.write_text(json.dumps({"study": key["study"], "participant": person, "answers": given}))
    return path


def at(method):
    return lambda order: order.index(method)


def test_the_page_tells_nothing_and_is_made_again_by_its_seed(folder, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert make(folder, tmp_path / f"{name}.html", "--seed", seed) == 0
    page = (tmp_path / "a.html").read_text()
    assert page == (tmp_path / "b.html").read_text()
    assert page != (tmp_path / "c.html").read_text()
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert set(data) == {"study", "trials"}
    assert {frozenset(trial) for trial in data["trials"]} == {frozenset({"id", "kind", "pictures", "beside"})}
    key = key_of(tmp_path / "a.html")
    assert sorted(key["judged"].values()) == ["one"] * 3 + [REAL] * 3 + ["two"] * 3
    assert len(key["compared"]) == 3
    ids = [trial["id"] for trial in data["trials"]]
    assert ids == sorted({*key["judged"], *key["compared"]})
    # Every picture is of one format and size, whatever the files were.
    starts = {picture[:30] for trial in data["trials"] for picture in trial["pictures"]}
    assert {start[:23] for start in starts} == {"data:image/webp;base64,"}


def test_planted_answers_come_out(folder, tmp_path, capsys):
    assert make(folder, tmp_path / "s.html") == 0
    key = key_of(tmp_path / "s.html")
    # Ann sees through everything and prefers "two"; Bob takes all for real and prefers "one".
    files = [
        answers(
            tmp_path / "ann.json", key, "Ann", lambda x: "real" if x == REAL else "generated", lambda o: o.index("two")
        ),
        answers(tmp_path / "bob.json", key, "Bob", lambda x: "real", at("one")),
    ]
    capsys.readouterr()
    report = tmp_path / "report.json"
    assert main(["study", "score", str(tmp_path / "s.key.json"), *map(str, files), "--report", str(report)]) == 0
    values = {(f["name"], f["method"]): f for f in json.loads(report.read_text())["figures"]}
    assert {k: v["value"] for k, v in values.items()} == {
        ("R2G", REAL): 0.0,
        ("G2R", "one"): 0.5,
        ("G2R", "two"): 0.5,
        ("Jab", "one"): 0.5,
        ("Jab", "two"): 0.5,
    }
    assert values["G2R", "one"]["total"] == 6
    # Two people who disagree wholly: over people the interval is everything.
    assert values["G2R", "one"]["people"] == [0.0, 1.0]
    assert "| Jab | two | 0.500 |" in capsys.readouterr().out


def test_answers_left_out_are_told_and_the_rest_counts(folder, tmp_path, capsys):
    assert make(folder, tmp_path / "s.html") == 0
    key = key_of(tmp_path / "s.html")
    path = answers(tmp_path / "a.json", key, "A", lambda x: "generated", lambda o: 0, leave_out=2)
    report = score_study(tmp_path / "s.key.json", [path])
    assert report.missing == {"A": 2}
    assert sum(share.total for share in report.shares if share.name != "Jab") == 7
    assert main(["study", "score", str(tmp_path / "s.key.json"), str(path)]) == 0
    assert "A left out 2 trials" in capsys.readouterr().err


def test_intervals():
    low, high = wilson(15, 30)
    # Roots of (p - x)^2 = z^2 x (1 - x) / n.
    for x in (low, high):
        assert (0.5 - x) ** 2 == pytest.approx(1.959963984540054**2 * x * (1 - x) / 30, rel=1e-9)
    assert wilson(0, 10)[0] == 0
    assert bootstrap([(3, 10)], 0) is None
    assert bootstrap([(3, 10)] * 5, 0) == pytest.approx((0.3, 0.3))
    wide = bootstrap([(0, 10), (10, 10)] * 5, 0)
    narrow = wilson(50, 100)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap([(1, 4), (3, 4), (2, 4)], 7) == bootstrap([(1, 4), (3, 4), (2, 4)], 7)


def test_bad_answers_are_refused(folder, tmp_path):
    assert make(folder, tmp_path / "s.html") == 0
    key = key_of(tmp_path / "s.html")
    one = answers(tmp_path / "a.json", key, "A", lambda x: "real", lambda o: 0)
    again = answers(tmp_path / "b.json", key, "A", lambda x: "real", lambda o: 0)
    score = tmp_path / "s.key.json"
    with pytest.raises(TruePoseError, match="'A' stands twice"):
        score_study(score, [one, again])
    values = json.loads(one.read_text())
    for change, message in (
        ({"study": "x"}, "answers the study 'x'"),
        ({"participant": " "}, "names no participant"),
        ({"answers": {"ffff": "real"}}, "a trial 'ffff' that the study does not have"),
        ({"answers": {next(iter(key["judged"])): "perhaps"}}, "which the page does not offer"),
        ({"answers": {next(iter(key["compared"])): 2}}, "which the page does not offer"),
        ({"answers": None}, "holds no answers"),
    ):
        one.write_text(json.dumps({**values, **change}))
        with pytest.raises(TruePoseError, match=message):
            score_study(score, [one])
    score.write_text(json.dumps({**key, "version": 9}))
    with pytest.raises(TruePoseError, match="of version 9; this truepose reads version 1"):
        score_study(score, [one])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trials", "9"], "9 trials need as many pairs; the list has 4. Give --trials 4"),
        (["--results", "one=x", "one=y"], "'one' is given twice"),
        (["--results", "here"], "is not NAME=FOLDER"),
        (["--out", "page.txt"], "the suffix '.txt'"),
        (["--sources", "nowhere"], "p0.png does not exist"),
    ],
)
def test_wrong_options_are_one_line(folder, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.chdir(tmp_path)
    assert make(folder, tmp_path / "s.html", *extra) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_person_answers_in_a_browser(folder, tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chrome, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if not (chrome and driver):
        pytest.skip("chromium and chromedriver are not installed")
    assert make(folder, tmp_path / "s.html", "--title", "<b>Which?</b>") == 0
    key = key_of(tmp_path / "s.html")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        browser.get((tmp_path / "s.html").as_uri())
        assert browser.title == "<b>Which?</b>"
        browser.find_element("id", "name").send_keys("Zoë 1")
        browser.find_element("id", "start").click()
        for _ in range(len(key["judged"]) + len(key["compared"])):
            trial = browser.find_element("id", "main").get_attribute("data-trial")
            loaded = "return [...document.images].every(i => i.complete && i.naturalHeight === 64)"
            assert browser.execute_script(loaded)
            answer = "real" if trial in key["judged"] else str(key["compared"][trial].index("two"))
            browser.find_element("css selector", f"[data-answer='{answer}']").click()
        assert browser.find_element("id", "save").get_attribute("download") == "answers-Zoë-1.json"
        saved = browser.execute_script("return document.getElementById('answers').textContent")
    finally:
        browser.quit()
    (tmp_path / "zoe.json").write_text(saved)
    report = score_study(tmp_path / "s.key.json", [tmp_path / "zoe.json"])
    values = {(s.name, s.method): s.value for s in report.shares}
    assert report.missing == {}
    assert values["R2G", REAL] == 0
    assert values["G2R", "one"] == values["Jab", "two"] == 1
