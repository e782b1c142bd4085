"""Verb: one function that is called with a configuration or with keywords."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from megatron_midus.config.values import build
from megatron_midus.progress import Bars, Progress

Result = TypeVar("Result")


class Verb(Generic[Result]):
    """Makes a function of a configuration callable in two ways.

    ``upscale(UpscaleConfig(…))``, or ``upscale(hf_model="base", save="out", num_blocks=4)`` with the names of the flags of
    ``midus upscale``. ``progress`` shows how far it is: ``Bars()`` (the default), ``Callback(function)`` or ``SILENT``.

    Args:
        function: ``(config, progress) -> result``.
        config: dataclass whose fields are the flags.
    """

    def __init__(self, function: Callable[[Any, Progress], Result], config: type) -> None:
        functools.update_wrapper(self, function)
        self.function, self.config = function, config

    def __call__(self, config: Any = None, /, *, progress: Progress | None = None, **settings: Any) -> Result:
        if config is None:
            config = build(self.config, settings, f"{self.function.__name__}()")
        elif settings:
            config = dataclasses.replace(config, **settings)
        return self.function(config, Bars() if progress is None else progress)


def verb(config: type) -> Callable[[Callable[[Any, Progress], Result]], Verb[Result]]:
    """Decorates ``(config, progress) -> result``."""
    return lambda function: Verb(function, config)
