"""Rows read media below their root alone, whatever their paths, links, lists and URLs say."""

import json
import os

import pytest
from PIL import Image

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.media_roots import MediaRoots
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Subtitles
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import text_family, vl_family

OUTSIDE = "it lies outside data.media_root"


@pytest.fixture
def folders(tmp_path):
    """A root with a clip, and a place beside it with another."""
    for name in ("root", "beside", "root_of_another"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "clip.mp4", 8)
        Image.new("RGB", (28, 28)).save(tmp_path / name / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    "path",
    [
        "{beside}/clip.mp4", "{root}/../beside/clip.mp4", "{root}/link.mp4", "{root}/folder/clip.mp4",
        "{root}_of_another/clip.mp4", "~/clip.mp4", "/dev/zero", "{root}/..", "file:///etc/passwd",
        "FILE:///etc/passwd", "local:///etc/passwd", "simplecache::file:///etc/passwd", "zip://a::/etc/a.zip",
        "reference://::https://a/b.json", "{root}/\ud800/../../beside/clip.mp4",
    ],
)  # fmt: skip
def test_what_leads_out_of_the_root_is_refused(folders, path):
    root, beside = str(folders / "root"), str(folders / "beside")
    os.symlink(f"{beside}/clip.mp4", f"{root}/link.mp4")
    os.symlink(beside, f"{root}/folder")
    with pytest.raises(UnusableSample, match=f"{OUTSIDE}|reads files of this machine|it is no path"):
        MediaRoots.below([root]).check(path.format(root=root, beside=beside))
    MediaRoots().check(path)


@pytest.mark.parametrize(
    "path",
    [
        "{root}/clip.mp4", "{root}/../root/clip.mp4", "{root}/link.mp4", "{root}/none.mp4", "{link}/clip.mp4",
        "https://a/b.mp4", "zip://a::s3://b/c.zip", "simplecache::https://a/b.mp4",
    ],
)  # fmt: skip
def test_what_stays_in_the_root_is_read(folders, path):
    root, link = folders / "root", folders / "link"
    os.symlink("clip.mp4", root / "link.mp4")
    os.symlink(root, link)
    MediaRoots.below([str(root)]).check(path.format(root=root, link=link))
    MediaRoots.below([str(link)]).check(path.format(root=root, link=link))


def test_a_snapshot_of_the_hubs_cache_is_read_with_its_blobs(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    os.symlink("../../blobs/5678", snapshot / "clip.mp4")
    os.symlink("../../../other/blobs/5678", snapshot / "other.mp4")
    roots = MediaRoots.below([str(snapshot)])
    roots.check(str(snapshot / "clip.mp4"))
    with pytest.raises(UnusableSample, match=OUTSIDE):
        roots.check(str(snapshot / "other.mp4"))


def data_module(folder, records, family=None, **options):
    rows = folder / "rows.jsonl"
    asked = {"problem": "What?", "answer": "x", "task": "exact"}
    rows.write_text("".join(json.dumps(asked | record) + "\n" for record in records))
    sampling = VideoSampling(fps=None, num_frames=4)
    return LongVideoReason(
        family or vl_family(), train=str(rows), video=sampling, prompts_per_batch=1, skipped_dir=str(folder),
        question_template="{subtitles}{problem}", **options,
    )  # fmt: skip


def test_a_file_of_outside_paths_ends_in_one_line_before_anything_is_listed(folders):
    clip = str(folders / "beside" / "clip.mp4")
    data = data_module(folders / "root", [{"videos": clip}] * 200)
    with pytest.raises(ValueError, match=OUTSIDE) as caught:
        data.setup("fit")
    message = str(caught.value)
    assert message.startswith(f"200 of 200 rows name media that may not be read, the first: {clip}: ")
    assert f"set data.media_root (now {folders / 'root'}) to the folder" in message
    assert "data.allow_outside_paths=true" in message
    assert "\n" not in message
    assert not (folders / "root" / "skipped.jsonl").exists()
    for option in ({"allow_outside_paths": True}, {"media_root": str(folders / "beside")}):
        allowed = data_module(folders / "root", [{"videos": clip}] * 200, **option)
        allowed.setup("fit")
        assert len(allowed.skips("train")) == 0


@pytest.mark.parametrize("check_files", [True, False])
def test_single_rows_outside_are_skipped_and_listed(folders, check_files):
    root, beside = folders / "root", folders / "beside"
    frames = root / "list.frames.json"
    frames.write_text(json.dumps({"frames": ["../beside/a.png"], "fps": 1}))
    (root / "link.mp4").symlink_to(beside / "clip.mp4")
    lines = {"subtitles": str(beside / "lines.srt")}
    (beside / "lines.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nsecret\n")
    bad = [
        {"videos": str(beside / "clip.mp4")}, {"images": "../beside/a.png"}, {"videos": "list.frames.json"},
        {"videos": "link.mp4"}, {"videos": "clip.mp4", "metadata": lines}, {"audios": "file:///etc/passwd"},
        {"videos": [["a.png", f"{beside}/a.png"]], "fps": 1},
    ]  # fmt: skip
    good = [{"videos": "clip.mp4"} for _ in range(12)]
    records = [{"problem_id": f"bad {n}", **record} for n, record in enumerate(bad)]
    data = data_module(
        root, [*records, *good], max_skipped_share=0.9, check_files=check_files, subtitles=Subtitles(source="record"),
    )  # fmt: skip
    data.setup("fit")
    data.draw_prompts(12)
    reasons = [json.loads(line) for line in (root / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in reasons) == [f"bad {n}" for n in range(len(bad))]
    assert all(OUTSIDE in line["reason"] or "reads no audios" in line["reason"] for line in reasons)


def test_text_rows_have_no_root(tmp_path):
    data = data_module(tmp_path, [{}] * 4, text_family())
    data.setup("fit")
    assert len(data.draw_prompts(4)) == 4
