"""Evaluations that ask with tools: answers of several turns, stored under the environment, shown with their frames."""

import json

import pytest

from longrl.evaluation.turn_cards import turn_cards
from longrl.io.jsonl import read_jsonl
from longrl.turns import ToolCall, Turn, call_text, restored_turn, saved_turn, turns_text
from tests.evaluation.scripted import questions
from tests.evaluation.test_local_policy import evaluation, run_test
from tests.runs import config, rollouts, videos

ENVIRONMENT = {"make": "tests.environment_runs.Clips", "options": {"always": True}, "max_turns": 3, "num_workers": 1}
TURNS = (
    Turn("assistant", 'I look. <tool_call>\n{"name": "zoom"}\n</tool_call>', 9),
    Turn(
        "tool", "The frame: <image>\n<b>no</b>", 30,
        (
            ToolCall("zoom", {"time_s": 2.5, "box": [0, 0, 500, 1000]}, None, 0.1, (2.5, 2.5), (2.5,)),
            ToolCall("zoom", {"time_s": 99}, "<b>there is no such time</b>"),
        ),
    ),
    Turn("assistant", "<answer>A</answer>", 5),
)  # fmt: skip


def test_turns_survive_json_and_read_as_text():
    saved = json.loads(json.dumps([saved_turn(turn) for turn in TURNS]))
    assert tuple(map(restored_turn, saved)) == TURNS
    assert call_text(TURNS[1].calls[1]) == "zoom(time_s=99)"
    text = turns_text(TURNS)
    assert "-> zoom(time_s=2.5, box=[0, 0, 500, 1000]): 1 frame\n" in text
    assert "-> zoom(time_s=99): ERROR <b>there is no such time</b>\n" in text
    assert text.endswith("<answer>A</answer>")


def test_cards_show_the_box_that_a_call_asked_for():
    clip = next((videos() / "videos").glob("*.mp4"), None) or next(videos().rglob("*.mp4"))
    _, answered, _ = turn_cards([saved_turn(turn) for turn in TURNS], [str(clip)])
    (image, time_s), *others = answered.calls[0].frames
    assert (time_s, others, image.height) == (2.5, [], 2 * image.width)
    assert list(answered.calls[1].frames) == []
    gone = turn_cards([saved_turn(turn) for turn in TURNS], ["nowhere.mp4"])
    assert list(gone[1].calls[0].frames) == []
    others = ToolCall("look", {"video": 1, "box": [0, 0, 10**400, 1]}, None, 0.1, None, (2.5,))
    (card,) = turn_cards([saved_turn(Turn("tool", "", 1, (others,)))], [str(clip)])
    assert list(card.calls[0].frames) == []


def with_tools(folder, **options):
    """An evaluation whose answers have turns, of a policy that says nothing sensible."""
    environment = f"--policy.init_args.environment={json.dumps(ENVIRONMENT | options)}"
    sampled = ("--sampling.temperature=1.0", "--num_cards=2")
    return evaluation(folder, environment, *sampled, engine={"class_path": "tests.environment_runs.ShortTurns"})


def test_an_evaluation_asks_with_tools_and_shows_what_they_showed(tmp_path):
    first = with_tools(tmp_path / "evaluation")
    first.run()
    lines = read_jsonl(tmp_path / "evaluation" / "samples.jsonl")
    calls = [call for line in lines for turn in line["turns"][0] for call in turn["calls"]]
    assert any(call["frame_times"] for call in calls)
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "crop_video(start_s=" in page
    assert page.count('alt="frame"') > 0
    assert json.loads((tmp_path / "evaluation" / "results.json").read_text())["policy"]["environment"]["max_turns"] == 3

    again = with_tools(tmp_path / "evaluation", max_turns=2)
    with pytest.raises(ValueError, match=r"max_turns"):  # the answers of another environment are none of its own
        again.run()


def test_frames_are_not_shuffled_where_tools_would_show_them_in_order(tmp_path):
    environment = f"--policy.init_args.environment={json.dumps(ENVIRONMENT)}"
    engine = {"class_path": "tests.environment_runs.ShortTurns"}
    with pytest.raises(ValueError, match=r"the tools of policy\.init_args\.environment would show .* in order"):
        evaluation(tmp_path / "evaluation", environment, "--shuffled_baseline=true", engine=engine).run()
    values = config("rl")
    values["rollout"] = rollouts(environment=ENVIRONMENT, engine=engine)
    values["data"] |= {"test": str(questions()), "train": None, "shuffle_frames": True}
    with pytest.raises(ValueError, match=r"the tools of rollout\.environment would show .* in order"):
        run_test(tmp_path / "run", values)


@pytest.mark.slow
def test_answers_with_tools_are_those_of_test(tmp_path):
    values = config("rl")
    values["trainer"]["callbacks"] = [{"class_path": "longrl.callbacks.evaluation.EvaluationReport"}]
    sampling = {"num_generations": 1, "max_completion_tokens": 6, "temperature": 1.0}
    engine = {"class_path": "tests.environment_runs.ShortTurns"}
    values["rollout"] = rollouts(sampling=sampling, eval_sampling=sampling, environment=ENVIRONMENT, engine=engine)
    values["data"] |= {"test": str(questions()), "eval_prompts_per_batch": 3, "train": None}
    run_test(tmp_path / "run", values)
    with_tools(tmp_path / "evaluation").run()
    lines, others = (read_jsonl(tmp_path / name / "samples.jsonl") for name in ("run/test", "evaluation"))
    assert [line["turns"] for line in lines] == [line["turns"] for line in others]
    assert [line["resps"] for line in lines] == [line["resps"] for line in others]
    described = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run/test", "evaluation")]
    assert described[0]["policy"]["environment"] == described[1]["policy"]["environment"]
