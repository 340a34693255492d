"""mhabridge: move multi-head attention between PyTorch, MindSpore and MegEngine, and prove that it arrived.

``import mhabridge as mb`` costs next to nothing: every public name is loaded when it is first used, and no framework is
imported before a layer or a backend of it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhabridge.backends import BackendInfo as BackendInfo
    from mhabridge.backends import backend as backend
    from mhabridge.backends import backends as backends
    from mhabridge.bridge import attend as attend
    from mhabridge.bridge import build as build
    from mhabridge.bridge import convert as convert
    from mhabridge.bridge import extract as extract
    from mhabridge.checkpoint.conversion import ConversionReport as ConversionReport
    from mhabridge.checkpoint.conversion import convert_checkpoint as convert_checkpoint
    from mhabridge.checkpoint.fingerprints import Fingerprint as Fingerprint
    from mhabridge.checkpoint.fingerprints import fingerprint as fingerprint
    from mhabridge.checkpoint.inspection import CheckpointInfo as CheckpointInfo
    from mhabridge.checkpoint.inspection import inspect_checkpoint as inspect_checkpoint
    from mhabridge.checkpoint.load_report import LoadReport as LoadReport
    from mhabridge.checkpoint.loading import load_into as load_into
    from mhabridge.dialects import translate_call as translate_call
    from mhabridge.diff import DiffReport as DiffReport
    from mhabridge.diff import diff as diff
    from mhabridge.diff.checkpoints import diff_checkpoints as diff_checkpoints
    from mhabridge.diff.recordings import diff_recordings as diff_recordings
    from mhabridge.errors import ArgumentError as ArgumentError
    from mhabridge.errors import ArgumentTypeError as ArgumentTypeError
    from mhabridge.errors import BackendError as BackendError
    from mhabridge.errors import CheckpointError as CheckpointError
    from mhabridge.errors import MHABridgeError as MHABridgeError
    from mhabridge.errors import UnsupportedError as UnsupportedError
    from mhabridge.errors import WeightsError as WeightsError
    from mhabridge.initial import manual_seed as manual_seed
    from mhabridge.recording import record as record
    from mhabridge.spec import MHASpec as MHASpec
    from mhabridge.weights import MHAWeights as MHAWeights

__version__ = "0.1.0"

_HOME = {
    "MHASpec": "spec",
    "MHAWeights": "weights",
    "translate_call": "dialects",
    "extract": "bridge",
    "attend": "bridge",
    "build": "bridge",
    "convert": "bridge",
    "manual_seed": "initial",
    "convert_checkpoint": "checkpoint.conversion",
    "ConversionReport": "checkpoint.conversion",
    "inspect_checkpoint": "checkpoint.inspection",
    "CheckpointInfo": "checkpoint.inspection",
    "load_into": "checkpoint.loading",
    "LoadReport": "checkpoint.load_report",
    "fingerprint": "checkpoint.fingerprints",
    "Fingerprint": "checkpoint.fingerprints",
    "BackendInfo": "backends",
    "backends": "backends",
    "backend": "backends",
    "DiffReport": "diff",
    "diff": "diff",
    "diff_checkpoints": "diff.checkpoints",
    "diff_recordings": "diff.recordings",
    "record": "recording",
    "MHABridgeError": "errors",
    "UnsupportedError": "errors",
    "WeightsError": "errors",
    "CheckpointError": "errors",
    "BackendError": "errors",
    "ArgumentError": "errors",
    "ArgumentTypeError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mhabridge' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"mhabridge.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)  # two packages are callable
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
