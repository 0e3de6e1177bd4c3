"""What a teacher is shown of a training row: the policy's prompt, or one of its own that tells it more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from longrl.datamodules.loading.media_reading import HeldMedia
from longrl.datamodules.loading.render import BLANKS, RowRenderer
from longrl.datamodules.loading.row_marks import unmarked
from longrl.datamodules.loading.templates import QUESTION_NAMES, check_template
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Subtitles
from longrl.io.number_ranges import COUNT, check_ranges
from longrl.models.reading import RendersPrompts
from longrl.packing.lengths import LengthLimit
from longrl.types import Frames, Prompt, Row, UnusableSample

TOLD = (*QUESTION_NAMES, "answer", "option", "reasoning")
"""What a teacher's question may name: the policy's may not name the last three."""
HARMLESS = Row("harmless", "What is this?", "A", reasoning="It is grey.")
PROBED_SIDE = 280
"""Pixels of the frames by which two families are compared."""


@dataclass(frozen=True)
class TeacherView:
    r"""How training rows are shown to the teacher where it differs from how the policy is shown them.

    None takes what the policy is shown by. Validation and test rows have no such view.

    Example:
        `data.teacher_view: {video: {fps: 2.0, max_frames: 512}}` is twice the frames of `data.video: {fps: 1.0, ...}`;
        `question_template: "{problem}\n\nThe right answer is {answer}. Explain it."` makes a teacher of any model.
    """

    video: VideoSampling | None = None
    """Which frames, in the place of all of `data.video`."""
    question_template: str | None = None
    """Its question: `{problem}`, `{subtitles}`, and of the row `{answer}`, `{option}` (the right option's wording) and
    `{reasoning}` (nothing where it has none)."""
    subtitles: Subtitles | None = None
    """Which subtitles, in the place of all of `data.subtitles`."""
    max_prompt_tokens: int | None = None
    """Rows whose view is longer are skipped; None is `data.max_prompt_tokens`."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.teacher_view.", max_prompt_tokens=COUNT)
        template = self.question_template
        if template is None:
            return
        if "{problem}" not in template:
            raise ValueError(f"data.teacher_view.question_template must contain {{problem}}, got {template!r}")
        check_template("teacher_view.question_template", template, TOLD)

    def check_rows(self, rows: Sequence[Row], question_template: str) -> None:
        """Raises ValueError for options that the training rows make no use of.

        Args:
            rows: to train on.
            question_template: of the policy, where the view has none.
        """
        template = self.question_template or question_template
        if self.subtitles is not None and self.subtitles.source and "{subtitles}" not in template:
            raise ValueError(
                f"data.teacher_view.subtitles.source={self.subtitles.source} is shown where the teacher's question "
                f"says {{subtitles}}, got {template!r}; add it to data.teacher_view.question_template"
            )
        if self.question_template is None:
            return
        conversation = next((row for row in rows if row.messages), None)
        if conversation is not None:
            raise ValueError(
                f"data.teacher_view.question_template asks questions, but row {conversation.id!r} is a conversation, "
                "which is shown as it is; leave the template out, or such rows"
            )


class TeachesRows(Protocol):
    """A teacher as far as rows are concerned: `longrl.modules.teachers.Teacher`."""

    @property
    def family(self) -> RendersPrompts | None:
        """Of its model; None reads the policy's prompts."""

    @property
    def tasks(self) -> Sequence[str] | None:
        """Of the rows that it teaches; None is all."""


@dataclass(frozen=True)
class ShownTo:
    """How rows are shown to one teacher. A renderer that is None leaves it the policy's own prompt."""

    tasks: Sequence[str] | None
    view: RowRenderer | None
    plain: RowRenderer | None
    """Of rows that the policy is shown blind: told more, a teacher would teach it to recite."""
    has_frames: bool = False
    """The view has frames of its own, of which a curriculum of the policy's frames says nothing."""

    def of_row(self, row: Row) -> RowRenderer | None:
        """What renders a row."""
        if self.view is not None and self.view.drops_media(row):
            return self.plain
        return self.view

    def with_limits(self, limits: Sequence[LengthLimit]) -> ShownTo:
        """See `RowRenderer.with_limits`."""
        view, plain = (None if one is None else one.with_limits(limits) for one in (self.view, self.plain))
        return replace(self, view=view, plain=plain)


@dataclass(frozen=True)
class TeacherPrompts:
    """Makes what a row's teacher reads: the part of a loader's worker that renders the row a second time.

    Args:
        teachers: the first that teaches a row's task is its teacher.
    """

    teachers: Sequence[ShownTo]

    @property
    def families(self) -> list[RendersPrompts]:
        """Those that render, each once."""
        return list({id(one.family): one.family for one in self._renderers()}.values())

    @property
    def most_held_bytes(self) -> float:
        """Of the teacher whose view takes most: a row has one."""
        return max((renderer.most_held_bytes for renderer in self._renderers()), default=0.0)

    def __call__(self, row: Row, policy: Prompt) -> Prompt | None:
        """The row's second prompt, None where its teacher reads the policy's or it has no teacher.

        Args:
            row: the record.
            policy: its first prompt; for answers that the data brings there must be room behind the second one, too.

        Raises:
            UnusableSample: the teacher cannot be shown the row.
        """
        own = next((one for one in self.teachers if one.tasks is None or row.task in one.tasks), None)
        renderer = None if own is None else own.of_row(row)
        if own is None or renderer is None:
            return None
        try:
            prompt = replace(renderer(unmarked(row) if own.has_frames else row), row=row)
            renderer.check_length(replace(prompt, response=policy.response, rejected=policy.rejected))
        except UnusableSample as error:
            raise UnusableSample(error.path, f"its teacher cannot be shown it: {error.reason}") from error
        return prompt

    def try_options(self, rows: Sequence[Row]) -> None:
        """See `RowRenderer.try_options`."""
        for renderer in self._renderers():
            renderer.try_options(rows)

    def with_limits(self, limits: Sequence[LengthLimit]) -> TeacherPrompts:
        """The same within those limits that the update sets: nothing is sampled behind a teacher's prompt."""
        of_update = [limit for limit in limits if limit.of_update]
        return TeacherPrompts([one.with_limits(of_update) for one in self.teachers])

    def _renderers(self) -> list[RowRenderer]:
        return [one for shown in self.teachers for one in (shown.view, shown.plain) if one is not None]


def teacher_prompts(
    teachers: Sequence[TeachesRows], policy: RowRenderer, view: TeacherView | None, compute_dtype: str | None
) -> TeacherPrompts | None:
    """What renders teachers' prompts; None where all read the policy's.

    Args:
        teachers: of the run.
        policy: renders the policy's prompts of training rows.
        view: what teachers see instead.
        compute_dtype: of the run's forward passes; None is that of each family.
    """
    shown = []
    for teacher in teachers:
        family = policy.family if teacher.family is None else teacher.family
        is_alike = reads_alike(family, policy.family)
        plain = None if is_alike else _view_of(family, policy, TeacherView(), compute_dtype, is_alike)
        own = plain if view is None else _view_of(family, policy, view, compute_dtype, is_alike)
        shown.append(ShownTo(teacher.tasks, own, plain, view is not None and view.video is not None))
    prompts = TeacherPrompts(shown)
    return prompts if prompts.families else None


def _view_of(
    family: RendersPrompts, policy: RowRenderer, view: TeacherView, compute_dtype: str | None, is_alike: bool
) -> RowRenderer:
    """The policy's renderer as the teacher's. Where both read the same pixels, what one has decoded the other finds."""
    subtitles = policy.subtitles if view.subtitles is None else view.subtitles
    shares_pixels = is_alike and view.video in (None, policy.video)
    return replace(
        policy,
        family=family,
        video=view.video or policy.video,
        stage="rl",  # what is taught stands behind the policy's prompt, and is read behind this one
        question_template=view.question_template or policy.question_template,
        subtitles=subtitles,
        tells_answer=True,
        max_prompt_tokens=view.max_prompt_tokens or policy.max_prompt_tokens,
        prompt_option="data.teacher_view.max_prompt_tokens" if view.max_prompt_tokens else policy.prompt_option,
        patch_dtype=getattr(torch, compute_dtype or family.dtype),
        stored=None,  # the policy's features
        teacher=None,
        held=policy.held if shares_pixels else HeldMedia(),
    )


def reads_alike(one: RendersPrompts, other: RendersPrompts) -> bool:
    """Whether two families make the same prompt of every row: by their options, and by one that both are shown."""
    if one is other:
        return True
    if type(one) is not type(other) or _options(one) != _options(other):
        return False
    pixels = torch.arange(4 * 3 * PROBED_SIDE * PROBED_SIDE).reshape(4, 3, PROBED_SIDE, PROBED_SIDE) % 251
    media = []
    for kind, blank in BLANKS.items():
        if one.reads_media(kind):
            if isinstance(blank, Frames):
                blank = replace(blank, pixels=pixels[: len(blank.pixels)].to(torch.uint8))
            media.append(blank)
    prompts = [family.render(HARMLESS, HARMLESS.problem, media) for family in (one, other)]
    return _same(*prompts) and [*one.end_token_ids] == [*other.end_token_ids]


def _options(family: RendersPrompts) -> dict[str, object]:
    names = [name for part in type(family).__mro__ for name in vars(part).get("answer_options", ())]
    # Prompts are the same in every precision.
    return {name: getattr(family, name) for name in (*names, *family.later_options, "system_prompt") if name != "dtype"}


def _same(one: Prompt, other: Prompt) -> bool:
    pairs = [(one.input_ids, other.input_ids), (one.position_ids, other.position_ids)]
    pairs += [(item.patches, same.patches) for item, same in zip(one.media, other.media, strict=True)]
    return all(torch.equal(tensor, same) for tensor, same in pairs)
