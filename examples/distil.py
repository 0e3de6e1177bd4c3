"""On-policy distillation as a loop you can read: a teacher that sees more frames scores what the student says.

    python examples/distil.py

Student and teacher are the demo's base model; the student sees a frame every eight seconds, the teacher one every two.
The student describes a video; for each of its tokens the teacher says how likely it would have been. Their difference,
log q - log p, is the reverse KL divergence on average, and its negative the token's advantage. No reward and no answer
is needed. The divergence falls from 6 to about 3 nats in 30 steps.

The same as a run: configs/demo/distil, with whole distributions instead of sampled tokens (docs/distillation.md).
"""

import argparse
import random
from dataclasses import replace

import torch

import longrl
from longrl.algorithms import single_rank, token_mean
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos


def main(videos="runs/examples/videos", num_steps=30, num_videos=64, prompts_per_step=8):
    # 1. One prompt of each video for either: the same question behind other frames.
    generate_videos(videos, SyntheticConfig(num_videos, num_eval_videos=0, fps=2))
    rows = longrl.read_rows(f"{videos}/train.jsonl", "longrl.datamodules.rows.longvideo_reason_row")
    family = Qwen2_5_VLFamily("configs/demo/base", min_pixels=3136, max_pixels=3136)
    few = longrl.RowRenderer(family, longrl.VideoSampling(fps=0.125, min_frames=2), question_template="{problem}")
    many = replace(few, video=longrl.VideoSampling(fps=0.5))
    describe = [replace(row, problem="Describe the video.") for row in rows if row.category == "spatial"]
    pairs = [(few(row), many(row)) for row in describe]

    # 2. Two models of one family; they may be of different sizes, if they have the same tokens.
    student = family.build()
    teacher = family.build().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=5e-4, betas=(0.9, 0.98))
    cache = longrl.FeatureCache(family)  # both have the same vision encoder, which is frozen
    engine = longrl.HFEngine()
    sampling = longrl.SamplingParams(num_generations=4, max_completion_tokens=64)
    algorithm = longrl.Algorithm(token_weights=token_mean)

    history = []
    for step in range(num_steps):
        seen, shown = zip(*random.Random(step).sample(pairs, prompts_per_step), strict=True)
        features = cache.get_or_encode(student, [*seen, *shown])

        # What the student says, and what the teacher would have said: N tokens, numbered alike behind either prompt.
        completions = engine.generate(family, student, seen, features, sampling, seed=step)
        answers = [answer for group in completions for answer in group]
        lengths = torch.tensor([len(answer.token_ids) for answer in answers])  # [C]
        student_logp = torch.cat([answer.logprobs for answer in answers])  # [N]
        teacher_logp = torch.zeros_like(student_logp)
        with torch.no_grad():
            for packed in longrl.pack(shown, completions, max_tokens=8192):
                teacher_logp[packed.token_index] = family.forward(teacher, packed, features).logp
        advantages = teacher_logp - student_logp  # [N]

        # The update is that of RL: an advantage for each token.
        weights = algorithm.token_weights(lengths, torch.ones(len(lengths), dtype=torch.bool), single_rank)  # [C]
        optimizer.zero_grad()
        for packed in longrl.pack(seen, completions, max_tokens=8192):
            logp = family.forward(student, packed, features).logp
            index = packed.completion_index
            of_tokens = advantages[packed.token_index]
            algorithm.loss(logp, logp.detach(), None, None, of_tokens, weights[index], index).loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

        history.append(-advantages.mean().item())
        print(f"step {step:2}  reverse KL {history[-1]:.3f} nats per token  length {lengths.float().mean():.1f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=30)
    main(num_steps=parser.parse_args().steps)
