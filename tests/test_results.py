"""Tables of the documentation are those that ``examples/results`` gives, and results say where they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pages
import pytest
import results

from tests.figures import record

FILES = sorted(results.FOLDER.rglob("*.json"))


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.relative_to(pages.ROOT).as_posix())
def test_every_table_of_results_is_what_the_files_say(page: Path):
    text = page.read_text("utf-8")
    assert pages.filled(text) == text, "run: python examples/bench/pages.py"


def test_a_table_that_is_not_what_the_files_say_is_noticed():
    page = pages.ROOT / "docs" / "design" / "reliability.md"
    text = page.read_text("utf-8")
    assert (
        pages.filled(text.replace("<!-- results: reliability -->\n", "<!-- results: reliability -->\n| 9 |\n")) == text
    )
    with pytest.raises(KeyError, match="nobody"):
        pages.filled("<!-- results: nobody -->\n<!-- end of results -->")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_result_says_on_which_machine_and_by_which_command(path: Path):
    found = json.loads(path.read_text("utf-8"))
    assert found["command"] and found["machine"]["processor"] and found["machine"]["versions"]["torch"]
    assert "/" not in found["machine"]["processor"]


def test_figures_are_written_only_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RPQFX_RESULTS", raising=False)
    record("a/b", "command", tried=3)
    monkeypatch.setenv("RPQFX_RESULTS", str(tmp_path))
    record("a/b", "command", tried=3, seed=0)
    assert results.read("a/b", tmp_path)["tried"] == 3
    assert [found["seed"] for found in results.read_all("a", tmp_path)] == [0]
