"""The weighted sum: parts, failures, loading and YAML; which judge is asked, and what ground truths are refused."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from longrl.algorithms import drop_uniform
from longrl.callbacks.generations import group_samples
from longrl.evaluation.records import group_records
from longrl.modules.metric_means import MetricMeans
from longrl.modules.rollout_means import mean_over_ranks, reward_values
from longrl.rewards import (
    CosineLength,
    RewardSum,
    RewardTerm,
    SoftOverlong,
    accuracy,
    accuracy_lenient,
    check_answer,
    think_answer_format,
)
from longrl.rewards.batch import BatchReward
from longrl.rewards.judge import TextSimilarity
from longrl.rewards.reward_sum import ACCURACY, LENIENT_ACCURACY
from longrl.strategies.axis import SINGLE_RANK
from longrl.types import Completion, Group, Prompt, Row

CONFIGS = Path(__file__).parents[2] / "configs" / "reward"
PICTURES = ("colour", "compressibility", "ocr", "pickscore", "video_ocr", "video_quality")
"""Configs of rewards for generated pictures and videos; the others judge text."""
GOOD, WRONG, BARE = "<think>x</think><answer>B</answer>", "<think>x</think><answer>A</answer>", "B"


def group(*texts: str, num_tokens: int = 4) -> Group:
    row = Row(id="q1", problem="Which?\nA. cat\nB. dog", answer="B")
    prompt = Prompt("q1", torch.zeros(3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), (), row)
    completions = [Completion(torch.zeros(num_tokens), torch.zeros(num_tokens), text, "stop") for text in texts]
    return Group(prompt, completions)


def fails_on_bare(completion: Completion, row: Row) -> float:
    if completion.text == BARE:
        raise KeyError("no tag")
    return 1.0


def nan_on_bare(completion: Completion, row: Row) -> float:
    return math.nan if completion.text == BARE else 1.0


def test_rewards_are_the_weighted_sum_and_parts_are_unweighted():
    reward = RewardSum([RewardTerm(accuracy, 0.9), RewardTerm(think_answer_format, 0.1)])
    groups = [group(GOOD, WRONG, BARE), group(GOOD)]
    assert reward.score(groups) == 0
    assert groups[0].rewards.dtype == torch.float32
    torch.testing.assert_close(groups[0].rewards, torch.tensor([1.0, 0.1, 0.0]))
    torch.testing.assert_close(groups[0].reward_parts["accuracy"], torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(groups[0].reward_parts["think_answer_format"], torch.tensor([1.0, 1.0, 0.0]))
    assert groups[0].valid.tolist() == [True, True, True]
    torch.testing.assert_close(groups[1].rewards, torch.tensor([1.0]))


@pytest.mark.parametrize("function", [fails_on_bare, nan_on_bare])
def test_a_failing_reward_masks_its_completion_and_is_logged_with_the_sample(function, caplog):
    reward = RewardSum([RewardTerm(function), RewardTerm(think_answer_format, 0.5)])
    scored = group(GOOD, BARE, WRONG)
    with caplog.at_level(logging.WARNING):
        assert reward.score([scored]) == 1
    assert scored.valid.tolist() == [True, False, True]
    assert scored.rewards.tolist() == [1.5, 0.0, 1.5]
    assert scored.reward_parts["think_answer_format"].tolist() == [1.0, 0.0, 1.0]
    record = caplog.records[0]
    assert "'q1'" in record.message
    assert repr(BARE) in record.message
    assert function.__name__ in record.message
    assert "Error" in record.getMessage()


class Together(BatchReward):
    """Counts its calls; bare answers have no value, and "all" is an error of the whole."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def score_all(self, completions, rows):
        self.calls.append([completion.text for completion in completions])
        if "all" in self.calls[-1]:
            raise ConnectionError("away")
        return [KeyError("bare") if completion.text == BARE else float(row.answer == "B") for completion, row in
                zip(completions, rows, strict=True)]  # fmt: skip


def test_a_batch_reward_gets_all_completions_of_a_step_at_once():
    together = Together()
    reward = RewardSum([RewardTerm(together, name="together"), RewardTerm(think_answer_format, 0.5)])
    groups = [group(GOOD, BARE), group(WRONG)]
    assert reward.score(groups) == 1
    assert together.calls == [[GOOD, BARE, WRONG]]
    assert groups[0].valid.tolist() == [True, False]
    assert groups[0].rewards.tolist() == [1.5, 0.0]
    assert groups[1].rewards.tolist() == [1.5]
    assert together(groups[0].completions[0], groups[0].prompt.row) == 1.0
    with pytest.raises(KeyError, match="bare"):
        together(groups[0].completions[1], groups[0].prompt.row)


def test_a_batch_reward_that_fails_as_a_whole_masks_everything():
    groups = [group(GOOD, "all"), group(GOOD)]
    assert RewardSum([RewardTerm(Together(), name="together")]).score(groups) == 3
    assert [own.valid.tolist() for own in groups] == [[False, False], [False]]
    assert RewardSum([RewardTerm(Together(), name="together")]).score([]) == 0


# ---- pictures and videos ----


@dataclass
class Video:
    """A generated sample as rewards see it."""

    frames: torch.Tensor


def video(*levels: int) -> Video:
    return Video(torch.stack([torch.full((3, 4, 4), level, dtype=torch.uint8) for level in levels]))


def shown(*samples: Video) -> Group:
    made = group()
    made.completions = list(samples)
    return made


def brightness(frames: torch.Tensor, row: Row) -> float:
    if frames.amax() == 255:
        raise ValueError("overexposed")
    return float(frames.double().mean())


class Counted(BatchReward):
    """The number of frames, all samples at once."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def prepare(self) -> None:
        self.events.append("prepared")

    def score_all(self, completions, rows):
        self.events.append("scored")
        return [float(len(frames)) for frames in completions]


def test_functions_get_the_frames_of_a_sample_and_each_term_chooses_its_own():
    counted = Counted()
    reward = RewardSum(
        [RewardTerm(brightness, 0.5), RewardTerm(brightness, name="end", frames_of="last"),
         RewardTerm(counted, frames_of="every 2", name="seen")]
    )  # fmt: skip
    groups = [shown(video(10, 20, 60), video(8)), shown(video(30, 40))]
    assert reward.score(groups) == 0
    assert groups[0].reward_parts["brightness"].tolist() == [30.0, 8.0]
    assert groups[0].reward_parts["end"].tolist() == [60.0, 8.0]
    assert groups[0].reward_parts["seen"].tolist() == [2.0, 1.0]
    assert groups[1].rewards.tolist() == [0.5 * 35 + 40 + 1]
    assert counted.events == ["prepared", "scored"]


def test_a_sample_whose_reward_fails_is_masked_and_logged(caplog):
    scored = shown(video(10), video(0, 255))
    assert RewardSum([RewardTerm(brightness)]).score([scored]) == 1
    assert scored.valid.tolist() == [True, False]
    assert scored.rewards.tolist() == [10.0, 0.0]
    assert "overexposed" in caplog.text
    assert "'(2 frames)'" in caplog.text


def test_a_user_function_in_a_file_judges_frames(tmp_path):
    (tmp_path / "my_rewards.py").write_text("def tall(frames, row):\n    return float(frames.shape[-2])\n")
    scored = shown(video(1))
    RewardSum([RewardTerm(f"{tmp_path}/my_rewards.py:tall")]).score([scored])
    assert scored.rewards.tolist() == [4.0]


def test_a_choice_of_frames_is_an_error_for_text_and_a_wrong_one_is_found_at_once():
    with pytest.raises(ValueError, match=r"frames_of='first' of reward 'accuracy'.*completions are text"):
        RewardSum([RewardTerm(accuracy, frames_of="first")]).score([group(GOOD)])
    with pytest.raises(ValueError, match="got 'each 2'"):
        RewardTerm(brightness, frames_of="each 2")


def test_what_cannot_be_loaded_ends_the_run_instead_of_masking_all():
    class Missing(Counted):
        def prepare(self) -> None:
            raise ValueError("no such folder")

    with pytest.raises(ValueError, match="no such folder"):
        RewardSum([RewardTerm(Missing())]).score([shown(video(1))])


@pytest.mark.parametrize("value", ["not a number", None, math.inf, 1e300])
def test_a_result_that_is_no_finite_number_is_a_failure(value):
    scored = group(GOOD)
    assert RewardSum([RewardTerm(lambda completion, row: value, name="odd")]).score([scored]) == 1
    assert scored.valid.tolist() == [False]


def test_a_completion_with_two_failed_parts_counts_once():
    reward = RewardSum([RewardTerm(fails_on_bare), RewardTerm(nan_on_bare)])
    assert reward.score([group(BARE)]) == 1


def test_functions_load_from_import_paths_and_files(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def brevity(completion, row):\n    return 1.0 / len(completion.text)\n")
    reward = RewardSum([RewardTerm("longrl.rewards.accuracy"), RewardTerm(f"{file}:brevity", 2.0)])
    assert reward.names == ["accuracy", "brevity"]
    scored = group(BARE)
    reward.score([scored])
    assert scored.rewards.tolist() == [2.0]


def test_a_bad_path_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"reward 'longrl\.rewards\.acuracy': .* has no 'acuracy'; it has accuracy"):
        RewardTerm("longrl.rewards.acuracy")
    with pytest.raises(
        ValueError, match="reward must be a function, got the class SoftOverlong; write it as class_path"
    ):
        RewardTerm("longrl.rewards.SoftOverlong")


def test_names_must_differ_and_accuracy_keeps_its_name():
    with pytest.raises(ValueError, match="must have different names"):
        RewardSum([RewardTerm(accuracy), RewardTerm(accuracy)])
    with pytest.raises(ValueError, match="must be named 'accuracy'"):
        RewardTerm(accuracy, name="acc")
    with pytest.raises(ValueError, match="at least one term"):
        RewardSum([])
    with pytest.raises(ValueError, match="finite number, got nan"):
        RewardTerm(accuracy, weight=math.nan)
    assert RewardTerm(SoftOverlong(8, 4)).name == "soft_overlong"


class Consumer:
    def __init__(self, reward: RewardSum) -> None:
        self.reward = reward


def parsed(arguments: list[str]) -> tuple[RewardSum, str]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Consumer, "consumer")
    config = parser.parse_args(arguments)
    return parser.instantiate(config).consumer.reward, parser.dump(config)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_reward_config_builds_and_its_dump_builds_the_same(path, tmp_path):
    reward, dump = parsed([f"--consumer.reward={path}"])
    (tmp_path / "dump.yaml").write_text(dump)
    again, _ = parsed([f"--config={tmp_path / 'dump.yaml'}"])
    assert again == reward
    assert ("accuracy" in reward.names) == (path.stem not in (*PICTURES, "remote", "reward_model"))


def test_think_answer_yaml_is_nine_to_one_and_dapo_yaml_punishes_length():
    reward, _ = parsed([f"--consumer.reward={CONFIGS / 'think_answer.yaml'}"])
    assert [(term.function, term.weight) for term in reward.terms] == [(accuracy, 0.9), (think_answer_format, 0.1)]
    dapo, _ = parsed([f"--consumer.reward={CONFIGS / 'dapo.yaml'}"])
    scored = group(GOOD, num_tokens=896)
    dapo.score([scored])
    assert scored.rewards.tolist() == [1.5]


def test_the_terms_of_the_picture_configs():
    built = {name: parsed([f"--consumer.reward={CONFIGS / name}.yaml"])[0] for name in PICTURES}
    assert {name: [(part, term.weight, term.frames_of) for part, term in zip(reward.names, reward.terms, strict=True)]
            for name, reward in built.items()} == {
        "colour": [("mean_colour", 0.5, "all"), ("colour_share", 0.5, "all")],
        "compressibility": [("compressibility", 1.0, "all")],
        "ocr": [("ocr_match", 1.0, "all")],
        "pickscore": [("pick_score", 1 / 26, "all")],
        "video_ocr": [("ocr_match", 1.0, "every 4")],
        "video_quality": [
            ("brisque", 0.5, "every 4"), ("temporal_smoothness", 0.25, "all"), ("motion_amount", 0.25, "all")
        ],
    }  # fmt: skip
    scored = shown(Video(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)))
    scored.prompt = Prompt("1", scored.prompt.input_ids, scored.prompt.position_ids, (), Row("1", "a black square", ""))
    built["colour"].score([scored])
    assert scored.rewards.tolist() == [1.0]


def test_a_file_path_survives_yaml_and_a_bad_one_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def brevity(completion, row):\n    return 1.0\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"consumer:\n  reward:\n    terms:\n    - function: {tmp_path}/mine.py:brevity\n")
    reward, dump = parsed([f"--config={config}"])
    assert reward.names == ["brevity"]
    assert f"{tmp_path}/mine.py:brevity" in dump
    config.write_text("consumer:\n  reward:\n    terms:\n    - function: longrl.rewards.nothing\n")
    with pytest.raises(ValueError, match=r"longrl\.rewards\.nothing"):
        parsed([f"--config={config}"])


# ---- judges ----

CHOICES = "Which?\nA. cat\nB. dog"
RIGHT = {
    "multiple_choice": (CHOICES, "B", "dog"),
    "math": ("?", "1/2", "0.5"),
    "numeric": ("?", "3", "three"),
    "exact": ("?", "Paris", "paris."),
    "temporal_iou": ("?", "0:10-0:20", "10 to 20 s"),
    "box_iou": ("?", '{"time": 3, "bbox_2d": [1, 2, 30, 40]}', '{"3.0": [1, 2, 30, 40]}'),
    "regression": ("?", "2.5 m", "2.50"),
    "mra": ("?", "2.5", "2.50"),
    "ocr": ("?", "OPEN 24 hours", "OPEN 24 hours"),
    "free_form": ("?", "The man runs", "the man run"),
}


@pytest.mark.parametrize("task", RIGHT)
def test_each_task_has_its_judge(task):
    problem, answer, said = RIGHT[task]
    row = Row(id="1", problem=problem, answer=answer, task=task)
    check_answer(row)
    assert accuracy(Completion((), (), f"<answer>{said}</answer>", "stop"), row) == 1.0
    assert accuracy(Completion((), (), said, "stop"), row) == 0.0
    assert accuracy_lenient(Completion((), (), said, "stop"), row) == 1.0


def test_strict_and_lenient_judges_cover_the_same_tasks():
    assert ACCURACY.keys() == LENIENT_ACCURACY.keys() == RIGHT.keys()


def test_an_unknown_task_is_an_error_that_names_the_known_ones():
    row = Row(id="7", problem="?", answer="x", task="open_ended")
    with pytest.raises(ValueError, match=r"row '7'.*multiple_choice, math, .*got 'open_ended'"):
        accuracy(Completion((), (), "x", "stop"), row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(id="7", problem=CHOICES, answer="C"), r"row '7'.*one of the options A, B, got 'C'; correct the row"),
        (Row(id="7", problem=CHOICES, answer="dog"), r"got 'dog'"),
        (Row(id="7", problem="Which?", answer="A"), r"must list its options from A on.*'A\. text'"),
        (Row(id="7", problem=CHOICES, answer=" "), r"must not be empty"),
        (Row(id="7", problem="?", answer="many", task="numeric"), r"must be one number, got 'many'"),
        (Row(id="7", problem="?", answer="3 to 5", task="regression"), r"must be one number, got '3 to 5'"),
        (Row(id="7", problem="?", answer="noon", task="temporal_iou"), r"must hold an interval .*got 'noon'"),
        (Row(id="7", problem="?", answer="left", task="box_iou"), r"must hold boxes .*got 'left'"),
        (Row(id="7", problem="?", answer="\u732b", task="free_form"), r"needs words of a to z"),
    ],
)
def test_a_ground_truth_that_cannot_be_judged_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        check_answer(row)


def test_open_ended_rows_pass_the_check():
    check_answer(Row(id="7", problem="Why?", answer="Because.", task="open_ended"))


# ---- parts that do not apply ----


def of_numbers(completion, row):
    return 1.0 if row.task == "numeric" else None


def never(completion, row):
    return None


def row_group(row: Row, *texts: str) -> Group:
    made = group(*texts)
    return Group(Prompt(row.id, made.prompt.input_ids, made.prompt.position_ids, (), row), made.completions)


NUMBER = Row("n", "?", "3", "numeric")
OPEN = Row("o", "Why?", "because", "open_ended")


def test_none_leaves_the_part_out_of_the_sum_and_keeps_the_weights():
    reward = RewardSum([RewardTerm(of_numbers, 0.7), RewardTerm(think_answer_format, 0.2)])
    groups = [row_group(NUMBER, GOOD, BARE), row_group(OPEN, GOOD, BARE)]
    assert reward.score(groups) == 0
    torch.testing.assert_close(groups[0].rewards, torch.tensor([0.9, 0.7]))
    torch.testing.assert_close(groups[1].rewards, torch.tensor([0.2, 0.0]))
    assert groups[1].reward_parts["of_numbers"].isnan().all()
    assert groups[1].valid.all()


def test_a_completion_to_which_nothing_applies_is_masked_and_said_in_one_line(caplog):
    groups = [row_group(NUMBER, GOOD, BARE), row_group(OPEN, GOOD, BARE)]
    with caplog.at_level(logging.WARNING):
        assert RewardSum([RewardTerm(of_numbers), RewardTerm(never)]).score(groups) == 2
    assert [one.valid.tolist() for one in groups] == [[True, True], [False, False]]
    assert groups[1].rewards.tolist() == [0.0, 0.0]
    assert [record.getMessage() for record in caplog.records] == [
        "no reward applies to 2 completions, of row 'o'; they are left out of the loss"
    ]


def test_logged_means_are_of_the_completions_that_have_the_part():
    groups = [row_group(NUMBER, GOOD, BARE), row_group(OPEN, GOOD)]
    RewardSum([RewardTerm(of_numbers), RewardTerm(never), RewardTerm(think_answer_format)]).score(groups)
    metrics = mean_over_ranks(reward_values(groups), SINGLE_RANK)
    assert metrics["reward/of_numbers"] == 1.0
    assert math.isnan(metrics["reward/never"])
    assert metrics["reward/think_answer_format"] == pytest.approx(2 / 3)
    assert metrics["rollout/failed_rewards"] == 0.0
    means = MetricMeans()
    for one in groups:
        means.add_rewards(one, "val", by_category=False)
    assert means.collect(SINGLE_RANK)["val/of_numbers"] == 1.0


def test_dynamic_sampling_looks_at_the_reward_where_accuracy_does_not_apply():
    terms = [RewardTerm(of_numbers, name="accuracy"), RewardTerm(think_answer_format)]
    groups = [row_group(NUMBER, GOOD, BARE), row_group(OPEN, GOOD, BARE)]
    RewardSum(terms).score(groups)
    assert drop_uniform(groups) == [groups[1]]


def test_records_and_samples_leave_out_what_does_not_apply():
    made = row_group(NUMBER, GOOD)
    RewardSum([RewardTerm(of_numbers), RewardTerm(never)]).score([made])
    (record,) = group_records(NUMBER, made)
    assert record["rewards"] == {"of_numbers": 1.0}
    assert group_samples(made, 1, 1)[0]["parts"] == {"of_numbers": 1.0}


# ---- who judges which task ----


def judges_open(completion, row):
    assert row.task == "open_ended"
    return 0.5


def test_a_term_with_tasks_is_asked_about_those_and_accuracy_about_the_others():
    reward = RewardSum([RewardTerm(accuracy), RewardTerm(judges_open, tasks=["open_ended"])])
    choice = group(GOOD)
    groups = [choice, row_group(OPEN, GOOD)]
    assert reward.score(groups) == 0
    assert [one.rewards.tolist() for one in groups] == [[1.0], [0.5]]


@pytest.mark.parametrize(
    "terms",
    [
        [RewardTerm(accuracy)],
        [RewardTerm(accuracy), RewardTerm(think_answer_format)],
        [RewardTerm(accuracy_lenient), RewardTerm(never)],
        [RewardTerm(judges_open, tasks=["ocr"])],
        [RewardTerm(CosineLength(9))],
    ],
)
def test_a_task_without_a_judge_is_missed_before_the_run(terms):
    rows = [NUMBER] * 3 + [OPEN, OPEN] if terms[0].tasks is None else [OPEN, OPEN]
    with pytest.raises(ValueError, match=(
        rf"2 of {len(rows)} rows of data\.val have the task 'open_ended', which no reward judges, first row 'o'; "
        r".*configs/reward/judge\.yaml or text_similarity\.yaml.*`tasks: every`"
    )):  # fmt: skip
        RewardSum(terms).check_rows(rows, "val")


@pytest.mark.parametrize(
    "terms",
    [
        [RewardTerm(never)],
        [RewardTerm(think_answer_format)],
        [RewardTerm(never, name="accuracy")],
        [RewardTerm(accuracy), RewardTerm(judges_open, tasks=["open_ended"])],
        [RewardTerm(accuracy), RewardTerm(judges_open, tasks="every")],
        [RewardTerm(TextSimilarity(), name="accuracy")],
    ],
)
def test_rows_with_a_judge_pass(terms):
    RewardSum(terms).check_rows([NUMBER, OPEN], "train")


def test_a_function_says_itself_what_it_judges():
    def judge(completion, row):
        return 1.0

    judge.tasks = "every"
    RewardSum([RewardTerm(accuracy), RewardTerm(judge)]).check_rows([NUMBER, OPEN], "train")
    judge.tasks = ["numeric"]
    with pytest.raises(ValueError, match="'open_ended', which no reward judges"):
        RewardSum([RewardTerm(judge)]).check_rows([NUMBER, OPEN], "train")


def test_tasks_and_the_time_limit_are_read_from_yaml(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "consumer:\n  reward:\n    time_limit_s: 5\n    terms:\n    - function: longrl.rewards.accuracy\n"
        "    - {function: longrl.rewards.think_answer_format, tasks: every}\n"
        "    - {function: longrl.rewards.think_answer_format, tasks: [ocr, math], name: other}\n"
    )
    reward, _ = parsed([f"--config={config}"])
    assert [term.tasks for term in reward.terms] == [None, "every", ["ocr", "math"]]
    assert reward.time_limit_s == 5.0


@pytest.mark.parametrize("name", ["judge", "text_similarity"])
def test_the_remedies_that_are_named_judge_every_task(name):
    reward, _ = parsed([f"--consumer.reward={CONFIGS / name}.yaml"])
    reward.check_rows([Row(task, "?", "x", task) for task in [*RIGHT, "open_ended"]], "train")
