"""Profiles: how much of the paper's protocol is run."""

from dataclasses import dataclass, field
from typing import Any

from atv.config import PAPER_TRAINING

IN_TABLES = ("zero-shot", "icl", "bm25", "elicit", "i2cl", "lora", "prefix", "fixed", "atv", "icl+atv")
"""Default methods of a reproduction or a sweep."""


@dataclass(frozen=True)
class Profile:
    """The paper's protocol (its section 5), or a part of it.

    Rows, variants and seeds are the same for every method.
    """

    name: str
    says: str
    """What it cuts, for readers of its tables."""
    train_rows: int = 90
    """Training rows per task, drawn from the training split with each seed; also the source of demonstrations."""
    valid_rows: int = 30
    """Validation rows per task, to choose the epoch and ELICIT's layers; the paper does not state their number."""
    test_rows: int = 100
    """Test rows per task, the first ones of the split for every seed; a split sorted by answer is refused."""
    seeds: tuple[int, ...] = (42, 100, 10)
    variants: str = "all"
    shots: int = 16
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to use, out of those given. None: all."""
    tasks_per_category: int | None = None
    """Number of tasks per category, those with the shortest inputs. None: all."""
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Settings that override a method's defaults and are overridden by the user's."""

    def tables(self) -> dict[str, dict[str, Any]]:
        """Its settings, with as many demonstrations for methods that learn from them as ICL shows."""
        shots = {"shots": self.shots, "demonstrations": self.shots}
        return self.settings | {"all": shots | self.settings.get("all", {})}


_PAPER = {name: value for name, value in PAPER_TRAINING.items() if "learning_rate" not in name}
"""Training settings of all methods of the paper, except the learning rates, which differ by method."""
_SMOLLM2: dict[str, dict[str, Any]] = {"lora": {"learning_rate": 2e-3}}
"""Chosen on validation rows for the embedded LLM (docs/lab-notes.md); at the paper's rate, 4e-4, LoRA learns less."""

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("paper", "Nothing is cut.", settings={"all": _PAPER, "atv": {"parametrisation": "paper"}}),
        Profile(
            "small",
            "Cut for two CPU cores: each method's own number of epochs instead of 15 (of the paper's 90 training rows "
            "per task), 16 test rows instead of 100, 3 prompt variants instead of 9 (each template once, each with "
            "another answer prefix), one seed instead of three, 4 demonstrations instead of 16, 5 validation rows that "
            "choose ELICIT's layers instead of 10.",
            valid_rows=8,
            test_rows=16,
            seeds=(42,),
            variants="diagonal",
            shots=4,
            settings=_SMOLLM2 | {"elicit": {"layer_rows": 5}},
        ),
        Profile(
            "ablation",
            "One short task of each category and three unseen ones, so that many conditions can be compared on two CPU "
            "cores: 90 training, 30 validation and 100 test rows per task (fewer where a task has fewer), the first "
            "template with A:, 4 demonstrations; LoRA, whose step reads whole prompts, for 5 epochs.",
            variants="first",
            shots=4,
            tasks=(
                "glue_sst2",
                "bbh_boolean_expressions",
                "commonsense_qa",
                "math_qa",
                "ethics_justice",
                "glue_cola",
                "mmlu_high_school_psychology",
                "deepmind",
            ),
            settings={"lora": _SMOLLM2["lora"] | {"epochs": 5}, "elicit": {"layer_rows": 5}},
        ),
        Profile(
            "pair",
            "Two tasks with more rows: 400 training, 100 validation and 100 test rows of SST-2 and of MNLI, the first "
            "template with A:, 4 demonstrations; LoRA for 5 epochs.",
            train_rows=400,
            valid_rows=100,
            variants="first",
            shots=4,
            tasks=("glue_sst2", "glue_mnli"),
            settings={"lora": _SMOLLM2["lora"] | {"epochs": 5}, "elicit": {"layer_rows": 5}},
        ),
        Profile(
            "smoke",
            "A few minutes to check that everything runs; its numbers mean nothing: the shortest task per category, "
            "12 training and 8 test rows per task, one variant, one seed, 2 demonstrations, one epoch.",
            train_rows=12,
            valid_rows=3,
            test_rows=8,
            seeds=(42,),
            variants="first",
            shots=2,
            tasks_per_category=1,
            settings={"all": {"epochs": 1}, "elicit": {"exemplars": 2}},
        ),
    )
}
