"""Rollouts that go on over several updates, by a slow engine of long-tailed lengths in the process of the test."""

import pytest
import torch
from lightning.pytorch import Callback

from longrl.algorithms import Algorithm
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.types import SamplingParams
from tests.callbacks.test_rollout import callback, data_module, order_of, train
from tests.slow_engine import SlowEngine
from tests.tiny import text_family

SAMPLING = SamplingParams(num_generations=2, max_completion_tokens=8)


def by_tokens(completion, row):
    return int(completion.token_ids.sum()) % 7 / 7


class Weights(Callback):
    """Keeps the weights of every step, and scores all completions of the run by those that drew each token."""

    def __init__(self):
        self.of_step, self.batches, self.differences, self.ages, self.scored = {}, [], [], [], 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        state = pl_module.model.state_dict()
        self.of_step[trainer.global_step] = {name: value.clone() for name, value in state.items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append((trainer.global_step - pl_module.steps_per_rollout, batch))

    def on_train_end(self, trainer, pl_module):
        for step, batch in self.batches:
            prompts = [group.prompt for group in batch.groups]
            completions = [group.completions for group in batch.groups]
            engine = torch.cat([completion.logprobs for group in completions for completion in group])
            versions = torch.cat([completion.versions for group in completions for completion in group])
            self.ages += ((step - versions) / pl_module.steps_per_rollout).ceil().int().tolist()
            for version in versions.unique().tolist():
                pl_module.model.load_state_dict(self.of_step[version])
                with torch.no_grad():
                    logp = pl_module.score(pl_module.policy, prompts, completions, batch.features)
                drawn = versions == version
                self.differences.append(float((engine - logp)[drawn].abs().max()))


def asynchronous(engine, **options):
    options = {"max_staleness": 2, "sampling": SAMPLING, "max_mean_mismatch": 10.0, "max_mismatch": 1e-4, **options}
    return callback(engine, **options)


def test_every_token_has_the_log_probability_of_the_weights_that_drew_it(tmp_path):
    engine = SlowEngine(seconds=0.02, tail=1.0)
    weights = Weights()
    rollouts = asynchronous(engine)
    data = data_module(tmp_path, count=64)
    policy = PolicyModule(data.renderer.family, None, OptimizerSettings(lr=1e-2), mini_batches_per_rollout=2)
    seen = train(tmp_path, rollouts, steps=6, policy=policy, data=data, callbacks=None) if False else None
    from tests.callbacks.test_rollout import trainer_of
    trainer_of(rollouts, weights, steps=6).fit(policy, datamodule=data)
    print(weights.differences, weights.ages, engine.synced, engine.asked)
    assert max(weights.differences) < 1e-5
    assert max(weights.ages) <= 2
    assert set(weights.ages) >= {0, 1}
