"""The next token from logits made by hand: every setting does what it says, and no more."""

from collections import Counter
from itertools import permutations

import pytest
import torch

from casa.errors import UserError
from casa.streaming import Sampling
from casa.streaming.sampling import decode
from casa.testing import tiny_casa

LOGITS = torch.tensor([1.0, 3.0, 2.5, 0.0, 2.0, -1.0])
STOPS = frozenset([3])
DRAWS = 300


def drawn(sampling, logits=LOGITS, **settings):
    """How often each token comes up."""
    generator = torch.Generator().manual_seed(0)
    return Counter(sampling.pick(logits, [], generator, **settings) for _ in range(DRAWS))


def picked(sampling, logits=LOGITS, said=(), **settings):
    return sampling.pick(logits, list(said), torch.Generator(), **settings)


def test_greedy_takes_the_best():
    assert set(drawn(Sampling())) == {1}


def test_top_k_keeps_the_k_best():
    assert set(drawn(Sampling(temperature=1.0, top_k=2))) == {1, 2}


def test_top_p_keeps_the_fewest_that_reach_it():
    # 0.46, 0.28, 0.17, ...: two of them reach 0.6
    assert LOGITS.softmax(-1)[1] < 0.6 < LOGITS.softmax(-1)[[1, 2]].sum()
    assert set(drawn(Sampling(temperature=1.0, top_p=0.6))) == {1, 2}


@pytest.mark.parametrize("temperature", [0.5, 1, 1.0, 3.0])
def test_frequencies_are_the_softmax_of_the_logits_over_the_temperature(temperature):
    """A whole number is a temperature too."""
    found = drawn(Sampling(temperature=temperature))
    for token, chance in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        # four standard deviations; the seed is fixed
        assert abs(found[token] / DRAWS - chance) <= 4 * (chance * (1 - chance) / DRAWS) ** 0.5, token


@pytest.mark.parametrize(("earlier", "said"), [([], [4, 2, 1, 0, 4, 2]), ([4, 2, 1, 0], [4, 2]), ([4, 2, 1, 4], [2])])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_no_run_is_said_twice(earlier, said, temperature):
    """4 2 1 was said, be it in captions before: after 4 2 no 1 comes, though its logit is largest."""
    sampling = Sampling(temperature=temperature, no_repeat_ngram_size=3)
    generator = torch.Generator().manual_seed(0)
    found = {sampling.pick(LOGITS, said, generator, STOPS, earlier) for _ in range(DRAWS // 3)}
    assert 1 not in found
    assert 2 in found
    assert picked(Sampling(), said=said, earlier=earlier) == 1
    assert picked(Sampling(no_repeat_ngram_size=3, memory=4), said=said, earlier=earlier) == 1, "too long ago"


def test_each_saying_costs_less_the_older_it_is():
    """0.5 per saying, 0.5 less at every token: 1 was said 0 and 2 tokens ago, 2 was said 1 token ago."""
    sampling = Sampling(repetition=0.5, decay=0.5)
    penalties = {1: 0.5 * (1 + 0.25), 2: 0.5 * 0.5}
    for token, penalty in penalties.items():
        for slack, wanted in ((1e-3, token), (-1e-3, 5)):
            logits = torch.full((6,), -9.0)
            logits[token], logits[5] = 0.0, -penalty - slack
            assert picked(sampling, logits, [2, 1], earlier=[1], stops=STOPS) == wanted
    # and drawing, too: both are as likely once the penalty has been taken
    logits = torch.tensor([-30.0, penalties[1], penalties[2], -30.0, 0.0, -30.0])
    warm = Sampling(temperature=1.0, repetition=0.5, decay=0.5)
    generator = torch.Generator().manual_seed(0)
    found = Counter(warm.pick(logits, [2, 1], generator, STOPS, [1]) for _ in range(DRAWS))
    assert all(found[token] == pytest.approx(100, abs=30) for token in (1, 2, 4))


@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.3), (1.0, 0.25), (-0.5, -0.1)])
def test_penalties_are_openais(presence, frequency):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, with counts of what this caption has said, all of it."""
    said = [1, 2, 1, 1, 4] + [1] * 100
    counts = torch.tensor([float(said.count(token)) for token in range(len(LOGITS))])
    wanted = LOGITS - counts * frequency - (counts > 0) * presence
    sampling = Sampling(temperature=1.0, presence_penalty=presence, frequency_penalty=frequency)
    seen = []
    generator = torch.Generator()
    for seed in range(40):
        token = sampling.pick(LOGITS, said, generator.manual_seed(seed), earlier=[0, 0, 0])
        plain = Sampling(temperature=1.0).pick(wanted, [], generator.manual_seed(seed))
        seen.append((token, plain))
    assert all(token == plain for token, plain in seen)
    greedy = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    assert picked(greedy, said=said) == int(wanted.argmax())


def test_stopping_is_no_repetition():
    logits = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0])
    assert picked(Sampling(repetition=5.0), logits, [3, 3, 3], stops=STOPS) == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bias", [50, 50.0])
def test_a_bias_on_the_stop_says_less_or_more(temperature, bias):
    assert set(drawn(Sampling(temperature, stop_bias=bias), stops=STOPS)) == {3}
    eager = torch.tensor([1.0, 3.0, 2.5, 9.0, 2.0, 9.0])
    assert not {3, 5} & set(drawn(Sampling(temperature, stop_bias=-bias), eager, stops=frozenset([3, 5])))
    assert picked(Sampling(), eager, stops=STOPS) == 3


def test_a_bias_is_added_exactly():
    for bias, wanted in ((2.999, 1), (3.001, 3)):
        assert picked(Sampling(stop_bias=bias), stops=STOPS) == wanted
    assert picked(Sampling(stop_bias=50.0)) == 1, "without a stop there is nothing to add it to"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.0}, "whole"),
        ({"no_repeat_ngram_size": 1.5}, "whole"),
        ({"top_p": 0.0}, "top_p"),
        ({"decay": 1.0}, "decay"),
        ({"repetition": -0.1}, "repetition"),
    ],
)
def test_settings_that_cannot_be(settings, word):
    with pytest.raises(UserError, match=word):
        Sampling(**settings)


class Scripted:
    """Says what it is given, and keeps the logits from which it was to choose."""

    def __init__(self, tokens):
        self.left, self.last, self.seen = list(tokens), 0, []

    @property
    def is_open(self):
        return bool(self.left)

    def take(self, logits):
        self.seen.append(logits.clone())
        self.last = self.left.pop(0)
        return not self.left


@torch.no_grad()
@pytest.mark.parametrize("drop_ended", [True, False])
@pytest.mark.parametrize("lengths", list(permutations((1, 2, 4))), ids=str)
def test_texts_of_a_batch_go_on_as_each_alone_whichever_ends_first(lengths, drop_ended):
    model = tiny_casa().eval()
    said = [[5 + 7 * row + at for at in range(length)] for row, length in enumerate(lengths)]
    prompts = torch.tensor([[3, 9, 4], [17, 8, 30], [6, 6, 50]])
    together = [Scripted(tokens) for tokens in said]
    for _ in decode(model, {"input_ids": prompts}, model.new_cache(), together, drop_ended=drop_ended):
        pass
    for row, text in enumerate(together):
        alone = Scripted(said[row])
        list(decode(model, {"input_ids": prompts[row : row + 1]}, model.new_cache(), [alone]))
        assert not text.left
        torch.testing.assert_close(torch.stack(text.seen), torch.stack(alone.seen), rtol=1e-10, atol=1e-10)
