"""The loggers of a run, and of the same run once it goes on."""

import sys
from types import ModuleType

import pytest
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from longrl.commands import run_loggers
from longrl.commands.run_loggers import ContinuedTensorBoard, check_tensorboard, make_loggers, with_csv


def wandb_of(folder, command="fit"):
    return next(one for one in make_loggers(str(folder), command, wandb="offline") if isinstance(one, WandbLogger))


@pytest.fixture
def offline(monkeypatch):
    """What W&B keeps goes below the run's folder, and nothing is sent."""
    import wandb

    wandb.finish()  # what a command that another test called here has begun
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_run_that_goes_on_is_the_same_one_for_wandb(tmp_path, offline):
    import wandb

    ids = []
    for step in range(2):
        logger = wandb_of(tmp_path / "run")
        logger.log_metrics({"reward/mean": 0.5}, step)
        ids.append(logger.experiment.id)
        wandb.finish()
    assert ids[0] == ids[1] == (tmp_path / "run" / "wandb_id").read_text()
    kept = [path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*")]
    assert kept
    assert all(ids[0] in name for name in kept)


def test_other_runs_and_evaluations_have_ids_of_their_own(tmp_path):
    one, other = (wandb_of(tmp_path / name)._wandb_init for name in ("one", "other"))
    assert one["id"] != other["id"]
    assert one["resume"] == "allow"
    assert one["name"] == "one"
    assert wandb_of(tmp_path / "one", "test")._wandb_init["id"] is None


def test_ranks_other_than_0_leave_the_id_to_rank_0(tmp_path, monkeypatch):
    monkeypatch.setattr(run_loggers.rank_zero_only, "rank", 1)
    assert wandb_of(tmp_path / "run")._wandb_init["id"] is None
    assert not (tmp_path / "run" / "wandb_id").exists()


def test_tensorboard_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_loggers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package tensorboard.*pip install tensorboard"):
        make_loggers(str(tmp_path), "fit", tensorboard=True)


class Writer:
    """Stands for SummaryWriter."""

    made: tuple = ()

    def __init__(self, log_dir, **options):
        type(self).made += ((log_dir, options),)

    def add_scalar(self, name, value, step):
        type(self).made += ((name, value, step),)


def test_a_later_part_of_a_run_tells_tensorboard_from_where_it_repeats(tmp_path, monkeypatch):
    """The package is no dependency: what is asserted is what its writer is given."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for base in TensorBoardLogger.__mro__:
        for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
            if hasattr(sys.modules[base.__module__], name):
                monkeypatch.setattr(sys.modules[base.__module__], name, name == "_TENSORBOARD_AVAILABLE")
    monkeypatch.setattr(run_loggers, "find_spec", lambda name: object())
    for first in (0, 7):
        logger = make_loggers(str(tmp_path), "fit", tensorboard=True)[-1]
        assert isinstance(logger, ContinuedTensorBoard)
        logger.log_metrics({"loss": 0.5}, first)
        logger.log_metrics({"loss": 0.25}, first + 1)
    folder = str(tmp_path / "tensorboard") + "/"
    assert Writer.made == (
        (folder, {}),
        ("loss", 0.5, 0),
        ("loss", 0.25, 1),
        (folder, {"purge_step": 7}),
        ("loss", 0.5, 7),
        ("loss", 0.25, 8),
    )


def test_a_users_loggers_have_metrics_csv_beside_them(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    own = WandbLogger(save_dir=str(tmp_path), offline=True)
    kept, csv = with_csv(own, str(tmp_path), "fit")
    assert kept is own
    csv.log_metrics({"a": 1.0}, 3)
    assert (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines() == ["step,a", "3,1.0"]
    assert with_csv([own], str(tmp_path), "test")[1].name == "test_logs"
    lightnings = CSVLogger(str(tmp_path))
    assert with_csv([lightnings], str(tmp_path), "fit") == [lightnings]


@pytest.mark.parametrize("form", ["text", "mapping", "list"])
def test_tensorboard_of_a_config_that_is_not_installed_is_one_line(monkeypatch, form):
    monkeypatch.setattr(run_loggers, "find_spec", lambda name: None)
    path = "lightning.pytorch.loggers.TensorBoardLogger"
    given = {"text": path, "mapping": {"class_path": path}, "list": [{"class_path": path, "init_args": {}}]}[form]
    with pytest.raises(ValueError, match=r"trainer.logger: TensorBoardLogger needs .*\(the extra `tensorboard`"):
        check_tensorboard(given)
    check_tensorboard(True)
    check_tensorboard(None)
    check_tensorboard({"class_path": "lightning.pytorch.loggers.CSVLogger"})
