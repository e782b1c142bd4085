"""Imports of Megatron-Core without torch's compiler, which they do not use before training does."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deferred_compile() -> Iterator[None]:
    """While this lasts, ``torch.compile`` as a decorator compiles with the first call of what it decorates.

    Megatron-Core decorates its fusions at import. torch imports its compiler for that, hundreds of modules in each rank,
    which a run that calls none of these fusions never needs.
    """
    compile_now = torch.compile
    torch.compile = functools.partial(_on_first_call, compile_now)
    try:
        yield
    finally:
        torch.compile = compile_now


def _on_first_call(compile_now: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    if function is None:
        return functools.partial(_on_first_call, compile_now, **options)
    if isinstance(function, torch.nn.Module):
        return compile_now(function, **options)
    compiled = functools.cache(lambda: compile_now(function, **options))

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        return compiled()(*arguments, **keywords)

    return call
