"""An extension of Griffe, which reads docstrings for mkdocstrings: code under `Example:` is shown as code.

Griffe takes `Example:` for a note and would set its lines as one paragraph.
"""

import ast
import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^(Examples?:\n)((?:    .*\n?|\n)+)", re.MULTILINE)


class DocstringExamples(griffe.Extension):
    """Puts fences around examples that are Python or shell commands; others, and those with fences, stay."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        """Changes the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(fenced, obj.docstring.value)


def fenced(match: re.Match) -> str:
    """The section with its code in fences."""
    text = textwrap.dedent(match.group(2)).strip("\n")
    language = "bash" if text.startswith("python -m ") else "python"
    if language == "python" and not is_python(text):
        return match.group()
    return match.group(1) + textwrap.indent(f"```{language}\n{text}\n```\n", "    ")


def is_python(text: str) -> bool:
    """Whether it is code; prose and Markdown do not parse."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
