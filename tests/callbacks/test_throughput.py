"""Phase times: what belongs to a step and what does not."""

from types import SimpleNamespace

import pytest

from longrl.callbacks import throughput
from longrl.callbacks.throughput import Throughput
from longrl.modules.policy import PolicyModule
from longrl.types import Batch
from tests.tiny import text_family


def test_the_seconds_of_a_validation_belong_to_no_step(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr("longrl.modules.trained.time", clock)
    logged = {}
    module = PolicyModule(text_family())
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.update({name: value}))

    def spend(phase, seconds):
        with module.phases(phase):
            now[0] += seconds

    def step(callback):
        now[0] += 0.25  # waits for its batch
        callback.on_train_batch_start(None, module, Batch([]), 0)
        spend("generate", 2.0)
        callback.on_train_batch_end(None, module, None, Batch([]), 0)

    callback = Throughput()
    callback.on_train_epoch_start(None, module)
    step(callback)
    spend("generate", 100.0)
    spend("reward", 50.0)
    now[0] += 7.0
    callback.on_validation_end(None, module)
    logged.clear()
    step(callback)
    assert {name: value for name, value in logged.items() if name.startswith("time/")} == {
        "time/generate": pytest.approx(2.0),
        "time/data": pytest.approx(0.25),
    }
