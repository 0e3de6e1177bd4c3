"""Figures of released code, computed with that code itself; tests hold longrl's own to them.

    python -m tests.harness.peer_figures frames LONG_RL tests/datamodules/media/peer_frame_times.json
    python -m tests.harness.peer_figures scores tests/evaluation/peer_scores.json

in an environment in which lmms_eval, vlmeval, qwen_vl_utils and longrl import; LONG_RL is a checkout of NVlabs/Long-RL.
Videos are stand-ins for decord's, OpenCV's and PyAV's that note which frames are asked for: what is run is the rule.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from tests.harness.peer_cases import OUTPUTS, VIDEOS, Ask, Video

Frames = list[int]


def shown(frames: Frames) -> dict[str, Any]:
    """The figures of a list of frames: all of few, else how many, the ends, and a hash of all."""
    if len(frames) <= 12:
        return {"frames": frames}
    digest = hashlib.sha256(json.dumps(frames).encode()).hexdigest()[:16]
    return {"count": len(frames), "first": frames[:4], "last": frames[-3:], "sha256": digest}


# ------------------------------------------------------------------------------------------------- frames of videos
class DecordVideo:
    """A video as decord has it, of black frames; notes which are read."""

    video: Video
    read: Frames

    def __init__(self, path: object, **options: object) -> None:
        DecordVideo.read = []

    def __len__(self) -> int:
        return self.video.num_frames

    def get_avg_fps(self) -> float:
        return float(Fraction(self.video.fps))

    def get_batch(self, indices: Frames) -> Any:
        DecordVideo.read += [int(index) for index in indices]
        return SimpleNamespace(asnumpy=lambda: np.zeros((len(indices), 2, 2, 3), np.uint8))

    def __getitem__(self, index: int) -> Any:
        DecordVideo.read.append(int(index))
        return SimpleNamespace(asnumpy=lambda: np.zeros((2, 2, 3), np.uint8))


class OpenCVVideo:
    """A video as OpenCV has it, whose frames spell their numbers."""

    def __init__(self, video: Video) -> None:
        self.video, self.at = video, 0

    def get(self, name: str) -> float:
        return float(Fraction(self.video.fps)) if name == "fps" else float(self.video.num_frames)

    def grab(self) -> bool:
        self.at += 1
        return self.at <= self.video.num_frames

    def read(self) -> tuple[bool, Any]:
        there = self.grab()
        number = self.at - 1
        return there, np.array([[[number % 256, number // 256 % 256, number // 65536]]], np.uint8) if there else None


def qwen_frames(video: Video, ask: Ask) -> Frames | None:
    """qwen-vl-utils' decord reader; None where it refuses."""
    from qwen_vl_utils.vision_process import _read_video_decord

    rule = {"nframes": ask.count} if ask.count else {"fps": ask.rate, "min_frames": 4, "max_frames": ask.most}
    try:
        _, metadata, _ = _read_video_decord({"video": "x.mp4", **rule})
    except ValueError:
        return None
    return [int(index) for index in metadata["frames_indices"]]


def vila_frames(video: Video, ask: Ask, long_rl: Path) -> Frames:
    """Long-RL's VILA: `_load_video` of a number of frames, `get_frame_from_vcap_with_fps` of a rate."""
    folder = long_rl / "verl/utils/vila_remote_code"
    from PIL import Image

    scope: dict[str, Any] = {"np": np, "Image": Image, "cv2": sys.modules["cv2"]}
    if ask.count:
        exec(_function(folder / "media.py", "_load_video"), scope)
        images = scope["_load_video"]("x.mp4", ask.count)
    else:
        exec(_function(folder / "mm_utils.py", "get_frame_from_vcap_with_fps"), scope)
        images, _ = scope["get_frame_from_vcap_with_fps"](OpenCVVideo(video), num_frames=ask.most, max_fps=ask.rate)
    pixels = [image.getpixel((0, 0)) for image in images]
    return [red + 256 * green + 65536 * blue for red, green, blue in pixels]


def _function(path: Path, name: str) -> Any:
    """The code of a file's last function of a name; the file itself would import the whole trainer."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    last = [item for item in tree.body if isinstance(item, ast.FunctionDef) and item.name == name][-1]
    return compile(ast.Module([last], []), str(path), "exec")


def lmms_eval_frames(video: Video, ask: Ask) -> Frames:
    """lmms-eval's decord loader of a number of frames, and its PyAV loader of a rate."""
    from lmms_eval.models.model_utils.load_video import load_video_decord, load_video_stream

    if ask.count:
        load_video_decord("x.mp4", ask.count)
        return DecordVideo.read
    stream = SimpleNamespace(frames=video.num_frames, average_rate=Fraction(video.fps))
    container = SimpleNamespace(
        streams=SimpleNamespace(video=[stream]), decode=lambda video: iter(range(stream.frames))
    )
    return load_video_stream(container, ask.most, ask.rate)


def vlmevalkit_frames(video: Video, ask: Ask) -> Frames:
    """VLMEvalKit's `VideoBaseDataset.save_video_frames`; its rate has no upper limit."""
    from vlmeval.dataset.video_base import VideoBaseDataset

    class Dataset(VideoBaseDataset):
        def __init__(self, folder: str) -> None:
            self.frame_root, self.data_root = folder, folder
            self.frame_tmpl, self.frame_tmpl_fps = "{}-{}.jpg", "{}-{}-{}.jpg"
            self.nframe, self.fps = ask.count or 0, ask.rate or -1

        def evaluate(self, eval_file, **judge): ...
        def build_prompt(self, idx): ...
        def prepare_dataset(self, dataset): ...

    with tempfile.TemporaryDirectory() as folder:
        Dataset(folder).save_video_frames("x")
    return DecordVideo.read


def frame_figures(long_rl: Path) -> list[dict[str, Any]]:
    """Of every video and peer, which frames its rule takes."""
    from PIL import Image

    sys.modules["decord"] = ModuleType("decord")
    vars(sys.modules["decord"]).update(VideoReader=DecordVideo, cpu=lambda index: index)
    sys.modules["cv2"] = ModuleType("cv2")
    vars(sys.modules["cv2"]).update(
        VideoCapture=lambda path: OpenCVVideo(DecordVideo.video), cvtColor=lambda frame, code: frame,
        CAP_PROP_FPS="fps", CAP_PROP_FRAME_COUNT="count", COLOR_BGR2RGB=None,
    )  # fmt: skip
    Image.Image.save = lambda *args, **options: None  # what VLMEvalKit does with each frame
    rows = []
    for video, ask in VIDEOS:
        DecordVideo.video = video
        DecordVideo.read = []
        row: dict[str, Any] = {"video": video._asdict(), "ask": ask._asdict()}
        peers = {
            "qwen": qwen_frames(video, ask), "vila": vila_frames(video, ask, long_rl),
            "lmms_eval": lmms_eval_frames(video, ask), "vlmevalkit": vlmevalkit_frames(video, ask),
        }  # fmt: skip
        rows.append(row | {name: None if frames is None else shown(frames) for name, frames in peers.items()})
    return rows


# -------------------------------------------------------------------------------------------------- scores of answers
def score_figures() -> dict[str, str]:
    """Of every peer's rule, a digit per output: 1 where it counts as right."""
    return {name: "".join(map(str, rule())) for name, rule in SCORERS.items()}


def lmms_eval_scores() -> list[int]:
    """VideoMME of lmms-eval, behind the tags that its command line strips by default."""
    from lmms_eval.api.reasoning import strip_reasoning_tags
    from lmms_eval.tasks.videomme.utils import videomme_process_results

    fields = dict.fromkeys(("domain", "sub_category", "task_type", "question_id", "duration", "videoID"), "x")
    scores = []
    for output in OUTPUTS:
        text = strip_reasoning_tags(output.text, [["<think>", "</think>"], ["<analysis>", "</analysis>"]])
        result = videomme_process_results({**fields, "answer": output.gold}, [text])
        scores.append(int(result["videomme_perception_score"]["score"]))
    return scores


def vlmevalkit_videomme_scores() -> list[int]:
    """Video-MME of VLMEvalKit with `exact_matching`: its `evaluate` on a file of predictions."""
    import pandas as pd
    from vlmeval.dataset import videomme
    from vlmeval.dataset.utils.videomme import DOMAINS, DURATIONS, SUB_CATEGORIES, TASK_CATEGORIES

    fields = {
        "domain": DOMAINS[0], "sub_category": SUB_CATEGORIES[0], "task_type": TASK_CATEGORIES[0],
        "duration": DURATIONS[0],
    }  # fmt: skip
    rows = [
        {"index": index, "video": "x", "question": "Which?", "answer": output.gold, "prediction": output.text,
         "candidates": str([f"{letter}. {text}" for letter, text in output.options.items()]), **fields}
        for index, output in enumerate(OUTPUTS)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        predictions = Path(folder, "tiny_Video-MME.xlsx")
        pd.DataFrame(rows).to_excel(predictions)
        videomme.VideoMME.evaluate(str(predictions), model="exact_matching")
        scored = pd.read_excel(next(Path(folder).glob("*_score*.xlsx")))
    return [int(score) for score in scored["score"]]


def vlmevalkit_mcq_scores() -> list[int]:
    """Other multiple-choice sets of VLMEvalKit with `exact_matching`: `eval_vanilla`."""
    from vlmeval.dataset.utils.multiple_choice import eval_vanilla

    items = [
        {"question": "Which?", "prediction": output.text, "GT": output.gold, **output.options} for output in OUTPUTS
    ]
    return [eval_vanilla(None, item)["hit"] for item in items]


SCORERS = {
    "lmms_eval_videomme": lmms_eval_scores,
    "vlmevalkit_videomme": vlmevalkit_videomme_scores,
    "vlmevalkit_mcq": vlmevalkit_mcq_scores,
}

if __name__ == "__main__":
    _, what, *paths, out = sys.argv
    if what == "frames":
        text = "[\n" + ",\n".join(json.dumps(row) for row in frame_figures(Path(paths[0]))) + "\n]\n"
    else:
        text = json.dumps(score_figures(), indent=1) + "\n"
    Path(out).write_text(text)
