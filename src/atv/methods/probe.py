"""Probe: logistic regression on a frozen state of the query. How much does the state reveal without any steering?

The state is a generator's, which reads the bare query (mean pooling), or the frozen LLM's own: one decoder layer's
output at the last token of the prompt (always in the task's first template).

Each training task has its own classifier over its training answers; queries of other tasks use one over all answers.
States are standardised with the training rows' mean and deviation. The penalty and the layer, the same for all tasks,
are those with the highest validation accuracy (mean over tasks); ties go to the strongest penalty, then the lowest
layer. The classifier over all answers has its own penalty, chosen in the same way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from atv import adapter as adapters
from atv import artifact
from atv.config import EMBEDDED_GENERATOR, Checked, TrainConfig
from atv.data import Example, Renderer, Task, asking_of
from atv.errors import ATVError, unknown
from atv.lm import identity
from atv.lm.hooks import decoder_layers, input_device, text_config
from atv.lm.prefix_store import PrefixStore
from atv.methods.answers import choices
from atv.methods.base import Choice, Method
from atv.methods.exemplars import last_states, plain_prompts
from atv.methods.learn_once import BEST, layers_to_try, learn_once, note_few, number_or_best
from atv.methods.retriever import check_encoder, fit_classifier, load_encoder, read_queries
from atv.progress import bar

WEIGHTS_FILE = "probe.safetensors"
SOURCES = ("generator", "llm")
PENALTIES = (1000.0, 100.0, 10.0, 1.0, 0.1)
"""Strongest first."""
ALL = ""
"""Name of the classifier over the answers of all tasks; no task has this name."""


@dataclass
class ProbeConfig(Checked):
    """What is read and how the classifiers are regularised."""

    source: str = "generator"
    """Source of the state: generator, which reads the query; or llm, the frozen LLM at the prompt's last token."""
    generator: str = EMBEDDED_GENERATOR
    """Hugging Face id or folder of the frozen encoder that reads the query, with mean pooling."""
    layer: int | str = BEST
    """For the source llm: index of the decoder layer, or best: chosen on validation rows."""
    penalty: float | str = BEST
    """Weight of half the squared weights, added to the summed loss (scikit-learn's 1 / C); or best: the best of 1000,
    100, 10, 1 and 0.1 on validation rows."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        if self.source not in SOURCES:
            raise unknown("source", self.source, SOURCES)
        check_encoder(self.generator)
        number_or_best("layer", self.layer, whole=True)
        number_or_best("penalty", self.penalty)
        if self.source != "llm" and self.layer != BEST:
            raise ATVError(f"layer is {self.layer!r} and the source {self.source}: only the source llm has layers.")


class Classifier(NamedTuple):
    """A linear classifier on standardised states; all tensors float32."""

    mean: Tensor
    """(state,)"""
    deviation: Tensor
    """(state,)"""
    weight: Tensor
    """(answers, state)"""
    bias: Tensor
    """(answers,)"""

    def scores(self, states: Tensor) -> Tensor:
        """Scores (rows, answers) for states (rows, state)."""
        return (states - self.mean) / self.deviation @ self.weight.T + self.bias


class Labelled(NamedTuple):
    """Rows that a classifier is trained or evaluated on."""

    states: Tensor
    """(rows, layers, state), or (rows, state) float32 for one layer."""
    answers: list[str]

    def at(self, layer: int) -> "Labelled":
        """The same rows with the states of one layer."""
        return Labelled(self.states[:, layer].float(), self.answers)


def joint(parts: Sequence[Labelled]) -> Labelled:
    """The rows of all tasks together."""
    return Labelled(torch.cat([rows.states for rows in parts]), [answer for rows in parts for answer in rows.answers])


def fit(rows: Labelled, penalty: float) -> tuple[list[str], Classifier]:
    """The sorted answers of rows and a classifier over them."""
    answers = sorted(set(rows.answers))
    mean, deviation = rows.states.mean(0), rows.states.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    labels = torch.tensor([answers.index(answer) for answer in rows.answers])
    weights = fit_classifier((rows.states - mean) / deviation, labels, len(answers), penalty)
    return answers, Classifier(mean, deviation, *weights)


def best_penalty(pairs: Sequence[tuple[Labelled, Labelled]], penalties: Sequence[float]) -> tuple[float, float]:
    """The penalty with the highest mean accuracy over pairs of training and validation rows, and that accuracy."""

    def accuracy(train: Labelled, valid: Labelled, penalty: float) -> float:
        known, classifier = fit(train, penalty)
        found: list[int] = classifier.scores(valid.states).argmax(-1).tolist()
        return sum(known[place] == answer for place, answer in zip(found, valid.answers, strict=True)) / len(found)

    means = {penalty: sum(accuracy(*pair, penalty) for pair in pairs) / len(pairs) for penalty in penalties}
    best = max(penalties, key=lambda penalty: (means[penalty], penalty))
    return best, means[best]


def best_layer(
    train: Sequence[Labelled], valid: Sequence[Labelled], penalties: Sequence[float]
) -> tuple[int, tuple[float, float]]:
    """The layer with the highest accuracy at its best penalty, and the result of `best_penalty` there."""
    found = {}
    with bar("probe: choose", train[0].states.shape[1]) as progress:
        for layer in range(train[0].states.shape[1]):
            pairs = [(rows.at(layer), others.at(layer)) for rows, others in zip(train, valid, strict=True)]
            found[layer] = best_penalty(pairs, penalties)
            progress.advance()
    best = max(found, key=lambda layer: (found[layer][1], found[layer][0], -layer))
    return best, found[best]


class Reader:
    """Reads the states that the configuration names.

    Args:
        llm: the frozen LLM.
        tokenizer: the LLM's.
        config: the probe's configuration.
    """

    def __init__(self, llm: nn.Module, tokenizer: Any, config: ProbeConfig) -> None:
        self.llm, self.tokenizer = llm, tokenizer
        self.layer = None if config.layer == BEST else layers_to_try(config.layer, 1, llm)[0]
        self.generator = load_encoder(config.generator).to(input_device(llm)) if config.source == "generator" else None

    def prompts(self, task: Task, split: str, rows: Sequence[Example]) -> list[list[int]]:
        """Prompts of rows in the first template, as token ids; empty if the LLM reads nothing."""
        if self.generator is not None:
            return [[] for _ in rows]
        first = task.training_renderers()[:1]
        return [prompt.ids for prompt in plain_prompts(self.llm, self.tokenizer, task, split, rows, first)]

    def states(self, rows: Sequence[Example], prompts: Sequence[list[int]]) -> Tensor:
        """States (rows, layers, state) on the CPU; layers is 1 for a generator or a single layer."""
        if self.generator is not None:
            return read_queries(self.generator, [row.input for row in rows]).cpu()[:, None]
        return last_states(self.llm, self.tokenizer, prompts, self.layer)

    def read(self, task: Task, split: str) -> Labelled:
        """Read a split of a task."""
        rows: Sequence[Example] = getattr(task, split)
        return Labelled(self.states(rows, self.prompts(task, split, rows)), [row.output for row in rows])

    def number(self, place: int) -> int | None:
        """Index of the decoder layer at a position along the states' layers; None for a generator."""
        if self.generator is not None:
            return None
        return place if self.layer is None else self.layer

    def about(self) -> dict[str, Any]:
        """What identifies the generator, so that another one is refused."""
        if self.generator is None:
            return {}
        weights = identity.sample_weights(self.generator.encoder)
        return {"name": self.generator.name_or_path, "revision": self.generator.revision, "weights": weights}


class Probe(Method):
    """Answers without the LLM's next token."""

    name = "probe"
    config_class = ProbeConfig
    train_defaults = None  # learned without a training loop
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"penalty": (BEST, 1000.0, 100.0, 10.0, 1.0)}

    def __init__(
        self,
        tokenizer: Any,
        reader: Reader,
        config: ProbeConfig,
        classifiers: Mapping[str, tuple[list[str], Classifier]],
        training: dict[str, Any],
    ) -> None:
        super().__init__(reader.llm, tokenizer)
        self.reader, self.config, self.classifiers, self.training = reader, config, classifiers, training

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: ProbeConfig,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Read all training and validation rows once, then fit the classifiers. Nothing is random."""
        del store, train

        def learn(folder: Path, parts: Path, keep: Callable[..., None]) -> None:
            del parts
            reader = Reader(llm, tokenizer, config)
            train_all, valid_all = ([reader.read(task, split) for task in tasks] for split in ("train", "valid"))
            penalties = PENALTIES if config.penalty == BEST else (float(config.penalty),)
            settings = len(penalties) * train_all[0].states.shape[1]
            if settings > 1:
                note_few(cls.name, tasks, settings)
            layer, (penalty, right) = best_layer(train_all, valid_all, penalties)
            train_rows, valid_rows = ([each.at(layer) for each in split] for split in (train_all, valid_all))
            joined = joint(train_rows), joint(valid_rows)
            joint_penalty, _ = best_penalty([joined], penalties)
            learned = {task.name: fit(each, penalty) for task, each in zip(tasks, train_rows, strict=True)}
            learned[ALL] = fit(joined[0], joint_penalty)
            summary = {
                **asking_of(tasks, tokenizer),
                "penalty": penalty,
                "penalty_over_all_answers": joint_penalty,
                "layer": reader.number(layer),
                "valid_accuracy": right,
            }
            keep(chosen=summary)

            def write(part: Path) -> None:
                tensors = {
                    f"{name}/{field}": tensor.contiguous()
                    for name, (_, classifier) in learned.items()
                    for field, tensor in classifier._asdict().items()
                }
                save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})

            about = {"answers": {name: known for name, (known, _) in learned.items()}, "generator": reader.about()}
            artifact.save(folder, cls.name, identity.describe_llm(llm), config.to_dict(), summary, write, about)

        return learn_once(llm, tokenizer, tasks, out, config, {}, learn, force=force)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the classifiers and, if it is the source, the generator."""
        cls.wanted_shots(shots)
        folder, saved = artifact.read_for(cls.wanted_adapter(adapter), cls.name, llm)
        config = ProbeConfig.from_dict(saved.config)
        if config.source == "llm":
            config = replace(config, layer=artifact.layer_of(saved, folder, len(decoder_layers(llm))))
        reader = Reader(llm, tokenizer, config)
        if reader.generator is not None:
            adapters.require_named_generator(saved, reader.generator, folder)
        answers = artifact.answers_of(saved, folder)
        if ALL not in answers:
            raise artifact.damaged(folder, "answers has none of all tasks together")
        like = {f"{name}/{field}": shape for name, known in answers.items() for field, shape in _like(reader, known)}
        tensors = artifact.load_tensors(folder / WEIGHTS_FILE, like)
        classifiers = {
            name: (known, Classifier(*(tensors[f"{name}/{field}"] for field in Classifier._fields)))
            for name, known in answers.items()
        }
        method = cls(tokenizer, reader, config, classifiers, saved.training)
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """The configuration and the choices made on validation rows."""
        return {"config": self.config.to_dict(), "training": self.training}

    def choose(self, task: Task, examples: Sequence[Example], render: Renderer) -> list[Choice]:
        """Answer with the task's own classifier, or with the one over all answers if the task was not trained on."""
        del render
        answers, classifier = self.classifiers.get(task.name, self.classifiers[ALL])
        prompts = self.reader.prompts(task, "test", examples)
        states = self.reader.states(examples, prompts)[:, 0].float()
        chosen = choices(classifier.scores(states), answers)
        return [choice._replace(prompt_tokens=len(ids)) for choice, ids in zip(chosen, prompts, strict=True)]


def _like(reader: Reader, answers: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """The shapes of a classifier over `answers`, by field."""
    generator = reader.generator
    width = text_config(reader.llm).hidden_size if generator is None else generator.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"mean": (width,), "deviation": (width,)}
    return [*(shapes | {"weight": (len(answers), width), "bias": (len(answers),)}).items()]
