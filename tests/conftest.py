"""What holds for the whole suite: Hypothesis profiles, one thread, the numerical tests, and what a run left out."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Tensors are tiny, barriers between threads are not; and each worker of pytest-xdist would have a pool of its own.
# Processes that tests start, and the compiler, follow the environment.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

_common = {"deadline": None, "max_examples": 100, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", **_common)
settings.register_profile("ci", derandomize=True, print_blob=True, **_common)
settings.register_profile("thorough", **{**_common, "max_examples": 500})
# pytest --hypothesis-profile has the last word.
settings.load_profile("ci" if os.environ.get("CI") else "default")

HERE = Path(__file__).parent

# The tests whose numbers depend on the processor and on whether the compiled kernels run: folders and files. They have
# the marker "numerical", by which .ci/run runs them again, but for those with the marker "traced".
NUMERICAL = (
    "codebook/test_matrix.py",
    "codebook/test_tiles.py",
    "contracts/test_gradient_sums.py",
    "fit",
    "kv",
    "nn/test_weight.py",
    "ops",
    "test_suite.py",
)
_OTHERS = (  # a compiler's, and a GPU's
    "ops/cpu/test_build.py",
    "ops/cpu/test_compiler.py",
    "ops/cuda",
    "ops/test_inductor.py",
)


def _within(name: str, known: tuple[str, ...]) -> bool:
    return any(name == one or name.startswith(f"{one}/") for one in known)


def is_numerical(path: Path) -> bool:
    """Whether the tests of a file are numerical."""
    name = path.relative_to(HERE).as_posix() if path.is_relative_to(HERE) else ""
    return _within(name, NUMERICAL) and not _within(name, _OTHERS)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spares a run of the numerical tests the import of the others."""
    only = config.getoption("markexpr").startswith("numerical and ")
    return True if only and collection_path.match("test_*.py") and not is_numerical(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the numerical tests; and those with the marker "few" as slow ones in a run of these, with all examples.

    Settings are a function's, which several items share: they are made once for each.
    """
    markers, few = config.getoption("markexpr"), dict[Any, int]()
    for item in items:
        if is_numerical(item.path) and not item.get_closest_marker("traced"):
            item.add_marker(pytest.mark.numerical)
        if item.path.is_relative_to(HERE / "distributed"):
            item.add_marker(pytest.mark.processes)
        marker = item.get_closest_marker("few")
        if marker is None:
            continue
        if "slow" in markers and "not slow" not in markers:
            item.add_marker(pytest.mark.slow)
        elif settings.get_current_profile_name() != "thorough":
            few[item.function] = marker.args[0]  # type: ignore[attr-defined]
    for function, count in few.items():
        settings(max_examples=count)(function)


def pytest_collection_finish() -> None:
    """Leaves what the tests import out of the garbage collector's rounds; it stays, and going through it takes long."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else extension modules complain about what they find left at the end


def pytest_report_header() -> str:
    """What the numbers of this run depend on."""
    kernels = "off (RPQFX_KERNELS=0)" if os.environ.get("RPQFX_KERNELS") == "0" else "on where they can be compiled"
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, compiled kernels {kernels}"


# ------------------------------------------------------------------------------------------ what a run left out

# The extra that brings a package, where it is not the package's own name.
_EXTRAS = {"accelerate": "transformers", "peft": "transformers", "onnxruntime": "onnx", "onnxscript": "onnx"}
_MISSING = re.compile(r"could not import '([\w.]+)'")


class LeftOut:
    """Collects what was skipped for want of a package, and how many tests the markers left out.

    Under pytest-xdist the controller hears of neither, so that each worker sends it what it has seen.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.missing, self.deselected = config, {}, 0

    def _note(self, report: Any) -> None:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found = _MISSING.search(text) if report.skipped else None
        if found is not None:
            self.missing[report.nodeid] = found[1].partition(".")[0]

    def pytest_collectreport(self, report: Any) -> None:
        self._note(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._note(report)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        apart = ("slow", "gpu", "processes")
        self.deselected += sum(any(item.get_closest_marker(name) for name in apart) for item in items)

    def pytest_sessionfinish(self) -> None:
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["left_out"] = (self.missing, self.deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        missing, deselected = getattr(node, "workeroutput", {}).get("left_out", ({}, 0))
        self.missing.update(missing)
        self.deselected = max(self.deselected, deselected)  # all workers collect the same

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in left_out(self.missing, self.deselected):
            terminalreporter.write_line(line)


def left_out(missing: dict[str, str], deselected: int) -> Iterator[str]:
    """The lines at the end of a run.

    Args:
        missing: The package that each skipped test, or file of tests, wants.
        deselected: How many tests the markers left out.
    """
    files = sum("::" not in name for name in missing)
    counts = [f"{n} {noun}{'s' * (n != 1)}" for n, noun in ((len(missing) - files, "test"), (files, "test file")) if n]
    if counts:
        packages = sorted(set(missing.values()))
        extras = sorted({_EXTRAS.get(package, package) for package in packages})
        need = "needs" if len(missing) == 1 else "need"
        yield (
            f'{" and ".join(counts)} {need} more than the extra "test" ({", ".join(packages)}): '
            f"pip install -e '.[{','.join(extras)}]'"
        )
    if deselected:
        yield (
            f"{deselected} deselected: pytest -m slow runs the slow tests, -m processes those of several processes, "
            "-m gpu those that need a GPU"
        )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LeftOut(config), "left-out")
