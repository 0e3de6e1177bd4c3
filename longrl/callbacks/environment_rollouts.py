"""`rollout.environment` in a run: its checks, who answers, and the features of what completions were shown.

Without an environment nothing of it happens, so the rollout callback need not ask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import Tensor

from longrl.engines.rollout_engine import RolloutEngine, check_environment
from longrl.environments.runner import EnvironmentRunner
from longrl.environments.settings import EnvironmentSettings, with_observed
from longrl.features.cache import distinct_media
from longrl.features.rollout_features import RolloutFeatures, shared_features
from longrl.modules.policy import PolicyModule
from longrl.modules.trained import data_module_of
from longrl.types import Group, Media, SamplingParams

logger = logging.getLogger(__name__)


class EnvironmentRollouts:
    """What a rollout callback does for its environment.

    Args:
        settings: which environment, and its limits; None: completions have one turn.
    """

    def __init__(self, settings: EnvironmentSettings | None) -> None:
        self.settings = settings
        self.runner: EnvironmentRunner | None = None
        """Known from `setup` on."""
        self._shown: dict[str, Tensor] = {}
        """Features of what completions of the next step were shown, for the cache may let go of them before it."""
        self._num_encoded = 0
        """Media items that environments of this rank had encoded since the last step."""

    # -- before a run --------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, module: PolicyModule, engine: RolloutEngine) -> None:
        """Refuses what cannot be, and has prompts name the tools, before a loader renders any."""
        if self.settings is None:
            return
        check_environment(engine)
        if data_module_of(trainer).renderer.shuffle_frames:
            raise ValueError(
                "data.shuffle_frames=true shuffles prompts alone, and the tools of rollout.environment would show "
                "parts of videos in order; set rollout.environment to null, or data.shuffle_frames to false"
            )
        if module.family.router_replay and not engine.replays_turns:
            raise ValueError(
                "rollout.router_replay=true knows the experts of completions of one turn with "
                f"{type(engine).__name__}, got rollout.environment beside it; set rollout.router_replay to false, or "
                "use longrl.engines.hf.HFEngine"
            )
        self.close()
        self.runner = EnvironmentRunner(self.settings, module.family)
        data = data_module_of(trainer)
        tools = self.runner.tools
        for family in (module.family, module.engine_family, *data.renderer.families):
            family.tools = tools
        for dataset in data.datasets.values():
            data.renderer.try_options(dataset.rows)  # again, for only now does the template write of tools
        names = ", ".join(str(tool.get("function", tool).get("name")) for tool in tools)
        logger.info("completions of up to %d turns, with the tools: %s", self.settings.max_turns, names or "none")

    def check_encoder(self, module: PolicyModule, max_staleness: int) -> None:
        """Raises ValueError if what completions are shown cannot be encoded beside the engine; asks the weights."""
        if self.settings is None or not module.vision_encoder_trains:
            return
        problem = ""
        if max_staleness:
            problem = f"rollout.max_staleness={max_staleness} lets the update change its weights meanwhile"
        elif module.parallel.world.size > 1:
            problem = f"its weights are shared among {module.parallel.world.size} ranks, which are shown other things"
        if problem:
            raise ValueError(
                "with rollout.environment what completions are shown is encoded while others are sampled, but the "
                f"encoder trains, and {problem}; set model.family.init_args.freeze_vision_encoder to true"
            )

    def lengths(self, sampling: SamplingParams) -> SamplingParams:
        """The same with as many tokens as a completion may have with all that it is shown, for limits of lengths."""
        return with_observed(sampling, self.settings)

    def close(self) -> None:
        """Ends what environments run in."""
        if self.runner is not None:
            self.runner.close()
            self.runner = None

    # -- features of what completions were shown -----------------------------------------------------------------

    def share(self, module: PolicyModule, groups: Sequence[Group], features: RolloutFeatures) -> None:
        """Has all ranks of the sequence-parallel group know the features of what completions were shown.

        Args:
            module: whose cache gets them.
            groups: all of a rollout, on every rank of the group, which all must call it.
            features: of the rollout on this rank.
        """
        if self.settings is None:
            return
        # Caches of the ranks are alike: what is in one needs not be sent.
        cache = module.features
        local = {key: rows for key, rows in features.shown.items() if cache.find(key) is None}
        sent = shared_features(local, module.device, module.parallel)
        for item in shown_media(groups):
            rows = sent.get(item.key, cache.find(item.key))
            if rows is not None:
                self._shown[item.key] = rows
        cache.add(sent)
        self._num_encoded += features.num_encoded

    def restore(self, module: PolicyModule, groups: Sequence[Group]) -> None:
        """Puts what the cache has let go of since `share` back, for the step on these groups."""
        keys = [item.key for item in shown_media(groups)]
        module.features.add({key: self._shown[key] for key in keys if key in self._shown})
        self._shown = {}

    def take_num_encoded(self) -> int:
        """Media items that environments of this rank had encoded since the last call."""
        count = self._num_encoded
        self._num_encoded = 0
        return count


def shown_media(groups: Sequence[Group]) -> list[Media]:
    """The distinct media that completions were shown."""
    return distinct_media(completion for group in groups for completion in group.completions)
