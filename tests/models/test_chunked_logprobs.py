import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longrl.algorithms import Distillation
from longrl.models.chunked_logprobs import chunked_scores
from longrl.models.kept_distributions import KeptDistributions
from longrl.models.teacher_targets import TeacherScores, TeacherSpan, TeacherTargets


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [7, 40, 10_000])
def test_slices_equal_one_float64_log_softmax_with_gradients(temperature, max_logits):
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    logp, entropy, _ = chunked_scores(hidden, weight, targets, temperature, max_logits)
    rows = torch.log_softmax((hidden.double() @ weight.double().T) / temperature, -1)
    torch.testing.assert_close(logp.double(), rows[range(9), targets], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(rows.exp() * rows).sum(-1), rtol=1e-5, atol=1e-6)
    coefficients = torch.linspace(-1, 2, 9)
    found = torch.autograd.grad((logp * coefficients).sum(), (hidden, weight))
    wanted = torch.autograd.grad((rows[range(9), targets] * coefficients).sum(), (hidden, weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_lm_head_in_float32_gives_what_computing_in_float32_gives(autocast):
    """Of hidden states and weights in bfloat16, forward and backward; autocast does not lower it again."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 50, (9,))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logp, _, _ = chunked_scores(hidden, weight, targets, max_logits=150, fp32=True)
        rounded, _, _ = chunked_scores(hidden, weight, targets, max_logits=150)
    exact_hidden, exact_weight = (each.detach().float().requires_grad_() for each in (hidden, weight))
    exact = torch.log_softmax(exact_hidden @ exact_weight.T, -1)[range(9), targets]
    torch.testing.assert_close(logp, exact, rtol=1e-6, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-2
    found = torch.autograd.grad(logp.sum(), (hidden, weight))
    wanted = torch.autograd.grad(exact.sum(), (exact_hidden, exact_weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=3e-2)


def test_no_rows_give_empty_tensors():
    logp, entropy, _ = chunked_scores(torch.zeros(0, 5), torch.zeros(11, 5), torch.zeros(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)


def test_temperature_zero_scores_like_one():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3, 5), torch.randn(11, 5), torch.tensor([1, 2, 3])
    assert torch.equal(*(chunked_scores(hidden, weight, targets, t)[0] for t in (0.0, 1.0)))


# ---- entropies with a gradient ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [7, 40, 10_000])
def test_entropies_carry_the_gradient_of_a_dense_one_if_asked(temperature, max_logits):
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    _, entropy, _ = chunked_scores(hidden, weight, targets, temperature, max_logits, entropy_gradient=True)
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    rows = torch.log_softmax((exact_hidden @ exact_weight.T) / temperature, -1)
    coefficients = torch.linspace(-1, 2, 9)
    found = torch.autograd.grad((entropy * coefficients).sum(), (hidden, weight))
    dense = -(rows.exp() * rows).sum(-1)
    wanted = torch.autograd.grad((dense * coefficients).sum(), (exact_hidden, exact_weight))
    torch.testing.assert_close(entropy.double(), dense, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


# ---- distances to a teacher ----

SIZES = {"same": 11, "smaller": 10, "larger": 14}
"""Rows of the teacher's head; the policy's has 11."""
DIVERGENCES = ["reverse_kl", "forward_kl", "jensen_shannon"]


def teacher_of(size, distillation, temperature, head_rows=11):
    """A teacher of the rows 0..3 of 9 and another of 5..8; row 4 has none. And their logits, [9, v] in float64."""
    generator = torch.Generator().manual_seed(3)
    common = min(size, head_rows)
    dense = torch.zeros(9, common, dtype=torch.float64)
    spans = []
    for rows, width in ((slice(0, 4), 6), (slice(5, 9), 3)):
        num_rows = rows.stop - rows.start
        hidden = torch.randn(num_rows, width, generator=generator)
        head = torch.randn(size, width, generator=generator)
        dense[rows] = (hidden.double() @ head.double()[:common].T) / temperature
        index = torch.randperm(num_rows, generator=generator)
        scores = TeacherScores(torch.zeros(num_rows), hidden=hidden[index.argsort()], lm_head=head)
        if distillation.top_k is not None:
            keep = KeptDistributions(distillation.top_k, head_rows)
            kept = keep.of_rows(scores.hidden, head, temperature, fp32=False, max_logits=20)
            scores = TeacherScores(torch.zeros(num_rows), top_ids=kept.top_ids, top_logp=kept.top_logp)
        spans.append(TeacherSpan(rows.start, index, scores))
    return TeacherTargets(tuple(spans), distillation.of_rows, temperature), dense


def dense_divergence(name, policy, teacher, beta=0.5):
    """[R] of two [R, V] logits, as the formulas say it."""
    q, p = policy.softmax(-1), teacher.softmax(-1)
    if name == "reverse_kl":
        return (q * (q.log() - p.log())).sum(-1)
    if name == "forward_kl":
        return (p * (p.log() - q.log())).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p.log() - m.log()) + (1 - beta) * q * (q.log() - m.log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_distances_are_those_of_dense_float64_distributions_with_gradients(name, size, temperature):
    """Of heads with fewer rows and with more, which are cut to those of both; of two teachers, and of none."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    teacher, dense = teacher_of(SIZES[size], Distillation(name), temperature)
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = (exact_hidden @ exact_weight.T)[:, : dense.shape[1]] / temperature
    expected = dense_divergence(name, logits, dense)
    expected = expected.where(torch.arange(9) != 4, 0.0)
    coefficients = torch.linspace(-1, 2, 9)
    wanted = torch.autograd.grad((expected * coefficients).sum(), (exact_hidden, exact_weight))
    plain = chunked_scores(hidden, weight, targets, temperature)
    assert plain.divergence is None
    for max_logits in (7, 50, 10_000):
        scores = chunked_scores(hidden, weight, targets, temperature, max_logits, teacher=teacher)
        torch.testing.assert_close(scores.divergence.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores.logp, plain.logp)
        found = torch.autograd.grad((scores.divergence * coefficients).sum(), (hidden, weight))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("top_k", [1, 4, 11])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_distances_by_the_likeliest_tokens_count_all_others_as_one(name, top_k, temperature):
    """Of all 11 tokens that is the whole vocabulary's."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    teacher, dense = teacher_of(11, Distillation(name, top_k=top_k), temperature)
    exact_hidden, exact_weight = (each.detach().double().requires_grad_() for each in (hidden, weight))
    logits = (exact_hidden @ exact_weight.T) / temperature
    ids = dense.topk(top_k, -1).indices

    def coarse(all_logits):
        """[9, k + 1] logits, the last of all others together; [9, 11] of all."""
        if top_k == 11:
            return all_logits
        chosen = torch.zeros(9, 11).scatter(-1, ids, 1.0).bool()
        rest = all_logits.exp().masked_fill(chosen, 0.0).sum(-1, keepdim=True).log()
        return torch.cat([all_logits.gather(-1, ids), rest], -1)

    expected = dense_divergence(name, coarse(logits), coarse(dense)).where(torch.arange(9) != 4, 0.0)
    coefficients = torch.linspace(-1, 2, 9)
    wanted = torch.autograd.grad((expected * coefficients).sum(), (exact_hidden, exact_weight))
    for max_logits in (7, 10_000):
        scores = chunked_scores(hidden, weight, targets, temperature, max_logits, teacher=teacher)
        torch.testing.assert_close(scores.divergence.double(), expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad((scores.divergence * coefficients).sum(), (hidden, weight))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_share_of_the_rows_has_the_teachers_of_its_rows():
    targets, _ = teacher_of(11, Distillation(), 1.0)
    hidden, weight, ids = torch.randn(9, 5), torch.randn(11, 5), torch.randint(0, 11, (9,))
    whole = chunked_scores(hidden, weight, ids, teacher=targets).divergence
    for rows in (slice(0, 3), slice(3, 6), slice(6, 9), slice(4, 5)):
        part = chunked_scores(hidden[rows], weight, ids[rows], teacher=targets.share(rows)).divergence
        torch.testing.assert_close(part, whole[rows])


@pytest.mark.parametrize("fp32", [False, True])
def test_a_teacher_is_multiplied_in_the_precision_of_the_policy(fp32):
    """Under autocast its hidden states are kept in bfloat16 unless heads are float32, which changes nothing."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 64), torch.randn(50, 64)
    ids = torch.zeros(9, dtype=torch.int64)
    distances = []
    with torch.autocast("cpu", torch.bfloat16):
        kept = KeptDistributions(None, 50).of_rows(hidden + 1, weight, 1.0, fp32).hidden
        assert kept.dtype == (torch.float32 if fp32 else torch.bfloat16)
        for own in (kept, hidden + 1):
            span = TeacherSpan(0, torch.arange(9), TeacherScores(torch.zeros(9), hidden=own, lm_head=weight))
            targets = TeacherTargets((span,), Distillation().of_rows, 1.0)
            distances.append(chunked_scores(hidden, weight, ids, fp32=fp32, teacher=targets).divergence)
    assert torch.equal(*distances)
    exact = dense_divergence("reverse_kl", (hidden @ weight.T).double(), ((hidden + 1) @ weight.T).double())
    error = (distances[0] - exact).abs().max()
    assert (error < 1e-4) == fp32


class LargestTensor(TorchDispatchMode):
    """Most numbers that a tensor of some operation has had."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return result


@pytest.mark.parametrize("top_k", [None, 3])
def test_no_tensor_has_a_number_for_every_row_and_token(top_k):
    """Of 40 rows and 97 tokens: forward and backward, of the policy and of the teacher."""
    hidden, weight = torch.randn(40, 2, requires_grad=True), torch.randn(97, 2, requires_grad=True)
    own, head = torch.randn(40, 3), torch.randn(97, 3)
    limit = 6 * 97
    with LargestTensor() as largest:
        scores = TeacherScores(torch.zeros(40), hidden=own, lm_head=head)
        if top_k is not None:
            kept = KeptDistributions(top_k, 97).of_rows(own, head, 1.0, False, max_logits=limit)
            scores = TeacherScores(torch.zeros(40), top_ids=kept.top_ids, top_logp=kept.top_logp)
        span = TeacherSpan(0, torch.arange(40), scores)
        teacher = TeacherTargets((span,), Distillation(top_k=top_k).of_rows, 1.0)
        ids = torch.zeros(40, dtype=torch.int64)
        found = chunked_scores(hidden, weight, ids, max_logits=limit, entropy_gradient=True, teacher=teacher)
        (found.divergence.sum() + found.entropy.sum()).backward()
    assert largest.numel <= limit
