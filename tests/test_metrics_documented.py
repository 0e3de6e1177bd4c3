"""docs/metrics.md names what a run logs: no more, no less."""

import re

import pytest

from tests.runs import ROOT, config, rollouts, run
from tests.tiny import qwen3_vl_folder

NOT_HERE = {"throughput/mfu", "train/grad_norm_lm_head"}
"""Of known devices alone, and of an LM head with weights of its own, which the tiny model does not have."""
NOT_HERE |= {f"rollout/{name}" for name in ("staleness_mean", "staleness_max", "staleness_share_D", "cut_share")}
NOT_HERE |= {"train/mismatch_mean_staleness_D"}  # of rollouts beside the updates
NOT_HERE |= {"rollout/repeated", "rollout/servers_lost"}  # of servers
NOT_HERE |= {
    "data/weight_SOURCE",
    "data/progress_SOURCE",
    "data/num_frames",
}  # of mixes, and of a fixed number of frames
NOT_HERE |= {"data/videos_decoded_on_cpu", "data/frames_decoded_on_cpu"}  # of decoding on GPUs


NAME = re.compile(r"`((?:train|reward|rollout|data|time|memory|throughput)/\w+)`")


def documented() -> set[str]:
    """Names in the first cells of the page's tables."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if line.startswith("| `") and "/" in line.split("|")[1]:
            names |= set(
                re.findall(r"`((?:train|reward|rollout|data|time|memory|throughput)/\w+)`", line.split("|")[1])
            )
    return names


OF_PAIRS = {
    f"train/{name}"
    for name in (
        "preference_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected",
        "loss_preference", "loss_quality", "loss_generation", "reward_shift",
    )
}  # fmt: skip
"""Of `data.stage: preference`: tests/test_preference_runs.py."""
OF_DRIVER = {
    f"rollout/{name}"
    for name in ("groups_ready", "prompts_in_flight", "asked_again", "dropped", "engine_busy", "engine_requests")
}
"""Of rollouts over several updates, whose engine is a server."""


def logged(folder) -> set[str]:
    header = (folder / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    return set(header.split(",")) - {"step", "epoch"}


def rl(tmp_path, **family):
    """Two steps, each with a checkpoint: a KL coefficient that moves, an entropy bonus, and a reward of two parts."""
    values = config("rl", **family)
    terms = [{"function": "tests.runs.rare", "name": name} for name in ("accuracy", "format")]
    values["rollout"] = rollouts() | {"reward": {"terms": terms}}
    values["trainer"] |= {"max_steps": 2}
    values["checkpoint"] = {"every_n_train_steps": 1}
    values["model"]["algorithm"] = {"kl_coef": 0.1, "kl_control": {"target": 0.1}, "entropy_coef": 0.01}
    return values


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Of a run whose encoder trains, of one with features on disk, tools and a teacher, of SFT, and of a mixture."""
    folder = tmp_path_factory.mktemp("runs")
    signals = rl(folder, freeze_vision_encoder=False)
    signals["rollout"]["frame_order"] = {"bonus": 0.3}
    signals["model"]["consistency"] = {"bonus": 0.5}
    trained = run(folder / "trained", signals)
    cached = rl(folder)
    cached["model"]["feature_cache_dir"] = str(folder / "features")
    cached["model"]["max_tokens_per_micro_batch"] = 4000
    cached["model"]["algorithm"]["advantage"] = "longrl.algorithms.part_normalized"
    cached["rollout"]["engine"] = {"class_path": "tests.environment_runs.ShortTurns"}
    cached["rollout"]["environment"] = {
        "make": "tests.environment_runs.Clips",
        "max_observed_tokens": 200,
        "num_workers": 1,
    }
    family = dict(cached["model"]["family"]["init_args"], init_seed=4)
    of_teacher = {"class_path": cached["model"]["family"]["class_path"], "init_args": family}
    cached["model"]["teacher"] = {
        "class_path": "longrl.modules.local_teacher.LocalTeacher",
        "init_args": {"family": of_teacher},
    }
    cached["data"]["curriculum"] = {
        "pass_rates": {"low": 0.1},
        "video": {"max_frames": {"steps": [0], "values": [8]}, "fps": {"steps": [0], "values": [1.0]}},
    }
    cached["rollout"]["length_schedule"] = {"steps": [0], "values": [5]}
    kept = run(folder / "cached", cached)
    sft = config("sft")
    sft["trainer"] |= {"max_steps": 1}
    mixture = rl(folder)
    sizes = {"random_init": True, "min_pixels": 1024, "max_pixels": 1024}
    mixture["model"]["family"] = {
        "class_path": "longrl.models.qwen3_vl.Qwen3VLFamily",
        "init_args": {"model": qwen3_vl_folder(experts=True), **sizes},
    }
    mixture["rollout"]["router_replay"] = True
    mixture["model"]["algorithm"]["top_entropy_share"] = 0.5
    experts = run(folder / "experts", mixture)
    return logged(trained), logged(kept), logged(run(folder / "sft", sft)), logged(experts)


def test_an_rl_run_logs_exactly_the_documented_names(names):
    trained, cached, _, experts = names
    wanted = documented() - NOT_HERE - OF_DRIVER - OF_PAIRS - {"reward/NAME"} | {"reward/accuracy", "reward/format"}
    assert trained | cached | experts == wanted


def test_what_a_name_depends_on_is_documented(names):
    trained, cached, sft, experts = names
    of_cache = {name for name in documented() if "feature" in name}
    of_tools = {"rollout/turns", "rollout/observed_tokens", "throughput/media_shown_encoded"}
    of_tools |= {name for name in documented() if "tool" in name}
    of_teacher = {name for name in documented() if "teacher" in name}
    of_tools |= {name for name in documented() - NOT_HERE if name.startswith("data/")}
    of_encoder = {"train/grad_norm_vision_encoder", "train/grad_norm_projector"}
    assert cached - trained == of_cache - {"throughput/feature_hit_rate"} | of_tools | of_teacher
    of_signals = {"reward/order", "rollout/accuracy_in_order", "rollout/accuracy_shuffled"}
    of_signals |= {"train/answer_likelihood", "train/consistent_share"}
    assert trained - cached == of_encoder | of_signals
    of_experts = {name for name in documented() if "expert" in name or "router" in name}
    of_top_entropy = {"train/entropy_threshold", "train/high_entropy_share"}
    assert experts - trained == of_experts | of_top_entropy
    assert sft < documented()
    assert {"train/loss", "train/grad_norm_language_model", "time/step", "memory/update"} < sft
    assert not any(name.startswith(("rollout/", "reward/")) for name in sft)
