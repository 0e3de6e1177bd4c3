"""What a question is shown of a video by each selection: frames, images behind it, keys, shards and what is kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from longrl.commands.cache_features import rows_by_media
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.loading.selected_media import asked_question
from longrl.datamodules.loading.teacher_view import TeacherView, teacher_prompts
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.datamodules.media.subtitles import Subtitles
from longrl.datamodules.media.video import known_index
from longrl.datamodules.selection import Coverage, KeyFrames, Motion, Scenes, Similarity, UserFunction
from longrl.datamodules.selection.candidates import Candidates
from longrl.datamodules.selection.frame_selection import forget
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.testing.tiny_clip import tiny_clip, tiny_siglip
from longrl.types import FrameShard, UnusableSample
from tests.datamodules.media.test_frame_lists import frame_list
from tests.datamodules.media.test_video import write
from tests.tiny import omni_family, qwen3_vl_family, row, text_family, vila_family, vl_family

FOUR = VideoSampling(fps=None, num_frames=4)
MADE = {"clip": tiny_clip, "siglip": tiny_siglip}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a CLIP and a SigLIP with random weights."""
    folder = tmp_path_factory.mktemp("models")
    return {name: str(make(folder / name, ["which", "red"], **SMALL)) for name, make in MADE.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 s at 4 frames per second, grey, brighter from frame to frame, with a key frame every 2.5 s."""
    return str(write(tmp_path_factory.mktemp("video") / "v.mp4", 80, rate=4, g="10"))


@pytest.fixture(autouse=True)
def nothing_kept():
    forget()


def asked(video, **fields):
    return replace(row("a", videos=(str(video),)), **fields)


def same(one, other):
    """Two prompts with the same tokens, positions, keys and patches."""
    assert [item.key for item in one.media] == [item.key for item in other.media]
    pairs = [(one.input_ids, other.input_ids), (one.position_ids, other.position_ids)]
    pairs += [(item.patches, same.patches) for item, same in zip(one.media, other.media, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


# ---- what is chosen ----


def test_key_frames_are_chosen_by_the_packets_alone(clip, monkeypatch):
    monkeypatch.setattr(Candidates, "pictures", lambda *_: pytest.fail("nothing need be decoded"))
    index = known_index(clip, DEFAULT_MEDIA_LIMITS)
    keys = (index.starts[index.keys] - index.starts[0]).tolist()
    assert keys == [2.5 * number for number in range(8)]
    assert KeyFrames().shown_frames(clip, "", FOUR).sampling.at_s == (2.5, 7.5, 12.5, 17.5)
    of_part = replace(FOUR, span_s=(4.0, 9.0))  # key frames at 5 and 7.5 s, and those farthest from them
    chosen = KeyFrames(candidates_fps=2.0).shown_frames(clip, "", of_part).sampling.at_s
    assert {5.0, 7.5} < set(chosen)
    assert len(chosen) == 4


def test_a_video_without_more_candidates_than_frames_is_sampled_as_ever(clip):
    sampling = VideoSampling(fps=2.0)
    assert Scenes().shown_frames(clip, "", sampling).sampling == sampling


def test_scenes_and_motion_look_at_small_pictures(tmp_path):
    """Dark for 4 s, bright for 12 s, dark for 4 s: three scenes, two changes."""
    levels = [0] * 8 + [60] * 24 + [0] * 8
    for index, level in enumerate(levels):
        Image.new("RGB", (64, 48), (level,) * 3).save(tmp_path / f"{index}.png")
    names = [f"{index}.png" for index in range(40)]
    (tmp_path / "v.frames.json").write_text(json.dumps({"frames": names, "times": [3 + n / 2 for n in range(40)]}))
    path = str(tmp_path / "v.frames.json")
    three = VideoSampling(fps=None, num_frames=3, min_frames=1)
    chosen = Scenes(candidates_fps=2.0).shown_frames(path, "", three).sampling
    assert read_video(path, chosen).timestamps == (4.5, 12.5, 20.5)  # as the list counts, from its own beginning on
    moments = Motion(candidates_fps=2.0, still_share=0.0).shown_frames(path, "", replace(three, num_frames=2)).sampling
    assert moments.at_s == (4.0, 16.0)


def test_candidates_are_small_upright_and_the_frames_of_their_times(tmp_path):
    path = str(write(tmp_path / "v.mp4", 40, matrix=(0, 1, -1, 0)))  # 64 x 48, turned
    video = Candidates(path, VideoSampling(span_s=(1.0, 3.0)), 2.0, 3)
    (pictures,) = video.pictures(24)
    assert pictures.shape == (3, 32, 24, 3)
    wanted = read_video(path, VideoSampling(at_s=tuple(video.times))).pixels
    assert np.abs(pictures.mean(axis=(1, 2, 3)) - wanted.float().mean(dim=(1, 2, 3)).numpy()).max() <= 1
    assert np.abs(video.greys()[:, 0, 0] - pictures[:, 0, 0].mean(axis=1)).max() <= 2


@pytest.mark.parametrize("name", MADE)
def test_similarity_is_that_of_the_folders_own_processor_and_model(folders, tmp_path, name):
    """Against transformers, picture by picture, on pictures that are as small as the model reads them."""
    from transformers import AutoModel, AutoProcessor

    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    path = str(frame_list(tmp_path, 0, fps=1.0))
    names = [f"{index}.png" for index in range(12)]
    (tmp_path / "clip.frames.json").write_text(json.dumps({"frames": names, "fps": 1.0}))
    selection = Similarity(folder=folders[name], batch_size=5)
    selection.check()
    scores = selection.scores(Candidates(path, FOUR, 1.0, 100), "Which red?")

    model, processor = AutoModel.from_pretrained(folders[name]), AutoProcessor.from_pretrained(folders[name])
    text = {"text": ["Which red?"], "padding": "max_length", "max_length": 24}
    wanted = []
    for index in range(12):
        inputs = processor(images=[Image.open(tmp_path / f"{index}.png")], return_tensors="pt", **text)
        with torch.no_grad():
            output = model.eval()(**inputs)
        wanted.append(torch.cosine_similarity(output.image_embeds, output.text_embeds).item())
    assert np.abs(scores - wanted).max() < 1e-4
    best = sorted(np.argsort(-scores, kind="stable")[:4])
    assert selection.shown_frames(path, "Which red?", FOUR).sampling.at_s == tuple(float(index) for index in best)


def test_candidates_are_embedded_once_for_all_questions_and_found_on_disk_again(folders, clip, tmp_path, monkeypatch):
    looked = []
    pictures = Candidates.pictures
    monkeypatch.setattr(Candidates, "pictures", lambda self, side: looked.append(side) or pictures(self, side))
    fresh = Similarity(folder=folders["clip"])
    one, other = (fresh.shown_frames(clip, said, FOUR).sampling.at_s for said in ("Which red?", "red"))
    assert looked == [64]
    kept = replace(fresh, cache_dir=str(tmp_path))
    assert kept.identity() == fresh.identity()
    for change in (None, None, b"torn"):
        forget()
        assert kept.shown_frames(clip, "Which red?", FOUR).sampling.at_s == one
        assert kept.shown_frames(clip, "red", FOUR).sampling.at_s == other
        (file,) = tmp_path.iterdir()
        if change:
            file.write_bytes(change)
    forget()
    assert kept.shown_frames(clip, "Which red?", FOUR).sampling.at_s == one
    assert looked == [64, 64, 64]  # for the file, and where it was damaged


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"must be a local folder with a CLIP or SigLIP, but '.*' has no config\.json"),
        ({"model_type": "clip"}, r"must have safetensors weights, and has none"),
        ({"model_type": "qwen2"}, "must hold a model of pictures and texts, and a Qwen2Model is none"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}, "holds no model that transformers knows"),
    ],
)
def test_a_folder_without_such_a_model_is_refused_before_weights_are_loaded(folders, tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    if content and content["model_type"] != "clip":
        (tmp_path / "model.safetensors").symlink_to(f"{folders['clip']}/model.safetensors")
    (tmp_path / "own.py").write_text("raise SystemExit('code of a folder ran')")
    renderer = RowRenderer(vl_family(), FOUR, selection=Similarity(folder=str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        renderer.try_options([])


# ---- what is shown ----


def test_a_prompt_is_that_of_the_chosen_moments_in_every_shard(folders, clip):
    selection = Coverage(folder=folders["clip"])
    moments = selection.shown_frames(clip, "Which?", FOUR).sampling
    whole = RowRenderer(vl_family(), FOUR, selection=selection)(asked(clip))
    assert same(whole, RowRenderer(vl_family(), moments)(asked(clip)))
    assert whole.frame_times == (moments.at_s,)
    forget()
    shards = [RowRenderer(vl_family(), FOUR, selection=selection, shard=FrameShard(n, 2))(asked(clip)) for n in (0, 1)]
    assert torch.equal(torch.cat([shard.media[0].patches for shard in shards]), whole.media[0].patches)
    assert {shard.media[0].key for shard in shards} == {whole.media[0].key}


def test_two_questions_of_a_video_have_frames_keys_and_features_of_their_own(tmp_path, clip):
    file = tmp_path / "mine.py"
    file.write_text("def first(video, question, count):\n    return video.times[len(question) :][:count]\n")
    selection = UserFunction(function=f"{file}:first")
    renderer = RowRenderer(vl_family(), FOUR, selection=selection, cached_media=4)
    rows = [asked(clip, problem="<video>W?\nA. one\nB. two"), asked(clip, problem="Which?"), asked(clip, problem="W?")]
    prompts = [renderer(one) for one in rows]
    assert [prompt.frame_times[0][0] for prompt in prompts] == [2.5, 6.5, 2.5]
    assert prompts[0].media[0].key == prompts[2].media[0].key != prompts[1].media[0].key
    assert rows_by_media(rows, renderer) == [[0, 2], [1]]
    assert rows_by_media(rows, replace(renderer, selection=KeyFrames())) == [[0, 1, 2]]
    shuffled = replace(renderer, shuffle_frames=True)(rows[0])
    assert sorted(shuffled.media[0].cell_order) == [0, 1]
    blind = replace(renderer, blind=True)(rows[0])
    assert (blind.media, blind.frame_times) == ((), ())


def test_subtitles_and_teachers_go_by_the_chosen_frames(clip, tmp_path):
    lines = ("00:00:02,400 --> 00:00:02,700\nearly", "00:00:03,000 --> 00:00:04,000\nlater")
    (tmp_path / "v.srt").write_text("\n\n".join(f"{number}\n{line}" for number, line in enumerate(lines, 1)) + "\n")
    three = VideoSampling(fps=None, num_frames=3, min_frames=1)
    subtitles = Subtitles(source=str(tmp_path))
    renderer = RowRenderer(vl_family(), three, selection=KeyFrames(), subtitles=subtitles)
    renderer = replace(renderer, question_template="{subtitles}{problem}")
    family = vl_family()
    teachers = [SimpleNamespace(family=family, tasks=None)]
    renderer.teacher = teacher_prompts(teachers, renderer, TeacherView(video=replace(three, num_frames=2)), None)
    prompt = renderer(asked(clip))
    assert (prompt.frame_times, prompt.teacher.frame_times) == (((2.5, 10.0, 15.0),), ((5.0, 15.0),))
    said = family.tokenizer.decode(prompt.input_ids)
    assert "early" in said
    assert "later" not in said


def test_the_users_function_is_told_by_its_files_content(tmp_path):
    identities = []
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"def choose(video, question, count):\n    return [{text}]\n")
        selection = UserFunction(function=f"{tmp_path / name}/mine.py:choose")
        identities.append(RowRenderer(vl_family(), FOUR, selection=selection).identity()["selection"])
    assert identities[0]["function"] == "mine.py:choose"
    assert identities[0] == identities[1] != identities[2]
    (tmp_path / "few.py").write_text("def choose(video):\n    return [1]\n")
    with pytest.raises(
        ValueError, match=r"data\.selection\.init_args\.function is called as \(video, question, count\)"
    ):
        UserFunction(function=f"{tmp_path}/few.py:choose").check()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("[]", r"must choose 1 to 4 moments between 0 and 20 s, got \[\]"),
        ("[21.0]", r"got \[21\.0\]"),
        ("[float('nan')]", r"got \[nan\]"),
        ("video.times[: count + 1]", r"got \[0\.5, 1\.5, 2\.5, 3\.5, 4\.5\]"),
        ("1 / 0", r"data\.selection cannot choose its frames \(ZeroDivisionError: division by zero\)"),
    ],
)
def test_what_is_no_moment_of_a_video_costs_the_row_alone(tmp_path, clip, said, reason):
    (tmp_path / "mine.py").write_text(f"def choose(video, question, count):\n    return {said}\n")
    renderer = RowRenderer(vl_family(), FOUR, selection=UserFunction(function=f"{tmp_path}/mine.py:choose"))
    with pytest.raises(UnusableSample, match=reason):
        renderer(asked(clip))


def test_a_question_is_read_without_options_and_of_a_conversation_the_users_last():
    assert asked_question(replace(row(), problem="<video>Who?\n(A) he\n(B) she\nAnswer by letter.")) == "Who?"
    assert asked_question(replace(row(), problem="Which is 1) red 2) blue?")) == "Which is 1) red 2) blue?"
    texts = [("user", "What?"), ("assistant", "That."), ("user", "And then?")]
    messages = tuple({"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts)
    assert asked_question(replace(row(), messages=messages)) == "And then?"


# ---- images behind a video ----


@pytest.mark.parametrize("make", [vl_family, qwen3_vl_family, vila_family, omni_family, lambda: ChatReader(64)])
def test_details_are_the_images_that_a_row_with_them_would_show(clip, tmp_path, make):
    selection = KeyFrames(detail_frames=2, detail_pixels=32 * 32, overview_pixels=24 * 24)
    family = make()
    said = asked(clip, problem="<video>Which?")
    prompt = RowRenderer(family, FOUR, selection=selection)(said)
    assert prompt.row == said
    assert [item.kind for item in prompt.media] == ["video", "image", "image"]
    assert prompt.frame_times == ((2.5, 7.5, 12.5, 17.5), (5.0,), (15.0,))
    assert prompt.frame_indices[1:] == ((20,), (60,))

    shown = selection.shown_frames(clip, "", FOUR)
    parts = [shown.part, *shown.details]
    sizes = [part.outline().pixels.shape[-2:] for part in parts]
    assert all(height * width <= most for (height, width), most in zip(sizes, (600, 1100, 1100), strict=True))
    frames = [replace(next(part()), source=None) for part in parts]
    text = "<video>\nFrame at 5.0 s: <image>\nFrame at 15.0 s: <image>\nWhich?"
    template = RowRenderer(family, FOUR).question_template.replace("{subtitles}", "")
    wanted = family.render(said, template.replace("{problem}", text), frames)
    assert same(prompt, wanted)


def test_details_stand_in_conversations_and_behind_media_that_no_tag_places(clip):
    selection = KeyFrames(detail_frames=1)
    renderer = RowRenderer(vl_family(), FOUR, question_template="{problem}", selection=selection)
    tagged, plain = renderer(asked(clip, problem="<video>Which?")), renderer(asked(clip, problem="Which?"))
    assert same(tagged, plain)
    content = [{"type": "video"}, {"type": "text", "text": "Which?"}]
    talk = asked(clip, messages=({"role": "user", "content": content},))
    prompt = renderer(talk)
    assert same(prompt, plain)
    assert prompt.row == talk  # rendered again after a resume, it has its images once
    assert same(renderer(prompt.row), prompt)
    parts = replace(renderer, family=ChatReader(64))(talk).messages[0]["content"]
    assert [part["type"] for part in parts] == ["video", "text", "image", "text", "text"]


def test_an_image_is_one_ranks_and_not_decoded_where_its_features_are(clip):
    selection = KeyFrames(detail_frames=1)
    renderer = RowRenderer(vl_family(), FOUR, selection=selection)
    whole = renderer(asked(clip)).media[1]
    first, last = (replace(renderer, shard=FrameShard(n, 2))(asked(clip)).media[1] for n in (0, 1))
    assert len(first.patches) == 0
    assert torch.equal(last.patches, whole.patches)

    class Stored:
        def has(self, key):
            return True

    item = replace(renderer, stored=Stored())(asked(clip)).media[1]
    assert (item.key, len(item.patches)) == (whole.key, 0)
    assert torch.equal(next(item.source()).pixels, read_video(clip, VideoSampling(at_s=(10.0,))).pixels)


def test_a_family_without_images_is_told_so_before_a_run(clip):
    renderer = RowRenderer(text_family(), FOUR, selection=KeyFrames(detail_frames=1))
    with pytest.raises(ValueError, match=r"detail_frames=1 shows images behind a video, and TextFamily reads none"):
        renderer.try_options([row()])
    RowRenderer(vl_family(), FOUR, selection=KeyFrames(detail_frames=1)).try_options([asked(clip)])
    with pytest.raises(ValueError, match=r"data\.selection\.init_args\.overview_pixels=9 is of a video with images"):
        KeyFrames(overview_pixels=9)
