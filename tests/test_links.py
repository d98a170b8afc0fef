"""Links between the pages of the repository lead to files and headings; docs/pages.py makes those of the site of them."""

import re

import pytest
from repo import REPO

PAGES = sorted([*(REPO / "docs").rglob("*.md"), *REPO.glob("*.md"), *(REPO / "examples").rglob("*.md")])
_LINK = re.compile(r"\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")


def anchors(path):
    """What GitHub calls the headings."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower()).replace(" ", "-") for head in heads}


def dead(path):
    """The links of a page that lead nowhere."""
    found = []
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in _LINK.findall(text):
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and place.suffix == ".md" and anchor not in anchors(place)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_links_lead_somewhere(path):
    assert dead(path) == []


def test_dead_ones_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A *head*: one\n[a](#a-head-one) [b](page.md#a-head-one) [c](#no) [d](no.md) [e](https://x.y) `[f](no)`")
    assert dead(page) == ["#no", "no.md"]
