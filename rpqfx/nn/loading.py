"""What a codebook-held tensor checks and completes when its codes are read, assigned, saved, loaded and unpickled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.nn.code_bytes import check_range, checked, from_bytes, to_bytes


class Loaded(nn.Module):
    """Base of ``RPQWeight``: its buffer ``codes`` holds bytes where codes take two of them, and nobody else sees that.

    ``module.codes``, assigning it, and the state dict have codes ``[R, M, N]`` in the narrowest integer. The buffer
    itself, which ``named_buffers()`` yields and torch.distributed sends, is ``stored_codes``. Where it has tiles, the
    state dict has them, too, and takes either.
    """

    spec: CodebookSpec

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
            self._buffers["codes"] = codes
            return
        right = checked(codes, self.spec.entries, self.spec.code_dtype, "codes")
        self._buffers["codes"] = to_bytes(right, self.spec.tiled)

    def tiled_vectors(self, stored: Tensor) -> int:
        """Returns ``N`` where a buffer of codes has tiles, else 0.

        Code that moves tensors between devices (accelerate) may have written ``[R, M, N]`` past the setter.

        Args:
            stored: The buffer.
        """
        tiled = self.spec.tiled and tuple(stored.shape) == self.spec.stored_codes_shape
        return self.spec.num_vectors if tiled else 0

    def _read(self, stored: Tensor) -> Tensor:
        return from_bytes(stored, self.spec.code_dtype, self.tiled_vectors(stored))

    @property
    def stored_codes(self) -> Tensor:
        """The buffer that holds the codes (see ``rpqfx.nn.code_bytes``)."""
        stored = self._buffers["codes"]
        assert stored is not None
        return stored

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codes" and isinstance(value, Tensor):
            object.__setattr__(self, name, value)  # the property, which torch would pass by for a buffer of that name
        else:
            super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.spec.dim_scale:  # modules that were pickled before there was one lack its place
            self._parameters.setdefault("dim_scale", None)
        self._buffers["codes"] = to_bytes(self.codes, self.spec.tiled)  # pickled before codes of two bytes were bytes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.spec.tiled:  # tiles stay as they lie, so that who writes to a state dict writes to the model
            destination[prefix + "codes"] = self._read(destination[prefix + "codes"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name, stored = prefix + "codes", self.stored_codes
        codes = state_dict.get(name)
        if isinstance(codes, Tensor):
            check_range(self._read(codes) if self.tiled_vectors(codes) else codes, self.spec.entries, name)
        if self.spec.tiled:
            if isinstance(codes, Tensor) and codes.shape == self.spec.codes_shape:
                state_dict[name] = to_bytes(checked(codes, self.spec.entries, self.spec.code_dtype, name), True)
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        here = self.codes
        self._buffers["codes"] = here  # torch compares shapes, copies and assigns
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            now = self._buffers["codes"]
            self._buffers["codes"] = stored if now is here else to_bytes(self.codes)
