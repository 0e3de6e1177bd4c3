"""configs/eval/ presets of published protocols against what the released code does with one question of its own.

Prompts, frames and options were copied by hand from lmms-eval 75571cfe, Long-RL 97abc84, Qwen3-VL 9658872 and
qwen-vl-utils 0.0.14.
"""

from dataclasses import replace

import pytest

from longrl.commands.evaluate import parse_evaluation
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.types import SamplingParams
from tests.datamodules.media.test_video import write
from tests.runs import ROOT

RECORD = {
    "question_id": "001-1", "videoID": "abc", "duration": "short", "domain": "Knowledge", "sub_category": "History",
    "task_type": "Counting Problem", "question": "How many balls are there?",
    "options": ["A. 1.", "B. Two.", "C. 3.", "D. None of them."], "answer": "B",
}  # fmt: skip
OPTIONS = "A. 1.\nB. Two.\nC. 3.\nD. None of them."
LMMS_EVAL = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    f"with only the letter (A, B, C, or D) of the correct option.\nHow many balls are there?\n{OPTIONS}\n"
)
LONG_RL = (
    "You are a helpful assistant. The user asks a question, and then you solves it.\n\nPlease first think deeply about "
    "the question based on the given video, and then provide the final answer. The reasoning process and answer are "
    "enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning process here "
    "</think> <answer> {} </answer>.\n\n Question: {}"
)
LMMS_EVAL_FRAMES = [
    0, 3, 6, 9, 12, 15, 19, 22, 25, 28, 31, 35, 38, 41, 44, 47, 51, 54, 57, 60, 63, 67, 70, 73, 76, 79, 83, 86, 89, 92,
    95, 99,
]  # fmt: skip


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Function (preset, record, with subtitles) -> its config, the prompt's text and the indices of its frames."""
    folder = tmp_path / "data" / "videomme"
    (folder / "subtitle").mkdir(parents=True)
    write(folder / "abc.mp4", 100, rate=25, size=(32, 32))
    monkeypatch.chdir(tmp_path)

    def ask(preset, record, subtitles=None):
        if subtitles:
            (folder / "subtitle" / "abc.srt").write_text(subtitles)
        config, data = parse_evaluation(
            [f"--config={ROOT / 'configs' / 'eval' / preset}.yaml", f"--data.media_root={folder}"]
        )
        row = data.row_functions[data.row_function](record, 0, str(folder))
        prompt = replace(data.renderer, family=ChatReader(64))(row)
        (indices,) = prompt.frame_indices
        (times,) = prompt.frame_times
        assert times == pytest.approx([index / 25 for index in indices])  # as released code counts them
        return config, data, prompt.text, list(indices)

    return ask


def test_lmms_evals_video_mme(asked):
    config, _, text, frames = asked("lmms_eval_video_mme", RECORD)
    assert text == LMMS_EVAL + "\nAnswer with the option's letter from the given choices directly."
    assert frames == LMMS_EVAL_FRAMES
    assert config.sampling == SamplingParams(1, 16, 0.0)
    family = config.policy.family
    assert (family.min_pixels, family.max_pixels) == (256 * 28 * 28, 768 * 28 * 28)
    assert family.max_video_tokens == 128_000 * 9 // 10
    assert not config.blind_baseline
    assert config.protocol.score_name == "letter rule of lmms-eval"


def test_lmms_evals_video_mme_with_subtitles(asked):
    """Of three lines two are on show at one of the 32 frames, as by its frame numbers."""
    lines = [("00:00:00,000", "00:00:00,200", "Hello."), ("00:00:00,410", "00:00:00,460", "Between frames."),
             ("00:00:02,000", "00:00:03,000", "There they are.")]  # fmt: skip
    font = '<font color="white" size=".72c">{}</font>'
    srt = "\n\n".join(f"{n}\n{start} --> {end}\n{font.format(said)}" for n, (start, end, said) in enumerate(lines, 1))
    _, _, without, _ = asked("lmms_eval_video_mme_subtitles", RECORD)
    heading = "This video's subtitles are listed below: \n"
    assert without == f"{heading}No subtitles available\n{LMMS_EVAL}The best answer is:"
    config, _, text, frames = asked("lmms_eval_video_mme_subtitles", RECORD, srt)
    assert text == f"{heading}Hello.\nThere they are.\n{LMMS_EVAL}The best answer is:"
    assert frames == LMMS_EVAL_FRAMES
    assert config.sampling == SamplingParams(1, 16, 0.0)


def test_long_rls_longvideo_reason(asked):
    record = {
        "problem_id": 1, "problem": f"How many balls are there?\n{OPTIONS}", "videos": "abc.mp4", "data_type": "video",
        "answer": "<answer>B</answer>",
    }  # fmt: skip
    config, data, text, frames = asked("long_rl_longvideo_reason", record)
    assert text == LONG_RL.format("answer here", record["problem"])
    assert frames == list(range(100))  # fewer than 512: all
    video = data.renderer.video
    assert (video.num_frames, video.moments, video.rounding, video.multiple_of) == (512, "ends", "down", 1)
    assert config.sampling.temperature == 0.0
    assert config.protocol.score_name == "exact letter of Long-RL"


def test_the_prompt_that_longvila_r1_was_trained_on_is_a_data_config():
    preset = ROOT / "configs" / "data" / "longvideo_reason_long_rl.yaml"
    import yaml

    values = yaml.safe_load(preset.read_text())
    letter = "the letter of your choice (A, B, C, or D)"
    assert values["question_template"] == LONG_RL.format(letter, "{problem}")


def test_qwens_video_mme(asked):
    config, data, text, frames = asked("qwen3_vl_video_mme", RECORD)
    assert text == (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nQuestion: How many balls are there?\n"
        f"{OPTIONS}\nThe best answer is:"
    )
    assert frames == [0, 14, 28, 42, 57, 71, 85, 99]  # 4 s at 2 per second
    assert config.sampling == SamplingParams(1, 32_768, 0.6, 0.95, 20)
    video, family = data.renderer.video, config.policy.family
    assert (video.fps, video.min_frames, video.max_frames) == (2.0, 4, 2048)
    assert (family.min_pixels, family.max_pixels) == (128 * 32 * 32, 768 * 32 * 32)
    assert family.max_video_tokens == 224 * 1024
    # A context of 256k holds the tokens of video and answer.
    assert config.policy.engine.max_length() == 224 * 1024 + 32_768
