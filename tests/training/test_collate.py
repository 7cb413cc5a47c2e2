"""The collator: one row, samples apart, pictures where they belong."""

import pytest
import torch

from casa.data.record import BadRecord, Origin, Picture
from casa.models.losses import IGNORE_INDEX
from casa.testing import tiny_processor
from casa.training.collator import PackCollator
from casa.training.config import TokenBudget
from casa.training.samples import SampleMaker, SizedPicture, TrainingSample

PROCESSOR = tiny_processor()
MAKE = SampleMaker(PROCESSOR, TokenBudget(1000, 1000))


def test_a_row_holds_samples_one_after_the_other(chat, picture):
    first = MAKE(chat(("user", picture(56, 28), "a"), ("assistant", "bc")))[0]
    second = MAKE(chat(("user", "d"), ("assistant", "e")))[0]
    third = MAKE(chat(("user", "f", picture(28, 28, 1), picture(28, 56, 2)), ("assistant", "g")))[0]
    batch = PackCollator(PROCESSOR)([first, second, third])
    lengths = [8, 6, 8]
    assert batch["input_ids"].tolist() == [[*first.ids, *second.ids, *third.ids]]
    assert batch["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
    assert batch["image_positions"].tolist() == [[0, 1], [0, 16], [0, 17]]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 4], [1, 2, 2], [1, 4, 2]]
    assert batch["pixel_values"].shape == (8 + 4 + 8, 3 * 14 * 14)
    learned = PROCESSOR.tokenizer.decode([label for label in batch["labels"][0].tolist() if label != IGNORE_INDEX])
    assert learned == "bc<end>e<end>g<end>"


def test_the_first_token_of_a_sample_is_never_learned():
    sample = TrainingSample((5, 6), (True, True), (), (), Origin("x", 1))
    # the blank picture's token stands last
    labels = [IGNORE_INDEX, 6, IGNORE_INDEX, 6, IGNORE_INDEX]
    assert PackCollator(PROCESSOR)([sample, sample])["labels"].tolist() == [labels]
    assert sample.learned == 1


def test_a_batch_without_pictures_gets_a_blank_one_behind_all_text(chat):
    sample = MAKE(chat(("user", "d"), ("assistant", "e")))[0]
    batch = PackCollator(PROCESSOR)([sample])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0]]
    assert batch["image_positions"].tolist() == [[0, 6]]
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert batch["labels"][0, -1] == IGNORE_INDEX


def test_a_picture_is_made_as_small_as_its_sample_says(chat, picture):
    maker = SampleMaker(PROCESSOR, TokenBudget(1000, 20))
    sample = maker(chat(("user", picture(224, 224), "a"), ("assistant", "b")))[0]
    batch = PackCollator(PROCESSOR)([sample])
    assert int(batch["image_grid_thw"].prod()) // 4 == sample.image_tokens == 16


def test_a_damaged_picture_is_named(chat, picture):
    whole = picture(112, 112)
    sample = MAKE(chat(("user", picture(), whole, "a"), ("assistant", "b")))[0]
    assert isinstance(whole.source, bytes)
    cut = SizedPicture(Picture(whole.source[: len(whole.source) // 2]), (8, 8), 16)
    broken = TrainingSample(sample.ids, sample.learn, sample.places, (sample.pictures[0], cut), sample.origin)
    with pytest.raises(BadRecord, match="Picture 2"):
        PackCollator(PROCESSOR).prepare(broken)


def test_labels_and_positions_are_whole_numbers(chat):
    batch = PackCollator(PROCESSOR)(MAKE(chat(("user", "d"), ("assistant", "e"))))
    for name in ("input_ids", "position_ids", "labels", "image_positions", "image_grid_thw"):
        assert batch[name].dtype == torch.int64
