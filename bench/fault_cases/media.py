"""Media of strangers: files that are damaged, lead elsewhere, or would take the machine."""

from __future__ import annotations

import functools
import json
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Ended, fit, kept_checkpoint, write_rows
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import write as write_video
from tests.runs import config

WHOLE = VideoSampling(fps=None, num_frames=768)
GOOD_ROWS = 12
NUM_FLIPPED = 100
SETTINGS_BYTES = 900
"""What x264 writes of itself in front of the first frame."""
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n"
BOMB_SIDE = 100_000
ASKED = {"problem": "What?", "answer": "x", "task": "exact"}


def _text_named(name: str, text: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        (folder / name).write_text(text)
        return {"images" if name.endswith("png") else "videos": name}

    return make


def _truncated(folder: Path) -> dict[str, Any]:
    whole = (folder / "clip.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    return {"videos": "truncated.mp4"}


def _picture_bomb(folder: Path) -> dict[str, Any]:
    head = struct.pack(">IIBBBBB", BOMB_SIDE, BOMB_SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b""))
    parts = (struct.pack(">I", len(data)) + name + data + _checksum(name + data) for name, data in chunks)
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return {"images": "bomb.png"}


def _checksum(data: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(data))


def _hourly(folder: Path) -> dict[str, Any]:
    write_video(folder / "hourly.mp4", 20, times_ms=[3_600_000 * hour for hour in range(20)])
    return {"videos": "hourly.mp4"}


def _decoder_bomb(folder: Path) -> dict[str, Any]:
    write_video(folder / "slow.mp4", 3000, size=(320, 240), preset="ultrafast", g="3000")
    return {"videos": "slow.mp4"}


def _large_frames(folder: Path) -> dict[str, Any]:
    write_video(folder / "large.mp4", 2, size=(1280, 720))
    return {"videos": "large.mp4"}


def _link(folder: Path) -> dict[str, Any]:
    (folder / "link.mp4").symlink_to(folder.parent / "outside.mp4")
    return {"videos": "link.mp4"}


BAD_ROWS: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "an ffconcat that names its neighbour, named .mp4": (
        _text_named("list.mp4", "ffconcat version 1.0\nfile clip.mp4\n"),
        "its format is none that is read of rows: it may be a playlist",
    ),
    "an HLS playlist of an address, named .mp4": (_text_named("hls.mp4", HLS), "cannot be decoded|may be a playlist"),
    "a page of HTML named .mp4": (_text_named("page.mp4", "<html>Not found</html>"), "it cannot be decoded"),
    "a PostScript program named .png": (_text_named("eps.png", "%!PS-Adobe-3.0 EPSF-3.0\n"), "cannot identify image"),
    "an mp4 cut off in the middle": (_truncated, "it cannot be decoded|it is torn"),
    "a PNG of 100 bytes that claims 100,000 x 100,000 pixels": (_picture_bomb, "max_pixels|exceeds limit"),
    "frames above media_limits.max_pixels": (_large_frames, "1280 x 720 pixels, more than data.media_limits"),
    "a video of 19 hours and 20 frames": (_hourly, "it lasts 68400 s, longer than data.media_limits.max_s"),
    "a video that takes longer to decode than its limit": (
        _decoder_bomb,
        "decoding it takes more than data.media_limits.max_decode_s=0.05 s",
    ),
    "an absolute path": (lambda folder: {"images": "/etc/passwd"}, "it lies outside data.media_root"),
    "a path of ..": (lambda folder: {"videos": "../outside.mp4"}, "it lies outside data.media_root"),
    "a link that leads out of media_root": (_link, "it lies outside data.media_root, as .*outside.mp4"),
    "a path with a NUL": (lambda folder: {"videos": "a\0b.mp4"}, "the file does not exist"),
}
"""What is wrong with a row -> what makes it in a folder, and the reason that has to be listed."""


@functools.cache
def _one_run() -> tuple[Ended, str, dict[str, str]]:
    """One run in which each of `BAD_ROWS` occurs: its end, what it keeps, and fault -> the reason listed."""
    with tempfile.TemporaryDirectory(prefix="longrl-fault-media-") as work:
        folder = Path(work) / "data"
        folder.mkdir()
        write_video(folder / "clip.mp4", 20, g="5")
        write_video(folder.parent / "outside.mp4", 20)
        rows = [{**ASKED, "problem_id": name, **make(folder)} for name, (make, _) in BAD_ROWS.items()]
        rows += [{**ASKED, "problem_id": f"good {n}", "videos": "clip.mp4"} for n in range(GOOD_ROWS)]
        write_rows(folder / "rows.jsonl", rows)
        limits = {"max_pixels": 320 * 240, "max_s": 40_000, "max_decode_s": 0.05}
        ended = fit(folder, _values(folder, media_limits=limits, max_skipped_share=0.9))
        listed = folder / "run" / "skipped.jsonl"
        lines = map(json.loads, listed.read_text().splitlines() if listed.exists() else [])
        reasons = {line["id"]: line["reason"].replace(work, "FOLDER") for line in lines}
        return ended, kept_checkpoint(folder), reasons


def _values(folder: Path, **data: Any) -> dict[str, Any]:
    """SFT on the rows of a folder, each of which is drawn."""
    values = config("sft")
    values["trainer"]["max_steps"] = 13
    values["checkpoint"] = {"every_n_train_steps": 13}
    values["data"] |= {"train": str(folder / "rows.jsonl"), "video": {"fps": 1.0}, **data}
    return values


def _in_the_run(name: str) -> Callable[[Path], Outcome]:
    def run(folder: Path) -> Outcome:
        ended, kept, reasons = _one_run()
        return Outcome(reasons.get(name, ended.last_line), ended.exit_code, f"{kept}; the row is listed and skipped")

    return run


def all_outside(folder: Path) -> Outcome:
    """Every row names a file outside the data file's folder."""
    write_video(folder / "outside.mp4", 8)
    data = folder / "data"
    data.mkdir()
    write_rows(data / "rows.jsonl", [{**ASKED, "videos": str(folder / "outside.mp4")}] * 100)
    ended = fit(data, _values(data))
    listed = (data / "run" / "skipped.jsonl").exists()
    return Outcome(ended.last_line, ended.exit_code, f"no step was made; rows listed: {listed}")


def flipped_bits(folder: Path) -> Outcome:
    """H.264 with one bit flipped: how often are other pixels given than were written?"""
    whole = _moving_pattern(folder / "whole.mp4")
    pixels, content = read_video(whole, WHOLE).pixels, whole.read_bytes()
    start = content.index(b"mdat") + SETTINGS_BYTES
    draws = random.Random(0)
    accepted = refused = 0
    for _ in range(NUM_FLIPPED):
        damaged = bytearray(content)
        damaged[draws.randrange(start, len(content))] ^= 1 << draws.randrange(8)
        file = folder / "damaged.mp4"
        file.write_bytes(damaged)
        try:
            accepted += not torch.equal(read_video(file, WHOLE).pixels, pixels)
        except UnusableSample:
            refused += 1
    few = "few" if accepted <= NUM_FLIPPED // 10 else "many"
    seen = f"{refused} of {NUM_FLIPPED} refused, {accepted} read with other pixels ({few})"
    return Outcome(seen, 0, "rows with damage that decoders see are skipped")


def _moving_pattern(path: Path) -> Path:
    """40 frames of 320 x 240 in which everything moves."""
    down, right = np.mgrid[:240, :320]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(40):
            levels = np.stack([right + 4 * i, down + 2 * i, down + right], axis=-1) % 256
            container.mux(stream.encode(av.VideoFrame.from_ndarray(levels.astype(np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    return path


FAULTS = [
    *(
        Fault(kind="media", fault=name, does=_in_the_run(name), exit_code=0, seen=reason)
        for name, (_, reason) in BAD_ROWS.items()
    ),
    Fault(
        kind="media",
        fault="100 rows whose media all lie outside media_root",
        does=all_outside,
        exit_code=2,
        seen="100 of 100 rows name media .*data.media_root.*data.allow_outside_paths=true",
    ),
    Fault(
        kind="media",
        fault="100 files of H.264 with one bit flipped",
        does=flipped_bits,
        exit_code=0,
        seen=r"read with other pixels \(few\)",
        quick=False,
    ),
]
