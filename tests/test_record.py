"""Records: validated, appended whole, read back in spite of a crash."""

from __future__ import annotations

import errno
import json
import multiprocessing
from datetime import datetime

import pytest

from harness.errors import ReplivitError
from harness.record import (
    METRICS,
    Conditions,
    Record,
    RecordStore,
    bits_of,
    make_record,
    read_records,
    records_schema,
)


def record(value=1, variant="toy", metric="params", **fields):
    return make_record(variant, metric, value, Conditions(threads=1), run_id="r", **fields)


def test_round_trip(tmp_path):
    store = RecordStore(tmp_path)
    first = record(12, interval=(11, 13), detail={"samples": [1.0, 2.0]})
    store.append([first])
    store.append([record(13)])
    assert store.load()[0] == first
    assert [one.value for one in store.load()] == [12, 13]
    assert first.environment.packages["torch"]
    assert first.environment.code_sha256


@pytest.mark.parametrize(
    "fields",
    [
        {"metric": "speed"},
        {"value": float("nan")},
        {"value": float("inf")},
        {"value": 10**400},
        {"interval": (float("nan"), 1.0)},
        {"interval": (2.0, 1.0)},
        {"started": datetime(2026, 1, 1)},
        {"surprise": 1},
        {"duration_s": -1.0},
    ],
)
def test_wrong_records_are_refused(fields):
    with pytest.raises(ValueError):
        record(**{"value": 1, **fields})


def test_wrong_unit_is_refused():
    good = record().model_dump()
    with pytest.raises(ValueError, match="unit 'ms' is wrong"):
        Record(**{**good, "unit": "ms"})


def test_torn_last_line_is_reported_and_skipped_and_healed(tmp_path):
    store = RecordStore(tmp_path)
    store.append([record(1), record(2)])
    whole = store.file.read_bytes()
    store.file.write_bytes(whole[:-40])
    with pytest.warns(UserWarning, match=r"line 2: is torn"):
        assert [one.value for one in store.load()] == [1]
    store.append([record(3)])
    with pytest.warns(UserWarning, match="torn"):
        assert [one.value for one in store.load()] == [1, 3]


def test_line_of_a_later_schema_is_reported(tmp_path):
    line = json.loads(record().model_dump_json())
    line["schema_version"] = 99
    path = tmp_path / "new.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.warns(UserWarning, match="schema_version"):
        assert list(read_records(path)) == []


def _write_many(arguments):
    folder, writer = arguments
    store = RecordStore(folder)
    for number in range(25):
        store.append([record(number, variant=f"writer{writer}", detail={"pad": "x" * 3000})])


def test_two_writers_lose_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(_write_many, [(tmp_path, 0), (tmp_path, 1)])
    found = [(one.variant, one.value) for one in RecordStore(tmp_path)]
    assert sorted(found) == [(f"writer{w}", n) for w in (0, 1) for n in range(25)]


class _ShortStream:
    """A file on a disk that fills up in the middle of a line."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, line):
        return self.stream.write(line[: len(line) // 2])

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_full_disk_leaves_no_torn_line(tmp_path):
    store = RecordStore(tmp_path)
    store.append([record(1)])
    before = store.file.read_bytes()
    with open(store.file, "ab+", buffering=0) as stream, pytest.raises(OSError) as caught:
        store._append_line(_ShortStream(stream), b"x" * 1000 + b"\n")
    assert caught.value.errno == errno.ENOSPC
    assert store.file.read_bytes() == before


def test_a_full_device_is_named_as_such(tmp_path):
    (tmp_path / "records.jsonl").symlink_to("/dev/full")
    with pytest.raises(ReplivitError, match=r"cannot write .*: No space left on device"):
        RecordStore(tmp_path).append([record()])


def test_unwritable_folder_is_one_sentence(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ReplivitError, match="cannot write"):
        RecordStore(blocked / "records").append([record()])


def test_schema_export_names_every_field():
    schema = records_schema()
    assert set(schema["properties"]) == set(Record.model_fields)
    assert schema["additionalProperties"] is False


def test_conditions_key_tells_conditions_apart():
    assert Conditions(batch_size=1).key() != Conditions(batch_size=8).key()
    assert Conditions(options={"a": 1, "b": 2}).key() == Conditions(options={"b": 2, "a": 1}).key()


def test_every_metric_has_a_unit():
    assert all(METRICS.values())


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ({}, "keeps no bits$"),
        ({"bits": [1], "n": 1}, "keeps no bits$"),
        ({"bits": "gA==", "n": "1"}, "keeps no bits$"),
        ({"bits": "!!", "n": 1}, "that can be read"),
        ({"bits": "gA==", "n": 9}, "another number of images than 9"),
        ({"bits": "gA==", "n": -1}, "another number of images than -1"),
    ],
)
def test_bits_that_cannot_be_are_one_sentence(detail, words):
    good = record(50.0, metric="top1", detail={"bits": "gA==", "n": 2})
    assert bits_of(good).tolist() == [True, False]
    with pytest.raises(ReplivitError, match=words):
        bits_of(record(50.0, metric="top1", detail=detail))
