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
        # PyTorch has no uint32 tensors that every operation knows.
        words = torch.from_numpy(keys.astype(np.int64))  # [624]
        cuda_state = None
        if torch.cuda.is_available():
            cuda_state = torch.cuda.get_rng_state()
        return {
            # Plain values and tensors: `torch.load(weights_only=True)` reads nothing else.
            "python": [version, list(internal), gauss],
            "numpy": [name, words, *position],
            "torch": torch.get_rng_state(),
            "cuda": cuda_state,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here and not when the state is loaded: building loaders and models draws numbers in between.
        state = self._restored
        if state is None:
            return
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, words, *position = state["numpy"]
        keys = words.numpy().astype(np.uint32)
        np.random.set_state((name, keys, *position))
        torch.set_rng_state(state["torch"])
        cuda_state = state["cuda"]
        if cuda_state is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(cuda_state)
        self._restored = None
