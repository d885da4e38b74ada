"""Prefix-tuning: learned keys and values before every prompt, in every layer (with PEFT)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from atv.config import Checked
from atv.errors import ATVError
from atv.lm.load import context_length
from atv.lm.prefix import KeptLayer, as_cache, counts_positions
from atv.methods.learn_once import at_least_one
from atv.methods.peft_model import Adapted, PEFTMethod


@dataclass
class PrefixConfig(Checked):
    """The configuration of a learned prefix. The default is the usual value for PEFT."""

    virtual_tokens: int = 20
    """Number of learned keys and values per layer."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        at_least_one(self, "virtual_tokens")


class AdaptedByPrefix(Adapted):
    """The LLM with learned keys and values before the prompt.

    PEFT's own forward drops `position_ids`, so a row's answer would depend on its padding. Here the columns are virtual
    tokens, padding, prompt. The padding is masked, and positions continue after the virtual tokens.
    """

    @property
    def context(self) -> int | None:
        """The LLM's context without the virtual tokens."""
        limit = super().context
        return None if limit is None else limit - int(self.peft.active_peft_config.num_virtual_tokens)

    def learned(self) -> nn.Module:
        """The keys and values, in float32."""
        encoders: nn.Module = self.peft.prompt_encoder
        return encoders

    def forward(self, **inputs: Any) -> Any:
        """Call the LLM. Caches passed in and returned do not contain the virtual tokens."""
        llm, mask = self.get_base_model(), inputs["attention_mask"]  # (batch, seq)
        past, tokens = self._virtual_tokens(len(mask))
        columns = tokens + mask.shape[1]
        self._require_room(columns)
        if not counts_positions(llm, columns) and not mask[:, 0].all():
            return self._one_by_one(inputs)
        if inputs.get("past_key_values") is not None:
            for layer, given in zip(past.layers, inputs["past_key_values"].layers, strict=True):
                layer.update(given.keys, given.values)
        inputs["attention_mask"] = nn.functional.pad(mask, (tokens, 0), value=1)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + tokens
        output = llm(**inputs | {"past_key_values": past, "use_cache": True})
        if inputs.get("use_cache"):
            for layer in past.layers:
                layer.keys, layer.values = layer.keys[:, :, tokens:], layer.values[:, :, tokens:]
        return output

    def _virtual_tokens(self, rows: int) -> tuple[Any, int]:
        """A cache of the virtual tokens' keys and values, and their number.

        PEFT's layers with a sliding window keep only the columns inside it, and more would drop out while the cache
        grows, so that the virtual tokens could not be told from the prompt. Here each layer keeps every column: those
        that PEFT has dropped are zeros, which the window hides.
        """
        past = self.peft.get_prompt(rows)
        tokens = past.get_seq_length()
        past.layers = [
            KeptLayer(*(_widened(side, tokens) for side in (layer.keys, layer.values)))
            if layer.is_sliding and layer.is_initialized
            else layer
            for layer in past.layers
        ]
        return past, tokens

    def _one_by_one(self, inputs: dict[str, Any]) -> Any:
        """Run each row without its left padding, for LLMs that would count the padding as tokens."""
        given, width, outputs = inputs.pop("past_key_values", None), inputs["attention_mask"].shape[1], []
        for row, mask in enumerate(inputs["attention_mask"]):
            padding, one = int(mask.argmax()), slice(row, row + 1)
            # Without the padding: all tensors end at the same column, and with a cache some begin later than others.
            cut = {name: x[one, padding - width :] if isinstance(x, Tensor) else x for name, x in inputs.items()}
            if given is not None:
                sides = [(layer.keys, layer.values) for layer in given.layers]
                cut["past_key_values"] = as_cache([(k[one, :, padding:], v[one, :, padding:]) for k, v in sides])
            outputs.append(self(**cut))
        outputs[0].logits = torch.cat([output.logits for output in outputs])
        if inputs.get("use_cache"):
            caches = [output.past_key_values.layers for output in outputs]
            for layer, *others in zip(*caches, strict=True):
                for name in ("keys", "values"):
                    setattr(layer, name, torch.cat([_widened(getattr(each, name), width) for each in (layer, *others)]))
        return outputs[0]

    def _require_room(self, tokens: int) -> None:
        limit = context_length(self)
        if limit is not None and tokens > limit:
            raise ATVError(
                f"A prompt and the virtual tokens before it are {tokens} tokens and the LLM's context is {limit}; "
                "shorten the prompt or train fewer virtual tokens."
            )


def _widened(side: Tensor, columns: int) -> Tensor:
    """Keys or values (batch, heads, seq, head width), padded with zeros in front to `columns` columns."""
    return nn.functional.pad(side, (0, 0, columns - side.shape[2], 0))


class PrefixTuning(PEFTMethod):
    """The same learned keys and values before every prompt."""

    name = "prefix"
    config_class = PrefixConfig
    train_defaults: ClassVar[dict[str, Any]] = {"learning_rate": 1e-2}
    search: ClassVar[dict[str, tuple[Any, ...]]] = {
        "learning_rate": (1e-2, 3e-2, 3e-3, 1e-3),
        "virtual_tokens": (20, 5, 50),
    }

    @classmethod
    def adapt(cls, llm: nn.Module, config: PrefixConfig) -> Adapted:
        """New keys and values with random initialisation."""
        from peft import PrefixTuningConfig

        return AdaptedByPrefix(llm, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.virtual_tokens))
