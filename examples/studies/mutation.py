"""
Puts random small faults (mutants) into the rooms that decide the output, one by one: what share do the tests notice?

    pip install -e ".[studies]"
    python examples/studies/mutation.py --number 200          # goes on where it was stopped
    python examples/studies/mutation.py --number 200 --report  # the table and the survivors, without a run

The faults are those of mutmut (another operator, number or constant, an argument left out or `None`, ...), and a
statement left out. mutmut's own runner wraps every function, which `torch.compile`, class lookups and pickling notice;
therefore only its operators are used. Texts, errors and log messages stay as they are: what an error says decides no
token. The mutants of a seed are in a fixed order, so that a larger `--number` begins with those of a smaller one.

Each mutant runs quick test files of its room, until a test fails; survivors run the other files too. The results file
holds every mutant with its outcome. A survivor that no input can tell from the original is equivalent: whoever reads
it writes the reason under `"equivalent"` in that file. The share counts the mutants that are not equivalent.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from mutmut.mutation.mutators import mutation_operators, operator_string
from package_copy import ROOT, PackageCopy, package_copy


RESULTS = Path(__file__).parent / "results" / "mutation.json"
# Quick files; `_WIDE` follows in every room.
_TESTS = {
    "attention": "decoding_edges drafting_step family_verification compiled_edges split_attention",
    "decoding": "decoding_edges checks_edges target_edges compiled_edges pair_state",
    "drafting": "draft_head drafting_step decoding_edges compiled_edges draft_reference",
    "kv": "cache transaction decoding_edges compiled_edges",
    "target": "target_edges checks_edges decoding_edges family_verification refusals",
    "tree": "tree tree_policy suffix_branch decoding_edges",
}
_WIDE = (
    "odd_calls suffix_branch generation_golden integration every_argument conversation generate_arguments draft_vocab "
    "pair_state target_layers compiled_edges refusals batches device_rounds lossless_greedy lossless_sampling "
    "loaded_targets families draft_reference assisted_chain phases recorded_step compiled"
)
# Annotations, decorators and what an error says stay as they are.
_KEPT = (cst.Annotation, cst.Decorator, cst.Raise, cst.Assert, cst.Import, cst.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    """
    One fault.

    Args:
        file: below `msd_hf`.
        name: file, function, the code before and after, and which of several equal places in the function it is. It
            stays when other functions change.
        module, node, other: the file's code, the node that is replaced, and its replacement.
    """

    file: str
    name: str
    module: cst.Module
    node: cst.CSTNode
    other: cst.CSTNode

    @property
    def source(self) -> str:
        """The file with the fault."""
        return self.module.deep_replace(self.node, self.other).code

    @property
    def change(self) -> str:
        """The lines that differ, as `-` and `+` lines."""
        before, after = self.module.code.splitlines(), self.source.splitlines()
        lines = difflib.unified_diff(before, after, lineterm="", n=0)
        return "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")


class _Collector(cst.CSTVisitor):
    """Collects function, node and replacement of each fault."""

    def __init__(self) -> None:
        self.found: list[tuple[str, cst.CSTNode, cst.CSTNode]] = []
        self._scope: list[str] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self._scope.append(node.name.value)
        if isinstance(node, _KEPT) or (isinstance(node, cst.Call) and _is_log(node)) or _is_public_list(node):
            return False
        replacements = [
            other
            for kind, operator in mutation_operators
            if isinstance(node, kind) and operator is not operator_string
            for other in operator(node)
        ]
        is_dropped = isinstance(node, cst.AugAssign) or (
            isinstance(node, cst.Expr) and isinstance(node.value, cst.Call)
        )
        replacements += [cst.Pass()] * is_dropped
        self.found += [(".".join(self._scope), node, other) for other in replacements]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        if isinstance(original_node, cst.FunctionDef | cst.ClassDef):
            self._scope.pop()


def _is_log(call: cst.Call) -> bool:
    function = call.func
    return isinstance(function, cst.Attribute) and getattr(function.value, "value", None) == "logger"


def _is_public_list(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", None) == "__all__"


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All mutants of a file."""
    module = cst.parse_module(source)
    collector = _Collector()
    module.visit(collector)
    seen: Counter[str] = Counter()
    mutants = []
    for function, node, other in collector.found:
        name = f"{file} {function}: {module.code_for_node(node)} -> {module.code_for_node(other)}"
        seen[name] += 1
        mutants.append(Mutant(file, f"{name} #{seen[name]}", module, node, other))
    return mutants


def sample_mutants(number: int, seed: int, rooms: list[str]) -> list[Mutant]:
    """
    `number` mutants of the rooms. Every mutant is as likely as every other one. The order depends on their names
    alone: a change of the code exchanges few of them.
    """
    mutants = []
    for room in rooms:
        for path in sorted((ROOT / "msd_hf" / room).glob("*.py")):
            mutants += mutants_of(f"{room}/{path.name}", path.read_text(encoding="utf-8"))
    print(f"{len(mutants):,} mutants in {', '.join(rooms)}", flush=True)
    return sorted(mutants, key=lambda mutant: hashlib.sha256(f"{seed}/{mutant.name}".encode()).digest())[:number]


def tests_of(file: str, all_tests: bool) -> list[str]:
    """Test files for a file of the package, in the order in which they run."""
    names = [*_TESTS[file.partition("/")[0]].split(), *(_WIDE.split() if all_tests else ())]
    return [f"tests/test_{name}.py" for name in dict.fromkeys(names)]


def try_mutant(mutant: Mutant, before: dict[str, Any], copy: PackageCopy, all_tests: bool, timeout: float) -> Any:
    """Runs the tests that an entry of the results has not passed. Returns the new entry."""
    passed = list(before.get("passed", ()))
    tests = [name for name in tests_of(mutant.file, all_tests) if name not in passed]
    with copy.changed(mutant.file, mutant.source):
        status, output = copy.run(tests, timeout)
    if status in (3, 4, 5):
        raise RuntimeError(f"pytest could not run {tests}:\n{output}")
    outcome = {None: "too long", 0: "survived"}.get(status, "noticed")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "file": mutant.file,
        "change": mutant.change,
        "outcome": outcome,
        "by": failed[0].split(" - ")[0] if failed else "",
        "passed": [*passed, *tests] if outcome == "survived" else passed,
    }


def try_mutants(mutants: list[Mutant], results: dict[str, Any], path: Path, timeout: float) -> None:
    """Runs the tests of all mutants that are not noticed yet, first those of their room, and writes the results."""
    with package_copy() as copy:
        for all_tests in (False, True):
            for mutant in mutants:
                before = results.get(mutant.name, {"outcome": "survived"})
                is_done = set(tests_of(mutant.file, all_tests)) <= set(before.get("passed", ()))
                if before["outcome"] != "survived" or "equivalent" in before or is_done:
                    continue
                start = time.monotonic()
                entry = results[mutant.name] = try_mutant(mutant, before, copy, all_tests, timeout)
                path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                seconds = time.monotonic() - start
                print(f"{entry['outcome']:<9}{seconds:>6.0f} s  {mutant.file}\n{entry['change']}", flush=True)


def interval(successes: int, number: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share, at 95% by default."""
    share = successes / number
    centre = share + z * z / (2 * number)
    spread = z * math.sqrt(share * (1 - share) / number + z * z / (4 * number * number))
    return (centre - spread) / (1 + z * z / number), (centre + spread) / (1 + z * z / number)


def report(entries: list[dict]) -> Iterator[str]:
    """The table of a run, and its survivors."""
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for entry in entries:
        kind = "equivalent" if entry.get("equivalent") else entry["outcome"]
        for room in (entry["file"].partition("/")[0], "all"):
            rows[room][kind] += 1
    names = ("mutants", "noticed", "too long", "survived", "equivalent", "share")
    yield f"{'room':<12}" + "".join(f"{name:>12}" for name in names) + "  95%"
    for room, counts in sorted(rows.items(), key=lambda row: (row[0] == "all", row[0])):
        noticed = counts["noticed"] + counts["too long"]
        number = noticed + counts["survived"]
        low, high = interval(noticed, number) if number else (0.0, 1.0)
        yield (
            f"{room:<12}{counts.total():>12}{counts['noticed']:>12}{counts['too long']:>12}{counts['survived']:>12}"
            f"{counts['equivalent']:>12}{noticed / max(number, 1):>12.1%}  {low:.1%} to {high:.1%}"
        )
    for entry in entries:
        if entry["outcome"] == "survived":
            reason = entry.get("equivalent")
            yield f"\n{entry['file']}: {'equivalent: ' + reason if reason else 'survived'}\n{entry['change']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=200, help="Number of mutants.")
    parser.add_argument("--seed", type=int, default=0, help="Chooses the mutants.")
    parser.add_argument(
        "--rooms", default="attention,decoding,drafting,kv,target", help="Folders of the package, with commas."
    )
    parser.add_argument("--timeout", type=float, default=1800.0, help="Seconds for the tests of one mutant.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="The file of the results.")
    parser.add_argument("--report", action="store_true", help="Run nothing.")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.is_file() else {}
    mutants = sample_mutants(arguments.number, arguments.seed, arguments.rooms.split(","))
    if not arguments.report:
        try_mutants(mutants, results, arguments.results, arguments.timeout)
    print("\n".join(report([results[mutant.name] for mutant in mutants if mutant.name in results])))


if __name__ == "__main__":
    main()
