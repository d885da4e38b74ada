"""Linear task vector (arXiv 2605.20730): the effect of demonstrations as a linear function of the LLM's own state.

Only the paper's abstract is followed: a closed-form linear map, found by regression, estimates the effect of
demonstrations on a hidden state and replaces them at inference. Everything else is this implementation's choice:

- State: one decoder layer's output at the prompt's last token, h without and h' with demonstrations (`shots` other
  training rows before the query; templates alternate, with the same one in both prompts).
- Map: ridge regression of the effect h' - h on h over a task's training rows, both centred, so that a strong ridge
  leaves the mean effect, the usual task vector: e(h) = mean(h' - h) + (h - mean(h)) B. The penalty is `ridge` times the
  mean eigenvalue of the rows' Gram matrix, so the same values suit every layer and LLM.
- Inference: h + scale * e(h) at that layer and token, with h from the steered forward pass itself.
- Each training task has its own map; queries of other tasks use a map of all training rows.
- Layer and ridge, the same for all tasks, are those with the highest validation accuracy (mean over tasks); ties go to
  the highest log-probability of the right tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from atv import artifact
from atv.config import ATVConfig, Checked, Positions, TrainConfig
from atv.data import Prompt, Task, asking_of
from atv.errors import ATVError
from atv.files import write_bytes
from atv.lm import identity
from atv.lm.hooks import decoder_layers, input_device, text_config
from atv.lm.prefix_store import PrefixStore
from atv.lm.spans import Span
from atv.methods.base import Method
from atv.methods.exemplars import exemplar_prompts, judged_rows, last_states, layer_scores, plain_prompts
from atv.methods.learn_once import BEST, at_least_one, layers_to_try, learn_once, note_few, number_or_best
from atv.progress import bar
from atv.steer import add_from, at_ends

WEIGHTS_FILE = "linear.safetensors"
RIDGES = (100.0, 10.0, 1.0, 0.1)
"""Strongest first."""
ALL = ""
"""Name of the map of all training rows; no task has this name."""


@dataclass
class LinearConfig(Checked):
    """What the map is fitted to and where its effect is added."""

    shots: int = 16
    """Number of demonstrations whose effect is estimated."""
    layer: int | str = BEST
    """Index of the decoder layer, or best: the best of `candidates` layers on validation rows."""
    candidates: int = 8
    """Number of layers to try, evenly spread over the LLM's depth."""
    ridge: float | str = BEST
    """Penalty in units of the rows' mean eigenvalue, or best: the best of 100, 10, 1 and 0.1 on validation rows."""
    scale: float = 1.0
    """Strength of the addition; 1 replaces the state with the estimate."""

    def __post_init__(self) -> None:
        """Raise ATVError for a value that is not allowed."""
        at_least_one(self, "shots", "candidates")
        number_or_best("layer", self.layer, whole=True)
        number_or_best("ridge", self.ridge)
        ATVConfig(scale=self.scale)  # raises unless it is a finite number


class Ridge(NamedTuple):
    """A linear map, represented by the rows that it was fitted to; all tensors float32."""

    mean: Tensor
    """(hidden,), the rows' mean state."""
    effect: Tensor
    """(hidden,), the rows' mean effect."""
    rows: Tensor
    """(rows, hidden), the rows' centred states."""
    weights: Tensor
    """(rows, hidden)"""

    def effects(self, states: Tensor) -> Tensor:
        """The estimated effects of demonstrations, (..., hidden), on states (..., hidden)."""
        return self.effect + (states - self.mean) @ self.rows.T @ self.weights

    def to(self, device: torch.device) -> "Ridge":
        """The same map on another device."""
        return Ridge(*(tensor.to(device) for tensor in self))


def fit(states: Tensor, effects: Tensor, ridge: float) -> Ridge:
    """Minimise the squared error of the centred effects + ridge * mean eigenvalue * the map's squared weights.

    Args:
        states: (rows, hidden), without demonstrations.
        effects: (rows, hidden), what demonstrations add to the states.
        ridge: the penalty.
    """
    mean, effect = states.double().mean(0), effects.double().mean(0)
    rows = states.double() - mean
    gram = rows @ rows.T  # (rows, rows)
    penalty = ridge * gram.trace() / len(rows)
    penalty = torch.where(penalty > 0, penalty, 1.0)  # all rows are equal: nothing to fit
    weights = torch.linalg.solve(gram + penalty * torch.eye(len(rows), dtype=gram.dtype), effects.double() - effect)
    return Ridge(*(tensor.float() for tensor in (mean, effect, rows, weights)))


class Linear(Method):
    """The plain prompt, with the estimated effect of demonstrations added to its last token's state at one layer."""

    name = "linear"
    config_class = LinearConfig
    train_defaults = None  # learned without a training loop
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"scale": (1.0, 0.5, 1.5), "shots": (16, 4)}
    edited_tokens = 1

    def __init__(
        self, llm: nn.Module, tokenizer: Any, config: LinearConfig, maps: Mapping[str, Ridge], training: dict[str, Any]
    ) -> None:
        super().__init__(llm, tokenizer)
        self.config, self.training = config, training
        self.layer = decoder_layers(llm)[training["layer"]]
        self.maps = {name: made.to(input_device(llm)) for name, made in maps.items()}

    @classmethod
    def fit(
        cls,
        llm: nn.Module,
        tokenizer: Any,
        tasks: Sequence[Task],
        out: Path,
        config: LinearConfig,
        train: TrainConfig,
        *,
        force: bool = False,
        store: PrefixStore | None = None,
    ) -> Path:
        """Read all training rows without and with demonstrations (drawn with `train.seed`) and fit the maps."""
        del store
        layers = layers_to_try(config.layer, config.candidates, llm)
        ridges = RIDGES if config.ridge == BEST else (float(config.ridge),)

        def learn(folder: Path, parts: Path, keep: Callable[..., None]) -> None:
            read, scores = [], []
            if len(layers) * len(ridges) > 1:
                note_few(cls.name, tasks, len(layers) * len(ridges))
            with bar(cls.name, len(tasks)) as progress:
                for task in tasks:
                    progress.describe(f"{cls.name}: {task.name}")
                    states, effects = _read(llm, tokenizer, task, layers, config.shots, train.seed, parts)
                    read.append((states, effects))
                    scores.append(_scores(llm, tokenizer, task, layers, states, effects, ridges, config.scale))
                    keep()
                    progress.advance()
            right, likely = (torch.stack(of).mean(0) for of in zip(*scores, strict=True))  # (ridges, layers)
            likely = likely.nan_to_num(nan=float("-inf"))
            settings = [(place, where) for where in range(len(layers)) for place in range(len(ridges))]
            place, where = max(settings, key=lambda of: (right[of].item(), likely[of].item()))
            at = {task.name: (s[:, where], e[:, where]) for task, (s, e) in zip(tasks, read, strict=True)}
            at[ALL] = torch.cat([s for s, _ in at.values()]), torch.cat([e for _, e in at.values()])
            maps = {name: fit(s, e, ridges[place]) for name, (s, e) in at.items()}
            summary = {
                **asking_of(tasks, tokenizer),
                "seed": train.seed,
                "layer": layers[where],
                "ridge": ridges[place],
                "valid_accuracy": right[place, where].item(),
            }
            keep(chosen=summary)

            def write(part: Path) -> None:
                tensors = {f"{name}/{key}": t for name, made in maps.items() for key, t in made._asdict().items()}
                save_file({name: t.contiguous() for name, t in tensors.items()}, part / WEIGHTS_FILE)

            artifact.save(folder, cls.name, identity.describe_llm(llm), config.to_dict(), summary, write)

        return learn_once(llm, tokenizer, tasks, out, config, {"seed": train.seed}, learn, force=force)

    @classmethod
    def load(
        cls, llm: nn.Module, tokenizer: Any, adapter: Path | None, *, shots: int | None = None, seed: int = 42
    ) -> Self:
        """Load the maps for the LLM."""
        cls.wanted_shots(shots)
        folder, saved = artifact.read_for(cls.wanted_adapter(adapter), cls.name, llm)
        artifact.layer_of(saved, folder, len(decoder_layers(llm)))
        names, hidden = [*saved.training.get("tasks", {}), ALL], text_config(llm).hidden_size
        shapes = {"mean": (hidden,), "effect": (hidden,), "rows": (-1, hidden), "weights": (-1, hidden)}
        like = {f"{name}/{field}": shape for name in names for field, shape in shapes.items()}
        tensors = artifact.load_tensors(folder / WEIGHTS_FILE, like)
        maps = {name: Ridge(*(tensors[f"{name}/{field}"] for field in Ridge._fields)) for name in names}
        if any(len(made.rows) != len(made.weights) for made in maps.values()):
            raise ATVError(f"{folder / WEIGHTS_FILE} does not fit: rows and weights differ in number.")
        method = cls(llm, tokenizer, LinearConfig.from_dict(saved.config), maps, saved.training)
        method.seed = seed
        return method

    def describe(self) -> dict[str, Any]:
        """The configuration and the choices made on validation rows."""
        return {"config": self.config.to_dict(), "training": self.training}

    def edit(self, prompts: Sequence[Prompt]) -> "AddEffect":
        """The map of each prompt's task, or the map of all training rows if the task was not trained on."""
        maps = [self.maps.get(prompt.task, self.maps[ALL]) for prompt in prompts]
        return AddEffect([self.layer], maps, self.config.scale)


@dataclass
class AddEffect:
    """An `Edit` that adds the effect of demonstrations, estimated from the prompt's own state at the layer."""

    sites: Sequence[nn.Module]
    maps: Sequence[Ridge]
    """One map per prompt. A prompt may have several rows, which are consecutive."""
    scale: float
    positions: Positions = field(default_factory=lambda: Positions.parse("last"))

    def __call__(self, site: int, hidden: Tensor, span: Span) -> Tensor:
        """Edit hidden states (rows, seq, hidden) at each prompt's last token."""
        del site
        assert span.ends is not None  # a call that edits a prompt's last token contains it
        states = at_ends(hidden, span.ends).to(self.maps[0].mean)  # (rows, hidden)
        of_prompts = states.unflatten(0, (len(self.maps), -1))  # (prompts, rows of each, hidden)
        effects = torch.empty_like(of_prompts)
        for made in {id(each): each for each in self.maps}.values():
            rows = torch.tensor([each is made for each in self.maps], device=states.device)
            effects[rows] = made.effects(of_prompts[rows])
        return add_from(span, hidden, effects.flatten(0, 1), self.scale)


def _read(
    llm: nn.Module, tokenizer: Any, task: Task, layers: Sequence[int], shots: int, seed: int, parts: Path
) -> tuple[Tensor, Tensor]:
    """States of training rows without demonstrations, and the effects of demonstrations, both (rows, layers, hidden).

    Read from the task's file if an interrupted training wrote it.
    """
    file = parts / f"{task.name}.safetensors"
    if not file.exists():
        shown = exemplar_prompts(llm, tokenizer, task, len(task.train), shots, seed)
        plain = plain_prompts(llm, tokenizer, task, "train", [task.train[row] for row, _ in shown])
        read = {
            "without": last_states(llm, tokenizer, [prompt.ids for prompt in plain])[:, layers],
            "with": last_states(llm, tokenizer, [prompt.ids for _, prompt in shown])[:, layers],
        }
        write_bytes(file, save(read, {"format": "pt"}))
    found = load_file(file)
    return found["without"].float(), found["with"].float() - found["without"].float()


def _scores(
    llm: nn.Module,
    tokenizer: Any,
    task: Task,
    layers: Sequence[int],
    states: Tensor,
    effects: Tensor,
    ridges: Sequence[float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """How well validation rows are answered, for each ridge and layer; see `layer_scores`."""
    prompts = [row.pairs[0][0] for row in judged_rows(llm, tokenizer, task, task.valid)]
    asked = last_states(llm, tokenizer, prompts)[:, layers].float()  # (valid, layers, hidden)
    made = torch.stack(
        [
            torch.stack(
                [fit(states[:, at], effects[:, at], ridge).effects(asked[:, at]) for at in range(asked.shape[1])], dim=1
            )
            for ridge in ridges
        ]
    )  # (ridges, valid, layers, hidden)
    return layer_scores(llm, tokenizer, task, made, scale, task.valid, layers)
