"""Hub data sets through `datasets`: tried offline, on folders laid out like one."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casa.data import Shard, open_pictures, open_records, parse_data_settings
from casa.errors import UserError

ROWS = 23


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path_factory):
    """No progress bars, no network, a cache that goes away."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(root) -> Path:
    """A data set of three parquet files, in FineVision's shape."""
    data = root / "set" / "data"
    data.mkdir(parents=True)
    picture = (root / "a.png").read_bytes()
    for part, rows in enumerate((range(0, 9), range(9, 14), range(14, ROWS))):
        texts = [[{"user": str(row), "assistant": "yes"}] for row in rows]
        images = [[{"bytes": picture, "path": "a.png"}] for _ in rows]
        pq.write_table(pa.table({"images": images, "texts": texts}), data / f"train-{part:05}-of-00003.parquet")
    return root / "set"


def opened(folder: Path, shard: Shard | None = None, **rest: Any):
    values = {"sources": [{"path": f"hub:{folder}"}], "exhausted": "leave", **rest}
    return open_records(parse_data_settings(values), seed=3, shard=shard)


def names(records) -> list[int]:
    return [int(record.messages[0].parts[1].text) for record in records]


def test_rows_and_pictures_are_read(folder):
    records = list(opened(folder, shuffle=0))
    assert names(records) == list(range(ROWS))
    assert open_pictures(records[0])[0].getpixel((0, 0)) == (255, 0, 0)
    assert str(records[4].origin) == f"hub:{folder}:5"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_row_goes_to_one_reader(folder, world):
    seen = [name for rank in range(world) for name in names(opened(folder, Shard(rank, world)))]
    assert sorted(seen) == list(range(ROWS))


@pytest.mark.parametrize("shuffle", [0, 4])
@pytest.mark.parametrize("reader", [Shard(), Shard(1, 2)])
def test_resumed_anywhere_it_is_the_same_stream(folder, shuffle, reader):
    whole = names(opened(folder, reader, shuffle=shuffle))
    for stop in range(0, len(whole), 3):
        records = opened(folder, reader, shuffle=shuffle)
        seen = names([next(records) for _ in range(stop)])
        state = json.loads(json.dumps(records.state_dict()))
        records = opened(folder, reader, shuffle=shuffle)
        records.load_state_dict(state)
        assert seen + names(records) == whole


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be opened .*check its name, subset, split"):
        opened(tmp_path / "nowhere")
