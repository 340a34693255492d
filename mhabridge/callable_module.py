"""Makes a package callable: ``mb.diff(...)`` is a function of the public surface and ``mhabridge.diff`` a package.

Both names are fixed. Python binds a subpackage's name in its parent when it is first imported, from wherever, so a
function of the same name would be there or not depending on the order of imports. A callable package is always both.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import sys
import types
from typing import Any


def make_callable(package: str, function: str) -> None:
    """Let calls of a package go to its function of that name.

    Args:
        package: its full name.
        function: the name of an attribute of it.
    """

    class CallablePackage(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
