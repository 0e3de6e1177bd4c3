"""Whether a model trained by reward alone comes to hear: a tiny Qwen2.5-Omni is asked whether a tone is low or high.

Both stages are the command line on configs/qwen2_5_omni_7b_avqa_grpo.yaml, with a model of 0.2 million random weights:

- SFT teaches the form of an answer, on answers drawn by lot: nothing in it tells low from high.
- GRPO rewards right answers. All that the model then knows of tones it has heard.

Tones last 0.3 to 1.5 s and lie around 300 or 1500 Hz, between other sines of no meaning, in noise, at any loudness.
Evaluation is on tones that no stage has heard, one answer each, sampled at temperature 1, after each stage, four ways:
as it sounds; with silence of the same length instead; with another row's tone instead (then right answers are chance
for a model that hears, as they are for one that does not); and without any sound in the prompt. Half of the answers are
low. `low` and `high` are Wilson's 95 % bounds of the share of right answers.

    python bench/hearing.py --json bench/results/hearing.json
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import ROOT, Row, parse_arguments, report
from numpy.typing import NDArray

from longrl import types
from longrl.commands.export import family_of
from longrl.commands.main import main as longrl_main
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.shown_media import without_media
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows.question_rows import audio_qa_row, make_rows
from longrl.datamodules.rows.sources import read_records
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.modules.initial_weights import build_from
from longrl.rewards import accuracy
from longrl.testing.tiny import tiny_qwen_omni

RECIPE = ROOT / "configs" / "qwen2_5_omni_7b_avqa_grpo.yaml"
RATE = 16_000
PITCHES = {"low": 300.0, "high": 1500.0}


@dataclass(frozen=True)
class Sizes:
    """What a run trains and measures."""

    train_tones: int = 400
    eval_tones: int = 400
    sft_steps: int = 40
    rl_steps: int = 120
    prompts: int = 16
    generations: int = 8


FULL = Sizes()
QUICK = Sizes(train_tones=32, eval_tones=16, sft_steps=4, rl_steps=2, prompts=4, generations=4)


# ---- data ----


def tone(pitch: str, random_: np.random.Generator) -> NDArray[np.int16]:
    """[S] samples of a tone that is low or high, between sines far from both, in noise."""
    time = np.arange(int(random_.uniform(0.3, 1.5) * RATE)) / RATE
    around = PITCHES[pitch] * random_.uniform(0.8, 1.25)
    sound = np.sin(2 * np.pi * (around * time + random_.random()))
    sound += 0.3 * np.sin(2 * np.pi * (random_.uniform(3000, 5000) * time + random_.random()))
    sound += 0.05 * random_.standard_normal(len(time))
    return (sound * random_.uniform(0.05, 0.6) * 32767 / 1.6).astype(np.int16)


def write_wav(path: Path, samples: NDArray[np.int16]) -> None:
    """One channel of 16 bits at 16 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


def write_tones(folder: Path, name: str, count: int, seed: int, by_lot: bool = False) -> Path:
    """`count` tones and a question about each, half of them low; `by_lot` draws the answers instead."""
    random_, lot = np.random.default_rng(seed), random.Random(seed)
    lines = []
    for number in range(count):
        pitch = list(PITCHES)[number % 2]
        write_wav(folder / f"{name}{number}.wav", tone(pitch, random_))
        answer = lot.choice(list(PITCHES)) if by_lot else pitch
        asked = {"question": "Which tone?", "options": list(PITCHES), "answer": answer}
        lines.append(json.dumps({"id": f"{name}{number}", "audio": f"{name}{number}.wav", **asked}) + "\n")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines))
    return path


# ---- training ----


def fit(sizes: Sizes, folder: Path, run: str, *more: str) -> Path:
    """A run of the recipe with the tiny model on the CPU."""
    longrl_main(
        ["fit", f"--config={RECIPE}", f"--trainer={ROOT / 'configs' / 'trainer' / 'cpu.yaml'}",
         f"--run_dir={folder / run}", "--trainer.enable_model_summary=false",
         f"--model.family.init_args.model={folder / 'model'}", "--model.family.init_args.random_init=true",
         "--model.family.init_args.dtype=float32", "--model.family.init_args.gradient_checkpointing=false",
         "--model.family.init_args.use_audio_in_video=false", "--model.family.init_args.freeze_audio_encoder=false",
         "--model.algorithm.kl_coef=0", "--data.val=null", "--data.test=null", "--data.num_workers=0",
         "--data.question_template={problem}", "--data.answer_template=<answer>{option}</answer>",
         f"--data.media_root={folder}", f"--data.prompts_per_batch={sizes.prompts}", "--data.cached_media=100000",
         f"--rollout.sampling.num_generations={sizes.generations}",
         "--rollout.sampling.max_completion_tokens=6", f"--rollout.engine={ROOT / 'configs' / 'rollout' / 'hf.yaml'}",
         "--rollout.engine.init_args.max_sequences=1024",
         '--rollout.reward={"terms": [{"function": "longrl.rewards.accuracy"}]}', *more]
    )  # fmt: skip
    return folder / run


def train(sizes: Sizes, folder: Path) -> dict[str, Path]:
    """Folders of the two runs."""
    tiny_qwen_omni(folder / "model", text={"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128})
    by_lot = write_tones(folder, "lot", sizes.train_tones, seed=1, by_lot=True)
    right = write_tones(folder, "train", sizes.train_tones, seed=2)
    sft = fit(
        sizes, folder, "sft", "--data.stage=sft", f"--data.train={by_lot}", "--data.blind_share=0.2",
        f"--trainer.max_steps={sizes.sft_steps}", "--model.optimizer.lr=3e-3",
    )  # fmt: skip
    rl = fit(
        sizes, folder, "rl", "--data.stage=rl", f"--data.train={right}", f"--model.init_from={sft}",
        f"--trainer.max_steps={sizes.rl_steps}", "--model.optimizer.lr=1e-3",
    )  # fmt: skip
    return {"sft": sft, "rl": rl}


# ---- evaluation ----


def heard(way: str, rows: Sequence[types.Row], folder: Path) -> list[types.Row]:
    """The rows as a way of asking has them."""
    if way == "no sound":
        return [without_media(row) for row in rows]
    if way == "another's":  # the neighbours' pitches alternate, so half of all rows get their own pitch
        order = random.Random(0).sample(rows, len(rows))
        return [dataclasses.replace(row, audios=other.audios) for row, other in zip(rows, order, strict=True)]
    if way == "silence":
        return [dataclasses.replace(row, audios=(str(silent(Path(row.audios[0]))),)) for row in rows]
    return list(rows)


def silent(path: Path) -> Path:
    """A file of as many zeros."""
    with wave.open(str(path)) as file:
        count = file.getnframes()
    quiet = path.with_suffix(".silent.wav")
    write_wav(quiet, np.zeros(count, np.int16))
    return quiet


def evaluate(run: Path, rows: Sequence[types.Row], folder: Path) -> dict[str, list[float]]:
    """way -> 1.0 for every right answer, one per row."""
    family = family_of(str(run))
    model = build_from(family, str(run))
    renderer = RowRenderer(family, VideoSampling(), question_template="{problem}")
    sampling = types.SamplingParams(num_generations=1, max_completion_tokens=6)
    right = {}
    for way in ("its own", "silence", "another's", "no sound"):
        prompts = [renderer(row) for row in heard(way, rows, folder)]
        features = FeatureCache(family).get_or_encode(model, prompts)
        answers = HFEngine(64).generate(family, model, prompts, features, sampling, seed=7)
        right[way] = [accuracy(answer, row) for (answer,), row in zip(answers, rows, strict=True)]
    return right


def wilson(right: Sequence[float]) -> tuple[float, float]:
    """95 % bounds of a share (Wilson 1927)."""
    count, share, z = len(right), sum(right) / len(right), 1.96
    middle, spread = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - spread) / (1 + z**2 / count), (middle + spread) / (1 + z**2 / count)


def measure(sizes: Sizes, folder: Path) -> list[Row]:
    """A row for every stage and way of asking."""
    runs = train(sizes, folder)
    source = write_tones(folder, "eval", sizes.eval_tones, seed=3)
    rows = [row for row in make_rows(read_records(source), audio_qa_row, str(folder)) if isinstance(row, types.Row)]
    table = []
    for stage, run in runs.items():
        for way, right in evaluate(run, rows, folder).items():
            low, high = wilson(right)
            table.append({"stage": stage, "sound": way, "right": sum(right) / len(right), "low": low, "high": high})
    return table


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(sizes, Path(folder))
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    report(__file__, arguments, rows, notes=[f"sizes: {settings}"])


if __name__ == "__main__":
    main()
