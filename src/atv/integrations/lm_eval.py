"""Evaluate adapters with lm-eval, the Language Model Evaluation Harness, as its model `atv`.

    simple_evaluate(ATVLM("runs/train", query_field="question"), tasks=["arc_easy"])

`ATVLM` is lm-eval's own model for Hugging Face LLMs, `HFLM`, in which a trained method steers or adapts the LLM. Which
tokens are steered follows from the length of each context, as in `atv eval`: the last token of the context is the last
token of the prompt, and the continuation is the answer.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from torch import Tensor, nn

from atv import artifact
from atv.config import SELF
from atv.data import Example, Prompt, check_chat_template, query_renderer, trained_task
from atv.data.chat import Chat, has_chat_template, opening
from atv.data.collate import pad, pad_id
from atv.data.task import not_text, text_of
from atv.errors import ATVError, unknown
from atv.evaluation.measure import Frozen
from atv.generator import CONSTANT
from atv.lm.hooks import base_llm, input_device
from atv.lm.hooks import quantization as quantization_of
from atv.lm.identity import llm_digest
from atv.lm.load import load_tokenizer
from atv.lm.prefix import call_llm
from atv.lm.quiet import errors_alone
from atv.lm.scoring import refusing_non_finite, require_finite
from atv.lm.spans import Lengths, Spans, Tracked
from atv.methods import METHODS
from atv.methods.atv import ATVMethod
from atv.methods.base import Method
from atv.methods.lora import AdaptedByLoRA
from atv.methods.peft_model import Adapted
from atv.model import ATVModel
from atv.processes import world_size
from atv.progress import bar, log, log_once
from atv.steer import Edit, steer
from atv.vector_cache import AdapterHash, VectorCache

OPTIONS = ("add_bos_token", "chat_template_args", "enable_thinking", "max_length", "prefix_token_id", "think_end_token")
"""Options of `HFLM` that apply to an LLM that has been loaded, and change its answers."""


class Context(str):
    """A text before an answer, and what the generator reads with it. lm-eval passes it on like any other string."""

    query: str

    def __new__(cls, text: str, query: str) -> Self:
        """Return the text with its query."""
        made = super().__new__(cls, text)
        made.query = query
        return made


class _Read(NamedTuple):
    """What the LLM reads to score a continuation, and the generator with it."""

    query: str
    context: tuple[int, ...]
    """Token ids, without white space at its end."""
    continuation: tuple[int, ...]
    """Its token ids without the last one, which is not read."""
    space: int
    """Number of tokens of the continuation that belong to the prompt."""


@register_model("atv")
class ATVLM(HFLM):
    """lm-eval's model of an LLM with an adapter.

    Args:
        adapter: folder or hub id of an adapter of a method that steers or adapts the LLM (`atv`, `fixed`, `lora`, ...),
            or an `ATVModel`.
        pretrained: the LLM, or its name; by default the one that the adapter names is loaded.
        query_field: field of the documents with the query. The generator reads it as in training: alone, or in its
            task's template. None: the generator reads the whole context, demonstrations included.
        training_task: name of the training task whose template is used; None: the only one.
        scale: strength of the vectors; by default the adapter's.
        dtype: dtype of the LLM, like the next four as for `atv.lm.load.load_llm`.
        device: cpu, cuda, ...
        quantization: 8bit or 4bit.
        revision: revision of the LLM on the hub.
        trust_remote_code: run code that comes with the LLM.
        batch_size: contexts per call of the LLM, or "auto" or "auto:N".
        max_batch_size: maximum for "auto".
        options: those of `HFLM` in `OPTIONS`.

    Raises:
        ATVError: there is no such adapter; its method does not work with prompts that lm-eval writes; the generator
            needs a query and none is named, or the reverse; an option is unknown.
    """

    def __init__(
        self,
        adapter: str | Path | ATVModel,
        pretrained: str | nn.Module | None = None,
        *,
        query_field: str | None = None,
        training_task: str | None = None,
        scale: float | None = None,
        dtype: str = "auto",
        device: str | None = None,
        quantization: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        **options: Any,
    ) -> None:
        if other := options.keys() - set(OPTIONS):
            own = [name for name in signature(type(self)).parameters if name != "options"]
            raise unknown("option of the model atv", min(other), (*OPTIONS, *own))
        if world_size() > 1:
            raise ATVError(
                f"lm-eval with an adapter runs in one process, and a launcher started {world_size()}; start one. "
                "device=auto spreads the LLM over several GPUs."
            )
        if scale is not None and not (isinstance(scale, int | float) and math.isfinite(scale)):
            raise ATVError(f"scale is {scale!r}; expected a number.")
        self.scale = None if scale is None else float(scale)
        loading = {"dtype": dtype, "device": device, "quantization": quantization, "revision": revision}
        self.method, training, digest = _loaded(adapter, pretrained, loading | {"trust_remote_code": trust_remote_code})
        if scale is not None and not isinstance(self.method, ATVMethod):
            raise ATVError(f"The method {self.method.name} has no scale; found scale {scale}: leave it out.")
        check_chat_template(training, self.method.tokenizer)
        self.query_field, self.task = query_field, trained_task(training, training_task)[0]
        self._query_of = _query_of(self.method, training, query_field, training_task)
        self._chats = any(not _is_plain(asked, self.method.tokenizer) for asked in training.get("tasks", {}).values())
        llm: Any = base_llm(self.method.llm)
        sizes = {"batch_size": batch_size, "max_batch_size": max_batch_size}
        with errors_alone(HFLM.__module__):  # it warns that the LLM is loaded
            super().__init__(pretrained=llm, tokenizer=self.method.tokenizer, **sizes, **options)
        about = [digest, llm_digest(llm), str(llm.dtype), quantization_of(llm), self.scale, query_field, training_task]
        self.identity = hashlib.sha256(json.dumps([*about, options], sort_keys=True).encode()).hexdigest()[:16]
        """Digest of everything that determines the answer to a request."""
        self._reading: Sequence[Context] = ()  # the contexts that `generate` reads next

    # ---- requests ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each request the log-probability of its continuation, and whether greedy decoding gives it."""
        found: list[tuple[float, bool]] = super().loglikelihood(self._with_queries(requests), disable_tqdm)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a generated text for each request."""
        if isinstance(self.method.llm, Adapted) and not isinstance(self.method.llm, AdaptedByLoRA):
            raise ATVError(
                f"Texts cannot be generated with the method {self.method.name}: generate of transformers does not use "
                "its learned keys and values. Choose tasks that compare options, or use atv eval."
            )
        found: list[str] = super().generate_until(self._with_queries(requests), disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Raise ATVError: a text without a context has no prompt that could be steered."""
        del disable_tqdm
        raise ATVError(
            f"The task {requests[0].task_name} measures the perplexity of whole texts. A vector is made from a query "
            "and added at the end of its prompt, and these texts have neither. Leave the task out, or measure the LLM "
            "without the adapter (--model hf)."
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation in the LLM's chat template."""
        if self.query_field is None and _reads(self.method):
            raise ATVError(
                "Prompts in a chat template were asked for, and without a query field the generator would read the "
                "template's marks, which it never did in training. Name the field with the query (query_field)."
            )
        self._chats = False
        text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        options = json.dumps(self.chat_template_args)
        return text + opening(self.tokenizer, Chat(template_kwargs=options)) if add_generation_prompt else text

    def _with_queries(self, requests: Sequence[Instance]) -> list[Instance]:
        if self._chats:
            log_once(
                "This adapter was trained on chats, and these prompts are plain texts: scores may be far from those of "
                "atv eval. Ask for the chat template (--apply_chat_template)."
            )
        return [replace(each, arguments=(self._context(each), *each.args[1:])) for each in requests]

    def _context(self, request: Instance) -> Context:
        context, doc = request.args[0], request.doc
        if self.query_field is None:
            return Context(context, self._query_of(context))
        where = f"The task {request.task_name}: a document"
        if self.query_field not in doc:
            raise ATVError(
                f"{where} has no field {self.query_field!r}; it has {', '.join(map(repr, doc))}. Name the field with "
                "the query (query_field)."
            )
        if (query := text_of(doc[self.query_field])) is None:
            raise not_text(where, repr(self.query_field), doc[self.query_field])
        if self.cache_hook.dbdict is not None and query.strip() not in context:
            raise ATVError(
                f"{where} has the {self.query_field} {query[:60]!r}, which is not in its prompt. lm-eval's cache finds "
                "answers by the prompt alone, so it could return those to another query: leave use_cache out."
            )
        return Context(context, self._query_of(query))

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use a cache of answers, in which the keys of this model begin with its `identity`.

        lm-eval's own keys are made of the request alone: all models that are given the same file share its answers.
        """
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            cache_hook.dbdict.encode_key = lambda key: f"{self.identity} {key}"

    # ---- calls of the LLM ----

    def _edit(self, prompts: Sequence[Prompt]) -> Edit | None:
        if not isinstance(self.method, ATVMethod):
            return self.method.edit(prompts)
        atv = self.method.atv
        return atv.edit(atv.own_vectors([prompt.query for prompt in prompts]), self.scale)

    @contextmanager
    def _steered(self, prompts: Sequence[Prompt], spans: Callable[..., Spans], *about: Any) -> Iterator[None]:
        """Open the context in which the LLM reads these prompts, in this order, with the method's edit."""
        edit = self._edit(prompts)
        with nullcontext() if edit is None else steer(self.method.llm, edit, spans(*about, edit.positions)):
            yield

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[Context, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return log-probabilities of continuations, each read together with its context.

        Requests that differ only in the last token of the continuation, which is not read, are read once. (`HFLM` also
        reads those once that split the same tokens elsewhere; steered, these are different texts.)
        """
        del override_bs  # of perplexities
        alike: dict[_Read, list[int]] = {}
        for number, ((context, continuation), before, after) in enumerate(requests):
            if not 0 < len(after) <= self.max_length:
                raise ATVError(
                    f"The continuation {continuation[:60]!r} has {len(after)} tokens; expected 1 to {self.max_length}, "
                    "which is the LLM's context."
                )
            read = _Read(context.query, tuple(before), tuple(after[:-1]), self._space(context, before, after))
            alike.setdefault(read, []).append(number)
        # as `HFLM` wants them to measure batch sizes: what is about a text, its context, its continuation
        texts = [((read, numbers), *requests[numbers[0]][1:]) for read, numbers in alike.items()]
        texts.sort(key=lambda text: -len(text[1]) - len(text[2]))
        if cut := sum(len(before) + len(after) > self.max_length + 1 for _, before, after in texts):
            log.warning(
                f"{cut} texts do not fit the LLM's context of {self.max_length} tokens: cut at their beginning."
            )
        self.batch_sizes: dict[int, int] = {}  # measured again, since these texts may be longer than the last ones
        size, measured = (0, self._batch_scheduler) if self.batch_size == "auto" else (self.batch_size, None)
        found: dict[int, tuple[float, bool]] = {}
        with nullcontext() if disable_tqdm else bar("lm-eval: continuations", len(requests)) as progress:
            for batch in Collator.get_chunks(texts, size, measured):
                following = self._following([read for (read, _), _, _ in batch])
                for ((_, numbers), _, _), logits in zip(batch, following, strict=True):
                    for number in numbers:
                        found[number] = _judged(logits, requests[number][2])
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
                    if progress is not None:
                        progress.advance(len(numbers))
        return [found[number] for number in range(len(requests))]

    def _space(self, context: str, before: list[int], after: list[int]) -> int:
        """Return how many tokens of a continuation are white space at the end of its context.

        lm-eval scores that white space with the continuation, but the prompt ends after it, as in `generate` and in
        training: chat templates end in a line break. 0 if a token spans both.
        """
        if context == context.rstrip():
            return 0
        prompt, whole = self.tok_encode(context), before + after
        return len(prompt) - len(before) if prompt == whole[: len(prompt)] and len(prompt) < len(whole) else 0

    def _following(self, texts: Sequence[_Read]) -> list[Tensor]:
        """Return for each text the logits that predict its continuation, (its tokens, vocabulary).

        They are float32, on the CPU. A text that is too long is cut at its beginning.
        """
        read = [[*text.context, *text.continuation][-self.max_length :] for text in texts]
        starts = [len(ids) - len(text.continuation) for ids, text in zip(read, texts, strict=True)]
        lengths = [start + text.space for start, text in zip(starts, texts, strict=True)]
        prompts = [
            Prompt(ids[:length], text.query, task=self.task)
            for ids, length, text in zip(read, lengths, texts, strict=True)
        ]
        ids, mask = pad(read, pad_id(self.tokenizer), "right")
        device, first = input_device(self.method.llm), min(starts) - 1
        with self._steered(prompts, Lengths, lengths):
            logits = call_llm(
                self.method.llm,
                keep=ids.shape[1] - first,
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                use_cache=False,
            ).logits  # (batch, columns from the first that predicts a continuation, vocabulary)
        return [
            row[start - 1 - first : len(ids) - first].float().cpu()
            for row, start, ids in zip(logits, starts, read, strict=True)
        ]

    def tok_batch_encode(self, strings: Sequence[Context], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return ids and mask of the contexts that `generate` reads next, (batch, seq), padded on the left."""
        self._reading = strings
        encoded: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **kwargs)
        return encoded

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Return the contexts and what the LLM generates after them, (batch, seq)."""
        prompts = [
            Prompt(ids, read.query, task=self.task) for ids, read in zip(context.tolist(), self._reading, strict=True)
        ]
        adapted: AbstractContextManager[None] = nullcontext()
        if isinstance(self.method.llm, Adapted):
            adapted = self.method.llm.inserted()
        with adapted, self._steered(prompts, Tracked, len(prompts)):
            return super()._model_generate(context, max_length, stop, **refusing_non_finite(kwargs))  # type: ignore[no-any-return]

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval records about the model: also method and digest of the adapter, scale and query field."""
        info: dict[str, Any] = super().get_model_info()
        info |= {"atv_method": self.method.name, "atv_query_field": self.query_field, "atv_identity": self.identity}
        if isinstance(self.method, ATVMethod):
            info["atv_scale"] = self.method.atv.config.scale if self.scale is None else self.scale
        return info


def _judged(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """Return the log-probability of a continuation, and whether greedy decoding gives it.

    Args:
        logits: those that predict its tokens, (tokens, vocabulary) float32.
        continuation: its tokens.
    """
    tokens = torch.tensor(continuation)
    scores = require_finite(logits).log_softmax(-1).gather(1, tokens[:, None])
    return scores.sum().item(), bool((logits.argmax(-1) == tokens).all())


# ---- the adapter ----


def _loaded(
    adapter: str | Path | ATVModel, pretrained: str | nn.Module | None, loading: dict[str, Any]
) -> tuple[Method, Mapping[str, Any], str]:
    """Return an adapter's method on its LLM, the summary of its training, and its digest."""
    given = next((name for name, value in loading.items() if value not in (None, False, "auto")), None)
    if given and (isinstance(adapter, ATVModel) or isinstance(pretrained, nn.Module)):
        raise ATVError(f"The LLM is loaded already; found {given} {loading[given]}: leave it out.")
    if isinstance(adapter, ATVModel):
        if pretrained is not None:
            raise ATVError("An ATVModel has its LLM; found pretrained too: leave it out.")
        return ATVMethod(adapter), adapter.training_summary, AdapterHash().of(adapter.atv, str(adapter.config))
    folder = artifact.locate(str(adapter))
    saved = artifact.read(folder)
    _require_usable(saved.method, folder)
    if isinstance(pretrained, nn.Module):
        llm, tokenizer = pretrained, load_tokenizer(str(base_llm(pretrained).name_or_path))
    else:
        llm, tokenizer = Frozen(pretrained or saved.base_llm["name"], **loading).load()
    method = METHODS[saved.method].load(llm, tokenizer, folder)
    if isinstance(method, ATVMethod):
        method.atv.vector_cache.limit = VectorCache().limit  # a query has a request for each of its options
    return method, saved.training, artifact.identity(folder)


def _require_usable(name: str, folder: Path) -> None:
    """Raise ATVError for a method that does not work with prompts that are given."""
    if name not in METHODS:
        raise ATVError(f"{folder} is an adapter of the method {name}, which is not known here.")
    method = METHODS[name]
    if method.choose is not Method.choose or method.prompts is not Method.prompts or method.shots:
        raise ATVError(
            f"{folder} is an adapter of the method {name}, which writes prompts or chooses answers itself; lm-eval "
            "writes the prompts, and the LLM answers. Expected a method that steers or adapts the LLM, such as atv, "
            "fixed or lora; to measure this one, use atv eval."
        )


def _query_of(
    method: Method, training: Mapping[str, Any], query_field: str | None, training_task: str | None
) -> Callable[[str], str]:
    """Return the function from a query, or without a query field from a whole context, to what the generator reads."""
    if not _reads(method):
        if query_field is not None:
            raise ATVError(
                f"What the method {method.name} does here does not depend on a query, or it reads the LLM's own "
                f"prompts; found the query field {query_field!r}: leave it out."
            )
        return lambda _: "not read"
    tasks: Mapping[str, Any] = training.get("tasks", {})
    if query_field is None:
        if method.reads != "prompt" or not all(_is_plain(asked, method.tokenizer) for asked in tasks.values()):
            what = "the query alone" if method.reads == "query" else "queries without the marks of a chat"
            raise ATVError(
                f"This adapter has learned from {what}, and lm-eval's prompts hold more. Name the field of the "
                "documents with the query (query_field)."
            )
        return str
    if method.reads == "query":
        return str
    if (
        training_task is None
        and len({(tuple(a["templates"][:1]), a["answer_prefixes"][0]) for a in tasks.values()}) > 1
    ):
        raise ATVError(
            "This adapter has learned from several tasks, and its generator reads the query in the template of its "
            f"task. Name one of them (training_task): {', '.join(tasks)}."
        )
    render = query_renderer(training, method.reads, training_task or next(iter(tasks), None))
    return lambda query: render.prompt(method.tokenizer, Example(query, "")).query


def _reads(method: Method) -> bool:
    """Whether a method's edit depends on a text that is not read by the LLM itself."""
    if isinstance(method, ATVMethod):
        return method.atv.config.generator not in (SELF, CONSTANT)
    return method.edited_tokens != 0


def _is_plain(asked: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether a training task's prompts were plain texts, so that the generator read what the LLM read."""
    written = asked["renderer"].get("format")
    return written == "template" or (written == "auto" and not has_chat_template(tokenizer))
