"""The wiring self-test: does this ATV steer this LLM as specified, and change nothing else?

If a library changes what a layer returns, steering fails silently: vectors are added to the wrong tokens, or no
gradient arrives. Each check tests one property on the actual model, in seconds.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from atv.data.collate import Row, edit_mask
from atv.data.render import INPUT, Example, Template
from atv.errors import ATVError
from atv.lm.hooks import base_llm, capture_outputs, decoder_layers, quantization
from atv.lm.prefix import call_llm, steered_logits
from atv.lm.spans import Known
from atv.model import ATVModel
from atv.steer import steer

PROMPTS = (
    "The harbour was quiet before the first boats came in.\nA:",
    "Two and two are four, and four and four are eight; what comes after that?\nA:",
    "Short one.\nA:",
)
QUERIES = ("The harbour was quiet.", "Two and two are four.", "Short one.")


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    found: str


def check_wiring(atv: ATVModel) -> list[Check]:
    """Run every check on `atv`; its weights, gradients, modes and the random state stay unchanged.

    The test vectors are strong (a tenth of the residual stream's norm at every layer), so that a wrong position or a
    lost edit changes the logits far beyond rounding in any dtype.
    """
    state = torch.get_rng_state()
    was_training = atv.training
    atv.eval()
    try:
        checks = CHECKS if atv.own is None else (*CHECKS, OWN_CHECK)
        with _not_zero(atv.expansion):
            return [_run(name, check, atv) for name, check in checks]
    finally:
        atv.train(was_training)
        torch.set_rng_state(state)


def require_wiring(atv: ATVModel) -> None:
    """Raise ATVError that names each failed check."""
    failed = [check for check in check_wiring(atv) if not check.passed]
    if failed:
        described = "; ".join(f"{check.name}: {check.found}" for check in failed)
        raise ATVError(f"The wiring self-test failed, so training would be wrong. {described}. See: atv doctor")


@contextmanager
def _not_zero(expansion: nn.Module) -> Iterator[None]:
    """Put random numbers in place of all-zero weights, through which no gradient would reach the generator."""
    zeros = [p for p in expansion.parameters() if not p.any()]
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in zeros:
                p.copy_(torch.randn(p.shape, generator=draw) / max(1, p.shape[-1]) ** 0.5)
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def _run(name: str, check: Callable[[ATVModel], tuple[bool, str]], atv: ATVModel) -> Check:
    try:
        passed, found = check(atv)
    except Exception as error:
        passed, found = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return Check(name, passed, found)


# ---- tools ----


def _test_vectors(atv: ATVModel, queries: int) -> Tensor:
    """Return random vectors (queries, layers, hidden), each a tenth as large as the residual stream at its layer.

    Where a site is an attention module or an MLP, the size is still that of the residual stream: a vector relative to
    the module's own output could be lost in rounding.
    """
    inputs = atv.encode_prompts(PROMPTS[:1])
    home = {part: layer for layer in decoder_layers(atv.llm, atv.config.layer_path) for part in layer.modules()}
    with capture_outputs([home.get(site, site) for site in atv.layers]) as states:
        _plain(atv, inputs)
    sizes: Tensor = torch.stack([states[index].float().norm(dim=-1)[0, -1].cpu() for index in range(len(atv.layers))])
    noise = torch.randn(queries, *atv.expansion.shape, generator=torch.Generator().manual_seed(0))
    sizes = sizes.repeat_interleave(atv.expansion.shape[0] // len(sizes))
    return cast(Tensor, 0.1 * sizes[None, :, None] * noise / noise.norm(dim=-1, keepdim=True))


@torch.no_grad()
def _plain(atv: ATVModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits (batch, vocabulary) of the last column."""
    return cast(Tensor, call_llm(atv.llm, keep=1, use_cache=False, **inputs).logits[:, -1].float())


@torch.no_grad()
def _steered(atv: ATVModel, prompts: Sequence[str], vectors: Tensor) -> Tensor:
    with atv.steer(prompts, vectors=vectors, scale=1.0):
        return _plain(atv, atv.encode_prompts(prompts))


def _tolerance(atv: ATVModel) -> float:
    """Return the largest difference that rounding explains, as a share of what steering changes."""
    # 8 bit multiplies in float16, and its outliers depend on the whole batch.
    rough = quantization(atv.llm) == "8bit" or next(atv.llm.parameters()).dtype in (torch.bfloat16, torch.float16)
    return 0.25 if rough else 1e-3


def _close(
    atv: ATVModel, found: Tensor, expected: Tensor, plain: Tensor, unsteered: Tensor | None = None
) -> tuple[bool, str]:
    """Compare steered logits to the expected ones, relative to the effect of steering.

    Args:
        atv: the model under test.
        found: logits, of any shape, like the next three.
        expected: what they should be.
        plain: `expected` without steering.
        unsteered: `found` without steering, to tell whether the LLM itself causes a difference; None: unknown.
    """
    effect = (expected - plain).abs().mean().item()
    share = (found - expected).abs().mean().item() / effect if effect else float("inf")
    passed, words = share <= _tolerance(atv), f"differs by {share:.1e} of what steering changes"
    own = (unsteered - plain).abs().mean().item() / effect if unsteered is not None and effect else 0.0
    if not passed and own > _tolerance(atv):
        words += f"; the unsteered LLM by {own:.1e}: padding changes its answers"
    return passed, words


# ---- checks ----


def _gradient(atv: ATVModel) -> tuple[bool, str]:
    """The gradient must exist and not be zero: with a vector at the wrong token it is exactly zero."""
    rows = [atv.encode_row(Row(Example(prompt, "yes"), (Template(INPUT),))) for prompt in PROMPTS]
    device = next(atv.parameters()).device
    batch = {name: value.to(device) for name, value in atv.collator()(rows).items()}
    parameters = [p for p in atv.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = atv(**batch).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    llm_reached = [name for name, p in atv.llm.named_parameters() if p.requires_grad or p.grad is not None]
    of = dict(zip(map(id, parameters), gradients, strict=True))

    def largest(module: torch.nn.Module) -> float:
        found = [of.get(id(p)) for p in module.parameters()]
        return max((g.abs().max().item() for g in found if g is not None), default=0.0)

    parts = {"expansion": largest(atv.expansion)}
    if atv.config.train_generator:
        parts["generator"] = largest(atv.generator)
    zero = [name for name, size in parts.items() if not size > 0]
    found = ", ".join(f"{name} {size:.1e}" for name, size in parts.items())
    if llm_reached:
        return False, f"LLM weights take a gradient: {', '.join(llm_reached[:3])}"
    return not zero, f"largest gradient: {found}"


def _positions(atv: ATVModel) -> tuple[bool, str]:
    """At the first steered layer edits have not spread yet: exactly the requested tokens must have changed."""
    inputs = atv.encode_prompts(PROMPTS)
    vectors = _test_vectors(atv, len(PROMPTS))
    with torch.no_grad():
        with capture_outputs(atv.layers[:1]) as before:
            _plain(atv, inputs)
        with atv.steer(PROMPTS, vectors=vectors, scale=1.0), capture_outputs(atv.layers[:1]) as after:
            _plain(atv, inputs)
    attended = inputs["attention_mask"].bool()
    count = atv.positions.prompt_tokens
    asked = attended.clone()
    if count is not None:
        for row, length in enumerate(attended.sum(1).tolist()):
            asked[row, : attended.shape[1] - min(count, length)] = False
    changed = (before[0] != after[0]).any(-1).to(asked.device)
    wrong = int((changed != asked).sum())
    return wrong == 0, f"{int(changed.sum())} tokens changed, {int(asked.sum())} asked for, {wrong} mismatches"


def _scale_zero(atv: ATVModel) -> tuple[bool, str]:
    inputs = atv.encode_prompts(PROMPTS)
    plain = _plain(atv, inputs)
    vectors = _test_vectors(atv, len(PROMPTS))
    everywhere = inputs["attention_mask"].bool()
    with steer(atv.llm, atv.edit(vectors, 0.0), Known(everywhere)):
        zero = _plain(atv, inputs)
    different = int((plain != zero).sum())
    return different == 0, f"{different} of {plain.numel()} logits differ"


def _batch_single(atv: ATVModel) -> tuple[bool, str]:
    """Compare each row of a padded batch to the same prompt alone: neither other rows' vectors nor padding matter."""
    vectors = _test_vectors(atv, len(PROMPTS))
    together = _steered(atv, PROMPTS, vectors)
    alone = torch.cat([_steered(atv, [p], vectors[i : i + 1]) for i, p in enumerate(PROMPTS)])
    plain = torch.cat([_plain(atv, atv.encode_prompts([p])) for p in PROMPTS])
    return _close(atv, together, alone, plain, _plain(atv, atv.encode_prompts(PROMPTS)))


def _padded(atv: ATVModel) -> tuple[bool, str]:
    prompt = PROMPTS[0]
    vectors = _test_vectors(atv, 1)
    inputs = atv.encode_prompts([prompt])
    wider = {name: torch.nn.functional.pad(value, (5, 0)) for name, value in inputs.items()}
    with atv.steer([prompt], vectors=vectors, scale=1.0):
        padded = _plain(atv, wider)
    return _close(atv, padded, _steered(atv, [prompt], vectors), _plain(atv, inputs), _plain(atv, wider))


def _cached(atv: ATVModel) -> tuple[bool, str]:
    """Compare greedy decoding with a cache to recomputing everything at each step, both steered."""
    vectors = _test_vectors(atv, len(PROMPTS))
    inputs = atv.encode_prompts(PROMPTS)
    inputs.pop("position_ids")
    options: dict[str, Any] = {
        "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    llm: Any = atv.llm
    results = {}
    with torch.no_grad():
        for name, use_cache in (("cached", True), ("recomputed", False)):
            with atv.steer(PROMPTS, vectors=vectors, scale=1.0):
                results[name] = llm.generate(**inputs, **options, use_cache=use_cache)
        plain = llm.generate(**inputs, **options)
    # Rounding may flip a near tie, after which the texts differ: compare up to that token.
    tokens = {name: result.sequences[:, -3:] for name, result in results.items()}
    same = (tokens["cached"] == tokens["recomputed"]).cumprod(1).bool()
    comparable = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1)  # (batch, 3)
    logits = {name: torch.stack(result.logits, 1).float()[comparable] for name, result in results.items()}
    unsteered = torch.stack(plain.logits, 1).float()[comparable]
    return _close(atv, logits["cached"], logits["recomputed"], unsteered)


def _split(atv: ATVModel) -> tuple[bool, str]:
    """Compare a training step's pass (prefix first, the rest with gradient) to one pass over all columns."""
    vectors = _test_vectors(atv, len(PROMPTS))
    inputs = atv.encode_prompts(PROMPTS)
    ids, mask, places = (inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    learned = vectors.clone().requires_grad_()
    with torch.enable_grad():
        logits = steered_logits(
            atv.llm,
            lambda where: steer(atv.llm, atv.edit(learned, 1.0), Known(where)),
            *(ids, mask, places, edit_mask(mask, atv.positions)),
            keep=1,
        )
    return _close(atv, logits[:, -1].detach().float(), _steered(atv, PROMPTS, vectors), _plain(atv, inputs))


def _vectors_alone(atv: ATVModel) -> tuple[bool, str]:
    """Compare vectors of queries read in a batch and alone: they differ if the generator attends to padding."""
    queries = QUERIES if atv.own is None else PROMPTS
    together = atv.atv.make_vectors(queries)
    alone = torch.cat([atv.atv.make_vectors([query]) for query in queries])
    difference = (together - alone).abs().mean().item()
    spread = (together - together.mean(0)).abs().mean().item()
    share = difference / spread if spread else float(difference > 0)
    rough = _tolerance(atv) if atv.own else 0.01  # other generators compute in float32
    return share <= rough, f"differs by {share:.1e} of what queries differ by"


def _own(atv: ATVModel) -> tuple[bool, str]:
    """Compare vectors made in the pass that they steer to vectors made beforehand, for a padded batch."""
    inputs = atv.encode_prompts(PROMPTS)
    plain, sizes = _plain(atv, inputs), _test_vectors(atv, 1).norm()
    made = atv.task_vectors(PROMPTS)
    scale = float(sizes / made[0].norm())
    with torch.no_grad():
        with atv.steer(PROMPTS, scale=scale):
            in_pass = _plain(atv, inputs)
        with atv.steer(PROMPTS, vectors=made, scale=scale):
            beforehand = _plain(atv, inputs)
    return _close(atv, in_pass, beforehand, plain)


CHECKS: tuple[tuple[str, Callable[[ATVModel], tuple[bool, str]]], ...] = (
    ("gradient reaches generator and expansion, and no LLM weight", _gradient),
    ("the tokens that changed are those asked for", _positions),
    ("scale 0 gives the base model's logits bit for bit", _scale_zero),
    ("batch = single", _batch_single),
    ("padded = unpadded", _padded),
    ("cached = recomputed", _cached),
    ("training step = full pass", _split),
    ("vectors of a query in a batch = alone", _vectors_alone),
)
OWN_CHECK = ("vectors made in the pass = made beforehand", _own)
"""Only for the generator `self`."""


def model_summary(atv: ATVModel) -> str:
    """Return one line that describes what was tested."""
    weights = quantization(atv.llm) or next(atv.llm.parameters()).dtype
    return (
        f"{base_llm(atv.llm).name_or_path}: {len(atv.layers)} steered layers, width {atv.expansion.shape[1]}, "
        f"{weights}; generator {atv.generator.describe()}, pooling {atv.config.pooling}"
    )
