"""A rewritten ViT, ResNet-20 and decoder LM compile and export as whole models, for every size that comes."""

from __future__ import annotations

import copy
import functools
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.export import ExportedProgram, export
from torch.utils._pytree import tree_leaves

from rpqfx.nn import RPQLinear
from rpqfx.reporting.report import dense_bytes
from tests.deployed import DEPLOYED, EVERY, SHALLOW, DecoderLM, assert_close, mark_dynamic, run_as
from tests.fresh import run_without_rpqfx
from tests.helpers import gradients

NAMES = list(DEPLOYED)
BATCHES = (2, 3, 5, 8, 17)
PLANS = [
    ("vit", "auto"),
    ("resnet", "auto"),
    pytest.param("resnet20", "auto", marks=pytest.mark.slow),
    pytest.param("lm", "auto", marks=pytest.mark.slow),  # its layers are those of the first
    pytest.param("vit", "dequantize", marks=pytest.mark.slow),
    pytest.param("vit", "lookup", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counting(counts: Counter[str]) -> Callable[..., Any]:
    """A backend that runs the graphs of AOTAutograd as they are, and counts them by what they are for."""

    def compiler(kind: str) -> Callable[..., Any]:
        def compile(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            counts[kind] += 1
            return make_boxed_func(graph.forward)

        return compile

    return aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), inference_compiler=compiler("inference")
    )


def arguments(name: str, batch: int) -> tuple[Any, ...]:
    """Of every size with another batch, marked as varying."""
    case = EVERY[name]
    more = {size: 1 + batch * place for place, size in enumerate(case.sizes, 1)}
    return mark_dynamic(case.inputs(**{**more, "batch": batch}), case.axes)


def parameter_gradients(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    return gradients(tuple(tree_leaves(outputs)), dict(model.named_parameters()))


def assert_same_gradients(model: nn.Module, outputs: Any, twin: nn.Module, wanted: Any) -> None:
    expected = parameter_gradients(twin, wanted)
    for key, grad in parameter_gradients(model, outputs).items():
        assert_close(grad, expected[key], 1e-3)


# -------------------------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_one_graph_forward_and_one_backward_train_every_batch(name: str, plan: str, monkeypatch: pytest.MonkeyPatch):
    run_as(plan, monkeypatch)
    counts: Counter[str] = Counter()
    model = EVERY[name].model().train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=counting(counts))
    for batch in BATCHES:
        args = arguments(name, batch)
        outputs, wanted = compiled(*args), twin(*args)
        assert_close(outputs, wanted)
        assert_same_gradients(model, outputs, twin, wanted)
        assert_close(list(model.buffers()), list(twin.buffers()))  # running statistics
    assert counts == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("name", ["vit", pytest.param("resnet20", marks=pytest.mark.slow)])
def test_one_graph_infers_every_batch(name: str):
    counts: Counter[str] = Counter()
    model = DEPLOYED[name].model()
    compiled = torch.compile(model, fullgraph=True, backend=counting(counts))
    with torch.no_grad():
        for batch in BATCHES:
            args = arguments(name, batch)
            assert_close(compiled(*args), model(*args))
    assert counts == {"inference": 1}


def test_a_graph_for_each_batch_is_noticed():
    """Otherwise the counts above could not fail."""
    counts: Counter[str] = Counter()
    compiled = torch.compile(
        RPQLinear(64, 64, codebook_dim=8, codebook_bits=2), backend=counting(counts), dynamic=False
    )
    for batch in BATCHES[:3]:
        compiled(torch.zeros(batch, 64)).sum().backward()
    assert counts == {"forward": 3, "backward": 3}


def generate(model: Callable[..., Any], ids: Tensor, cache: Any, steps: int) -> tuple[Tensor, Any]:
    """Greedy tokens after a prompt, which is read in one call, and the cache; each further call reads one token."""
    axes = SHALLOW["small lm"].axes[0], [SHALLOW["small lm"].axes[1][0]] * len(cache)
    now = ids
    for _ in range(steps):
        logits, cache = model(*mark_dynamic((now, cache), axes))
        now = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, now], 1)
    return ids, cache


@pytest.mark.parametrize("name", ["small lm", pytest.param("lm", marks=pytest.mark.slow)])
def test_a_decoder_generates_with_one_graph_for_prompts_and_one_for_steps(name: str):
    """Whatever the batch, the prompt's length and the cache's; tokens and cache are those of eager mode."""
    counts: Counter[str] = Counter()
    model = EVERY[name].model()
    assert isinstance(model, DecoderLM)
    compiled = torch.compile(model, fullgraph=True, backend=counting(counts))
    with torch.no_grad():
        for batch, length in zip(BATCHES[:3], (5, 9, 4), strict=True):
            ids, _ = EVERY[name].inputs(batch, length, 0)
            found, cache = generate(compiled, ids, model.empty_cache(batch), 4)
            wanted, kept = generate(model, ids, model.empty_cache(batch), 4)
            assert torch.equal(found, wanted) and cache[0][0].shape[2] == length + 3
            assert_close(cache, kept)
            whole, _ = model(found[:, :-1], model.empty_cache(batch))  # without a cache
            assert torch.equal(found[:, length:], whole[:, length - 1 :].argmax(-1))
    assert counts == {"inference": 2}


# -------------------------------------------------------------------------------------------------------- exporting


def exported(name: str) -> ExportedProgram:
    case = DEPLOYED[name]
    return export(case.model(), case.inputs(**case.sizes), dynamic_shapes=case.dynamic())


@pytest.fixture(scope="module")
def programs() -> Callable[[str], ExportedProgram]:
    """``exported``, once for each model that a test asks for."""
    return functools.cache(exported)


def saved(program: ExportedProgram, folder: Path, name: str) -> Path:
    torch.export.save(program, folder / f"{name}.pt2")
    return folder / f"{name}.pt2"


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_serves_every_size(name: str, programs: Callable[[str], ExportedProgram]):
    case, model, program = DEPLOYED[name], DEPLOYED[name].model(), programs(name).module()
    with torch.no_grad():
        for sizes in (case.sizes, *case.others):
            assert_close(program(*case.inputs(**sizes)), model(*case.inputs(**sizes)))


@pytest.mark.parametrize("plan", [pytest.param("dequantize", marks=pytest.mark.slow), "lookup"])
def test_an_exported_model_serves_every_size_either_way(plan: str, monkeypatch: pytest.MonkeyPatch):
    run_as(plan, monkeypatch)
    case, model, program = DEPLOYED["vit"], DEPLOYED["vit"].model(), exported("vit")
    bags = any("embedding_bag" in str(node.target) for node in program.graph.nodes)
    assert bags == (plan == "lookup")
    with torch.no_grad():
        for sizes in case.others:
            assert_close(program.module()(*case.inputs(**sizes)), model(*case.inputs(**sizes)))


@pytest.mark.parametrize("name", ["vit", "lm"])
def test_the_models_meet_both_ways_to_run_a_product(name: str, programs: Callable[[str], ExportedProgram]):
    targets = Counter(str(node.target) for node in programs(name).graph.nodes)
    assert targets["aten.embedding_bag.padding_idx"] >= 4
    expanded = [key for key in programs(name).state_dict if key.endswith("codebooks")]
    assert targets["aten.embedding_bag.padding_idx"] <= len(expanded) - 3  # one for each of the others


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_model_holds_what_the_rewritten_one_does(name: str, programs: Callable[[str], ExportedProgram]):
    """Codebooks, codes and what was left dense; and constants of a few elements."""
    model, program = DEPLOYED[name].model(), programs(name)
    state = {key: tensor.shape for key, tensor in program.state_dict.items()}
    assert state == {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert all(x.numel() <= 64 for key, x in program.constants.items() if key not in state)
    assert "rpqfx" not in "".join(str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_program_is_of_the_rewritten_models_size(
    name: str, programs: Callable[[str], ExportedProgram], tmp_path: Path
):
    """Its graph and its example inputs apart; a tensor of few elements takes more than those."""
    case = DEPLOYED[name]
    with zipfile.ZipFile(saved(programs(name), tmp_path, name)) as file:
        entries = {entry.filename.partition("/")[2]: entry.file_size for entry in file.infolist()}
    held = sum(size for entry, size in entries.items() if entry.startswith(("data/weights/", "data/constants/")))
    small = dense_bytes(case.model())
    assert small <= held <= small + 512 * len(case.model().state_dict()) < 0.35 * dense_bytes(case.dense())


@pytest.mark.slow
def test_saved_programs_run_where_this_library_is_not(programs: Callable[[str], ExportedProgram], tmp_path: Path):
    calls = {
        str(saved(programs(name), tmp_path, name)): [case.inputs(**sizes) for sizes in (case.sizes, *case.others)]
        for name, case in DEPLOYED.items()
    }
    results = run_without_rpqfx("export", calls, tmp_path)
    with torch.no_grad():
        for name, args, (_, outputs) in zip(DEPLOYED, calls.values(), results, strict=True):
            model = DEPLOYED[name].model()
            assert_close(outputs, [model(*arg) for arg in args])
