"""What one chooses: the shape of an ATV (saved with it) and how it is trained."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from typing import Any, Literal, NamedTuple, Self

from atv.errors import ATVError, unknown

POOLINGS = ("last", "mean", "cls")
REGIONS = ("all", "bottom", "middle", "top")
POSITIONS = ("last", "last:K", "answer", "all")
MOST_SEED = 2**32 - 1
"""The largest seed that NumPy's generator takes."""
SELF = "self"
"""Names the generator that is the frozen LLM itself."""
QUERY_TEMPLATE = "Q: {query}\nA:"


class Positions(NamedTuple):
    """The tokens that a vector is added to.

    The last `prompt_tokens` tokens of the prompt (None: all of them) and, where `answer` is true, every answer
    token after it.
    """

    prompt_tokens: int | None
    answer: bool

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read `last`, `last:K`, `answer` or `all`; raise ATVError for anything else."""
        if name == "all":
            return cls(None, True)
        if name == "answer":
            return cls(1, True)
        match = re.fullmatch(r"last(?::([1-9][0-9]*))?", str(name))
        if match is None:
            raise unknown("positions", name, POSITIONS, "K is a whole number from 1, as in last:4.")
        return cls(int(match[1] or 1), False)


def parse_layers(layers: object) -> str | list[int]:
    """Read `all`, `bottom`, `middle`, `top`, or indices: `0,1,2` and `0-9`, or whole numbers in any collection.

    Raises:
        ATVError: it is none of these.
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


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ATVError(f"{name} is {value!r}; expected true or false.")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def random_sizes(generator: str) -> tuple[int, int] | None:
    """Layers and width of the generator `random:LAYERSxWIDTH`; None if it is another; ATVError if it is malformed."""
    if not str(generator).startswith("random:"):
        return None
    match = re.fullmatch(r"random:([1-9][0-9]*)x([1-9][0-9]*)", generator)
    layers, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not layers or width % (64 if width > 64 else 2):  # heads of 64, or one of an even width
        raise ATVError(
            f"The generator is {generator!r}; expected random:LAYERSxWIDTH, its width an even number up to 64 or a "
            "multiple of 64, as in random:2x128."
        )
    return layers, width


class Checked:
    """What every configuration has: to and from a dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary, ready for JSON."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a dictionary; a key that is no option raises ATVError."""
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise unknown("option", key, known)
        return cls(**values)


@dataclass
class ATVConfig(Checked):
    """The shape of an ATV. The defaults are the paper's (section 3 of its text)."""

    generator: str = "openai-community/gpt2"
    """Hugging Face id or folder of the model that reads the query (any encoder or decoder); `self`: the LLM's own lower
    layers, while they read the prompt; `random:LAYERSxWIDTH`: a new small decoder."""
    generator_revision: str | None = None
    """Commit, tag or branch of the generator on the hub."""
    generator_layer: int | None = None
    """Of the generator `self`: index of the decoder layer whose output is the state, below all steered ones; none: the
    last of the bottom third."""
    pooling: Literal["last", "mean", "cls"] = "last"
    """How the generator's hidden states become one vector: its last token (the paper), their mean, or the first."""
    train_generator: bool = True
    """Train generator and expansion together (the paper), or keep the generator frozen; of `self` always false."""
    query_template: str = QUERY_TEMPLATE
    """What the generator reads, in training and in use alike; must hold {query}. Of no use to `self`."""
    expansion_rank: int | None = None
    """None: one full linear map (the paper). A number: the product of two maps through that many dimensions."""
    layers: str | Sequence[int] = "all"
    """Decoder layers that receive a vector: all (with the generator `self`: all above the one that is read), a third of
    them (bottom, middle, top), or indices: as text (`0,1,2`, `0-9`), a list or a range; kept as a list."""
    layer_path: str | None = None
    """Name of the LLM's list of decoder layers, for a model where it cannot be found by structure."""
    positions: str = "last"
    """Tokens that receive the vector: last (the paper, Eq. 6), last:K, answer, or all (the paper's released code)."""
    scale: float = 0.001
    """lambda, the strength of the injection."""

    def __post_init__(self) -> None:
        """Refuse values that no ATV can have."""
        for name in ("generator", "generator_revision", "layer_path"):
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name == "generator"):
                raise ATVError(f"{name} is {value!r}; expected a text.")
        _check_bool("train_generator", self.train_generator)
        Positions.parse(self.positions)
        if self.pooling not in POOLINGS:
            raise unknown("pooling", self.pooling, POOLINGS)
        self.layers = parse_layers(self.layers)
        if not _is_finite(self.scale):
            raise ATVError(f"scale is {self.scale!r}; expected a finite number, such as 0.05.")
        if not isinstance(self.query_template, str) or "{query}" not in self.query_template:
            raise ATVError(
                f"The query template {self.query_template!r} has no {{query}}; put {{query}} where the query goes."
            )
        self._check_generator()
        if self.expansion_rank is not None and not _is_whole(self.expansion_rank, 1):
            raise ATVError(f"expansion_rank is {self.expansion_rank!r}; expected a whole number from 1, or none.")

    def _check_generator(self) -> None:
        """Refuse what does not go with the generator that is named."""
        if self.generator == SELF:
            self.train_generator = False  # the LLM is frozen
            if self.pooling != "last":
                raise ATVError(
                    f"pooling is {self.pooling!r} and the generator {SELF}: its state is that of the prompt's last "
                    "token, which has read all the others. Expected last."
                )
            if self.query_template != QUERY_TEMPLATE:
                raise ATVError(
                    f"query_template is {self.query_template!r} and the generator {SELF}: it reads the prompt as it "
                    "is. Leave the query template out."
                )
            if self.generator_layer is not None and not _is_whole(self.generator_layer, 0):
                raise ATVError(f"generator_layer is {self.generator_layer!r}; expected a whole number from 0, or none.")
        elif self.generator_layer is not None:
            raise ATVError(
                f"generator_layer is {self.generator_layer!r} and the generator {self.generator!r}; it says which "
                f"layer of the LLM the generator {SELF} reads: leave it out."
            )
        new = random_sizes(self.generator) is not None
        if new and not self.train_generator:
            raise ATVError(
                f"The generator {self.generator} begins with random weights and train_generator is false: it would "
                "never learn to read. Train it, or name a model that can read."
            )
        if self.pooling == "cls" and new:
            raise ATVError(
                f"pooling is 'cls' and the generator {self.generator}: a decoder reads its first token before the "
                "query, so that its state is the same for every query. Expected last or mean."
            )

    def read_layer(self, num_layers: int) -> int | None:
        """Index of the layer that the generator `self` reads, in an LLM with `num_layers`; None of any other."""
        if self.generator != SELF:
            return None
        index = max(0, round(num_layers / 3) - 1) if self.generator_layer is None else self.generator_layer
        if index > num_layers - 2:
            raise ATVError(
                f"The generator {SELF} is to read layer {index}; this LLM has layers 0 to {num_layers - 1}. Expected a "
                "generator_layer that leaves at least one layer above it to steer."
            )
        return index

    def layer_indices(self, num_layers: int) -> list[int]:
        """The chosen layers of an LLM with `num_layers` of them, in ascending order."""
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
            above = "" if read is None else f", and none but those above layer {read}, which the generator {SELF} reads"
            raise ATVError(
                f"layers is {self.layers!r}; this LLM has layers 0 to {num_layers - 1}: name at least one of them"
                f"{above}."
            )
        return chosen


@dataclass
class TrainConfig(Checked):
    """How an ATV is trained. Optimiser, rate, decay and epochs are the paper's (section 3 of its text)."""

    epochs: int = 15
    """Passes over the training rows."""
    batch_size: int = 8
    """Rows per optimiser step, over all processes; each row is read with `templates_per_row` prompts."""
    gradient_accumulation_steps: int = 1
    """Parts that a process reads its share of a batch in: less memory, the same step up to rounding."""
    learning_rate: float = 5e-4
    """Constant learning rate of the expansion (and of the generator unless it has its own)."""
    generator_learning_rate: float | None = None
    """Learning rate of the generator; none: the same as the expansion's."""
    weight_decay: float = 1e-5
    """Adam's coupled L2 penalty."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm; none: no clipping (the paper)."""
    bf16: bool = False
    """The generator's matrix products in bfloat16 while it is trained: faster, its states differ by less than 1%."""
    templates_per_row: int = 3
    """Prompts of a row in a step: 3 is every template (the paper's code), 1 takes them in turn. They share the row's
    vector; `self` makes one of each."""
    seed: int = 42
    """Seed of initialisation, order and dropout."""

    def __post_init__(self) -> None:
        """Refuse values that no training can have."""
        _check_bool("bf16", self.bf16)
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "templates_per_row", "seed"):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not _is_whole(value, least):
                raise ATVError(f"{name} is {value!r}; expected a whole number from {least}.")
        if self.seed > MOST_SEED:
            raise ATVError(f"seed is {self.seed}; expected a whole number from 0 to {MOST_SEED}.")
        for name in ("learning_rate", "generator_learning_rate", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is None and name in ("generator_learning_rate", "max_grad_norm"):
                continue
            if not _is_finite(value) or value < 0:
                raise ATVError(f"{name} is {value!r}; expected a finite number that is not negative.")

    def rows_per_call(self, processes: int) -> int:
        """Rows that a process reads at once, where `processes` share a batch; ATVError if it cannot be split so."""
        parts = processes * self.gradient_accumulation_steps
        if self.batch_size % parts:
            raise ATVError(
                f"batch_size is {self.batch_size}, the rows of one optimiser step over all processes; {processes} "
                f"processes x {self.gradient_accumulation_steps} accumulation steps cannot share it equally. Give a "
                f"multiple of {parts}."
            )
        return self.batch_size // parts
