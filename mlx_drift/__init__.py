"""mlx-drift: lossless EAGLE-3 and EAGLE-3.1 speculative decoding on MLX.

The public names (`mlx_drift.public`) are imported when one of them is first asked for: what needs
none of them, such as `mlx-drift --help`, does not wait for mlx-lm.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_drift.public import *  # noqa: F403

FUNCTIONS = "doctor", "generate"
"""Public functions with the name of the module that they are in."""


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module("mlx_drift.public"), name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return [*__getattr__("__all__")]


class _Package(ModuleType):
    """This package, where a module that is imported does not hide the function of its name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in FUNCTIONS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
