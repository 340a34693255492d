"""The tensors of an optimizer that lie among a model's, under the names of its parameters: moments are no weights.

MindSpore's checkpoints of a network in training have them. What they are called is data: ``optimizer`` in
``[framework.checkpoints]`` of each table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from mhabridge import mapping

RULE = "unchanged: an optimizer's"


def tensors(names: Collection[str]) -> set[str]:
    """Those of some names that are an optimizer's.

    Args:
        names: all that are in a file.

    Example:
        >>> sorted(tensors(["fc.weight", "moment1.fc.weight", "global_step", "moment1.other.weight"]))
        ['global_step', 'moment1.fc.weight']
        >>> tensors(["fc.weight", "moment1.fc.weight"])  # a module may be called so
        set()
    """
    found: set[str] = set()
    for framework in mapping.FRAMEWORKS:
        declared = mapping.table(framework)["framework"]["checkpoints"].get("optimizer")
        if declared is None or declared["mark"] not in names:
            continue
        there = set(names)
        found.update(there.intersection(declared["beside"]))
        for name in there:
            first, _, rest = name.partition(".")
            if first in declared["of_parameters"] and rest in there:
                found.add(name)
    return found


def note(found: Iterable[str]) -> str:
    """What is said of them.

    Example:
        >>> note(["global_step", "moment1.fc.weight", "moment1.fc.bias"])
        "3 tensors are an optimizer's and stay as they are; --drop 'global_step' --drop 'moment1.*' leaves them out."
    """
    names = list(found)
    patterns = dict.fromkeys(f"{name.partition('.')[0]}.*" if "." in name else name for name in names)
    drops = " ".join(f"--drop '{pattern}'" for pattern in patterns)
    return f"{len(names)} tensors are an optimizer's and stay as they are; {drops} leaves them out."
