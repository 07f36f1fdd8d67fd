"""Triton's interpreter, so that kernels of the CUDA engine run on a machine without a GPU.

Triton reads TRITON_INTERPRET when it is imported, so ``claim`` is called before any test (by
conftest.py). Where there is a GPU, kernels are compiled, and tests by interpreter are skipped.
"""

import os
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch


def claim() -> None:
    """Ask for the interpreter, if this machine needs it and Triton is there."""
    if find_spec("triton") is not None and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def missing() -> str | None:
    """Why kernels cannot run on this machine's CPU; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return "with a GPU, kernels are compiled for it instead of interpreted"
    from triton import knobs

    if not knobs.runtime.interpret:
        return "Triton was imported before its interpreter was asked for"
    _patch_once()
    return None


_FLOATS = {"fp32"}
_SIGNED = {"int32", "int64"}
_WHOLE = _SIGNED | {"uint32", "uint64"}
_NUMBERS = _WHOLE | _FLOATS
_OPERATORS = {
    **dict.fromkeys(("add", "radd"), (_NUMBERS, np.add, False)),
    **dict.fromkeys(("sub", "rsub"), (_NUMBERS, np.subtract, False)),
    **dict.fromkeys(("mul", "rmul"), (_NUMBERS, np.multiply, False)),
    "and": (_WHOLE | {"int1"}, np.bitwise_and, False),
    "or": (_WHOLE | {"int1"}, np.bitwise_or, False),
    "lt": (_NUMBERS, np.less, True),
    "le": (_NUMBERS, np.less_equal, True),
    "gt": (_NUMBERS, np.greater, True),
    "ge": (_NUMBERS, np.greater_equal, True),
    "eq": (_NUMBERS, np.equal, True),
    "ne": (_NUMBERS, np.not_equal, True),
}
"""By operator: the types it is quick for, the function of numpy, and whether it compares."""


class _Kept:
    """Stands for a patch that stays."""

    def restore(self) -> None:
        return None


@cache
def _patch_once() -> None:
    """Make the interpreter about ten times faster, by what it need not do again and again.

    It puts its functions into Triton's language anew at every call of every function; here once,
    for good, and in one call each instead of three. It also makes the type of every intermediate
    tensor anew; here each is kept. Operands that have the same type and shape are not made alike,
    and plain arithmetic goes to numpy straight away.
    Sums of integers are not checked for overflow, as compiled kernels do not: no number of a
    small model comes near it.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, semantic = interpreter._patch_lang, interpreter.interpreter_semantic

    def user() -> None:
        """Has the modules in view whose functions are replaced."""

    interpreter._patch_attr = partial(_attach, semantic)
    patch(type(user)(user.__code__, {"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _function: _Kept()
    interpreter._get_np_dtype = _kept_dtypes(interpreter._get_np_dtype, tl.core)
    tl.core.block_type.__init__ = _kept_blocks(tl.core.block_type.__init__, tl.core)
    tl.core.tensor.__init__ = _kept_tensors(tl.core.tensor.__init__)
    interpreter.TensorHandle.__post_init__ = lambda _self: None
    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    kind = type(semantic)
    kind.broadcast_impl_value = _quick_broadcast(kind.broadcast_impl_value)
    kind.binary_op_type_checking_impl = _quick_types(kind.binary_op_type_checking_impl, tl.core)
    quick = _QuickOperators(semantic, interpreter.TensorHandle, tl.core)
    for name, steps in _OPERATORS.items():
        quick.replace(f"__{name}__", *steps)


def _attach(semantic: Any, place: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
    """Put one function of the interpreter into the language."""
    inner = getattr(member, "__wrapped__", member)

    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    scope.set_attr(place, name, call)


class _QuickOperators:
    """Operators of tensors whose operands numpy treats as the language does."""

    def __init__(self, semantic: Any, handle: Any, core: Any) -> None:
        self._builder, self._handle, self._core = semantic.builder, handle, core
        self._joined = _joined_types(core)

    def replace(self, name: str, types: set[str], function: Any, compares: bool) -> None:
        """Put a quick operator before the one of this name; it passes on what it does not take."""
        tensor, constant, handle = self._core.tensor, self._core.constexpr, self._handle
        add_pointer, truth = self._builder.create_addptr, self._core.int1
        joined, slow, adds = self._joined, getattr(tensor, name), function is np.add
        swaps = name.startswith("__r")

        def quick(self: Any, other: Any, **_: Any) -> Any:
            if type(other) is constant:
                other = other.value
            kind = self.dtype.name
            if type(other) is tensor:
                moves = adds and other.dtype.name in _SIGNED and self.dtype.is_ptr()
                if not moves and (kind not in types or other.dtype.name != kind):
                    return slow(self, other)
                joint = joined(self.type, other.type)
                if joint is None:
                    return slow(self, other)
                if moves:
                    return tensor(add_pointer(self.handle, other.handle), joint)
                number = other.handle.data
            elif (kind in _NUMBERS and type(other) is int and abs(other) < 2**31) or (
                kind in _FLOATS and type(other) is float
            ):
                joint, number = self.type, other
            else:
                return slow(self, other)
            mine = self.handle.data
            data = function(number, mine) if swaps else function(mine, number)
            outcome = joined(truth, joint) if compares else joint
            return tensor(handle(data, self.handle.dtype.scalar), outcome)

        setattr(tensor, name, quick)


def _joined_types(core: Any) -> Any:
    """The type of a result of two operands' shapes, with the elements of the first.

    None where numpy would not broadcast as the language does.
    """
    known: dict[tuple[str, str], Any] = {}

    def of(mine: Any, other: Any) -> Any:
        key = (mine.name, other.name)
        if key not in known:
            known[key] = joined(mine, other)
        return known[key]

    def joined(mine: Any, other: Any) -> Any:
        if not other.is_block():
            return mine
        if not mine.is_block():
            return core.block_type(mine, other.shape)
        first, second = mine.shape.values, other.shape.values
        if first == second:
            return mine
        pairs = list(zip(first, second, strict=False))
        if len(first) != len(second) or any(a != b and 1 not in (a, b) for a, b in pairs):
            return None
        return core.block_type(mine.element_ty, [max(pair) for pair in pairs])

    return of


def _quick_broadcast(broadcast: Any) -> Any:
    """Operands of the same shape are left as they are."""

    def quick(self: Any, lhs: Any, rhs: Any) -> Any:
        mine, other = lhs.type, rhs.type
        if mine.is_block():
            if other.is_block() and mine.shape.values == other.shape.values:
                return lhs, rhs
        elif not other.is_block():
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    return quick


def _quick_types(check: Any, core: Any) -> Any:
    """Operands of the same type are left as they are, but for pointers and short floats."""
    plain = {"int1", "int32", "int64", "uint32", "uint64", "fp32"}

    def quick(self: Any, lhs: Any, rhs: Any, *rules: Any) -> Any:
        if isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor):
            name = lhs.dtype.name
            if name in plain and name == rhs.dtype.name:
                return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *rules)

    return quick


def _kept_dtypes(get: Any, core: Any) -> Any:
    known: dict[str, Any] = {}

    def of(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, core.block_type) else kind
        if element.name not in known:
            known[element.name] = get(kind)
        return known[element.name]

    return of


def _kept_blocks(init: Any, core: Any) -> Any:
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def make(self: Any, element_ty: Any, shape: Any) -> None:
        shape = shape.values if isinstance(shape, core.tuple) else list(shape)
        sizes = (size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = (element_ty.name, *sizes)
        if key not in known:
            init(self, element_ty, shape)
            known[key] = (self.shape, self.numel, self.name)
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return make


def _kept_tensors(init: Any) -> Any:
    known: dict[str, tuple[Any, ...]] = {}

    def make(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = (self.shape, self.numel)
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[type.name]

    return make
