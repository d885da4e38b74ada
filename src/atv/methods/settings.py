"""What a method is trained with: its defaults, then what tables of settings say, the later the stronger."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from atv.config import PAPER, PAPER_TRAINING, TrainConfig
from atv.errors import ATVError, unknown
from atv.files import read_toml
from atv.methods import METHODS

Tables = Mapping[str, Mapping[str, Any]]
"""Settings of each method by its name; those under `all` are for every method that has such an option."""
ALL = "all"


class Settings(NamedTuple):
    """What a method learns, and how."""

    config: Any
    """Of the method's `config_class`."""
    train: TrainConfig


def _options(name: str) -> tuple[set[str], set[str]]:
    """The options of a method, and those of its training; none for a method that learns nothing."""
    method = METHODS[name]
    if method.config_class is None:
        return set(), set()
    own = {field.name for field in fields(method.config_class)}  # type: ignore[arg-type]
    loop = {field.name for field in fields(TrainConfig)} if method.train_defaults is not None else set()
    return own, loop - {"seed"}


def method_settings(name: str, tables: Sequence[Tables], seed: int) -> Settings:
    """What the method `name` is trained with.

    Args:
        name: of a method that is trained.
        tables: the later ones win; within one, a method's own values win over those under `all`.
        seed: of the training.

    Raises:
        ATVError: an option that the method does not have.
    """
    method, (own, loop) = METHODS[name], _options(name)
    if method.config_class is None:
        raise ATVError(f"The method {name} learns nothing: measure it with atv eval --method {name}.")
    values: dict[str, Any] = dict(method.train_defaults or {})
    for table in tables:
        given = {key: value for key, value in table.get(ALL, {}).items() if key in own | loop}
        given |= table.get(name, {})
        values |= given
    if values.get("parametrisation") == "paper":  # then what nobody has said is the paper's too
        values = PAPER | PAPER_TRAINING | values
    for key in values:
        if key not in own | loop:
            raise unknown(f"option of the method {name}:", key, sorted(own | loop))
    config = method.config_class.from_dict({key: value for key, value in values.items() if key in own})
    train = TrainConfig(seed=seed, **{key: value for key, value in values.items() if key in loop})
    return Settings(config, train)


def read_settings(path: Path) -> dict[str, dict[str, Any]]:
    """Tables of settings from a TOML file: `[all]`, and one named after each method; a wrong name raises ATVError."""
    tables = read_toml(path, f"a TOML file with tables of settings as [{ALL}] and [atv], as atv sweep writes")
    trained = [name for name in METHODS if any(_options(name))]
    everything = set().union(*(own | loop for own, loop in map(_options, trained)))
    read = {}
    for name, values in tables.items():
        if not isinstance(values, dict):
            raise ATVError(f"{path}: {name} stands outside a table; put it under [{ALL}] or a method's name.")
        if name != ALL and name not in trained:
            raise unknown(f"table in {path}:", name, (ALL, *trained))
        read[name] = {key.replace("-", "_"): value for key, value in values.items()}
        own, loop = (everything, set()) if name == ALL else _options(name)
        for key in read[name]:
            if key not in own | loop:
                raise unknown(f"option in [{name}] of {path}:", key, sorted(own | loop))
    return read
