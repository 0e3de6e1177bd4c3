"""Options of the pipeline; `longvideo-reason/configs/` has examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from longrl.chat.endpoint import Budget, Decoding, Endpoint
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, SHARE, check_ranges

Kind = Literal["multiple_choice", "open_ended"]
CATEGORIES = ("temporal", "goal and purpose", "spatial", "plot and narrative")


@dataclass(frozen=True)
class SplitOptions:
    """Step split."""

    clip_s: float = 10.0
    """Desired length of a clip in seconds."""
    min_clip_s: float = 5.0
    """A shorter last clip joins the one before it."""
    scenes: bool = False
    """Cut at the scene change nearest to `clip_s`, if there is one between half and one and a half of it. Decodes
    everything."""
    scene_threshold: float = 12.0
    """Mean difference of grey values (0 to 255) between two frames from which a scene changes."""
    write_files: bool = False
    """Also write every clip as an mp4 file, for looking at; no later step reads them."""
    workers: int = 2
    """Videos that are read at once."""

    def __post_init__(self) -> None:
        check_ranges(self, "split.", clip_s=NOT_NEGATIVE, scene_threshold=NOT_NEGATIVE)
        if not 0 <= self.min_clip_s <= self.clip_s or self.clip_s <= 0 or self.workers < 1:
            raise ValueError(
                "split needs 0 <= min_clip_s <= clip_s, clip_s above 0 and workers of at least 1, got "
                f"min_clip_s={self.min_clip_s}, clip_s={self.clip_s} and workers={self.workers}"
            )


@dataclass(frozen=True)
class CaptionOptions:
    """Step caption."""

    frames: int = 8
    """Frames of a clip that the captioner sees."""
    max_side: int = 448
    """Longest side of a frame in pixels."""
    boxes: bool = False
    """Ask for boxes of the main objects, for spatial questions with boxes."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.2, max_tokens=512))
    """How captions are drawn."""
    attempts: int = 3
    """Times a clip is asked about, each with another seed, until the reply is usable."""

    def __post_init__(self) -> None:
        check_ranges(self, "caption.", frames=COUNT, max_side=COUNT, attempts=COUNT)


@dataclass(frozen=True)
class TimelineOptions:
    """Step timeline."""

    max_chars: int = 60_000
    """Captions of a video beyond this are condensed, neighbours together, until they fit; about 4 to a token."""
    max_missing_share: float = 0.2
    """A video with more clips without caption is left out."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.2, max_tokens=1024))
    """How condensed captions are drawn."""
    attempts: int = 3
    """Times a part is asked about, each with another seed, until the reply is usable."""

    def __post_init__(self) -> None:
        check_ranges(self, "timeline.", max_missing_share=SHARE, attempts=COUNT)
        if self.max_chars < 200:
            raise ValueError(f"timeline.max_chars must be at least 200, got {self.max_chars}")


@dataclass(frozen=True)
class QuestionOptions:
    """Step question."""

    categories: tuple[str, ...] = CATEGORIES
    """Each needs a file in the prompts folder: `question_` and its name with `_` for spaces."""
    kinds: tuple[Kind, ...] = ("multiple_choice", "open_ended")
    """Forms of questions that are asked for in every category."""
    per_video: int = 1
    """Questions of each category and kind about a video."""
    num_options: int = 4
    """Options of a multiple-choice question, 2 to 8."""
    boxes: bool = False
    """Spatial questions name a box in thousandths of width and height and the second it is seen at."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.7, max_tokens=8192))
    """How questions are drawn."""
    attempts: int = 3
    """Times a video is asked about, each with another seed, until the reply is usable."""

    def __post_init__(self) -> None:
        check_ranges(self, "question.", attempts=COUNT)
        if not 2 <= self.num_options <= 8 or self.per_video < 1 or not self.categories or not self.kinds:
            raise ValueError(
                "question needs num_options of 2 to 8, per_video of at least 1, and a category and a kind, got "
                f"{self.num_options}, {self.per_video}, {self.categories} and {self.kinds}"
            )


@dataclass(frozen=True)
class ValidateOptions:
    """Step validate."""

    max_length_ratio: float = 1.6
    """The right option may be so many times as long as the longest wrong one, and the shortest so many times as it."""
    length_slack: int = 12
    """Characters by which lengths may differ whatever their ratio."""
    max_similarity: float = 0.85
    """Two questions about one video that share more of their letter triples are duplicates."""
    max_answer_words: int = 40
    """Most words of an open-ended answer; longer ones are left out."""
    min_steps: int = 1
    """Steps of reasoning, each with times."""
    english_only: bool = False
    """Reject questions that are mostly in another script than Latin."""

    def __post_init__(self) -> None:
        zero = {"length_slack": NOT_NEGATIVE, "min_steps": NOT_NEGATIVE, "max_answer_words": NOT_NEGATIVE}
        check_ranges(self, "validate.", max_length_ratio=NOT_NEGATIVE, max_similarity=NOT_NEGATIVE, **zero)


@dataclass(frozen=True)
class RewriteOptions:
    """Step rewrite."""

    timestamps: bool = False
    """Keep the times in the reasoning that SFT learns."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.7, max_tokens=2048))
    """How rewritten reasoning is drawn."""
    attempts: int = 3
    """Times a question is asked about, each with another seed, until the reply is usable."""

    def __post_init__(self) -> None:
        check_ranges(self, "rewrite.", attempts=COUNT)


@dataclass(frozen=True)
class FilterOptions:
    """Step filter."""

    num_samples: int = 10
    """Answers of the policy to each question with its video; 0 keeps all questions, unasked."""
    blind_samples: int = 4
    """Answers without the video; 0 skips that test."""
    max_blind_share: float = 0.5
    """A question answered right without the video more often than this is dropped."""
    right_from: float = 0.5
    """Score from which an open-ended answer counts as right."""
    num_frames: int = 32
    """Frames of the video that the policy sees."""
    max_side: int = 448
    """Longest side of a frame in pixels."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=1.0, max_tokens=2048))
    """How answers are drawn; a temperature above 0, since several are compared."""
    open_ended: Literal["judge", "text_similarity"] = "judge"
    """Judge of open-ended answers."""

    def __post_init__(self) -> None:
        check_ranges(self, "filter.", max_blind_share=SHARE, right_from=SHARE, num_frames=COUNT, max_side=COUNT)
        if self.num_samples < 0 or self.num_samples == 1 or self.blind_samples < 0:
            raise ValueError(
                "filter.num_samples must be 0 or at least 2 (one answer is always all right or all wrong), and "
                f"filter.blind_samples at least 0, got {self.num_samples} and {self.blind_samples}"
            )


@dataclass(frozen=True)
class ExportOptions:
    """Step export."""

    name: str = "My-LongVideo-Reason"
    """Title of the data set's card."""
    eval_share: float = 0.05
    """Share of the videos; at least one if above 0."""
    sft_share: float = 1 / 3
    """Share of the other videos; the rest is for RL."""
    seed: int = 0
    """Decides which video goes where, and the letters of the options."""
    license: str = "other"
    """For the card; the videos' own licence decides."""

    def __post_init__(self) -> None:
        if not (0 <= self.eval_share < 1 and 0 <= self.sft_share <= 1):
            raise ValueError(
                f"export needs 0 <= eval_share < 1 and 0 <= sft_share <= 1, got {self.eval_share} and {self.sft_share}"
            )


@dataclass(frozen=True)
class TraceOptions:
    """Step trace."""

    records: str | None = None
    """Questions in the schema of LongVideo-Reason, as `data.train` reads them; by default those that `export` wrote for
    SFT."""
    media_root: str | None = None
    """Folder where their paths start; by default that of the file."""
    max_records: int | None = None
    """Ask about the first so many records only; by default about all."""
    tools: str = "longrl.environments.video_tools.VideoTools"
    """The environment, as `rollout.environment.make`."""
    tool_options: dict[str, Any] = field(default_factory=dict)
    """As `rollout.environment.options`."""
    max_turns: int = 5
    """Messages of the model; the last one must answer."""
    num_frames: int = 16
    """Frames of the video that it sees before it calls a tool."""
    max_side: int = 448
    """Longest side of a frame in pixels."""
    right_from: float = 1.0
    """Score from which an answer counts as right."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.7, max_tokens=4096))
    """How each turn of a conversation is drawn."""
    attempts: int = 3
    """Conversations about a question, until one is kept."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "trace.", max_turns=COUNT, num_frames=COUNT, max_side=COUNT, right_from=SHARE, attempts=COUNT
        )


@dataclass(frozen=True)
class PipelineConfig:
    """Videos in, data set out."""

    videos: str
    """A folder, searched through, or a text file with one path per line."""
    out: str
    """Folder of everything: responses, each step's file and report, and `dataset/`."""
    prompts: str = "longvideo-reason/prompts"
    """Folder of the prompts; copy and change it for your own videos."""
    captioner: Endpoint | None = None
    """Describes clips from their frames: step caption."""
    writer: Endpoint | None = None
    """Reads text: steps timeline, question and rewrite."""
    policy: Endpoint | None = None
    """Answers questions with frames: steps filter and trace."""
    judge: Endpoint | None = None
    """Compares open-ended answers: step filter."""
    judge_decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0, max_tokens=512))
    """How verdicts are drawn."""
    judge_attempts: int = 3
    """Times a judge is asked about an answer, until its reply has a score."""
    budget: Budget = field(default_factory=Budget)
    """Over all steps and runs in `out`."""
    max_failed_share: float = 0.1
    """Share of a step's items; beyond it the step fails, and the same command tries the failed ones again."""
    split: SplitOptions = field(default_factory=SplitOptions)
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    timeline: TimelineOptions = field(default_factory=TimelineOptions)
    question: QuestionOptions = field(default_factory=QuestionOptions)
    validate: ValidateOptions = field(default_factory=ValidateOptions)
    rewrite: RewriteOptions = field(default_factory=RewriteOptions)
    filter: FilterOptions = field(default_factory=FilterOptions)
    export: ExportOptions = field(default_factory=ExportOptions)
    trace: TraceOptions = field(default_factory=TraceOptions)

    def __post_init__(self) -> None:
        check_ranges(self, "--", judge_attempts=COUNT, max_failed_share=SHARE)

    def endpoint(self, role: Literal["captioner", "writer", "policy", "judge"]) -> Endpoint:
        """The endpoint of a role.

        Raises:
            ValueError: it is not set.
        """
        endpoint: Endpoint | None = getattr(self, role)
        if endpoint is None:
            raise ValueError(
                f"this step asks the {role}, which is not set; give --{role}.model and --{role}.url (an "
                "OpenAI-compatible server)"
            )
        return endpoint
