"""What a method is trained with: its defaults, then what tables of settings say, the later the stronger."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from atv.config import PAPER, PAPER_TRAINING, ATVConfig, Checked, TrainConfig
from atv.errors import ATVError, unknown
from atv.methods import METHODS, TRAINED

Tables = Mapping[str, Mapping[str, Any]]
"""Settings of each method by its name; those under `all` are for every method that has such an option."""
ALL = "all"


class Settings(NamedTuple):
    """What a method learns, and how."""

    config: Any
    """Of the method's `config_class`."""
    train: TrainConfig


class Learned(NamedTuple):
    """What there is to set of a method that is trained."""

    config: type[Checked]
    """Its own configuration."""
    train: dict[str, Any] | None
    """What it sets otherwise than TrainConfig; None: it has no training loop."""

    def own(self) -> list[str]:
        """The names of its own options."""
        return [field.name for field in fields(self.config)]  # type: ignore[arg-type]

    def loop(self) -> list[str]:
        """The names of the options of its training, without the seed, which every method has."""
        return [] if self.train is None else [field.name for field in fields(TrainConfig) if field.name != "seed"]


def learned(name: str) -> Learned:
    """What there is to set of the method `name`; ATVError if it is unknown or learns nothing."""
    if name == "atv":  # what its class says too, but without importing torch: for the help of the command line
        return Learned(ATVConfig, {})
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method = METHODS[name]
    if method.config_class is None:
        raise ATVError(f"The method {name} learns nothing: measure it with atv eval --method {name}.")
    return Learned(method.config_class, method.train_defaults)


def method_settings(name: str, tables: Sequence[Tables], seed: int) -> Settings:
    """What the method `name` is trained with.

    Args:
        name: of a method that is trained.
        tables: the later ones win; within one, a method's own values win over those under `all`.
        seed: of the training.

    Raises:
        ATVError: an option that the method does not have.
    """
    of = learned(name)
    own, loop = of.own(), of.loop()
    values: dict[str, Any] = dict(of.train or {})
    for table in tables:
        values |= {key: value for key, value in table.get(ALL, {}).items() if key in (*own, *loop)}
        values |= table.get(name, {})
    if values.get("parametrisation") == "paper":  # then what nobody has said is the paper's too
        values = PAPER | PAPER_TRAINING | values
    for key in values:
        if key not in (*own, *loop):
            raise unknown(f"option of the method {name}:", key, [*own, *loop])
    config = of.config.from_dict({key: value for key, value in values.items() if key in own})
    train = TrainConfig(seed=seed, **{key: value for key, value in values.items() if key in loop})
    return Settings(config, train)


def check_tables(tables: Tables, file: Path) -> None:
    """Raise ATVError for a key of methods' tables of a file that its method, or of `all` that no method, has."""
    for name, values in tables.items():
        asked = TRAINED if name == ALL else (name,)
        known = {key for of in map(learned, asked) for key in (*of.own(), *of.loop())}
        for key in values:
            if key not in known:
                raise unknown(f"option in [{name}] of {file}:", key, known)
