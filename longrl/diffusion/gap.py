"""Does a flow model score its samples in the update as it did when it drew them?"""

from __future__ import annotations

from typing_extensions import override

from longrl.engines.parity import GapWatch


class StepGap(GapWatch):
    """`GapWatch` of log-probabilities that are means over the numbers of a latent, far closer than those of tokens."""

    @override
    def parted(self, numbers: str) -> str:
        return (
            f"sampling and update have parted: the log-probabilities of this rollout's denoising steps differ by "
            f"{numbers}, mean above model.max_gap={self.max_gap}; this step did not change the weights. Set "
            "model.family.init_args.dtype to float32 and trainer.precision to 32-true, or raise model.max_gap if the "
            "mean stays below the clip range (model.algorithm.clip_high)"
        )
