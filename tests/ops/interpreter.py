"""Triton's interpreter without what it does again and again: half of its time.

What it finds out of its language and of a type is kept, and what it would reduce element by element NumPy does at once.
"""

import functools
import types

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def quicken():
    interpreter._patch_lang = functools.partial(look_once, interpreter._patch_lang)
    interpreter._get_np_dtype = functools.partial(kept, "of_numpy", interpreter._get_np_dtype)
    one_type_of_a_shape(tl.block_type)
    shapes_of_types(tl.tensor)
    same_shapes_stay(TritonSemantic)
    at_once(interpreter)


def look_once(patch_lang, fn):
    """Through the language at a launch, not for each call of a function inside a kernel."""
    languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    if any(tl.core.is_builtin(language.load) for language in languages):
        return patch_lang(fn)
    return types.SimpleNamespace(restore=lambda: None)


def kept(name, find, type):
    """find(type), as an attribute of the type: some cannot be keys."""
    if name not in type.__dict__:
        setattr(type, name, find(type))
    return type.__dict__[name]


def one_type_of_a_shape(block_type):
    make = block_type.__init__

    def new(cls, element_ty=None, shape=()):
        if cls is not block_type or element_ty is None:
            return object.__new__(cls)
        shape = tuple([tl.core._unwrap_if_constexpr(size) for size in shape])
        made = kept("blocks", lambda _: {}, element_ty)
        return made.setdefault(shape, object.__new__(cls))

    def init(self, *arguments):
        if not hasattr(self, "name"):
            make(self, *arguments)

    block_type.__new__, block_type.__init__ = new, init


def shapes_of_types(tensor):
    make = tensor.__init__

    def init(self, handle, type):
        known = type.__dict__.get("of_a_tensor")
        if known is None:
            make(self, handle, type)
            type.of_a_tensor = {name: value for name, value in vars(self).items() if name != "handle"}
        else:
            self.handle = handle
            self.__dict__.update(known)

    tensor.__init__ = init


def same_shapes_stay(semantic):
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and list(lhs.type.shape) == list(rhs.type.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def at_once(interpreter):
    """What a sort and code_stats' scan are made of."""
    scan, reduce = interpreter.ScanOps.generic_scan, interpreter.ReduceOps.generic_reduce

    def names(operation):
        return operation.combine_fn.fn.__module__, operation.combine_fn.fn.__name__

    def generic_scan(self, input):
        if names(self) != ("ncfast.ops.triton.code_stats", "larger"):
            return scan(self, input)
        return [self.to_tensor(np.maximum.accumulate(x.handle.data, axis=self.axis), x.dtype) for x in input]

    def generic_reduce(self, input):
        if names(self) != ("triton.language.standard", "_xor_combine"):
            return reduce(self, input)
        options = {"axis": self.axis, "keepdims": self.keep_dims}
        return [self.to_tensor(np.bitwise_xor.reduce(x.handle.data, **options), x.dtype) for x in input]

    interpreter.ScanOps.generic_scan, interpreter.ReduceOps.generic_reduce = generic_scan, generic_reduce
