"""launch/slurm.sbatch beside stand-ins for SLURM's commands."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRUN = """#!/usr/bin/env bash
echo "cpus ${SRUN_CPUS_PER_TASK:-one}, meet at $MASTER_ADDR"
echo "srun $*"
exit "$SRUN_STATUS"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node1; echo node2; else echo "scontrol $*"; fi
"""


def run_script(folder, status=0, **variables):
    """Runs the script as SLURM would; -> (its exit code, lines that the stand-ins wrote)."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8", "SRUN_STATUS": str(status),
    }  # fmt: skip
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SRUN_"))}
    environment = mine | slurm | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "fit", "--config", "c.yaml"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_every_rank_gets_the_cores_that_the_job_asked_for(tmp_path):
    """srun reads SRUN_CPUS_PER_TASK; what sbatch was given it no longer inherits (SLURM 22.05)."""
    _, lines = run_script(tmp_path, SLURM_CPUS_PER_TASK="12")
    assert lines[0] == "cpus 12, meet at node1"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (75, True), (1, False)])
def test_only_a_run_that_was_asked_to_stop_is_requeued(tmp_path, status, requeued):
    code, lines = run_script(tmp_path, status)
    assert code == status
    assert ("scontrol requeue 77" in lines) == requeued


def test_the_ranks_are_those_of_the_job(tmp_path):
    _, lines = run_script(tmp_path)
    assert lines[1].startswith("srun --kill-on-bad-exit=1 python -m longrl fit --config c.yaml ")
    assert "--trainer.num_nodes=2 --trainer.devices=8 --resume auto" in lines[1]
