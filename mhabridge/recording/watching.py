"""Watches layers: what each call is given and answers goes into the ledger, on its way and at once.

Also part of the record kit (Python 3.8, the standard library only).
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

from mhabridge.recording.calls import Arguments, Running, answers, names_of_answers, signature_of, with_answers
from mhabridge.recording.gradients import Gradients, own_failure
from mhabridge.recording.ledger import NOT_WANTED, Ledger, is_plain_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mhabridge.recording.replaying import Replay
    from mhabridge.recording.selecting import Selected

    Passed = tuple[tuple[Any, ...], dict[str, Any]]


class Watched:
    """One layer that is watched, and how often it was called."""

    def __init__(self, adapter: Any, chosen: Selected) -> None:
        self.layer, self.path, self.attention = chosen.layer, chosen.path, chosen.attention
        self.chosen = chosen
        self.signature = signature_of(adapter.method(chosen.layer))
        self.settings = {
            name: value
            for name, value in adapter.settings(chosen.layer).items()
            if value is None or isinstance(value, (bool, str)) or is_plain_number(value)
        }
        self.calls = self.skipped = 0
        self.latest = -1
        self.silent = False
        self.digests: dict[str, int | None] = {}


class Watcher:
    """All layers that are watched in one recording.

    Args:
        adapter: the recording module of the model's framework.
        ledger: where everything is written.
        chosen: the layers.
        options: what is recorded.
        replay: another recording's inputs, or None.

    Attributes:
        calls: how many calls of layers were recorded.
    """

    def __init__(
        self, adapter: Any, ledger: Ledger, chosen: Sequence[Selected], options: Any, replay: Replay | None
    ) -> None:
        self.adapter, self.ledger, self.options, self.replay = adapter, ledger, options, replay
        self.layers = [Watched(adapter, one) for one in chosen]
        self.calls = 0
        self.gradients = Gradients(adapter, ledger) if options.grads else None
        self._selected = {id(one.layer) for one in chosen}
        self._numbers = itertools.count()
        self._running: dict[tuple[int, int], list[Running | None]] = {}
        self._lock = threading.Lock()

    def watch(self, one: Watched, at_the_end: Callable[..., Any]) -> None:
        """Put the hooks on a layer, and have ``at_the_end`` remember what takes them off."""
        if self.gradients is not None and not one.chosen.whole:
            names = [name for name, _ in self._own_parameters(one)]
            remove, why_not = self.gradients.watch_parameters(one.layer, names, lambda: one.latest)
            at_the_end(remove)
            if why_not:
                self.ledger.leave_out(f"{one.path}: gradients of parameters: {why_not}")

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passed:
            with own_failure(self.ledger):
                if self.ledger.writable:
                    return self._before(one, args, kwargs)
            return args, kwargs

        def after(outputs: Any) -> Any:
            with own_failure(self.ledger):
                return self._after(one, outputs)
            return outputs

        at_the_end(self.adapter.hook(one.layer, before, after))

    def say_what_is_missing(self) -> None:
        """Leave out, by name, what should have been recorded and did not happen."""
        for stack in self._running.values():
            for running in filter(None, stack):
                self.ledger.event({"call": {**running.entry, "outputs": []}})
                layer = "the model" if running.whole else running.entry["layer"]
                self.ledger.leave_out(f"{running.name}: outputs: {layer} did not return")
        for one in self.layers:
            if one.skipped:
                self.ledger.leave_out(f"{one.path}: {one.skipped} more calls: there was no room to describe them")
            if not one.calls and not one.skipped and one.chosen.missed:
                self.ledger.leave_out(f"{one.path}: it was not called: {self.adapter.WHY_NOT_CALLED}")
            if one.chosen.whole and not one.calls and self.calls:
                self.ledger.leave_out(
                    "the model's output: its layers were called one by one; what comes after the last one is not here"
                )
        if not self.options.parameters:
            self.ledger.leave_out("parameters: parameters=False")
        if not self.options.attn_weights:
            self.ledger.leave_out("attention weights: attn_weights=False")
        if self.gradients is not None:
            self.gradients.say_what_is_missing()

    # -- a call --------------------------------------------------------------------------------------------------------

    def _before(self, one: Watched, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passed:
        stack = self._stack(one)
        if self.ledger.full:
            one.skipped += 1
            stack.append(None)
            return args, kwargs
        running = self._started(one)
        stack.append(running)
        if running.whole:
            running.entry["arguments"] = {}
            return args, kwargs
        arguments = Arguments(one.signature, args, kwargs)
        if self.replay is not None:
            args, kwargs = self._give_recorded(self.replay, one, running, arguments)
        running.entry["arguments"] = self._keep_arguments(running, arguments.named)
        if self.gradients is not None:
            args, kwargs = self.gradients.tap_arguments(running, arguments)
        return args, kwargs

    def _after(self, one: Watched, outputs: Any) -> Any:
        stack = self._stack(one)
        running = stack.pop() if stack else None
        if running is None or not self.ledger.writable:
            return outputs
        values = answers(outputs)
        names = names_of_answers(outputs)
        if names:
            running.entry["output_names"] = names
        running.entry["outputs"] = [self._keep_output(one, running, *numbered) for numbered in enumerate(values)]
        if one.attention and all(value is None for value in values[1:]) and not one.silent:
            one.silent = True
            self.ledger.leave_out(f"{one.path}: attn_weights: the model did not ask this layer for them")
        if self.gradients is not None and not running.whole:
            tap = self.gradients.tap
            values = [tap(running, f"outputs/{number}", value) for number, value in enumerate(values)]
        self.ledger.event({"call": running.entry})
        self.calls += not running.whole
        try:
            return with_answers(outputs, values)
        except Exception as error:  # whatever a class of the user's own raises
            kind = f"a {type(outputs).__module__}.{type(outputs).__qualname__}"
            why = f"{kind} cannot be made again ({type(error).__name__}: {error})"[:300]
            self.ledger.leave_out(f"{running.name}/grads/outputs: {why}")
            return outputs

    def _started(self, one: Watched) -> Running:
        with self._lock:
            running = Running(next(self._numbers), one.calls, {}, one.chosen.whole)
            one.calls += 1
            training = self.adapter.training(one.layer)
            running.entry.update(index=running.index, layer=one.path, nth=running.nth, training=training)
            if not running.nth:
                self._describe(one, running)
            elif self.options.parameters and not running.whole:
                self._follow(one, running)
        one.latest = running.index
        return running

    def _stack(self, one: Watched) -> list[Running | None]:
        """The calls of a layer that have not ended; a layer may call itself, and threads do not meet."""
        return self._running.setdefault((threading.get_ident(), id(one.layer)), [])

    def _keep_arguments(self, running: Running, named: dict[str, Any]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        seen: dict[int, str] = {}
        for name, value in named.items():
            if id(value) in seen:
                entries[name] = {"same_as": seen[id(value)]}
                continue
            entries[name] = self.ledger.keep(f"{running.name}/arguments/{name}", value)
            if self.adapter.is_tensor(value):
                seen[id(value)] = name
        return entries

    def _keep_output(self, one: Watched, running: Running, number: int, value: Any) -> dict[str, Any]:
        if one.attention and number > 0 and not self.options.attn_weights:
            return {"left_out": NOT_WANTED}
        return self.ledger.keep(f"{running.name}/outputs/{number}", value)

    def _give_recorded(self, replay: Replay, one: Watched, running: Running, arguments: Arguments) -> Passed:
        """The arguments with those of the other recording in their places, as far as they fit."""
        own = {
            name: (self.adapter.shape(value), self.adapter.is_floating(value), id(value))
            for name, value in arguments.named.items()
            if self.adapter.is_tensor(value)
        }
        answer = replay.inputs(one.path, one.settings, one.attention, running.nth, own)
        for line in answer.lines:
            self.ledger.leave_out(f"{running.name}: {one.path}: {line}")
        if answer.arrays:
            running.entry["replaced"] = dict.fromkeys(answer.arrays, answer.path)
        made: dict[int, Any] = {}

        def change(name: str, value: Any) -> Any:
            if name not in answer.arrays:
                return value
            array = answer.arrays[name]
            if id(array) not in made:
                made[id(array)] = self.adapter.like(array, value)
            return made[id(array)]

        return arguments.replaced(change)

    # -- a layer -------------------------------------------------------------------------------------------------------

    def _describe(self, one: Watched, running: Running) -> None:
        """What the layer is, with its parameters as they are at its first call."""
        entry: dict[str, Any] = {"path": one.path, **self.adapter.names(one.layer)}
        entry.update(attention=one.attention, settings=one.settings, parameters={})
        if one.chosen.aliases:
            entry["aliases"] = one.chosen.aliases
        if one.chosen.whole:
            entry["whole"] = True
        wanted = self.options.parameters and not one.chosen.whole
        for name, tensor in self._own_parameters(one) if wanted else ():
            one.digests[name] = self.ledger.digest(tensor)
            kept = self.ledger.keep(f"layers/{one.path}/{name}", tensor)
            if "tensor" in kept:
                entry["parameters"][name] = kept["tensor"]
            else:
                running.entry.setdefault("parameters", {})[name] = kept
        self.ledger.event({"layer": entry})

    def _follow(self, one: Watched, running: Running) -> None:
        """Keep the parameters that are no longer what they were at the call before: training changes them."""
        now = dict(self._own_parameters(one))
        changed: dict[str, Any] = {name: {"value": None} for name in one.digests if name not in now}
        for name in changed:
            del one.digests[name]
        for name, tensor in now.items():
            digest = self.ledger.digest(tensor)
            if name not in one.digests or digest != one.digests[name]:
                one.digests[name] = digest
                changed[name] = self.ledger.keep(f"{running.name}/parameters/{name}", tensor)
        if changed:
            running.entry["parameters"] = changed

    def _own_parameters(self, one: Watched) -> list[tuple[str, Any]]:
        """The parameters that are no other recorded layer's; all of an attention's, whose parts nobody calls."""
        parts = dict(self.adapter.parts(one.layer))
        found = []
        for name, tensor in self.adapter.parameters(one.layer):
            *path, _ = name.split(".")
            owners = [parts.get(".".join(path[: depth + 1])) for depth in range(len(path))]
            if one.attention or not any(id(owner) in self._selected for owner in owners):
                found.append((name, tensor))
        return found
