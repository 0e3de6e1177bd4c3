"""SLURM's signal reaches longrl's own handling: Lightning's would save wherever each rank is."""

import signal

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from longrl.commands.ranks import cluster_plugins


@pytest.fixture
def job(monkeypatch):
    """The environment of a SLURM job of one task."""
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    numbers = {"NTASKS": "1", "JOB_ID": "7", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**numbers, "JOB_NAME": "longrl"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.fixture
def handlers():
    """Restores the handlers of signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("job")
def test_lightning_takes_no_signal_of_slurm(handlers, tmp_path):
    plugins = cluster_plugins([])
    options = {"devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", plugins=plugins, default_root_dir=tmp_path, **options)
    trainer._signal_connector.register_signal_handlers()
    assert isinstance(plugins[0], SLURMEnvironment)
    assert signal.getsignal(signal.SIGUSR1) == handlers[signal.SIGUSR1]


@pytest.mark.usefixtures("job")
def test_a_cluster_of_the_users_own_and_torchrun_are_left_alone(monkeypatch):
    assert cluster_plugins([LightningEnvironment()]) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert cluster_plugins([]) == []
