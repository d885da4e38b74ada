"""New columns for a file of rows: every format, the same memory for any size, every row once after any kill."""

import base64
import csv
import datetime
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from forks import ended, forked
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

from atv.data import stream
from atv.data.rows import RowFile, cell, json_line, read_rows
from atv.data.stream import CHUNK, partial_files, predict_stream

SETTINGS = {"adapter": {"digest": "1a2b"}, "max_new_tokens": 16}


def upper(asked):
    """Answers in batches of seven, the shortest queries first."""
    rows = sorted(asked, key=lambda row: len(str(row[1]["input"])))
    for start in range(0, len(rows), 7):
        yield [
            (number, {"answer": str(row["input"]).upper(), "score": number / 2})
            for number, row in rows[start : start + 7]
        ]


def nothing(asked):
    raise AssertionError(f"asked for {[number for number, _ in asked]}")


def predicted(source, out, answer=upper, columns=("answer", "score"), **options):
    return predict_stream(source, out, columns, answer, options.pop("settings", SETTINGS), **options)


def csv_file(path, rows, columns=("id", "input"), **options):
    with path.open("w", encoding=options.pop("encoding", "utf-8"), newline="") as file:
        csv.writer(file, **options).writerows([columns, *rows])
    return path


def read_csv(path, delimiter=","):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


ROWS = [(f"0{n}", f"Straße {n}, {'x' * (n % 5)}") for n in range(CHUNK + 9)]


def inputs(folder):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    objects = [{"id": i, "input": text} for i, text in ROWS]
    yield csv_file(folder / "plain.csv", ROWS)
    yield csv_file(folder / "bom.csv", ROWS, encoding="utf-8-sig", lineterminator="\r\n", quoting=csv.QUOTE_ALL)
    yield csv_file(folder / "tabs.tsv", ROWS, delimiter="\t")
    (folder / "lines.jsonl").write_text("\ufeff" + "".join(json.dumps(row) + "\n\r\n" for row in objects))
    yield folder / "lines.jsonl"
    (folder / "list.json").write_text(json.dumps(objects))
    yield folder / "list.json"
    parquet.write_table(arrow.Table.from_pylist(objects), folder / "columns.parquet")
    yield folder / "columns.parquet"


def test_every_format_gives_the_same_rows_in_every_format(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    expected = [{"id": i, "input": text, "answer": text.upper(), "score": n / 2} for n, (i, text) in enumerate(ROWS)]
    cells = [[str(value) for value in row.values()] for row in expected]
    for source in inputs(tmp_path):
        out = tmp_path / "out"
        assert predicted(source, out / f"{source.name}.csv") == len(ROWS)
        assert read_csv(out / f"{source.name}.csv") == [["id", "input", "answer", "score"], *cells]
        predicted(source, out / f"{source.name}.tsv")
        assert read_csv(out / f"{source.name}.tsv", "\t")[1:] == cells
        predicted(source, out / f"{source.name}.jsonl")
        lines = (out / f"{source.name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == expected
        predicted(source, out / f"{source.name}.parquet")
        table = parquet.read_table(out / f"{source.name}.parquet")
        assert table.to_pylist() == expected
        assert [str(field.type) for field in table.schema] == ["string", "string", "string", "double"]
        assert {file.name.removeprefix(source.name) for file in out.iterdir() if file.name.startswith(source.name)} == {
            f".{end}{record}" for end in ("csv", "tsv", "jsonl", "parquet") for record in ("", ".json")
        }


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=12), st.sampled_from([".csv", ".tsv"]))
@example([("a\r\nb", "c\rd"), ('"', "\t,")], ".csv")
def test_text_comes_through_as_it_is(tmp_path_factory, rows, suffix):
    folder = tmp_path_factory.mktemp("text")
    source = csv_file(folder / "a.csv", rows, quoting=csv.QUOTE_ALL)
    predicted(
        source, folder / f"b{suffix}", lambda asked: [[(n, {"input2": row["input"]}) for n, row in asked]], ["input2"]
    )
    found = read_csv(folder / f"b{suffix}", "," if suffix == ".csv" else "\t")
    assert found == [["id", "input", "input2"], *([i, text, text] for i, text in rows)]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(["a", "b"]), JSON), max_size=8), st.lists(JSON, min_size=8, max_size=8))
def test_values_of_json_come_through_json_lines_and_any_column_fits_into_parquet(tmp_path_factory, rows, answers):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(asked):
        yield [(n, {"new": answers[n]}) for n, _ in asked]

    predicted(folder / "a.jsonl", folder / "b.jsonl", answer, ["new"])
    expected = [row | {"new": answers[n]} for n, row in enumerate(rows)]
    assert [json.loads(line) for line in (folder / "b.jsonl").open(encoding="utf-8")] == expected
    predicted(folder / "a.jsonl", folder / "b.parquet", answer, ["new"])
    table = parquet.read_table(folder / "b.parquet")
    assert table.num_rows == len(rows)
    for name in table.column_names:
        values = [row.get(name) for row in expected]
        kinds = {type(value) for value in values if value is not None}
        found = table[name].to_pylist()
        if kinds in ({bool}, {float}) or (kinds == {int} and all(abs(value) < 2**63 for value in values if value)):
            assert found == values
        elif kinds != {int, float}:
            readable = [
                None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in map(cell, values)
            ]
            assert found == readable


def test_types_of_parquet_stay_and_are_readable_in_text(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table(
        {
            "day": arrow.array([datetime.date(2025, 1, 2), None]),
            "small": arrow.array([1, 2], arrow.int8()),
            "raw": arrow.array([b"\x00\xff", b""]),
            "tags": arrow.array([["a"], []]),
            "kind": arrow.array(["x", "x"]).dictionary_encode(),
        }
    )
    parquet.write_table(table, tmp_path / "a.parquet")

    def answer(asked):
        yield [(n, {"new": n}) for n, _ in asked]

    predicted(tmp_path / "a.parquet", tmp_path / "b.parquet", answer, ["new"])
    found = parquet.read_table(tmp_path / "b.parquet")
    assert found.select(table.column_names).equals(table)
    assert found["new"].to_pylist() == [0, 1]
    predicted(tmp_path / "a.parquet", tmp_path / "b.csv", answer, ["new"])
    coded = base64.b64encode(b"\x00\xff").decode()
    assert read_csv(tmp_path / "b.csv")[1:] == [
        ["2025-01-02", "1", coded, '["a"]', "x", "0"],
        ["", "2", "", "[]", "x", "1"],
    ]


def test_a_table_without_rows_keeps_its_columns(tmp_path):
    assert predicted(csv_file(tmp_path / "a.csv", []), tmp_path / "b.csv", nothing) == 0
    assert read_csv(tmp_path / "b.csv") == [["id", "input", "answer", "score"]]


def test_short_lines_and_missing_keys_are_empty_cells(tmp_path):
    (tmp_path / "a.csv").write_text("id,input\n1\n\n2,x\n")
    predicted(tmp_path / "a.csv", tmp_path / "b.csv")
    assert read_csv(tmp_path / "b.csv")[1:] == [["1", "", "NONE", "0.0"], ["2", "x", "X", "0.5"]]
    (tmp_path / "a.jsonl").write_text('{"input": "x"}\n{"input": "y", "more": {"ä": [true]}}\n')
    predicted(tmp_path / "a.jsonl", tmp_path / "c.csv")
    assert read_csv(tmp_path / "c.csv") == [
        ["input", "more", "answer", "score"],
        ["x", "", "X", "0.0"],
        ["y", '{"ä": [true]}', "Y", "0.5"],
    ]


# ---- standard input and output ----


@contextmanager
def standard_input(monkeypatch, data):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        yield


def test_standard_input_and_output_are_json_lines(tmp_path, monkeypatch, capsys):
    data = "".join(json.dumps({"input": text}) + "\n" for _, text in ROWS).encode()
    expected = [{"input": text, "answer": text.upper(), "score": n / 2} for n, (_, text) in enumerate(ROWS)]
    with standard_input(monkeypatch, data):
        assert predicted("-", "-") == len(ROWS)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == expected
    with standard_input(monkeypatch, data):
        predicted("-", tmp_path / "b.jsonl")
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").open(encoding="utf-8")] == expected
    with standard_input(monkeypatch, data):
        assert predicted("-", tmp_path / "b.jsonl", nothing) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"b.jsonl", "b.jsonl.json"}
    predicted(tmp_path / "b.jsonl", "-", lambda asked: [[(n, {"new": 1}) for n, _ in asked]], ["new"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == expected[-1] | {"new": 1}
    with standard_input(monkeypatch, b'{"input": "a"}\n{"input"\n'), refused("standard input, line 2: no JSON"):
        predicted("-", tmp_path / "c.jsonl", nothing)
    with standard_input(monkeypatch, b'{"answer": "a"}\n'), refused("standard input has a column 'answer'"):
        predicted("-", "-", nothing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("2 processes cannot share standard input"):
        predicted("-", "-", nothing)


def test_rows_go_to_standard_output_while_later_ones_are_answered(tmp_path, monkeypatch, capsys):
    source = csv_file(tmp_path / "a.csv", ROWS[:3])

    def slow(asked):
        yield [(1, {"answer": "b"})]
        assert not capsys.readouterr().out
        yield [(0, {"answer": "a"})]
        assert [json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]
        yield [(2, {"answer": "c"})]

    predicted(source, "-", slow, ["answer"])


def test_columns_are_chosen_among_those_of_all_rows_and_are_the_same_when_it_is_resumed(tmp_path, monkeypatch, capsys):
    asked = []

    def last(there):
        asked.append(there)
        return there[-1:]

    rows = [{"input": text} for _, text in ROWS]
    rows[-1]["more"] = "x"
    source, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(Stopped):
        predicted(source, out, stopped_after(2), choose=last)
    with refused("read: ['more'] there, ['input'] now"):
        predicted(source, out, nothing, choose=lambda there: there[:1])
    predicted(source, out, choose=last)
    assert json.loads((tmp_path / "b.jsonl.json").read_text())["settings"]["read"] == ["more"]
    predicted(source, "-", choose=last)
    assert {tuple(there) for there in asked} == {("input", "more")}
    with standard_input(monkeypatch, source.read_bytes()):
        predicted("-", "-", choose=last)
    assert asked[-2:] == [["input"], ["input", "more"]]  # one for each chunk
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(ROWS)


# ---- what is refused, and what is not lost ----


def test_whole_numbers_of_any_length_come_through(tmp_path):
    parquet, long = pytest.importorskip("pyarrow.parquet"), "-" + "7" * 4301
    lines = [f'{{"id": {number}, "input": "a"}}' for number in (1, long)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    for source in ("a.jsonl", "a.json"):
        for suffix in (".csv", ".jsonl", ".parquet"):
            predicted(tmp_path / source, tmp_path / f"{source}-b{suffix}")
        assert [row[0] for row in read_csv(tmp_path / f"{source}-b.csv")] == ["id", "1", long]
        rows = (tmp_path / f"{source}-b.jsonl").read_text().splitlines()
        assert [json.loads(row)["id"] for row in rows] == [1, long]
        assert parquet.read_table(tmp_path / f"{source}-b.parquet")["id"].to_pylist() == ["1", long]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"id,input\n1,a\n2,b,c\n", ["line 3: 3 cells", "names 2 columns"]),
        ("a.csv", b"id,id\n1,a\n", ["two columns of one name"]),
        ("a.csv", b"id,input\n1,a\n" + b"2,b\n" * 9000 + b"3,\xff\n", ["line 9003: not UTF-8", "save it as UTF-8"]),
        ("a.csv", b'id,input\n1,"a\n', ["line"]),
        ("a.jsonl", b'{"input": 1}\n\n{"input"\n', ["line 3: no JSON"]),
        ("a.jsonl", b"[" * 100_000, ["line 1: no JSON: nested too deeply"]),
        ("a.jsonl", b"[1]\n", ["line 1: a JSON list"]),
        ("a.jsonl", b'{"input": "\xff"}\n', ["line 1: not UTF-8"]),
        ("a.json", b'{"train": []}', ["expected a list of objects."]),
        ("a.json", b"[1,\n", ["line 2: no JSON"]),
        ("a.parquet", b"PAR1", ["a.parquet cannot be read as Parquet"]),
        ("a.txt", b"a", ["'.txt'", ".parquet"]),
        ("a.csv", b"id,answer\n1,a\n", ["a column 'answer' already", "rename"]),
    ],
)
def test_an_error_anywhere_in_the_input_is_found_before_anything_is_asked(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with refused(*said):
        predicted(tmp_path / name, tmp_path / "b.csv", nothing)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_missing_package_or_file_and_an_unknown_ending_are_said(tmp_path, monkeypatch):
    with refused("none.csv cannot be read: No such file"):
        predicted(tmp_path / "none.csv", tmp_path / "b.csv", nothing)
    source = csv_file(tmp_path / "a.csv", ROWS[:3])
    with refused("b.json has the ending '.json'", ".csv, .tsv, .jsonl, .parquet"):
        predicted(source, tmp_path / "b.json", nothing)
    with refused("both the input and --out"):
        predicted(source, source, nothing, force=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with refused("needs the package pyarrow: pip install 'adaptive-task-vectors[data]'"):
        predicted(tmp_path / "a.parquet", tmp_path / "b.csv", nothing)
    with refused("needs the package pyarrow"):
        predicted(source, tmp_path / "b.parquet", nothing)


def test_a_file_of_someone_else_is_kept_unless_forced(tmp_path):
    source, out = csv_file(tmp_path / "a.csv", ROWS[:3]), tmp_path / "b.csv"
    out.write_text("mine")
    with refused("b.csv exists and is not what this command wrote", "--force"):
        predicted(source, out, nothing)
    assert out.read_text() == "mine"
    assert predicted(source, out, force=True) == 3
    assert predicted(source, out, nothing) == 0
    out.write_text(out.read_text() + "1,edited,a,0\n")
    with refused("is not what this command wrote"):
        predicted(source, out, nothing)
    (tmp_path / "c.csv.json").write_text('{"mine": 1}')
    with refused("c.csv.json is not the record of a result"):
        predicted(source, tmp_path / "c.csv", nothing)


def test_other_settings_or_another_input_are_refused_with_both_sides(tmp_path):
    source, out = csv_file(tmp_path / "a.csv", ROWS[:3]), tmp_path / "b.csv"
    predicted(source, out)
    with refused("max_new_tokens: 16 there, 8 now", "--force"):
        predicted(source, out, nothing, settings=SETTINGS | {"max_new_tokens": 8})
    with refused("columns: ['answer', 'score'] there, ['answer'] now"):
        predicted(source, out, nothing, columns=["answer"])
    csv_file(source, ROWS[:4])
    with refused("input.sha256"):
        predicted(source, out, nothing)
    assert predicted(source, out, force=True) == 4
    out.unlink()
    assert predicted(source, out, settings={}) == 4


class Stopped(Exception):
    """As a kill."""


def stopped_after(batches):
    def answer(asked):
        for number, batch in enumerate(upper(asked), 1):
            yield batch
            if number == batches:
                raise Stopped

    return answer


def test_an_interrupted_result_is_resumed_only_with_its_settings(tmp_path):
    source, out = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv"
    with pytest.raises(Stopped):
        predicted(source, out, stopped_after(2))
    assert not out.exists()
    with refused("b.csv.partial-0.jsonl was made with other settings", "max_new_tokens: 16 there, 8 now"):
        predicted(source, out, nothing, settings=SETTINGS | {"max_new_tokens": 8})
    assert predicted(source, out, settings=SETTINGS | {"max_new_tokens": 8}, force=True) == len(ROWS)
    out.unlink()
    with pytest.raises(Stopped):
        predicted(source, out, stopped_after(2))
    assert predicted(source, out) == len(ROWS) - 14
    assert not partial_files(out)


@pytest.mark.parametrize("cut", [1, 5, 30, 10**6])
def test_a_cut_last_line_is_answered_again(tmp_path, cut):
    source, out = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv"
    with pytest.raises(Stopped):
        predicted(source, out, stopped_after(2))
    (partial,) = partial_files(out)
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-cut])
    there = max(0, whole[:-cut].count(b"\n") - 1)
    assert predicted(source, out) == len(ROWS) - there
    assert [row[2] for row in read_csv(out)[1:]] == [text.upper() for _, text in ROWS]


def test_a_damaged_line_is_named(tmp_path):
    source, out = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv"
    with pytest.raises(Stopped):
        predicted(source, out, stopped_after(2))
    (partial,) = partial_files(out)
    lines = partial.read_bytes().splitlines(keepends=True)
    partial.write_bytes(b"".join([*lines[:3], b"\0\0\n", *lines[3:]]))
    with refused("partial-0.jsonl, line 4", "remove this line"):
        predicted(source, out, nothing)
    partial.write_bytes(b"mine\n")
    with refused("begins with b'mine", "Move it away"):
        predicted(source, out, nothing)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            lambda asked: [[(n, {"answer": 1, "score": 1}) for n, _ in asked[1:]]],
            "1 rows got no answer, the first of them row 0",
        ),
        (lambda asked: [[(n, {"answer": 1}) for n, _ in asked]], "expected ['answer', 'score']"),
        (lambda asked: [[(99, {"answer": 1, "score": 1})]], "An answer for row 99"),
        (lambda asked: [[(0, {"answer": 1, "score": 1})] * 2], "An answer for row 0"),
    ],
)
def test_each_row_is_answered_once_with_every_column(tmp_path, answer, said):
    with refused(said):
        predicted(csv_file(tmp_path / "a.csv", ROWS[:3]), tmp_path / "b.csv", answer)


def test_an_input_that_changes_meanwhile_is_refused(tmp_path):
    source = csv_file(tmp_path / "a.csv", ROWS)

    def answer(asked):
        with source.open("a") as file:
            file.write("1,more\n")
        yield from upper(asked)

    with refused("a.csv changed while it was read"):
        predicted(source, tmp_path / "b.csv", answer)
    assert not (tmp_path / "b.csv").exists()
    assert partial_files(tmp_path / "b.csv")


def test_two_commands_do_not_write_one_file(tmp_path):
    source = csv_file(tmp_path / "a.csv", ROWS[:3])
    with FileLock(tmp_path / ".b.csv.lock"), refused("Another command is writing"):
        predicted(source, tmp_path / "b.csv", nothing)
    predicted(source, tmp_path / "b.csv")


# ---- several processes ----


def together(monkeypatch, world, *calls):
    """Run calls as the processes of one launcher, here threads that each have their own rank."""
    local, meet, failed = threading.local(), threading.Barrier(world, timeout=20), []
    monkeypatch.setattr(stream, "world_size", lambda: world)
    monkeypatch.setattr(stream, "rank", lambda: local.rank)
    monkeypatch.setattr(stream, "is_main", lambda: local.rank == 0)
    monkeypatch.setattr(stream, "barrier", meet.wait)

    def run(rank, call):
        local.rank = rank
        try:
            call()
        except BaseException as error:
            failed.append(error)
            meet.abort()

    threads = [threading.Thread(target=run, args=(rank, call)) for rank, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def test_processes_divide_the_rows_and_another_number_of_them_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 20)
    source, out, asked = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv", []

    def counted(rows, batches=10**6):
        asked.append([number for number, _ in rows])
        answers = upper(rows)
        for _ in range(batches):
            batch = next(answers, None)
            if batch is None:
                return
            yield batch
        raise Stopped

    calls = [lambda k=k: predicted(source, out, lambda rows: counted(rows, k)) for k in (1, 2, 3)]
    assert together(monkeypatch, 3, *calls)
    assert len(partial_files(out)) == 3
    before = sum(file.read_bytes().count(b"\n") - 1 for file in partial_files(out))
    assert before > 0
    asked.clear()
    assert not together(monkeypatch, 2, *[lambda: predicted(source, out, counted)] * 2)
    assert sum(map(len, asked)) == len(ROWS) - before
    assert len({number for rows in asked for number in rows}) == len(ROWS) - before
    assert [row[2] for row in read_csv(out)[1:]] == [text.upper() for _, text in ROWS]
    assert not partial_files(out)
    assert not together(monkeypatch, 2, *[lambda: predicted(source, out, nothing)] * 2)


def test_two_real_processes_wait_for_each_other(tmp_path):
    if not pytest.importorskip("torch.distributed").is_available():
        pytest.skip("torch was built without torch.distributed")
    source, out = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def work(rank):
        def start():
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            assert predicted(source, out) == (CHUNK, len(ROWS) - CHUNK)[rank]
            assert predicted(source, out, nothing) == 0

        return start

    assert [ended(child) for child in [forked(work(0)), forked(work(1))]] == [0, 0]
    assert [row[2] for row in read_csv(out)[1:]] == [text.upper() for _, text in ROWS]


# ---- memory and kills ----

COLUMN = ["answer"]
MEASURED = """
import re, sys
from pathlib import Path
from atv.data.stream import predict_stream

def answer(asked):
    for start in range(0, len(asked), 64):
        yield [(number, {"answer": row["input"][:9]}) for number, row in asked[start : start + 64]]

for name in sys.argv[1:]:
    predict_stream(name, name + ".out.csv", ["answer"], answer, {})
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    names = []
    for count in (10_000, 100_000):
        names.append(tmp_path / f"{count}.csv")
        csv_file(names[-1], ((n, f"ticket {n}, please") for n in range(count)))
    script = [sys.executable, "-c", MEASURED, *map(str, names)]
    few, many = map(int, subprocess.run(script, check=True, capture_output=True, text=True).stdout.split())
    assert many - few < 3 * 2**10
    with Path(f"{names[1]}.out.csv").open() as file:
        assert sum(1 for _ in file) == 100_001


def test_killed_at_any_moment_every_row_is_there_once_and_hardly_any_is_asked_twice(tmp_path):
    source, out, calls = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "calls"
    csv_file(source, ((n, f"ticket {n}") for n in range(6_000)))
    batch_size, draw, kills = 64, random.Random(0), 0

    def answer(asked, batches=10**6, pause=0.0):
        with calls.open("ab", buffering=0) as log:
            for start in range(0, len(asked), batch_size):
                batch = asked[start : start + batch_size]
                log.write("".join(f"{number}\n" for number, _ in batch).encode())
                if start // batch_size == batches:
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(pause)
                yield [(number, {"answer": row["input"].upper()}) for number, row in batch]

    for attempt in range(30):
        if attempt % 2:  # in a batch of the first chunk that it asks for
            child = forked(
                lambda attempt=attempt: predicted(source, out, lambda rows: answer(rows, attempt % 6), COLUMN)
            )
        else:
            child = forked(lambda: predicted(source, out, lambda rows: answer(rows, pause=0.01), COLUMN))
            time.sleep(draw.uniform(0.01, 0.15))  # less than the 94 batches take
            os.kill(child, signal.SIGKILL)
        if ended(child) == 0:
            break
        kills += 1
    assert predicted(source, out, answer, COLUMN) >= 0
    assert kills >= 3
    assert read_csv(out) == [
        ["id", "input", "answer"],
        *([str(n), f"ticket {n}", f"TICKET {n}"] for n in range(6_000)),
    ]
    times = Counter(calls.read_text().split())
    assert len(times) == 6_000
    assert times.total() - 6_000 <= kills * batch_size
    assert predicted(source, out, nothing, COLUMN) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"a.csv", "b.csv", "b.csv.json", "calls"}


def test_a_kill_between_the_record_and_the_result_loses_nothing(tmp_path):
    source, out = csv_file(tmp_path / "a.csv", ROWS), tmp_path / "b.csv"

    def dies():
        stream.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        predicted(source, out)

    assert ended(forked(dies)) == -signal.SIGKILL
    assert [file for file in tmp_path.iterdir() if file.suffix == ".part"]
    assert predicted(source, out, nothing) == 0
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".part"]
    assert len(read_csv(out)) == len(ROWS) + 1


def test_a_row_file_names_columns_and_counts_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"b": 2, "a": 3}\n')
    file = RowFile(tmp_path / "a.jsonl")
    assert (file.columns, file.count) == (["a", "b"], 2)
    assert list(file) == list(file) == list(read_rows(tmp_path / "a.jsonl")) == [{"a": 1}, {"b": 2, "a": 3}]
    assert json_line({"a": "\ud800ä"}) == '{"a": "\\ud800ä"}\n'
