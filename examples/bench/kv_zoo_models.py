"""Tiny random models of every causal and every encoder-decoder architecture of the installed transformers."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from kv_zoo_sizes import ENCODED, OPTIONS, SMALL
from torch import Tensor, nn

VOCABULARY, SOURCE, FIRST_TOKEN = 200, 12, 5
_SPREAD = 0.2  # of weights: with those that models begin with, attention would be all but even


@dataclass(frozen=True)
class Architecture:
    """One model type in one of the forms that the installed transformers has it in.

    Args:
        kind: The model type.
        form: ``"CausalLM"``, ``"Seq2SeqLM"`` or ``"SpeechSeq2Seq"``, of the class that is built.
    """

    kind: str
    form: str

    @property
    def id(self) -> str:
        """The name in results."""
        return self.kind if self.form == "CausalLM" else f"{self.kind} {self.form}"


def architectures() -> list[Architecture]:
    """Returns what the installed transformers maps to causal models and to models with an encoder and a decoder."""
    from transformers.models.auto import modeling_auto

    maps = {
        "CausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "Seq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "SpeechSeq2Seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    }
    found: dict[tuple[str, Any], Architecture] = {}
    for form, names in maps.items():
        for kind in sorted(names):
            found.setdefault((kind, str(names[kind])), Architecture(kind, form))
    return list(found.values())


def tiny_config(kind: str, **options: Any) -> Any:
    """Returns a small configuration of a model type.

    Args:
        kind: The model type.
        **options: Fields, in the place of the usual small ones.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind](**_values(CONFIG_MAPPING[kind], {**OPTIONS.get(kind, {}), **options}))


def _values(config: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Values of a configuration class's fields, those of configurations within it among them."""
    fields = {field.name for field in dataclasses.fields(config)}
    values = {name: value for name, value in SMALL.items() if name in fields}
    usual = config() if any(part.__name__ == "AutoConfig" for part in config.sub_configs.values()) else None
    for name, part in config.sub_configs.items():
        given = dict(options.get(name, {}))
        kind = given.pop("model_type", None) or getattr(getattr(usual, name, None), "model_type", None)
        if part.__name__ != "AutoConfig":
            values[name] = part(**_values(part, {**OPTIONS.get(part.model_type, {}), **given}))
        elif kind is not None:
            values[name] = tiny_config(kind, **given)
    return {**values, **{name: value for name, value in options.items() if name not in config.sub_configs}}


def build(one: Architecture) -> Any:
    """Returns the model, in eval mode, with random weights of a spread that makes attention uneven."""
    import transformers

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = tiny_config(one.kind)
        model = getattr(transformers, f"AutoModelFor{one.form}").from_config(config)
    model = model.float().eval()
    _spread(model)
    config = model.generation_config
    config.eos_token_id, config.forced_eos_token_id, config.forced_bos_token_id = None, None, None
    config.pad_token_id = 0
    return model


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name.endswith("weight") and 0 < float(parameter.std()) < 0.1:
            parameter *= _SPREAD / float(parameter.std())
        elif name.endswith("sinks"):
            parameter.normal_()


def tokens(seed: int, batch: int, length: int) -> Tensor:
    """Returns ``[batch, length]`` token numbers, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, VOCABULARY - 40, (batch, length), generator=generator)


def encoded(one: Architecture, batch: int) -> dict[str, Tensor]:
    """Returns what the encoder is given, ``{}`` where there is none."""
    make = ENCODED.get(one.kind)
    if not _has_encoder(one):
        return {}
    return {"input_ids": tokens(5, 1, SOURCE).repeat(batch, 1)} if make is None else make(batch)


def _has_encoder(one: Architecture) -> bool:
    return one.form != "CausalLM" and bool(tiny_config(one.kind).is_encoder_decoder)
