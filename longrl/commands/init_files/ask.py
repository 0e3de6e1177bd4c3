"""Asks an exported model one question about a video, by transformers alone: nothing of longrl is imported.

python ask.py EXPORTED VIDEO "What happens at the end?"
"""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import load_video


def main(folder: str, video: Any, question: str) -> None:
    """Prints the answer."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", device_map="auto").eval()

    # 1. What the model was trained on: `export` writes it beside the weights.
    settings = yaml.safe_load(Path(folder, "longrl_settings.yaml").read_text(encoding="utf-8"))
    shown, limits = settings["data"]["video"], settings["family"]["init_args"]
    text = settings["data"]["question_template"].replace("{subtitles}", "").replace("{problem}", question)
    options: dict[str, Any] = {"do_sample_frames": False}
    if "max_pixels" in limits:  # of one frame
        options["size"] = {"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}

    # 2. The frames: even in time, no more than in training.
    def frames_of(metadata: Any, **_: Any) -> Any:
        wanted = metadata.duration * shown["fps"]
        count = int(min(max(wanted, shown["min_frames"]), shown["max_frames"], metadata.total_num_frames))
        return torch.linspace(0, metadata.total_num_frames - 1, max(count, 1)).round().int().numpy()

    frames, _ = load_video(video, backend="pyav", sample_indices_fn=frames_of)

    # 3. The prompt, as the chat template writes it, and the answer.
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=[prompt], videos=[frames], videos_kwargs=options, return_tensors="pt").to(model.device)
    limit = settings["sampling"]["max_completion_tokens"]
    tokens = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    print(processor.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
