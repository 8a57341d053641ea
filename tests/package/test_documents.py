"""Every Python block of the README and of the documentation's pages runs as it stands; every page is reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}-{index}")
    for page in PAGES
    for index, block in enumerate(re.findall(r"^ *```python\n(.*?)^ *```$", page.read_text(), re.S | re.M), 1)
]


def test_there_is_something_to_run() -> None:
    with_blocks = {block.values[0] for block in BLOCKS}
    assert {"README.md", "getting-started.md", "training.md", "serving.md"} <= {page.name for page in with_blocks}  # type: ignore[attr-defined]


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_block(page: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what a block saves does not land in the working tree
    exec(compile(block, f"{page.name}", "exec"), {"__name__": "document"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in configuration
