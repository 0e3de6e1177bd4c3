"""A step that was left out is taken again: the module, row and token of its first bad number are named."""

import shutil

import pytest
import torch
from torch import nn

from longrl.commands.first_nonfinite import NonfiniteWatch
from longrl.commands.main import main
from longrl.modules.skipped_steps import FOLDER
from tests.modules.test_skipped_steps import NAN
from tests.runs import rollouts, run, text_config

TRUST = "--trust_run_config=true"  # the config names classes of these tests
POISON = {"class_path": "tests.modules.test_skipped_steps.PoisonFrom", "init_args": {"step": 1}}


def left_out(folder, stage: str):
    """A run whose steps from the second on are left out, with a checkpoint of the first, and its first record."""
    file = folder / "rows.jsonl"
    line = '{"problem": "Which? A. one B. two", "answer": "A", "reasoning": "One.", "problem_id": "%d"}\n'
    file.write_text("".join(line % number for number in range(12)))
    values = text_config(file, stage)
    if stage == "rl":
        values["rollout"] = rollouts(sampling={"num_generations": 2, "max_completion_tokens": 3})
    values["trainer"]["callbacks"].append(POISON)
    values["trainer"]["max_steps"] = 6
    values["checkpoint"] = {"every_n_train_steps": 1}
    with pytest.raises(RuntimeError, match="of 3 optimizer steps in a row"):
        run(folder / "run", values)
    return folder / "run", min((folder / "run" / FOLDER).iterdir())


@pytest.fixture(scope="module", params=["sft", "rl"])
def record(request, tmp_path_factory):
    return left_out(tmp_path_factory.mktemp(request.param), request.param)


def planted(run_dir, folder, name: str, change) -> str:
    """The run's last checkpoint with a weight changed."""
    path = folder / "planted.ckpt"
    shutil.copy(run_dir / "checkpoints" / "last.ckpt", path)
    saved = torch.load(path, weights_only=True)
    change(saved["state_dict"][f"model.{name}"])
    torch.save(saved, path)
    return str(path)


def test_a_step_that_is_finite_now_says_so(record, capsys):
    run_dir, file = record
    main(["replay", TRUST, str(file)])
    said = capsys.readouterr().out
    assert "the step after 1 steps, rank 0: loss" in said
    assert "gradient norm nan then" in said
    assert f"weights: {run_dir}" in said
    assert "every number is finite now" in said


def test_a_weight_that_is_no_number_is_named(record, tmp_path, capsys):
    run_dir, file = record
    name = "model.layers.1.mlp.down_proj"
    weights = planted(run_dir, tmp_path, f"{name}.weight", lambda weight: weight[3, 2].fill_(NAN))
    main(["replay", TRUST, str(file), "--weights", weights])
    said = capsys.readouterr().out
    assert "not finite before anything ran, weights: the value (1 nan and 0 infinite of" in said
    assert "first number that is not finite, forward: the output (" in said
    assert f"of {name}\n" in said
    assert "token 0 of the prompt's" in said
    assert "float32 within" in said


def test_activations_that_overflow_are_named(record, tmp_path, capsys):
    run_dir, file = record
    name = "model.layers.0.mlp.up_proj"
    weights = planted(run_dir, tmp_path, f"{name}.weight", lambda weight: weight.fill_(3e38))
    main(["replay", TRUST, str(file), "--weights", weights])
    said = capsys.readouterr().out
    assert "not finite before" not in said
    assert f"of {name}\n" in said
    assert "completion 0" in said or "of the prompt's" in said


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.safetensors", "there is no .*; name a file in RUN/nonfinite_steps"),
        (lambda folder: (folder / "x.safetensors").write_bytes(b"x") and folder / "x.safetensors", "is no record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        main(["replay", str(make(tmp_path))])


def test_a_record_away_from_its_run_is_refused(record, tmp_path):
    _, file = record
    copy = shutil.copy(file, tmp_path / file.name)
    with pytest.raises(ValueError, match=r"has no config.yaml, .* leave it in its run's folder"):
        main(["replay", str(copy)])


class Root(nn.Module):
    """Its gradient at 0 is infinite."""

    def forward(self, x):
        return x.sqrt()


def test_the_backward_pass_names_the_module_that_made_a_gradient():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Root(), nn.Linear(2, 1))
    nn.init.constant_(model[0].weight, -1.0)
    nn.init.constant_(model[0].bias, 0.0)
    watch = NonfiniteWatch()
    with watch.watching(model):
        model(torch.ones(3, 2)).sum().backward()
    assert watch.finding.phase == "backward"
    assert watch.finding.module == "2"
    assert "reaches the output of 1" in watch.finding.what


def test_operations_between_modules_and_gradients_of_weights_are_told_apart():
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

        def forward(self, x):
            return self.second(self.first(x) / 0.0)

    model = Between()
    watch = NonfiniteWatch()
    with watch.watching(model):
        model(torch.ones(3, 2))
    assert (watch.finding.phase, watch.finding.module) == ("forward", "second")
    assert "made between modules" in watch.finding.what
    model = nn.Linear(2, 1)
    watch = NonfiniteWatch()
    with watch.watching(model):
        model(torch.full((3, 2), 3e38)).mul(1e-38).sum().mul(1e38).backward()
    assert (watch.finding.phase, watch.finding.module) == ("gradient", "weight")
