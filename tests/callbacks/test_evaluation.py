"""The evaluation report: every completion on file, every question scored once, and the same numbers as `evaluate`."""

import json
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.evaluation import EvaluationReport
from longrl.callbacks.rollout import RolloutCallback
from longrl.datamodules.loading.shown_media import without_media
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.metric import logged_values
from longrl.evaluation.outcomes import judge_answers, make_outcome
from longrl.evaluation.samples import read_samples
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum, RewardTerm
from longrl.types import Batch, Completion, Group, Prompt, UnusableSample
from tests.evaluation.scripted import benchmark, records
from tests.evaluation.test_report_page import Tags
from tests.tiny import vl_family


def group(row, *letters):
    ids = torch.zeros(3, dtype=torch.long)
    texts = [f"<think>x</think><answer>{letter}</answer>" for letter in letters]
    completions = [Completion(torch.zeros(2, dtype=torch.long), torch.zeros(2), text, "stop") for text in texts]
    return Group(Prompt(row.id, ids, ids[None], (), row), completions)


class Run:
    """A trainer's end of `test` on four questions whose answers are B."""

    def __init__(self, folder, **options):
        questions = [{**record, "answer": "B", "problem_id": str(n)} for n, record in enumerate(records()[:4])]
        family = vl_family()
        options |= {"skipped_dir": str(folder), "allow_outside_paths": True}
        self.data = LongVideoReason(family, test=str(benchmark(folder, questions)), **options)
        self.data.read(("test",))
        self.rows = self.data.datasets["test"].rows
        self.module = PolicyModule(family)
        self.module.model = family.build()
        self.folder = folder
        self.trainer = SimpleNamespace(
            default_root_dir=str(folder),
            is_global_zero=True,
            datamodule=self.data,
            callbacks=[RolloutCallback(RewardSum([RewardTerm("longrl.rewards.accuracy")]))],
            ckpt_path=None,
            limit_test_batches=1.0,
            limit_predict_batches=1.0,
        )

    def add(self, report, *groups):
        batch = Batch([each.prompt for each in groups], groups=list(groups))
        report.on_test_batch_end(self.trainer, self.module, None, batch, 0)

    def results(self):
        (condition,) = json.loads((self.folder / "test" / "results.json").read_text())["conditions"].items()
        return condition


def test_all_completions_are_on_file_and_a_question_scores_their_mean(tmp_path, capsys):
    run, report = Run(tmp_path), EvaluationReport(num_cards=1)
    run.add(report, group(run.rows[0], "B", "A"), group(run.rows[1], "B", "B"))
    run.add(report, group(run.rows[2], "A", "A"))
    report.on_test_end(run.trainer, run.module)
    lines = read_samples(tmp_path / "test")["video"]  # the fourth was not asked: limit_test_batches
    assert [(line["id"], line["sample"], line["correct"]) for line in lines] == [
        ("0", [0, 1], [True, False]), ("1", [0, 1], [True, True]), ("2", [0, 1], [False, False]),
    ]  # fmt: skip
    name, results = run.results()
    assert (name, results["num_questions"]) == ("video", 3)
    assert (results["scores"]["overall"]["accuracy"], results["scores"]["overall"]["n"]) == (0.5, 3)
    assert Tags((tmp_path / "test" / "report.html").read_text()).open == []
    assert "accuracy, 95% interval" in capsys.readouterr().out


def test_results_of_other_weights_or_of_more_questions_are_not_replaced(tmp_path, caplog):
    run, report = Run(tmp_path), EvaluationReport(num_cards=0)
    report.on_test_start(run.trainer, run.module)
    run.add(report, group(run.rows[0], "B"))
    report.on_test_end(run.trainer, run.module)
    before = {path: path.read_bytes() for path in (tmp_path / "test").iterdir()}

    report.on_test_start(run.trainer, run.module)
    assert "has the results of this evaluation already; they are made again" in caplog.text
    run.trainer.limit_test_batches = 1
    with pytest.raises(ValueError, match=r"--run_dir=\S+ has the results .*limit_test_batches was null, is 1"):
        report.on_test_start(run.trainer, run.module)
    run.trainer.limit_test_batches = 1.0
    (tmp_path / "step=5.ckpt").write_bytes(b"others")
    run.trainer.ckpt_path = str(tmp_path / "step=5.ckpt")
    with pytest.raises(ValueError, match=r"policy\.weights was .*folder of its own by --run_dir"):
        report.on_test_start(run.trainer, run.module)
    assert {path: path.read_bytes() for path in (tmp_path / "test").iterdir()} == before


def test_predictions_are_not_replaced_by_others_either(tmp_path, caplog):
    run, report = Run(tmp_path), EvaluationReport()
    report.on_predict_start(run.trainer, run.module)
    run.add(report, group(run.rows[0], "B"))
    report.on_predict_end(run.trainer, run.module)
    report.on_predict_start(run.trainer, run.module)
    assert "has these answers already; they are made again" in caplog.text
    run.trainer.callbacks[0].seed = 5
    with pytest.raises(ValueError, match="seed was 0, is 5"):
        report.on_predict_start(run.trainer, run.module)
    (tmp_path / "predict" / "description.json").unlink()  # as an earlier release left it
    with pytest.raises(ValueError, match="does not say what answered"):
        report.on_predict_start(run.trainer, run.module)


def test_questions_of_several_ranks_come_in_the_order_of_the_rows(tmp_path):
    run, report = Run(tmp_path), EvaluationReport(num_cards=0)
    other = EvaluationReport()
    run.add(other, group(run.rows[1], "A", "B"), group(run.rows[3], "B", "B"))

    class TwoRanks:
        def gather_list(self, local):
            return [*local, *other._questions]

        def gather(self, local):
            return [local, {}]

    run.module.parallel = SimpleNamespace(dp=TwoRanks())
    run.add(report, group(run.rows[0], "B", "B"), group(run.rows[2], "A", "A"))
    report.on_test_end(run.trainer, run.module)
    assert [line["id"] for line in read_samples(tmp_path / "test")["video"]] == ["0", "1", "2", "3"]
    _, results = run.results()
    assert results["scores"]["overall"]["accuracy"] == 2.5 / 4


def test_rows_that_could_not_be_shown_are_counted_as_failures(tmp_path):
    run, report = Run(tmp_path), EvaluationReport(num_cards=0)
    (tmp_path / "lost.mp4").write_bytes(b"")
    run.data.skips("test").add_drawn(UnusableSample(tmp_path / "lost.mp4", "no video", 1, "1"))
    run.add(report, group(run.rows[0], "B"), group(run.rows[2], "B"))
    report.on_test_end(run.trainer, run.module)
    _, results = run.results()
    assert results["failures"] == {"decode": 1}
    assert results["scores"]["overall"]["accuracy"] == 1.0
    assert results["scores_with_failures_as_wrong"]["overall"]["n"] == 3


def test_a_blind_test_is_the_condition_without_video_and_knows_which_video_it_was(tmp_path):
    run, report = Run(tmp_path, blind=True), EvaluationReport(num_cards=0)
    run.add(report, *(group(without_media(row), "B") for row in run.rows))
    report.on_test_end(run.trainer, run.module)
    name, results = run.results()
    assert (name, results["blind"]) == ("no video", True)
    assert all(line["video_id"].endswith(".mp4") for line in read_samples(tmp_path / "test")["no video"])


def test_test_validate_and_evaluate_give_the_same_numbers(tmp_path):
    run, report = Run(tmp_path), EvaluationReport(num_cards=0)
    logged: dict = {}
    run.module.log_dict = logged.update
    groups = [group(row, *letters) for row, letters in zip(run.rows, ("AB", "B", "CB", "A"), strict=True)]
    report.on_validation_epoch_start(run.trainer, run.module)
    report.on_validation_batch_end(run.trainer, run.module, None, Batch([], groups=groups), 0)
    report.on_validation_epoch_end(run.trainer, run.module)
    run.add(report, *groups)
    report.on_test_end(run.trainer, run.module)
    answers = report.outcome.answers
    evaluated = make_outcome("video", run.rows, answers, judge_answers(run.rows, answers), {})
    assert evaluated.summary == report.outcome.summary
    assert logged == {f"val/{name}": value for name, value in logged_values(evaluated.summary).items()}


def test_a_test_without_answers_says_what_is_missing(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ValueError, match="needs at least one answered question, got none; look at trainer.limit_test"):
        EvaluationReport().on_test_end(run.trainer, run.module)


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_questions_that_nothing_answers_end_the_run_before_it_begins(tmp_path, stage):
    run = Run(tmp_path)
    run.trainer.callbacks = []
    with pytest.raises(ValueError, match=r"need rollout\.reward to answer at all; name one by --rollout\.reward"):
        EvaluationReport().setup(run.trainer, run.module, stage)
    EvaluationReport().setup(run.trainer, run.module, "fit")
