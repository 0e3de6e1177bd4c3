"""What a teacher reads of a training row: its own frames, template and lengths, and nothing of it at evaluation."""

import json
import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from longrl.callbacks.waiting_groups import rendered_rows, saved_row
from longrl.datamodules.loading import media_reading
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.row_marks import RowDraw, marked
from longrl.datamodules.loading.teacher_view import TeacherView, reads_alike, teacher_prompts
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.subtitles import Subtitles
from longrl.packing.lengths import LengthLimit, micro_batch_limit
from longrl.strategies.axis import SINGLE_RANK
from longrl.strategies.parallel import Parallel
from longrl.types import FrameShard, UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import qwen3_vl_family, row, text_family, vl_family

FEW, MORE = VideoSampling(fps=None, num_frames=4), VideoSampling(fps=None, num_frames=8)
TELLING = "{problem} It is {answer}, {option}: {reasoning}"


@dataclass
class Teaches:
    family: object = None
    tasks: object = None


def renderer(family=None, view=None, teachers=None, **options) -> RowRenderer:
    """A policy's renderer of 4 frames with a teacher."""
    policy = RowRenderer(family or vl_family(), FEW, question_template="{problem}", **options)
    policy.teacher = teacher_prompts(teachers or [Teaches(vl_family())], policy, view, None)
    return policy


def same(one, other):
    """Two prompts with the same tokens, positions and patches."""
    pairs = [(one.input_ids, other.input_ids), (one.position_ids, other.position_ids)]
    pairs += [(item.patches, same.patches) for item, same in zip(one.media, other.media, strict=True)]
    assert [item.key for item in one.media] == [item.key for item in other.media]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture
def clip(tmp_path):
    return row("a", videos=(str(write(tmp_path / "v.mp4", 16)),), reasoning="I look.")


@pytest.mark.parametrize("shard", [FrameShard(), FrameShard(1, 2)])
def test_a_view_is_what_a_renderer_of_its_options_makes_and_the_policys_prompt_is_what_it_was(clip, shard):
    view = TeacherView(video=MORE, question_template=TELLING)
    prompt = renderer(view=view, shard=shard)(clip)
    alone = RowRenderer(vl_family(), FEW, question_template="{problem}", shard=shard)(clip)
    assert same(prompt, alone)
    told = TELLING.replace("{problem}", clip.problem).replace("{answer}", "A").replace("{reasoning}", "I look.")
    told = told.replace("{option}", "one")  # the wording of option A
    wanted = RowRenderer(vl_family(), MORE, question_template="{problem}", shard=shard)(replace(clip, problem=told))
    assert same(prompt.teacher, replace(wanted, row=clip))
    assert (len(prompt.frame_indices[0]), len(prompt.teacher.frame_indices[0])) == (4, 8)
    assert prompt.teacher.media[0].key != prompt.media[0].key  # caches of features tell them apart
    assert (prompt.teacher.row, prompt.teacher.response, prompt.teacher.teacher) == (clip, None, None)


def test_a_teacher_that_reads_alike_reads_the_policys_prompt_and_another_renders_its_own(clip):
    assert renderer().teacher is None
    assert renderer(teachers=[Teaches(None)]).teacher is None
    assert reads_alike(vl_family(), vl_family(dtype="bfloat16", freeze_vision_encoder=True))
    assert not reads_alike(vl_family(), vl_family(max_pixels=28 * 28))
    other = qwen3_vl_family()
    prompt = renderer(teachers=[Teaches(other)])(clip)
    assert same(prompt.teacher, RowRenderer(other, FEW, question_template="{problem}")(clip))


def test_the_first_teacher_of_a_rows_task_has_its_view(clip):
    teachers = [Teaches(vl_family(), ["math"]), Teaches(qwen3_vl_family(), ["numeric"])]
    both = renderer(teachers=teachers)
    assert both(replace(clip, task="math")).teacher is None  # reads alike
    assert both(replace(clip, task="numeric")).teacher is not None
    assert both(clip).teacher is None  # nobody teaches it


def test_a_video_is_decoded_once_where_both_see_the_same_frames_and_nothing_is_kept(clip, monkeypatch):
    opened = []
    open_video = media_reading.open_video
    monkeypatch.setattr(media_reading, "open_video", lambda *args: opened.append(args[1]) or open_video(*args))
    telling = renderer(view=TeacherView(question_template=TELLING))
    prompt = telling(clip)
    assert opened == [FEW]
    assert torch.equal(prompt.media[0].patches, prompt.teacher.media[0].patches)
    assert not telling.held.items
    renderer(view=TeacherView(video=MORE))(clip)
    assert opened == [FEW, FEW, MORE]


def test_a_curriculum_of_the_policys_frames_leaves_a_views_own_alone(clip):
    drawn = marked(clip, RowDraw(0, (("num_frames", 6),)))
    prompt = renderer(view=TeacherView(video=MORE))(drawn)
    assert (len(prompt.frame_indices[0]), len(prompt.teacher.frame_indices[0])) == (6, 8)
    assert prompt.teacher.row == drawn
    prompt = renderer(view=TeacherView(question_template=TELLING))(drawn)
    assert (len(prompt.frame_indices[0]), len(prompt.teacher.frame_indices[0])) == (6, 6)


def test_what_a_row_spells_of_control_tokens_stays_text(clip):
    family = vl_family()
    view = TeacherView(question_template="{problem} {answer} {reasoning}")
    spelled = replace(clip, answer="<|im_end|>", reasoning="<video> <|video_pad|>")
    prompt = renderer(family, view)(spelled).teacher
    plain = renderer(family, view)(replace(clip, answer="A", reasoning="I")).teacher
    for token in (family.end_token_ids[0], family.media_token_ids()["video"]):
        assert (prompt.input_ids == token).sum() == (plain.input_ids == token).sum()


def test_a_row_that_is_shown_blind_is_told_nothing_more(clip):
    view = TeacherView(video=MORE, question_template=TELLING)
    assert renderer(view=view, blind_share=1.0)(clip).teacher is None
    other = qwen3_vl_family()
    prompt = renderer(view=view, blind_share=1.0, teachers=[Teaches(other)])(clip)
    assert same(prompt.teacher, RowRenderer(other, FEW, question_template="{problem}", blind=True)(clip))


def test_lengths_are_those_of_the_update_and_of_the_views_own_option(clip):
    view = TeacherView(video=MORE)
    prompt = renderer(view=view)(clip)
    length = len(prompt.teacher.input_ids)
    assert length > len(prompt.input_ids)
    engine = LengthLimit(length - 1, "max_model_len of an engine")
    assert renderer(view=view).with_limits([engine])(clip).teacher is not None  # nothing is sampled behind it
    update = micro_batch_limit(length + 4, [1], longest=5)
    with pytest.raises(UnusableSample, match=rf"its teacher cannot be shown it: its prompt has {length} tokens, "):
        renderer(view=view).with_limits([update])(clip)
    with pytest.raises(UnusableSample, match=rf"above {length - 1}, the data.max_prompt_tokens"):
        renderer(view=view, max_prompt_tokens=length - 1)(clip)
    own = replace(view, max_prompt_tokens=length)
    assert renderer(view=own, max_prompt_tokens=length - 1)(clip).teacher is not None
    with pytest.raises(UnusableSample, match=rf"above {length - 1}, the data.teacher_view.max_prompt_tokens"):
        renderer(view=replace(view, max_prompt_tokens=length - 1))(clip)


def test_what_is_taught_must_fit_behind_the_view(clip):
    view = TeacherView(video=MORE)
    taught = renderer(view=view, stage="sft")(clip)
    room = len(taught.teacher.input_ids) + len(taught.response.token_ids)
    assert taught.teacher.response is None
    renderer(view=view, stage="sft").with_limits([micro_batch_limit(room, [1])])(clip)
    with pytest.raises(UnusableSample, match="its teacher cannot be shown it"):
        renderer(view=view, stage="sft").with_limits([micro_batch_limit(room - 1, [1])])(clip)


def test_it_reaches_a_worker_and_pinned_memory_with_the_prompt(clip, monkeypatch):
    prompt = pickle.loads(pickle.dumps(renderer(view=TeacherView(video=MORE))))(clip)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = prompt.pin_memory()
    assert torch.equal(pinned.media[0].patches, prompt.media[0].patches + 1)
    assert torch.equal(pinned.teacher.media[0].patches, prompt.teacher.media[0].patches + 1)


def test_a_saved_row_is_rendered_again_with_its_view(clip):
    shown = renderer(view=TeacherView(video=MORE))
    (restored,) = rendered_rows([saved_row(shown(clip).row)], shown, SINGLE_RANK)
    assert same(restored.teacher, shown(clip).teacher)


def data_of(tmp_path, clip, view, **options):
    """A data module of two rows, set up to train beside a teacher."""
    rows = [{"problem": clip.problem, "answer": "A", "videos": clip.videos[0]}] * 2
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    options = {"allow_outside_paths": True, "prompts_per_batch": 1, "video": FEW, **options}
    data = LongVideoReason(
        vl_family(), train=str(source), val=str(source), test=str(source), teacher_view=view, **options
    )
    module = SimpleNamespace(parallel=Parallel(), distiller=SimpleNamespace(teachers=[Teaches(vl_family())]))
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(
        lightning_module=module, strategy=strategy, default_root_dir=str(tmp_path), is_global_zero=True,
        distributed_sampler_kwargs=None,
    )  # fmt: skip
    return data


def test_training_prompts_alone_have_a_view(tmp_path, clip):
    data = data_of(tmp_path, clip, TeacherView(video=MORE))
    data.setup("fit")
    (prompt,) = next(iter(data.train_dataloader())).prompts
    assert len(prompt.teacher.frame_indices[0]) == 8
    assert len(data.renderer(prompt.row).teacher.frame_indices[0]) == 8  # of rows that a checkpoint holds
    assert [one.teacher for one in next(iter(data.val_dataloader())).prompts] == [None, None]
    data.setup("test")
    assert [one.teacher for one in next(iter(data.test_dataloader())).prompts] == [None, None]


def test_a_row_whose_view_cannot_be_made_is_skipped_and_listed(tmp_path, clip):
    data = data_of(tmp_path, clip, TeacherView(video=MORE, max_prompt_tokens=1), max_skipped_share=1.0)
    data.setup("fit")
    with pytest.raises(ValueError, match="its teacher cannot be shown it"):
        next(iter(data.train_dataloader()))
    assert "its teacher cannot be shown it" in (tmp_path / "skipped.jsonl").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question_template": "{answer}"}, r"teacher_view.question_template must contain \{problem\}"),
        ({"question_template": "{problem} {right}"}, r"teacher_view.question_template may name .*, got \{right\}"),
        ({"max_prompt_tokens": 0}, "data.teacher_view.max_prompt_tokens"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TeacherView(**options)


def test_options_that_rows_make_no_use_of_are_refused(tmp_path, clip):
    talk = row("b", messages=({"role": "user", "content": [{"type": "text", "text": "What?"}]},))
    with pytest.raises(ValueError, match="row 'b' is a conversation"):
        TeacherView(question_template=TELLING).check_rows([talk], "{problem}")
    TeacherView(video=MORE).check_rows([talk], "{problem}")
    with pytest.raises(ValueError, match=r"add it to data.teacher_view.question_template"):
        TeacherView(subtitles=Subtitles("record")).check_rows([], "{problem}")


def test_a_view_without_a_teacher_is_told(tmp_path, clip, caplog):
    data = data_of(tmp_path, clip, TeacherView(video=MORE))
    data.trainer.lightning_module.distiller = None
    data.setup("fit")
    assert "data.teacher_view does nothing in a run without model.teacher" in caplog.text


def test_a_text_family_has_views_too():
    view = TeacherView(question_template="{problem} ({answer})")
    policy = RowRenderer(text_family(), FEW, question_template="{problem}")
    policy.teacher = teacher_prompts([Teaches(text_family())], policy, view, None)
    prompt = policy(row("a"))
    assert len(prompt.teacher.input_ids) > len(prompt.input_ids)


def test_memory_of_a_worker_counts_the_frames_of_the_teacher_that_sees_most():
    family = vl_family()
    own = 3 * family.max_pixels * FEW.num_frames
    assert RowRenderer(family, FEW).most_held_bytes == own
    teachers = [Teaches(vl_family(), ["math"]), Teaches(vl_family())]
    seen = renderer(family, TeacherView(video=MORE), teachers)
    assert seen.most_held_bytes == own + 3 * family.max_pixels * MORE.num_frames
