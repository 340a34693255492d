"""What a call costs through ``mb.attend`` and the drop-in class, beside the framework's own layer in the same run.

    python benchmarks/attending.py [FRAMEWORK ...]

Each framework runs in a worker. Its own layer, ``mb.attend`` on that layer and the drop-in take turns; a ratio is the
median over rounds of one call's time to the native call's of the same round, so a busy moment of the machine hits a
round, not a form. Self-attention; "forward" is in evaluation, "backward" a forward and a backward pass in training,
with gradients for the input and all parameters.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mhabridge as mb
from mhabridge.backends import BackendInfo, shipping
from mhabridge.backends.worker import Worker
from mhabridge.mapping import FRAMEWORKS

SMALL = (8, 10, 128, 8)  # N, L, E, H
LARGE = (8, 128, 512, 8)
FORMS = ("attend", "drop-in")
MASKS = ("no mask", "padding")
MORE_MASKS = ("attn_mask", "both", "is_causal")  # PyTorch's, at the smaller size, where each takes another way
# Where our forms run the native layer: this much on top. Elsewhere they compose: not slower at the larger size.
PART, SECONDS = 0.03, 30e-6


@dataclass(frozen=True)
class Case:
    """One kind of call."""

    framework: str
    device: str
    sizes: tuple[int, int, int, int]
    masks: str
    backward: bool
    need_weights: bool

    @property
    def native_serves(self) -> bool:
        return self.framework == "torch" or (self.framework == "mindspore" and self.masks == "no mask")

    def __str__(self) -> str:
        size = "N={} L={:<3} E={}".format(*self.sizes)
        passes = "backward" if self.backward else "forward"
        where = self.framework if self.device == "cpu" else f"{self.framework} {self.device}"
        return f"{where:<11}{size}  {self.masks:<9}  {passes:<8}  {'weights' if self.need_weights else '-':<7}"

    def payload(self) -> dict[str, Any]:
        batch, length, embed_dim, _ = self.sizes
        x = np.random.default_rng(0).standard_normal((batch, length, embed_dim)).astype(np.float32)
        padding = np.arange(length) >= length - np.arange(batch)[:, None] % 4
        return {
            "sizes": self.sizes,
            "device": self.device,
            "x": x,
            "padding": padding if self.masks in ("padding", "both") else None,
            "attn_mask": np.triu(np.ones((length, length), bool), 1) if self.masks in MORE_MASKS else None,
            "is_causal": self.masks == "is_causal",
            "backward": self.backward,
            "need_weights": self.need_weights,
        }


@dataclass(frozen=True)
class Measured:
    """One form against the native layer.

    Args:
        ratio: the median of a round's ratio.
        least: the ratio of the fastest calls.
        added: the median of what a round's call takes longer, in seconds.
        native: the native call's median, in seconds.
    """

    ratio: float
    least: float
    added: float
    native: float

    def ok(self, case: Case) -> bool | None:
        """Whether it is within its limit; None where there is none."""
        if case.native_serves:
            return self.added <= PART * self.native + SECONDS
        return self.ratio <= 1.0 if case.sizes == LARGE else None


def compared(native: list[float], form: list[float]) -> Measured:
    """One form's times against the native layer's, round by round."""
    return Measured(
        statistics.median(mine / own for mine, own in zip(form, native, strict=True)),
        min(form) / min(native),
        statistics.median(mine - own for mine, own in zip(form, native, strict=True)),
        statistics.median(native),
    )


def measure(info: BackendInfo) -> list[tuple[Case, str, Measured]]:
    """All cases of one framework; prints each as it comes."""
    modules = {
        "mhabridge.bridge": shipping.source("mhabridge.bridge"),
        "bench": Path(__file__).with_name("attending_worker.py").read_text(encoding="utf-8"),
    }
    worker = Worker(info.python, info.name, extra_modules=modules)
    found = []
    devices = worker.call("bench:devices", {})
    chosen = [*itertools.product(devices, (SMALL, LARGE), MASKS, (False, True), (False, True))]
    if info.name == "torch":
        chosen += itertools.product(devices, (SMALL,), MORE_MASKS, (False, True), (False, True))
    for case in (Case(info.name, *one) for one in chosen):
        seconds = worker.call("bench:measure", case.payload())
        for form in FORMS:
            found.append((case, form, compared(seconds["native"], seconds[form])))
            show(*found[-1])
    worker.close()
    return found


def show(case: Case, form: str, measured: Measured) -> None:
    verdict = {True: "met", False: "NOT MET", None: ""}[measured.ok(case)]
    print(
        f"{case}  {form:<8}{measured.native * 1e3:>9.2f}{measured.ratio:>8.2f}{measured.least:>9.2f}"
        f"{measured.added * 1e6:>+10.0f}  {'native' if case.native_serves else 'composed':<9}{verdict}",
        flush=True,
    )


def main() -> int:
    chosen = sys.argv[1:] or list(FRAMEWORKS)
    infos = {info.name: info for info in mb.backends()}
    print(
        f"{'framework':<11}{'size':<19}{'mask':<11}{'pass':<10}{'returns':<9}{'form':<8}{'ms':>9}{'ratio':>8}{'min/min':>9}"
        f"{'us added':>10}  {'ours is':<9}limit"
    )
    found = []
    for framework in chosen:
        info = infos.get(framework)
        if info is None or not info.ok:
            print(f"{framework:<11}not measured: {info.reason if info else 'no such backend'}")
            continue
        found += measure(info)
    missed = 0
    for native_serves, text in (
        (True, f"where the native layer serves: at most {PART:.0%} and {SECONDS * 1e6:.0f} us on top"),
        (False, "where we compose: not slower than the native layer at the larger size"),
    ):
        kept = [entry.ok(case) for case, _, entry in found if case.native_serves == native_serves]
        judged = [ok for ok in kept if ok is not None]
        print(f"{text}: {sum(judged)} of {len(judged)} met")
        missed += len(judged) - sum(judged)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
