"""THE IDEA: a generator reads the query, an expansion makes one vector per layer, a frozen LLM is steered by them.

query --Generator--> state (batch, generator hidden) --Expansion--> task vectors (batch, layers, hidden)
prompt --frozen LLM, with  h~_l = h_l + scale * v_l  at the chosen tokens of every chosen layer (Eq. 6)--> answer

    v_l = r_l * (b_l + a * W_l z)

z is the state, standardised; b_l is common to all queries, W_l z is the query's own; r_l is the size that the residual
stream has at layer l; a, between 0 and 1, fades the query's own part out far from the queries of the training, and
where it did not help validation rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from atv import adapter, artifact
from atv.config import ENOUGH_TO_TRAIN, ATVConfig, Positions, TrainConfig, random_sizes
from atv.data import Task
from atv.data.collate import Collator, EncodedRow, Row, like_lengths, pad, pad_id
from atv.errors import ATVError
from atv.expansion import Expansion, PaperExpansion
from atv.generator import READ_TOKENS, Generator, Itself, check_queries, load_generator
from atv.lm.calls import Calls, around_methods, eager
from atv.lm.frozen import AnswerLoss, Trainable, answer_loss
from atv.lm.hooks import base_llm, capture_outputs, decoder_layers, edit_outputs, input_device, text_config
from atv.lm.load import load_llm
from atv.lm.prefix import ReadPrefix, first_edited, steered_logits
from atv.lm.tracking import GENERATES, PromptTracker, refuse_untracked
from atv.vector_cache import AdapterHash, Lock, VectorCache


def add_vectors(hidden: Tensor, vectors: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`hidden + scale * vectors` at the tokens that `mask` names (Eq. 6), added in float32 at least, rounded once.

    Args:
        hidden: (batch, seq, hidden), on any device and of any floating dtype; not written to.
        vectors: (batch, hidden), one per row.
        mask: (batch, seq) bool.
        scale: lambda.

    Returns:
        (batch, seq, hidden) in the dtype of `hidden`, equal to it wherever `mask` is false.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    added = scale * vectors.to(hidden.device, dtype)[:, None] * mask.to(hidden.device)[:, :, None]
    return (hidden.to(dtype) + added).to(hidden.dtype)


@contextmanager
def inject(
    layers: Sequence[nn.Module], vectors: Callable[[], Tensor], scale: float, mask: Callable[[], Tensor | None]
) -> Iterator[None]:
    """Add each query's vectors to the outputs of `layers` while the context lasts.

    Args:
        layers: the steered decoder layers.
        vectors: called at every layer; (queries, layers, hidden). A batch may hold several rows per query, one query
            after the other (templates, beams, returned sequences): they share its vector.
        scale: lambda.
        mask: called at every layer; the tokens of this call that receive the vector, (rows, seq) bool, or None.
    """

    def edit(index: int, hidden: Tensor) -> Tensor:
        where = mask()
        if where is None:
            return hidden
        made = vectors()
        rows_per_query, rest = divmod(len(hidden), len(made))
        if where.shape != hidden.shape[:2] or rest:
            raise ATVError(
                f"A layer returned {tuple(hidden.shape[:2])} tokens; the edit mask has {tuple(where.shape)} and there "
                f"are {len(made)} task vectors. Expected a mask of that shape and a whole number of rows per vector."
            )
        row_vectors = made[:, index].repeat_interleave(rows_per_query, dim=0)  # (rows, hidden)
        start = first_edited(where) if where.shape[1] > 1 else 0  # one column: no need to ask the device
        if start == 0:
            return add_vectors(hidden, row_vectors, where, scale)
        edited = hidden.clone()
        edited[:, start:] = add_vectors(hidden[:, start:], row_vectors, where[:, start:], scale)
        return edited

    with edit_outputs(layers, edit):
        yield


def steering(
    llm: nn.Module, layers: Sequence[nn.Module], vectors: Tensor, scale: float, positions: Positions
) -> AbstractContextManager[None]:
    """Add each query's vectors at `positions` of its prompts, in any call of the LLM while the context lasts.

    Args:
        llm: the frozen LLM, or a PEFT model around it.
        layers: its steered decoder layers.
        vectors: (queries, layers, hidden), one query per prompt, in the order of the prompts.
        scale: lambda.
        positions: the tokens that receive a vector.
    """
    return editing(
        llm, layers, len(vectors), positions, lambda t: inject(layers, lambda: vectors, scale, lambda: t.mask)
    )


@contextmanager
def editing(
    llm: nn.Module,
    layers: Sequence[nn.Module],
    prompts: int,
    positions: Positions,
    edits: Callable[[PromptTracker], AbstractContextManager[None]],
) -> Iterator[None]:
    """Run every call of the LLM that holds tokens to edit inside what `edits` makes, while the context lasts.

    Other threads and asyncio tasks are not steered by it: their contexts on the same LLM are their own, and a call in
    one that opened none is refused.

    Args:
        llm: the frozen LLM, or a PEFT model around it; put into eval mode.
        layers: its edited modules, in the order in which they run.
        prompts: how many the LLM is called with; each may have several rows (beams, returned sequences).
        positions: the tokens that receive a vector.
        edits: given the tracker that knows where those tokens and the prompts' ends are in the current call.
    """
    tracker, base = PromptTracker(prompts, positions), base_llm(llm)
    llm.eval()

    def steered(call: Mapping[str, Any]) -> AbstractContextManager[None] | None:
        tracker.observe(call)
        if tracker.finished:  # until `generate` ends its decoding steps are those of the plain LLM, compiled or not
            calls.pause()
            steps.enter_context(eager.released())
        return None if tracker.mask is None else edits(tracker)

    @contextmanager
    def generating(method: str, arguments: Mapping[str, Any]) -> Iterator[None]:
        refuse_untracked(base, method, arguments)
        try:
            with tracker.generating():
                yield
        finally:
            steps.close()
            calls.resume()

    steps = ExitStack()
    calls = Calls(base, steered, inner=next(iter(layers), None))
    with eager(), calls.watched(), around_methods(base, GENERATES, generating):
        yield


class ATVModel(Trainable):
    """An Adaptive Task Vector for one frozen LLM.

    Its parameters, its `state_dict` and its `train` are those of generator and expansion alone (see `Trainable`).

    Args:
        llm: a Hugging Face causal LM, PEFT-wrapped or not, in any dtype.
        config: the shape of the ATV; the default is the paper's.
        tokenizer: the LLM's; by default the one saved with it.
        generator: a ready `Generator`; by default the one that `config` names is loaded.
    """

    @torch.inference_mode(False)  # weights made inside inference mode could never be trained or loaded outside it
    def __init__(
        self,
        llm: nn.Module,
        config: ATVConfig | None = None,
        *,
        tokenizer: Any = None,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(llm, tokenizer)
        self.config = config or ATVConfig()
        self.positions = Positions.parse(self.config.positions)
        self.edited = self.positions.prompt_tokens
        all_layers = decoder_layers(llm, self.config.layer_path)
        chosen = self.config.layer_indices(len(all_layers))
        object.__setattr__(self, "layers", [all_layers[index] for index in chosen])
        self.generator = generator or load_generator(self.config, llm, self.tokenizer)
        self.expansion = self.new_expansion()
        self.vector_cache = VectorCache()
        """Vectors of queries that came before, used outside training mode; `vector_cache.limit = 0` turns it off."""
        self._hash = AdapterHash()
        self._making = Lock()
        self._start = 0.0
        self.to(input_device(llm))

    method = "atv"
    layers: list[nn.Module]
    adaptive_dropout = 0.0
    """In training mode, share of the queries that have the common vector alone."""

    @property
    def own(self) -> Itself | None:
        """The generator, if it is the LLM itself: what it reads are prompts, in the LLM's own pass over them."""
        return self.generator if isinstance(self.generator, Itself) else None

    def new_expansion(self) -> Expansion | PaperExpansion:
        """An untrained expansion, as the configuration says."""
        kind = PaperExpansion if self.config.parametrisation == "paper" else Expansion
        width = text_config(self.llm).hidden_size
        return kind(self.generator.hidden_size, len(self.layers), width, self.config.expansion_rank)

    def describe(self) -> dict[str, Any]:
        """Its configuration."""
        return self.config.to_dict()

    def parameter_groups(self, config: TrainConfig) -> list[dict[str, Any]]:
        """One group per learning rate: common vector, map and generator have rates of their own."""
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
        """Decide whether the generator is trained, if the configuration does not say so."""
        if self.config.train_generator is None:
            enough = sum(len(task.train) for task in tasks) >= ENOUGH_TO_TRAIN * len(tasks)
            self.config = replace(self.config, train_generator=enough)
            self.generator.set_trainable(enough)

    def generator_start(self, config: TrainConfig) -> float:
        """Share of the steps before the generator learns: none of one that has yet to learn to read."""
        return config.generator_start if random_sizes(self.config.generator) is None else 0.0

    def reach(self, share: float) -> None:
        """Let the generator learn when its time has come."""
        if share >= self._start:
            self.generator.learn()

    @torch.no_grad()
    def calibrate(self, rows: Sequence[EncodedRow]) -> None:
        """Take the means of states and the sizes of the residual stream from training rows, before training on them.

        Args:
            rows: from `encode_row`; all their queries are read, and at most 64 of their prompts.
        """
        if isinstance(self.expansion, Expansion):
            self.expansion.calibrate(self._row_states(rows), self._residual_sizes(rows[:: -(-len(rows) // 64)]))

    @torch.no_grad()
    def set_gate(self, rows: Sequence[EncodedRow], valid: Sequence[EncodedRow]) -> None:
        """Let the gate know the training rows, and what the query's own part does to validation rows, after training.

        Args:
            rows: from `encode_row`.
            valid: likewise; each is asked with its first prompt.
        """
        if not isinstance(self.expansion, Expansion) or not self.config.gate or self.expansion.map is None:
            return
        gate = self.expansion.gate
        with gate.set_to(0.0):  # the common vector alone
            common = self._answers_likely(valid)
        with gate.set_to(1.0):
            own = self._answers_likely(valid)
        gate.fit(self._row_states(rows), self.config.gate)
        gate.judge(self._states_of(valid), own - common)

    def _answers_likely(self, rows: Sequence[EncodedRow]) -> Tensor:
        """(rows,): probability of the answer to each row's first prompt, the geometric mean over its tokens."""
        collate, losses = self.collator(), []
        for start in range(0, len(rows), 16):
            batch = collate([replace(row, pairs=row.pairs[:1]) for row in rows[start : start + 16]])
            losses.append(self(**{name: tensor.to(input_device(self.llm)) for name, tensor in batch.items()}).losses)
        return torch.exp(-torch.cat(losses))

    def _states_of(self, rows: Sequence[EncodedRow]) -> Tensor:
        """(rows, state); of the generator `self`, of each row's first prompt."""
        read = [row.pairs[0][0] if self.own else row.query for row in rows]
        return torch.cat([self._states(read[start : start + 16]) for start in range(0, len(read), 16)])

    def _row_states(self, rows: Sequence[EncodedRow]) -> Tensor:
        """(different queries, state); of the generator `self`, different prompts."""
        read = (
            {tuple(prompt) for row in rows for prompt, _ in row.pairs} if self.own else {tuple(r.query) for r in rows}
        )
        was_training = self.training
        self.eval()
        states = []
        for batch in like_lengths(read, READ_TOKENS):
            states.append(self._states(batch))
        self.train(was_training)
        return torch.cat(states)

    def _residual_sizes(self, rows: Sequence[EncodedRow]) -> Tensor:
        """(layers,): root mean square of what each steered layer gives out at the last token of these rows' prompts."""
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
        """As every `Trainable`, the generator in bfloat16 if `config` says so; while frozen it reads each query once.

        `self` reads none ahead: it reads prompts, in the LLM's own passes.
        """
        self.generator.bf16, self.adaptive_dropout = config.bf16, config.adaptive_dropout
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

    def train(self, mode: bool = True) -> Self:
        """Training mode; a calibrated generator stays without dropout, which would move states off their mean."""
        super().train(mode)
        if isinstance(self.expansion, Expansion):
            self.generator.eval()
        return self

    # ---- the path of a query ----

    def vectors(self, query_input_ids: Tensor, query_attention_mask: Tensor) -> Tensor:
        """Encoded queries (queries, query seq) to task vectors (queries, layers, hidden), float32, with gradient."""
        return self.expand(self.generator(query_input_ids, query_attention_mask))

    def expand(self, states: Tensor) -> Tensor:
        """States (queries, state) to task vectors (queries, layers, hidden)."""
        if isinstance(self.expansion, PaperExpansion):
            return cast(Tensor, self.expansion(states))
        if self.training:
            kept = torch.rand(len(states), device=states.device) >= self.adaptive_dropout
            return cast(Tensor, self.expansion(states, kept.to(states.dtype)))
        share = self.expansion.gate(states) if self.config.gate else None
        return cast(Tensor, self.expansion(states, share))

    def forward(
        self,
        query_input_ids: Tensor,
        query_attention_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        edit_mask: Tensor,
        labels: Tensor,
    ) -> AnswerLoss:
        """The loss of the steered LLM's answers; see `Trainable.forward`."""
        scale, keep = self.config.scale, labels.shape[1]
        ends = labels.new_full((len(labels),), -keep)  # a prompt's last column predicts the answer's first token
        made = [] if self.own else [self.vectors(query_input_ids, query_attention_mask)]  # (queries, layers, hidden)

        def steered(mask: Tensor) -> AbstractContextManager[None]:
            if self.own:
                return self.inject_own(made, lambda: ends, scale, lambda: mask, learn=True)
            return inject(self.layers, lambda: made[0], scale, lambda: mask)

        logits = steered_logits(
            self.llm,
            steered,
            input_ids,
            attention_mask,
            position_ids,
            edit_mask,
            keep=keep,
            read=self.read_prefix,
        )  # (batch, answer, vocabulary)
        return answer_loss(logits, labels)

    @contextmanager
    def inject_own(
        self,
        made: list[Tensor],
        ends: Callable[[], Tensor | None],
        scale: float,
        mask: Callable[[], Tensor | None],
        learn: bool = False,
    ) -> Iterator[None]:
        """As `inject`, with vectors that the generator `self` makes in the very pass that they steer.

        Args:
            made: holds the vectors of the latest prompts, (rows, layers, hidden): later passes over their answers have
                them too.
            ends: as in `Itself.reading`.
            scale: lambda.
            mask: as in `inject`.
            learn: with gradient.
        """

        def take(states: Tensor) -> None:
            with torch.set_grad_enabled(learn and torch.is_grad_enabled()):
                made[:] = [self.expand(states)]

        own = cast(Itself, self.generator)
        with own.reading(ends, take), inject(self.layers, lambda: made[0], scale, mask):
            yield

    # ---- texts to tensors ----

    def encode_query(self, row: Row) -> list[int]:
        """What the generator reads of a row beside its prompts, as its token ids."""
        if self.own:
            return super().encode_query(row)
        return self.generator.encode([row.query if self.config.reads == "query" else row.prompts[0]])[0]

    def collator(self) -> Collator:
        """Makes the batches that `forward` takes from `encode_row`'s rows."""
        return Collator(self.positions, pad_id(self.tokenizer), pad_id(self.generator.tokenizer))

    # ---- use ----

    @torch.no_grad()
    def task_vectors(self, queries: Sequence[str]) -> Tensor:
        """Task vectors of queries: (queries, layers, hidden), float32; dropout off. An empty query raises ATVError.

        With the generator `self` a query is a whole prompt. In eval mode the vectors of queries that came before are
        taken from `vector_cache`; they are of the weights as they are now.
        """
        check_queries(queries)
        if self.training or not self.vector_cache.limit:
            return self.make_vectors(queries)
        about = f"{self.config} {self.generator.pooling} {self.generator.query_template} {self.generator.bf16}"
        return self.vector_cache.get(self._hash.of(self, about), queries, self.make_vectors)

    @torch.no_grad()
    def make_vectors(self, queries: Sequence[str]) -> Tensor:
        """As `task_vectors`, whatever is cached."""
        if self.own:  # without a mode of its own; and who holds the LLM must not wait for who waits for the LLM
            return self._read(queries)
        with self._making:  # the mode is that of all threads
            was_training = self.training
            self.eval()
            try:
                return self._read(queries)
            finally:
                self.train(was_training)

    def _read(self, queries: Sequence[str]) -> Tensor:
        return self.expand(self._states(self.generator.encode(queries)))

    def _states(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = pad(encoded, pad_id(self.generator.tokenizer), "right")
        return cast(Tensor, self.generator(ids.to(self.generator.device), mask.to(self.generator.device)))

    @torch.no_grad()
    def gate(self, queries: Sequence[str]) -> Tensor:
        """Share of its own part that each query has in use, (queries,), from 0 to 1; see `atv.gate.Gate`."""
        states = self._states(self.generator.encode(queries))
        if isinstance(self.expansion, Expansion) and self.config.gate:
            return cast(Tensor, self.expansion.gate(states))
        return states.new_ones(len(states))

    @contextmanager
    def steer(
        self, queries: Sequence[str], *, vectors: Tensor | None = None, scale: float | None = None
    ) -> Iterator[Self]:
        """Steer any call of the LLM inside the context: ``with atv.steer(queries): llm.generate(**inputs)``.

        A call that edits nothing, as every decoding step of positions `last` and `last:K`, runs as without steering
        (a static cache, which keeps its length on the device, is asked for it).

        Args:
            queries: one per prompt, in the order of the prompts; the generator `self` reads the prompts instead, in
                the same pass, and only their number counts. The LLM may be called with several rows per prompt (beams,
                returned sequences), with or without a cache, as often as one likes; prompts may be padded on either
                side if `attention_mask` is given. A prompt read in chunks (`prefill_chunk_size`) is not supported,
                since its end cannot be told from its first chunk.
            vectors: ready task vectors (queries, layers, hidden) to use instead of making them from the queries.
            scale: strength for this context; by default the configuration's.

        Raises:
            ATVError: a number of rows that is no multiple of the number of queries, or an empty query.
        """
        scale = self.config.scale if scale is None else scale
        steered: AbstractContextManager[None]
        if self.own and vectors is None:
            check_queries(queries)
            made: list[Tensor] = []
            steered = editing(
                self.llm,
                self.layers,
                len(queries),
                self.positions,
                lambda tracker: self.inject_own(made, tracker.prompt_ends, scale, lambda: tracker.mask),
            )
        else:
            vectors = self.task_vectors(queries) if vectors is None else vectors  # (queries, layers, hidden)
            steered = steering(self.llm, self.layers, vectors, scale, self.positions)
        with steered:
            yield self

    def generate(
        self, prompts: Sequence[str], queries: Sequence[str] | None = None, **generate_options: Any
    ) -> list[str]:
        """Answer prompts, steered.

        Args:
            prompts: what the LLM reads, of any mixed lengths.
            queries: what the generator reads, one per prompt; by default the prompts themselves, as `reads = "prompt"`
                has it in training.
            generate_options: for transformers' `generate`: `max_new_tokens`, `do_sample`, `num_beams`,
                `num_return_sequences`, `streamer` and so on; no assisted decoding.

        Returns:
            The new text of each sequence; `num_return_sequences` per prompt, one prompt after the other.
        """
        queries = prompts if queries is None else queries
        if isinstance(prompts, str) or isinstance(queries, str) or len(prompts) != len(queries) or not prompts:
            raise ATVError("generate takes a list of prompts, not empty, and as many queries (or none).")
        inputs = self.encode_prompts(prompts)
        width = inputs.pop("position_ids").shape[1]  # generate counts positions from the mask itself
        generate_options.setdefault("pad_token_id", pad_id(self.tokenizer))
        with self.steer(queries), torch.no_grad():
            output = cast(Any, self.llm).generate(**inputs, **generate_options)
        sequences = getattr(output, "sequences", output)
        return cast(list[str], self.tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True))

    # ---- the artifact ----

    def require_savable(self) -> None:
        """Raise ATVError if a part is not the one that the configuration makes: it could not be read back."""
        adapter.require_savable(self)

    def load_weights(self, folder: Path) -> None:
        """Take the weights of an adapter that a model made alike has saved, and how it was trained."""
        adapter.load_weights(self, folder)

    def save_pretrained(self, path: str | Path) -> None:
        """Write generator, expansion, configuration and model card to a folder, whole or not at all."""
        adapter.save(self, Path(path))

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Save and upload to the Hugging Face hub; returns the address of the commit."""
        return adapter.push(self, repo_id, private=private, token=token)

    @classmethod
    @torch.inference_mode(False)
    def from_pretrained(
        cls,
        llm: nn.Module | str,
        path_or_hub_id: str | Path,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
    ) -> Self:
        """Load an adapter onto the LLM that it was trained for.

        Args:
            llm: the LLM, or the name to load it by.
            path_or_hub_id: folder written by `save_pretrained`, or a repository of the hub.
            tokenizer: the LLM's; by default the one saved with it.
            revision: of the hub repository.

        Raises:
            ATVError: not an adapter, made for another LLM, or damaged; the message names what differs.
        """
        folder = artifact.locate(path_or_hub_id, revision)
        saved = artifact.read(folder, cls.method)
        config = adapter.read_config(saved, folder)
        loaded = load_llm(llm) if isinstance(llm, str) else llm
        artifact.check_llm(saved, loaded, folder)
        model = cls(loaded, config, tokenizer=tokenizer, generator=adapter.load_generator(saved, config, folder))
        adapter.require_named_generator(saved, model.generator, folder)
        adapter.load_expansion(model.expansion, folder)
        model.training_summary = saved.training
        return model.eval()
