"""What the config.json beside a checkpoint says of its attention: how many heads, and whether it is a plain one.

Which of its keys mean what is data: ``[config]`` in mappings/layouts.toml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mhabridge import mapping
from mhabridge.checkpoint.storage import checking
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError

_LARGEST = 4 << 20  # bytes; most have a few kilobytes


def read(checkpoint: Path) -> dict[str, Any]:
    """The content of config.json in the checkpoint's folder; empty when there is none.

    Raises:
        CheckpointError: it is no JSON.
    """
    file = checkpoint.parent / "config.json"
    if not file.is_file():
        return {}
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        content = checking.json_of(text)
    except (ValueError, OSError) as error:
        raise CheckpointError(
            str(file), given=f"no JSON ({error!s:.200})", expected="a model's configuration"
        ) from error
    return content if isinstance(content, dict) else {}


def num_heads(config: Mapping[str, Any], prefix: str) -> int:
    """The number of heads that a configuration states.

    Args:
        config: what ``read`` gave.
        prefix: of the layer, for the message.

    Raises:
        ArgumentError: it states none, or two that differ.
        CheckpointError: what it states is no positive integer.

    Example:
        >>> num_heads({"n_head": 12}, "h.0.attn")
        12
    """
    found = {name: _count(config, name) for name in _words()["num_heads"] if config.get(name) is not None}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    raise ArgumentError(
        "num_heads",
        given=f"None, and config.json beside the file says {said or 'nothing of it'}",
        expected="the number of heads of the layer" + (f" under {prefix}" if prefix else ""),
        advice="No weight tells it: pass num_heads=..., or --num-heads on the command line.",
    )


def require_plain(config: Mapping[str, Any]) -> list[str]:
    """Refuse a configuration of an attention that MHASpec does not describe.

    Args:
        config: what ``read`` gave.

    Returns:
        Notes on the parts of a composite model (``text_config`` and the like) that are not plain: whether the layer is
        in one of them, the configuration does not tell.

    Raises:
        UnsupportedError: with the key, its value and the reason.

    Example:
        >>> require_plain({"model_type": "bert", "position_embedding_type": "absolute"})
        []
        >>> require_plain({"text_config": {"rotary_dim": 64}})  # doctest: +ELLIPSIS
        ['config.json: its text_config has rotary_dim = 64, so that queries and keys are turned by ...
    """
    for name, value, reason in _oddities(config):
        raise _not_plain(name, value, reason)
    return [
        f"config.json: its {part} has {name} = {_json(value)}, so that {reason}; a layer of that part is not plain."
        for part, inner in config.items()
        if isinstance(inner, dict)
        for name, value, reason in _oddities(inner)
    ]


def require_own_keys(config: Mapping[str, Any], heads: int) -> None:
    """Refuse a configuration in which several heads share a key.

    Args:
        config: what ``read`` gave.
        heads: H.

    Raises:
        CheckpointError: a number of key heads that is no positive integer.
        UnsupportedError: another number than H.
    """
    for name in _words()["key_value_heads"]:
        if config.get(name) is not None and _count(config, name) != heads:
            raise _not_plain(name, config[name], f"with {heads} heads it is grouped-query or multi-query attention")


def _not_plain(name: str, value: Any, reason: str) -> UnsupportedError:
    return UnsupportedError(
        name,
        given=f"{_json(value)} in config.json: {reason}",
        expected="a plain multi-head attention",
        advice="MHASpec does not describe such a layer. If this one is plain all the same, read its tensors with "
        "open_tensors and MHAWeights.from_layout, which do not ask config.json.",
    )


def _oddities(config: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Each key that makes an attention not plain, its value, and the reason."""
    for rule in _words()["refused"]:
        patterns = ["model_type"] if "model_types" in rule else rule["keys"]
        for name, value in config.items():
            if any(fnmatchcase(name, pattern) for pattern in patterns) and _counts(rule, value):
                yield name, value, rule["reason"]


def _counts(rule: Mapping[str, Any], value: Any) -> bool:
    if value is None:
        return False
    wanted = rule.get("model_types", rule.get("is"))
    return value in wanted if wanted is not None else value not in rule.get("unless", ())


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config[name]
    if type(value) is int and value > 0:  # True is an int to Python
        return value
    raise CheckpointError(
        f"config.json: {name}",
        given=_json(value),
        expected="a positive integer",
        advice="Mend the file, or read the tensors with open_tensors and MHAWeights.from_layout.",
    )


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words() -> dict[str, Any]:
    words: dict[str, Any] = mapping.table("layouts")["config"]
    return words
