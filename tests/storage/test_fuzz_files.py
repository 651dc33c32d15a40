"""A file that was changed, in whatever way, is refused or gives the same outputs, and never costs more than it is long.

Mutations of bytes are of any, those of a manifest are under a seal that fits, so that they reach what reads it. Of
tensors that were changed under a checksum that fits no file can tell: they load as the other model that they are. So do
the few manifests that are right by all that the file has, as where a square weight's vectors are its columns.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.figures import record
from tests.fuzz_files import SHARES, CheckpointFuzzer, Fuzzer, Largest


def outcomes(subject: str, name: str, times: int, folder: Path) -> dict[str, Counter[str]]:
    """What becomes of mutations, ``times`` a share of them, by kind."""
    found: dict[str, Counter[str]] = {}
    fuzzer = CheckpointFuzzer(folder) if subject == "checkpoint" else Fuzzer(name, subject)
    for kind, share in SHARES[subject, name].items():
        if isinstance(fuzzer, CheckpointFuzzer):
            found[kind] = Counter(fuzzer.outcome(seed) for seed in range(times * share))
        else:
            found[kind] = Counter(fuzzer.outcome(kind, seed, watch=seed % 10 == 0) for seed in range(times * share))
    return found


def check(subject: str, name: str, times: int, folder: Path) -> Counter[str]:
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    total: Counter[str] = Counter()
    for kind, found in outcomes(subject, name, times, folder).items():
        print(f"{subject}, {name}, {kind}: {dict(found)}")
        total += found
        assert set(found) <= {"refused", "identical", "another"}, kind
        most = {"tensors": 0.5, "any": 0.5, "manifest": 0.01}.get(kind, 0.0)
        assert found["another"] <= most * found.total(), kind
        assert found["refused"] > 0.25 * found.total(), kind
    return total


@pytest.mark.parametrize(("subject", "name"), SHARES)
def test_a_thousand_mutations(subject: str, name: str, tmp_path: Path) -> None:
    check(subject, name, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("subject", "name"), SHARES)
def test_a_hundred_thousand_mutations(subject: str, name: str, tmp_path: Path) -> None:
    found = check(subject, name, 100, tmp_path)
    what = f"{subject} ({name.removeprefix('m')})" if name else "checkpoint of a conversion"
    record(
        f"reliability/mutations-{what.replace(' ', '-').translate(str.maketrans('', '', '().'))}",
        "pytest -m slow tests/storage/test_fuzz_files.py",
        attack=f"mutations of a file: {what}",
        tried=found.total(),
        outcome=f"{found['refused']:,} refused, {found['identical']:,} with identical outputs, {found['another']:,} "
        "another model under seals that fit it",
        counts=dict(found),
        seeds="0 and on",
    )


def test_there_are_as_many_as_the_names_say() -> None:
    assert sum(share for kinds in SHARES.values() for share in kinds.values()) == 1000


def test_the_watch_on_memory_can_fail() -> None:
    largest = Largest()
    with largest:
        torch.empty(1000, device="meta")
        torch.zeros(10)
    assert largest.nbytes == 40
    with largest:
        torch.zeros(10**5).sum()
    assert largest.nbytes == 4 * 10**5
