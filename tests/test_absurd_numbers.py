"""Numbers that no option can mean: each is refused by name when the option is given, not hours later."""

import inspect
import math
from typing import Literal

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from longrl.algorithms import EntropyControl, KLControl, MovingReference, TaskNormalized
from longrl.algorithms.algorithm import Algorithm
from longrl.algorithms.corrections import GeometricMask, OffPolicySequenceMask, TwoSidedMask
from longrl.algorithms.distillation import Distillation
from longrl.algorithms.losses import BoundedK3, Constant, DualClipped, SoftGated, StaleClipped
from longrl.algorithms.preferences import Preference, SimPO, SmoothedDPO
from longrl.algorithms.sequence_surrogates import SequenceDualClipped
from longrl.callbacks.checkpoint import Checkpoint
from longrl.callbacks.evaluation import EvaluationReport
from longrl.callbacks.frame_order import FrameOrder
from longrl.callbacks.generations import Generations
from longrl.callbacks.rollout import RolloutCallback
from longrl.callbacks.terminal_view import TerminalView
from longrl.callbacks.watchdog import Watchdog
from longrl.chat.endpoint import Budget, Decoding, Endpoint
from longrl.commands.serve import ServerOptions
from longrl.datamodules.loading.curriculum import Curriculum
from longrl.datamodules.loading.learning_progress import LearningProgress
from longrl.datamodules.loading.mixing import DataSource
from longrl.datamodules.loading.pass_rates import PassRates
from longrl.datamodules.loading.schedules import Schedule
from longrl.datamodules.loading.teacher_view import TeacherView
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.opening import MediaLimits
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.subtitles import Subtitles
from longrl.datamodules.selection import Coverage, KeyFrames, Motion
from longrl.diffusion.diffusion_module import DiffusionModule
from longrl.diffusion.objectives import BestOfGroup, DiffusionDPO, DiffusionNFT
from longrl.diffusion.old_policy import OldPolicySettings
from longrl.diffusion.picture_grids import PictureGrids
from longrl.diffusion.prompt_files import PromptFiles
from longrl.diffusion.rewards.clip import ClipScore
from longrl.diffusion.rewards.generation import MotionAmount
from longrl.diffusion.rewards.ocr import OcrMatch
from longrl.diffusion.rollout_callback import DiffusionRolloutCallback
from longrl.diffusion.sampler import DiffusionSampling
from longrl.diffusion.sd3 import SD3Family
from longrl.diffusion.steps import CPS, FlowSDE
from longrl.diffusion.wan import WanFamily
from longrl.diffusion.windows import RandomWindow, SlidingWindow
from longrl.engines.hf import HFEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.evaluation.benchmark import EvaluationConfig
from longrl.evaluation.endpoint_policy import EndpointPolicy
from longrl.evaluation.local_policy import LocalPolicy
from longrl.evaluation.own_answers import ChoiceRules
from longrl.models.ema import EMASettings
from longrl.models.fewer_tokens import FewerTokens
from longrl.models.lora import LoRASettings
from longrl.models.qwen3_vl import Qwen3VLFamily
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.text import TextFamily
from longrl.models.vila import VilaFamily
from longrl.modules.consistency import Consistency
from longrl.modules.local_teacher import LocalTeacher
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.policy import PolicyModule
from longrl.modules.server_teacher import ServerTeacher
from longrl.pipeline import config as pipeline
from longrl.planning.run_plan import PlanOptions
from longrl.rewards.judge import Judge
from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.rewards.remote import RemoteScorer
from longrl.rewards.reward_model import RewardModel
from longrl.rewards.reward_sum import RewardSum, RewardTerm
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.types import SamplingParams

TEXT = TextFamily("m")
REWARD = RewardSum([RewardTerm("longrl.rewards.accuracy")])
ENDPOINT = Endpoint(model="m")
CLASSES = [
    (Endpoint, {"model": "m"}), (Decoding, {}), (Budget, {}), (ServerOptions, {}), (PlanOptions, {}),
    (pipeline.SplitOptions, {}), (pipeline.CaptionOptions, {}), (pipeline.TimelineOptions, {}),
    (pipeline.QuestionOptions, {}), (pipeline.ValidateOptions, {}), (pipeline.RewriteOptions, {}),
    (pipeline.FilterOptions, {}), (pipeline.ExportOptions, {}), (pipeline.PipelineConfig, {"videos": "v", "out": "o"}),
    (KLControl, {"target": 0.1}), (EntropyControl, {"target": 0.1}), (MovingReference, {}), (TaskNormalized, {}),
    (EMASettings, {}), (LoRASettings, {}), (Algorithm, {}), (DualClipped, {}), (BoundedK3, {}),
    (SoftGated, {}), (SequenceDualClipped, {}), (StaleClipped, {"stale_low": 0.5, "stale_high": 1.0}),
    (TwoSidedMask, {}), (GeometricMask, {}), (OffPolicySequenceMask, {"max_kl": 0.5}),
    (Constant, {"max_completion_tokens": 8}), (SamplingParams, {}), (OptimizerSettings, {}),
    (Distillation, {}), (LocalTeacher, {"family": TEXT}),
    (PolicyModule, {"family": TEXT}), (TextFamily, {"model": "m"}), (Qwen2_5_VLFamily, {"model": "m"}),
    (Qwen3VLFamily, {"model": "m"}), (FewerTokens, {"model": "m", "max_kept_tokens": 9}),
    (VilaFamily, {"model": "m"}), (MRSPStrategy, {}),
    (LongVideoReason, {"family": TEXT}), (VideoSampling, {}),
    (PassRates, {}), (LearningProgress, {}), (Curriculum, {"pass_rates": PassRates()}),
    (Schedule, {"steps": [0], "values": [8.0]}),
    (KeyFrames, {}), (Motion, {}), (Coverage, {}), (Subtitles, {}), (MediaLimits, {}), (DecodeLimits, {}),
    (TeacherView, {}), (ServerTeacher, {"urls": "http://127.0.0.1:1", "family": TEXT}),
    (RolloutCallback, {"reward": REWARD}), (Watchdog, {}), (Checkpoint, {}), (Generations, {}), (TerminalView, {}),
    (EvaluationReport, {}), (HFEngine, {}), (VLLMEngine, {}), (VLLMServerEngine, {"urls": "http://127.0.0.1:1"}),
    (RewardTerm, {"function": "longrl.rewards.accuracy"}), (RewardSum, {"terms": REWARD.terms}),
    (Judge, {"endpoint": ENDPOINT, "cache_dir": "c"}), (RewardModel, {"folder": "f"}),
    (RemoteScorer, {"endpoint": ENDPOINT, "cache_dir": "c"}), (CosineLength, {"max_completion_tokens": 8}),
    (SoftOverlong, {"max_completion_tokens": 8, "buffer_tokens": 2}), (LocalPolicy, {"family": TEXT}),
    (EndpointPolicy, {"endpoint": ENDPOINT}), (EvaluationConfig, {"policy": None, "out": "o"}),
    (DiffusionSampling, {}), (FlowSDE, {}), (CPS, {}), (DiffusionNFT, {}), (DiffusionDPO, {}), (BestOfGroup, {}),
    (OldPolicySettings, {}),
    (RandomWindow, {}), (SlidingWindow, {}), (SD3Family, {"model": "m"}), (WanFamily, {"model": "m"}),
    (DiffusionModule, {"family": SD3Family("m")}), (DiffusionRolloutCallback, {"reward": REWARD}),
    (Preference, {}), (SmoothedDPO, {}), (SimPO, {}), (ChoiceRules, {}),
    (FrameOrder, {}), (Consistency, {}),
    (PictureGrids, {}), (PromptFiles, {}), (ClipScore, {"folder": "f"}), (MotionAmount, {}), (OcrMatch, {}),
]  # fmt: skip
"""Everything with numbers that a user sets, and what it cannot do without. Its options are found by themselves."""
KINDS = ("int", "float", "int | None", "float | None", "int | Literal['auto']", "PoolFrames")
VALUES = ("-1", "0", ".nan", ".inf", "-.inf", "1e30", str(10**30), "")


def numbers_of(made):
    """Name and kind of the options that are a number."""
    for option in inspect.signature(made).parameters.values():
        kind = option.annotation if isinstance(option.annotation, str) else getattr(option.annotation, "__name__", "")
        if kind in KINDS:
            yield option.name, eval(kind, {"Literal": Literal, "PoolFrames": int})


def given(made, base, name, kind, text):
    """Gives an option as a user does, whose text becomes a number of the option's kind first."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        value = parser.parse_args([f"--{name}={text}"])[name]
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return made(**(base | {name: value}))


BELOW_0 = """
seed init_seed RewardTerm.weight right_short right_full wrong_short wrong_full exceeded num_threads
ChoiceRules.wrong_below min_reward
"""
"""Options that may be below 0."""
ZERO = """
seed init_seed RewardTerm.weight right_short right_full wrong_short wrong_full exceeded retries backoff_s
max_backoff_s start_timeout_s recover_timeout_s max_staleness transfer_port input_price output_price max_calls
Budget.max_tokens max_cost workspace_gib text_tokens
kv_cache_gib launch_us feature_cache_gib feature_cache_disk_gib feature_cache_bytes feature_cache_disk_bytes num_workers
cached_media max_held_mib num_cards min_clip_s scene_threshold length_slack max_answer_words min_steps
FilterOptions.num_samples blind_samples limit_s RewardSum.time_limit_s PictureGrids.every_n_steps
warn_without_signal_after max_resample_rounds bypass_old_logp_below max_grad_norm warmup_steps lr weight_decay decay
dropout top_k temperature noise_level kl_coef entropy_coef EntropyControl.lowest clip_low clip_high correction_cap
max_mismatch max_mean_mismatch
max_length_ratio max_similarity right_from eval_share sft_share blind_share max_blind_share max_missing_share
max_failed_share max_skipped_share TwoSidedMask.low GeometricMask.low stale_low stale_high max_kl Distillation.coef
sft_coef low retry_after memory bonus ratio margin flat_steps decay_per_step max_decay imitation
ChoiceRules.wrong_below min_reward quality_weight generation_weight gamma label_smoothing
detail_frames still_share min_gap_s Coverage.threshold max_depth
"""
"""Options that may be 0: none of it, switched off, or the least of a measure."""
ENDLESS = """
clip_low clip_high correction_cap advantage_limit bound limit max_grad_norm max_mismatch max_mean_mismatch
bypass_old_logp_below limit_s silent_s every_n_minutes max_s max_decode_s TwoSidedMask.high GeometricMask.high
stale_low stale_high
"""
"""Limits that may be infinite, which is none."""


def may_be(made, name, text):
    """What a new option is held to until it is named above."""
    if text in ("", ".nan", "-.inf"):
        return False
    named = {"-1": BELOW_0, "0": ZERO, ".inf": ENDLESS}.get(text)
    return named is None or not {name, f"{made.__name__}.{name}"}.isdisjoint(named.split())


def is_taken(made, base, name, kind, text):
    """True if an option takes a value; a refusal must name it."""
    try:
        given(made, base, name, kind, text)
    except ValueError as refusal:
        if name not in str(refusal):
            raise AssertionError(f"{made.__name__} refuses {name}={text} with {refusal}") from refusal
        return False
    return True


@pytest.mark.parametrize(("made", "base"), CLASSES, ids=[made.__name__ for made, _ in CLASSES])
def test_a_number_that_an_option_cannot_mean_is_refused_by_name(made, base):
    made(**base)
    options = list(numbers_of(made))
    taken = [(name, text) for name, kind in options for text in VALUES if is_taken(made, base, name, kind, text)]
    assert options
    assert [f"{name}={text}" for name, text in taken if not may_be(made, name, text)] == []


@pytest.mark.parametrize(
    ("name", "make", "values"),
    [
        ("betas", lambda value: OptimizerSettings(betas=value), [(-1.0, 0.9), (0.9, 1.0), (math.nan, 0.9)]),
        ("span_s", lambda value: VideoSampling(span_s=value), [(-1.0, 2.0), (2.0, 1.0), (math.nan, 1.0)]),
        ("save", lambda value: Watchdog(limits_s={"save": value}), [-1.0, math.nan]),
        ("frames", lambda value: EvaluationConfig(None, "o", frames=value), [[0], [-1], [4, 4]]),
        ("steps", lambda value: Schedule(value, [8.0, 16.0]), [[0, 0], [0, -1], [1, 2], [5, 0]]),
        ("values", lambda value: Schedule([0], [value]), [-1.0, 0.0, math.nan, math.inf]),
        ("weights", lambda value: LongVideoReason(TEXT, [DataSource("s", value)]), [-1, 0, math.nan, math.inf]),
    ],
)
def test_numbers_within_an_option(name, make, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            make(value)
