"""Streams of records: dealt out without overlap or loss, mixed by weight, and resumed exactly from any position."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from casa.data import BadRecord, Origin, Records, Shard, open_pictures, open_records, parse_data_settings
from casa.errors import UserError
from casa.testing import PATIENCE


def row(name: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": name}, {"role": "assistant", "content": "yes"}]}


def name(record: Any) -> str:
    return record.messages[0].parts[0].text


def write(path: Path, names: list[str], bad: int = 0) -> None:
    """bad: every so many lines, one that is no JSON."""
    lines = [json.dumps(row(entry)) for entry in names]
    for at in range(0, len(lines) if bad else 0, bad or 1):
        lines[at] = "oops"
    path.write_text("".join(line + "\n" for line in lines))


def opened(path: Any, shard: Shard | None = None, seed: int = 5, **rest: Any) -> Records:
    sources = path if isinstance(path, list) else [{"path": str(path)}]
    return open_records(
        parse_data_settings({"exhausted": "leave", "shuffle": 0, **rest, "sources": sources}), seed=seed, shard=shard
    )


def first(records: Records, count: int) -> list[str]:
    """So many names, or as many as there are, without beginning anew after the end."""
    found: list[str] = []
    while len(found) < count and (record := next(records, None)) is not None:
        found.append(name(record))
    return found


def test_the_order_of_files_and_rows_is_kept_without_shuffling(tmp_path):
    write(tmp_path / "b.jsonl", ["b0", "b1"])
    write(tmp_path / "a.jsonl", ["a0", "a1"])
    assert [name(record) for record in opened(tmp_path)] == ["a0", "a1", "b0", "b1"]
    assert [str(record.origin) for record in opened(tmp_path / "*b.jsonl")] == [
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/b.jsonl:2",
    ]


@settings(max_examples=30, deadline=None)
@given(
    files=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    world=st.integers(1, 4),
    workers=st.integers(1, 3),
    shuffle=st.sampled_from([0, 3, 100]),
)
def test_every_row_goes_to_one_reader(tmp_path_factory, files, world, workers, shuffle):
    folder = tmp_path_factory.mktemp("files")
    for number, rows in enumerate(files):
        write(folder / f"{number}.jsonl", [f"{number}.{k}" for k in range(rows)])
    shards = [Shard(rank, world, worker, workers) for rank in range(world) for worker in range(workers)]
    seen = Counter(name(record) for shard in shards for record in opened(folder, shard, shuffle=shuffle))
    assert seen == Counter(f"{number}.{k}" for number, rows in enumerate(files) for k in range(rows))


def test_parquet_is_dealt_out_by_row_groups(tmp_path):
    texts = [[{"user": str(k), "assistant": "yes"}] for k in range(40)]
    pq.write_table(
        pa.table({"images": pa.array([[]] * 40, pa.list_(pa.string())), "texts": texts}),
        tmp_path / "x.parquet",
        row_group_size=10,
    )
    seen = [[int(name(record)) for record in opened(tmp_path, Shard(rank, 2))] for rank in range(2)]
    assert seen == [[*range(10), *range(20, 30)], [*range(10, 20), *range(30, 40)]]


def sources(folder: Path) -> list[dict[str, Any]]:
    """Four sources of different lengths, formats and weights, one with bad lines, one that breaks off."""
    (folder / "several").mkdir()
    for number in range(3):
        write(folder / "several" / f"{number}.jsonl", [f"s{number}.{k}" for k in range(4)], bad=3)
    write(folder / "long.jsonl", [f"l{k}" for k in range(23)])
    (folder / "list.json").write_text(json.dumps([row(f"j{k}") for k in range(5)]))
    (folder / "broken").mkdir()
    write(folder / "broken" / "1.jsonl", ["b0", "b1", "b2"])
    with tarfile.open(cut := folder / "broken" / "0.tar", "w") as tar:
        for number in range(6):
            data = json.dumps(row(f"t{number}")).encode()
            member = tarfile.TarInfo(f"{number}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    cut.write_bytes(cut.read_bytes()[:4700])
    return [
        {"path": str(folder / "several")},
        {"path": str(folder / "broken")},
        {"path": str(folder / "long.jsonl"), "weight": 2.0},
        {"path": str(folder / "list.json"), "weight": 0.5},
    ]


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(
    stops=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    shuffle=st.sampled_from([0, 1, 2, 5, 1000]),
    exhausted=st.sampled_from(["repeat", "leave", "stop"]),
    seed=st.integers(0, 3),
    reader=st.sampled_from([Shard(), Shard(1, 2), Shard(0, 2, 1, 2)]),
)
def test_resumed_at_any_position_it_is_the_same_stream(tmp_path_factory, stops, shuffle, exhausted, seed, reader):
    given = sources(tmp_path_factory.mktemp("data"))

    def fresh() -> Records:
        return opened(given, reader, seed, shuffle=shuffle, exhausted=exhausted)

    whole_records = fresh()
    whole = first(whole_records, 130)
    records, seen = fresh(), []
    for stop in stops:
        seen += first(records, stop)
        state = json.loads(json.dumps(records.state_dict()))
        records = fresh()
        records.load_state_dict(state)
        assert records.state_dict() == state
    seen += first(records, 130 - len(seen))
    assert seen == whole
    if exhausted != "repeat":
        assert records.report.counts == whole_records.report.counts


def test_each_epoch_is_whole_and_in_another_order(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(50)])
    records = opened(tmp_path, shuffle=20, exhausted="repeat")
    epochs = [first(records, 50) for _ in range(3)]
    assert [source["epoch"] for source in records.state_dict()["sources"]] == [2]
    assert all(sorted(epoch, key=int) == [str(k) for k in range(50)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # mixed within blocks, and not beyond
    assert sorted(map(int, epochs[0][:20])) == list(range(20))
    assert epochs[0][:20] != [str(k) for k in range(20)]


def test_seeds_give_other_orders_and_the_same_seed_the_same(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(50)])
    orders = [tuple(first(opened(tmp_path, seed=seed, shuffle=50), 50)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_two_sources_of_the_same_file_have_orders_of_their_own(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(50)])
    twice = [{"path": str(tmp_path)}, {"path": str(tmp_path)}]
    seen = [int(entry) for entry in first(opened(twice, shuffle=50), 100)]
    assert Counter(seen) == Counter(dict.fromkeys(range(50), 2))
    assert len(set(seen[:30])) < 30


def test_files_come_in_another_order_each_epoch(tmp_path):
    for number in range(8):
        write(tmp_path / f"{number}.jsonl", [str(number)])
    records = opened(tmp_path, shuffle=2, exhausted="repeat")
    epochs = {tuple(first(records, 8)) for _ in range(3)}
    assert len(epochs) == 3


@pytest.mark.slow
def test_sources_are_drawn_by_weight(tmp_path):
    write(tmp_path / "a.jsonl", ["a"] * 10)
    write(tmp_path / "b.jsonl", ["b"] * 10)
    weighed = [{"path": str(tmp_path / "a.jsonl"), "weight": 3}, {"path": str(tmp_path / "b.jsonl")}]
    seen = Counter(first(opened(weighed, exhausted="repeat"), 4000))
    assert 0.72 < seen["a"] / 4000 < 0.78
    orders = [first(opened(weighed, Shard(rank, 2), exhausted="repeat"), 40) for rank in range(2)]
    assert orders[0] != orders[1]


def test_what_happens_at_the_end_of_a_source(tmp_path):
    write(tmp_path / "a.jsonl", ["a"] * 3)
    write(tmp_path / "b.jsonl", ["b"] * 30)
    both = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl")}]
    assert Counter(first(opened(both, exhausted="leave"), 99)) == {"a": 3, "b": 30}
    stopped = Counter(first(opened(both, exhausted="stop"), 99))
    assert stopped["a"] == 3
    assert stopped["b"] < 30
    assert Counter(first(opened(both, exhausted="repeat"), 99))["a"] > 30


def test_after_an_end_iterating_again_is_the_next_epoch(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(20)])
    records = opened(tmp_path, shuffle=20)
    one, two = [name(r) for r in records], [name(r) for r in records]
    assert sorted(one) == sorted(two)
    assert one != two
    ended = opened(tmp_path, shuffle=20)
    list(ended)
    resumed = opened(tmp_path, shuffle=20)
    resumed.load_state_dict(ended.state_dict())
    assert [name(r) for r in resumed] == two


def test_bad_rows_are_counted_named_and_passed_over(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(7)], bad=3)
    wanted = parse_data_settings({"sources": [{"path": str(tmp_path / "x.jsonl")}], "exhausted": "leave"})
    records = open_records(wanted, report=tmp_path)
    assert sorted(name(record) for record in records) == ["1", "2", "4", "5"]
    assert records.report.counts == {"not-json": 3}
    records.refuse(Origin("x.jsonl", 2), BadRecord("unreadable-picture", "It is cut off."))
    lines = [json.loads(line) for line in (tmp_path / "bad-records.jsonl").read_text().splitlines()]
    assert sorted(line["origin"].rpartition(":")[2] for line in lines) == ["1", "2", "4", "7"]
    strict = open_records(
        parse_data_settings({"sources": [{"path": str(tmp_path / "x.jsonl")}], "strict": True, "shuffle": 0})
    )
    with pytest.raises(UserError, match=r"x\.jsonl:1: The line is no JSON"):
        next(strict)


def test_every_bad_row_of_a_list_on_one_line_is_named(tmp_path):
    rows: list[Any] = [row(str(k)) for k in range(5)] + [{"no": "shape"}] * 20
    (tmp_path / "x.json").write_text(json.dumps(rows))
    wanted = parse_data_settings({"sources": [{"path": str(tmp_path / "x.json")}], "exhausted": "leave"})
    records = open_records(wanted, report=tmp_path)
    assert len(list(records)) == 5
    assert records.report.total == 20
    lines = [json.loads(line)["origin"] for line in (tmp_path / "bad-records.jsonl").read_text().splitlines()]
    assert sorted(lines) == sorted(f"{tmp_path}/x.json:1, row {k}" for k in range(6, 26))


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_shards_lie_beside_plain_ones(tmp_path, compression):
    from backports import zstd

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}[compression]
    write(tmp_path / "a.jsonl", ["a0", "a1"])
    write(tmp_path / "b.jsonl", ["b0", "b1"])
    (tmp_path / f"b.jsonl{compression}").write_bytes(compress((tmp_path / "b.jsonl").read_bytes()))
    (tmp_path / "b.jsonl").unlink()
    assert [name(record) for record in opened(tmp_path)] == ["a0", "a1", "b0", "b1"]
    assert [name(record) for record in opened(tmp_path / "*.jsonl*")] == ["a0", "a1", "b0", "b1"]
    assert [name(record) for record in opened(tmp_path / f"b.jsonl{compression}")] == ["b0", "b1"]


@pytest.mark.slow
@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_that_is_cut_off_costs_its_rest(tmp_path, compression):
    from backports import zstd

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}[compression]
    noise = [hashlib.sha512(str(k).encode()).hexdigest() for k in range(4000)]
    write(tmp_path / "a.jsonl", noise)
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(compress((tmp_path / "a.jsonl").read_bytes()))
    whole = path.read_bytes()
    (tmp_path / "a.jsonl").unlink()
    write(tmp_path / "b.jsonl", ["b"])
    path.write_bytes(whole[: len(whole) * 2 // 3])
    records = opened(tmp_path)
    found = [name(record) for record in records]
    assert found == [*noise[: len(found) - 1], "b"]
    assert records.report.counts == {"unreadable-file": 1}
    origin, _ = records.report.first[0]
    assert (origin.path, origin.line) == (str(path), len(found))
    path.write_bytes(b"nonsense" * 100)
    records = opened(tmp_path)
    assert [name(record) for record in records] == ["b"]
    assert records.report.counts == {"unreadable-file": 1}
    path.write_bytes(whole)
    assert len(list(opened(tmp_path))) == 4001


def test_what_datasets_has_saved_is_read_and_nothing_beside_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [row(str(k)) for k in range(5)]
    datasets.Dataset.from_list(rows[:3]).save_to_disk(tmp_path / "one", num_shards=2)
    split = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows[3:4]), "test": datasets.Dataset.from_list(rows[4:])}
    )
    split.save_to_disk(tmp_path / "several")
    # what `map` keeps beside the tables is no part of them
    (tmp_path / "one" / "cache-1.arrow").write_bytes((tmp_path / "one" / "data-00000-of-00002.arrow").read_bytes())
    assert [name(record) for record in opened(tmp_path / "one")] == ["0", "1", "2"]
    assert [name(record) for record in opened(tmp_path)] == ["0", "1", "2", "3"]
    test = [{"path": str(tmp_path / "several"), "split": "test"}]
    assert [name(record) for record in opened(test)] == ["4"]
    with pytest.raises(UserError, match="has no split 'valid': set split to one of train, test"):
        opened([{"path": str(tmp_path / "several"), "split": "valid"}])
    (tmp_path / "one" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="lacks data-00000-of-00002"):
        opened(tmp_path / "one")


def test_pictures_that_datasets_has_saved_are_opened(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"),
                                  "answers": datasets.List(datasets.Value("string"))})  # fmt: skip
    picture = Image.new("RGB", (8, 6), "red")
    rows = {"image": [picture], "question": ["What?"], "answers": [["A cat.", "cat"]]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    (record,) = opened(tmp_path / "one")
    assert open_pictures(record)[0].getpixel((0, 0)) == (255, 0, 0)
    assert record.references == ("A cat.", "cat")


@pytest.mark.parametrize(
    "odd", ["b.jsonl.zip", "b.gz", "b.tar.lz4", "b.parquet.gz", "b.tfrecord", "b.feather", "b.pkl"]
)
def test_files_of_rows_that_are_not_read_are_refused_by_name(tmp_path, odd):
    write(tmp_path / "a.jsonl", ["a"])
    (tmp_path / odd).write_bytes(b"x")
    (tmp_path / "images.zip").write_bytes(b"x")
    (tmp_path / "README.md").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=f"{odd} looks like a file of records that is not read"):
            opened(path)
    assert [name(record) for record in opened(tmp_path / "*.jsonl")] == ["a"]
    (tmp_path / odd).unlink()
    assert [name(record) for record in opened(tmp_path)] == ["a"]


def test_folders_behind_links_are_searched_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "b.jsonl", ["b"])
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "a.jsonl", ["a"])
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    assert [name(record) for record in opened(tmp_path / "set")] == ["a", "b"]


def test_each_reader_has_a_report_of_its_own(tmp_path):
    write(tmp_path / "x.jsonl", ["0", "1"], bad=1)
    for rank in range(2):
        wanted = parse_data_settings({"sources": [{"path": str(tmp_path / "x.jsonl")}], "exhausted": "leave"})
        assert list(open_records(wanted, shard=Shard(rank, 2), report=tmp_path)) == []
    assert sorted(path.name for path in tmp_path.glob("bad*")) == ["bad-records-0-0.jsonl", "bad-records-1-0.jsonl"]


def test_a_source_without_a_good_record_does_not_go_round_for_ever(tmp_path):
    write(tmp_path / "x.jsonl", ["0", "1"], bad=1)
    with pytest.raises(UserError, match="no record that can be read"):
        next(opened(tmp_path, exhausted="repeat"))
    assert list(opened(tmp_path)) == []


def test_a_reader_whose_file_gives_nothing_has_another_in_the_next_epoch(tmp_path):
    write(tmp_path / "good.jsonl", [str(k) for k in range(4)])
    write(tmp_path / "damaged.jsonl", ["x"], bad=1)
    for rank in range(2):
        records = opened(tmp_path, Shard(rank, 2), shuffle=2, exhausted="repeat")
        assert set(first(records, 20)) == {"0", "1", "2", "3"}
        assert records.report.counts["not-json"] > 0
    fixed = [opened(tmp_path, Shard(rank, 2), shuffle=0, exhausted="repeat") for rank in range(2)]
    assert first(fixed[1], 20) == ["0", "1", "2", "3"] * 5
    with pytest.raises(UserError, match="no record that can be read"):
        next(fixed[0])


def test_keys_that_parquet_fills_with_null_are_as_if_absent(tmp_path):
    """A table has one set of keys for all rows."""
    asked, spoken = {"from": "human", "value": "1"}, {"role": "user", "content": "2"}
    turns = [
        [asked, {"from": "gpt", "value": "yes"}],
        [spoken, {"role": "assistant", "content": "yes"}],
        [asked, {"role": "assistant", "content": "yes"}],
    ]
    pq.write_table(
        pa.table({"conversations": [*turns, None, None, None], "messages": [None, None, None, *turns]}),
        tmp_path / "x.parquet",
    )
    records = opened(tmp_path)
    assert first(records, 9) == ["1", "2", "1", "1", "2", "1"]
    assert not records.report.counts


def test_a_line_that_is_no_record_is_not_counted(tmp_path):
    """Live-WhisperX's file ends with a list of the bytes where its lines begin."""
    (tmp_path / "x.jsonl").write_text('"oops"\n[0, 7, 21]\n')
    named = [{"path": str(tmp_path / "x.jsonl"), "shape": "live-whisperx"}]
    records = opened(named)
    assert list(records.rows()) == [None, None]
    assert records.report.counts == {"wrong-type": 1}
    unnamed = opened(tmp_path)
    assert list(unnamed.rows()) == [None, None]
    assert unnamed.report.counts == {"wrong-type": 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 6}, "another seed"),
        ({"shard": Shard(0, 2)}, "another number of processes"),
        ({"shuffle": 7}, "another shuffle buffer"),
    ],
)
def test_a_position_in_another_stream_is_refused(tmp_path, change, sentence):
    write(tmp_path / "x.jsonl", [str(k) for k in range(9)])
    records = opened(tmp_path, shuffle=4)
    next(records)
    with pytest.raises(UserError, match=sentence):
        opened(tmp_path, **{"shuffle": 4, **change}).load_state_dict(records.state_dict())


def test_a_position_in_changed_data_is_refused(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(9)])
    state = opened(tmp_path).state_dict()
    write(tmp_path / "x.jsonl", [str(k) for k in range(10)])
    with pytest.raises(UserError, match="The data changed"):
        opened(tmp_path).load_state_dict(state)


def test_a_file_that_goes_missing_is_counted(tmp_path):
    for number in range(3):
        write(tmp_path / f"{number}.jsonl", [str(number)])
    records = opened(tmp_path)
    (tmp_path / "1.jsonl").unlink()
    assert [name(record) for record in records] == ["0", "2"]
    assert records.report.counts == {"unreadable-file": 1}


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("nowhere.jsonl", "There is no"),
        ("owner/name", "of the hub is written hub:owner/name"),
        ("p*.jsonl", "mend the pattern"),
        ("notes.txt", "convert it"),
        (".", "no file of records"),
    ],
)
def test_data_that_are_not_there_are_named(tmp_path, monkeypatch, path, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad-records-0-0.jsonl").write_text("{}")
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "x.jsonl", ["0"])
    with pytest.raises(UserError, match=sentence):
        opened(path)


def test_a_stream_crosses_processes_before_it_begins(tmp_path):
    write(tmp_path / "x.jsonl", [str(k) for k in range(9)])
    records = opened(tmp_path, shuffle=4)
    assert first(pickle.loads(pickle.dumps(records)), 9) == first(records, 9)


@pytest.mark.slow
def test_the_room_is_light():
    """Reading JSON needs neither torch's friends nor the extras; they come with the files that need them."""
    heavy = {"transformers", "datasets", "pyarrow", "pandas", "av", "matplotlib", "torch"}
    code = f"import sys, casa.data, casa.data.check, casa.data.html_report; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
