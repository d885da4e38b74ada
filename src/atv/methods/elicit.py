"""ELICIT: a library of task vectors taken from demonstrations; one is retrieved for each query."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from atv import adapter as adapters
from atv import artifact
from atv.config import EMBEDDED_GENERATOR, REGIONS, ATVConfig, Checked, Positions, TrainConfig
from atv.data import Prompt, Task, asking_of
from atv.data.splits import stratified
from atv.errors import ATVError, unknown
from atv.files import write_bytes
from atv.lm import identity
from atv.lm.hooks import decoder_layers, input_device, text_config
from atv.lm.prefix_store import PrefixStore
from atv.methods.base import Method
from atv.methods.exemplars import (
    Exemplars,
    best_layers,
    exemplar_prompts,
    last_states,
    layer_scores,
)
from atv.methods.learn_once import BEST, at_least_one, learn_once
from atv.methods.retriever import Retriever, embed, fit_classifier, load_encoder
from atv.progress import Bar, bar
from atv.steer import AddVectors

NO_LAYER = -1
"""Best layer of an entry if the configuration names the layers instead."""
LIBRARY_FILE = "library.safetensors"
RETRIEVER_FILE = "retriever.safetensors"


@dataclass
class ElicitConfig(Checked):
    """The configuration of an ELICIT library. Exemplars, shots and scale are those of its paper and code."""

    exemplars: int = 10
    """Entries per task."""
    shots: int = 16
    """Demonstrations in the prompt from which an entry is taken."""
    layers: str = BEST
    """Where the retrieved states are added: best, each entry's own best layer; or all, bottom, middle, top."""
    scale: float = 2.0
    """Strength of the addition; an entry's best layer is chosen at this strength."""
    layer_rows: int = 10
    """Validation rows per task for choosing the best layers."""
    encoder: str = EMBEDDED_GENERATOR
    """Hugging Face id or folder of the retriever's frozen encoder."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        at_least_one(self, "exemplars", "shots", "layer_rows")
        if self.layers not in (BEST, *REGIONS):
            raise unknown("choice of layers", self.layers, (BEST, *REGIONS))
        ATVConfig(scale=self.scale)  # raises unless it is a finite number


class Elicit(Method):
    """The plain prompt, with a retrieved state added at its last token.

    The paper drops entries below a similarity threshold. Here every query gets an entry, of the task that a linear
    classifier predicts; the retriever is not given the query's task, which may not be a training task.
    """

    name = "elicit"
    config_class = ElicitConfig
    train_defaults = None  # learned without a training loop
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"scale": (2.0, 1.0, 0.5, 0.2, 0.1)}
    edited_tokens = 1

    def __init__(
        self,
        llm: nn.Module,
        tokenizer: Any,
        config: ElicitConfig,
        library: dict[str, Tensor],
        retriever: Retriever,
        training: dict[str, Any],
    ) -> None:
        super().__init__(llm, tokenizer)
        self.config, self.retriever, self.training = config, retriever, training
        self.states = library["states"].to(input_device(llm))
        """All states of the library, added or not: (entries, layers, hidden)."""
        count = self.states.shape[1]
        if config.layers == BEST:
            added = library["layers"][:, None] == torch.arange(count)
        else:
            chosen = ATVConfig(layers=config.layers).layer_indices(count)
            added = torch.isin(torch.arange(count), torch.tensor(chosen)).expand(len(self.states), -1)
        self._added = added.to(self.states.device)  # (entries, layers) bool
        self._layers = decoder_layers(llm)

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: ElicitConfig,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Fill the library and train the retriever. Of `train`, only the seed is used, for the demonstrations."""
        del store

        def learn(adapter: Path, parts: Path, keep: Callable[..., None]) -> None:
            library = []
            with bar(cls.name, len(tasks) * config.exemplars) as progress:
                for task in tasks:
                    library.append(_exemplars(llm, tokenizer, task, parts, config, train.seed, progress))
                    keep()
            _save(llm, tokenizer, tasks, library, adapter, config, train.seed)

        return learn_once(llm, tokenizer, tasks, out, config, {"seed": train.seed}, learn, force=force)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the library and the retriever for the LLM."""
        del seed
        cls.wanted_shots(shots)
        folder, saved = artifact.read_for(cls.wanted_adapter(adapter), cls.name, llm)
        config = ElicitConfig.from_dict(saved.config)
        encoder = load_encoder(config.encoder).to(input_device(llm))
        adapters.require_named_generator(saved, encoder, folder, "encoder")
        tasks, layers, width = len(saved.training.get("tasks", {})), len(decoder_layers(llm)), encoder.hidden_size
        entries = tasks * config.exemplars
        states = {"states": (entries, layers, text_config(llm).hidden_size), "embeddings": (entries, width)}
        library = artifact.load_tensors(folder / LIBRARY_FILE, states | {"layers": (entries,), "tasks": (entries,)})
        if not library["tasks"].equal(torch.arange(tasks).repeat_interleave(config.exemplars)):
            raise ATVError(f"{folder / LIBRARY_FILE} does not fit: its entries are not those of {tasks} tasks.")
        shapes = {"weight": (tasks, width), "bias": (tasks,)}
        classifier = artifact.load_tensors(folder / RETRIEVER_FILE, shapes)
        retriever = Retriever(encoder, **classifier, entries=library["embeddings"], tasks=library["tasks"])
        return cls(llm, tokenizer, config, library, retriever, saved.training)

    def describe(self) -> dict[str, Any]:
        """The configuration and how the library was made."""
        return {"config": self.config.to_dict(), "training": self.training}

    def entry_tasks(self) -> list[str]:
        """The task name of each entry in `states`."""
        names = list(self.training["tasks"])
        return [names[number] for number in self.retriever.tasks.tolist()]

    def edit(self, prompts: Sequence[Prompt]) -> AddVectors:
        """The retrieved states at their layers. Retrieval depends only on the queries."""
        picked = self.retriever.pick([prompt.query for prompt in prompts]).to(self.states.device)  # (queries,)
        used = self._added[picked].any(0).nonzero()[:, 0]
        layers = [self._layers[index] for index in used.tolist()]
        added = self._added[picked][:, used, None]
        vectors = self.states[picked][:, used] * added  # (queries, used layers, hidden)
        return AddVectors(layers, vectors, self.config.scale, Positions.parse("last"))


def _exemplars(
    llm: nn.Module, tokenizer: Any, task: Task, folder: Path, config: ElicitConfig, seed: int, progress: Bar
) -> Exemplars:
    """A task's part of the library, read from its file if an interrupted training wrote it."""
    file = folder / f"{task.name}.safetensors"
    progress.describe(f"elicit: {task.name}")
    if file.exists():
        progress.advance(config.exemplars)
        return Exemplars(**load_file(file))
    rows, states = [], []
    for row, prompt in exemplar_prompts(llm, tokenizer, task, config.exemplars, config.shots, seed):
        rows.append(row)
        states.append(last_states(llm, tokenizer, [prompt.ids])[0])
        progress.advance()
    made = torch.stack(states)
    if config.layers == BEST:
        drawn = stratified([row.output for row in task.valid], config.layer_rows, f"{seed} {task.name}")
        some = [task.valid[index] for index in drawn]
        layers = best_layers(*layer_scores(llm, tokenizer, task, made, config.scale, some))
    else:
        layers = torch.full((len(made),), NO_LAYER)  # finding the best ones takes most of the time
    exemplars = Exemplars(made, layers, torch.tensor(rows))
    write_bytes(file, save(exemplars._asdict(), {"format": "pt"}))
    return exemplars


def _save(
    llm: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Task],
    library: Sequence[Exemplars],
    adapter: Path,
    config: ElicitConfig,
    seed: int,
) -> None:
    """Train the retriever on the training queries of all tasks and write everything that `load` needs."""
    encoder = load_encoder(config.encoder).to(input_device(llm))
    embedded = [embed(encoder, [row.input for row in task.train]).cpu() for task in tasks]
    labels = torch.arange(len(tasks)).repeat_interleave(torch.tensor([len(task.train) for task in tasks]))
    weight, bias = fit_classifier(torch.cat(embedded), labels, len(tasks))
    entries = {
        "states": torch.cat([exemplars.states for exemplars in library]),
        "layers": torch.cat([exemplars.layers for exemplars in library]),
        "tasks": torch.arange(len(tasks)).repeat_interleave(config.exemplars),
        "embeddings": torch.cat([rows[exemplars.rows] for rows, exemplars in zip(embedded, library, strict=True)]),
    }
    right = [
        (embed(encoder, [row.input for row in task.valid]).cpu() @ weight.T + bias).argmax(-1) == number
        for number, task in enumerate(tasks)
    ]
    summary = {
        **asking_of(tasks, tokenizer),
        "seed": seed,
        "best_layers": {task.name: made.layers.tolist() for task, made in zip(tasks, library, strict=True)}
        if config.layers == BEST
        else None,
        "retriever_accuracy": torch.cat(right).double().mean().item(),
    }

    def write(part: Path) -> None:
        save_file(entries, part / LIBRARY_FILE, metadata={"format": "pt"})
        save_file({"weight": weight, "bias": bias}, part / RETRIEVER_FILE, metadata={"format": "pt"})

    named = {
        "name": encoder.name_or_path,
        "revision": encoder.revision,
        "weights": identity.sample_weights(encoder.encoder),
    }
    llm_identity = identity.describe_llm(llm)
    artifact.save(adapter, Elicit.name, llm_identity, config.to_dict(), summary, write, {"encoder": named})
