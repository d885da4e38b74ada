"""lm-eval's model `atv`: the same answers as `atv eval` on the same rows, and as vectors added by hand."""

import json
import logging
import re
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from chat_templates import chat_tokenizer
from conftest import PAPER_FORM, byte_level_tokenizer, make_atv, make_generator, make_llm, toy_task
from generation import recomputed
from labels import LABELS, added, labelled
from refusals import refused
from test_peft_methods import make as make_peft
from test_self_generator import made as made_of_itself

from atv.cli import main
from atv.config import ATVConfig
from atv.data import Example, Rendering
from atv.data.render import Template
from atv.data.rendering import chat_template_digest
from atv.evaluation.run import evaluate
from atv.lm.load import load_llm
from atv.lm.scoring import longest_answer
from atv.methods.atv import ATVMethod
from atv.methods.fixed import FixedConfig, FixedModel
from atv.methods.lora import LoRA
from atv.methods.prefix_tuning import PrefixTuning
from atv.model import ATVModel
from atv.progress import log

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from atv.integrations.lm_eval import ATVLM

END = "</s>"  # answers of a template end with the end-of-text token, and lm-eval's do only if it is written
WITHOUT_SPECIAL = re.compile("<(s|/s|unk|pad)>")
PROMPT = "{{input}}\\nwhich?\\nA:"
TASKS = {
    "options": """
output_type: multiple_choice
doc_to_text: "%PROMPT%"
doc_to_choice: %OPTIONS%
doc_to_target: "{{number}}"
metric_list: [{metric: acc}]
""",
    "texts": """
output_type: generate_until
doc_to_text: "%PROMPT%"
doc_to_target: "{{output}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: %LIMIT%, do_sample: false}
filter_list: [{name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{input}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without the list of all installed packages, and the index of lm-eval's thousands of tasks."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def rows():
    return labelled(LABELS["opinions"])


@pytest.fixture
def ask(tmp_path, rows):
    """Evaluate a model on a task file whose documents are the test rows: the results and each document's sample."""
    return asking(tmp_path, rows)


def asking(folder, task, prompt=PROMPT, end=END):
    write_tasks(folder, task, prompt, end)
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def run(model, *names, **options):
        found = simple_evaluate(model, tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)
        return found["results"], {name: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for name in names}

    return run


def write_tasks(folder, task, prompt=PROMPT, end=END):
    docs = [row._asdict() | {"number": [*task.options, row.output].index(row.output)} for row in task.test]
    (folder / "docs.jsonl").write_text("\n".join(json.dumps(doc) for doc in docs))
    plain = replace(task, renderer=Rendering("template"), answer_prefixes=("A:",))
    limit = longest_answer(byte_level_tokenizer(), plain, plain.training_renderers()[0])
    for name, text in TASKS.items():
        text = text.replace("%PROMPT%", prompt).replace("%LIMIT%", str(limit))
        text = text.replace("%OPTIONS%", json.dumps([option + end for option in task.options]))
        files = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(files)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)


def trained_on(task, atv):
    """The ATV, saying that it was trained on a task."""
    atv.training_summary = {"tasks": {task.name: task.asking()}}
    return atv


def request(context, answer, number=0, **doc):
    return Instance("loglikelihood", doc, (context, answer), number, ("hand-made", number, 1))


def generated(rows):
    return [row["outputs"]["generated"] for row in rows]


def texts_equal_to_atv_eval(method, task, folder, lm):
    texts = generated(evaluate(method, [task], ["exact_match"], variants="first"))
    some = [text.isprintable() and "<" not in text and text != "" and place % 2 for place, text in enumerate(texts)]
    assert 0 < sum(some) < len(some)
    asked = zip(task.test, texts, some, strict=True)
    right = replace(task, test=tuple(row._replace(output=text if it else row.output) for row, text, it in asked))
    expected = evaluate(method, [right], ["exact_match"], variants="first")
    results, samples = asking(folder, right)(lm, "texts")
    for row, sample in zip(expected, samples["texts"], strict=True):
        assert sample["resps"][0][0].strip() == WITHOUT_SPECIAL.sub("", row["outputs"]["generated"])
        assert sample["exact_match"] == row["scores"]["exact_match"]
    assert results["texts"]["exact_match,stripped"] == pytest.approx(sum(some) / len(some))


def options_equal_to_atv_eval(method, task, folder, lm, *written, **options):
    expected = evaluate(method, [task], ["option_likelihood"], variants="first")
    results, samples = asking(folder, task, *written)(lm, "options", **options)
    for row, sample in zip(expected, samples["options"], strict=True):
        scores = torch.tensor([response[0][0] for response in sample["resps"]], dtype=torch.float64)
        wanted = torch.tensor([row["probabilities"][option] for option in task.options], dtype=torch.float64)
        torch.testing.assert_close(scores.softmax(0), wanted, rtol=2e-4, atol=1e-7)
        assert sample["acc"] == row["scores"]["option_likelihood"]
    right = [row["scores"]["option_likelihood"] for row in expected]
    assert results["options"]["acc,none"] == pytest.approx(sum(right) / len(right))
    assert 0 < sum(right) < len(right)


# ---- equal to atv eval ----


@pytest.mark.parametrize("positions", ["last", "last:3", "answer", "all"])
def test_answers_are_those_of_atv_eval(rows, tmp_path, positions):
    atv = trained_on(rows, make_atv(dtype=torch.float32, positions=positions))
    lm = ATVLM(atv, query_field="input", batch_size=5)
    options_equal_to_atv_eval(ATVMethod(atv), rows, tmp_path, lm)
    texts_equal_to_atv_eval(ATVMethod(atv), rows, tmp_path, lm)


@pytest.mark.parametrize("query_field", [None, "input"])
def test_a_generator_that_reads_prompts(rows, tmp_path, query_field):
    """The whole context, or the query in the template of training, which is the same text here."""
    atv = trained_on(rows, make_atv(dtype=torch.float32, reads="prompt"))
    options_equal_to_atv_eval(ATVMethod(atv), rows, tmp_path, ATVLM(atv, query_field=query_field, batch_size=4))


def test_the_llm_as_its_own_generator(rows, tmp_path):
    atv = trained_on(rows, made_of_itself(dtype=torch.float32))
    options_equal_to_atv_eval(ATVMethod(atv), rows, tmp_path, ATVLM(atv, batch_size=4))
    texts_equal_to_atv_eval(ATVMethod(atv), rows, tmp_path, ATVLM(atv, batch_size=4))


@pytest.mark.parametrize("family", ["chatml, default system message", "qwen 3"])
def test_a_chat(rows, tmp_path, family, monkeypatch):
    """lm-eval writes the chat; the generator reads the query in the template of training, without the chat's marks."""
    task = replace(rows, renderer=Rendering("chat"), answer_prefixes=(None,))
    config = ATVConfig(**PAPER_FORM | {"reads": "prompt"})
    tokenizer = chat_tokenizer(family)
    atv = ATVModel(make_llm(dtype=torch.float32), config, tokenizer=tokenizer, generator=make_generator(config)).eval()
    trained_on(task, atv).training_summary["chat_template"] = chat_template_digest(tokenizer)
    written = "{{input}}\\nwhich?", "<|im_end|>"
    lm = ATVLM(atv, query_field="input", batch_size=5)
    options_equal_to_atv_eval(ATVMethod(atv), task, tmp_path, lm, *written, apply_chat_template=True)
    ask = asking(tmp_path, task, *written)
    with refused("query_field"):
        ATVLM(atv)
    with refused("chat template", "query_field"):
        ask(ATVLM(trained_on(rows, make_atv(reads="prompt"))), "options", apply_chat_template=True)
    messages = []
    monkeypatch.setattr("atv.progress._WARNED", set())
    log.addHandler(handler := Noting(messages))
    ask(ATVLM(atv, query_field="input"), "options")
    log.removeHandler(handler)
    assert any("--apply_chat_template" in message for message in messages)


class Noting(logging.Handler):
    def __init__(self, messages):
        super().__init__()
        self.messages = messages

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("method", ["fixed", "lora", "prefix"])
def test_other_methods(rows, tmp_path, method):
    folder = named_llm(tmp_path)
    llm = load_llm(str(folder), dtype="float32")
    if method == "fixed":
        model = FixedModel(llm, FixedConfig(), tokenizer=byte_level_tokenizer())
        with torch.no_grad():
            model.expansion.common.normal_()
    else:
        model = make_peft({"lora": LoRA, "prefix": PrefixTuning}[method], llm=llm)
    trained_on(rows, model).save_pretrained(tmp_path / "adapter")
    lm = ATVLM(tmp_path / "adapter", batch_size=5, dtype="float32")
    assert lm.method.name == method
    options_equal_to_atv_eval(lm.method, rows, tmp_path, lm)
    if method != "prefix":
        texts_equal_to_atv_eval(lm.method, rows, tmp_path, lm)
    else:
        with refused("method prefix", "atv eval"):
            asking(tmp_path, rows)(lm, "texts")


def named_llm(folder):
    make_llm(dtype=torch.float32).save_pretrained(folder / "llm")
    byte_level_tokenizer().save_pretrained(folder / "llm")
    return folder / "llm"


# ---- equal to vectors added by hand ----

QUIET, LEAKS = "the harbour is quiet", "the kettle leaks and the lid sticks"
REQUESTS = [
    request("quiet", " yes", query=QUIET),
    request("quiet", " yes", query=LEAKS),  # the same texts, another vector
    request("quiet", " no", query=QUIET),
    request("quiet yes", " no yes", query=QUIET),
    request("quiet yes no", " yes", query=QUIET),  # the same tokens, of which more are the context
    request("Is this opinion positive or negative?\nA:", " the first boats came in", query=LEAKS),
    request("", "yes or no", query=QUIET),
    request("Question:\n", "yes or no", query=LEAKS),  # the prompt ends after the line break, which is scored too
    *(request("which one? " * count, "one two three"[:count], query=LEAKS) for count in (1, 5, 9)),
]


@pytest.mark.parametrize("batch_size", [1, 4, "auto"])
@pytest.mark.parametrize("positions", ["last", "answer"])
def test_log_likelihoods_are_those_of_one_text_at_a_time(positions, batch_size):
    atv = make_atv(dtype=torch.float64, positions=positions)
    lm = ATVLM(atv, query_field="query", batch_size=batch_size, max_batch_size=4)
    found = lm.loglikelihood(REQUESTS)
    for each, (score, greedy) in zip(REQUESTS, found, strict=True):
        context, answer = each.args
        stripped = context.rstrip()
        before = atv.tokenizer(stripped)["input_ids"] or [atv.tokenizer.bos_token_id]
        after = atv.tokenizer(context + answer)["input_ids"][len(before) if stripped else 0 :]
        vectors = atv.config.scale * atv.task_vectors([each.doc["query"]])[0]
        prompt = len(before) + context.endswith("\n")
        columns = list(range(prompt - 1, len(before + after) if positions == "answer" else prompt))
        with torch.no_grad(), added(atv.layers, vectors, columns):
            logits = atv.llm(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
        expected = logits.log_softmax(-1)[range(len(after)), after].sum().item()
        assert score == pytest.approx(expected, abs=1e-4), each.args
        assert greedy == (logits.argmax(-1).tolist() == after)
    assert len({round(score, 3) for score, _ in found}) == len(REQUESTS)


def test_texts_are_those_of_one_prompt_at_a_time():
    for positions in ("last", "answer"):
        atv = make_atv(positions=positions)
        contexts = ["quiet\nA:", "the kettle leaks and the lid sticks, yes or no?\nA:", "quiet\nA:", "one two"]
        queries = [QUIET, LEAKS, LEAKS, QUIET]
        asked = [
            Instance("generate_until", {"q": query}, (context, {"until": ["\0"], "max_gen_toks": 5}), 0, ("t", 0, 1))
            for context, query in zip(contexts, queries, strict=True)
        ]
        found = ATVLM(atv, query_field="q", batch_size=3).generate_until(asked)
        for text, context, query in zip(found, contexts, queries, strict=True):
            ids = recomputed(atv, Template("{input}").prompt(atv.tokenizer, Example(context, "")), query)
            until = ids[: ids.index(3)] if 3 in ids else ids
            assert text == atv.tokenizer.decode(until, skip_special_tokens=True)


def test_at_scale_0_it_is_the_stock_model(rows, ask):
    atv = make_atv(dtype=torch.float32)
    stock = HFLM(pretrained=atv.llm, tokenizer=byte_level_tokenizer(), batch_size=5)
    plain, plain_samples = ask(stock, "options", "texts")
    steered, samples = ask(ATVLM(atv, query_field="input", scale=0, batch_size=5), "options", "texts")
    for name, metric in (("options", "acc,none"), ("texts", "exact_match,stripped")):
        assert steered[name][metric] == plain[name][metric]
    assert [s["resps"] for s in samples["texts"]] == [s["resps"] for s in plain_samples["texts"]]
    scores, plain_scores = (
        torch.tensor([[r[0][0] for r in sample["resps"]] for sample in found["options"]])
        for found in (samples, plain_samples)
    )
    torch.testing.assert_close(scores, plain_scores, rtol=1e-5, atol=1e-4)
    other = ask(ATVLM(atv, query_field="input", batch_size=5), "options")[1]["options"]
    assert abs(other[0]["resps"][0][0][0] - scores[0, 0]) > 0.1


def test_long_contexts_are_cut_at_their_beginning():
    atv = make_atv()
    context, answer = "the first boats came in. " * 40 + "A:", " yes or no"
    found = ATVLM(atv, query_field="query", max_length=24).loglikelihood([request(context, answer, query=QUIET)])[0][0]
    whole = atv.tokenizer(context + answer)["input_ids"]
    count = len(whole) - len(atv.tokenizer(context)["input_ids"])
    vectors = atv.config.scale * atv.task_vectors([QUIET])[0]
    with torch.no_grad(), added(atv.layers, vectors, [24 - count]):
        scores = atv.llm(torch.tensor([whole[-25:-1]])).logits[0, -count:].log_softmax(-1)
    assert found == pytest.approx(scores[range(count), whole[-count:]].sum().item(), abs=1e-4)
    with refused("tokens", "1 to 8"):
        ATVLM(atv, query_field="query", max_length=8).loglikelihood([request("one", " two" * 20, query=QUIET)])


# ---- the cache of answers ----


def test_adapters_do_not_share_answers_in_a_cache(rows, ask, tmp_path):
    one, other = (make_atv(dtype=torch.float32, positions=positions) for positions in ("last", "answer"))
    cache = str(tmp_path / "answers")

    few = {"samples": {"options": [0, 1, 2], "texts": [3, 4]}}

    def scores(lm, **options):
        samples = ask(lm, "options", "texts", **few, **options)[1]
        return [sample["resps"] for name in samples for sample in samples[name]]

    kinds = [
        lambda: ATVLM(one, query_field="input"),
        lambda: ATVLM(other, query_field="input"),
        lambda: ATVLM(one, query_field="input", scale=0.1),
        lambda: HFLM(pretrained=one.llm, tokenizer=byte_level_tokenizer()),
    ]
    expected = [scores(make()) for make in kinds]
    assert all(one != other for place, one in enumerate(expected) for other in expected[:place])
    assert [scores(make(), use_cache=cache) for make in kinds] == expected
    lm = ATVLM(one, query_field="input")
    lm.generate_until = lm.loglikelihood = None  # every answer is in the cache
    assert scores(lm, use_cache=cache) == expected[0]


def test_a_cache_needs_queries_that_are_in_the_prompt(rows, ask, tmp_path):
    lm = ATVLM(make_atv(dtype=torch.float32), query_field="output")
    ask(lm, "options")
    with refused("options", "output", "use_cache"):
        ask(lm, "options", use_cache=str(tmp_path / "answers"))


# ---- refusals ----


def test_perplexity_is_refused(rows, ask):
    with refused("perplexity", "query", "--model hf"):
        ask(ATVLM(make_atv(dtype=torch.float32), query_field="input"), "perplexity")


def test_queries_that_are_missing_or_superfluous(rows):
    alone = trained_on(rows, make_atv())
    prompts = trained_on(rows, make_atv(reads="prompt"))
    with refused("the query alone", "query_field"):
        ATVLM(alone)
    with refused("'question'", "'query'", "hand-made"):
        ATVLM(alone, query_field="question").loglikelihood(REQUESTS)
    with refused("'query'", "7.5"):
        ATVLM(alone, query_field="query").loglikelihood([request("quiet", " yes", query=7.5)])
    with refused("query"):
        ATVLM(alone, query_field="query").loglikelihood([request("quiet", " yes", query=" ")])
    with refused("A query is ''"):
        ATVLM(prompts).loglikelihood([request("", "yes or no")])
    with refused("'input'", "leave it out"):
        ATVLM(made_of_itself(), query_field="input")
    prompts.training_summary["tasks"]["toy"] = toy_task().asking()
    with refused("several tasks", "labels, toy"):
        ATVLM(prompts, query_field="input")
    assert ATVLM(prompts, query_field="input", training_task="toy").task == "toy"
    prompts.training_summary["tasks"]["toy"]["renderer"] |= {"format": "chat"}
    prompts.training_summary["chat_template"] = None
    with refused("query_field"):
        ATVLM(prompts)


def test_options_that_are_wrong(rows, tmp_path, monkeypatch):
    atv = trained_on(rows, make_atv())
    with refused("'peft'", "query_field"):
        ATVLM(atv, query_field="input", peft="x")
    with refused("scale", "'much'"):
        ATVLM(atv, query_field="input", scale="much")
    with refused("pretrained"):
        ATVLM(atv, "llm", query_field="input")
    with refused("dtype float32", "loaded already"):
        ATVLM(atv, query_field="input", dtype="float32")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("one process", "2"):
        ATVLM(atv, query_field="input")
    monkeypatch.delenv("WORLD_SIZE")
    with refused("No adapter"):
        ATVLM(tmp_path / "nothing")
    folder = named_llm(tmp_path)
    make_peft(LoRA, llm=load_llm(str(folder), dtype="float32")).save_pretrained(tmp_path / "lora")
    with refused("lora", "scale"):
        ATVLM(tmp_path / "lora", scale=2)
    file = tmp_path / "lora" / "atv_config.json"
    for name, part in (("probe", "atv eval"), ("icl+atv", "atv eval"), ("other", "not known")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"method": name}))
        with refused(name, part):
            ATVLM(tmp_path / "lora")


# ---- the command ----


@pytest.fixture
def command(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["atv", "lm-eval", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_lm_evals_table(rows, tmp_path, command):
    folder = named_llm(tmp_path)
    write_tasks(tmp_path, rows)
    atv = trained_on(rows, make_atv(dtype=torch.float32, reads="prompt"))
    atv.llm.name_or_path = str(folder)
    atv.save_pretrained(tmp_path / "adapter")
    about = ["--adapter", tmp_path / "adapter", "--dtype", "float32"]
    asked = ["--tasks", tmp_path / "options.yaml", "--batch_size", "5", "--output_path", tmp_path / "out"]
    code, out, err = command(*about, *asked)
    assert code == 0, err
    accuracy = asking(tmp_path, rows)(ATVLM(atv), "options")[0]["options"]["acc,none"]
    (line,) = [line for line in out.splitlines() if line.startswith("|options")]
    assert f"{accuracy:.4g}" in line
    (file,) = (tmp_path / "out").rglob("results*.json")
    written = json.loads(file.read_text())
    assert written["results"]["options"]["acc,none"] == accuracy
    assert written["config"]["atv_method"] == "atv"
    assert written["config"]["atv_scale"] == atv.config.scale
    for words, part in (
        (["--model", "hf", "--tasks", "x"], "--model"),
        (["--tasks", "nothing_of_this_name"], "nothing_of_this_name"),
        (["--tasks", tmp_path / "perplexity.yaml"], "perplexity"),
        (["--tasks", tmp_path / "options.yaml", "--model_args", "max_len=3"], "max_len"),
    ):
        code, out, err = command(*about, *words)
        assert code == 2
        assert part in err.splitlines()[-1]
        assert err.splitlines()[-1].startswith("atv: ")


def test_without_the_package(command, monkeypatch):
    monkeypatch.setattr("atv.cli.lm_eval.find_spec", lambda name: None)
    code, _, err = command("--adapter", "x", "--tasks", "y")
    assert code == 2
    assert "pip install 'adaptive-task-vectors[lm-eval]'" in err
