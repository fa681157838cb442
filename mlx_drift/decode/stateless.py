"""Which logits processors and samplers keep nothing from call to call.

They may be asked about all positions of a round at once. They are mlx-lm's own, functions that have
nowhere to keep anything, and what is marked: `processor.stateless = True`, on a function, an object
or its class.
"""

import builtins
import dis
from functools import lru_cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import mlx.core as mx

MLX_LMS_OWN = "mlx_lm.sample_utils"
PURE_MODULES = {"math", "mlx", "numpy"}
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), mx.Dtype)
REACHING_OUT = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_ATTR", "DELETE_ATTR", "IMPORT_NAME"}
UNSAFE_BUILTINS = {"delattr", "eval", "exec", "globals", "input", "setattr", "vars", "__import__"}


def is_stateless(function: Any) -> bool:
    """Tells whether calls of a processor or sampler cannot depend on the calls before.

    A function is believed to keep nothing only if it has nowhere to: no defaults, cells or globals
    but constants, pure modules and functions of that kind. Drawing at random counts as a state, so
    that a seed gives what it gives in plain decoding.
    """
    if getattr(function, "stateless", False) is True:
        return True
    if isinstance(function, partial):
        return _is_constant((function.func, *function.args, *function.keywords.values()), set())
    return isinstance(function, FunctionType) and _is_constant(function, set())


def _is_constant(value: Any, seen: set[int]) -> bool:
    """Tells whether a value cannot change; functions if they keep nothing and change nothing.

    Args:
        value: What a function refers to, or is.
        seen: The ids of functions that are being looked at: they may call each other.
    """
    if isinstance(value, CONSTANTS):
        return True
    if isinstance(value, tuple | frozenset):
        return all(_is_constant(part, seen) for part in value)
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] in PURE_MODULES
    if type(value).__module__ == "nanobind":  # functions and types of mlx
        return True
    if isinstance(value, BuiltinFunctionType | type):
        name = value.__name__
        return getattr(builtins, name, None) is value and name not in UNSAFE_BUILTINS
    if not isinstance(value, FunctionType):
        return False
    if id(value) in seen or value.__globals__.get("__name__") == MLX_LMS_OWN:
        return True
    seen.add(id(value))
    return _keeps_nothing(value, seen)


def _keeps_nothing(function: FunctionType, seen: set[int]) -> bool:
    """Tells whether a function has only constants to go by, and writes to nothing but its own."""
    code, taken = function.__code__, names_taken(function.__code__)
    names = {name for loaded in taken.values() for name in loaded}
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    rebound = taken.get("STORE_DEREF", set()) | taken.get("DELETE_DEREF", set())
    if REACHING_OUT & taken.keys() or rebound & cells.keys() or "random" in names:
        return False
    if any(not name.startswith("__") for name in vars(function)):
        return False
    used = taken.get("LOAD_GLOBAL", set()) | taken.get("LOAD_NAME", set())
    missing = object()
    values = [
        function.__globals__.get(name, getattr(builtins, name, missing)) for name in sorted(used)
    ]
    values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    try:
        values += [cell.cell_contents for cell in cells.values()]
    except ValueError:  # a cell that is empty yet
        return False
    return all(_is_constant(value, seen) for value in values)


@lru_cache(maxsize=1024)
def names_taken(code: CodeType) -> dict[str, set[str]]:
    """Returns the operations of a code, those within it included, with the names they take."""
    found: dict[str, set[str]] = {}
    for instruction in dis.get_instructions(code):
        names = found.setdefault(instruction.opname, set())
        if isinstance(instruction.argval, str):
            names.add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for opname, names in names_taken(inner).items():
                found.setdefault(opname, set()).update(names)
    return found
