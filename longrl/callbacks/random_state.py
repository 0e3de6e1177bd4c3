"""Random states in checkpoints, so that a resumed run draws what the uninterrupted one would have drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class RandomState(Callback):
    """Saves the states of Python's, NumPy's and PyTorch's generators; sets them again when training goes on."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    @override
    def state_dict(self) -> dict[str, Any]:
        version, internal, gauss = random.getstate()
        name, keys, *position = np.random.get_state(legacy=True)
        assert isinstance(keys, np.ndarray)
        return {
            # Plain values and tensors: `torch.load(weights_only=True)` reads nothing else.
            "python": [version, list(internal), gauss],
            "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *position],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restored is None:
            return
        version, internal, gauss = self._restored["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = self._restored["numpy"]
        keys = keys.numpy().astype(np.uint32)
        np.random.set_state((name, keys, *rest))
        torch.set_rng_state(self._restored["torch"])
        # A run may go on where there is no GPU, or another number of them.
        if self._restored["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self._restored["cuda"])
        self._restored = None
