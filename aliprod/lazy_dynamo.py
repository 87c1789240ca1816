"""`torch._dynamo`, the half of torch that compiles, imported when something is compiled and not before.

timm, torchvision and the first step of an optimizer import it, only to say what is not to be compiled. That is a second
of a CPU and 110 MB in each process that sees an image (benchmarks/job_start.py).
"""

import sys
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

_NAME = "torch._dynamo"


class _Later(ModuleType):
    """A module until it is asked for more than it was given; then it is the real one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and (self.__name__, name) != (_NAME, "__path__"):
            raise AttributeError(name)  # Python asks every module for these; only a submodule needs the real path
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    for standing_in in (_NAME, f"{_NAME}.utils"):
        if isinstance(sys.modules.get(standing_in), _Later):
            del sys.modules[standing_in]
    import_module(_NAME)
    return import_module(name)


def _disable(function: Callable[..., Any] | None = None, recursive: bool = True, **settings: Any) -> Any:
    if function is None:
        return lambda found: _disable(found, recursive, **settings)

    @cache
    def known_to_dynamo() -> Any:
        return _real(_NAME).disable(function, recursive, **settings)

    @wraps(function)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        compiles = not isinstance(sys.modules[_NAME], _Later)
        return (known_to_dynamo() if compiles else function)(*args, **kwargs)

    return disabled


def import_when_compiling() -> None:
    """Have `torch._dynamo` imported by whoever compiles, exports or asks for what is not known here. Where it is
    imported already, nothing happens."""
    if _NAME in sys.modules:
        return
    dynamo, utils = _Later(_NAME), _Later(f"{_NAME}.utils")
    vars(dynamo).update(
        disable=_disable,
        graph_break=lambda: None,  # of what is not compiled
        trace_rules=SimpleNamespace(clear_lru_cache=lambda: None),
    )
    vars(utils).update(is_compile_supported=lambda device: _real(utils.__name__).is_compile_supported(device))
    sys.modules |= {module.__name__: module for module in (dynamo, utils)}
