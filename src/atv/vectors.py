"""THE IDEA, first half: a generator reads the query, an expansion makes one vector per layer. No LLM is needed.

query --Generator--> state (batch, state) --Expansion--> task vectors (batch, layers, hidden)

    v_l = r_l * (b_l + a * (c_l + s * W_l z))

b_l is common to all queries; c_l is shared by the queries of one training task; W_l z is the query's own part, where z
is the state standardised within the task; r_l is the size of the residual stream at layer l. a, between 0 and 1, fades
out all but b_l far from the training queries, and s holds the own part back where it hurt validation rows. `atv.steer`
adds the vectors inside a frozen LLM.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from atv import adapter, artifact
from atv.config import SELF, ATVConfig
from atv.data.collate import pad, pad_id
from atv.errors import ATVError
from atv.expansion import Expansion, PaperExpansion, new_expansion
from atv.generator import Generator, Itself, check_queries, load_generator
from atv.lm.hooks import require_eval
from atv.vector_cache import AdapterHash, Lock, VectorCache


class ATV(nn.Module):
    """An Adaptive Task Vector: generator and expansion for one LLM, which need not be loaded.

    Args:
        config: its configuration.
        generator: from `atv.generator.load_generator`.
        vectors: number of vectors per query: one per layer, unless the edit takes several.
        hidden_size: width of the LLM's residual stream.
    """

    @torch.inference_mode(False)  # weights made inside inference mode could never be trained or loaded outside it
    def __init__(self, config: ATVConfig, generator: Generator, vectors: int, hidden_size: int) -> None:
        super().__init__()
        self.config, self.generator = config, generator
        self.expansion: Expansion | PaperExpansion = new_expansion(config, generator.hidden_size, vectors, hidden_size)
        self.adaptive_dropout = 0.0
        """In training mode, share of the queries that get the common vector alone."""
        self.vector_cache = VectorCache()
        """Cached task vectors of queries, used outside training mode; `vector_cache.limit = 0` turns the cache off."""
        self.base_llm: dict[str, Any] = {}
        """Identity of the LLM that a loaded adapter was made for (`atv.lm.identity.describe_llm`)."""
        self.training_summary: dict[str, Any] = {}
        """How a loaded adapter was trained."""
        self._hash, self._making = AdapterHash(), Lock()

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path_or_hub_id: str | Path, *, revision: str | None = None, method: str = "atv") -> Self:
        """Load an adapter without its LLM, to make task vectors.

        Args:
            path_or_hub_id: folder written by `save_pretrained`, or a hub repository.
            revision: revision of the hub repository.
            method: the expected method.

        Raises:
            ATVError: it is not an adapter, is damaged, or its generator is the LLM itself.
        """
        folder = artifact.locate(path_or_hub_id, revision)
        saved = artifact.read(folder, method)
        config = adapter.read_config(saved, folder)
        if config.generator == SELF:
            raise ATVError(
                f"The generator of the adapter {folder} is {SELF}: the LLM makes the vectors while it reads the "
                "prompt. Load it with the LLM: ATVModel.from_pretrained."
            )
        return cls.of(saved, config, load_generator(config) if not adapter.has_generator(saved) else None, folder)

    @classmethod
    def of(cls, saved: artifact.Saved, config: ATVConfig, named: Generator | None, folder: Path) -> Self:
        """Build the ATV of an adapter that has been read.

        Args:
            saved: from `artifact.read`.
            config: from `adapter.read_config`.
            named: the generator that the configuration names; None: the adapter contains it.
            folder: folder of the adapter.
        """
        if named is not None:
            adapter.require_named_generator(saved, named, folder)
        generator = named or adapter.saved_generator(config, folder)
        atv = cls(config, generator, *adapter.vectors_shape(saved, folder))
        adapter.load_expansion(atv.expansion, folder)
        atv.base_llm, atv.training_summary = saved.base_llm, saved.training
        return atv.eval()

    @property
    def own(self) -> Itself | None:
        """The generator if it is `self`, which reads prompts in the LLM's own pass over them; otherwise None."""
        return self.generator if isinstance(self.generator, Itself) else None

    def train(self, mode: bool = True) -> Self:
        """Set training mode; a calibrated ATV's generator stays in eval mode, as dropout would shift its states."""
        super().train(mode)
        if isinstance(self.expansion, Expansion):
            self.generator.eval()
        return self

    # ---- the path of a query ----

    def forward(
        self, query_input_ids: Tensor, query_attention_mask: Tensor, query_tasks: Tensor | None = None
    ) -> Tensor:
        """Map encoded queries (queries, query seq) to task vectors (queries, layers, hidden), float32 with gradient.

        `query_tasks`, (queries,) int64, are the numbers of their tasks, if these are known.
        """
        return self.expand(self.generator(query_input_ids, query_attention_mask), query_tasks)

    def expand(self, states: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Map states (queries, state) to task vectors (queries, layers, hidden).

        `tasks`, (queries,) int64, are the numbers of the queries' tasks; by default the nearest ones.
        """
        if isinstance(self.expansion, PaperExpansion):
            return cast(Tensor, self.expansion(states))
        if self.training:
            kept = torch.rand(len(states), device=states.device) >= self.adaptive_dropout
            return cast(Tensor, self.expansion(states, tasks, kept.to(states.dtype)))
        return cast(Tensor, self.expansion(states, *self._gated(states, tasks)))

    def _gated(self, states: Tensor, tasks: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Return tasks, openness and strength of queries, as the expansion takes them."""
        assert isinstance(self.expansion, Expansion)
        if not self.config.gate:
            return tasks, None, None
        gate, tasks = self.expansion.gate, self.expansion.nearest_tasks(states) if tasks is None else tasks
        return tasks, gate.openness(states, tasks), gate.strength(tasks)

    def states(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        """Return the generator's states of encoded queries, (queries, state)."""
        ids, mask = pad(encoded, pad_id(self.generator.tokenizer), "right")
        return cast(Tensor, self.generator(ids.to(self.generator.device), mask.to(self.generator.device)))

    # ---- use ----

    @torch.no_grad()
    def task_vectors(self, queries: Sequence[str]) -> Tensor:
        """Return the task vectors of queries: (queries, layers, hidden), float32; without dropout.

        An empty query raises ATVError. With the generator `self` a query is a whole prompt. In eval mode vectors come
        from `vector_cache` if they are cached for the current weights.
        """
        check_queries(queries)
        if self.training or not self.vector_cache.limit:
            return self.make_vectors(queries)
        about = f"{self.config} {self.generator.pooling} {self.generator.query_template} {self.generator.bf16}"
        return self.vector_cache.get(self._hash.of(self, about), queries, self.make_vectors)

    @torch.no_grad()
    def make_vectors(self, queries: Sequence[str]) -> Tensor:
        """Like `task_vectors`, without the cache."""
        if self.own:  # no mode to set, and locking could deadlock with a thread that holds the LLM
            return self.expand(self.states(self.generator.encode(queries)))
        with self._making:  # all threads share the mode
            was_training = self.training
            require_eval(self)
            try:
                return self.expand(self.states(self.generator.encode(queries)))
            finally:
                if was_training:
                    self.train()

    @torch.no_grad()
    def gate(self, queries: Sequence[str]) -> Tensor:
        """Return the share of each query's own part that is added, (queries,): openness times strength (`atv.gate`)."""
        states = self.states(self.generator.encode(queries))
        share = states.new_ones(len(states))
        if isinstance(self.expansion, Expansion):
            for factor in self._gated(states)[1:]:
                share = share if factor is None else share * factor
        return share
