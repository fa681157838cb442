"""What is no drafter this version runs, by name, each with what to use instead.

The signatures are those by which engines tell these formats apart (vllm-project/vllm, sgl-project/
sglang, FasterDecoding/Medusa, zankner/Hydra, z-lab/dflash).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mlx_drift.convert.dialects import Config, Names, architecture

EAGLE3 = "Take an EAGLE-3 head for the same target (`mlx-drift pairs` lists some)"


DFLASH = "Take a DFlash, DSpark or EAGLE-3 head for the same target"


@dataclass(frozen=True)
class Refused:
    """A format that is recognised and refused."""

    name: str
    recognises: Callable[[Config, Names], bool]
    instead: str


def _model_type(config: Config) -> str:
    return str(config.get("speculators_model_type") or config.get("model_type") or "")


def _any(names: Names, *parts: str) -> bool:
    return any(part in name for name in names for part in parts)


def _domino(config: Config, names: Names) -> bool:
    return "Domino" in architecture(config) or _any(names, "prefix_gru.")


def _dflash2(config: Config, names: Names) -> bool:
    return (
        "DFlash2" in architecture(config)
        or _model_type(config) == "dflash2"
        or _any(names, "candidate_selector.", "attention_conv.", "mlp_conv.")
    )


def _dfly(config: Config, names: Names) -> bool:
    return _any(names, "layer_fusion_weights", "k_proj_target", "context_proj.")


def _xpress(config: Config, names: Names) -> bool:
    return _model_type(config) == "xpress"


def _parallel(config: Config, names: Names) -> bool:
    return config.get("parallel_drafting") is True and not _any(names, "mask_hidden")


def _mla(config: Config, names: Names) -> bool:
    kinds = ("Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekMLAModel")
    return architecture(config) in kinds or _any(names, "q_a_proj", "kv_a_proj_with_mqa")


def is_mtp(config: Config, names: Names) -> bool:
    """Tells whether a checkpoint holds a multi-token-prediction head, alone or beside a model."""
    return (
        _model_type(config) == "mtp"
        or str(config.get("model_type", "")).endswith("_mtp")
        or _any(names, "mtp.", "mtp_layers.", ".eh_proj.")
    )


UNQUANTIZED = "Convert the bfloat16 head it was made from, with -q if you want it small"

FP8 = "FP8, one scale a tensor or row"
QUANTIZATIONS = (
    ("GPTQ or AWQ", (".qweight", ".qzeros")),
    ("NVFP4", (".weight_scale_2", ".weight_global_scale")),
    ("compressed-tensors", (".weight_packed", ".weight_shape", ".weight_zero_point")),
    (FP8, (".weight_scale", ".input_scale")),
)
"""What tools quantize to that MLX does not read, by the ends of the names that they add."""


def quantized_to(names: Names) -> str | None:
    """Tells what a head is quantized to, if it is to something that MLX does not read."""
    for kind, ends in QUANTIZATIONS:
        if any(name.endswith(ends) for name in names):
            return kind
    return None


def _whole_model(config: Config, names: Names) -> bool:
    fused = any(name.endswith("fc.weight") or "hidden_norm" in name for name in names)
    fused = fused or _any(names, "medusa_head")  # beside the model they were trained with
    return not fused and _any(names, "layers.1.") and _any(names, "embed_tokens.weight")


def _quantized_to(kind: str, config: Config, names: Names) -> bool:
    return quantized_to(names) == kind


REFUSED = (
    Refused(
        "a whole language model and no drafter",
        _whole_model,
        "Give it as the target (--target, --model), and a drafter trained for it as the source",
    ),
    Refused("a DFlash2 drafter", _dflash2, f"z-lab's dflash runs it. {DFLASH}"),
    Refused("a Domino drafter", _domino, f"SpecForge and SGLang run it. {DFLASH}"),
    Refused("a DFly or DFlare drafter", _dfly, f"AngelSlim runs it. {DFLASH}"),
    Refused("an XPress drafter", _xpress, f"vLLM runs it. {DFLASH}"),
    Refused(
        "a P-EAGLE drafter without its mask_hidden",
        _parallel,
        "Save it again with what stands in the place of taps in its rows after the first",
    ),
    Refused(
        "an EAGLE-3 drafter with latent attention (MLA)",
        _mla,
        f"vLLM and SGLang run it. {EAGLE3} with plain attention",
    ),
    Refused(
        "a Hydra head of the cross-attn kind",
        lambda config, names: config.get("hydra_head_arch") == "cross-attn",
        f"Its mlp, prefix-mlp and eagle-attn kinds are run. {EAGLE3}",
    ),
    Refused(
        "an EagleMedusa drafter (parallel_draft_heads)",
        lambda config, names: _any(names, "parallel_draft_heads."),
        f"TensorRT-LLM runs it. {EAGLE3}",
    ),
    Refused(
        "a Gemma-4 assistant",
        lambda config, names: (
            _model_type(config) in ("gemma4_assistant", "gemma4_unified_assistant")
        ),
        f"It shares the target's cache: mlx-vlm runs it. {EAGLE3}",
    ),
    *(
        Refused(
            f"a quantized head ({kind})",
            partial(_quantized_to, kind),
            UNQUANTIZED,
        )
        for kind, _ in QUANTIZATIONS
    ),
    Refused(
        "a quantized head (by mlx, or FP8 by blocks)",
        lambda config, names: _any(names, ".scales", ".weight_scale"),
        UNQUANTIZED,
    ),
)
