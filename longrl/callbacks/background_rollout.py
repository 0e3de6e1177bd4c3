"""A rollout beside the update: an engine in another process generates while the trainer computes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future

from torch import Tensor

from longrl.engines.generation_shards import GeneratedShards, RolloutRequest, generate_shards
from longrl.engines.rollout_engine import RolloutEngine
from longrl.modules.policy import PolicyModule


class BackgroundRollout:
    """One call of `generate_shards` in a thread.

    Args:
        engine: generates.
        module: the trainer, whose weights the engine has been handed.
        request: see `generate_shards`.
        features: see `generate_shards`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        module: PolicyModule,
        request: RolloutRequest,
        features: Mapping[str, Tensor],
    ) -> None:
        self.engine = engine
        self.module = module
        self.request = request
        self.features = features
        self.generated: Future[list[GeneratedShards]] = Future()
        # A daemon does not keep a process alive which ends for another reason.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        module = self.module
        try:
            generated = generate_shards(
                self.engine,
                module.engine_family,
                module.model,
                self.request,
                self.features,
                module.parallel.sp_group,
            )
            self.generated.set_result(generated)
        except BaseException as error:
            self.generated.set_exception(error)
