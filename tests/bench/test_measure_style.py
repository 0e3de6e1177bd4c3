"""Counting lines, tokens, functions and edges of sources written by hand."""

import importlib
import json
import textwrap
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SOURCE = '''\
"""Module.

Of three lines."""

import os  # why


# alone
@cached
def outer(a: int) -> str:
    """One line."""
    text = f"{a} and {a + 1}"

    def inner():
        return (
            "one"
            "two"
        )

    return text + inner()


LIMIT = 3
"""Documented."""


class Empty:
    """Only words."""

    async def wait(self): ...
'''


@pytest.fixture
def style(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("measure_style")


def test_docstrings_comments_and_blank_lines_are_no_code(style):
    """import; @, def, text =, def, return (, "one", "two", ), return; LIMIT; class, async def."""
    found = style.count(SOURCE)
    assert (found.files, found.code_lines, found.comment_lines) == (1, 13, 2)


def test_tokens_are_names_numbers_and_operators_but_no_strings(style):
    assert style.count("x = 1\n").tokens == 3
    assert style.count('x = "a b c"\n').tokens == 2
    assert style.count('x = f"{a + 1} b", 2\n').tokens == 4  # x = , 2 on every version of Python
    assert style.count('"""Words."""\n# words\n').tokens == 0


def test_functions_are_measured_from_the_decorator_to_the_last_line(style):
    assert sorted(style.count(SOURCE).lengths) == [1, 5, 12]


def test_a_file_without_code_counts_as_none(style):
    assert style.count("").files == style.count('"""Words."""\n').files == 0


def test_a_row_has_median_p90_and_longest(style):
    row = style.Counts(1, 10, 25, 1, [*range(1, 12)]).row("x")
    assert (row["tokens_per_line"], row["comments_percent"]) == (2.5, 10)
    assert (row["functions"], row["median"], row["p90"], row["max"]) == (11, 6, 10, 11)


@pytest.fixture
def package(tmp_path):
    """a <-> b, of which b needs a only within a function; a -> c for types; top -> c."""
    sources = {
        "pkg/__init__.py": "",
        "pkg/a/one.py": """
            from typing import TYPE_CHECKING
            import pkg.b.two
            if TYPE_CHECKING:
                from pkg.c import three
            """,
        "pkg/b/two.py": """
            def f():
                from pkg.a.one import g
                from pkg.b import other
            """,
        "pkg/c/three.py": "import os",
        "pkg/top.py": "from pkg import c",
    }
    for name, source in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
    return tmp_path / "pkg"


def test_edges_at_import_leave_functions_and_types_out(style, package):
    every, at_import = style.edges(package)
    assert every == {("a", "b"), ("b", "a"), ("a", "c"), ("top", "c")}
    assert at_import == {("a", "b"), ("top", "c")}
    assert style.mutual(every) == [("a", "b")]
    assert style.mutual(at_import) == []


def test_the_json_has_folders_their_parts_and_files(style, package, tmp_path):
    path = tmp_path / "out.json"
    style.main([str(package), str(package / "top.py"), "--json", str(path)])
    found = json.loads(path.read_text())
    assert [(row["name"], row["code_lines"]) for row in found["rows"]] == [
        ("pkg/", 9), ("  (files)", 1), ("  a/", 4), ("  b/", 3), ("  c/", 1), ("top.py", 1),
    ]  # fmt: skip
    assert found["packages"] == [
        {"package": "pkg", "package_edges": 4, "mutual": ["a <-> b"], "mutual_at_import": []},
    ]
    assert str(tmp_path) not in path.read_text()
