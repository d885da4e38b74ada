"""The paper's tasks: the table and the templates, and what a folder's task takes from them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from refusals import refused

from atv.data import load_task
from atv.paper.tasks import PAPER, load_paper_tasks, paper_templates

ROWS = {
    "train": [{"input": "a", "output": "Yes"}],
    "valid": [{"input": "b", "output": "No"}],
    "test": [{"input": "c", "output": "No"}],
}


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def test_there_are_twenty_in_domain_tasks_and_five_unseen_ones():
    counts = Counter(task.category for task in PAPER.values())
    assert counts == {"Knowledge": 4, "Reasoning": 5, "Mathematics": 2, "Safety": 4, "NLU": 5, "Unseen": 5}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_task_has_three_different_templates_that_take_the_input_once(name):
    assert paper_templates().keys() == PAPER.keys()
    templates = paper_templates()[name]
    assert len(set(templates)) == 3
    assert [template.count("{input}") for template in templates] == [1, 1, 1]


def test_the_templates_name_the_answers_of_the_table():
    """A template that says how to answer says so with the table's words; one for letters asks for a letter."""
    for name, task in PAPER.items():
        for template in paper_templates()[name]:
            words = re.findall(r"\w+", template)
            if task.options is None:
                assert "X" in words, name
            elif name != "bbh_boolean_expressions" and "Answer" in words:
                assert all(option.casefold() in map(str.casefold, words) for option in task.options), (name, template)


def test_a_task_named_as_the_papers_has_its_category_and_templates_without_a_word_about_them(tmp_path):
    write(tmp_path / "superglue_wic.json", ROWS)
    task = load_paper_tasks(["superglue_wic"], tmp_path)[0]
    assert task.category == "NLU"
    assert list(task.templates) == paper_templates()["superglue_wic"]
    write(tmp_path / "templates.json", {"another": ["{input}"]})
    assert load_paper_tasks(["superglue_wic"], tmp_path)[0] == task


def test_what_the_folder_says_stands(tmp_path):
    write(tmp_path / "superglue_wic.json", ROWS | {"category": "Mine"})
    write(tmp_path / "templates.json", {"superglue_wic": ["{input}?"]})
    task = load_paper_tasks(["superglue_wic"], tmp_path)[0]
    assert (task.category, task.templates) == ("Mine", ("{input}?",))
    assert load_paper_tasks(["superglue_wic"], tmp_path, ["{input}!"])[0].templates == ("{input}!",)


def test_wrong_templates_of_the_folder_are_not_passed_over(tmp_path):
    write(tmp_path / "superglue_wic.json", ROWS)
    for wrong in ([], {"superglue_wic": "{input}"}):
        write(tmp_path / "templates.json", wrong)
        with refused("templates.json has no list of templates for superglue_wic"):
            load_paper_tasks(["superglue_wic"], tmp_path)[0]


@pytest.mark.parametrize("category", ["", " ", 1, None, ["NLU"]])
def test_a_category_that_is_no_text_is_refused(tmp_path, category):
    write(tmp_path / "mine.json", ROWS | {"category": category})
    with refused(tmp_path / "mine.json", f"has category {category!r}", "expected some text"):
        load_task("mine", tmp_path, ["{input}"])


def test_a_task_of_another_name_has_the_category_of_its_file(tmp_path):
    write(tmp_path / "mine.json", ROWS | {"category": "Safety"})
    assert load_task("mine", tmp_path, ["{input}"]).category == "Safety"


def test_answers_that_the_papers_task_does_not_have_are_told(tmp_path, capsys):
    told = "answers 'great', where the paper's task has 'negative', 'positive'."
    rows = {
        split: [{"input": f"{split} {answer}", "output": answer} for answer in ("negative", "great")] for split in ROWS
    }
    write(tmp_path / "glue_sst2.json", rows)
    write(tmp_path / "math_qa.json", rows)  # whose options are each row's own
    load_paper_tasks(["glue_sst2", "math_qa"], tmp_path)
    err = capsys.readouterr().err
    assert f"glue_sst2: {told}" in err
    assert "math_qa" not in err
