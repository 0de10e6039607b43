"""Relative links in the documents lead somewhere, and their anchors exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def prose_of(page: Path) -> str:
    """Return the text of a page without its code, which may contain brackets of its own."""
    return CODE.sub("", FENCE.sub("", page.read_text()))


def links_of(page: Path) -> Iterator[str]:
    """Yield the targets of all links that stay in the repository."""
    for target in LINK.findall(prose_of(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    cleaned = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in cleaned}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page whose file or anchor does not exist."""
    broken = []

    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page

        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)

    return broken


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_relative_link_resolves(page: Path):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One heading\n[good](#one-heading) [gone](gone.md) [no anchor](page.md#two)\n"
        "[elsewhere](https://example.org/gone.md) `[code](code.md)`\n"
    )
    assert broken_links(page) == ["gone.md", "page.md#two"]
