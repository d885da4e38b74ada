"""Chats are rendered as the tokenizer's own `apply_chat_template` renders them, in training and in use."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import FAMILIES, GPT2_SPLITS, NO_END, chat_tokenizer
from conftest import byte_level_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from atv.data import Chat, Example, Rendering, Template, Turn, load_tasks
from atv.data.rendering import chat_template_digest, described, recorded
from atv.errors import ATVError

HISTORY = (Turn("user", "Is it good?"), Turn("assistant", "Yes, it is."))
EXAMPLE = Example("Is the bill right?", "no, it is 3 too high")


def messages_of(example: Example, answer: bool = False) -> list[dict[str, str]]:
    """The example's messages, written out by hand."""
    said = [{"role": role, "content": content} for role, content in example.turns]
    said.append({"role": "user", "content": example.input})
    return [*said, {"role": "assistant", "content": example.output}] if answer else said


SYSTEM = (Turn("system", "You help."), *HISTORY)
CONVERSATIONS = [
    (name, turns) for name, family in FAMILIES.items() for turns in ((), HISTORY, *([SYSTEM] if family.system else []))
]


@pytest.mark.parametrize(("name", "turns"), CONVERSATIONS)
def test_prompt_and_answer_are_those_of_the_chat_template(name: str, turns: tuple[Turn, ...]) -> None:
    tokenizer, example = chat_tokenizer(name), EXAMPLE._replace(turns=turns)
    prompt = Chat().prompt(tokenizer, example)
    expected = tokenizer.apply_chat_template(messages_of(example), add_generation_prompt=True)["input_ids"]
    opening = tokenizer(FAMILIES[name].opening, add_special_tokens=False)["input_ids"]
    assert prompt.ids == [*expected, *opening]
    assert Chat().asks(tokenizer, example).ids == list(expected)
    assert prompt.query == example.input
    answer = Chat().answer(tokenizer, prompt, example.output)
    whole = list(tokenizer.apply_chat_template(messages_of(example, answer=True))["input_ids"])
    end = tokenizer.convert_tokens_to_ids(FAMILIES[name].end)
    assert answer[-1] == end
    assert answer.count(end) == 1
    if name == NO_END:
        assert prompt.ids + answer[:-1] == whole
    elif name == GPT2_SPLITS:  # the LLM never reads the whole conversation's token at the beginning of the answer
        assert whole[: len(prompt.ids)] != prompt.ids
        assert tokenizer.decode(prompt.ids + answer) == tokenizer.decode(whole)
    else:
        assert whole[: len(prompt.ids) + len(answer)] == prompt.ids + answer
        assert example.output.split()[-1] not in tokenizer.decode(whole[len(prompt.ids) + len(answer) :])
    assert example.output in tokenizer.decode(answer)


@given(
    name=st.sampled_from(sorted(FAMILIES.keys() - {GPT2_SPLITS})),
    query=st.text(min_size=1),
    answer=st.text("ab1 .,é日\n", min_size=1),
)
def test_any_text(name: str, query: str, answer: str) -> None:
    """The answer's tokens do not depend on the prompt, so that options are encoded once."""
    if not query.strip() or not answer.strip():
        return
    tokenizer, example = chat_tokenizer(name), Example(query, answer.strip())
    prompt = Chat().prompt(tokenizer, example)
    whole = list(tokenizer.apply_chat_template(messages_of(example, answer=True))["input_ids"])
    ids = Chat().answer(tokenizer, prompt, example.output)
    closed = ids[:-1] if name == NO_END else ids
    assert whole[: len(prompt.ids) + len(closed)] == prompt.ids + closed


@pytest.mark.parametrize("text", ["The refund is on its way.", ".", "way", "no.\n\nWhy?", "(a) ..."])
def test_an_answer_whose_end_merges_with_the_line_breaks_after_it_is_whole(text: str) -> None:
    """As with the pre-tokenizers of Qwen 2 and Llama 3, and a chat template without control tokens."""
    made = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    said = ["assistant: It is on its way.\n\nuser: (a) ...\n\nuser: no\n\n"] * 3
    made.train_from_iterator(said, trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    template = """{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, eos_token="</s>")
    assert len(tokenizer(".\n\n")["input_ids"]) == 1
    prompt = Chat().prompt(tokenizer, EXAMPLE)
    answer = Chat().answer(tokenizer, prompt, text)
    assert answer == [*tokenizer(f" {text}")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(answer[:-1]) == f" {text}"


def test_the_system_prompt_and_the_options_of_the_chat_template() -> None:
    tokenizer = chat_tokenizer("qwen 3")
    chat = Chat("Rate: {input}", "You help.", json.dumps({"enable_thinking": False}), "Rate: {input}")
    prompt = chat.prompt(tokenizer, EXAMPLE)
    said = [
        {"role": "system", "content": "You help."},
        {"role": "user", "content": f"Rate: {EXAMPLE.input}"},
    ]
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True, enable_thinking=False)["input_ids"]
    assert prompt.ids == list(expected)
    assert prompt.query == f"Rate: {EXAMPLE.input}"
    # Without the option the chat template writes the empty thoughts before every answer: they belong to the prompt.
    default = replace(chat, template_kwargs="{}")
    assert default.prompt(tokenizer, EXAMPLE).ids == prompt.ids
    assert len(default.asks(tokenizer, EXAMPLE).ids) < len(prompt.ids)
    for each in (default, chat):
        assert tokenizer.decode(each.answer(tokenizer, prompt, "no")) == "no<|im_end|>"


def test_thoughts_in_an_answer_are_refused_where_empty_ones_belong_to_the_prompt() -> None:
    """Chat templates of LLMs that can think write the thoughts of an answer in the place of the empty ones."""
    tokenizer = copy.deepcopy(chat_tokenizer("qwen 3"))
    kept = "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{% if m['role'] == 'assistant' and loop.last %}", kept)
    prompt = Chat().prompt(tokenizer, EXAMPLE)
    assert tokenizer.decode(Chat().answer(tokenizer, prompt, "no")) == "no<|im_end|>"
    with pytest.raises(ATVError, match="thoughts"):
        Chat().answer(tokenizer, prompt, "<think>\nIt is 3 too high.\n</think>\n\nno")


def test_a_conversations_own_system_message_comes_first() -> None:
    chat = Chat(system="You help.")
    own = EXAMPLE._replace(turns=(Turn("system", "Be brief."), *HISTORY))
    assert [message["content"] for message in chat.messages(own)[:2]] == ["Be brief.", HISTORY[0].content]
    assert chat.messages(EXAMPLE)[0] == {"role": "system", "content": "You help."}


def test_demonstrations_are_earlier_turns() -> None:
    tokenizer = chat_tokenizer("chatml")
    shot = Example("Is it good?", "Yes, it is.")
    prompt = Chat(system="You help.").prompt(tokenizer, EXAMPLE, [shot])
    same = Chat().prompt(tokenizer, EXAMPLE._replace(turns=(Turn("system", "You help."), *HISTORY)))
    assert prompt.ids == same.ids
    assert prompt.demonstrations == 1


def test_what_the_generator_reads() -> None:
    example = EXAMPLE._replace(turns=HISTORY)
    read = {
        reads: next(iter(task_of(example).renderers("first", reads).values())).prompt(chat_tokenizer("chatml"), example)
        for reads in ("query", "prompt", "conversation")
    }
    assert read["query"].query == example.input
    assert read["prompt"].query == f"Rate: {example.input}"
    said = "user: Is it good?\nassistant: Yes, it is.\nuser: Rate: Is the bill right?"
    assert read["conversation"].query == said


def task_of(example: Example) -> Any:
    """A task of a chat with an instruction, whose test row is an example."""
    task = load_tasks(["topic"], format="chat", templates=["Rate: {input}"])[0]
    return replace(task, test=(example, *task.test[1:]), options=())


@pytest.mark.parametrize(
    ("family", "chat", "example", "said"),
    [
        ("gemma", Chat(system="You help."), EXAMPLE, "System role not supported"),
        ("mistral", Chat(), EXAMPLE._replace(turns=(Turn("user", "hi"),)), "must alternate"),
        ("chatml", Chat(), Example(" ", "a"), "query is empty"),
    ],
)
def test_refusals(family: str, chat: Chat, example: Example, said: str) -> None:
    with pytest.raises(ATVError, match=said):
        chat.prompt(chat_tokenizer(family), example)


def test_without_a_chat_template() -> None:
    tokenizer = byte_level_tokenizer()
    plain = Rendering()("{input}", None, "{input}")
    assert plain.prompt(tokenizer, EXAMPLE).ids == Template("{input}").prompt(tokenizer, EXAMPLE).ids
    with pytest.raises(ATVError, match="no chat template"):
        Rendering("chat")("{input}", None, "{input}").prompt(tokenizer, EXAMPLE)
    with pytest.raises(ATVError, match="system prompt"):
        Rendering(system="You help.")("{input}", None, "{input}").prompt(tokenizer, EXAMPLE)
    with pytest.raises(ATVError, match="other turns"):
        plain.prompt(tokenizer, EXAMPLE._replace(turns=HISTORY))


def test_auto_is_a_chat_where_there_is_a_chat_template() -> None:
    tokenizer = chat_tokenizer("llama 3")
    assert Rendering()("{input}", None, "{input}").prompt(tokenizer, EXAMPLE) == Chat().prompt(tokenizer, EXAMPLE)


def test_renderings_are_recorded() -> None:
    for rendering in (Rendering(), Rendering("chat", "You help.", '{"a": 1}'), Rendering("template", ends=False)):
        assert recorded(json.loads(json.dumps(described(rendering)))) == rendering
    with pytest.raises(ATVError, match="custom renderer"):
        recorded(described(Template))
    assert chat_template_digest(chat_tokenizer("chatml")) != chat_template_digest(chat_tokenizer("gemma"))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "chatml"},
        {"format": "template", "system": "You help."},
        {"template_kwargs": "[1]"},
        {"template_kwargs": "{"},
        {"system": " "},
    ],
)
def test_renderings_are_validated(options: dict[str, Any]) -> None:
    with pytest.raises(ATVError):
        Rendering(**options)


def test_a_chat_has_no_answer_prefix() -> None:
    with pytest.raises(ATVError, match="answer prefix"):
        Rendering("chat")("{input}", "A:", "{input}")
