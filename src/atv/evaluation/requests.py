"""Requests to an LLM about a task's prompts, in one pass over the prompts for all metrics."""

import math
from collections.abc import Collection, Sequence
from typing import Any, Self

from torch import nn

from atv.data import Renderer, Task
from atv.data.render import answer_ids
from atv.errors import ATVError
from atv.evaluation.metrics import Likelihoods, Metric, Need, NextToken, reads_whole
from atv.lm.continuation import Continuation
from atv.lm.ends import decoded, end_ids
from atv.lm.scoring import Options, longest_answer, task_options
from atv.methods.base import Choice
from atv.progress import log_once

MOST_TOKENS = 256
"""Maximum length of a generated answer, even if the task has longer answers."""
MARKUP = 16
"""Tokens for a code block around an answer that is judged as a whole."""


class Requests:
    """The requests about prompts with the same options or the same kind of answers.

    An answer is generated greedily. It ends at an end token of the LLM, at a line break unless answers may contain one,
    or at the most tokens.

    Args:
        llm: the LLM, which knows its end tokens.
        tokenizer: the LLM's.
        render: renders the prompts.
        needs: the needs of all metrics.
        options: the options, if they are needed.
        limit: most tokens of a generated answer.
        lines: whether answers may contain line breaks.
    """

    def __init__(
        self,
        llm: nn.Module,
        tokenizer: Any,
        render: Renderer,
        needs: Collection[Need],
        *,
        options: Options | None,
        limit: int,
        lines: bool,
    ) -> None:
        self.llm, self.tokenizer, self.render, self.needs = llm, tokenizer, render, frozenset(needs)
        self.options, self._lines = options, lines
        self.limit = limit if "generate" in self.needs else 1
        self._ends = frozenset(end_ids(llm, tokenizer))

    @classmethod
    def of_task(cls, llm: nn.Module, tokenizer: Any, task: Task, render: Renderer, metrics: Sequence[Metric]) -> Self:
        """Return the requests of metrics about a task in one variant.

        A generated answer has at most as many tokens as the task's longest one, and it has several lines only if one of
        these has; for a metric that `reads_whole` answers it may have lines and twice the tokens. `MOST_TOKENS` is the
        limit for all.

        Raises:
            ATVError: options are needed, but an answer is not an option or two options have the same tokens.
        """
        needs = {metric.needs for metric in metrics}
        # If answers are only generated, options are not encoded.
        options = task_options(tokenizer, task, render) if {"next_token", "loglikelihood"} & {*needs} else None
        longest = longest_answer(tokenizer, task, render) if "generate" in needs else 1
        if longest > MOST_TOKENS:
            log_once(
                f"{task.name}: its longest answer has {longest} tokens, and generated ones end after {MOST_TOKENS}."
            )
        whole = any(map(reads_whole, metrics))
        limit = min(2 * longest + MARKUP if whole else longest, MOST_TOKENS)
        return cls(llm, tokenizer, render, needs, options=options, limit=limit, lines=whole or task.has_lines)

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

    def outputs(self, behind: Continuation) -> list[dict[Need, Any]]:
        """The metrics' inputs for each prompt of a batch. Call it inside the context that steers the LLM.

        A generated answer that may have several lines keeps the white space around it.

        Args:
            behind: the batch as it was read, with a cache if `continues`.
        """
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
                text = decoded(self.tokenizer, [token for token in tokens if token not in self._ends])
                each["generate"] = text if self._lines else first_line(text)
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
        texts = self.options.texts
        values = [choice.scores.get(option, -math.inf) for option in texts]
        if max(values) == -math.inf:  # no option must be credited: the method answered something else
            texts, values = [choice.answer, *texts], [-math.inf, *values]
        likelihoods = Likelihoods(texts, values, sums=False)
        if "loglikelihood" in self.needs:
            found["loglikelihood"] = likelihoods
        if "next_token" in self.needs:
            token = answer_ids(self.tokenizer, self.render, (choice.answer,))[0][0]
            found["next_token"] = NextToken(token, choice.answer, likelihoods.best(), self.options)
        return found

    def _ended(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self._ends or (not self._lines and "\n" in self.tokenizer.decode(tokens[-1:]))


def first_line(text: str) -> str:
    """Return a text up to its first line break."""
    return text.partition("\n")[0].strip()
