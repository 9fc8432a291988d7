"""Writes pages of the public names with pdoc, and fails if a name has no docstring or a link leads nowhere.

    python examples/studies/api_pages.py --output api

Open `api/index.html` then. Needs `pip install -e ".[docs]"`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

from page_links import broken_html_links


MODULES = ("msd_hf", "msd_hf.training", "msd_hf.evaluation", "msd_hf.toy", "msd_hf.observer")


def write_pages(output: Path) -> list[str]:
    """Writes the pages and returns what is wrong with them, as sentences."""
    import pdoc

    pdoc.render.configure(docformat="google", show_source=False)
    # Only the modules above are public, not all modules inside of them.
    chosen = [part for module in MODULES for part in (module, rf"!{module}\..+")]
    pdoc.pdoc(*chosen, output_directory=output)
    for page in output.rglob("*.html"):
        page.write_text(without_links_to_inherited(page.read_text(encoding="utf-8")), encoding="utf-8")
    return [*undocumented(), *broken_html_links(output)]


def without_links_to_inherited(text: str) -> str:
    """A page without the links that pdoc makes of a name in a docstring if a member of the class has the same name,
    although it gives members that are inherited from transformers no entry."""
    ids = set(re.findall(r'id="([^"]+)"', text))
    return re.sub(
        r'<a href="#([^"]+)">(.*?)</a>', lambda match: match[0] if match[1] in ids else match[2], text, flags=re.DOTALL
    )


def undocumented() -> list[str]:
    """The public classes and functions, and their public members, that have no docstring of ours, as sentences."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            value = getattr(module, public)
            if not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if not inspect.getdoc(value):
                found.append(f"{name}.{public} has no docstring")
            for member, function in vars(value).items() if inspect.isclass(value) else ():
                is_ours = inspect.isfunction(function) or isinstance(function, property | classmethod | staticmethod)
                if is_ours and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                    found.append(f"{name}.{public}.{member} has no docstring")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the pages of the public names.")
    parser.add_argument("--output", type=Path, default=Path("api"), help="Folder of the pages.")
    problems = write_pages(parser.parse_args().output)
    sys.exit("\n".join(problems) or None)
