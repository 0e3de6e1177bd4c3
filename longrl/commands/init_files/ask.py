"""Asks an exported model one question about a video, by transformers alone: nothing of longrl is imported.

python ask.py EXPORTED VIDEO "What happens at the end?"

A question with options has them on lines of their own, as in training: A. tea, B. milk.
"""

import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata


def main(folder: str, video: str, question: str) -> None:
    """Prints the answer."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto").eval()

    # 1. What the model was trained on: `export` writes it beside the weights.
    settings = yaml.safe_load(Path(folder, "longrl_settings.yaml").read_text(encoding="utf-8"))
    text = settings["data"]["question_template"].replace("{subtitles}", "").replace("{problem}", question)

    # 2. The frames, with their times, from which the model's positions or time stamps are made.
    frames, times = read_frames(video, settings["data"]["video"])
    options = {"do_sample_frames": False, "video_metadata": [times]}
    options |= size_options(processor, settings["family"]["init_args"], len(frames))

    # 3. The prompt, as the chat template writes it, and the answer.
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt], videos=[frames], videos_kwargs=options, return_tensors="pt").to(model.device)
    limit = settings["sampling"]["max_completion_tokens"]
    tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))


def read_frames(video: str, shown: dict[str, Any]) -> tuple[np.ndarray, VideoMetadata]:
    """Frames [N, H, W, 3] at the middles of equal spans of time, as in training, and their times.

    The reader of transformers counts frames instead of time, finds none to count in WebM, and leaves the videos of a
    phone that was held upright on their side.
    """
    # 1. When each frame appears, and until when the last one is shown.
    with av.open(video) as file:
        unit_s = float(file.streams.video[0].time_base or 1)
        spans = [(packet.pts, packet.duration or 0) for packet in file.demux(video=0) if packet.pts is not None]
    starts = np.array(sorted(start for start, _ in spans))
    duration = max(start + length for start, length in spans) - starts[0]
    wanted = shown["num_frames"] or round(duration * unit_s * shown["fps"])
    count = min(max(wanted, shown["min_frames"]), shown["max_frames"], len(starts))
    moments = starts[0] + (np.arange(count) + 0.501) * duration / count
    chosen = set(starts[np.searchsorted(starts, moments, side="right") - 1].tolist())

    # 2. These frames, turned as the file asks for.
    with av.open(video) as file:
        file.streams.video[0].thread_type = "AUTO"
        read = [frame for frame in file.decode(video=0) if frame.pts in chosen]
    frames = np.stack([np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in read])

    # 3. Times in milliseconds, as transformers has them: numbers of frames at a rate of 1000 per second.
    milliseconds = [round(float(frame.pts - starts[0]) * unit_s * 1000) for frame in read]
    length = round(float(duration) * unit_s * 1000)
    return frames, VideoMetadata(total_num_frames=length, fps=1000, frames_indices=milliseconds)


def size_options(processor: Any, limits: dict[str, Any], num_frames: int) -> dict[str, Any]:
    """How small and how large the processor makes frames: as in training."""
    if "max_pixels" not in limits:  # a family whose frames all have one size
        return {}
    least, most, budget = limits["min_pixels"], limits["max_pixels"], limits["max_video_pixels"]
    if type(processor.video_processor).__name__.startswith("Qwen3"):  # counts the pixels of all frames together
        num_counted = max(num_frames, processor.video_processor.temporal_patch_size)
        least *= num_counted
        most = max(least, min(most * num_counted, budget))
        return {"size": {"shortest_edge": least, "longest_edge": most}, "cap_pixels_per_frame": False}
    most = max(least, min(most, budget // num_frames))
    return {"size": {"shortest_edge": least, "longest_edge": most}}


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
