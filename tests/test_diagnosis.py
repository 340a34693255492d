"""Injected faults are named, clean ports are left alone, and what nobody knows stays unexplained."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

import mhabridge as mb
from mhabridge import dtypes, reference
from mhabridge.backends.running import prepare, restore
from mhabridge.diff.diagnosis import heads, precision, trials
from mhabridge.diff.diagnosis.computing import Computer
from mhabridge.diff.diagnosis.evidence import choose, read
from mhabridge.diff.diagnosis.findings import Diagnosis
from mhabridge.diff.diagnosis.hypotheses import hypotheses
from mhabridge.diff.diagnosis.search import diagnose
from mhabridge.diff.diagnosis.trials import Trials
from mhabridge.diff.inputs import random_inputs, random_masks
from mhabridge.diff.rounding import Accuracy, named
from tests import faulty_ports
from tests.faulty_ports import Trial, draw, right

SIZES = (16, 32)


def _diagnose(trial: Trial) -> Diagnosis:
    return diagnose(trial.spec, trial.weights, trial.inputs, trial.call, trial.observed, trial.expected)


@functools.cache
def _trials(count: int, first: int, last: int) -> tuple[Trial, ...]:
    drawn = [draw(seed, count, sizes=SIZES) for seed in range(first, last)]
    return tuple(trial for trial in drawn if trial is not None)


def _named(trials: tuple[Trial, ...]) -> float:
    wrong = []
    for trial in trials:
        found = _diagnose(trial)
        if not right(trial, found.faults):
            wrong.append(([each.name for each in trial.injected], found.words))
    print(*wrong, sep="\n")
    return 1.0 - len(wrong) / len(trials)


@pytest.mark.timeout(300)
def test_single_faults_are_named() -> None:
    trials = _trials(1, 1000, 1150)
    assert len(trials) > 80
    assert {trial.layout for trial in trials} == set(faulty_ports.LAYOUTS)
    assert {trial.spec.dtype for trial in trials} == {"float16", "bfloat16", "float32"}
    assert _named(trials) >= 0.95


@pytest.mark.timeout(300)
def test_pairs_of_faults_are_named() -> None:
    trials = _trials(2, 2000, 2028)
    assert len(trials) > 14
    assert _named(trials) >= 0.8


@pytest.mark.timeout(300)
def test_nothing_is_named_on_clean_ports() -> None:
    for trial in _trials(0, 3000, 3060):
        found = _diagnose(trial)
        assert not found.faults
        assert found.words == "Rounding explains it."
        assert found.explains <= 1.0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "group",
    [
        "heads permuted",
        "output columns by head",
        "order with output",
        "causal strict",
        "causal inverted",
        "causal past",
    ],
)
def test_each_of_these_is_named_by_itself(group: str) -> None:
    """One kind that is never named would still fit into what the drawn faults may miss."""
    drawn = [draw(seed, 1, "float32", SIZES, group) for seed in range(6000, 6060)]
    trials = tuple(trial for trial in drawn if trial is not None)[:8]
    assert len(trials) >= 6
    assert _named(trials) == 1.0


# -- what nobody knows -------------------------------------------------------------------------------------------------


def _reversed(port: faulty_ports.Port) -> None:
    port.weight("q")[...] = port.weight("q")[::-1].copy()


def _negated(port: faulty_ports.Port) -> None:
    port.weight("out")[...] = -port.weight("out").copy()


def _half_transposed(port: faulty_ports.Port) -> None:
    half = port.weight("v")[: port.spec.embed_dim // 2, : port.spec.embed_dim // 2]
    half[...] = half.T.copy()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("change", [_reversed, _negated, _half_transposed])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unknown_faults_stay_unexplained(monkeypatch: pytest.MonkeyPatch, change: Any, dtype: str) -> None:
    unknown = faulty_ports.Injected("unknown", (), change, "unknown")
    monkeypatch.setattr(faulty_ports, "injections", lambda *_: [unknown])
    trial = next(filter(None, (draw(seed, 1, dtype, SIZES) for seed in range(4000, 4050))))
    found = _diagnose(trial)
    assert not found.faults
    assert not found.sure
    assert found.words.startswith("Unexplained")
    assert found.tried > 1000


# -- the mending line --------------------------------------------------------------------------------------------------


def _case(**fields: Any) -> tuple[mb.MHASpec, mb.MHAWeights, tuple[np.ndarray, ...]]:
    spec = mb.MHASpec(**{"embed_dim": 32, "num_heads": 4, "batch_first": True, **fields})
    return spec, mb.MHAWeights.random(spec, seed=5), tuple(random_inputs(spec, 5).values())


def _answer(spec: mb.MHASpec, weights: mb.MHAWeights, inputs: Any, **call: Any) -> dict[str, np.ndarray]:
    prepared = prepare(spec, weights, *inputs, **call)
    found = named(restore(prepared, reference.attend(spec, weights, prepared.call)))
    return {name: dtypes.round_to(array, spec.dtype) for name, array in found.items()}


def test_the_real_life_slice_is_named_with_its_rows() -> None:
    spec, weights, inputs = _case()
    native = weights.to_layout("torch", spec)
    native["in_proj_weight"][32:64] = native["in_proj_weight"][64:96].copy()
    native["in_proj_bias"][32:64] = native["in_proj_bias"][64:96].copy()
    wrong = mb.MHAWeights.from_layout("torch", native, spec)
    found = diagnose(spec, weights, inputs, {}, _answer(spec, wrong, inputs), Accuracy("float32"), layer="a", side="b")
    assert (found.layer, found.side, found.sure) == ("a", "b", "certain")
    assert found.faults[0].mend == "in_proj_weight: rows 32:64 are the key, not 64:96"


def test_an_inverted_mask_is_named_with_its_mend() -> None:
    spec, weights, inputs = _case()
    masks = random_masks("padding", spec, 1)
    observed = _answer(spec, weights, inputs, key_padding_mask=~masks["key_padding_mask"])
    found = diagnose(spec, weights, inputs, masks, observed, Accuracy("float32"))
    assert [fault.mend for fault in found.faults] == ["key_padding_mask: invert"]


@pytest.mark.parametrize("order", [[3, 0, 2, 1], [1, 2, 3, 0], [1, 0, 3, 2]])
@pytest.mark.parametrize("returned", ["output", "heads"])
def test_the_output_s_columns_are_named_and_in_which_order_they_stand(order: list[int], returned: str) -> None:
    """From the output alone the rows of q, k and v, the other way round, explain it as well; one matrix is likelier."""
    spec, weights, inputs = _case()
    columns = np.arange(32).reshape(4, 8)[order].ravel()
    wrong = mb.MHAWeights(**{**weights.to_tree(), "out_weight": weights.out_weight[:, columns]})
    call = {"average_attn_weights": False}
    observed = _answer(spec, wrong, inputs, **call)
    observed = observed if returned == "heads" else {"output": observed["output"]}
    found = diagnose(spec, weights, inputs, call, observed, Accuracy("float32"))
    shown = ", ".join(map(str, order))
    assert found.faults[0].mend == f"out_weight: reorder the columns by head; they stand as {shown}"
    there = ", ".join(str(order.index(head)) for head in range(4))
    others = [fault.mend for other in found.others for fault in other]
    both = f"q_weight, k_weight, v_weight: reorder the rows by head; they stand as {there}"
    assert others == ([both] if returned == "output" else [])


@pytest.mark.parametrize("lengths", [(6, 6), (6, 8)])
@pytest.mark.parametrize("dead", ["nan", "uniform"])
def test_torch_tril_as_a_mask_that_blocks(lengths: tuple[int, int], dead: str) -> None:
    """With as many keys as queries its last row is fully masked: NaN, or equal weights where -inf is a large number."""
    spec, weights, _ = _case()
    inputs = tuple(random_inputs(spec, 5, target=lengths[0], source=lengths[1]).values())
    mask = np.tril(np.ones(lengths, bool))
    given = np.where(mask, -1e30, 0.0).astype("float32") if dead == "uniform" else mask
    observed = _answer(spec, weights, inputs, attn_mask=given)
    found = diagnose(spec, weights, inputs, {"is_causal": True}, observed, Accuracy("float32"))
    expected = {"is_causal: invert"} | ({"fully_masked: nan"} if dead == "uniform" and lengths == (6, 6) else set())
    assert {fault.mend for fault in found.faults} == expected


def test_the_flat_vector_with_value_and_output_exchanged() -> None:
    spec, weights, inputs = _case()
    native = weights.to_layout("megengine", spec)
    flat = native["io_weight_bias"].reshape(-1)
    size = 32 * 32
    for step, start in ((size, 0), (32, 4 * size)):
        value, out = (slice(start + i * step, start + (i + 1) * step) for i in (2, 3))
        flat[value], flat[out] = flat[out].copy(), flat[value].copy()
    wrong = mb.MHAWeights.from_layout("megengine", native, spec)
    found = diagnose(spec, weights, inputs, {}, _answer(spec, wrong, inputs), Accuracy("float32"))
    assert found.faults[0].mend.endswith("order query, key, value, output, not query, key, output, value")


def test_symmetric_faults_are_listed_as_others() -> None:
    """A value bias that is lost, and one that went to the key, where a bias does nothing, compute the same."""
    spec, weights, inputs = _case()
    wrong = mb.MHAWeights(**{**weights.to_tree(), "v_bias": np.zeros(32, "float32")})
    found = diagnose(spec, weights, inputs, {}, _answer(spec, wrong, inputs), Accuracy("float32"))
    assert (found.faults[0].name, found.faults[0].where) == ("bias missing", "v_bias")
    assert found.sure == "likely"
    assert ("bias on the wrong projection",) in [tuple(fault.name for fault in other) for other in found.others]


@pytest.mark.parametrize("policy", ["nan", "zero"])
def test_fully_masked_rows(policy: str) -> None:
    spec, weights, inputs = _case()
    mask = np.zeros((2, 7), bool)
    mask[1] = True
    call = {"key_padding_mask": mask, "fully_masked": policy}
    other = {**call, "fully_masked": "zero" if policy == "nan" else "nan"}
    found = diagnose(spec, weights, inputs, call, _answer(spec, weights, inputs, **other), Accuracy("float32"))
    assert found.faults[0].name == "fully masked rows"
    assert found.faults[0].mend == f"fully_masked: {policy}"
    clean = diagnose(spec, weights, inputs, call, _answer(spec, weights, inputs, **call), Accuracy("float32"))
    assert not clean.faults
    assert clean.words == "Rounding explains it."


def test_nothing_but_nan_is_unexplained() -> None:
    spec, weights, inputs = _case()
    observed = {"output": np.full((2, 5, 32), np.nan, "float32")}
    found = diagnose(spec, weights, inputs, {}, observed, Accuracy("float32"))
    assert not found.faults
    assert found.words.startswith("Unexplained: no element is finite")


def test_an_output_in_the_other_axis_order() -> None:
    spec, weights, inputs = _case()
    observed = {"output": _answer(spec, weights, inputs)["output"].swapaxes(0, 1)}
    found = diagnose(spec, weights, inputs, {}, observed, Accuracy("float32"))
    assert [fault.name for fault in found.faults] == ["output axes swapped"]


def test_gradients_that_are_scaled_are_named_and_others_are_not() -> None:
    spec, weights, inputs = _case()
    call = {"grad_output": np.random.default_rng(0).standard_normal((2, 5, 32)).astype("float32")}
    observed = _answer(spec, weights, inputs, **call)
    assert not diagnose(spec, weights, inputs, call, observed, Accuracy("float32")).faults
    half = {**observed, "grads.q_weight": observed["grads.q_weight"] / 2}
    found = diagnose(spec, weights, inputs, call, half, Accuracy("float32"))
    assert [(fault.name, fault.where) for fault in found.faults] == [("gradient scaled", "grads.q_weight")]
    assert "0.5 times" in found.faults[0].words
    turned = {**observed, "grads.q_weight": observed["grads.q_weight"].T}
    found = diagnose(spec, weights, inputs, call, turned, Accuracy("float32"))
    assert not found.faults
    assert found.words.startswith("Unexplained: the output and the weights are right")


# -- dropout and precision ---------------------------------------------------------------------------------------------


def test_weights_before_dropout_and_after() -> None:
    spec, weights, inputs = _case(dropout=0.5)
    call = {"training": True, "average_attn_weights": False}
    dropped = _answer(spec, weights, inputs, **call)
    found = diagnose(spec, weights, inputs, call, dropped, Accuracy("float32"))
    assert not found.faults
    assert found.words == "Rounding explains it, given what was dropped."
    plain = _answer(spec, weights, inputs, average_attn_weights=False)
    before = {**dropped, "attn_weights": plain["attn_weights"]}
    assert diagnose(spec, weights, inputs, call, before, Accuracy("float32")).faults[0].name == "weights before dropout"
    assert diagnose(spec, weights, inputs, call, plain, Accuracy("float32")).faults[0].name == "dropout not applied"


def test_half_precision_sums() -> None:
    trial = next(filter(None, (draw(seed, 1, "float16", (256,), "half sums") for seed in range(100))))
    found = _diagnose(trial)
    assert [fault.name for fault in found.faults] == ["half-precision accumulation"]
    assert found.sure == "likely"


@pytest.mark.parametrize("factor", [1.001, 0.99])
def test_a_wrong_factor_is_no_noise(factor: float) -> None:
    """It is as small as half-precision sums would be, but it points along the output."""
    spec, weights, inputs = _case()
    output = _answer(spec, weights, inputs)["output"] * np.float32(factor)
    found = diagnose(spec, weights, inputs, {}, {"output": output}, Accuracy("float32"))
    assert not found.faults
    assert found.words.startswith("Unexplained")


@pytest.mark.parametrize("name", ["q_weight", "k_weight", "v_weight", "v_bias", "out_weight", "output"])
def test_one_wrong_element_or_an_offset_is_no_noise(name: str) -> None:
    """As small as half-precision sums would be, but alike in every row, or in few rows only."""
    spec = mb.MHASpec(embed_dim=64, num_heads=4, batch_first=True)
    weights, rng = mb.MHAWeights.random(spec, seed=3), np.random.default_rng(0)
    inputs = (rng.standard_normal((2, 12, 64)).astype("float32"),) * 3
    wrong = {key: array.copy() for key, array in weights.arrays().items()}
    if name != "output":
        wrong[name].reshape(-1)[-30] += np.float32(0.02)
    output = _answer(spec, mb.MHAWeights(**wrong), inputs)["output"]
    output = output + np.float32(3e-4) if name == "output" else output
    case = read(spec, weights, inputs, {}, {"output": output}, Accuracy("float32"))
    bench = Trials(case).bench()
    assert bench is not None
    assert not precision.explanations(case, bench)


def test_noise_in_a_few_rows_is_something_else() -> None:
    spec = mb.MHASpec(embed_dim=64, num_heads=4, batch_first=True)
    weights, rng = mb.MHAWeights.random(spec, seed=3), np.random.default_rng(0)
    inputs = (rng.standard_normal((2, 12, 64)).astype("float32"),) * 3
    output = _answer(spec, weights, inputs)["output"]
    noise = (rng.standard_normal(output.shape) * 2e-4).astype("float32")
    for rows, expected in ((12, True), (5, False)):
        observed = output.copy()
        observed[:, :rows] += noise[:, :rows]
        case = read(spec, weights, inputs, {}, {"output": observed}, Accuracy("float32"))
        bench = Trials(case).bench()
        assert bench is not None
        assert bool(precision.explanations(case, bench)) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("what", ["weights", "all"])
def test_a_narrower_dtype_inside_is_noise(dtype: str, what: str) -> None:
    spec = mb.MHASpec(embed_dim=64, num_heads=4, batch_first=True)
    weights, rng = mb.MHAWeights.random(spec, seed=3), np.random.default_rng(0)
    inputs = (rng.standard_normal((2, 12, 64)).astype("float32"),) * 3

    def cast(array: np.ndarray) -> np.ndarray:
        return dtypes.to_float64(dtypes.round_to(array, dtype)).astype("float32")

    narrow = mb.MHAWeights(**{name: cast(array) for name, array in weights.arrays().items()})
    given = (cast(inputs[0]),) * 3 if what == "all" else inputs
    output = _answer(spec, narrow, given)["output"]
    observed = {"output": cast(output) if what == "all" else output}
    case = read(spec, weights, inputs, {}, observed, Accuracy("float32"))
    bench = Trials(case).bench()
    assert bench is not None
    assert [each.faults[0].name for each in precision.explanations(case, bench)] == ["half-precision accumulation"]


# -- how much it costs -------------------------------------------------------------------------------------------------


def test_too_many_pairs_are_cut_short_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights, inputs = _case()
    output = np.random.default_rng(0).standard_normal((2, 5, 32)).astype("float32")
    monkeypatch.setattr(trials, "WORK", 2e8)
    found = diagnose(spec, weights, inputs, {}, {"output": output}, Accuracy("float32"))
    assert found.tried < 3000
    assert found.words.endswith("what was observed (the search of pairs was cut short).")


def test_what_looking_for_orders_of_heads_costs_is_counted_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many heads its least squares cost more than all else: unknowns are the square of the heads."""
    spec, weights, inputs = _case(embed_dim=64, num_heads=32)
    output = np.random.default_rng(0).standard_normal((2, 5, 64)).astype("float32")
    search = Trials(read(spec, weights, inputs, {}, {"output": output}, Accuracy("float32")))
    bench = search.bench(filtering=True)
    assert bench is not None
    before = bench.work
    list(heads.permutations(bench, search.case.state))
    each = (bench.work - before) / 8  # sets of projections
    assert each > 32**6 / 3 / 8
    states = [state for state in search._states() if not state[0].rare]
    assert len(states) > 24
    monkeypatch.setattr(trials, "WORK", 40 * each)
    before = search._work()
    list(search._ordered(states))
    assert search.cut_short
    assert 16 * each < search._work() - before < 26 * each  # one more of eight after the last look


@pytest.mark.parametrize("sizes", [(1, 4000, 2, 1), (6, 300, 32, 8)])
def test_of_long_sequences_a_part_is_looked_at(sizes: tuple[int, int, int, int]) -> None:
    batch, length, features, heads = sizes
    spec = mb.MHASpec(embed_dim=features, num_heads=heads, batch_first=True)
    x = np.random.default_rng(0).standard_normal((batch, length, features)).astype("float32")
    observed = {"output": x.copy()}
    observed["output"][-1, 3] += 1000.0
    case = read(spec, mb.MHAWeights.random(spec), (x, x, x), {}, observed, Accuracy("float32"))
    cut = choose(case)
    assert cut is not None
    assert cut.rows is not None
    assert 3 in cut.rows
    assert cut.batches is None or batch - 1 in cut.batches
    elements = len(cut.rows) * (batch if cut.batches is None else len(cut.batches))
    assert 30 <= elements <= 1e6 / length / heads
    assert choose(case, "rows") is None or length < 1000


# -- the search's own computation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["none", "padding+causal", "per-head", "float"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 8, "vdim": 16, "bias": False},
        {"residual": True, "scale": 0.3},
        {"q_proj_size": 16, "k_proj_size": 16, "v_proj_size": 8, "out_proj_size": 0, "out_bias": False},
    ],
)
def test_the_clean_state_is_the_reference(masks: str, fields: dict[str, Any]) -> None:
    spec, weights, inputs = _case(**fields)
    call = random_masks(masks, spec, 3)
    prepared = prepare(spec, weights, *inputs, **call)
    exact = reference.attend(spec, weights, prepared.call)
    case = read(spec, weights, inputs, call, {"output": exact.output}, Accuracy("float32"))
    found = Computer().run(case.state)
    np.testing.assert_allclose(found["output"], exact.output, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["attn_weights"], exact.attn_weights, rtol=1e-12, atol=1e-12)


def test_every_hypothesis_says_what_to_do() -> None:
    spec, weights, inputs = _case(add_bias_kv=True)
    call = random_masks("padding+causal", spec, 3)
    case = read(spec, weights, inputs, call, _answer(spec, weights, inputs, **call), Accuracy("float32"))
    table = hypotheses(case)
    assert len(table) > 150
    for each in table:
        assert all(dataclasses.astuple(each.fault))
        assert ":" in each.fault.mend
