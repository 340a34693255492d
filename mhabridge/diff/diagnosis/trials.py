"""Trying hypotheses: a cheap filter over all, full bounds for the few that pass it, single faults before pairs."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Sequence

from mhabridge.diff.diagnosis.computing import Cut
from mhabridge.diff.diagnosis.evidence import FILTER_SAMPLES, Bench, Case, Fit, choose
from mhabridge.diff.diagnosis.findings import Fault
from mhabridge.diff.diagnosis.heads import permutations
from mhabridge.diff.diagnosis.hypotheses import Hypothesis, hypotheses
from mhabridge.diff.diagnosis.state import State
from mhabridge.diff.rounding import SAMPLES

KEPT = 12  # hypotheses of a stage that get full bounds
FAR = 100.0  # times the clean bound that a right hypothesis is never off: its own bound may be wider, but not so much
NEAR = 3.0  # times as far off as the best one: not worth full bounds
MOST, LEAST = 30_000, 3_000  # pairs with a rare fault that are tried in a stage, by how much each costs
FLOPS = 8e9  # of such a stage, more or less
WORK = 1.5e10  # of all pairs, as ``Computer.work`` counts; that takes about five seconds of one processor
ORDERS = 0.4  # of that, what looking for orders of heads may take: one of 32 heads takes as long as some 500 pairs
CANDIDATE = 2e5  # of that, what a candidate costs besides what is computed for it
BASES = 24  # single faults after which the order of heads is looked for, or more
MOST_ORDERS = 3_200  # of such faults by H^2


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """One or two faults, and what is computed with them.

    Args:
        faults: in the order in which they happened.
        state: the computation.
        rank: how far down in the table they stand; of two that compute the same the first is named.
    """

    faults: tuple[Fault, ...]
    state: State
    rank: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Explanation:
    """Faults that explain what was observed.

    Args:
        faults: one or two.
        fit: how well.
        misfit: by the cheap measure.
        rank: of the candidate.
    """

    faults: tuple[Fault, ...]
    fit: Fit
    misfit: float
    rank: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the faults, in order."""
        return tuple(sorted(fault.name for fault in self.faults))


class Trials:
    """All hypotheses about one case."""

    def __init__(self, case: Case, root: Fault | None = None) -> None:
        self.case, self.root = case, root
        self.tried = 0
        self.cut_short = False  # not all pairs were tried
        self._most_work = math.inf
        self._benches: dict[Hashable, Bench] = {}
        self._chosen: dict[tuple[str, bool], Bench | None] = {}

    def bench(self, mixes: str = "", filtering: bool = False) -> Bench | None:
        """Where states are tried that mix rows or batch elements, or do not; None where that would be too much."""
        if (mixes, filtering) not in self._chosen:
            cut = choose(self.case, mixes, filtering)
            self._chosen[mixes, filtering] = None if cut is None else self._on(cut, filtering)
        return self._chosen[mixes, filtering]

    def _on(self, cut: Cut, filtering: bool) -> Bench:
        key = (
            None if cut.batches is None else tuple(cut.batches),
            None if cut.rows is None else tuple(cut.rows),
            None if cut.features is None else len(cut.features),
            filtering and cut is not None and not (cut.batches is None and cut.rows is None and cut.features is None),
        )
        if key not in self._benches:
            self._benches[key] = Bench(self.case, cut, samples=FILTER_SAMPLES if key[-1] else SAMPLES)
        return self._benches[key]

    # -- stages ----------------------------------------------------------------------------------------------------

    def clean(self) -> Fit:
        """How well the right computation explains what was observed."""
        return _there(self.bench()).fit(self.case.state)

    def singles(self) -> list[Explanation]:
        """Single faults that explain it, the likeliest first."""
        candidates = [Candidate((each.fault,), state, i) for i, (each, state) in enumerate(self._states())]
        return self._verified(self._ranked(candidates))

    def pairs(self) -> list[Explanation]:
        """Pairs of faults that explain it, the likeliest first; ``cut_short`` tells if they were too many."""
        self._most_work = self._work() + WORK
        effective = [each for each in self._effective() if not each[0].alone]
        usual = [each for each in effective if not each[0].rare]
        rare = [each for each in effective if each[0].rare]
        most = self._most()
        near = rare[: max(1, most // max(1, len(usual)))]
        stages: tuple[Iterable[Candidate], ...] = (
            self._paired(itertools.combinations(usual, 2)),
            self._ordered(effective),
            self._paired(itertools.product(usual, near)),
            self._paired(itertools.combinations(rare[: math.isqrt(2 * most)], 2)),
        )
        for stage in stages:
            found = self._verified(self._ranked(stage))
            if found or self._work() > self._most_work:
                return found
        return []

    def _work(self) -> float:
        return sum(bench.work for bench in self._benches.values()) + CANDIDATE * self.tried

    def _most(self) -> int:
        bench, sizes = self._filter(self.case.state), self.case.sizes
        rows = next(iter(bench.observed.values())).shape[-2] * min(sizes.batch, 2)
        cost = 4.0 * sizes.source * self.case.spec.embed_dim * (rows + 2)
        return int(min(MOST, max(LEAST, FLOPS / cost)))

    # -- candidates ------------------------------------------------------------------------------------------------

    def _states(self) -> list[tuple[Hypothesis, State]]:
        """Each hypothesis and what it makes of the clean state; each computation once."""
        if not hasattr(self, "_known"):
            seen = {self.case.state.signature}
            self._known = []
            orders = permutations(self._filter(self.case.state), self.case.state)
            for each in itertools.chain(hypotheses(self.case), orders):
                state = each.change(self.case.state)
                if state is not None and state.signature not in seen:
                    seen.add(state.signature)
                    self._known.append((each, state))
        return self._known

    def _effective(self) -> list[tuple[Hypothesis, State]]:
        """Those that change what is computed (by itself the key's bias does not), the nearest first."""
        clean = self._filter(self.case.state).misfits(self.case.state)
        ranked = []
        for i, (each, state) in enumerate(self._states()):
            if self.bench(state.mixes, filtering=True) is None:
                continue
            misfits = self._filter(state).misfits(state)
            if each.latent or any(_differ(misfit, right) for misfit, right in zip(misfits, clean, strict=True)):
                ranked.append((math.prod(misfits), i))
        return [self._states()[i] for _, i in sorted(ranked)]

    def _ordered(self, bases: Sequence[tuple[Hypothesis, State]]) -> Iterator[Candidate]:
        """Each of the nearest faults, and then the order of heads that explains best what is left."""
        places = {id(state): i for i, (_, state) in enumerate(self._states())}
        most = min(self._work() + ORDERS * WORK, self._most_work)
        for each, state in bases[: max(BASES, MOST_ORDERS // self.case.state.heads**2)]:
            if self._work() > most:
                self.cut_short = True
                return
            for order in permutations(self._filter(state), state):
                changed = order.change(state)
                if changed is not None:
                    yield Candidate((each.fault, order.fault), changed, places[id(state)])

    def _paired(
        self, pairs: Iterable[tuple[tuple[Hypothesis, State], tuple[Hypothesis, State]]]
    ) -> Iterator[Candidate]:
        """Both faults after each other, in both orders where they touch the same parameters."""
        places = {id(state): i for i, (_, state) in enumerate(self._states())}
        touched = {id(state): _touched(state, self.case.state) for _, state in self._states()}
        for (first, after_first), (second, after_second) in pairs:
            rank = places[id(after_first)] + places[id(after_second)]
            both = second.change(after_first)
            if both is not None:
                yield Candidate((first.fault, second.fault), both, rank)
            if touched[id(after_first)] & touched[id(after_second)]:
                other = first.change(after_second)
                if other is not None:
                    yield Candidate((second.fault, first.fault), other, rank)

    # -- filter and judge ------------------------------------------------------------------------------------------

    def _filter(self, state: State) -> Bench:
        """Where a state that mixes nothing, or not too much, is tried."""
        return _there(self.bench(state.mixes, filtering=True))

    def _misfit(self, state: State, limit: float = math.inf) -> float:
        self.tried += 1
        bench = self.bench(state.mixes, filtering=True)
        return math.inf if bench is None else bench.misfit(state, limit)

    def _ranked(self, candidates: Iterable[Candidate]) -> list[tuple[float, Candidate]]:
        """The few that are least off, if they are less off than the clean computation."""
        clean = self._filter(self.case.state).misfit(self.case.state)
        limit = min(FAR, 0.9 * clean) if self.root is None else FAR
        best: list[tuple[float, int, Candidate]] = []  # a heap, the worst first
        for number, candidate in enumerate(candidates):
            if self._work() > self._most_work:
                self.cut_short = True
                break
            misfit = self._misfit(candidate.state, limit)
            if misfit > limit:
                continue
            heapq.heappush(best, (-misfit, -number, candidate))
            if len(best) > KEPT:
                heapq.heappop(best)
                limit = min(limit, -best[0][0])
        return [(-misfit, candidate) for misfit, _, candidate in sorted(best, key=lambda item: (-item[0], -item[1]))]

    def _verified(self, ranked: Sequence[tuple[float, Candidate]]) -> list[Explanation]:
        found: list[Explanation] = []
        for misfit, candidate in ranked:
            if found and misfit > NEAR * max(found[0].misfit, 1e-3):
                break
            fit = _there(self.bench(candidate.state.mixes)).fit(candidate.state)
            if fit.ok:
                faults = candidate.faults if self.root is None else (self.root, *candidate.faults)
                found.append(Explanation(faults, fit, misfit, candidate.rank))
        return _likeliest_first(found)

    def rooted(self) -> list[Explanation]:
        """The root by itself, or else the root and one more fault."""
        fit = self.clean()
        if self.root is not None and fit.ok:
            return [Explanation((self.root,), fit, 0.0)]
        return []


def _there(bench: Bench | None) -> Bench:
    if bench is None:
        raise RuntimeError("a computation that is too large was not left out")
    return bench


def _likeliest_first(found: Sequence[Explanation]) -> list[Explanation]:
    """By likelihood; those that compute the same as the likeliest come first, in the order of the table."""
    if not found:
        return []
    best = min(found, key=lambda each: each.fit.unlikely)

    def place(each: Explanation) -> tuple[bool, float]:
        same = math.isclose(each.misfit, best.misfit, rel_tol=1e-6)
        return not same, each.rank if same else each.fit.unlikely

    return sorted(found, key=place)


def _differ(misfit: float, clean: float) -> bool:
    """Infinite ones, where NaN is on one side only, say nothing."""
    return not math.isfinite(misfit) or not math.isclose(misfit, clean, rel_tol=1e-9)


def _touched(state: State, clean: State) -> frozenset[str]:
    """The fields and parameters that are other than in the clean state."""
    names = {*state.parameters, *clean.parameters}
    changed = {name for name in names if state.parameters.get(name) is not clean.parameters.get(name)}
    for field in dataclasses.fields(State):
        if field.name != "parameters" and getattr(state, field.name) != getattr(clean, field.name):
            changed.add(field.name)
    return frozenset(changed)
