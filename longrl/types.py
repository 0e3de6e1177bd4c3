"""All that crosses a file border: rows, prompts, media, completions, groups and packed micro-batches.

Letters used for shapes: P prompts per data-parallel rank, G completions of a prompt, T prompt tokens, S completion
tokens, L packed tokens, R scored rows (sampled tokens) of a micro-batch, A position axes (3 for M-RoPE, else 1),
N media tokens, D hidden size, M layers with a mixture of E experts, of which each token uses k.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, cast, runtime_checkable

from typing_extensions import TypeVar

from longrl.turns import ToolCall, Turn

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MediaKind = Literal["image", "video", "audio"]
FinishReason = Literal["stop", "length"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class TemporalPatchSize:
    """Frames of a temporal patch where they follow from the length of the video.

    Example:
        `TemporalPatchSize(4, (256, 512)).of(300)` is 8.
    """

    fewest: int = 1
    doubled_beyond: tuple[int, ...] = ()
    """Lengths in frames; a video longer than one of them has twice as many frames in a patch."""

    def of(self, num_frames: int) -> int:
        """Frames of a temporal patch of a video of so many."""
        return self.fewest << sum(num_frames > limit for limit in self.doubled_beyond)


@dataclass(frozen=True)
class FrameShard:
    """The part of every media item that one rank of `size` decodes and encodes.

    Example:
        `FrameShard(1, 2).temporal_patches(5)` is `range(2, 5)`.
    """

    rank: int = 0
    size: int = 1

    def temporal_patches(self, num_patches: int) -> range:
        """The shard's temporal patches of a media item; the only one of an image is the last rank's."""
        return range(num_patches * self.rank // self.size, num_patches * (self.rank + 1) // self.size)

    def frames(self, num_frames: int, temporal_patch_size: int | TemporalPatchSize) -> range:
        """The frames of the shard's `temporal_patches`; the last patch may lack some."""
        size = temporal_patch_size if isinstance(temporal_patch_size, int) else temporal_patch_size.of(num_frames)
        patches = self.temporal_patches(-(-num_frames // size))
        return range(min(patches.start * size, num_frames), min(patches.stop * size, num_frames))


FULL_SHARD = FrameShard()  # one rank has all


@dataclass(frozen=True)
class Row:
    """One record of a dataset, in one spelling whatever its source.

    Example:
        `Row("7", "What comes next? A. ...", "B", category="temporal", videos=("clips/7.mp4",), reasoning="First ...")`
    """

    id: str
    problem: str
    """The question with its options, as the model reads it."""
    answer: str
    """The ground truth without tags: a letter, a number, or text."""
    task: str = "multiple_choice"
    """The kind of answer: `multiple_choice`, `math`, `numeric`, `regression`, `mra`, `exact`, `ocr`, `free_form`,
    `temporal_iou`, `box_iou` or `open_ended`."""
    category: str = "general"
    """Reported on its own in evaluation, e.g. `temporal` or `plot and narrative`."""
    videos: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    """Sounds of their own; a video's own track belongs to the video."""
    reasoning: str | None = None
    """Chain of thought for SFT; None for rows that only serve RL."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Mapping[str, Any], ...] = ()
    """A conversation but for its last answer, shown instead of `problem`: `role` and `content`, a list of parts
    `{"type": "text", "text": ..}` and, where media stand, `{"type": "video"}` and the like."""
    response: str | None = None
    """That answer, or of a question an answer to the letter: the SFT target, or the better one of a pair."""
    rejected: str | None = None
    """The other answer of a pair."""
    trace: tuple[Mapping[str, Any], ...] = ()
    """The SFT target in its place: turns of the assistant (`content` is text, `tool_calls` may follow), and tools'
    answers between them, whose media are parts of videos; see `datamodules/rows/traces.py`."""
    draw: Mapping[str, Any] | None = None
    """What a curriculum noted when it drew the row (`datamodules/loading/row_marks.py`); no data set has it."""


class UnusableSample(ValueError):
    """Why a sample cannot be used: a file that is missing or broken, a prompt that is too long.

    Whoever finds out raises it; a loader hands it on instead of the sample, and `SkipLog` lists it.

    Args:
        path: the file at fault; None where no file is.
        reason: what is wrong, for people.
        index: of the row among its split's; records that gave no row count from -1 down.
        row_id: the row's name.
    """

    def __init__(self, path: str | os.PathLike[str] | None, reason: str, index: int = -1, row_id: str = "") -> None:
        self.path = None if path is None else str(path)
        self.reason = reason
        self.index = index
        self.row_id = row_id
        super().__init__(self.path, reason, index, row_id)

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{self.path}: {self.reason}"

    @classmethod
    def because(cls, error: Exception, what: str, path: str | os.PathLike[str] | None = None) -> UnusableSample:
        """The sample that an error makes unusable; `what` cannot be done with it."""
        first_line = next(iter(str(error).splitlines()), "no message")
        return cls(path, f"{what} ({type(error).__name__}: {first_line[:300]})")

    def of_row(self, index: int, row_id: str) -> UnusableSample:
        """The same of a row."""
        return UnusableSample(self.path, self.reason, index, row_id)


@runtime_checkable
class DecodesOnDevice(Protocol):
    """A `Frames.source` that can be asked to decode where the frames are encoded."""

    def decoded_on(self, device: torch.device) -> Iterator[Frames]:
        """The pixels, part by part, on that device if they were to be decoded there."""


@dataclass(frozen=True)
class Frames:
    """Decoded pixels of one image (one frame) or video, before the family's own resizing and patching."""

    kind: MediaKind
    pixels: Tensor
    """[F, 3, H, W] uint8 RGB; of a rank that has a shard of a video, its part of the F frames, or [0, 3, H, W]."""
    timestamps: tuple[float, ...]
    """Presentation time of each frame in seconds, from the container; (0.0,) for an image."""
    key: str
    """Hash of the file's content and of everything that decided which pixels these are (frame indices, size)."""
    duration_s: float = 0.0
    indices: tuple[int, ...] = ()
    """Index of each of the F frames in the file; () where nobody counted."""
    missing_s: float = 0.0
    """Seconds of the video that its file lacks at the end, where what is there is shown (`VideoSampling.torn`)."""
    resized: bool = False
    """True if the pixels have the size in which the encoder reads them; `CausalFamily.resize` makes it so."""
    source: Callable[[], Iterator[Frames]] | None = None
    """Gives the pixels, part by part, where they were left out: the video is large, or its features are on disk."""


@dataclass(frozen=True)
class AudioClip:
    """Decoded sound, before the family's own spectrogram."""

    waveform: Tensor
    """[S] float32 between -1 and 1, one channel; [0] where it was left out, for its features are on disk."""
    num_samples: int
    """S of the full sound."""
    key: str
    """Hash of the file's content and of everything that decided which samples these are."""
    is_video_track: bool = False
    """The track of the video before it, not a media item that the prompt places."""
    shard: FrameShard = FULL_SHARD
    """Which part of its features this rank encodes."""
    source: Callable[[], Iterator[AudioClip]] | None = None
    """Gives the sound where the samples were left out, as `Frames.source` does."""
    kind: MediaKind = "audio"


@dataclass(frozen=True)
class Media:
    """One image, video or sound as its encoder reads it."""

    kind: MediaKind
    patches: Tensor
    """[number of patches, values of a patch] in float32 or the encoder's precision, or uint8 where the encoder scales
    pixels; of a rank that has a shard of a video, those of its temporal patches. Of a sound, its spectrogram:
    [frames, mel bins]."""
    grid_thw: tuple[int, int, int]
    """Patches of all of it along time, height and width; of a sound (windows, frames of the spectrogram, 1)."""
    seconds_per_temporal_patch: float
    """Seconds between two temporal patches; 0.0 for an image."""
    timestamps: tuple[float, ...]
    """Mean time of each temporal patch in seconds; of a video whose tokens are merged, of each patch of its windows."""
    key: str
    """Media items with equal keys have equal patches: the feature cache encodes them once."""
    source: Callable[[], Iterator[Frames | AudioClip]] | None = None
    """Gives the frames, part by part, or the sound, where `patches` were left out; see `Frames.source`."""
    is_video_track: bool = False
    """A sound that is the track of the video before it: its placeholders stand among the video's."""
    sound_tokens: int | None = None
    """Tokens of a video's track that stand among its own; None without a track."""
    temporal_patch_size: int = 1
    """Frames of a video behind one temporal patch."""
    cell_order: tuple[int, ...] = ()
    """Of a video whose temporal patches are shown in another order: which of them stands at each place; its features
    are those of `key_in_order`, rearranged (longrl/models/cell_order.py). () is in order."""
    key_in_order: str = ""
    """The key of the same video in order, where `cell_order` says another one."""
    is_whole: bool = False
    """True if patches and source are all of it whatever the rank, as of what an environment showed: then one rank of a
    sequence-parallel group encodes it, not each its shard."""

    def with_patches_in(self, dtype: torch.dtype) -> Media:
        """The same, scaled pixels rounded to a precision; of bytes nothing changes."""
        return replace(self, patches=self.patches.to(dtype)) if self.patches.is_floating_point() else self

    def part(self, num_patches: int) -> Media:
        """The temporal patches that are here, as a media item of its own."""
        return replace(self, grid_thw=(num_patches, *self.grid_thw[1:]))


class ReadingTime(NamedTuple):
    """Seconds that reading and decoding a prompt's media took in a loader's worker."""

    spent_s: float
    """In this run: nothing for media that the worker still held, or whose features are stored."""
    alone_s: float | None
    """Of the prompt by itself; None where a medium was not decoded here."""


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt: token ids with media placeholders expanded, and the media they stand for."""

    id: str
    input_ids: Tensor
    """[T] int64."""
    position_ids: Tensor
    """[A, T] int64, or float32 of a model that counts in fractions. A completion continues at `position_ids.max() + 1`
    on every axis."""
    media: tuple[Media, ...]
    """In the order of their placeholders."""
    row: Row
    response: Continuation | None = None
    """The SFT target, end token included, or the chosen answer of a pair; None for RL."""
    rejected: Continuation | None = None
    """The other answer of a pair, where preferences are learned."""
    teacher: Prompt | None = None
    """What a teacher reads in this prompt's place, where it sees other things than the policy does; the same row's."""
    frame_indices: tuple[tuple[int, ...], ...] = ()
    """Indices of the frames in the file, of each video or image in the order of the media."""
    frame_times: tuple[tuple[float, ...], ...] = ()
    """The same frames' times in seconds."""
    torn_videos: tuple[str, ...] = ()
    """Files that were cut off, and of which what is there is shown."""
    video_s: tuple[float, ...] = ()
    """Seconds of each video, in the order of the media."""
    reading: ReadingTime | None = field(default=None, compare=False, repr=False)
    """What its media took to decode: measured, so it decides nothing."""

    def pin_memory(self) -> Prompt:
        """The same with patches in pinned memory, from where a copy to a GPU is not waited for."""
        pinned = replace(self, media=_pinned(self.media))
        if self.teacher is not None:
            pinned = replace(pinned, teacher=self.teacher.pin_memory())
        for name in ("response", "rejected"):
            target = getattr(self, name)
            if target is not None:
                pinned = replace(pinned, **{name: replace(target, media=_pinned(target.media))})
        return pinned

    @property
    def targets(self) -> tuple[Continuation, ...]:
        """The answers that the data brings: none in RL, one in SFT, of a pair two."""
        return tuple(answer for answer in (self.response, self.rejected) if answer is not None)


def _pinned(media: tuple[Media, ...]) -> tuple[Media, ...]:
    return tuple(replace(item, patches=item.patches.pin_memory()) for item in media)


@dataclass(frozen=True)
class TextPrompt:
    """A prompt for pictures or videos: the `problem` of its row."""

    row: Row

    @property
    def id(self) -> str:
        """The row's."""
        return self.row.id


@dataclass(frozen=True)
class Continuation:
    """The tokens behind a prompt: those that are scored, and between them those that the policy is shown."""

    token_ids: Tensor
    """[S] int64, the end token included when it was produced."""
    sampled: Tensor | None = field(default=None, kw_only=True)
    """[S] bool, False where a token was shown (an environment's observation) and is read alone; None is True
    everywhere."""
    position_ids: Tensor | None = field(default=None, kw_only=True)
    """[A, S] positions counted from `prompt.position_ids.max() + 1`; None is one token after the other."""
    media: tuple[Media, ...] = field(default=(), kw_only=True)
    """Of the tokens that were shown, in the order of their placeholders."""

    @property
    def num_sampled(self) -> int:
        """Tokens that are scored: those that count as the completion's length."""
        return len(self.token_ids) if self.sampled is None else int(self.sampled.sum())


@dataclass(frozen=True)
class Observed:
    """Tokens that a completion is shown behind a turn, as the chat template writes a tool's answers."""

    input_ids: Tensor
    """[T] int64, from behind the last sampled token up to where the next turn begins."""
    position_ids: Tensor
    """[A, T] positions counted from 0; they go on where the turn ended."""
    media: tuple[Media, ...] = ()
    """In the order of their placeholders."""
    text: str = ""
    """As `Turn.text` has it."""
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Completion(Continuation):
    """One sampled answer, n tokens of which the policy has sampled."""

    logprobs: Tensor
    """[n] float32 log-probability of each sampled token under the distribution it was drawn from."""
    text: str
    """What rewards read: the last turn, without end token, behind the `<think>` with which the prompt ends, if it
    does."""
    finish_reason: FinishReason
    turns: tuple[Turn, ...] = field(default=(), kw_only=True)
    """All turns, the policy's and the environment's; () without an environment."""
    experts: Tensor | None = None
    """[S - 1, M, k] int16: the experts that the engine chose for each token, but for the last, which it never read;
    -1 where it does not say. None without `rollout.router_replay`."""
    prompt_experts: Tensor | None = None
    """[T, M, k] int16: those of the prompt, which one completion of a group carries for all."""
    versions: Tensor | None = field(default=None, kw_only=True)
    """[n] int64: of each sampled token the optimizer step whose weights drew it, where weights may have changed between
    two of them; None where the group says all (`Group.carried_over`)."""


class PromptOfRow(Protocol):
    """The common part of all kinds of prompts."""

    @property
    def id(self) -> str:
        """The id of the prompt's row."""

    @property
    def row(self) -> Row:
        """The record: what is asked for, and what rewards check answers by."""


NOT_SCORED = cast("Tensor", None)
"""The rewards of a group before it is scored: None, which only those ask about who may get such a group."""
PromptT = TypeVar("PromptT", bound=PromptOfRow, default=Prompt)
SampleT = TypeVar("SampleT", default=Completion)
"""A sample: completions of text, or the trajectories of a diffusion model (longrl/diffusion/sampler.py)."""


@dataclass
class Group(Generic[PromptT, SampleT]):
    """The G samples of one prompt and what the rewards said of them: `Group` alone is one of text completions."""

    prompt: PromptT
    completions: list[SampleT]
    rewards: Tensor = NOT_SCORED
    """[G] float32 weighted sum of the parts."""
    reward_parts: dict[str, Tensor] = field(default_factory=dict)
    """name -> [G] float32, unweighted, NaN where a part does not apply. `accuracy` is what dynamic sampling looks at,
    when present."""
    valid: Tensor = NOT_SCORED
    """[G] bool; False masks a completion out of everything (its reward raised, or it was cut off and is filtered)."""
    baseline: float | None = None
    """Reward of a greedy completion, for ReMax."""
    shuffled_accuracy: Tensor | None = None
    """Accuracy of the completions that were sampled beside with shuffled frames and could be judged, for
    `rollout.frame_order`; [0] where none could, None where there were none."""
    carried_over: bool = False
    """Sampled by the weights of an earlier step, so its old log-probabilities are the sampler's."""
    in_loss: Tensor | None = None
    """[G] bool, of valid ones those in the loss: others count in their group's mean alone. None is all of them."""
    part_weights: dict[str, float] | None = None
    """name -> weight of a part in `rewards`; None where nobody says them."""


@dataclass
class Batch:
    """The input of a LightningModule's step. The rollout callback fills `features` and `groups`."""

    prompts: list[Prompt]
    features: dict[str, Tensor] = field(default_factory=dict)
    """media key -> [N, D] features."""
    groups: list[Group] | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Lightning's device transfer. Pixels stay where they are: the encoder fetches each distinct one once."""
        return self


@dataclass(frozen=True)
class GroupSpan:
    """Where one group lies in a packed sequence: `[prompt][y1]..[yG]` from `start` on."""

    start: int
    prompt_tokens: int
    completion_tokens: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the group's last token."""
        return self.start + self.prompt_tokens + sum(self.completion_tokens)


@dataclass(frozen=True)
class Packed:
    """A micro-batch: several groups in one sequence, each prompt once.

    Completions are numbered over the whole optimizer step, and so are their tokens, so that per-token tensors of a
    rollout (old log-probs, weights, advantages) are picked by `token_index` whatever the split into micro-batches.
    """

    input_ids: Tensor
    """[L]"""
    position_ids: Tensor
    """[A, L]"""
    spans: tuple[GroupSpan, ...]
    predict_from: Tensor
    """[R] position whose hidden state predicts the row's target; a prompt's last position occurs G times."""
    target_ids: Tensor
    """[R]"""
    completion_index: Tensor
    """[R] number of the completion a row belongs to, over the whole step. Tokens that were shown are no rows."""
    token_index: Tensor
    """[R] number of the row's token, over the whole step."""
    media_keys: tuple[str, ...]
    """In the order of their placeholders."""
    media_kinds: tuple[MediaKind, ...] = ()
    host_ids: Tensor | None = None
    """[L] `input_ids` of what has left the host, which need not wait for a device to read them."""
    host_predict_from: Tensor | None = None
    """[R] `predict_from` likewise."""
    shown: Tensor | None = None
    """[L] bool on the host, True where a completion was shown something, so that placeholders stand for media; None is
    nowhere."""
    experts: Tensor | None = None
    """[L, M, k] int16: experts to be used in place of the router's choice, -1 where that stands; None is everywhere."""

    def to(self, device: torch.device, multiple: int = 1) -> Packed:
        """The same micro-batch on `device`, with rows behind the last group that nothing attends to.

        Args:
            device: of all tensors.
            multiple: L becomes a multiple of it.
        """
        from torch.nn.functional import pad

        names = ("input_ids", "position_ids", "predict_from", "target_ids", "completion_index", "token_index")
        tensors: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        tensors["host_ids"] = self.input_ids if self.host_ids is None else self.host_ids
        tensors["host_predict_from"] = self.predict_from if self.host_predict_from is None else self.host_predict_from
        missing = -len(self.input_ids) % multiple
        if missing:
            for name in ("input_ids", "position_ids", "host_ids"):
                tensors[name] = pad(tensors[name], (0, missing))
        if self.shown is not None:
            tensors["shown"] = pad(self.shown, (0, missing))
        if self.experts is not None:
            experts = to_device(self.experts, device)
            tensors["experts"] = pad(experts, (0, 0, 0, 0, 0, missing), value=-1)
        return replace(self, **tensors)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for what is queued there.

    It is pinned for that: a copy from other memory of the host may wait.

    Args:
        tensor: of any shape.
        device: where to; one that is there already is returned.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class ExpertLoad(NamedTuple):
    """What the routers of a mixture of experts chose for this rank's rows of a micro-batch; sums over rows."""

    tokens: Tensor
    """[M, E] float64: tokens that each expert got."""
    replayed: Tensor
    """[] float64: choices, of a token in a layer, that were the engine's."""
    differing: Tensor
    """[] float64: those of them that the trainer's router would not have made."""


class RowDistributions(NamedTuple):
    """Of each scored row the distribution of its token, as hidden states or as the likeliest tokens."""

    hidden: Tensor | None = None
    """[rows, D] last hidden states."""
    top_ids: Tensor | None = None
    """[rows, k] int64."""
    top_logp: Tensor | None = None
    """[rows, k] float32."""


class PolicyOutput(NamedTuple):
    """A policy's scores of the rows, [R] float32 each; in a tuple FSDP finds the tensors whose backward it awaits."""

    logp: Tensor
    entropy: Tensor  # without gradient, unless the forward pass was asked for it
    load: ExpertLoad | None = None
    """None of a model without experts."""
    divergence: Tensor | None = None
    """[R] distance to a teacher's distribution, with gradient; None unless the pass was given one."""
    distributions: RowDistributions | None = None
    """Of the rows that this rank scores (`SequenceParallel.share`); None unless the pass was asked for them."""


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Example:
        `SamplingParams(num_generations=8, max_completion_tokens=64, temperature=1.0)`; temperature 0 is greedy.
    """

    num_generations: int = 8
    """Completions of each prompt: the group within which RL compares them. At least 2 where advantages are relative."""
    max_completion_tokens: int = 1024
    """Tokens after which a completion is cut off; over all turns where an environment answers."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token. 1.0 is usual in RL: below it the policy explores less."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities sum to this; 1.0 draws from all, as is usual in RL."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 draws from all, as is usual in RL."""

    def __post_init__(self) -> None:
        if self.num_generations < 1 or self.max_completion_tokens < 1:
            raise ValueError(
                "num_generations and max_completion_tokens must be at least 1, "
                f"got {self.num_generations} and {self.max_completion_tokens}"
            )
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "temperature must be >= 0, top_p in (0, 1] and top_k >= 0, "
                f"got {self.temperature}, {self.top_p} and {self.top_k}"
            )


Features = Mapping[str, "Tensor"]
"""media key -> [N, D] features of a media item."""
Metrics = dict[str, float]
"""name -> value, as loggers take them."""
