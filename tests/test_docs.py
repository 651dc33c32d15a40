"""What the documentation says: its snippets run, its names exist, and no public name is left out."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rpqfx
import rpqfx.routing
from rpqfx.nn.layer import CodebookOptions, RPQLayer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# A Python block, the "<!-- no-run: REASON -->" before it, and the text block right after it: what it prints.
_BLOCK = re.compile(
    r"(?:^[ ]*<!-- no-run(?P<reason>[^\n]*)-->\s*?\n)?"
    r"^(?P<indent>[ ]*)```python\n(?P<code>.*?)^(?P=indent)```[ ]*$"
    r"(?:\s*^(?P=indent)```text\n(?P<output>.*?)^(?P=indent)```[ ]*$)?",
    re.DOTALL | re.MULTILINE,
)


class Snippet(NamedTuple):
    line: int
    code: str
    output: str | None
    reason: str | None = None  # why it is left out, "" where the page does not say


def blocks(text: str) -> Iterator[Snippet]:
    """All Python blocks of a page, those that are left out as well."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        output = None if found["output"] is None else textwrap.dedent(found["output"])
        reason = None if found["reason"] is None else found["reason"].removeprefix(":").strip()
        yield Snippet(line, textwrap.dedent(found["code"]), output, reason)


def snippets(text: str) -> Iterator[Snippet]:
    """Those that are run."""
    return (block for block in blocks(text) if block.reason is None)


def run(path: str, text: str) -> None:
    """Runs a page's snippets in one namespace and holds what each prints against the page."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for snippet in snippets(text):
        printed = io.StringIO()
        code = ast.increment_lineno(ast.parse(snippet.code), snippet.line - 1)
        with contextlib.redirect_stdout(printed):
            exec(compile(code, path, "exec"), namespace)
        if snippet.output is not None or printed.getvalue():
            assert _lines(printed.getvalue()) == _lines(snippet.output or ""), f"{path}, line {snippet.line}"


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


with_snippets = [page for page in PAGES if any(snippets(page.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("page", with_snippets, ids=relative)
def test_snippets_run_and_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run(relative(page), page.read_text(encoding="utf-8"))


def test_a_snippet_that_fails_or_prints_something_else_is_noticed():
    page = "a\n\n<!-- no-run: long -->\n```python\nx\n```\n\n```python\nprint(1)\n```\n"
    assert [(block.line, block.reason) for block in blocks(page)] == [(5, "long"), (9, None)]
    assert [snippet.line for snippet in snippets(page)] == [9]
    assert [block.reason for block in blocks("<!-- no-run -->\n```python\nx\n```\n")] == [""]
    run("page", "```python\nprint(1)\n```\n\n```text\n1\n```\n")
    with pytest.raises(AssertionError, match="page, line 2"):
        run("page", "```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="page, line 2"):
        run("page", "```python\nprint(1)\n```\n")
    with pytest.raises(NameError):
        run("page", "    ```python\n    missing\n    ```\n")


def test_blocks_that_are_left_out_are_few_and_say_why():
    left_out = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = list(blocks(text))
        assert len(found) == len(re.findall(r"^ *```python", text, re.MULTILINE)), (
            f"{relative(page)}: a block is not seen"
        )
        unexplained = [block.line for block in found if block.reason is not None and len(block.reason.split()) < 4]
        assert unexplained == [], f"{relative(page)}: <!-- no-run: REASON --> is what leaves a block out"
        if count := sum(block.reason is not None for block in found):
            left_out[page.stem] = count
    assert left_out == {
        "compile-and-export": 5,
        "distributed": 7,  # run by tests/distributed in several processes
        "finetuning": 1,
        "from-other-libraries": 1,
        "kv-cache": 1,
        "pretrained": 1,
        "processes": 1,
        "quickstart": 1,
        "transformers": 9,  # all of that page, run by tests/slow/test_transformers.py
    }


def test_what_leaves_a_block_out_names_tests_that_exist():
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            for name in re.findall(r"tests/\S+\.py", block.reason or ""):
                assert (ROOT / name).is_file(), f"{relative(page)}, line {block.line}: {name}"


def test_the_readme_and_every_guide_have_snippets():
    """Otherwise the tests above would pass on nothing."""
    guides = {page.stem for page in with_snippets if page.parent.name == "guides"}
    assert ROOT / "README.md" in with_snippets
    assert guides == {
        "choosing-a-policy",
        "command-line",
        "compile-and-export",
        "finetuning",
        "from-other-libraries",
        "layers",
        "pretrained",
        "processes",
        "rewriting",
        "kv-cache",
        "routing",
        "saving",
        "training",
        "speed",
        "training-memory",
        "troubleshooting",
    }


# ------------------------------------------------------------------------------------------------------- names


def resolve(name: str) -> Any:
    """The object of a dotted name; a module only where nothing else has that name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        if end == len(parts) and end > 1:  # rpqfx.report is a function to its users, and a module to import
            found = getattr(importlib.import_module(".".join(parts[:-1])), parts[-1], found)
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def referenced() -> dict[str, Any]:
    """Every object that the reference pages document, by the name they give it."""
    found = {}
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = resolve(name)
    return found


@pytest.mark.parametrize("module", [rpqfx, rpqfx.nn, rpqfx.graph, rpqfx.routing], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: Any):
    known = referenced()
    documented = {id(item) for item in known.values()}
    for item in known.values():
        if inspect.ismodule(item):
            documented |= {id(member) for member in vars(item).values()}
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    for name in module.__all__:
        item = getattr(module, name)
        if inspect.ismodule(item):
            assert f"`{item.__name__}`" in index, f"{item.__name__} is missing from the reference's index"
        else:
            assert id(item) in documented, f"{module.__name__}.{name} is missing from the reference pages"


def test_the_shared_arguments_of_layers_are_in_the_reference():
    assert RPQLayer in referenced().values()
    told = inspect.getdoc(RPQLayer) or ""
    described = set(re.findall(r"^    (\w+)(?: \(.*\))?: ", told, re.MULTILINE))
    assert set(CodebookOptions.__annotations__) - described == set()


def spans() -> list[str]:
    """What the right column of "What came before" names."""
    rows = re.findall(r"^\|.*\| (.*) \|$", (ROOT / "docs/guides/seeds.md").read_text(encoding="utf-8"), re.MULTILINE)
    return sorted({span for row in rows for span in re.findall(r"`([^`]+)`", row)})


def test_what_came_before_names_files_and_names_that_exist():
    named = spans()
    assert len(named) > 30
    for span in named:
        if "/" in span:
            assert (ROOT / span).is_file(), f"{span} does not exist"
        elif span.startswith("rpqfx."):
            check_call(span)


def check_call(span: str) -> None:
    """``rpqfx.name`` or ``rpqfx.name(argument, argument=value)``: the name and its arguments exist."""
    tree = ast.parse(span, mode="eval").body
    call = tree if isinstance(tree, ast.Call) else None
    item = resolve(ast.unparse(tree.func if isinstance(tree, ast.Call) else tree))
    if call is not None:
        given = {argument.id for argument in call.args if isinstance(argument, ast.Name)}
        given |= {keyword.arg for keyword in call.keywords if keyword.arg}
        known = set(inspect.signature(item).parameters)
        if inspect.isclass(item):
            known |= {name for cls in item.__mro__ for name in getattr(cls, "__annotations__", ())}
            known |= set(CodebookOptions.__annotations__) if issubclass(item, RPQLayer) else set()
        elif inspect.isclass(getattr(item, "__self__", None)):  # Policy.budget(**options): those of the class
            known |= set(inspect.signature(item.__self__).parameters)
        assert given <= known, f"{span}: no argument {sorted(given - known)}"


def test_names_and_arguments_that_do_not_exist_are_noticed():
    check_call("rpqfx.Policy(num_subvectors='heads')")
    for wrong in ("rpqfx.Polcy", "rpqfx.Policy(codebook='heads')", "rpqfx.nn.RPQLinear(splits='row')"):
        with pytest.raises((AttributeError, AssertionError)):
            check_call(wrong)


def test_every_row_of_what_came_before_says_where_it_is():
    text = (ROOT / "docs/guides/seeds.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", text, re.MULTILINE)
    rows = [row for row in rows if row[0] not in ("ability there",)]
    assert len(rows) > 40
    for ability, where in rows:
        told = "`" in where or "not here yet" in where or "no figure of ours yet" in where
        assert told, f"no answer for: {ability}"
    assert "planned" not in text


# ------------------------------------------------------------------------------------------------------ the pages


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert page.relative_to(ROOT / "docs").as_posix() in navigation


def test_relative_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{relative(page)}: {target}"


def test_docstrings_are_markdown():
    """Roles of another markup would stand in the reference as they are."""
    for source in (ROOT / "rpqfx").rglob("*.py"):
        found = re.search(r":(func|class|meth|mod|attr|data|ref):`", source.read_text(encoding="utf-8"))
        assert found is None, f"{source.name}: {found[0] if found else ''}"
