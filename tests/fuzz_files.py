"""How the fuzz writes files; with `rng`, with something wrong in them."""

import json
import math
import struct
from typing import Any

from fuzz_bases import Tensors
from fuzz_mutations import EVIL, PICKLED, RAW, Random, mutated
from torch_files import Persistent, dumps, storage, stream, tensor, zip_archive

STORAGES = {"F16": "Half", "BF16": "BFloat16", "F32": "Float", "F64": "Double", "I64": "Long"}
STORAGES |= {"I32": "Int", "I16": "Short", "I8": "Char", "BOOL": "Bool"}


def text(tree: Any) -> bytes:
    found = json.dumps(tree)
    for name, raw in RAW.items():
        found = found.replace(f'"{name}"', raw)
    return found.encode()


def safetensors(tensors: Tensors, rng: Random | None = None) -> bytes:
    header, at = {}, 0
    for name, one in tensors.items():
        span = [at, at := at + len(one.data)]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": span}
    found = text(header if rng is None else mutated(header, rng, EVIL))
    length = len(found)
    if rng is not None:
        twice = found.replace(b"{", b'{"fc.weight":{},', 1)
        found = rng.choice([*([found] * 6), twice, found.decode().encode("utf-16")])
        length = rng.choice([*([len(found)] * 8), 0, 7, 10**8, 2**63, 2**64 - 1])
    return struct.pack("<Q", length) + found + b"".join(one.data for one in tensors.values())


def torch_file(tensors: Tensors, legacy: bool, rng: Random | None = None) -> bytes:
    state, storages = {}, []
    for key, (name, one) in enumerate(tensors.items()):
        kind, numel = f"{STORAGES.get(one.dtype, 'Byte')}Storage", math.prod(one.shape)
        strides = tuple(math.prod(one.shape[i + 1 :]) for i in range(len(one.shape)))
        state[name] = tensor(storage(kind, str(key), numel), 0, one.shape, strides)
        storages.append((str(key), numel, one.data))
    value = state if rng is None else mutated(state, rng, [*PICKLED, Persistent("x")])
    if legacy:
        return stream(value, *storages)
    members = {f"archive/data/{key}": data for key, _, data in storages}
    return zip_archive({"archive/data.pkl": dumps(value)} | members)
