"""Reach into a frozen LLM without changing it: find its decoder layers, edit or read what they return.

What changes a model's doing is a context manager around forward hooks. The module tree, its names and its weights stay
as they are, and the hooks are gone when the context ends, after an exception too.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn

from atv.errors import ATVError
from atv.lm.calls import eager, hooked, scope, unsteered

Edit = Callable[[int, Tensor], Tensor]


def unregistered(owner: nn.Module, **values: Any) -> None:
    """Set attributes that hold modules without making them submodules: the LLM's weights are not the owner's."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was given; any other module as it is."""
    return cast(nn.Module, getattr(module, "_orig_mod", module))


def base_llm(llm: nn.Module) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper (its `generate` calls that one), or the model itself."""
    unwrap = getattr(llm, "get_base_model", None)
    return uncompiled(unwrap() if callable(unwrap) else llm)


def input_device(llm: nn.Module) -> torch.device:
    """Where an LLM's input ids must be: at its embeddings, or where accelerate brings those if they are offloaded."""
    embeddings = base_llm(llm).get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embeddings.weight
    return torch.device(embeddings._hf_hook.execution_device) if weight.is_meta else weight.device


def quantization(llm: nn.Module) -> str | None:
    """`8bit` or `4bit` for weights quantised by bitsandbytes, the method's name for others, None for plain weights."""
    config = getattr(base_llm(llm).config, "quantization_config", None)
    if config is None:
        return None
    about = config if isinstance(config, dict) else config.to_dict()
    for bits in ("8bit", "4bit"):
        if about.get(f"load_in_{bits}"):
            return bits
    return str(getattr(about["quant_method"], "value", about["quant_method"]))


def keep_differentiable(llm: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference on a CPU.

    On CPUs with AVX512-BF16 it does so at the first call without gradient, and then no gradient passes a layer any
    more; only the residual stream still carries one, so that nothing seems wrong.
    """
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to nn.Module's types


def text_config(llm: nn.Module) -> Any:
    """The configuration of the language part of a Hugging Face model."""
    return base_llm(llm).config.get_text_config()  # type: ignore[operator, union-attr]


def decoder_layers(llm: nn.Module, path: str | None = None) -> list[nn.Module]:
    """The decoder layers, found by structure: the one ModuleList as long as `config.num_hidden_layers`.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        path: name of the ModuleList (as in `llm.named_modules()`), for a model where structure does not decide.

    Raises:
        ATVError: no list, or several, or no list of that name; the message lists the candidates.
    """
    lists = {name: module for name, module in llm.named_modules() if isinstance(module, nn.ModuleList)}
    described = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    if path is not None:
        if path not in lists:
            raise ATVError(f"{type(llm).__name__} has no ModuleList named {path!r}; it has: {described}.")
        return list(lists[path])
    count = getattr(text_config(llm), "num_hidden_layers", None)
    found = [name for name, module in lists.items() if len(module) == count]
    # A list inside another (experts inside a layer) is not the list of layers.
    found = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    if len(found) != 1:
        raise ATVError(
            f"{type(llm).__name__} has {len(found)} ModuleLists of {count or 'an unstated number of'} layers "
            f"({', '.join(found) or 'none'}); expected exactly one. Name it with layer_path; candidates: {described}."
        )
    return list(lists[found[0]])


def attention_and_mlp(llm: nn.Module, path: str | None = None) -> list[tuple[nn.Module, nn.Module]]:
    """The attention module and the MLP of each decoder layer, found by structure: the two children with matrices.

    An MLP may be written out in the layer as bare linear maps: its output is then that of the map that ends in the
    width of the residual stream.

    Raises:
        ATVError: a layer that is built otherwise; the message lists its children.
    """
    hidden = text_config(llm).hidden_size
    found = []
    for layer in decoder_layers(llm, path):
        attention: list[nn.Module] = []
        others: list[nn.Module] = []
        for name, child in layer.named_children():
            matrices = any(tensor.dim() > 1 for tensor in chain(child.parameters(), child.buffers()))
            if matrices and getattr(child, "out_features", hidden) == hidden:
                named = f"{name} {type(child).__name__}".lower()
                (attention if "attention" in named or "attn" in named else others).append(child)
        if len(attention) != 1 or len(others) != 1:
            children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
            raise ATVError(
                f"{type(layer).__name__} has {len(attention)} attention modules and {len(others)} others with weights; "
                f"expected one of each. Its children are: {children}."
            )
        found.append((attention[0], others[0]))
    return found


SITES: dict[str, Callable[[nn.Module, str | None], Sequence[nn.Module]]] = {
    "layer": decoder_layers,
    "attention": lambda llm, path: [attention for attention, _ in attention_and_mlp(llm, path)],
    "mlp": lambda llm, path: [mlp for _, mlp in attention_and_mlp(llm, path)],
}
"""Where an LLM can be edited: by name, a function from the LLM and the path of its list of decoder layers to one module
for each of them. Add one of your own before an adapter with it is made or loaded."""


def _hidden(module: nn.Module, output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise ATVError(
            f"{type(module).__name__} returned {type(output).__name__}; expected hidden states as a tensor, or a "
            "tuple or list that begins with them."
        )
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """What a module returned, with other hidden states in it; nothing is written to."""
    if isinstance(output, Tensor):
        return hidden
    rest = (hidden, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)  # a named tuple takes them singly


def _streams(module: nn.Module, hidden: Tensor) -> tuple[Tensor, int] | None:
    """A view of hidden states with parallel residual streams on an axis of their own, and that axis; None for one.

    Gemma 3n's AltUp puts them before (batch, seq, hidden), the hyper-connections of DeepSeek V4 behind (batch, seq),
    and those of Qwen 4 into the width.
    """
    config: Any = next((part.config for part in module.modules() if hasattr(part, "config")), None)
    folded = getattr(config, "hc_count", None) or 1
    if folded > 1 and hidden.shape[-1] == folded * config.hidden_size:
        return hidden.unflatten(-1, (folded, -1)), 2
    if hidden.dim() < 4:  # some modules take (batch * seq, hidden)
        return None
    for count, axis in (("altup_num_inputs", 0), ("hc_mult", 2)):
        if getattr(config, count, None) == hidden.shape[axis]:
            return hidden, axis
    raise ATVError(
        f"{type(module).__name__} returned states of shape {tuple(hidden.shape)}; expected (batch, seq, hidden): where "
        "the residual stream is in them is not known."
    )


def _read(module: nn.Module, output: Any) -> Tensor:
    """Hidden states (batch, seq, hidden), of parallel streams their mean."""
    hidden = _hidden(module, output)
    streams = _streams(module, hidden)
    return hidden if streams is None else streams[0].mean(streams[1])


@contextmanager
def edit_outputs(modules: Sequence[nn.Module], edit: Edit) -> Iterator[None]:
    """Replace each module's hidden states by `edit(index, hidden)` while the context lasts.

    Edits run before every other hook of a module, so that whoever looks at it sees the edited states, whenever it
    began to look.

    Args:
        modules: modules that return hidden states (batch, seq, hidden), as a tensor or first in a tuple or list.
        edit: called with the module's place in `modules` and its hidden states; returns a new tensor of the same
            shape, or the same tensor to leave it alone. It must not write into the tensor that it is given. Where an
            LLM keeps several residual streams beside each other, it is called for each of them.

    Raises:
        ATVError: in the call, from a module that returns anything else.
    """

    def hook(index: int, module: nn.Module, _: Any, output: Any) -> Any:
        if not here():
            return None
        hidden = _hidden(module, output)
        found = _streams(module, hidden)
        if found is None:
            edited = edit(index, hidden)
            return None if edited is hidden else _with_hidden(output, edited)  # None: nothing replaced
        streams = found[0].unbind(found[1])
        changed = [edit(index, stream) for stream in streams]
        if all(new is old for new, old in zip(changed, streams, strict=True)):
            return None
        return _with_hidden(output, torch.stack(changed, found[1]).view_as(hidden))

    register = (partial(m.register_forward_hook, partial(hook, i), prepend=True) for i, m in enumerate(modules))
    with scope() as here, eager(), hooked(*register):
        yield


@contextmanager
def capture_outputs(modules: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Collect each module's latest hidden states, edited ones as edited, detached, by its place in `modules`.

    Each is (batch, seq, hidden), of parallel residual streams their mean.

    Raises:
        ATVError: when the context ends, if a module was not called: some LLMs leave layers out where a prompt has no
            image.
    """
    captured: dict[int, Tensor] = {}

    def keep(index: int, module: nn.Module, _: Any, output: Any) -> None:
        if here():
            captured[index] = _read(module, output).detach()

    register = (partial(module.register_forward_hook, partial(keep, index)) for index, module in enumerate(modules))
    with scope() as here, eager(), hooked(*register):
        yield captured
    if left_out := [index for index in range(len(modules)) if index not in captured]:
        names = ", ".join(sorted({type(modules[index]).__name__ for index in left_out}))
        raise ATVError(
            f"The LLM did not call {names} ({', '.join(map(str, left_out))} of those asked for, counted from 0) when "
            "it read a text: a vector there would change nothing. Choose layers without them."
        )


class _Reached(Exception):
    """Ends a forward pass at the layer whose output was wanted."""


def accepted(llm: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the named inputs that this LLM's signature has."""
    known = inspect.signature(base_llm(llm).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def read_up_to(llm: nn.Module, layer: nn.Module, **inputs: Any) -> Tensor:
    """Hidden states (batch, seq, hidden) that a decoder layer returns, from a pass that ends there.

    The layers after it and the head are not run, and nobody steers this pass.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        layer: one of its decoder layers.
        inputs: of the LLM; those that its signature does not have are left out.
    """

    def stop(module: nn.Module, _: Any, output: Any) -> None:
        if here():
            raise _Reached(_read(module, output))

    with scope() as here, eager(), unsteered(), hooked(partial(layer.register_forward_hook, stop)):
        try:
            base_llm(llm)(**accepted(llm, inputs))
        except _Reached as reached:
            return cast(Tensor, reached.args[0])
    raise ATVError(f"{type(llm).__name__} did not call its decoder layer {type(layer).__name__} in a forward pass.")


@contextmanager
def flat_head(llm: nn.Module) -> Iterator[None]:
    """Let the language-model head see its input as (batch * seq, hidden) while the context lasts.

    A model that keeps the logits of its last columns gives its head a slice that is not contiguous. With frozen
    weights torch then multiplies batch-wise and copies the head's weights once per row: on a CPU with a head of
    49,152 x 576 and 16 rows the forward pass of a training step took 3.7 s, and 1.2 s without. The result is the same.
    """
    head = base_llm(llm).get_output_embeddings()  # type: ignore[operator]
    shapes: list[Any] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not here():
            return args
        shapes.append(args[0].shape[:-1])
        return (args[0].flatten(0, -2), *args[1:])

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.unflatten(0, shapes.pop()) if here() else output

    register = [] if head is None else [
        partial(head.register_forward_pre_hook, before), partial(head.register_forward_hook, after)
    ]  # fmt: skip
    with scope() as here, hooked(*register):
        yield
