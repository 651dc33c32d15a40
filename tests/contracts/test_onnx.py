"""torch.onnx.export takes rewritten models, and onnxruntime computes what they do."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from rpqfx.nn import RPQLinear
from rpqfx.reporting.report import dense_bytes
from tests.deployed import DEPLOYED, EVERY, SHALLOW, assert_close, run_as

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def exported(model: nn.Module, args: tuple[Any, ...], shapes: Any, **options: Any) -> Any:
    return torch.onnx.export(model, args, dynamic_shapes=shapes, dynamo=True, verbose=False, **options)


def session(program: Any, path: Path) -> Any:
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, args: Any) -> list[torch.Tensor]:
    names = [one.name for one in session.get_inputs()]
    values = {name: x.numpy() for name, x in zip(names, tree_leaves(args), strict=True)}
    return [torch.from_numpy(x) for x in session.run(None, values)]


@pytest.mark.parametrize(
    ("name", "plan", "optimize"),
    [
        *((name, "auto", False) for name in SHALLOW),
        *(pytest.param(name, "auto", False, marks=pytest.mark.slow) for name in DEPLOYED),
        pytest.param("vit", "lookup", True, marks=pytest.mark.slow),
        pytest.param("lm", "lookup", False, marks=pytest.mark.slow),
        pytest.param("lm", "dequantize", True, marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_serves_every_size(
    name: str, plan: str, optimize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_as(plan, monkeypatch)
    case = EVERY[name]
    model = case.model()
    program = exported(model, case.inputs(**case.sizes), case.dynamic(), optimize=optimize)
    ready = session(program, tmp_path / "model.onnx")
    with torch.no_grad():
        for sizes in (case.sizes, *case.others):
            assert_close(run(ready, case.inputs(**sizes)), list(tree_leaves(model(*case.inputs(**sizes)))))
    if not optimize:  # then no weight is expanded while exporting
        held = {key: value.const_value.nbytes for key, value in program.model.graph.initializers.items()}
        assert sum(held.values()) <= dense_bytes(model)
        assert all(size <= 512 for key, size in held.items() if key not in model.state_dict())


@pytest.mark.parametrize("split", ["row", "column"])
def test_the_table_is_made_of_a_few_plain_operators(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No loop over the outputs of a layer, and nothing that grows with them or with the batch but its own tensors."""
    run_as("lookup", monkeypatch)
    layer = RPQLinear(64, 64, num_subvectors=4, codebook_bits=3, stages=2, signs=True, scale=True, split=split).eval()
    program = exported(layer, (torch.randn(3, 64),), ({0: Dim("batch", min=1)},))
    kinds = collections.Counter(node.op_type for node in program.model.graph)
    assert not {"Loop", "If", "Scan"} & kinds.keys()
    assert kinds["Gather" if split == "row" else "ScatterND"] == 8
    ready = session(program, tmp_path / "layer.onnx")
    for batch in (1, 3, 70):
        x = torch.randn(batch, 64)
        with torch.no_grad():
            assert_close(run(ready, x), [layer(x)])


@pytest.mark.parametrize("plan", ["lookup", "dequantize"])
def test_codes_of_two_bytes_are_put_together_by_plain_operators(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_as(plan, monkeypatch)
    layer = RPQLinear(8, 1024, num_subvectors=2, codebook_bits=9).eval()
    program = exported(layer, (torch.randn(3, 8),), ({0: Dim("batch", min=1)},), optimize=False)
    held = {key: value.const_value.nbytes for key, value in program.model.graph.initializers.items()}
    assert held["weight_rpq.codes"] == 2 * 2 * 1024
    ready = session(program, tmp_path / "layer.onnx")
    for batch in (1, 3, 70):
        x = torch.randn(batch, 8)
        with torch.no_grad():
            assert_close(run(ready, (x,)), [layer(x)])
