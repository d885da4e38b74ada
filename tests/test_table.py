"""Tables as people have them: every format gives the same task, nothing is guessed, nothing leaks between splits."""

import csv
import json
import logging
from collections import Counter
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from atv.data import Example, load_table, load_tasks
from atv.data.splits import same
from atv.data.table import load_queries
from atv.errors import ATVError

LABELS = ("billing", "how to", "007")
ROWS = [Example(f"ticket {number}, please", LABELS[number % 3]) for number in range(60)]


def as_csv(path, rows=ROWS, columns=("input", "output"), **options):
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.writer(file, **options)
        writer.writerows([columns, *(row[: len(columns)] for row in rows)])
    return path


def as_jsonl(path, rows=ROWS, columns=("input", "output")):
    path.write_text("".join(json.dumps(dict(zip(columns, row[: len(columns)], strict=True))) + "\n" for row in rows))
    return path


def everything(task):
    return sorted([*task.train, *task.valid, *task.test])


def formats(folder):
    datasets = pytest.importorskip("datasets")
    columns = {"input": [row[0] for row in ROWS], "output": [row[1] for row in ROWS]}
    yield as_csv(folder / "plain.csv")
    yield as_csv(folder / "bom.csv", encoding="utf-8-sig", lineterminator="\r\n", quoting=csv.QUOTE_ALL)
    yield as_csv(folder / "tabs.tsv", delimiter="\t")
    yield as_jsonl(folder / "lines.jsonl")
    (folder / "list.json").write_text(json.dumps([{"input": i, "output": o} for i, o, _ in ROWS]))
    yield folder / "list.json"
    datasets.Dataset.from_dict(columns).to_parquet(str(folder / "columns.parquet"))
    yield folder / "columns.parquet"
    yield datasets.Dataset.from_dict(columns)
    yield datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)})


def test_every_format_gives_the_same_rows_and_the_same_splits(tmp_path):
    tasks = [load_table(data) for data in formats(tmp_path)]
    assert len(tasks) == 8
    for task in tasks:
        assert (task.train, task.valid, task.test) == (tasks[0].train, tasks[0].valid, tasks[0].test)
        assert everything(task) == sorted(ROWS)
    assert tasks[0].options == tuple(sorted(LABELS))  # "007" is no number
    assert tasks[0].templates == ("{input}",)
    assert tasks[0].answer_prefixes == (None,)
    assert tasks[0].name == "plain"


@pytest.mark.parametrize(
    ("columns", "rows", "expected"),
    [
        (("Text", "Label"), [("a", "x")], ("a", "x")),
        (("prompt", "completion"), [("a", "x")], ("a", "x")),
        (("instruction", "input", "output"), [("do", "a", "x")], ("do\na", "x")),
        (("instruction", "input", "output"), [("do", "", "x")], ("do", "x")),
        (("id", "input", "output"), [("7", "a", "x")], ("a", "x")),
    ],
)
def test_columns_are_recognised(tmp_path, columns, rows, expected):
    others = [tuple(f"{cell}{number}" for cell in rows[0]) for number in range(20)]
    task = load_table(as_csv(tmp_path / "t.csv", [*rows, *others], columns))
    assert Example(*expected) in everything(task)


def test_columns_of_other_names_are_given_and_unknown_ones_are_named(tmp_path):
    path = as_csv(tmp_path / "t.csv", columns=("body", "team"))
    assert everything(load_table(path, input="body", output="team")) == sorted(ROWS)
    with refused("'body', 'team'", "Name yours with --input and --output"):
        load_table(path)
    with refused("no column 'bodi'", "'body', 'team'"):
        load_table(path, input="bodi", output="team")
    with refused("together"):
        load_table(path, input="body")


def test_the_names_of_classes_are_the_labels(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t {n}" for n in range(20)], "label": [n % 2 for n in range(20)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "classes.parquet")
    for task in (load_table(data), load_table(tmp_path / "classes.parquet")):
        assert task.options == ("no", "yes")
        assert Example("t 3", "yes") in everything(task)


def test_rows_whose_class_is_unknown_are_dropped_and_other_numbers_are_refused(tmp_path):
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    parquet, file = pytest.importorskip("pyarrow.parquet"), tmp_path / "t.parquet"
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": [f"t {n}" for n in range(30)], "label": [(0, 1, -1)[n % 3] for n in range(30)]}
    data = datasets.Dataset.from_dict(rows, features=features)
    task = load_table(data)
    assert task.prepared["dropped"] == {"with an empty cell": 10}
    assert Counter(row.output for row in everything(task)) == {"no": 10, "yes": 10}
    data.to_parquet(file)
    table = parquet.read_table(file)
    for value in (-2, 2):
        parquet.write_table(table.set_column(1, table.schema.field(1), arrow.array([0, value] * 15)), file)
        with refused("t: train row 1", f"label {value}", "2 classes"):
            load_table(file)


def test_columns_that_only_later_rows_have_are_read(tmp_path):
    rows = [{"instruction": f"do {n}", "output": LABELS[n % 3]} for n in range(150)]
    rows[120]["input"] = "this"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Example("do 120\nthis", LABELS[0]) in everything(load_table(tmp_path / "t.jsonl"))
    assert Example("do 120\nthis", "") in sum(load_queries(tmp_path / "t.jsonl").splits.values(), ())


def test_the_splits_of_a_folder_and_of_a_file_are_used(tmp_path):
    for name, part in (("train.csv", ROWS[:30]), ("dev.csv", ROWS[30:40]), ("test.csv", ROWS[40:])):
        as_csv(tmp_path / name, part)
    task = load_table(tmp_path)
    assert (task.train, task.valid, task.test) == (tuple(ROWS[:30]), tuple(ROWS[30:40]), tuple(ROWS[40:]))
    as_jsonl(tmp_path / "validation.jsonl")
    with refused("dev.csv and validation.jsonl"):
        load_table(tmp_path)
    objects = [{"input": i, "output": o} for i, o, _ in ROWS]
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps({"train": objects[:30], "validation": objects[30:40], "test": objects[40:]}))
    assert load_table(whole).valid == tuple(ROWS[30:40])


def test_what_is_dropped_is_counted(tmp_path, caplog):
    rows = [
        *ROWS[:40],
        ("", "billing"),
        ("only a query", " "),
        ("  Ticket 1,   PLEASE ", LABELS[1]),  # repeated
        ("ticket 2, please", "billing"),  # with another answer
    ]
    as_csv(tmp_path / "train.csv", rows)
    as_csv(tmp_path / "test.csv", [*ROWS[40:], ("TICKET 3, please", LABELS[0])])
    with caplog.at_level(logging.INFO, "atv"):
        task = load_table(tmp_path)
    said = " ".join(record.getMessage() for record in caplog.records)
    for words in (
        "2 with an empty cell",
        "1 repeated,",
        "1 repeated with another answer",
        "1 of train that are in test",
        "valid drawn from the training rows, seed 42",
    ):
        assert words in said
    assert len(task.train) + len(task.valid) == 39
    assert len(task.test) == 21


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, st.sampled_from("abc")), min_size=40, max_size=80))
def test_no_input_is_in_two_splits_and_every_row_is_there_or_counted(tmp_path_factory, rows):
    kept = {}
    for query, answer in rows:
        if query.strip():
            kept.setdefault(same(query), answer)
    if len(kept) < 10 or len(set(kept.values())) < 2:
        return
    path = as_csv(tmp_path_factory.mktemp("table") / "t.csv", rows)
    task = load_table(path)
    inputs = [same(row.input) for row in everything(task)]
    assert sorted(inputs) == sorted(kept)
    assert {same(row.input): row.output for row in everything(task)} == kept


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b", "c", ""])), min_size=40, max_size=80),
    st.sampled_from([("text", "label"), ("body", "team")]),
    st.booleans(),
)
def test_queries_are_in_the_splits_of_their_answers(tmp_path_factory, rows, columns, own_test):
    folder = tmp_path_factory.mktemp("table")
    given_columns = {} if columns[0] == "text" else {"input": columns[0], "output": columns[1]}
    if own_test:
        as_csv(folder / "test.csv", rows[:20], columns)
    as_csv(folder / "train.csv", rows[20:] if own_test else rows, columns)
    data = folder if own_test else folder / "train.csv"
    try:
        task = load_table(data, **given_columns)
    except ATVError:  # too few answers
        return
    found = load_queries(data, **given_columns)
    assert not any(row.output for rows in found.splits.values() for row in rows)
    answered, read = set(), []
    for split in ("train", "valid", "test"):
        inputs = [row.input for row in getattr(task, split)]
        assert [row.input for row in found.splits[split]][: len(inputs)] == inputs
        answered |= {same(row) for row in inputs}
        read += [(split, same(row.input)) for row in found.splits[split][len(inputs) :]]
    own = {same(query) for query, answer in rows[:20] if not answer} if own_test else set()
    assert all(split == ("test" if query in own else "train") for split, query in read)
    every = {same(query) for query, _ in rows if query.strip()}
    assert Counter(query for _, query in read) == Counter(every - answered)
    assert found.prepared.get("drawn_test") == task.prepared.get("drawn_test")


def test_answers_that_cannot_be_read_leave_the_queries(tmp_path):
    objects = [{"text": f"t {n}", "label": n / 2} for n in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    found = load_queries(tmp_path / "t.jsonl")
    assert sorted(map(len, found.splits.values())) == [3, 8, 29]
    with refused("Give --input and --output together"):
        load_queries(tmp_path / "t.jsonl", output="label")


def test_rows_are_drawn_by_answer_from_a_sorted_file(tmp_path):
    rows = [(f"t {n}", label) for label, count in (("a", 300), ("b", 60), ("c", 40)) for n in range(count)]
    rows = [(f"{label} {query}", label) for query, label in rows]
    task = load_table(as_csv(tmp_path / "t.csv", rows))
    assert Counter(row.output for row in task.test) == {"a": 60, "b": 12, "c": 8}
    found = Counter(row.output for row in task.valid)
    assert found.total() == 32
    assert all(abs(found[answer] - share) < 1 for answer, share in {"a": 24, "b": 4.8, "c": 3.2}.items())
    assert [row.input for row in task.test if row.output == "a"] != [f"a t {n}" for n in range(60)]


@pytest.mark.parametrize("labelled", [0, 200])
def test_rows_with_an_answer_of_their_own_are_drawn_like_the_others(tmp_path, labelled):
    """At random places of the file, and in the share that they have of it."""
    rows = [(f"own {n}", f"answer {n}") for n in range(200)] + [(f"t {n}", "ab"[n % 2]) for n in range(labelled)]
    path = as_csv(tmp_path / "t.csv", rows)
    task, again = load_table(path), load_table(path)
    assert (task.train, task.valid, task.test) == (again.train, again.valid, again.test)
    own = [int(row.input.split()[1]) for row in task.test if row.input.startswith("own")]
    assert len(task.test) == len(rows) // 5
    assert 25 <= len(own) <= 55
    assert 70 < sum(own) / len(own) < 130  # the first rows of the file would have a mean of 20


def test_rare_answers_are_neither_always_nor_never_tested(tmp_path):
    rows = [(f"rare {n}", f"answer {n // 2}") for n in range(40)] + [(f"t {n}", "often") for n in range(160)]
    task = load_table(as_csv(tmp_path / "t.csv", rows))
    counts = Counter(row.output for row in task.test if row.output != "often")
    assert 3 <= len(counts) <= 14  # eight are expected
    assert set(counts.values()) == {1}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", "input,output\na,b,c\n", ["line 2: 3 cells", "names 2 columns"]),
        ("t.csv", "input,input\na,b\n", ["two columns of one name"]),
        ("t.csv", 'input,output\n"a,b\n', ["line"]),
        ("t.jsonl", '{"input": "a", "output": "b"}\n{"input": \n', ["line 2: no JSON"]),
        ("t.jsonl", '{"input": "a", "output": "b"}\n[1]\n', ["line 2", "list"]),
        ("t.jsonl", '{"input": "a", "output": 1.5}\n', ["row 0", "output 1.5"]),
        ("t.jsonl", '{"messages": "hello"}\n', ["row 0", "a list of messages"]),
        ("t.jsonl", '{"messages": [{"role": "tool", "content": "a"}]}\n', ["messages 0", "role 'tool'"]),
        ("t.jsonl", '{"messages": [{"role": "user", "content": 7}]}\n', ["messages 0", "content 7"]),
        ("t.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', ["row 0", "user, then assistant"]),
        ("t.jsonl", '{"input": "a \\ud83d", "output": "b"}\n', ["row 0", "'a \\ud83d', with half of a surrogate"]),
        ("t.jsonl", '{"input": "a", "output": "\\ud83d"}\n', ["row 0", "output '\\ud83d', with half"]),
        ("t.jsonl", f'{{"input": {"7" * 4301}, "output": "b"}}\n', ["row 0", "input Decimal('777"]),
        ("t.json", f'[{{"input": {"7" * 4301}, "output": "b"}}]', ["row 0", "input Decimal('777"]),
        ("t.jsonl", '{"messages": [{"role": "user", "content": "\\udc00"}]}\n', ["row 0, messages 0", "with half"]),
        ("t.json", '{"train": 3}', ["a list of objects"]),
        ("t.txt", "a", [".txt", ".parquet"]),
        ("t.csv", "input,output\na,b\n", ["too few"]),
        ("t.csv", "", ["(none)"]),
    ],
)
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with refused(*said):
        load_table(tmp_path / name)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "found nothing; expected train"),
        ({"data": []}, "found data; expected train"),
        ({"test": []}, "found test; expected train"),
        ({"validation": [], "test": []}, "found validation, test; expected train"),
        ({"train": [], "val": [], "dev": []}, "several lists that are valid; found ['train', 'val', 'dev']"),
        ({"train": [], "Train": []}, "several lists that are train; found ['train', 'Train']"),
    ],
)
def test_an_object_without_training_rows_or_with_a_split_twice_is_refused(tmp_path, found, said):
    (tmp_path / "t.json").write_text(json.dumps(found))
    for read in (load_table, load_queries):
        with refused("t.json", said):
            read(tmp_path / "t.json")


def test_names_of_splits_may_have_capitals_and_a_folder_has_training_rows(tmp_path):
    rows = [{"input": i, "output": o} for i, o, _ in ROWS]
    (tmp_path / "t.json").write_text(json.dumps({"Train": rows[:40], "Dev": rows[40:]}))
    assert load_table(tmp_path / "t.json").valid == tuple(ROWS[40:])
    (tmp_path / "t.json").unlink()
    as_csv(tmp_path / "dev.csv", ROWS[:30])
    as_csv(tmp_path / "test.csv", ROWS[30:])
    for read in (load_table, load_queries):
        with refused(tmp_path, "found dev.csv, test.csv; expected train"):
            read(tmp_path)
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(rows)
    with refused("data has no training rows: found validation, test"):
        load_table(datasets.DatasetDict({"validation": part, "test": part}))


@pytest.mark.parametrize("at", [0, 0.1, 0.5, 0.9, 1])
def test_a_damaged_parquet_file_is_named(tmp_path, at):
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "t.parquet"
    datasets.Dataset.from_dict({"input": [row[0] for row in ROWS], "output": [row[1] for row in ROWS]}).to_parquet(file)
    data = bytearray(file.read_bytes())
    begin = int(at * (len(data) - 40))
    data[begin : begin + 40] = b"\xff" * 40
    file.write_bytes(data)
    with refused(file) if at in (0, 1) else suppress(ATVError):  # damage between the parts that are read is not seen
        load_table(file)


@pytest.mark.parametrize("name", ["hub:", "hub:../..", "hub:/etc", "hub:a/b/c", "hub:here"])
def test_a_name_of_the_hub_never_reads_a_folder_of_this_machine(tmp_path, monkeypatch, name):
    pytest.importorskip("datasets")
    (tmp_path / "here").mkdir()
    as_csv(tmp_path / "here" / "train.csv")
    monkeypatch.chdir(tmp_path)
    with refused(name):
        load_tasks(data=name)


def test_an_empty_name_is_not_the_folder_that_one_is_in(tmp_path, monkeypatch):
    as_csv(tmp_path / "train.csv")
    monkeypatch.chdir(tmp_path)
    for name in ("", " "):
        with refused("empty name"):
            load_tasks(data=name)


@pytest.mark.parametrize("name", [".", "..", "../tickets v1.2", "./"])
def test_a_folder_has_the_name_that_it_has_from_elsewhere(tmp_path, monkeypatch, name):
    here = tmp_path / "tickets v1.2"
    (here / "in").mkdir(parents=True)
    as_csv(here / "train.csv")
    monkeypatch.chdir(here / "in" if name == ".." else here)
    for read in (load_table, load_queries):
        assert read(name).name == "tickets v1.2"


def test_bytes_of_another_encoding_are_named(tmp_path):
    (tmp_path / "t.csv").write_bytes("input,output\nGrüße,a\n".encode("latin-1"))
    with refused("not UTF-8", "save it as UTF-8"):
        load_table(tmp_path / "t.csv")


def test_a_table_is_one_task_by_its_name(tmp_path):
    path = as_csv(tmp_path / "tickets.csv")
    assert [task.name for task in load_tasks(data=path)] == ["tickets"]
    assert load_tasks(["tickets"], path, templates=["Ticket: {input}"])[0].templates == ("Ticket: {input}",)
    with refused("Unknown task 'other'", "leave --task out"):
        load_tasks(["other"], path)
    with refused("--input and --output", "built-in"):
        load_tasks(input="a", output="b")
