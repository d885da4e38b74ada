"""Runs on disk: made, continued after a kill at any byte, refused when they do not fit, and loaded together."""

import json
import platform
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

import atv
from atv.evaluation.records import Row, RunWriter, load_runs, read_rows
from atv.report import markdown
from atv.report.comparison import comparison_table

SETTINGS = {"method": "atv", "llm": "tiny", "seed": 42, "tasks": {"sentiment": 120}}


def prediction(example: int = 0, **changed: object) -> Row:
    fields = {
        "task": "sentiment",
        "category": "NLU",
        "split": "test",
        "template": 1,
        "answer_prefix": "A:",
        "example": example,
        "target": "positive",
        "scores": {"first_token": None, "option_likelihood": 1.0},
        "outputs": {"generated": " größer\n"},
        "prompt_tokens": 31,
        "seconds": 0.25,
    }
    return Row(**fields | changed)


def fresh(folder: Path, rows: int = 0, **changed: object) -> RunWriter:
    run = RunWriter(folder, SETTINGS | changed)
    run.append(prediction(index) for index in range(rows))
    return run


def run_file(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / "atv"


def test_a_new_run_has_its_settings_its_origin_and_no_rows(folder):
    run = fresh(folder)
    described = run_file(folder)
    assert {key: described[key] for key in ("schema", "finished", "settings")} == {
        "schema": 2,
        "finished": False,
        "settings": SETTINGS,
    }
    assert described["versions"]["adaptive-task-vectors"] == atv.__version__
    assert described["python"] == platform.python_version()
    assert platform.machine() in described["machine"]
    assert described["commit"] is None or set(described["commit"]) <= set("0123456789abcdef")
    assert (run.finished, run.rows, (folder / "predictions.jsonl").read_bytes()) == (False, [], b"")


def test_a_row_is_one_line_of_json_that_any_tool_can_read(folder):
    fresh(folder, rows=2)
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["example"] for line in lines] == [0, 1]
    assert '"generated": " größer\\n"' in lines[0]
    assert list(json.loads(lines[0])) == list(asdict(prediction()))


TEXT = st.text(max_size=12) | st.sampled_from(["\n", "a\r\nb", "\u2028", "\x85", '"}', "\\", "ß🦆"])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.builds(
            Row,
            task=TEXT,
            category=TEXT,
            split=TEXT,
            template=st.integers(0, 9),
            answer_prefix=TEXT,
            example=st.integers(0, 999),
            target=TEXT,
            scores=st.dictionaries(TEXT, st.none() | st.floats(0, 1)),
            outputs=st.dictionaries(TEXT, TEXT),
            prompt_tokens=st.integers(0, 9999),
            demonstrations=st.integers(0, 16),
            seconds=st.floats(0, 100),
            probabilities=st.none() | st.dictionaries(TEXT, st.floats(0, 1)),
            query=TEXT,
        ),
        max_size=4,
        unique_by=lambda row: (row.task, row.template, row.answer_prefix, row.example),
    )
)
def test_rows_come_back_as_they_were_appended(predictions):
    with tempfile.TemporaryDirectory() as name:
        run = RunWriter(Path(name), SETTINGS)
        run.append(predictions[:1])
        run.append(predictions[1:])
        assert run.rows == [asdict(row) for row in predictions]
        assert [Row(**row) for row in read_rows(Path(name))] == predictions


@pytest.mark.parametrize("line", ["3", "{}", '{"task": "sentiment"}'])
def test_a_line_that_is_no_prediction_is_named(folder, line):
    fresh(folder, rows=1)
    with (folder / "predictions.jsonl").open("a") as file:
        file.write(line + "\n")
    with refused("predictions.jsonl line 2", line[:10], "a row with all of its fields"):
        read_rows(folder)


def test_rows_of_earlier_versions_get_the_defaults_of_what_they_lack(folder):
    fresh(folder, rows=2)
    file = folder / "predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name in ("probabilities", "query"):
        del rows[0][name]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(folder) == [asdict(prediction(index)) for index in range(2)]
    assert RunWriter(folder, SETTINGS).rows == [asdict(prediction(index)) for index in range(2)]


def test_a_run_goes_on_where_it_stopped(folder):
    fresh(folder, rows=2).describe(device="cpu")
    before = run_file(folder)
    run = RunWriter(folder, SETTINGS)
    assert [row["example"] for row in run.rows] == [0, 1]
    assert not run.finished
    run.append([prediction(2)])
    assert [row["example"] for row in read_rows(folder)] == [0, 1, 2]
    assert run_file(folder) == before
    assert before["device"] == "cpu"


def test_rows_that_other_processes_wrote_are_taken_once_and_kept_in_one_file(folder):
    fresh(folder, rows=2)
    lines = [json.dumps(asdict(prediction(index))) + "\n" for index in range(5)]
    (folder / "predictions-1.jsonl").write_text("".join(lines[1:4]) + lines[4][:30])
    (folder / "predictions-2.jsonl").write_text(lines[3] + lines[4])
    assert [row["example"] for row in read_rows(folder)] == [0, 1, 2, 3, 4]
    run = RunWriter(folder, SETTINGS)
    assert [row["example"] for row in run.rows] == [0, 1, 2, 3, 4]
    assert sorted(file.name for file in folder.iterdir()) == ["predictions.jsonl", "run.json"]
    run.gather([("sentiment", 1, "A:", index) for index in (4, 2, 0)])
    assert [row["example"] for row in read_rows(folder)] == [4, 2, 0, 1, 3]
    (folder / "predictions-1.jsonl").write_text(lines[0])
    assert RunWriter(folder, SETTINGS, force=True).rows == read_rows(folder) == []


def test_a_finished_run_is_known_as_finished_when_it_is_opened_again(folder):
    fresh(folder, rows=1).finish(seconds=12.5)
    run = RunWriter(folder, SETTINGS)
    assert run.finished
    assert (run.run["seconds"], len(run.rows)) == (12.5, 1)


def test_settings_are_compared_as_json_gives_them_back(folder):
    fresh(folder, rows=1, layers=(0, 1), counts={3: "three"})
    assert len(RunWriter(folder, SETTINGS | {"layers": [0, 1], "counts": {"3": "three"}}).rows) == 1


@pytest.mark.parametrize(
    ("settings", "parts", "same"),
    [
        (SETTINGS | {"seed": 43}, ["seed: 42 there, 43 now"], ["llm", "method"]),
        (
            SETTINGS | {"llm": "huge", "method": "zero-shot"},
            ["llm: 'tiny' there, 'huge' now", "method: 'atv'"],
            ["seed"],
        ),
        (SETTINGS | {"tasks": {"sentiment": 8}}, ["tasks.sentiment: 120 there, 8 now"], ["seed"]),
        (SETTINGS | {"dtype": "float16"}, ["dtype: None there, 'float16' now"], ["seed"]),
        ({"method": "atv", "llm": "tiny", "seed": 42}, ["tasks.sentiment: 120 there, None now"], ["seed"]),
    ],
)
def test_a_run_with_other_settings_is_refused_and_left_alone(folder, settings, parts, same):
    fresh(folder, rows=2)
    with refused(folder, "other settings", "Use another --out, or --force", *parts) as caught:
        RunWriter(folder, settings)
    assert not [key for key in same if f"{key}:" in str(caught.value)]
    assert [row["example"] for row in RunWriter(folder, SETTINGS).rows] == [0, 1]


def test_force_begins_anew_whatever_the_settings(folder):
    fresh(folder, rows=2).finish(note="former")
    run = RunWriter(folder, SETTINGS | {"seed": 43}, force=True)
    assert (run.rows, read_rows(folder), run.finished) == ([], [], False)
    described = run_file(folder)
    assert described["settings"]["seed"] == 43
    assert "note" not in described


def test_force_that_cannot_write_the_new_run_does_not_pass_former_rows_for_it(folder):
    fresh(folder, rows=2)
    (folder / "run.json").unlink()
    (folder / "run.json").mkdir()
    with pytest.raises(OSError, match=r"run\.json"):
        RunWriter(folder, SETTINGS | {"seed": 43}, force=True)
    assert read_rows(folder) == []


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_a_run_is_never_written_over(tmp_path, kind, force):
    path = tmp_path / "thesis"
    if kind == "folder":
        path.mkdir()
    precious = path / "chapter.txt" if kind == "folder" else path
    precious.write_text("years of work")
    with refused(path, "is not a run", "choose a new folder"):
        RunWriter(path, SETTINGS, force=force)
    assert precious.read_text() == "years of work"
    assert len(list(tmp_path.rglob("*"))) == (2 if kind == "folder" else 1)


def test_an_empty_folder_becomes_a_run(folder):
    folder.mkdir(parents=True)
    assert len(fresh(folder, rows=1).rows) == 1


def test_a_kill_at_any_byte_of_a_row_costs_at_most_that_row(folder):
    fresh(folder, rows=2)
    path = folder / "predictions.jsonl"
    whole = path.read_bytes()
    first, last = (index for index, byte in enumerate(whole) if byte == ord("\n"))
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert [row["example"] for row in read_rows(folder)] == ([0, 1] if cut >= last else [0])


@pytest.mark.parametrize("cut", [b'{"task": "senti', '"größer"'.encode()[:4], b'{"task": "x"', b"\x00\x00\x00"])
def test_a_line_that_a_kill_cut_short_is_dropped_and_the_next_row_stands_on_a_line_of_its_own(folder, cut):
    fresh(folder, rows=2)
    path = folder / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + cut)
    run = RunWriter(folder, SETTINGS)
    assert path.read_bytes() == whole
    run.append([prediction(2)])
    assert [row["example"] for row in run.rows] == [0, 1, 2]
    assert [json.loads(line)["example"] for line in path.read_bytes().splitlines()] == [0, 1, 2]


def test_a_whole_last_row_without_its_line_break_is_kept(folder):
    fresh(folder, rows=2)
    path = folder / "predictions.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    RunWriter(folder, SETTINGS).append([prediction(2)])
    assert [row["example"] for row in read_rows(folder)] == [0, 1, 2]


@pytest.mark.parametrize("damage", [b'{"task": "senti', b"not json", b'{"task": "\xff"}'])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_damage_before_the_last_line_is_named_with_its_place(folder, damage, line):
    fresh(folder, rows=3)
    path = folder / "predictions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[line - 1] = damage + b"\n"
    path.write_bytes(b"".join(lines))
    with refused(f"{path} line {line} is not JSON", "expected one row a line"):
        read_rows(folder)
    with refused(f"{path} line {line}"):
        RunWriter(folder, SETTINGS)
    assert path.read_bytes() == b"".join(lines)


def test_runs_are_loaded_in_order_each_row_with_its_method_llm_seed_and_folder(tmp_path):
    fresh(tmp_path / "b", rows=2, method="zero-shot", seed=1).finish()
    fresh(tmp_path / "a", rows=1).finish()
    rows = load_runs([tmp_path / "b", str(tmp_path / "a")])
    zero_shot = {"method": "zero-shot", "llm": "tiny", "seed": 1, "run": str(tmp_path / "b"), "asking": None}
    adapted = {"method": "atv", "llm": "tiny", "seed": 42, "run": str(tmp_path / "a"), "asking": None}
    assert rows == [
        zero_shot | asdict(prediction(0)),
        zero_shot | asdict(prediction(1)),
        adapted | asdict(prediction(0)),
    ]


def test_runs_below_a_folder_are_found_at_any_depth_and_read_once(tmp_path):
    for name in ("b/42", "a", "a/inside/10", ".left/run", "b/.run.former"):
        fresh(tmp_path / name, rows=1).finish()
    (tmp_path / "b" / "adapter").mkdir()
    found = [row["run"] for row in load_runs([tmp_path / "b" / "42", tmp_path])]
    assert found == [str(tmp_path / name) for name in ("b/42", "a/inside/10", "a")]
    assert [row["run"] for row in load_runs([tmp_path / ".left"])] == [str(tmp_path / ".left/run")]
    with refused(tmp_path / "b" / "adapter", "is not a run and contains none"):
        load_runs([tmp_path / "a", tmp_path / "b" / "adapter"])


def test_a_run_can_be_moved(tmp_path, folder):
    fresh(folder, rows=1).finish()
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_runs([tmp_path / "elsewhere"])[0]["run"] == str(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ("is not a run", "run.json is missing", "Make one with: atv eval --out DIR")),
        ("{", ("run.json is not valid JSON", "expected a run's description")),
        ("[]", ("run.json has schema", "expected 2", "another version", "--force")),
        ('{"schema": 1, "settings": {}}', ("run.json has schema", "expected 2", "another version", "--force")),
        ('{"settings": {}}', ("run.json has schema", "expected 2", "another version", "--force")),
    ],
)
def test_a_folder_that_is_no_run_of_this_version_is_named(folder, content, parts):
    fresh(folder, rows=1)
    (folder / "run.json").unlink() if content is None else (folder / "run.json").write_text(content)
    with refused(folder, *parts):
        load_runs([folder])
    if content is not None:
        with refused(folder, *parts):
            RunWriter(folder, SETTINGS)
    assert len(read_rows(folder)) == 1


@pytest.mark.parametrize("content", [None, "", '{"task": "senti'])
def test_a_run_that_is_not_finished_is_named(folder, content):
    fresh(folder)
    (folder / "predictions.jsonl").unlink() if content is None else (folder / "predictions.jsonl").write_text(content)
    with refused(folder, "is not finished (0 rows)", "run its command again to resume"):
        load_runs([folder])


def test_runs_on_other_test_rows_of_a_task_are_not_loaded_together(tmp_path):
    """An example's number stands for another row there, and every comparison row by row would be wrong."""
    for name, changed in {
        "a": {},
        "b": {"tasks": {"sentiment": 121}},
        "c": {"llm": "other", "tasks": {"sentiment": 9}},
    }.items():
        fresh(tmp_path / name, 1, **changed).finish()
    assert len(load_runs([tmp_path / "a", tmp_path / "c"])) == 2
    with refused(tmp_path / "a", tmp_path / "b", "different test rows for the task sentiment (120; 121)"):
        load_runs([tmp_path])


def test_runs_of_one_method_that_differ_in_more_than_seeds_are_kept_apart(tmp_path):
    asking = {"sentiment": {"templates": ["{input}"], "options": ["bad", "good"]}}
    runs = {
        "a/one": ({"seed": 42}, {}),
        "a/two": ({"seed": 43, "adapter": "other weights"}, {}),  # another seed of the training and of the run
        "b/shots": ({"method": "icl", "shots": 1}, {}),
        "b/more": ({"method": "icl", "shots": 8}, {}),
        "c/own": ({"label": "mine", "dtype": "float16"}, {}),
        "d/long": ({"method": "lora"}, {"training": {"train": {"seed": 1, "epochs": 9}}}),
        "d/short": ({"method": "lora"}, {"training": {"train": {"seed": 2, "epochs": 3}}}),
    }
    for name, (changed, method) in runs.items():
        run = fresh(tmp_path / name, rows=1, asking=asking, **changed)
        run.finish(method={"config": {}, "training": {"train": {"seed": run.run["settings"]["seed"]}}} | method)
    found = {Path(row["run"]).name: row["method"] for row in load_runs([tmp_path])}
    assert {name: found[name] for name in ("one", "two", "own")} == {"one": "atv", "two": "atv", "own": "mine"}
    expected = {"shots": "icl (b/shots)", "more": "icl (b/more)", "long": "lora (d/long)", "short": "lora (d/short)"}
    assert {name: found[name] for name in expected} == expected
    assert {row["method"] for row in load_runs([tmp_path / "b"])} == {"icl (shots)", "icl (more)"}
    assert {row["method"] for row in load_runs([tmp_path / "b" / "more"])} == {"icl"}
    run = fresh(tmp_path / "e", rows=1, asking={"sentiment": {"templates": ["Well? {input}"], "options": None}})
    run.finish()
    said = markdown(comparison_table(load_runs([tmp_path / "c", tmp_path / "e"]), "mine"))
    assert "prompts differ in template, system message or format for sentiment" in said
    assert "differ in template" not in markdown(comparison_table(load_runs([tmp_path / "c", tmp_path / "a"]), "mine"))


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ({}, {"adapter": "b"}, True),  # the same seeds: it learned from other rows
        ({}, {"adapter": "b", "seed": 2}, False),
        ({}, {"adapter": "b", "trained with": 2}, False),
        ({}, {"adapter": "b", "seed": 2, "rows": {"sentiment": 60}}, True),
        ({"rows": None}, {"adapter": "b", "seed": 2, "rows": {"sentiment": 60}}, False),  # an earlier version's record
        ({}, {"adapter": "b", "seed": 2, "rows": {"sentiment": 16, "topic": 16}}, True),
        ({"rows": None}, {"adapter": "b", "seed": 2, "rows": None, "tasks": ["topic"]}, True),
        ({"adapter": None}, {"adapter": None}, False),
        ({"shown": "x", "adapter": None}, {"shown": "y", "adapter": None}, True),
        ({"shown": "x", "adapter": None}, {"shown": "y", "adapter": None, "seed": 2}, False),
    ],
)
def test_runs_that_learned_from_other_rows_are_kept_apart_except_where_the_seed_draws_them(tmp_path, one, other, apart):
    learned = {"adapter": "a", "seed": 1, "trained with": 1, "rows": {"sentiment": 16}, "shown": None}
    for name, changed in (("one", learned | one), ("other", learned | other)):
        shown = {"demonstrations from": {"sentiment": changed["shown"]}} if changed["shown"] else {}
        tasks = {task: {} for task in changed.get("tasks", changed["rows"] or ["sentiment"])}
        training = {"train": {"seed": changed["trained with"]}, "tasks": tasks}
        training |= {"train_rows": changed["rows"]} if changed["rows"] else {}
        run = fresh(tmp_path / name, 1, seed=changed["seed"], adapter=changed["adapter"], **shown)
        run.finish(method={"config": {}, "training": training})
    found = {row["method"] for row in load_runs([tmp_path])}
    assert found == ({"atv (one)", "atv (other)"} if apart else {"atv"})


def test_rows_that_two_runs_wrote_or_somebody_removed_are_noticed(folder):
    one = fresh(folder, rows=2)
    other = fresh(folder, rows=0)
    other.append([prediction(1), prediction(2)])  # row 1 again
    one.append([prediction(2)])
    assert [row["example"] for row in read_rows(folder)] == [0, 1, 2]
    order = [("sentiment", 1, "A:", index) for index in range(3)]
    one.gather(order)
    with refused("1 of 4 rows are missing"):
        one.gather([*order, ("sentiment", 1, "A:", 3)])
    one.finish()
    assert len(load_runs([folder])) == 3
    file = folder / "predictions.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with refused("has 2 rows and was finished with 3"):
        load_runs([folder])


def test_a_label_may_change_and_is_the_last_one(folder):
    fresh(folder, rows=1, label="atv, 4 rows").finish()
    assert RunWriter(folder, SETTINGS | {"label": "atv, few rows"}).finished
    assert [row["method"] for row in load_runs([folder])] == ["atv, few rows"]
    assert RunWriter(folder, SETTINGS).finished
    assert [row["method"] for row in load_runs([folder])] == ["atv"]
