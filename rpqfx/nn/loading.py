"""Checks and completes codes of a weight when they are read, assigned, saved, loaded and unpickled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.codebook.counter_random import SEEDS
from rpqfx.nn.code_bytes import check_range, checked, from_bytes, to_bytes
from rpqfx.nn.shards import is_shard, part_of

_SEED = "code_seed"  # in the metadata of a state dict, which has no key for it: its keys are those of ever


class Loaded(nn.Module):
    """Base of ``RPQWeight``: its buffer ``codes`` holds bytes where codes take two of them, and nobody else sees that.

    ``module.codes``, assigning it, and the state dict have codes ``[R, M, N]`` in the narrowest integer. The buffer
    itself, which ``named_buffers()`` yields and torch.distributed sends, is ``stored_codes``. Where it has tiles, the
    state dict has them, too, and takes either.

    ``hold_codes_as_parameters`` makes the codes Parameters without a gradient, which is what FSDP shares out over
    processes. The state dict then has them as they lie in memory, since the two bytes of a code may be all that a
    collective can send; every model loads them from that, too.
    """

    spec: CodebookSpec

    code_seed: int | None = None
    """The seed that codes were last drawn from, all stages or some; None where none were. They may be others by now:
    ``drawn_stages`` compares. A state dict has it in its ``_metadata``, which torch saves and loads along with it."""

    @property
    def codes(self) -> Tensor:
        """The codes, ``[R, M, N]`` in ``spec.code_dtype``; writing to them writes to the buffer, unless it has tiles.

        May be assigned: integers of any dtype that point into the codebook, also on another device; or tiles, where the
        spec is tiled.

        Raises:
            InputError: When set to what are no integers.
            CodeError: When set to integers of another dtype that point outside the codebook.
        """
        return self._read(self.stored_codes)

    @codes.setter
    def codes(self, codes: Tensor) -> None:
        if codes.dtype == torch.uint8 and self.tiled_vectors(codes):  # as torch assigns them from a state dict
            self._store(codes)
            return
        right = checked(codes, self.spec.entries, self.spec.code_dtype, "codes")
        self._store(to_bytes(right, self.spec.tiled))

    def _store(self, stored: Tensor) -> None:
        if "codes" in self._parameters:
            self._parameters["codes"] = nn.Parameter(stored, requires_grad=False)
        else:
            self._buffers["codes"] = stored

    def hold_codes_as_parameters(self) -> None:
        """Makes codes and signs Parameters that need no gradient, in the place of buffers."""
        for name in ("codes", "signs"):
            stored = self._buffers.pop(name, None)
            if stored is not None:
                self._parameters[name] = nn.Parameter(stored, requires_grad=False)
            elif name not in self._parameters:
                self._buffers[name] = None  # there is none

    def hold_codes_as_buffers(self) -> None:
        """Makes codes and signs buffers again, which nobody has shared out meanwhile."""
        for name in ("codes", "signs"):
            stored = self._parameters.pop(name, None)
            if stored is not None:
                self._buffers[name] = stored.detach()

    @property
    def saved_spec(self) -> CodebookSpec:
        """The spec of what a state dict holds; not ``spec`` where this is a part of a weight."""
        return self.spec

    def tiled_vectors(self, stored: Tensor) -> int:
        """Returns ``N`` where a buffer of codes has tiles, else 0.

        Code that moves tensors between devices (accelerate) may have written ``[R, M, N]`` past the setter.

        Args:
            stored: The buffer.
        """
        tiled = self.spec.tiled and tuple(stored.shape) == self.spec.stored_codes_shape
        return self.spec.num_vectors if tiled else 0

    def _read(self, stored: Tensor) -> Tensor:
        if is_shard(stored):  # bytes, until FSDP has gathered them
            return stored
        return from_bytes(stored, self.spec.code_dtype, self.tiled_vectors(stored))

    @property
    def stored_codes(self) -> Tensor:
        """The buffer that holds the codes (see ``rpqfx.nn.code_bytes``), or the Parameter that does."""
        stored = self._buffers["codes"] if "codes" in self._buffers else self._parameters["codes"]
        assert stored is not None
        return stored

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codes" and isinstance(value, nn.Parameter) and "codes" in self._parameters:  # FSDP changes it
            self._parameters["codes"] = value
        elif name == "codes" and isinstance(value, Tensor):
            object.__setattr__(self, name, value)  # the property, which torch would pass by for a buffer of that name
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.spec.column_scale_group:  # modules that were pickled before there was one lack its place
            self._parameters.setdefault("column_scale", None)
        if "codes" in self._buffers:  # maybe pickled before codes of two bytes were bytes
            self._buffers["codes"] = to_bytes(self.codes, self.spec.tiled)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Tiles stay as they lie, so that who writes to a state dict writes to the model.
        if not self.spec.tiled and "codes" in self._buffers:
            destination[prefix + "codes"] = self._read(destination[prefix + "codes"])
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and self.code_seed is not None:
            metadata.setdefault(prefix[:-1], {})[_SEED] = self.code_seed

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        name = prefix + "codes"
        codes = state_dict.get(name)
        seed = local_metadata.get(_SEED)
        if codes is not None and type(seed) is int and 0 <= seed < SEEDS:
            self.code_seed = seed
        if isinstance(codes, Tensor) and self._as_bytes(codes):
            codes = state_dict[name] = codes.view(self.spec.code_dtype)
        if isinstance(codes, Tensor) and not is_shard(codes):
            check_range(self._read(codes) if self.tiled_vectors(codes) else codes, self.spec.entries, name)
        if self.spec.tiled or "codes" in self._parameters or is_shard(self.stored_codes):
            if isinstance(codes, Tensor) and not is_shard(codes) and codes.shape == self.saved_spec.codes_shape:
                right = checked(codes, self.spec.entries, self.spec.code_dtype, name)
                state_dict[name] = to_bytes(right, self.spec.tiled)
            self._share_out(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        here, stored = self.codes, self.stored_codes
        self._buffers["codes"] = here  # torch compares shapes, copies and assigns
        try:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        finally:
            now = self._buffers["codes"]
            self._buffers["codes"] = stored if now is here else to_bytes(self.codes)

    def _share_out(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Takes this process's part of what is whole in a state dict and shared out here."""
        for name, part in (*self._parameters.items(), *self._buffers.items()):
            given = state_dict.get(prefix + name)
            if part is not None and is_shard(part) and isinstance(given, Tensor) and not is_shard(given):
                state_dict[prefix + name] = part_of(given, part) if given.shape == part.shape else given

    def _as_bytes(self, codes: Tensor) -> bool:
        """Returns whether these are whole codes of two bytes each, as a sharded model's state dict has them."""
        if self.spec.tiled or self.spec.code_dtype.itemsize == 1 or is_shard(codes):
            return False
        *stages, vectors = self.saved_spec.codes_shape
        return codes.dtype == torch.uint8 and tuple(codes.shape) == (*stages, 2 * vectors)
