"""In which form each framework answers a call with ``mode="auto"``: a table made from mappings/.

A row is a feature of ``mhabridge.envelope`` or a case that adapters tell from others of its feature, a column a range
of a framework's versions in which nothing changes. A cell is found by trying: an example of the feature is held against
the limits of the version, and against what its dialects can say. ``tests/test_support.py`` runs the same examples on
the frameworks themselves.

``python -m mhabridge.support docs/support.md`` writes the page.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mhabridge import envelope, mapping
from mhabridge.backends.running import prepare
from mhabridge.calls import Call
from mhabridge.diff.inputs import random_inputs
from mhabridge.errors import UnsupportedError
from mhabridge.native import native_form
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights

_EMBED, _HEADS, _N, _L, _S = 8, 2, 2, 3, 4
_GRAD = np.ones((_L, _N, _EMBED), "float32")
_DEAD = np.array([[True] * _S, [False] * _S])  # the first sequence is padding only
_SOFT = np.zeros((_L, _S), "float32")
_SOFT[1] = -1e9  # a whole row, by a number that is meant as -inf
_SIZES = {"v_proj_size": 6, "out_proj_size": 5}


@dataclasses.dataclass(frozen=True)
class Example:
    """A feature, and the smallest layer and call that have it.

    Args:
        title: in words.
        fields: of the spec, beyond 8 features and 2 heads.
        call: keyword arguments of ``Backend.run``.
        sizes: N, L and S.
        unfit: by framework, what its adapter finds in the numbers of a call (no table can say it beforehand).
    """

    title: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    sizes: tuple[int, int, int] = (_N, _L, _S)
    unfit: dict[str, str] = dataclasses.field(default_factory=dict)

    def material(self) -> tuple[MHASpec, MHAWeights, dict[str, np.ndarray]]:
        """The spec, weights and inputs to run it with."""
        spec = MHASpec(_EMBED, _HEADS, **self.fields)
        batch, target, source = self.sizes
        return spec, MHAWeights.random(spec), random_inputs(spec, batch=batch, target=target, source=source)

    def canonical(self) -> tuple[MHASpec, Call]:
        """The spec and the canonical call."""
        spec, weights, inputs = self.material()
        return spec, prepare(spec, weights, *inputs.values(), **self.call).call


# In the order of the page.
EXAMPLES = {
    "float16": Example("float16", {"dtype": "float16"}),
    "bfloat16": Example("bfloat16", {"dtype": "bfloat16"}),
    "float64": Example("float64", {"dtype": "float64"}),
    "add_bias_kv": Example("`add_bias_kv`", {"add_bias_kv": True}),
    "add_zero_attn": Example("`add_zero_attn`", {"add_zero_attn": True}),
    "scale": Example("another `scale` than 1/sqrt(head size)", {"scale": 0.3}),
    "projection_sizes": Example("value and output projections of other sizes, or any left out", _SIZES),
    "half_precision_projection_sizes": Example("the same in float16", {**_SIZES, "dtype": "float16"}),
    "query_projection_size": Example("query and key projections of other sizes", {"q_proj_size": 4, "k_proj_size": 4}),
    "no_parameters": Example("no projections at all", {f"{name}_proj_size": 0 for name in ("q", "k", "v", "out")}),
    "residual": Example("`residual`", {"residual": True}),
    "out_dropout": Example("`out_dropout`", {"out_dropout": 0.5}),
    "dropout_of_one": Example("`dropout=1`", {"dropout": 1.0}),
    "per_head_weights": Example("attention weights of each head", call={"average_attn_weights": False}),
    "attn_weights_gradient": Example(
        "gradient through the attention weights", call={"grad_attn_weights": np.ones((_N, _L, _S), "float32")}
    ),
    "mask_gradient": Example(
        "gradient of a float mask", call={"attn_mask": np.ones((_L, _S), "float32"), "grad_output": _GRAD}
    ),
    "scores": Example(
        "scores far below zero (a soft mask over a whole row)",
        call={"attn_mask": _SOFT},
        unfit={"megengine": "the softmax loses digits there and gives NaN below about -88."},
    ),
    "fully_masked_nan": Example('fully masked rows, `fully_masked="nan"`', call={"key_padding_mask": _DEAD}),
    "fully_masked_nan_without_projection": Example(
        "the same without an output projection", {"out_proj_size": 0}, {"key_padding_mask": _DEAD}
    ),
    "fully_masked_zero": Example(
        'fully masked rows, `fully_masked="zero"`', call={"key_padding_mask": _DEAD, "fully_masked": "zero"}
    ),
    "fully_masked_gradient": Example(
        "gradients beside fully masked rows", call={"key_padding_mask": _DEAD, "grad_output": _GRAD}
    ),
    "gradient_of_one_row": Example(
        "gradients for one target position, source position or feature of one batch element",
        call={"grad_output": np.ones((1, 1, 8), "float32")},
        sizes=(1, 1, _S),
    ),
    "empty": Example("an empty batch (N = 0)", sizes=(0, _L, _S)),
    "empty_target": Example("no target position (L = 0)", sizes=(_N, 0, _S)),
    "empty_source": Example("no source position (S = 0)", sizes=(_N, _L, 0)),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Versions of a framework between which nothing changes.

    Args:
        framework: its name.
        oldest: the first of them.
        label: for a heading.
    """

    framework: str
    oldest: str
    label: str


def ranges(framework: str) -> list[Range]:
    """The ranges of versions of a framework, oldest first.

    Example:
        >>> [versions.label for versions in ranges("mindspore")]
        ['MindSpore >=2.0, <2.1', 'MindSpore >=2.1, <2.3', 'MindSpore >=2.3']
    """
    table = mapping.table(framework)
    oldest, key = table["dialects"][framework]["oldest"], mapping.version_key
    turns = {turn for entry in table["envelope"] for turn in (entry.get("since"), entry.get("until")) if turn}
    starts = [oldest, *sorted((turn for turn in turns if key(turn) > key(oldest)), key=key)]
    ends = [f", <{turn}" for turn in starts[1:]] + [""]
    title = table["framework"]["title"]
    return [Range(framework, start, f"{title} >={start}{end}") for start, end in zip(starts, ends, strict=True)]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a framework answers a call with ``mode="auto"``.

    Args:
        kind: "native", "composed" or "refused".
        reasons: why it is not native.
    """

    kind: str
    reasons: tuple[str, ...] = ()


def form(framework: str, version: str, feature: str) -> Form:
    """How a version of a framework answers the example of a feature.

    Example:
        >>> form("torch", "2.13", "residual")
        Form(kind='composed', reasons=('The module has no residual connection.',))
        >>> form("torch", "2.13", "add_bias_kv").kind, form("mindspore", "2.10", "bfloat16").kind
        ('native', 'refused')
    """
    example = EXAMPLES[feature]
    spec, call = example.canonical()
    broken = envelope.violations(framework, version, spec, call)
    impossible = tuple(limit.reason for limit in broken if not limit.composable)
    if impossible:
        return Form("refused", impossible)
    reasons = tuple(limit.reason for limit in broken) or _unsayable(framework, version, spec)
    if framework in example.unfit:
        reasons = reasons or (example.unfit[framework],)
    return Form("composed" if reasons else "native", reasons)


def _unsayable(framework: str, version: str, spec: MHASpec) -> tuple[str, ...]:
    """Why not even the last of a framework's dialects can describe a layer; empty when one can."""
    reason = ""
    for dialect in mapping.table(framework)["dialects"]:
        try:
            native_form(spec, dialect, version, turn=True)
        except UnsupportedError as error:
            reason = f"{error.expected.partition(': ')[2]}."  # behind the value that the dialect is bound to
        else:
            return ()
    return (reason,)


def document() -> str:
    """The page: one table of all, then the reasons of each framework."""
    columns = [versions for framework in mapping.FRAMEWORKS for versions in ranges(framework)]
    cells = {
        (feature, versions): form(versions.framework, versions.oldest, feature)
        for feature in EXAMPLES
        for versions in columns
    }
    rows = [
        [example.title, *(cells[feature, versions].kind for versions in columns)]
        for feature, example in EXAMPLES.items()
    ]
    lines = [_HEAD, *_table(["", *(versions.label for versions in columns)], rows), ""]
    for framework in mapping.FRAMEWORKS:
        own = [versions for versions in columns if versions.framework == framework]
        lines += [f"## {mapping.table(framework)['framework']['title']}", "", *_reasons(cells, own), ""]
    return "\n".join(lines)


_HEAD = """# What is native, composed or refused

<!-- Written by `python -m mhabridge.support docs/support.md` from mappings/*.toml. Do not edit. -->

What `backend.run` does with `mode="auto"`, and why it is not native:

- *native*: the framework's own attention layer answers.
- *composed*: that layer cannot express the call or answers it wrongly, so the same formula is computed from the
  framework's own operations (matmul, exp, sums and so on), through its autograd. The first of the result's notes says
  why. Calls without any batch element, target or source position are the exception: where they are not native, NumPy
  answers, because there is nothing to compute.
- *refused*: the framework itself cannot compute in that dtype on a CPU: `UnsupportedError`, in every mode.

`mode="native"` refuses what is composed here, with the same reason. In every mode an answer with NaN where none belongs
(scores that overflow, say) is refused too. The backend `numpy` (float64) does everything on this page.

What has no row here is native everywhere: float32, every kind of mask, `is_causal`, both axis orders, unbatched calls,
`kdim` and `vdim`, any subset of the biases, averaged weights, and gradients of inputs and parameters. Where a layer has
no such argument, masks are merged, inputs transposed and zeros put in place of missing biases; the result's notes say
so.

All of it was measured on CPUs, with PyTorch 1.8.1 and 2.13.0, MindSpore 2.0.0 and 2.10.0, and MegEngine 1.13.0. Of the
versions between two measured ones nothing is assumed: what the native layer of one of the two cannot do is not native
there either, and a dtype that one of the two lacks is refused there, unless the change is documented.
"""


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _reasons(cells: dict[tuple[str, Range], Form], columns: list[Range]) -> list[str]:
    """One line for each feature and reason, with the versions that it holds for unless it is all of them."""
    lines = []
    for feature, example in EXAMPLES.items():
        found: dict[Form, list[str]] = {}
        for versions in columns:
            found.setdefault(cells[feature, versions], []).append(versions.label)
        for answer, labels in found.items():
            where = "" if len(labels) == len(columns) else f" ({'; '.join(labels)})"
            reason = " ".join(answer.reasons)
            lines += [f"- {example.title}{where}, {answer.kind}: {reason}"] if reason else []
    return lines


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
