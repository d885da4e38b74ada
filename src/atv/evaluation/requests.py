"""Requests to an LLM about a task's prompts, in one pass over the prompts for all metrics."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from atv.data import Renderer, Task
from atv.data.render import answer_ids
from atv.errors import ATVError
from atv.evaluation.metrics import Likelihoods, Need, NextToken
from atv.lm.continuation import Continuation
from atv.lm.hooks import base_llm
from atv.lm.scoring import Options, longest_answer, task_options
from atv.methods.base import Choice
from atv.progress import warn_once

MOST_TOKENS = 256
"""Maximum length of a generated answer, even if the task has longer answers."""


class Requests:
    """The requests about one task in one variant.

    An answer is generated greedily. It ends at an end-of-text token, at a line break unless one of the task's answers
    contains one, or at the length of the task's longest answer (at most `MOST_TOKENS` tokens).

    Args:
        llm: the LLM, which knows its end-of-text tokens.
        tokenizer: the LLM's.
        task: the task.
        render: renders the prompts.
        needs: the needs of all metrics.

    Raises:
        ATVError: options are needed, but an answer is not an option or two options have the same tokens.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any, task: Task, render: Renderer, needs: Collection[Need]) -> None:
        self.llm, self.tokenizer, self.render, self.needs = llm, tokenizer, render, frozenset(needs)
        # If answers are only generated, options are not encoded.
        options = self.needs & {"next_token", "loglikelihood"}
        self.options: Options | None = task_options(tokenizer, task, render) if options else None
        self._lines = any("\n" in option for option in task.options)
        self._ends = _end_ids(llm, tokenizer)
        self.limit = 1
        if "generate" in self.needs:
            longest = longest_answer(tokenizer, task, render)
            self.limit = min(longest, MOST_TOKENS)
            if longest > MOST_TOKENS:
                warn_once(
                    f"{task.name}: its longest answer has {longest} tokens, and generated ones end after {MOST_TOKENS}."
                )

    @property
    def read_after(self) -> int:
        """Maximum number of tokens read after a prompt."""
        counts = [self.limit - 1]
        if self.options is not None and "next_token" in self.needs:
            counts.append(self.options.longest)
        if self.options is not None and "loglikelihood" in self.needs:
            counts += [len(ids) - (number not in self.options.continued) for number, ids in enumerate(self.options.ids)]
        return max(counts)

    @property
    def continues(self) -> bool:
        """Whether tokens may be read after the prompts, so that their keys and values are needed."""
        return self.read_after > 0

    def outputs(self, inputs: Mapping[str, Tensor], output: Any) -> list[dict[Need, Any]]:
        """The metrics' inputs for each prompt of a batch. Call it inside the context that steers the LLM.

        Args:
            inputs: inputs of the call that read the prompts, all columns, as for `Continuation`.
            output: output of that call, with a cache if `continues`.
        """
        behind = Continuation(self.llm, inputs, output)
        found: list[dict[Need, Any]] = [{} for _ in behind.logits]
        if self.options is not None and "next_token" in self.needs:
            best = behind.likeliest([self.options] * len(found))
            for each, token, option in zip(found, behind.logits.argmax(-1).tolist(), best, strict=True):
                each["next_token"] = NextToken(token, self.tokenizer.decode([token]), option, self.options)
        if self.options is not None and "loglikelihood" in self.needs:
            for each, values in zip(found, behind.log_likelihoods(self.options).tolist(), strict=True):
                each["loglikelihood"] = Likelihoods(self.options.texts, values)
        if "generate" in self.needs:
            for each, tokens in zip(found, behind.greedy(self.limit, self._ended), strict=True):
                each["generate"] = self._text(tokens)
        return found

    def outputs_of(self, choice: Choice) -> dict[Need, Any]:
        """The metrics' inputs for an answer that a method chose without the LLM."""
        found: dict[Need, Any] = {}
        if "generate" in self.needs:
            found["generate"] = choice.answer.strip()
        if self.options is None:
            return found
        if choice.scores is None:
            raise ATVError(
                f"The answer {choice.answer!r} has no scores of the options, and the metrics need "
                f"{', '.join(sorted(self.needs - {'generate'}))}. Give Choice.scores, or set serves = {{'generate'}}."
            )
        values = [choice.scores.get(option, float("-inf")) for option in self.options.texts]
        likelihoods = Likelihoods(self.options.texts, values, sums=False)
        if "loglikelihood" in self.needs:
            found["loglikelihood"] = likelihoods
        if "next_token" in self.needs:
            token = answer_ids(self.tokenizer, self.render, (choice.answer,))[0][0]
            found["next_token"] = NextToken(token, choice.answer, likelihoods.best(), self.options)
        return found

    def _ended(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self._ends or (not self._lines and "\n" in self.tokenizer.decode(tokens[-1:]))

    def _text(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode([token for token in tokens if token not in self._ends])
        return (text if self._lines else text.partition("\n")[0]).strip()


def _end_ids(llm: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a text."""
    known = getattr(getattr(base_llm(llm), "generation_config", None), "eos_token_id", None)
    ids = {*known} if isinstance(known, list | tuple) else {known}
    return {int(token) for token in ids | {tokenizer.eos_token_id} if token is not None}
