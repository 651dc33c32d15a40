"""What the suite and .ci/run rely on: pinned tools, the numerical tests, and what a run says it has left out."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement

from rpqfx.ops.cpu import build
from tests.conftest import (
    HERE,
    NUMERICAL,
    LeftOut,
    is_numerical,
    left_out,
    pytest_collection_modifyitems,
    pytest_ignore_collect,
)

ROOT = HERE.parent
PINS = ROOT / ".ci" / "constraints.txt"
MISSING = ("tests/test_x.py", 3, "Skipped: could not import 'peft.tuners': No module named 'peft'")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    known = dict(line.split("==") for line in lines)  # fails where a line pins nothing
    assert len(known) == len(lines), "a package is pinned twice"
    return known


@pytest.mark.parametrize("part", ["build", "dependencies", "test", "lint", "docs"])
def test_every_tool_that_ci_uses_is_pinned_to_a_version_that_the_project_allows(part: str) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = settings["project"]["optional-dependencies"]
    groups |= {"build": settings["build-system"]["requires"], "dependencies": settings["project"]["dependencies"]}
    wanted = [Requirement(text) for text in groups[part]]
    own = {extra for requirement in wanted if requirement.name == "rpqfx" for extra in requirement.extras}
    wanted = [r for r in wanted if r.name != "rpqfx"] + [Requirement(text) for extra in own for text in groups[extra]]
    known = pins()
    assert wanted
    for requirement in wanted:
        name = normal(requirement.name)
        assert name in known, f"{name} has no pin in .ci/constraints.txt"
        assert known[name] in requirement.specifier, f"{name}=={known[name]} is not {requirement.specifier}"


def test_names_in_the_constraints_are_normal() -> None:
    """.ci/run compares them as text with what pip has installed."""
    assert [name for name in pins() if name != normal(name)] == []


@pytest.mark.parametrize(
    ("markers", "profile", "count", "slow"),
    [
        ("not slow and not gpu", "default", 7, False),
        ("numerical and not slow and not gpu", "default", 7, False),
        ("", "default", 7, False),
        ("not slow and not gpu", "thorough", 500, False),
        ("slow", "default", 100, True),
        ("slow and numerical", "thorough", 500, True),
    ],
)
def test_claims_with_few_examples_draw_all_of_them_as_slow_tests(
    markers: str, profile: str, count: int, slow: bool
) -> None:
    """The function of two items, as of two parameters, whose settings cannot be made twice."""
    drawn: list[int] = []
    added: list[str] = []
    before = settings.get_current_profile_name()
    settings.load_profile(profile)
    try:

        @given(st.integers())
        def claim(value: int) -> None:
            drawn.append(value)

        few = {"few": pytest.mark.few(7).mark}
        item = SimpleNamespace(
            path=HERE / "nn" / "test_conv.py",
            function=claim,
            get_closest_marker=few.get,
            add_marker=lambda marker: added.append(marker.name),
        )
        config = SimpleNamespace(getoption=lambda name: markers)
        pytest_collection_modifyitems(config, [item, item])  # type: ignore[arg-type, list-item]
        claim()
    finally:
        settings.load_profile(before)
    assert len(drawn) == count and added == ["slow"] * 2 * slow


def test_numerical_tests_are_those_of_the_list() -> None:
    assert [name for name in NUMERICAL if not (HERE / name).exists()] == []
    chosen = {path.relative_to(HERE).as_posix() for path in HERE.rglob("test_*.py") if is_numerical(path)}
    assert {
        "ops/test_search.py",
        "ops/cpu/test_kernels.py",
        "fit/test_k_means.py",
        "kv/attention/test_attend.py",
    } <= chosen
    assert not {"ops/cuda/test_triton_kernels.py", "test_api.py", "kv.py"} & chosen
    assert not is_numerical(Path("/elsewhere/ops/test_search.py"))


@pytest.mark.parametrize(
    ("expression", "name", "ignored"),
    [
        ("numerical and not slow and not gpu", "test_api.py", True),
        ("numerical and not slow and not gpu", "ops/test_search.py", None),
        ("numerical and not slow and not gpu", "conftest.py", None),
        ("not slow and not gpu", "test_api.py", None),
    ],
)
def test_a_numerical_run_imports_no_other_tests(expression: str, name: str, ignored: bool | None) -> None:
    config: Any = SimpleNamespace(getoption={"markexpr": expression}.get)
    assert pytest_ignore_collect(HERE / name, config) is ignored


def test_numerical_tests_have_the_marker(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("numerical") is not None


def test_the_switches_of_the_numerical_runs_take_effect() -> None:
    """Otherwise .ci/run would run the same tests three times in the same way."""
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        assert torch.backends.cpu.get_cpu_capability() == "AVX2"
    if os.environ.get("RPQFX_KERNELS") == "0":
        assert not build.ready()


# ------------------------------------------------------------------------------------------ what a run left out


def report(nodeid: str, longrepr: Any = MISSING, skipped: bool = True) -> Any:
    return SimpleNamespace(nodeid=nodeid, longrepr=longrepr, skipped=skipped)


def test_a_run_says_what_needs_more_packages_and_how_to_run_the_rest() -> None:
    assert list(left_out({}, 0)) == []
    assert list(left_out({"a.py::b": "peft"}, 2)) == [
        "1 test needs more than the extra \"test\" (peft): pip install -e '.[transformers]'",
        "2 deselected: pytest -m slow runs the slow tests, -m processes those of several processes, "
        "-m gpu those that need a GPU",
    ]
    (line,) = left_out({"a.py::b": "peft", "a.py::c": "onnxruntime", "d.py": "safetensors"}, 0)
    assert line == (
        '2 tests and 1 test file need more than the extra "test" (onnxruntime, peft, safetensors): '
        "pip install -e '.[onnx,safetensors,transformers]'"
    )


def test_only_what_was_skipped_for_a_package_counts() -> None:
    seen = LeftOut(SimpleNamespace())
    seen.pytest_runtest_logreport(report("a.py::missing"))
    seen.pytest_collectreport(report("b.py"))
    seen.pytest_runtest_logreport(report("a.py::other", ("a.py", 1, "Skipped: needs a CUDA device")))
    seen.pytest_runtest_logreport(report("a.py::passed", None, skipped=False))
    assert seen.missing == {"a.py::missing": "peft", "b.py": "peft"}


def test_workers_send_what_they_have_seen() -> None:
    """Each collects all files, so that the counts are not added up."""
    worker, controller = LeftOut(SimpleNamespace(workeroutput={})), LeftOut(SimpleNamespace())
    worker.pytest_collectreport(report("b.py"))
    slow, other = (SimpleNamespace(get_closest_marker=[name].count) for name in ("slow", "numerical"))
    worker.pytest_deselected([slow, slow, other])
    worker.pytest_sessionfinish()
    for _ in range(2):
        controller.pytest_testnodedown(worker.config)
    controller.pytest_testnodedown(SimpleNamespace())  # one that crashed
    assert (controller.missing, controller.deselected) == ({"b.py": "peft"}, 2)


def test_the_extras_it_names_exist() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package in ("transformers", "peft", "accelerate", "onnx", "onnxruntime", "onnxscript", "safetensors"):
        (line,) = left_out({"a.py": package}, 0)
        (extra,) = re.findall(r"\.\[(\w+)\]", line)
        named = {Requirement(text).name for text in settings["project"]["optional-dependencies"][extra]}
        assert package in named
