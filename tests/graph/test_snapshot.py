"""What a call changed of torch's state is put back."""

from __future__ import annotations

import warnings

import torch

from rpqfx.graph.snapshot import Ambient
from rpqfx.routing.rewrite.seeds import Drawing
from tests.interrupts import around


def test_all_that_a_call_left_behind_is_put_back() -> None:
    """Function modes too, which stay where an interrupt forestalls their end."""
    with torch.device("cpu"):  # which stays
        before, ambient = around(), Ambient()
        torch.device("meta").__enter__()
        Drawing(0).__enter__()
        torch.set_grad_enabled(False)
        warnings.simplefilter("ignore")
        torch.rand(1)
        assert around() != before
        for _ in range(2):
            ambient.restore()
            assert around() == before
    assert around()["modes"] == before["modes"] - 1
