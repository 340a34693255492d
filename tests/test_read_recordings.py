"""Reading recordings: journals that broke off, and files of anybody's, none of which is believed."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from mhabridge.diff.recordings import diff_recordings
from mhabridge.errors import ArgumentTypeError, CheckpointError
from mhabridge.recording.reading import open_recording

from .recordings import comparison, encoder, notes, record, rewritten


def journal(tmp_path: Path) -> bytes:
    writer = record(tmp_path / "j", "torch", encoder("torch", layers=1), finished=False)
    writer.journal.event({"left_out": "something"})
    writer.journal.event({"end": {"complete": True}})
    writer.journal.close()
    return writer.journal.path.read_bytes()


def test_a_journal_cut_anywhere_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    data = journal(tmp_path)
    with open_recording(tmp_path / "j.journal") as recording:
        assert (recording.complete, recording.left_out, len(recording.calls)) == (True, ("something",), 1)
    seen, cut = set(), tmp_path / "cut"
    for length in [*range(400), *range(400, len(data), 97), len(data) - 1]:
        cut.write_bytes(data[:length])
        try:
            with open_recording(cut) as recording:
                assert not recording.complete
                assert recording.left_out
                seen.add(len(recording.calls))
        except CheckpointError:
            assert length < 400
    assert seen == {0, 1}


def test_a_flipped_bit_ends_a_journal(tmp_path: Path) -> None:
    data = bytearray(journal(tmp_path))
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    with open_recording(tmp_path / "flipped") as recording:
        assert not recording.complete
        assert "breaks off" in recording.left_out[-1]
    report = diff_recordings(tmp_path / "flipped", tmp_path / "flipped")
    assert (report.ok, report.exit_code) == (False, 2)


def test_a_journal_that_was_not_ended_says_so(tmp_path: Path) -> None:
    writer = record(tmp_path / "j", "torch", encoder("torch", layers=1), finished=False)
    with open_recording(writer.journal.path) as recording:
        assert "no end" in recording.left_out[-1]
        assert len(recording.calls) == 1
    writer.journal.close()


def records(*headers: Any, payload: bytes = b"") -> bytes:
    data = b"MHAREC01"
    for header in headers:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        data += struct.pack("<IQI", len(text), len(payload), zlib.crc32(payload, zlib.crc32(text))) + text + payload
    return data


START = {"event": {"start": {"format": 1, "framework": "torch", "version": "2.13.0"}}}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MHAREC01",
        b"{}",
        records(b"[" * 100_000),
        records(START, START),
        records({"event": {"start": 3}}),
        records({"event": {"explode": {}}}),
        records({"event": {}}),
        records(START, {"event": {"layer": {"path": 3}}}),
        records(START, {"event": {"layer": {"path": "a"}}}, {"event": {"layer": {"path": "a"}}}),
        records(START, {"event": {"call": {"index": True, "layer": "a"}}}),
        records(START, {"event": {"call": {"index": 0, "layer": "a", "nth": 0}}}),
        records(START, {"event": {"grads": {"index": 0, "grads": {}}}}),
        records(START, {"tensor": "x", "dtype": "F32", "shape": [2**40]}),
        records(START, {"tensor": "x", "dtype": "F32", "shape": [1]}, payload=b"12345678"),
        records(START, {"tensor": "x", "dtype": "F33", "shape": [2]}),
        records(START, {"tensor": "x", "dtype": "F32", "shape": [-1]}),
        records(START, {"tensor": "\ud800", "dtype": "F32", "shape": [0]}),
        records(START, {"tensor": "x", "dtype": "F32", "shape": [0]}, {"tensor": "x", "dtype": "F32", "shape": [0]}),
    ],
)
def test_hostile_journals_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "hostile").write_bytes(data)
    with pytest.raises(CheckpointError):
        open_recording(tmp_path / "hostile")


def deep(depth: int) -> Any:
    found: Any = {"value": 1}
    for _ in range(depth):
        found = {"items": [found]}
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 3),
        (("format",), True),
        (("framework",), 3),
        (("layers",), []),
        (("calls",), {}),
        (("calls", 0, "layer"), "nowhere"),
        (("calls", 0, "index"), -1),
        (("calls", 0, "nth"), "0"),
        (("calls", 1, "index"), 0),
        (("calls", 0, "arguments", "query"), {"tensor": "nowhere"}),
        (("calls", 0, "arguments", "query"), {"tensor": 3}),
        (("calls", 0, "arguments", "query"), {"same_as": "value"}),
        (("calls", 0, "arguments", "query"), {"value": [1]}),
        (("calls", 0, "arguments", "query"), {"value": 1, "tensor": "x"}),
        (("calls", 0, "arguments", "query"), deep(20)),
        (("calls", 0, "outputs"), "x"),
        (("layers", "layers.0.self_attn", "settings"), {"num_heads": [4]}),
        (("layers", "layers.0.self_attn", "parameters"), {"in_proj_weight": "nowhere"}),
        (("left_out",), ["\ud800"]),
        (("calls", 1, "parameters"), {"in_proj_weight": {"tensor": "nowhere"}}),
        (("calls", 1, "parameters"), ["in_proj_weight"]),
    ],
)
def test_hostile_recordings_are_refused(tmp_path: Path, path: tuple[Any, ...], value: Any) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch", layers=2)).path

    def spoil(document: Any) -> None:
        for name in path[:-1]:
            document = document[name]
        document[path[-1]] = value

    spoilt = rewritten(first, tmp_path / "b", spoil)
    with pytest.raises(CheckpointError):
        open_recording(spoilt)
    assert open_recording(rewritten(first, tmp_path / "c", lambda document: document)).close() is None


@pytest.mark.parametrize("text", ["[" * 100_000, "3", "{", '{"a": 1, "a": 2}'])
def test_hostile_metadata_is_refused(tmp_path: Path, text: str) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch", layers=1)).path
    with pytest.raises(CheckpointError):
        open_recording(rewritten(first, tmp_path / "b", lambda document: text))


def test_a_file_that_is_no_recording(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing there"):
        open_recording(tmp_path / "none")
    with pytest.raises(ArgumentTypeError, match="path"):
        open_recording(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["num_heads", "embed_dim", "batch_first", "dropout"])
@pytest.mark.parametrize("value", [0, -3, 10**15, "x", 0.5, None])
def test_settings_that_cannot_be_are_a_note(tmp_path: Path, setting: str, value: Any) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch", layers=1)).path

    def spoil(document: Any) -> None:
        document["layers"]["layers.0.self_attn"]["settings"][setting] = value
        document["framework"] = "torch"

    report = diff_recordings(first, rewritten(first, tmp_path / "b", spoil))
    assert report.entries
    report.to_json()


def test_an_unknown_framework_is_compared_without_a_reference(tmp_path: Path) -> None:
    first = record(tmp_path / "a", "torch", encoder("torch")).path
    other = rewritten(first, tmp_path / "b", lambda document: document.update(framework="flax", version="?"))
    report = diff_recordings(first, other)
    assert report.ok
    assert "not held against the reference: on the second side" in notes(report, "layers.0.self_attn")
    assert comparison(report, "layers.0.self_attn", "output").verdict == "equal"
