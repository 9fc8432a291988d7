"""The commands and the code of `examples/SHARING.md` run as they are written.

Folders with the names of repositories stand for them, and a small server for the Hub.
"""

import json
import re
import shlex
from pathlib import Path

from hub_server import hub_in_process
from PIL import Image

from msd_hf import MSDDraftModel
from msd_hf.toy import DEMO_IMAGE, DRAFT_DIR, TARGET_DIR
from msd_hf.toy.training_data import write_training_data


PAGE = (Path(__file__).parents[1] / "examples" / "SHARING.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    target = "llava-hf/llava-1.5-7b-hf"
    draft = MSDDraftModel.from_pretrained(DRAFT_DIR)
    draft.config.target_name_or_path = target
    for name in ("lucylyn/MSD-LLaVA1.5-7B", "my-draft", "my-drafts/one"):
        draft.save_pretrained(tmp_path / name)
    for name in (target, "my-llava"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(TARGET_DIR)
    Image.open(DEMO_IMAGE).convert("RGB").save("photo.jpg")
    write_training_data(Path("data"), 4, seed=0)
    questions = json.loads(Path("data/visual.json").read_text())[:1]
    Path("questions.json").write_text(json.dumps(questions))
    Path("images").symlink_to("data")

    (tmp_path / "hub").mkdir()
    with hub_in_process(tmp_path / "hub", monkeypatch, "hf_tokenOfSomebody0123456789") as hub:
        commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
        assert len(commands) == 6
        for command in commands:
            program, *arguments = shlex.split(command)
            code, out, err = run(*arguments)
            assert program == "msd-hf" and code == 0, (command, out, err)
        for code in blocks("python"):
            exec(compile(code, "SHARING.md", "exec"), {"draft": MSDDraftModel.from_pretrained("my-draft")})
        assert (hub.root / "me" / "my-draft" / "model.safetensors").exists()
    assert "not measured" not in Path("my-draft/README.md").read_text()
