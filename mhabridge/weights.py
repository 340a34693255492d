"""``MHAWeights``: the parameters of one layer in canonical form.

Weights are (out_features, in_features), as in ``Y = X @ W.T + b``. The dtype is kept as it was found: only ``astype``
changes it. The arrays are read-only copies of what was given, so neither side can change the other's numbers.

This module also runs inside workers (Python 3.8).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from mhabridge import dtypes, packing
from mhabridge.errors import ArgumentError, ArgumentTypeError, WeightsError
from mhabridge.spec import MHASpec


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MHAWeights:
    """The parameters of one multi-head attention layer; None for each that it does not have.

    With E = embed_dim, and every projection of the usual size, the shapes are those below; for all others see
    ``MHASpec.parameter_shapes``. bfloat16 is ``ml_dtypes.bfloat16`` (in a worker ``dtypes.BFLOAT16_WORDS``).

    Two are equal (``==`` or ``equals``) if they have the same parameters with the same dtype, shapes and bits.

    Args:
        q_weight: (E, E).
        k_weight: (E, kdim).
        v_weight: (E, vdim).
        out_weight: (E, E).
        q_bias: (E,).
        k_bias: (E,).
        v_bias: (E,).
        out_bias: (E,).
        bias_k: (E,), the position that add_bias_kv appends to the projected keys.
        bias_v: (E,), the same for the values.

    Raises:
        ArgumentTypeError: something else than a NumPy array.
        WeightsError: a dtype that is not one of the four, or more than one dtype.

    Example:
        >>> weights = MHAWeights(q_weight=np.eye(2, dtype="float32"))
        >>> weights
        MHAWeights(float32, q_weight (2, 2))
        >>> weights.q_weight.flags.writeable
        False
    """

    q_weight: np.ndarray | None = None
    k_weight: np.ndarray | None = None
    v_weight: np.ndarray | None = None
    out_weight: np.ndarray | None = None
    q_bias: np.ndarray | None = None
    k_bias: np.ndarray | None = None
    v_bias: np.ndarray | None = None
    out_bias: np.ndarray | None = None
    bias_k: np.ndarray | None = None
    bias_v: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _own(name, value))
        found = {name: dtypes.name_of(array) for name, array in self.arrays().items()}
        if len(set(found.values())) > 1:
            raise WeightsError(
                "weights",
                given=", ".join(f"{name} {dtype}" for name, dtype in found.items()),
                expected="one dtype for all",
                advice="Change the odd ones first, knowing what is lost.",
            )

    @property
    def dtype(self) -> str | None:
        """The canonical name of the dtype; None if there is no parameter at all."""
        arrays = self.arrays()
        return dtypes.name_of(next(iter(arrays.values()))) if arrays else None

    def arrays(self) -> dict[str, np.ndarray]:
        """The parameters that are there, by name (read-only)."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def to_tree(self) -> dict[str, np.ndarray | None]:
        """All ten, by name, None for what is not there."""
        return {name: getattr(self, name) for name in NAMES}

    @classmethod
    def from_tree(cls, tree: Mapping[str, np.ndarray | None]) -> MHAWeights:
        """The inverse of ``to_tree``.

        Raises:
            WeightsError: a name that is no parameter's.
        """
        for name in tree:
            if name not in NAMES:
                raise WeightsError(
                    name,
                    given="a parameter of no layer",
                    expected="names among " + ", ".join(NAMES),
                    advice=_OTHER_NAMES,
                )
        return cls(**tree)

    @classmethod
    def random(cls, spec: MHASpec, seed: int = 0) -> MHAWeights:
        """Random parameters of a layer, from PyTorch's distributions; the biases too are random.

        q, k and v are Xavier-uniform, as one (3E, E) matrix when their shapes agree, else each by itself; the output's
        weight is uniform in ±1/sqrt(fan_in); bias_k and bias_v are Xavier-normal. PyTorch starts with zero biases,
        which would hide an error in them; here they are uniform in ±1/sqrt(fan_in), like those of ``torch.nn.Linear``.

        Each parameter has a stream of its own, drawn in float64 and then rounded: the same numbers whatever the dtype
        and in every version of NumPy (``RandomState`` is frozen).

        Raises:
            ArgumentError: the seed is not in [0, 2**32).
            ArgumentTypeError: the seed is no integer, or the spec is none.

        Example:
            >>> spec = MHASpec(4, 2)
            >>> MHAWeights.random(spec) == MHAWeights.random(spec, seed=0) != MHAWeights.random(spec, seed=1)
            True
        """
        key = _seed(seed)
        _require_spec(spec)
        shapes = spec.parameter_shapes()
        drawn = {name: _draw(np.random.RandomState([key, NAMES.index(name)]), name, spec, shapes) for name in shapes}
        return cls(**{name: dtypes.round_to(values, spec.dtype) for name, values in drawn.items()})

    @classmethod
    def from_layout(
        cls,
        layout: str,
        named: Mapping[str, np.ndarray],
        spec: MHASpec,
        prefix: str = "",
        notes: list[str] | None = None,
    ) -> MHAWeights:
        """The parameters in a framework's or a checkpoint's own tensors.

        Every tensor under the prefix is used, wholly, or it is an error. Left out, and said in ``notes``, are only the
        neighbours that the layout knows by name (``output.LayerNorm`` beside BERT's attention, the buffers of GPT-2's
        causal mask), and a bias that the layout cannot be without and the spec does not have, which must be zero.

        Args:
            layout: a name such as "torch", "torch@1.8.1" or "hf-bert"; ``layouts.names()`` gives all.
            named: arrays by name.
            spec: the layer.
            prefix: what goes before the layout's own names, such as "encoder.layer.0.attention"; names without it
                are ignored.
            notes: a list that is filled with what was left out.

        Raises:
            ArgumentError: there is no such layout.
            ArgumentTypeError: an argument of another type, such as two that are swapped.
            UnsupportedError: the layout cannot hold such a layer.
            WeightsError: a tensor is missing, unexpected, of another shape or dtype, or would be lost.

        Example:
            >>> spec = MHASpec(4, 2)
            >>> weights = MHAWeights.random(spec)
            >>> MHAWeights.from_layout("gpt2", weights.to_layout("gpt2", spec), spec) == weights
            True
        """
        found = packing.find(layout)
        _require_spec(spec)
        arrays = packing.from_named(found, named, spec, prefix=prefix, notes=notes)
        weights = cls(**arrays)
        weights.check(spec)
        return weights

    def to_layout(
        self, layout: str, spec: MHASpec, prefix: str = "", notes: list[str] | None = None
    ) -> dict[str, np.ndarray]:
        """The same parameters as a framework or a checkpoint names, packs and orients them.

        A bias that the layout cannot leave out and the spec does not have is written as zeros.

        Args:
            layout: a name such as "torch", "torch@1.8.1" or "hf-bert"; ``layouts.names()`` gives all.
            spec: the layer.
            prefix: goes before every name, with a dot between.
            notes: a list that is filled with what was written as zeros.

        Returns:
            New arrays that can be written to, in C order.

        Raises:
            ArgumentError: there is no such layout.
            UnsupportedError: the layout cannot hold such a layer.
            WeightsError: the weights are not those of the spec.

        Example:
            >>> spec = MHASpec(4, 2)
            >>> named = MHAWeights.random(spec).to_layout("torch", spec, prefix="attn")
            >>> {name: array.shape for name, array in named.items()}  # doctest: +NORMALIZE_WHITESPACE
            {'attn.in_proj_weight': (12, 4), 'attn.in_proj_bias': (12,),
             'attn.out_proj.weight': (4, 4), 'attn.out_proj.bias': (4,)}
        """
        found = packing.find(layout)
        self.check(spec)
        return packing.to_named(found, self.arrays(), spec, prefix=prefix, notes=notes)

    def check(self, spec: MHASpec) -> None:
        """Hold every parameter's presence, shape and dtype against the spec.

        Raises:
            ArgumentTypeError: that is no spec.
            WeightsError: one is missing, one too many, or of another shape or dtype.
        """
        _require_spec(spec)
        expected, arrays = spec.parameter_shapes(), self.arrays()
        for name in NAMES:
            _check_shape(name, arrays.get(name), expected.get(name))
        if arrays and self.dtype != spec.dtype:
            raise WeightsError(
                "weights",
                given=f"dtype {self.dtype}",
                expected=f"{spec.dtype}, the spec's",
                advice=f"Use spec.replace(dtype={self.dtype!r}), or weights.astype to round.",
            )

    def astype(self, dtype: Any) -> MHAWeights:
        """The weights rounded to another dtype (to nearest, ties to even).

        Raises:
            WeightsError: a finite value would become infinite.

        Example:
            >>> MHAWeights.random(MHASpec(4, 2)).astype("float16").dtype
            'float16'
        """
        target = dtypes.canonical(dtype)
        rounded = {name: dtypes.round_to(array, target) for name, array in self.arrays().items()}
        for name, array in rounded.items():
            _refuse_overflow(name, getattr(self, name), array, target)
        return MHAWeights(**rounded)

    def equals(self, other: MHAWeights) -> bool:
        """Whether both have the same parameters, bit for bit, of the same dtype.

        Unlike ``np.array_equal`` it tells 0.0 from -0.0, and equal NaNs are equal.

        Raises:
            ArgumentTypeError: the other is no MHAWeights.
        """
        if not isinstance(other, MHAWeights):
            raise ArgumentTypeError("other", given=type(other).__name__, expected="MHAWeights")
        mine, theirs = self.arrays(), other.arrays()
        return mine.keys() == theirs.keys() and all(_same_bits(mine[name], theirs[name]) for name in mine)

    def __eq__(self, other: object) -> bool:
        return self.equals(other) if isinstance(other, MHAWeights) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by value, and the values are large

    def __repr__(self) -> str:
        parts = [f"{name} {array.shape}" for name, array in self.arrays().items()]
        return f"MHAWeights({', '.join([self.dtype, *parts] if self.dtype else parts)})"


NAMES = tuple(field.name for field in dataclasses.fields(MHAWeights))
_OTHER_NAMES = "A framework's own names are read with MHAWeights.from_layout."


def _require_spec(spec: Any) -> None:
    if not isinstance(spec, MHASpec):
        raise ArgumentTypeError("spec", given=type(spec).__name__, expected="an MHASpec")


def _own(name: str, value: Any) -> np.ndarray:
    """A read-only copy in C order and native byte order."""
    value = packing.as_array(name, value)
    if dtypes.name_of(value) not in dtypes.FLOATS:
        raise WeightsError(
            name,
            given=f"dtype {value.dtype}",
            expected="one of " + ", ".join(dtypes.FLOATS),
            advice="Quantised weights have to be dequantised first.",
        )
    if dtypes.name_of(value) == "bfloat16":
        value = _bfloat16(value)
    array = np.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
    array.flags.writeable = False
    return array


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """Words stay words; a framework's own bfloat16 (MindSpore's is another than that of ml_dtypes) becomes public."""
    if array.dtype == dtypes.BFLOAT16_WORDS:
        return array
    words = dtypes.to_words(array)
    try:
        return dtypes.to_public(words)
    except ImportError:
        return words


def _check_shape(name: str, array: np.ndarray | None, expected: tuple[int, ...] | None) -> None:
    if array is None and expected is not None:
        raise WeightsError(
            name,
            given="nothing",
            expected=f"an array of shape {expected}",
            advice="The spec says that the layer has it.",
        )
    if array is not None and expected is None:
        raise WeightsError(
            name,
            given=f"an array of shape {array.shape}",
            expected="None",
            advice="The spec says that the layer has none.",
        )
    if array is not None and array.shape != expected:
        raise WeightsError(
            name,
            given=f"shape {array.shape}",
            expected=f"shape {expected}",
            advice="Weights are (out, in); see the spec's sizes.",
        )


def _refuse_overflow(name: str, before: np.ndarray, after: np.ndarray, dtype: str) -> None:
    finite = np.isfinite(dtypes.to_float64(before))
    lost = int(np.count_nonzero(finite & ~np.isfinite(dtypes.to_float64(after))))
    if lost:
        raise WeightsError(
            name,
            given=f"{lost} finite values beyond what {dtype} holds",
            expected=f"at most {dtypes.LARGEST[dtype]:g}",
            advice="Choose bfloat16 or a wider dtype.",
        )


def _same_bits(mine: np.ndarray, theirs: np.ndarray) -> bool:
    return (
        dtypes.name_of(mine) == dtypes.name_of(theirs)
        and mine.shape == theirs.shape
        and mine.tobytes() == theirs.tobytes()
    )


def _seed(seed: Any) -> int:
    try:
        number = operator.index(seed)
    except TypeError:
        raise ArgumentTypeError("seed", given=repr(seed), expected="an integer") from None
    if not 0 <= number < 2**32:
        raise ArgumentError("seed", given=str(number), expected="an integer in [0, 2**32)")
    return number


def _draw(stream: np.random.RandomState, name: str, spec: MHASpec, shapes: Mapping[str, tuple[int, ...]]) -> np.ndarray:
    """Random values of one parameter, in float64."""
    shape = shapes[name]
    if name in ("bias_k", "bias_v"):
        return stream.standard_normal(shape) / math.sqrt(shape[0])
    rows, columns = shapes[name.replace("_bias", "_weight")]
    bound = 1.0 / math.sqrt(columns)
    if name in ("q_weight", "k_weight", "v_weight"):
        alike = shapes.get("q_weight") == shapes.get("k_weight") == shapes.get("v_weight")
        bound = math.sqrt(6.0 / ((3 * rows if alike else rows) + columns))
    return stream.uniform(-bound, bound, shape)
