"""A run that is killed anywhere and resumed ends as the uninterrupted one: bit for bit, whatever is compared.

Reference and resumed runs are made in this process, killed ones in a fork of it (`tests.runs.Kill` sends SIGKILL at a
chosen place); one test goes through `python -m longrl` and a kill from outside at a time of its own.
"""

import copy
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.engines.parity import RenderedPrompt
from longrl.evaluation.async_signs import WAIT_FOR_TAILS
from longrl.io.atomic import PARTIAL_SUFFIX
from tests.distributed import ForkedCommand
from tests.runs import arguments, checkpoint, config, data_order, metrics, run, run_in_child, text_config, videos
from tests.tiny import qwen3_5_folder

LAST = "checkpoints/last.ckpt"
SFT_STEPS = 18
RL_STEPS = 24


# ---- runs ----


def sft(**trainer):
    """3 epochs of 6 steps, validation in the middle and at the end of each, a checkpoint every 3 steps."""
    values = config("sft")
    values["trainer"] |= {"max_epochs": 3, "val_check_interval": 3, **trainer}
    values["data"]["val"] = str(videos() / "eval.jsonl")
    values["checkpoint"] = {"every_n_train_steps": 3}
    return values


def dapo(**trainer):
    """2 epochs of 3 steps, 4 optimizer steps per rollout; dynamic sampling carries groups over. KL, a teacher."""
    values = config("rl")
    values["trainer"] |= {"max_epochs": 2, **trainer}
    values["model"] |= {"mini_batches_per_rollout": 2, "epochs_per_rollout": 2}
    values["model"]["algorithm"] = {
        "advantage": "longrl.algorithms.group_normalized",
        "token_weights": "longrl.algorithms.token_mean",
        "select": "longrl.algorithms.drop_uniform",
        "clip_high": 0.28,
        "kl_coef": 0.1,
    }
    family = values["model"]["family"]
    of_teacher = family | {"init_args": dict(family["init_args"], init_seed=7)}
    values["model"]["teacher"] = {
        "class_path": "longrl.modules.local_teacher.LocalTeacher",
        "init_args": {"family": of_teacher},
    }
    values["model"]["distillation"] = {"coef": 0.01}
    values["data"] |= {"val": str(videos() / "eval.jsonl"), "prompts_per_batch": 4}
    values["checkpoint"] = {"every_n_train_steps": 4}
    return values


def killed(values, step, where):
    values = copy.deepcopy(values)
    kill = {"class_path": "tests.runs.Kill", "init_args": {"step": step, "where": where}}
    values["trainer"]["callbacks"].append(kill)
    return values


def resume(folder: Path) -> list[str]:
    return [f"--ckpt_path={folder / LAST}"] if (folder / LAST).exists() else []


def interrupted_run(folder: Path, values, kills):
    """Killed at each of `kills` in turn, always resumed from the last checkpoint, and then run to its end."""
    for step, where in kills:
        assert run_in_child(folder, killed(values, step, where), *resume(folder)) == -signal.SIGKILL, (step, where)
    return run(folder, values, *resume(folder))


# ---- comparing ----


def differences(one, other, place=""):
    """Where two checkpoints differ; paths are those of the runs, `unlogged` metrics and one alert hold timings."""
    if place.endswith(("_path", "dirpath", f"traces/{WAIT_FOR_TAILS}")) or "/unlogged/metrics" in place:
        return []
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, other) and one.dtype == other.dtype else [place]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{place}: keys {one.keys() ^ other.keys()}"]
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{place}: {len(one)} or {len(other)} items"]
        return [
            found for i, pair in enumerate(zip(one, other, strict=True)) for found in differences(*pair, f"{place}/{i}")
        ]
    return [] if one == other else [f"{place}: {one} or {other}"]


def assert_same_end(folder: Path, reference: Path):
    """Weights, optimizer, schedule, random states, loops, carried-over groups, data order and logged metrics."""
    assert data_order(folder) == data_order(reference)
    assert metrics(folder) == metrics(reference)
    assert differences(checkpoint(folder), checkpoint(reference)) == []


def carried(folder: Path):
    (waiting,) = checkpoint(folder)["callbacks"]["RolloutCallback"]["waiting"]
    return waiting["carried"]


@pytest.fixture(scope="module")
def sft_reference(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("sft") / "run", sft())
    saved = checkpoint(folder)
    assert saved["global_step"] == SFT_STEPS
    assert {step for step, name in metrics(folder) if name == "val/loss"} == {2, 5, 8, 11, 14, 17}
    return folder


@pytest.fixture(scope="module")
def dapo_reference(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("dapo") / "run", dapo())
    assert checkpoint(folder)["global_step"] == RL_STEPS
    losses = [float(value) for (_, name), value in metrics(folder).items() if name == "train/grad_norm"]
    assert len(losses) == 6
    assert all(losses)  # every rollout trained on something
    return folder


# ---- tests ----


@pytest.mark.parametrize(
    ("step", "where"),
    [
        (3, "saved"),  # after the checkpoint, before the step's metrics are logged
        (5, "on_train_batch_start"),
        (6, "on_validation_batch_end"),
        (6, "saved"),  # exactly at the end of an epoch
        (9, "saving"),  # half of the checkpoint is written
    ],
)
def test_sft_killed_once(tmp_path, sft_reference, step, where):
    assert_same_end(interrupted_run(tmp_path / "run", sft(), [(step, where)]), sft_reference)


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
def test_sft_killed_again_and_again(tmp_path, sft_reference, limit):
    """Lightning resumes differently when `max_steps` is given."""
    values = sft() if limit == "max_epochs" else sft(max_epochs=None, max_steps=14)
    reference = sft_reference if limit == "max_epochs" else run(tmp_path / "reference", values)
    kills = [
        (2, "on_train_batch_end"),
        (3, "on_validation_batch_end"),
        (6, "on_train_batch_start"),
        (8, "on_train_batch_end"),
        (9, "saving"),
        (12, "saved"),
        (13, "on_train_batch_end"),
    ]
    folder = interrupted_run(tmp_path / "run", values, kills)
    assert_same_end(folder, reference)


@pytest.mark.slow
def test_sft_killed_with_loader_workers(tmp_path, sft_reference):
    """What they rendered ahead is rendered again, and none outlives its trainer (`run_in_child` waits for them)."""
    values = sft()
    values["data"] |= {"num_workers": 2, "prefetch_prompts": 6}
    kills = [(3, "saved"), (6, "on_train_batch_start"), (8, "on_train_batch_end")]
    assert_same_end(interrupted_run(tmp_path / "run", values, kills), sft_reference)


@pytest.mark.slow
def test_rl_killed_with_groups_carried_over(tmp_path, dapo_reference):
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(dapo(), 8, "saved")) == -signal.SIGKILL
    assert len(carried(folder)) > 0
    run(folder, dapo(), *resume(folder))
    assert_same_end(folder, dapo_reference)


@pytest.mark.slow
def test_rl_killed_again_and_again_across_an_epoch_end(tmp_path, dapo_reference):
    kills = [
        (4, "on_train_batch_end"),
        (8, "saving"),
        (12, "on_validation_batch_end"),
        (12, "saved"),
        (16, "on_train_batch_start"),
        (20, "saved"),
    ]
    assert_same_end(interrupted_run(tmp_path / "run", dapo(), kills), dapo_reference)


CONTROLS = {"kl_control": {"target": 1e-3, "horizon": 20}, "entropy_control": {"target": 99.0, "step": 0.05}}
TASKS = {"class_path": "longrl.algorithms.TaskNormalized", "init_args": {"decay": 0.5}}
MOVING = {
    "coefficients": CONTROLS,
    "tasks, KL in the reward": {"advantage": TASKS, "kl": "longrl.algorithms.k1", "kl_placement": "reward", **CONTROLS},
    "reference": {"moving_reference": {"alpha": 0.5, "every_n_steps": 1}},
    "reference of adapters": {"moving_reference": {"alpha": 1.0, "every_n_steps": 3}},
}


@pytest.mark.parametrize("state", MOVING)
def test_what_moves_from_step_to_step_is_resumed(tmp_path, state):
    """Coefficients, deviations of tasks, the reference: saved at 4 of 8 steps, and the rest as it was."""
    rows = tmp_path / "rows.jsonl"
    records = [{"problem": f"{n} + 1?", "answer": str(n + 1), "task": ("exact", "math")[n % 2]} for n in range(8)]
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = text_config(rows, "rl")
    if "adapters" in state:
        values["model"]["family"]["init_args"]["lora"] = {"rank": 2, "alpha": 4}
    values["trainer"] |= {"max_steps": 8, "max_epochs": 9}
    values["model"] |= {"mini_batches_per_rollout": 2, "optimizer": {"lr": 1e-2}}
    values["model"]["algorithm"] = {"kl_coef": 0.1, **MOVING[state]}
    values["checkpoint"] = {"every_n_train_steps": 4, "save_top_k": -1, "filename": "{step}"}
    whole = run(tmp_path / "whole", values)
    (half,) = (whole / "checkpoints").glob("step=4.ckpt")
    resumed = run(tmp_path / "resumed", values, f"--ckpt_path={half}")
    found = checkpoint(resumed)
    wanted = checkpoint(whole)
    for part in ("state_dict", "optimizer_states", "coefficients", "task_deviations"):
        assert differences(found.get(part), wanted.get(part), part) == []
    logged = metrics(resumed)
    assert ("train/kl_ref" if "KL" not in state else "train/kl_coef") in {name for _, name in logged}
    first = min(step for step, _ in logged)
    assert {key: value for key, value in metrics(whole).items() if key[0] >= first} == logged
    before = torch.load(half, weights_only=True)
    moved = [name for name in ("coefficients", "task_deviations") if name in wanted]
    assert all(before[name] != wanted[name] for name in moved)
    references = [name for name in wanted["state_dict"] if name.startswith("moving_reference.")]
    assert any(not torch.equal(before["state_dict"][name], wanted["state_dict"][name]) for name in references) or moved
    assert bool(references) == ("moving_reference" in MOVING[state])


def test_a_reference_begins_to_move_in_a_run_that_goes_on_and_is_not_lost(tmp_path):
    """A checkpoint without one has its run's first policy for it; one with it is refused where it would be left."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(8)))
    values = text_config(rows, "rl")
    values["trainer"] |= {"max_steps": 2, "max_epochs": 9, "callbacks": [{"class_path": "tests.runs.FirstWeights"}]}
    values["model"]["algorithm"] = {"kl_coef": 0.1}
    values["checkpoint"] = {"every_n_train_steps": 1}
    folder = run(tmp_path / "run", values)
    first = torch.load(folder / "first.pt")
    values["trainer"] |= {"max_steps": 3, "callbacks": []}
    values["model"]["algorithm"]["moving_reference"] = {"alpha": 1.0, "every_n_steps": 99}
    run(folder, values, *resume(folder))
    saved = checkpoint(folder)["state_dict"]
    kept = {name.partition(".")[2].replace("/", "."): saved[name] for name in saved if name.startswith("moving_")}
    assert kept
    assert all(torch.equal(value, first[f"model.{name}"]) for name, value in kept.items())
    values["model"]["algorithm"]["moving_reference"] = None
    values["trainer"]["max_steps"] = 4
    with pytest.raises(ValueError, match=r"has moved, and model\.algorithm\.moving_reference=null"):
        run(folder, values, *resume(folder))


@pytest.mark.slow
def test_rl_of_a_hybrid_model_killed_in_the_middle(tmp_path):
    values = dapo(limit_val_batches=0, max_epochs=1)
    folder = {"model": qwen3_5_folder(), "min_pixels": 1024, "max_pixels": 1024}
    values["model"]["family"]["class_path"] = "longrl.models.qwen3_5.Qwen3_5Family"
    values["model"]["family"]["init_args"] |= folder
    values["model"]["max_tokens_per_micro_batch"] = 2000
    reference = run(tmp_path / "reference", values)
    assert checkpoint(reference)["global_step"] == 12
    assert_same_end(interrupted_run(tmp_path / "run", values, [(4, "saved"), (8, "on_train_batch_end")]), reference)


@pytest.mark.slow
def test_rl_killed_from_outside_through_the_command_line(tmp_path, dapo_reference):
    folder = tmp_path / "run"
    process = ForkedCommand(*arguments(folder, dapo()))
    try:
        deadline = time.monotonic() + 600
        while not steps_logged(folder, 3):
            assert process.returncode is None, process.output()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert (folder / LAST).exists()
    output = (process := ForkedCommand(*arguments(folder, dapo(), *resume(folder)))).wait()
    assert process.returncode == 0, output
    assert_same_end(folder, dapo_reference)


def steps_logged(folder, count):
    files = list(folder.glob("logs/version_0/metrics.csv"))
    return bool(files) and files[0].read_text().count("\n") > count


def test_a_run_stopped_by_max_steps_goes_on_with_more(tmp_path, sft_reference):
    values = sft(max_epochs=None, max_steps=8)
    values["model"]["optimizer"]["total_steps"] = SFT_STEPS  # the schedule must not depend on where we stop
    folder = run(tmp_path / "run", values)
    assert checkpoint(folder)["global_step"] == 8  # the last step is saved though 3 does not divide it
    values["trainer"]["max_steps"] = SFT_STEPS
    run(folder, values, *resume(folder))
    assert data_order(folder) == data_order(sft_reference)
    assert metrics(folder) == metrics(sft_reference)
    assert differences(checkpoint(folder)["state_dict"], checkpoint(sft_reference)["state_dict"]) == []


@pytest.mark.parametrize(("limits", "steps"), [((3, 5), 5), ((2, 9), 4)], ids=["max_steps", "max_epochs"])
def test_a_run_that_ended_with_an_epoch_goes_on_under_both_limits(tmp_path, limits, steps):
    """Its checkpoint lies at the end of an epoch: a resumed run must neither end there nor count the epoch twice."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    values = text_config(rows)
    values["trainer"] |= {"max_epochs": 1}
    folder = run(tmp_path / "run", values)
    assert checkpoint(folder)["global_step"] == 2
    values["trainer"] |= dict(zip(("max_epochs", "max_steps"), limits, strict=True))
    run(folder, values, *resume(folder))
    assert checkpoint(folder)["global_step"] == steps
    assert [step for step, *_ in data_order(folder)] == list(range(1, steps + 1))


def test_rollouts_of_several_steps_are_saved_when_they_pass_a_multiple(tmp_path):
    values = dapo(limit_val_batches=0)
    values["checkpoint"] = {"every_n_train_steps": 5, "save_top_k": -1, "filename": "{step}"}
    folder = run(tmp_path / "run", values)
    saved = sorted(int(file.stem.split("=")[1]) for file in (folder / "checkpoints").glob("step=*.ckpt"))
    assert saved == [8, 12, 16, 20, 24]  # rollouts end at 4, 8, ..., 24


def test_a_batch_that_no_validation_follows_is_saved_at_once(tmp_path):
    """Without rows to validate, `val_check_interval` of a recipe is a number without a meaning."""
    values = sft(val_check_interval=2)
    values["data"].pop("val", None)
    values["trainer"].pop("limit_val_batches", None)
    values["checkpoint"] = {"every_n_train_steps": 2, "save_top_k": -1, "filename": "{step}"}
    values["trainer"]["max_steps"] = 5
    folder = run(tmp_path / "run", values)
    saved = sorted(int(file.stem.split("=")[1]) for file in (folder / "checkpoints").glob("step=*.ckpt"))
    assert saved[:2] == [2, 4]


def test_checkpoints_by_time_count_also_under_manual_optimization(tmp_path):
    values = sft(limit_val_batches=0)
    values["checkpoint"] = {"every_n_train_steps": None, "train_time_interval": "00:00:00"}  # after every batch
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 5, "on_train_batch_end")) == -signal.SIGKILL
    assert checkpoint(folder)["global_step"] == 4


def test_a_half_written_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    values = sft()
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 6, "saving")) == -signal.SIGKILL
    assert checkpoint(folder)["global_step"] == 3
    (partial,) = [file.name for file in (folder / "checkpoints").iterdir() if file.name != "last.ckpt"]
    assert partial.startswith(".last.ckpt.")
    assert partial.endswith(PARTIAL_SUFFIX)
    run(folder, values, *resume(folder))
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_run_killed_between_saving_and_deleting_goes_on_and_keeps_what_it_should(tmp_path):
    """Nothing looks for the highest number: another run's checkpoint in the folder is neither read nor deleted."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"problem": "1 + 1?", "answer": "2"}\n' * 8)
    values = text_config(rows)
    values["trainer"] |= {"max_steps": 6}
    values["checkpoint"] = {"every_n_train_steps": 2, "save_top_k": 1, "filename": "{step}"}
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(values, 4, "pruning")) == -signal.SIGKILL
    assert names_of_checkpoints(folder) == ["last.ckpt", "step=2.ckpt", "step=4.ckpt"]
    assert checkpoint(folder)["global_step"] == 2
    (folder / "checkpoints" / "step=900.ckpt").write_bytes(b"another run's")
    run(folder, values, *resume(folder))
    assert names_of_checkpoints(folder) == ["last.ckpt", "step=6.ckpt", "step=900.ckpt"]
    assert checkpoint(folder)["global_step"] == 6
    assert [step for step, *_ in data_order(folder)] == [1, 2, 3, 4, 5, 6]


def names_of_checkpoints(folder):
    return sorted(file.name for file in (folder / "checkpoints").iterdir())


def test_resuming_with_other_data_is_refused(tmp_path):
    values = sft(max_epochs=1)
    folder = run(tmp_path / "run", values)
    values["data"]["seed"] = 1
    with pytest.raises(ValueError, match="must be the checkpoint's, but its seed was 0 and is now 1"):
        run(folder, values, *resume(folder))


def test_a_run_that_goes_on_replaces_last_ckpt(tmp_path):
    """`last.ckpt` is what `model.init_from` reads; Lightning's own choice is to write `last-v1.ckpt` beside it."""
    values = sft(max_epochs=1, limit_val_batches=0)
    folder = run(tmp_path / "run", values)
    values["trainer"]["max_epochs"] = 2
    first, again = checkpoint(folder), checkpoint(run(folder, values, *resume(folder)))
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
    assert differences(first["state_dict"], again["state_dict"]) != []


@pytest.mark.slow
def test_a_killed_run_goes_on_with_workers(tmp_path, sft_reference):
    """Where the loader was is a number of rows, whoever renders them."""
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(sft(), 8, "on_train_batch_end")) == -signal.SIGKILL
    values = sft()
    values["data"] |= {"num_workers": 2, "prefetch_prompts": 6}
    run(folder, values, *resume(folder))
    assert_same_end(folder, sft_reference)


class OwnWeights(HFEngine):
    """Samples from a copy that `sync` makes, as an engine in another process does."""

    reads_policy_weights = False

    def sync(self, family, model, step):
        self.weights = copy.deepcopy(model)

    def rendered_prompts(self, family, prompts, features):
        return [RenderedPrompt(prompt.input_ids, prompt.position_ids) for prompt in prompts]

    def generate(self, family, model, *args, **options):
        with torch.no_grad():
            return super().generate(family, self.weights, *args, **options)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_engine(tmp_path, dapo_reference):
    """Groups carried over were sampled by the engine before; the numbers drawn belong to the run."""
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(dapo(), 8, "saved")) == -signal.SIGKILL
    assert len(carried(folder)) > 0
    values = dapo()
    values["rollout"]["engine"] = {"class_path": "tests.test_resume.OwnWeights"}
    run(folder, values, *resume(folder))
    assert data_order(folder) == data_order(dapo_reference)
    saved, wanted = (checkpoint(one)["state_dict"] for one in (folder, dapo_reference))
    for name, value in wanted.items():
        torch.testing.assert_close(saved[name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_run_folder_may_be_moved(tmp_path, sft_reference):
    folder = tmp_path / "run"
    assert run_in_child(folder, killed(sft(), 7, "on_train_batch_end")) == -signal.SIGKILL
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    run(moved, sft(), *resume(moved))
    assert_same_end(moved, sft_reference)
    assert not os.path.exists(folder)
