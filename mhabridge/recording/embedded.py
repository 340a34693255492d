"""Records what the layers of a model compute, for `mhabridge diff recordings A B`; it needs Python 3.8 and NumPy.

Put this file beside your script (there is nothing to install), and:

    import mhabridge_record

    with mhabridge_record.record(model, "a.safetensors"):
        model(x)

`help(mhabridge_record.record)` says what else it can record. The file that it writes is a safetensors file; compare it
with another one, of any framework, where mhabridge is installed: mhabridge diff recordings a.safetensors b.safetensors
"""

# In mhabridge this file is the frame of the kit: `mhabridge.recording.kit` fills in the two tables.

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import Any

FRAMEWORKS: dict[str, str] = {}
SOURCES: dict[str, str] = {}

_ROOT = f"{__name__}_parts"


class _Parts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports the sources in this file as a package of their own, so that an installed mhabridge is left alone."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        name = self._name(fullname)
        if name is None or (name not in SOURCES and not self.is_package(fullname)):
            return None
        origin = f"<{name} in {__file__}>"
        return importlib.machinery.ModuleSpec(fullname, self, origin=origin, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether other sources lie below this name."""
        return any(other.startswith(f"{self._name(fullname)}.") for other in SOURCES)

    def get_source(self, fullname: str) -> str:
        """The source, with the package's name in its imports."""
        return SOURCES.get(self._name(fullname) or "", "").replace("from mhabridge.", f"from {_ROOT}.")

    def _name(self, fullname: str) -> str | None:
        inside = fullname == _ROOT or fullname.startswith(f"{_ROOT}.")
        return f"mhabridge{fullname[len(_ROOT) :]}" if inside else None


def adapter_of(model: Any) -> Any:
    """The part of the recorder for the framework that a model is of."""
    roots = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    for module, framework in FRAMEWORKS.items():
        if module in roots:
            found = importlib.import_module(f"{_ROOT}.adapters.{framework}.recording")
            if found.is_model(model):
                return found
    raise TypeError(
        f"model: given {type(model).__module__}.{type(model).__qualname__}; expected a module or cell of "
        f"{', '.join(FRAMEWORKS.values())}, for which this file was written."
    )


def __getattr__(name: str) -> Any:
    """``record``, when it is first asked for."""
    if name != "record":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not any(isinstance(finder, _Parts) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Parts())
    sys.modules[f"{_ROOT}.recording.dispatch"] = sys.modules[__name__]
    globals()["record"] = importlib.import_module(f"{_ROOT}.recording").record
    return globals()["record"]


if __name__ == "__main__":
    print(__doc__)
