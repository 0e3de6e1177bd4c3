"""The command line end to end on tiny models: what it refuses, what composes, and one stage after the other."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from longrl.commands.main import main
from tests.runs import ROOT, arguments, checkpoint, config, data_order, metrics, rollouts, run, text_config, videos
from tests.tiny import text_folder

HEAVY = ("torch", "lightning", "transformers", "numpy", "jsonargparse", "datasets", "wandb", "vllm")


@pytest.fixture
def rows(tmp_path):
    """Ten text rows with reasoning."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(text_row(n)) + "\n" for n in range(10)))
    return file


def text_row(n, **changes):
    problem = f"What is {n} + 1?\nA. {n + 1}\nB. {n + 2}"
    return {"problem_id": n, "problem": problem, "answer": "A", "reasoning": f"{n} + 1 = {n + 1}", **changes}


def short(values, steps=1):
    values["trainer"]["max_steps"] = steps
    return values


@pytest.fixture
def no_weights(monkeypatch):
    """Fails a test that comes as far as building the model."""

    def build(*args):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("longrl.modules.policy.build_from", build)


# ---- help and parsing ----


@pytest.mark.parametrize("args", [["--help"], []])
def test_help_imports_nothing_heavy(args):
    code = f"""import sys; from longrl.commands.main import main; main({args})
print([name for name in {HEAVY} if name in sys.modules])"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    for command in ("fit", "validate", "test", "predict", "export", "cache-features", "synthetic", "demo"):
        assert f"\n  {command} " in output


def test_python_m_longrl_is_the_same_command_line():
    output = subprocess.run(
        [sys.executable, "-m", "longrl", "-h"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.startswith("usage: python -m longrl COMMAND")


def test_an_unknown_command_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown command 'train'; did you mean fit"):
        main(["train"])


def printed_config(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


def test_later_configs_and_flags_win(tmp_path, capsys):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    values = config("rl")
    values["model"]["optimizer"] = {"lr": 0.5, "warmup_steps": 7}
    first.write_text(yaml.safe_dump(values))
    second.write_text("model: {optimizer: {lr: 0.25}, max_grad_norm: 2.0}\ndata: {prompts_per_batch: 3}\n")
    found = printed_config(capsys, "--config", str(first), "--config", str(second), "--data.prompts_per_batch=5")
    assert found["model"]["optimizer"]["lr"] == 0.25
    assert found["model"]["optimizer"]["warmup_steps"] == 7  # what the second says nothing of stays
    assert found["model"]["max_grad_norm"] == 2.0
    assert found["data"]["prompts_per_batch"] == 5
    assert found["data"]["train"] == values["data"]["train"]
    family = found["model"]["family"]
    assert family["init_args"]["max_pixels"] == 784
    swapped = printed_config(capsys, "--config", str(second), "--config", str(first))
    assert swapped["model"]["optimizer"]["lr"] == 0.5


def typo(where):
    values = config("rl")
    place = values
    *path, name = where.split(".")
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[name] = 1
    return values


@pytest.mark.parametrize(
    "where",
    [
        "modell",
        "model.max_gradd_norm",
        "model.optimizer.learning_rate",
        "model.family.init_args.max_pixel",
        "data.video.fpss",
        "rollout.sampling.num_generation",
        "rollout.reward.terms.0.weigth",
        "checkpoint.every_n_steps",
    ],
)
def test_a_typo_in_a_config_is_an_error_that_names_the_key(tmp_path, capsys, where):
    with pytest.raises(SystemExit) as stop:
        main(arguments(tmp_path / "run", typo(where)))
    assert stop.value.code == 2
    assert where.rpartition(".")[2] in capsys.readouterr().err


def test_a_typo_in_an_algorithm_is_an_error_that_names_the_key(tmp_path, capsys):
    values = config("rl")
    values["model"]["algorithm"] = {"clip_hihg": 0.3}
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "run", values))
    assert "clip_hihg" in capsys.readouterr().err


def test_a_typo_in_a_flag_is_an_error_that_names_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(arguments(tmp_path / "run", config("rl"), "--model.max_gradd_norm=1"))
    assert "max_gradd_norm" in capsys.readouterr().err


# ---- bad input, before weights are loaded ----


@pytest.mark.parametrize("value", [1.0, 0.5])
def test_lightnings_gradient_clipping_is_refused(tmp_path, no_weights, value):
    values = config("sft")
    values["trainer"]["gradient_clip_val"] = value
    with pytest.raises(ValueError, match=rf"trainer.gradient_clip_val={value} has no effect.*set model.max_grad_norm"):
        run(tmp_path / "run", values)


def test_lightnings_gradient_accumulation_is_refused(tmp_path, no_weights):
    values = config("sft")
    values["trainer"]["accumulate_grad_batches"] = 2
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 has no effect.*set data.prompts_per_batch"):
        run(tmp_path / "run", values)


def test_lightnings_neutral_values_are_not_refused(rows, tmp_path):
    values = short(text_config(rows))
    values["trainer"] |= {"gradient_clip_val": 0, "accumulate_grad_batches": 1}
    run(tmp_path / "run", values)


def with_sampling(values, **sampling):
    values["rollout"]["sampling"] |= sampling
    return values


def test_grpo_with_one_completion_is_refused(tmp_path, no_weights):
    values = with_sampling(config("rl"), num_generations=1)
    with pytest.raises(ValueError, match="group_normalized .* needs num_generations >= 2, got 1; raise"):
        run(tmp_path / "run", values)


def test_a_batch_larger_than_the_data_is_refused(tmp_path, no_weights):
    values = config("rl")
    values["data"]["prompts_per_batch"] = 13
    with pytest.raises(ValueError, match="prompts_per_batch=13 .* but data.train has 12 rows; lower"):
        run(tmp_path / "run", values)


def test_a_row_whose_answer_is_no_option_is_refused(tmp_path, no_weights):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(text_row(n, answer="ABC"[n])) + "\n" for n in range(3)))
    with pytest.raises(ValueError, match="must be one of the options A, B, got 'C'"):
        run(tmp_path / "run", text_config(file))


def test_data_that_does_not_exist_is_refused(tmp_path, no_weights):
    with pytest.raises((ValueError, FileNotFoundError), match=r"nowhere\.jsonl"):
        run(tmp_path / "run", text_config(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize("name", ["mini_batches_per_rollout", "epochs_per_rollout", "max_tokens_per_micro_batch"])
def test_sizes_below_one_are_refused(tmp_path, no_weights, name):
    values = config("rl")
    values["model"][name] = 0
    with pytest.raises((ValueError, SystemExit)):
        run(tmp_path / "run", values)


def test_a_prompt_longer_than_a_micro_batch_says_what_to_raise(rows, tmp_path):
    values = text_config(rows)
    values["model"]["max_tokens_per_micro_batch"] = 10
    with pytest.raises(
        ValueError, match=r"above 10, the model\.max_tokens_per_micro_batch; raise that to \d+, or take fewer frames"
    ):
        run(tmp_path / "run", values)


# ---- media that cannot be read ----


def videos_with_faults(folder):
    """A copy of the videos; the first is cut off, the second is missing."""
    shutil.copytree(videos(), folder)
    broken, missing, *_ = sorted(
        {json.loads(line)["videos"] for line in (folder / "train.jsonl").read_text().splitlines()}
    )
    (folder / broken).write_bytes((folder / broken).read_bytes()[:300])
    (folder / missing).unlink()
    return broken, missing


def test_missing_and_broken_videos_are_listed_and_the_run_goes_on(tmp_path):
    broken, missing = videos_with_faults(tmp_path / "data")
    values = short(config("sft"), steps=6)
    values["data"] |= {"train": str(tmp_path / "data" / "train.jsonl"), "max_skipped_share": 0.9}
    folder = run(tmp_path / "run", values)
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    paths = [Path(item["path"]) for item in skipped]
    assert paths.count(tmp_path / "data" / missing) == paths.count(tmp_path / "data" / broken) == 4
    assert len(skipped) == 8  # four questions each, listed once
    assert all(item["reason"] and item["split"] == "train" for item in skipped)
    assert checkpoint(folder)["global_step"] == 6


def test_too_many_missing_videos_end_the_run_before_it_starts(tmp_path, no_weights):
    videos_with_faults(tmp_path / "data")
    values = config("sft")
    values["data"]["train"] = str(tmp_path / "data" / "train.jsonl")
    with pytest.raises(
        ValueError, match=r"data.max_skipped_share=0.05 of the train rows may be skipped, but 4 of all 12"
    ):
        run(tmp_path / "run", values)


# ---- one stage after the other ----


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    values = short(config("sft"), steps=2)
    values["model"]["optimizer"] = {"lr": 1e-2}
    return run(tmp_path_factory.mktemp("sft") / "run", values)


def rl_from(source, *callbacks):
    values = short(config("rl"))
    values["model"] |= {"init_from": str(source), "algorithm": {"kl_coef": 0.1}}
    values["trainer"]["callbacks"] += [{"class_path": "tests.runs.FirstWeights"}, *callbacks]
    return values


def assert_equal_weights(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("file", ["", "checkpoints/last.ckpt"], ids=["run", "checkpoint"])
def test_rl_starts_from_the_weights_sft_ended_with(tmp_path, sft_run, file):
    folder = run(tmp_path / "rl", rl_from(sft_run / file))
    assert_equal_weights(torch.load(folder / "first.pt"), checkpoint(sft_run)["state_dict"])
    assert float(metrics(folder)[0, "train/kl_ref"]) == pytest.approx(0.0, abs=1e-6)  # the reference too


def test_resuming_restores_more_than_init_from(tmp_path, sft_run):
    values = short(config("sft"), steps=3)
    again = run(tmp_path / "resumed", values, f"--ckpt_path={sft_run / 'checkpoints' / 'last.ckpt'}")
    anew = run(tmp_path / "anew", values, f"--model.init_from={sft_run}")
    assert checkpoint(again)["global_step"] == checkpoint(anew)["global_step"] == 3
    assert len(data_order(again)) == 1
    assert len(data_order(anew)) == 3


def test_weights_of_another_model_are_refused(tmp_path, sft_run):
    values = rl_from(sft_run)
    values["model"]["family"] = {
        "class_path": "longrl.models.text.TextFamily",
        "init_args": {"model": text_folder(), "random_init": True},
    }
    values["data"] |= {"blind": True}
    with pytest.raises(ValueError, match="holds another model than the family describes: .*differences"):
        run(tmp_path / "rl", values)


@pytest.mark.parametrize("source", ["runs/nowhere", "./nowhere", "nowhere", "nowhere.ckpt", "a/b/nowhere"])
def test_weights_that_do_not_exist_are_refused_without_asking_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()  # else `runs/nowhere` may be a hub id
    with pytest.raises(ValueError, match=f"model.init_from='{source}' does not exist; give a checkpoint file"):
        run(tmp_path / "rl", rl_from(source))


def test_the_saved_config_repeats_the_run(tmp_path, sft_run):
    args = ["fit", "--config", str(sft_run / "config.yaml"), f"--run_dir={tmp_path / 'again'}"]
    main(args)
    assert metrics(tmp_path / "again") == metrics(sft_run)
    assert_equal_weights(checkpoint(tmp_path / "again")["state_dict"], checkpoint(sft_run)["state_dict"])


# ---- export ----


@pytest.fixture(scope="module")
def exported(tmp_path_factory, sft_run):
    out = tmp_path_factory.mktemp("export") / "model"
    main(["export", "--run", str(sft_run), "--out", str(out)])
    return out


def chat(processor):
    from longrl.datamodules.media.sampling import VideoSampling
    from longrl.datamodules.media.sources import read_video

    video = next((videos() / "videos").glob("train*.mp4"))
    content = [{"type": "video"}, {"type": "text", "text": "What comes next?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pixels = read_video(str(video), VideoSampling(fps=1.0)).pixels
    return processor(text=[text], videos=[pixels], do_sample_frames=False, return_tensors="pt")


def test_transformers_loads_an_export_and_gives_the_same_logits(sft_run, exported):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from longrl.commands.export import family_of
    from longrl.modules.initial_weights import build_from

    loaded = AutoModelForImageTextToText.from_pretrained(exported).eval()
    ours = build_from(family_of(str(sft_run)), str(sft_run)).eval()
    assert_equal_weights(loaded.state_dict(), ours.state_dict())
    inputs = chat(AutoProcessor.from_pretrained(exported))
    assert inputs["pixel_values_videos"].numel() > 0
    plain = AutoModelForImageTextToText.from_config(loaded.config)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        found, wanted = loaded(**inputs).logits, plain.eval()(**inputs).logits
    assert torch.equal(found, wanted)
    assert found.std() > 0


def test_an_export_is_a_start_for_another_run(tmp_path, sft_run, exported):
    folder = run(tmp_path / "rl", rl_from(exported))
    assert_equal_weights(torch.load(folder / "first.pt"), checkpoint(sft_run)["state_dict"])


def test_an_export_is_a_family_of_its_own(tmp_path, sft_run, exported):
    values = rl_from(exported)
    del values["model"]["init_from"]
    values["model"]["family"]["init_args"] |= {"model": str(exported), "random_init": False}
    folder = run(tmp_path / "rl", values)
    assert_equal_weights(torch.load(folder / "first.pt"), checkpoint(sft_run)["state_dict"])


def test_export_in_another_precision(tmp_path, sft_run):
    from transformers import AutoModelForImageTextToText

    out = tmp_path / "half"
    main(["export", "--run", str(sft_run), "--out", str(out), "--dtype", "bfloat16"])
    weights = AutoModelForImageTextToText.from_pretrained(out, dtype="auto").state_dict()
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


def test_export_refuses_to_overwrite_and_wants_a_run(tmp_path, sft_run, exported):
    with pytest.raises(ValueError, match="exists already; name a new folder"):
        main(["export", "--run", str(sft_run), "--out", str(exported)])
    with pytest.raises(ValueError, match="has no config.yaml; name the folder of a training run"):
        main(["export", "--run", str(tmp_path), "--out", str(tmp_path / "new")])


# ---- evaluation ----


def evaluated(values):
    values["data"]["test"] = values["data"]["val"] = str(videos() / "eval.jsonl")
    values["trainer"]["callbacks"].append({"class_path": "longrl.callbacks.evaluation.EvaluationReport"})
    values["rollout"] = rollouts("longrl.rewards.accuracy")
    return values


def test_test_writes_the_files_of_evaluate(tmp_path, sft_run, capsys):
    values = evaluated(config("sft"))
    main(arguments(tmp_path / "run", values, f"--model.init_from={sft_run}", command="test"))
    results = json.loads((tmp_path / "run" / "test" / "results.json").read_text())
    assert results["policy"]["model"] == sft_run.name
    assert results["conditions"]["video"]["scores"]["overall"]["n"] == 4
    assert len((tmp_path / "run" / "test" / "samples.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "run" / "test" / "report.html").is_file()
    called = json.loads((tmp_path / "run" / "test" / "command.json").read_text())["command"]
    assert called.startswith("python -m longrl test --config")
    assert "accuracy, 95% interval" in capsys.readouterr().out


def test_a_runs_checkpoint_is_all_that_test_needs_to_be_told(tmp_path, sft_run, caplog):
    given = [f"--data.test={videos() / 'eval.jsonl'}", "--rollout.reward.terms=[{function: longrl.rewards.accuracy}]"]
    report = "--trainer.callbacks+=longrl.callbacks.evaluation.EvaluationReport"
    # The run's own config names a callback of the tests.
    shown = ["--data.video.fps=2", f"--run_dir={tmp_path / 'run'}", "--trust_run_config=true"]
    main(["test", f"--ckpt_path={sft_run / 'checkpoints' / 'last.ckpt'}", *given, report, *shown])
    results = json.loads((tmp_path / "run" / "test" / "results.json").read_text())
    assert results["policy"]["model"] == sft_run.name
    assert results["conditions"]["video"]["reading"]["video"]["fps"] == 2.0
    assert "asked in training: data.video.fps is 2.0 (the run: 1.0)" in caplog.text


def test_weights_that_nobody_named_are_not_tested_under_a_runs_name(sft_run):
    before = sorted(sft_run.rglob("*"))
    with pytest.raises(ValueError, match=r"is not told which weights .*last\.ckpt is there"):
        main(["test", f"--run_dir={sft_run}", "--trust_run_config=true"])
    assert sorted(sft_run.rglob("*")) == before


def test_validate_and_predict(tmp_path, sft_run):
    checkpoint_flag = f"--ckpt_path={sft_run / 'checkpoints' / 'last.ckpt'}"
    main(arguments(tmp_path / "validate", evaluated(config("sft")), checkpoint_flag, command="validate"))
    assert (0, "val/accuracy") in {(step and 0, name) for step, name in metrics(tmp_path / "validate", "validate_logs")}
    main(arguments(tmp_path / "run", evaluated(config("sft")), checkpoint_flag, command="predict"))
    assert len((tmp_path / "run" / "predict" / "samples.jsonl").read_text().splitlines()) == 4
