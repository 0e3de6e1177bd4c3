"""Single steps with small answers: missing captions, long timelines, difficulty, budgets, splits."""

import json
from dataclasses import replace

import av
import pytest
from hypothesis import given, strategies as st

from longrl.chat.endpoint import Budget, Endpoint
from longrl.commands.main import main
from longrl.commands.pipeline import run_step
from longrl.pipeline.captions import condensable_groups, timeline_text
from longrl.pipeline.config import (
    CaptionOptions,
    ExportOptions,
    FilterOptions,
    PipelineConfig,
    QuestionOptions,
    SplitOptions,
    TimelineOptions,
)
from longrl.pipeline.dataset_export import _has_same_files, assign_splits, link_video
from longrl.pipeline.difficulty import reason_to_drop, rotate_options
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.step_run import Workspace
from longrl.pipeline.video_frames import frame_times
from tests.chat.server import Server, completion
from tests.pipeline.test_splitting import noise, write
from tests.runs import ROOT

PROMPTS = str(ROOT / "longvideo-reason" / "prompts")


def config(out, url="http://127.0.0.1:9/v1", **options) -> PipelineConfig:
    endpoint = Endpoint("m", url, retries=1, backoff_s=0.01, timeout_s=2.0, concurrency=2)
    roles = dict.fromkeys(("captioner", "writer", "policy", "judge"), endpoint)
    return PipelineConfig(videos="videos", out=str(out), prompts=PROMPTS, **{**roles, **options})


def captioned(texts, seconds=10.0, name="a.mp4"):
    common = {"video": name, "path": name, "digest": "d", "duration_s": seconds * len(texts)}
    return [
        {**common, "id": f"{name}#{i:04d}", "start_s": seconds * i, "end_s": seconds * (i + 1), "caption": text}
        for i, text in enumerate(texts)
    ]


# ---- timeline ----


def test_a_clip_without_caption_is_left_out_and_a_video_with_many_too(tmp_path):
    workspace = Workspace(tmp_path)
    few, many = captioned(["x", None, "y", "z", "w", "v"]), captioned(["x", None], name="b.mp4")
    workspace.write("caption", few + many)
    report = run_step(config(tmp_path), "timeline")
    (video,) = workspace.read("timeline")
    assert [entry["start_s"] for entry in video["entries"]] == [0.0, 20.0, 30.0, 40.0, 50.0]
    assert video["shown"] == video["entries"]
    assert report.counts["clips without caption"] == 2
    assert report.counts["too few captions"] == 1


def test_a_long_timeline_is_condensed_to_fit_with_exact_times(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write("caption", captioned([f"Scene {i}. " + "word " * 100 for i in range(60)]))
    with Server(lambda body: completion("All of it. " * 3)) as server:
        run_step(config(tmp_path, server.url, timeline=TimelineOptions(max_chars=4000)), "timeline")
    (video,) = workspace.read("timeline")
    assert len(video["entries"]) == 60
    assert len(timeline_text(video["shown"])) <= 4000
    assert [video["shown"][0]["start_s"], video["shown"][-1]["end_s"]] == [0.0, 600.0]
    assert all(a["end_s"] == b["start_s"] for a, b in zip(video["shown"], video["shown"][1:], strict=False))
    assert all(len(body["messages"][0]["content"]) < 4000 + 1000 for body in server.bodies)


def test_what_cannot_be_condensed_is_cut_and_said(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write("caption", captioned([f"Scene{i} " + "word " * 100 for i in range(20)]))
    with Server(completion("I'm sorry, I can't.")) as server:
        options = {"timeline": TimelineOptions(max_chars=2000), "max_failed_share": 1.0}
        report = run_step(config(tmp_path, server.url, **options), "timeline")
    (video,) = workspace.read("timeline")
    text = timeline_text(video["shown"])
    assert len(text) <= 2000
    assert all(f"Scene{i} " in text for i in range(20))
    assert report.counts["captions cut"] == len(video["shown"])


@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=60),
    max_chars=st.integers(200, 5000),
)
def test_condensed_timelines_always_fit_and_lose_no_stretch(lengths, max_chars):
    entries = [{"start_s": float(i), "end_s": i + 1.0, "text": "x" * length} for i, length in enumerate(lengths)]
    groups = condensable_groups({"video": "a", "entries": entries}, max_chars)
    assert [entry for group in groups for entry in group["entries"]] == entries
    full = [{"start_s": 10000.0, "end_s": 10001.0, "text": "x" * group["limit"]} for group in groups]
    if max_chars // len(groups) >= 80:
        assert len(timeline_text(full)) <= max_chars


# ---- questions ----


def test_a_category_without_prompt_names_the_file(tmp_path):
    Workspace(tmp_path).write("timeline", [{**captioned(["x"])[0], "entries": [], "shown": []}])
    with Server(completion("x")) as server, pytest.raises(ValueError, match=r"question_humour\.txt"):
        run_step(config(tmp_path, server.url, question=QuestionOptions(categories=("humour",))), "question")


def test_prompts_name_only_what_is_given(tmp_path):
    (tmp_path / "x.txt").write_text('{seconds} {"json": {}} {colour}')
    with pytest.raises(ValueError, match=r"names colour; it may name seconds"):
        Prompts(str(tmp_path)).text("x", seconds="1")
    assert Prompts(str(tmp_path)).text("x", seconds="{colour}", colour="red") == '{colour} {"json": {}} red'


def test_a_missing_step_or_endpoint_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"run `python -m longrl pipeline split`"):
        run_step(config(tmp_path), "caption")
    Workspace(tmp_path).write("split", [])
    with pytest.raises(ValueError, match=r"asks the captioner, which is not set; give --captioner.model"):
        run_step(config(tmp_path, captioner=None), "caption")
    with pytest.raises(ValueError, match="unknown step 'captions'"):
        main(["pipeline", "captions"])


@pytest.mark.parametrize("path", sorted((ROOT / "longvideo-reason" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_config_is_read(path, tmp_path):
    with pytest.raises(ValueError, match=r"4_replies.jsonl is not there"):
        main(["pipeline", "validate", f"--config={path}", "--videos=x", f"--out={tmp_path}"])


# ---- difficulty ----


@pytest.mark.parametrize(
    ("seen", "blind", "why"),
    [
        ([1, 0, 1, 0], [0, 0, 0, 0], None),
        ([1, 1, 1, 1], [0, 0, 0, 0], "dropped: always right"),
        ([0, 0, 0, 0], [], "dropped: never right"),
        ([1, 0, 0, 0], [1, 1, 1, 0], "dropped: right without the video"),
        ([1, 0, 0, 0], [1, 1, 0, 0], None),
        ([1, 0, None, None], [None], None),
        ([1, None, None, None], [], "dropped: too few answers"),
        ([0.5, 0.4, 0.4, 0.4], [], None),
    ],
)
def test_what_teaches_nothing_is_dropped(seen, blind, why):
    assert reason_to_drop(seen, blind, FilterOptions(num_samples=4)) == why


def test_without_samples_everything_stays():
    assert reason_to_drop([], [], FilterOptions(num_samples=0)) is None


def test_over_all_turns_every_option_stands_everywhere():
    turned = [rotate_options("abcd", n) for n in range(4)]
    assert all(sorted(column) == list("abcd") for column in zip(*turned, strict=True))
    assert rotate_options((), 3) == []


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="0 or at least 2"):
        FilterOptions(num_samples=1)


def filterable(tmp_path, kinds):
    common = {"video": "a.mp4", "category": "temporal", "steps": [], "box": None, "box_at_s": None, "reasoning": None}
    rows = [
        {**common, "id": str(i), "kind": kind, "question": f"What {i}?", "answer": "tea",
         "options": ["tea", "milk"] if kind == "multiple_choice" else []}
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    workspace = Workspace(tmp_path)
    workspace.write("rewrite", rows)
    workspace.write("timeline", [{"video": "a.mp4", "path": "nowhere.mp4", "digest": "d", "duration_s": 1.0}])
    return workspace


def test_a_video_that_cannot_be_read_leaves_its_questions_ungraded_and_is_listed(tmp_path):
    workspace = filterable(tmp_path, ["multiple_choice"])
    with Server(completion("<answer>A</answer>")) as server:
        report = run_step(config(tmp_path, server.url, max_failed_share=1.0), "filter")
    assert workspace.read("filter") == []
    assert report.counts["broken video"] == 10
    assert json.loads((tmp_path / "7_filtered.dropped.jsonl").read_text())["dropped"] == "dropped: too few answers"


def test_a_spent_budget_ends_a_step_without_half_a_file_and_goes_on_when_raised(tmp_path):
    workspace = Workspace(tmp_path)
    workspace.write("caption", captioned(["word " * 100 for _ in range(30)]))
    options = {"timeline": TimelineOptions(max_chars=4000)}
    with Server(completion("Short.")) as server:
        with pytest.raises(ValueError, match=r"2 items of step timeline are left.*raise --budget.max_calls"):
            run_step(config(tmp_path, server.url, budget=Budget(max_calls=3), **options), "timeline")
        assert not (tmp_path / "3_timelines.jsonl").exists()
        assert json.loads((tmp_path / "reports" / "timeline.json").read_text())["left"] == 2
        run_step(config(tmp_path, server.url, budget=Budget(max_calls=5), **options), "timeline")
        assert len(server.bodies) == 5
    assert len(workspace.read("timeline")) == 1


# ---- splits ----


@given(count=st.integers(0, 40), seed=st.integers(0, 5), eval_share=st.sampled_from([0.0, 0.05, 0.3]))
def test_every_video_has_one_split_in_the_wanted_shares(count, seed, eval_share):
    names = [f"{i}.mp4" for i in range(count)]
    videos = {name: {"digest": f"digest {name}"} for name in names}
    found = assign_splits(names, videos, ExportOptions(eval_share=eval_share, seed=seed))
    assert found.keys() == set(names)
    values = list(found.values())
    if count > 1:
        assert values.count("eval") == (max(1, round(eval_share * count)) if eval_share else 0)
    assert abs(values.count("sft") - (count - values.count("eval")) / 3) <= 1
    assert found == assign_splits(names[::-1], videos, ExportOptions(eval_share=eval_share, seed=seed))


def test_impossible_options_are_refused():
    for make, message in (
        (lambda: SplitOptions(clip_s=0.0), "clip_s above 0"),
        (lambda: ExportOptions(eval_share=1.0), "eval_share < 1"),
        (lambda: QuestionOptions(num_options=1), "num_options of 2 to 8"),
        (lambda: TimelineOptions(max_chars=10), "max_chars must be at least 200"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


# ---- captions ----


def test_clips_with_broken_frames_and_odd_captions_are_counted_and_the_rest_goes_on(tmp_path):
    """Three clips: one whole, one with some broken frames, one with none that decodes."""
    path = tmp_path / "videos" / "x.mkv"
    path.parent.mkdir()
    write(path, range(60), keys=4, options={"x264-params": "scenecut=0"}.items(), draw=noise)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in packets[24:28] + packets[40:60]:
        content[position + 24 : position + size] = bytes(size - 24)  # not the container's own header
    path.write_bytes(content)
    frame_times.cache_clear()
    with Server(completion("\u4e00\u53ea\u732b\u5750\u7740\u3002", finish_reason="length")) as server:
        options = {"split": SplitOptions(clip_s=5.0), "caption": CaptionOptions(frames=20), "max_failed_share": 0.5}
        made = replace(config(tmp_path / "out", server.url, **options), videos=str(path.parent))
        run_step(made, "split")
        report = run_step(made, "caption")
    found = Workspace(tmp_path / "out").read("caption")
    assert [bool(clip["caption"]) for clip in found] == [True, True, False]
    assert report.counts["broken frames"] == 4
    assert report.counts["broken video"] == 1
    assert report.counts["cut replies used"] == report.counts["replies mostly not in Latin script"] == 2
    assert len(server.bodies) == 2  # nothing is paid for a clip that nobody can see
    parts = [part for body in server.bodies for part in body["messages"][0]["content"]]
    assert sum(part.get("text") == "(this frame is broken)" for part in parts) == 4


# ---- export ----


def test_a_data_set_of_other_files_is_kept(tmp_path, caplog):
    workspace = Workspace(tmp_path)
    for step in ("filter", "timeline"):
        workspace.write(step, [])
    run_step(config(tmp_path), "export")
    run_step(config(tmp_path), "export")
    assert not caplog.text
    (tmp_path / "dataset" / "mine.txt").touch()
    run_step(config(tmp_path), "export")
    assert "is another data set now; the earlier one is dataset.old1" in caplog.text


def test_data_sets_of_equal_sizes_are_told_apart_by_one_letter(tmp_path):
    lines = bytearray(b'{"answer": "A"}\n' * 500_000)
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rl.jsonl").write_bytes(lines)
        if name == "second":
            lines[5_000_012] = ord("B")
    assert _has_same_files(tmp_path / "first", tmp_path / "second")
    assert not _has_same_files(tmp_path / "first", tmp_path / "third")


@pytest.mark.parametrize(
    ("name", "path"),
    [("a/b.mp4", "videos/a/b.mp4"), ("../b.mp4", "videos/0123/b.mp4"), ("/x/b.mp4", "videos/0123/b.mp4")],
)
def test_a_data_set_holds_links_to_its_videos(tmp_path, name, path):
    (tmp_path / "b.mp4").write_text("frames")
    video = {"video": name, "path": str(tmp_path / "b.mp4"), "digest": "0123"}
    assert link_video(video, tmp_path / "work", tmp_path / "dataset") == path
    assert (tmp_path / "work" / path).samefile(tmp_path / "b.mp4")


def test_a_video_that_cannot_be_linked_stays_where_it_is(tmp_path, monkeypatch):
    def another_disk(source, link):
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr("os.link", another_disk)
    video = {"video": "b.mp4", "path": str(tmp_path / "b.mp4"), "digest": "0123"}
    assert link_video(video, tmp_path / "work", tmp_path / "dataset") == "../b.mp4"
