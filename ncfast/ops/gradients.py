"""Gradients of kernels, and what becomes of gradients of gradients."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def of_kernel(operation: str, again: Callable | None = None) -> Callable[[Callable], Callable]:
    """Decorates `backward` of an autograd.Function whose gradient a kernel computes, as a number that knows no more
    where it comes from.

    With create_graph (a penalty on a gradient, a Hessian-vector product) the gradient itself is to be differentiated.
    PyTorch's `once_differentiable` speaks up only where the incoming gradient requires one, and lets the others pass as
    constants: a second derivative of zero. Here they are computed by the reference, or refused.

    Args:
        operation: its name, for the error.
        again: ctx -> (inputs, outputs): the inputs as they were given, None for those that are no tensors, in forward's
            order, and forward's outputs, computed from them by operations that autograd knows. None: refuse.

    Raises:
        RuntimeError: from the backward pass, where a second derivative is wanted and there is none.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            # A compiled backward pass is never differentiated, and its tracing has gradients enabled.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if again is None:
                raise RuntimeError(
                    f"{operation}: its kernels have no second derivative, which create_graph=True asks for; use "
                    "impl='reference', or the environment variable NCFAST_IMPL=reference"
                )
            inputs, outputs = again(ctx)
            return of_reference(inputs, outputs, grads, ctx.needs_input_grad)

        return wrapper

    return decorate


def of_reference(
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
    grads: tuple[Tensor | None, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of outputs with respect to inputs, with a graph of their own; None where none is needed."""
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, grads, strict=True)
        if grad is not None and isinstance(out, Tensor) and out.requires_grad
    ]
    wanted = [i for i, need in enumerate(needed) if need and i < len(inputs) and inputs[i] is not None]
    found = torch.autograd.grad(
        [out for out, _ in pairs],
        [inputs[i] for i in wanted],
        [grad for _, grad in pairs],
        create_graph=True,
        allow_unused=True,
    )
    gradients: list[Tensor | None] = [None] * len(needed)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
