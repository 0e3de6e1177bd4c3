"""The guides in docs/: their snippets run and print what the page shows, and figures of numbers are those of today."""

import contextlib
import io
import re
import runpy
import shlex

import pytest

from longrl.commands.main import main
from tests.runs import ROOT

BLOCK = re.compile(r"^```(\S+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page):
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())


@pytest.mark.parametrize("page", ["data_to_prompt", "mr_sp", "shared_prefix"])
def test_snippets_print_what_the_page_shows(page):
    blocks = [(kind, text) for kind, text in blocks_of(page) if kind in ("python", "text")]
    assert [kind for kind, _ in blocks] == ["python", "text"] * (len(blocks) // 2), "a snippet is followed by its output"
    names = {"__name__": "guide"}
    for (_, code), (_, shown) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), names)  # noqa: S102
        assert printed.getvalue() == shown


def test_plans_print_what_the_page_shows(tmp_path, monkeypatch, capsys):
    """Line by line: the page leaves some out."""
    monkeypatch.chdir(ROOT)
    (_, plan), (_, of_plan), (_, lengths), (_, asynchronous), (_, of_asynchronous) = blocks_of("planning")
    (tmp_path / "lengths.txt").write_text(lengths)
    asynchronous = asynchronous.replace("lengths.txt", str(tmp_path / "lengths.txt"))
    for command, shown in ((plan, of_plan), (asynchronous, of_asynchronous)):
        main(shlex.split(command.removeprefix("python -m longrl ")))
        printed = capsys.readouterr().out
        assert [line for line in shown.splitlines() if line not in printed] == []


def test_the_figure_of_memory_is_what_is_planned(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    figure = runpy.run_path(str(ROOT / "docs/figures/rollout_memory.py"))
    message = "python docs/figures/rollout_memory.py draws it again"
    assert figure["TARGET"].read_text() == figure["draw"](figure["planned"]()), message
