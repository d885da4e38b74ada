"""Configuration dataclasses: the shape of an ATV, which is saved with it, and how it is trained."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

from atv.errors import ATVError, unknown

REGIONS = ("all", "bottom", "middle", "top")
POSITIONS = ("last", "last:K", "answer", "all")
MOST_SEED = 2**32 - 1
"""The largest seed that NumPy's generator takes."""
SELF = "self"
"""Name of the generator that is the frozen LLM itself."""
QUERY_TEMPLATE = "{query}"
EMBEDDED_LLM = "embedded:smollm2-135m"
EMBEDDED_GENERATOR = "embedded:minilm-l6"
"""Default models, which are embedded in packages (`atv.lm.load`)."""
PAPER: dict[str, Any] = {
    "generator": "openai-community/gpt2",
    "pooling": "last",
    "train_generator": True,
    "reads": "query",
    "query_template": "Q: {query}\nA:",
    "parametrisation": "paper",
    "scale": 0.001,
}
"""Options in which the paper's ATV differs from the defaults."""
PAPER_TRAINING: dict[str, Any] = {
    "epochs": 15,
    "batch_size": 8,
    "learning_rate": 5e-4,
    "generator_learning_rate": 5e-4,
    "generator_start": 0.0,
    "lr_schedule": "constant",
    "optimizer": "adam",
    "weight_decay": 1e-5,
    "max_grad_norm": None,
    "adaptive_dropout": 0.0,
    "state_dropout": 0.0,
    "best_epoch": "loss",
    "patience": 15,
    "templates_per_row": 3,
}
"""Options in which the paper's training differs from the defaults."""
GENERATOR_OPTIONS = frozenset(
    ("generator_learning_rate", "bf16", "generator_start", "adaptive_dropout", "state_dropout")
)
"""Options of TrainConfig that have an effect only on methods with a generator."""
READ = 6400
"""Rows that a training reads by default, each as often as it is read."""
ENOUGH_TO_TRAIN = 200
"""Training rows per task from which a trained generator is more accurate than a frozen one (docs/lab-notes.md)."""


class Positions(NamedTuple):
    """The tokens that a vector is added to.

    They are the last `prompt_tokens` tokens of the prompt (None: all of them) and, if `answer` is true, every answer
    token.
    """

    prompt_tokens: int | None
    answer: bool

    @classmethod
    def parse(cls, name: str) -> Self:
        """Parse `last`, `last:K`, `answer` or `all`; raise ATVError for anything else."""
        if name == "all":
            return cls(None, True)
        if name == "answer":
            return cls(1, True)
        match = re.fullmatch(r"last(?::([1-9][0-9]*))?", str(name))
        if match is None:
            raise unknown("positions", name, POSITIONS, "K is a whole number from 1, as in last:4.")
        return cls(int(match[1] or 1), False)


def parse_layers(layers: object) -> str | list[int]:
    """Parse `all`, `bottom`, `middle`, `top`, or indices: `0,1,2`, `0-9`, or a collection of whole numbers.

    Raises:
        ATVError: anything else.
    """
    if isinstance(layers, str):
        if layers in REGIONS:
            return layers
        parts = [re.fullmatch(r" *([0-9]{1,4})(?: *- *([0-9]{1,4}))? *", part) for part in layers.split(",")]
        ranges = [range(int(part[1]), int(part[2] or part[1]) + 1) for part in parts if part is not None]
        if len(ranges) < len(parts) or not all(ranges):
            raise unknown("layer region", layers, REGIONS, "Or give indices, as in 0,1,2 or 0-9.")
        return [index for indices in ranges for index in indices]
    found = list(layers) if isinstance(layers, Iterable) else [None]
    indices = [int(index) for index in found if isinstance(index, Integral) and not isinstance(index, bool)]
    if len(indices) < len(found) or any(index < 0 for index in indices):
        raise ATVError(
            f"layers is {layers!r}; expected {', '.join(REGIONS)}, or whole numbers from 0, as in 0,1,2 or 0-9."
        )
    return indices


def is_whole(value: object, least: int) -> bool:
    """Whether a value is a whole number from `least`; a boolean is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ATVError(f"{name} is {value!r}; expected true or false.")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def random_sizes(generator: str) -> tuple[int, int] | None:
    """Return layers and width of the generator `random:LAYERSxWIDTH`; None for any other; ATVError if malformed."""
    if not str(generator).startswith("random:"):
        return None
    match = re.fullmatch(r"random:([1-9][0-9]*)x([1-9][0-9]*)", generator)
    layers, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not layers or width % (64 if width > 64 else 2):  # heads of width 64, or a single one of even width
        raise ATVError(
            f"The generator is {generator!r}; expected random:LAYERSxWIDTH, where WIDTH is an even number up to 64 "
            "or a multiple of 64, as in random:2x128."
        )
    return layers, width


class Checked:
    """Base of the configurations: conversion to and from a dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary that can be written as JSON."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    def to_json_string(self) -> str:
        """Return the same as JSON; transformers' reports to TensorBoard read a model's configuration so."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dictionary; an unknown key raises ATVError."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise unknown("option", key, known)
        return cls(**values)

    def _check_choices(self) -> None:
        """Raise ATVError for a value that is not one of those that its field's type lists."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                raise unknown(name, getattr(self, name), get_args(hint))


@dataclass
class ATVConfig(Checked):
    """The shape of an ATV. The defaults suit any LLM with any generator; `ATVConfig.paper` has the paper's values."""

    generator: str = EMBEDDED_GENERATOR
    """Model that reads the query (any encoder or decoder): Hugging Face id, folder or embedded name; `self`: the LLM's
    own lower layers, as they read the prompt; `random:LAYERSxWIDTH`: a new small decoder."""
    positions: str = "last"
    """Tokens that receive the vector: last (the paper, Eq. 6), last:K, answer, or all (the paper's released code)."""
    layers: str | Sequence[int] = "all"
    """Decoder layers that receive a vector: all (with the generator `self`: all above the one that it reads), bottom,
    middle or top (a third of them), or indices such as `0,1,2` or `0-9`."""
    scale: float = 0.05
    """lambda, the strength of the injection."""
    parametrisation: Literal["calibrated", "paper"] = "calibrated"
    """What is learned. calibrated: a common vector, a part for each task and the query's own part, relative to the size
    of the residual stream at each layer. paper: one linear map of the generator's state; all other options of the
    method and its training then default to the paper's values."""
    gate: float = 0.05
    """Fade out all but the common vector for queries unlike the training queries, from the similarity that this share
    of the training queries fall below, and give the query's own part the strength that its task's validation rows
    choose; 0: never, and full strength. Calibrated only."""
    train_generator: bool | None = field(default=None, metadata={"flags": ["--train-generator/--freeze-generator"]})
    """Train the generator too (the paper), or keep it frozen. Default: train it from 200 rows per task on. `self` is
    never trained, a new decoder always."""
    pooling: Literal["last", "mean", "cls"] = "mean"
    """How the generator's hidden states are pooled: their mean, the last token's (the paper), or the first's (cls).
    `self` always uses the last token's."""
    reads: Literal["query", "prompt", "conversation"] = "prompt"
    """What the generator reads: the prompt (the query in the first template of its task), the query alone (the paper),
    or all turns of a conversation. `self` always reads the LLM's whole prompt."""
    query_template: str = QUERY_TEMPLATE
    """Template around what the generator reads; must contain {query}. Not for `self`."""
    expansion_rank: int | None = None
    """Rank of the map from the generator's state to the vectors. Default: full."""
    generator_layer: int | None = None
    """For the generator `self`: index of the decoder layer whose output is the state; it must be below all steered
    layers. Default: the last layer of the bottom third."""
    generator_revision: str | None = None
    """Commit, tag or branch of the generator on the hub."""
    site: str = "layer"
    """What is steered in each layer: the output of the decoder layer, of its attention, or of its mlp."""
    edit: str = "add"
    """How the vectors change hidden states: add, or an edit registered in atv.steer.EDITS."""
    layer_path: str | None = None
    """Name of the LLM's list of decoder layers, if it cannot be found by structure."""

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """Return the paper's configuration (section 3 of its text), except for `options`."""
        return cls(**PAPER | options)

    def __post_init__(self) -> None:
        """Validate the fields."""
        for name in ("generator", "generator_revision", "layer_path", "site", "edit"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in ("generator", "site", "edit")):
                raise ATVError(f"{name} is {value!r}; expected a string.")
        Positions.parse(self.positions)
        self._check_choices()
        self.layers = parse_layers(self.layers)
        if not _is_finite(self.scale):
            raise ATVError(f"scale is {self.scale!r}; expected a finite number, such as 0.05.")
        if not isinstance(self.query_template, str) or "{query}" not in self.query_template:
            raise ATVError(
                f"The query template {self.query_template!r} has no {{query}}; put {{query}} where the query goes."
            )
        if not (_is_finite(self.gate) and 0 <= self.gate < 0.5):
            raise ATVError(f"gate is {self.gate!r}; expected a share from 0 to less than 0.5, such as 0.05.")
        if self.parametrisation == "paper":
            self.gate = 0.0  # there is no part to fade out
        self._check_generator()
        if self.expansion_rank is not None and not is_whole(self.expansion_rank, 1):
            raise ATVError(f"expansion_rank is {self.expansion_rank!r}; expected a whole number from 1, or none.")

    def _check_generator(self) -> None:
        """Validate the fields that depend on the generator."""
        if self.train_generator is not None:
            _check_bool("train_generator", self.train_generator)
        if self.generator == SELF:
            self.train_generator, self.pooling, self.reads = False, "last", "prompt"
            if self.query_template != QUERY_TEMPLATE:
                raise ATVError(
                    f"query_template is {self.query_template!r}, but the generator {SELF} reads the prompt as it is. "
                    "Leave the query template out."
                )
            if self.generator_layer is not None and not is_whole(self.generator_layer, 0):
                raise ATVError(f"generator_layer is {self.generator_layer!r}; expected a whole number from 0, or none.")
        elif self.generator_layer is not None:
            raise ATVError(
                f"generator_layer is {self.generator_layer!r}, but the generator is {self.generator!r}; only the "
                f"generator {SELF} reads a layer of the LLM. Leave it out."
            )
        new = random_sizes(self.generator) is not None
        if new:
            self.train_generator = True  # random weights are useless untrained
        if self.pooling == "cls" and new:
            raise ATVError(
                f"pooling is 'cls', but the generator {self.generator} is a decoder: its first token's state is the "
                "same for every query. Expected last or mean."
            )

    def read_layer(self, num_layers: int) -> int | None:
        """Return the index of the layer that the generator `self` reads, of `num_layers`; None for any other."""
        if self.generator != SELF:
            return None
        index = max(0, round(num_layers / 3) - 1) if self.generator_layer is None else self.generator_layer
        if index > num_layers - 2:
            raise ATVError(
                f"The generator {SELF} would read layer {index}; this LLM has layers 0 to {num_layers - 1}. Expected a "
                "generator_layer that leaves at least one layer above it to steer."
            )
        return index

    def layer_indices(self, num_layers: int) -> list[int]:
        """Return the indices of the chosen layers of an LLM with `num_layers` layers, in ascending order."""
        read = self.read_layer(num_layers)
        lowest = 0 if read is None else read + 1
        if self.layers == "all":
            chosen = list(range(lowest, num_layers))
        elif isinstance(self.layers, str):
            third = REGIONS.index(self.layers)
            chosen = list(range(round((third - 1) * num_layers / 3), round(third * num_layers / 3)))
        else:
            chosen = sorted(set(self.layers))
        if not chosen or chosen[0] < lowest or chosen[-1] >= num_layers:
            above = "" if read is None else f", and only layers above layer {read}, which the generator {SELF} reads"
            raise ATVError(
                f"layers is {self.layers!r}; this LLM has layers 0 to {num_layers - 1}: name at least one of them"
                f"{above}."
            )
        return chosen


@dataclass
class TrainConfig(Checked):
    """How an ATV or another method is trained; `TrainConfig.paper` has the paper's values."""

    epochs: int | None = None
    """Passes over the training rows. Default: so many that 6,400 rows are read, for an ATV at least 3,200 per task; at
    least 4 and at most 100."""
    batch_size: int = 16
    """Rows per optimiser step, over all processes."""
    learning_rate: float = field(default=0.1, metadata={"flags": ["--learning-rate", "--lr"]})
    """Peak learning rate of an ATV's common vector (the rate of the query's own part is derived from it), of the
    paper's expansion, or of another method's parameters."""
    generator_learning_rate: float | None = field(
        default=None, metadata={"flags": ["--generator-learning-rate", "--generator-lr"]}
    )
    """Peak learning rate of the generator. Default for an ATV: 5e-5, or 1e-3 if it starts from random weights."""
    best_epoch: Literal["accuracy", "loss"] = "accuracy"
    """Keep the last epoch whose validation accuracy is at most one standard error below the best one, or the epoch with
    the lowest validation loss, as always with a teacher."""
    patience: int | None = None
    """Stop after this many epochs that are worse than the one to keep. Default: a third of the epochs, at least 5."""
    gradient_accumulation_steps: int = 1
    """Parts into which each process splits its share of a batch: less memory, the same step up to rounding."""
    bf16: bool = False
    """Compute the generator's matrix products in bfloat16 in training: faster; its states differ by less than 1%."""
    templates_per_row: int = 1
    """Prompts per row and step: 3 uses every template (the paper's code), 1 takes them in turn. They share the row's
    vector; `self` makes one for each."""
    generator_start: float = 0.5
    """Share of the steps after which training of the generator starts; until then the expansion is trained on its
    unchanged states (arXiv 2202.10054). 0: from the start (the paper), as always for a new decoder."""
    adaptive_dropout: float = 0.3
    """Share of a step's rows for which an ATV uses the common vector alone, so that it also works on its own."""
    state_dropout: float = 0.5
    """Dropout on an ATV's standardised states in training."""
    lr_schedule: Literal["linear", "constant"] = "linear"
    """linear: warm-up over the first 5% of the steps, then decay to zero; or constant (the paper)."""
    optimizer: Literal["adamw", "adam"] = "adamw"
    """adamw: decoupled weight decay; adam: an L2 penalty in the gradient (the paper)."""
    weight_decay: float = 0.0
    """Weight decay of all trained parameters."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient to this norm; none: no clipping (the paper)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight the loss of each training row by rows / (answers x rows with its answer), within its task, so
    that a rare answer counts as much as a frequent one. The validation loss is not weighted."""
    seed: int = 42
    """Seed of initialisation, shuffling and dropout."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send losses and validation scores to this tracker, whose package must be installed. TensorBoard's files are
    in the folder `logs` of the output."""

    @classmethod
    def paper(cls, **options: Any) -> Self:
        """Return the paper's training configuration (section 3 of its text), except for `options`."""
        return cls(**PAPER_TRAINING | options)

    def __post_init__(self) -> None:
        """Validate the fields."""
        _check_bool("bf16", self.bf16)
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "templates_per_row", "patience", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if value is None and name in ("epochs", "patience"):
                continue
            if not is_whole(value, least):
                raise ATVError(f"{name} is {value!r}; expected a whole number from {least}.")
        if self.seed > MOST_SEED:
            raise ATVError(f"seed is {self.seed}; expected a whole number from 0 to {MOST_SEED}.")
        self._check_rates()
        self._check_choices()

    def _check_rates(self) -> None:
        for name in ("learning_rate", "generator_learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is None and name in ("generator_learning_rate", "max_grad_norm"):
                continue
            if not _is_finite(value) or value < 0:
                raise ATVError(f"{name} is {value!r}; expected a finite number that is not negative.")
        for name in ("adaptive_dropout", "state_dropout", "generator_start"):
            value = getattr(self, name)
            if not _is_finite(value) or not 0 <= value < 1:
                raise ATVError(f"{name} is {value!r}; expected a share from 0 to less than 1.")

    def learned_with(self) -> dict[str, Any]:
        """Return the options that affect what is learned, which a resumed training must share.

        The split of a batch affects only rounding and dropout masks, and a training may be resumed with fewer GPUs.
        Class weights are left out if there are none, as in records from before there were any.
        """
        values = self.to_dict()
        del values["gradient_accumulation_steps"], values["report_to"]
        if self.class_weights == "none":
            del values["class_weights"]
        return values

    def patience_of(self, epochs: int) -> int:
        """Return the patience of a training of `epochs` epochs."""
        return max(5, epochs // 3) if self.patience is None else self.patience

    def epochs_of(self, rows: int, least: int = 0) -> int:
        """Return the number of passes over that many training rows; at least `least` rows are to be read in all."""
        if self.epochs is not None:
            return self.epochs
        return min(100, max(4, round(max(READ, least) / rows)))

    def rows_per_call(self, processes: int) -> int:
        """Return the rows that each of `processes` reads at once; ATVError if they cannot split a batch equally."""
        parts = processes * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ATVError(
                f"batch_size is {self.batch_size}, the rows of one optimiser step over all processes; {processes} "
                f"processes x {self.gradient_accumulation_steps} accumulation steps cannot share it equally. Give a "
                f"multiple of {parts}."
            )
        return self.batch_size // parts
