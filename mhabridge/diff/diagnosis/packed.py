"""What goes wrong with the packed projection: blocks in another order, slices at wrong rows, rows in another order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mhabridge.diff.diagnosis.evidence import Case
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.hypotheses import Hypothesis
from mhabridge.diff.diagnosis.state import LETTERS, State, Tensor
from mhabridge.spec import MHASpec

BOTH = ("weight", "bias")
WORDS = {"q": "query", "k": "key", "v": "value", "out": "output"}


def equal_features(spec: MHASpec) -> bool:
    """Whether query, key and value have as many features, so that their projections can be packed into one."""
    return spec.kdim is None and spec.vdim is None


def stacked(case: Case) -> bool:
    """Whether the layer's three projections can lie in one packed tensor."""
    return equal_features(case.spec) and case.state.has(*(f"{letter}_weight" for letter in LETTERS))


def native_name(name: str, spec: MHASpec) -> str:
    """Where PyTorch keeps a parameter, with its rows if it lies in a packed one.

    Example:
        >>> native_name("k_weight", MHASpec(8, 2)), native_name("out_bias", MHASpec(8, 2))
        ('in_proj_weight[8:16]', 'out_proj.bias')
    """
    letter, _, what = name.partition("_")
    if letter == "out":
        return f"out_proj.{what}"
    if what == "weight" and not equal_features(spec):
        return f"{letter}_proj_weight"
    start, stop = _rows(spec)[letter]
    return f"in_proj_{what}[{start}:{stop}]"


def _rows(spec: MHASpec) -> dict[str, tuple[int, int]]:
    shapes = spec.parameter_shapes()
    sizes = [shapes.get(f"{letter}_weight", (0,))[0] for letter in LETTERS]
    ends = np.cumsum([0, *sizes]).tolist()
    return {letter: (ends[i], ends[i + 1]) for i, letter in enumerate(LETTERS)}


def _packed_names(what: Sequence[str]) -> str:
    return ", ".join(f"in_proj_{each}" for each in what)


def taken(state: State, moves: dict[str, str]) -> State | None:
    """A state with parameters that hold others' values; None where one is missing or of another shape."""
    if not all(state.has(name, source) for name, source in moves.items()):
        return None
    found = {name: state.parameters[source] for name, source in moves.items()}
    if any(tensor.shape != state.parameters[name].shape for name, tensor in found.items()):
        return None
    return state.with_parameters(**found)


def _moves(case: Case, letters: dict[str, str], what: Sequence[str]) -> dict[str, str]:
    """By parameter; biases only where both are there."""
    pairs = {f"{to}_{each}": f"{source}_{each}" for each in what for to, source in letters.items()}
    return {name: source for name, source in pairs.items() if case.state.has(name, source)}


def reordered(case: Case) -> Iterator[Hypothesis]:
    """q, k and v in another order: weights and biases, or weights alone (biases alone: see ``biases``)."""
    for order in list(itertools.permutations(LETTERS))[1:]:
        letters = {to: source for to, source in zip(LETTERS, order, strict=True) if to != source}
        for what in (BOTH, ("weight",)):
            moves = _moves(case, letters, what)
            if taken(case.state, moves) is None or (what == BOTH and not any("bias" in name for name in moves)):
                continue
            found = ", ".join(WORDS[each] for each in order)
            fault = Fault(
                "projections in another order",
                _packed_names(what),
                f"the blocks were taken as {found} instead of query, key, value",
                f"{_packed_names(what)}: order query, key, value, not {found}",
            )
            yield Hypothesis(fault, functools.partial(taken, moves=moves))


def flat_blocks(case: Case) -> Iterator[Hypothesis]:
    """A flat vector (MegEngine's io_weight_bias) whose blocks go in another order, the output's among them.

    Without the output's it is ``reordered``; biases alone: see ``biases``.
    """
    four = (*LETTERS, "out")
    for order in list(itertools.permutations(four))[1:]:
        letters = {to: source for to, source in zip(four, order, strict=True) if to != source}
        if "out" not in letters:
            continue
        for what in (BOTH, ("weight",)):
            moves = _moves(case, letters, what)
            if len(moves) < len(letters) * len(what) or taken(case.state, moves) is None:
                continue
            found = ", ".join(WORDS[each] for each in order)
            names = "all weights and biases" if what == BOTH else "all weights"
            fault = Fault(
                "projections in another order",
                names,
                f"the blocks of {names} were taken as {found} instead of query, key, value, output",
                f"{', '.join(f'in_proj_{each}, out_proj.{each}' for each in what)}: "
                f"order query, key, value, output, not {found}",
            )
            usual = what == BOTH and len(letters) == 2
            yield Hypothesis(fault, functools.partial(taken, moves=moves), rare=not usual)


def wrong_slice(case: Case) -> Iterator[Hypothesis]:
    """One projection got another's block: weights and bias, or weights alone."""
    for to, source in itertools.permutations((*LETTERS, "out"), 2):
        for what in (BOTH, ("weight",)):
            moves = _moves(case, {to: source}, what)
            if f"{to}_weight" not in moves or taken(case.state, moves) is None or len(moves) < len(what):
                continue
            names = ", ".join(f"{to}_{each}" for each in what)
            fault = Fault(
                "wrong slice",
                names,
                f"the {WORDS[to]} projection got the {WORDS[source]}'s block",
                _mend(case, to, source),
            )
            yield Hypothesis(fault, functools.partial(taken, moves=moves), rare="out" in (to, source))


def _mend(case: Case, to: str, source: str) -> str:
    if to == "out" or not equal_features(case.spec):
        return f"{native_name(f'{to}_weight', case.spec)}: take it from the {WORDS[to]}, not from the {WORDS[source]}"
    rows = _rows(case.spec)
    right = f"in_proj_weight: rows {rows[to][0]}:{rows[to][1]} are the {WORDS[to]}"
    return f"{right}, not {rows[source][0]}:{rows[source][1]}" if source in rows else f"{right}, not out_proj.weight"


def shifted_slice(case: Case) -> Iterator[Hypothesis]:
    """One projection got rows that begin at a head's boundary inside a block, or one row beside its own."""
    if not stacked(case):
        return
    rows, total = _rows(case.spec), sum(case.state.parameters[f"{letter}_weight"].shape[0] for letter in LETTERS)
    size = case.spec.q_head_dim
    for letter in LETTERS:
        start, stop = rows[letter]
        length = stop - start
        blocks = {begin for begin, _ in rows.values()}
        steps = set(range(0, total - length + 1, size)) if size > 1 else set()
        near = {start - 1, start + 1}
        for begin in sorted((steps | near) - blocks):
            if begin < 0 or begin + length > total:
                continue
            for what in (BOTH, ("weight",), ("bias",)):
                change = _Slice(letter, begin, length, what)
                if change(case.state) is None:
                    continue
                fault = Fault(
                    "wrong slice",
                    ", ".join(f"{letter}_{each}" for each in what),
                    f"the {WORDS[letter]} projection got the packed rows {begin}:{begin + length}",
                    f"{_packed_names(what)}: rows {start}:{stop} are the {WORDS[letter]}, not {begin}:{begin + length}",
                )
                yield Hypothesis(fault, change, rare=True)


class _Slice:
    """Some rows of the packed tensors in the place of one projection."""

    def __init__(self, letter: str, begin: int, length: int, what: Sequence[str]) -> None:
        self.letter, self.what = letter, what
        self.key = ("slice", begin, length)
        self.rows = np.arange(begin, begin + length)

    def __call__(self, state: State) -> State | None:
        changed = {}
        for what in self.what:
            names = [f"{letter}_{what}" for letter in LETTERS]
            if not state.has(*names):
                return None
            sources = tuple(state.parameters[name] for name in names)
            changed[f"{self.letter}_{what}"] = Tensor.of_rows(self.key, sources, self.rows)
        return state.with_parameters(**changed)


# -- rows in another order ---------------------------------------------------------------------------------------------

_AXES = ("q/k/v", "head", "feature")


def repacked(case: Case) -> Iterator[Hypothesis]:
    """The packed rows go by other axes first: (q/k/v, head, feature) is right; GPT-NeoX has (head, q/k/v, feature)."""
    names = [f"{letter}_weight" for letter in LETTERS]
    if not stacked(case) or len({case.state.parameters[name].shape for name in names}) > 1:
        return
    sizes = (3, case.state.heads, case.spec.q_head_dim)
    seen = {tuple(range(3 * sizes[1] * sizes[2]))}
    for order in list(itertools.permutations(range(3)))[2:]:  # (q/k/v, feature, head) is one of ``heads.interleaved``
        for written in (True, False):
            index = _index(sizes, order, written)
            if tuple(index) in seen:
                continue
            seen.add(tuple(index))
            yield from _repacked(case, index, order, written)


def _index(sizes: tuple[int, int, int], order: tuple[int, ...], written: bool) -> np.ndarray:
    """Which rows of the right order stand where, if they were written, or read, by another order of axes."""
    rows = np.arange(np.prod(sizes))
    if written:
        return rows.reshape(sizes).transpose(order).ravel()
    return rows.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order)).ravel()


def _repacked(case: Case, index: np.ndarray, order: tuple[int, ...], written: bool) -> Iterator[Hypothesis]:
    axes = ", ".join(_AXES[axis] for axis in order)
    for what in (BOTH, ("weight",), ("bias",)):
        if not case.state.has(*(f"{letter}_{each}" for letter in LETTERS for each in what)):
            continue
        fault = Fault(
            "packed rows in another order",
            _packed_names(what),
            f"the rows were {'written' if written else 'read'} by ({axes}), and "
            f"{'read' if written else 'written'} by ({', '.join(_AXES)})",
            f"{_packed_names(what)}: rows go by ({', '.join(_AXES)}), not by ({axes})",
        )
        change = _Repack(index, (order, written), what)
        usual = what == BOTH and order in ((1, 0, 2), (1, 2, 0))
        yield Hypothesis(fault, change, rare=not usual)


class _Repack:
    """All rows of the packed tensors by an index."""

    def __init__(self, index: np.ndarray, key: object, what: Sequence[str]) -> None:
        self.index, self.key, self.what = index, key, what

    def __call__(self, state: State) -> State | None:
        changed = {}
        for what in self.what:
            names = [f"{letter}_{what}" for letter in LETTERS]
            if not state.has(*names):
                return None
            sources = tuple(state.parameters[name] for name in names)
            length = sources[0].shape[0]
            for i, name in enumerate(names):
                rows = self.index[i * length : (i + 1) * length]
                changed[name] = Tensor.of_rows(("repack", self.key, i), sources, rows)
        return state.with_parameters(**changed)


def flat_by_turns(case: Case) -> Iterator[Hypothesis]:
    """A flat vector (MegEngine's io_weight_bias) written as weight, bias, weight, bias and read as weights first."""
    names = [f"{letter}_{what}" for what in BOTH for letter in (*LETTERS, "out")]
    if not case.state.has(*names):
        return
    turns = [f"{letter}_{what}" for letter in (*LETTERS, "out") for what in BOTH]
    for written, read in ((turns, names), (names, turns)):
        words = "each bias after its weight" if written is turns else "all biases after all weights"
        fault = Fault(
            "flat vector in another order",
            "all weights and biases",
            f"the flat vector was written with {words}, and read otherwise",
            "io_weight_bias: first the weights of query, key, value and output, then their biases",
        )
        yield Hypothesis(fault, functools.partial(_through_flat, written=written, read=read), True, alone=True)


def _through_flat(state: State, written: list[str], read: list[str]) -> State | None:
    if not state.has(*written):
        return None
    changed, start = {}, 0
    first, *others = (state.parameters[name] for name in written)
    for name in read:
        shape = state.parameters[name].shape
        stop = start + int(np.prod(shape))

        def cut(*arrays: np.ndarray, at: slice = slice(start, stop), shape: tuple[int, ...] = shape) -> np.ndarray:
            flat = np.concatenate([array.T.ravel() for array in arrays])  # weights lie there as (in, out)
            return np.asarray(flat[at].reshape(shape[::-1]).T)

        changed[name] = first.then(("flat", tuple(written), name), cut, *others, shape=shape)
        start = stop
    return state.with_parameters(**changed)
