"""Packs: within both budgets, everybody once, nobody for ever, the same every time, and well filled."""

import json
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa.training.config import PackingSettings, TokenBudget
from casa.training.packed_dataset import Packer

BUDGET = TokenBudget(50, 400)


@dataclass(frozen=True)
class Item:
    number: int
    text_tokens: int
    image_tokens: int
    held_bytes: int = 0


ITEMS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 400)), max_size=60).map(
    lambda sizes: [Item(number, text, image) for number, (text, image) in enumerate(sizes)]
)


def packer_of(budget, buffer=256, patience=16, **choice):
    return Packer(PackingSettings(budget=budget, buffer_size=buffer, patience=patience, **choice))


def run(items, buffer, patience, packer=None):
    packer = packer or packer_of(BUDGET, buffer, patience)
    packs = []
    for item in items:
        packer.add(item)
        if packer.is_full:
            packs.append(packer.pack())
    while len(packer):
        packs.append(packer.pack())
    return packs


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.integers(1, 20), st.integers(0, 5))
def test_every_item_is_packed_once_within_both_budgets(items, buffer, patience):
    packs = run(items, buffer, patience)
    assert sorted(item.number for pack in packs for item in pack) == list(range(len(items)))
    for pack in packs:
        assert pack
        assert sum(item.text_tokens for item in pack) <= BUDGET.text
        assert sum(item.image_tokens for item in pack) <= BUDGET.image
        assert [item.number for item in pack] == sorted(item.number for item in pack)
    assert packs == run(items, buffer, patience)


@settings(max_examples=100, deadline=None)
@given(ITEMS, st.integers(1, 20), st.integers(0, 5))
def test_an_item_waits_for_as_many_packs_as_items_stand_before_it_and_its_patience_at_most(items, buffer, patience):
    packer = packer_of(BUDGET, buffer, patience)
    bound, packed = {}, 0
    for item in items:
        packer.add(item)
        bound[item.number] = packed + len(packer) + patience
        if packer.is_full:
            packed += 1
            for out in packer.pack():
                assert packed <= bound[out.number]


def test_the_oldest_goes_even_if_it_fits_badly():
    packer = packer_of(BUDGET, 4)
    for item in [Item(0, 50, 1), Item(1, 25, 200), Item(2, 25, 200)]:
        packer.add(item)
    assert [item.number for item in packer.pack()] == [0]
    assert [item.number for item in packer.pack()] == [1, 2]


def test_full_packs_go_first_until_the_oldest_has_waited_for_too_long():
    packer = packer_of(BUDGET, 9, patience=2)
    for item in [Item(0, 10, 100), Item(1, 30, 100), Item(2, 5, 400), Item(3, 50, 0), Item(4, 5, 400)]:
        packer.add(item)
    packs = [[item.number for item in packer.pack()] for _ in range(4)]
    assert packs == [[2], [3], [0, 1], [4]]


def test_who_has_waited_too_long_goes_before_who_fits_better():
    for patience, second in ((0, 1), (9, 3)):
        packer = packer_of(BUDGET, 9, patience)
        for item in [Item(0, 25, 200), Item(1, 5, 10), Item(2, 24, 195), Item(3, 25, 200)]:
            packer.add(item)
        assert packer.pack()[1].number == second


def test_exactly_full_is_not_too_full():
    packer = packer_of(TokenBudget(3, 30), 9)
    for number in range(6):
        packer.add(Item(number, 1, 10))
    assert [len(packer.pack()), len(packer.pack()), len(packer.pack())] == [3, 3, 0]


@settings(max_examples=50, deadline=None)
@given(ITEMS, st.integers(0, 60))
def test_a_packer_goes_on_from_its_state(items, cut):
    whole, first = run(items, 5, 2), packer_of(BUDGET, 5, 2)
    packs = []
    for item in items[:cut]:
        first.add(item)
        if first.is_full:
            packs.append(first.pack())
    second = packer_of(BUDGET, 5, 2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())), first.waiting)
    assert packs + run(items[cut:], 5, 2, second) == whole


def test_what_no_pack_holds_is_refused():
    with pytest.raises(ValueError, match="51 text and 0 image tokens"):
        packer_of(BUDGET).add(Item(0, 51, 0))


def test_a_better_choice_is_looked_for_where_much_is_left():
    """Largest first would take 0 and 1, and leave a tenth; 0, 2 and 3 leave nothing."""
    packer = packer_of(BUDGET, 9)
    for item in [Item(0, 5, 200), Item(1, 5, 160), Item(2, 5, 120), Item(3, 5, 80)]:
        packer.add(item)
    assert [item.number for item in packer.pack()] == [0, 2, 3]
    assert [item.number for item in packer.pack()] == [1]


def test_bytes_fill_the_buffer_too():
    packer = packer_of(BUDGET, 9, buffer_mb=100 / 2**20)
    for number in range(3):
        assert not packer.is_full
        packer.add(Item(number, 20, 100, held_bytes=40))
    assert packer.is_full
    assert [item.number for item in packer.pack()] == [0, 1]
    assert not packer.is_full
    again = packer_of(BUDGET, 9, buffer_mb=40 / 2**20)
    again.load_state_dict(packer.state_dict(), packer.waiting)
    assert again.is_full
