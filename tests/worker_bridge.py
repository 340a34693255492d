"""What tests/test_bridge.py has an older version of a framework do, in a worker: arrays in, arrays out.

Works on Python 3.8.
"""

from __future__ import annotations

import importlib
from typing import Any

from mhabridge import bridge
from mhabridge.spec import MHASpec
from mhabridge.weights import MHAWeights


def built(framework: str, payload: dict[str, Any]) -> dict[str, Any]:
    """A layer made by ``mb.build`` and one that it converts to: their specs and weights, and the first one's answers.

    The answers are to a causal call of ``inputs`` in evaluation, batched and (of the batch's first item) not.
    """
    spec, weights = MHASpec.from_dict(payload["spec"]), MHAWeights.from_tree(payload["weights"])
    notes: list[str] = []
    layer = bridge.build(spec, framework, weights, mode=payload["mode"], notes=notes)
    (layer.set_train if hasattr(layer, "set_train") else layer.train)(False)
    moved = bridge.convert(layer, to=framework)
    return {
        "layers": [_described(layer), _described(moved)],
        "notes": notes,
        "answers": [_answer(framework, layer, inputs) for inputs in payload["inputs"]],
    }


def _described(layer: Any) -> dict[str, Any]:
    spec, weights = bridge.extract(layer)
    return {"spec": spec.to_dict(), "weights": weights.to_tree()}


def _answer(framework: str, layer: Any, inputs: list[Any]) -> Any:
    module = importlib.import_module(framework)
    make = getattr(module, "from_numpy", getattr(module, "Tensor", None))
    output = bridge.attend(layer, *(make(array) for array in inputs), is_causal=True)[0]
    return output.detach().numpy() if hasattr(output, "detach") else output.asnumpy()
