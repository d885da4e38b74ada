"""The paper's tasks from their public data sets, labelled rows only: what `atv paper prepare` writes.

Rows on the hub are read with `datasets`. These sources are not pinned: the current version is resolved to a commit, or
the user names one, and the commit is recorded in the written file. BIG-Bench Hard, BBQ, CrowS-Pairs and ETHICS are read
from files of a repository, at a commit pinned here.
"""

import csv
import io
import json
import random
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atv.data.render import Example
from atv.data.task import Task
from atv.errors import ATVError, unknown
from atv.files import write_json
from atv.paper import layouts
from atv.paper.layouts import Row
from atv.paper.tasks import paper_templates

LONGEST = 4000
"""Maximum length of inputs, in characters; longer ones are left out."""
MOST = {"train": 1500, "valid": 300, "test": 700}
"""Maximum number of rows per split. The paper uses 90 of the training rows and 100 of the test rows."""


@dataclass(frozen=True)
class Source:
    """The source of a task's rows: a data set on the hub, or files of a repository at a commit."""

    layout: Callable[[Row], Example | None]
    data: str
    """Name of the data set or of the repository."""
    config: str | None = None
    train: str | None = "train"
    """Split, or file, of the train and valid rows. None: `test` is divided into three splits."""
    test: str = "validation"
    commit: str | None = None
    """Commit of a repository's files. None: a data set on the hub."""

    def described(self, revision: str) -> dict[str, Any]:
        """The description of the source in the written file."""
        return {"data": self.data, "config": self.config, "train": self.train, "test": self.test, "revision": revision}


Load = Callable[[Source, str, str | None], tuple[str, Iterable[Row]]]
"""Maps a source, a split and a revision to the commit and the rows."""


def _bbh(name: str) -> Source:
    commit = "9ee07bd481feebf959a6b59d61ea57bdcf30964d"
    return Source(layouts.bbh, "suzgunmirac/BIG-Bench-Hard", train=None, test=f"bbh/{name}.json", commit=commit)


def _bbq(name: str) -> Source:
    commit = "bea11bd97d79217245b5871acd247b9d6eb24598"
    return Source(layouts.bbq, "nyu-mll/BBQ", train=None, test=f"data/{name}.jsonl", commit=commit)


def _ethics(layout: Callable[[Row], Example], train: str, test: str) -> Source:
    commit = "e53100b5141300b1834361d6e172e925bbc2b46d"
    folder = "datasets/ethics"
    return Source(
        layout, "OSU-NLP-Group/Eval-LLM-Trust", train=f"{folder}/{train}", test=f"{folder}/{test}", commit=commit
    )


SOURCES = {
    "commonsense_qa": Source(layouts.commonsense_qa, "tau/commonsense_qa"),
    "openbookqa": Source(layouts.openbookqa, "allenai/openbookqa", "main", test="test"),
    "hellaswag": Source(layouts.hellaswag, "Rowan/hellaswag"),
    "boolq": Source(layouts.boolq, "google/boolq"),
    "bbh_boolean_expressions": _bbh("boolean_expressions"),
    "bbh_date_understanding": _bbh("date_understanding"),
    "bbh_reasoning_about_colored_objects": _bbh("reasoning_about_colored_objects"),
    "bbh_temporal_sequences": _bbh("temporal_sequences"),
    "arc_challenge": Source(layouts.commonsense_qa, "allenai/ai2_arc", "ARC-Challenge", test="test"),
    # A copy of allenai/math_qa, which is a script, in a format that `datasets` still reads.
    "math_qa": Source(layouts.math_qa, "regisss/math_qa", test="test"),
    "mmlu_pro_math": Source(layouts.mmlu_pro_math, "TIGER-Lab/MMLU-Pro", train=None, test="test"),
    "crows_pairs": Source(
        layouts.crows_pairs,
        "nyu-mll/crows-pairs",
        train=None,
        test="data/crows_pairs_anonymized.csv",
        commit="8aaac11c485473159ec9328a65253a5be9a479dc",
    ),
    "bbq_age": _bbq("Age"),
    # The repository has no training file for this one: use the test file, and the hard test file as test split.
    "ethics_commonsense": _ethics(
        layouts.ethics_commonsense, "commonsense/cm_test.csv", "commonsense/cm_test_hard.csv"
    ),
    "ethics_justice": _ethics(layouts.ethics_justice, "justice/justice_train.csv", "justice/justice_test.csv"),
    "superglue_rte": Source(layouts.rte, "aps/super_glue", "rte"),
    "superglue_wic": Source(layouts.wic, "aps/super_glue", "wic"),
    "glue_qnli": Source(layouts.qnli, "nyu-mll/glue", "qnli"),
    "glue_sst2": Source(layouts.sst2, "nyu-mll/glue", "sst2"),
    "glue_mnli": Source(layouts.mnli, "nyu-mll/glue", "mnli", test="validation_matched"),
    "glue_cola": Source(layouts.cola, "nyu-mll/glue", "cola"),
    "bbq_religion": _bbq("Religion"),
    "deepmind": Source(layouts.aqua, "deepmind/aqua_rat", "raw", test="test"),
    "mmlu_high_school_psychology": Source(layouts.mmlu, "cais/mmlu", "high_school_psychology", train=None, test="test"),
    "bbh_logical_deduction_five_objects": _bbh("logical_deduction_five_objects"),
}


def check_sources(names: Sequence[str], revision: str | None) -> None:
    """Refuse an unknown name, and a revision that does not apply to all of the sources."""
    for name in names:
        if name not in SOURCES:
            raise unknown("task", name, SOURCES, "These are the paper's tasks.")
    if revision is None:
        return
    data = sorted({SOURCES[name].data for name in names})
    if len(data) > 1:
        raise ATVError(f"One revision for the data sets {', '.join(data)}; expected tasks of one data set.")
    if SOURCES[names[0]].commit is not None:
        raise ATVError(f"{data[0]} is read at a pinned commit; leave the revision out.")


def prepared(name: str, load: Load, revision: str | None = None, seed: int = 42) -> tuple[dict[str, Any], int]:
    """The content of TASK.json, validated like a `Task`, and the number of rows left out.

    Args:
        name: name of the task.
        load: reads rows.
        revision: commit, tag or branch of the data set. None: the current version.
        seed: seed of the row order, and thus of the splits.

    Returns:
        The object to write, and the number of rows left out because they are empty, too long, repeated, answered in two
        ways, without five options (MathQA) or of another subject (MMLU-Pro).
    """
    source = SOURCES[name]
    try:
        commit, raw = load(source, source.test, revision)
        test = [source.layout(row) for row in raw]
        train: list[Example | None] = []
        if source.train is not None:
            _, raw = load(source, source.train, commit)
            train = [source.layout(row) for row in raw]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ATVError):
            raise ATVError(f"Task {name}, {source.data}: {error}") from None
        raise ATVError(
            f"Task {name}: a row of {source.data} does not look as expected ({type(error).__name__}: {error}); the "
            "data set has changed. Give the --revision of an earlier commit."
        ) from error
    kept_test, kept_train = _usable(test, train)
    rng = random.Random(seed)
    rng.shuffle(kept_test)
    rng.shuffle(kept_train)
    if source.train is None:  # 70% train, 10% valid, 20% test
        kept_train, kept_test = _cut(kept_test, 0.8)
        kept_train, valid = _cut(kept_train, 0.875)
    else:
        kept_train, valid = _cut(kept_train, 0.9)
    rows = {"train": kept_train, "valid": valid, "test": kept_test}
    rows = {split: examples[: MOST[split]] for split, examples in rows.items()}
    Task(name, tuple(paper_templates()[name]), tuple(rows["train"]), tuple(rows["valid"]), tuple(rows["test"]))
    content = {split: [example._asdict() for example in examples] for split, examples in rows.items()}
    left_out = len(test) + len(train) - len(kept_test) - len(kept_train) - len(valid)
    return {"source": source.described(commit) | {"seed": seed}} | content, left_out


def _usable(test: Sequence[Example | None], train: Sequence[Example | None]) -> tuple[list[Example], list[Example]]:
    """Deduplicated inputs, preferring test to train, without those that are empty, too long or answered in two ways."""
    answers: dict[str, set[str]] = {}
    for example in (*test, *train):
        if example is not None:
            answers.setdefault(example.input, set()).add(example.output)
    fine = {text for text, found in answers.items() if text.strip() and len(text) <= LONGEST and len(found) == 1}
    kept: list[list[Example]] = []
    for rows in (test, train):
        kept.append([])
        for example in rows:
            if example is not None and example.input in fine:
                fine.remove(example.input)
                kept[-1].append(example)
    return kept[0], kept[1]


def _cut(rows: list[Example], share: float) -> tuple[list[Example], list[Example]]:
    at = round(share * len(rows))
    return rows[:at], rows[at:]


def public_rows(source: Source, split: str, revision: str | None) -> tuple[str, Iterable[Row]]:
    """Read a split from the hub or a file of a repository; see `Load`."""
    try:
        if source.commit is not None:
            return source.commit, _repository_rows(source, split)
        from datasets import load_dataset
        from huggingface_hub import HfApi

        commit = str(HfApi().dataset_info(source.data, revision=revision).sha)
        return commit, load_dataset(source.data, source.config, split=split, revision=commit)
    except ModuleNotFoundError as error:
        raise ATVError(
            f"atv paper prepare needs the package {error.name}, which is not installed. Install it with: "
            "pip install datasets"
        ) from error
    except Exception as error:  # from many libraries: no network, unknown revision, unsupported format
        reason = " ".join(str(error).split())[:200]
        raise ATVError(
            f"{split} cannot be read ({type(error).__name__}: {reason}). Expected a network that reaches it; without "
            "one, give the other commands a folder of your own TASK.json files as --data DIR."
        ) from error


def _repository_rows(source: Source, path: str) -> list[Row]:
    url = f"https://raw.githubusercontent.com/{source.data}/{source.commit}/{path}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        text: str = answer.read().decode("utf-8")
    return parse_rows(text, path)


def parse_rows(text: str, path: str) -> list[Row]:
    """Rows of a CSV file, of a JSON Lines file, or of the `examples` of a JSON object."""
    if path.endswith(".csv"):
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if path.endswith(".jsonl"):
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    examples: list[Row] = json.loads(text)["examples"]
    return examples


def prepare(
    names: Sequence[str],
    out: Path,
    load: Load = public_rows,
    revision: str | None = None,
    seed: int = 42,
    force: bool = False,
) -> Iterable[str]:
    """Write `out`/TASK.json for each task (by default all) and yield one line about each.

    Existing files are kept, so that the same command resumes where it stopped.
    """
    names = list(dict.fromkeys(names)) or list(SOURCES)
    check_sources(names, revision)
    for name in names:
        file = out / f"{name}.json"
        if file.exists() and not force:
            yield f"{name}: {file} exists and is kept; --force writes it again."
            continue
        content, left_out = prepared(name, load, revision, seed)
        write_json(file, content)
        sizes = ", ".join(f"{len(content[split])} {split}" for split in MOST)
        source = content["source"]
        yield f"{name}: {sizes} rows of {source['data']} at {source['revision']}; {left_out} left out."
