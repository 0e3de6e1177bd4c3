"""Benchmarks of configs/eval/ from records as they are released to rows, prompts, scores and figures.

Wordings were copied by hand from the released code that each config names; scores are worked out by hand. That the
rules score as the released functions do (vision-x-nyu/thinking-in-space 51e089c, TencentARC/TimeLens 5d90c06, lmms-eval
75571cfe, CG-Bench f826608) was compared on 31,000 generated answers; the odd ones among them stand here.
"""

from dataclasses import replace

import pytest

from longrl.commands.evaluate import parse_evaluation
from longrl.datamodules import rows as row_functions
from longrl.datamodules.loading.selected_media import shown_frames
from longrl.datamodules.media.sampling import VideoSampling, in_parts
from longrl.datamodules.rows.question_rows import make_rows
from longrl.evaluation import benchmark_figures, benchmark_rules
from longrl.evaluation.answering import Answer
from longrl.evaluation.benchmark_report import figures_table
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.evaluation.mmmu_rule import video_mmmu_score
from longrl.evaluation.outcomes import judge_answers, make_outcome
from longrl.evaluation.samples import records_of, sample_lines
from longrl.types import Completion, Row
from tests.datamodules.rows import benchmark_records as released
from tests.evaluation.presets import read_preset
from tests.runs import ROOT


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """`read_preset` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return read_preset


def scored(rows, texts, config):
    """Outcome of one answer to each row."""
    answers = {n: Answer(texts=[text], num_completion_tokens=[1], finish_reasons=["stop"], input="", prompt_hash="",
                         num_prompt_tokens=1, num_media_tokens=None, frame_indices=[], frame_times=[])
               for n, text in enumerate(texts)}  # fmt: skip
    judged = judge_answers(rows, answers, config.breakdowns, rule=config.protocol.scoring_rule())
    return make_outcome("video", rows, answers, judged, {}, figures=config.protocol.figures_function())


def rule(function, text, row):
    return function(Completion((), (), text, "stop"), row)


# ---- temporal grounding ----


def test_charades_sta(preset):
    config, rows, render = preset("charades_sta", {
        "data/charades/charades_sta_test.txt": "\n".join(released.CHARADES) + "\n", "data/charades/v/A1B2C.mp4": 32,
    })  # fmt: skip
    assert [(row.id, row.answer, row.task) for row in rows] == [
        ("A1B2C-0", "2 to 6.5 seconds", "temporal_iou"), ("A1B2C-1", "0 to 4 seconds", "temporal_iou"),
    ]  # fmt: skip
    assert render(rows[0]).text == (
        "Please find the visual event described by a sentence in the video, determining its starting and ending times. "
        "The format should be: 'The event happens in the start time - end time'. For example, The event 'person turn a "
        "light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: a person opens a "
        "window. Please return its start time and end time."
    )
    # 2..6.5 against 2..5: 3 / 4.5; 0..4 against 4..8: nothing.
    outcome = scored(rows, ["The event happens in the 5.0 - 2.0", "It starts at 0:04 and ends at 0:08"], config)
    assert outcome.figures == pytest.approx({"R@0.3": 50, "R@0.5": 50, "R@0.7": 0, "mIoU": 100 / 3})
    assert outcome.summary.lenient_graded["temporal_iou"]["mIoU"]["overall"].accuracy == 0.0  # "5 to 2" is no interval
    hub = {"video": "A1B2C.mp4", "caption": "a person opens a window", "timestamp": [2.0, 6.5]}
    (row,) = make_rows([hub], row_functions.charades_sta_row, "/m")
    assert (row.answer, row.metadata["asked"], row.videos) == (
        "2 to 6.5 seconds", "a person opens a window", ("/m/A1B2C.mp4",),
    )  # fmt: skip
    for line, message in (("A1B2C 2.0##x", "must be a line 'video"), ("A1B2C 6.0 6.0##x", "two increasing seconds")):
        (error,) = make_rows([{"line": line}], row_functions.charades_sta_row, None)
        assert message in str(error)


def test_timelens(preset):
    videos = released.timelens()
    charades = {"A1B2C": videos.pop("A1B2C")}
    config, rows, render = preset("timelens", {
        "data/timelens/charades-timelens.json": charades,
        "data/timelens/activitynet-timelens.json": {"v_abcdefghijk": videos["v_abcdefghijk"]},
        "data/timelens/qvhighlights-timelens.json": {"abc_60.0_210.0": videos["abc_60.0_210.0"]},
        "data/timelens/videos/charades/A1B2C.mp4": 32,
    })  # fmt: skip
    assert [row.category for row in rows] == ["charades", "charades", "activitynet", "qvhighlights"]
    prompt = render(rows[0])
    assert prompt.text == (
        "Please find the visual event described by the sentence 'a person opens a window', determining its starting "
        "and ending times. The format should be: 'The event happens in <start time> - <end time> seconds'."
    )
    assert len(prompt.frame_indices[0]) == 16  # 8 s at 2 per second
    family = config.policy.family
    assert (family.min_pixels, family.max_video_tokens) == (64 * 32 * 32, 14336)
    said = ["The event happens in 2.4 - 6.4 seconds.", "no idea", "0:05 to 0:09, or 10 - 20", "12 and 28"]
    outcome = scored(rows, said, config)
    # 2..6 of 2..6.5; nothing; 5..9 of 5..9; 12..28 of 10..30.
    assert outcome.figures["mIoU"] == pytest.approx(25 * (4 / 4.5 + 0 + 1 + 0.8))
    assert outcome.figures["charades: R@0.7"] == 50
    assert outcome.figures["qvhighlights: mIoU"] == pytest.approx(80)
    whole = {
        "source": "cosmo_cap",
        "video_path": "x/1.mp4",
        "duration": 9,
        "events": [{"query": "a.", "span": [[1, 2]]}],
    }
    one = {"video_path": "charades/A1B2C.mp4", "query": "a window", "span": [[1.0, 2.0]]}
    train, harness = make_rows([whole, one], row_functions.timelens_rows, "/m")
    assert (train.category, train.answer, train.videos) == ("cosmo_cap", "1 to 2 seconds", ("/m/x/1.mp4",))
    assert (harness.category, harness.id) == ("charades", "A1B2C-1")


@pytest.mark.parametrize(
    ("text", "timelens", "charades"),
    [
        ("The event happens in 10.0 - 20.0 seconds.", 1.0, 1.0),
        ("From 10 to 20", 1.0, 1.0),
        ("20 - 10 seconds; start", 0.0, 1.0),  # turned round by one, not by the other
        ("<think>1 - 2</think>it happens in 10 - 20", 1.0, 1.0),
        ("0:10 - 0:20", 1.0, 1.0),
        ("Starting time: 10 seconds.\nEnding time: 20 seconds", 1.0, 1.0),
        ("start: 10, end: 20", 1.0, 0.0),  # the first number of one line only
        ("10.4 - 20.4", 1.0, 9.6 / 10.4),  # one in whole seconds
        ("12", 0.0, 0.0),
    ],
)
def test_rules_of_grounding_read_times_as_released_code_does(text, timelens, charades):
    row = Row("r", "When?", "10 to 20 seconds", task="temporal_iou")
    assert rule(benchmark_rules.timelens_iou, text, row) == pytest.approx(timelens)
    assert rule(benchmark_rules.charades_sta_iou, text, row) == pytest.approx(charades)


# ---- space ----


def test_vsi_bench():
    letters = ["A. left", "B. right"]
    kinds = [("object_counting", "4", None), ("object_rel_direction_easy", "B", letters),
             ("object_rel_direction_medium", "B", letters), ("object_rel_direction_hard", "A", letters)]  # fmt: skip
    records = [released.vsi_bench(*kind, number) for number, kind in enumerate(kinds)]
    rows = make_rows(records, row_functions.vsi_bench_row, "data")
    config, data = parse_evaluation([f"--config={ROOT / 'configs' / 'eval' / 'vsi_bench.yaml'}"])
    assert [(row.task, row.answer) for row in rows] == [
        ("mra", "4"), ("multiple_choice", "B"), ("multiple_choice", "B"), ("multiple_choice", "A"),
    ]  # fmt: skip
    assert rows[0].videos == ("data/scannet/scene0.mp4",)
    question = "These are frames of a video.\nHow many lamps are in this room?\n"
    blind = replace(data.renderer, family=ChatReader(64), blind=True)
    assert blind(rows[0]).text == f"{question}Please answer the question using a single word or phrase."
    assert blind(rows[1]).text == (
        f"{question}Options:\nA. left\nB. right\nAnswer with the option's letter from the given choices directly."
    )
    # 5 for 4 is off by a quarter: within 0.5, 0.45 .. 0.25. "right" is no letter by the rule, but read by our own.
    outcome = scored(rows, ["5.", "B.", "right", "b"], config)
    assert outcome.figures == pytest.approx(
        {"average of tasks": (60 + 100 / 3) / 2, "object_counting": 60, "object_rel_direction": 100 / 3}
    )
    robust = outcome.summary.lenient_scores
    assert [robust[kind].accuracy for kind, *_ in kinds[1:]] == [1.0, 1.0, 0.0]
    assert outcome.summary.lenient_graded["mra"]["MRA"]["overall"].accuracy == pytest.approx(0.5)  # the paper's "<"
    assert outcome.to_dict()["protocol_figures"] == dict(outcome.figures)
    (line, *_) = sample_lines(outcome, rows, {})
    assert records_of(line)[0]["accuracy_by_rule"] == pytest.approx(0.6)
    del line["accuracy_by_rule"]  # as before rules could score by degrees
    assert records_of(line)[0]["accuracy_by_rule"] == 1.0
    assert figures_table([outcome]).rows[0] == ["average of tasks", "46.7"]
    assert [record["accuracy_by_rule"] for (record,) in outcome.records.values()] == pytest.approx([0.6, 1, 0, 0])


@pytest.mark.parametrize(
    ("text", "score"), [("10", 1.0), ("10.5", 1.0), ("15", 0.1), ("ten", 0.0), (" 10", 0.0), ("10 m", 1.0)]
)
def test_the_rule_of_vsi_bench_reads_the_first_word(text, score):
    assert rule(benchmark_rules.vsi_bench_score, text, Row("r", "?", "10", task="mra")) == pytest.approx(score)


# ---- clues ----


def test_cg_bench(preset):
    config, rows, render = preset("cg_bench", {
        "data/cg_bench/cgbench_mini.json": [released.cg_bench(), released.cg_bench(qid=8)],
        "data/cg_bench/abc.mp4": 40,  # 10 s
    })  # fmt: skip
    assert [row.id for row in rows] == ["7/long", "7/clue", "7/grounding", "8/long", "8/clue", "8/grounding"]
    assert rows[2].answer == "1 to 2 seconds, 3 to 4 seconds"
    assert {name: rows[0].metadata[name] for name in ("domain", "sub_category", "duration")} == {
        "domain": "Life Record", "sub_category": "Entity Perception", "duration": "40 ~ 50",
    }  # fmt: skip
    clue = render(rows[1])
    # 32 frames would be more than the clues have: each of their eight once.
    assert clue.frame_indices == ((4, 5, 6, 7, 12, 13, 14, 15),)
    assert clue.text == (
        "You will be provided with sampled frames from a video, along with a multiple-choice question that includes a "
        "question and several answer options.\nYour task is to analyze the provided frames, infer the most plausible "
        "answer based on the visual information.\nIf the video does not provide enough information, infer the answer "
        "based on the options available and still provide a result. Therefore, In all cases, an answer must be given.\n"
        'Only output the answer in the following format:\n\n```json\n{"result": "option"}\n```\n\n'
        "The 'option' is the uppercase letter corresponding to your answer.\n\n"
        "A total of 8 frames are sampled. Their corresponding timestamps are:\n\n"
        "1.0, 1.25, 1.5, 1.75, 3.0, 3.25, 3.5, 3.75\n\n"
        "Question: What colour is the kite?\n\nA:Blue\nB:Red\nC:Green\n\n"
    )
    long = render(rows[0])
    assert len(long.frame_indices[0]) == 40
    assert 'The "option" is the uppercase letter' in long.text
    where = render(rows[2]).text
    assert '```json\n{"result": [[start1, end1], [start2, end2], ...]}\n```\n\nIn this output format' in where
    block = "```json\n{}\n```".format
    said = [block('{"result": "B"}'), "B", block('{"result": [[1, 2], [3, 4]]}'),
            block('{"result": A}'), "A or B", "1.0 to 3.0"]  # fmt: skip
    outcome = scored(rows, said, config)
    # Of the second question 1..3 against 1..2 and 3..4: a third, so it reaches 0.1, 0.2 and 0.3.
    assert outcome.figures == pytest.approx(
        {"long-acc": 50, "clue-acc": 100, "CRR": 50, "mIoU": 200 / 3, "rec@IoU": 80, "acc@IoU": 50}
    )
    assert list(outcome.summary.breakdowns) == ["domain", "duration", "sub_category"]
    (error,) = make_rows([released.cg_bench(clue_intervals=[[4, 4]])], row_functions.cg_bench_clue_row, None)
    assert "'clue_intervals' must be [start, end] in increasing seconds" in str(error)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('```json\n{"result": [[1, 3], [2, 4]]}\n```', 1 - 1 / 3),  # joined: 1..4, of which 2..3 is no clue
        ('```json\n{"result": "1 to 2"}\n```', 0.5),  # no list of spans: all numbers of the text
        ("1, 2 and 3", 0.0),  # an odd number of them
        ('```json\n{"result": [[2, 1]]}\n```', 0.0),
        ("nothing", 0.0),
    ],
)
def test_the_rule_of_cg_bench_reads_intervals_as_released_code_does(text, score):
    row = Row("r", "?", "1 to 2 seconds, 3 to 4 seconds", task="temporal_iou")
    assert rule(benchmark_rules.cg_bench_score, text, row) == pytest.approx(score)


# ---- knowledge ----


def test_video_mmmu(preset):
    config, rows, render = preset("video_mmmu", {
        "data/video_mmmu/perception_video.json": released.video_mmmu("Perception"),
        "data/video_mmmu/comprehension_video.json": released.video_mmmu("Comprehension"),
        "data/video_mmmu/adaptation_video.json": released.video_mmmu("Adaptation"),
    })  # fmt: skip
    assert [(row.id, row.task) for row in rows] == [
        ("dev_Art_Theory_3/perception", "multiple_choice"), ("dev_Art_Theory_3/comprehension", "multiple_choice"),
        ("dev_Art_Theory_3/adaptation", "multiple_choice"), ("dev_Art_Theory_3/question only", "multiple_choice"),
        ("test_Math_12/adaptation", "exact"), ("test_Math_12/question only", "exact"),
    ]  # fmt: skip
    assert [row.metadata["discipline"] for row in rows] == ["Art"] * 4 + ["Science"] * 2
    assert rows[4].metadata["aliases"] == ["3.429", "3.43"]
    assert rows[3].videos == ("data/video_mmmu/question_only/dev_Art_Theory_3_image.mp4",)
    blind = replace(render, blind=True)
    options = "\nA. hue\nB. value\nC. chroma"
    learn = "You should watch and learn the video content. Then apply what you learned to answer the following "
    end = "The image for this question is at the end of the video.\n"
    assert [blind(row).text for row in rows[1:5]] == [
        f"What does the lecture call this?{options}\nPlease ignore the Quiz question in last frame of the video.",
        f"{learn}multi-choice question. {end}<image 1> Which one is shown?{options}",
        f"<image 1> Which one is shown?{options}",
        f"{learn}open-ended question. {end}<image 1> What is x?",
    ]
    outcome = scored(rows, ["C", "A", "The answer is C", "B", "So x = 24/7", "x = 3"], config)
    assert outcome.figures == pytest.approx({
        "overall": 75, "adaptation": 100, "comprehension": 0, "perception": 100, "question only": 0,
        "gain of knowledge": 100, "wrong to right": 100,
    })  # fmt: skip
    image = {**released.video_mmmu("Adaptation")["Adaptation"]["0"], "image 1": "a.png"}
    _, alone = make_rows([image], row_functions.video_mmmu_gain_rows, "/m")
    assert (alone.images, alone.videos, alone.category) == (("/m/a.png",), (), "question only")


def test_the_gain_of_knowledge_is_relative_to_what_was_left_to_learn():
    before, after = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0]
    records = [
        {"id": f"{n}/{track}", "category": track, "sample": 0, "accuracy_by_rule": value, "task": "multiple_choice"}
        for track, values in (("question only", before), ("adaptation", after))
        for n, value in enumerate(values)
    ]
    figures = benchmark_figures.video_mmmu(records)
    assert figures["gain of knowledge"] == pytest.approx(100 * (75 - 50) / (100 - 50))
    assert (figures["wrong to right"], figures["right to wrong"]) == (100, 50)


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("Total is 4.\nThe result equals 12.970", "12.97", 1.0),
        ("a = 1,200", "1200", 1.0),
        ("It is called interference of waves", "interference", 1.0),
        ("The value is 13", "12.97", 0.0),
        ("12.97 is close, the answer is 13", "12.97", 0.0),  # only what stands behind a lead
        ("", "4", 0.0),
    ],
)
def test_open_answers_of_video_mmmu_follow_mmmus_rule(text, gold, score):
    assert rule(video_mmmu_score, text, Row("r", "?", gold, task="exact")) == score


def test_mmvu(preset):
    config, rows, render = preset("mmvu", {"data/mmvu/validation.json": [released.mmvu(), released.MMVU_OPEN]})
    choice, free = rows
    assert (choice.answer, choice.task, choice.category) == ("B", "multiple_choice", "Science")
    assert (free.answer, free.task, free.metadata["kind"]) == ("Interference", "open_ended", "open-ended")
    assert choice.videos == ("data/mmvu/videos/Chemistry/0.mp4",)
    blind = replace(render, blind=True)
    assert blind(choice).text == (
        "\nQuestion: Which effect is shown?\nA: one\nB: two\nC: three\nD: four\nE: five\n\n"
        "Answer the given multiple-choice question step by step. Begin by explaining your reasoning process clearly. "
        "Conclude by stating the final answer using the following format: 'Therefore, the final answer is: $LETTER' "
        "(without quotes), where $LETTER is one of the options. Think step by\nstep before answering."
    )
    assert blind(free).text.startswith("\nQuestion: Which effect is shown?\n\nAnswer the given question step by step.")
    assert config.sampling.temperature == 1.0
    judge = config.reward.terms[0].function
    asked = judge.request(free, "It is interference.")
    assert [message["role"] for message in asked.messages] == ["system", "user"]
    assert asked.messages[1]["content"] == (
        "Question: Which effect is shown?\n\nGround Truth Answer: Interference\n\nModel Response to the Question: "
        "It is interference."
    )
    assert "exact same technique" in asked.messages[0]["content"]
    of_options, of_choice = (message["content"] for message in judge.request(choice, "B").messages)
    assert 'str value "A" "B"' in of_options
    assert of_choice.startswith("Question: Which effect is shown?\n\nOptions:\nA: one\nB: two\n")
    rewards = [("multiple_choice", 1.0), ("open_ended", 0.0), ("open_ended", 1.0)]
    records = [{"id": str(n), "task": task, "rewards": {"accuracy": value}} for n, (task, value) in enumerate(rewards)]
    assert benchmark_figures.mmvu(records) == pytest.approx(
        {"accuracy": 200 / 3, "multiple choice": 100, "open ended": 50}
    )
    assert benchmark_figures.mmvu([{**record, "rewards": {}} for record in records]) == {}


# ---- parts of a video ----


def test_parts_of_a_video_share_the_frames_by_their_length():
    sampling = in_parts(VideoSampling(fps=None, num_frames=8, min_frames=1, max_frames=8), [[10, 11], [20, 23]])
    assert sampling.at_s == pytest.approx((10.25, 10.75, 20.25, 20.75, 21.25, 21.75, 22.25, 22.75))
    chosen = shown_frames(object(), Row("r", "?", "A"), "v.mp4", sampling, None, None)
    assert chosen.sampling is sampling  # whatever a selection would choose
    few = in_parts(sampling, [[0, 1], [50, 149]], 4)
    assert few.at_s == pytest.approx((0.5, 66.5, 99.5, 132.5))  # int(4 * 0.99) of the second, one of the first
    with pytest.raises(ValueError, match=r"each of parts_s must be two increasing seconds"):
        in_parts(sampling, [[3, 3]])
    with pytest.raises(ValueError, match="parts_s must be a list"):
        in_parts(sampling, "1-2")
