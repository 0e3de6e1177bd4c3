"""The guides in docs/: their snippets run and print what the page shows, and figures of numbers are those of today."""

import contextlib
import inspect
import io
import re
import runpy
import shlex

import pytest
import yaml

from longrl.commands.main import main
from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.strategies.mr_sp import MRSPStrategy
from tests.runs import ROOT

BLOCK = re.compile(r"^```(\S+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page):
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text())


@pytest.mark.parametrize("page", ["data_to_prompt", "mr_sp", "shared_prefix"])
def test_snippets_print_what_the_page_shows(page):
    blocks = [(kind, text) for kind, text in blocks_of(page) if kind in ("python", "text")]
    kinds = [kind for kind, _ in blocks]
    assert kinds == ["python", "text"] * (len(blocks) // 2), "a snippet is followed by its output"
    names = {"__name__": "guide"}
    for (_, code), (_, shown) in zip(blocks[::2], blocks[1::2], strict=True):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, page, "exec"), names)
        assert printed.getvalue() == shown


def test_plans_print_what_the_page_shows(tmp_path, monkeypatch, capsys):
    """Line by line: the page leaves some out."""
    monkeypatch.chdir(ROOT)
    (_, plan), (_, of_plan), (_, lengths), (_, asynchronous), (_, of_asynchronous) = blocks_of("planning")
    (tmp_path / "lengths.txt").write_text(lengths)
    asynchronous = asynchronous.replace("lengths.txt", str(tmp_path / "lengths.txt"))
    for command, shown in ((plan, of_plan), (asynchronous, of_asynchronous)):
        main(shlex.split(command.replace("\\\n", "").removeprefix("python -m longrl ")))
        printed = capsys.readouterr().out
        assert [line for line in shown.splitlines() if line not in printed] == []


def test_the_figure_of_memory_is_what_is_planned(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    figure = runpy.run_path(str(ROOT / "docs/figures/rollout_memory.py"))
    message = "python docs/figures/rollout_memory.py draws it again"
    assert figure["TARGET"].read_text() == figure["draw"](figure["planned"]()), message


GUIDES = ("data_to_prompt", "many_nodes", "mr_sp", "planning", "rollouts", "shared_prefix", "troubleshooting")
OPTION = re.compile(r"(?<![\w./])((?:model|data|rollout|trainer|checkpoint|watchdog)\.[a-z][\w.]*\w)")
CHOSEN = (HFEngine, VLLMEngine, VLLMServerEngine, MRSPStrategy)
"""Classes of engines and strategies whose options the pages name."""


def names_of(values, prefix=""):
    """All keys of a config, as they are set on the command line, without init_args."""
    for name, value in values.items():
        if name == "init_args":
            yield from names_of(value, prefix)
        else:
            yield prefix + name
            if isinstance(value, dict):
                yield from names_of(value, f"{prefix}{name}.")


def test_options_that_guides_name_exist(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/qwen2_5_vl_7b_longvideo_grpo.yaml", "--print_config"])
    known = set(names_of(yaml.safe_load(capsys.readouterr().out)))
    for chosen in CHOSEN:
        owner = "trainer.strategy." if chosen is MRSPStrategy else "rollout.engine."
        known |= {owner + name for name in inspect.signature(chosen).parameters}
    unset = {"trainer.strategy.sharding.", "model.family.lora.", "data.curriculum.", "rollout.environment."}
    for page in GUIDES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        named = {name.replace(".init_args", "") for name in OPTION.findall(text)}
        unknown = {name for name in named - known if not name.startswith(tuple(unset))}
        assert unknown == set(), page
