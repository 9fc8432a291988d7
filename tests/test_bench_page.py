"""The page of `msd-hf bench --html`: it needs nothing else, runs nothing, and holds every section."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from msd_hf import MSDDraftModel
from msd_hf.errors import MSDError
from msd_hf.evaluation import plots
from msd_hf.evaluation.bench_prompts import first_questions
from msd_hf.evaluation.html_report import check_page, render_page, write_page
from msd_hf.evaluation.make_report import report_pair
from msd_hf.evaluation.methods import TREE, VANILLA
from msd_hf.evaluation.tree_picture import draw_tree
from msd_hf.images import read_image
from msd_hf.loading import load_target
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR
from msd_hf.training import load_conversations


EVIL = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">\x1b[31m"


@pytest.fixture(scope="module")
def prompts(toy_processor):
    samples = [
        {"id": "picture", "question": "Describe the picture.", "image": read_image(DEMO_IMAGE)},
        {"id": "text", "question": "Count from 5 to 9."},
    ]
    return first_questions(load_conversations(samples, needs_answer=False), toy_processor, 2)


@pytest.fixture(scope="module")
def measured(prompts, toy_processor):
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    # Trees that size themselves depend on the machine.
    draft.generation_config.update(num_assistant_tokens=16, tree_depth=5, tree_top_k=3)
    settings = {"repeats": 1, "max_new_tokens": 20, "tokenizer": toy_processor.tokenizer, "num_recorded": 2}
    return report_pair(load_target(TARGET_DIR), draft, prompts, [VANILLA, TREE], **settings)


@pytest.fixture(scope="module")
def html(measured, prompts):
    return render_page(measured, {prompt.name: prompt.images for prompt in prompts})


class Page(HTMLParser):
    """The elements of a page, the addresses that it names, and its text by section."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []
        self.sections, self._section = {"": ""}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if tag == "section" and name == "id":
                self._section = value
                self.sections[value] = ""

    def handle_endtag(self, tag):
        if tag == "section":
            self._section = ""

    def handle_data(self, data):
        self.sections[self._section] += data


def test_recorded_rounds_make_the_answer(measured):
    assert [found["prompt"] for found in measured["recorded"]] == ["text", "picture"]  # all groups in turn
    for found in measured["recorded"]:
        (prompt,) = (prompt for prompt in measured["prompts"] if prompt["name"] == found["prompt"])
        text = found["first"] + "".join(piece for one in found["rounds"] for piece in one["emitted"])
        assert text == prompt["answers"]["tree"]
        assert sum(len(one["emitted"]) for one in found["rounds"]) == prompt["new_tokens"] - 1
        for one in found["rounds"]:
            accepted = one["accepted"]
            assert [one["parents"][node] for node in accepted[1:]] == accepted[:-1]
            assert [one["tokens"][node] for node in accepted[1:]] == one["emitted"][: len(accepted) - 1]
            assert len(one["emitted"]) - len(accepted) in (0, -1)  # with the target's own token, or cut at the limit
    assert max(len(one["accepted"]) for found in measured["recorded"] for one in found["rounds"]) > 3


def test_it_holds_every_section(measured, html):
    page = Page(html)
    assert [name for name in page.sections if name] == [
        "plots", "trees", "agreement", "figures", "prompts", "environment", "terms"
    ]  # fmt: skip
    assert {address.removeprefix("#") for address in page.addresses if address[0] == "#"} == set(page.sections) - {""}
    pictures = [address for address in page.addresses if address[0] != "#"]
    assert [address.partition(";")[0] for address in pictures] == ["data:image/svg+xml"] * 4 + ["data:image/jpeg"]
    rounds = [one for found in measured["recorded"] for one in found["rounds"]]
    assert page.tags.count("svg") == len(rounds)
    assert page.tags.count("rect") >= sum(len(one["tokens"]) for one in rounds)
    assert "2 of 2" in page.sections["agreement"] and "No method has changed a token" in page.sections["agreement"]
    assert measured["environment"]["command"] in page.sections["environment"]
    assert "float32" in page.sections["environment"] and "max new tokens" in page.sections["environment"]
    for prompt in measured["prompts"]:
        assert prompt["question"] in page.sections["prompts"] and prompt["question"] in page.sections["trees"]
        assert prompt["answers"]["tree"].strip() in page.sections["prompts"]
    assert "Speed on 2 prompts" in page.sections["figures"] and "2/2" in page.sections[""]


def test_it_needs_and_runs_nothing(html):
    page = Page(html)
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import", html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags) and not page.handlers


def test_texts_are_shown_and_not_read_as_html(measured):
    report = copy.deepcopy(measured)
    report["pair"]["target"] = report["environment"]["command"] = EVIL
    report["warnings"] = [EVIL]
    report["settings"]["tree"] = EVIL
    difference = {"prompt": EVIL, "position": 1, "gap": 0.1, "gap_in_roundings": 2.0}
    report["methods"]["tree"]["agreement"] = {"identical": 1, "share": 0.5, "differences": [difference]}
    for found in report["recorded"]:
        found["prompt"] = found["first"] = EVIL
        found["rounds"][0]["tokens"][1] = found["rounds"][0]["emitted"][-1] = EVIL
    for prompt in report["prompts"]:
        prompt |= {"name": EVIL, "question": EVIL, "answers": dict.fromkeys(prompt["answers"], EVIL)}
    html = render_page(report)
    page = Page(html)
    assert "script" not in page.tags and not page.handlers and "\x1b" not in html
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    shown = EVIL.replace("\x1b", "␛")
    for section in ("", "trees", "agreement", "prompts", "environment"):
        assert shown in page.sections[section], section
    assert "No method has changed a token" not in page.sections["agreement"]


def test_a_tree_is_drawn_without_overlaps():
    found = {
        "tokens": [" a", " b", " c", "\n", " " * 3, "x" * 40, "字", " d"],
        "parents": [0, 0, 0, 1, 2, 2, 3, 0],
        "probabilities": [1.0, 0.5, 0.25, 0.125, None, 0.1, 0.1, 0.1],
        "accepted": [0, 2, 5],
        "emitted": [" c", "x" * 40, "!"],
    }
    nodes = draw_tree(found).nodes
    assert [node.kind for node in nodes] == [
        "root", "rejected", "accepted", "rejected", "rejected", "accepted", "rejected", "rejected", "bonus"
    ]  # fmt: skip
    assert [node.text for node in nodes[3:7]] == ["⏎", "␣␣␣", "x" * 17 + "…", "字"]
    assert len({node.y for node in nodes if node.kind in ("root", "accepted", "bonus")}) == 1
    for node, parent in zip(nodes[1:], [*found["parents"], 5][1:], strict=True):
        assert node.line[0] == nodes[parent].x + nodes[parent].width and node.line[2] == node.x > node.line[0]
    boxes = [(node.x, node.y, node.x + node.width, node.y + node.height) for node in nodes]
    for number, one in enumerate(boxes):
        for other in boxes[:number]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    picture = draw_tree({**found, "accepted": [0, 2, 5], "emitted": [" c", "x"]})  # cut at the length limit
    assert all(node.kind != "bonus" for node in picture.nodes)


def test_a_page_replaces_only_a_page(html, tmp_path, monkeypatch):
    path = tmp_path / "a <b>.html"
    check_page(path)
    path.write_text(html)
    check_page(path)
    check_page(tmp_path / "new folder" / "report.html")
    (tmp_path / "mine.html").write_text("<html>My own page")
    (tmp_path / "folder.html").mkdir()
    for name, message in (
        ("mine.html", "exists, and is no page of `msd-hf bench`"),
        ("folder.html", "is a folder"),
        ("report.pdf", "give one that ends in .html"),
        ("mine.html/report.html", "is not a folder"),
    ):
        with pytest.raises(MSDError, match=message):
            check_page(tmp_path / name)
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MSDError, match=r'pip install "msd-hf\[bench\]", or leave --html out'):
        check_page(path)


def test_the_command_writes_a_page_without_texts(run, tmp_path):
    question = "Count from 5 to 9."
    (tmp_path / "p.txt").write_text(question)
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR, "--data", tmp_path / "p.txt", "--no-texts")
    few = ("--repeats", 1, "--max-new-tokens", 8, "--baseline", "vanilla")
    written = ("--output", tmp_path / "out", "--html", tmp_path / "new folder" / "r.html")
    code, out, err = run("bench", *pair, *few, *written)
    assert code == 0 and f"Wrote {tmp_path / 'new folder' / 'r.html'}" in out, err
    report, html = (tmp_path / "out" / "report.json").read_text(), (tmp_path / "new folder" / "r.html").read_text()
    assert question not in report and question not in html and "recorded" not in json.loads(report)
    assert str(tmp_path) not in html and "trees" not in Page(html).sections and "#trees" not in html
    code, _, err = run("bench", *pair, "--html", tmp_path / "p.txt")
    assert code == 1 and "is not the name of a page" in err


@pytest.mark.browser
def test_a_browser_shows_it(measured, prompts, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    path = write_page(measured, tmp_path / "report.html", {prompt.name: prompt.images for prompt in prompts})
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    subprocess.run([browser, *options, path.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as image:
        colours = set(image.convert("RGB").resize((300, 600)).getdata())
    for seen in ((43, 52, 70), (31, 111, 235)):  # the root of a tree, the bars of a plot
        assert min(sum(abs(a - b) for a, b in zip(colour, seen, strict=True)) for colour in colours) < 40
