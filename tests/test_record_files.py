"""The recorder without any framework: what it keeps, its bounds, its journal, and what happens when things go wrong."""

from __future__ import annotations

import errno
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhabridge.errors import ArgumentError, ArgumentTypeError, CheckpointError
from mhabridge.recording import journal as journals
from mhabridge.recording import ledger as ledgers
from mhabridge.recording import recorder as recorders
from mhabridge.recording.contents import Contents, open_contents
from mhabridge.recording.finishing import finish
from mhabridge.recording.journal import Journal, scan
from mhabridge.recording.recorder import Options, Recorder
from tests import plain_framework
from tests.plain_framework import Attention, Chain, Layer, Linear, Tensor

X = Tensor(np.arange(6, dtype="f4").reshape(2, 3))


def recorder(model: Any, path: Path, **options: Any) -> Recorder:
    return Recorder(plain_framework, model, path, Options(**options))


def chain() -> Chain:
    shared = Attention(num_heads=2, in_weight=Tensor(np.ones(3, "f4")))
    return Chain(layers=[shared, Linear(weight=Tensor(np.full(3, 2, "f4"))), shared, Attention(num_heads=1)])


@pytest.fixture
def reading() -> Iterator[Callable[[Path], Contents]]:
    opened: list[Contents] = []

    def read(path: Path) -> Contents:
        opened.append(open_contents(path))
        return opened[-1]

    yield read
    for contents in opened:
        contents.close()


Reading = Callable[[Path], Contents]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def journal_of(target: Path) -> Path:
    return target.with_name(target.name + ".journal")


# -- what is recorded --------------------------------------------------------------------------------------------------


def test_the_file_and_nothing_else(target: Path, reading: Reading) -> None:
    model = chain()
    with recorder(model, target) as made:
        assert journal_of(target).exists()
        assert not target.exists()
        model(X)
    assert [file.name for file in target.parent.iterdir()] == ["a.safetensors"]
    assert not any("forward" in vars(layer) for _, layer in plain_framework.parts(model))
    found = reading(target).metadata
    assert made.calls == 3
    assert [(call["layer"], call["nth"]) for call in found["calls"]] == [
        ("layers.0", 0),
        ("layers.0", 1),
        ("layers.3", 0),
        ("", 0),
    ]
    assert found["layers"][""] == {
        "class": "plain.Chain",
        "kind": "Chain",
        "attention": False,
        "settings": {},
        "parameters": {},
        "whole": True,
    }
    assert found["calls"][-1]["arguments"] == {}
    assert found["calls"][-1]["outputs"] == [{"tensor": "calls/000000/outputs/0"}]
    assert found["layers"]["layers.0"] == {
        "class": "plain.Attention",
        "kind": "Attention",
        "attention": True,
        "settings": {"num_heads": 2},
        "parameters": {"in_weight": "layers/layers.0/in_weight"},
        "aliases": ["layers.2"],
    }
    assert found["calls"][0]["arguments"] == {
        "query": {"tensor": "calls/000001/arguments/query"},
        "key": {"same_as": "query"},
        "value": {"same_as": "query"},
    }


def test_every_kind_of_value(target: Path, reading: Reading) -> None:
    class Odd(Layer):
        def forward(self, x: Any, *more: Any, flag: Any = True, **rest: Any) -> Any:
            return {"a": x, "b": [x, 3]}

    arrays = {
        code: np.ones((2, 0, 3) if code == "U8" else (2, 3), kind)
        for code, kind in {
            "F64": "f8",
            "F16": "f2",
            "I64": "i8",
            "I32": "i4",
            "I16": "i2",
            "I8": "i1",
            "U64": "u8",
            "U32": "u4",
            "U16": "u2",
            "U8": "u1",
            "BOOL": "?",
            "C64": "c8",
        }.items()
    }
    model = Odd()
    turned = np.arange(6, dtype=">f4").reshape(2, 3).T  # neither C order nor little-endian
    with recorder(model, target, layers="*") as made:
        model(Tensor(turned), 1, "two", flag=float("nan"), big=2**70, odd=object(), none=None, np_=np.float32(2))
        model(X, **{code: Tensor(array) for code, array in arrays.items()})
        model(Tensor(np.array([object()])), (X, [X, 1.5]), Tensor(np.array(1 + 2j)))
    found = reading(target)
    first, second, third = found.metadata["calls"]
    given = first["arguments"]
    assert found.read(given["x"]["tensor"]).tolist() == turned.tolist()
    assert given["more"] == {"items": [{"value": 1}, {"value": "two"}]}
    assert [given[name] for name in ("none", "np_")] == [{"value": None}, {"value": 2.0}]
    assert np.isnan(found.read(given["flag"]["tensor"])).tolist() is True
    assert {name for name, entry in given.items() if "left_out" in entry} == {"big", "odd"}
    assert first["output_names"] == ["a", "b"]
    assert first["outputs"][1] == {"items": [{"tensor": "calls/000000/outputs/1/0"}, {"value": 3}]}
    for code, array in arrays.items():
        assert found.tensors[second["arguments"][code]["tensor"]].code == code
        assert found.read(second["arguments"][code]["tensor"]).tobytes() == array.tobytes()
        assert found.tensors[second["arguments"][code]["tensor"]].shape == array.shape
    assert "RuntimeError: its memory is gone" in third["arguments"]["x"]["left_out"]
    items = third["arguments"]["more"]["items"]
    assert items[0]["items"][1]["items"][0] == {"tensor": "calls/000002/arguments/more/0/1/0"}
    assert items[1] == {"left_out": "a tensor of complex128"}
    assert len(made.left_out) == 2 + 2 + 2  # the third call gives back the one that has no values, twice


@pytest.mark.parametrize(
    ("wanted", "paths"),
    [
        (None, ["", "layers.0", "layers.3"]),
        ("all", ["", "layers.0", "layers.1", "layers.3"]),
        ("layers.2", ["layers.0"]),  # an alias
        (Linear, ["layers.1"]),
        (["layers.[13]", Chain], ["", "layers.1", "layers.3"]),
    ],
)
def test_which_layers(wanted: Any, paths: list[str], target: Path, reading: Reading) -> None:
    model = chain()
    with recorder(model, target, layers=wanted):
        model(X)
    assert sorted(reading(target).metadata["layers"]) == paths


@pytest.mark.parametrize(
    ("wanted", "kind", "text"),
    [
        ("nothing.*", ArgumentError, "'nothing.*', which no layer matches"),
        (["layers.0", dict], ArgumentError, "dict, which no layer matches"),
        (3, ArgumentTypeError, "layers: given 3"),
        ([], ArgumentTypeError, "layers"),
        ([3], ArgumentTypeError, "a pattern or a class"),
    ],
)
def test_layers_that_are_not_there(wanted: Any, kind: type[Exception], text: str, target: Path) -> None:
    with pytest.raises(kind) as caught, recorder(chain(), target, layers=wanted):
        pass
    assert text in str(caught.value)
    assert list(target.parent.iterdir()) == []


def test_a_model_without_attention(target: Path) -> None:
    model = Chain(layers=[Linear()])
    with pytest.raises(ArgumentError, match=r"Chain without an attention layer.*layers\.0"), recorder(model, target):
        pass


def test_what_is_not_asked_for(target: Path, reading: Reading) -> None:
    model = chain()
    with recorder(model, target, parameters=False, attn_weights=False) as made:
        model(X)
    found = reading(target)
    assert {name.rpartition("/")[2] for name in found.tensors} == {"query", "0"}
    assert found.metadata["calls"][0]["outputs"][1] == {"left_out": "attn_weights=False"}
    expected = ["parameters: parameters=False", "attention weights: attn_weights=False"]
    assert made.left_out == found.metadata["left_out"] == expected


def test_weights_that_the_model_does_not_ask_for_are_said_once_a_layer(target: Path) -> None:
    layer = Attention()
    with recorder(layer, target) as made:
        for _ in range(3):
            assert layer(X, X, X, need_weights=False)[1] is None
    assert made.left_out == [": attn_weights: the model did not ask this layer for them"]


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_over_the_limit_tensors_are_left_out_and_named(target: Path, reading: Reading) -> None:
    layer = Attention()
    big = Tensor(np.ones((100, 10), "f4"))
    with recorder(layer, target, limit=5000) as made:
        layer(big, X, Tensor(np.float32(1)))  # 4000, 24 and 4; the output of 4000 does not fit any more
        layer(X, X, X)
    found = reading(target).metadata
    assert made.left_out == ["calls/000000/outputs/0: 3.91 KiB more: the limit of 4.88 KiB was reached"]
    assert found["left_out"] == made.left_out
    assert found["complete"] is True
    assert found["calls"][0]["outputs"][0] == {"left_out": "3.91 KiB more: the limit of 4.88 KiB was reached"}
    assert "tensor" in found["calls"][1]["outputs"][0]  # what is small still fits
    assert target.stat().st_size < 5000 + 3000


@pytest.mark.parametrize("bound", [{"MOST_TENSORS": 10}, {"MOST_TEXT": 3000}])
def test_calls_beyond_all_bounds_are_counted(
    bound: dict[str, int], target: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in bound.items():
        monkeypatch.setattr(ledgers, name, value)
    layer = Attention()
    with recorder(layer, target) as made:
        for _ in range(1000):
            layer(X, X, X)
    found = reading(target).metadata
    assert 1 < made.calls == len(found["calls"]) < 20
    assert f": {1000 - made.calls} more calls: there was no room to describe them" in found["left_out"]
    assert target.stat().st_size < 16000


def test_not_even_the_lines_grow_without_bound(target: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_MOST_LINES", 4)
    layer = Attention()
    with recorder(layer, target, limit=0):
        layer(X, X, X)
        layer(X, X, X)
    lines = reading(target).metadata["left_out"]
    assert len(lines) == 5
    assert lines[-1] == "2 more things, for which there was no line"


# -- a block that does not end well ------------------------------------------------------------------------------------


class Stop(BaseException):
    """Neither an Exception nor anything that is known."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, Stop])
def test_the_blocks_own_error_goes_on_and_the_file_is_finished(
    error: type[BaseException], target: Path, reading: Reading
) -> None:
    model = chain()

    def block() -> None:
        with recorder(model, target):
            model(X)
            raise error("mine")

    with pytest.raises(error, match="mine") as caught:
        block()
    assert caught.value.__cause__ is None
    found = reading(target).metadata
    assert found["complete"] is False
    assert len(found["calls"]) == 4
    assert not journal_of(target).exists()


def test_a_call_that_does_not_return_has_its_inputs(target: Path, reading: Reading) -> None:
    layer = Attention()
    with recorder(layer, target):
        with pytest.raises(AttributeError):
            layer(X, X, 3)
        layer(X, X, X)
    found = reading(target).metadata
    assert [(call["index"], len(call["outputs"])) for call in found["calls"]] == [(1, 2), (0, 0)]
    assert found["left_out"] == ["calls/000000: outputs:  did not return"]


class Full:
    """A disk with room for so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = self.file.write(data[: self.room])
        self.room -= done
        return int(done)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_ends_the_recording_and_not_the_run(target: Path, reading: Reading) -> None:
    model = chain()

    def block() -> None:
        with recorder(model, target) as made:
            before = model(X).array
            assert made._watcher is not None
            writer = made._watcher.ledger.journal
            writer._file = Full(writer._file, 500)  # type: ignore[assignment]  # in the middle of a record
            assert all((model(X).array == before).all() for _ in range(5))

    with pytest.raises(CheckpointError, match=r"ended early: No space left.*is in .*a\.safetensors"):
        block()
    found = reading(target).metadata
    assert found["complete"] is False
    assert 3 <= len(found["calls"]) < 9


def test_a_journal_that_cannot_even_begin_is_no_journal(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few_bytes(self: Journal, *_: Any) -> None:
        self._file.write(b"MHARE")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "_write", few_bytes)
    model = chain()
    with pytest.raises(CheckpointError, match="No space left"), recorder(model, target):
        pass
    assert not list(target.parent.iterdir())
    monkeypatch.undo()
    with recorder(model, target):
        model(X)


def test_no_room_for_the_file_leaves_the_journal(
    target: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mhabridge.recording.finishing._write", no_room)
    model = chain()
    with pytest.raises(CheckpointError, match=r"No space left.*recorded is in .*\.journal"), recorder(model, target):
        model(X)
    assert [file.name for file in target.parent.iterdir()] == ["a.safetensors.journal"]
    assert reading(journal_of(target)).metadata["complete"] is True

    def failing_block() -> None:
        with recorder(model, target, overwrite=True):
            model(X)
            raise ZeroDivisionError

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError):
            failing_block()
    assert any("No space left" in str(one.message) for one in said)


def test_a_mistake_of_the_recorder_does_not_reach_the_model(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(layer: Any) -> bool:
        raise LookupError("a bug")

    monkeypatch.setattr(plain_framework, "training", broken)
    model = chain()
    with pytest.raises(CheckpointError, match="ended early: LookupError: a bug") as caught, recorder(model, target):
        assert model(X).array.shape == (2, 3)
    assert isinstance(caught.value.__cause__, LookupError)


def test_a_child_process_does_not_write_into_the_parents_journal(target: Path, reading: Reading) -> None:
    model = chain()
    with recorder(model, target):
        model(X)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads of the frameworks, when these were loaded
            child = os.fork()
        if not child:
            model(X)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert len(reading(target).metadata["calls"]) == 4


def test_threads_do_not_mix_their_calls(target: Path, reading: Reading) -> None:
    second_began, first_ended = threading.Event(), threading.Event()

    class Slow(Attention):
        def forward(self, query: Any, key: Any, value: Any) -> Any:  # type: ignore[override]
            if query.array[0] == 1:
                second.start()
                assert second_began.wait(20)
            else:
                second_began.set()
                assert first_ended.wait(20)
            return query, None

    layer = Slow()
    second = threading.Thread(target=layer, args=(Tensor(np.full(2, 2, "f4")), X, X))
    with recorder(layer, target):
        layer(Tensor(np.full(2, 1, "f4")), X, X)
        first_ended.set()
        second.join()
    found = reading(target)
    for call in found.metadata["calls"]:
        given, answered = call["arguments"]["query"]["tensor"], call["outputs"][0]["tensor"]
        assert found.read(given).tolist() == found.read(answered).tolist()


# -- names that are taken ----------------------------------------------------------------------------------------------


def test_an_old_file_and_an_old_journal_are_safe(target: Path) -> None:
    model = chain()
    for file in (target, journal_of(target)):
        file.write_text("precious")
        with pytest.raises(CheckpointError, match=r"a file that exists.*overwrite=True"), recorder(model, target):
            pass
        assert file.read_text() == "precious"
        file.unlink()
    target.write_text("old")
    journal_of(target).write_text("old")
    with recorder(model, target, overwrite=True):
        model(X)
    assert target.stat().st_size > 1000
    assert not journal_of(target).exists()


def test_a_file_that_appears_meanwhile_is_safe(target: Path, reading: Reading) -> None:
    def block() -> None:
        with recorder(chain(), target) as made:
            made.model(X)
            target.write_text("precious")

    with pytest.raises(CheckpointError, match="a file that exists"):
        block()
    assert target.read_text() == "precious"
    assert len(reading(journal_of(target)).metadata["calls"]) == 4


def test_options_and_places_that_cannot_be(target: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="path: given None"):
        recorder(chain(), None)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="limit"):
        recorder(chain(), target, limit=-1)
    with pytest.raises(CheckpointError, match="a folder that does not exist"), recorder(chain(), target / "b"):
        pass
    with pytest.raises(CheckpointError, match="No such file"), recorder(chain(), target, inputs_from="x"):
        pass
    assert list(target.parent.iterdir()) == []
    with pytest.raises(CheckpointError, match="File name too long"), recorder(chain(), target.with_name("x" * 254)):
        pass
    made = recorder(chain(), target)
    with pytest.warns(RuntimeWarning, match="nothing was recorded"), made:
        pass
    with pytest.raises(ArgumentError, match="was used"), made:
        pass


# -- the journal -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A journal of two tensors and some events."""
    made = Journal(tmp_path / "small.journal")
    made.event({"start": {"format": 1, "framework": "plain", "version": "1.0", "environment": {}}})
    made.event({"layer": {"path": "a", "parameters": {}}})
    made.tensor("calls/000000/outputs/0", "BOOL", (3,), memoryview(b"\0\1\0"))
    made.tensor("calls/000000/arguments/x", "F32", (2,), memoryview(np.ones(2, "<f4")).cast("B"))
    made.event({"call": {"index": 0, "layer": "a", "arguments": {"x": {"tensor": "calls/000000/arguments/x"}}}})
    made.event({"left_out": "b: why"})
    made.event({"end": {"complete": True}})
    made.close()
    return made.path


def test_cut_at_every_byte_what_is_whole_is_read(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    with open(small, "rb") as file:
        ends = [record.offset + record.length for record in scan(file)]
    assert len(ends) == 7
    assert ends[-1] == len(whole)
    part = tmp_path / "part.journal"
    for length in range(len(whole)):
        part.write_bytes(whole[:length])
        with open(part, "rb") as file:
            found = scan(file)
            assert len(list(found)) == sum(end <= length for end in ends), length
            assert bool(found.broken) == (length not in (8, *ends)), length
        if length >= 8:
            contents = open_contents(part)
            assert contents.metadata["complete"] is False
            assert "what came after that is not here" in contents.metadata["left_out"][-1]
            assert len(contents.tensors) == sum(end <= length for end in ends[2:4])
            contents.close()


def test_every_flipped_bit_is_noticed(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    part = tmp_path / "part.journal"
    for position in range(8, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        part.write_bytes(damaged)
        with open(part, "rb") as file:
            found = scan(file)
            before = list(found)
        assert found.broken, position
        assert all(record.offset + record.length <= position for record in before), position


def test_a_part_of_a_journal_can_be_finished(small: Path, tmp_path: Path, reading: Reading) -> None:
    small.write_bytes(small.read_bytes()[:-5])
    said = finish(small, tmp_path / "b.safetensors")
    found = reading(tmp_path / "b.safetensors")
    assert found.metadata == said
    assert found.metadata["complete"] is False
    assert found.metadata["left_out"][0] == "b: why"
    assert "is cut off" in found.metadata["left_out"][1]
    assert found.read("calls/000000/outputs/0").tolist() == [False, True, False]
    assert found.read("calls/000000/arguments/x").tolist() == [1.0, 1.0]
    assert not small.exists()


def test_tensors_lie_aligned_in_the_file(small: Path, tmp_path: Path, reading: Reading) -> None:
    finish(small, tmp_path / "b.safetensors")
    found = reading(tmp_path / "b.safetensors")
    assert all(place.offset % journals.ITEM_SIZES[place.code] == 0 for place in found.tensors.values())


def test_ctrl_c_in_the_middle_of_a_record_leaves_whole_ones(tmp_path: Path) -> None:
    made = Journal(tmp_path / "a.journal")
    made.event({"left_out": "one"})

    class Interrupted(Full):
        def write(self, data: Any) -> int:
            if self.room <= 0:
                raise KeyboardInterrupt
            return super().write(data)

    file, made._file = made._file, Interrupted(made._file, 10)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        made.event({"left_out": "two"})
    made._file = file
    made.event({"left_out": "three"})
    made.close()
    with open(made.path, "rb") as opened:
        assert [record.header["event"]["left_out"] for record in scan(opened)] == ["one", "three"]


@pytest.mark.parametrize(
    "content", [b"", b"x", b"MHAREC0", b"\x10\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 99]
)
def test_what_is_no_recording(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="no recording"):
        open_contents(tmp_path / "a")


def test_the_public_function_has_the_same_options() -> None:
    import dataclasses
    import inspect

    from mhabridge.recording import record

    public = inspect.signature(record).parameters
    own = {field.name: field.default for field in dataclasses.fields(recorders.Options)}
    assert {name: item.default for name, item in public.items() if name not in ("model", "path")} == own


def test_a_model_of_no_framework() -> None:
    from mhabridge.recording import record

    for model in (3, types, Layer()):
        with pytest.raises(ArgumentTypeError, match="expected a module or cell of torch, mindspore, megengine"):
            record(model, "never")
