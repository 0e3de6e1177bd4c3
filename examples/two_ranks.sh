#!/usr/bin/env bash
# Two ranks that share every sequence take the step that one rank takes, on CPUs:
#
#     bash examples/two_ranks.sh
#
# runs examples/short_run.yaml on one rank and on two (gloo, sequence_parallel_size 2), and compares loss and gradient
# norm of the first step. Each rank decodes and encodes half of a video's frames, samples half of the completions, and
# computes half of the rows of every packed sequence.
set -euo pipefail
videos=runs/examples/videos
out=runs/examples/two_ranks
rm -rf "$out" # of an earlier call: `fit` never replaces a run

python -m longrl synthetic --out "$videos" --num_train_videos 64 --num_eval_videos 0 --fps 2

python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
    --rollout.reward examples/custom_reward.yaml --run_dir "$out/one_rank"

torchrun --nproc_per_node 2 --module longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
    --rollout.reward examples/custom_reward.yaml --run_dir "$out/two_ranks" --trainer.devices 2 \
    --trainer.strategy longrl.strategies.mr_sp.MRSPStrategy --trainer.strategy.init_args.sequence_parallel_size 2

python - "$out" <<'CHECK'
import csv
import math
import sys


def first_step(run):
    with open(f"{sys.argv[1]}/{run}/logs/version_0/metrics.csv") as file:
        return next(row for row in csv.DictReader(file) if row["train/loss"])


one, two = first_step("one_rank"), first_step("two_ranks")
for name in ("train/loss", "train/grad_norm", "reward/mean"):
    print(f"{name}: {one[name]} on one rank, {two[name]} on two")
    assert math.isclose(float(one[name]), float(two[name]), rel_tol=1e-4, abs_tol=1e-6), name
CHECK
