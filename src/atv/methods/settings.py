"""A method's settings for training: its defaults, then tables of settings, where later ones win."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from atv.config import GENERATOR_OPTIONS, PAPER, PAPER_TRAINING, ATVConfig, Checked, TrainConfig
from atv.errors import ATVError, unknown
from atv.methods import METHODS, TRAINED

Tables = Mapping[str, Mapping[str, Any]]
"""Settings by method name; those under `all` are for every method with such an option."""
ALL = "all"


class Settings(NamedTuple):
    """A method's configuration and how it is trained."""

    config: Any
    """An instance of the method's `config_class`."""
    train: TrainConfig


class Learned(NamedTuple):
    """The options of a trained method."""

    config: type[Checked]
    """Its configuration class."""
    train: dict[str, Any] | None
    """Its defaults that differ from TrainConfig's. None: it has no training loop."""
    generator: frozenset[str] = GENERATOR_OPTIONS
    """Those of `GENERATOR_OPTIONS` that have an effect on it."""

    def own(self) -> list[str]:
        """The names of its configuration's options."""
        return [field.name for field in fields(self.config)]  # type: ignore[arg-type]

    def options(self) -> list[str]:
        """The names of its configuration's and training's options, without the seed, which every method has."""
        unused = GENERATOR_OPTIONS - self.generator | {"seed"}
        loop = [] if self.train is None else [field.name for field in fields(TrainConfig)]
        return [*self.own(), *(option for option in loop if option not in unused)]


def learned(name: str) -> Learned:
    """The options of the method `name`; ATVError if it is unknown or learns nothing."""
    if name == "atv":  # the same as its class says, without importing torch, for command-line help
        return Learned(ATVConfig, {})
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method = METHODS[name]
    if method.config_class is None:
        raise ATVError(f"The method {name} learns nothing: measure it with atv eval --method {name}.")
    return Learned(method.config_class, method.train_defaults, method.generator_options)


def method_settings(name: str, tables: Sequence[Tables], seed: int) -> Settings:
    """The settings with which the method `name` is trained.

    Args:
        name: a trained method.
        tables: later ones win. Within a table, a method's own values win over those under `all`.
        seed: seed of the training.

    Raises:
        ATVError: an option that the method does not have.
    """
    of = learned(name)
    own = of.own()
    # All methods share one TrainConfig: under `all`, and in the paper's, are options without an effect on this one.
    loop = [] if of.train is None else [field.name for field in fields(TrainConfig) if field.name != "seed"]
    values: dict[str, Any] = dict(of.train or {})
    for table in tables:
        values |= {key: value for key, value in table.get(ALL, {}).items() if key in (*own, *loop)}
        for key in table.get(name, {}):
            if key not in of.options():
                raise unknown(f"option of the method {name}:", key, of.options())
        values |= table.get(name, {})
    if values.get("parametrisation") == "paper":  # then all other defaults are the paper's too
        values = PAPER | PAPER_TRAINING | values
    config = of.config.from_dict({key: value for key, value in values.items() if key in own})
    train = TrainConfig(seed=seed, **{key: value for key, value in values.items() if key in loop})
    return Settings(config, train)


def check_tables(tables: Tables, file: Path) -> None:
    """Raise ATVError for an unknown key in a file's tables of methods; in `all`, for one that no method has."""
    for name, values in tables.items():
        asked = TRAINED if name == ALL else (name,)
        known = {key for of in map(learned, asked) for key in of.options()}
        for key in values:
            if key not in known:
                raise unknown(f"option in [{name}] of {file}:", key, known)
