"""A rollout engine of your own: the smallest there is, which computes everything anew for each token.

    python examples/custom_engine.py

samples with it and compares its log-probabilities with the trainer's. In a run:

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --rollout.engine examples.custom_engine.PlainEngine --rollout.reward examples/custom_reward.yaml \
        --run_dir runs/examples/engine
"""

import torch

import longrl
from longrl.engines.rollout_engine import prompt_seed
from longrl.engines.sampling import sample_tokens
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Completion


class PlainEngine(longrl.RolloutEngine):
    """Samples token by token by a forward pass of prompt and completion: slow, and right.

    Args:
        log_every: prints a line for every so many completions; 0 is never.
    """

    reads_policy_weights = True  # sharded weights are gathered around `generate`

    def __init__(self, log_every: int = 0) -> None:
        self.log_every = log_every

    def sync(self, family, model, step):
        """Nothing to take over: `generate` is handed the trainer's model."""

    def identity(self):
        """None of its options decides an answer; needed where an evaluation stores answers."""
        return {}

    @torch.no_grad()
    def generate(self, family, model, prompts, features, sampling, seed, first=0):
        groups = []
        for prompt in prompts:
            numbers = range(first, first + sampling.num_generations)
            groups.append([self._sample(family, model, prompt, features, sampling, seed, number) for number in numbers])
        return groups

    def _sample(self, family, model, prompt, features, sampling, seed, number):
        """Completion `number` of a prompt; seed, prompt and number alone decide it, whoever samples the others."""
        generator = torch.Generator().manual_seed(prompt_seed(seed, f"{prompt.id}/{number}"))
        ids = torch.zeros(0, dtype=torch.int64)
        logps = torch.zeros(0)
        reason = "length"
        while reason == "length" and len(ids) < sampling.max_completion_tokens:
            token, logp = sample_tokens(
                self._next_logits(family, model, prompt, ids, features),
                sampling,
                torch.rand(1, generator=generator, dtype=torch.float64),
            )
            ids = torch.cat([ids, token.cpu()])
            logps = torch.cat([logps, logp.cpu()])
            if int(token) in family.end_token_ids:
                reason = "stop"
        if self.log_every and number % self.log_every == 0:
            print(f"{prompt.id}: {family.decode(ids)}")
        return Completion(ids, logps, family.decode(ids), reason)

    def _next_logits(self, family, model, prompt, ids, features):
        """[1, V] logits behind the prompt and the tokens so far."""
        anything = torch.zeros(1, dtype=torch.int64)  # the token that is to be drawn: nothing attends to it
        packed = longrl.pack([prompt], [[torch.cat([ids, anything])]], max_tokens=1 << 30)[0]
        packed = packed.to(model.get_input_embeddings().weight.device)
        inputs = family.text_inputs(model, packed, features)  # embeddings, with video features in their places
        hidden = family.hidden_states(model, packed.position_ids[:, None], packed.spans, **inputs)  # [1, L, D]
        return model.get_output_embeddings()(hidden[:, packed.predict_from[-1]])


def main(videos="runs/examples/videos", num_videos=64, num_prompts=2, num_generations=2, max_tokens=12):
    generate_videos(videos, SyntheticConfig(num_videos, num_eval_videos=0, fps=2))
    rows = longrl.read_rows(f"{videos}/train.jsonl", "longrl.datamodules.rows.longvideo_reason_row")
    family = Qwen2_5_VLFamily("configs/demo/base", min_pixels=3136, max_pixels=3136)
    model = family.build()
    render = longrl.RowRenderer(family, longrl.VideoSampling(fps=0.5, max_frames=64), question_template="{problem}")
    prompts = [render(row) for row in rows[:num_prompts]]
    features = longrl.FeatureCache(family).get_or_encode(model, prompts)
    sampling = longrl.SamplingParams(num_generations, max_tokens)

    groups = PlainEngine(log_every=1).generate(family, model, prompts, features, sampling, seed=0)

    # Whatever the engine: the trainer must find each token as likely as the engine said. A run measures it in every
    # step (`train/mismatch_mean`) and ends if the first rollout is too far away.
    (packed,) = longrl.pack(prompts, groups, max_tokens=8192)
    with torch.no_grad():
        logp = family.forward(model, packed, features, sampling.temperature).logp
    sampled = torch.cat([completion.logprobs for group in groups for completion in group])
    difference = (logp - sampled[packed.token_index]).abs().max().item()
    print(f"largest difference to the trainer: {difference:.1e} nats")
    assert difference < 1e-4
    return groups


if __name__ == "__main__":
    main()
