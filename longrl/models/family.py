"""What a policy needs to be: rendered to, built, and asked to score its own rollouts.

A family is a light, picklable description of a model, chosen by class path in YAML; nothing else in longrl knows which
model it trains.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import AudioClip, Frames, Media, Packed, PolicyOutput, Prompt, Row

OWN_WEIGHTS = "<own>"
"""`ModelFamily.build`'s default: the weights that the family itself names."""


class ModelFamily(abc.ABC):
    """What a policy needs to be: rendered to, built, and asked to score its own rollouts."""

    supports_sequence_parallel: ClassVar[bool] = False
    """Whether ranks can share a sequence."""
    casts_inputs: ClassVar[bool] = True
    """Whether sharded layers cast what they are given to the precision they compute in."""
    supports_audio: ClassVar[bool] = False
    """Whether it reads sound."""
    use_audio_in_video: bool = False
    """Whether a video is shown with its sound track."""

    @abc.abstractmethod
    def build(self, weights: str | None = OWN_WEIGHTS) -> nn.Module:
        """The model on the CPU, in training precision.

        Args:
            weights: a Hugging Face folder or hub id; None for random weights; by default what the family names.
        """

    @abc.abstractmethod
    def render(
        self, row: Row, text: str, frames: Sequence[Frames | AudioClip] = (), response: str | None = None
    ) -> Prompt:
        """Turns a row into token ids and media; runs in loader workers and touches no weights."""

    @abc.abstractmethod
    def encode_media(self, model: nn.Module, media: Sequence[Media]) -> list[Tensor]:
        """Features of each medium, [N_i, D], in the order given."""

    @abc.abstractmethod
    def forward(
        self,
        model: nn.Module,
        packed: Packed,
        features: Mapping[str, Tensor],
        temperature: float = 1.0,
        sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
    ) -> PolicyOutput:
        """Scores the rows of a micro-batch."""

    @abc.abstractmethod
    def vision_encoder(self, model: nn.Module) -> nn.Module | None:
        """The media encoder, or None."""
