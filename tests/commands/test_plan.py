"""`python -m longrl plan` on the shipped recipes and on a tiny model's folder."""

import json
from types import SimpleNamespace

import pytest
import torch

from longrl.commands.main import main
from longrl.commands.run_parts import RunParts
from longrl.strategies.mr_sp import MRSPStrategy
from tests.runs import ROOT
from tests.tiny import vl_folder

VIDEO = str(ROOT / "configs" / "qwen2_5_vl_7b_longvideo_grpo.yaml")


ENGINES = ROOT / "configs" / "rollout"
BY_TRAINER = f"--rollout.engine={ENGINES / 'hf.yaml'}"


def plan(tmp_path, *args, devices="--devices=8"):
    (tmp_path / "plan.json").unlink(missing_ok=True)
    main(["plan", "--config", VIDEO, "--json", str(tmp_path / "plan.json"), *([devices] if devices else []), *args])
    return json.loads((tmp_path / "plan.json").read_text())


def test_a_recipe_is_planned_without_weights_and_later_options_win(tmp_path, capsys):
    found = plan(tmp_path, "--hardware=A100", "--frames=128", "--data.prompts_per_batch=4")
    assert found["plan"]["prompts_per_batch"] == 4
    assert found["plan"]["num_generations"] == 8
    assert found["plan"]["reference"]
    assert found["fits"]
    assert {row["nodes"] for row in found["grid"]} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert set(found["bytes_per_device"]) == {"encode", "sync", "generate", "update", "validate", "score"}
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == found["verdict"]
    assert found["verdict"].startswith("fits: needs ")


@pytest.mark.parametrize(
    ("args", "devices"),
    [
        ([], 1),  # one H100 was planned as a node of eight
        (["--trainer.devices=4"], 4),
        (["--trainer.devices=[0,3]"], 2),
        (["--trainer.devices=2", "--trainer.num_nodes=3"], 6),
        (["--trainer.devices=auto"], 8),
        (["--trainer.devices=4", "--devices=2"], 2),
    ],
)
def test_the_devices_are_those_of_the_config_unless_given(tmp_path, args, devices):
    assert plan(tmp_path, *args, devices=None)["plan"]["devices"] == devices


def test_vllm_takes_its_share_of_the_whole_gpu(tmp_path):
    found = plan(tmp_path, devices=None)
    by_phase = found["bytes_per_device"]
    share = 0.35 * found["hardware"]["memory_gib"] * 2**30
    assert by_phase["generate"]["vLLM"] == by_phase["validate"]["vLLM"] == pytest.approx(share)
    assert by_phase["update"]["vLLM"] == by_phase["encode"]["vLLM"] < 0.1 * share  # asleep
    assert by_phase["sync"]["vLLM"] > 14 * 2**30  # its weights, before its cache
    assert found["fits"]
    larger = plan(tmp_path, "--rollout.engine.init_args.gpu_memory_utilization=0.6", devices=None)
    assert larger["verdict"].startswith("does not fit: needs ")
    assert larger["verdict"].endswith("remedy: rollout.engine.init_args.gpu_memory_utilization=0.26")
    smaller = plan(tmp_path, "--rollout.engine.init_args.gpu_memory_utilization=0.2", devices=None)
    assert "for keys and values of 21504 tokens" in smaller["verdict"]
    assert smaller["verdict"].endswith("remedy: rollout.engine.init_args.gpu_memory_utilization=0.26")


def test_completions_of_a_server_cost_its_devices_nothing(tmp_path):
    server = "--rollout.engine=longrl.engines.server.VLLMServerEngine", "--rollout.engine.urls=http://127.0.0.1:8000"
    found = plan(tmp_path, *server, devices=None)
    assert set(found["bytes_per_device"]) == {"encode", "sync", "update", "validate", "score"}
    assert found["times_s"]["prefill"] == found["times_s"]["decode"] == 0


def test_an_environment_is_planned_at_its_limits_and_the_plan_says_so(tmp_path, capsys):
    tools = "--rollout.environment.make=longrl.environments.calculator.Calculator"
    usual = plan(tmp_path, BY_TRAINER, devices=None)
    shown = plan(tmp_path, BY_TRAINER, tools, "--rollout.environment.max_observed_tokens=3000", devices=None)
    more = shown["plan"]["completion_tokens"] - usual["plan"]["completion_tokens"]
    assert more == shown["plan"]["observed_tokens"] == 3000
    for phase in ("encode", "update"):
        assert shown["operations"][phase] > usual["operations"][phase]
    assert shown["operations"]["prefill"] == usual["operations"]["prefill"]
    assert any("planned with all 3000 tokens of max_observed_tokens, all of them features" in a for a in shown["notes"])
    assert "(3000 of them shown)" in capsys.readouterr().out


def test_launching_kernels_takes_time(tmp_path):
    slow, fast = (plan(tmp_path, BY_TRAINER, f"--launch_us={us}", devices=None)["times_s"] for us in (20, 0))
    assert slow["decode"] > fast["decode"]
    rounds, tokens, layers, kernels = 8, 1024, 28, 65  # 2 of 16 prompts together
    assert slow["decode"] == pytest.approx(rounds * tokens * layers * kernels * 20e-6)


def test_too_long_a_video_gets_a_remedy_and_notes(tmp_path):
    pixels = "--model.family.init_args.max_pixels=112896", "--model.family.init_args.max_video_pixels=406425600"
    pixels = BY_TRAINER, *pixels
    found = plan(tmp_path, "--frames=3600", "--frame_size=720x720", "--data.prompts_per_batch=1", *pixels)
    assert not found["fits"]
    assert found["verdict"].endswith("remedy: trainer.strategy.init_args.sequence_parallel_size=4")
    assert any("model.max_tokens_per_micro_batch=267904" in note for note in found["notes"])
    assert any("data.max_prompt_tokens=20480 would skip" in note for note in found["notes"])
    eight = plan(tmp_path, "--frames=3600", "--frame_size=720x720", "--data.prompts_per_batch=1", "--sp=8", *pixels)
    assert eight["fits"]
    assert any(note.startswith("28 query and 4 key heads on 8 ranks work") for note in eight["notes"])


def test_vila_is_planned_from_its_shipped_config(tmp_path):
    """64 times 256 features of 256 frames pooled by 4; 1024 patches of a frame go through the encoder."""
    recipe = str(ROOT / "configs" / "longvila_7b_longvideo_grpo.yaml")
    found = plan(tmp_path, "--config", recipe, "--frames=256", "--hardware=H200")
    assert found["plan"]["media_tokens"] == 64 * 256
    assert found["plan"]["spatial_patches"] == 4 * 1024
    assert found["sizes"]["vision_encoder"]["merge"] == pytest.approx(4)
    assert found["plan"]["pooled_frames"] == 4
    assert found["fits"]
    longer = plan(tmp_path, "--config", recipe, "--frames=512", "--hardware=H200")["plan"]
    assert (longer["media_tokens"], longer["spatial_patches"], longer["pooled_frames"]) == (64 * 256, 8 * 1024, 8)


def test_fewer_tokens_are_planned_as_many(tmp_path):
    """256 frames of 16 x 30 patches: an eighth by pooling, the encoder reading all; or a number of its own."""

    def planned(**options):
        given = [f"--model.family.init_args.{name}={value}" for name, value in options.items()]
        return plan(tmp_path, "--frames=256", "--frame_size=640x360", *given)

    plain, pooled = planned()["plan"], planned(temporal_pool=2, spatial_pool=2)["plan"]
    assert plain["media_tokens"] == 128 * 8 * 15
    assert pooled["media_tokens"] == 64 * 4 * 8
    assert pooled["encoded_patches"] == plain["encoded_patches"] == 128 * 16 * 30
    assert pooled["cell_patches"] == 2 * plain["cell_patches"] == 2 * 16 * 30
    kept = planned(max_kept_tokens=4000)
    assert 3800 < kept["plan"]["media_tokens"] <= 4000
    assert kept["largest_frames"] > 256, "longer ones that the budget cannot hold end the search, not the plan"


def test_the_strategy_of_the_config_counts(tmp_path):
    strategy = {
        "class_path": "longrl.strategies.mr_sp.MRSPStrategy",
        "init_args": {"sequence_parallel_size": 4, "sharding": {"offload": True, "compute_dtype": "bfloat16"}},
    }
    tiny = f"--model.family.init_args.model={vl_folder()}", "--model.family.init_args.dtype=float32"
    found = plan(tmp_path, "--frames=16", f"--trainer.strategy={json.dumps(strategy)}", *tiny)["plan"]
    assert (found["sequence_parallel_size"], found["offload"]) == (4, True)
    assert (found["weight_bytes"], found["gathered_bytes"]) == (4, 2)


def test_sizes_that_do_not_divide_are_an_error_before_anything_is_counted(tmp_path):
    with pytest.raises(ValueError, match=r"sequence_parallel_size=3 must divide the 8 devices"):
        plan(tmp_path, "--sp=3")


def test_a_run_says_before_it_starts_what_will_not_fit(tmp_path, monkeypatch, caplog):
    """The same model, asked by `fit` for the GPU that is there."""
    tiny = f"--model.family.init_args.model={vl_folder()}"
    cli = RunParts("plan", ["--config", VIDEO, tiny])
    monkeypatch.setattr(MRSPStrategy, "root_device", torch.device("cuda"))
    cli.trainer = SimpleNamespace(strategy=MRSPStrategy(), is_global_zero=True, num_devices=2)
    for gib, fits in ((64, True), (1, False)):
        caplog.clear()
        here = SimpleNamespace(total_memory=gib << 30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, here=here: here)
        cli.before_fit()
        assert ("does not fit: needs" in caplog.text) is not fits


@pytest.mark.parametrize(
    ("recipe", "devices", "gib"),
    [("qwen2_5_vl_3b_hour_grpo", 8, 50), ("qwen2_5_vl_7b_hour_grpo", 8, 70), ("qwen2_5_vl_3b_hour_grpo_lora", 1, 60)],
)
def test_an_hour_fits_the_hardware_that_its_recipe_names(tmp_path, recipe, devices, gib):
    file = ROOT / "configs" / f"{recipe}.yaml"
    main(["plan", "--config", str(file), "--json", str(tmp_path / "plan.json")])
    found = json.loads((tmp_path / "plan.json").read_text())
    assert (found["plan"]["frames"], found["plan"]["media_tokens"]) == (3600, 259_200)
    assert found["plan"]["sequence_parallel_size"] == devices
    assert found["verdict"].startswith("fits: needs ")
    assert max(sum(parts.values()) for parts in found["bytes_per_device"].values()) < gib * 2**30
    assert not [note for note in found["notes"] if "planned with it" in note or "would skip" in note]


def test_what_waits_in_host_memory_and_mlps_in_pieces_count(tmp_path):
    family = "--model.family.init_args"
    options = f"{family}.offload_checkpoints=true", f"{family}.mlp_chunk_tokens=512", "--model.optimizer.offload=true"
    size = "--hardware=A100", "--frames=128", "--data.prompts_per_batch=4", BY_TRAINER
    plain, found = plan(tmp_path, *size, "--model.optimizer.offload=false"), plan(tmp_path, *size, *options)
    assert found["plan"]["offload_checkpoints"]
    assert (found["plan"]["mlp_chunk_tokens"], found["plan"]["optimizer_offload"]) == (512, True)
    assert found["host_bytes_per_node"]["offloaded"] > plain["host_bytes_per_node"]["offloaded"] == 0
    assert found["times_s"]["update"] > plain["times_s"]["update"]
    for phase in ("rollout", "update"):
        assert found["bytes_per_device"][phase]["activations"] < plain["bytes_per_device"][phase]["activations"]
