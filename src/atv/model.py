"""THE IDEA, joined: an ATV (`atv.vectors`) steers a frozen LLM (`atv.steer`): loss, generate, save and load."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from atv import adapter, artifact
from atv.config import ENOUGH_TO_TRAIN, ATVConfig, Positions, TrainConfig, random_sizes
from atv.data import Task, check_chat_template, query_renderer
from atv.data.collate import Collator, EncodedRow, like_lengths, pad_id
from atv.data.conversation import example_of, turns_of
from atv.data.render import Example, Prompt, plain_prompt
from atv.errors import ATVError, unknown
from atv.expansion import Expansion, PaperExpansion
from atv.gate import STRENGTHS
from atv.generator import READ_TOKENS, Generator, Itself, check_queries, load_generator
from atv.lm.adapter_model import AdapterModel, AnswerLoss, answer_loss
from atv.lm.ends import decoded, end_ids
from atv.lm.hooks import SITES, base_llm, capture_outputs, input_device, text_config, unregistered
from atv.lm.identity import describe_llm
from atv.lm.load import load_llm, load_tokenizer
from atv.lm.prefix import ReadPrefix, steered_logits
from atv.lm.scoring import refusing_non_finite
from atv.lm.spans import Known, Span, Tracked
from atv.progress import bar, log
from atv.steer import EDITS, Edit, VectorEdit, at_ends, steer
from atv.vector_cache import VectorCache
from atv.vectors import ATV


@dataclass
class ReadAndSteer:
    """The `Edit` of the generator `self`: reads the prompt's state at one layer and steers the layers above with it."""

    model: "ATVModel"
    edit: VectorEdit
    """The edit above that layer, with the vectors of the latest prompts; passes over their answers reuse them."""
    learn: bool = False
    """Whether to make the vectors with gradient."""

    @property
    def sites(self) -> list[nn.Module]:
        """The layer that is read, then the steered ones."""
        return [cast(Itself, self.model.generator).layer, *self.edit.sites]

    @property
    def positions(self) -> Positions:
        """The edited tokens."""
        return self.edit.positions

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Return hidden states (rows, seq, hidden), edited above the layer that is read."""
        if site > 0:
            return self.edit(site - 1, hidden, span)
        if span.ends is not None:
            state = at_ends(hidden, span.ends).detach().to(cast(Itself, self.model.generator).like)
            with torch.set_grad_enabled(self.learn and torch.is_grad_enabled()):
                self.edit.vectors = self.model.atv.expand(state)  # (rows, vectors, hidden)
        return hidden


class ATVModel(AdapterModel):
    """An ATV and the frozen LLM that it steers.

    Its `parameters`, `state_dict` and `train` cover the ATV alone (see `AdapterModel`).

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not, in any dtype.
        atv: an ATV made for this LLM, or the configuration of a new one.
        tokenizer: the LLM's; by default the one saved with it.
        generator: generator of a new ATV; by default the one that its configuration names is loaded.
    """

    @torch.inference_mode(False)  # weights made inside inference mode could never be trained or loaded outside it
    def __init__(
        self,
        llm: nn.Module,
        atv: ATV | ATVConfig | None = None,
        *,
        tokenizer: Any = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(llm, tokenizer)
        config = atv.config if isinstance(atv, ATV) else atv or ATVConfig()
        if config.site not in SITES or config.edit not in EDITS:
            what, known = ("site", SITES) if config.site not in SITES else ("edit", EDITS)
            raise unknown(what, getattr(config, what), known)
        self.positions = Positions.parse(config.positions)
        self.dependent_tokens = self.positions.prompt_tokens
        unregistered(self, layers=self.named_layers(config))
        if not isinstance(atv, ATV):
            vectors = len(self.layers) * EDITS[config.edit].vectors_per_site
            generator = generator or load_generator(config, llm, self.tokenizer)
            atv = ATV(config, generator, vectors, text_config(llm).hidden_size)
        self.atv = atv
        self.training_summary = atv.training_summary
        self._start = 0.0
        self._tasks: dict[str, int] = {}
        self.to(input_device(llm))

    method = "atv"
    read_per_task = (
        3200  # with less, a task of 90 rows among five is not learned as well as by itself (docs/lab-notes.md)
    )
    layers: list[nn.Module]
    """The steered sites, by default decoder layers."""

    @property
    def config(self) -> ATVConfig:
        """The configuration of the ATV."""
        return self.atv.config

    @property
    def generator(self) -> Generator:
        """The model that reads the query."""
        return self.atv.generator

    @property
    def expansion(self) -> Expansion | PaperExpansion:
        """The module that maps the generator's state to vectors."""
        return self.atv.expansion

    @property
    def vector_cache(self) -> VectorCache:
        """Cached task vectors of queries; `vector_cache.limit = 0` turns the cache off."""
        return self.atv.vector_cache

    @property
    def _vectors_per_site(self) -> int:
        return EDITS[self.config.edit].vectors_per_site

    @property
    def own(self) -> Itself | None:
        """The generator if it is `self`, which reads prompts in the LLM's own pass over them; otherwise None."""
        return self.atv.own

    def named_layers(self, config: ATVConfig) -> list[nn.Module]:
        """Return the modules of the LLM that a configuration steers."""
        everywhere = SITES[config.site](self.llm, config.layer_path)
        return [everywhere[index] for index in config.layer_indices(len(everywhere))]

    def describe(self) -> dict[str, Any]:
        """Return its configuration."""
        return self.config.to_dict()

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """Return one group per learning rate; common vector, map and generator have different rates."""
        rate = config.generator_learning_rate
        if rate is None:
            rate = 5e-5 if random_sizes(self.config.generator) is None else 1e-3
        if isinstance(self.expansion, Expansion):
            rates = self.expansion.rates(config.learning_rate)
        else:
            rates = [(p, config.learning_rate) for p in self.expansion.parameters()]
        late = self.generator_start(config)
        timed = [(p, of_it, 0.0) for p, of_it in rates] + [(p, rate, late) for p in self.generator.parameters()]
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter, of_it, start in timed:
            if parameter.requires_grad:
                groups.setdefault((of_it, start), []).append(parameter)
        return [{"params": own, "lr": of_them, "start": start} for (of_them, start), own in groups.items()]

    def settle(self, tasks: Sequence[Task]) -> None:
        """Decide whether to train the generator, if the configuration leaves it open."""
        if self.config.train_generator is None:
            enough = sum(len(task.train) for task in tasks) >= ENOUGH_TO_TRAIN * len(tasks)
            self.atv.config = replace(self.config, train_generator=enough)
            self.generator.set_trainable(enough)

    def generator_start(self, config: TrainConfig) -> float:
        """Return the share of the steps before training of the generator starts: 0 for one with random weights."""
        return config.generator_start if random_sizes(self.config.generator) is None else 0.0

    def reach(self, share: float) -> None:
        """Start training the generator once `share` of the steps is enough."""
        if share >= self._start:
            self.generator.learn()

    @torch.no_grad()
    def calibrate(self, rows: Sequence[EncodedRow]) -> None:
        """Measure the statistics of states and the sizes of the residual stream on training rows, before training.

        Args:
            rows: from `encode_row`; all of their queries are read, and at most 64 of their prompts.
        """
        if isinstance(self.expansion, Expansion):
            sizes = self._residual_sizes(rows[:: -(-len(rows) // 64)])
            states = self._states_by_task(rows)
            self._tasks = {task: number for number, task in enumerate(states)}
            self.expansion.calibrate(list(states.values()), sizes.repeat_interleave(self._vectors_per_site))

    @torch.no_grad()
    def set_gate(self, rows: Sequence[EncodedRow], valid: Sequence[EncodedRow]) -> None:
        """Fit the gate to training rows, and choose the strength of the query's own part on validation rows.

        Args:
            rows: those of `calibrate`.
            valid: from `encode_row`, of the same tasks; only each row's first prompt is used. For each task the
                strength with the highest mean probability of its rows' answers is kept (per token, as a geometric
                mean). Unlike the loss it is bounded: a few confident mistakes do not decide.
        """
        if not isinstance(self.expansion, Expansion) or self.expansion.map is None:
            return
        states = self._states_by_task(rows)
        self.expansion.locate([states[task] for task in self._tasks])
        if not self.config.gate:
            return
        gate, found = self.expansion.gate, []
        for strength in STRENGTHS:
            with gate.set_to(strength):
                found.append((-self._first_losses(valid)).exp())
        chosen = []
        for task in self._tasks:
            own = torch.tensor([row.task == task for row in valid])
            means = [each[own].mean().item() for each in found]
            chosen.append(STRENGTHS[means.index(max(means))])
            log.info(
                f"{task}: strength of the query's own part {chosen[-1]}: mean probability of a token of the right "
                f"answers {max(means):.3f}, without it {means[0]:.3f}"
            )
        gate.strengths = torch.tensor(chosen).to(gate.limits)
        near = self._states_by_task(valid)
        gate.fit([states[task] for task in self._tasks], self.config.gate, [near[task] for task in self._tasks])

    def _first_losses(self, rows: Sequence[EncodedRow]) -> Tensor:
        """Return the loss of each row's first prompt, (rows,), on the CPU."""
        collate, losses = self.collator(), []
        for start in range(0, len(rows), 16):
            batch = collate([replace(row, pairs=row.pairs[:1]) for row in rows[start : start + 16]])
            losses.append(self(**{name: tensor.to(input_device(self.llm)) for name, tensor in batch.items()}).losses)
        return torch.cat(losses).cpu()

    def _states_by_task(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Return the states of each task's distinct queries, (queries, state); for the generator `self`, of prompts."""
        read: dict[str, set[tuple[int, ...]]] = {}
        for row in rows:
            own = [prompt for prompt, _ in row.pairs] if self.own else [row.query]
            read.setdefault(row.task, set()).update(map(tuple, own))
        was_training = self.training
        self.eval()
        found = dict[tuple[int, ...], Tensor]()
        for batch in like_lengths(set().union(*read.values()), READ_TOKENS):
            found |= dict(zip(batch, self.atv.states(batch), strict=True))
        self.train(was_training)
        return {task: torch.stack([found[ids] for ids in sorted(of_task)]) for task, of_task in read.items()}

    def _residual_sizes(self, rows: Sequence[EncodedRow]) -> Tensor:
        """Return the root mean square of each steered layer's output at the last token of these prompts, (layers,)."""
        sizes = []
        for start in range(0, len(rows), 8):
            batch = self.collator()([replace(row, pairs=row.pairs[:1]) for row in rows[start : start + 8]])
            keep = batch["labels"].shape[1]
            names = ("input_ids", "attention_mask", "position_ids", "edit_mask")
            inputs = {name: batch[name].to(input_device(self.llm)) for name in names}
            with capture_outputs(self.layers) as states:
                steered_logits(self.llm, lambda _: nullcontext(), **inputs, keep=keep, read=self.read_prefix)
            last = torch.stack([states[index][:, -keep].float().cpu() for index in range(len(self.layers))])
            sizes.append(last.pow(2).mean(-1).sqrt())  # (layers, rows)
        return torch.cat(sizes, dim=1).mean(1)

    @contextmanager
    def in_training(self, config: TrainConfig, read: ReadPrefix, rows: Sequence[EncodedRow]) -> Iterator[None]:
        """As in `AdapterModel`; also applies the generator's options. A frozen generator reads each query only once.

        The generator `self` reads nothing ahead: it reads prompts in the LLM's own passes.
        """
        self.generator.bf16, self.atv.adaptive_dropout = config.bf16, config.adaptive_dropout
        if isinstance(self.expansion, Expansion):
            self.expansion.dropout = config.state_dropout
        self._start = self.generator_start(config)
        self.generator.waits = self.generator.trainable and self._start > 0
        queries = {tuple(row.query) for row in rows}
        ahead = nullcontext() if self.own else self.generator.read_ahead(queries)
        try:
            with super().in_training(config, read, rows), ahead:
                yield
        finally:
            self.generator.bf16 = self.generator.waits = False

    # ---- the path of a query ----

    def edit(self, vectors: Tensor | None, scale: float | None = None, learn: bool = False) -> Edit:
        """Return the edit that steers the LLM.

        Args:
            vectors: (queries, vectors, hidden); None: the generator `self` makes them in the pass that they steer.
            scale: strength; by default the configuration's.
            learn: whether vectors made in the pass have a gradient.
        """
        made = torch.empty(0) if vectors is None else vectors
        scale = self.config.scale if scale is None else scale
        edit = EDITS[self.config.edit](self.layers, made, scale, self.positions)
        return ReadAndSteer(self, edit, learn) if vectors is None else edit

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        edit_mask: Tensor,
        labels: Tensor,
        query_tasks: Tensor | None = None,
    ) -> AnswerLoss:
        """Return the loss of the steered LLM's answers; see `AdapterModel.forward`.

        `query_tasks`, (queries,) int64, are the numbers of the queries' tasks, if there are several.
        """
        keep = labels.shape[1]
        ends = labels.new_full((len(labels),), -keep)  # a prompt's last column predicts the answer's first token
        vectors = None if self.own else self.atv(query_input_ids, query_attention_mask, query_tasks)
        edit = self.edit(vectors, learn=True)
        logits = steered_logits(
            self.llm,
            lambda where: steer(self.llm, edit, Known(where, ends)),
            input_ids,
            attention_mask,
            position_ids,
            edit_mask,
            keep=keep,
            read=self.read_prefix,
        )  # (batch, answer, vocabulary)
        return answer_loss(logits, labels)

    # ---- texts to tensors ----

    @property
    def reads(self) -> str:
        """What the generator reads: "query", "prompt" or "conversation"."""
        return self.config.reads

    def encode_query(self, query: str, task: str) -> list[int]:
        """Return the token ids of the generator's input; a placeholder for `self`, which reads the prompts."""
        return super().encode_query(query, task) if self.own else self.generator.encode([query])[0]

    def collator(self) -> Collator:
        """Return the collator that makes batches for `forward` from rows of `encode_row`."""
        tasks = self._tasks if len(self._tasks) > 1 and not self.own else {}
        return Collator(self.positions, pad_id(self.tokenizer), pad_id(self.generator.tokenizer), tasks)

    # ---- use ----

    def task_vectors(self, queries: Sequence[str]) -> Tensor:
        """Return the task vectors of queries, (queries, vectors, hidden); see `ATV.task_vectors`."""
        return self.atv.task_vectors(queries)

    def gate(self, queries: Sequence[str]) -> Tensor:
        """Return the gate of each query at inference, (queries,); see `ATV.gate`."""
        return self.atv.gate(queries)

    def own_vectors(self, queries: Sequence[str]) -> Tensor | None:
        """Return the `vectors` that `edit` needs for these queries: task vectors, or None for the generator `self`."""
        check_queries(queries)
        return None if self.own else self.task_vectors(queries)

    @contextmanager
    def steer(
        self, queries: Sequence[str], *, vectors: Tensor | None = None, scale: float | None = None
    ) -> Iterator[Self]:
        """Steer any call of the LLM inside the context: ``with atv.steer(queries): llm.generate(**inputs)``.

        A call that edits nothing, such as each decoding step with positions `last` and `last:K`, runs as without
        steering (except that the length of a static cache is read from the device).

        Args:
            queries: one per prompt, in the order of the prompts. The generator `self` reads the prompts instead, in
                the same pass; only the number of queries matters. The LLM may be called with several rows per prompt
                (beams, returned sequences), with or without a cache, any number of times. Prompts may be padded on
                either side if `attention_mask` is given. Chunked prefill (`prefill_chunk_size`) is not supported,
                since the first chunk does not show where the prompt ends.
            vectors: precomputed task vectors (queries, vectors, hidden) to use instead of the queries' own.
            scale: strength inside this context; by default the configuration's.

        Raises:
            ATVError: the number of rows is not a multiple of the number of queries, or a query is empty.
        """
        if vectors is None:
            vectors = self.own_vectors(queries)
        prompts = len(queries) if vectors is None else len(vectors)
        with steer(self.llm, self.edit(vectors, scale), Tracked(prompts, self.positions)):
            yield self

    def render(self, queries: Sequence[str | Sequence[Mapping[str, Any]]], task: str | None = None) -> list[Prompt]:
        """Return the prompts of queries, written as in training.

        Args:
            queries: texts, or conversations for a chat: lists of {"role": ..., "content": ...} that end with the user.
            task: name of a training task, whose first template is used. None: the only one; if there are several, the
                query alone.

        Raises:
            ATVError: the task is unknown, a query is empty, or training used a custom renderer or is not recorded.
        """
        render = query_renderer(self.training_summary, self.reads, task)
        examples = [
            Example(query, "") if isinstance(query, str) else example_of("A query", turns_of("A query", "turn", query))
            for query in queries
        ]
        return [render.prompt(self.tokenizer, example) for example in examples]

    def generate(
        self,
        prompts: Sequence[Prompt | str | Sequence[Mapping[str, Any]]],
        queries: Sequence[str] | None = None,
        *,
        task: str | None = None,
        batch_size: int = 16,
        progress: bool = False,
        **generate_options: Any,
    ) -> list[str]:
        """Generate answers, steered. An answer ends at any of the LLM's end tokens, or after `max_new_tokens`.

        Args:
            prompts: queries or conversations, which are written as in training (`render`; an ATV without a training
                summary reads texts as they are); or prompts that a renderer has made.
            queries: what the generator reads, one per prompt; by default each prompt's `query`.
            task: as for `render`.
            batch_size: prompts per call of the LLM. They are sorted by length, and the answers are in the given order.
            progress: show a progress bar.
            generate_options: options of transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`,
                `num_return_sequences`, `streamer` and so on, but no assisted decoding.

        Returns:
            The new text of each sequence; `num_return_sequences` per prompt, grouped by prompt.

        Raises:
            ATVError: an argument is not allowed, a prompt with its answer would exceed the LLM's context, or the LLM's
                logits are not finite.
        """
        if isinstance(prompts, str) or isinstance(queries, str) or not prompts:
            raise ATVError("generate takes a non-empty list of prompts, and as many queries (or none).")
        if batch_size < 1:
            raise ATVError(f"batch_size is {batch_size}; expected a whole number from 1.")
        asked = [self._prompt(prompt, task) for prompt in prompts]
        if queries is not None:
            if len(queries) != len(asked):
                raise ATVError(
                    f"There are {len(asked)} prompts and {len(queries)} queries; expected as many queries as prompts."
                )
            asked = [prompt._replace(query=query) for prompt, query in zip(asked, queries, strict=True)]
        generate_options.setdefault("pad_token_id", pad_id(self.tokenizer))
        generate_options.setdefault("eos_token_id", end_ids(self.llm, self.tokenizer))
        by_length = sorted(range(len(asked)), key=lambda index: len(asked[index].ids))
        self._check_room(len(asked[by_length[-1]].ids), generate_options)
        answers: dict[int, list[str]] = {}
        with bar("generate", len(asked)) if progress else nullcontext() as shown:
            for start in range(0, len(asked), batch_size):
                batch = by_length[start : start + batch_size]
                texts = self._generate([asked[index] for index in batch], generate_options)
                each = len(texts) // len(batch)
                answers |= {index: texts[place * each :][:each] for place, index in enumerate(batch)}
                if shown is not None:
                    shown.advance(len(batch))
        return [text for index in range(len(asked)) for text in answers[index]]

    def _prompt(self, prompt: Prompt | str | Sequence[Mapping[str, Any]], task: str | None) -> Prompt:
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str) and not self.training_summary.get("tasks"):
            return plain_prompt(self.tokenizer, prompt)
        return self.render([prompt], task)[0]

    def _check_room(self, longest: int, options: Mapping[str, Any]) -> None:
        """Raise ATVError if a prompt of `longest` tokens and an answer are longer than the LLM's context."""
        limit = self.context
        configs = (options.get("generation_config"), getattr(base_llm(self.llm), "generation_config", None))
        places = (options, *(vars(config) for config in configs if config is not None))
        for name, read in (("max_new_tokens", longest), ("max_length", 0)):  # transformers bounds an answer without any
            asked = next((found for place in places if (found := place.get(name)) is not None), None)
            if asked is None:
                continue
            if limit is not None and read + asked > limit:
                raise ATVError(
                    f"The longest prompt has {longest} tokens, {name} is {asked}, and the LLM's context is {limit} "
                    "for both. Shorten the prompt, or ask for a shorter answer."
                )
            return

    def _generate(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[str]:
        """Return the new text of each sequence of one batch."""
        inputs = self.encode_prompts(prompts)
        width = inputs.pop("position_ids").shape[1]  # generate counts positions from the mask itself
        with self.steer([prompt.query for prompt in prompts]), torch.no_grad():
            output = cast(Any, self.llm).generate(**inputs, **refusing_non_finite(options))
        sequences = getattr(output, "sequences", output)
        return [decoded(self.tokenizer, ids, skip_special_tokens=True) for ids in sequences[:, width:].tolist()]

    # ---- the adapter ----

    def require_savable(self) -> None:
        """Raise ATVError if a part differs from what the configuration builds, since it could not be loaded again."""
        if list(map(id, self.layers)) != list(map(id, self.named_layers(self.config))):
            raise adapter.unsavable("its layers are not those of the LLM that the configuration names")
        adapter.require_savable(self.config, self.generator, self.expansion)

    def load_weights(self, folder: Path) -> None:
        """Load weights and training summary from an adapter of a model with the same configuration."""
        saved = artifact.read(folder, self.method)
        artifact.check_llm(saved, self.llm, folder)
        adapter.load_generator_weights(self.generator, saved, adapter.read_config(saved, folder), folder)
        adapter.load_expansion(self.expansion, folder)
        self.training_summary = saved.training

    def save_pretrained(self, path: str | Path) -> None:
        """Write generator, expansion, configuration and model card to a folder, atomically.

        The generator is left out if it is frozen and can be loaded by its name. What was written is read back and
        compared before it is moved into place.

        Raises:
            ATVError: the written adapter would load as a different model.
        """
        self.require_savable()
        was_training = self.training
        self.eval()
        try:
            adapter.save(
                Path(path),
                self.method,
                describe_llm(self.llm, self.config.layer_path),
                self.config,
                self.generator,
                self.expansion,
                self.training_summary,
            )
        finally:
            self.train(was_training)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save, upload to the Hugging Face hub and return the commit's URL."""
        return adapter.push(self.save_pretrained, repo_id, private=private, token=token)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        llm: nn.Module | str | None = None,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
    ) -> Self:
        """Load an adapter onto the LLM that it was trained for.

        Args:
            path_or_hub_id: folder written by `save_pretrained`, or a hub repository.
            llm: the LLM or its name; by default the one that the adapter names is loaded.
            tokenizer: the LLM's; by default the one saved with it.
            revision: revision of the hub repository.

        Raises:
            ATVError: it is not an adapter, is damaged, or was made for another LLM; the message names what differs.
        """
        folder = artifact.locate(path_or_hub_id, revision)
        saved = artifact.read(folder, cls.method)
        config = adapter.read_config(saved, folder)
        name = saved.base_llm["name"] if llm is None else llm
        loaded = load_llm(name) if isinstance(name, str) else name
        artifact.check_llm(saved, loaded, folder)
        if tokenizer is None:
            tokenizer = load_tokenizer(str(base_llm(loaded).name_or_path))
        check_chat_template(saved.training, tokenizer)
        named = None if adapter.has_generator(saved) else load_generator(config, loaded, tokenizer)
        return cls(loaded, ATV.of(saved, config, named, folder), tokenizer=tokenizer).eval()
