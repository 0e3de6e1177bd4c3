import pytest
import torch

from longrl.models.chunked_logprobs import chunked_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [7, 40, 10_000])
def test_slices_equal_one_float64_log_softmax_with_gradients(temperature, max_logits):
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(0, 11, (9,))
    logp, entropy = chunked_logprobs(hidden, weight, targets, temperature, max_logits)
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
        logp, _ = chunked_logprobs(hidden, weight, targets, max_logits=150, fp32=True)
        rounded, _ = chunked_logprobs(hidden, weight, targets, max_logits=150)
    exact_hidden, exact_weight = (each.detach().float().requires_grad_() for each in (hidden, weight))
    exact = torch.log_softmax(exact_hidden @ exact_weight.T, -1)[range(9), targets]
    torch.testing.assert_close(logp, exact, rtol=1e-6, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-2
    found = torch.autograd.grad(logp.sum(), (hidden, weight))
    wanted = torch.autograd.grad(exact.sum(), (exact_hidden, exact_weight))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=3e-2)


def test_no_rows_give_empty_tensors():
    logp, entropy = chunked_logprobs(torch.zeros(0, 5), torch.zeros(11, 5), torch.zeros(0, dtype=torch.int64))
    assert logp.shape == entropy.shape == (0,)


def test_temperature_zero_scores_like_one():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(3, 5), torch.randn(11, 5), torch.tensor([1, 2, 3])
    assert torch.equal(*(chunked_logprobs(hidden, weight, targets, t)[0] for t in (0.0, 1.0)))
