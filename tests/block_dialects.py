"""Heads that draft a block in every spelling there is, for the targets of `tiny`."""

from pathlib import Path
from typing import Any

from dialects import (
    DRAFT_VOCAB,
    HEAD_DIM,
    Head,
    Variant,
    head,
    layer,
    random,
    renamed,
    sizes,
    variant,
    with_t2d,
    write,
)
from tiny import HIDDEN, VOCAB

BLOCK, RANK, MASK = 4, 32, 9
TAPS = (3, 6, 10)
CANONICAL = (("context_norm.", "hidden_norm."),)
MODULES = (
    *CANONICAL,
    ("markov.w", "markov_head.markov_w"),
    ("markov.gate.", "markov_head.gate_proj."),
    ("markov.joint.", "markov_head.joint_proj."),
    ("confidence.", "confidence_head.proj."),
)
FLAT = (
    *CANONICAL,
    ("markov.w", "markov_w"),
    ("markov.gate.", "gate_proj."),
    ("markov.joint.", "joint_proj."),
    ("confidence.", "confidence_proj."),
)


def p_eagle(**values: Any) -> Head:
    """A P-EAGLE head: an EAGLE-3 one with what stands in the taps' place."""
    made = head(layers=2, **values)
    tensors = made.tensors | {"mask_hidden": random("mask", 1, 1, len(made.taps) * HIDDEN)}
    return Head(tensors, made.taps, made.values)


def block(markov: str | None = None, *, reduced: bool = False, own: bool = False) -> Head:
    """A DFlash head, or a DSpark one with a bias of some kind."""
    tensors = layer(0, HIDDEN) | layer(1, HIDDEN)
    for i, name in ((i, name) for i in range(2) for name in ("q_norm", "k_norm")):
        tensors[f"layers.{i}.self_attn.{name}.weight"] = random(f"{i}.{name}", HEAD_DIM)
    tensors |= {
        "fc.weight": random("fc", HIDDEN, len(TAPS) * HIDDEN),
        "context_norm.weight": random("context", HIDDEN),
        "norm.weight": random("norm", HIDDEN),
    }
    rows = DRAFT_VOCAB if reduced else VOCAB
    if reduced or own:
        tensors["lm_head.weight"] = random("lm_head", rows, HIDDEN)
    if own:
        tensors["embed_tokens.weight"] = random("embed", VOCAB, HIDDEN)
    if reduced:
        tensors["d2t"] = head().tensors["d2t"]
    if markov is not None:
        shapes: dict[str, tuple[int, ...]] = {"w1": (VOCAB, RANK), "w2": (rows, RANK)}
        shapes |= {"gate": (RANK, HIDDEN + RANK)} if markov == "gated" else {}
        shapes |= {"joint": (3 * RANK, HIDDEN + 2 * RANK)} if markov == "rnn" else {}
        tensors |= {f"markov.{n}.weight": random(n, *shape) for n, shape in shapes.items()}
        for name in ("gate", "joint"):
            if name in shapes:
                tensors[f"markov.{name}.bias"] = random(f"{name}.bias", shapes[name][0])
        tensors["confidence.weight"] = random("confidence", 1, HIDDEN + RANK)
        tensors["confidence.bias"] = random("confidence.bias", 1)
    return Head(tensors, TAPS, {"markov": markov})


def _about(drafts: int) -> dict[str, Any]:
    return {
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafts}],
        "verifier": {"name_or_path": "owner/target"},
    }


def speculators(made: Head, folder: Path, kind: str, drafts: int, **more: Any) -> None:
    """As speculators 0.9 writes it: the layer's config nested, ids as inputs."""
    ids = "eagle_aux_hidden_state_layer_ids" if kind == "peagle" else "aux_hidden_state_layer_ids"
    theta = {"rope_theta": 10000.0, "rope_type": "default"}
    layers = sizes(made, rope_theta=None, model_type="qwen3", rope_parameters=theta)
    config = {
        "speculators_model_type": kind,
        "speculators_config": _about(drafts),
        "transformer_layer_config": layers,
        "draft_vocab_size": DRAFT_VOCAB if "d2t" in made.tensors else VOCAB,
        ids: list(made.taps),
        "mask_token_id": MASK,
    } | more
    if kind != "peagle":
        config["block_size"] = BLOCK
    write(folder, config, with_t2d(renamed(made.tensors, *(MODULES if kind != "peagle" else ()))))


def z_lab(made: Head, folder: Path, flat: bool = False, form: str = "safetensors", **more: Any):
    """z-lab's layout: ids as outputs, in `dflash_config` or, flat, beside the layers' own."""
    own = {"mask_token_id": MASK, "target_layer_ids": made.outputs}
    config = sizes(made, model_type="qwen3") | {"block_size": BLOCK}
    nested = more.pop("nested", {})
    config |= own | nested if flat else {"dflash_config": own | nested}
    names = FLAT if flat and not more.pop("modules", False) else MODULES
    write(folder, config | more, renamed(made.tensors, *names), form)


def flat_eagle(made: Head, folder: Path, architecture: str, **more: Any) -> None:
    """A P-EAGLE head in SpecForge's layout of EAGLE-3, or vLLM's."""
    config = sizes(made) | {
        "architectures": [architecture],
        "draft_vocab_size": DRAFT_VOCAB,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": made.outputs},
    }
    write(folder, config | more, with_t2d(made.tensors))


BLOCK_VARIANTS: dict[str, Variant] = {
    "p-eagle speculators": variant(
        "P-EAGLE of speculators", p_eagle(), speculators, kind="peagle", drafts=5
    ),
    "p-eagle specforge": variant(
        "P-EAGLE of SpecForge",
        p_eagle(),
        flat_eagle,
        architecture="PEagleDraftModel",
        mask_token_id=MASK,
    ),
    "p-eagle vllm": variant(
        "P-EAGLE of vLLM",
        p_eagle(),
        flat_eagle,
        architecture="LlamaForCausalLMEagle3",
        parallel_drafting=True,
        ptd_token_id=MASK,
    ),
    "dflash speculators": variant(
        "DFlash of speculators", block(reduced=True), speculators, kind="dflash", drafts=BLOCK - 1
    ),
    "dflash z-lab": variant("DFlash", block(), z_lab, architectures=["DFlashDraftModel"]),
    "dflash z-lab sliding": variant(
        "DFlash",
        block(),
        z_lab,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=6,
        num_target_layers=12,
    ),
    "dflash sharded": variant("DFlash", block(), z_lab, form="sharded"),
    "dflash bin": variant("DFlash", block(), z_lab, form="bin"),
    "dflash modelopt window": variant(
        "DFlash", block(), z_lab, nested={"use_swa": True, "swa_window_size": 6}
    ),
    "dspark speculators": variant(
        "DSpark of speculators",
        block("gated", reduced=True),
        speculators,
        kind="dspark",
        drafts=BLOCK,
        sample_from_anchor=True,
    ),
    "dspark deepspec": variant(
        "DSpark", block("vanilla", own=True), z_lab, flat=True, modules=True, markov_rank=RANK
    ),
    "dspark modelopt": variant(
        "DSpark", block("rnn"), z_lab, flat=True, shift_label=False, use_confidence_head=True
    ),
    "dspark specforge": variant(
        "DSpark",
        block("rnn"),
        z_lab,
        nested={"projector_type": "dspark", "markov_head_type": "rnn", "shift_label": True},
    ),
}
