"""Checks of single arguments say what was seen, what is expected, and the likely next move."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from rpqfx.codebook import CodebookSpec
from rpqfx.errors import InputError, PolicyError, SpecError
from rpqfx.validation.values import closest, flag, number, one_of, shown, whole


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "got 0"), (17, "got 17"), (True, "got True"), ("4", "got '4'"), (None, "got None"), ([4], r"got \[4\]"),
        (4.0, "got 4.0; give 4"), (4.5, "got 4.5$"), (float("nan"), "got nan$"), (float("inf"), "got inf$"),
        (numpy.int64(4), r"got .*4.*\(int64\); give 4"), (torch.tensor(4), r"got tensor\(4\) \(Tensor\); give 4"),
        (torch.zeros(3), r"got tensor.*\(Tensor\)$"), (10**400, "got an integer of 1329 bits"),
    ],
)  # fmt: skip
def test_whole_numbers(value: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=rf"^bits is a whole number from 1 to 16, {said}"):
        whole("bits", value, 1, 16)
    whole("bits", 16, 1, 16)


@pytest.mark.parametrize("value", [0, -1, 2, True, "x", None, float("nan"), float("inf"), 10**400, torch.tensor(0.5)])
def test_numbers(value: Any) -> None:
    with pytest.raises(InputError, match=r"^ratio is a share, got "):
        number("ratio", value, "a share", lambda x: 0 < x <= 1, error=InputError)
    number("ratio", numpy.float64(0.5), "a share", lambda x: 0 < x <= 1)


@pytest.mark.parametrize("value", [0, 1, "yes", None, numpy.bool_(True), torch.tensor(True)])
def test_flags(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"^scale is True or False, got "):
        flag("scale", value)


@pytest.mark.parametrize("value", ["Fit", "fitt", ["fit"], numpy.array(["fit"]), torch.zeros(2), 3, None])
def test_words(value: Any) -> None:
    with pytest.raises(PolicyError, match=r"^init is one of fit, random, got ") as caught:
        one_of("init", value, ("fit", "random"))
    assert ("did you mean 'fit'?" in str(caught.value)) == (
        value in ("Fit", "fitt") if isinstance(value, str) else False
    )


def test_whatever_is_shown_is_short() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in ("x" * 10**5, list(range(10**5)), torch.zeros(10**4), 10**5000, Rude(), {"a": "b" * 10**4}, lambda: 0):
        assert len(shown(value)) < 120
    assert shown("x") == "'x'" and shown(Rude()).endswith("(Rude)")


def test_the_closest_name() -> None:
    assert closest("bitz", ["bits", "stages"]) == "; did you mean 'bits'?"
    assert closest("q", ["bits"]) == closest(3, ["bits"]) == closest("b" * 10**6, ["b" * 10**6]) == ""


@pytest.mark.parametrize("wrong", [1.0, "8", None, torch.tensor(8)])
def test_numbers_of_a_spec(wrong: Any) -> None:
    for name in ("num_vectors", "dim", "codebook_dim", "entries", "stages", "column_scale_group"):
        with pytest.raises(SpecError, match=f"^{name} is a whole number, got "):
            CodebookSpec(**{"num_vectors": 64, "dim": 8, "codebook_dim": 4, "entries": 4, name: wrong})
