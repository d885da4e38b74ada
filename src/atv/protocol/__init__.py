"""What is run beside what, on which rows: a method's settings, measuring it, the paper's tables, the sweep."""

from atv.protocol.experiments import Condition, Experiment, conditions_of, known_experiments, read_experiment
from atv.protocol.measure import Frozen, measure
from atv.protocol.profiles import PROFILES, Profile
from atv.protocol.reproduce import chosen_tasks, reproduce
from atv.protocol.settings import Settings, method_settings, read_settings
from atv.protocol.sweep import sweep

__all__ = [
    "PROFILES",
    "Condition",
    "Experiment",
    "Frozen",
    "Profile",
    "Settings",
    "chosen_tasks",
    "conditions_of",
    "known_experiments",
    "measure",
    "method_settings",
    "read_experiment",
    "read_settings",
    "reproduce",
    "sweep",
]
