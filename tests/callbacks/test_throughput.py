"""Phase times: what belongs to a step and what does not."""

from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks import throughput
from longrl.callbacks.throughput import Throughput, largest_by_phase
from longrl.engines.hf import HFEngine
from longrl.modules.policy import PolicyModule
from longrl.types import Batch, Completion, Group, Prompt, Row
from tests.tiny import text_family


def test_the_seconds_of_a_validation_belong_to_no_step(monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr("longrl.modules.phase_times.time", clock)
    logged = {}
    module = PolicyModule(text_family())
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.update({name: value}))
    monkeypatch.setattr(module, "log_dict", lambda values, **options: logged.update(values))

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
        "time/step": pytest.approx(2.25),
    }
    assert [name for name in logged if name.startswith("memory/")] == ["memory/generate"]


def test_a_rollout_says_how_much_of_a_step_went_to_waiting_and_to_weights(monkeypatch):
    """8 s, of which 2 s of generate and 1 s of sync; SFT has neither number."""
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(throughput, "time", clock)
    monkeypatch.setattr("longrl.modules.phase_times.time", clock)
    module = PolicyModule(text_family())
    logged = []
    monkeypatch.setattr(module, "log", lambda name, value, **options: None)
    monkeypatch.setattr(module, "log_dict", lambda values, **options: logged.append(dict(values)))
    callback = Throughput()
    for batch in (rollout(), Batch([])):
        for phase, seconds in {"generate": 2.0, "sync": 1.0, "update": 5.0}.items():
            with module.phases(phase):
                now[0] += seconds
        callback.on_train_batch_end(None, module, None, batch, 0)
    assert logged[0]["throughput/trainer_busy"] == pytest.approx(0.75)
    assert logged[0]["throughput/sync_share"] == pytest.approx(0.125)
    assert not {"throughput/trainer_busy", "throughput/sync_share"} & set(logged[1])


def test_a_phase_that_a_step_leaves_out_took_no_time(monkeypatch):
    """Lightning would log the checkpoint of the first step with every later one."""
    module = PolicyModule(text_family())
    logged = []
    monkeypatch.setattr(module, "log", lambda name, value, **options: None)
    monkeypatch.setattr(module, "log_dict", lambda values, **options: logged.append(dict(values)))
    callback = Throughput()
    for phases in (["update", "save"], ["update"]):
        for phase in phases:
            with module.phases(phase):
                pass
        callback.on_train_batch_end(None, module, None, Batch([]), 0)
    assert logged[0]["time/save"] > 0
    assert logged[1]["time/save"] == 0
    assert logged[1]["memory/save"] == 0
    assert logged[1]["memory/update"] > 0


# ---- rates ----


def rates(cost, batch, peak=None, disk=None, **counted):
    """What is logged of a step of 4 s, 2 s of them the update, on two devices that have the batch each."""
    module = SimpleNamespace(
        features=SimpleNamespace(num_requested=0, num_encoded=0, num_encoded_bytes=0, disk=disk),
        num_scoring_passes=1,
        num_synced_bytes=3 << 20,
        epochs_per_rollout=3,
        parallel=SimpleNamespace(
            dp=SimpleNamespace(sum_dict=lambda values: {name: 2 * value for name, value in values.items()}),
            world=SimpleNamespace(size=2),
        ),
    )
    vars(module.features).update(counted)
    callback = Throughput()
    callback._cost, callback._peak = cost, peak
    return callback._rates(module, batch, step_s=4.0, update_s=2.0)


def rollout():
    """One group: a prompt of 5 tokens, completions of 2 and 1."""
    completions = [Completion(torch.zeros(n), torch.zeros(n), "", "stop") for n in (2, 1)]
    prompt = Prompt("1", torch.zeros(5), torch.zeros(1, 5), (), Row("1", "", ""))
    return Batch([prompt], groups=[Group(prompt, completions)])


class Cost:
    def forward_flops(self, groups):
        assert groups == [(5, [2, 1], 0)]
        return 1e12

    def update_flops(self, groups):
        return 3e12


def test_operations_are_those_of_all_epochs_and_scoring_passes_per_device_and_second():
    """(3 epochs of 3e12 and a pass of 1e12) on each of 2 devices, in 2 s."""
    found = rates(Cost(), rollout(), peak=50e12)
    assert found["throughput/update_tflops"] == pytest.approx(5.0)
    assert found["throughput/mfu"] == pytest.approx(0.1)
    assert found["throughput/tokens_per_s"] == pytest.approx(2 * 8 / 4.0)


def test_what_is_unknown_is_not_logged():
    always = {"throughput/tokens_per_s", "throughput/media_encoded", "throughput/encoded_mib"}
    assert set(rates(None, rollout())) == always | {"throughput/sync_mib"}
    assert set(rates(None, Batch([]))) == always
    assert "throughput/mfu" not in rates(Cost(), rollout())


def test_hits_are_media_asked_for_and_not_encoded():
    found = rates(None, rollout(), num_requested=4, num_encoded=1)
    assert found["throughput/feature_hit_rate"] == pytest.approx(0.75)
    assert found["throughput/media_encoded"] == 1.0
    assert "throughput/feature_hit_rate" not in rates(None, rollout(), num_requested=4, disk=object())


def test_bytes_are_those_since_the_last_step():
    """Of weights on this rank, which is one of two with the same engine; of features on both."""
    found = rates(None, rollout(), num_encoded_bytes=2 << 20)
    assert found["throughput/sync_mib"] == 3.0
    assert found["throughput/encoded_mib"] == 4.0


@pytest.mark.parametrize(
    ("device", "name", "peak", "found", "said"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", None, 989e12, False),
        ("cuda", "NVIDIA GeForce RTX 4090", None, None, True),
        ("cuda", "NVIDIA GeForce RTX 4090", 165.0, 165e12, False),
        ("cuda", "NVIDIA H100 80GB HBM3", 500.0, 500e12, False),
        ("cpu", None, None, None, False),
        ("cpu", None, 0.5, 5e11, False),
    ],
)
def test_a_peak_that_is_given_wins_and_one_that_is_unknown_is_said(
    monkeypatch, caplog, device, name, peak, found, said
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput.TextCost, "of", lambda family, model: None)
    module = PolicyModule(text_family())
    module.model = torch.nn.Identity()
    monkeypatch.setattr(PolicyModule, "device", SimpleNamespace(type=device))
    callback = Throughput(peak)
    with caplog.at_level("INFO", logger="longrl"):
        callback.on_train_start(SimpleNamespace(is_global_zero=True), module)
    assert callback._peak == found
    assert (f"the peak of {name} is not known; set peak_tflops" in caplog.text) == said


def test_weights_are_counted_on_their_way_to_the_engine():
    engine = HFEngine()
    weights = [("a", torch.zeros(3)), ("b", torch.zeros(2, 2, dtype=torch.bfloat16))]
    assert list(engine.counted(weights)) == weights
    assert engine.num_synced_bytes == 12 + 8


def test_memory_is_that_of_the_rank_with_most():
    found = largest_by_phase([{"update": 1.0, "encode": 3.0}, {"update": 2.0}])
    assert found == {"memory/update": 2.0, "memory/encode": 3.0}
