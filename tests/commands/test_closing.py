"""The last lines of a command: what was written where, and the next command; capitals are for its user to fill in."""

import pytest
import torch

from longrl.commands.closing import MAX_LINES, end_of_export, end_of_fit, say_end, second_stage, without_next
from longrl.modules.initial_weights import saved_step


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a checkpoint."""
    folder = tmp_path / "my run"
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"global_step": 7, "state_dict": {}}, folder / "checkpoints" / "last.ckpt")
    return folder


def test_sft_leads_to_test_rl_and_export(run, capsys):
    end_of_fit(str(run), 7, {"stage": "sft", "test": None})
    done, test, rl, export = capsys.readouterr().out.splitlines()
    assert done.startswith(f"done: step 7, checkpoint {run}/checkpoints/last.ckpt; curves: python -m longrl report")
    assert test == f"next: python -m longrl test --weights '{run}' --test FILE"
    assert f"--init_from '{run}' --out '{run}_rl'" in rl
    assert export == f"next: python -m longrl export --run '{run}' --out '{run}_export'"


def test_sft_of_a_folder_of_init_leads_to_its_own_rl_yaml(run, tmp_path, capsys):
    sft, rl = tmp_path / "sft.yaml", tmp_path / "rl.yaml"
    rl.write_text(f'model: {{init_from: "{run}"}}\n')
    end_of_fit(str(run), 7, {"stage": "sft"}, configs=[str(sft)])
    assert capsys.readouterr().out.splitlines()[2] == f"next: python -m longrl fit --config {rl} --resume auto"
    for text in ("model: {init_from: runs/other}", "model: []", "[", ""):
        rl.write_text(text)
        assert second_stage(str(run), [str(sft)]) is None
    assert second_stage(str(run), [str(tmp_path / "none" / "sft.yaml")]) is None
    assert second_stage(str(run), []) is None


def test_rl_leads_to_test_and_export_and_diffusion_keeps_its_word(run, capsys):
    end_of_fit(str(run), 7, {"stage": "rl", "test": "x.jsonl"})
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[1:]] == ["test", "export"]
    end_of_fit(str(run), 7, {"test": None}, ["diffusion"])
    assert capsys.readouterr().out.splitlines()[1].startswith("next: python -m longrl diffusion test --weights")


def test_a_run_without_a_checkpoint_says_so_and_leads_nowhere(tmp_path, capsys):
    end_of_fit(str(tmp_path), 7, {"stage": "rl"})
    (line,) = capsys.readouterr().out.splitlines()
    assert "no checkpoint (checkpoint.save_last is off)" in line


def test_an_export_says_step_size_and_how_it_is_loaded(run, capsys):
    assert saved_step(run / "checkpoints" / "last.ckpt") == 7
    end_of_export(str(run), "runs/a", 7, "bfloat16", "transformers.AutoModel.from_pretrained('x')")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"exported: step 7 of runs/a to {run} (bfloat16, 0.00 GiB)")
    assert lines[2] == f"next: vllm serve '{run}' --dtype bfloat16"
    assert len(lines) == 4
    end_of_export(str(run), "runs/a", None, "float32", "diffusers.X.from_pretrained('x')")
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_command_within_another_names_no_next_one_and_no_end_is_long(capsys, monkeypatch):
    with without_next():
        say_end(["written: x"], ["a"])
    say_end(["written: x"], ["a"] * 9)
    assert len(capsys.readouterr().out.splitlines()) == 1 + MAX_LINES
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    say_end(["written: x"], ["a"])
    assert capsys.readouterr().out == ""
