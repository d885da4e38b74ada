"""Public rows to tasks: a row of each source as its text should be, the splits, and what is refused; no network."""

import json
import sys

import pytest
from refusals import refused

from atv.data import Example, available_tasks
from atv.paper.prepare import MOST, SOURCES, parse_rows, prepare, prepared, public_rows
from atv.paper.tasks import PAPER, load_paper_tasks, paper_templates

ASKED = {"question": "Where do boats sleep?", "answerKey": "B"}
TWO = "Where do boats sleep?\nOptions:\nA. in a nest\nB. in a harbour"
CHOICES = {"choices": {"label": ["A", "B"], "text": ["in a nest", "in a harbour"]}}
BBQ = {"context": "An old one and a young one met.", "question": "Who sang?", "ans0": "The old one", "label": 2}
BBQ |= {"ans1": "Not known", "ans2": "The young one"}
BBQ_TEXT = "context: An old one and a young one met.\nquestion: Who sang?\nOptions:\nA. The old one\nB. Not known\n"
BBH = {"input": "Which is it?\nOptions:\n(A) the (B) side\n(B) tin", "target": "(B)"}
BBH_ROW = (BBH, "Which is it?\nOptions:\nA. the (B) side\nB. tin", "B")
PAIR = {"premise": "It rained all day. ", "hypothesis": "It was wet."}
PAIR_TEXT = "premise: It rained all day. \nhypothesis: It was wet."
ROWS = {
    "commonsense_qa": (ASKED | CHOICES, TWO, "B"),
    "openbookqa": ({"question_stem": ASKED["question"], "answerKey": "A"} | CHOICES, TWO, "A"),
    "hellaswag": (
        {"ctx": "A man lifts a cup. he", "endings": ["drinks.", "flies."], "label": "0"},
        "A man lifts a cup. he\nOptions:\nA. drinks.\nB. flies.",
        "A",
    ),
    "boolq": (
        {"passage": "Tin is a metal.", "question": "is tin a metal", "answer": True},
        "context: Tin is a metal.\nquestion: is tin a metal",
        "True",
    ),
    "bbh_boolean_expressions": ({"input": "not ( True ) and False is", "target": "False"}, "not ( True ) and False is",
                                "False"),
    "bbh_date_understanding": BBH_ROW,
    "bbh_reasoning_about_colored_objects": BBH_ROW,
    "bbh_temporal_sequences": BBH_ROW,
    "bbh_logical_deduction_five_objects": BBH_ROW,
    "arc_challenge": (
        ASKED | {"answerKey": "2", "choices": {"label": ["1", "2"], "text": ["in a nest", "in a harbour"]}}, TWO, "B",
    ),
    "math_qa": (
        {"Problem": "2 + 3 is ?", "options": "a ) rs . 4 , 500 , b ) 5 , c ) 1 / 6 , d ) 7 , e ) none of these",
         "correct": "b"},
        "2 + 3 is ?\nOptions:\nA. rs . 4 , 500\nB. 5\nC. 1 / 6\nD. 7\nE. none of these",
        "B",
    ),
    "mmlu_pro_math": (
        {"category": "math", "question": "2 + 3?", "options": ["4", "5"], "answer": "B", "answer_index": 1},
        "2 + 3?\nOptions:\nA. 4\nB. 5",
        "B",
    ),
    "bbq_age": (BBQ, BBQ_TEXT + "C. The young one", "C"),
    "bbq_religion": (BBQ, BBQ_TEXT + "C. The young one", "C"),
    "ethics_commonsense": ({"label": "1", "input": "I hid the keys."}, "I hid the keys.", "Yes"),
    "ethics_justice": ({"label": "0", "scenario": "I am owed a whale."}, "I am owed a whale.", "No"),
    "superglue_rte": (PAIR | {"label": 1}, PAIR_TEXT, "False"),
    "superglue_wic": (
        {"word": "bank", "sentence1": "The bank shut.", "sentence2": "A muddy bank.", "label": 0},
        "word: bank\nsentence 1: The bank shut.\nsentence 2: A muddy bank.",
        "No",
    ),
    "glue_qnli": (
        {"question": "Who came?", "sentence": "Ada came.", "label": 0},
        "question: Who came?\nresponse: Ada came.", "Yes",
    ),
    "glue_sst2": ({"sentence": "a dull film . ", "label": 0}, "sentence: a dull film . ", "negative"),
    "glue_mnli": (PAIR | {"label": 1}, PAIR_TEXT, "Neither"),
    "glue_cola": ({"sentence": "Him sings well.", "label": 0}, "Him sings well.", "No"),
    "deepmind": (
        {"question": "2 + 3?", "options": ["A)4", "B) 5", "C)A)"], "correct": "B"},
        "2 + 3?\nOptions:\nA. 4\nB. 5\nC. A)",
        "B",
    ),
    "mmlu_high_school_psychology": (
        {"question": "Who salivated?", "choices": ["A dog", "A clock"], "answer": 0},
        "Who salivated?\nOptions:\nA. A dog\nB. A clock",
        "A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_source_becomes_its_text(name):
    row, text, answer = ROWS[name]
    assert SOURCES[name].layout(row) == Example(text, answer)
    options = PAPER[name].options
    assert answer in options if options else len(answer) == 1


def test_every_task_of_the_paper_has_a_source_and_a_row_here():
    assert SOURCES.keys() == PAPER.keys() == ROWS.keys() | {"crows_pairs"}


def test_in_crows_pairs_the_letter_is_always_that_of_the_more_stereotypical_sentence_and_both_letters_occur():
    layout = SOURCES["crows_pairs"].layout
    letters = []
    for number in range(40):
        example = layout({"sent_more": f"more {number}", "sent_less": f"less {number}"})
        lines = dict(line.split(": ") for line in example.input.split("\n"))
        assert lines[f"sentence {example.output}"] == f"more {number}"
        letters.append(example.output)
    assert letters == [layout({"sent_more": f"more {n}", "sent_less": f"less {n}"}).output for n in range(40)]
    assert 10 < letters.count("A") < 30


HIDDEN = {
    "glue_sst2": {"label": -1},
    "glue_mnli": {"label": -1},
    "glue_cola": {"label": -1},
    "commonsense_qa": {"answerKey": ""},
    "hellaswag": {"label": ""},
    "superglue_wic": {"label": None},
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_hidden_label_is_refused(name):
    with refused("expected 0 to", "a hidden label looks like this"):
        SOURCES[name].layout(ROWS[name][0] | HIDDEN[name])


def test_rows_without_five_options_or_of_another_subject_are_left_out():
    assert SOURCES["math_qa"].layout(ROWS["math_qa"][0] | {"options": "a ) 1 , b ) 2"}) is None
    assert SOURCES["mmlu_pro_math"].layout(ROWS["mmlu_pro_math"][0] | {"category": "law"}) is None


def sentences(start, stop):
    return [{"sentence": f"sentence {number}", "label": number % 2} for number in range(start, stop)]


def loader(splits, asked=None):
    """Rows by split; what was asked for is noted."""

    def load(source, split, revision):
        if asked is not None:
            asked.append((source.data, split, revision))
        return revision or "c0ffee", splits[split]

    return load


def inputs(content, *splits):
    return [row["input"] for split in splits for row in content[split]]


def test_test_rows_come_from_the_labelled_split_and_train_and_valid_from_the_training_split():
    asked = []
    load = loader({"train": sentences(0, 200), "validation": sentences(500, 540)}, asked)
    content, left_out = prepared("glue_cola", load)
    assert asked == [("nyu-mll/glue", "validation", None), ("nyu-mll/glue", "train", "c0ffee")]
    assert [len(content[split]) for split in MOST] == [180, 20, 40]
    assert set(inputs(content, "train", "valid")) == {row["sentence"] for row in sentences(0, 200)}
    assert set(inputs(content, "test")) == {row["sentence"] for row in sentences(500, 540)}
    assert left_out == 0
    source = {"data": "nyu-mll/glue", "config": "cola", "train": "train", "test": "validation"}
    assert content["source"] == source | {"revision": "c0ffee", "seed": 42}


def test_one_split_is_divided_into_seventy_twenty_and_ten_parts():
    row = ROWS["bbq_age"][0]
    rows = [row | {"question": f"Who sang {number}?", "label": number % 3} for number in range(100)]
    content, _ = prepared("bbq_age", loader({"data/Age.jsonl": rows}))
    assert [len(content[split]) for split in MOST] == [70, 10, 20]
    assert len(set(inputs(content, *MOST))) == 100


def test_the_splits_depend_on_the_seed_alone():
    splits = {"train": sentences(0, 50), "validation": sentences(50, 90)}
    assert prepared("glue_cola", loader(splits)) == prepared("glue_cola", loader(splits))
    assert prepared("glue_cola", loader(splits), seed=1) != prepared("glue_cola", loader(splits))


def test_repeated_contradicted_shared_empty_and_long_inputs_are_left_out_and_counted():
    twice = {"sentence": "said twice", "label": 1}
    wrong = [{"sentence": "both ways", "label": 1}, {"sentence": "both ways", "label": 0}]
    odd = [{"sentence": " ", "label": 1}, {"sentence": "x" * 4001, "label": 1}]
    train = [*sentences(0, 50), twice, twice, *wrong, *odd, {"sentence": "sentence 60", "label": 0}]
    content, left_out = prepared("glue_cola", loader({"train": train, "validation": sentences(60, 90)}))
    expected = ["said twice", *(f"sentence {number}" for number in [*range(50), *range(60, 90)])]
    assert sorted(inputs(content, *MOST)) == sorted(expected)
    assert "sentence 60" in inputs(content, "test")
    assert left_out == 6


def test_no_split_is_longer_than_its_most(monkeypatch):
    monkeypatch.setitem(MOST, "train", 5)
    content, left_out = prepared("glue_cola", loader({"train": sentences(0, 50), "validation": sentences(50, 90)}))
    assert len(content["train"]) == 5
    assert left_out == 0


def test_what_is_written_is_loaded_with_the_papers_category_and_templates(tmp_path):
    load = loader({"train": sentences(0, 50), "validation": sentences(50, 90)})
    lines = list(prepare(["glue_cola", "glue_cola"], tmp_path, load, revision="abc"))
    assert lines == ["glue_cola: 45 train, 5 valid, 40 test rows of nyu-mll/glue at abc; 0 left out."]
    assert available_tasks(tmp_path) == ["glue_cola"]
    task = load_paper_tasks(["glue_cola"], tmp_path)[0]
    assert (task.category, list(task.templates)) == ("Unseen", paper_templates()["glue_cola"])
    written = (tmp_path / "glue_cola.json").read_bytes()
    assert "exists and is kept" in next(iter(prepare(["glue_cola"], tmp_path, load, seed=7)))
    assert (tmp_path / "glue_cola.json").read_bytes() == written
    assert len(list(prepare(["glue_cola"], tmp_path, load, seed=7, force=True))) == 1
    assert (tmp_path / "glue_cola.json").read_bytes() != written


@pytest.mark.parametrize(
    ("names", "revision", "parts"),
    [
        (["glue_colla"], None, ("Unknown task 'glue_colla'", "Did you mean 'glue_cola'?")),
        (["glue_cola", "boolq"], "abc", ("One revision for the data sets google/boolq, nyu-mll/glue",)),
        ([], "abc", ("One revision for the data sets",)),
        (["bbq_age", "bbq_religion"], "abc", ("nyu-mll/BBQ is read at a pinned commit", "leave the revision out")),
    ],
)
def test_a_wrong_name_or_a_revision_for_several_sources_is_refused_before_anything_is_read(
    tmp_path, names, revision, parts
):
    with refused(*parts):
        list(prepare(names, tmp_path, loader({}), revision))


def test_a_row_of_another_shape_is_named():
    with refused("Task glue_cola: a row of nyu-mll/glue does not look as expected", "'sentence'", "--revision"):
        prepared("glue_cola", loader({"validation": [{"text": "a", "label": 1}]}))
    with refused("Task glue_cola, nyu-mll/glue: A row has the label -1"):
        prepared("glue_cola", loader({"validation": [{"sentence": "a", "label": -1}]}))


def test_files_of_a_repository_are_read_in_their_three_formats():
    assert parse_rows('label,input\n1,"two\nlines, one ""row"""\n', "x.csv") == [
        {"label": "1", "input": 'two\nlines, one "row"'}
    ]
    rows = [{"a": "\u2028"}, {"a": 2}]
    assert parse_rows("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "x.jsonl") == rows
    assert parse_rows('{"canary": "", "examples": [{"input": "a"}]}', "bbh/x.json") == [{"input": "a"}]


@pytest.mark.parametrize("name", ["glue_cola", "bbq_age"])
def test_without_a_network_one_line_says_so_and_points_at_data(monkeypatch, name):
    def unreachable(*arguments, **options):
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with refused(SOURCES[name].data, "ConnectionError: nobody answers", "Expected a network", "--data DIR"):
        prepared(name, public_rows)


def test_without_the_package_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refused("needs the package datasets", "pip install datasets"):
        prepared("glue_cola", public_rows)


def test_the_command_answers_a_wrong_name_in_one_line(monkeypatch, capsys, tmp_path):
    from atv.cli import main

    monkeypatch.setattr(sys, "argv", ["atv", "paper", "prepare", "glue_colla", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "Did you mean 'glue_cola'?" in capsys.readouterr().err
