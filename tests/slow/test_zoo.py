"""The zoo's own models of torch.nn pass every check; those of other libraries are run by examples/bench/zoo.py."""

from __future__ import annotations

import pytest

from tests.zoo_bench import checks, coverage, models

pytestmark = pytest.mark.slow
LEFT = {"torch/orthogonal": "reads signs from its diagonal"}  # models that have a weight which cannot be held, and why


@pytest.mark.parametrize("entry", models.catalogue(["torch"]), ids=lambda entry: entry.id)
def test_it_passes_every_check(entry: models.Model) -> None:
    result = checks.check_model(entry)
    assert {name: check["detail"] for name, check in result["checks"].items() if check["state"] == "failed"} == {}
    missed = result["checks"]["coverage"]["missed"]
    assert coverage.share([result["checks"]["coverage"]["sums"]]) > 0.995 or entry.id in LEFT, missed
    assert [line["reason"] for line in missed if LEFT.get(entry.id, "nothing") not in line["reason"]] == []
