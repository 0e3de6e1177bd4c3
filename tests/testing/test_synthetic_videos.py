import json
import re
from collections import Counter
from random import Random

import av
import numpy as np
import pytest

from longrl.testing import synthetic_videos
from longrl.testing.drawing import (
    Clip,
    draw_background,
    draw_scene,
    write_video,
)
from longrl.testing.stories import (
    ASK,
    CATEGORIES,
    COLORS,
    LETTERS,
    POSITIONS,
    Scene,
    Story,
    describe_story,
    possible_goals,
    sample_story,
)
from longrl.testing.synthetic_videos import (
    SyntheticConfig,
    generate_videos,
    make_records,
)

SMALL = SyntheticConfig(num_train_videos=2, num_eval_videos=2, num_pretrain_videos=2, scene_s=1.0, fps=2, size=64)
MANY = SyntheticConfig(num_train_videos=500, num_eval_videos=125, num_pretrain_videos=50)


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def options_of(record):
    question, *lines = record["problem"].split("\n")
    assert [line[:3] for line in lines] == [f"{letter}. " for letter in LETTERS]
    return question, [line[3:] for line in lines]


def correct_index(record):
    return LETTERS.index(re.fullmatch(r"<answer>([A-D])</answer>", record["answer"])[1])


def stories(count, scenes=(4, 5)):
    rng = Random(7)
    return [sample_story(rng, num_scenes=rng.randint(*scenes)) for _ in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    generate_videos(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def many():
    return make_records(MANY)


# ---------------------------------------------------------------------------------------------------------- stories


def test_the_robot_visits_all_and_only_objects_with_the_goal_and_these_share_nothing_else():
    for story in stories(300, scenes=(4, 8)):
        visited = [scene for scene in story.scenes if scene.visited]
        assert 2 <= len(visited) < len(story.scenes)
        assert visited == [scene for scene in story.scenes if story.goal in scene.attributes]
        assert set.intersection(*(set(scene.attributes) for scene in visited)) == {story.goal}


def test_the_objects_alone_leave_the_goal_open():
    assert all(len(possible_goals(story.scenes)) >= 2 for story in stories(300))


def test_objects_of_a_story_are_distinct_up_to_all_24():
    for story in [*stories(100), sample_story(Random(0), num_scenes=24)]:
        assert len({scene.name for scene in story.scenes}) == len(story.scenes)


def test_a_description_lists_what_is_visible_in_order():
    scenes = (Scene("red", "circle", "top left", False), Scene("red", "cross", "bottom right", True))
    story = Story(scenes, "red objects")
    assert describe_story(story) == "red circle top left. red cross bottom right, robot."


# -------------------------------------------------------------------------------------------------------- questions


def test_temporal_answers_are_the_neighbours():
    for story in stories(200):
        question = ASK["temporal"](story, Random(0))
        order = [scene.name for scene in story.scenes]
        if " right before the " in question.text:
            order.reverse()
        asked = re.split(r" right (?:after|before) the ", question.text)[1].removesuffix("?")
        assert question.correct == [*order, "nothing"][order.index(asked) + 1]
        assert asked not in question.distractors
        assert set(question.distractors) <= {*order, "nothing"}


def test_spatial_answers_are_the_places():
    for story in stories(100):
        question = ASK["spatial"](story, Random(1))
        (scene,) = [scene for scene in story.scenes if question.text == f"Where is the {scene.name}?"]
        assert question.correct == scene.position
        assert sorted([question.correct, *question.distractors]) == sorted(POSITIONS)


def test_goal_options_are_two_colours_and_two_shapes():
    for story in stories(100):
        question = ASK["goal and purpose"](story, Random(2))
        options = {question.correct, *question.distractors}
        assert question.correct == story.goal
        assert sum(option.endswith(" objects") for option in options) == 2
        assert len(options) == 4


def test_plot_options_hold_the_ends_and_another_pair_in_both_orders():
    for story in stories(100):
        question = ASK["plot and narrative"](story, Random(3))
        first, last = story.scenes[0].name, story.scenes[-1].name
        assert question.correct == f"{first} to {last}"
        pairs = {tuple(option.split(" to ")) for option in (question.correct, *question.distractors)}
        assert len(pairs) == 4
        assert pairs == {pair[::-1] for pair in pairs}


# ---------------------------------------------------------------------------------------------------------- records


def test_letters_are_balanced_in_each_split_and_category(many):
    records, _ = many
    for split in ("train", "eval"):
        for category in CATEGORIES:
            counts = Counter(r["answer"] for r in records[split] if r["problem_type"] == category)
            assert len(counts) == 4
            assert max(counts.values()) - min(counts.values()) <= 1


def test_reasoning_is_short_and_ends_with_the_answer(many):
    records, clips = many
    described = {clip.path: describe_story(clip.story) for clip in clips}
    for record in records["train"]:
        correct = options_of(record)[1][correct_index(record)]
        assert record["reasoning"].startswith(described[record["videos"]])
        assert record["reasoning"].endswith(f" {correct}.")
        assert len(record["reasoning"].split()) <= 60


def test_train_and_eval_share_no_story(many):
    _, clips = many
    scenes = {split: {c.story.scenes for c in clips if f"/{split}_" in c.path} for split in ("train", "eval")}
    assert len(scenes["train"]) == 500
    assert len(scenes["eval"]) == 125
    assert not scenes["train"] & scenes["eval"]


def test_equal_seeds_give_equal_records_and_others_do_not():
    assert make_records(SMALL) == make_records(SMALL)
    assert make_records(SyntheticConfig(seed=1))[0] != make_records(SyntheticConfig(seed=2))[0]


def test_fewer_questions_per_video_rotate_through_the_categories():
    records, _ = make_records(SyntheticConfig(num_train_videos=4, num_eval_videos=0, questions_per_video=2))
    assert Counter(record["problem_type"] for record in records["train"]) == dict.fromkeys(CATEGORIES, 2)


def test_pretraining_rows_have_neither_reasoning_nor_the_four_questions(many):
    records, clips = many
    described = {clip.path: describe_story(clip.story) for clip in clips}
    asked = re.compile(r"What comes|Where is|look for|begin and end|<answer>|<think>")
    assert {record["problem_type"] for record in records["pretrain"]} == {"description", "lookup", "reading"}
    for record in records["pretrain"]:
        assert record["reasoning"] is None
        assert not asked.search(record["problem"] + record["answer"])
        if record["problem_type"] == "description":
            assert record["answer"] == described[record["videos"]]
        else:
            assert (record["videos"], record["data_type"]) == (None, "text")


# --------------------------------------------------------------------------------------------- blind guessing is chance


def noise(count):
    """Four standard deviations of the share of hits among `count` guesses at 1 in 4."""
    return 4 * (0.25 * 0.75 / count) ** 0.5


def most_common_words(question, options):
    counts = Counter(word for option in options for word in option.split())
    return [sum(counts[word] for word in option.split()) / len(option.split()) for option in options]


def rarest_words(question, options):
    return [-score for score in most_common_words(question, options)]


def words_of_the_question(question, options):
    asked = set(question.rstrip("?").split())
    return [len(asked & set(option.split())) for option in options]


def other_words_than_the_question(question, options):
    return [-score for score in words_of_the_question(question, options)]


def longest(question, options):
    return [len(option) for option in options]


@pytest.mark.parametrize(
    "heuristic",
    [most_common_words, rarest_words, words_of_the_question, other_words_than_the_question, longest],
)
def test_a_guess_from_the_text_is_no_better_than_chance(many, heuristic):
    rng = Random(0)
    hits: Counter[str] = Counter()
    for record in many[0]["train"]:  # 2000 records, 500 of each category
        scores = heuristic(*options_of(record))
        best = [index for index, score in enumerate(scores) if score == max(scores)]
        hits[record["problem_type"]] += rng.choice(best) == correct_index(record)
    assert sum(hits.values()) / 2000 == pytest.approx(0.25, abs=noise(2000))
    for category in CATEGORIES:
        assert hits[category] / 500 == pytest.approx(0.25, abs=noise(500))


def test_each_option_wording_is_right_as_often_as_it_is_offered(many):
    offered: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for record in many[0]["train"]:
        options = options_of(record)[1]
        offered.update(options)
        right[options[correct_index(record)]] += 1
    for option, count in offered.items():
        if count >= 200:
            assert right[option] / count == pytest.approx(0.25, abs=noise(count)), option


# ----------------------------------------------------------------------------------------------------------- pixels


def see(image):
    """Position, colour and visit of a frame, found from its pixels alone."""
    pixels = image.astype(int)
    lit = np.abs(pixels - np.median(pixels, axis=(0, 1))).max(axis=2) > 45
    rows, cols = np.nonzero(lit)
    middle = len(image) / 2
    position = f"{'bottom' if rows.mean() > middle else 'top'} {'right' if cols.mean() > middle else 'left'}"
    palette = np.array(list(COLORS.values()))
    nearest = np.abs(pixels[lit][:, None] - palette).sum(axis=2)
    votes = nearest.argmin(axis=1)[nearest.min(axis=1) < 90]
    black = (pixels.max(axis=2) < 20).sum()
    return position, list(COLORS)[np.bincount(votes).argmax()], bool(black > 10)


def test_the_video_shows_what_the_description_says(tmp_path):
    for index, story in enumerate(stories(6)):
        write_video(tmp_path / "v.mp4", Clip("v.mp4", story, str(index)), SyntheticConfig(scene_s=2.0, fps=2))
        shown = [see(image) for image in decode(tmp_path / "v.mp4")[2::4]]
        assert shown == [(scene.position, scene.color, scene.visited) for scene in story.scenes]


def test_objects_move_within_a_scene_and_stay_in_their_quadrant():
    scene = Scene("white", "square", "bottom right", False)
    background = np.zeros((112, 112, 3), np.uint8)
    images = list(draw_scene(scene, background, Random(0)))
    assert any((image != images[0]).any() for image in images)
    for image in images:
        assert not image[:56].any()
        assert not image[:, :56].any()


@pytest.mark.parametrize("size", range(32, 130, 2))
def test_every_allowed_size_can_be_drawn(size):
    rng = Random(size)
    background = draw_background(rng, size)
    for position in POSITIONS:
        for image in draw_scene(Scene("red", "cross", position, True), background, rng):
            assert image.shape == (size, size, 3)


def test_an_hour_is_one_config_away(tmp_path):
    config = SyntheticConfig(min_scenes=4, max_scenes=4, scene_s=900.0, fps=1, size=32)
    write_video(tmp_path / "hour.mp4", Clip("hour.mp4", stories(1, scenes=(4, 4))[0], "0"), config)
    with av.open(str(tmp_path / "hour.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.codec_context.name, stream.pix_fmt) == (3600, "h264", "yuv420p")
        assert float(stream.duration * stream.time_base) == pytest.approx(3600.0)


# ---------------------------------------------------------------------------------------------------------- writing


def test_a_dataset_is_records_beside_their_videos(dataset):
    records, clips = make_records(SMALL)
    for split in ("train", "eval", "pretrain"):
        assert read_jsonl(dataset / f"{split}.jsonl") == records[split]
    assert sorted(path.name for path in (dataset / "videos").iterdir()) == sorted(c.path.split("/")[1] for c in clips)
    assert {record["videos"] for record in records["train"]} == {"videos/train_000000.mp4", "videos/train_000001.mp4"}


def test_the_same_config_gives_the_same_frames_with_any_number_of_workers(dataset, tmp_path):
    generate_videos(tmp_path / "again", SMALL, workers=2)
    for path in sorted((dataset / "videos").iterdir()):
        assert (decode(path) == decode(tmp_path / "again" / "videos" / path.name)).all()


def test_a_complete_dataset_is_left_alone_and_another_config_replaces_it(tmp_path):
    config = SyntheticConfig(num_train_videos=1, num_eval_videos=0, scene_s=1.0, fps=1, size=32)
    folder = tmp_path / "data"
    generate_videos(folder, config)
    before = (folder / "manifest.json").stat().st_mtime_ns
    generate_videos(folder, config)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    generate_videos(folder, SyntheticConfig(num_train_videos=2, num_eval_videos=0, scene_s=1.0, fps=1, size=32))
    assert len(list((folder / "videos").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_missing_video_is_made_again(tmp_path):
    config = SyntheticConfig(num_train_videos=1, num_eval_videos=0, scene_s=1.0, fps=1, size=32)
    generate_videos(tmp_path / "data", config)
    (tmp_path / "data/videos/train_000000.mp4").unlink()
    generate_videos(tmp_path / "data", config)
    assert (tmp_path / "data/videos/train_000000.mp4").is_file()


@pytest.mark.parametrize("manifest", [None, "{}", "[]", "no json"])
def test_a_folder_of_someone_else_is_refused(tmp_path, manifest):
    (tmp_path / "thesis.txt").write_text("mine")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match="was not written by this generator"):
        generate_videos(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic_videos, "write_video", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_videos(tmp_path / "data", SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_eval_videos": -1}, "at least 0"),
        ({"min_scenes": 3}, "4 <= min_scenes"),
        ({"max_scenes": 25}, "got 4 and 25; for longer videos raise scene_s"),
        ({"questions_per_video": 5}, "must be 1 to 4, got 5"),
        ({"fps": 0}, "at least one frame"),
        ({"size": 113}, "must be even"),
    ],
)
def test_impossible_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**wrong)
