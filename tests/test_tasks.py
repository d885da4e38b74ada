"""Tasks: those built in, solved again from their text; those from a folder, and every way in which one can be wrong."""

import hashlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from datetime import datetime
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from rendering import Letters

from atv.data import BUILTIN, UNSEEN, Example, Task, available_tasks, builtin_task, load_task, load_tasks

SPLITS = ("train", "valid", "test")
KNOWN = {
    "sentiment": ("NLU", (204, 40, 120), "negative positive"),
    "topic": ("NLU", (204, 40, 120), "business food science sports"),
    "boolean_expressions": ("Reasoning", (120, 20, 100), "False True"),
    "temporal_sequences": ("Reasoning", (60, 20, 60), "A B C D"),
    "outlook": ("Unseen", (24, 20, 100), "negative positive"),
}
WRITTEN = ("sentiment", "topic", "outlook")


def splits(task: Task) -> list[tuple[Example, ...]]:
    return [getattr(task, split) for split in SPLITS]


def every_row(name: str) -> list[Example]:
    return [row for split in splits(builtin_task(name)) for row in split]


def test_the_built_in_tasks_are_the_known_ones():
    assert available_tasks() == [task.name for task in load_tasks()] == list(KNOWN) == list(BUILTIN)
    assert [task.name for task in load_tasks() if task.category == UNSEEN] == ["outlook"]


@pytest.mark.parametrize("name", KNOWN)
def test_a_built_in_task_has_its_known_category_sizes_and_options(name):
    task = load_task(name)
    category, sizes, options = KNOWN[name]
    assert (task.name, task.category) == (name, category)
    assert tuple(len(split) for split in splits(task)) == sizes
    assert task.options == tuple(options.split())


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("split", SPLITS)
def test_the_labels_of_a_written_task_are_equally_frequent_in_each_split(name, split):
    counts = Counter(row.output for row in getattr(builtin_task(name), split))
    assert counts == dict.fromkeys(builtin_task(name).options, counts.total() // len(counts))


@pytest.mark.parametrize(("name", "most"), [("boolean_expressions", 0.7), ("temporal_sequences", 0.45)])
@pytest.mark.parametrize("split", SPLITS)
def test_no_label_of_a_generated_task_wins_by_being_frequent(name, most, split):
    rows = getattr(builtin_task(name), split)
    assert max(Counter(row.output for row in rows).values()) / len(rows) < most


@pytest.mark.parametrize("name", KNOWN)
def test_no_input_of_a_built_in_task_occurs_twice_even_if_case_and_punctuation_differ(name):
    plain = Counter(re.sub(r"[^\w()]+", " ", row.input.casefold()).strip() for row in every_row(name))
    assert plain.most_common(1)[0][1] == 1


def test_the_unseen_task_shares_its_answers_and_none_of_its_inputs_with_the_one_trained_on():
    assert builtin_task("outlook").options == builtin_task("sentiment").options
    assert not {row.input for row in every_row("outlook")} & {row.input for row in every_row("sentiment")}


@pytest.mark.parametrize("name", ["sentiment", "outlook"])
def test_no_input_of_a_written_task_says_its_answer(name):
    assert not [row for row in every_row(name) if re.search(r"positive|negative", row.input, re.IGNORECASE)]


@pytest.mark.parametrize("name", KNOWN)
def test_a_built_in_task_has_three_different_templates_that_take_the_input_once(name):
    templates = builtin_task(name).templates
    assert len(set(templates)) == 3
    assert [template.count("{input}") for template in templates] == [1, 1, 1]
    assert not [template for template in templates if "{" in template.replace("{input}", "")]


DIGEST = """
import hashlib
from atv.data import load_tasks

print(hashlib.sha256(repr(load_tasks()).encode()).hexdigest())
"""


def test_the_built_in_tasks_are_the_same_on_each_load_and_in_each_process():
    assert [make() for make in BUILTIN.values()] == load_tasks()
    here = hashlib.sha256(repr(load_tasks()).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_every_boolean_expression_has_the_value_that_python_gives_it():
    for row in every_row("boolean_expressions"):
        assert re.fullmatch(r"((not|and|or|True|False|\(|\)) )+is", row.input)
        assert row.output == str(eval(row.input.removesuffix(" is")))


def test_boolean_expressions_need_every_operator():
    words = Counter(word for row in every_row("boolean_expressions") for word in row.input.split())
    assert min(words[word] for word in ("not", "and", "or", "(", "True", "False")) > 100
    lengths = [len(row.input.split()) - 1 for row in every_row("boolean_expressions")]
    assert (min(lengths), max(lengths)) == (4, 12)


def clock(text: str) -> int:
    return datetime.strptime(text, "%I %p").hour


def span(text: str) -> range:
    start, end = text.split(" to ")
    return range(clock(start), clock(end))


def free_options(text: str) -> list[str]:
    """Letters of the options in which someone had the place open and was seen nowhere else, read from the text."""
    story, listed = text.split("\nOptions:\n")
    name = re.match(r"(\w+) went to", story)[1]
    seen = re.findall(rf"\w+ saw {name} [a-z ]+ from (\d+ [ap]m to \d+ [ap]m)\.", story)
    assert len(seen) == 3
    busy = {hour for when in seen for hour in span(when)}
    closed = clock(re.search(r"closed at (\d+ [ap]m)\.", story)[1])
    options = dict(line.split(". ") for line in listed.split("\n"))
    assert list(options) == list("ABCD")
    for first, second in combinations(options.values(), 2):
        assert not set(span(first)) & set(span(second))
    return [letter for letter, when in options.items() if not set(span(when)) & busy and max(span(when)) < closed]


def test_every_temporal_row_has_one_option_that_its_text_allows_and_that_is_the_answer():
    for row in every_row("temporal_sequences"):
        assert free_options(row.input) == [row.output]


TEMPLATES = ("{input}\nyes or no?", "Question: {input}", "Is it so? {input}")


def examples(*rows: str) -> tuple[Example, ...]:
    return tuple(Example(*row.split("=")) for row in rows)


def make_task(**changed: object) -> Task:
    fields = {
        "templates": TEMPLATES,
        "train": examples("a=yes", "b=no", "c=maybe"),
        "valid": examples("d=no", "i=no"),
        "test": examples("e=yes", "f=no", "g=yes", "h=yes"),
    }
    return Task("toy", **fields | changed)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"templates": ()}, ("no template", "expected at least one with {input}")),
        ({"templates": ("Q: {query}",)}, ("the template 'Q: {query}' has no {input}", "put {input} where")),
        ({"templates": (*TEMPLATES, "{ input }")}, ("the template '{ input }' has no {input}",)),
        ({"train": ()}, ("the split 'train' is empty", "at least one row")),
        ({"valid": ()}, ("the split 'valid' is empty", "at least one row")),
        ({"test": ()}, ("the split 'test' is empty", "at least one row")),
        ({"test": examples("e=yes", "a=no")}, ("the input 'a' is in train and in test", "remove it from one")),
        ({"valid": examples("c=no")}, ("the input 'c' is in train and in valid", "remove it from one")),
        ({"test": examples("e=yes", "d=no")}, ("the input 'd' is in valid and in test", "remove it from one")),
        (
            {"test": examples(*(f"{letter}=-1" for letter in "opqrstuvwx"))},
            ("all 10 test answers are '-1'", "at least two different", "hidden-label"),
        ),
    ],
)
def test_a_task_on_which_no_honest_number_can_be_measured_is_refused(changed, parts):
    with refused("Task toy: ", *parts):
        make_task(**changed)


def test_an_input_may_repeat_within_a_split_and_a_single_test_row_is_not_a_constant_answer():
    assert len(make_task(train=examples("a=yes", "a=no")).train) == 2
    assert make_task(test=examples("e=yes")).majority() == 1.0


def test_the_options_are_all_answers_of_all_splits_in_order():
    assert make_task().options == ("maybe", "no", "yes")
    assert make_task(options=("yes", "no")).options == ("yes", "no")


def test_the_majority_is_the_share_of_the_most_frequent_test_answer():
    assert make_task().majority() == 0.75
    assert load_task("topic").majority() == 0.25


def test_ones_own_templates_take_the_place_of_a_built_in_tasks():
    (task,) = load_tasks(["sentiment"], templates=["{input}?"])
    assert task.templates == ("{input}?",)


def read(task: Task, query: str, template: int = 0, prefix: str = "A:") -> str:
    """What the LLM reads of a query."""
    return Letters.text(task.renderers()[template, prefix].prompt(Letters(), Example(query, "")).ids)


def test_a_prompt_is_the_template_a_line_break_and_the_prefix_with_nothing_after_it():
    assert read(make_task(), "Is rain wet?", 1, "The answer is") == "Question: Is rain wet?\nThe answer is"
    assert read(make_task(), "Is rain wet?") == "Is rain wet?\nyes or no?\nA:"


WORDS = st.text(max_size=20)


BRACES = st.sampled_from(["{input}", "{}", "{0}", "{x!r}", "}{", "%s", "\\1"])


@given(WORDS, WORDS.map(lambda text: text.replace("{", "<")), BRACES)
def test_a_query_is_put_in_as_it_is_whatever_its_braces(query, around, braces):
    task = make_task(templates=(f"{around}{{input}}{around}",))
    query = f"{query}{braces}{query}"
    assert read(task, query) == around + query + around + "\nA:"


def test_other_braces_of_a_template_stay_as_they_are():
    assert read(make_task(templates=("{a} {input} {}",)), "x") == "{a} x {}\nA:"


@pytest.mark.parametrize("count", [1, 3])
def test_the_variants_are_every_template_with_each_of_the_three_prefixes(count):
    variants = list(make_task(templates=TEMPLATES[:count]).renderers())
    assert len(variants) == 3 * count
    assert variants == list(product(range(count), ("A:", "Answer:", "The answer is")))


def sorted_task(rows: int = 400) -> Task:
    """As a file is that was written one class after the other."""
    made = [
        examples(*(f"{split} {row}={'no' if row < rows // 2 else 'yes'}" for row in range(rows))) for split in SPLITS
    ]
    return make_task(**dict(zip(SPLITS, made, strict=True)))


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_sorted_file_are_drawn_and_hold_every_answer(seed):
    task = sorted_task().drawn(16, 8, seed, test=16)
    assert [len(split) for split in splits(task)] == [16, 8, 16]
    assert [{row.output for row in split} for split in splits(task)] == [{"no", "yes"}] * 3
    assert all(set(some) < set(every) for some, every in zip(splits(task), splits(sorted_task()), strict=True))
    assert task.options == ("no", "yes")


def test_the_seed_draws_training_rows_and_none_changes_the_test_rows():
    task = sorted_task()
    one, same, other = (task.drawn(16, 8, seed, test=16) for seed in (1, 1, 2))
    assert one == same
    assert set(one.train) != set(other.train)
    assert set(one.valid) != set(other.valid)
    assert one.test == other.test == task.drawn(None, None, 7, test=16).test
    assert [task.test.index(row) for row in one.test] == sorted(task.test.index(row) for row in one.test)


def test_what_is_not_limited_keeps_its_rows_and_their_order():
    assert make_task().drawn(None, None, 1) == make_task() == make_task().drawn(None, None, 1, test=99)
    assert set(make_task().drawn(99, 99, 1).train) == set(make_task().train)


def test_the_rows_of_a_reproduction_are_those_that_the_recorded_results_were_made_with():
    """Digests of the rows drawn when docs/results was written; other ones would need all of it measured again."""
    drawn = load_task("topic").first_test_rows(16).drawn(90, 8, 42)
    assert [drawn.digest(split) for split in SPLITS] == ["2dca6b6413be636c", "7530b8f5a5196323", "11c28073e0f2a6c8"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("count", [0, -1])
def test_a_limit_below_one_is_refused(split, count):
    with refused(f"{split} rows is {count}", "expected a whole number from 1"):
        make_task().drawn(**{"train": None, "valid": None, "seed": 1, split: count})


def test_the_first_test_rows_of_a_sorted_file_are_refused_and_those_of_a_shuffled_one_are_not():
    with refused("Task toy", "none of the first 100 test rows is answered 'yes', and 200 of all 400", "Shuffle"):
        sorted_task().first_test_rows(100)
    assert sorted_task().first_test_rows(1000) == sorted_task()
    for name in KNOWN:
        for count in (16, 20, 100):
            assert load_task(name).first_test_rows(count).test == load_task(name).test[:count]


TOY = {
    "train": [{"input": "a", "output": "yes"}, {"input": "b", "output": "no"}],
    "valid": [{"input": "c", "output": "no"}],
    "test": [{"input": " d\n", "output": " yes\n"}, {"input": "e", "output": "no"}],
}


def write(path: Path, content: object) -> None:
    """A JSON file; a text is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.fixture(params=["", "tasks"], ids=["flat", "tasks"])
def data(request, tmp_path) -> Path:
    """A folder with one task, in each of the two layouts."""
    folder = tmp_path / "data"
    write(folder / request.param / "toy.json", TOY)
    write(folder / "templates.json", {"toy": TEMPLATES})
    return folder


def place(data: Path) -> Path:
    return data / "tasks" if (data / "tasks").exists() else data


def test_a_task_from_a_folder_has_the_rows_of_its_file_with_answers_stripped(data):
    task = load_task("toy", data)
    assert (task.name, task.templates, task.category) == ("toy", TEMPLATES, "other")
    assert task.train == (Example("a", "yes"), Example("b", "no"))
    assert task.valid == (Example("c", "no"),)
    assert task.test == (Example(" d\n", "yes"), Example("e", "no"))
    assert task.options == ("no", "yes")


def test_templates_that_are_given_stand_in_for_those_of_the_folder(data):
    assert load_task("toy", data, ["{input}?"]).templates == ("{input}?",)
    (data / "templates.json").unlink()
    assert load_tasks(data=data, templates=["{input}?"])[0].templates == ("{input}?",)


def test_all_tasks_of_a_folder_are_found_and_other_files_are_none(data):
    write(place(data) / "another.json", TOY)
    write(place(data) / "answer_prefixes.json", ["A:"])
    write(place(data) / "notes.txt", "not a task")
    write(data / "templates.json", {"toy": TEMPLATES, "another": TEMPLATES})
    assert available_tasks(data) == ["another", "toy"]
    assert [task.name for task in load_tasks(data=data)] == ["another", "toy"]


def test_tasks_are_loaded_in_the_order_named_and_each_once():
    names = ["outlook", "topic", "outlook"]
    assert load_tasks(names) == [builtin_task("outlook"), builtin_task("topic")]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("sentimant", ("'sentimant'", "Did you mean 'sentiment'?", ", ".join(sorted(KNOWN)), "Give --data DIR")),
        ("Topic", ("'Topic'", "Did you mean 'topic'?")),
        ("toy", ("'toy'", "Give --data DIR for your own tasks.")),
        ("", ("task ''", "Give --data DIR")),
    ],
)
def test_a_built_in_task_that_does_not_exist_is_refused_with_the_nearest_name(name, parts):
    with refused("Unknown task", *parts):
        load_tasks([name])


def test_a_task_that_the_folder_does_not_have_is_refused_with_the_nearest_name(data):
    with refused("Unknown task 'tyo'; known: toy.", "Did you mean 'toy'?", f"the JSON files in {data}"):
        load_task("tyo", data)


@pytest.mark.parametrize(
    "name", ["../secret", "../data/toy", "./toy", "tasks/toy", "toy.json", "templates", "{}/secret"]
)
def test_a_name_that_leads_elsewhere_is_no_task_even_where_a_file_is_there(data, name):
    write(data.parent / "secret.json", TOY)
    write(place(data).parent / "secret.json", TOY)
    write(data / "templates.json", {"toy": TEMPLATES, name: TEMPLATES})
    name = name.format(data.parent)
    with refused(f"Unknown task {name!r}; known: ", f"the JSON files in {data}"):
        load_task(name, data, TEMPLATES)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with refused(f"No file or folder {tmp_path / 'nowhere'}", "TASK.json files and templates.json"):
        load_tasks(data=tmp_path / "nowhere")


def test_a_file_where_a_folder_of_tasks_was_expected_is_named(tmp_path):
    write(tmp_path / "toy.json", TOY)
    with refused(f"No file or folder {tmp_path / 'toy.json'}", "TASK.json"):
        load_task("toy", tmp_path / "toy.json")


@pytest.mark.parametrize("inner", ["", "tasks"])
def test_a_folder_without_tasks_is_named(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write(tmp_path / "templates.json", {})
    with refused(tmp_path, "holds no TASK.json", "expected at least one"):
        load_tasks(data=tmp_path)


def without(key: str) -> dict[str, object]:
    return {name: rows for name, rows in TOY.items() if name != key}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{not json", ("is not valid JSON", "line 1", 'expected an object {"train": [...], "valid": [...], "test"')),
        ([TOY], ("holds a JSON list", "expected an object with train, valid, test")),
        ('"toy"', ("holds a JSON str", "expected an object with train, valid, test")),
        (without("train"), ("the split 'train' is missing", "expected a list of rows")),
        (without("test"), ("the split 'test' is missing", "expected a list of rows")),
        (TOY | {"valid": []}, ("the split 'valid' is empty", "expected a list of rows")),
        (TOY | {"test": {"input": "d", "output": "no"}}, ("the split 'test' is a JSON dict", "expected a list")),
        (
            TOY | {"train": [TOY["train"][0], {"input": "b"}]},
            ("train row 1 has output None", "an object with input and output"),
        ),
        (TOY | {"valid": [{"output": "no"}]}, ("valid row 0 has input None", "an object with input and output")),
        (TOY | {"valid": [{"input": "c", "output": 1.5}]}, ("valid row 0 has output 1.5", "whole number")),
        (TOY | {"valid": [{"input": "c", "output": True}]}, ("valid row 0 has output True", "whole number")),
        (TOY | {"valid": [{"input": "c", "output": float("nan")}]}, ("valid row 0 has output nan", "whole number")),
        (TOY | {"valid": [{"input": "c", "output": ["a"]}]}, ("valid row 0 has output ['a']", "whole number")),
        (
            TOY | {"valid": [{"input": "c", "output": " "}]},
            ("valid row 0 has output ' '", "an object with input and output"),
        ),
        (TOY | {"valid": ["c"]}, ("valid row 0 has input None", "an object with input")),
        (TOY | {"test": TOY["test"] + TOY["train"]}, ("Task toy", "'a' is in train and in test")),
        (TOY | {"test": TOY["test"][:1] * 10}, ("Task toy", "all 10 test answers are 'yes'", "hidden-label")),
    ],
)
def test_a_wrong_task_file_is_refused_and_the_message_says_what_is_wrong_where(data, content, parts):
    file = place(data) / "toy.json"
    write(file, content)
    with refused("Task toy" if "Task toy" in parts else file, *parts):
        load_task("toy", data)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("No file {}", "each with its templates", "--template three times")),
        ("[", ("{} is not valid JSON", "each with its templates")),
        ([list(TEMPLATES)], ("{} has no list of templates for toy", "add one, or give --template three times")),
        ({"another": TEMPLATES}, ("{} has no list of templates for toy", "add one, or give --template three times")),
        ({"toy": TEMPLATES[0]}, ("{} has no list of templates for toy", "add one")),
        ({"toy": [TEMPLATES[0], 1]}, ("{} has no list of templates for toy", "add one")),
        ({"toy": []}, ("Task toy: no template", "at least one with {{input}}")),
        ({"toy": ["{input}", "yes?"]}, ("Task toy: the template 'yes?' has no {{input}}", "put {{input}} where")),
    ],
)
def test_wrong_templates_are_refused_and_the_message_says_what_to_do(data, content, parts):
    file = data / "templates.json"
    file.unlink() if content is None else write(file, content)
    with refused(*(part.format(file) for part in parts)):
        load_task("toy", data)


def test_a_given_template_without_a_place_for_the_input_is_refused(data):
    with refused("Task toy: the template 'yes?' has no {input}", "put {input} where the input goes"):
        load_task("toy", data, ["yes?"])


def test_whole_numbers_are_texts_and_a_column_of_a_table_just_works():
    import numpy as np

    task = make_task(train=(Example("a", 1), Example(2, np.int64(0))), valid=[("d", "1")], test=examples("e=0", "f=1"))
    assert task.train == (Example("a", "1"), Example("2", "0"))
    assert task.valid == (Example("d", "1"),)
    assert task.options == ("0", "1")
    assert isinstance(task.train[1].output, str)


ODD = [None, float("nan"), 1.0, True, ["yes"], {"a": 1}, b"yes"]


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("place", ["input", "output"])
def test_what_is_neither_text_nor_a_whole_number_is_refused_with_its_row(place, value):
    row = Example("c", "no")._replace(**{place: value})
    with refused(f"Task toy: valid row 1 has {place} {value!r}", "expected a text or a whole number"):
        make_task(valid=(Example("d", "no"), row))


def test_a_row_that_is_no_pair_is_refused():
    with refused("Task toy: train row 0 is 'ab'", "expected an input and an output"):
        make_task(train=("ab",))
    with refused("Task toy: train row 0 is ('a', 'b', 'c')", "expected an input and an output"):
        make_task(train=(("a", "b", "c"),))


def test_whole_numbers_in_a_file_are_texts(data):
    write(place(data) / "toy.json", TOY | {"valid": [{"input": 7, "output": 1}]})
    task = load_task("toy", data)
    assert task.valid == (Example("7", "1"),)
    assert task.options == ("1", "no", "yes")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_files_that_begin_with_a_byte_order_mark_are_read(data, encoding):
    for file in (place(data) / "toy.json", data / "templates.json"):
        file.write_text(file.read_text(), encoding=encoding)
    task = load_task("toy", data)
    assert (task.templates, task.train[0]) == (TEMPLATES, Example("a", "yes"))


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
@pytest.mark.parametrize("listed", ["NFC", "NFD"])
def test_a_name_with_accents_is_found_however_it_is_composed(tmp_path, written, asked, listed):
    name = unicodedata.normalize("NFC", "métier")
    write(tmp_path / f"{unicodedata.normalize(written, name)}.json", TOY)
    write(tmp_path / "templates.json", {unicodedata.normalize(listed, name): TEMPLATES})
    assert available_tasks(tmp_path) == [name]
    (task,) = load_tasks([unicodedata.normalize(asked, name)], tmp_path)
    assert (task.name, task.templates) == (name, TEMPLATES)
    assert make_task().drawn(2, 1, 1).name == "toy"


def test_two_files_whose_names_differ_in_composition_alone_are_refused(tmp_path):
    for form in ("NFC", "NFD"):
        write(tmp_path / f"{unicodedata.normalize(form, 'métier')}.json", TOY)
    with refused("two files", "métier.json", "rename one"):
        available_tasks(tmp_path)


def test_a_folder_may_be_a_text_and_below_the_home_folder(data, monkeypatch):
    monkeypatch.setenv("HOME", str(data.parent))
    assert load_task("toy", "~/data") == load_tasks(data=str(data))[0] == load_task("toy", data)
    with refused("No file or folder", "nowhere"):
        load_tasks(data="~/nowhere")
