"""
Puts small faults into a copy of the package, one at a time, and runs the tests that should notice each.

    python examples/studies/faults.py            # all of them
    python examples/studies/faults.py --only mask

Every fault lies at a subtle spot. A fault that no test notices is printed as "passed".
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """
    One fault.

    Args:
        name: what is wrong.
        file: below `msd_hf`.
        old: text that stands in the file once.
        new: text in its place.
        tests: arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


COMPILED, DECODING = "tests/test_compiled_edges.py", "tests/test_decoding_edges.py"
CHECKS, HEAD, TREES = "tests/test_checks_edges.py", "tests/test_draft_head.py", "tests/test_tree_policy.py"
ROTARY, CACHE = "tests/test_drafting_step.py", "tests/test_transaction.py tests/test_cache.py"
INTERRUPTED = f"{DECODING} {CACHE} -k interrupt"
LATE, PAUSES = f"{COMPILED} -k late", f"{TREES} -k 'paus or trial or comes_back or learnt or paid'"
SHOWN, WINDOW, INDEX = f"{DECODING} -k drafted_token", f"{DECODING} -k window", "tests/test_suffix_branch.py -k index"

FAULTS = [
    Fault(
        "the attention implementation stays after an error",
        "target/tree_forward.py",
        "        try:\n            yield\n        finally:\n            config._attn_implementation = before\n",
        "        yield\n        config._attn_implementation = before\n",
        COMPILED,
    ),
    Fault(
        "the last position does not follow fed tokens",
        "drafting/drafter.py",
        "        self._last_position += length\n",
        "",
        COMPILED,
    ),
    Fault(
        "the last position does not follow resumed rounds",
        "drafting/fixed.py",
        "        self._last_position += num_fed\n",
        "",
        COMPILED,
    ),
    Fault(
        "the last position does not follow compiled drafting",
        "drafting/fixed.py",
        "        self._last_position += max(counts)\n",
        "",
        LATE,
    ),
    Fault(
        "the last position does not follow device rounds",
        "decoding/device_rounds.py",
        "        self._last_position += self._count\n",
        "",
        LATE,
    ),
    Fault(
        "device rounds reserve slots for the tree alone",
        "decoding/device_rounds.py",
        "return max(self.drafter.settings.num_nodes, self._block_length)",
        "return self.drafter.settings.num_nodes",
        COMPILED,
    ),
    Fault(
        "device rounds reserve slots for the tokens alone",
        "decoding/device_rounds.py",
        "return max(self.drafter.settings.num_nodes, self._block_length)",
        "return self._block_length",
        COMPILED,
    ),
    Fault(
        "device rounds forget the tokens that are ahead",
        "decoding/device_rounds.py",
        "self.running.context.num_slots + ahead + self._num_slots <=",
        "self.running.context.num_slots + self._num_slots <=",
        COMPILED,
    ),
    Fault(
        "device rounds forget the target's own slots",
        "decoding/device_rounds.py",
        "self.running.context.num_slots + ahead + self._num_slots <=",
        "self.running.context.num_slots + ahead <=",
        COMPILED,
    ),
    Fault(
        "device rounds forget the draft's own slots",
        "decoding/device_rounds.py",
        "self._draft_context.num_slots + self._count + ahead + self.drafter.num_slots <=",
        "self._draft_context.num_slots + self._count + ahead <=",
        COMPILED,
    ),
    Fault(
        "device rounds forget positions of the tree",
        "decoding/device_rounds.py",
        "last_position + self.drafter.num_positions <= len",
        "last_position <= len",
        LATE,
    ),
    Fault(
        "a draft vocabulary has no cap of logits",
        "drafting/head.py",
        "return self.target.cap(functional.linear(states.to(weight), weight, bias))",
        "return functional.linear(states.to(weight), weight, bias)",
        HEAD,
    ),
    Fault(
        "the whole head has no cap of logits",
        "drafting/head.py",
        "plain_head = function_at(target.head_module, draft) if target.logit_cap is None else None",
        "plain_head = function_at(target.head_module, draft)",
        HEAD,
    ),
    Fault(
        "a product in place has no cap of logits",
        "drafting/head.py",
        "is_plain = self._rows is not None and self._rows[1] is None and target.logit_cap is None",
        "is_plain = self._rows is not None and self._rows[1] is None",
        HEAD,
    ),
    Fault(
        "the compiled head has no cap of logits",
        "drafting/head.py",
        "        self._head = self.target.head\n",
        "        self._head = self.target.head_module\n",
        HEAD,
    ),
    Fault(
        "log-probabilities in half precision",
        "drafting/head.py",
        "            if logits.dtype in _HALF:\n                logits = logits.float()\n            log_probs",
        "            log_probs",
        HEAD,
    ),
    Fault(
        "compiled log-probabilities in half precision",
        "drafting/head.py",
        "        if logits.dtype in _HALF:\n            logits = logits.float()\n        best",
        "        best",
        HEAD,
    ),
    Fault(
        "an interrupted batch is not cut to its shortest row",
        "kv/transaction.py",
        "            truncate(self.cache, min(lengths))\n",
        "",
        INTERRUPTED,
    ),
    Fault(
        "rows that have ended do not count for the cut",
        "kv/transaction.py",
        "lengths = [*self.context.lengths, *(row.length for row in self._stored.values())]",
        "lengths = [*self.context.lengths]",
        INTERRUPTED,
    ),
    Fault(
        "rows that have ended do not come back",
        "kv/transaction.py",
        "            self.restore_rows()\n            truncate",
        "            truncate",
        INTERRUPTED,
    ),
    Fault(
        "a failed check leaves the prompt in the cache",
        "decoding/loop.py",
        "            call.slots.revert()  # so that",
        "            pass  # so that",
        "tests/test_odd_calls.py -k fails_its_check",
    ),
    Fault(
        "a refused call takes the memory of a chat",
        "decoding/call.py",
        "    check_positions(adapter.text_config",
        "    ChatMemory(cache, draft, input_ids, num_slots)\n    check_positions(adapter.text_config",
        "tests/test_odd_calls.py -k refused_call",
    ),
    Fault(
        "a cycle of references keeps the target",
        "drafting/head.py",
        "        self._product: TensorFunction | None = None",
        "        self._cycle = self.logits\n        self._product: TensorFunction | None = None",
        "tests/test_pair_state.py -k goes_with",
    ),
    Fault(
        "release does not free buffers",
        "decoding/pair.py",
        "        drafts.pop(model, None)\n",
        "        pass\n",
        "tests/test_pair_state.py -k release",
    ),
    Fault(
        "the window inside a tree is dropped",
        "attention/masks.py",
        "    return visible & (depths.unsqueeze(2) - depths.unsqueeze(1) < window)\n",
        "    return visible\n",
        WINDOW,
    ),
    Fault(
        "the window before a tree is one slot too wide",
        "attention/masks.py",
        "+ depths - window + 1  # [B, T]",
        "+ depths - window  # [B, T]",
        WINDOW,
    ),
    Fault(
        "the last of two length limits counts",
        "decoding/token_selection.py",
        "criterion.max_length if max_length is None else min(max_length, criterion.max_length)",
        "criterion.max_length",
        f"{DECODING} -k limits",
    ),
    Fault(
        "ties in float64 are not those of float32",
        "decoding/verification.py",
        "return (logits.float() if logits.dtype == torch.float64 else logits).argmax(-1)",
        "return logits.argmax(-1)",
        f"{DECODING} -k ties",
    ),
    Fault(
        "the last accepted token is shown as not drafted",
        "decoding/verification.py",
        "min(len(nodes) - 1, num_emitted)",
        "min(len(nodes) - 1, num_emitted - 1)",
        SHOWN,
    ),
    Fault(
        "the last accepted token of device rounds is shown as not drafted",
        "decoding/device_rounds.py",
        "[min(self._count - 1, num_emitted)]",
        "[min(self._count - 1, num_emitted - 1)]",
        SHOWN,
    ),
    Fault(
        "image tokens are proposed",
        "tree/suffix.py",
        "self._prompts = prompts.masked_fill(visual_mask, _VISUAL)",
        "self._prompts = prompts",
        f"{DECODING} -k branch",
    ),
    Fault(
        "NaN passes the self-check",
        "decoding/self_check.py",
        '.nan_to_num(nan=float("inf"))',
        ".nan_to_num(nan=0.0)",
        CHECKS,
    ),
    Fault(
        "a shallow check counts for good",
        "decoding/self_check.py",
        "pair.is_checked = depth == _DEPTH",
        "pair.is_checked = True",
        CHECKS,
    ),
    Fault(
        "longrope ignores padding",
        "target/support.py",
        "if prompt_length > limit and batch_size == 1 and is_full:",
        "if prompt_length > limit and batch_size == 1:",
        CHECKS,
    ),
    Fault(
        "rope_type of an original draft is ignored",
        "draft/checkpoints.py",
        'scaling.get("rope_type", scaling.get("type"))',
        'scaling.get("type")',
        CHECKS,
    ),
    Fault(
        "the old name of rope_type is ignored",
        "draft/checkpoints.py",
        'scaling.get("rope_type", scaling.get("type"))',
        'scaling.get("rope_type")',
        CHECKS,
    ),
    Fault(
        "a missing rms_norm_eps is ours",
        "draft/checkpoints.py",
        '    fields.setdefault("rms_norm_eps", 1e-6)\n',
        "",
        CHECKS,
    ),
    Fault(
        "the batch size is not in the key",
        "decoding/call.py",
        "        target.dtype,\n        batch_size,\n",
        "        target.dtype,\n",
        PAUSES,
    ),
    Fault(
        "means are not reset after a pause",
        "tree/experience.py",
        "                self._drafted_tokens, self._drafted_seconds = _Mean(), _Mean()\n            return False",
        "            return False",
        PAUSES,
    ),
    Fault(
        "a pause has no bound",
        "tree/experience.py",
        "min(2 * self._pause, _LONGEST_PAUSE)",
        "2 * self._pause",
        PAUSES,
    ),
    Fault(
        "a pause stays long after drafting has paid",
        "tree/experience.py",
        "            self._pause = _PAUSE\n            return True",
        "            return True",
        PAUSES,
    ),
    Fault(
        "kinds of samples do not depend on the seed",
        "training/curriculum.py",
        'random.Random(f"{self.seed}/{number}")',
        'random.Random(f"{number}")',
        "tests/test_training_curriculum.py",
    ),
    Fault(
        "places of samples do not depend on the seed",
        "training/curriculum.py",
        'random.Random(f"{self.seed}/{kind}/{turn}")',
        'random.Random(f"{kind}/{turn}")',
        "tests/test_training_curriculum.py",
    ),
    Fault(
        "tables of rotations repeat",
        "drafting/step.py",
        "rotary_emb(like, positions.unsqueeze(0))",
        "rotary_emb(like, positions.unsqueeze(0) % 1024)",
        ROTARY,
    ),
    Fault(
        "a suffix goes on after its earliest occurrence",
        "tree/suffix.py",
        "            self._next[key] = len(self.tokens)\n",
        "            self._next.setdefault(key, len(self.tokens))\n",
        INDEX,
    ),
]


def is_noticed(fault: Fault, folder: Path) -> bool:
    """Whether a test fails with the fault in a copy of the package in `folder`."""
    path = folder / "msd_hf" / fault.file
    source = path.read_text(encoding="utf-8")
    if source.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has {source.count(fault.old)} times, not once: {fault.old!r}")
    path.write_text(source.replace(fault.old, fault.new), encoding="utf-8")
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {fault.tests}"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    try:
        result = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(source, encoding="utf-8")
    if result.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run {fault.tests}:\n{result.stdout}{result.stderr}")
    return result.returncode == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Faults whose name contains this text.")
    only = parser.parse_args().only
    faults = [fault for fault in FAULTS if only in fault.name]
    num_noticed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("msd_hf", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        for fault in faults:
            noticed = is_noticed(fault, folder)
            num_noticed += noticed
            print(f"{'noticed' if noticed else 'passed '}  {fault.name}", flush=True)
    print(f"{num_noticed} of {len(faults)} faults noticed")
    raise SystemExit(num_noticed < len(faults))


if __name__ == "__main__":
    main()
