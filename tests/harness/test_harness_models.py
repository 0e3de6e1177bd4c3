"""longrl as a model of lmms-eval and of VLMEvalKit: the same answers as `evaluate`, by what these harnesses pass.

Stand-ins have the names and arguments of the real packages (`stand_ins.py`); policies and videos are real.
"""

import importlib
import json
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from PIL import Image

from longrl.commands.evaluate import parse_evaluation
from longrl.datamodules.media.sampling import VideoSampling
from longrl.evaluation.benchmark import Evaluation
from longrl.harness.answerer import HarnessAnswerer, asked_frames, sampling_of
from longrl.harness.vlmevalkit_run import main, split_arguments
from longrl.io.jsonl import read_jsonl
from longrl.types import SamplingParams
from tests.evaluation.scripted import questions, records
from tests.harness.stand_ins import lmms_eval_modules, vlmevalkit_modules
from tests.tiny import vl_folder

TAGGED = "<think>Bob?</think> <answer>C</answer>"


@pytest.fixture
def lmms_eval(monkeypatch):
    for name, module in lmms_eval_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return _fresh(monkeypatch, "longrl.harness.lmms_eval_model")


@pytest.fixture
def vlmevalkit(monkeypatch):
    for name, module in vlmevalkit_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return _fresh(monkeypatch, "longrl.harness.vlmevalkit_model")


def _fresh(monkeypatch, name):
    """The module as it is beside this test's stand-ins."""
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def tiny_config(tmp_path, **more):
    """A random tiny Qwen2.5-VL on the CPU, as a file of `evaluate`."""
    family = {"model": vl_folder(), "random_init": True, "min_pixels": 784, "max_pixels": 784}
    family = {"class_path": "longrl.models.qwen_vl.Qwen2_5_VLFamily", "init_args": family}
    policy = {
        "class_path": "longrl.evaluation.local_policy.LocalPolicy", "init_args": {"family": family, "device": "cpu"},
    }  # fmt: skip
    values = {
        "policy": policy, "sampling": {"num_generations": 1, "max_completion_tokens": 6, "temperature": 0.0},
        "data": {"video": {"fps": 1.0}, "eval_prompts_per_batch": 3, "question_template": "{problem}"} | more,
        "out": str(tmp_path / "harness"),
    }  # fmt: skip
    file = tmp_path / "policy.yaml"
    file.write_text(json.dumps(values))
    return file


def scripted(says=TAGGED):
    """Options of a policy without weights."""
    return {"policy": json.dumps({"class_path": "tests.evaluation.scripted.Scripted", "init_args": {"says": says}})}


def video(record):
    return str(questions().parent / record["videos"])


def messages(doc):
    """As lmms-eval's `_build_user_turn` makes them."""
    content = [{"type": "video", "url": video(doc)}, {"type": "text", "text": doc["problem"]}]
    return [{"role": "user", "content": content}]


def asked(lmms_eval, model, docs, make=messages, **generation):
    """lmms-eval's call of a chat model on one task."""
    instance = sys.modules["lmms_eval.api.instance"].Instance
    model.task_dict = {"tiny": {"test": docs}}
    return model.generate_until([instance((f"{i}", make, generation, i, "tiny", "test")) for i in range(len(docs))])


def shown_in(folder):
    """What was shown for each answer, as it is kept."""
    lines = [line for file in Path(folder, "answers").iterdir() for line in read_jsonl(file)]
    return [answer for line in lines for answer in line["answers"].values()]


def test_lmms_eval_gets_the_answers_of_evaluate(tmp_path, lmms_eval):
    config = tiny_config(tmp_path)
    options = [f"--config={config}", f"--out={tmp_path / 'evaluate'}", f"--data.test={questions()}", "--num_cards=0"]
    Evaluation(*parse_evaluation(options)).run()
    expected = [line["resps"][0][0] for line in read_jsonl(tmp_path / "evaluate" / "samples.jsonl")]
    assert len(expected) == 8

    model = lmms_eval.LongRL.create_from_arg_string(f"config={config}", {"batch_size": 1, "device": "cpu"})
    results = asked(lmms_eval, model, records(), max_new_tokens=6, temperature=0)
    assert [result.text for result in results] == expected
    kept = shown_in(tmp_path / "harness")
    pictures_and_text = [
        [answer["prompt_hash"] for answer in shown_in(tmp_path / name)] for name in ("harness", "evaluate")
    ]
    assert pictures_and_text[0] == pictures_and_text[1]
    assert [result.token_counts.input_tokens for result in results] == [answer["num_prompt_tokens"] for answer in kept]
    assert model.answerer.config.policy.features.num_encoded == 2  # a video once for all its questions
    model.clean()


def test_what_was_answered_is_not_asked_again_but_another_draw_is(tmp_path, lmms_eval):
    log = tmp_path / "asked.txt"
    policy = {"class_path": "tests.evaluation.scripted.Scripted", "init_args": {"log": str(log)}}
    options = {"policy": json.dumps(policy), "out": str(tmp_path)}
    asked(lmms_eval, lmms_eval.LongRL(**options), records()[:2])
    model = lmms_eval.LongRL(**options)
    asked(lmms_eval, model, records()[:3])
    assert log.read_text().split() == ["tiny/test/0", "tiny/test/1", "tiny/test/2"]
    instance = sys.modules["lmms_eval.api.instance"].Instance
    model.generate_until([instance(("", messages, {}, 0, "tiny", "test"))] * 2)
    assert log.read_text().split()[3:] == ["tiny/test/0"]


def test_a_video_that_cannot_be_read_gets_an_empty_answer_and_is_listed(tmp_path, lmms_eval, caplog):
    def parts(doc):
        (turn,) = messages(doc)
        turn["content"].append(
            {"type": "audio", "url": doc["sound"]} if "sound" in doc else {"type": "image", "url": picture}
        )
        return [turn]

    picture = Image.new("RGB", (8, 6))
    docs = [records()[0], {**records()[1], "videos": "missing.mp4"}, {**records()[2], "sound": [0.5, 0.25]}]
    model = lmms_eval.LongRL(**scripted("C"), out=str(tmp_path))
    assert [result.text for result in asked(lmms_eval, model, docs, parts)] == ["C", "", ""]
    missing, unreadable = read_jsonl(tmp_path / "skipped.jsonl")
    assert (missing["id"], unreadable["id"]) == ("tiny/test/1", "tiny/test/2")
    assert "does not exist" in missing["reason"]
    assert "must hold file paths or media" in unreadable["reason"]
    assert "2 of 3 questions could not be asked and get an empty answer" in caplog.text
    assert len(shown_in(tmp_path)[0]["frame_indices"]) == 2  # the video and the picture


def test_wording_and_what_is_handed_over(tmp_path, lmms_eval):
    options = scripted() | {"out": str(tmp_path), "data.question_template": "Think! {problem}"}
    plain = lmms_eval.LongRL(**options)
    own = lmms_eval.LongRL(**options, wording="own", hands_over="answer")
    assert asked(lmms_eval, plain, records()[:1])[0].text == TAGGED
    assert asked(lmms_eval, own, records()[:1])[0].text == "C"
    problem = records()[0]["problem"]
    assert {answer["input"] for answer in shown_in(tmp_path)} == {problem, f"Think! {problem}"}
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with pytest.raises(ValueError, match="wording=own is for one question, got turns of"):
        own.answerer.row("x", turns)
    with pytest.raises(ValueError, match="hands_over must be text or answer, got 'tag'"):
        lmms_eval.LongRL(**options, hands_over="tag")


def test_a_part_of_a_video_is_shown_as_the_task_says(tmp_path, lmms_eval):
    def part(doc):
        (message,) = messages(doc)
        message["content"][0] = {"type": "video", "url": {"url": video(doc), "video_start": 2.0, "video_end": 4.0}}
        return [message]

    model = lmms_eval.LongRL(**scripted(), out=str(tmp_path))
    asked(lmms_eval, model, records()[:1], part)
    times = shown_in(tmp_path)[0]["frame_times"][0]
    assert all(2.0 - 0.25 <= time < 4.0 for time in times)

    def beside_a_whole_one(doc):
        (message,) = part(doc)
        message["content"].append({"type": "video", "url": video(doc)})
        return [message]

    assert asked(lmms_eval, model, records()[:1], beside_a_whole_one)[0].text == ""
    assert "a row has one span" in (tmp_path / "skipped.jsonl").read_text()


def test_sampling_as_a_task_says_it(tmp_path, caplog):
    own = SamplingParams(1, 512, 0.6, 0.95, 20)
    assert sampling_of({}, own) == own
    assert sampling_of({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "until": ["\n"]}, own) == SamplingParams(
        1, 16, 0.0, 1.0, 20
    )
    assert sampling_of({"do_sample": False, "temperature": None}, own).temperature == 0.0
    assert sampling_of({"temperature": 0, "top_p": 0}, own) == replace(own, temperature=0.0)  # as mathverse's tasks say
    assert not caplog.text
    sampling_of({"num_beams": 4}, own)
    assert "num_beams=4 has no effect" in caplog.text
    answerer = HarnessAnswerer.from_options(**scripted(), out=str(tmp_path), sampling="own")
    answerer.answer([answerer.row("x", [{"role": "user", "content": "What?"}])], SamplingParams(1, 1))
    assert answerer.own_sampling.max_completion_tokens == 1024


def test_lmms_eval_finds_the_model_by_its_entry_point(lmms_eval):
    from longrl.harness.lmms_eval_plugin import manifest

    assert manifest().model_id == "longrl"
    module, _, name = manifest().chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), name) is lmms_eval.LongRL
    assert not lmms_eval.LongRL.is_simple
    declared = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\nlongrl = "longrl.harness.lmms_eval_plugin:manifest"' in declared


# ---------------------------------------------------------------------------------------------------------- VLMEvalKit
def message(record):
    """As its `VideoMME.build_prompt` makes it for a model that reads videos."""
    return [
        {"type": "text", "value": ""}, {"type": "video", "value": video(record)},
        {"type": "text", "value": "Look."}, {"type": "text", "value": record["problem"]},
    ]  # fmt: skip


def test_vlmevalkit_gets_the_answers_that_lmms_eval_gets_and_says_how_many_frames(tmp_path, lmms_eval, vlmevalkit):
    def parts(doc):
        (turn,) = messages(doc)
        turn["content"].insert(1, {"type": "text", "text": "Look."})
        return [turn]

    config, five = str(tiny_config(tmp_path)), {"data.video": '{"fps": null, "num_frames": 5}'}
    chat = lmms_eval.LongRL(config=config, out=str(tmp_path / "lmms"), **five)
    expected = [result.text for result in asked(lmms_eval, chat, records()[:2], parts)]
    model = vlmevalkit.LongRL(config=config)
    assert (model.VIDEO_LLM, model.INTERLEAVE, model.nframe > 0, model.fps > 0) == (True, True, True, True)
    model.nframe, model.fps = 5, None  # as its loop sets them for a data set with nframe=5
    assert [model.generate(message(record), "Tiny_5frame") for record in records()[:2]] == expected
    model.nframe, model.fps = None, None  # a data set without either
    model.generate(message(records()[0]), "Tiny")
    own = vlmevalkit.LongRL(config=config, frames="own", out=str(tmp_path / "own"))
    own.generate(message(records()[0]), "Tiny_5frame")
    kept = shown_in(tmp_path / "harness")
    assert {answer["prompt_hash"] for answer in kept[:2]} == {a["prompt_hash"] for a in shown_in(tmp_path / "lmms")}
    frames = [len(answer["frame_indices"][0]) for answer in kept]
    assert frames == [5, 5, len(shown_in(tmp_path / "own")[0]["frame_indices"][0])]
    assert own.nframe is own.fps is None
    for each in (model, own):
        each.answerer.close()


def test_frames_that_a_data_set_asks_for():
    video = VideoSampling(fps=2.0, min_frames=4, max_frames=32, moments="ends")
    assert asked_frames(video, None, None) is video
    assert asked_frames(video, 64, None) == VideoSampling(None, 64, 4, 64, moments="ends")
    assert asked_frames(video, 2, None).min_frames == 2
    assert asked_frames(VideoSampling(None, 8, 4), None, 1.0) == VideoSampling(1.0, min_frames=4)


def test_vlmevalkits_script_finds_the_model(tmp_path, vlmevalkit, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, vlmeval.vlm\nfrom vlmeval.config import supported_VLM\n"
        "made = supported_VLM['longrl']()\nassert isinstance(made, vlmeval.vlm.LongRL)\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(f'{{made.answerer.folder}} {{sys.argv[1:]}}')\n"
    )
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (policy,) = scripted().values()
    main([f"policy={policy}", f"out={tmp_path}", str(script), "--model", "longrl"])
    assert (tmp_path / "seen").read_text() == f"{tmp_path} ['--model', 'longrl']"
    with pytest.raises(ValueError, match=r"behind the model's options stands the path of VLMEvalKit's run.py, got 'no"):
        split_arguments(["a=1", "no.py"])


def test_neither_harness_is_imported_by_longrl():
    assert not {name for name in sys.modules if name.split(".")[0] in ("lmms_eval", "vlmeval")}
    assert all(point.value.startswith("longrl.") for point in entry_points(group="lmms_eval.models"))
