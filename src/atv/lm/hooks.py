"""Find an LLM's decoder layers, and edit or read their outputs, without modifying the LLM.

Everything that changes a model's behaviour is a context manager around forward hooks. The module tree, its names and
its weights stay the same, and the hooks are removed when the context ends, also after an exception.
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
    """Set attributes to modules without registering them as submodules: the LLM's weights are not the owner's."""
    for name, value in values.items():
        object.__setattr__(owner, name, value)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that was passed to ``torch.compile``; any other module unchanged."""
    return cast(nn.Module, getattr(module, "_orig_mod", module))


def require_eval(model: nn.Module) -> None:
    """Set eval mode if a part of the model is in training mode; looking costs a fifth of setting it."""
    if any(module.training for module in model.modules()):
        model.eval()


def base_llm(llm: nn.Module) -> nn.Module:
    """Return the Hugging Face model inside a PEFT wrapper (whose `generate` calls it), or the model itself."""
    unwrap = getattr(llm, "get_base_model", None)
    return uncompiled(unwrap() if callable(unwrap) else llm)


def input_device(llm: nn.Module) -> torch.device:
    """Return the device for an LLM's input ids: that of its embeddings, or where accelerate runs offloaded ones."""
    embeddings = base_llm(llm).get_input_embeddings()  # type: ignore[operator]
    weight: Tensor = embeddings.weight
    return torch.device(embeddings._hf_hook.execution_device) if weight.is_meta else weight.device


def quantization(llm: nn.Module) -> str | None:
    """Return `8bit` or `4bit` for bitsandbytes weights, the name of any other quantisation, None for plain weights."""
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

    On CPUs with AVX512-BF16 it does so at the first call without gradient. After that no gradient passes through a
    layer; only the residual stream still carries one, so nothing seems wrong.
    """
    for module in llm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - unknown to nn.Module's types


def text_config(llm: nn.Module) -> Any:
    """Return the configuration of a Hugging Face model's language part."""
    return base_llm(llm).config.get_text_config()  # type: ignore[operator, union-attr]


def decoder_layers(llm: nn.Module, path: str | None = None) -> list[nn.Module]:
    """Return the decoder layers, found by structure: the only ModuleList of length `config.num_hidden_layers`.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        path: name of the ModuleList (as in `llm.named_modules()`), if the structure is ambiguous.

    Raises:
        ATVError: there is no such list, or several, or none of that name; the message lists the candidates.
    """
    lists = {name: module for name, module in llm.named_modules() if isinstance(module, nn.ModuleList)}
    described = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    if path is not None:
        if path not in lists:
            raise ATVError(f"{type(llm).__name__} has no ModuleList named {path!r}; it has: {described}.")
        return list(lists[path])
    count = getattr(text_config(llm), "num_hidden_layers", None)
    found = [name for name, module in lists.items() if len(module) == count]
    # A list inside another one (experts inside a layer) is not the list of layers.
    found = [name for name in found if not any(name.startswith(outer + ".") for outer in found)]
    if len(found) != 1:
        raise ATVError(
            f"{type(llm).__name__} has {len(found)} ModuleLists of {count or 'an unstated number of'} layers "
            f"({', '.join(found) or 'none'}); expected exactly one. Name it with layer_path; candidates: {described}."
        )
    return list(lists[found[0]])


def attention_and_mlp(llm: nn.Module, path: str | None = None) -> list[tuple[nn.Module, nn.Module]]:
    """Return each decoder layer's attention module and MLP, found by structure: the two children with matrices.

    If a layer contains its MLP as bare linear maps, the MLP is the map whose output has the width of the residual
    stream.

    Raises:
        ATVError: a layer has a different structure; the message lists its children.
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
"""Sites at which an LLM can be edited, by name: functions from the LLM and the path of its list of decoder layers to
one module per layer. Register a custom site before making or loading an adapter with it."""


def _hidden(module: nn.Module, output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise ATVError(
            f"{type(module).__name__} returned {type(output).__name__}; expected hidden states as a tensor, or a "
            "tuple or list that begins with them."
        )
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """Return a module's output with other hidden states in it; the output is not modified in place."""
    if isinstance(output, Tensor):
        return hidden
    rest = (hidden, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)  # a named tuple takes them singly


def _streams(module: nn.Module, hidden: Tensor) -> tuple[Tensor, int] | None:
    """Return hidden states viewed with an axis for parallel residual streams, and that axis; None for one stream.

    Gemma 3n's AltUp puts the axis before (batch, seq, hidden), the hyper-connections of DeepSeek V4 after (batch, seq),
    and those of Qwen 4 fold it into the width.
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
        f"{type(module).__name__} returned states of shape {tuple(hidden.shape)}; expected (batch, seq, hidden). It is "
        "unknown where the residual stream is."
    )


def _read(module: nn.Module, output: Any) -> Tensor:
    """Return hidden states (batch, seq, hidden); of parallel streams, their mean."""
    hidden = _hidden(module, output)
    streams = _streams(module, hidden)
    return hidden if streams is None else streams[0].mean(streams[1])


@contextmanager
def edit_outputs(modules: Sequence[nn.Module], edit: Edit) -> Iterator[None]:
    """Replace each module's hidden states by `edit(index, hidden)` inside this context.

    Edits run before all other hooks of a module, so every other hook sees the edited states, whenever it was
    registered.

    Args:
        modules: modules that return hidden states (batch, seq, hidden), as a tensor or first in a tuple or list.
        edit: called with the module's index in `modules` and its hidden states; returns a new tensor of the same
            shape, or the same tensor to leave it unchanged. It must not modify its input in place. If an LLM has
            several parallel residual streams, it is called for each of them.

    Raises:
        ATVError: during the call, if a module returns anything else.
    """

    def hook(index: int, module: nn.Module, _: Any, output: Any) -> Any:
        if not here():
            return None
        hidden = _hidden(module, output)
        found = _streams(module, hidden)
        if found is None:
            edited = edit(index, hidden)
            return None if edited is hidden else _with_hidden(output, edited)  # None: keep the output
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
    """Collect each module's latest hidden states, after edits, detached, by its index in `modules`.

    Each is (batch, seq, hidden); of parallel residual streams, their mean.

    Raises:
        ATVError: when the context ends, if a module was not called: some LLMs skip layers if a prompt has no image.
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
    """Ends a forward pass at the requested layer."""


def accepted(llm: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the named inputs that this LLM's signature accepts."""
    known = inspect.signature(base_llm(llm).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def read_up_to(llm: nn.Module, layer: nn.Module, **inputs: Any) -> Tensor:
    """Return a decoder layer's hidden states (batch, seq, hidden), from an unsteered pass that ends there.

    The layers after it and the head do not run.

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not.
        layer: one of its decoder layers.
        inputs: inputs of the LLM; those that its signature does not accept are ignored.
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
    """Flatten the language-model head's input to (batch * seq, hidden) inside this context.

    A model that keeps only the logits of its last columns passes a non-contiguous slice to its head. With frozen
    weights torch then multiplies batch-wise and copies the head's weights once per row: on a CPU with a head of
    49,152 x 576 and 16 rows, the forward pass of a training step took 3.7 s, and 1.2 s with this. The result is equal.
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
