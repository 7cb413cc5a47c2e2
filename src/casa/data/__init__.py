"""One's own data: rows of many shapes, from many places, as one resumable stream of records. Knows no model.

    settings = parse_data_settings({"sources": [{"path": "pages/*.jsonl"}]})
    records = open_records(settings, seed=1, shard=Shard(rank, world, worker, workers))
    for record in records:                  # casa.data.Record
        try:
            pictures = open_pictures(record)    # PIL images, in the record's order
        except BadRecord as bad:            # a truncated JPEG, say: found only by decoding it
            records.refuse(record.origin, bad)  # counted and named; raises UserError where settings say strict
            continue
        ...
    state = records.state_dict()            # plain values (JSON); load_state_dict(state) goes on right after

A record that cannot be read costs itself only.
"""

from casa.data.pictures import open_pictures
from casa.data.record import BadRecord, BadRecordReport, Message, Origin, Picture, Record, Text
from casa.data.records import Records, open_records
from casa.data.settings import DataSettings, Shard, SourceSettings, parse_data_settings
from casa.data.shapes import SHAPES, parse_row

__all__ = [
    "SHAPES",
    "BadRecord",
    "BadRecordReport",
    "DataSettings",
    "Message",
    "Origin",
    "Picture",
    "Record",
    "Records",
    "Shard",
    "SourceSettings",
    "Text",
    "open_pictures",
    "open_records",
    "parse_data_settings",
    "parse_row",
]
