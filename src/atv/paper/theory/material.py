"""Material for checking the statements: random matrices, or an LLM's weights and hidden states, in float64."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn

from atv.data import load_tasks
from atv.data.render import Example, Template
from atv.errors import ATVError
from atv.lm.calls import Calls
from atv.lm.hooks import attention_and_mlp, base_llm, input_device, text_config
from atv.paper.theory.prefix import Three

SAME_TOKEN = 8
"""Number of prompts whose last token's states in the first layer are used."""


@dataclass(frozen=True)
class Material:
    """States and weights; n is twice the hidden size d."""

    name: str
    states: Tensor
    """Inputs of the projections of several layers, for the same tokens in each: (layers, n, d)."""
    first: Tensor
    """Inputs of the first layer's projections at the last token of prompts that end alike: (prompts, d)."""
    prompt: Tensor
    """Inputs of one layer's projections at every token of one prompt: (T, d)."""
    weights: Three
    """W_q, W_k, W_v of that layer, (heads, d, k) each; shared keys and values are repeated."""
    sharing: int
    """Number of consecutive heads that share keys and values."""
    width: int
    """d_s in the checks of Theorem 1, much smaller than d."""


def random_material(draw: torch.Generator, hidden: int = 16, tokens: int = 10, width: int = 4) -> Material:
    """Normally distributed material with one head as wide as the states, as in the paper's formulas."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return Material(
        f"random matrices, d = {hidden}",
        states=normal(4, 2 * hidden, hidden),
        first=normal(1, hidden).expand(SAME_TOKEN, hidden),
        prompt=normal(tokens, hidden),
        weights=Three(*(normal(3, 1, hidden, hidden) / hidden**0.5)),
        sharing=1,
        width=width,
    )


def llm_material(llm: nn.Module, tokenizer: Any, tokens: int = 24, width: int = 16) -> Material:
    """Weights and states of an LLM that reads inputs of the built-in tasks, each ending in "A:".

    States are taken from all tokens except each prompt's first, which is the same for many prompts. As in the paper,
    biases of the projections and rotary positions are left out.

    Args:
        llm: with separate query, key and value projections.
        tokenizer: the LLM's.
        tokens: T, the length of the one prompt that is used whole.
        width: d_s.
    """
    projections = [_projections(attention) for attention, _ in attention_and_mlp(llm)]
    count = len(projections)
    layers = [0, count // 3, 2 * count // 3, count - 1]
    wanted = 2 * int(text_config(llm).hidden_size)
    prompts: list[Tensor] = []  # (layers, tokens, d) each
    read = 0
    render = Template("{input}", "A:")
    for text in _texts():
        ids = render.prompt(tokenizer, Example(text, "")).ids
        prompts.append(_inputs(llm, [projections[index].q for index in layers], ids))
        read += prompts[-1].shape[1] - 1
        if read >= wanted and len(prompts) >= SAME_TOKEN:
            break
    long = next((states for states in prompts if states.shape[1] >= tokens), None)
    if read < wanted or long is None:
        raise ATVError(
            f"The built-in tasks gave {read} tokens; expected {wanted}, twice the LLM's hidden size, and a prompt of "
            f"{tokens}. Take an LLM with a smaller hidden size."
        )
    chosen = 2  # of `layers`
    config = text_config(llm)
    sharing = config.num_attention_heads // (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    return Material(
        f"{base_llm(llm).name_or_path}, layer {layers[chosen]} of {count}",
        states=torch.cat([states[:, 1:] for states in prompts], 1)[:, :wanted],
        first=torch.stack([states[0, -1] for states in prompts[:SAME_TOKEN]]),
        prompt=long[chosen, :tokens],
        weights=_weights(projections[layers[chosen]], config.num_attention_heads, sharing),
        sharing=sharing,
        width=width,
    )


@dataclass(frozen=True)
class _Projections:
    q: nn.Module
    k: nn.Module
    v: nn.Module


def _projections(attention: nn.Module) -> _Projections:
    children = dict(attention.named_children())
    try:
        return _Projections(children["q_proj"], children["k_proj"], children["v_proj"])
    except KeyError:
        raise ATVError(
            f"{type(attention).__name__} has the children {', '.join(children) or 'none'}; expected q_proj, k_proj and "
            "v_proj, since the theorems have three separate projections. Take an LLM with these, such as Llama."
        ) from None


def _weights(projections: _Projections, heads: int, sharing: int) -> Three:
    """W_q, W_k, W_v (heads, d, k) from weights (heads * k, d)."""

    def of(module: nn.Module, repeats: int) -> Tensor:
        weight = cast(Tensor, module.weight).detach().double().cpu()
        per_head: Tensor = weight.unflatten(0, (heads // repeats, -1))
        return per_head.mT.repeat_interleave(repeats, 0)

    return Three(of(projections.q, 1), of(projections.k, sharing), of(projections.v, sharing))


def _texts() -> Iterator[str]:
    """Inputs of the built-in tasks, alternating between the tasks."""
    columns: Iterable[list[str]] = ([example.input for example in task.train] for task in load_tasks())
    rows = zip_longest(*columns)
    return (text for text in islice(chain.from_iterable(rows), 4096) if text)


@torch.no_grad()
def _inputs(llm: nn.Module, modules: list[nn.Module], ids: list[int]) -> Tensor:
    """The input of each of `modules` when the LLM reads one prompt: (modules, tokens, d)."""
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(Calls(module, lambda named: seen.append(named["input"][0].double().cpu())).watched())
        base_llm(llm).base_model(input_ids=torch.tensor([ids], device=input_device(llm)), use_cache=False)  # type: ignore[operator]
    return torch.stack(seen)
