"""Policies in this process: real engines on tiny models, killed at any moment, and the same answers as `test`."""

import dataclasses
import json
import random
import subprocess
import sys
import time

import pytest

from longrl.commands.evaluate import parse_evaluation
from longrl.commands.main import main
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.evaluation.answering import hash_json, make_portable, question_key
from longrl.evaluation.benchmark import Evaluation
from longrl.evaluation.local_policy import LocalPolicy, class_path, shown_name, weights_hash
from longrl.io.jsonl import read_jsonl
from longrl.models.lora import LoRASettings
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import Row
from tests.distributed import run_distributed
from tests.evaluation.scripted import questions
from tests.pipeline.running import join, kill, start_child
from tests.runs import ROOT, config, rollouts, run
from tests.tiny import vl_folder


def arguments(out, *more, engine=None, folder=None, **family):
    """4 questions on each of 2 videos, 3 in a batch; a random tiny Qwen2.5-VL on the CPU."""
    sizes = {"random_init": True, "min_pixels": 784, "max_pixels": 784}
    init_args = {"model": folder or vl_folder(), **sizes, **family}
    policy = {
        "class_path": "longrl.evaluation.local_policy.LocalPolicy",
        "init_args": {
            "family": {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": init_args},
            "device": "cpu",
            **({"engine": engine} if engine else {}),
        },
    }
    return [
        f"--policy={json.dumps(policy)}", f"--out={out}", f"--data.test={questions()}", "--data.video.fps=1.0",
        "--data.eval_prompts_per_batch=3", "--num_cards=0", "--sampling.max_completion_tokens=6", *more,
    ]  # fmt: skip


def evaluation(out, *more, **options):
    return Evaluation(*parse_evaluation(arguments(out, *more, **options)))


def said(folder):
    return {line["id"]: line["resps"][0] for line in read_jsonl(folder / "samples.jsonl")}


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_answers_are_those_of_test(tmp_path, shuffled):
    names = ("run/test", "evaluate")
    values = config("rl")
    report = {"class_path": "longrl.callbacks.evaluation.EvaluationReport"}
    sampling = {"num_generations": 2, "max_completion_tokens": 6, "temperature": 1.0}
    values["trainer"]["callbacks"] = [report]
    values["rollout"] = rollouts(sampling=sampling, eval_sampling=sampling)
    values["data"] |= {"test": str(questions()), "eval_prompts_per_batch": 3, "train": None}
    values["data"]["shuffle_frames"] = shuffled
    values["model"]["family"]["init_args"]["model"] = vl_folder()
    run_test(tmp_path / "run", values)
    options = ("--sampling.temperature=1.0", "--sampling.num_generations=2", f"--data.shuffle_frames={shuffled}")
    evaluation(tmp_path / "evaluate", *options).run()
    assert len({text for texts in said(tmp_path / "run" / "test").values() for text in texts}) == 16
    of_test, of_evaluate = (json.loads((tmp_path / name / "results.json").read_text()) for name in names)
    assert of_test["conditions"] == of_evaluate["conditions"]
    assert list(of_test["conditions"]) == ["video, shuffled" if shuffled else "video"]
    for name in ("sampling", "seed", "questions"):
        assert of_test[name] == of_evaluate[name]
    for name in ("family", "settings", "engine", "versions"):
        assert of_test["policy"][name] == of_evaluate["policy"][name]
    lines, others = (read_jsonl(tmp_path / name / "samples.jsonl") for name in names)
    of_reward_or_weights = {"rewards", "reward", "weights", "model"}
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        assert {name for name in line if line[name] != other[name]} <= of_reward_or_weights
    assert (tmp_path / "run" / "test" / "report.html").is_file()


def run_test(folder, values):
    from tests.runs import arguments as of_run

    main(of_run(folder, values, "--base_weights=true", command="test"))


def test_a_sample_line_counts_tokens_and_names_the_weights(tmp_path):
    made = evaluation(tmp_path)
    made.run()
    first = read_jsonl(tmp_path / "samples.jsonl")[0]
    assert first["num_frames"] == len(first["frame_indices"][0]) >= 8
    cells = -(-first["num_frames"] // 2)
    assert first["num_media_tokens"] == cells  # 28 x 28 pixels, one token per cell
    assert first["num_prompt_tokens"] > first["num_media_tokens"]
    assert "pad" not in first["input"]
    assert first["weights"] == weights_hash(made.config.policy.model)
    assert first["finish_reason"] == first["finish_reason_of_engine"]


def test_a_video_is_encoded_once_for_all_its_questions(tmp_path):
    made = evaluation(tmp_path)
    results = made.run().results
    assert made.config.policy.features.num_encoded == 2

    # The first question about a video pays for it, and each is said to cost as much by itself.
    alone = [line["costs"]["encode_flops"] for line in read_jsonl(tmp_path / "samples.jsonl")]
    timings = read_jsonl(tmp_path / "timings.jsonl")
    spent = [line["encode_spent_flops"] for line in timings]
    assert spent == [alone[0], 0, 0, 0, alone[4], 0, 0, 0]
    costs = results["conditions"]["video"]["costs"]
    assert costs["encode_flops"] == {"mean": sum(alone) / 8, "total": sum(alone), "n": 8}
    assert costs["prefill_flops"]["mean"] > 0
    assert costs["generate_flops"]["mean"] > 0
    assert all(line["decode_s"] >= line["decode_spent_s"] >= 0 for line in timings)


def test_what_is_lost_on_shuffled_frames_is_told_by_category(tmp_path):
    made = evaluation(tmp_path, "--shuffled_baseline=true", "--sampling.temperature=1.0")
    results = made.run().results
    assert made.config.policy.features.num_encoded == 2, "shuffled frames are features in other rows"
    ordered, shuffled = (results["conditions"][name] for name in ("video", "video, shuffled"))
    assert "shuffle_frames" not in ordered["reading"], "answers stored before there was such an option are found"
    assert shuffled["reading"] == ordered["reading"] | {"shuffle_frames": True}
    lost = ordered["over_shuffled"]
    assert list(lost) == list(ordered["scores"])
    assert (lost["overall"]["n"], lost["temporal"]["n"]) == (8, 2)
    for name, score in ordered["scores"].items():
        difference = score["accuracy"] - shuffled["scores"][name]["accuracy"]
        assert lost[name]["difference"] == pytest.approx(difference)
    by_condition = {}
    for line in read_jsonl(tmp_path / "samples.jsonl"):
        by_condition.setdefault(line["condition"], []).append(line)
    pairs = list(zip(*by_condition.values(), strict=True))
    assert all(one["input"] == other["input"] for one, other in pairs)
    assert all(one["prompt_hash"] != other["prompt_hash"] for one, other in pairs)
    assert "strict minus shuffled frames, in points, temporal" in (tmp_path / "report.html").read_text()


def test_stored_features_are_neither_decoded_nor_encoded_again(tmp_path, monkeypatch):
    def with_cache(out, seed):
        made = evaluation(out, f"--seed={seed}", "--sampling.temperature=1.0")
        policy = LocalPolicy(made.config.policy.family, device="cpu", feature_cache_dir=str(tmp_path / "features"))
        made.config = dataclasses.replace(made.config, policy=policy)
        return made

    first = with_cache(tmp_path / "a", 0)
    wanted = first.run().results
    assert first.config.policy.features.num_encoded == 2
    monkeypatch.setattr("longrl.datamodules.media.video.VideoReader.chunks", None)
    second = with_cache(tmp_path / "b", 0)
    assert second.run().results == wanted
    assert second.config.policy.features.num_encoded == 0
    for line in read_jsonl(tmp_path / "b" / "timings.jsonl"):
        assert (line["decode_s"], line["decode_spent_s"], line["encode_spent_flops"]) == (None, 0, 0)
    assert said(tmp_path / "a") == said(tmp_path / "b")


def test_several_processes_share_the_questions_and_one_reports(tmp_path, monkeypatch):
    whole = evaluated(tmp_path / "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert evaluated(tmp_path / "shared") is None
    assert not (tmp_path / "shared" / "results.json").exists()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    last = evaluation(tmp_path / "shared")
    last.config.policy.answer = None  # nothing is left to ask
    assert last.run().results == whole
    assert len(list((tmp_path / "shared" / "answers").iterdir())) == 2


def test_other_weights_are_asked_anew_and_never_mixed(tmp_path):
    first = evaluation(tmp_path).run().results
    (tmp_path / "results.json").unlink()
    second = evaluation(tmp_path, init_seed=1).run().results
    assert first["policy"]["weights"] != second["policy"]["weights"]
    lines = [json.loads(line) for path in (tmp_path / "answers").glob("*") for line in path.open()]
    assert sum(len(line["answers"]) for line in lines) == 16
    (tmp_path / "results.json").unlink()
    again = evaluation(tmp_path)
    again.config.policy.answer = None  # nothing is left to ask
    assert again.run().results == first


def test_answers_of_an_engine_with_other_options_are_not_taken(tmp_path):
    def with_options(**init_args):
        engine = {"class_path": "longrl.engines.hf.HFEngine", "init_args": init_args}
        return evaluation(tmp_path, "--data.max_eval_rows=1", engine=engine)

    first = with_options(prefill_chunk_tokens=8).run().results
    assert first["policy"]["engine_options"] == {"prefill_chunk_tokens": 8}
    again = with_options(prefill_chunk_tokens=8, max_sequences=3)
    again.config.policy.answer = None  # nothing is left to ask
    assert again.run().results == first
    with pytest.raises(ValueError, match=r"policy\.engine_options\.prefill_chunk_tokens was 8, is 16"):
        with_options(prefill_chunk_tokens=16).run()
    (tmp_path / "results.json").unlink()
    with_options(prefill_chunk_tokens=16).run()
    lines = [json.loads(line) for path in (tmp_path / "answers").glob("*") for line in path.open()]
    assert sum(len(line["answers"]) for line in lines) == 2


@pytest.mark.parametrize(
    ("engine", "stored"),
    [
        (HFEngine(), "longrl.rollout.engine.HFEngine"),
        (VLLMEngine(sleep=False), "longrl.rollout.vllm_engine.VLLMEngine"),
        (VLLMServerEngine("http://127.0.0.1:8000"), "longrl.rollout.vllm_server.VLLMServerEngine"),
    ],
)
def test_engines_have_the_names_of_the_first_release_in_stored_answers(engine, stored):
    assert class_path(engine) == stored


def test_an_evaluation_that_the_first_release_began_goes_on(tmp_path):
    """What is part of keys and of results.json has the form it had in 0.1.0."""
    found = evaluation(tmp_path, "--data.max_eval_rows=1").run().results["policy"]
    assert {name: value for name, value in found.items() if name not in ("weights", "versions", "model")} == {
        "family": "longrl.models.qwen_vl.Qwen2_5_VLFamily",
        "settings": {
            "dtype": "float32", "chat_template_kwargs": {}, "min_pixels": 784, "max_pixels": 784,
            "max_video_pixels": 115_200 * 784, "max_video_tokens": None, "max_patches_per_encode": 1 << 16,
            "chat_template": found["settings"]["chat_template"],
        },
        "revision": None,
        "engine": "longrl.rollout.engine.HFEngine",
        "engine_options": {"prefill_chunk_tokens": 16384},
    }  # fmt: skip


def test_options_of_vllm_that_may_change_answers_tell_engines_apart(tmp_path):
    """Such as further arguments of `vllm.LLM`, in which a folder goes by its name."""
    options = {"quantization": "fp8", "speculative_config": {"model": str(tmp_path / "draft")}}
    engine = VLLMEngine(max_num_seqs=4, sleep=False, tensor_parallel_size=2, options=options)
    assert make_portable(engine.identity()) == {
        "max_model_len": 32_768, "enforce_eager": False, "tensor_parallel_size": 2,
        "options": {"quantization": "fp8", "speculative_config": {"model": "draft"}},
    }  # fmt: skip
    assert VLLMServerEngine("http://127.0.0.1:8000").identity() == {}


class OwnFamily(Qwen2_5_VLFamily):
    """A family out of tree, which keeps whatever it likes."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.helper = object()


def first_key(**options):
    """Key of the first question, asked of a family of one's own."""
    family = OwnFamily(str(ROOT / "configs" / "demo" / "base"), **options)
    row = Row("1", "Which?\nA. x\nB. y", "A")
    renderer = RowRenderer(family, VideoSampling())
    identity = {"family": make_portable(family.identity()), "reading": make_portable(renderer.identity())}
    return question_key(row, identity, renderer)


def test_a_family_of_ones_own_has_the_same_keys_in_every_process():
    code = "from tests.evaluation.test_local_policy import first_key; print(first_key())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == first_key()


def test_options_of_training_alone_leave_stored_answers_valid():
    training = {
        "gradient_checkpointing": True, "freeze_vision_encoder": False, "lora": LoRASettings(rank=2),
        "mlp_chunk_tokens": 64, "init_seed": 7,
    }  # fmt: skip
    assert first_key(**training) == first_key()
    assert first_key(min_pixels=784) != first_key()


def test_the_identity_of_what_is_asked_is_plain_values():
    with pytest.raises(TypeError, match="not JSON serializable"):
        hash_json({"helper": object()})


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_a_random_moment_it_goes_on_to_the_same_bytes(tmp_path, seed):
    options = ("--sampling.temperature=1.0", "--sampling.num_generations=2", "--blind_baseline=true")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    assert join(start_child(["evaluate", *arguments(whole, *options)])) == 0
    took = time.monotonic() - start
    draw, status = random.Random(seed), None
    for _ in range(10):
        child = start_child(["evaluate", *arguments(killed, *options)])
        time.sleep(draw.uniform(0.3, 0.95) * took)
        kill(child)
        status = join(child)
        if status == 0:
            break
    if status != 0:
        assert join(start_child(["evaluate", *arguments(killed, *options)])) == 0
    keys = [key for path in (killed / "answers").glob("*") for line in whole_lines(path) for key in line["answers"]]
    assert len(keys) == len(set(keys)) == 16
    for name in ("results.json", "samples.jsonl", "report.html"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()


def whole_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def test_a_run_is_known_by_its_name_and_a_hub_model_by_its_id(tmp_path):
    last = tmp_path / "demo" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert shown_name(str(last)) == "demo"
    assert shown_name(str(tmp_path / "demo")) == "demo"
    assert shown_name("Qwen/Qwen2.5-VL-7B-Instruct") == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_weights_of_a_run_are_read_as_init_from_reads_them(tmp_path):
    from longrl.modules.initial_weights import plain_from
    from tests.tiny import vl_family

    values = config("sft")
    values["trainer"]["max_steps"] = 2
    run(tmp_path / "run", values)
    policy = LocalPolicy(vl_family(), weights=str(tmp_path / "run"), device="cpu")
    policy.prepare(tmp_path)
    assert policy.identity()["weights"] == weights_hash(plain_from(vl_family(), str(tmp_path / "run")))
    assert policy.identity()["model"] == "run"
    assert policy.identity()["weights"] != weights_hash(plain_from(vl_family(), None))


def test_weights_that_are_not_there_are_told_by_the_option_that_names_them(tmp_path):
    nowhere = str(tmp_path / "nothere.ckpt")
    with pytest.raises(ValueError, match=r"^--policy\.init_args\.weights='\S+' does not exist; give a checkpoint file"):
        evaluation(tmp_path / "out", f"--policy.init_args.weights={nowhere}").run()


VLLM = {
    "class_path": "longrl.engines.vllm.VLLMEngine",
    "init_args": {
        "max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 0.0625, "enforce_eager": True,
        "options": {"block_size": 32},
    },
}  # fmt: skip


def evaluated(*args, **options):
    files = evaluation(*args, **options).run()
    return files and files.results


def describing(out, engine=None):
    """The demo's base model describes what it sees, so that its greedy answers tell videos and frames apart."""
    asked = ("--data.question_template={problem}", "--sampling.max_completion_tokens=24", "--frames=[4,8]")
    options = {"random_init": False, "min_pixels": 3136, "max_pixels": 3136}
    folder = str(ROOT / "configs" / "demo" / "base")
    return evaluated(out, *asked, "--blind_baseline=true", engine=engine, folder=folder, **options)


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_answers_as_transformers_do(tmp_path):
    pytest.importorskip("vllm")
    (results,) = run_distributed(describing, 1, tmp_path / "vllm", VLLM)
    plain = describing(tmp_path / "hf")
    found = read_jsonl(tmp_path / "vllm" / "samples.jsonl")
    answers = [[line["condition"], line["id"], line["resps"]] for line in found]
    assert answers == [
        [line["condition"], line["id"], line["resps"]] for line in read_jsonl(tmp_path / "hf" / "samples.jsonl")
    ]
    assert len({str(resps) for _, _, resps in answers}) > 4
    assert results["conditions"] == plain["conditions"]
    assert results["policy"]["versions"]["vllm"]
