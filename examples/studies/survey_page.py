"""Writes and reads the table of the survey, `examples/FAMILIES.md`."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from survey_rows import ALONE, FAILED, REFUSED, SERVED, UNTRIED, Row


COLUMNS = "| family | class | | text | image | tau | logits | loss | |"
_ADVICE = re.compile(r" (Call `generate` without `assistant_model`|See SUPPORT)\.?$")
_PAGE = """# Families

Which targets of transformers can be served. `python examples/studies/families.py --training --write` writes this page: it
builds the smallest model of each entry of two mappings of transformers, with random weights, and compares `generate`
with and without a draft: greedy and sampled with the same seed, text and an image.

transformers {transformers}, torch {torch}.

{counts}

- **served**: the same tokens in all calls. **refused**: the call ends with the sentence in the last column. **failed**: an
  exception, or other tokens. **target alone fails**: transformers itself cannot run it. **untried**: no model or no input
  could be built.
- **text**, **image**: "same" are the same tokens as without a draft, greedy and sampled. "alone": the target was run without
  a draft only. "near-tie": rounding chose another token, while the logits agree to within {rounding}.
- **tau**: tokens a verification, with drafts that guess a part of the text. It says that candidates are accepted, and
  nothing of trained drafts.
- **logits**: the largest difference of logits with and without the draft, in their standard deviations. Targets are
  float64 except where the column says float32. Kernels that compute in float32 also in a float64 model show about 1e-6.
- **loss**: of a draft before and after 8 steps of training on the features of one batch, with the image if there is one.
- Towers of timm (FastVLM, Gemma 3n, PerceptionLM) have the sizes of published models only, so a small tower stands in.

## Image and text

{images}

## Text

{texts}
"""


def write_page(path: Path, rows: list[Row], num_images: int) -> None:
    """Writes the page. The first `num_images` rows are families with images."""
    parts = {"Image and text": rows[:num_images], "Text": rows[num_images:]}
    counts = [f"| | {' | '.join(_STATUSES)} | all |", "|---|" + "---|" * (len(_STATUSES) + 1)]
    for name, part in parts.items():
        found = collections.Counter(row.status for row in part)
        counts.append(f"| {name} | {' | '.join(str(found[status]) for status in _STATUSES)} | {len(part)} |")
    images, texts = (_table(part) for part in parts.values())
    path.write_text(
        _PAGE.format(
            transformers=transformers.__version__,
            torch=torch.__version__.partition("+")[0],
            counts="\n".join(counts),
            rounding="1e-5 (float32: 1e-3)",
            images=images,
            texts=texts,
        ),
        encoding="utf-8",
    )


_STATUSES = (SERVED, REFUSED, FAILED, ALONE, UNTRIED)


def _table(rows: list[Row]) -> str:
    return "\n".join([COLUMNS, "|---|---|---|---|---|---|---|---|---|", *map(_line, rows)])


def _line(row: Row) -> str:
    figures = "" if row.tau is None else f"{row.deviation:.0e}" + (", float32" if row.dtype == "float32" else "")
    cells: list[Any] = [
        f"`{row.model_type}`",
        f"`{row.class_name}`",
        row.status,
        *(_short(outcome) for outcome in (row.text, row.image)),
        "" if row.tau is None else f"{row.tau:.2f}",
        figures,
        "" if row.loss is None else "{:.2f} → {:.2f}".format(*row.loss),
        note_of(row),
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _short(outcome: str) -> str:
    return outcome.partition(":")[0] if ":" in outcome else outcome


def note_of(row: Row) -> str:
    """The last column: the sentence of a refusal without its advice, an exception, or why there is no input."""
    reasons = [outcome for outcome in (row.text, row.image) if ":" in outcome]
    return _ADVICE.sub("", row.note) or "; ".join(reasons)


def read_page(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The version of transformers that a page names, and its rows: family, class, status, text, image, note."""
    text = path.read_text(encoding="utf-8")
    version = re.search(r"^transformers (\S+), torch", text, re.MULTILINE)
    assert version is not None
    names = ("family", "class", "status", "text", "image", "tau", "logits", "loss", "note")
    rows = []
    for line in text.splitlines():
        cells = re.split(r"(?<!\\) ?\| ?", line)[1:-1]
        if len(cells) == len(names) and cells[0].startswith("`"):
            rows.append(dict(zip(names, (cell.strip().strip("`") if number < 2 else cell.replace("\\|", "|") for number, cell in enumerate(cells)), strict=True)))
    return version[1], rows


__all__ = ["note_of", "read_page", "write_page"]
