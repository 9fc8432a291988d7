"""What the page of `msd-hf demo --web` shows, without gradio and without a browser."""

from __future__ import annotations

import importlib.util
import socket
import threading
from html.parser import HTMLParser

import pytest
import torch

from msd_hf import MSDDraftModel, loading
from msd_hf.images import read_image
from msd_hf.prompts import build_inputs
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR
from msd_hf.web import race as race_module
from msd_hf.web.markup import answer_markup, sides_markup, summary_markup, tree_markup, trees_markup
from msd_hf.web.page import MOST_CHARACTERS, answer_views
from msd_hf.web.pieces import Pieces
from msd_hf.web.questions import example_questions
from msd_hf.web.race import Frame, RacePair, race
from msd_hf.web.recorder import accepted_nodes, record
from msd_hf.web.recording import DraftedTree, Recording, Round


QUESTION = "Describe the picture."


class Elements(HTMLParser):
    """The texts of a page, each with the class of its element and the number of lists around it."""

    def __init__(self, markup: str):
        super().__init__()
        self.found: list[tuple[str, str | None, int]] = []
        self._open: list[tuple[str, str | None]] = []
        self.feed(markup)
        assert self._open == []  # every element is closed

    def handle_starttag(self, tag, attrs):
        self._open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.found.append(
            (data, self._open[-1][1] if self._open else None, [tag for tag, _ in self._open].count("ul"))
        )


def texts(markup: str, kind: str) -> list[str]:
    return [text for text, own_kind, _ in Elements(markup).found if own_kind == kind]


TREE = DraftedTree(("the", " <b>", " red", " cat", "\n", ""), (0, 0, 0, 1, 1, 3), frozenset({1, 3}))
DRAFTED = Recording(
    (
        Round(0.1, (5,), (" The",)),
        Round(0.2, (6, 7, 8), (" <b>", " cat", " &"), 2, TREE),
        Round(0.4, (9, 2), (" sits", ""), 1, DraftedTree(("&", " sits"), (0, 0), frozenset({1}))),
    ),
    0.5,
    True,
)
ALONE = Recording(
    tuple(Round(i / 4, (token,), ("x",)) for i, token in enumerate((5, 6, 7, 8, 9, 2), start=1)), 2.0, True
)


def test_tokens_have_the_colour_of_their_origin():
    markup = answer_markup(DRAFTED)
    assert texts(markup, "drafted") == ["<b>", "cat", "sits"] and texts(markup, "own") == ["The", "&"]
    assert "".join(text for text, _, _ in Elements(markup).found) == "The <b> cat & sits"
    assert "<b>" not in markup and 'title="forward 1: 2 drafted + 1 own"' in markup
    assert texts(answer_markup(ALONE), "drafted") == []


def test_harmful_characters_are_shown_by_signs():
    markup = answer_markup(Recording((Round(0.1, (1,), ('"\u202e\x00<script>',)),), 0.1))
    assert "\u202e" not in markup and "\x00" not in markup and "<script>" not in markup


def test_a_tree_is_drawn_with_each_node_below_its_parent():
    nodes = [(text, kind, depth - 1) for text, kind, depth in Elements(tree_markup(TREE)).found]
    assert nodes == [
        ("the", "own", 0),
        ("<b>", "drafted", 1),
        ("cat", "drafted", 2),
        ("∅", "rejected", 3),
        ("⏎", "rejected", 2),
        ("red", "rejected", 1),
    ]


def test_a_deep_tree_is_drawn():
    number = 1100  # more than Python's recursion has room for
    tree = DraftedTree(tuple(map(str, range(number))), (0, *range(number - 1)), frozenset())
    assert Elements(tree_markup(tree)).found[-1] == (str(number - 1), "rejected", number)


def test_the_last_tree_is_drawn_and_at_the_end_all():
    frame = Frame("race", ALONE, DRAFTED, 6)
    assert "Tree of forward 2: 1 candidates, 1 accepted" in trees_markup(frame)
    assert trees_markup(frame).count('class="tree"') == 1
    assert trees_markup(Frame("done", ALONE, DRAFTED, 6)).count('class="tree"') == 3
    assert 'class="tree"' not in trees_markup(Frame())


def test_accepted_nodes_are_found_where_tokens_repeat():
    nodes, parents = [4, 7, 8, 7, 8, 7], [0, 0, 0, 2, 1, 4]
    assert accepted_nodes(nodes, parents, [8, 7]) == {2, 3}
    assert accepted_nodes(nodes, parents, [7, 8, 7]) == {1, 4, 5}
    assert accepted_nodes(nodes, parents, []) == set()


def test_a_character_of_several_tokens_is_one_piece():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    pieces = Pieces(Bytes())
    assert [pieces.add(byte) for byte in "né–x".encode()] == ["n", "", "é", "", "", "–", "x"]


def test_a_recording_knows_its_figures_at_each_time():
    assert DRAFTED.tau == 2.5 and DRAFTED.tokens_per_second == 12
    early = DRAFTED.until(0.25)
    assert early.tokens == (5, 6, 7, 8) and early.seconds == 0.25 and not early.is_done
    assert early.tokens_per_second == 16 and early.tau == 3
    assert DRAFTED.until(0.5) is DRAFTED and DRAFTED.until(9) is DRAFTED
    assert DRAFTED.until(0.0).tokens == () and DRAFTED.until(0.0).tokens_per_second == 0


def test_the_result_says_speedup_and_whether_the_answers_are_the_same():
    done = summary_markup(Frame("done", ALONE, DRAFTED, 6))
    assert "4.0×" in done and "the same answer" in done and 'data-same="true"' in done
    assert "3 forwards of the target instead of 6" in done
    assert 'data-same="false"' in summary_markup(Frame("done", ALONE, DRAFTED.until(0.3), 6))
    assert texts(sides_markup(Frame("done", ALONE, DRAFTED, 6)), "note")
    assert summary_markup(Frame("race", ALONE, DRAFTED, 6, slowdown=7)).count("7 times slower") == 1


@pytest.fixture(scope="module")
def pair(toy_processor):
    target = loading.load_target(TARGET_DIR)
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    return RacePair(target, draft, toy_processor, ("a", "b"), {"max_new_tokens": 24, "do_sample": False})


@pytest.fixture(scope="module")
def inputs(toy_processor):
    return build_inputs(toy_processor, QUESTION, read_image(DEMO_IMAGE))


def test_a_race_records_both_sides_and_replays_them(pair, inputs, monkeypatch):
    monkeypatch.setattr(race_module, "_SHORTEST_REPLAY", 0.3)
    frames = list(race(pair, QUESTION, read_image(DEMO_IMAGE)))
    stages = [frame.stage for frame in frames]
    assert sorted(set(stages), key=stages.index) == ["alone", "drafted", "race", "done"]
    last = frames[-1]
    expected = pair.target.generate(**inputs, **pair.arguments)[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(last.alone.tokens) == list(last.drafted.tokens) == expected and last.is_same
    text = pair.processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert "".join(piece for round_ in last.drafted.rounds for piece in round_.pieces) == text
    assert last.alone.tau == 1 and last.drafted.tau > 1.5
    times = [round_.seconds for round_ in last.drafted.rounds]
    assert times == sorted(times) and times[-1] < last.drafted.seconds
    drafted = [round_ for round_ in last.drafted.rounds if round_.num_draft_tokens]
    assert drafted and all(len(round_.tree.accepted) == round_.num_draft_tokens for round_ in drafted)
    replayed = [frame for frame in frames if frame.stage == "race"]
    assert replayed[0].alone.tokens == () and replayed[0].length == len(expected)


def test_a_recording_that_nobody_reads_stops_its_call(pair, inputs):
    threads = threading.active_count()
    for arguments in ({}, {"assistant_model": pair.draft}):
        calls = record(pair.target, pair.processor.tokenizer, inputs, 0.01, max_new_tokens=2000, **arguments)
        next(calls)
        calls.close()
        assert threading.active_count() == threads
    assert torch.equal(
        pair.target.generate(**inputs, **pair.arguments),
        pair.target.generate(**inputs, **pair.arguments, assistant_model=pair.draft),
    )


def test_an_error_of_the_call_reaches_the_reader(pair, inputs):
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(record(pair.target, pair.processor.tokenizer, inputs, 1.0, max_new_tokens=0))


@pytest.mark.parametrize(
    "text, files, message",
    [
        ("  ", [], "Type a question."),
        ("?", ["<i>.png"], "There is no image file &#x27;&lt;i&gt;.png&#x27;"),
        ("?", ["a.png", "b.png"], "Got 2 pictures"),
        ("?" * (MOST_CHARACTERS + 1), [], "4,001 characters"),
        ("<image><image>", [], "Error"),  # tokens for pictures that are not there
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_on_the_page(pair, text, files, message):
    *_, (summary, sides, _) = answer_views(pair, {"text": text, "files": files})
    assert message in summary and "error" in summary
    assert "Target alone" in sides


def test_examples_are_questions_with_and_without_pictures(tmp_path):
    questions = example_questions(tmp_path)
    assert len({question["text"] for question in questions}) == len(questions) >= 5
    assert {len(question["files"]) for question in questions} == {0, 1}
    for question in questions:
        for path in question["files"]:
            assert read_image(path).size == (144, 144)


def test_the_page_is_refused_before_the_models_are_loaded(run, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", refuse)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    code, _, err = run("demo", "--web")
    assert code == 1 and 'pip install "msd-hf[demo]"' in err and err.count("\n") == 1

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "gradio" else found(name))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run("demo", "--web", "--port", port)
        assert code == 1 and f"--port {port} cannot be served from" in err
    code, _, err = run("demo", "--web", "--host", "no such host")
    assert code == 1 and "--host 'no such host'" in err
    code, _, err = run("demo", "--web", "--image", "none.png")
    assert code == 1 and "There is no image file" in err
    code, _, err = run("demo", "--web", "--draft", tmp_path / "no-such-draft")
    assert code == 1 and "no-such-draft" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--web", "--target", "T"], "give it with --draft"),
        (["--host", "0.0.0.0"], "--host is for the page of the demo: add --web"),
        (["--draft", "D"], "--draft is for the page of the demo: add --web"),
        (["--web", "--repeats", "3"], "--repeats"),
        (["--web", "--port", "70000"], "--port"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message, run):
    code, _, err = run("demo", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
