"""Keys in the environment of runs against servers that repeat them: they are in no file and in no line."""

import json
import logging
from dataclasses import replace

import pytest

from longrl.commands.main import main
from longrl.rewards.judge import Judge
from tests.chat.server import Server, completion
from tests.evaluation import test_endpoint_policy as evaluations
from tests.pipeline import running
from tests.runs import rollouts, run, text_config

VARIABLES = ("OPENAI_API_KEY", "MY_JUDGE_KEY", "WANDB_API_KEY", "HF_TOKEN", "LONGRL_SERVER_KEY")
CANARY = "canary0123456789"


class Echo(Server):
    """Repeats the key that it was sent: in an answer, or in every second one an error of its status."""

    status = 500

    def send(self, handler, status, content):
        said = f"your key is {handler.headers.get('Authorization')}"
        if len(self.bodies) % 2:
            super().send(handler, self.status, json.dumps({"error": {"message": said}}).encode())
        else:
            super().send(handler, 200, json.dumps(completion(f"<answer>B</answer> {said} SCORE: 0.5")).encode())


class AskingJudge(Judge):
    """Takes all that a random model says for an answer."""

    def score_all(self, completions, rows):
        answers = [replace(one, text=f"<answer>{at} tea</answer>") for at, one in enumerate(completions)]
        return super().score_all(answers, rows)


def judged_run(folder, url, *more):
    """A step of RL with a judge."""
    row = {"problem": "What does he pour?", "answer": "tea", "reasoning": "x", "problem_type": "free-form"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    endpoint = {"model": "j", "url": url, "key_variable": "MY_JUDGE_KEY", "backoff_s": 0.01, "retries": 1}
    judge = {"endpoint": endpoint, "cache_dir": str(folder / "replies")}
    values = text_config(folder / "rows.jsonl", "rl")
    values["trainer"] |= {"max_steps": 1}
    values["data"] |= {"prompts_per_batch": 1}
    values["rollout"] = rollouts(
        {"class_path": "tests.test_secrets.AskingJudge", "init_args": judge},
        sampling={"num_generations": 4, "max_completion_tokens": 4},
        max_resample_rounds=0,
    )
    run(folder / "fit", values, *more)


def logged_run(folder, url):
    """The same, logged by W&B."""
    judged_run(folder, url, "--wandb=offline")
    assert any(folder.rglob("*.wandb"))


def evaluate(folder, url):
    more = ["--data.max_eval_rows=2", "--num_cards=1"]
    main(["evaluate", *evaluations.arguments(folder / "evaluation", url, *more, retries=1)])


def caption(folder, url):
    for step in ("split", "caption"):
        main(running.arguments(step, folder / "pipeline", url.removesuffix("/v1"), running.videos(1)))


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (judged_run, 500),
        (judged_run, 401),
        (evaluate, 500),
        (evaluate, 401),
        (caption, 500),
        (caption, 401),
        pytest.param(logged_run, 500, marks=pytest.mark.slow),
    ],
)
def test_a_key_that_a_server_repeats_is_nowhere(tmp_path, monkeypatch, capfd, caplog, command, status):
    caplog.set_level(logging.DEBUG, "longrl")
    for variable in VARIABLES:
        monkeypatch.setenv(variable, f"{variable.lower()}-{CANARY}")
    monkeypatch.setenv("WANDB_SILENT", "true")
    said = []
    with Echo(completion("")) as server:
        server.status = status
        try:
            command(tmp_path, server.url)
        except ValueError as error:  # a refusal ends a command
            said.append(str(error))
    assert any(CANARY in str(key) for key in server.keys)  # the trap works
    told = "\n".join([*said, caplog.text, *capfd.readouterr()])
    assert CANARY not in told
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert [file for file in files if CANARY.encode() in file.read_bytes()] == []
    assert "[a key]" in told + "".join(file.read_text(errors="replace") for file in files)
