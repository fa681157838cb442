"""Write tiny MTP checkpoints and what ``mtp_torch.py`` answers for them.

    export PYTHONPATH=tests/reference
    python tests/mtp_reference/make_references.py                 # write
    python tests/mtp_reference/make_references.py --check         # recompute, compare instead
    python tests/mtp_reference/make_references.py --transformers  # ask transformers 5.23 as well

Run ``make_speculators_references.py`` first: its checkpoints get references of the engine
convention here as well. Needs torch; only ``--transformers`` needs more.

NAME/config.json, NAME/model.safetensors
    The module's tensors alone, as the repository that ``mtp_cases.py`` names has them. Folders
    ``speculators_*`` are the package's own (see ``make_speculators_references.py``).
references.json
    ``{"seed", "length", "cases": [{"name", "hidden_size"}, ...]}``, all folders.
references.safetensors
    ``tokens`` [L + 3] int64; ``H/hidden`` [L, H], ``H/embed`` [V, H] and ``H/head`` [V, H] for each
    hidden size H; ``NAME/logits`` [L + 2, V] and ``NAME/states`` [L + 2, H]: the engine convention
    of ``mtp_torch.py``. All floats float32.
speculators.safetensors
    What the package answered, with the same inputs (see ``make_speculators_references.py``).

Outputs are computed in float64 and rounded once to float32, so a comparison measures only the error
of the side under test. No choice of experts is closer than MARGIN, so float32 chooses the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from mtp_cases import CONFIGS, LENGTH, SEED, STEPS, Config, Tensors, checkpoint, inputs
from mtp_torch import MtpReference, text_config
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
TENSORS_FILE = HERE / "references.safetensors"
PACKAGE_FILE = HERE / "speculators.safetensors"
CASES_FILE = HERE / "references.json"
MARGIN = 1e-3
TOLERANCE = 2e-5
BUDGET = 1_200_000


def load_case(name: str) -> tuple[Config, Tensors]:
    """A committed checkpoint."""
    config = json.loads((HERE / name / "config.json").read_text(encoding="utf-8"))
    return config, load_file(HERE / name / "model.safetensors")


def reference(name: str, given: Tensors, dtype: torch.dtype = torch.float64) -> MtpReference:
    """The module of a committed checkpoint."""
    config, tensors = load_case(name)
    width = text_config(config)["hidden_size"]
    return MtpReference(config, tensors, given[f"{width}/embed"], given[f"{width}/head"], dtype)


def engine(module: MtpReference, given: Tensors) -> Tensors:
    """What it answers in the engine convention, rounded once."""
    hidden = given[f"{module.config['hidden_size']}/hidden"]
    logits, states = module.engine(given["tokens"], hidden)
    if module.margin < MARGIN:
        raise SystemExit(f"experts chosen by {module.margin}: draw others")
    return {"logits": logits.float(), "states": states.float()}


def compare(name: str, got: Tensors, want: Tensors) -> float:
    """The largest difference from ``NAME/...`` of ``want``; ends the program if it is large."""
    error = max(float((tensor - want[f"{name}/{key}"]).abs().max()) for key, tensor in got.items())
    if not error <= TOLERANCE:
        raise SystemExit(f"{name}: differs by {error}")
    return error


def check_package(name: str, module: MtpReference, given: Tensors) -> float:
    """Compare the equations with what the package answered."""
    hidden = given[f"{module.config['hidden_size']}/hidden"]
    logits, states = module.package(given["tokens"], hidden, STEPS)
    return compare(name, {"logits": logits, "states": states}, load_file(PACKAGE_FILE))


def folders() -> list[str]:
    """The names of all cases."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def write() -> None:
    """Write every file; one JSON line per case, so that a diff reads well."""
    for name, config in CONFIGS.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        save_file(checkpoint(config), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)

    tensors: Tensors = {}
    lines = []
    for name in folders():
        width = text_config(load_case(name)[0])["hidden_size"]
        given = inputs(width)
        module = reference(name, given)
        tensors |= given
        tensors |= {f"{name}/{key}": tensor for key, tensor in engine(module, given).items()}
        entry = {"name": name, "hidden_size": width}
        if name not in CONFIGS:
            entry["package_steps"] = STEPS
            check_package(name, module, given)
        lines.append("  " + json.dumps(entry))
    save_file(tensors, TENSORS_FILE)
    TENSORS_FILE.chmod(0o644)
    listing = ",\n".join(lines)
    CASES_FILE.write_text(
        f'{{"seed": {SEED}, "length": {LENGTH}, "cases": [\n{listing}\n]}}\n', encoding="utf-8"
    )
    written = [path for path in HERE.rglob("*") if path.suffix in (".json", ".safetensors")]
    size = sum(path.stat().st_size for path in written)
    if size > BUDGET:
        raise SystemExit(f"the references take {size} bytes, more than {BUDGET}")
    print(f"{len(lines)} cases, {size} bytes")


def check() -> None:
    """Recompute every committed case in float32 from what the files hold, and compare."""
    given = load_file(TENSORS_FILE)
    worst = 0.0
    for name in folders():
        module = reference(name, given, torch.float32)
        worst = max(worst, compare(name, engine(module, given), given))
        if name not in CONFIGS:
            worst = max(worst, check_package(name, module, given))
    print(f"all cases agree, largest difference {worst:.1e} (float32 against the stored values)")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="write or check the MTP references")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="compare instead of writing")
    choice.add_argument(
        "--transformers", action="store_true", help="compare with the layers of transformers"
    )
    arguments = parser.parse_args()
    if arguments.transformers:
        from mtp_transformers import compare_all

        compare_all(folders(), load_file(TENSORS_FILE))
    elif arguments.check:
        check()
    else:
        write()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
