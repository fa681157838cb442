"""What PyTorch tools read: a resolved config in SpecForge's words, or in speculators'.

Both say most of what an EAGLE-3 drafter can be, neither all of it; speculators' has MTP heads, too.
What a format cannot say is
refused by name, since a tool that ignores a switch runs another drafter.

Tap ids are the trap (`mlx_drift.convert.conventions`): SpecForge counts outputs of layers, vLLM and
speculators inputs. So SpecForge's format leaves the default ids out, which every tool then takes
for the same three states.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_drift.convert.conventions import TAPS_KEY
from mlx_drift.convert.mtp import export as mtp
from mlx_drift.convert.rope import attention_factor
from mlx_drift.drafters.chain_config import Eagle3Config, MTPConfig
from mlx_drift.drafters.schema import DrafterConfig
from mlx_drift.errors import DriftError

Format = Literal["specforge", "speculators"]

SPECULATORS_VERSION = "0.9.0"
"""The release whose schema is written."""


@dataclass(frozen=True)
class Written:
    """One format.

    Attributes:
        title: What the user sees.
        unsaid: What a config has that the format cannot say.
        config: Writes the config, given the target's name.
        name: Returns the format's name of a tensor, given the canonical one.
    """

    title: str
    unsaid: Callable[[Any], Iterator[str]]
    config: Callable[[Any, str], dict[str, Any]]
    name: Callable[[str], str] = str


def find_format(name: str) -> Mapping[str, Written]:
    """Finds a format by its name: for each type of drafter that it has, how it is written.

    Raises:
        DriftError: If there is none.
    """
    if name not in FORMATS:
        raise DriftError(f"format is {name!r}; expected {' or '.join(FORMATS)}")
    return FORMATS[name]


def check_said(config: DrafterConfig, form: Mapping[str, Written], where: str) -> Written:
    """Checks that a format can say all of a config, and returns how it is written.

    Raises:
        DriftError: Naming the first thing that it cannot.
    """
    written = form.get(config.drafter_type)
    if written is None:
        title = next(iter(form.values())).title
        kinds = " and ".join(KINDS[kind] for kind in form)
        raise DriftError(
            f"{where}: the format of {title} is written for {kinds}, and this is a drafter of the "
            f"type {config.drafter_type!r}{_elsewhere(config)}"
        )
    for what in written.unsaid(config):
        raise DriftError(
            f"{where}: {what}, which the format of {written.title} cannot say{_elsewhere(config)}"
        )
    return written


def _elsewhere(config: DrafterConfig) -> str:
    """Names the formats that can say all of a config, as the end of a refusal."""
    able = [
        name
        for name, form in FORMATS.items()
        if (written := form.get(config.drafter_type)) and not any(written.unsaid(config))
    ]
    return f"; --format {' or '.join(able)} can" if able else ""


def _unsaid_by_any(config: Eagle3Config) -> Iterator[str]:
    if not config.fc:
        yield "it reads one state without an fc"
    if config.fc_bias:
        yield "its fc has a bias (fc_bias)"
    if not config.hidden_norm:
        yield "its first layer has no hidden_norm"
    if config.gated_attention:
        yield "its attention has a gate (gated_attention)"
    if config.fc_norm and config.norm_before_fc:
        yield "it has both fc_norm and norm_before_fc"
    if config.attention_bias != config.attention_output_bias:
        yield "its attention_bias and attention_output_bias differ"


def _unsaid_by_specforge(config: Eagle3Config) -> Iterator[str]:
    """What SpecForge's `llama3_eagle.py` has no place for."""
    yield from _unsaid_by_any(config)
    for switch in (
        *("norm_before_residual", "norm_before_fc", "qk_norm"),
        *("attention_bias", "mlp_bias"),
    ):
        if getattr(config, switch):
            yield f"{switch} is on"
    if config.num_layers != 1:
        yield f"it has {config.num_layers} layers"
    if config.partial_rotary_factor != 1:
        yield f"partial_rotary_factor is {config.partial_rotary_factor}"
    if config.taps[0] == 0:
        yield "one of its taps is the embedding, the output of no layer"
    last = config.target.num_layers
    if last is not None and config.taps[-1] > last:
        yield "one of its taps is the target's final norm, the output of no layer"


def _unsaid_by_speculators(config: Eagle3Config) -> Iterator[str]:
    yield from _unsaid_by_any(config)
    if config.qk_norm and config.mlp_bias:
        yield "it has both qk_norm and mlp_bias"
    if config.partial_rotary_factor != 1 and _rope(config)["rope_type"] in ("default", "mrope"):
        yield f"partial_rotary_factor is {config.partial_rotary_factor} in plain RoPE"
    last = config.target.num_layers
    if last is not None and config.taps[-1] > last:
        yield "one of its taps is the target's final norm, which comes after all its ids"


def _specforge(config: Eagle3Config, target: str) -> dict[str, Any]:
    rope = _rope(config)
    theta = rope.pop("rope_theta")
    ids = [tap - 1 for tap in config.taps]
    n = config.target.num_layers
    default = n is not None and list(config.taps) == [2, n // 2, n - 3]
    return (
        _layers(config)
        | _head(config)
        | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "rope_theta": theta,
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "fc_norm": config.fc_norm,
            "norm_output": config.feedback == "post",
            "num_aux_hidden_states": len(config.taps),
            "target_hidden_size": config.target.hidden_size,
        }
        | ({} if default else {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}})
    )


def _speculators(config: Eagle3Config, target: str) -> dict[str, Any]:
    wider = config.target.hidden_size != config.hidden_size
    layer = _layers(config) | {
        "model_type": "qwen3" if config.qk_norm else "llama",
        "rope_parameters": _rope(config),
    }
    return (
        _head(config)
        | _speculator("eagle3", "Eagle3DraftModel", target, layer)
        | {
            "norm_before_residual": config.norm_before_residual,
            "norm_before_fc": config.norm_before_fc,
            "fc_norm": config.fc_norm,
            "norm_output": config.feedback == "post",
            "eagle_aux_hidden_state_layer_ids": list(config.taps),
            "target_hidden_size": config.target.hidden_size if wider else None,
            "embed_requires_grad": config.own_embedding,
        }
    )


def _speculators_mtp(config: MTPConfig, target: str) -> dict[str, Any]:
    layer = mtp.layer_config(config)
    said = _speculator("mtp", "MTPDraftModel", target, layer)
    return said | {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}


def _speculator(algorithm: str, model: str, target: str, layer: dict[str, Any]) -> dict[str, Any]:
    """What every config of speculators begins with."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": 3,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": [model],
        "speculators_model_type": algorithm,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target, "architectures": []},
        },
        "transformer_layer_config": layer,
    }


def _head(config: Eagle3Config) -> dict[str, Any]:
    """What is said of the drafter as a whole; SGLang takes a missing head from the target."""
    draft = {"draft_vocab_size": config.draft_vocab_size} if config.own_head else {}
    layers = config.target.num_layers
    made_for = {} if layers is None else {"target_num_hidden_layers": layers}
    return draft | made_for | {"tie_word_embeddings": False, TAPS_KEY: list(config.taps)}


def _layers(config: Eagle3Config) -> dict[str, Any]:
    """What transformers' Llama and Qwen3 configs call the sizes of a layer, and its window."""
    sizes = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias"),
    )
    layers = range(config.num_layers)
    kinds = ["full" if config.window_of(layer) is None else "sliding" for layer in layers]
    return {key: getattr(config, key) for key in sizes} | {
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.target.vocab_size,
        "hidden_act": "silu",
        "sliding_window": config.sliding_window,
        "use_sliding_window": config.sliding_window is not None,
        "layer_types": [f"{kind}_attention" for kind in kinds],
    }


def _rope(config: Eagle3Config) -> dict[str, Any]:
    """RoPE as transformers 5 spells it.

    transformers ignores a YaRN's `mscale` that stands alone; mlx-lm does not. What it comes to is
    `attention_factor` (`modeling_rope_utils._compute_yarn_parameters`).
    """
    rope: dict[str, Any] = dict(config.rope_scaling or {"rope_type": "default"})
    rope["rope_theta"] = config.rope_theta
    if config.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    if rope["rope_type"] == "yarn" and "mscale" in rope and not rope.get("mscale_all_dim"):
        rope["attention_factor"] = attention_factor(rope["mscale"], rope["factor"])
    return rope


def _midlayer(canonical: str) -> str:
    """SpecForge's name of a tensor: its only layer has no number."""
    return canonical.replace("layers.0.", "midlayer.", 1)


KINDS = {"eagle3": "EAGLE-3 drafters", "mtp": "MTP heads"}

FORMATS: dict[str, dict[str, Written]] = {
    "specforge": {"eagle3": Written("SpecForge", _unsaid_by_specforge, _specforge, _midlayer)},
    "speculators": {
        "eagle3": Written("speculators", _unsaid_by_speculators, _speculators),
        "mtp": Written("speculators", mtp.unsaid, _speculators_mtp, mtp.name_of),
    },
}
