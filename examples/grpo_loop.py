"""GRPO on videos as a loop you can read: no Lightning, no config, about a minute on a laptop.

    python examples/grpo_loop.py

The demo's base model describes videos and was never asked a question: to "Where is the green cross?" it describes all
that it saw. The reward is how many words a completion shares with the right answer. In 60 steps it rises from 0.1 to
about 0.6; a model that always says the same position earns 0.5.

`python -m longrl fit` takes the same step. Left out here: several GPUs (MR-SP), checkpoints and resuming, vLLM,
sampling ahead (staleness), resampling, several updates per rollout, a reference model, loader processes, skipped rows,
metrics.
"""

import argparse
import random
from collections import Counter

import torch

import longrl
from longrl.algorithms import single_rank, token_mean
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.rewards.options import parse_options
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos


def shared_words(completion, row):
    """F1 of the words of a completion and those of the right option: 1 if it says that and nothing else."""
    said = Counter(completion.text.lower().replace(".", " ").split())
    right = Counter(parse_options(row.problem)[row.answer].lower().split())
    return 2 * (said & right).total() / (said.total() + right.total())


def main(videos="runs/examples/videos", num_steps=60, num_videos=64, prompts_per_step=8):
    # 1. Data: mp4 files and a JSONL of questions, here generated. A row function reads the schema of the records.
    generate_videos(videos, SyntheticConfig(num_videos, num_eval_videos=0, fps=2))
    rows = longrl.read_rows(f"{videos}/train.jsonl", "longrl.datamodules.rows.longvideo_reason_row")

    # 2. Model: a family knows how to build it, how its prompts look, and where its parts are. The encoder is frozen.
    family = Qwen2_5_VLFamily("configs/demo/base", min_pixels=3136, max_pixels=3136)
    model = family.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, betas=(0.9, 0.98))

    # 3. Prompts: a frame every two seconds, token ids with a placeholder for each token of the video.
    render = longrl.RowRenderer(family, longrl.VideoSampling(fps=0.5, max_frames=64), question_template="{problem}")
    prompts = [render(row) for row in rows if row.category == "spatial"]

    # 4. The parts of a step, each of which can be yours: docs/extend.
    cache = longrl.FeatureCache(family)  # a video goes through the encoder once, however often it is asked about
    engine = longrl.HFEngine()  # samples with the model itself, each prompt prefilled once for its G completions
    sampling = longrl.SamplingParams(num_generations=8, max_completion_tokens=48)
    reward = longrl.RewardSum([longrl.RewardTerm(shared_words)])
    algorithm = longrl.Algorithm(token_weights=token_mean, clip_high=0.28)  # advantages: normalized within the group

    history = []
    for step in range(num_steps):
        batch = random.Random(step).sample(prompts, prompts_per_step)  # P prompts

        # Rollout: G completions of each prompt, N tokens in all, each with its log-probability.
        features = cache.get_or_encode(model, batch)  # {key of a video: [tokens, hidden size]}
        completions = engine.generate(family, model, batch, features, sampling, seed=step)
        lengths = torch.tensor([len(one.token_ids) for group in completions for one in group])  # [P * G]

        # Reward: fills `rewards` and `valid` of each group. A function that raises costs the completion, not the run.
        groups = [longrl.Group(prompt, answers) for prompt, answers in zip(batch, completions, strict=True)]
        reward.score(groups)
        rewards = torch.stack([group.rewards for group in groups])  # [P, G]
        valid = torch.stack([group.valid for group in groups])  # [P, G]

        # Advantages, and what each token counts: weights sum to 1 over the step, so losses of micro-batches add up.
        advantages = algorithm.token_advantages(rewards, valid, lengths)  # [N]
        weights = algorithm.token_weights(lengths, valid.flatten(), single_rank)  # [P * G]

        # Update. A micro-batch is [prompt][y1]..[yG], group after group: every prompt is computed once, not G times.
        optimizer.zero_grad()
        for packed in longrl.pack(batch, completions, max_tokens=8192):
            output = family.forward(model, packed, features, sampling.temperature)
            loss = algorithm.loss(
                logp=output.logp,  # [R] of the micro-batch's R sampled tokens
                old_logp=output.logp.detach(),  # the policy that sampled is the one being updated
                ref_logp=None,  # no KL penalty
                sampler_logp=None,  # and no correction of an engine's other rounding
                advantages=advantages[packed.token_index],
                weights=weights[packed.completion_index],
                completion_index=packed.completion_index,
            ).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        history.append(rewards.mean().item())
        print(f"step {step:2}  reward {history[-1]:.3f}  tokens per completion {lengths.float().mean():4.1f}")
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    main(num_steps=parser.parse_args().steps)
