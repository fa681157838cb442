"""Writes a converted drafter: beside its place first, then renamed into it, all or nothing."""

import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx

from mlx_drift.drafters.config import Eagle3Config
from mlx_drift.drafters.load import WEIGHTS
from mlx_drift.errors import DriftError

CARD = """---
library_name: mlx-drift
tags: [mlx, mlx-drift, speculative-decoding, eagle3]
---

# {name}

An EAGLE-3 drafter{normalized} for a target of hidden size {hidden} and vocabulary {vocab},
converted from `{source}` (sha256 `{sha256}`) with `mlx-drift convert`.

```bash
mlx-drift generate --model TARGET --drafter {name} -p "…"
```

| convention | value | from |
|---|---|---|
{conventions}
"""


def check_free(path: Path) -> None:
    """Checks that nothing stands where a folder is to be written.

    Raises:
        DriftError: If something does.
    """
    if path.exists() or path.is_symlink():
        raise DriftError(f"{path} exists already; choose another --mlx-path, or remove it first")


def write_drafter(path: Path, config: Eagle3Config, tensors: dict[str, mx.array]) -> None:
    """Writes `model.safetensors`, `config.json` and `README.md`; the same input, the same bytes.

    Raises:
        DriftError: If the folder exists or cannot be written.
    """
    check_free(path)
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise DriftError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        in_order = {name: tensors[name] for name in sorted(tensors)}
        mx.save_safetensors(str(partial / WEIGHTS), in_order, {"format": "mlx"})
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(_card(path.name, config), encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp makes private folders
        partial.rename(path)
    except (OSError, RuntimeError) as error:
        raise DriftError(f"{path}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if not path.exists():
            for parent in made:
                parent.rmdir()


def _card(name: str, config: Eagle3Config) -> str:
    values = config.to_dict()
    normalized = " (EAGLE-3.1: normalized)" if config.fc_norm and config.feedback == "post" else ""
    return CARD.format(
        name=name,
        normalized=normalized,
        hidden=config.target.hidden_size,
        vocab=config.target.vocab_size,
        source=config.source.get("repo", config.source.get("path")),
        sha256=config.source["sha256"],
        conventions="\n".join(
            f"| `{key}` | `{values[key]}` | {origin} |"
            for key, origin in sorted(config.provenance.items())
        ),
    )
