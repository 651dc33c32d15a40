"""Mutations of saved files, of their manifests and of checkpoints, and what becomes of them."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rpqfx
from rpqfx import KeepDense, Policy, Quantize, Rule
from rpqfx.conversion.checkpoint import Checkpoint
from rpqfx.errors import FormatError
from rpqfx.storage.container import open_container
from rpqfx.storage.sealed_manifest import checksum, seal_of
from tests.kv.kv_models import LM, tokens

LARGEST = 64  # bytes that a byte of a file may become: codes of a bit in a tensor of int64


class Tiny(nn.Module):
    """Has ties, a buffer, a tensor in a plain attribute, and five weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(8, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(8, 24, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.BatchNorm1d(16)
        self.plain = torch.full((3,), 2.0)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids)
        hidden = self.norm(self.square(torch.relu(self.first(hidden) + self.second(hidden))))
        return self.head(hidden[:, :8] + hidden[:, 8:]) * self.plain[0]


def tiny() -> nn.Module:
    """A rewritten ``Tiny``."""
    torch.manual_seed(0)
    rules = (
        Rule("first", sharing="shape", stages=2),
        Rule("second", sharing="shape", stages=2),
        Rule("square", signs=True, column_scale=True),
    )
    policy = Policy(codebook_dim=4, codebook_bits=2, min_size=1, scale=True, allow_growth=True, rules=rules)
    small = rpqfx.rpqify(Tiny(), lambda site: _in_tiles(policy(site))).eval()
    with torch.no_grad():
        small.square.weight_rpq.codebooks.copy_(small.square.weight_rpq.codebooks.half())
    return small


def _in_tiles(answer: Quantize | KeepDense) -> Quantize | KeepDense:
    """The same, with codes that lie in tiles where they can."""
    if isinstance(answer, Quantize) and answer.spec.stages > 1:
        return dataclasses.replace(answer, spec=dataclasses.replace(answer.spec, tiled=True))
    return answer


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made anywhere but on the meta device."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.nbytes = max(self.nbytes, leaf.untyped_storage().nbytes())
        return result


def cached() -> nn.Module:
    """A language model whose weights and cache are quantized."""
    torch.manual_seed(0)
    policy = rpqfx.KVPolicy(bits_per_value=3, window=4, sinks=2, codebook_size=16, chunk=8, codebook_dim=4)
    small = rpqfx.rpqify(LM(layers=1), Policy(codebook_dim=8, codebook_bits=3, min_size=64))
    return rpqfx.quantize_kv(small, policy, calibration=[tokens(1)]).eval()


def drawn() -> nn.Module:
    """A ``Tiny`` whose codes are seeds, but for a stage of one and all of another."""
    torch.manual_seed(0)
    rules = (Rule("first", stages=3), Rule("second", stages=2), Rule("square", codebook_bits=3))
    policy = Policy.from_scratch(codebook_dim=4, codebook_bits=2, min_size=1, allow_growth=True, rules=rules)
    small = rpqfx.rpqify(Tiny(), lambda site: _in_tiles(policy(site))).eval()
    first, square = small.first.weight_rpq, small.square.weight_rpq
    first.codes = torch.stack([first.codes[0], first.codes[1].flip(-1), first.codes[2]])
    square.codes = square.codes.flip(-1)
    return small


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "weights": (tiny, Tiny, torch.arange(24)),
    "random codes": (drawn, Tiny, torch.arange(24)),
    "weights and cache": (cached, lambda: LM(layers=1), tokens(2, length=12)),
}
"""Models as they are saved, what builds them again, and inputs."""


# How many of a thousand mutations are of which subject, file and kind.
SHARES: dict[tuple[str, str], dict[str, int]] = {
    ("weights", "m.rpq"): {"bytes": 120, "manifest": 80, "tensors": 20, "directory": 120},
    ("weights", "m.safetensors"): {"bytes": 100, "manifest": 60, "tensors": 20, "directory": 60},
    ("random codes", "m.rpq"): {"bytes": 30, "manifest": 60, "tensors": 40, "directory": 10},
    ("random codes", "m.safetensors"): {"bytes": 10, "manifest": 30, "tensors": 20, "directory": 10},
    ("weights and cache", "m.rpq"): {"bytes": 20, "manifest": 40, "tensors": 10, "directory": 10},
    ("weights and cache", "m.safetensors"): {"bytes": 10, "manifest": 10, "tensors": 5, "directory": 5},
    ("checkpoint", ""): {"any": 100},
}


class Fuzzer:
    """Mutates what a model is saved as, and loads it.

    Args:
        name: Of the file, whose ending says its format.
        subject: A key of ``SUBJECTS``.
    """

    def __init__(self, name: str, subject: str = "weights") -> None:
        make, self.build, self.inputs = SUBJECTS[subject]
        small = make()
        file = io.BytesIO()
        file.name = name
        rpqfx.save(small, file)
        self.name, self.whole = name, file.getvalue()
        held = open_container(io.BytesIO(self.whole), name)
        self.manifest = json.loads(held.text)
        self.tensors = held.read(list(held.stored))
        with torch.no_grad():
            self.wanted = small(self.inputs)
        self.kinds: dict[str, Callable[[random.Random], bytes]] = {
            "bytes": lambda rng: mutated_bytes(self.whole, rng), "manifest": self._manifest, "tensors": self._tensors,
            "directory": self._directory,
        }  # fmt: skip

    def outcome(self, kind: str, seed: int, watch: bool = False) -> str:
        """``"refused"``, ``"identical"`` outputs, or ``"another"`` model's.

        Anything else, a crash or more memory than the file accounts for, is raised.
        """
        content = self.kinds[kind](random.Random(seed))
        file = io.BytesIO(content)
        file.name = self.name
        largest = Largest()
        try:
            if watch:
                with largest:
                    found = rpqfx.load(file, self.build)
            else:
                found = rpqfx.load(file, self.build)
        except FormatError:
            return "refused"
        finally:
            assert largest.nbytes <= LARGEST * len(content) + 64, (kind, seed, largest.nbytes)
        str(rpqfx.report(found))
        try:
            with torch.no_grad():
                return "identical" if torch.equal(found.eval()(self.inputs), self.wanted) else "another"
        except RuntimeError as error:  # torch's own, where factors are of another dtype than the layers around
            if "mixed dtype" not in str(error):
                raise
            return "another"

    def _manifest(self, rng: random.Random) -> bytes:
        """The manifest with values that it should not have, under a seal that fits."""
        manifest = copy.deepcopy(self.manifest)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            mutate_json(manifest, rng)
        text = json.dumps(manifest)
        if rng.random() < 0.05:
            text = rng.choice(_TEXTS)(text)
        return self._file(text, self.tensors)

    def _tensors(self, rng: random.Random) -> bytes:
        """Tensors that are not as the manifest says, under a checksum that fits."""
        tensors = dict(self.tensors)
        for _ in range(rng.choice((1, 1, 2))):
            mutate_tensors(tensors, rng)
        manifest = {**self.manifest, "checksum": checksum(tensors)}
        return self._file(json.dumps(manifest), tensors)

    def _directory(self, rng: random.Random) -> bytes:
        """What the format itself says of tensors, in a container that is whole."""
        if self.name.endswith(".safetensors"):
            length = int.from_bytes(self.whole[:8], "little")
            header = json.loads(self.whole[8 : 8 + length])
            mutate_json(header, rng)
            text = json.dumps(header).encode()
            return struct.pack("<Q", len(text)) + text + self.whole[8 + length :]
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.whole)) as source, zipfile.ZipFile(made, "w") as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = mutated_bytes(content, rng)
                packed = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
                if rng.random() > 0.003:
                    target.writestr(entry.filename, content, packed)
        return made.getvalue()

    def _file(self, text: str, tensors: dict[str, Tensor]) -> bytes:
        if self.name.endswith(".safetensors"):
            from safetensors.torch import save

            plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
            return bytes(save(plain, {"format": "pt", "rpqfx": text, "rpqfx_seal": seal_of(text)}))
        file = io.BytesIO()
        torch.save({"rpqfx": text, "seal": seal_of(text), "tensors": tensors}, file)
        return file.getvalue()


class CheckpointFuzzer:
    """Mutates what a conversion keeps of a finished weight, and asks for it.

    Args:
        folder: An empty one.
    """

    NAME = "blocks.0"
    SHAPES: ClassVar[dict[str, tuple[int, ...]]] = {"codes": (1, 2, 24), "scale": (24,), "error": ()}

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.tensors = {
            "codes": torch.randint(0, 4, self.SHAPES["codes"], dtype=torch.uint8), "scale": torch.rand(24),
            "error": torch.tensor(0.5),
        }  # fmt: skip
        self.store = Checkpoint(folder, "x")
        self.store.save(self.NAME, self.tensors)
        (self.path,) = folder.glob("*.pt")
        self.whole = self.path.read_bytes()

    def outcome(self, seed: int) -> str:
        """``"refused"``, or ``"identical"`` tensors; ``"another"`` are under a sum that fits. All else is raised."""
        rng = random.Random(seed)
        if rng.random() < 0.5:
            self.path.write_bytes(mutated_bytes(self.whole, rng))
        else:
            tensors = dict(self.tensors)
            mutate_tensors(tensors, rng)
            self.store.save(self.NAME, tensors)
        found = self.store.load(self.NAME, self.SHAPES)
        if found is None:
            return "refused"
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == self.SHAPES
        same = all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in self.tensors.items())
        return "identical" if same else "another"


_TEXTS: tuple[Callable[[str], str], ...] = (
    lambda text: text[: len(text) // 2], lambda text: "[" * 100_000, lambda text: text.replace('"std"', '"names"'),
    lambda text: text.replace('"version": 1', '"version": 1' + "0" * 10_000), lambda text: "null", lambda text: "",
    lambda text: text.replace("true", "NaN"), lambda text: text + text,
)  # fmt: skip


def mutated_bytes(whole: bytes, rng: random.Random) -> bytes:
    """Some bytes flipped, cut off, put in, left out, doubled, exchanged or zeroed."""
    data = bytearray(whole)
    at, to = sorted(rng.randrange(len(data)) for _ in range(2))
    to = min(to, at + rng.choice((1, 4, 16, 64, 1024)))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.choice((1, 1, 2, 8))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 8, 64))))
        case 3:
            del data[at : to + 1]
        case 4:
            data[at:at] = data[at:to]
        case 5:
            size = rng.choice((1, 8, 32, 128))
            other = rng.randrange(len(data))
            data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
        case 6:
            data[at:to] = rng.choice((b"\0", b"\xff")) * (to - at)
    return bytes(data)


_NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 255, 256, 65_537, 2**31, 2**63, 10**12, 10**30, -(10**12), 0.5, -0.0, 1e308,
    float("inf"), float("nan"), "", "load", "__class__", "save", "float32", "float64", "int64", "uint8", "bool",
    "complex32", "../../etc/passwd", "a/b", ".", "..", "a..b", "first.weight", "first.bias", "training", "forward",
    "_parameters", "first.forward", "first.training", "norm.running_mean", "parameter", "buffer", "attribute",
    "dequantize", "lookup", "virtual", "tensor", "é\ud800", "x" * 5_000, [], {}, [[]], [1], [-1], [10**12, 10**12],
    [0, 10**18], ["first.weight"], ["a", "a"], {"bits": 16, "entries": 65_536}, {"bits": 1, "entries": 2},
    {"__class__": "x"}, [0], [0, 1],
)  # fmt: skip


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within JSON values, with each key or index."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        found += _places(inner)
    return found


def mutate_json(value: Any, rng: random.Random) -> None:
    """Changes one of the values, in place."""
    places = _places(value)
    if not places:
        return
    holder, key = rng.choice(places)
    other, other_key = rng.choice(places)
    match rng.randrange(8):
        case 0 | 1 | 2:
            holder[key] = copy.deepcopy(rng.choice(_NASTY))
        case 3:
            del holder[key]
        case 4:
            holder[key] = copy.deepcopy(other[other_key])
        case 5:
            holder[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(holder[key])
        case 6:
            if isinstance(holder, list):
                holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(other[other_key]))
            else:
                holder[rng.choice(("packed", "stored", "drawn", "kv", "routed", "more", "names"))] = copy.deepcopy(
                    rng.choice((other[other_key], *_NASTY[:20]))
                )
        case 7:
            if type(holder[key]) is int:
                holder[key] += rng.choice((-1, 1, 8, 2**20, 2**40))
            elif type(holder[key]) is bool:
                holder[key] = not holder[key]
            elif type(holder[key]) is str:
                holder[key] = holder[key][::-1]


def mutate_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    """Changes one of the tensors, in place."""
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor = tensors[name]
    match rng.randrange(8):
        case 0:
            del tensors[name]
        case 1:
            tensors[name + rng.choice((".x", "_", ""))] = tensors[other].clone()
        case 2:
            dtype = rng.choice((torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64))
            tensors[name] = tensor.to(dtype)
        case 3:
            tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
        case 4:
            tensors[name] = tensor.reshape(rng.choice(((-1,), (1, -1), (-1, 1))))
        case 5:
            tensors[name], tensors[other] = tensors[other], tensor
        case 6:
            filled = rng.choice((0, 1, 3, 127, 100)) if not tensor.is_floating_point() else rng.choice((0.0, 3e4))
            tensors[name] = torch.full_like(tensor, filled)
        case 7:
            tensors[name] = torch.cat([tensor.reshape(-1)] * 2)
