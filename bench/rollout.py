"""Seconds and encoder runs of one rollout: pixels into vLLM, features into vLLM, features from disk; and HFEngine.

P videos of a Qwen2.5-VL with random weights, G completions of each. A rollout begins as one does in training, right
after new weights have gone over, with every cache of keys, values and media empty, and ends with the last token; the
handing over of weights is not part of it.

- pixels: vLLM's processor and encoder read the frames, as engines without embeddings do. The trainer would encode
  them once more for its own passes, which is not counted here.
- features: longrl's encoder encodes and vLLM is given embeddings; the update reuses them.
- disk: the features were encoded by an earlier run.

`encodes` counts videos that a vision encoder reads per rollout, the trainer's or the engine's. Sources alternate; the
median of each is reported.

    python bench/rollout.py --json bench/results/rollout.json
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import encode_once
import torch
from common import Row, parse_arguments, report
from torch import nn

from longrl import types
from longrl.engines.hf import HFEngine
from longrl.engines.vllm import VLLMEngine
from longrl.engines.vllm_options import sampling_arguments
from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.tiny import tiny_qwen2_5_vl


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    completions: tuple[int, ...] = (1, 8)
    videos: int = 4
    frames: int = 64
    response_tokens: int = 32
    repeats: int = 3
    frame_size: int = 112
    text: Mapping[str, Any] = field(default_factory=lambda: encode_once.FULL.text)
    vision: Mapping[str, Any] = field(default_factory=lambda: encode_once.FULL.vision)


FULL = Sizes()
QUICK = Sizes(videos=2, frames=16, response_tokens=8, repeats=1)


class Rollouts:
    """The same prompts, answered by two engines from three sources."""

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.encodes = sizes, 0
        pixels = sizes.frame_size**2
        made = tiny_qwen2_5_vl(folder / "model", text=dict(sizes.text), vision=dict(sizes.vision))
        self.family = Qwen2_5_VLFamily(str(made), random_init=True, max_pixels=pixels, min_pixels=pixels)
        self.model = self.family.build()
        self.model.save_pretrained(made)  # vLLM's encoder needs weights from a folder
        self.clips = [self._clip(number) for number in range(sizes.videos)]
        self.prompts = [
            self.family.render(types.Row(id=clip.key, problem="", answer=""), "What happens?", [clip])
            for clip in self.clips
        ]
        self.disk = DiskCache(self.family, str(folder / "features"), 1 << 30)
        known = self._features(self.disk)
        self.pixels = [self._pixels(*pair, known) for pair in zip(self.prompts, self.clips, strict=True)]
        self.vllm = VLLMEngine(
            max_model_len=4096, max_num_seqs=sizes.videos * max(sizes.completions), kv_cache_gib=1.0,
            enforce_eager=True, options={"load_format": "auto", "block_size": 32, "limit_mm_per_prompt": {"video": 1}},
        )  # fmt: skip
        self.vllm.start(self.family)
        self.family.media_encoders(self.model)[0].register_forward_hook(self._count, with_kwargs=True)
        self.vllm._llm.apply_model(lambda model: model.visual.register_forward_hook(self._count, with_kwargs=True))

    def run(self, engine: str, source: str, completions: int) -> None:
        """One rollout of all prompts."""
        sampling = types.SamplingParams(completions, self.sizes.response_tokens)
        if source == "pixels":
            from vllm import SamplingParams

            asked = [sampling_arguments(self.family, prompt, sampling, 0, 0) for prompt in self.prompts]
            params = [SamplingParams(**arguments) for arguments in asked]
            self.vllm._llm.generate(self.pixels, params, use_tqdm=False)
            return
        features = self._features(self.disk if source == "disk" else None)
        generator = self.vllm if engine == "vllm" else HFEngine()
        generator.generate(self.family, self.model, self.prompts, features, sampling, seed=0)

    def _features(self, disk: DiskCache | None) -> dict[str, torch.Tensor]:
        return FeatureCache(self.family, disk=disk).get_or_encode(self.model, self.prompts)

    def _clip(self, number: int) -> types.Frames:
        size, count = self.sizes.frame_size, self.sizes.frames
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        return types.Frames("video", pixels, tuple(map(float, range(count))), f"clip{number}", float(count))

    def _pixels(self, prompt: types.Prompt, clip: types.Frames, known: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The prompt for vLLM's own processor."""
        metadata = {
            "total_num_frames": len(clip.timestamps), "fps": 1.0, "duration": clip.duration_s,
            "frames_indices": list(range(len(clip.timestamps))), "video_backend": "bench", "do_sample_frames": False,
        }  # fmt: skip
        size = {"shortest_edge": self.family.min_pixels, "longest_edge": self.family.max_pixels}
        return {
            "prompt_token_ids": self.family.engine_request(prompt, known)["prompt_token_ids"],
            "multi_modal_data": {"video": [(clip.pixels.permute(0, 2, 3, 1).numpy(), metadata)]},
            "mm_processor_kwargs": {"size": size},
        }

    def _count(self, vision_encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.encodes += len(kwargs["grid_thw"])


CASES = (("vllm", "pixels"), ("vllm", "features"), ("vllm", "disk"), ("hf", "features"), ("hf", "disk"))


def measure(rollouts: Rollouts, completions: int) -> list[Row]:
    """The rows of one number of completions."""
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in CASES}
    encodes = dict.fromkeys(CASES, 0)
    for _ in range(rollouts.sizes.repeats):
        for case in CASES:
            rollouts.vllm.reset_caches()
            rollouts.encodes = 0
            start = time.perf_counter()
            rollouts.run(*case, completions)
            seconds[case].append(time.perf_counter() - start)
            encodes[case] = rollouts.encodes
    return [
        {
            "engine": engine, "source": source, "completions": completions,
            "rollout_s": statistics.median(seconds[engine, source]), "encodes": encodes[engine, source],
        }
        for engine, source in CASES
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    with tempfile.TemporaryDirectory() as folder:
        rollouts = Rollouts(sizes, Path(folder))
        for case in CASES:  # the first rollouts of a process are slow
            rollouts.run(*case, 1)
        rows = [row for count in sizes.completions for row in measure(rollouts, count)]
        rollouts.vllm.close()
    tokens = len(rollouts.prompts[0].input_ids)
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    report(__file__, arguments, rows, notes=[f"{tokens} prompt tokens; sizes: {settings}"])


if __name__ == "__main__":
    main()
