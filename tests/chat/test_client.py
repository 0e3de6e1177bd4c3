import asyncio
import json
import time

import pytest

from longrl.chat.client import BudgetSpent, CallFailed, ChatClient, ReplyCache
from longrl.chat.endpoint import Budget, Decoding, Endpoint, Request, read_reply
from longrl.io.append_log import AppendLog
from tests.chat.server import Dripping, Server, completion

HELLO = ({"role": "user", "content": "Hello"},)


def endpoint(server: Server, **options) -> Endpoint:
    return Endpoint("m", server.url, **{"backoff_s": 0.01, "timeout_s": 2.0, "retries": 3, **options})


def request(text: str = "Hello", sample: int = 0, **options) -> Request:
    decoding = Decoding(temperature=0.5, max_tokens=9)
    return Request("m", ({"role": "user", "content": text},), decoding, sample, **options)


def ask(server: Server, folder, *requests: Request, budget: Budget | None = None, **options):
    """What becomes of requests that are made together."""

    async def together():
        async with ChatClient(endpoint(server, **options), ReplyCache(str(folder), budget)) as client:
            return await asyncio.gather(*(client.ask(one) for one in requests or (request(),)), return_exceptions=True)

    return asyncio.run(together())


def test_a_reply_has_text_and_tokens_and_the_server_sees_all_that_decides_it(tmp_path):
    with Server(completion("Hi")) as server:
        (reply,) = ask(server, tmp_path, request(sample=3, extra={"top_k": 5}))
    assert (reply.text, reply.prompt_tokens, reply.completion_tokens) == ("Hi", 10, 5)
    (body,) = server.bodies
    assert body == {
        "model": "m", "messages": list(HELLO), "temperature": 0.5, "top_p": 1.0, "max_tokens": 9, "seed": 3, "top_k": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (429, "http 429"),
        (500, "http 500"),
        (503, "http 503"),
        (b'{"choices": [{"mess', "garbled"),
        (b"<html>", "garbled"),
        ({"choices": []}, "garbled"),
        ({"error": "x"}, "garbled"),
        (1.0, "timeout"),
    ],
)
def test_what_may_pass_is_repeated_and_kept(tmp_path, fault, kind):
    with Server(fault, completion("Hi")) as server:
        (reply,) = ask(server, tmp_path, timeout_s=0.5)
    assert reply.text == "Hi"
    failure, answer = list(AppendLog(tmp_path).read())
    assert (failure["key"], failure["kind"]) == (None, kind)
    assert answer["response"]["choices"][0]["message"]["content"] == "Hi"
    assert answer["request"]["messages"] == list(HELLO)


def test_a_server_that_is_away_is_a_failed_call(tmp_path):
    with Server(completion("Hi")) as server:
        pass
    (error,) = ask(server, tmp_path, retries=1)
    assert isinstance(error, CallFailed)
    assert error.kind == "connection"
    assert "attempts: 2" in str(error)


def test_a_request_that_is_refused_fails_at_once_and_is_no_reply(tmp_path):
    with Server(400) as server:
        (error,) = ask(server, tmp_path)
        assert isinstance(error, CallFailed)
        assert len(server.bodies) == 1
        ask(server, tmp_path)
        assert len(server.bodies) == 2  # another run tries again


def test_a_wrong_key_says_where_keys_come_from(tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with Server(401) as server:
        (error,) = ask(server, tmp_path, key_variable="MY_KEY")
    assert isinstance(error, ValueError)
    assert "MY_KEY (key_variable), which is not set" in str(error)


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-7")
    with Server(completion("Hi")) as server:
        ask(server, tmp_path, key_variable="MY_KEY")
    assert server.keys == ["Bearer secret-7"]
    assert all(b"secret-7" not in path.read_bytes() for path in tmp_path.iterdir())


def test_retry_after_is_waited_for(tmp_path):
    started = time.monotonic()
    with Server(429, completion("Hi"), headers={"Retry-After": "0.4"}) as server:
        ask(server, tmp_path)
    assert time.monotonic() - started >= 0.4


def test_equal_requests_are_one_call_now_and_later(tmp_path):
    with Server(completion("Hi")) as server:
        replies = ask(server, tmp_path, *[request()] * 5)
        assert len(server.bodies) == 1
        assert replies == ask(server, tmp_path, *[request()] * 5)
        assert len(server.bodies) == 1
        ask(server, tmp_path, request(sample=1), request("Bye"))
        assert len(server.bodies) == 3


def test_no_more_calls_than_concurrency_are_under_way(tmp_path):
    def slow(body):
        time.sleep(0.05)
        return completion("Hi")

    with Server(slow) as server:
        ask(server, tmp_path, *[request(str(n)) for n in range(12)], concurrency=3)
    assert server.most_at_once == 3


def test_the_budget_counts_earlier_runs_and_failed_attempts(tmp_path):
    with Server(500, completion("Hi")) as server:
        found = ask(server, tmp_path, *[request(str(n)) for n in range(4)], budget=Budget(max_calls=3), concurrency=1)
        assert [getattr(one, "text", None) for one in found] == ["Hi", "Hi", None, None]
        assert isinstance(found[2], BudgetSpent)
        assert "budget.max_calls=3 is spent" in str(found[2])
        assert len(server.bodies) == 3
        found = ask(server, tmp_path, request("0"), request("3"), budget=Budget(max_calls=3))
        assert found[0].text == "Hi"  # what was paid for is there
        assert isinstance(found[1], BudgetSpent)
        assert len(server.bodies) == 3


@pytest.mark.parametrize("budget", [Budget(max_tokens=30), Budget(max_cost=0.00045)])
def test_tokens_and_money_end_a_run_too(tmp_path, budget):
    prices = {"input_price": 10.0, "output_price": 20.0}  # a call: 10 * 10 + 5 * 20 = 200 millionths
    with Server(completion("Hi")) as server:
        found = ask(server, tmp_path, *[request(str(n)) for n in range(4)], budget=budget, concurrency=1, **prices)
    answered = sum(not isinstance(one, Exception) for one in found)
    assert answered == (2 if budget.max_tokens else 3)


def test_images_are_loaded_for_a_call_only_and_named_by_content(tmp_path):
    loaded = []

    def load():
        loaded.append(1)
        return {"frame:a": "data:image/jpeg;base64,AAAA"}

    parts = [{"type": "image_url", "image_url": {"url": name}} for name in ("frame:a", "frame:b")]
    asked = Request("m", ({"role": "user", "content": parts},), Decoding(), load=load)
    with Server(completion("Hi")) as server:
        (reply,) = ask(server, tmp_path, asked)
        assert reply.broken_images == 1
        sent = server.bodies[0]["messages"][0]["content"]
        assert sent[0]["image_url"]["url"] == "data:image/jpeg;base64,AAAA"
        assert sent[1] == {"type": "text", "text": "(this frame is broken)"}
        (reply,) = ask(server, tmp_path, asked)
        assert reply.broken_images == 1
    assert len(loaded) == 1
    assert b"base64" not in next(tmp_path.iterdir()).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"model": ""}, "needs the name of its model"),
        ({"concurrency": 0}, "concurrency of an endpoint must be at least 1"),
        ({"timeout_s": 0.0}, "timeout_s must be above 0"),
    ],
)
def test_impossible_endpoints_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"model": "m", **options})


def test_a_server_that_tells_the_key_it_was_sent_does_not_bring_it_into_the_journal(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    told = "you sent sk-canary-0123456789"
    with Server(completion(told)) as server:
        (reply,) = ask(server, tmp_path)
    with Server((401, {"error": told})) as server:
        (refused,) = ask(server, tmp_path / "refused")
    assert reply.text == "you sent [a key]"
    assert "you sent [a key]" in str(refused)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"canary" not in file.read_bytes()


def chat(**message) -> bytes:
    return json.dumps({"choices": [{"message": message}]}).encode()


def test_a_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "SCORE"}, {"type": "image_url"}, {"type": "text", "text": ": 1"}]
    assert read_reply(chat(content=parts))[1].text == "SCORE: 1"
    assert read_reply(chat(content=None))[1].text == ""


@pytest.mark.parametrize(
    "content",
    [
        chat(content={"text": "1"}), chat(content=3), chat(content=[3]), chat(content=[{"text": 3}]), b"[" * 100_000,
        b'{"choices": [{"message": {}}], "usage": {"prompt_tokens": 1e999}}', b"{}", b'"x"', b"\xff\xfe",
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"no chat completion|Expecting|decode|more than 100"):
        read_reply(content)


def test_a_journal_that_somebody_wrote_into_costs_nothing(tmp_path):
    values = {"prompt_tokens": "many", "completion_tokens": [1], "cost": 10**400}
    AppendLog(tmp_path).append("a", values)
    AppendLog(tmp_path).append("b", {"prompt_tokens": 3, "completion_tokens": None, "cost": 0.5})
    spent = ReplyCache(tmp_path).spent
    assert (spent.calls, spent.tokens, spent.cost) == (2, 3, 0.5)


def test_a_reply_that_drips_is_over_at_the_time_limit(tmp_path):
    """httpx's own limit is one of each byte."""
    with Dripping(completion("a" * 200)) as server:
        (error,) = ask(server, tmp_path, request(), timeout_s=0.3, retries=0)
    assert isinstance(error, CallFailed)
    assert error.kind == "timeout"
    assert "timeout_s=0.3" in str(error)
    assert server.num_sent < 30


def test_a_reply_without_end_is_read_to_its_limit_once(tmp_path):
    with Dripping(completion("a"), pause_s=0.0, endless=b"x" * (1 << 20)) as server:
        (error,) = ask(server, tmp_path, request(), max_reply_mib=2, retries=3)
    assert isinstance(error, CallFailed)
    assert error.kind == "too large"
    assert "larger than 2 MiB" in str(error)
    assert "max_reply_mib=2" in str(error)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "written",
    [
        {"response": {"choices": []}}, {"response": None}, {"response": "text"}, {},
        {"response": {"choices": [{"message": {"content": [7]}}]}},
    ],
)  # fmt: skip
def test_a_reply_on_disk_that_cannot_be_read_is_asked_for_again(tmp_path, written):
    AppendLog(tmp_path).append(request().key, written)  # as an earlier release, or somebody else, left it
    with Server(completion("Hi")) as server:
        (reply,) = ask(server, tmp_path)
    assert reply.text == "Hi"
    assert len(server.bodies) == 1
