"""Readers and streams: every sample once, bad records passed over and named, and a way back to any batch."""

import json
from dataclasses import replace
from itertools import islice

import pytest

from casa.data import open_records, parse_data_settings
from casa.data.record import Message, Origin, Picture, Record, Text
from casa.data.settings import Shard
from casa.errors import UserError
from casa.testing import tiny_processor
from casa.training.collator import PackCollator
from casa.training.config import PackingSettings, TokenBudget
from casa.training.packed_dataset import DataPosition, PackedDataset, PackReader, packed_dataloader
from casa.training.samples import SampleMaker
from tests.training.small_run import ListedRecords

PROCESSOR = tiny_processor()
BUDGET = TokenBudget(60, 40)
PACKING = PackingSettings(budget=BUDGET, buffer_size=6, patience=2)


@pytest.fixture(scope="module")
def records():
    """80 conversations of uneven length; every seventh is split in two, every eleventh answers nothing."""
    found = []
    for number in range(80):
        said = "" if number % 11 == 10 else "0123456789"[: 1 + number % 9]
        turns = [Message("user", (Text("q" * (1 + number * 7 % 13)),)), Message("assistant", (Text(said),))]
        if number % 7 == 6:
            turns = [*turns, Message("user", (Text("r" * 30),)), Message("assistant", (Text("s" * 20),))]
        found.append(Record(tuple(turns), Origin("made", number + 1)))
    return found


def reader(records, number=0, **choice):
    source = ListedRecords(records, repeat=False)
    maker = SampleMaker(PROCESSOR, BUDGET)
    return PackReader(source, maker, PackCollator(PROCESSOR), replace(PACKING, **choice), number), source, maker


def shown(batch):
    return batch.inputs["input_ids"].tolist()


def test_every_sample_is_seen_once_and_bad_records_are_named(records):
    read, source, maker = reader(records)
    batches = list(read)
    seen = [origin for batch in batches for origin in batch.origins]
    empty = {f"made:{number + 1}" for number in range(80) if number % 11 == 10 and number % 7 != 6}
    assert set(seen) == {f"made:{number + 1}" for number in range(80)} - empty
    assert len(seen) == maker.counts["samples"] > 80 - len(empty)
    assert {origin for origin, _ in source.refused} == empty
    for batch in batches:
        assert batch.facts["text_tokens"] <= BUDGET.text
        assert batch.facts["samples"] == len(batch.origins)
        assert batch.facts["learned"] == int((batch.inputs["labels"] != -100).sum())


@pytest.mark.slow
def test_it_goes_on_from_every_batch(records):
    batches = list(reader(records)[0])
    assert len(batches) > 10
    for number, batch in enumerate(batches):
        again, *_ = reader(records)
        again.load(batch.position)
        assert [shown(b) for b in again] == [shown(b) for b in batches[number + 1 :]]
    assert json.loads(batches[-1].position)["waiting"] == []


def test_it_goes_on_twice(records):
    batches = list(reader(records)[0])
    first, *_ = reader(records)
    first.load(batches[4].position)
    third = list(zip(first, range(3), strict=False))[-1][0]
    second, *_ = reader(records)
    second.load(third.position)
    assert [shown(b) for b in second] == [shown(b) for b in batches[8:]]


@pytest.mark.slow
def test_positions_stay_small(records):
    endless = ListedRecords(records)
    read = PackReader(endless, SampleMaker(PROCESSOR, BUDGET), PackCollator(PROCESSOR), PACKING)
    for batch, _ in zip(read, range(300), strict=False):
        saved = json.loads(batch.position)
        # at most what waits, and the records between two notes, are read again
        assert saved["read"] - saved["noted_at"] <= 32 + 6 * 30
        assert len(batch.position) < 1000


def test_counts_go_on_too(records):
    batches = list(reader(records)[0])
    whole = json.loads(batches[-1].position)["counts"]
    again, _, maker = reader(records)
    again.load(batches[5].position)
    list(again)
    assert dict(maker.counts) == whole


def test_pictures_in_memory_fill_the_buffer_by_their_bytes(chat, picture, tmp_path):
    """Samples of videos hold every frame."""
    held = [chat(("user", picture(56, 28, n), "q"), ("assistant", "a"), line=n) for n in range(12)]
    size = max(len(next(record.pictures()).source) for record in held)
    choice = {"buffer_size": 50, "buffer_mb": 4 * size / 2**20}
    batches = list(reader(held, **choice)[0])
    for number, batch in enumerate(batches):
        assert len(json.loads(batch.position)["waiting"]) <= 5
        again, *_ = reader(held, **choice)
        again.load(batch.position)
        assert [b.origins for b in again] == [b.origins for b in batches[number + 1 :]]
    assert json.loads(batches[0].position)["read"] <= 5
    # those that are files take no memory
    (tmp_path / "a.png").write_bytes(next(held[0].pictures()).source)
    named = [chat(("user", Picture(tmp_path / "a.png"), "q"), ("assistant", "a"), line=n) for n in range(12)]
    assert json.loads(next(iter(reader(named, **choice)[0])).position)["read"] == 12


def test_a_picture_that_cannot_be_decoded_costs_its_sample_only(records, picture):
    whole = picture(112, 56)
    damaged = Picture(whole.source[: len(whole.source) // 2])
    bad = Record((Message("user", (damaged,)), Message("assistant", (Text("a"),))), Origin("made", 99))
    read, source, _ = reader([bad, *records[:9], bad])
    batches = list(read)
    assert {origin for batch in batches for origin in batch.origins} == {f"made:{n}" for n in range(1, 10)}
    assert [origin for origin, _ in source.refused] == ["made:99"] * 2
    assert sum(batch.facts["dropped"] for batch in batches) >= 1


def test_nothing_but_bad_records_gives_no_batch(picture):
    damaged = Picture(picture().source[:60])
    bad = Record((Message("user", (damaged,)), Message("assistant", (Text("a"),))), Origin("made", 99))
    assert list(reader([replace(bad, origin=Origin("made", n)) for n in range(3)])[0]) == []
    assert list(reader([])[0]) == []


@pytest.mark.parametrize("good", [0, 1])
def test_records_that_repeat_and_teach_nothing_end_in_an_error(picture, good):
    damaged = Message("user", (Picture(picture().source[:60]),))
    answer = Message("assistant", (Text("a"),))
    found = [Record((damaged, answer), Origin("made", n)) for n in range(3)]  # refused once opened
    found += [Record((damaged, Message("assistant", (Text(""),))), Origin("made", n)) for n in range(3, 9)]  # at once
    found += [Record((Message("user", (Text("q"),)), answer), Origin("made", 9 + n)) for n in range(good)]
    source = ListedRecords(found, repeat=True)
    read = PackReader(source, SampleMaker(PROCESSOR, BUDGET), PackCollator(PROCESSOR), PACKING)
    if good:
        positions = [batch.position for batch in islice(read, 20)]
        for position in positions:
            again = PackReader(source, SampleMaker(PROCESSOR, BUDGET), PackCollator(PROCESSOR), PACKING)
            again.load(position)
            assert next(iter(again)).origins
        return
    with pytest.raises(UserError, match="No record of the data can be learned from"):
        next(iter(read))


class Opened:
    def __init__(self, records):
        self.records = records

    def __call__(self, shard: Shard):
        return ListedRecords(self.records, shard=shard, repeat=False)


def loader(records, workers, position=None, rank=0, world=1):
    stream = PackedDataset(Opened(records), SampleMaker(PROCESSOR, BUDGET), PACKING, rank=rank, world=world)
    if position is not None:
        stream.position = position
    return packed_dataloader(stream, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_from_where_the_loop_stands(records, workers):
    whole, position = [], DataPosition(max(1, workers))
    for number, batch in enumerate(loader(records, workers)):
        whole.append(shown(batch))
        if number < 5:
            position.take(batch)
    position = DataPosition.from_dict(json.loads(json.dumps(position.to_dict())))
    assert [shown(batch) for batch in loader(records, workers, position)] == whole[5:]


def test_readers_of_all_processes_share_the_records(records):
    seen = []
    for rank in range(2):
        seen += [origin for batch in loader(records[:10], 0, rank=rank, world=2) for origin in batch.origins]
    assert sorted(set(seen)) == sorted(f"made:{n + 1}" for n in range(10))


def test_a_position_of_other_readers_is_refused(records):
    position = DataPosition(2, 0, {0: "{}"})
    with pytest.raises(UserError, match="set num_workers to 2"):
        loader(records, 0, position)


class OpenedFiles:
    """Real records, of two files of different length."""

    def __init__(self, folder, exhausted):
        for name, count in (("a", 4), ("b", 16)):
            asked = [{"role": "user", "content": "q" * (1 + n % 5)} for n in range(count)]
            rows = [{"messages": [turn, {"role": "assistant", "content": name}]} for turn in asked]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.settings = parse_data_settings({"sources": [{"path": str(folder)}], "shuffle": 3, "exhausted": exhausted})

    def __call__(self, shard: Shard):
        return open_records(self.settings, seed=3, shard=shard)


@pytest.mark.slow
@pytest.mark.parametrize("exhausted", ["leave", "stop", "repeat"])
@pytest.mark.parametrize("buffer", [1, 6])
def test_after_an_end_nothing_comes(tmp_path, exhausted, buffer):
    """Records begin their next epoch when they are asked once more."""
    opened = OpenedFiles(tmp_path, exhausted)

    def read(position=None):
        found = PackReader(
            opened(Shard()),
            SampleMaker(PROCESSOR, BUDGET),
            PackCollator(PROCESSOR),
            replace(PACKING, buffer_size=buffer),
        )
        if position is not None:
            found.load(position)
        return found

    # several epochs, where there is no end
    batches = list(islice(read(), 25))
    repeats = exhausted == "repeat"
    assert (len(batches) == 25) == repeats
    for number in range(0, len(batches), 5 if repeats else 1):
        left = batches[number + 1 :]
        more = list(islice(read(batches[number].position), len(left) if repeats else 25))
        assert [(b.origins, shown(b)) for b in more] == [(b.origins, shown(b)) for b in left]


def test_a_reader_that_has_ended_stays_so_while_another_goes_on(tmp_path):
    def loaded(position):
        stream = PackedDataset(OpenedFiles(tmp_path, "leave"), SampleMaker(PROCESSOR, BUDGET), PACKING)
        stream.position = DataPosition.from_dict(position)
        return packed_dataloader(stream, num_workers=2)

    position, batches, positions = DataPosition(2), [], []
    for batch in loaded(position.to_dict()):
        position.take(batch)
        batches.append((batch.reader, shown(batch)))
        positions.append(json.loads(json.dumps(position.to_dict())))
    readers = [reader for reader, _ in batches]
    last = {reader: len(readers) - 1 - readers[::-1].index(reader) for reader in range(2)}
    assert abs(last[0] - last[1]) > 1
    for number in (min(last.values()), len(batches) - 1):
        assert [(batch.reader, shown(batch)) for batch in loaded(positions[number])] == batches[number + 1 :]
