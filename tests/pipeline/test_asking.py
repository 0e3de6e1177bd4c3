"""Replies that cannot be used: asked for again with the form that is wanted, by the same command given again too."""

import json

import pytest

from longrl.chat.client import ReplyCache
from longrl.chat.endpoint import Decoding, Endpoint, Reply
from longrl.pipeline.asking import Task, UnusableReply, ask_all
from longrl.pipeline.config import PipelineConfig
from longrl.pipeline.step_run import StepReport, StepRun, Workspace
from tests.chat.server import Server, completion

FORM = 'a last line "SCORE: x"'


def read_number(reply: Reply, item: dict) -> float:
    if not reply.text.startswith("SCORE: "):
        raise UnusableReply("not judged", f"no score in {reply.text!r}")
    return float(reply.text.removeprefix("SCORE: "))


def ask(folder, server, *ids, attempts=1, max_failed_share=0.0):
    """One command: the values of the items, and its report."""
    endpoint = Endpoint("any", server.url, concurrency=1, retries=0)
    run = StepRun(
        PipelineConfig(videos="none", out=str(folder)), Workspace(folder), StepReport("filter", max_failed_share),
        ReplyCache(folder / "responses"),
    )  # fmt: skip

    def request(item, attempt):
        return endpoint.request(f"Grade {item['id']}.", Decoding(), attempt)

    try:
        return ask_all(run, [{"id": name} for name in ids], Task(request, read_number, FORM, attempts), endpoint), run
    finally:
        run.replies.log.close()


def asked(server) -> list[str]:
    return [body["messages"][-1]["content"] for body in server.bodies]


def test_rubbish_first_and_a_good_reply_then_end_one_command(tmp_path):
    with Server(completion("0"), completion("SCORE: 0.5")) as server:
        values, run = ask(tmp_path, server, "a", attempts=3)
    assert values == [0.5]
    first, second = asked(server)
    assert first == "Grade a."
    assert second == f"Grade a.\n\nAn earlier reply to this could not be used. Reply in this form: {FORM}"
    assert [body["seed"] for body in server.bodies] == [0, 1]
    assert (run.report.failed, run.report.counts["not judged"]) == (0, 1)


def test_the_same_command_asks_again_what_the_log_has_no_usable_reply_to(tmp_path):
    with Server(completion("0")) as server:
        with pytest.raises(ValueError, match=r"2 of 2 items .* tries them again, asking anew; a usable reply is"):
            ask(tmp_path, server, "a", "b", attempts=2)
        assert len(server.bodies) == 4  # a limited number of tries
        server.outcomes = [completion("SCORE: 1")]
        values, run = ask(tmp_path, server, "a", "b", attempts=2)
        assert values == [1.0, 1.0]
        assert [body["seed"] for body in server.bodies[4:]] == [2, 2]
        assert run.report.calls["replies from disk"] == 4
        ask(tmp_path, server, "a", "b", attempts=2)
        assert len(server.bodies) == 6  # what is usable is not asked for again


def test_the_report_says_what_is_wanted(tmp_path):
    with Server(completion("7 of 10")) as server:
        _, run = ask(tmp_path, server, "a", max_failed_share=1.0)
    (given_up,) = [problem for problem in run.report.problems if problem["kind"] == "given up"]
    assert given_up["text"] == f"no usable reply, wanted is {FORM}; the last: no score in '7 of 10'"
    assert json.loads(run.report.to_json())["wanted"] == [FORM]


def test_replies_to_the_wording_of_an_earlier_release_are_taken(tmp_path):
    endpoint = Endpoint("any", "http://127.0.0.1:9/v1")
    with Server(completion("0"), completion("SCORE: 0.25")) as server:
        asked_plainly = [endpoint.request("Grade a.", Decoding(), attempt) for attempt in range(2)]
        replies = ReplyCache(tmp_path / "responses")
        for request, text in zip(asked_plainly, ("0", "SCORE: 0.25"), strict=True):
            replies.log.append(request.key, {"response": completion(text)})
        replies.log.close()
        values, _ = ask(tmp_path, server, "a", attempts=2)
    assert (values, server.bodies) == ([0.25], [])


# ---- results of steps ----


def test_a_step_with_another_result_keeps_the_earlier_one_and_says_so(tmp_path, caplog):
    space = Workspace(tmp_path)
    space.write("filter", [{"id": "a"}])
    space.write("filter", [{"id": "b"}, {"id": "a"}])  # more than there was
    assert "another result" not in caplog.text
    space.write("filter", [{"id": "b"}])
    assert "7_filtered.jsonl has another result now; the earlier one is 7_filtered.jsonl.old1" in caplog.text
    assert space.read("filter") == [{"id": "b"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7_filtered.jsonl", "7_filtered.jsonl.old1"]
