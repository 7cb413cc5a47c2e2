"""Hub data sets through `datasets`: tried offline, on folders laid out like one."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from casa.data import Shard, open_pictures, open_records, parse_data_settings
from casa.errors import UserError
from casa.testing import tiny_processor
from casa.training.config import PackingSettings, TokenBudget
from casa.training.packed_dataset import DataPosition, PackedDataset, packed_dataloader
from casa.training.samples import SampleMaker

FILES = (9, 5, 9)  # rows in each
ROWS = sum(FILES)


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
    for part, count in enumerate(FILES):
        rows = range(sum(FILES[:part]), sum(FILES[:part]) + count)
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
    assert str(records[4].origin) == f"hub:{folder}#1:5"
    assert str(records[9].origin) == f"hub:{folder}#2:1"


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_row_goes_to_one_reader(folder, world):
    seen = [name for rank in range(world) for name in names(opened(folder, Shard(rank, world)))]
    assert sorted(seen) == list(range(ROWS))


@pytest.mark.slow
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


def file_order(rows: list[int]) -> list[int]:
    """The file of each row, runs of the same one once."""
    files = [sum(row >= sum(FILES[: n + 1]) for n in range(len(FILES))) for row in rows]
    return [file for n, file in enumerate(files) if n == 0 or files[n - 1] != file]


def test_files_come_in_another_order_each_epoch(folder):
    records = opened(folder, shuffle=2, exhausted="repeat")
    epochs = [names(islice(records, ROWS)) for _ in range(6)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(file_order(epoch[::2])) for epoch in epochs}) > 2
    kept = opened(folder, shuffle=0, exhausted="repeat")
    assert names(islice(kept, 2 * ROWS)) == [*range(ROWS)] * 2


def cut_off(path: Path) -> int:
    """The file without its end, where parquet says what is in it; how many rows can still be read."""
    path.write_bytes(path.read_bytes()[:-20])
    return 0


def spoilt(path: Path) -> int:
    """The file with its third row's page overwritten; how many rows can still be read: `datasets` reads ahead."""
    pq.write_table(pq.read_table(path), path, row_group_size=2)
    column = pq.read_metadata(path).row_group(1).column(0)
    data, start = bytearray(path.read_bytes()), column.dictionary_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    return 0


@pytest.mark.parametrize("damage", [cut_off, spoilt])
def test_a_damaged_file_costs_its_rest_and_nothing_else(folder, damage):
    kept = damage(folder / "data" / "train-00001-of-00003.parquet")
    before, behind = sum(FILES[:1]), sum(FILES[:2])
    records = opened(folder, shuffle=0)
    whole = names(records)
    assert whole == [*range(before + kept), *range(behind, ROWS)]
    assert records.report.counts == {"unreadable-file": 1}
    assert str(records.report.first[0][0]) == f"hub:{folder}#2:{kept + 1}"
    for stop in range(before - 1, before + kept + 3):
        records = opened(folder, shuffle=0)
        seen = names([next(records) for _ in range(stop)])
        state = json.loads(json.dumps(records.state_dict()))
        records = opened(folder, shuffle=0)
        records.load_state_dict(state)
        assert seen + names(records) == whole
        assert records.report.counts == {"unreadable-file": 1}
    with pytest.raises(UserError, match=rf"#2:{kept + 1}: The file cannot be read from here on"):
        names(opened(folder, shuffle=0, strict=True))


def test_a_lost_connection_costs_files_and_a_lack_of_memory_ends_the_run(folder, monkeypatch):
    import datasets

    def failing(error: BaseException):
        def iterate(*_: Any, **__: Any):
            raise error
            yield

        return iterate

    monkeypatch.setattr(datasets.IterableDataset, "iter", failing(ConnectionError("Server Disconnected")))
    records = opened(folder)
    assert list(records) == []
    assert records.report.counts == {"unreadable-file": len(FILES)}
    # each reader has a connection of its own, and says what it lost
    shared = [opened(folder, Shard(rank, 4)) for rank in range(4)]
    assert [len(list(records)) + records.report.total for records in shared] == [len(FILES)] * 4
    for error in (MemoryError(), UserError("It is told elsewhere."), KeyboardInterrupt()):
        monkeypatch.setattr(datasets.IterableDataset, "iter", failing(error))
        with pytest.raises(type(error)):
            list(opened(folder))


def test_lists_of_json_whose_keys_are_not_known_beforehand(root):
    """As LLaVA-Video-178K's are."""
    (root / "set").mkdir()
    turns = [[{"from": "human", "value": str(k)}, {"from": "gpt", "value": "Yes."}] for k in range(5)]
    (root / "set" / "train.json").write_text(json.dumps([{"conversations": entry} for entry in turns]))

    def asked(records) -> list[str]:
        return [record.messages[0].parts[0].text for record in records]

    assert asked(opened(root / "set", shuffle=0)) == [*"01234"]
    records = opened(root / "set", shuffle=0)
    seen = asked([next(records) for _ in range(3)])
    state = json.loads(json.dumps(records.state_dict()))
    records = opened(root / "set", shuffle=0)
    records.load_state_dict(state)
    assert seen + asked(records) == [*"01234"]


class Opened:
    """Opens the records in a reader's process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, shard: Shard):
        return opened(self.folder, shard, shuffle=4)


@pytest.mark.slow
def test_readers_in_processes_of_their_own(folder):
    """`datasets` sees that it is in one of a loader's processes, and must not deal the rows out once more."""
    budget = TokenBudget(40, 40)

    def loader(position: DataPosition):
        maker = SampleMaker(tiny_processor(), budget)
        stream = PackedDataset(Opened(folder), maker, PackingSettings(budget=budget, buffer_size=3))
        stream.position = position
        return packed_dataloader(stream, num_workers=2)

    whole, position = [], DataPosition(2)
    for number, batch in enumerate(loader(DataPosition(2))):
        whole.append(batch.origins)
        if number < 3:
            position.take(batch)
    rows = [f"hub:{folder}#{file}:{row}" for file, count in enumerate(FILES, 1) for row in range(1, count + 1)]
    assert Counter(origin for origins in whole for origin in origins) == Counter(rows)
    assert [batch.origins for batch in loader(position)] == whole[3:]


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot be opened .*check its name, subset, split"):
        opened(tmp_path / "nowhere")
