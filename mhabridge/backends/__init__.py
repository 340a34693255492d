"""Backends: a framework somewhere we can run it, in this process or in a worker in another interpreter.

``wire`` says how values travel, ``launcher`` and ``child`` are what runs on the other side, ``process`` is one life of
a worker and ``worker`` all of them, ``registry`` knows the names, ``environments`` installs, ``doctor`` checks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhabridge.callable_module import make_callable

if TYPE_CHECKING:
    from mhabridge.backends.registry import Backend as Backend
    from mhabridge.backends.registry import BackendInfo as BackendInfo
    from mhabridge.backends.registry import backend as backend
    from mhabridge.backends.registry import backends as backends

__all__ = ["Backend", "BackendInfo", "backend", "backends"]


def __getattr__(name: str) -> Any:
    # Lazy, because this package is imported inside workers too, where the registry does not exist.
    if name not in __all__:
        raise AttributeError(f"module 'mhabridge.backends' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("mhabridge.backends.registry"), name)


make_callable(__name__, "backends")
