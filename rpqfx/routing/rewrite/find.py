"""Where a model has blocks that could be routed: feed-forward blocks, and attention of a sequence to itself."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import fx, nn

from rpqfx.graph.attention import AttentionSite, attends_causally, find_attention
from rpqfx.graph.inline import inlined
from rpqfx.graph.leaves import is_own
from rpqfx.graph.module_graphs import Captured
from rpqfx.nn.weight import RPQWeight

# Functions and methods that work on each number by itself, or on those of one token where cut along the last axis.
_POINTWISE = {
    "add", "mul", "sub", "neg", "pow", "square", "sqrt", "truediv", "div", "abs", "exp", "clamp", "clip", "erf",
    "relu", "relu6", "relu_", "leaky_relu", "gelu", "silu", "mish", "elu", "selu", "celu", "hardswish", "hardtanh",
    "hardsigmoid", "softplus", "softsign", "sigmoid", "tanh", "dropout", "to", "float", "half", "bfloat16", "type_as",
    "contiguous",
}  # fmt: skip
_LINEAR_OPS = {"dropout", "to", "float", "half", "bfloat16", "type_as", "contiguous", "getitem"}
_ALONG_THE_LAST = {"glu": 1, "chunk": 2, "split": 2, "tensor_split": 2}
_BLIND = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_TORCH_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_CROSS = ("encoder_attn", "crossattention", "cross_attn", "EncDecAttention", "multihead_attn")


@dataclass(frozen=True)
class Block:
    """A block that could be routed.

    Args:
        name: Qualified name: of the module whose code calls the block's layers, or of the attention module. Where a
            module has several feed-forward blocks, of the last layer.
        kind: ``"feed_forward"`` or ``"attention"``.
        first: Layers that have the block's input, in the order in which they run.
        last: The layer whose output is the block's; or the attention module.
        causal: Whether it is attention to earlier tokens only, as far as its code says so.
        obstacle: Why it cannot be routed, or None.
        time_first: Whether its tokens are ``[n, B, d]``, as far as is known.
    """

    name: str
    kind: str
    first: tuple[nn.Module, ...]
    last: nn.Module
    causal: bool = False
    obstacle: str | None = None
    time_first: bool = False


def find_blocks(captured: Captured) -> list[Block]:
    """The blocks of a model.

    A feed-forward block is a linear layer, or several on the same input as in gated ones, something that is not linear
    and works token by token, and a linear layer on that; nothing else uses what lies between.

    Args:
        captured: The model as it was read.
    """
    return [*_feed_forward(captured), *(_attention(captured, site) for site in find_attention(captured))]


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer over the last axis; that of transformers' GPT-2 is one too."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# ------------------------------------------------------------------------------------------------ feed-forward blocks


_Found = tuple[tuple[nn.Module, ...], nn.Module]


def _feed_forward(captured: Captured) -> list[Block]:
    names = {module: name for name, module in captured.model.named_modules()}
    calls = _calls(captured)
    blocks: dict[nn.Module, Block] = {}
    taken: set[nn.Module] = set()
    for module, name in sorted(names.items(), key=lambda item: -item[1].count(".") if item[1] else 1):  # inner first
        if sum(is_linear(each) and each not in taken for each in module.modules()) < 2:
            continue
        found = []
        for first, last in (*_of_torch(module), *_of_graphs(captured, name)):
            layers = {*first, last}
            if not taken & layers and all(calls[layer] == 1 for layer in layers):
                taken |= layers
                found.append((first, last))
        for first, last in found:
            turned = isinstance(module, _TORCH_BLOCKS) and not module.self_attn.batch_first
            own = name if len(found) == 1 else names[last]
            blocks[last] = Block(own, "feed_forward", first, last, time_first=turned)
    return [blocks[module] for module in names if module in blocks]


def _calls(captured: Captured) -> Counter[nn.Module]:
    """How many calls of a module there are in the code of others; one where that could not be read."""
    found: Counter[nn.Module] = Counter()
    for name, held in captured.graphs.items():
        for graph in held.graphs[:1]:
            for node in graph.nodes:
                if node.op == "call_module":
                    found[captured.model.get_submodule(f"{name}.{node.target}".lstrip("."))] += 1
    for module in captured.model.modules():
        found[module] = max(found[module], 1)
    return found


def _of_torch(module: nn.Module) -> Iterator[_Found]:
    if isinstance(module, _TORCH_BLOCKS):
        yield (module.linear1,), module.linear2


def _of_graphs(captured: Captured, name: str) -> list[_Found]:
    """Of the first graph that shows any."""
    for graph in inlined(captured, name):
        found = [block for node in graph.nodes if (block := _ends_at(captured.model, node)) is not None]
        if found:
            return found
    return []


def _ends_at(model: nn.Module, node: fx.Node) -> _Found | None:
    """The block whose last layer a node calls."""

    def module(call: fx.Node) -> nn.Module | None:
        return model.get_submodule(str(call.target)) if call.op == "call_module" else None

    def linear(call: fx.Node) -> bool:
        called = module(call)
        return called is not None and is_linear(called)

    def idle(call: fx.Node) -> bool:
        return isinstance(module(call), _BLIND) if call.op == "call_module" else _word(call) in _LINEAR_OPS

    def blind(call: fx.Node) -> bool:
        called = module(call)
        return _pointwise(call) if called is None else _pointwise_module(called)

    if not linear(node):
        return None
    inside = _between(node, linear, blind)
    heads = [each for each in node.graph.nodes if each in inside and linear(each)]
    if len({each.args[:1] for each in heads}) != 1 or all(idle(each) for each in inside if each not in heads):
        return None
    if any(user is not node and user not in inside for each in inside for user in each.users):
        return None
    first, last = tuple(module(each) for each in heads), module(node)
    return first, last  # type: ignore[return-value]


def _between(node: fx.Node, linear: Callable[[fx.Node], bool], blind: Callable[[fx.Node], bool]) -> dict[fx.Node, None]:
    """What a linear layer's input is made of, back to linear layers; nothing where there is something else."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        each = waiting.pop()
        if each in found:
            continue
        found[each] = None
        if linear(each):
            continue
        if not blind(each) or not each.all_input_nodes:
            return {}
        waiting += each.all_input_nodes
    return found


def _pointwise(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = _word(node)
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _word(source) in _ALONG_THE_LAST and isinstance(node.args[1], int)
    if name in _ALONG_THE_LAST:
        at = _ALONG_THE_LAST[name]
        axis = node.kwargs.get("dim", node.args[at] if len(node.args) > at else None)
        return bool(axis == -1) or (name == "glu" and axis is None)
    return name in _POINTWISE


def _word(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "").lstrip("_")


def _pointwise_module(module: nn.Module) -> bool:
    if isinstance(module, (*_BLIND, *_NORMS)):
        return True
    if next(module.parameters(), None) is not None or isinstance(module, nn.Softmax):
        return False
    return type(module).__module__ in ("torch.nn.modules.activation", "transformers.activations")


# --------------------------------------------------------------------------------------------------------- attention


def _attention(captured: Captured, site: AttentionSite) -> Block:
    causal = attends_causally(captured, site)
    return Block(site.name, "attention", (), site.module, causal, _obstacle(site))


def _obstacle(site: AttentionSite) -> str | None:
    if site.name.rpartition(".")[2] in _CROSS:
        return "it attends to other tokens than its own"
    allowed = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "weight", "bias_k", "bias_v")
    if any(isinstance(child, nn.Embedding) for child in site.module.modules()):
        return "it holds an embedding, perhaps of positions, which are others among chosen tokens"
    ours = {each for child in site.module.modules() if is_own(child) for each in child.modules()}
    for child in site.module.modules():
        for name, parameter in () if isinstance(child, RPQWeight) or child in ours else child._parameters.items():
            if parameter is not None and parameter.dim() > 1 and name not in allowed:
                return f"its Parameter {name!r} may be of positions, which are others among chosen tokens"
    return None
