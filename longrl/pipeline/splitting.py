"""Step split: videos into clips of about ten seconds, exact to the frame."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from longrl.io.append_log import AppendLog
from longrl.io.atomic import atomic_file
from longrl.io.text_files import read_utf8
from longrl.pipeline.cutting import cut_clips, scene_starts
from longrl.pipeline.step_run import Record, StepReport, StepRun, Workspace
from longrl.pipeline.video_frames import BrokenVideo, decode_frames, file_digest, frame_times

SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
Cut = Record | BrokenVideo
"""Result of a video."""
VERSION = 1
"""Raise it when the same options cut elsewhere."""


def split_into_clips(run: StepRun) -> None:
    """Writes one record per clip: video, times in seconds and frame indices.

    A video is cut once; clips of a file with the same content and options come from the log in `splits/`.
    """
    options, report = run.config.split, run.report
    videos = find_videos(run.config.videos, run.workspace.folder)
    report.items = len(videos)
    run.add_items(len(videos))
    log = AppendLog(run.workspace.path("splits")).open()

    def cut_once(video: tuple[str, str]) -> Cut:
        name, path = video
        try:
            digest = file_digest(path)
            how = [VERSION, digest, options.clip_s, options.min_clip_s, options.scenes, options.scene_threshold]
            key = hashlib.sha256(json.dumps(how).encode()).hexdigest()
            if key not in log:
                times = frame_times(path)
                scenes = scene_starts(path, times, options.scene_threshold) if options.scenes else []
                spans = cut_clips(times, options.clip_s, options.min_clip_s, scenes)
                clips = [[times.start(first), times.start(stop), first, stop] for first, stop in spans]
                cut = {"video": name, "digest": digest, "duration_s": times.end_s, "clips": clips}
                log.append(key, cut | {"missing_s": times.index.missing_s})
            return log[key]
        except BrokenVideo as error:
            return error
        finally:
            run.finish_item()

    with ThreadPoolExecutor(options.workers) as pool:
        results = list(pool.map(cut_once, videos))
    log.close()
    clips = list(_clip_records(videos, results, report))
    report.check()
    if options.write_files:
        for clip in clips:
            _write_file(run.workspace, clip)
    run.workspace.write("split", clips)


def find_videos(source: str, made: Path | None = None) -> list[tuple[str, str]]:
    """(name, path) of all videos: the name is relative to the folder, or the path as listed.

    Args:
        source: a folder, or a file that lists videos.
        made: a folder in it of what the pipeline made, which holds links to videos and parts of them.

    Raises:
        ValueError: nothing there, or no video in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if made is not None and made.resolve().is_relative_to(path.resolve()) and made.resolve() != path.resolve():
            files = [file for file in files if not file.resolve().is_relative_to(made.resolve())]
        videos = [(file.relative_to(path).as_posix(), str(file)) for file in files]
    elif path.is_file():
        lines = [line.strip() for line in read_utf8(path).splitlines()]
        videos = [(line, str(path.parent / Path(line).expanduser())) for line in dict.fromkeys(lines) if line]
    else:
        raise ValueError(f"--videos={source} does not exist (working folder: {Path.cwd()}); name a folder or a list")
    if not videos:
        raise ValueError(f"--videos={source} has no video ({', '.join(SUFFIXES)}); name another folder or list")
    return videos


def _clip_records(videos: list[tuple[str, str]], results: list[Cut], report: StepReport) -> Iterator[Record]:
    first_with: dict[str, str] = {}
    for (name, path), result in zip(videos, results, strict=True):
        if isinstance(result, BrokenVideo):
            report.failed += 1
            report.add_problem(name, result.kind, str(result))
            continue
        twin = first_with.setdefault(result["digest"], name)
        if twin != name:
            report.add_problem(name, "same content as another video", f"it is {twin} again, and left out")
            continue
        if result.get("missing_s"):
            report.add_problem(name, "torn", f"its last {result['missing_s']:.1f} s are missing; what is there is cut")
        report.done += 1
        report.counts["clips"] += len(result["clips"])
        video = {"video": name, "path": path, "digest": result["digest"], "duration_s": result["duration_s"]}
        for number, (start_s, end_s, first, stop) in enumerate(result["clips"]):
            span = {"start_s": start_s, "end_s": end_s, "first": first, "stop": stop}
            yield {"id": f"{name}#{number:04d}", **video, **span}


def _write_file(workspace: Workspace, clip: Record) -> None:
    """A clip as an mp4 file in `clips/`, encoded anew and upright: copying would cut at key frames only."""
    import av

    path = workspace.path("clips") / f"{clip['id'].replace('/', '__')}.mp4"
    if path.exists():
        return
    times = frame_times(clip["path"])
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as container:
        stream: Any = None
        for index, frame in decode_frames(clip["path"], range(clip["first"], clip["stop"]), times):
            if stream is None:
                stream = container.add_stream("libx264", rate=30)
                stream.width = frame.width // 2 * 2  # 4:2:0 chroma needs even sides
                stream.height = frame.height // 2 * 2
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = frame.time_base
            picture = frame.reformat(stream.width, stream.height, "yuv420p")
            picture.pts = int(times.index.pts[index] - times.index.pts[clip["first"]])
            container.mux(stream.encode(picture))
        if stream is not None:
            container.mux(stream.encode(None))
