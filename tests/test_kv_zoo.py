"""The zoo of caches tries every architecture, and its checks can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rpqfx.kv import CodebookCache
from rpqfx.kv.cache.layer import LayerStore

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def checked(kind: str) -> dict[str, Any]:
    import kv_zoo_checks
    import kv_zoo_models

    one = next(one for one in kv_zoo_models.architectures() if one.id == kind)
    return kv_zoo_checks.check(one)


def states(found: dict[str, Any]) -> dict[str, str]:
    return {name: outcome["state"] for name, outcome in found["checks"].items()}


def test_every_causal_and_every_two_sided_architecture_is_tried_once():
    from kv_zoo_models import architectures

    ids = [one.id for one in architectures()]
    assert len(ids) == len(set(ids)) > 100
    assert {"llama", "bart", "bart Seq2SeqLM", "t5 Seq2SeqLM", "whisper SpeechSeq2Seq"} <= set(ids)


def test_a_model_that_is_served_passes_every_check():
    found = checked("llama")
    assert found["state"] == "served" and set(states(found).values()) == {"ok"}


def test_a_model_that_is_refused_says_why():
    found = checked("jetmoe")
    assert found["state"] == "refused" and "cache of codes" in found["detail"]


def test_attention_that_is_off_with_a_cache_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = LayerStore.attend

    def wrong(self: LayerStore, *args: Any, **options: Any) -> torch.Tensor:
        return right(self, *args, **options) * (1.05 if self.encoded else 1)  # else it would be refused

    monkeypatch.setattr(LayerStore, "attend", wrong)
    found = states(checked("gpt2"))
    assert found["dense"] == "ok"
    assert {"cache", "tokens", "parts", "padding", "copies"} <= {name for name in found if found[name] == "failed"}


def test_a_copied_cache_that_is_empty_is_seen(monkeypatch: pytest.MonkeyPatch):
    def forget(self: CodebookCache, memo: dict[int, Any]) -> CodebookCache:
        return type(self)(copied.pop())

    import kv_zoo_checks

    copied: list[torch.nn.Module] = []
    monkeypatch.setattr(CodebookCache, "__deepcopy__", forget)
    original = kv_zoo_checks._copies

    def noted(small: Any, *args: Any) -> Any:
        copied.extend([small.model, small.model])
        return original(small, *args)

    monkeypatch.setattr(kv_zoo_checks, "_copies", noted)
    found = states(checked("gpt2"))
    assert [name for name, state in found.items() if state == "failed"] == ["copies"]
