"""Log-probabilities without the logits, against the plain formula."""

import torch

from katherine.likelihood import token_logprobs


def test_values_and_gradients_are_those_of_log_softmax_whatever_the_chunk():
    torch.manual_seed(0)
    weight, labels = torch.randn(50, 8), torch.randint(50, (7,))
    upstream = torch.rand(7)
    hidden = torch.randn(7, 8, requires_grad=True)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    (wanted,) = torch.autograd.grad(expected, hidden, upstream)
    for chunk in (1, 50, 120, 10_000):
        found = token_logprobs(hidden, weight, labels, chunk)
        (gradient,) = torch.autograd.grad(found, hidden, upstream)
        assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(gradient, wanted, atol=1e-5), chunk


def test_nothing_is_kept_where_no_gradient_is_wanted():
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    with torch.no_grad():
        found = token_logprobs(hidden, weight, torch.tensor([1, 2, 3]))
    assert not found.requires_grad
