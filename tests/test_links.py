"""Links of the pages lead somewhere, and the public names have docstrings for `help()`."""

import pytest
from api_pages import undocumented
from page_links import anchors, broken_html_links, broken_markdown_links
from pages import PAGES


def test_links_of_the_pages():
    assert broken_markdown_links(PAGES) == []


def test_public_names_are_documented():
    assert undocumented() == []


@pytest.mark.parametrize(
    "link, is_broken",
    [
        ("there.md", False),
        ("none.md", True),
        ("there.md#a-heading-of-code-1", False),
        ("there.md#a-heading-of-code-2", True),
        ("#here", False),
        ("#there", True),
        ("https://example.com/none", False),
        ("a%20folder", False),
    ],
)
def test_broken_links_are_found(link, is_broken, tmp_path):
    (tmp_path / "there.md").write_text("# A heading, of `code`\n## A heading of code\n```\n# no heading\n```\n")
    (tmp_path / "a folder").mkdir()
    (tmp_path / "page.md").write_text(f"# Here\n[a link]({link}) and `[no](link.md)`\n")
    assert len(broken_markdown_links([tmp_path / "page.md"])) == is_broken
    (tmp_path / "there.html").write_text('<p id="a-heading-of-code-1">')
    (tmp_path / "page.html").write_text(f'<h1 id="here"><a href="{link.replace(".md", ".html")}">')
    assert len(broken_html_links(tmp_path)) == is_broken


def test_anchors():
    assert anchors('# `num_assistant_tokens="auto"`\n## A [link](x.md): what?\n') == {
        "num_assistant_tokensauto",
        "a-link-what",
    }
