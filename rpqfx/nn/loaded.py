"""What a codebook-held tensor checks and completes when its codes are read, assigned, saved, loaded and unpickled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rpqfx.codebook import CodebookSpec
from rpqfx.nn.codebytes import check_range, checked, from_bytes, to_bytes


class Loaded(nn.Module):
    """Base of ``RPQWeight``: its buffer ``codes`` holds bytes where codes take two of them, and nobody else sees that.

    ``module.codes``, assigning it, and the state dict have codes ``[R, M, N]`` in the narrowest integer. The buffer
    itself, which ``named_buffers()`` yields and torch.distributed sends, is ``stored_codes``.
    """

    spec: CodebookSpec

    @property
    def codes(self) -> Tensor:
        """The codes, ``[R, M, N]`` in ``spec.code_dtype``; writing to them writes to the buffer.

        May be assigned: integers of any dtype that point into the codebook, also on another device.

        Raises:
            InputError: When set to what are no integers.
            CodeError: When set to integers of another dtype that point outside the codebook.
        """
        return from_bytes(self._buffers["codes"], self.spec.code_dtype)  # type: ignore[arg-type]

    @codes.setter
    def codes(self, codes: Tensor) -> None:
        self._buffers["codes"] = to_bytes(checked(codes, self.spec.entries, self.spec.code_dtype, "codes"))

    @property
    def stored_codes(self) -> Tensor:
        """The buffer that holds the codes (see ``rpqfx.nn.codebytes``)."""
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
        self._buffers["codes"] = to_bytes(self.codes)  # pickled before codes of two bytes were kept as bytes

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = from_bytes(destination[prefix + "codes"], self.spec.code_dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        codes, stored, here = state_dict.get(prefix + "codes"), self.stored_codes, self.codes
        if isinstance(codes, Tensor):
            check_range(codes, self.spec.entries, prefix + "codes")
        self._buffers["codes"] = here  # torch compares shapes, copies and assigns
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            now = self._buffers["codes"]
            self._buffers["codes"] = stored if now is here else to_bytes(self.codes)
