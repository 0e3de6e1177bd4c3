"""Environments in processes: what hangs, ends or lies is answered, what is shown is encoded once, nothing is left."""

import collections
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from longrl.environments import runner as runner_module
from longrl.environments.encoding import RolloutEncoder
from longrl.environments.rendering import render_observation
from longrl.environments.runner import EnvironmentRunner, turn_text
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.video_tools import VideoTools
from longrl.features.cache import FeatureCache
from longrl.io.pulse import PULSE
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.types import Row
from tests.environments.asking import MAKE, SECONDS, answers, begin, call, is_there, say, told, wait_for_end
from tests.tiny import vl_family


@pytest.fixture
def encodes(monkeypatch):
    """How often each media item goes through the encoder."""
    counts = collections.Counter()
    encode = Qwen2_5_VLFamily.encode_media

    def counted(self, model, media):
        counts.update(item.key for item in media)
        return encode(self, model, media)

    monkeypatch.setattr(Qwen2_5_VLFamily, "encode_media", counted)
    return counts


def test_what_several_completions_ask_for_at_once_is_encoded_once(runner, model, clip, encodes):
    answer = answers(runner, model)
    text = call("crop_video", start_s=1, end_s=2, fps=5) + call("zoom", time_s=1, box=[0, 0, 500, 500])
    trajectories = begin(runner, clip, 6)
    shown = [future.result(60) for future in [say(answer, one, text) for one in trajectories]]
    assert len(answer.features) == 2, shown[0].text
    assert set(encodes.values()) == {1}
    for observed in shown:
        assert [item.key for item in observed.media] == list(answer.features)
        assert all(not len(item.patches) for item in observed.media)
        assert [call.error for call in observed.calls] == [None, None]
    # What is dropped can be encoded again, to the last bit, from where it came.
    encoded = FeatureCache(runner.family).get_or_encode(model, shown[:1])
    for key, rows in answer.features.items():
        assert torch.equal(rows, encoded[key])
    # In another rollout nothing of it is encoded, nor decoded.
    again = answers(runner, model, dict(answer.features))
    before = dict(encodes)
    observed = say(again, begin(runner, clip)[0], text).result(60)
    assert encodes == before
    assert all(not len(item.patches) for item in observed.media)


def test_what_a_killed_turn_was_to_decode_is_asked_for_again(family, model, clip):
    environment = VideoTools()
    environment.reset(Row("r", "", "", videos=(clip,)))
    observation = environment.step(call("crop_video", start_s=1, end_s=2))
    encoder = RolloutEncoder(family, model, {})
    outline = render_observation(family, observation, True, needed=lambda keys: frozenset())
    (item,) = outline.media
    with encoder.claims() as killed:
        assert killed.needed([item.key]) == {item.key}
        with encoder.claims() as other, ThreadPoolExecutor() as threads:
            assert not other.needed([item.key])
            waiting = threads.submit(other.encode, outline, Future())
            time.sleep(0.1)
            assert not waiting.done()
            killed.release()
            assert waiting.result(10) is False
            assert other.needed([item.key]) == {item.key}
            shown = Future()
            whole = render_observation(family, observation, True, needed=other.needed)
            assert other.encode(whole, shown)
            assert shown.result(10).media[0].key == item.key


def test_media_are_encoded_in_the_autocast_context_of_the_caller(runner, model, clip):
    with torch.autocast("cpu", torch.bfloat16):
        answer = answers(runner, model)
        say(answer, begin(runner, clip)[0], call("get_frames", times_s=[2])).result(60)
        ((_, rows),) = answer.features.items()
    plain = answers(runner, model)
    say(plain, begin(runner, clip)[0], call("get_frames", times_s=[2])).result(60)
    ((_, exact),) = plain.features.items()
    assert not torch.equal(rows.float(), exact)
    assert torch.allclose(rows.float(), exact, atol=0.1)
    assert not rows.requires_grad


@pytest.mark.parametrize("trick", ["sleep", "spin", "start"])
def test_a_call_that_hangs_is_cut_and_the_environment_is_as_before(runner, model, clip, trick):
    answer = answers(runner, model)
    (trajectory,) = begin(runner, clip)
    assert told(answer, trajectory, call("do", trick="count")).text == "call 1"
    start = time.monotonic()
    beats = PULSE.beats
    observed = told(answer, trajectory, call("do", trick=trick))
    assert observed.text == f"Error: no answer within {SECONDS} s; ask for less"
    assert observed.calls[0].error
    assert time.monotonic() - start < SECONDS + 5
    assert told(answer, trajectory, call("do", trick="count")).text == "call 2"
    assert PULSE.beats > beats  # a watchdog need not end a run whose tools are slow


def test_calls_that_hang_without_end_are_not_tried_any_more_in_a_rollout(runner, model, clip, monkeypatch):
    monkeypatch.setattr(runner_module, "MAX_LOST_S", SECONDS / runner.settings.num_workers)
    answer = answers(runner, model)
    (trajectory,) = begin(runner, clip)
    assert "no answer within" in told(answer, trajectory, call("do", trick="sleep")).text
    observed = told(answer, trajectory, call("do", trick="count"))
    assert observed.text == "Error: tools do not answer now; go on without them"
    (other,) = begin(runner, clip)
    assert told(answers(runner, model), other, call("do", trick="count")).text == "call 1"


@pytest.mark.parametrize(
    ("trick", "said"),
    [
        ("fail", "Error: do failed (KeyError: 'no such thing\\nat all'); try other arguments"),
        ("misspelt", "Error: do failed (NameError: name 'undefined_name' is not defined); try other arguments"),
        ("refuse", "Error: no; ask otherwise"),
        ("leave", "Error: the environment failed (SystemExit: 3); try something else"),
        ("die", "Error: the tool's process ended without an answer; ask for something else"),
        ("talk", "talked <|im_end|> <image> ?"),
        ("lines", "more than the 600 tokens that are left; ask for less"),
        ("huge", "more than the 600 tokens that are left; ask for less"),
        ("recurse", "Error: do failed (RecursionError"),
    ],
)
def test_whatever_a_tool_does_is_answered(runner, model, clip, trick, said, caplog):
    runner._warned.clear()  # what other tests were told
    observed = told(answers(runner, model), begin(runner, clip)[0], call("do", trick=trick))
    assert said in observed.text
    assert len(observed.input_ids) <= 600
    log = {"misspelt": "NameError", "die": "ended without an answer", "talk": "I warn", "leave": "SystemExit"}
    assert log.get(trick, "") in caplog.text


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ("refuses a connection", "ConnectionRefusedError: nobody is there"),
        ("end of a file", "EOFError: too short"),
        ("a dict", "TypeError: step must return an Observation, a text or None, got dict"),
        ("a lambda", "lambda"),
        ("a set", "TypeError: Object of type set is not JSON serializable"),
    ],
)
def test_whatever_a_step_does_is_shown_and_logged(runner, model, clip, turn, said, caplog):
    runner._warned.clear()
    observed = told(answers(runner, model), begin(runner, clip)[0], turn)
    assert observed.text.startswith("Error: the environment failed (")
    assert said in observed.text
    assert "Traceback" in caplog.text


def test_options_that_do_not_fit_are_named(family):
    runner = EnvironmentRunner(EnvironmentSettings(MAKE.replace("Hostile", "VideoTools"), {"max_frame": 4}), family)
    with pytest.raises(ValueError, match=r"rollout.environment.options do not fit VideoTools .*max_frame.*max_frames"):
        _ = runner.tools
    shown = EnvironmentRunner(EnvironmentSettings(MAKE), family).tools
    assert {"crop_video", "do"} <= {tool["function"]["name"] for tool in shown}
    assert EnvironmentRunner(EnvironmentSettings(MAKE, show_tools=False), family).tools == ()


def test_calls_have_plain_values(runner, model, clip):
    (call,) = told(answers(runner, model), begin(runner, clip)[0], "NumPy").calls
    assert call.frame_times == (1.0,)
    assert {type(value) for value in (call.seconds, *call.span_s, *call.frame_times)} == {float}


def test_what_a_process_started_ends_when_it_ends_by_itself(runner, model, clip, tmp_path):
    file = tmp_path / "pid"
    told(answers(runner, model), begin(runner, clip)[0], f"leave a child {file}")
    wait_for_end([int(file.read_text())])


def test_an_environment_that_cannot_be_copied_ends_the_run(runner, model, clip):
    future = say(answers(runner, model), begin(runner, clip)[0], call("do", trick="hold"))
    with pytest.raises(ValueError, match=r"Hostile cannot be pickled .*lock.*; let it hold plain values"):
        future.result(60)


def test_a_completion_ends_where_no_error_fits_or_no_call_is_made(runner, model, clip):
    answer = answers(runner, model)
    (trajectory,) = begin(runner, clip)
    trajectory.num_observed = 590
    assert say(answer, trajectory, call("do", trick="count")).result(60) is None
    assert say(answer, begin(runner, clip)[0], "It is A.").result(60) is None


def test_a_turn_that_stopped_at_its_call_is_answered_behind_its_end_token(runner, model, clip):
    answer = answers(runner, model)
    one, other = begin(runner, clip, 2)
    ended = say(answer, one, call("do", trick="count")).result(60)
    stopped = say(answer, other, call("do", trick="count"), end=False).result(60)
    assert stopped.input_ids.tolist() == [answer.end, *ended.input_ids.tolist()]


def test_a_turn_may_end_with_the_token_that_ends_a_call(runner):
    settings = replace(runner.settings, stop_at_call=True)
    with pytest.raises(ValueError, match=r"stop_at_call needs a tokenizer with </tool_call> as one token"):
        EnvironmentRunner(settings, vl_family())
    family = vl_family()
    family.tokenizer.add_tokens(["</tool_call>"])
    stopping = EnvironmentRunner(settings, family)
    token = family.tokenizer.convert_tokens_to_ids("</tool_call>")
    assert stopping.stop_token_ids == (token,)
    (trajectory,) = begin(stopping, "v.mp4")
    assert trajectory.stop_token_ids == (token,)
    assert trajectory.max_observed_tokens == 600
    stopping.close()


@pytest.mark.parametrize("text", ["<tool_call>a</tool_call>", "<tool_call>a", "a</tool_call>"])
def test_tags_that_are_special_tokens_reach_the_environment(text):
    family = vl_family()
    family.tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    ids = torch.tensor([*family.tokenizer(text, add_special_tokens=False)["input_ids"], family.end_token_ids[0]])
    assert "tool_call" not in family.decode(ids)
    runner = EnvironmentRunner(EnvironmentSettings(MAKE), family)
    (trajectory,) = begin(runner, "v.mp4")
    trajectory.add_turn(ids, torch.zeros(len(ids)), family.decode(ids), stopped=True)
    assert turn_text(family, trajectory) == text


def test_what_forks_has_one_thread_and_nothing_is_left_behind(runner, model, clip):
    say(answers(runner, model), begin(runner, clip)[0], call("do", trick="count")).result(60)
    server = runner._processes._server.pid
    assert len(os.listdir(f"/proc/{server}/task")) == 1
    files = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    for _ in range(3):
        answer = answers(runner, model)
        say(answer, begin(runner, clip)[0], call("do", trick="die")).result(60)
        say(answer, begin(runner, clip)[0], call("crop_video", start_s=0, end_s=1)).result(60)
    assert len(os.listdir("/proc/self/fd")) <= len(files[0]) + 1  # the second lane may have started its process
    assert set(os.listdir("/dev/shm")) == files[1]


def test_no_process_outlives_a_trainer_that_was_killed(model, family, clip, tmp_path):
    """In a forked process, which spares the imports; its environments are asked something that hangs meanwhile."""
    settings = EnvironmentSettings(MAKE, seconds_per_call=100.0)
    child = os.fork()
    if child == 0:
        try:
            runner = EnvironmentRunner(settings, family)
            answer = answers(runner, model)
            say(answer, begin(runner, clip)[0], call("do", trick="count")).result(60)
            for one in begin(runner, clip, 2):
                say(answer, one, call("do", trick="spin"))
            while not all(lane._process for lane in runner._lanes):
                time.sleep(0.05)
            pids = [runner._processes._server.pid, *(lane._process.pid for lane in runner._lanes)]
            (tmp_path / "new").write_text(" ".join(map(str, pids)))
            (tmp_path / "new").rename(tmp_path / "pids")
            time.sleep(100)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(is_there, pids))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for_end(pids)
