"""Runs the pickle inside a PyTorch checkpoint as the data it should be, never as a program.

A pickle is a program: `pickle.load` calls any function it names. Here `pickletools.genops`, which
decodes and does not execute, feeds a small stack machine that knows the opcodes a state dict needs;
a global becomes an inert name, and REDUCE picks one of five rebuild rules below. BUILD sets
nothing, no name is imported, no attribute is looked up.

The persistent id `('storage', type, key, location, numel)` stands for a storage, and
`_rebuild_tensor_v2` views it by offset, size and stride, all in elements. `_rebuild_tensor_v3` is
for dtypes without a storage type of their own (uint16/32/64, fp8): bytes, the dtype passed apart.
"""

import pickletools
from dataclasses import dataclass
from typing import IO, Any

_MAX_OPCODES = 250_000  # about 40 a tensor; bounds time, and memory where one byte makes a dict
_MAX_KEY = 1000  # characters; two long keys could be compared once an opcode
MAX_ELEMENTS = 2**59  # their count of bytes still fits int64

# By safetensors' names. The last three have no place in MLX: the reader refuses them by name.
_DTYPES = {
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
    "torch.float64": "F64",
    "torch.int8": "I8",
    "torch.int16": "I16",
    "torch.int32": "I32",
    "torch.int64": "I64",
    "torch.uint8": "U8",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.float8_e8m0fnu": "F8_E8M0",
}
_STORAGE_DTYPES = {
    "torch.BFloat16Storage": "BF16",
    "torch.HalfStorage": "F16",
    "torch.FloatStorage": "F32",
    "torch.DoubleStorage": "F64",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.IntStorage": "I32",
    "torch.LongStorage": "I64",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.storage.UntypedStorage": "U8",  # its numel counts bytes
}
_FUNCTIONS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}
# Every other global is refused; these are only names.
_GLOBALS = _FUNCTIONS | _STORAGE_DTYPES.keys() | _DTYPES.keys()

_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPERANDS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # others: to a MARK

_RESAVE = "load it in PyTorch only if you trust it, and save its tensors as safetensors"


class Refusal(Exception):
    """A refusal without the file's name, which the reader adds."""

    def __init__(self, found: str, expected: str, remedy: str = _RESAVE) -> None:
        super().__init__(f"found {found}, expected {expected}; {remedy}")


@dataclass(frozen=True)
class Global:
    """An inert name: never imported, never called."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Raw elements that tensors view, known by a key; its dtype by safetensors' name."""

    key: str
    dtype: str
    numel: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage, in elements; but for its dtype, the file's claims, unchecked."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    stride: Any


class Machine:
    """The stack machine of the pickle format, for dicts, lists, tuples, scalars and tensors.

    Hashing, comparing or printing an untrusted container can take exponential time or overflow the
    C stack, so values are only moved; dict keys are short strings or small integers. One machine
    runs all pickles of a file, so that their opcodes are counted together.
    """

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._count = 0  # of opcodes

    def run(self, stream: IO[bytes]) -> Any:
        """Executes one pickle and leaves `stream` behind its STOP.

        Raises:
            Refusal: The pickle is malformed, too long, or anything but a plain state dict.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if self._count == _MAX_OPCODES:
                    raise Refusal(f"more than {_MAX_OPCODES} pickle opcodes", "a state dict")
                self._step(opcode.name, argument)
                self._count += 1
            return self._stack.pop()
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise Refusal(f"a malformed pickle ({error!s:.80})", "one torch.save wrote") from error

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_LITERALS[opcode])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._operands(opcode)))
            case "APPEND" | "APPENDS":
                self._extend(self._operands(opcode))
            case "SETITEM" | "SETITEMS":
                self._update(self._operands(opcode))
            case "BINPUT" | "LONG_BINPUT" if argument <= self._count:
                self._memo[argument] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(_resolve(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_resolve(".".join((module, name))))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments))
            case "BUILD" if isinstance(stack[-2], dict):
                stack.pop()  # attributes of an OrderedDict: the `_metadata` of a state dict
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise Refusal(f"the pickle opcode {opcode}", "those of a plain state dict")

    def _operands(self, opcode: str) -> list[Any]:
        count = _OPERANDS.get(opcode)
        start = self._marks.pop() if count is None else len(self._stack) - count
        if not 0 <= start <= len(self._stack):
            raise IndexError("stack underflow")
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise TypeError("append to what is no list")
        self._stack[-1].extend(items)

    def _update(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], dict):
            raise TypeError("item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not _is_key(key) and not (isinstance(key, int) and abs(key) < 2**31):
                raise TypeError("a dict key that is neither a short string nor a small integer")
            self._stack[-1][key] = value

    def _storage(self, persistent_id: Any) -> Storage:
        match persistent_id:
            # The stream container appends the metadata of a storage view, None since torch 0.4.
            case ("storage", Global(kind), str(key), _, int(numel), *view) if view in ([], [None]):
                if kind in _STORAGE_DTYPES and _is_key(key) and 0 <= numel <= MAX_ELEMENTS:
                    storage = Storage(key, _STORAGE_DTYPES[kind], numel)
                    if self.storages.setdefault(key, storage) == storage:
                        return storage
        raise Refusal("an unknown persistent id", "('storage', type, key, location, numel)")


def _is_key(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_KEY


def _resolve(name: str) -> Global:
    if name not in _GLOBALS:
        raise Refusal(f"the global {name!r:.80}", "tensors and plain containers only")
    return Global(name)


def _rebuild(function: Any, arguments: Any) -> Any:
    """The value of REDUCE; hooks and requires_grad of a tensor mean nothing here."""
    match function, arguments:
        case Global("collections.OrderedDict"), ():
            return {}
        case Global("torch.Size"), (tuple(sizes),):
            return sizes
        case Global("torch._utils._rebuild_parameter"), (Tensor() as data, _, _):
            return data
        case (
            Global("torch._utils._rebuild_tensor_v2"),
            (Storage() as storage, offset, shape, stride, _, _, *metadata),
        ) if not any(metadata):  # metadata marks the lazy conjugate and negative views
            return Tensor(storage, storage.dtype, offset, shape, stride)
        case (
            Global("torch._utils._rebuild_tensor_v3"),
            (Storage() as storage, offset, shape, stride, _, _, Global(dtype), *metadata),
        ) if dtype in _DTYPES and not any(metadata):
            return Tensor(storage, _DTYPES[dtype], offset, shape, stride)
    name = function.name if isinstance(function, Global) else f"a {type(function).__name__}"
    raise Refusal(f"a call of {name} with unknown arguments", "a tensor, parameter or OrderedDict")
