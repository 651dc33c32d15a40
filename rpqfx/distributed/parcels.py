"""Plain values and tensors as bytes that another process turns into the same values, to the last bit."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor

_HEAD = 8  # bytes that say how long the pickle is


class _Packer(pickle.Pickler):
    """Pickles a value, its tensors apart, as bytes that are not copied on the way."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor):
            return None
        self.tensors.append(obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        return obj.dtype, tuple(obj.shape), obj.device.type


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Tensor) -> None:
        super().__init__(file)
        self._tensors, self._at = tensors, 0

    def persistent_load(self, pid: Any) -> Tensor:
        dtype, shape, kind = pid
        stop = self._at + torch.Size(shape).numel() * dtype.itemsize
        held = self._tensors[self._at : stop].clone().view(dtype).reshape(shape)  # a copy lies as its dtype needs it
        self._at = stop
        return held if kind == "cpu" else held.to(kind)  # the current device of that kind


def packed(value: Any) -> Tensor:
    """Returns a value as bytes, uint8 on the CPU.

    Args:
        value: Anything that can be pickled; its tensors may be on any device.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    text = file.getvalue()
    head = bytearray(len(text).to_bytes(_HEAD, "little") + text)
    return torch.cat([torch.frombuffer(head, dtype=torch.uint8), *packer.tensors])


def unpacked(parcel: Tensor) -> Any:
    """Returns the value that ``packed`` made bytes of. Tensors from a GPU are put on this process's current one.

    Args:
        parcel: Bytes from a process that is trusted: pickles can run code.
    """
    length = int.from_bytes(bytes(parcel[:_HEAD].tolist()), "little") + _HEAD
    return _Unpacker(io.BytesIO(bytes(parcel[_HEAD:length].tolist())), parcel[length:]).load()
