"""What the config.json beside a checkpoint says of its attention: how many heads, and whether it is a plain one.

Which of its keys mean what is data: ``[config]`` in mappings/layouts.toml.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mhabridge import mapping
from mhabridge.checkpoint.formats.safetensors_header import unique
from mhabridge.checkpoint.storage import checking
from mhabridge.errors import ArgumentError, CheckpointError, UnsupportedError

_LARGEST = 4 << 20  # bytes; most have a few kilobytes
_ADVICE = "Mend or move that file, or give the number of heads: num_heads=..., --num-heads on the command line."


@dataclasses.dataclass(frozen=True)
class Configuration:
    """The config.json beside a checkpoint; without one it states nothing.

    Args:
        file: where it is, or would be.
        content: its entries.
        fault: why it cannot be used: no JSON, no object, or a number of heads that is none.
    """

    file: Path
    content: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fault: CheckpointError | None = None

    def num_heads(self) -> int | None:
        """The number of heads that it states; None when it states none, or two that differ.

        Raises:
            CheckpointError: it cannot be used.

        Example:
            >>> Configuration(Path("config.json"), {"n_head": 12}).num_heads()
            12
        """
        if self.fault is not None:
            raise self.fault
        found = set(self._stated("num_heads").values())
        return found.pop() if len(found) == 1 else None

    def require_num_heads(self, prefix: str) -> int:
        """The number of heads that it states.

        Args:
            prefix: of the layer, for the message.

        Raises:
            ArgumentError: it states none, or two that differ.
            CheckpointError: it cannot be used.
        """
        heads = self.num_heads()
        if heads is not None:
            return heads
        said = ", ".join(f"{name}={value}" for name, value in self._stated("num_heads").items())
        raise ArgumentError(
            "num_heads",
            given=f"None, and config.json beside the file says {said or 'nothing of it'}",
            expected="the number of heads of the layer" + (f" under {prefix}" if prefix else ""),
            advice="No weight tells it: pass num_heads=..., or --num-heads on the command line.",
        )

    def misfit(self, prefix: str, embed_dim: int) -> CheckpointError | None:
        """What it states that a layer of this width cannot have; None when it may be that layer's.

        Example:
            >>> config = Configuration(Path("config.json"), {"hidden_size": 16, "n_head": 2})
            >>> config.misfit("attn", 8).given
            '16, and attn has embed_dim 8'
        """
        widths, heads = self._stated("embed_dim"), self._stated("num_heads")
        wrong = widths if widths and embed_dim not in widths.values() else {}
        wrong = wrong or {name: count for name, count in heads.items() if embed_dim % count}
        for name, value in wrong.items():
            return CheckpointError(
                f"{self.file}: {name}",
                given=f"{value}, and {prefix or 'the layer'} has embed_dim {embed_dim}",
                expected="the configuration of this checkpoint's model",
                advice=_ADVICE,
            )
        return None

    def notes_beside(self, said: int | None, misfit: CheckpointError | None = None) -> list[str]:
        """What to say of it where the number of heads is known without it.

        Args:
            said: the number of heads that counts.
            misfit: what does not fit the layer.
        """
        error = self.fault or misfit
        if error is not None:
            return [f"{error.subject}: {error.given}; num_heads={said} does not come from there."]
        other = {name: count for name, count in self._stated("num_heads").items() if count != said}
        return [f"{self.file}: it has {name}={count}; num_heads={said} is given." for name, count in other.items()]

    def _stated(self, what: str) -> dict[str, int]:
        """The positive integers that it has under the names of something."""
        if not self.content:
            return {}
        return {name: self.content[name] for name in _words()[what] if _is_count(self.content.get(name))}


def read(checkpoint: Path) -> Configuration:
    """The config.json in a checkpoint's folder."""
    file = checkpoint.parent / "config.json"
    if not file.is_file():
        return Configuration(file)
    try:
        with file.open("rb") as stream:
            text = stream.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")
        content = checking.json_of(text, object_pairs_hook=unique)
    except (ValueError, OSError) as error:
        return Configuration(file, fault=_fault(str(file), f"no JSON ({error!s:.200})"))
    if not isinstance(content, dict):
        return Configuration(file, fault=_fault(str(file), f"{_json(content)}, which is no object"))
    counts = [*_words()["num_heads"], *_words()["key_value_heads"]]
    wrong = [name for name in counts if content.get(name) is not None and not _is_count(content[name])]
    if not wrong:
        return Configuration(file, content)
    fault = _fault(f"{file}: {wrong[0]}", _json(content[wrong[0]]), "a positive integer")
    return Configuration(file, content, fault)


def _fault(subject: str, given: str, expected: str = "a model's configuration") -> CheckpointError:
    return CheckpointError(subject, given=given, expected=expected, advice=_ADVICE)


def require_plain(config: Configuration) -> list[str]:
    """Refuse a configuration of an attention that MHASpec does not describe.

    Args:
        config: what ``read`` gave.

    Returns:
        Notes on the parts of a composite model (``text_config`` and the like) that are not plain: whether the layer is
        in one of them, the configuration does not tell.

    Raises:
        UnsupportedError: with the key, its value and the reason.

    Example:
        >>> require_plain(Configuration(Path("config.json"), {"model_type": "bert"}))
        []
        >>> require_plain(Configuration(Path("config.json"), {"text_config": {"rotary_dim": 64}}))[0][:46]
        'config.json: its text_config has rotary_dim = '
    """
    for name, value, reason in _oddities(config.content):
        raise _not_plain(name, value, reason)
    return [
        f"config.json: its {part} has {name} = {_json(value)}, so that {reason}; a layer of that part is not plain."
        for part, inner in config.content.items()
        if isinstance(inner, dict)
        for name, value, reason in _oddities(inner)
    ]


def require_own_keys(config: Configuration, said: int | None = None) -> None:
    """Refuse a configuration in which several heads share a key.

    Args:
        config: what ``read`` gave.
        said: H, for a configuration that does not state it.

    Raises:
        UnsupportedError: another number than H.
    """
    heads = said if config.fault is not None else config.num_heads() or said
    for name in _words()["key_value_heads"]:
        value = config.content.get(name)
        if heads is not None and _is_count(value) and value != heads:
            raise _not_plain(name, value, f"with {heads} heads it is grouped-query or multi-query attention")


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


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0  # True is an int to Python


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words() -> dict[str, Any]:
    words: dict[str, Any] = mapping.table("layouts")["config"]
    return words
