"""Known pairs: which head to try for which target.

One head is in this package. The others, and what they need, are from their cards and from engines'
test suites; nobody could run them here. A target is known by the name of its repository, whatever
organisation and quantization it comes in, or by the sizes in its config where only one known target
has them.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_drift.convert.mtp.layouts import LAYOUTS
from mlx_drift.demo import smollm2
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.files.json_file import read_json

HEADLESS = (
    "Without a head, mlx-drift generate takes --draft-model, a small model of its family, "
    "--drafter prompt-lookup or --no-draft"
)
"""What to do where there is no head, in any command: few have all of generate's options."""

QWEN3 = "enable_thinking=false: the head was trained on answers without thinking"


@dataclass(frozen=True)
class Pair:
    """A target and the head recommended for it.

    Attributes:
        target: The original repository of the target.
        drafter: The head's repository.
        sizes: The target's `model_type`, hidden size, number of layers and vocabulary; None for a
            target that is known by its name alone.
        needs: What the model needs for the head to work well.
        others: Heads of other kinds for the same target: the kind, and the repository.
    """

    target: str
    drafter: str
    sizes: tuple[str, int, int, int] | None = None
    needs: str = ""
    others: tuple[tuple[str, str], ...] = ()


PAIRS = (
    Pair("Qwen/Qwen3-1.7B", "AngelSlim/Qwen3-1.7B_eagle3", ("qwen3", 2048, 28, 151936), QWEN3),
    Pair(
        "Qwen/Qwen3-4B",
        "AngelSlim/Qwen3-4B_eagle3",
        ("qwen3", 2560, 36, 151936),
        QWEN3,
        others=(
            ("DFlash", "z-lab/Qwen3-4B-DFlash-b16"),
            ("DSpark", "deepseek-ai/dspark_qwen3_4b_block7"),
        ),
    ),
    Pair(
        "Qwen/Qwen3-8B",
        "RedHatAI/Qwen3-8B-speculator.eagle3",
        ("qwen3", 4096, 36, 151936),
        QWEN3,
        others=(
            ("DFlash", "z-lab/Qwen3-8B-DFlash-b16"),
            ("DSpark", "deepseek-ai/dspark_qwen3_8b_block7"),
            ("DSpark", "mgoin/Qwen3-8B-speculator.dspark"),
            ("P-EAGLE", "RedHatAI/Qwen3-8B-speculator.peagle"),
        ),
    ),
    Pair(
        "Qwen/Qwen3-14B",
        "RedHatAI/Qwen3-14B-speculator.eagle3",
        ("qwen3", 5120, 40, 151936),
        QWEN3,
        others=(("DSpark", "deepseek-ai/dspark_qwen3_14b_block7"),),
    ),
    Pair(
        "Qwen/Qwen3-32B", "RedHatAI/Qwen3-32B-speculator.eagle3", ("qwen3", 5120, 64, 151936), QWEN3
    ),
    Pair(
        "Qwen/Qwen3-30B-A3B", "AngelSlim/Qwen3-a3B_eagle3", ("qwen3_moe", 2048, 48, 151936), QWEN3
    ),
    Pair(
        "Qwen/Qwen3-30B-A3B-Instruct-2507",
        "RedHatAI/Qwen3-30B-A3B-Instruct-2507-speculator.eagle3",
        ("qwen3_moe", 2048, 48, 151936),
    ),
    Pair(
        "Qwen/Qwen3-Coder-30B-A3B-Instruct",
        "JinnP/SGLang-EAGLE3-Qwen3-Coder-30B-A3B-Instruct",
        ("qwen3_moe", 2048, 48, 151936),
        others=(("DFlash", "z-lab/Qwen3-Coder-30B-A3B-DFlash"),),
    ),
    Pair(
        "meta-llama/Llama-3.1-8B-Instruct",
        "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B",
        ("llama", 4096, 32, 128256),
        others=(("DFlash", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),),
    ),
    Pair(
        "meta-llama/Llama-3.3-70B-Instruct",
        "yuhuili/EAGLE3-LLaMA3.3-Instruct-70B",
        ("llama", 8192, 80, 128256),
    ),
    Pair(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "yuhuili/EAGLE3-DeepSeek-R1-Distill-LLaMA-8B",
        ("llama", 4096, 32, 128256),
    ),
    Pair(
        "openai/gpt-oss-20b",
        "RedHatAI/gpt-oss-20b-speculator.eagle3",
        ("gpt_oss", 2880, 24, 201088),
        others=(
            ("DFlash", "z-lab/gpt-oss-20b-DFlash"),
            ("P-EAGLE", "amazon/GPT-OSS-20B-P-EAGLE"),
        ),
    ),
    Pair(
        "openai/gpt-oss-120b",
        "RedHatAI/gpt-oss-120b-speculator.eagle3",
        ("gpt_oss", 2880, 36, 201088),
        others=(
            ("DFlash", "z-lab/gpt-oss-120b-DFlash"),
            ("P-EAGLE", "amazon/GPT-OSS-120B-P-EAGLE"),
        ),
    ),
    Pair(
        "google/gemma-4-31B-it",
        "RedHatAI/gemma-4-31B-it-speculator.eagle3",
        ("gemma4", 5376, 60, 262144),
        others=(("DFlash", "z-lab/gemma-4-31B-it-DFlash"),),
    ),
    Pair(
        "Qwen/Qwen3.6-27B",
        "Dogacel/specdrift-qwen3.6-27b-eagle3",
        ("qwen3_5", 5120, 64, 248320),
        others=(
            ("DFlash", "z-lab/Qwen3.6-27B-DFlash"),
            ("DSpark", "satgeze/Qwen3.6-27B-DSpark"),
        ),
    ),
    Pair(
        "Qwen/Qwen3.6-35B-A3B",
        "Dogacel/specdrift-qwen3.6-35b-a3b-eagle3",
        ("qwen3_5_moe", 2048, 40, 248320),
        others=(
            ("DFlash", "z-lab/Qwen3.6-35B-A3B-DFlash"),
            ("DSpark", "RedHatAI/Qwen3.6-35B-A3B-speculator.dspark"),
        ),
    ),
    Pair("Qwen/Qwen3.5-4B", "z-lab/Qwen3.5-4B-DFlash"),
    Pair("Qwen/Qwen3.5-9B", "z-lab/Qwen3.5-9B-DFlash"),
    Pair("Qwen/Qwen3.5-27B", "z-lab/Qwen3.5-27B-DFlash"),
    Pair("Qwen/Qwen3.5-35B-A3B", "z-lab/Qwen3.5-35B-A3B-DFlash"),
    Pair("Qwen/Qwen3.5-122B-A10B", "z-lab/Qwen3.5-122B-A10B-DFlash"),
    Pair(
        "Qwen/Qwen3.8-27B",
        "RedHatAI/Qwen3.8-27B-speculator.dspark",
        others=(
            ("DSpark", "RadixArk/Qwen3.8-27B-DSpark"),
            ("EAGLE-4", "EAGLE-Corp/Qwen3.8-27B-EAGLE4"),
        ),
    ),
    Pair("openbmb/MiniCPM5-2B", "openbmb/MiniCPM5-2B-DSpark"),
    Pair(
        "lmsys/vicuna-7b-v1.3",
        "ankner/hydra-vicuna-7b-v1.3",
        others=(("Medusa", "FasterDecoding/medusa-vicuna-7b-v1.3"),),
    ),
    Pair(
        "lmsys/vicuna-13b-v1.3",
        "ankner/hydra-vicuna-13b-v1.3",
        others=(("Medusa", "FasterDecoding/medusa-vicuna-13b-v1.3"),),
    ),
    Pair(
        "lmsys/vicuna-33b-v1.3",
        "ankner/hydra-vicuna-33b-v1.3",
        others=(("Medusa", "FasterDecoding/medusa-vicuna-33b-v1.3"),),
    ),
    Pair(
        "mistralai/Mistral-7B-Instruct-v0.2",
        "text-generation-inference/Mistral-7B-Instruct-v0.2-medusa",
    ),
)

# What mlx-community and others add to the name of the model they converted. Nothing that could be
# a part of a name: a wrongly stripped fine-tune would silently get the original's head.
_SUFFIX = re.compile(
    r"[-_](mlx|[2-8]-?bit|(bf|fp|f)16|fp8|mxfp[48]|nvfp4|int[48]|q[2-8]|gs?(32|64|128)"
    r"|awq|gptq|dwq(-\d{4,8})?)$"
)


def known_drafter(name: str, folder: Path) -> tuple[str, str]:
    """Finds the drafter to try for a target: the one in this package, or a published one.

    Args:
        name: The target's repository or folder, as the user gave it.
        folder: Where its `config.json` and, if it is here, its tokenizer are.

    Returns:
        The drafter's folder or repository, and what to tell of it in a line.

    Raises:
        DriftError: If none is known, or more than one target might be it.

    Warns:
        DriftWarning: If the target is a fine-tune of the one that the head was trained for.
    """
    if smollm2.is_like(folder):
        is_named = _base_name(name) == _base_name(smollm2.REPOSITORY)
        if not is_named and not smollm2.is_original(folder):
            warnings.warn(
                f"{name} has the sizes and the tokenizer of {smollm2.REPOSITORY}, but not its "
                "name or weights: the head was trained for the original, and fewer of its drafts "
                "may be accepted",
                DriftWarning,
                stacklevel=2,
            )
        return str(smollm2.HEAD), f"drafter: the head in this package for {smollm2.REPOSITORY}."
    pair, why = find_pair(name, read_json(folder / "config.json"))
    needs = f" It needs {pair.needs}." if pair.needs else ""
    return pair.drafter, f"drafter: {pair.drafter}, by {why}.{needs}"


def find_pair(name: str, config: dict[str, Any]) -> tuple[Pair, str]:
    """Finds the head to try for a target.

    Args:
        name: The target's repository or folder, as the user gave it.
        config: Its `config.json`.

    Returns:
        The pair, and by what the target was known.

    Raises:
        DriftError: If the target is not in the table, or more than one might be it.
    """
    base = _base_name(name)
    alike = [pair for pair in PAIRS if _base_name(pair.target) == base]
    why = f"the name {name}"
    if not alike:
        inner = config.get("text_config")
        text = inner if isinstance(inner, dict) else config
        keys = "hidden_size num_hidden_layers vocab_size"
        sizes = tuple(text.get(key) for key in keys.split())
        types = config.get("model_type"), text.get("model_type")
        alike = [p for p in PAIRS if p.sizes in [(model_type, *sizes) for model_type in types]]
        why = f"its sizes, those of {alike[0].target}" if alike else ""
    if len(alike) == 1:
        return alike[0], why
    targets = " or ".join(pair.target for pair in alike)
    own = (
        "; models of its family have an MTP head of their own, which `mlx-drift convert ORIGINAL "
        "--mtp --mlx-path OUT` takes from the original repository"
    )
    raise DriftError(
        f"{name}: "
        + (f"by its sizes this could be {targets}" if alike else "no drafter is known for it")
        + own * (str(config.get("model_type")) in LAYOUTS)
        + ". `mlx-drift pairs` lists the known pairs; name a head with --drafter owner/name. "
        + HEADLESS
    )


def _base_name(name: str) -> str:
    """The name of a model without organisation and quantization, in lower case."""
    base = name.rstrip("/").rpartition("/")[2].lower()
    while (shorter := _SUFFIX.sub("", base)) != base:
        base = shorter
    return base.removeprefix("meta-")
