"""Demonstrations before the query: which, how many, in what order, and that reading them once changes nothing."""

import itertools
import json
import math
import random
import re
import time
import unicodedata

import bm25s
import pytest
import torch
from conftest import byte_level_tokenizer, make_llm, toy_task
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from rendering import prompt_text

from atv.data import Example, Task
from atv.evaluation.records import RunWriter
from atv.evaluation.run import evaluate
from atv.lm.prefix import SharedPrefix
from atv.methods import METHODS
from atv.methods.demonstrations import Demonstrated
from atv.words import words

WORDS = ["harbour", "kettle", "lid", "boat", "quiet", "not", "A", "7", "the", "the", "the"]


def sentences(count, seed, longest=12):
    draw = random.Random(seed)
    made = {}
    while len(made) < count:
        made.setdefault(" ".join(draw.choices(WORDS, k=draw.randint(2, longest))), None)
    return list(made)


def random_task(train=40, test=10, seed=0, name="words"):
    rows = [Example(text, ("yes", "no")[i % 2]) for i, text in enumerate(sentences(train + test + 1, seed))]
    templates = ("{input}\nyes or no?", "Question: {input}", "Is it so? {input}")
    return Task(name, templates, tuple(rows[:train]), tuple(rows[train : train + 1]), tuple(rows[train + 1 :]))


def roomy_llm(limit=20_000):
    llm = make_llm()
    llm.config.max_position_embeddings = limit  # rotary positions have no table that would be too short
    return llm


def load(name, llm=None, **options):
    return METHODS[name].load(llm or roomy_llm(), byte_level_tokenizer(), None, **options)


def asked(method, tasks, folder, batch_size=4):
    """The run's rows, and how many tokens the LLM read."""
    read = []
    hook = method.llm.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    run = RunWriter(folder, {})
    evaluate(method, tasks, ["first_token"], run, variants="first", batch_size=batch_size)
    hook.remove()
    return run.rows, sum(read)


def by_hand(query, documents, k1=1.5, b=0.75):
    """BM25 in Lucene's variant, as the formula has it."""
    split = [re.findall(r"\w+", text.lower()) for text in documents]
    mean = sum(map(len, split)) / len(split)

    def score(words):
        total = 0.0
        for word in re.findall(r"\w+", query.lower()):
            containing = sum(word in other for other in split)
            idf = math.log(1 + (len(split) - containing + 0.5) / (containing + 0.5))
            frequency = words.count(word)
            total += idf * frequency / (frequency + k1 * (1 - b + b * len(words) / mean))
        return total

    return [round(score(words), 9) for words in split]


def test_bm25_refuses_a_task_without_words():
    task = toy_task()
    train = tuple(Example("?" * (i + 1), row.output) for i, row in enumerate(task.train))
    with refused("no training input has a word", "--method icl"):
        load("bm25").demonstrations(Task("signs", task.templates, train, task.valid, task.test), task.test)


@pytest.mark.parametrize("seed", range(5))
def test_bm25_ranks_as_its_formula_and_ties_in_the_order_of_the_split(seed):
    task = random_task(train=30, seed=seed)
    odd = [Example(query, "yes") for query in ("not a word of it", "unheard of", "??", "kettle kettle lid")]
    queries = [*task.test, *odd]
    chosen = load("bm25", shots=7).demonstrations(task, queries)
    documents = [row.input for row in task.train]
    for query, shown in zip(queries, chosen, strict=True):
        scores = by_hand(query.input, documents)
        best = sorted(range(30), key=lambda row: (-scores[row], row))[:7]
        assert shown == [task.train[row] for row in reversed(best)]


def test_scores_whose_sums_differ_in_the_last_digit_alone_are_a_tie():
    others = ["u v z z z", *(f"w{i} x{i} y{i}" for i in range(9))]
    task = toy_task()
    train = tuple(Example(text, "yes") for text in ("p q u", "v r s", *others))  # u and v are the common words
    task = Task("ties", task.templates, train, task.valid, task.test)
    (shown,) = load("bm25", shots=2).demonstrations(task, [Example("p q u v r s", "no")])
    assert [row.input for row in shown] == ["v r s", "p q u"]


def test_the_same_seed_draws_the_same_demonstrations_and_another_seed_or_task_others():
    task, namesake = random_task(), random_task(name="other")

    def drawn(seed, task=task):
        return load("icl", seed=seed).demonstrations(task, task.test)

    first = drawn(42)
    assert first == drawn(42)
    assert all(shown == first[0] for shown in first)
    assert len(set(first[0])) == 16
    assert first[0] != drawn(100)[0]
    assert first[0] != drawn(42, namesake)[0]


@pytest.mark.parametrize("name", ["icl", "bm25"])
def test_demonstrations_are_training_rows_and_never_the_query(name):
    task = random_task()
    shown = {row for rows in load(name).demonstrations(task, task.test) for row in rows}
    assert shown <= set(task.train)
    assert not {row.input for row in shown} & {row.input for row in task.test}


@pytest.mark.parametrize("name", ["icl", "bm25"])
def test_predictions_are_those_of_one_plain_pass_over_the_text_written_by_hand(name, tmp_path, monkeypatch):
    task, method = random_task(test=6), load(name, shots=5)
    rows, read = asked(method, [task], tmp_path / "shared")
    assert len({row["outputs"]["first_token"] for row in rows}) > 1
    for row, shown in zip(rows, method.demonstrations(task, task.test), strict=True):
        text = "".join(f"{example.input}\nyes or no?\nA: {example.output}\n\n" for example in shown)
        text += f"{task.test[row['example']].input}\nyes or no?\nA:"
        ids = torch.tensor([method.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            likeliest = method.llm(ids).logits[0, -1].argmax()
        assert row["outputs"]["first_token"] == method.tokenizer.decode([likeliest])
        assert (row["prompt_tokens"], row["demonstrations"]) == (ids.shape[1], 5)
        yes, no = (method.tokenizer(text + f" {word}")["input_ids"][ids.shape[1]] for word in ("yes", "no"))
        assert row["scores"]["first_token"] == (likeliest == (yes if row["target"] == "yes" else no))
    monkeypatch.setattr(SharedPrefix.__init__, "__defaults__", (10**6,))
    plain, plain_read = asked(method, [task], tmp_path / "plain")
    without_time = [[{**row, "seconds": 0} for row in some] for some in (rows, plain)]
    assert without_time[0] == without_time[1]
    assert (read < 0.5 * plain_read) == (name == "icl")


def fits(method, task, shown, example, limit):
    text = "".join(f"{row.input}\nyes or no?\nA: {row.output}\n\n" for row in shown)
    return len(method.tokenizer(f"{text}{example.input}\nyes or no?\nA:")["input_ids"]) <= limit


@pytest.mark.parametrize("limit", [120, 256])
def test_bm25_drops_from_the_front_what_does_not_fit_before_each_query(limit):
    task, method = random_task(), load("bm25", roomy_llm(limit))
    counts = set()
    render = task.training_renderers()[0]
    method.read_after = 3
    limit -= method.read_after
    prompts = method.prompts(task, task.test, render)
    for prompt, shown, example in zip(prompts, method.demonstrations(task, task.test), task.test, strict=True):
        kept = prompt.demonstrations
        assert len(prompt.ids) <= limit
        text = method.tokenizer.decode(prompt.ids)
        assert text.endswith(f"{shown[-1].input}\nyes or no?\nA: {shown[-1].output}\n\n{example.input}\nyes or no?\nA:")
        assert fits(method, task, shown[16 - kept :], example, limit)
        assert not fits(method, task, shown[16 - kept - 1 :], example, limit)
        counts.add(kept)
    assert len(counts) > 1
    assert max(counts) < 16


def test_icl_drops_the_same_number_before_every_query_and_still_reads_them_once(tmp_path, capsys):
    task, limit = random_task(test=40), 256
    method = load("icl", roomy_llm(limit))
    rows, read = asked(method, [task], tmp_path / "icl")
    (kept,) = {row["demonstrations"] for row in rows}
    drawn = load("icl").demonstrations(task, task.test)[0]
    assert 0 < kept < 16
    assert all(fits(method, task, drawn[16 - kept :], example, limit) for example in task.test)
    assert not all(fits(method, task, drawn[16 - kept - 1 :], example, limit) for example in task.test)
    assert read < 0.5 * sum(row["prompt_tokens"] for row in rows)
    said = capsys.readouterr().err
    assert said.count(f"icl: 40 of 40 prompts had fewer than 16 demonstrations (down to {kept})") == 1


def never_right(example, output):
    return 0.0


@pytest.mark.parametrize("metric", ["json", never_right])
@pytest.mark.parametrize("name", ["icl", "bm25"])
def test_a_metric_that_reads_more_after_a_prompt_costs_no_more_demonstrations_than_it_must(name, metric, capsys):
    plain, number = random_task(test=3), itertools.count()
    answers = {
        split: tuple(
            row._replace(output=json.dumps({"team": row.output, "n": next(number) % 3}))
            for row in getattr(plain, split)
        )
        for split in ("train", "valid", "test")
    }
    task = Task(plain.name, plain.templates, **answers)
    method, limit = load(name, roomy_llm(256)), 256
    found = evaluate(method, [task], [metric], variants="first")
    longest = max(len(method.tokenizer(f" {row.output}</s>")["input_ids"]) for rows in answers.values() for row in rows)
    limit -= 2 * longest + 16 - 1  # the last token that is generated is not read
    drawn = method.demonstrations(task, task.test)
    kept = [
        max(count for count in range(17) if fits(method, task, shown[16 - count :], example, limit))
        for shown, example in zip(drawn, task.test, strict=True)
    ]
    assert [row["demonstrations"] for row in found] == ([min(kept)] * 3 if name == "icl" else kept)
    assert 0 < min(kept) < 16
    assert "are cut" not in capsys.readouterr().err


def test_icl_looks_again_where_the_most_characters_are_not_the_most_tokens():
    dense = Example("#" * 60, "yes")  # a token each
    wide = Example("the harbour was quiet " * 5, "no")  # a token a word
    plain = random_task()
    task = Task(plain.name, plain.templates, plain.train, plain.valid, (wide, dense))
    prompts = load("icl", roomy_llm(256)).prompts(task, task.test, task.training_renderers()[0])
    assert len(prompts[1].ids) > len(prompts[0].ids)
    assert len(prompts[1].ids) <= 256
    assert prompts[0].demonstrations == prompts[1].demonstrations > 0


@pytest.mark.parametrize("name", ["icl", "bm25"])
def test_a_query_is_never_dropped_and_one_too_long_is_cut_at_its_end(name, tmp_path, capsys):
    task, tokenizer = toy_task(), byte_level_tokenizer()
    longest = max(len(tokenizer(prompt_text(task, row.input))["input_ids"]) for row in task.test)
    rows, _ = asked(load(name, roomy_llm(longest)), [task], tmp_path / "just")
    assert {row["demonstrations"] for row in rows} == {0}
    assert "are cut" not in capsys.readouterr().err
    rows, _ = asked(load(name, roomy_llm(longest - 1)), [task], tmp_path / "over")
    assert max(row["prompt_tokens"] for row in rows) <= longest - 1
    assert len(rows) == len(task.test)
    assert f"context of {longest - 1} tokens" in capsys.readouterr().err


def test_fewer_training_rows_than_shots_are_all_shown(tmp_path, capsys):
    task = toy_task()  # 8 training rows
    for name in ("icl", "bm25"):
        rows, _ = asked(load(name), [task], tmp_path / name)
        assert {row["demonstrations"] for row in rows} == {8}
        assert f"{name}: 8 of 8 prompts had fewer than 16" in capsys.readouterr().err
    rows, _ = asked(load("zero-shot"), [task], tmp_path / "zero-shot")
    assert {row["demonstrations"] for row in rows} == {0}
    assert "demonstrations" not in capsys.readouterr().err


def test_sixteen_shots_cost_less_than_three_times_the_tokens_of_none(tmp_path):
    task = random_task(test=32)
    _, none = asked(load("zero-shot"), [task], tmp_path / "zero-shot")
    rows, sixteen = asked(load("icl"), [task], tmp_path / "icl")
    assert {row["demonstrations"] for row in rows} == {16}
    assert sum(row["prompt_tokens"] for row in rows) > 10 * none
    assert sixteen < 3 * none


def test_seconds_per_query_include_retrieval(tmp_path, monkeypatch):
    task, retrieve = random_task(test=8), Demonstrated.prompts
    monkeypatch.setattr(Demonstrated, "prompts", lambda *given: time.sleep(0.4) or retrieve(*given))
    rows, _ = asked(load("bm25", shots=1), [task], tmp_path / "run")
    assert min(row["seconds"] for row in rows) >= 0.4 / 8


SENTENCES = {
    "Chinese": (
        "这部电影非常好看,演员也很出色。",
        "昨天的股票市场大幅下跌了。",
        "火锅里的牛肉又辣又香。",
        "他们家的牛肉火锅怎么样?",
    ),
    "Japanese": (
        "この映画はとても面白かった。",
        "株価が昨日大きく下がった。",
        "ラーメンのスープがおいしい。",
        "おいしいスープはどれ?",
    ),
    "Thai": ("หนังเรื่องนี้สนุกมาก", "ตลาดหุ้นร่วงหนักเมื่อวานนี้", "ก๋วยเตี๋ยวร้านนี้อร่อยดี", "ร้านไหนอร่อย"),
    "Khmer": ("ភាពយន្តនេះល្អណាស់", "ទីផ្សារភាគហ៊ុនធ្លាក់ចុះ", "អាហារនៅទីនេះឆ្ងាញ់ណាស់", "អាហារឆ្ងាញ់"),
    "Korean": ("이 영화 정말 재미있다", "어제 주식 시장이 내렸다", "여기 냉면 국물 맛있다", "냉면 국물 어때"),
    "Hindi": ("यह फ़िल्म अच्छी थी", "कल शेयर बाज़ार गिरा", "यहाँ का खाना स्वादिष्ट है", "खाना कैसा है"),
    "mixed": ("GPT模型真的很好用", "TCP协议是一种网络协议", "我的iPhone屏幕碎了", "iPhone 屏幕怎么修?"),
}


@pytest.mark.parametrize("language", SENTENCES)
def test_bm25_finds_what_is_alike_in_scripts_with_and_without_spaces(language):
    *train, query = SENTENCES[language]
    plain = toy_task()
    task = Task("t", plain.templates, tuple(Example(text, "yes") for text in train), plain.valid, plain.test)
    shown = load("bm25", shots=3).demonstrations(task, [Example(query, "no")])[0]
    assert shown[-1].input == train[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The kettle's LID, 7 not_A x²", ["the", "kettle", "s", "lid", "7", "not_a", "x²"]),
        ("牛肉", ["牛", "牛肉", "肉"]),
        ("好", ["好"]),
        ("GPT模型2号", ["gpt", "模", "模型", "型", "2", "号"]),
        ("ラーメン", ["ラ", "ラー", "ー", "ーメ", "メ", "メン", "ン"]),
        ("ดีที่", ["ดี", "ดีที่", "ที่"]),
        ("์", []),
        ("नमस्ते जी", ["नमस्ते", "जी"]),
        ("cafe\u0301", ["café"]),
        ("İzmir", ["i\u0307zmir"]),
        ("냉면 맛", ["냉면", "맛"]),
        ("?! … \u200d\ufe0f", []),
    ],
)
def test_words_are_cut_by_script(text, expected):
    assert sorted(words(text)) == sorted(expected)


# İ apart: its lower case is an i and a combining dot, which bm25s drops and we keep, as every other combining mark.
@given(st.text(st.characters(max_codepoint=0x2FF, exclude_characters="İ")) | st.text("aZ é²½ßЖж_'-.\n7٣", max_size=30))
def test_words_of_alphabets_are_those_that_bm25s_finds(text):
    how = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "return_ids": False, "show_progress": False}
    text = unicodedata.normalize("NFC", text)
    assert words(text) == bm25s.tokenize([text], **how)[0]
