"""Checks the families of my_family.py against plain transformers, on tiny models with random weights.

    python examples/new_family/check.py

writes the tiny models to runs/examples, and compares logits, gradients, features, generation, export and two ranks that
share a sequence. Then a run trains one (family.yaml):

    python -m longrl synthetic --out runs/examples/videos --num_train_videos 64 --num_eval_videos 0 --fps 2
    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --config examples/new_family/family.yaml --rollout.reward examples/custom_reward.yaml \
        --run_dir runs/examples/new_family
"""

import argparse
from pathlib import Path

from my_family import MistralFamily, SquareInternVLFamily
from tiny_models import media_inputs, tiny_internvl, tiny_mistral

from longrl.testing import check_family


def main(folder="runs/examples", num_ranks=2):
    mistral = tiny_mistral(Path(folder, "tiny_mistral"))
    internvl = tiny_internvl(Path(folder, "tiny_internvl"))
    reports = [
        check_family(MistralFamily(str(mistral), random_init=True), num_ranks=num_ranks),
        check_family(
            SquareInternVLFamily(str(internvl), random_init=True), media_inputs=media_inputs, num_ranks=num_ranks
        ),
    ]
    for report in reports:
        print(report)
    return reports


if __name__ == "__main__":  # ranks are processes, which import this file
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2, help="1 leaves sequence parallelism out")
    main(num_ranks=parser.parse_args().ranks)
