import http.server
import json
import logging
import os
import threading
from functools import partial
from pathlib import Path

import fsspec
import pytest

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media import remote
from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia, check_access, is_remote
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import vl_family


@pytest.fixture
def elsewhere(tmp_path):
    """A video at `memory://clips/a.mp4`."""
    files = fsspec.filesystem("memory")
    files.pipe("/clips/a.mp4", write(tmp_path / "a.mp4", 8).read_bytes())
    yield "memory://clips/a.mp4"
    files.rm("/clips", recursive=True)


@pytest.fixture
def server(tmp_path):
    """A web server of `tmp_path/www`, and what it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    (tmp_path / "www").mkdir()
    handler = partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def test_a_url_is_told_from_a_path():
    assert all(map(is_remote, ["https://a/b.mp4", "s3://a/b", "hf://datasets/a/b/c.mp4", "zip://a::s3://b/c"]))
    assert not any(map(is_remote, ["/a/b.mp4", "a:b", "data/x.mp4"]))


def test_nothing_is_fetched_without_being_allowed(elsewhere):
    with pytest.raises(UnusableSample, match="nothing is fetched unless data.allow_remote_media is true"):
        NO_REMOTE.local_path(elsewhere)
    assert NO_REMOTE.local_path("/clips/a b.mp4") == "/clips/a b.mp4"


def test_a_file_is_fetched_once_and_whole(elsewhere, tmp_path):
    media = RemoteMedia(str(tmp_path / "cache"))
    path = media.local_path(elsewhere)
    assert path.endswith(".mp4")
    assert Path(path).read_bytes() == (tmp_path / "a.mp4").read_bytes()
    fsspec.filesystem("memory").pipe("/clips/a.mp4", b"another")
    assert media.local_path(elsewhere) == path
    assert os.listdir(tmp_path / "cache") == [os.path.basename(path)]


def test_a_web_server_is_asked_once(server, tmp_path):
    url, asked = server
    content = write(tmp_path / "www" / "a.mp4", 8).read_bytes()
    media = RemoteMedia(str(tmp_path / "cache"))
    path = media.local_path(f"{url}/a.mp4?token=1")
    assert Path(path).read_bytes() == content
    num_asked = len(asked)
    assert media.local_path(f"{url}/a.mp4?token=1") == path
    assert len(asked) == num_asked


def test_what_cannot_be_read_is_tried_again_and_leaves_nothing(tmp_path, monkeypatch):
    waits, broken = [], []

    def fail(url, num_bytes=0):
        broken.append(url)
        yield b"half"
        raise UnusableSample(url, "it cannot be fetched (TimeoutError: slow)")

    monkeypatch.setattr(remote, "_remote_bytes", fail)
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    with pytest.raises(UnusableSample, match="it cannot be fetched"):
        RemoteMedia(str(tmp_path)).local_path("memory://clips/a.mp4")
    assert len(broken) == 3
    assert waits == [1.0, 2.0]
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_not_there_is_not_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(UnusableSample, match="memory://none.mp4: the file does not exist"):
        RemoteMedia(str(tmp_path)).local_path("memory://none.mp4")


# ---- before a run ----


def test_a_protocol_that_cannot_be_read_here_is_an_error_before_a_run():
    with pytest.raises(ValueError, match="1 media lie at nosuch://, which cannot be read here"):
        check_access(["nosuch://bucket/a.mp4"])


def test_places_that_do_not_answer_are_an_error_before_a_run():
    urls = [f"http://127.0.0.1:1/{n}.mp4" for n in range(5)]
    with pytest.raises(ValueError, match="none of 3 media that were tried at http:// can be read, the last: .*2.mp4"):
        check_access(urls)


def test_a_file_that_is_missing_at_a_place_that_answers_is_its_rows_matter(elsewhere, server):
    check_access(["memory://clips/none.mp4", elsewhere, f"{server[0]}/none.mp4", "/local.mp4"])


# ---- in a run ----


def source(folder, *paths):
    records = [{"problem": "What?", "answer": "x", "task": "exact", "videos": path} for path in paths]
    (folder / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "rows.jsonl")


def test_rows_with_remote_media_are_skipped_and_listed_before_a_run_that_may_not_fetch(elsewhere, tmp_path):
    local = [str(tmp_path / "a.mp4")] * 9
    data = LongVideoReason(vl_family(), test=source(tmp_path, elsewhere, *local), skipped_dir=str(tmp_path))
    data.read(["test"])
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["path"] == elsewhere
    assert "data.allow_remote_media" in line["reason"]
    with pytest.raises(ValueError, match="data.allow_remote_media"):
        LongVideoReason(vl_family(), test=source(tmp_path, elsewhere), skipped_dir=str(tmp_path)).read(["test"])


def test_a_run_that_may_fetch_reads_them_like_others(elsewhere, tmp_path):
    data = LongVideoReason(
        vl_family(),
        train=source(tmp_path, elsewhere, str(tmp_path / "a.mp4"), f"file://{tmp_path}/a.mp4", "memory://none.mp4"),
        allow_remote_media=True,
        media_cache_dir=str(tmp_path / "cache"),
        prompts_per_batch=1,
        skipped_dir=str(tmp_path),
    )
    data.setup("fit")
    prompts = data.draw_prompts(3)
    assert len({prompt.media[0].key for prompt in prompts}) == 1
    data.draw_prompts(3)
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert (line["path"], line["reason"]) == ("memory://none.mp4", "memory://none.mp4: the file does not exist")


def test_a_folder_for_what_may_not_be_fetched_has_no_effect_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        LongVideoReason(vl_family(), media_cache_dir="cache")
    assert "data.media_cache_dir does nothing without data.allow_remote_media=true" in caplog.text
