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

TEXT_OF = """
{%- macro text_of(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}
"""
QWEN_TOOLS = (
    TEXT_OF
    + """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set system = text_of(messages[0].content) if messages[0].role == 'system' else SYSTEM -%}
{%- if system or tools -%}{{ '<|im_start|>system\n' + system }}
{%- if tools -%}{{ '\n\n# Tools\n<tools>' }}{%- for tool in tools -%}{{ '\n' + tool | tojson }}{%- endfor -%}
{{ '\n</tools>\nCall by <tool_call>.' }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}
{{ '\n<tool_response>\n' + text_of(message.content) + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- set content = text_of(message.content) -%}{%- set thinking = '' -%}
{%- if '</think>' in content -%}
{%- set thinking = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (ALWAYS or thinking) -%}{{ '<think>\n' + thinking + '\n</think>\n\n' }}{%- endif -%}
{{ content }}
{%- for call in message.tool_calls or [] -%}{{ '\n' if content or not loop.first }}
{{- CALL }}{%- endfor -%}{{ '<|im_end|>\n' }}
{%- elif message.role == 'user' -%}{{ '<|im_start|>user\n' + text_of(message.content) + '<|im_end|>\n' }}
{%- elif message.role != 'system' -%}{{ raise_exception('Unexpected message role.') }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' + OPENING }}{%- endif -%}"""
)
JSON_CALL = """'<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson
+ '}\n</tool_call>'"""
XML_CALL = """'<tool_call>\n<function=' + call.function.name + '>\n</function>\n</tool_call>'"""


def _tools(system: str, always: str, call: str, opening: str) -> str:
    words = {"SYSTEM": repr(system), "ALWAYS": always, "CALL": call, "OPENING": repr(opening)}
    text = QWEN_TOOLS
    for name, value in words.items():
        text = text.replace(name, value)
    return text


LLAMA3_TOOLS = """{{- '<|begin|>' -}}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}{{ '<|header|>ipython<|/header|>\n\n' + message.content | tojson + '<|eot|>' }}
{%- else -%}{{ '<|header|>' + message.role + '<|/header|>\n\n' }}
{%- if loop.first and tools -%}{{ tools | tojson + '\n\n' }}{%- endif -%}
{{ message.content | trim + '<|eot|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|header|>assistant<|/header|>\n\n' }}{%- endif -%}"""


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

LLAMA_TOKENS = ("<|begin|>", "<|header|>", "<|/header|>", "<|eot|>")
KNOW_TOOLS = {
    "qwen2.5 tools": Template(_tools("You are Qwen.", "false", JSON_CALL, "")),
    "qwen3 tools": Template(_tools("", "false", JSON_CALL, "")),
    "qwen3 thinking tools": Template(_tools("", "true", JSON_CALL, "<think>\n"), opening="<think>\n"),
    "qwen3.5 tools": Template(_tools("", "true", XML_CALL, "<think>\n"), opening="<think>\n"),
    "llama3 tools": Template(LLAMA3_TOOLS, LLAMA_TOKENS, "<|eot|>", "<|eot|>", keeps_space=False),
}
"""Those that know tools."""


@functools.cache
def family_of(name: str, **options: object) -> TextFamily:
    """A tiny Qwen2 with this template."""
    template = (TEMPLATES | KNOW_TOOLS)[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(template.tokens), special_tokens=True)
    tokenizer.eos_token = template.eos
    tokenizer.chat_template = template.text
    folder = tiny_text(tempfile.mkdtemp(prefix="longrl-chat-"), "qwen2", tokenizer)
    return TextFamily(str(folder), random_init=True, **options)
