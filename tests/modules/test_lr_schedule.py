"""Learning-rate schedules are those of transformers, to the last bit, and resume each other's checkpoints."""

import subprocess
import sys

import pytest
import torch
from transformers import get_scheduler

from longrl.modules.lr_schedule import lr_scheduler

NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


def rates(scheduler, steps):
    found = []
    for _ in range(steps):
        found += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 7), (1, 1), (9, 7), (0, 1)])
def test_rates_are_those_of_transformers_also_behind_the_end(schedule, warmup, total):
    ours = lr_scheduler(schedule, optimizer(), warmup, total)
    theirs = get_scheduler(NAMES[schedule], optimizer(), warmup, total)
    assert rates(ours, 12) == rates(theirs, 12)


@pytest.mark.parametrize("schedule", NAMES)
def test_a_checkpoint_with_transformers_scheduler_goes_on(schedule):
    theirs = get_scheduler(NAMES[schedule], optimizer(), 2, 9)
    rates(theirs, 4)
    ours = lr_scheduler(schedule, optimizer(), 2, 9)
    ours.load_state_dict(theirs.state_dict())
    assert ours.last_epoch == 4
    assert rates(ours, 3)[1:] == rates(theirs, 3)[1:]


def test_a_run_imports_no_compiler():
    code = (
        "import sys, torch; from longrl.modules.optimizer import OptimizerSettings;"
        "OptimizerSettings(schedule='cosine').build(torch.nn.Linear(1, 1), 5);"
        "print(*{'bitsandbytes', 'peft', 'torch._inductor.compile_fx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
