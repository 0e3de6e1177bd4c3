"""Every YAML of configs/ as the command line reads it: nothing is downloaded, and recipes train tiny models."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from longrl import algorithms, rewards
from longrl.algorithms import Algorithm, Constant, Preference
from longrl.callbacks.frame_order import check_frame_order
from longrl.callbacks.rollout import RolloutCallback
from longrl.commands.diffusion import DiffusionCLI
from longrl.commands.evaluate import parse_evaluation
from longrl.commands.trainer import LongRLCLI
from longrl.datamodules.loading.curriculum import Curriculum
from longrl.datamodules.loading.mixing import DataSource
from longrl.datamodules.longvideo_reason import DEFAULT_ROW_FUNCTION
from longrl.datamodules.selection import FrameSelection
from longrl.diffusion.diffusion_family import DiffusionFamily
from longrl.diffusion.prompt_files import PromptFiles
from longrl.engines.rollout_engine import RolloutEngine
from longrl.engines.server import VLLMServerEngine
from longrl.environments.settings import EnvironmentSettings
from longrl.evaluation.alert_rules import RULES
from longrl.evaluation.benchmark import Evaluation
from longrl.evaluation.published_figures import read_benchmark
from longrl.io.jsonl import read_jsonl
from longrl.models.base import CausalFamily
from longrl.modules.moving_reference import check_reference
from longrl.rewards import RewardSum, SoftOverlong
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from tests.distributed import run_distributed
from tests.sounds import write_clip
from tests.tiny import (
    internvl_folder,
    omni_folder,
    qwen3_5_folder,
    qwen3_vl_folder,
    text_folder,
    vila_folder,
    vl_folder,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
]
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.y*ml"))
FLOW_NAMES = ("*_flow_grpo.yaml", "*_diffusion_*.yaml", "demo/flow/*.yaml")
FLOW = sorted(path for pattern in FLOW_NAMES for path in CONFIGS.glob(pattern))
"""Recipes and demos of pictures and videos: tests/diffusion/test_flow_configs.py."""
RECIPES = sorted(path for path in CONFIGS.glob("*.yaml") if path not in FLOW)
DEMO = sorted(
    path
    for folder in ("demo", "demo/distil", "demo/qwen3_5", "demo/tools")
    for path in CONFIGS.glob(f"{folder}/*.yaml")
)
EVALUATIONS = sorted(CONFIGS.glob("eval/*.yaml"))
BY_RECORDS = {
    "activitynet_qa", "cg_bench", "charades_sta", "mmvu", "timelens", "video_mmmu", "vsi_bench", "ego_schema",
    "ego_schema_full", "longvideobench", "lvbench", "mlvu", "mlvu_generation", "mvbench", "temp_compass",
    "temp_compass_captioning", "video_holmes", "video_mme_v2", "video_mme_v2_subtitles",
}  # fmt: skip
"""Evaluations that tests/evaluation/test_benchmark_sets.py and test_long_video_presets.py ask, by records of their own
form."""
KINDS = (
    "algorithm", "async", "curriculum", "data", "environment", "family", "policy", "preference", "published", "reward",
    "rollout", "selection", "signals", "trainer",
)  # fmt: skip
PIECES = {kind: sorted(CONFIGS.glob(f"{kind}/*.yaml")) for kind in KINDS}
FLOW_FAMILIES = [path for path in PIECES["family"] if path.stem.startswith(("sd3", "wan"))]
PROMPT_FILES = [path for path in PIECES["data"] if path.stem in ("geneval", "ocr_prompts", "prompts")]
"""Data pieces of `PromptFiles`; the others are of `LongVideoReason`."""
TYPES = {
    "algorithm": Algorithm, "curriculum": Curriculum, "environment": EnvironmentSettings, "family": CausalFamily,
    "preference": Preference, "reward": RewardSum, "rollout": RolloutEngine, "selection": FrameSelection,
}  # fmt: skip
"""Of the pieces that are values; the others are groups of options."""
ON_CPU = f"--trainer={CONFIGS / 'trainer' / 'cpu.yaml'}"
BY_TRAINER = f"--rollout.engine={CONFIGS / 'rollout' / 'hf.yaml'}"
TEXT, VIDEO = CONFIGS / "qwen2_5_text_math_grpo.yaml", CONFIGS / "qwen2_5_vl_7b_longvideo_grpo.yaml"


def files(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))


def built(*args: str | Path, cli: type[LongRLCLI] = LongRLCLI) -> LongRLCLI:
    """All objects of a run, before anything is read or loaded: the arguments are those of `longrl fit`."""
    return cli(
        cli.module_class, cli.data_class, save_config_callback=None, seed_everything_default=0, run=False,
        args=[str(arg) for arg in args],
    )  # fmt: skip


def piece(path: Path) -> object:
    """What a file in a folder of `TYPES` describes."""
    parser = ArgumentParser(exit_on_error=False)
    kind = DiffusionFamily if path in FLOW_FAMILIES else TYPES[path.parent.name]
    parser.add_argument("--piece", type=kind, sub_configs=True)
    return parser.instantiate(parser.parse_args([f"--piece={path}"])).piece


def rollouts(cli: LongRLCLI) -> RolloutCallback:
    (found,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, RolloutCallback)]
    return found


def raw(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


# ---- every file ----


@files(FILES)
def test_a_test_below_reads_this_file(path):
    assert path in [*RECIPES, *FLOW, *DEMO, *EVALUATIONS, *(piece for kind in KINDS for piece in PIECES[kind])], (
        f"no test reads configs/{path.relative_to(CONFIGS)}: a recipe belongs in configs/, a piece in configs/KIND/ "
        "with KIND among KINDS of tests/test_configs.py"
    )


@files(FILES)
def test_no_key_is_written_twice_or_with_a_dot(path):
    """Of equal keys YAML keeps the last; `trainer.max_steps: 5` beside `trainer:` discards all of `trainer`."""
    for mapping in mappings(yaml.compose(path.read_text())):
        keys = [key.value for key, _ in mapping.value]
        assert len(set(keys)) == len(keys), keys
        assert not [key for key in keys if "." in key]


def mappings(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from mappings(value)


@files(FILES)
def test_the_first_line_says_what_it_is(path):
    assert re.match(r"# \w", path.read_text())


# ---- pieces ----


@files([path for kind in TYPES for path in PIECES[kind]])
def test_a_piece_is_what_its_folder_says(path):
    assert isinstance(piece(path), DiffusionFamily if path in FLOW_FAMILIES else TYPES[path.parent.name])


@files(PIECES["published"])
def test_published_figures_have_a_source_and_name_a_benchmark_of_configs(path):
    found = read_benchmark(path)
    named = {raw(evaluation)["name"] for evaluation in EVALUATIONS}
    assert found.is_about(named) or path.stem == "lvbench"
    for figure in found.figures:
        assert re.search(r"arXiv:\d{4}\.\d{5}|model card|README of", figure.source)
        assert 0 < figure.accuracy < 1


@files(PIECES["family"])
def test_a_family_names_a_hub_model_and_states_the_keys_of_its_class(path):
    """So that one family given after another of its class leaves nothing of it behind."""
    values = raw(path)
    alike = [raw(other) for other in PIECES["family"] if raw(other)["class_path"] == values["class_path"]]
    assert all(other["init_args"].keys() == values["init_args"].keys() for other in alike)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", values["init_args"]["model"])


@files([path for path in PIECES["data"] if path not in PROMPT_FILES])
def test_a_data_piece_lies_over_a_recipe(path):
    values, data = raw(path), built("--config", VIDEO, ON_CPU, "--data", path).datamodule
    assert data.sources == {split: sources(values[split]) for split in ("train", "val", "test")}
    assert (data.media_root, data.bad_records) == (values["media_root"], values["bad_records"])
    assert data.row_function == values.get("row_function", DEFAULT_ROW_FUNCTION)


def sources(value: str | list | None) -> list[DataSource]:
    listed = value if isinstance(value, list) else [value] if value else []
    return [DataSource(**one) if isinstance(one, dict) else DataSource(one) for one in listed]


def test_the_mix_has_a_row_function_and_a_weight_for_every_source():
    data = built("--config", VIDEO, ON_CPU, "--data", CONFIGS / "data" / "longvideo_reason_mix.yaml").datamodule
    assert data.weights == (8, 6, 2, 1, 2, 1)
    assert len(data.row_functions) == 6


def test_the_open_ended_split_is_read_and_needs_a_judge(tmp_path):
    record = {
        "problem_id": "1", "problem": "Why does she turn back?", "data_type": "video", "problem_type": "goal",
        "reasoning": "She forgot her keys.", "videos": ["longvila_videos/1.mp4"], "answer": "<answer>3 keys</answer>",
    }  # fmt: skip
    (tmp_path / "openended.jsonl").write_text(json.dumps(record) + "\n")
    data = built(
        "--config", VIDEO, ON_CPU, "--data", CONFIGS / "data" / "longvideo_reason_openended.yaml",
        f"--model.family.init_args.model={vl_folder()}", f"--data.train={tmp_path / 'openended.jsonl'}",
        "--data.check_files=false", f"--data.skipped_dir={tmp_path}",
    ).datamodule  # fmt: skip
    data.read_split("train")
    (row,) = data.datasets["train"].rows
    assert (row.task, row.answer) == ("open_ended", "3 keys")
    for name in ("judge", "text_similarity"):
        piece(CONFIGS / "reward" / f"{name}.yaml").check_rows([row], "train")
    with pytest.raises(ValueError, match=r"task 'open_ended', which no reward judges, first row '1'.*judge\.yaml"):
        piece(CONFIGS / "reward" / "think_answer.yaml").check_rows([row], "train")


def test_subtitles_are_switched_on_by_one_option(tmp_path):
    data = built(
        "--config", VIDEO, ON_CPU, "--data", CONFIGS / "data" / "videomme.yaml", f"--data.subtitles.source={tmp_path}"
    ).datamodule
    assert data.renderer.subtitles.source == str(tmp_path)
    assert (data.renderer.subtitles.max_chars, data.renderer.subtitles.lines) == (20000, "frames")


def test_a_selection_lies_over_a_recipe():
    path = CONFIGS / "selection" / "details.yaml"
    data = built("--config", VIDEO, ON_CPU, f"--data.selection={path}").datamodule
    assert data.renderer.selection == piece(path)
    assert data.renderer.selection.detail_frames == 8


@files(PROMPT_FILES)
def test_a_piece_with_prompts_states_all_but_the_limits(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PromptFiles, "data")
    data, values = parser.instantiate(parser.parse_args([f"--data={path}"])).data, raw(path)
    assert data.sources == {split: [values[split]] for split in ("train", "val", "test")}
    assert data.row_function.__name__ == values["row_function"].rpartition(".")[2]
    assert values.keys() == inspect.signature(PromptFiles).parameters.keys() - {"max_train_rows", "max_eval_rows"}
    if values["train"].startswith("configs/"):  # shipped with the project
        data.read(("train", "val", "test"))
        assert len(data.rows["train"]) >= values["prompts_per_batch"]


@files(PIECES["trainer"])
def test_a_trainer_piece_lies_over_a_recipe_and_changes_the_machine_alone(path):
    cli = built("--config", TEXT, "--trainer", path, "--trainer.accelerator=cpu")
    assert raw(path).keys() - {"strategy"} == {"accelerator", "devices", "precision"}
    assert cli.trainer.precision == raw(path)["precision"]
    assert cli.trainer.max_steps == raw(TEXT)["trainer"]["max_steps"]
    assert rollouts(cli).sampling.num_generations == 8


@files(PIECES["rollout"])
def test_an_engine_lies_over_a_recipe(path):
    cli = built("--config", VIDEO, ON_CPU, f"--rollout.engine={path}")
    engine, options = rollouts(cli).engine, raw(path)["init_args"]
    assert type(engine).__name__ == raw(path)["class_path"].rpartition(".")[2]
    given = {name: value for name, value in options.items() if value is not None}
    assert {name: getattr(engine, name) for name in given} == given


@files([path for path in RECIPES if re.search("text_math|3b_longvideo_dapo|7b_longvideo.*_grpo", path.stem)])
def test_servers_lie_over_a_recipe_whose_objective_takes_old_tokens(path):
    cli = built("--config", path, "--config", CONFIGS / "async" / "servers.yaml", ON_CPU)
    rollout, model = rollouts(cli), cli.model
    assert type(rollout.engine) is VLLMServerEngine
    assert rollout.max_staleness == 2
    model.algorithm.validate(rollout.sampling, model.mini_batches_per_rollout, max_staleness=2)


@files(PIECES["signals"])
def test_a_signal_lies_over_a_recipe_that_can_have_it(path):
    cli = built("--config", VIDEO, "--config", path, ON_CPU, BY_TRAINER)
    rollout, model = rollouts(cli), cli.model
    model.algorithm.validate(rollout.sampling, model.mini_batches_per_rollout)
    check_frame_order(rollout.frame_order, model, rollout.reward, rollout.max_staleness, has_turns=False)
    assert (rollout.frame_order is not None) == (path.stem == "t_grpo")
    assert (model.consistency is not None) == (path.stem == "grpo_care")
    assert model.rollouts_need_reference == (model.consistency is not None or model.algorithm.kl_coef > 0)
    check_reference(model.algorithm.moving_reference, model.rollouts_need_reference)
    assert ("first_answer" in rollout.reward.names) == (path.stem == "answer_twice")
    assert ("again" in cli.datamodule.renderer.question_template) == (path.stem == "answer_twice")


# ---- recipes and the demo ----


@files(RECIPES)
def test_a_recipe_is_one_config_whose_parts_agree(path):
    cli = built("--config", path, ON_CPU)
    model, data, rollout = cli.model, cli.datamodule, rollouts(cli)
    sampling = rollout.sampling
    if data.renderer.stage == "rl":
        model.algorithm.validate(sampling, model.mini_batches_per_rollout)
    limits = [term.function for term in rollout.reward.terms if isinstance(term.function, SoftOverlong)]
    limits += [rule for rule in [model.algorithm.token_weights] if isinstance(rule, Constant)]
    assert all(limit.max_completion_tokens == sampling.max_completion_tokens for limit in limits)
    longest = data.renderer.max_prompt_tokens + sampling.max_completion_tokens
    ranks = raw(path)["trainer"]["devices"]  # that share a sequence
    assert longest <= ranks * model.max_tokens_per_micro_batch  # else a long prompt ends the run


@files(RECIPES)
def test_a_recipe_says_how_it_is_launched_and_what_it_starts_from(path):
    values, name = raw(path), path.stem
    header = path.read_text().partition("\nrun_dir:")[0]
    for wanted in ("# Needs:", f"python -m longrl fit --config configs/{name}.yaml", "# Override:", "--ckpt_path"):
        assert wanted in header
    assert all(line.startswith("#") for line in header.splitlines())
    assert values["run_dir"] == f"runs/{name}"
    hardware = [raw(CONFIGS / "trainer" / name) for name in ("gpu.yaml", "node.yaml")]
    assert any({key: values["trainer"].get(key) for key in machine} == machine for machine in hardware)
    start = values["model"].get("init_from")
    assert start is None or start in [raw(other)["run_dir"] for other in RECIPES]


@files(RECIPES)
def test_the_options_of_a_recipes_header_exist(path):
    """Each `...` line of the header, added to the recipe as it says."""
    lines = re.sub(r"\n#  +--", " --", path.read_text().partition("\nrun_dir:")[0]).splitlines()
    examples = [re.findall(r"(--[\w.]+) ([^\s()]+)", line) for line in lines if ": " in line and "... --" in line]
    assert len(examples) >= 2
    for example in examples:
        args = [part for pair in example if pair[0] != "--ckpt_path" for part in pair]
        if args:
            built("--config", path, ON_CPU, *args)


@files(DEMO)
def test_a_stage_of_the_demo_lies_over_what_all_share(path):
    common = dict.fromkeys((CONFIGS / "demo" / "common.yaml", path.parent / "common.yaml"))
    files = [*filter(Path.exists, common), path]
    cli = built(*(part for file in files for part in ("--config", file)))
    assert rollouts(cli).reward.names == ["accuracy", "think_answer_format"]
    assert cli.config.run_dir == raw(path).get("run_dir", "runs/default")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """4 questions about one video of 8 to 10 seconds, with reasoning."""
    folder = tmp_path_factory.mktemp("videos") / "synthetic"
    generate_videos(folder, SyntheticConfig(1, 0, scene_s=2.0, size=56))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("sums") / "train.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(4)))
    return file


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """4 questions about two videos with a longer and a shorter sound track."""
    folder = tmp_path_factory.mktemp("clips")
    names = [write_clip(folder / f"{n}.mp4", 3.0, 2.0 + 2 * n).name for n in range(2)]
    asked = {"question": "Which tone?", "options": ["low", "high"], "answer": "low"}
    lines = [json.dumps({"id": n, "video": names[n % 2], **asked}) + "\n" for n in range(4)]
    (folder / "train.jsonl").write_text("".join(lines))
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def pairs(videos) -> Path:
    """Both answers to each question about the video, beside it."""
    file = videos.parent / "pairs.jsonl"
    records = [record | {"chosen": f"It is {n}.", "rejected": "No."} for n, record in enumerate(read_jsonl(videos))]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def coin(completion, row) -> float:
    return float(int(completion.token_ids.sum()) % 2)


@files(RECIPES)
def test_a_recipe_takes_a_step_with_a_tiny_model(path, tmp_path, videos, sums, clips, pairs):
    values = raw(path)
    if values["data"].get("stage") == "preference":
        videos = pairs
    has_video = "video" in values["data"]
    tiles = {"family/longvila_r1_7b.yaml": vila_folder, "family/internvl3_5_8b.yaml": internvl_folder}
    if str(values["model"]["family"]) in tiles:
        folder = tiles[values["model"]["family"]]()
        tiny = [f"--model.family.init_args.model={folder}", "--data.media_root=null"]
    elif has_video:
        folder, pixels = (qwen3_vl_folder(), 1024) if path.stem.startswith("qwen3_vl") else (vl_folder(), 784)
        if path.stem.startswith("qwen3_5"):
            folder, pixels = qwen3_5_folder(), 1024
        if "omni" in path.stem:
            folder, videos = omni_folder(), clips
        tiny = [f"--model.family.init_args.model={folder}", f"--model.family.init_args.min_pixels={pixels}"]
        tiny += [f"--model.family.init_args.max_pixels={pixels}", "--data.media_root=null"]
    else:
        tiny = [f"--model.family.init_args.model={text_folder(path.stem.split('_')[0][:5])}"]
    if "teacher" in values["model"]:
        of_family = [one.removeprefix("--model.family.") for one in tiny if one.startswith("--model.family.")]
        of_family.append("init_args.random_init=true")
        tiny += [f"--model.teacher.init_args.family.{option}" for option in of_family]
        tiny.append("--model.teacher.init_args.init_from=null")
    args = [
        "fit", f"--config={path}", ON_CPU, BY_TRAINER, f"--run_dir={tmp_path}", *tiny,
        "--model.family.init_args.random_init=true", "--model.init_from=null",
        f"--data.train={videos if has_video else sums}", "--data.val=null", "--data.test=null",
        "--data.num_workers=0", "--data.prompts_per_batch=4", "--trainer.max_steps=1",
        "--rollout.sampling.max_completion_tokens=3",
        '--rollout.reward={"terms": [{"function": "tests.test_configs.coin"}]}',
    ]  # fmt: skip
    ((steps, grad_norm),) = run_distributed(one_step, 1, args) if "strategy" in values["trainer"] else [one_step(args)]
    assert steps == values["model"].get("mini_batches_per_rollout", 1)
    assert grad_norm > 0
    assert (tmp_path / "config.yaml").exists()


def one_step(args: list[str]) -> tuple[int, float]:
    trainer = LongRLCLI.run(args).trainer
    return trainer.global_step, float(trainer.logged_metrics["train/grad_norm"])


# ---- evaluations ----


@pytest.fixture
def benchmark(tmp_path, monkeypatch, videos):
    """The questions on a generated video, in the schema of each config; with subtitles."""
    monkeypatch.chdir(tmp_path)  # folders of configs are found from here
    folder = tmp_path / "data" / "videomme"
    (folder / "subtitle").mkdir(parents=True)
    (folder / "subtitle" / "abc.srt").write_text("1\n00:00:00,000 --> 00:01:00,000\nA robot hums.\n")
    rows = [json.loads(line) for line in videos.read_text().splitlines()]
    shutil.copy(videos.parent / rows[0]["videos"], folder / "abc.mp4")
    told = {"videoID": "abc", "duration": "short", "domain": "Knowledge", "task_type": "Counting"}
    asked = [
        {**told, "question_id": f"1-{n}", "question": head, "options": options, "answer": row["answer"][8]}
        for n, row in enumerate(rows)
        for head, *options in [row["problem"].splitlines()]
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    own = [{"id": one["question_id"], "video": "abc.mp4", **one} for one in asked]
    (folder / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))
    mme = {
        path.stem: folder / "questions.jsonl"
        for path in EVALUATIONS
        if "video_mme" in path.stem and path.stem not in BY_RECORDS
    }
    return {
        "longvideo_reason": videos,
        "long_rl_longvideo_reason": videos,
        "demo": videos,
        "jsonl": folder / "own.jsonl",
        **mme,
    }


@files(PIECES["policy"])
def test_a_policy_lies_over_an_evaluation(path):
    config, _ = parse_evaluation([f"--config={CONFIGS / 'eval' / 'jsonl.yaml'}", f"--policy={path}", "--out=out"])
    assert f"{type(config.policy).__module__}.{type(config.policy).__name__}" == raw(path)["class_path"]


@files(EVALUATIONS)
def test_an_evaluation_is_one_config_whose_parts_agree(path, benchmark):
    config, data = parse_evaluation([f"--config={path}"])
    values = raw(path)
    assert (config.name, config.out) == (values["name"], values["out"])
    assert data.sources["test"] == sources(values["data"]["test"])
    config.policy.check(config.sampling)
    longest, room = data.renderer.max_prompt_tokens, config.policy.engine.max_length()
    if longest is not None and room is not None:
        assert longest + config.sampling.max_completion_tokens <= room
    header = path.read_text().partition("\nname:")[0]
    assert f"# Launch:    python -m longrl evaluate --config configs/eval/{path.name}" in header


@files(EVALUATIONS)
def test_the_options_of_an_evaluations_header_exist(path, benchmark):
    examples = re.findall(r"^# .*\.\.\. (--\S+) (\S+)", path.read_text(), re.MULTILINE)
    assert len(examples) >= 2
    for name, value in examples:
        parse_evaluation([f"--config={path}", name, str(ROOT / value) if value.startswith("configs/") else value])


@files([path for path in EVALUATIONS if path.stem not in BY_RECORDS])
def test_an_evaluation_runs_with_a_tiny_model(path, tmp_path, benchmark):
    family = {"model": vl_folder(), "random_init": True, "min_pixels": 784, "max_pixels": 784}
    init_args = {
        "family": {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": family},
        "engine": {"class_path": "longrl.engines.hf.HFEngine"},
        "weights": None,
        "device": "cpu",
    }
    policy = {"class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": init_args}
    results = Evaluation(
        *parse_evaluation([
            f"--config={path}", f"--policy={json.dumps(policy)}", f"--out={tmp_path / 'out'}", "--num_cards=1",
            f"--data.test={benchmark[path.stem]}", "--data.media_root=null", "--data.num_workers=0",
            "--sampling.max_completion_tokens=3",
        ])
    ).run().results  # fmt: skip
    values = raw(path)
    num_conditions = max(1, len(values.get("frames", []))) + values.get("blind_baseline", False)
    assert len(results["conditions"]) == num_conditions
    assert results["budget"]["max_pixels"] == 784
    assert results["protocol"]["name"] == values.get("protocol", {}).get("name", "longrl")
    assert all(of["scores"]["overall"]["n"] == 4 for of in results["conditions"].values())
    for line in read_jsonl(tmp_path / "out" / "samples.jsonl"):
        shown = path.stem.endswith("video_mme_subtitles") and line["condition"] != "no video"
        assert ("A robot hums." in line["input"]) == shown
    if "video_mme" in path.stem:
        found = results["conditions"]["video"]["breakdowns"]
        assert {name: list(of) for name, of in found.items()} == {
            "duration": ["short"], "domain": ["Knowledge"], "task_type": ["Counting"]
        }  # fmt: skip


# ---- what composes ----


def test_a_later_config_and_then_the_command_line_change_single_keys_of_a_piece(tmp_path):
    later = tmp_path / "later.yaml"
    later.write_text(
        "model:\n  algorithm: {clip_high: 0.3, kl_coef: 0.5}\n  family:\n    init_args: {max_pixels: 6272}\n"
        "  optimizer: {warmup_steps: 7}\ndata:\n  video: {max_frames: 9}\n"
        "trainer:\n  callbacks+: longrl.callbacks.random_state.RandomState\n"
    )
    cli = built("--config", VIDEO, "--config", later, ON_CPU, "--model.algorithm.kl_coef=0", "--data.video.fps=0.5")
    algorithm, family, optimizer = cli.model.algorithm, cli.model.family, cli.model.optimizer_settings
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.kl_coef) == (0.2, 0.3, 0.0)
    assert (family.min_pixels, family.max_pixels) == (3136, 6272)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.weight_decay) == (1e-6, 7, 0.01)
    video = cli.datamodule.renderer.video
    assert (video.fps, video.min_frames, video.max_frames) == (0.5, 8, 9)
    assert sum(type(callback).__name__ == "RandomState" for callback in cli.trainer.callbacks) == 2


def test_the_command_line_reaches_into_the_rollout_callback():
    cli = built(
        "--config", TEXT, ON_CPU, "--rollout.sampling.num_generations=2", "--rollout.engine.init_args.max_num_seqs=5",
        f"--rollout.reward={CONFIGS / 'reward' / 'think_answer.yaml'}",
    )  # fmt: skip
    rollout = rollouts(cli)
    assert (rollout.sampling.num_generations, rollout.sampling.max_completion_tokens) == (2, 1024)
    assert rollout.engine.max_num_seqs == 5
    assert rollout.reward.names == ["accuracy", "think_answer_format"]


@pytest.fixture(scope="module")
def parsers() -> dict[type[LongRLCLI], ArgumentParser]:
    """Of both entries; `--print_config` prints what they dump."""
    flow = ["--config", FLOW[0], ON_CPU]
    return {LongRLCLI: built("--config", TEXT, ON_CPU).parser, DiffusionCLI: built(*flow, cli=DiffusionCLI).parser}


def of_different_objectives(recipes):
    """One of those that name the same `model.algorithm`: what is chosen in its place is the same in all of them."""
    by_objective = {str((raw(recipe).get("model") or {}).get("algorithm")): recipe for recipe in reversed(recipes)}
    return list(by_objective.values())


@files(PIECES["algorithm"])
def test_choosing_an_algorithm_is_that_algorithm_and_nothing_of_the_recipes_own(path, parsers):
    assert raw(path).keys() == {field.name for field in dataclasses.fields(Algorithm)}
    flow = path.stem.startswith("flow")
    parser, recipes = (parsers[DiffusionCLI], FLOW) if flow else (parsers[LongRLCLI], RECIPES)
    for recipe in of_different_objectives(recipes):
        values = parser.parse_args([f"--config={recipe}", f"--model.algorithm={path}"])
        printed = yaml.safe_load(parser.dump(values, skip_unset=False))
        assert printed["model"]["algorithm"] == raw(path), recipe.stem


@files(PIECES["preference"])
def test_choosing_an_objective_on_pairs_is_that_and_nothing_of_the_recipes_own(path, parsers):
    assert raw(path).keys() == {field.name for field in dataclasses.fields(Preference)}
    for recipe in CONFIGS.glob("*_7b_longvideo_[dm]po.yaml"):
        values = parsers[LongRLCLI].parse_args([f"--config={recipe}", f"--model.preference={path}"])
        printed = yaml.safe_load(parsers[LongRLCLI].dump(values, skip_unset=False))
        assert printed["model"]["preference"] == raw(path), recipe.stem


def test_the_flags_of_the_documents_go_together_with_a_callback_more(tmp_path):
    """Every flag of a run that the documents name, but those that stand for another machine or model."""
    documents = ("README.md", "docs/how_to.md", "docs/algorithms.md", "launch/README.md")
    text = "".join((ROOT / name).read_text() for name in documents).replace("\\\n", " ")
    text = re.sub(r"python -m lmms_eval [^`\n]*", "", text)  # its flags are not ours
    flags = dict(re.findall(r"(--(?:rollout|model|data|trainer)[\w.]*) ([^\s`|)\]]+)", text))
    flags = {name: value for name, value in flags.items() if not name.endswith(".help") and "NAME" not in value}
    flags |= {"--rollout.engine": "longrl.engines.server.VLLMServerEngine"}
    flags |= {name: str(ROOT / value) for name, value in flags.items() if value.startswith("configs/")}
    (tmp_path / "my_sapo.py").write_text("def sapo(tokens, clip_low, clip_high):\n    return tokens\n")
    own = {
        "--model.algorithm.surrogate": f"{tmp_path}/my_sapo.py:sapo",
        "--rollout.reward": CONFIGS / "reward" / "judge.yaml",
        "--data": CONFIGS / "data" / "videomme.yaml",
        "--model.preference": CONFIGS / "preference" / "ipo.yaml",
        "--data.subtitles.source": tmp_path,
        "--rollout.max_staleness": "2",
        "--rollout.engine.urls": "http://127.0.0.1:8000",  # of several nodes it is a list in quotes
    }
    assert {"--rollout.engine.urls", "--model.algorithm.token_weights"} <= flags.keys()
    args = [part for pair in (flags | own).items() for part in pair]
    for more in (["--trainer.callbacks+", "LearningRateMonitor"], ["--trainer.callbacks+=LearningRateMonitor"]):
        cli = built("--config", VIDEO, *args, *more, ON_CPU, "--trainer.devices=8")
        names = [type(callback).__name__ for callback in cli.trainer.callbacks]
        assert names.index("LearningRateMonitor") < names.index("RolloutCallback")
        assert cli.config.rollout.engine.init_args.urls == "http://127.0.0.1:8000"
        assert rollouts(cli).max_staleness == 2


def test_one_family_replaces_another():
    cli = built("--config", TEXT, ON_CPU, "--model.family", CONFIGS / "family" / "qwen2_5_vl_3b.yaml")
    assert vars(cli.model.family) == vars(piece(CONFIGS / "family" / "qwen2_5_vl_3b.yaml"))
    assert cli.datamodule.renderer.family is cli.model.family


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("rundir", "rundir: runs/x"),
        ("max_step", "trainer: {max_step: 5}"),
        ("prompt_per_batch", "data: {prompt_per_batch: 5}"),
        ("video.frames", "data: {video: {frames: 5}}"),
        ("clip_hihg", "model: {algorithm: {clip_hihg: 0.3}}"),
        ("max_pixel", "model: {family: {init_args: {max_pixel: 784}}}"),
        ("learning_rate", "model: {optimizer: {learning_rate: 1.0e-5}}"),
        (
            "num_generation",
            "rollout: {sampling: {num_generation: 2}}",
        ),
    ],
)
def test_a_typo_is_an_error_that_names_the_key(key, text, tmp_path, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text(text)
    with pytest.raises(SystemExit):
        built("--config", VIDEO, "--config", typo, ON_CPU)
    assert re.search(rf"Option '{key}' is not accepted|does not accept option '{key}'", capsys.readouterr().err)


def test_a_misspelt_piece_is_an_error_that_names_it(tmp_path, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text("model: {algorithm: algorithm/gpro.yaml}")
    with pytest.raises(SystemExit):
        built("--config", VIDEO, "--config", typo, ON_CPU)
    assert "algorithm/gpro.yaml" in capsys.readouterr().err


def test_alerts_and_the_page_about_them_name_options_that_exist(parsers):
    said = (ROOT / "docs" / "watching_runs.md").read_text() + " ".join(rule.knob for rule in RULES)
    parser = parsers[LongRLCLI]
    values = yaml.safe_load(parser.dump(parser.parse_args([f"--config={TEXT}"]), skip_unset=False))
    named = set(re.findall(r"(?<![\w.])(?:model|data|rollout)\.[a-z0-9_.]*[a-z0-9_]", said))
    assert len(named) > 10
    for name in named:
        group, _, option = name.rpartition(".")
        assert option in functools.reduce(dict.__getitem__, group.split("."), values), name
    for name in re.findall(r"longrl\.(?:algorithms|rewards)\.(\w+)", said):
        assert hasattr(algorithms, name) or hasattr(rewards, name), name
    for name in re.findall(r"configs/[\w/]+\.yaml", said):
        assert (ROOT / name).is_file(), name
