"""GRPO-CARE's consistency: who earns the bonus, from which tokens, and in a step of the module."""

import dataclasses
import math

import pytest
import torch

from longrl.algorithms import Algorithm, MovingReference, group_centered
from longrl.modules.consistency import (
    Consistency,
    answer_likelihood,
    answer_span,
    answer_tokens,
    consistency_bonus,
    right_completions,
)
from longrl.modules.mini_batches import flatten_groups
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.types import Batch, Completion, Group
from tests.modules.test_policy import train
from tests.tiny import plain_model, row, separate_logps, text_family


@pytest.mark.parametrize(
    ("accuracy", "likelihood", "bonus"),
    [
        # As the lines of GRPO-CARE's trainer give them, with the options of its script: 0.5, at most 0.95, margin 0.01.
        ([1.0, 1.0, 1.0, 0.0], [0.9, 0.5, 0.8, 0.99], [0.5, 0.0, 0.5, 0.0]),
        ([1.0, 0.0, 0.0, 0.0], [0.1, 0.9, 0.9, 0.9], [0.5, 0.0, 0.0, 0.0]),
        ([1.0, 1.0, 0.0, 0.0], [0.99, 0.96, 0.1, 0.1], [0.5, 0.5, 0.0, 0.0]),
        ([1.0, 1.0, 1.0, 1.0], [0.7, 0.69, 0.705, 0.6], [0.5, 0.5, 0.5, 0.0]),
        ([0.9, 0.3, 0.6, 0.2], [0.5, 0.9, 0.4, 0.9], [0.45, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]),
        # Without an answer to be found there is no bonus and no part in the mean; unknown accuracy is not right.
        ([1.0, 1.0, 1.0, 0.0], [math.nan, 0.5, 0.4, 0.9], [0.0, 0.5, 0.0, 0.0]),
        ([math.nan, 1.0, 0.0, 0.0], [0.9, 0.2, 0.9, 0.9], [0.0, 0.5, 0.0, 0.0]),
    ],
)
def test_the_bonus_is_that_of_the_authors_code(accuracy, likelihood, bonus):
    values = torch.tensor([accuracy], dtype=torch.float64)
    right = right_completions(values, torch.ones(1, 4, dtype=torch.bool))
    earned = consistency_bonus(values, right, torch.tensor([likelihood]).double(), margin=0.01, most=0.95)
    torch.testing.assert_close(0.5 * earned, torch.tensor([bonus], dtype=torch.float64))


def test_completions_that_could_not_be_judged_are_not_right():
    accuracy = torch.tensor([[1.0, 1.0, 0.2]])
    assert right_completions(accuracy, torch.tensor([[True, False, True]])).tolist() == [[True, False, False]]
    assert right_completions(accuracy, torch.tensor([[False, False, True]])).tolist() == [[False, False, True]]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>red</think><answer>B</answer>", "B"),
        ("It is so.</think>\n<answer>\n the red circle \n</answer>", "the red circle"),
        ("<answer>A</answer><think>\u00e9\u4e2d\U0001f600</think><answer>\u4e2d\u00e9 ok</answer>", "\u4e2d\u00e9 ok"),
        ("<think><answer>A</answer>", "A"),
        ("<think>a</think><answer>B", None),
        ("<think>a</think><answer> </answer>", None),
        ("no tags", None),
    ],
)
@pytest.mark.parametrize("cut", ["as the tokenizer does", "by characters"])
def test_the_answers_tokens_are_found_however_the_text_was_cut(text, answer, cut):
    """A policy may sample other tokens for a text than the tokenizer would."""
    tokenizer = text_family().tokenizer
    pieces = [text] if cut == "as the tokenizer does" else list(text)
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    span = answer_span(tokenizer, ids)
    if answer is None:
        assert span is None
        return
    found = tokenizer.decode(ids[slice(*span)])
    assert answer in found
    inner = tokenizer.decode(ids[span[0] + 1 : span[1] - 1])
    assert answer not in inner or len(answer) < len(inner), "no token more than needed"
    assert len(found) <= len(answer) + (0 if cut == "by characters" else 12)


def test_likelihoods_are_geometric_means_over_the_sampled_tokens_of_the_answer():
    family = text_family()
    texts = ["<think>x</think><answer>B</answer>", "nothing", "<answer>A or B</answer>"]
    completions = []
    for number, text in enumerate(texts):
        ids = family.encode_response(text)
        if number == 2:  # between its turns it was shown something
            shown = torch.tensor([7, 8, 9])
            sampled = torch.tensor([False] * 3 + [True] * len(ids))
            completions.append(
                Completion(torch.cat([shown, ids]), torch.zeros(len(ids)), text, "stop", sampled=sampled)
            )
        else:
            completions.append(Completion(ids, torch.zeros(len(ids)), text, "stop"))
    index, in_answer = answer_tokens(family.tokenizer, completions)
    assert len(index) == sum(completion.num_sampled for completion in completions)
    logp = -torch.rand(len(index), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = answer_likelihood(logp, index, in_answer, 3)
    for number in (0, 2):
        mine = (index == number) & in_answer
        assert mine.any()
        torch.testing.assert_close(found[number], logp[mine].mean().exp())
    assert found[1].isnan()
    ids = completions[2].token_ids[3:]
    assert family.tokenizer.decode(ids[in_answer[index == 2]]).strip(" <>") == "A or B"


@pytest.mark.parametrize("moving", [None, MovingReference(alpha=0.5, every_n_steps=1)], ids=["still", "moving"])
def test_a_step_of_the_module_adds_the_bonus_by_its_reference_alone(moving):
    """The update is that of groups whose rewards had it, and there is no KL term."""
    family = text_family()
    prompts = [family.render(row(name), question) for name, question in (("a", "Which one?"), ("b", "What? " * 4))]
    texts = [
        ["<think>so</think><answer>B</answer>", "<think>hm, well</think><answer>B</answer>", "<answer>A</answer>"],
        ["<think>no</think><answer>A or B</answer>", "nothing", "<think>yes</think><answer>A or B</answer>"],
    ]
    accuracy = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    groups = []
    for prompt, said, right in zip(prompts, texts, accuracy, strict=True):
        ids = [family.encode_response(text) for text in said]
        completions = [
            Completion(one, torch.zeros(len(one)), text, "stop") for one, text in zip(ids, said, strict=True)
        ]
        groups.append(Group(prompt, completions, right.clone(), {"accuracy": right}, torch.ones(3, dtype=torch.bool)))

    # By hand: the reference is the policy before its first step.
    ids = [[completion.token_ids for completion in group.completions] for group in groups]
    logp = separate_logps(plain_model(family.build(), family), prompts, ids)
    index, in_answer = answer_tokens(family.tokenizer, [one for group in groups for one in group.completions])
    likelihood = answer_likelihood(logp.detach(), index, in_answer, 6).view(2, 3)
    settings = Consistency(bonus=0.5, margin=0.0, most=1.0)
    wanted = accuracy.clone()
    for group, (right, likely) in enumerate(zip(accuracy.bool(), likelihood, strict=True)):
        wanted[group] += 0.5 * (right & (likely >= likely[right].mean()))
    assert 0 < (wanted > accuracy).sum() < 4, "some right completions earn it and some do not"

    def stepped(consistency, rewards):
        given = [dataclasses.replace(group, rewards=one) for group, one in zip(groups, rewards, strict=True)]
        following = None if consistency is None else moving
        algorithm = Algorithm(advantage=group_centered, kl_coef=0.0, moving_reference=following)
        policy = PolicyModule(text_family(), algorithm, OptimizerSettings(lr=1e-3), consistency=consistency)
        return policy, train(policy, Batch(prompts, groups=given))

    policy, seen = stepped(settings, accuracy)
    plain, expected = stepped(None, wanted)
    assert policy.reference is not None
    assert plain.reference is None
    for name, gradient in expected.gradients[0].items():
        torch.testing.assert_close(seen.gradients[0][name], gradient, rtol=1e-5, atol=1e-7)
    (logged,) = seen.metrics
    assert logged["train/consistent_share"] == pytest.approx((wanted > accuracy).sum().item() / 4)
    assert logged["train/answer_likelihood"] == pytest.approx(float(likelihood[accuracy.bool()].mean()), rel=1e-4)
    assert "train/kl_ref" not in logged
    assert "train/consistent_share" not in expected.metrics[0]


def test_the_bonus_is_a_part_for_advantages_that_look_at_each():
    family = text_family()
    prompt = family.render(row("a"), "Which one?")
    texts = ("<answer>B</answer>", "<think>x</think><answer>B</answer>", "<answer>A</answer>")
    ids = [family.encode_response(text) for text in texts]
    completions = [Completion(one, torch.zeros(len(one)), text, "stop") for one, text in zip(ids, texts, strict=True)]
    right = torch.tensor([1.0, 1.0, 0.0])
    parts = {"accuracy": right}
    group = Group(prompt, completions, 2 * right, parts, right >= 0, part_weights={"accuracy": 2.0})
    flat = flatten_groups([group], torch.device("cpu"))
    logp = torch.cat([torch.full((len(one),), -0.1 * (1 + n)) for n, one in enumerate(ids)])
    found = Consistency(bonus=0.5, margin=0.0).score(flat, logp, family.tokenizer)
    assert found.earned.tolist() == [[1.0, 0.0, 0.0]]
    sums = sum(found.flat.part_weights[name][:, None] * values for name, values in found.flat.parts.items())
    assert found.flat.rewards.tolist() == sums.tolist() == [[2.5, 2.0, 0.0]]
    # On a device without numbers: no GPU is waited for.
    meta = torch.device("meta")
    unknown = Consistency().score(flatten_groups([group], meta), logp.to(meta), family.tokenizer)
    assert unknown.flat.rewards.is_meta
    with pytest.raises(ValueError, match="'consistency' to the reward, which has one of that name"):
        Consistency().check_parts(["accuracy", "consistency"])


def test_a_reward_that_does_not_say_what_is_right_is_refused():
    with pytest.raises(ValueError, match=r"model\.consistency compares .* 'accuracy' .* got brevity; name the part so"):
        Consistency().check_parts(["brevity"])
