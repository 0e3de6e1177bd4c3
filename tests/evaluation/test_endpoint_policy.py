"""A policy behind a scripted OpenAI-compatible server: what it is sent, what becomes of faults, what is paid for."""

import base64
import io
import json
import random
import re
import time

import pytest
from PIL import Image

from longrl.chat.endpoint import Endpoint
from longrl.commands.evaluate import parse_evaluation
from longrl.evaluation.benchmark import Evaluation
from longrl.evaluation.endpoint_policy import EndpointPolicy
from longrl.io.jsonl import read_jsonl
from tests.chat.server import Server, completion
from tests.evaluation.scripted import benchmark, questions
from tests.pipeline.running import Scripted, join, kill, start_child, videos


def arguments(out, url, *more, policy=None, **options):
    """Command line of an evaluation; `options` are the endpoint's, `policy` has those of the policy."""
    quick = {"timeout_s": 60.0, "backoff_s": 0.01, "retries": 2, "concurrency": 3}
    policy = {
        "class_path": "longrl.evaluation.endpoint_policy.EndpointPolicy",
        "init_args": {
            "endpoint": {"model": "served", "url": url, **quick, **options},
            "max_side": 28,
            **(policy or {}),
        },
    }
    return [
        f"--policy={json.dumps(policy)}", f"--out={out}", f"--data.test={questions()}", "--data.video.fps=1.0",
        "--num_cards=0", *more,
    ]  # fmt: skip


def evaluated(out, url, *more, **options):
    return Evaluation(*parse_evaluation(arguments(out, url, *more, **options))).run().results


def lines(folder):
    return read_jsonl(folder / "samples.jsonl")


def parts(body):
    (message,) = body["messages"]
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def images(body):
    urls = [part["image_url"]["url"] for part in parts(body) if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]


def test_frames_are_sent_with_their_times_and_answers_are_scored(tmp_path):
    with Server(completion("<think>x</think><answer>B</answer>")) as server:
        results = evaluated(tmp_path, server.url, "--frames=[4]", "--blind_baseline=true")["conditions"]
        bodies = list(server.bodies)
    assert set(results) == {"4 frames", "no video"}
    assert results["4 frames"]["letters"]["predictions"] == {"B": 8}
    seen = [body for body in bodies if images(body)]
    assert len(seen) == 8
    assert len(bodies) == 16
    for body in seen:
        assert [max(image.size) for image in images(body)] == [28] * 4
        times = [
            float(part["text"][1:-3]) for part in parts(body) if re.fullmatch(r"\[[\d.]+ s\]", part.get("text", ""))
        ]
        assert times == sorted(times)
        assert len(times) == 4
        assert parts(body)[-1]["text"].endswith("the answer and nothing more.")
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("served", 0.0, 1024)
    first = lines(tmp_path)[0]
    assert [len(indices) for indices in first["frame_indices"]] == [4]
    assert (first["num_prompt_tokens"], first["num_completion_tokens"], first["num_media_tokens"]) == (10, [5], None)


def test_the_frames_sent_are_the_frames_of_the_file(tmp_path):
    """Frame by frame against a plain decoding, by the indices on record."""
    import av
    import numpy as np

    with Server(completion("B")) as server:
        evaluated(tmp_path, server.url, "--frames=[4]", "--data.max_eval_rows=1", policy={"max_side": 64})
        (body,) = server.bodies
    (indices,) = lines(tmp_path)[0]["frame_indices"]
    record = json.loads(questions().read_text().splitlines()[0])
    with av.open(str(questions().parent / record["videos"])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for index, image in zip(indices, images(body), strict=True):
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[index]).mean() < 6  # JPEG


def test_faults_are_repeated_and_a_question_without_a_reply_is_counted(tmp_path):
    with Server(500, completion("<answer>B</answer>"), 429, completion("<answer>B</answer>"), 400,
                completion("<answer>B</answer>")) as server:  # fmt: skip
        results = evaluated(tmp_path, server.url)["conditions"]["video"]
        assert results["failures"] == {"no reply": 1}
        assert results["scores"]["overall"]["n"] == 7
        assert results["scores_with_failures_as_wrong"]["overall"]["n"] == 8
        assert sum(line["error"] == "no reply" for line in lines(tmp_path)) == 1
        before = len(server.bodies)
        again = evaluated(tmp_path, server.url)["conditions"]["video"]
        assert len(server.bodies) == before + 1  # only that one is asked again
        assert again["scores"]["overall"]["n"] == 8


def test_nothing_is_paid_twice_even_if_the_answers_are_lost(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        first = evaluated(tmp_path, server.url)
        for path in (tmp_path / "answers").iterdir():
            path.unlink()
        assert evaluated(tmp_path, server.url) == first
        assert len(server.bodies) == 8
        assert server.most_at_once <= 3


def test_a_spent_budget_says_so_and_a_larger_one_goes_on(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        with pytest.raises(ValueError, match="max_calls=5 is spent"):
            evaluated(tmp_path, server.url, policy={"budget": {"max_calls": 5}})
        results = evaluated(tmp_path, server.url, policy={"budget": {"max_calls": 8}})
        assert len(server.bodies) == 8
    assert results["conditions"]["video"]["scores"]["overall"]["n"] == 8


def test_a_refused_model_is_the_users_mistake(tmp_path):
    with Server(404) as server, pytest.raises(ValueError, match="refuses every call for the model 'served'"):
        evaluated(tmp_path, server.url)


def test_several_samples_are_several_calls_with_seeds_of_their_own(tmp_path):
    def say(body):
        return completion("<answer>B</answer>" if body["seed"] == 5 else "<answer>A</answer>")

    with Server(say) as server:
        evaluated(tmp_path, server.url, "--sampling.num_generations=2", "--sampling.temperature=1.0", "--seed=4")
        assert sorted(body["seed"] for body in server.bodies) == [4] * 8 + [5] * 8
    assert all(line["filtered_resps"] == ["A", "B"] for line in lines(tmp_path))


def test_a_cut_reply_and_a_refused_one_are_told(tmp_path):
    cut = completion("<think>", finish_reason="length")
    with Server(cut, completion("", finish_reason="content_filter")) as server:
        results = evaluated(tmp_path, server.url, "--data.max_eval_rows=4")["conditions"]["video"]
    assert results["truncation_rate"] == 0.25
    assert sorted(line["finish_reason_of_engine"][0] for line in lines(tmp_path)) == ["content_filter"] * 3 + ["length"]


def test_another_revision_under_one_name_is_asked_anew(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        for revision in ("one", "two", "one"):
            evaluated(tmp_path / "a", server.url, policy={"revision": revision})
            (tmp_path / "a" / "results.json").unlink()
        assert len(server.bodies) == 16


def test_a_server_that_serves_other_weights_under_one_name_is_asked_anew(tmp_path, caplog):
    def model(root, created):
        return [{"id": "another", "root": "x"}, {"id": "served", "root": root, "created": created}]

    with Server(completion("<answer>B</answer>"), models=model("/data/first/export", 1)) as server:
        first = evaluated(tmp_path, server.url)
        assert "revision is null" in caplog.text
        assert first["policy"]["served"]["id"] == "served"
        assert re.fullmatch(r"export \([0-9a-f]{8}\)", first["policy"]["served"]["root"])
        server.models = model("/data/first/export", 2)  # vLLM's time of the question
        assert evaluated(tmp_path, server.url) == first
        server.models = model("/data/second/export", 2)
        with pytest.raises(ValueError, match=r"policy\.served\.root was "):
            evaluated(tmp_path, server.url)
        assert len(server.bodies) == 8
        (tmp_path / "results.json").unlink()
        second = evaluated(tmp_path, server.url)
        assert len(server.bodies) == 16
    assert evaluated(tmp_path, server.url) == second  # the server is gone, all answers are there


def test_a_server_that_lists_no_models_is_known_by_name_and_revision(tmp_path, caplog):
    with Server(completion("<answer>B</answer>")) as server:
        results = evaluated(tmp_path, server.url, policy={"revision": "one"})
    assert results["policy"]["served"] == {}
    assert "revision is null" not in caplog.text


def test_top_k_is_no_option_of_an_endpoint_unless_it_is_told_so(tmp_path):
    with pytest.raises(ValueError, match=r'sampling\.top_k=5 is no option of OpenAI.*as well.*\{"top_k": 5\}'):
        evaluated(tmp_path, "http://127.0.0.1:9/v1", "--sampling.top_k=5")
    with Server(completion("<answer>B</answer>")) as server:
        evaluated(tmp_path, server.url, "--sampling.top_k=5", "--data.max_eval_rows=1", extra={"top_k": 5})
        assert server.bodies[0]["top_k"] == 5


# ---- videos sent whole ----


def videos_of(body):
    return [part["video_url"]["url"] for part in parts(body) if part["type"] == "video_url"]


def as_video(out, url, *more, **policy):
    extra = {"media_io_kwargs": {"video": {"fps": 2.0, "num_frames": 64}}}
    policy = {"video_as": "video", **policy}
    return evaluated(out, url, "--data.max_eval_rows=2", *more, policy=policy, extra=extra)


def test_a_video_is_sent_as_its_file_and_the_server_is_told_how_to_sample_it(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        results = as_video(tmp_path, server.url, "--blind_baseline=true")
        bodies = list(server.bodies)
    record = json.loads(questions().read_text().splitlines()[0])
    content = (questions().parent / record["videos"]).read_bytes()
    sent = [body for body in bodies if videos_of(body)]
    assert len(sent) == 2
    for body in sent:
        assert [part["type"] for part in parts(body)] == ["video_url", "text"]
        (url,) = videos_of(body)
        head, _, data = url.partition("base64,")
        assert head == "data:video/mp4;"
        assert base64.b64decode(data) == content
        assert body["media_io_kwargs"] == {"video": {"fps": 2.0, "num_frames": 64}}
    assert results["policy"]["frames"] == results["budget"]["frames"] == "sampled by the server"
    assert results["conditions"]["video"]["shown"]["frames"] is None
    assert "video: sampled by the server" in (tmp_path / "report.html").read_text()
    assert lines(tmp_path)[0]["frame_indices"] == []
    assert content not in b"".join(path.read_bytes() for path in (tmp_path / "responses").rglob("*") if path.is_file())


def test_a_server_on_this_machine_may_read_the_file_itself(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        as_video(tmp_path, server.url, video_url="file")
        record = json.loads(questions().read_text().splitlines()[0])
        path = (questions().parent / record["videos"]).resolve()
        assert {url for body in server.bodies for url in videos_of(body)} == {path.as_uri()}
        # Answers are found by what is shown, not by how it is handed over.
        as_video(tmp_path, server.url, video_url="data")
        assert len(server.bodies) == 2


def test_frames_and_files_are_different_answers(tmp_path):
    with Server(completion("<answer>B</answer>")) as server:
        as_video(tmp_path, server.url)
        with pytest.raises(ValueError, match=r"policy\.video_as was "):
            as_video(tmp_path, server.url, video_as="frames")


def test_a_part_of_a_video_is_not_sent_whole(tmp_path):
    record = json.loads(questions().read_text().splitlines()[0])
    changed = [record, {**record, "problem_id": "part", "metadata": {"span_s": [0, 1]}}]
    test = benchmark(tmp_path, changed)
    with Server(completion("<answer>B</answer>")) as server:
        results = as_video(
            tmp_path / "out",
            server.url,
            f"--data.test={test}",
            "--data.allow_outside_paths=true",
            "--data.max_skipped_share=0.6",
        )
        assert len(server.bodies) == 1
    assert results["conditions"]["video"]["failures"] == {"decode": 1}
    assert "video_as=video sends whole files" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_numbers_of_frames_are_not_for_a_server_that_samples(tmp_path):
    with pytest.raises(ValueError, match=r"--frames=\[4\] samples frames here.*video_as=video"):
        as_video(tmp_path, "http://127.0.0.1:9/v1", "--frames=[4]")
    with pytest.raises(ValueError, match="video_as must be frames or video"):
        EndpointPolicy(Endpoint("x"), video_as="pictures")


# ---- a server that looks at the frames ----


def seeing(out, url):
    """4 answers to each of 12 questions on 3 videos, with video and without."""
    rows = videos(3).parent / "train.jsonl"
    given = arguments(
        out, url + "/v1", "--frames=[10]", "--blind_baseline=true", "--sampling.num_generations=4",
        "--sampling.temperature=1.0", policy={"max_side": 112}, timeout_s=2.5, concurrency=4,
    )  # fmt: skip
    return ["evaluate", *given, f"--data.test={rows}"]


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_nothing_and_repeats_no_reply_that_came(tmp_path):
    whole, killed, draw, num_kills = tmp_path / "whole", tmp_path / "killed", random.Random(0), 0
    with Scripted(0.1, delay_s=0.01) as server:
        assert join(start_child(seeing(whole, server.url))) == 0
        before = server.answered()
        for _ in range(5):
            child = start_child(seeing(killed, server.url))
            time.sleep(draw.uniform(0.2, 0.8))
            kill(child)
            num_kills += join(child) == -9
        assert join(start_child(seeing(killed, server.url))) == 0
        repeated = sum(count - 1 for count in (server.answered() - before).values())
    assert num_kills >= 2
    assert repeated <= 4 * num_kills  # those under way, whose replies nobody got
    for name in ("results.json", "samples.jsonl", "report.html"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    seen = json.loads((whole / "results.json").read_text())["conditions"]["10 frames"]
    assert seen["scores"]["overall"]["n"] == 12
    assert seen["over_blind"]["low"] > 0  # it does see


def test_a_conversation_is_sent_as_it_is_and_thinking_that_the_server_opened_is_read(tmp_path):
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    asked = "What is <|im_end|> or <image>?"
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": asked},
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": messages, "answer": "B", "task": "exact"}) + "\n")
    with Server(completion("x</think><answer>B</answer>")) as server:
        results = evaluated(tmp_path / "out", server.url, f"--data.test={rows}")["conditions"]["video"]
        (body,) = server.bodies
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "text"]
    assert body["messages"][3]["content"] == [{"type": "text", "text": asked}]
    assert (results["format_rate"], results["scores"]["overall"]["accuracy"]) == (1.0, 1.0)
    assert lines(tmp_path / "out")[0]["resps"] == [["<think>x</think><answer>B</answer>"]]


def test_replies_that_break_the_scorers_or_hang_them_end_no_run_and_are_not_asked_again(tmp_path, monkeypatch, caplog):
    """They are on disk: the same command would meet them again and again."""

    def accuracy(completion, row):
        if "hang" in completion.text:
            time.sleep(60.0)
        if "break" in completion.text:
            raise RecursionError("too deep")
        return float("B" in completion.text)

    def chosen_option(text, options):
        return {}[text] if "break" in text else None

    for name, made in (("accuracy", accuracy), ("chosen_option", chosen_option), ("MAX_SCORING_S", 0.2)):
        monkeypatch.setattr(f"longrl.evaluation.records.{name}", made)
    texts = ["<answer>hang</answer>", "<answer>break</answer>", "\ud800 \0 \x1b[2J <answer>B</answer>", "B"]
    replies = [completion(text) for text in texts]
    with Server(*replies) as server:
        results = evaluated(tmp_path, server.url)
        again = evaluated(tmp_path, server.url, "--name=again")
        assert len(server.bodies) == 8
    assert results["conditions"] == again["conditions"]
    assert results["conditions"]["video"]["scores"]["overall"]["accuracy"] == 6 / 8
    assert "takes more than 0.2 s to judge" in caplog.text
    assert "an answer to row" in caplog.text
    assert (tmp_path / "report.html").is_file()
