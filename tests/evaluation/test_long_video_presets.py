"""configs/eval/ of eight benchmarks against what their released code asks of one question of its own.

Prompts and frames were made by hand from LVBench f998d95, MLVU fd060c1, LongVideoBench fc3c553, Video-MME-v2 b24176a,
MVBench's notebook, TempCompass e1b4631, Video-Holmes 52ef8da, and lmms-eval 75571cfe where authors publish no prompt.
"""

import json
from dataclasses import replace

import pytest
import yaml

from longrl.commands.evaluate import parse_evaluation
from longrl.datamodules.rows.question_rows import make_rows
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.types import SamplingParams
from tests.datamodules.media.test_video import write
from tests.datamodules.rows import released_questions as released
from tests.evaluation.scripted import evaluation
from tests.runs import ROOT

LINSPACE_32 = [
    0, 3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 35, 38, 41, 44, 47, 51, 54, 57, 60, 63, 67, 70, 73, 76, 79, 83, 86, 89, 92,
    95, 99,
]  # fmt: skip
DIRECTLY = "Answer with the option's letter from the given choices directly."
MLVU_LEAD = "Carefully watch this video and pay attention to every detail. Based on your observations, "
MME_V2 = (
    "Question: What happens in step 4?\nA. Event A.\nB. Event B.\nC. Event C.\nD. Event D.\nE. Event E.\nF. Event F.\n"
    "G. Event G.\nH. Event H.\nSelect the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, D, E, F, G, or H) of the correct option."
)
MVBENCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\nQuestion: What happened after the person took the bag?\nOptions:\n(A) Ate the apple.\n"
    "(B) Closed the door.\n(C) Sat down.\nOnly give the best option.\nBest option:("
)
EGO = "What is C's aim?\n" + "\n".join(released.ego_schema()["option"]) + f"\n{DIRECTLY}"
ASKED = {
    "lvbench": (
        released.lvbench(), "abcDEF12345.mp4", LINSPACE_32,
        "What does the baker sell?\n(A) Bread\n(B) Shoes\n(C) Maps\n(D) Rope\n"
        "Answer the question with the option letter",
    ),
    "mlvu": (
        released.mlvu(), "1_plotQA/movie_1.mp4", LINSPACE_32,
        f"{MLVU_LEAD}select the best option that accurately addresses the question.\nQuestion: What is on the table?\n"
        "Options:\n(A) A vase\n(B) A hat\n(C) A fish\n(D) A key\nOnly give the best option.\nBest Option: (",
    ),
    "mlvu_generation": (
        released.mlvu_scene(), "8_sub_scene/scene_3.mp4", LINSPACE_32,
        f"{MLVU_LEAD}answer the given questions.\nDescribe the scene at the harbour.",
    ),
    "longvideobench": (
        released.longvideobench(), "videos/abc.mp4", [0, 25, 50, 75],
        "<image>\n<image>\nHello.\n<image>\n<image>\nQuestion: When she waves, what is behind her?\nA. A tree\n"
        f"B. A car\nC. A wall\nD. A dog\n{DIRECTLY}",
    ),
    "video_mme_v2": (
        released.video_mme_v2(4), "video/001.mp4", [int(number * (100 / 65)) for number in range(1, 65)],
        f"These are the frames of a video.\n{MME_V2}",
    ),
    "video_mme_v2_subtitles": (
        released.video_mme_v2(4), "video/001.mp4", [int(number * (100 / 65)) for number in range(1, 65)],
        "These are the frames of a video. This video's subtitles are listed below:\nshe said hello hello\n" + MME_V2,
    ),
    "mvbench": (
        released.mvbench(), "star/Charades_v1_480/ABC12.mp4",
        # Theirs: int(25 + 50 / 32 + round(50 / 16 * i)), of which each is at most one frame away.
        [26, 29, 32, 35, 39, 42, 45, 48, 51, 54, 57, 60, 64, 67, 70, 73],
        MVBENCH,
    ),
    "temp_compass": (
        {**released.temp_compass("yes_no"), "video_id": "123456"}, "123456.mp4", [0, 33, 66, 99],
        "Is the boy jumping?\nPlease answer yes or no:",
    ),
    "temp_compass_captioning": (
        released.temp_compass("captioning"), "123456.mp4", [0, 33, 66, 99],
        "Write a caption.\nInformation A: {'action': 'jumping'}\nGenerated Caption:",
    ),
    "ego_schema": (released.ego_schema(), "0074f737.mp4", LINSPACE_32, EGO),
    "ego_schema_full": (released.ego_schema_file(), "videos/0074f737.mp4", LINSPACE_32, EGO),
    "video_holmes": (
        released.video_holmes(), "videos/RSm.mp4", [0, 14, 28, 42, 57, 71, 85, 99],
        "Based on the given video, reason and answer the single-choice question. Provide your reasoning between the "
        "<think> and </think> tags, and then give your final answer between the <answer> and </answer> tags. The "
        "question is: Who are the two?. The options are: A: Cleaners, B: Cousins, C: Rivals, D: Strangers, "
        "E: Officers, F: Actors. Your answer:",
    ),
}  # fmt: skip
SUBTITLES = {
    "subtitles/abc_en.json": json.dumps([{"timestamp": [0.4, 1.9], "text": "Hello."}]),
    "subtitle/001.jsonl": "".join(
        json.dumps({"text": word, "start_time": number, "end_time": number + 1}) + "\n"
        for number, word in enumerate(("she", "said", "hello", "hello"))
    ),
}


@pytest.fixture
def media(tmp_path, monkeypatch):
    """Function (name) -> a folder with a video of 100 frames under it, and subtitles."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, 100, rate=25, size=(32, 32))
        for path, text in SUBTITLES.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return make


def config_of(preset, *more):
    return parse_evaluation([f"--config={ROOT / 'configs' / 'eval' / preset}.yaml", *more])


@pytest.mark.parametrize("preset", ASKED)
def test_a_question_is_asked_as_its_authors_ask_it(preset, media):
    record, video, frames, text = ASKED[preset]
    root = media(video)
    config, data = config_of(preset, f"--data.media_root={root}")
    row = make_rows([record], data.row_functions[data.row_function], str(root))[0]
    prompt = replace(data.renderer, family=ChatReader(64))(row)
    assert prompt.text == text
    shown = [index for indices in prompt.frame_indices for index in indices]
    assert shown == frames
    assert config.protocol.source
    assert config.sampling.num_generations == 1


@pytest.mark.parametrize(
    ("preset", "sampling"),
    [
        ("lvbench", SamplingParams(1, 16, 0.0)),
        ("mlvu", SamplingParams(1, 16, 0.0)),
        ("longvideobench", SamplingParams(1, 32, 0.0)),
        ("video_mme_v2", SamplingParams(1, 4096, 0.0)),
        ("mvbench", SamplingParams(1, 100, 0.0)),
        ("temp_compass", SamplingParams(1, 128, 0.0)),
        ("ego_schema", SamplingParams(1, 16, 0.0)),
        ("video_holmes", SamplingParams(1, 1024, 0.1, 0.001)),
    ],
)
def test_answers_are_sampled_and_read_as_published(preset, sampling):
    config, _ = config_of(preset)
    assert config.sampling == sampling
    assert config.protocol.scoring_rule() is not None


def test_every_task_of_mvbench_has_its_source():
    _, data = config_of("mvbench")
    tasks = [source.fields["task_type"] for source in data.sources["test"]]
    assert len(set(tasks)) == 20
    assert [source.source.rpartition("/")[2] for source in data.sources["test"]] == [
        task.lower().replace(" ", "_").replace("-", "_") + ".json" for task in tasks
    ]


def test_an_evaluation_of_video_mme_v2_scores_its_groups(media, tmp_path):
    """By hand: the group of `logic` has steps 1, 3 and 4 right of [1, [2, 3], 4]: 4/12; that of `relevance` 3 of 4."""
    root = media("video/001.mp4")
    (root / "video" / "002.mp4").write_bytes((root / "video" / "001.mp4").read_bytes())
    (root / "subtitle" / "002.jsonl").write_text(SUBTITLES["subtitle/001.jsonl"])
    wrong = [{"answer": "F"} if number == 2 else {} for number in (1, 2, 3, 4)]
    asked = [released.video_mme_v2(number, "001", "logic", **wrong[number - 1]) for number in (1, 2, 3, 4)]
    asked += [released.video_mme_v2(number, "002", "relevance", **wrong[number - 1]) for number in (1, 2, 3, 4)]
    (root / "test.json").write_text(json.dumps(asked))
    preset = yaml.safe_load((ROOT / "configs" / "eval" / "video_mme_v2.yaml").read_text())
    results = evaluation(
        tmp_path / "out", f"--protocol={json.dumps(preset['protocol'])}", "--breakdowns=[level]",
        f"--data.row_function={preset['data']['row_function']}", f"--data.media_root={root}",
        test=root / "test.json", says="Final Answer: E",
    ).run().results  # fmt: skip
    condition = results["conditions"]["video"]
    groups = {name: of["rule"]["accuracy"] for name, of in condition["averages"].items()}
    assert groups == pytest.approx({
        "groups": (4 / 12 + 9 / 16) / 2, "groups, group_type logic": 4 / 12, "groups, group_type relevance": 9 / 16,
        "groups, level 2": (4 / 12 + 9 / 16) / 2, "groups, second_head Order": (4 / 12 + 9 / 16) / 2,
        "groups, third_head Event order": (4 / 12 + 9 / 16) / 2,
    })  # fmt: skip
    assert condition["protocol_scores"]["overall"]["accuracy"] == 6 / 8
    assert condition["averages"]["groups"]["strict"]["accuracy"] == 0.0  # no answer has the tag of the strict score
