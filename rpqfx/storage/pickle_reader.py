"""The pickle in a file that ``torch.save`` wrote, read as the data that it is: no word of it is looked up or called."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_TYPED = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
}  # fmt: skip
_UNTYPED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "uint16", "uint32",
            "uint64", "complex32")  # fmt: skip
DTYPES: dict[str, torch.dtype] = {
    **{str(dtype).removeprefix("torch."): dtype for dtype in _TYPED.values()},
    **{name: getattr(torch, name) for name in _UNTYPED if hasattr(torch, name)},
}
"""The dtypes that a file may hold, by their names."""


class _Word(NamedTuple):
    """A name that the pickle calls, which is not looked up."""

    name: str


class Storage(NamedTuple):
    """A storage as the pickle describes it.

    Args:
        dtype: None where tensors each say theirs.
        key: Key of its record.
        numel: Number of elements, or of bytes where there is no dtype.
    """

    dtype: torch.dtype | None
    key: str
    numel: int


Describe = Callable[[Storage, int, Sequence[int], Sequence[int], torch.dtype | None], Any]
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Reader:
    """Reads a pickle of nested dicts with strings for keys, of strings and tensors. Nothing is looked up by name.

    Args:
        describe: Called with each tensor's storage, offset, shape, strides and dtype (None where the storage has it);
            what it returns stands for the tensor.
    """

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, pickle: bytes) -> Any:
        """Returns what was pickled.

        Args:
            pickle: The bytes.

        Raises:
            ValueError: If there is anything else in it; and IndexError, KeyError, TypeError for what makes no sense.
        """
        for op, argument, _ in pickletools.genops(pickle):
            if op.name == "STOP":
                (value,) = self._stack
                return value
            self._take(op.name, argument)
        raise ValueError("no end")

    def _take(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "MARK":
            self._marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "BINUNICODE" or name in _NUMBERS:
            stack.append(argument)
        elif name == "GLOBAL":
            stack.append(_Word(argument))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._put_tuple(self._above(len(stack) - count))
        elif name == "TUPLE":
            self._put_tuple(self._above(self._marks.pop()))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(self._called(stack.pop(), arguments))
        elif name in ("SETITEM", "SETITEMS"):
            self._set_items(self._above(self._marks.pop() if name == "SETITEMS" else len(stack) - 2))
        elif name != "PROTO":
            raise ValueError(f"the word {name} is none of a file of tensors")

    def _above(self, start: int) -> list[Any]:
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("too little on the stack")
        above = self._stack[start:]
        del self._stack[start:]
        return above

    def _put_tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("what is given items is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise ValueError("a key is no string, or there twice")
            target[key] = value

    def _called(self, function: Any, arguments: Any) -> Any:
        if type(function) is not _Word or type(arguments) is not tuple:
            raise ValueError("what is called is no function")
        if function.name == "collections OrderedDict" and not arguments:
            return {}
        if function.name == "torch._utils _rebuild_tensor_v2" and len(arguments) == 6:
            return self._tensor(*arguments)
        if function.name == "torch._utils _rebuild_tensor_v3" and len(arguments) == 7:
            return self._tensor(*arguments)
        raise ValueError(f"{function.name!r} makes no plain tensor")

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any = None
    ) -> Any:
        if type(storage) is not Storage or type(shape) is not tuple or type(strides) is not tuple or hooks != {}:
            raise ValueError("a tensor has no storage, no shape, or hooks")
        if dtype is not None:
            dtype = DTYPES[_name(dtype, "torch ")]
        return self._describe(storage, offset, shape, strides, dtype)


def _storage(said: Any) -> Storage:
    kind, typed, key, _, count = said
    if kind != "storage" or type(key) is not str or type(count) is not int or count < 0:
        raise ValueError("a storage is not as torch writes it")
    if typed == _Word("torch.storage UntypedStorage"):
        return Storage(None, key, count)
    return Storage(_TYPED[_name(typed, "torch ")], key, count)


def _name(word: Any, module: str) -> str:
    if type(word) is not _Word or not word.name.startswith(module):
        raise ValueError("a name is none of torch")
    return word.name.removeprefix(module)
