"""What was done to a layer's parameters is named, from nothing but the parameters; and nothing is made up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mhabridge.diff.comparing import compare
from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.diagnosis.arrangements import arrangement, packed_arrangement
from mhabridge.diff.diagnosis.sources import ArraySource
from mhabridge.diff.diagnosis.weights import diagnose_weights

E, H = 32, 4
PARTS = ("q", "k", "v", "out")
Arrays = dict[str, np.ndarray]


def layer(seed: int = 0, bias: bool = True) -> Arrays:
    rng = np.random.default_rng(seed)
    found = {f"{part}_weight": rng.standard_normal((E, E)).astype("f4") for part in PARTS}
    return found | ({f"{part}_bias": rng.standard_normal(E).astype("f4") for part in PARTS} if bias else {})


def diagnosed(first: Arrays, second: Arrays, heads: int | None = H) -> Diagnosis:
    differing = {}
    for name in first | second:
        found = compare(first.get(name), second.get(name))
        if not found.ok:
            differing[name] = found.cosine
    sources = [{name: ArraySource(array) for name, array in side.items()} for side in (first, second)]
    return diagnose_weights("attn", "b", *sources, differing, {name: f"b.{name}" for name in second}, heads)


def transpose(named: Arrays) -> None:
    named["out_weight"] = named["out_weight"].T.copy()


def swap_query_and_key(named: Arrays) -> None:
    for part in ("weight", "bias"):
        named[f"q_{part}"], named[f"k_{part}"] = named[f"k_{part}"], named[f"q_{part}"]


def turn_q_k_v_round(named: Arrays) -> None:
    named["q_weight"], named["k_weight"], named["v_weight"] = named["v_weight"], named["q_weight"], named["k_weight"]


def take_values_for_keys(named: Arrays) -> None:
    named["k_weight"] = named["v_weight"].copy()


def slice_in_the_middle(named: Arrays) -> None:
    rows = np.concatenate([named[f"{part}_weight"] for part in "qkv"])
    named["k_weight"] = rows[E // 2 : E // 2 + E].copy()


def permute_heads(named: Arrays) -> None:
    for part in "qkv":
        for kind in ("weight", "bias"):
            array = named[f"{part}_{kind}"]
            named[f"{part}_{kind}"] = array.reshape(H, E // H, -1)[[2, 0, 1, 3]].reshape(array.shape)


def permute_heads_everywhere(named: Arrays) -> None:
    permute_heads(named)
    named["out_weight"] = named["out_weight"].reshape(E, H, -1)[:, [2, 0, 1, 3]].reshape(E, E)


def interleave_heads(named: Arrays) -> None:
    named["q_weight"] = named["q_weight"].reshape(H, E // H, E).swapaxes(0, 1).reshape(E, E)


def interleave_columns(named: Arrays) -> None:
    named["out_weight"] = named["out_weight"].reshape(E, H, E // H).swapaxes(1, 2).reshape(E, E)


def rotary_order(named: Arrays) -> None:
    named["q_weight"] = named["q_weight"].reshape(H, 2, E // H // 2, E).swapaxes(1, 2).reshape(E, E)


def by_heads(named: Arrays) -> None:
    rows = np.concatenate([named[f"{part}_weight"] for part in "qkv"])
    turned = rows.reshape(3, H, E // H, E).swapaxes(0, 1).reshape(3 * E, E)
    named["q_weight"], named["k_weight"], named["v_weight"] = np.split(turned, 3)


def negate(named: Arrays) -> None:
    named["v_weight"] = -named["v_weight"]


def scale(named: Arrays) -> None:
    named["q_weight"] = named["q_weight"] * np.float32((E / H) ** -0.5)


def double_a_bias(named: Arrays) -> None:
    named["out_bias"] = named["out_bias"] * 2


def lose_a_bias(named: Arrays) -> None:
    del named["k_bias"]


def empty_a_bias(named: Arrays) -> None:
    named["k_bias"] = np.zeros(E, "f4")


def exchange_biases(named: Arrays) -> None:
    named["q_bias"], named["v_bias"] = named["v_bias"], named["q_bias"]


def shuffle_rows(named: Arrays) -> None:
    named["v_weight"] = named["v_weight"][np.random.default_rng(1).permutation(E)]


FAULTS: dict[Callable[[Arrays], None], tuple[str, str, str]] = {
    transpose: ("projection transposed", "out_weight", "b.out_weight: transpose"),
    swap_query_and_key: ("q/k/v in another order", "q_weight, k_weight, q_bias, k_bias", "put what lies in b.k_weight"),
    turn_q_k_v_round: ("q/k/v in another order", "q_weight, k_weight, v_weight", "put what lies in b.k_weight there"),
    take_values_for_keys: ("wrong slice", "k_weight", "b.k_weight: take the first side's k_weight"),
    slice_in_the_middle: ("wrong slice", "k_weight", "take rows [32:64] of the packed projection"),
    permute_heads: ("heads permuted", "q_weight, k_weight, v_weight, q_bias", "the heads in the order [1, 2, 0, 3]"),
    permute_heads_everywhere: ("heads permuted", "q_weight, k_weight, v_weight, out_weight", "order [1, 2, 0, 3]"),
    interleave_heads: ("heads interleaved", "q_weight", "bring the rows into the order (heads, head size)"),
    interleave_columns: ("heads interleaved", "out_weight", "bring the columns into the order (heads, head size)"),
    rotary_order: ("rows inside heads permuted", "q_weight", "from pairs into halves"),
    by_heads: ("packed projection in another order", "q_weight, k_weight, v_weight", "(3, heads 4, head size 8)"),
    negate: ("negated", "v_weight", "b.v_weight: negate"),
    scale: ("scaled", "q_weight", "b.q_weight: divide by 0.353553"),
    double_a_bias: ("bias doubled", "out_bias", "b.out_bias: divide by 2"),
    lose_a_bias: ("bias lost", "k_bias", "k_bias: take it from the first side"),
    empty_a_bias: ("zeros", "k_bias", "b.k_bias: take it from the first side"),
    exchange_biases: ("q/k/v in another order", "q_bias, v_bias", "put what lies in b.v_bias there"),
    shuffle_rows: ("rows permuted", "v_weight", "take the rows in the order ["),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_fault_is_named(fault: Callable[[Arrays], None], dtype: str) -> None:
    first, second = layer(), layer()
    fault(second)
    if dtype != "float32":  # a port to half precision
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        second = {name: array.astype(kind) for name, array in second.items()}
    found = diagnosed(first, second)
    name, where, mend = FAULTS[fault]
    assert [one.name for one in found.faults] == [name]
    assert found.faults[0].where.startswith(where)
    assert mend in found.faults[0].mend
    assert (found.sure, found.layer, found.side) == ("certain", "attn", "b")
    assert found.explains <= 1.0


@pytest.mark.parametrize("fault", [by_heads, permute_heads, interleave_heads, transpose], ids=lambda one: one.__name__)
def test_heads_need_not_be_known(fault: Callable[[Arrays], None]) -> None:
    first, second = layer(), layer()
    fault(second)
    assert [one.name for one in diagnosed(first, second, None).faults] == [FAULTS[fault][0]]


@pytest.mark.parametrize(("begin", "both"), [(64, False), (64, True), (40, False), (40, True)])
def test_a_wrong_slice_of_one_packed_tensor_is_said_with_its_rows(begin: int, both: bool) -> None:
    """In the same words as by a diff of what the layers compute, whether it is another's whole block or not."""
    first, second = layer(), layer()
    for kind in ("weight", "bias")[: 1 + both]:
        rows = np.concatenate([first[f"{part}_{kind}"] for part in "qkv"])
        second[f"k_{kind}"] = rows[begin : begin + E].copy()
    names = {name: f"b.in_proj_{name[2:]} ({name})" for name in second}
    sources = [{name: ArraySource(array) for name, array in side.items()} for side in (first, second)]
    differing = {name: 0.1 for name in first if not np.array_equal(first[name], second[name])}
    (fault,) = diagnose_weights("attn", "b", *sources, differing, names, H).faults
    line = f"rows 32:64 of the packed projection are the key, not {begin}:{begin + E}"
    there = ["b.in_proj_weight", "b.in_proj_bias"][: 1 + both]
    assert (fault.name, fault.mend) == ("wrong slice", "; ".join(f"{name}: {line}" for name in there))
    assert fault.words.endswith(f"rows [{begin}:{begin + E}] of the packed projection instead of [32:64]")


PAIRS = [
    (transpose, negate),
    (transpose, swap_query_and_key),
    (interleave_columns, take_values_for_keys),
    (permute_heads, transpose),
    (scale, lose_a_bias),
    (by_heads, exchange_biases),
    (negate, double_a_bias),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].__name__}-{pair[1].__name__}")
def test_two_faults_are_named(pair: Any) -> None:
    first, second = layer(), layer()
    for fault in pair:
        fault(second)
    assert {one.name for one in diagnosed(first, second).faults} == {FAULTS[fault][0] for fault in pair}


def test_two_faults_of_one_matrix() -> None:
    first, second = layer(), layer()
    second["q_weight"] = -second["k_weight"].T
    found = diagnosed(first, second).faults
    assert [(one.name, one.words) for one in found] == [
        ("wrong slice", "q_weight holds k_weight, transposed and negated")
    ]
    second["q_weight"] = layer()["q_weight"].T.reshape(H, E // H, E)[[1, 0, 2, 3]].reshape(E, E)
    found = diagnosed(first, second).faults
    assert [(one.name, one.mend[:30]) for one in found] == [("heads permuted", "b.q_weight: transpose, then ta")]


def test_heads_that_are_permuted_everywhere_give_the_same_outputs() -> None:
    first, second = layer(), layer()
    permute_heads_everywhere(second)
    assert "outputs are the same" in diagnosed(first, second).words
    permute_heads(once := layer())
    assert "outputs are the same" not in diagnosed(first, once).words


def test_other_numbers_are_unexplained() -> None:
    found = diagnosed(layer(), layer(seed=1))
    assert (found.explained, found.sure, found.faults) == (False, "", ())
    assert found.tried > 50
    assert "Unexplained: q_weight, k_weight" in found.words


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 1e-1])
def test_noise_is_unexplained(size: float) -> None:
    first, second = layer(), layer()
    rng = np.random.default_rng(2)
    second = {
        name: (array * (1 + size * rng.standard_normal(array.shape))).astype("f4") for name, array in second.items()
    }
    assert not diagnosed(first, second).explained


@pytest.mark.parametrize("fault", [one for one in FAULTS if one not in (lose_a_bias, empty_a_bias)])
def test_one_wrong_element_beside_a_fault_is_no_explanation(fault: Callable[[Arrays], None]) -> None:
    first, second = layer(), layer()
    fault(second)
    where = next(name for name in second if not compare(first[name], second[name]).ok)
    second[where] = second[where].copy()
    second[where][5] += 0.25
    assert not diagnosed(first, second).explained


def test_what_is_explained_is_said_beside_what_is_not() -> None:
    first, second = layer(bias=False), layer(bias=False)
    transpose(second)
    second["q_weight"] = layer(seed=3)["q_weight"]
    found = diagnosed(first, second)
    assert (found.explained, found.faults) == (False, ())
    assert "Unexplained: q_weight" in found.words
    assert "What is explained: out_weight is transposed" in found.words


def test_what_cannot_be_told_apart_is_said() -> None:
    first = layer(bias=False)
    first["v_weight"] = first["k_weight"].copy()
    second = {**first, "q_weight": first["k_weight"].copy()}
    found = diagnosed(first, second)
    assert found.sure == "likely"
    assert [[one.words for one in other] for other in found.others] == [["q_weight holds v_weight"]]


def test_orders_have_names() -> None:
    rows = np.arange(24)
    assert packed_arrangement(rows, 2) is None or packed_arrangement(rows, 2).words.count("(3, heads 2") == 2
    assert packed_arrangement(np.random.default_rng(0).permutation(24), None) is None
    assert arrangement(rows[::-1].tolist(), None, "columns").name == "columns reversed"
    assert arrangement(np.argsort(rows.reshape(3, 2, 4).swapaxes(0, 1).ravel()).tolist(), 6).name == "heads permuted"
