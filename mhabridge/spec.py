"""``MHASpec``: the canonical description of a multi-head attention layer.

A spec says what the layer *is*, in PyTorch's words, independent of any framework; it holds no weights and no device.
Two specs that describe the same layer are equal: a size given as its usual value is stored as None, and the
shorthand ``bias`` is expanded.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import operator
from typing import Any

from mhabridge import dtypes
from mhabridge.errors import ArgumentError, ArgumentTypeError

LARGEST_SIZE = 2**31 - 1  # frameworks hold sizes in 32 bits in places; no layer comes near it
_BIASES = ("q_bias", "k_bias", "v_bias", "out_bias")
_SIZES = ("kdim", "vdim", "q_proj_size", "k_proj_size", "v_proj_size", "out_proj_size")


@dataclasses.dataclass(frozen=True, init=False)
class MHASpec:
    """What a multi-head attention layer is. The defaults are PyTorch's.

    With E = embed_dim and H = num_heads, the layer computes (Vaswani et al., 2017, "Attention Is All You Need", 3.2.2)
    ``out = concat_h(softmax(scale * Q_h K_h^T + mask) V_h) Wo^T + bo`` with ``Q = query Wq^T + bq`` and so on.

    Args:
        embed_dim: features of the query, E.
        num_heads: H; it must divide every projection's size.
        kdim: features of the key; None for E.
        vdim: features of the value; None for E.
        dropout: probability in [0, 1] with which an attention weight is zeroed in training.
        bias: shorthand for the four below (default True); one of them given by itself wins over it.
        q_bias: the query projection adds a bias.
        k_bias: the key projection adds a bias (Whisper's has none).
        v_bias: the value projection adds a bias.
        out_bias: the output projection adds a bias.
        q_proj_size: features that the query projection makes, for all heads together; None for E; 0 for no projection:
            then
            every head gets the whole query (MegEngine's functional form).
        k_proj_size: the same for the key.
        v_proj_size: the same for the value.
        out_proj_size: features of the output; None for E; 0 for no output projection: then the output is the
            concatenated heads.
        out_dropout: probability of dropout on the projected output (MegEngine).
        add_bias_kv: a learned vector is appended to keys and one to values (as one more source position).
        add_zero_attn: a zero vector is appended to keys and to values, after bias_k and bias_v.
        scale: factor on the scores; None for ``1 / sqrt(head size)``.
        residual: the query is added to the output (MegEngine's ``reslink``).
        batch_first: arrays are (N, L, E), else (L, N, E).
        dtype: of the weights: "float16", "bfloat16", "float32" or "float64".

    Raises:
        ArgumentError: a value out of range, or sizes that do not fit each other.
        ArgumentTypeError: a value of the wrong type.

    Example:
        >>> spec = MHASpec(embed_dim=8, num_heads=2, kdim=8, k_bias=False)
        >>> spec.kdim is None, spec.bias is None, spec.q_bias, spec.k_bias
        (True, True, True, False)
        >>> spec == MHASpec.from_json(spec.to_json())
        True
    """

    embed_dim: int
    num_heads: int
    kdim: int | None
    vdim: int | None
    dropout: float
    q_bias: bool
    k_bias: bool
    v_bias: bool
    out_bias: bool
    q_proj_size: int | None
    k_proj_size: int | None
    v_proj_size: int | None
    out_proj_size: int | None
    out_dropout: float
    add_bias_kv: bool
    add_zero_attn: bool
    scale: float | None
    residual: bool
    batch_first: bool
    dtype: str

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        bias: bool | None = None,
        q_bias: bool | None = None,
        k_bias: bool | None = None,
        v_bias: bool | None = None,
        out_bias: bool | None = None,
        q_proj_size: int | None = None,
        k_proj_size: int | None = None,
        v_proj_size: int | None = None,
        out_proj_size: int | None = None,
        out_dropout: float = 0.0,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        scale: float | None = None,
        residual: bool = False,
        batch_first: bool = False,
        dtype: str = "float32",
    ) -> None:
        given = dict(locals())
        for field in dataclasses.fields(self):
            self._set(field.name, given[field.name])
        self._set("embed_dim", _positive(embed_dim, "embed_dim"))
        self._set("num_heads", _positive(num_heads, "num_heads"))
        for name in _SIZES:
            self._set(name, self._size(name))
        self._expand_bias(bias)
        for name in ("add_bias_kv", "add_zero_attn", "residual", "batch_first"):
            self._set(name, _boolean(getattr(self, name), name))
        for name in ("dropout", "out_dropout"):
            self._set(name, _probability(getattr(self, name), name))
        self._set("scale", None if scale is None else _finite(scale, "scale"))
        self._set("dtype", dtypes.canonical(dtype))
        self._check_sizes()
        if self.scale == self.default_scale:
            self._set("scale", None)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _size(self, name: str) -> int | None:
        value = getattr(self, name)
        if value is None:
            return None
        size = _integer(value, name)
        least = 0 if name.endswith("proj_size") else 1
        if size < least:
            raise ArgumentError(name, given=_shown(size), expected=f"None or an integer of at least {least}")
        return None if _fits(size, name) == self.embed_dim else size

    def _expand_bias(self, bias: bool | None) -> None:
        given = [getattr(self, name) for name in _BIASES]
        default = True if bias is None else _boolean(bias, "bias")
        if bias is not None and None not in given and default not in given:
            raise ArgumentError(
                "bias",
                given=f"bias={default} with all four of {', '.join(_BIASES)} {not default}",
                expected="a shorthand that agrees with at least one of them",
                advice="Leave one of the two away; to change an existing spec use spec.replace(bias=...).",
            )
        for name, value in zip(_BIASES, given):
            size = getattr(self, name.replace("bias", "proj_size"))
            if value is None:
                self._set(name, default and size != 0)
                continue
            if _boolean(value, name) and size == 0:
                raise ArgumentError(
                    name,
                    given="True, with no such projection (its size is 0)",
                    expected="False",
                    advice="Drop the bias.",
                )
            self._set(name, bool(value))

    def _check_sizes(self) -> None:
        for name in ("q_proj_size", "k_proj_size", "v_proj_size"):
            size = self.embed_dim if getattr(self, name) is None else getattr(self, name)
            if size % self.num_heads:
                what = "embed_dim" if getattr(self, name) is None else name
                raise ArgumentError(
                    what,
                    given=f"{size} with num_heads={self.num_heads}",
                    expected="a multiple of num_heads",
                    advice="Each head gets an equal share of the features.",
                )
        if self.q_head_dim != self.k_head_dim:
            raise ArgumentError(
                "q_proj_size, k_proj_size",
                given=f"a query head of {self.q_head_dim} and a key head of {self.k_head_dim} features",
                expected="equal head sizes: their product is the score",
                advice="Without a projection every head gets the whole tensor; choose the other size to match.",
            )
        if self.residual and self.out_features != self.embed_dim:
            raise ArgumentError(
                "residual",
                given=f"True with an output of {self.out_features} features",
                expected=f"as many as the query has ({self.embed_dim})",
            )

    @property
    def bias(self) -> bool | None:
        """The shorthand: True or False where all projections that exist agree, None where they differ."""
        existing = [name for name in _BIASES if getattr(self, name.replace("bias", "proj_size")) != 0]
        values = {getattr(self, name) for name in existing}
        if len(values) > 1:
            return None
        return values.pop() if values else False

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def key_features(self) -> int:
        """Features of the key as it comes in."""
        return self.embed_dim if self.kdim is None else self.kdim

    @property
    def value_features(self) -> int:
        """Features of the value as it comes in."""
        return self.embed_dim if self.vdim is None else self.vdim

    @property
    def q_head_dim(self) -> int:
        """Features of one head's query: the head size that ``scale`` refers to."""
        return self._head_dim(self.q_proj_size, self.embed_dim)

    @property
    def k_head_dim(self) -> int:
        """Features of one head's key."""
        return self._head_dim(self.k_proj_size, self.key_features)

    @property
    def v_head_dim(self) -> int:
        """Features of one head's value."""
        return self._head_dim(self.v_proj_size, self.value_features)

    @property
    def out_features(self) -> int:
        """Features of the output."""
        if self.out_proj_size == 0:
            return self.num_heads * self.v_head_dim
        return self.embed_dim if self.out_proj_size is None else self.out_proj_size

    @property
    def default_scale(self) -> float:
        """``1 / sqrt(head size)``."""
        return 1.0 / math.sqrt(self.q_head_dim)

    @property
    def score_scale(self) -> float:
        """The factor on the scores: ``scale``, or its default."""
        return self.default_scale if self.scale is None else self.scale

    @property
    def extra_columns(self) -> int:
        """How many source positions add_bias_kv and add_zero_attn append (0, 1 or 2)."""
        return int(self.add_bias_kv) + int(self.add_zero_attn)

    def _head_dim(self, size: int | None, features: int) -> int:
        if size == 0:
            return features
        return (self.embed_dim if size is None else size) // self.num_heads

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that the layer has, by its canonical name; weights are (out, in).

        Example:
            >>> MHASpec(4, 2, kdim=6, bias=False).parameter_shapes()
            {'q_weight': (4, 4), 'k_weight': (4, 6), 'v_weight': (4, 4), 'out_weight': (4, 4)}
        """
        heads = self.num_heads
        rows = {
            "q": (heads * self.q_head_dim, self.embed_dim, self.q_proj_size),
            "k": (heads * self.k_head_dim, self.key_features, self.k_proj_size),
            "v": (heads * self.v_head_dim, self.value_features, self.v_proj_size),
            "out": (self.out_features, heads * self.v_head_dim, self.out_proj_size),
        }
        shapes: dict[str, tuple[int, ...]] = {
            f"{name}_weight": (out, into) for name, (out, into, size) in rows.items() if size != 0
        }
        shapes.update({f"{n}_bias": (out,) for n, (out, _, _) in rows.items() if getattr(self, f"{n}_bias")})
        if self.add_bias_kv:
            shapes["bias_k"] = (heads * self.k_head_dim,)
            shapes["bias_v"] = (heads * self.v_head_dim,)
        return shapes

    # -- to and from other forms -----------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> MHASpec:
        """A copy with some fields changed; ``bias`` sets the four biases that are not given themselves.

        A size or scale that has its usual value is None, and follows: with another embed_dim it is the usual value of
        that.

        Example:
            >>> MHASpec(8, 2).replace(bias=False).out_bias
            False
        """
        fields = self.to_dict()
        if changes.get("bias") is not None:
            for name in _BIASES:
                fields.pop(name)
        for name in changes:
            if name != "bias" and name not in fields and name not in _BIASES:
                raise ArgumentTypeError(name, given="no field of MHASpec", expected="one of " + ", ".join(fields))
        return MHASpec(**{**fields, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, ``bias`` expanded."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MHASpec:
        """The inverse of ``to_dict``; missing fields take their defaults, unknown ones are refused."""
        if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
            raise ArgumentTypeError("spec", given=repr(fields), expected="a dictionary of fields by name")
        known = {field.name for field in dataclasses.fields(cls)} | {"bias"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ArgumentError(
                ", ".join(unknown),
                given="fields that MHASpec does not have",
                expected="fields among " + ", ".join(sorted(known)),
                advice="Translate a framework's own names with MHASpec.from_kwargs.",
            )
        missing = [name for name in ("embed_dim", "num_heads") if name not in fields]
        if missing:
            raise ArgumentTypeError(", ".join(missing), given="nothing", expected="a positive integer")
        return cls(**fields)

    def to_json(self) -> str:
        """The spec as a JSON object, one key a field.

        Example:
            >>> MHASpec(8, 2).to_json()[:45]
            '{"embed_dim": 8, "num_heads": 2, "kdim": null'
        """
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> MHASpec:
        """The inverse of ``to_json``.

        Raises:
            ArgumentError: not JSON, not an object, or unknown fields.
        """
        try:
            fields = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise ArgumentError("spec", given=f"text that is not JSON ({error})", expected="a JSON object") from error
        if not isinstance(fields, dict):
            raise ArgumentError("spec", given=f"a JSON {type(fields).__name__}", expected="a JSON object")
        return cls.from_dict(fields)

    @classmethod
    def from_kwargs(cls, dialect: str, *args: Any, version: str | None = None, **kwargs: Any) -> MHASpec:
        """The spec that a framework's constructor call describes.

        Args:
            dialect: "torch", "mindspore", "megengine", "megengine.functional" or "numpy", with a version
                ("torch@1.8.1") or without (the newest that the tables know).
            *args: positional arguments, in that dialect's order.
            version: another way to give the version.
            **kwargs: that dialect's own argument names.

        Raises:
            UnsupportedError: the dialect, in this version, has no such argument, or the value has no canonical form.
            ArgumentTypeError: too many positional arguments, or one given twice.

        Example:
            >>> MHASpec.from_kwargs("mindspore", embed_dim=8, num_heads=2, has_bias=False).bias
            False
        """
        from mhabridge import dialects

        return dialects.spec_from_kwargs(dialect, args, kwargs, version=version)

    def to_kwargs(self, dialect: str, *, version: str | None = None) -> dict[str, Any]:
        """The constructor's keyword arguments that describe this layer in a framework's dialect.

        Arguments at their default are left out. A dtype is its canonical name.

        Raises:
            UnsupportedError: the dialect cannot say it; the message names the argument, the value and what to do.

        Example:
            >>> MHASpec(8, 2, bias=False).to_kwargs("mindspore")
            {'embed_dim': 8, 'num_heads': 2, 'has_bias': False}
        """
        from mhabridge import dialects

        return dialects.spec_to_kwargs(self, dialect, version=version)


def _integer(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            name, given=f"{value!r} ({type(value).__name__})", expected="an integer", advice="Pass a plain int."
        ) from None


def _positive(value: Any, name: str) -> int:
    number = _integer(value, name)
    if number < 1:
        raise ArgumentError(name, given=_shown(number), expected="an integer of at least 1")
    return _fits(number, name)


def _shown(number: int) -> str:
    """Python refuses to print an integer of thousands of digits."""
    return str(number) if abs(number) < 10**20 else "a huge integer"


def _fits(number: int, name: str) -> int:
    if number > LARGEST_SIZE:
        raise ArgumentError(name, given="an integer beyond 2**31 - 1", expected="a size that an array can have")
    return number


def _boolean(value: Any, name: str) -> bool:
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise ArgumentTypeError(name, given=f"{value!r} ({type(value).__name__})", expected="True or False")


def _finite(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(name, given=f"{value!r} ({type(value).__name__})", expected="a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ArgumentError(name, given=f"{number}", expected="a finite number")
    return number


def _probability(value: Any, name: str) -> float:
    number = _finite(value, name)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(name, given=repr(value), expected="a probability in [0, 1]")
    return number
