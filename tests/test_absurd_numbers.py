"""Numbers that no option can mean: each is refused by name when the option is given, not hours later."""

import dataclasses
import math

import pytest

from longrl.algorithms.algorithm import Algorithm
from longrl.chat.endpoint import Budget, Decoding, Endpoint
from longrl.commands.serve import ServerOptions
from longrl.models.ema import EMASettings
from longrl.models.lora import LoRASettings
from longrl.pipeline import config as pipeline
from longrl.planning.run_plan import PlanOptions
from longrl.types import SamplingParams

CLASSES = [
    (Endpoint, {"model": "m"}), (Decoding, {}), (Budget, {}), (ServerOptions, {}), (PlanOptions, {}), (EMASettings, {}),
    (LoRASettings, {}), (Algorithm, {}), (SamplingParams, {}), (pipeline.SplitOptions, {}),
    (pipeline.CaptionOptions, {}), (pipeline.TimelineOptions, {}), (pipeline.QuestionOptions, {}),
    (pipeline.ValidateOptions, {}), (pipeline.RewriteOptions, {}), (pipeline.FilterOptions, {}),
    (pipeline.ExportOptions, {}),
]  # fmt: skip
ANY_SEED = ("seed", "init_seed")
OPTIONS = [
    pytest.param(made, base, item.name, value, id=f"{made.__name__}.{item.name}={value}")
    for made, base in CLASSES
    for item in dataclasses.fields(made)
    for kind in [str(item.type).partition(" ")[0]]
    if kind in ("int", "float") and item.name not in ANY_SEED
    for value in ([-1] if kind == "int" else [-1.0, math.nan])
]


@pytest.mark.parametrize(("made", "base", "name", "value"), OPTIONS)
def test_a_number_that_an_option_cannot_mean_is_refused_by_name(made, base, name, value):
    with pytest.raises(ValueError, match=name):
        made(**base, **{name: value})


def test_defaults_and_what_is_left_out_are_fine():
    for made, base in CLASSES:
        made(**base)
