"""A model behind an endpoint answers with tools; what is kept can be replayed, is right, and has looked."""

import json
import time
from typing import ClassVar

import pytest

from longrl.chat.endpoint import Reply
from longrl.commands.pipeline import run_step
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows import longvideo_reason_row
from longrl.pipeline.config import TraceOptions
from longrl.pipeline.step_run import Workspace
from longrl.testing.tool_traces import crop_call
from tests.chat.server import Server, completion
from tests.datamodules.media.test_video import write
from tests.pipeline.test_steps import config
from tests.tiny import vl_family

CALL = f"<think>Too coarse.</think>\n{crop_call(1, 2)}"
RIGHT = "<think>I saw it.</think><answer>B</answer>"
WRONG = "<think>I saw it.</think><answer>A</answer>"


@pytest.fixture
def records(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "v.mp4", 40)
    common = {"problem": "Which?\nA. red\nB. blue", "answer": "<answer>B</answer>", "videos": "v.mp4"}
    rows = [{**common, "problem_id": name, "problem": f"{name}: {common['problem']}"} for name in "abcd"]
    rows.append({**common, "problem_id": "no video", "videos": None})
    rows.append({**common, "problem_id": "open", "problem": "Why?", "answer": "for fun", "task": "open_ended"})
    path = tmp_path / "data" / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def policy(scripts):
    """Answers by the question's name, turn by turn; attempts of a question take its scripts in order."""
    begun = dict.fromkeys(scripts, -1)

    def reply(body):
        messages = body["messages"]
        text = messages[0]["content"][-1]["text"] if body["seed"] == 0 else messages[0]["content"][-2]["text"]
        name = next(name for name in scripts if f"{name}: Which?" in text)
        if len(messages) == 1:
            begun[name] += 1
        turns = scripts[name][min(begun[name], len(scripts[name]) - 1)]
        return completion(turns[(len(messages) - 1) // 2])

    return reply


def options(records, **values):
    return {"trace": TraceOptions(records=str(records), num_frames=2, attempts=2, max_turns=3, **values)}


def test_traces_that_are_right_and_looked_are_kept(tmp_path, records):
    """Others are asked again, and left out in the end; a second run asks for nothing that is there."""
    scripts = {
        "a": [[CALL, RIGHT]],
        "b": [[RIGHT], [CALL, CALL, RIGHT]],  # without a look, then with two
        "c": [[CALL, WRONG], ["<tool_call>{</tool_call>", RIGHT]],
        "d": [[CALL, CALL, CALL]],
    }
    out = tmp_path / "out"
    with Server(policy(scripts)) as server:
        chosen = config(out, server.url, max_failed_share=0.6, **options(records))
        report = run_step(chosen, "trace")
        kept = Workspace(out).read("trace")
        calls = len(server.bodies)
        shown = server.bodies[-1]["messages"][-1]["content"]
        assert any(part["type"] == "image_url" and part["image_url"]["url"].startswith("data:") for part in shown)
    assert [record["problem_id"] for record in kept] == ["a", "b"]
    assert [message["role"] for message in kept[1]["trace"]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    wanted = {"no call": 1, "wrong answer": 1, "call with an error": 1, "no answer": 2, "left out": 2, "given up": 2}
    assert {name: report.counts[name] for name in wanted} == wanted
    assert calls == 2 + (1 + 3) + (2 + 1) + 2 * 3

    # The kept ones are rows of SFT, whose targets show what the tools showed.
    root = str(records.parent)
    renderer = RowRenderer(vl_family(), VideoSampling(fps=0.5, min_frames=1), stage="sft")
    for record in kept:
        target = renderer(longvideo_reason_row(record, 0, root)).response
        assert 0 < target.num_sampled < len(target.token_ids)
        assert len(target.media) == len(record["trace"]) // 2
        assert {part["video"] for message in record["trace"][1::2] for part in message["content"][1:]} == {"v.mp4"}

    # Everything that was answered is on disk.
    with Server(500) as server:
        last = config(out, server.url, max_failed_share=1.0, **options(records))
        run_step(last, "trace")
        assert Workspace(out).read("trace") == kept


class Restless:
    """A tool whose answers differ from call to call."""

    tools = ()
    count = 0

    def reset(self, row):
        pass

    def step(self, text):
        type(self).count += 1
        return f"number {self.count}" if "<tool_call>" in text else None


class Broken(Restless):
    """One that raises."""

    def step(self, text):
        raise ConnectionRefusedError("nobody is there")


class Hanging(Restless):
    """One that does not answer in time."""

    def step(self, text):
        time.sleep(0.5)


class Short(Restless):
    """One that answers the first time that it is asked about a row alone."""

    begun: ClassVar[set[str]] = set()

    def reset(self, row):
        self.is_first = row.id not in self.begun
        self.begun.add(row.id)

    def step(self, text):
        return "a number" if self.is_first and "<tool_call>" in text else None


@pytest.mark.parametrize(
    ("tools", "problem"),
    [
        ("Restless", "not reproducible"),
        ("Short", "not reproducible"),
        ("Broken", "environment failed"),
        ("Hanging", "environment failed"),
    ],
)
def test_what_cannot_be_replayed_is_not_kept(tmp_path, records, tools, problem, monkeypatch):
    monkeypatch.setattr("longrl.pipeline.traces.STEP_S", 0.1 if tools == "Hanging" else 60.0)
    with Server(policy({name: [[CALL, RIGHT]] for name in "abcd"})) as server:
        tools = f"tests.pipeline.test_traces.{tools}"
        chosen = config(tmp_path / "out", server.url, max_failed_share=1.0, **options(records, tools=tools))
        report = run_step(chosen, "trace")
    assert report.counts[problem] >= 1
    assert report.counts["given up"] == 4
    assert Workspace(tmp_path / "out").read("trace") == []


def test_calls_and_thinking_that_a_server_tells_apart_are_a_part_of_the_turn():
    function = {"name": "crop_video", "arguments": '{"start_s": 1}'}
    message = {"content": None, "reasoning_content": "Hm.", "tool_calls": [{"function": function}]}
    reply = Reply.of({"choices": [{"message": message}]})
    assert reply.text.strip() == '<tool_call>\n{"name": "crop_video", "arguments": {"start_s": 1}}\n</tool_call>'
    assert reply.reasoning == "Hm."
