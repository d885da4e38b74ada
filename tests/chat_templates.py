# ruff: noqa: E501
"""Chat templates in the form of public model families, written for these tests, and tokenizers that have them."""

from functools import cache
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A chat template, its control tokens and the one that ends an answer."""

    template: str
    tokens: tuple[str, ...]
    end: str
    spaces: bool = False
    """Whether the tokenizer writes spaces as SentencePiece does, rather than bytes."""
    system: bool = True
    """Whether conversations may begin with a system message."""
    opening: str = ""
    """What is written between the generation prompt and any answer."""


CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

FAMILIES = {
    "chatml": Family(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "chatml, default system message": Family(
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML,
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    "qwen 3": Family(
        """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}""",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_end|>",
        opening="<think>\n\n</think>\n\n",
    ),
    "harmony": Family(
        """{% for m in messages %}<|start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>
{{- m['content'] }}{{ '<|return|>' if loop.last and m['role'] == 'assistant' else '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
        opening="<|channel|>final<|message|>",
    ),
    "llama 3": Family(
        """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|eot_id|>",
    ),
    "llama 2": Family(
        """{% if messages[0]['role'] == 'system' %}{% set says = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
{%- set messages = messages[1:] %}{% else %}{% set says = '' %}{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}
{{- bos_token + '[INST] ' + (says if loop.first else '') + m['content'] | trim + ' [/INST]' }}{% else %}
{{- ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}""",
        ("<s>", "</s>"),
        "</s>",
        spaces=True,
    ),
    "mistral": Family(
        """{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user and assistant') }}{% endif %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]
{%- else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}""",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "</s>",
        spaces=True,
        system=False,
    ),
    "gemma": Family(
        """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}
{%- endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        spaces=True,
        system=False,
    ),
    "phi 3": Family(
        """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}""",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
        spaces=True,
    ),
    "zephyr": Family(
        """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] + eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}""",
        ("<s>", "</s>"),
        "</s>",
        spaces=True,
    ),
    "vicuna": Family(
        """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + ' ' }}{% elif m['role'] == 'user' %}
{{- 'USER: ' + m['content'] + ' ' }}{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}""",
        ("<s>", "</s>"),
        "</s>",
        spaces=True,
    ),
    "command r": Family(
        """{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>
{%- if m['role'] == 'system' %}<|SYSTEM_TOKEN|>{% elif m['role'] == 'user' %}<|USER_TOKEN|>{% else %}<|CHATBOT_TOKEN|>{% endif %}
{{- m['content'] | trim }}<|END_OF_TURN_TOKEN|>{% endfor %}
{%- if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}""",
        (
            *("<BOS_TOKEN>", "<EOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
            *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Family(
        """{% for m in messages %}<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>
{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}""",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>",
    ),
    "deepseek": Family(
        """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}{% elif m['role'] == 'user' %}
{{- '<|User|>' + m['content'] }}{% else %}{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}""",
        ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"),
        "<|end|>",
    ),
    "gpt-2's splits": Family(
        """{% for m in messages %}<|{{ m['role'] }}|>

{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>

{% endif %}""",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
    ),
    "no end of the last turn": Family(
        """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ 'Bot: ' + m['content'] }}{% if not loop.last %}{{ eos_token }}
{%- endif %}{% else %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Bot:' }}{% endif %}""",
        ("<s>", "</s>"),
        "</s>",
    ),
}
"""By name. Their control tokens are added to the tokenizers as such."""
GPT2_SPLITS = "gpt-2's splits"
"""The last line break of a prompt is one token, and another one once an answer follows."""
NO_END = "no end of the last turn"
"""The end of an answer is left to the tokenizer's end-of-text token."""

BEGINS = ("<|begin_of_text|>", "<s>", "<bos>", "<BOS_TOKEN>", "<|begin|>")
ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<EOS_TOKEN>", "<|endoftext|>")
TEXT = [
    "system user assistant model You help. Is it good? Yes, it is. no\n\n USER: ASSISTANT: Bot: [INST] positive bill"
]


@cache
def chat_tokenizer(name: str) -> Any:
    """A small tokenizer with the chat template of a family."""
    family = FAMILIES[name]
    if family.spaces:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "merged_with_next")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|\s?\w+|\s?[^\s\w]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            if name != GPT2_SPLITS
            else [pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", *family.tokens]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    begin = next((token for token in family.tokens if token in BEGINS), None)
    end = next((token for token in family.tokens if token in ENDS), family.end)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=family.template,
        bos_token=begin,
        eos_token=end,
        unk_token="<unk>",
        extra_special_tokens=[token for token in family.tokens if token not in (begin, end)],
    )
