"""The loss in chunks: the plain cross-entropy and its gradients, with few logits at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from casa.models.losses import IGNORE_INDEX, chunked_cross_entropy
from casa.testing import TinySample, as_packed, tiny_casa

T, D, V = 23, 8, 31


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (T,))
    labels[::3] = IGNORE_INDEX
    return hidden, labels, nn.Linear(D, V, bias=True, dtype=torch.float64)


def both(case, chunk, count=None):
    hidden, labels, head = case
    sizes = []

    def logits_of(part):
        sizes.append(len(part))
        return head(part)

    def run(loss):
        hidden.grad = None
        head.zero_grad()
        loss.backward()
        return loss.detach(), hidden.grad, head.weight.grad.clone(), head.bias.grad.clone()

    found = run(chunked_cross_entropy(hidden, labels, logits_of, chunk, count))
    total = F.cross_entropy(head(hidden), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    wanted = run(total / (count if count is not None else (labels != IGNORE_INDEX).sum()))
    return found, wanted, sizes


@pytest.mark.parametrize("chunk", [1, 4, 15, 100])
@pytest.mark.parametrize("count", [None, 7, torch.tensor(40)])
def test_loss_and_gradients_are_those_of_the_plain_one(case, chunk, count):
    found, wanted, sizes = both(case, chunk, count)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    # forward, and once more in the backward pass; never more than a chunk, and only learned tokens
    assert max(sizes) <= chunk
    assert sum(sizes) == 2 * 15


def test_nothing_to_learn_gives_zero_gradients_to_everything(case):
    hidden, labels, head = case
    loss = chunked_cross_entropy(hidden, torch.full_like(labels, IGNORE_INDEX), head, 4, 3)
    loss.backward()
    assert loss == 0
    assert float(head.weight.grad.abs().max()) == 0
    assert float(hidden.grad.abs().max()) == 0


def test_without_gradients_nothing_is_computed_twice(case):
    hidden, labels, head = case
    calls = []
    with torch.no_grad():
        chunked_cross_entropy(hidden, labels, lambda part: calls.append(len(part)) or head(part), 4)
    assert sum(calls) == 15


def test_half_precision_is_summed_in_single(case):
    hidden, labels, head = case
    loss = chunked_cross_entropy(hidden.bfloat16(), labels, head.bfloat16(), 4)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("method", ["casa", "insertion"])
def test_a_model_with_a_loss_chunk_never_holds_all_logits(method):
    samples = [TinySample((5, 9, 17, 4, 33, 8, 21), ((2, 2, 3),)), TinySample((7, 30, 11, 12, 9, 3))]
    inputs = as_packed(samples)
    labels = inputs["input_ids"].clone()
    model = tiny_casa(method=method).train()
    # float32, as transformers has it for the loss
    plain = model(**inputs, labels=labels)
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[:-1].numel()))
    model.loss_chunk = 3
    chunked = model(**inputs, labels=labels)
    chunked.loss.backward()
    assert chunked.logits is None
    assert max(sizes) == 3
    torch.testing.assert_close(chunked.loss.float(), plain.loss, rtol=1e-6, atol=1e-6)
    # first tokens of samples are nobody's to predict: of 13 tokens, 11 are learned
    assert sum(sizes) == 2 * 11


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 100])
@pytest.mark.parametrize("count", [None, 0, torch.tensor(0), torch.tensor(7)])
def test_nothing_to_learn_is_a_loss_of_zero_whatever_the_chunk(chunk, count):
    """Also where the logits are no numbers; every parameter in use has a gradient, which is zero."""
    for method in ("casa", "insertion"):
        model, inputs = tiny_casa(method=method).train(), TinySample((5, 9, 17), ((1, 2, 2),)).inputs()
        model.loss_chunk = chunk
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        labels[0, 0] = 5  # nobody's to predict
        how = {} if count is None else {"num_items_in_batch": count}
        loss = model(**inputs, labels=labels, **how).loss
        assert loss == 0
        loss.backward()
        reached = [p.grad for p in model.parameters() if p.grad is not None]
        assert model.get_output_embeddings().weight.grad is not None
        assert model.get_input_embeddings().weight.grad is not None
        assert not any(gradient.any() for gradient in reached)
        with torch.no_grad():
            model.get_output_embeddings().weight.fill_(torch.inf)
        if chunk is not None:
            assert model(**inputs, labels=labels, **how).loss == 0
