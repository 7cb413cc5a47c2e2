"""Places of pictures are a plain tensor to all who compute with them, and refuse to be mixed up."""

import copy
import io
import pickle

import pytest
import torch

from casa.errors import UserError
from casa.models.processing_casa import Places

PLACES = Places.of([(0, 2), (1, 5)])


def test_they_are_a_tensor():
    assert PLACES.shape == (2, 2)
    assert PLACES.dtype == torch.int64
    assert PLACES.tolist() == [[0, 2], [1, 5]]
    assert Places.of([]).shape == (0, 2)
    assert torch.equal(PLACES, torch.tensor([[0, 2], [1, 5]]))


@pytest.mark.parametrize(
    "change",
    [lambda p: p + torch.tensor([1, 0]), lambda p: p[:1], lambda p: p.clone(), lambda p: p[:, 0]],
    ids=range(4),
)
def test_what_is_computed_from_them_is_plain(change):
    assert type(change(PLACES)) is torch.Tensor


@pytest.mark.parametrize("join", [torch.cat, torch.stack, torch.concat])
def test_two_batches_are_not_joined_as_they_are(join):
    with pytest.raises(UserError, match="all texts at once"):
        join([PLACES, Places.of([(0, 1), (0, 2)])])


def test_joined_with_rows_of_their_own_they_are_right():
    joined = torch.cat([PLACES, Places.of([(0, 1)]) + torch.tensor([2, 0])])
    assert joined.tolist() == [[0, 2], [1, 5], [2, 1]]


def through_a_file(places):
    file = io.BytesIO()
    torch.save({"image_positions": places}, file)
    file.seek(0)
    return torch.load(file)["image_positions"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p)), through_a_file], ids=["copy", "pickle", "file"]
)
def test_copies_are_plain(copied):
    found = copied(PLACES)
    assert type(found) is torch.Tensor
    assert torch.equal(found, PLACES)
