"""A folder is replaced only if it holds what we wrote, and as a whole: whenever a process is killed, and in a race."""

import functools
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import golden_sets
import pytest

from msd_hf.draft.folder import DRAFT_FOLDER
from msd_hf.errors import MSDError
from msd_hf.toy import DRAFT_DIR, TARGET_DIR, build
from msd_hf.toy.build import build_pair
from msd_hf.toy.target import TARGET_FOLDER
from msd_hf.writing import destination
from msd_hf.writing.destination import FolderKind, check_destination, replaced_folder


PAGES = FolderKind("a book", lambda path: re.fullmatch(r"page-\d", path.name) is not None, lambda folder: True)
NUM_PAGES = 3


def write_book(folder, text):
    for number in range(NUM_PAGES):
        (folder / f"page-{number}").write_text(text)


def read_book(folder):
    """The text of a whole book; `None` if there is none under this name."""
    if not os.path.lexists(folder):
        return None
    assert sorted(os.listdir(folder)) == [f"page-{number}" for number in range(NUM_PAGES)]
    (text,) = {(folder / f"page-{number}").read_text() for number in range(NUM_PAGES)}
    return text


def make_draft(folder):
    shutil.copytree(DRAFT_DIR, folder)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# What may be replaced.


@pytest.fixture
def original(tmp_path):
    return golden_sets.write_original_checkpoint("draft_weights_llava", tmp_path / "original", "llava")


def foreign_file(place):
    make_draft(place / "out")
    (place / "out" / "notes.txt").write_text("mine")
    return place / "out"


def repository(place):
    make_draft(place / "out")
    (place / "out" / ".git").mkdir()
    return place / "out"


def training_run(place):
    make_draft(place / "out")
    (place / "out" / "checkpoint-5").mkdir()
    return place / "out"


def own_card(place):
    make_draft(place / "out")
    (place / "out" / "README.md").write_text("# What I found out about this draft\n")
    return place / "out"


def linked_weights(place):
    out = make_draft(place / "out")
    (out / "model.safetensors").rename(place / "weights")
    (out / "model.safetensors").symlink_to(place / "weights")
    return out


def other_model(place):
    make_draft(place / "out")
    (place / "out" / "config.json").write_text('{"model_type": "llama"}')
    return place / "out"


def broken_config(place):
    make_draft(place / "out")
    (place / "out" / "config.json").write_text("[1, 2")
    return place / "out"


def link(place):
    (place / "out").symlink_to(make_draft(place / "draft"))
    return place / "out"


def link_with_slash(place):
    return f"{link(place)}/"


def dangling_link(place):
    (place / "out").symlink_to(place / "nothing")
    return place / "out"


def loop_of_links(place):
    (place / "one").symlink_to(place / "two")
    (place / "two").symlink_to(place / "one")
    return place / "one" / "out"


def file(place):
    (place / "out").write_text("mine")
    return place / "out"


def below_a_file(place):
    (place / "file").write_text("mine")
    return place / "file" / "out"


def working_directory(place):
    os.chdir(make_draft(place / "out"))
    return "."


def above_the_working_directory(place):
    (make_draft(place / "out") / "sub").mkdir()
    os.chdir(place / "out" / "sub")
    return ".."


def parent_by_name(place):
    out = make_draft(place / "out")
    (out / "sub").mkdir()
    return out / "sub" / ".."


def home(place):
    os.environ["HOME"] = str(make_draft(place / "out"))
    return "~"


CASES = {
    foreign_file: "it holds 'notes.txt', not only an MSD draft",
    repository: "it holds '.git'",
    training_run: "it holds 'checkpoint-5'",
    own_card: "it holds 'README.md'",
    linked_weights: "it holds 'model.safetensors'",
    other_model: "does not hold an MSD draft",
    broken_config: "does not hold an MSD draft",
    link: "is a symbolic link",
    link_with_slash: "is a symbolic link",
    dangling_link: "is a symbolic link",
    loop_of_links: "cannot be written",
    file: "is a file",
    below_a_file: "is not a folder",
    working_directory: "it is the working directory, or holds it",
    above_the_working_directory: "it is the working directory, or holds it",
    parent_by_name: "it holds 'sub'",
    home: "it is the home directory, or holds it",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_only_a_draft_of_ours_is_replaced(case, original, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    place = tmp_path / "place"
    place.mkdir()
    given = case(place)
    before = contents(tmp_path)
    code, _, err = run("convert", original, given, "--overwrite")
    assert code == 1 and CASES[case] in err and err.count("\n") == 1, err
    assert contents(tmp_path) == before


def test_a_mount_point_and_an_unreadable_folder_are_refused(tmp_path, monkeypatch):
    out = make_draft(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        with pytest.raises(MSDError, match="it is a mount point"):
            check_destination(out, DRAFT_FOLDER, overwrite=True)

    def refuse(path, scandir=os.scandir):
        if Path(path) == out:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(MSDError, match=r"cannot be written: Permission denied\.$"):
        check_destination(out, DRAFT_FOLDER, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MSDError, match="read-only for this user"):
        check_destination(tmp_path / "new", DRAFT_FOLDER)


@pytest.mark.parametrize(
    "command",
    [
        ("convert", "source", "out"),
        ("draft-vocab", "--target", "nowhere", "--draft", "nowhere", "--data", "nothing.json", "--output", "out"),
        ("tune", "--target", "nowhere", "--draft", "nowhere", "--data", "nothing.json", "--output", "out"),
    ],
)
def test_a_destination_is_refused_before_anything_is_loaded(command, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign_file(tmp_path)
    code, _, err = run(*command, "--overwrite")
    assert code == 1 and "'notes.txt'" in err


@pytest.mark.parametrize("name", ["out", "out/", "./out", "sub/../out"])
def test_a_draft_of_ours_is_replaced(name, original, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (make_draft(tmp_path / "out") / "training_args.bin").write_bytes(b"")
    (tmp_path / "sub").mkdir()
    card = "generated automatically according to the information the Trainer had access to"
    (tmp_path / "out" / "README.md").write_text(card)
    code, _, err = run("convert", original, name)
    assert code == 1 and "exists" in err and "--overwrite" in err
    code, _, err = run("convert", original, name, "--overwrite")
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["original", "out", "sub"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_home_is_expanded(original, tmp_path, run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("convert", original, "~/drafts/out")[0] == 0
    assert DRAFT_FOLDER.recognises(tmp_path / "drafts" / "out")


def test_a_toy_pair_replaces_only_a_toy_pair(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "build_target_folder", lambda *arguments: pytest.fail("the training began"))
    shutil.copytree(TARGET_DIR, tmp_path / "target")
    assert check_destination(tmp_path / "target", TARGET_FOLDER, overwrite=True) == (tmp_path / "target").resolve()
    with pytest.raises(MSDError, match="target' exists"):
        build_pair(tmp_path)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    config["text_config"]["vocab_size"] = 32_064
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MSDError, match="does not hold a target of the toy world"):
        build_pair(tmp_path, overwrite=True)
    foreign_file(tmp_path / "pair")
    (tmp_path / "pair" / "out").rename(tmp_path / "pair" / "draft")
    with pytest.raises(MSDError, match=r"'notes\.txt'"):
        build_pair(tmp_path / "pair", overwrite=True)
    (tmp_path / "again" / "work").mkdir(parents=True)
    with pytest.raises(MSDError, match="features of an earlier target"):
        build_pair(tmp_path / "again", overwrite=True)


@pytest.mark.parametrize("command", ["extract", "regenerate"])
def test_data_is_written_only_where_nothing_is_lost(command, tmp_path, run, monkeypatch):
    """The target is not loaded: `nowhere` is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.json").write_text("[]")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "folder.jsonl" / "mine").write_text("")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nothing")
    before = contents(tmp_path)
    names = ["file/out.jsonl", "folder.jsonl", "link.jsonl"] if command == "regenerate" else ["file", "folder.jsonl"]
    for name in names:
        code, _, err = run(command, "--target", "nowhere", "--data", "data.json", "--output", name)
        assert code == 1 and err.count("\n") == 1 and name.split("/")[0] in err and "nowhere" not in err, err
    assert contents(tmp_path) == before


# How it is replaced.


def test_a_folder_is_replaced_only_on_success(tmp_path):
    folder = tmp_path / "out"
    for text in ("old", "new"):
        with pytest.raises(RuntimeError), replaced_folder(folder, PAGES, overwrite=True) as temporary:
            write_book(temporary, "half")
            raise RuntimeError
        assert os.listdir(tmp_path) == (["out"] if text == "new" else [])
        with replaced_folder(folder, PAGES, overwrite=True) as temporary:
            write_book(temporary, text)
            assert read_book(folder) == (None if text == "old" else "old")
        assert read_book(folder) == text and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_was_written_meanwhile_is_kept(can_exchange, tmp_path, monkeypatch):
    """The user writes a file between the last check and the exchange."""
    folder = tmp_path / "out"
    folder.mkdir()
    write_book(folder, "old")
    exchange = destination._exchange
    is_late = iter([True, False])

    def exchange_later(one, other):
        if next(is_late):
            (folder / "notes.txt").write_text("mine")
        return exchange(one, other) if can_exchange else False

    monkeypatch.setattr(destination, "_exchange", exchange_later)
    with (
        pytest.raises(MSDError, match=r"'notes\.txt' was written to it meanwhile"),
        replaced_folder(folder, PAGES, overwrite=True) as temporary,
    ):
        write_book(temporary, "new")
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "page-0").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


OPERATIONS = ("rename", "mkdir", "rmdir", "unlink", "chmod", "open", "scandir", "listdir")


def kill_at(number, can_exchange):
    """Makes this process end, without any cleaning up, just before its file operation `number`."""
    count = 0

    def counted(operation):
        @functools.wraps(operation)
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os._exit(9)
            return operation(*args, **kwargs)

        return wrapped

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    destination._exchange = counted(destination._exchange if can_exchange else lambda one, other: False)


def in_child(work):
    """Runs `work` in a forked process; returns its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("old, can_exchange", [("old", True), ("old", False), (None, True)])
def test_a_kill_at_any_file_operation_leaves_a_whole_folder(old, can_exchange, tmp_path):
    """The next run clears what is left, and puts the old folder back if its name was lost."""
    folder = tmp_path / "out"

    def replace_until_killed(number):
        kill_at(number, can_exchange)
        with replaced_folder(folder, PAGES, overwrite=True) as temporary:
            write_book(temporary, "new")

    (tmp_path / ".out-mine.tmp").write_text("a file of the user")
    (tmp_path / ".out-12345678.tmp").mkdir()
    (tmp_path / ".out-12345678.tmp" / "mine").write_text("a folder of the user")
    found, num_lost = [], 0
    for number in range(1, 100):
        shutil.rmtree(folder, ignore_errors=True)
        if old:
            folder.mkdir()
            write_book(folder, old)
        status = in_child(functools.partial(replace_until_killed, number))
        found.append(read_book(folder))
        is_lost = found[-1] is None and old is not None
        num_lost += is_lost
        check_destination(folder, PAGES, overwrite=True)
        assert read_book(folder) == ("old" if is_lost else found[-1])
        assert {*os.listdir(tmp_path)} - {"out"} == {".out-mine.tmp", ".out-12345678.tmp"}
        if status == 0:
            break
        assert status == 9
    assert found[0] == old and found[-1] == "new" and len(found) > 15
    # Without an exchange the name is lost between two renames, and only there.
    assert num_lost == (0 if can_exchange else 1)


def test_the_workspace_of_a_living_process_stays(tmp_path):
    folder = tmp_path / "out"
    with replaced_folder(folder, PAGES) as temporary:
        check_destination(folder, PAGES)
        write_book(temporary, "first")
        with replaced_folder(folder, PAGES) as other:
            write_book(other, "second")
        assert temporary.is_dir()
        # The name is taken now, and this block may not overwrite it.
        with pytest.raises(MSDError, match="exists"), replaced_folder(folder, PAGES):
            raise AssertionError("not reached")
        shutil.rmtree(folder)
    assert read_book(folder) == "first" and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_processes_one_wins(overwrite, tmp_path):
    """Without --overwrite the other one fails; with it, the later one replaces the earlier one. Nothing is mixed."""
    folder = tmp_path / "out"
    for round_number in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        children = []
        for name in ("one", "two"):
            child = os.fork()
            if not child:
                status = 1
                try:
                    with replaced_folder(folder, PAGES, overwrite) as temporary:
                        write_book(temporary, name)
                        time.sleep(0.01 * round_number)
                    status = 0
                except MSDError:
                    status = 3
                finally:
                    os._exit(status)
            children.append(child)
        statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        assert statuses == ([0, 0] if overwrite else [0, 3])
        assert read_book(folder) in ("one", "two") and os.listdir(tmp_path) == ["out"]


def test_an_interrupt_is_cleaned_up(tmp_path):
    (tmp_path / "out").mkdir()
    write_book(tmp_path / "out", "old")

    def interrupted():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with replaced_folder(tmp_path / "out", PAGES, overwrite=True) as temporary:
            write_book(temporary, "new")
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)

    assert in_child(interrupted) != 0
    assert read_book(tmp_path / "out") == "old" and os.listdir(tmp_path) == ["out"]
