"""Goes through the calls of two recordings in the order in which they ran, one at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from mhabridge.diff.comparing import Comparison
from mhabridge.diff.diagnosis import Diagnosis
from mhabridge.diff.recordings import explaining, whole
from mhabridge.diff.recordings.answers import Apart
from mhabridge.diff.recordings.attention_calls import Compared, compare_attention
from mhabridge.diff.recordings.canonical import (
    AttentionCall,
    Described,
    attention_call,
    canonical_grads,
    describe,
)
from mhabridge.diff.recordings.drift import Drift
from mhabridge.diff.recordings.gradients import Backward, compare_gradients
from mhabridge.diff.recordings.judging import Material
from mhabridge.diff.recordings.matching import Pair, kind_of, weights_at
from mhabridge.diff.recordings.plain_calls import compare_plain
from mhabridge.diff.recordings.single_step import SingleStep
from mhabridge.diff.recordings.whole import compare_whole
from mhabridge.diff.report import REFERENCE, Entry, Layer, Picture
from mhabridge.errors import CheckpointError, MHABridgeError
from mhabridge.recording.reading import RecordedCall, RecordedLayer, Recording

WHOLE = "(model)"  # the path of the model itself is empty
UNTOLD = (
    "not held against the reference: recordings of this age do not tell whether a layer's parameters have changed "
    "since its first call"
)
_DRAWN = 64  # layers whose pictures are made although nothing is wrong with them
_ALIKE = 2  # layers with the same tensors wrong that are explained
_LARGEST_DRAWN = 1 << 24  # scores of a call whose attention is computed for a picture


@dataclasses.dataclass(frozen=True)
class Step:
    """One call, or one that a side lacks, as the report has it."""

    layer: Layer
    entries: tuple[Entry, ...]
    backward: Backward | None
    ok: bool


class Walk:
    """The comparison of two recordings.

    Args:
        first: one recording.
        second: the other.
        names: of the two sides.
        turned: whether one model is batch first and the other is not.
        single_step: where the second side's layers are run; None for not at all.
        pictures: whether pictures are made.
    """

    def __init__(
        self,
        first: Recording,
        second: Recording,
        names: tuple[str, str],
        turned: bool,
        single_step: SingleStep | None = None,
        pictures: bool = False,
    ) -> None:
        self.first, self.second, self.names, self.turned = first, second, names, turned
        self.single_step, self.wants_pictures = single_step, pictures
        self.diagnoses: list[Diagnosis] = []
        self.pictures: list[Picture] = []
        self.divergence: str | None = None
        self.drift = Drift()
        self._unit, self._latest = 0.0, ""
        self._between: list[str] = []  # layers since then whose answers were held against nothing
        self.not_whole: tuple[list[str], list[str]] = ([], [])
        self._with_grads = [_with_grads(side) for side in (first, second)]
        self._explained: dict[frozenset[str], int] = {}
        self._described: dict[tuple[Any, ...], Described | MHABridgeError] = {}

    def step(self, pair: Pair) -> Step:
        """Compare one call."""
        if pair.first is None or pair.second is None:
            return self._alone(pair)
        first, second = self._layer(0, pair.first), self._layer(1, pair.second)
        name = _called(pair.first)
        calls = self._attention(pair.first, pair.second) if first.attention and second.attention else "plain"
        backward = None
        if not isinstance(calls, str) and self._unsure(pair.first, pair.second, calls):
            calls = UNTOLD
        sides = (self.first, first, pair.first), (self.second, second, pair.second)
        if whole.is_whole(*sides):
            return self._whole(name, pair, compare_whole(*sides, Apart(self.drift, self.turned, self._unit, True)))
        if isinstance(calls, str):
            compared = compare_plain(*sides, self.drift, self.turned)
            compared.notes += [] if calls == "plain" else [calls]
            if calls != "plain" and compared.wrong("computed"):
                self._say_unexplained(name)
        else:
            compared, backward = self._compare(name, pair.first, pair.second, calls)
        for side, why in compared.not_whole:
            self.not_whole[side].append(f"{name}: {why}")
        self._unit = max(self._unit, compared.unit)
        if any(each.role in ("computed", "single_step") for each in compared.found):
            self._latest, self._between = name, []
        else:
            self._between.append(name)
        diverges = self._settle(name, compared)
        notes = [explaining.cause(compared), *compared.notes] if diverges else compared.notes
        entries = [self._entry(name, each.tensor, each.comparison, each.one_side) for each in compared.found]
        layer = Layer(name, _called(pair.second), first.kind, pair.matched, tuple(filter(None, notes)))
        return Step(layer, tuple(entries), backward, compared.ok)

    def _whole(self, name: str, pair: Pair, compared: Compared) -> Step:
        """A call of the model itself: what comes after the last layer."""
        assert pair.second is not None
        notes = list(compared.notes)
        for side, why in compared.not_whole:
            self.not_whole[side].append(f"{name}: {why}")
        if not compared.ok:
            notes.insert(0, whole.cause(self._latest, self.divergence, self._between))
            self.divergence = name if self.divergence is None else self.divergence
        entries = [self._entry(name, each.tensor, each.comparison) for each in compared.found]
        layer = Layer(name, _called(pair.second), "", pair.matched, tuple(notes))
        return Step(layer, tuple(entries), None, compared.ok)

    def _unsure(self, a: RecordedCall, b: RecordedCall, calls: tuple[AttentionCall, AttentionCall]) -> bool:
        """Whether what is off may be so since the parameters were others than those that are known."""
        if self.first.tells(a) and self.second.tells(b):
            return False
        frameworks = self.first.framework, self.second.framework
        return bool(compare_attention(*calls, frameworks, self.drift, "").wrong("computed"))

    def _alone(self, pair: Pair) -> Step:
        """A call that one side lacks: wrong, unless the layer holds nothing and the next one shows what it did."""
        number = 0 if pair.first is not None else 1
        call = pair.first or pair.second
        assert call is not None
        layer, name, side = self._layer(number, call), _called(call), self.names[number]
        entry = self._missing(name, number)
        holds = not layer.whole and (layer.attention or bool(layer.parameters))
        other = (self.second, self.first)[number]
        notes = [f"only {side} has this call"]
        if not other.complete:
            notes.append("the other recording broke off before its end")
        if holds and other.complete and self.divergence is None:
            self.divergence = name
        names = (name, "") if number == 0 else (name, name)
        entries = (entry,) if holds and other.complete else ()
        return Step(Layer(names[0], names[1], layer.kind, "", tuple(notes)), entries, None, not entries)

    def _missing(self, name: str, number: int) -> Entry:
        lacking = ("second", "first")[number]
        return self._entry(name, "call", Comparison("broken", lacking, f"missing on the {lacking} side"))

    def _compare(
        self, name: str, a: RecordedCall, b: RecordedCall, calls: tuple[AttentionCall, AttentionCall]
    ) -> tuple[Compared, Backward | None]:
        frameworks = self.first.framework, self.second.framework
        compared = compare_attention(*calls, frameworks, self.drift, weights_at((self.first, a), (self.second, b)))
        if self.single_step is not None:
            self.single_step.add_to(compared, *calls, frameworks[0])
            self._discount_inputs(compared)
        self._explain(name, compared, calls)
        if self.wants_pictures:
            self._draw(name, compared, calls)
        grads = (
            canonical_grads(self.first, a, calls[0].layer),
            canonical_grads(self.second, b, calls[1].layer),
        )
        once = _alone_in_backward(a, self._with_grads[0]) and _alone_in_backward(b, self._with_grads[1])
        return compared, compare_gradients(calls, grads, frameworks, once, compared)

    def _discount_inputs(self, compared: Compared) -> None:
        """What came in is no fault of a layer that ran on the first side's inputs, once an earlier one diverges."""
        stepped = any(each.role == "single_step" for each in compared.found)
        if stepped and self.divergence is not None and compared.wrong("inputs"):
            compared.found = [each for each in compared.found if each.role != "inputs"]
            compared.drift.clear()
            compared.notes.append(
                f"its inputs differ, as what comes after {self.divergence} does: it ran on the first's"
            )

    def _say_unexplained(self, name: str) -> None:
        if len(self.diagnoses) < explaining.MOST:
            words = "Unexplained: nothing was tried, since the layer could not be held against the reference."
            self.diagnoses.append(Diagnosis(name, self.names[1], words=words))

    def explain_backward(self, name: str, pair: Pair, found: dict[str, Comparison]) -> None:
        """Ask what explains gradients, of a layer whose forward computation is right."""
        if pair.first is None or pair.second is None or len(self.diagnoses) >= explaining.MOST:
            return
        calls = self._attention(pair.first, pair.second)
        if isinstance(calls, str):
            return
        for number, (side, call) in enumerate(((self.first, pair.first), (self.second, pair.second))):
            grads = canonical_grads(side, call, calls[number].layer).arrays
            wrong = explaining.explain_gradients(calls[number], grads, found, number, side.framework)
            if wrong is not None:
                self.diagnoses.append(dataclasses.replace(wrong, layer=name, side=self.names[number]))
                return
        words = explaining.unexplained_gradients(found)
        self.diagnoses.append(Diagnosis(name, self.names[1], words=words))

    def _explain(self, name: str, compared: Compared, calls: tuple[AttentionCall, AttentionCall]) -> None:
        """Ask what explains a layer, unless two with the same tensors wrong have been asked of: the search is slow."""
        wrong = frozenset(each.tensor for each in compared.wrong("settings", "weights", "mask", "computed"))
        if not wrong or len(self.diagnoses) >= explaining.MOST or self._explained.get(wrong, 0) >= _ALIKE:
            return
        self._explained[wrong] = self._explained.get(wrong, 0) + 1
        frameworks = self.first.framework, self.second.framework
        self.diagnoses += explaining.explain(name, compared, calls, self.names, frameworks)

    def _settle(self, name: str, compared: Compared) -> bool:
        """Keep what the run has drifted apart; whether this is the first divergence."""
        if compared.ok:
            for apart in compared.drift:
                self.drift.add(apart)
            return False
        if self.divergence is None:
            self.divergence = name
            return True
        if compared.wrong("inputs") and not compared.wrong("settings", "weights", "mask", "computed", "single_step"):
            compared.notes.append(f"its inputs differ: what comes after {self.divergence} does")
            return False
        return True

    def _attention(self, first: RecordedCall, second: RecordedCall) -> tuple[AttentionCall, AttentionCall] | str:
        """The call on both sides in canonical form, or why there is none."""
        found = []
        for number, call in enumerate((first, second)):
            side = (self.first, self.second)[number]
            try:
                found.append(attention_call(side, call, self._describe(number, call)))
            except CheckpointError:
                raise
            except MHABridgeError as error:
                return f"not held against the reference: on the {('first', 'second')[number]} side {error}"
        return found[0], found[1]

    def _describe(self, number: int, call: RecordedCall) -> Described:
        key = number, call.layer, tuple(call.parameters.items())
        if key not in self._described:
            while len(self._described) >= 4:  # a layer that is called again and again is read once
                self._described.pop(next(iter(self._described)))
            try:
                self._described[key] = describe((self.first, self.second)[number], self._layer(number, call), call)
            except CheckpointError:
                raise
            except MHABridgeError as error:
                self._described[key] = error
        found = self._described[key]
        if isinstance(found, MHABridgeError):
            raise found
        return found

    def _layer(self, number: int, call: RecordedCall) -> RecordedLayer:
        return (self.first, self.second)[number].layers[call.layer]

    def _entry(self, layer: str, tensor: str, comparison: Comparison, one_side: str = "") -> Entry:
        if one_side:
            return Entry(layer, tensor, REFERENCE, self.names[one_side == "second"], comparison)
        return Entry(layer, tensor, *self.names, comparison)

    def _draw(self, name: str, compared: Compared, calls: tuple[AttentionCall, AttentionCall]) -> None:
        drawn = {picture.layer for picture in self.pictures}
        if len(drawn) >= (_DRAWN if compared.ok else 2 * _DRAWN):
            return
        from mhabridge.diff.pictures import picture

        weights = [_attention_of(call) for call in calls]
        tensors: dict[str, tuple[Any, Any]] = {
            "attn_weights": (weights[0], weights[1]),
            "output": (calls[0].output, calls[1].output),
        }
        for each in compared.wrong("inputs"):
            part = each.tensor.partition(".")[2]
            tensors[each.tensor] = getattr(calls[0], part), getattr(calls[1], part)
        for tensor, (a, b) in tensors.items():
            if a is not None and b is not None and a.shape == b.shape:
                self.pictures.append(picture(name, tensor, *self.names, a, b))


def _attention_of(call: AttentionCall) -> np.ndarray | None:
    """The attention of each head: as it was returned, else as the reference has it for this side's inputs."""
    if call.attn_weights is not None and call.attn_weights.ndim == 4:
        return call.attn_weights
    n, length, _ = call.query.shape
    if call.random or n * length * call.layer.spec.num_heads * call.key.shape[1] > _LARGEST_DRAWN:
        return call.attn_weights
    return Material.of(call).all_weights()


def _with_grads(recording: Recording) -> frozenset[tuple[str, int]]:
    """The calls that gradients of parameters are noted with: the latest ones of their layers in each backward."""
    return frozenset(
        (call.layer, call.nth) for call in recording.calls if any(name.startswith("parameters/") for name in call.grads)
    )


def _alone_in_backward(call: RecordedCall, latest: frozenset[tuple[str, int]]) -> bool:
    """Whether the gradients of parameters that are noted with a call are of this call alone."""
    return not call.nth or (call.layer, call.nth - 1) in latest


def _called(call: RecordedCall) -> str:
    """What a call is called in the report: its layer, and which call it was if not the first."""
    name = call.layer or WHOLE
    return name if call.nth == 0 else f"{name} (call {call.nth + 1})"


def is_turned(first: Recording, second: Recording, layers: dict[str, tuple[str, str]]) -> bool:
    """Whether one model is batch first and the other is not, by the attention layers that belong together."""
    votes = [
        bool(first.layers[a].settings.get("batch_first")) != bool(second.layers[b].settings.get("batch_first"))
        for a, (b, _) in layers.items()
        if kind_of(first.layers[a]) == kind_of(second.layers[b]) == "attention"
    ]
    return bool(votes) and all(votes)
