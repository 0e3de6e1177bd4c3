"""LoRA through the command line: a chain of runs, resuming, and exports that transformers and peft load."""

from __future__ import annotations

import copy
import json
import logging
import signal

import pytest
import torch

from longrl.commands.export import family_of
from longrl.commands.main import main
from longrl.models.lora import is_adapter
from longrl.modules.initial_weights import build_from, plain_from
from tests.distributed import run_distributed
from tests.runs import checkpoint, config, metrics, run, run_in_child, text_config
from tests.test_resume import assert_same_end, dapo, killed, resume

LORA = {"rank": 4, "alpha": 8}
FIRST = {"class_path": "tests.runs.FirstWeights"}


def text_run(folder, *more, lora=LORA, **model):
    """Two SFT steps of a small text model with adapters, a large step each."""
    file = folder.parent / "rows.jsonl"
    rows = ({"problem": f"{n} + 1?", "reasoning": "I count.", "answer": str(n + 1)} for n in range(8))
    file.write_text("".join(json.dumps(record) + "\n" for record in rows))
    values = text_config(file)
    values["trainer"] |= {"max_steps": 2}
    values["trainer"]["callbacks"].append(FIRST)
    values["model"] |= {"optimizer": {"lr": 0.01}, **model}
    values["model"]["family"]["init_args"]["lora"] = lora
    return values


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    return run(folder, text_run(folder))


def first(folder):
    return {name.removeprefix("model."): value for name, value in torch.load(folder / "first.pt").items()}


def peft_merged(folder):
    """The oracle: peft merges the checkpoint's adapters into a stock model."""
    from tests.tiny import peft_model

    family = family_of(str(folder))
    model = build_from(family, None)
    saved = {name.removeprefix("model."): value for name, value in checkpoint(folder)["state_dict"].items()}
    model.load_state_dict(saved)
    return peft_model(model, family).merge_and_unload()


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# ---- chains ----


def test_a_run_with_adapters_says_what_they_are_and_moves_nothing_else(adapted):
    saved = checkpoint(adapted)
    assert saved["lora"] == {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": None}
    begun, ended = first(adapted), {name[6:]: value for name, value in saved["state_dict"].items()}
    moved = {name for name in begun if not torch.equal(begun[name], ended[name])}
    assert moved == {name for name in begun if is_adapter(name)}


@pytest.mark.parametrize("lora", [LORA, {"rank": 2, "target_modules": ["q_proj"]}, None], ids=["same", "other", "full"])
def test_a_run_begins_with_the_adapters_of_another_merged(tmp_path, adapted, lora):
    """So its reference, adapters off, is the policy it began with."""
    folder = tmp_path / "next"
    begun = first(run(folder, text_run(folder, lora=lora, init_from=str(adapted))))
    wanted = peft_merged(adapted).state_dict()
    assert_equal({name.replace(".base_layer", ""): v for name, v in begun.items() if not is_adapter(name)}, wanted)
    assert all(not value.any() for name, value in begun.items() if "lora_B" in name)
    trained = checkpoint(folder)["state_dict"]
    assert any(not torch.equal(value, begun[name.removeprefix("model.")]) for name, value in trained.items())


def test_adapters_begin_on_a_full_run(tmp_path):
    full, folder = tmp_path / "full", tmp_path / "lora"
    run(full, text_run(full, lora=None))
    begun = first(run(folder, text_run(folder, init_from=str(full))))
    wanted = {name.removeprefix("model."): value for name, value in checkpoint(full)["state_dict"].items()}
    assert_equal({name.replace(".base_layer", ""): v for name, v in begun.items() if not is_adapter(name)}, wanted)


def test_going_on_with_other_adapters_is_refused(tmp_path, adapted):
    values = text_run(tmp_path / "again", lora={"rank": 4, "alpha": 4})
    with pytest.raises(ValueError, match=r"lora must be the checkpoint's, which is .*alpha=8, .*model\.init_from"):
        run(tmp_path / "again", values, f"--ckpt_path={adapted / 'checkpoints' / 'last.ckpt'}")


# ---- resuming ----


def rl(**trainer):
    values = dapo(**trainer)
    values["model"]["family"]["init_args"]["lora"] = LORA
    values["model"]["optimizer"]["lr"] = 0.01
    return values


@pytest.fixture(scope="module")
def rl_reference(tmp_path_factory):
    folder = run(tmp_path_factory.mktemp("rl") / "run", rl())
    assert {name for _, name in metrics(folder) if "kl" in name}
    return folder


@pytest.mark.slow
def test_rl_with_adapters_killed_and_resumed_ends_bit_for_bit_the_same(tmp_path, rl_reference):
    folder = tmp_path / "run"
    for step, where in [(8, "saved"), (12, "saving")]:
        assert run_in_child(folder, killed(rl(), step, where), *resume(folder)) == -signal.SIGKILL
    run(folder, rl(), *resume(folder))
    assert_same_end(folder, rl_reference)


# ---- shards ----


def sharded(values):
    values = copy.deepcopy(values)
    strategy = {"class_path": "longrl.strategies.mr_sp.MRSPStrategy", "init_args": {"sequence_parallel_size": 2}}
    values["trainer"] |= {"devices": 2, "strategy": strategy}
    return values


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly_and_is_merged_and_exported(tmp_path):
    values = sharded(config("sft"))
    values["trainer"]["max_epochs"] = 1
    values["model"]["family"]["init_args"]["lora"] = LORA
    values["checkpoint"] = {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    folder, again = tmp_path / "run", tmp_path / "again"
    run_distributed(run, 2, folder, values)
    run_distributed(run, 2, again, values, f"--ckpt_path={folder / 'checkpoints' / 'step=3.ckpt'}")
    states = [plain_from(family_of(str(folder)), str(made)).state_dict() for made in (folder, again)]
    assert_equal(*states)
    begun = family_of(str(folder)).build().state_dict()
    assert not torch.equal(*(state["model.language_model.layers.0.mlp.up_proj.weight"] for state in (begun, states[0])))
    main(["export", "--run", str(folder), "--out", str(tmp_path / "adapter"), "--adapter", "true"])
    assert_adapter_is(tmp_path / "adapter", family_of(str(folder)).build(), states[0])


# ---- exports ----


def assert_adapter_is(folder, base, wanted):
    """peft, given the base and the folder, makes of them what our merging makes of the run."""
    from peft import PeftModel

    assert_equal(PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict(), wanted)


IDS = torch.arange(20)[None]


def logits(model):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_an_export_is_merged_and_loads_in_transformers(tmp_path, adapted):
    from transformers import AutoModelForCausalLM

    main(["export", "--run", str(adapted), "--out", str(tmp_path / "merged")])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    oracle = peft_merged(adapted)
    assert_equal(loaded.state_dict(), oracle.state_dict())
    assert torch.equal(logits(loaded), logits(oracle))


def test_an_export_in_float32_keeps_what_bfloat16_rounds_away(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    values = text_run(folder, optimizer={"lr": 1e-6})
    values["model"]["family"]["init_args"]["dtype"] = "bfloat16"
    run(folder, values)
    found = {}
    for dtype in ("bfloat16", "float32"):
        main(["export", "--run", str(folder), "--out", str(tmp_path / dtype), "--dtype", dtype])
        found[dtype] = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto").state_dict()
    base, name = family_of(str(folder)).build().state_dict(), "model.layers.0.mlp.up_proj.weight"
    saved = {name: v.float() for name, v in checkpoint(folder)["state_dict"].items() if "up_proj.lora" in name}
    a, b = (saved[f"model.model.layers.0.mlp.up_proj.lora_{matrix}.default.weight"] for matrix in "AB")
    assert torch.equal(found["float32"][name], base[name].float() + b @ a * 2.0)
    same = {dtype: (state[name].float() == base[name].float()).float().mean() for dtype, state in found.items()}
    assert same["bfloat16"] > 0.9
    assert same["float32"] < 0.1


def test_an_adapter_is_exported_for_peft(tmp_path, adapted):
    from peft import PeftModel

    out, family = tmp_path / "adapter", family_of(str(adapted))
    main(["export", "--run", str(adapted), "--out", str(out), "--adapter", "true"])
    written = {"adapter_config.json", "adapter_model.safetensors", "checksums.json"}
    assert {file.name for file in out.iterdir()} == written
    described = json.loads((out / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (4, 8)
    assert described["base_model_name_or_path"] == family.model_path
    policy = build_from(family, None)
    policy.load_state_dict({name[6:]: value for name, value in checkpoint(adapted)["state_dict"].items()})
    base = family.build()
    before = logits(base)
    found = logits(PeftModel.from_pretrained(base, out))
    assert torch.equal(found, logits(policy))
    assert not torch.allclose(found, before, atol=1e-3)


def test_an_adapter_on_another_runs_weights_says_so(tmp_path, adapted, caplog):
    folder = tmp_path / "next"
    run(folder, text_run(folder, init_from=str(adapted)))
    with caplog.at_level(logging.WARNING):
        main(["export", "--run", str(folder), "--out", str(tmp_path / "adapter"), "--adapter", "true"])
    assert f"belong to the weights of {adapted}, which is no Hugging Face folder; export it" in caplog.text
    base = plain_from(family_of(str(folder)), str(adapted))
    assert_adapter_is(tmp_path / "adapter", base, plain_from(family_of(str(folder)), str(folder)).state_dict())


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    folder = tmp_path / "full"
    run(folder, text_run(folder, lora=None))
    with pytest.raises(ValueError, match=r"--adapter=true needs a run with model\.family\.init_args\.lora"):
        main(["export", "--run", str(folder), "--out", str(tmp_path / "out"), "--adapter", "true"])
