"""Does a diffusion model score its samples in the update as it did when it drew them?"""

from __future__ import annotations

from typing_extensions import override

from longrl.modules.mismatch import MismatchMonitor


class StepMismatchMonitor(MismatchMonitor):
    """`MismatchMonitor` of denoising steps, whose log-probabilities are means over a latent: closer than tokens'."""

    @override
    def failure_message(self, metrics: str) -> str:
        return (
            f"sampling and update have parted: the log-probabilities of this rollout's denoising steps differ by "
            f"{metrics}, mean above model.max_mismatch={self.max_mismatch}; this step did not change the weights. Set "
            "model.family.init_args.dtype to float32 and trainer.precision to 32-true, or raise model.max_mismatch if "
            "the mean stays below the clip range (model.algorithm.clip_high)"
        )
