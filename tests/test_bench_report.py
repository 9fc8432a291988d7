"""Tables, files and plots of reports, and the command that writes them."""

import copy
import json

import pytest
from PIL import Image
from rich.console import Console

from msd_hf.errors import MSDError
from msd_hf.evaluation import plots
from msd_hf.evaluation.html_report import render_page
from msd_hf.evaluation.report import print_report, to_markdown, write_report
from msd_hf.evaluation.report_tables import report_tables
from msd_hf.toy import DRAFT_DIR, TARGET_DIR
from msd_hf.toy.evaluate import toy_prompts


SPREAD = {"median": 2.5, "lower_quartile": 2.25, "upper_quartile": 3.0}
NAN = float("nan")
PARTS = {
    "target forward": 6.0,
    "draft layers": 2.0,
    "draft head": 1.0,
    "tree building": 0.5,
    "verification": 0.25,
    "cache": 0.125,
    "the rest": 0.125,
}


def method(tau, identical=2, differences=(), **more):
    return {
        "description": "a way of decoding",
        "tokens_per_second": 100.0,
        "decode_tokens_per_second": 125.0,
        "speedup": SPREAD,
        "decode_speedup": dict.fromkeys(SPREAD, NAN),
        "tau": tau,
        "mean_accepted_draft_tokens": tau - 1,
        "acceptance_histogram": {1: 3, 2: 0, 3: 5},
        "acceptance_by_depth": [{"depth": 1, "share": 0.75, "given_parent": 0.75}],
        "peak_memory_bytes": None,
        "agreement": {"identical": identical, "share": identical / 2, "differences": list(differences)},
        **more,
    }


@pytest.fixture
def report():
    difference = {"prompt": "second", "position": 7, "gap": 1e-6, "gap_in_roundings": 1.5}
    methods = {
        "vanilla": method(1.0),
        "prompt-lookup": method(1.4),
        "tree": method(4.2, 1, [difference], num_rounds=8, round_efficiency=0.9, round_milliseconds=PARTS),
    }
    return {
        "kind": "pair",
        "environment": {
            "command": "msd-hf bench --toy",
            "versions": {"torch": "1.2.3"},
            "device": "CPU (a CPU)",
            "cpu_cores": 2,
            "threads": 1,
            "dtype": "float32",
            "attention": "sdpa",
            "system": "Linux",
        },
        "settings": {"repeats": 3},
        "num_prompts": 2,
        "num_too_short": 0,
        "methods": methods,
        "groups": {"text": {"num_prompts": 2, "methods": copy.deepcopy(methods)}},
        "prompts": [],
        "warnings": ["tau is low"],
    }


@pytest.fixture
def shape_report(report):
    return {
        "kind": "shape",
        "environment": report["environment"],
        "settings": {"shape": "small"},
        "draft_weight_bytes": 5_000_000,
        "step_milliseconds": SPREAD,
        "tokens_per_second": 10.0,
        "rounds": [
            {
                "way": "eager",
                "simulated_tau": 3.8,
                "milliseconds": SPREAD,
                "cost_in_steps": SPREAD,
                "first_rounds_milliseconds": 31.0,
                "simulated_tokens_per_second": 30.0,
                "simulated_decode_speedup": SPREAD,
            }
        ],
        "round": {"eager": {"num_rounds": 4, "round_efficiency": 0.9, "round_milliseconds": PARTS}},
        "verification": [{"nodes": 8, "milliseconds": 3.0, "steps": 1.25}],
        "bandwidth_gigabytes_per_second": 20.0,
        "share_of_bandwidth": {"step": 0.5},
        "peak_memory_bytes": {"alone": 1_000_000, "with the draft, eager": None},
    }


def test_files_hold_the_same_figures(report, tmp_path):
    files = write_report(report, tmp_path / "new", plots=False)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]
    assert [path.name for path in files] == ["report.json", "report.md"]
    read = json.loads(files[0].read_text())
    assert read["methods"]["tree"]["speedup"] == SPREAD and read["methods"]["tree"]["decode_speedup"]["median"] is None
    page = files[1].read_text()
    assert "msd-hf bench --toy" in page and "torch 1.2.3" in page and "**Warning**: tau is low" in page
    assert "| tree | 100.0 | 125.0 | 2.50 (2.25-3.00) | - |" in page
    assert "| tree | 4.20 | 3.20 | 0.900 | - | 1/2 (50.0%) |" in page
    assert "| target forward | 6.00 (60%) |" in page and "| round | 10.00 |" in page
    assert "| tree | second | 7 | 1e-06 | 1.5 |" in page


def test_every_row_is_as_wide_as_its_header(report, shape_report):
    for made in (report, shape_report):
        for table in report_tables(made):
            assert {len(row) for row in table.rows} == {len(table.header)}, table.title


def test_a_narrow_terminal_shows_whole_figures(report, capsys):
    print_report(report, Console(width=80))
    out = capsys.readouterr().out
    assert "…" not in out
    for text in ("2.50 (2.25-3.00)", "0.75 (0.75)", "0.900", "Warning: tau is low"):
        assert text in out


def test_a_simulation_says_so(shape_report):
    page = to_markdown(shape_report)
    assert "SIMULATED" in page and "the weights are random" in page
    assert "| eager | 3.80 | 2.50 (2.25-3.00) | 2.50 (2.25-3.00) | 30.0 | 2.50 (2.25-3.00) |" in page
    assert "| 8 | 3.00 | 1.25 |" in page
    html = render_page(shape_report)
    assert "SIMULATED" in html and "3.80" in html and html.count("data:image/svg+xml") == 1
    assert "tokens of the target alone" not in html and "Candidate trees" not in html


@pytest.mark.parametrize("kind, names", [("pair", ["speedup", "acceptance", "round"]), ("shape", ["round"])])
def test_plots_are_drawn(kind, names, report, shape_report, tmp_path):
    chosen = report if kind == "pair" else shape_report
    files = write_report(chosen, tmp_path, plots=True)
    assert [path.stem for path in files[2:]] == names
    for path in files[2:]:
        with Image.open(path) as image:
            assert image.format == "PNG" and len(set(image.convert("L").getdata())) > 2
        assert f"]({path.name})" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob(".*"))


def test_missing_matplotlib_is_reported_before_the_work(report, tmp_path, monkeypatch, run):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MSDError, match=r'pip install "msd-hf\[bench\]"'):
        write_report(report, tmp_path, plots=True)
    code, out, err = run("bench", "--toy", "--plots", "--output", tmp_path)
    assert code == 1 and out == "" and "Plots need matplotlib" in err


def test_the_command_compares_on_conversations(tmp_path, run):
    Image.new("RGB", (144, 144), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nDescribe the picture."}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": "red", "image": "red.png", "conversations": turns}]))
    pair = ("--target", TARGET_DIR, "--draft", DRAFT_DIR)
    fast = ("--repeats", 1, "--max-new-tokens", 8, "--ignore-eos", "--baseline", "vanilla")
    code, out, err = run("bench", *pair, "--data", tmp_path / "data.json", *fast, "--output", tmp_path / "out")
    assert code == 0, err
    assert "Speed on 1 prompts" in out and "1/1 (100.0%)" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["methods"]) == ["vanilla", "tree"]
    assert report["methods"]["tree"]["agreement"]["share"] == 1.0
    assert report["settings"]["ignore_eos"] is True
    assert report["prompts"][0]["name"] == "red" and report["prompts"][0]["group"] == "visual"
    assert report["environment"]["command"].startswith("msd-hf bench --target")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "one of --data, --toy, --hard, --shape and --lmms-eval"),
        (("--toy", "--shape", "small"), "one of --data, --toy, --hard, --shape and --lmms-eval"),
        (("--data", "x.json"), "--data needs a --draft, and its --target if the draft does not name it"),
        (("--toy", "--plots"), "--plots needs a folder"),
        (("--toy", "--baseline", "beam"), "Unknown baseline 'beam'"),
        (("--toy", "--compile"), "--compile is for --shape. On prompts, add --baseline compiled."),
        (("--shape", "huge"), "Unknown shape 'huge'"),
        (("--shape", "small", "--nodes", "1,x"), "--nodes '1,x' is not a list of numbers"),
        (("--shape", "small", "--assume-tau", "x"), "--assume-tau 'x' is not a number like 3.8, or a list like 3,4,5"),
        (("--shape", "small", "--draft-vocab-size", 32001), "has between 1 and 32,000 tokens"),
    ],
)
def test_bad_options_give_one_line(arguments, message, run):
    code, _out, err = run("bench", *arguments)
    assert code == 1 and message in " ".join(err.split()) and err.count("\n") == 1


def test_toy_prompts_are_of_all_kinds_in_turn(toy_processor):
    chosen = toy_prompts(toy_processor, 15, seed=0)
    kinds = [prompt.name.rsplit(" ", 1)[0] for prompt in chosen]
    assert len(chosen) == 15 and len(set(kinds[:13])) == 13 and kinds[13:] == kinds[:2]
    assert len({prompt.name for prompt in chosen}) == 15
    assert ("pixel_values" in chosen[0].make_inputs()) is (chosen[0].group == "visual")
