"""The examples of docs/extend: each runs, in this process and small, and its files do in a run what they say."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import (
    custom_algorithm,
    custom_dataset,
    custom_engine,
    custom_environment,
    custom_reward,
    distil,
    grpo_loop,
)
from examples.new_family import tiny_models
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from tests import runs
from tests.distributed import run_as_torchrun

ROOT = Path(__file__).parents[2]
NUM_VIDEOS = 8


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With `videos` as the examples write them, but fewer."""
    folder = tmp_path_factory.mktemp("examples")
    generate_videos(folder / "videos", SyntheticConfig(NUM_VIDEOS, num_eval_videos=0, fps=2))
    return folder


@pytest.fixture
def videos(folder):
    return {"videos": folder / "videos", "num_videos": NUM_VIDEOS}


def test_the_loop_runs_and_fits_on_a_page(videos):
    history = grpo_loop.main(**videos, num_steps=3, prompts_per_step=4)
    assert all(0.05 < reward < 0.4 for reward in history)  # an untrained model shares some words
    assert len(Path(grpo_loop.__file__).read_text().splitlines()) < 100


def test_the_student_comes_closer_to_its_teacher(videos):
    history = distil.main(**videos, num_steps=4, prompts_per_step=4)
    assert history[-1] < history[0]


def test_rewards_of_ones_own_are_weighed():
    group = custom_reward.main()
    assert group.rewards.tolist() == pytest.approx([0.9, 0.45, 0.2])


def test_an_objective_of_ones_own_gives_what_it_says():
    advantages, loss = custom_algorithm.main()
    assert advantages.tolist() == pytest.approx([-0.1, -0.1, -0.1, 0.1, 0.9, 0.9, 0.9])
    per_token = -torch.tensor(0.1).exp() * advantages + 0.25 * 0.01
    weights = torch.tensor([1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 12, 1 / 12, 1 / 12])
    assert loss.item() == pytest.approx((weights * per_token).sum().item())
    with pytest.raises(ValueError, match="median_centered"):
        custom_algorithm.longrl.Algorithm(custom_algorithm.median_centered).validate(
            custom_algorithm.longrl.SamplingParams(num_generations=1), mini_batches=1
        )


def test_records_of_ones_own_form_are_read(folder):
    rows = custom_dataset.main(folder=folder, num_videos=NUM_VIDEOS)
    assert len(rows) == 4 * NUM_VIDEOS
    assert all(Path(row.videos[0]).is_file() for row in rows)
    assert {row.answer for row in rows} == set("ABCD")


def test_an_engine_of_ones_own_samples_what_the_trainer_would(videos):
    groups = custom_engine.main(**videos, num_prompts=1, max_tokens=6)
    assert [len(group) for group in groups] == [2]


def test_an_environment_of_ones_own_answers_a_rollout(videos, capsys):
    completion = custom_environment.main(**videos)
    assert [turn.role for turn in completion.turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert completion.turns[3].calls[0].error == "colour_at may be called 1 times; answer now"
    assert "time_s must be at least 0, got -1" in capsys.readouterr().out


def test_families_of_ones_own_are_checked(tmp_path, monkeypatch):
    """With two ranks: tests/testing/test_family_check.py."""
    monkeypatch.syspath_prepend(ROOT / "examples" / "new_family")
    reports = importlib.import_module("check").main(tmp_path, num_ranks=1)
    assert all("same logits" in report.checked for report in reports)


# ---- the pages ----

PAGES = sorted((ROOT / "docs" / "extend").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"(\S+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_quotes_stands_in_the_file(page):
    """But for white space: `ruff format` lays the quotes out, too."""
    quoted = [(file, code) for _, file, code in FENCE.findall(page.read_text()) if file]
    assert quoted
    missing = [code for file, code in quoted if "".join(code.split()) not in "".join((ROOT / file).read_text().split())]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_are_those_of_an_example(page):
    """Which `test_the_command_of_an_example_trains` runs."""
    heads = " ".join(" ".join(path.read_text().replace("\\\n", " ").split()) for path in ROOT.glob("examples/**/*.py"))
    for language, _, code in FENCE.findall(page.read_text()):
        for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
            command = " ".join(line.partition("#")[0].split())
            assert command in heads, command


# ---- in a run ----


def fit(tmp_path, example, *more):
    """What the command in the head of an example logs, of one step."""
    text = inspect.getdoc(example) if inspect.ismodule(example) else ast.get_docstring(ast.parse(example.read_text()))
    (command,) = re.findall(r"python -m longrl (fit .*)", text)
    runs.main([*shlex.split(command), "--trainer.max_steps=1", f"--run_dir={tmp_path / 'run'}", *more])
    return runs.metrics(tmp_path / "run")


@pytest.mark.parametrize(
    "example", [custom_reward, custom_algorithm, custom_dataset, custom_engine, custom_environment]
)
def test_the_command_of_an_example_trains(tmp_path, folder, example):
    train = (
        custom_dataset.write_quiz(folder, NUM_VIDEOS) if example is custom_dataset else folder / "videos/train.jsonl"
    )
    logged = fit(tmp_path, example, f"--data.train={train}", "--rollout.sampling.max_completion_tokens=8")
    names = {name for _, name in logged}
    assert names >= {"reward/right_option", "reward/brevity", "reward/think_answer_format"}
    assert ("rollout/turns" in names) == (example is custom_environment)
    mismatches = [float(value) for (_, name), value in logged.items() if name == "train/mismatch_max"]
    assert mismatches == [pytest.approx(0, abs=1e-4)]


def test_the_command_of_the_family_trains(tmp_path, folder):
    tiny = tiny_models.tiny_internvl(tmp_path / "tiny")
    options = [f"--model.family.init_args.model={tiny}", f"--data.train={folder / 'videos/train.jsonl'}"]
    logged = fit(tmp_path, ROOT / "examples/new_family/check.py", *options)
    assert float(logged[0, "train/grad_norm"]) > 0


@pytest.mark.slow
def test_two_ranks_take_the_step_of_one(tmp_path, folder):
    """The commands of the script, in processes that need not import everything anew, and its comparison."""
    script = (ROOT / "examples" / "two_ranks.sh").read_text().replace("\\\n", " ").replace("$out", str(tmp_path))
    more = ["--trainer.max_steps=1", f"--data.train={folder / 'videos/train.jsonl'}"]
    (one,) = re.findall(r"^python -m longrl (fit .*)", script, re.MULTILINE)
    (two,) = re.findall(r"^torchrun --nproc_per_node 2 --module longrl (fit .*)", script, re.MULTILINE)
    runs.main([*shlex.split(one), *more])
    run_as_torchrun(2, *shlex.split(two), *more)
    (check,) = re.findall(r"<<'CHECK'\n(.*)\nCHECK", script, re.DOTALL)
    printed = subprocess.run([sys.executable, "-c", check, tmp_path], capture_output=True, text=True, check=True).stdout
    assert printed.count(" on one rank, ") == 3
