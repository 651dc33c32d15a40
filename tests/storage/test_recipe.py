"""Files that name the class of their dense model: names and plain values, and nothing is imported for them."""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpqfx
from rpqfx.errors import FormatError, InputError
from rpqfx.storage.container import open_container, writer_for
from rpqfx.storage.sealed_manifest import seal_of
from tests import forks
from tests.models import MLP, SMALL


def small(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return rpqfx.rpqify(MLP(width=width), SMALL)


def say(path: Path, **build: Any) -> None:
    """Writes a file anew whose manifest names another class, under a right seal."""
    with open(path, "rb") as file:
        held = open_container(file, path.name)
        tensors = held.read(list(held.stored))
    manifest = json.loads(held.text)
    manifest["build"] |= build
    text = json.dumps(manifest)
    writer_for(path.name)(path, text, seal_of(text), tensors)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rpqfx.save(small(48), tmp_path / "m.rpq", build=MLP, arguments={"width": 48})
    return tmp_path / "m.rpq"


def test_load_needs_no_function_then(path: Path) -> None:
    again = rpqfx.load(path)
    assert type(again) is type(small(48))
    assert all(torch.equal(value, small(48).state_dict()[name]) for name, value in again.state_dict().items())
    assert again.fc1.out_features == 48 and rpqfx.load(path, lambda: MLP(width=48)).fc1.out_features == 48


def test_another_process_has_to_import_the_class_before(path: Path) -> None:
    script = "import rpqfx\ntry: rpqfx.load({path!r})\nexcept rpqfx.RPQError as error: print(error)\n"
    script += "import sys\nassert 'tests.models' not in sys.modules\nimport tests.models\n"
    script += "print(type(rpqfx.load({path!r})).__name__)"
    done = forks.run(script.format(path=str(path)))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "names the class MLP of tests.models, which has not been imported" in first and second == "MLP"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("colorsys:MLP", "has not been imported"),
        ("subprocess:Popen", "no such module class"),
        ("tests.models:torch.nn.Linear", "no such module class"),
        ("tests.models:absent", "no such module class"),
        ("builtins:eval", "no such module class"),
        ("torch.nn:Linear", "TypeError"),
    ],
)
def test_what_a_file_names_is_neither_imported_nor_called(name: str, why: str, path: Path) -> None:
    sys.modules.pop("colorsys", None)
    say(path, **{"class": name})
    if why == "TypeError":  # it is a module's class, which takes other arguments
        with pytest.raises(TypeError):
            rpqfx.load(path)
        return
    with pytest.raises(FormatError, match=why):
        rpqfx.load(path)
    assert "colorsys" not in sys.modules


@pytest.mark.parametrize(
    "build", [{"class": "a b:C"}, {"class": "MLP"}, {"class": 3}, {"arguments": []}, {"code": "1"}]
)
def test_a_manifest_that_says_it_otherwise_is_refused(build: dict[str, Any], path: Path) -> None:
    say(path, **build)
    with pytest.raises(FormatError, match="no right value at build"):
        rpqfx.load(path)


class Local(MLP):
    class Inner(MLP):
        pass


def test_a_class_within_a_class_is_found(tmp_path: Path) -> None:
    rpqfx.save(small(), tmp_path / "m.rpq", build=Local.Inner)
    assert type(rpqfx.load(tmp_path / "m.rpq")).__name__ == "Inner"


@pytest.mark.parametrize(
    ("build", "arguments", "why"),
    [
        (lambda: MLP(), None, "build is a class of the dense model"),
        (dict, None, "build is a class of the dense model"),
        (type("Made", (MLP,), {}), None, "is not found by its name"),
        (MLP, {"width": 48}, "does not make this model"),
        (MLP, {"breadth": 48}, "does not make this model"),
        (MLP, {"width": (32,)}, r"arguments\['width'\] is a number"),
        (MLP, {"width": torch.tensor(32)}, r"arguments\['width'\] is a number"),
        (MLP, {"width": float("nan")}, r"arguments\['width'\] is a number"),
        (MLP, {"width": OrderedDict()}, r"arguments\['width'\] is a number"),
        (MLP, [48], "arguments is a dict"),
        (MLP, {3: 48}, "arguments is a dict"),
    ],
)
def test_what_could_not_be_made_again_is_not_saved(build: Any, arguments: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=why):
        rpqfx.save(small(), tmp_path / "m.rpq", build=build, arguments=arguments)
    assert not list(tmp_path.iterdir())
