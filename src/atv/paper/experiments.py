"""Experiments from TOML files: conditions that are trained and evaluated on the same rows."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atv.config import is_whole
from atv.errors import ATVError, unknown
from atv.files import local, read_toml
from atv.methods import METHODS
from atv.methods.settings import Tables, method_settings

FOLDER = Path(__file__).parent / "experiments"
_WORDS = {"title", "asks", "reference", "analysis", "conditions"}
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ,.:+=-]*")


@dataclass(frozen=True)
class Condition:
    """A method with changed settings; without any, a row of the paper's tables."""

    method: str
    label: str = ""
    """Name of its table rows; by default the method's name."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the trained method; they override all tables of settings."""
    shots: int | None = None
    """Demonstrations in the prompt, instead of the profile's number."""
    train_rows: int | None = None
    """Training rows per task, instead of the profile's number."""

    def __post_init__(self) -> None:
        """Set the default label and refuse an unknown method."""
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        object.__setattr__(self, "label", self.label or self.method)

    @property
    def trained_as(self) -> str | None:
        """Name of the method that is trained for it. None: nothing is trained."""
        return METHODS[self.method].trained_as()

    @property
    def name(self) -> str:
        """The label in a form for folder names."""
        return re.sub(r"[^A-Za-z0-9+.-]+", "-", self.label)

    @property
    def trained(self) -> str | None:
        """The training's name in folder names. Conditions without training settings share the method's."""
        own = self.settings or self.train_rows is not None
        return self.name if own and self.trained_as is not None else self.trained_as


@dataclass(frozen=True)
class Experiment:
    """A question and the conditions that answer it."""

    name: str
    title: str
    asks: str
    """The question and how it is answered."""
    conditions: tuple[Condition, ...]
    reference: str
    """Label of the condition with which the others are compared."""
    analysis: bool = False
    """Also analyse the vectors: the adapter of the method atv, together with an ELICIT library."""


def known_experiments() -> list[str]:
    """Names of the built-in experiments."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_experiment(name: str) -> Experiment:
    """Read a built-in experiment by name, or a TOML file; any mistake in it raises ATVError.

    The file has a `title`, a question (`asks`), the label of its `reference`, and tables `[conditions."LABEL"]`, each
    with a `method`, optionally `shots` (for a method with demonstrations) and `train_rows`, and settings of the method.
    """
    own = name.endswith(".toml")
    path = local(name) if own else FOLDER / f"{name}.toml"
    if not own and name not in known_experiments():
        raise unknown("experiment", name, known_experiments(), "Or give your own TOML file.")
    text = read_toml(path, "a TOML file that describes an experiment, with title, asks, reference, conditions")
    for key in text.keys() - _WORDS:
        raise unknown(f"key in {path}:", key, sorted(_WORDS))
    found = text.get("conditions")
    if not isinstance(found, dict) or not found:
        raise ATVError(f'{path} has no conditions; expected tables as [conditions."atv, bottom"] with a method.')
    conditions = tuple(_condition(path, label, values) for label, values in found.items())
    labels = [condition.label for condition in conditions]
    reference = text.get("reference", labels[0])
    if reference not in labels:
        raise unknown(f"reference in {path}:", reference, labels)
    said = {key: str(text.get(key, "")) for key in ("title", "asks")}
    experiment = Experiment(
        path.stem, said["title"] or path.stem, said["asks"], conditions, reference, _analysed(path, text)
    )
    conditions_of([experiment])
    return experiment


def conditions_of(experiments: Iterable[Experiment]) -> list[Condition]:
    """The conditions of several experiments without duplicates.

    Raises:
        ATVError: a label has two meanings, or two conditions would share a folder that only one of them belongs into.
    """
    found: dict[str, Condition] = {}
    for condition in (condition for experiment in experiments for condition in experiment.conditions):
        if found.setdefault(condition.label, condition) != condition:
            raise ATVError(
                f"The condition {condition.label!r} is {found[condition.label]} in one experiment and {condition} in "
                "another; give one of them another label."
            )
    folders: dict[str, tuple[str, Any]] = {}
    for of in found.values():
        holds: dict[str, Any] = {f"runs/{of.name}": of.label}
        if of.trained is not None:
            holds[f"trained/{of.trained}"] = (of.trained_as, of.settings, of.train_rows)
        for folder, what in holds.items():
            label, former = folders.setdefault(folder, (of.label, what))
            if former != what:
                raise ATVError(
                    f"The conditions {label!r} and {of.label!r} would share the folder {folder}-SEED; give one of them "
                    "a label that differs in letters or digits and is no method's name."
                )
    return list(found.values())


def _analysed(path: Path, text: dict[str, Any]) -> bool:
    analysis = text.get("analysis", False)
    if not isinstance(analysis, bool):
        raise ATVError(f"{path}: analysis is {analysis!r}; expected true or false.")
    if analysis and not {"atv", "elicit"} <= text["conditions"].keys():
        raise ATVError(f"{path}: an analysis is of the conditions atv and elicit; found {list(text['conditions'])}.")
    return analysis


def _condition(path: Path, label: str, values: Any) -> Condition:
    """One table of the file. Its settings are checked, so that mistakes are found before training."""
    if not isinstance(values, dict) or "method" not in values or not _LABEL.fullmatch(label):
        raise ATVError(
            f"{path}: the condition {label!r} is {values!r}; expected a table with a method, under a label of letters, "
            "digits, blanks and , . : + = -"
        )
    settings = {key.replace("-", "_"): value for key, value in values.items() if key != "method"}
    method = values["method"]
    rows = _taken(path, label, settings, "train_rows")
    shots = _taken(path, label, settings, "shots") if method in METHODS and METHODS[method].shots else None
    condition = Condition(method, label, settings, shots, rows)
    if condition.trained_as is not None:
        condition_settings(condition, [], 0)
    elif settings or rows is not None:
        named = [*settings, *(["train_rows"] if rows is not None else [])]
        raise ATVError(
            f"{path}: {label} sets {', '.join(named)}, and the method {method} learns nothing: leave it out."
        )
    return condition


def _taken(path: Path, label: str, settings: dict[str, Any], key: str) -> int | None:
    value: int | None = settings.pop(key, None)
    if value is not None and not is_whole(value, 1):
        raise ATVError(f"{path}: {key} of {label} is {value!r}; expected a whole number from 1.")
    return value


def condition_settings(condition: Condition, tables: Sequence[Tables], seed: int) -> Any:
    """The `Settings` with which a condition is trained: those of its method, overridden by its own."""
    trained = condition.trained_as
    assert trained is not None
    return method_settings(trained, [*tables, {trained: condition.settings}], seed)
