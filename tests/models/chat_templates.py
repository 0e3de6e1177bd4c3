"""Chat templates with the traits of released ones, written anew, and tiny families that have them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass

from longrl.models.text import TextFamily
from longrl.testing.tiny import CHAT_TEMPLATE, QWEN3_5_TEMPLATE, tiny_text, tiny_tokenizer

QWEN_BODY = """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}{%- set thinking = '' -%}
{%- if '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last and (ALWAYS or thinking) -%}
{{ '<|im_start|>assistant\n<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else -%}{{ '<|im_start|>assistant\n' + content }}{%- endif -%}{{ '<|im_end|>\n' }}
{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif -%}
{%- endfor -%}
"""
QWEN3 = (
    QWEN_BODY.replace("ALWAYS", "false")
    + """{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
{%- endif -%}"""
)
QWEN3_THINKING = (
    QWEN_BODY.replace("ALWAYS", "true")
    + "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif -%}"
)
LLAMA3 = """{{- '<|begin|>' -}}
{%- for message in messages -%}
{{ '<|header|>' + message.role + '<|/header|>\n\n' + message.content | trim + '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header|>assistant<|/header|>\n\n' }}{%- endif -%}"""
GEMMA = """{{- '<bos>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}
{%- if message.content is string -%}{{ message.content | trim }}{%- else -%}
{%- for part in message.content -%}{{ part.text | trim }}{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
R1 = """{{- '<bos>' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{ '<|Assistant|>' + message.content.split('</think>')[-1] + '<|eos|>' }}
{%- elif message.role == 'system' -%}{{ message.content }}
{%- else -%}{{ '<|User|>' + message.content }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|Assistant|><think>\n' }}{%- endif -%}"""
LISTS_ONLY = """
{%- for message in messages -%}{{ '[' + message.role + ']' }}
{%- for part in message.content -%}{{ part['text'] }}{%- endfor -%}{{ '<|eot|>' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '[assistant]' }}{%- endif -%}"""


@dataclass(frozen=True)
class Template:
    """A template and the tokens of its tokenizer."""

    text: str
    tokens: tuple[str, ...] = ()
    """Special ones beside the tiny tokenizer's."""
    eos: str = "<|im_end|>"
    """Of the tokenizer."""
    end: str = "<|im_end|>"
    """That the template writes."""
    opening: str = ""
    keeps_space: bool = True
    """False if it strips contents."""
    has_system: bool = True


TEMPLATES = {
    "chatml": Template(CHAT_TEMPLATE),
    "base model's tokenizer": Template(CHAT_TEMPLATE, eos="<|endoftext|>"),
    "qwen3": Template(QWEN3),
    "qwen3 thinking": Template(QWEN3_THINKING, opening="<think>\n"),
    "qwen3.5": Template(QWEN3_5_TEMPLATE, opening="<think>\n", keeps_space=False),
    "llama3": Template(
        LLAMA3, ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"), "<|eot|>", "<|eot|>", keeps_space=False
    ),
    "gemma": Template(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", keeps_space=False,
        has_system=False,
    ),
    "r1": Template(R1, ("<bos>", "<|eos|>", "<|User|>", "<|Assistant|>"), "<|eos|>", "<|eos|>", "<think>\n"),
}  # fmt: skip


@functools.cache
def family_of(name: str, **options: object) -> TextFamily:
    """A tiny Qwen2 with this template."""
    template = TEMPLATES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(template.tokens), special_tokens=True)
    tokenizer.eos_token = template.eos
    tokenizer.chat_template = template.text
    folder = tiny_text(tempfile.mkdtemp(prefix="longrl-chat-"), "qwen2", tokenizer)
    return TextFamily(str(folder), random_init=True, **options)
