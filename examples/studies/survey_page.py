"""Writes and reads the table of the survey, `examples/FAMILIES.md`."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from survey_rows import ALONE, FAILED, REFUSED, SERVED, UNTRIED, Row


_NAMES = ("family", "class", "status", "text", "image", "tau", "logits", "loss", "note")
COLUMNS = "| family | class | | text | image | tau | logits | loss | |"
_ADVICE = re.compile(r" Call `generate` without `assistant_model`\.$")
_PAGE = """# Families

Which targets of transformers can be served. This page is written by a script:

```bash
python examples/studies/families.py --training --write
```

It builds the smallest model of each entry of two mappings of transformers, with random weights, and compares
`generate` with and without a draft: text and an image, greedy and sampled with the same seed.

transformers {transformers}, torch {torch}.

{counts}

- **served**: the same tokens in all calls. **refused**: the call ends with the sentence in the last column.
  **failed**: an exception, or other tokens. **target alone fails**: transformers itself cannot run it.
  **untried**: no model or no input could be built.
- **text**, **image**: "same" are the same tokens as without a draft, greedy and sampled. "near-tie": rounding chose
  another token, while the logits agree to within {rounding} standard deviations. "alone": the target was run without a
  draft only.
- **tau**: tokens a verification, with a draft that guesses a part of the text. It says that candidates are accepted,
  and nothing of trained drafts.
- **logits**: the largest difference of logits with and without the draft, in their standard deviations. Targets are
  float64 except where the column says float32. Some kernels compute in float32 all the same.
- **loss**: of a draft before and after 8 steps of training on the features of one batch, with the image if there is
  one.
- Vision towers of timm (FastVLM, Gemma 3n, PerceptionLM) come in the sizes of published models only: a small tower
  stands in for them.

## Image and text

{images}

## Text

{texts}
"""
_STATUSES = (SERVED, REFUSED, FAILED, ALONE, UNTRIED)


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


def _table(rows: list[Row]) -> str:
    return "\n".join([COLUMNS, "|---|---|---|---|---|---|---|---|---|", *map(_line, rows)])


def _line(row: Row) -> str:
    figures = ""
    if row.tau is not None:  # logits that `generate` returns are float32
        figures = f"{row.deviation:.0e}" if row.deviation else "< 1e-7"
        figures += ", float32" * (row.dtype == "float32")
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
    rows = []
    for line in text.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if line.startswith("| `") and len(cells) == len(_NAMES):
            cells[:2] = (cell.strip("`") for cell in cells[:2])
            rows.append(dict(zip(_NAMES, cells, strict=True)))
    return version[1], rows


__all__ = ["note_of", "read_page", "write_page"]
