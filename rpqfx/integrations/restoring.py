"""A quantized model as ``from_pretrained`` of transformers makes it of a folder.

The model is made on the meta device, dense. The manifest says what becomes of it: it is rewritten there, so no dense
weight is ever allocated. Where nobody asks for devices or another dtype, all tensors are then read at once, and hidden
from transformers, which would look at each of them for longer than that takes. Else transformers reads them.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

try:
    from transformers.core_model_loading import ConversionOps, WeightConverter
except ImportError as error:
    raise ImportError("this needs transformers 5, the extra: pip install 'rpqfx[transformers]'") from error

from rpqfx.errors import FormatError, RPQError
from rpqfx.graph.pretrained_calls import EXTRA, first_matrix, renew_calls
from rpqfx.integrations.folder import Folder
from rpqfx.integrations.hidden import Hidden
from rpqfx.integrations.model_tensors import put_beside, tensor_at
from rpqfx.integrations.placing import placed
from rpqfx.kv.wrap import CORE
from rpqfx.nn.code_bytes import to_bytes
from rpqfx.nn.hosting.backed import SUFFIX, backed_weights
from rpqfx.nn.hosting.reparametrised import refresh
from rpqfx.nn.offloaded import offloaded
from rpqfx.nn.weight import RPQWeight
from rpqfx.routing.rewrite.policy import RoutePolicy
from rpqfx.routing.rewrite.rewrite import route
from rpqfx.storage.pickle_reader import DTYPES
from rpqfx.storage.restore import codes_of, put_back, redrawn, unpacked

_MAKER = "from_pretrained"
# What torch aligns memory to. Tensors of safetensors lie anywhere, and products of such ones are summed up otherwise.
_ALIGNED = 64
_NUMBER, _DIGITS = re.compile(r"\d+"), r"\\d+"
_IGNORED = "_keys_to_ignore_on_load_unexpected"


class _Patterns(set[str]):
    """Patterns as transformers joins them with its own: as sets, or as lists in older versions."""

    def __add__(self, more: list[str]) -> list[str]:
        return [*self, *more]


class _Converter(WeightConverter):
    """Has tensors of one pattern come here; each tensor gets a copy of its own, which transformers makes deep."""

    def __deepcopy__(self, memo: Any) -> _Converter:
        made = copy.copy(self)
        made.collected_tensors, made.layer_targets = defaultdict(list), defaultdict(set)
        return made


class Restoring(ConversionOps):
    """Restores one model while its folder is opened.

    Args:
        model: On the meta device, dense; is rewritten.
        files: Of the folder.
        routing: Policies of ``route``, as JSON, by the names of modules.
        dtype: What the model is to be of.
        device_map: Where tensors go, as ``from_pretrained`` was given it.

    Raises:
        FormatError: If the folder is damaged, incomplete, or of another model.
    """

    def __init__(
        self, model: nn.Module, files: Sequence[str] | None, routing: Mapping[str, str], dtype: torch.dtype,
        device_map: Any = None,
    ) -> None:  # fmt: skip
        self._folder = Folder(files)
        _route(model, routing, self._folder.path)
        whole = _class_name(model) in (getattr(model.config, "architectures", None) or [])
        self._manifest, self._stored_as = placed(self._folder.manifest, model, whole, self._folder.path)
        self._entries = {entry["names"][0]: entry for entry in self._manifest["tensors"]}
        self._codes = codes_of(self._manifest)
        main = _main_dtype(self._folder.manifest)
        self._cast = main not in (None, dtype)
        self._first = None if self._manifest["sites"] else first_matrix(model)  # which is stored flat
        self._dtypes = {name: _dtype_of(entry, main, dtype) for name, entry in self._entries.items()}
        at_once = device_map is None and not self._cast
        with torch._C.DisableTorchFunction():  # of torch.device("meta"), which looks at each call of torch
            tensors = self._tensors() if at_once else self._placeholders()
            put_back(model, self._manifest, tensors, self._folder.path, maker=_MAKER, partial=not whole)
            state = model.state_dict(keep_vars=True)
        self._beside = sorted(set(self._entries) - set(state))
        extra = {name for name in state if name.endswith(_EXTRA_STATE_KEY_SUFFIX)}
        self._hidden = Hidden(model, state, {*self._entries, *extra}) if at_once else None
        self._again = {name for entry in self._entries.values() for name in entry["names"][1:]}
        self._again -= dict(model.named_parameters(remove_duplicate=False)).keys()
        self._again |= extra
        self._errors: list[RPQError] = []
        self._seeds: dict[str, int] = {}
        self._prepare(model)

    def __deepcopy__(self, memo: Any) -> Restoring:
        """Each tensor has a converter of its own, and all of them this."""
        return self

    def _prepare(self, model: nn.Module) -> None:
        """Has transformers tie what is tied, draw nothing anew, and not wonder at what it does not know."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        ties = {
            other: entry["names"][0]
            for entry in self._entries.values()
            for other in entry["names"][1:]
            if entry["kind"] == "parameter"
        }
        self._known_ties = getattr(model, "all_tied_weights_keys", None) or {}
        hidden = () if self._hidden is None else self._hidden.names
        model.__dict__["all_tied_weights_keys"] = {
            target: source
            for target, source in {**self._known_ties, **ties}.items()
            if target in parameters and target not in hidden
        }
        for module in model.modules():
            if backed_weights(module) or isinstance(module, RPQWeight):
                module._is_hf_initialized = True  # type: ignore[assignment]
        guards = (name for site in self._folder.manifest["sites"] for name in site["names"])
        unread = self._beside if self._hidden is None else self._entries
        unknown = [*guards, *(self._stored_as[name] for name in unread)]
        before = getattr(model, _IGNORED, None) or ()
        # One pattern for the same layer of all blocks: transformers tries each on every name.
        patterns = {f"^{_NUMBER.sub(_DIGITS, re.escape(name))}$" for name in unknown} | {f"\\.{EXTRA}$"}
        model.__dict__[_IGNORED] = _Patterns({*before, *patterns})

    def _placeholders(self) -> dict[str, Tensor]:
        """Makes tensors on the meta device, for transformers to read."""
        self._folder.verify()
        return {
            name: torch.empty(entry["shape"], dtype=self._dtypes[name], device="meta")
            for name, entry in self._entries.items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        stored = self._folder.verified()
        return {name: self._unpacked(name, stored.pop(self._stored_as[name])) for name in self._entries}

    def _unpacked(self, name: str, stored: Tensor) -> Tensor:
        try:
            return unpacked(self._entries[name], stored, *self._codes.get(name, ()))
        except FormatError as error:
            raise FormatError(f"{self._folder.path} {error}") from error

    # -------------------------------------------------------------------------------- while tensors are read

    def conversions(self) -> list[Any]:
        """Returns the converters by which tensors come here."""
        pairs = [(f"{SUFFIX}\\.codes", f"{SUFFIX}.codes"), (f"\\.{CORE}\\.", f".{CORE}.")]
        if self._first is not None:
            pairs.append((f"^{re.escape(self._stored_as[self._first[0]])}$", self._stored_as[self._first[0]]))
        return [
            _Converter(source_patterns=[source], target_patterns=[target], operations=[self])
            for source, target in pairs
        ]

    def takes(self, name: str) -> bool:
        """Returns whether a tensor comes to its place in another shape than the one that is there.

        Args:
            name: Of the tensor.
        """
        return name in self._codes

    def element_size(self, name: str) -> float | None:
        """Returns None: tensors on the meta device are what they will be.

        Args:
            name: Of a tensor.
        """
        return None

    def dtype_of(self, converter: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Returns the dtype that a tensor is read in.

        Args:
            converter: Says where it goes.
            dtype: What transformers would give it.
        """
        if isinstance(converter, WeightConverter):
            return None  # comes here
        return dtype if self._cast else self._dtypes.get(converter.target_patterns[0], dtype)

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Makes a tensor of what a file holds; an error is kept for ``finish``.

        Args:
            input_dict: The tensor, by the pattern that its name matched.
            full_layer_name: Where it goes.
            missing_keys: What transformers has not found yet. Further names of buffers, and what the manifest has said,
                are taken out.
            **kwargs: What others need.
        """
        (held,) = input_dict.values()
        stored = held[0] if isinstance(held, list) else held
        entry = self._entries[full_layer_name]
        if missing_keys is not None:
            missing_keys -= self._again
        if full_layer_name not in self._codes:
            return {full_layer_name: stored.view(entry["shape"]).to(self._dtypes[full_layer_name])}
        try:
            return {full_layer_name: self._codes_of(full_layer_name, stored.to(torch.uint8))}
        except FormatError as error:  # transformers would say that something went wrong, and not what
            self._errors.append(error)
            return {full_layer_name: torch.zeros(entry["shape"], dtype=self._dtypes[full_layer_name])}

    def _codes_of(self, name: str, stored: Tensor) -> Tensor:
        entry, (entries, tiled) = self._entries[name], self._codes[name]
        held = unpacked(entry, stored, entries, tiled)
        if "drawn" not in entry:
            return held
        codes, self._seeds[name] = redrawn(entry, held)
        return to_bytes(codes, tiled=True) if tiled else codes

    # -------------------------------------------------------------------------------- when all have been read

    def finish(self, model: nn.Module) -> None:
        """Sees that every tensor has come, and gives the model those that transformers does not read.

        Args:
            model: The model.

        Raises:
            FormatError: If one has not, or cannot be what the manifest says.
        """
        model.__dict__.pop(_IGNORED, None)
        if self._hidden is not None:
            self._hidden.show()
        if self._errors:
            raise FormatError(f"{self._folder.path} {self._errors[0]}") from self._errors[0]
        for name, seed in self._seeds.items():
            weight = model.get_submodule(name.rpartition(".")[0])
            assert isinstance(weight, RPQWeight)
            weight.code_seed = seed
        stored = self._folder.read([self._stored_as[name] for name in self._beside])
        beside = {name: self._unpacked(name, stored[self._stored_as[name]]) for name in self._beside}
        self._folder.close()
        away, modules = set(offloaded(model)), dict(model.named_modules(remove_duplicate=False))
        for name, entry in self._entries.items():
            if name in beside:
                put_beside(modules, entry, beside[name])
                continue
            tensor = tensor_at(modules, name)
            if tensor is None or (tensor.is_meta and name not in away):
                raise FormatError(f"{self._folder.path}: {name} has not been loaded; the folder is not whole")
            if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNED:
                tensor.data = tensor.data.clone(memory_format=torch.preserve_format)
            if entry["kind"] == "parameter":
                tensor.requires_grad_(entry["requires_grad"])
        if not away:
            for module in model.modules():
                refresh(module)
        model.__dict__.update(_weight_conversions=[], all_tied_weights_keys=self._known_ties)
        renew_calls(model)


def _route(model: nn.Module, routing: Mapping[str, str], path: str) -> None:
    for name, policy in routing.items():
        try:
            route(model.get_submodule(name), RoutePolicy.from_json(policy), inplace=True)
        except (RPQError, AttributeError) as error:
            raise FormatError(
                f"{path} holds a routed model, and this one cannot be routed as it was: {error}"
            ) from error


def _class_name(model: nn.Module) -> str:
    """The name of a model's class, as ``config.json`` has it."""
    return getattr(type(model), "_rpq_base", type(model)).__name__


def _main_dtype(manifest: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that transformers would say a model is of: that of its first floating Parameter."""
    dtypes = [DTYPES[entry["dtype"]] for entry in manifest["tensors"] if entry["kind"] == "parameter"]
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _dtype_of(entry: Mapping[str, Any], main: torch.dtype | None, wanted: torch.dtype) -> torch.dtype:
    dtype = DTYPES[entry["dtype"]]
    return wanted if dtype is main and entry["kind"] == "parameter" else dtype
