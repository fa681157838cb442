"""Write ``references.safetensors`` and ``references.json``: what ``eagle3_torch.py`` answers.

    python tests/reference/make_references.py           # write both files
    python tests/reference/make_references.py --check   # recompute and compare with them instead

references.json
    ``{"seed", "length", "steps", "cases": [{"name", "config", "logits", "states"}, ...]}``; the
    last two are tensor names.
references.safetensors
    ``shared/NAME/SHAPE``   weights (canonical name), ``embed``, ``target_head``, ``taps`` as
                            float16 (exact, see ``cases.short_floats``), ``tokens``, ``d2t`` int64.
                            All cases have one seed, so a name and a shape say which tensor it is.
    ``case/NAME/logits``    [steps, L, D] float32
    ``case/NAME/states``    [steps, L, H] float32; a tied case points at its reduced twin's, since
                            the head does not touch the states.

Outputs are computed in float64 and rounded once to float32, so a comparison measures only the
error of the side under test. ``cases.load_cases`` reads both files without torch.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from cases import (
    CASES_FILE,
    TENSORS_FILE,
    Array,
    Case,
    load_cases,
    random_case,
    reference_configs,
    shared_tensors,
)
from eagle3_torch import Eagle3Reference
from safetensors.numpy import save_file

SEED = 31
LENGTH = 12
STEPS = 4
BUDGET = 700_000


def run_case(case: Case, steps: int, dtype: torch.dtype) -> tuple[Array, Array]:
    """The reference's (logits [steps, L, D], states [steps, L, H]) for a case, in ``dtype``."""
    reference = Eagle3Reference(
        case.config,
        {name: torch.from_numpy(w) for name, w in case.weights.items()},
        torch.from_numpy(case.embed),
        torch.from_numpy(case.target_head),
        dtype,
    )
    with torch.no_grad():
        logits, states = reference.train_time_test(
            torch.from_numpy(case.tokens), torch.from_numpy(case.taps), steps
        )
    return logits.numpy(), states.numpy()


def storable(x: Array) -> Array:
    """float32 as float16 where that loses nothing (it never may here), integers as they are."""
    if x.dtype != np.float32:
        return x
    short = x.astype(np.float16)
    if not np.array_equal(short.astype(np.float32), x):
        raise ValueError("a shared tensor is not exact in float16")
    return short


def build() -> tuple[dict[str, Array], list[dict[str, object]]]:
    """Compute every case: (tensors by stored name, the JSON entries)."""
    tensors: dict[str, Array] = {}
    entries: list[dict[str, object]] = []
    for name, config in reference_configs().items():
        case = random_case(name, config, SEED, LENGTH)
        named = {
            **case.weights,
            "embed": case.embed,
            "target_head": case.target_head,
            "tokens": case.tokens,
            "taps": case.taps,
        }
        for key, place in shared_tensors(config, LENGTH).items():
            tensor = storable(named[key])
            if not np.array_equal(tensors.setdefault(place, tensor), tensor):
                raise ValueError(f"{place} is not the same in every case")

        logits, states = (x.astype(np.float32) for x in run_case(case, STEPS, torch.float64))
        states_name = f"case/{name}/states"
        twin = f"case/{name.removesuffix('tied')}reduced/states"
        if name.endswith("/tied"):
            if not np.array_equal(tensors[twin], states):
                raise ValueError(f"{name}: the head changed the states")
            states_name = twin
        tensors[states_name] = states
        tensors[f"case/{name}/logits"] = logits
        entries.append(
            {
                "name": name,
                "config": config,
                "logits": f"case/{name}/logits",
                "states": states_name,
            }
        )
    return tensors, entries


def write(tensors: dict[str, Array], entries: list[dict[str, object]]) -> None:
    """Write both files; one JSON line per case, so that a diff reads well."""
    save_file(tensors, TENSORS_FILE)
    TENSORS_FILE.chmod(0o644)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    head = f'"seed": {SEED}, "length": {LENGTH}, "steps": {STEPS}'
    CASES_FILE.write_text(f'{{{head}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")
    size = TENSORS_FILE.stat().st_size + CASES_FILE.stat().st_size
    if size > BUDGET:
        raise SystemExit(f"the references take {size} bytes, more than {BUDGET}")
    print(f"{len(entries)} cases, {len(tensors)} tensors, {size} bytes")


def check() -> None:
    """Recompute every committed case in float32 from what the files hold, and compare."""
    worst = 0.0
    for case in load_cases():
        logits, states = run_case(case, case.steps, torch.float32)
        for got, want in ((logits, case.logits), (states, case.states)):
            error = float(np.abs(got - want)[case.valid].max())
            worst = max(worst, error)
            if error > 2e-5:
                raise SystemExit(f"{case.name}: differs by {error}")
    print(f"all cases agree, largest difference {worst:.1e} (float32 against the stored values)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write or check the drafter references")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        check()
    else:
        write(*build())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
