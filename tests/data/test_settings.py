"""The data block of a recipe: closed, typed, and refused by name."""

import pytest

from casa.data import DataSettings, Shard, SourceSettings, parse_data_settings
from casa.errors import UserError


def test_plain_values_become_settings():
    values = {"sources": [{"path": "x.jsonl", "weight": 2, "columns": {"image": "photo"}, "root": None}], "shuffle": 0}
    source = SourceSettings("x.jsonl", weight=2.0, columns={"image": "photo"})
    assert parse_data_settings(values) == DataSettings((source,), shuffle=0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"source": []}, "Unknown key 'source' in data; did you mean 'sources'?"),
        ({}, "data lacks the key 'sources'"),
        ({"sources": []}, r"data.sources is \[\]; it must be one entry or more"),
        (
            {"sources": [{"path": "x", "wieght": 2}]},
            r"Unknown key 'wieght' in data.sources\[0\]; did you mean 'weight'?",
        ),
        ({"sources": [{"path": "x", "weight": 0}]}, r"data.sources\[0\].weight is 0.0; it must be above 0"),
        ({"sources": [{"path": "x", "shape": "lava"}]}, r"data.sources\[0\].shape is 'lava'; did you mean 'llava'?"),
        ({"sources": [{"path": "x", "shape": "zzz"}]}, "choose from auto, chat"),
        ({"sources": [{"path": " "}]}, "a file, a folder, a glob or hub:owner/name"),
        ({"sources": [{"path": 3}]}, r"data.sources\[0\].path must be text, not 3"),
        ({"sources": [{"path": "x", "root": 3}]}, r"data.sources\[0\].root must be text, not 3"),
        ({"sources": [{"path": "x", "columns": {"image": 3}}]}, r"columns.image must be text, not 3"),
        ({"sources": [{"path": "x", "outside": 1}]}, "must be true or false, not 1"),
        ({"sources": [{"path": "x", "fps": "nan"}]}, "give a finite number"),
        ({"sources": "x.jsonl"}, "data.sources must be a list"),
        ({"sources": [{"path": "x"}], "exhausted": "again"}, "choose from repeat, leave, stop"),
        ([], "data must be a block of keys and values"),
    ],
)
def test_what_makes_no_sense_is_refused_by_place(values, sentence):
    with pytest.raises(UserError, match=sentence):
        parse_data_settings(values)


def test_a_shard_numbers_all_readers():
    shards = [Shard(rank, 3, worker, 2) for rank in range(3) for worker in range(2)]
    assert [shard.index for shard in shards] == list(range(6))
    assert {shard.count for shard in shards} == {6}


@pytest.mark.parametrize("numbers", [(1, 1), (-1, 1), (0, 0), (0, 1, 2, 2), (0, 1, 0, 0)])
def test_a_shard_that_cannot_be_is_refused(numbers):
    with pytest.raises(UserError):
        Shard(*numbers)
