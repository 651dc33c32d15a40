"""Compiling on first use: the cache, the check, and a stated reason wherever the kernels are not used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rpqfx import nn
from rpqfx.errors import RPQError
from rpqfx.ops import check
from rpqfx.ops.cpu import build, kernels

needs_kernels = pytest.mark.skipif(not build.ready(), reason="no compiled kernels on this machine")
TRY = (
    "import logging; logging.basicConfig(level=logging.INFO)\n"
    "import torch\n"
    "from rpqfx.nn import RPQLinear\n"
    "from rpqfx.ops.cpu import build\n"
    "layer = RPQLinear(32, 64, codebook_dim=16, bits=4)\n"
    "for _ in range(3): y = layer(torch.ones(2, 32))\n"
    "assert torch.allclose(y, torch.nn.functional.linear(torch.ones(2, 32), layer.weight, layer.bias), atol=1e-5)\n"
    "print('ready', build.ready())\n"
)


def attempt(**environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process that runs a layer, with all that it logs."""
    inherited = {name: value for name, value in os.environ.items() if name != build.SWITCH}
    return subprocess.run(
        [sys.executable, "-c", TRY], env={**inherited, **environment}, capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"RPQFX_KERNELS": "0"}, "RPQFX_KERNELS=0"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler could be run"),
        ({"CXX": "false"}, "false failed"),
    ],
)
def test_without_kernels_plain_operators_run_and_the_log_says_why_once(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    done = attempt(RPQFX_CACHE=str(tmp_path), **environment)
    assert done.stdout.split() == ["ready", "False"]
    lines = [line for line in done.stderr.splitlines() if "not used" in line]
    assert len(lines) == 1 and reason in lines[0] and lines[0].startswith("INFO:rpqfx")


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = attempt(RPQFX_CACHE=str(blocked))
    assert done.stdout.split() == ["ready", "False"] and "not used" in done.stderr


@needs_kernels
def test_a_compiled_library_is_found_again_without_a_compiler() -> None:
    """The second process neither compiles nor checks."""
    done = attempt(PATH="/nowhere")
    assert done.stdout.split() == ["ready", "True"]
    assert "compil" not in done.stderr


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_fewer_vector_instructions_will_do(capability: str, tmp_path: Path) -> None:
    """What torch takes for older machines (it obeys this variable) compiles, and passes the same check."""
    done = attempt(RPQFX_CACHE=str(tmp_path), ATEN_CPU_CAPABILITY=capability)
    assert done.stdout.split() == ["ready", "True"]
    assert len(list(tmp_path.glob("*.checked"))) == 1


@needs_kernels
def test_kernels_that_are_wrong_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A result that is off by a little more than rounding fails the check, which is made before the first use."""
    library = tmp_path / build._compiled().name
    monkeypatch.setattr(build, "_compiled", lambda: library)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    right = kernels.contract_grads
    monkeypatch.setattr(kernels, "contract_grads", lambda *args: (right(*args)[0], right(*args)[1] * 1.001))
    with caplog.at_level(logging.INFO, "rpqfx"):
        assert not build.ready.__wrapped__()
    assert "accumulate is wrong" in caplog.text
    assert not list(tmp_path.iterdir())  # and it is checked again next time
    monkeypatch.setattr(kernels, "contract_grads", right)
    assert build.ready.__wrapped__()
    assert [path.suffix for path in tmp_path.iterdir()] == [".checked"]


@needs_kernels
@pytest.mark.parametrize(
    "place",
    [torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta")],
    ids=lambda place: type(place).__name__,
)
def test_the_check_passes_wherever_the_first_use_is(place: Any) -> None:
    with place:
        check.against_reference(kernels, torch.device("cpu"))


@needs_kernels
@pytest.mark.parametrize(
    "name",
    [
        "contract",
        "contract_grads",
        "expand",
        "lookup",
        "collect",
        "gather_sum",
        "bin_sum",
        "nearest",
        "beam_search",
        "slot_tables",
        "slot_sums",
        "pick_sum",
        "bin_masses",
        "rotated_scores",
    ],
)
def test_the_check_looks_at_every_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, name)

    def wrong(*args: object) -> object:
        result = right(*args)
        if result is None:  # it is in the last argument
            return args[-1].mul_(1.2)  # type: ignore[attr-defined]
        return tuple(x * 1.2 for x in result) if isinstance(result, tuple) else result * 1.2

    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(RPQError, match="wrong"):
        check.against_reference(kernels, torch.device("cpu"))


@needs_kernels
def test_layers_run_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, both plans."""
    called = set()
    for name in ("contract", "contract_grads", "expand", "collect"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, run=run, **k: called.add(n) or run(*a, **k))
    layer = nn.RPQLinear(64, 512, codebook_dim=32, bits=4)
    x = torch.ones(8, 64, requires_grad=True)
    layer(x).sum().backward()
    assert called == {"contract", "contract_grads"}
    layer.weight.sum().backward()
    assert called == {"contract", "contract_grads", "expand", "collect"}
