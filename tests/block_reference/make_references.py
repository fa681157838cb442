"""Write what public packages answer of heads that draft a block: checkpoints and their own logits.

    python tests/block_reference/make_references.py           # write everything here
    python tests/block_reference/make_references.py --check   # recompute, compare instead

The tests read the files alone. The environment, from the root of the repository:

    python3 -m venv /tmp/block-venv
    pip=/tmp/block-venv/bin/pip
    $pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    $pip install --no-deps speculators==0.9.0 dflash==0.1.0
    $pip install transformers==5.19.0 hs-connectors==0.9.0 'datasets>=4,<=5.1.0' 'openai>=2'
    $pip install 'loguru<=0.7.3' aiohttp httpx pydantic-settings
    $pip download --no-deps --no-binary :all: specforge==0.2.0 && tar xzf specforge-0.2.0.tar.gz
    export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 PYTHONPATH=specforge-0.2.0
    /tmp/block-venv/bin/python tests/block_reference/make_references.py

What is the packages' own: the checkpoints, written by each model's `save_pretrained`, and the
logits. Of speculators they come from the training forward, whose anchors are set to every position
instead of drawn; of dflash from the model's forward over a cache that is fed in two goes, as in
decoding; of specforge from its forward, and its `markov_head.sample_block_tokens`. A speculators
DSpark head is asked for its biases slot by slot, each with the tokens that the slots before chose.

references.json
    ``{"versions", "length", "cases": [{"name", "kind", "taps", "slots"}, ...]}``: `taps` in
    mlx-drift's numbering, `slots` how a slot is to be read.
NAME/config.json, NAME/model.safetensors
    The head, in bfloat16.
references.safetensors
    ``tokens`` [L], ``embed`` [V, H] and ``head`` [V, H] of the target, ``NAME/taps`` [L, A·T],
    ``NAME/anchors`` [N], ``NAME/logits`` [N, K, D] and ``NAME/drafts`` [N, K], target ids: of each
    anchor (the position of the last committed token) the logits of its K drafts. Taps of
    positions before the anchor alone are seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

HERE = Path(__file__).resolve().parent
SEED, LENGTH, BLOCK, DEPTHS = 29, 20, 4, 5
VOCAB, DRAFT_VOCAB, HIDDEN, MASK = 48, 24, 32, 47
ANCHORS = [3, 9, 15]
TOLERANCE, BUDGET = 2e-5, 1_200_000


@dataclass(frozen=True)
class Spec:
    """What sets one case apart.

    Attributes:
        package: Who wrote it.
        cls: speculators' algorithm, or specforge's module.
        flags: Of the head's config.
        layer: Of its layers' config.
        reduced: Whether its vocabulary is smaller than the target's.
    """

    name: str
    package: str
    cls: str
    flags: dict[str, Any] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    reduced: bool = False

    @property
    def kind(self) -> str:
        return {"peagle": "p-eagle"}.get(self.cls, self.cls)

    @property
    def ids(self) -> list[int]:
        return [2, 4, 6] if self.cls == "peagle" else [1, 3]

    @property
    def taps(self) -> list[int]:
        return self.ids if self.package == "speculators" else [i + 1 for i in self.ids]

    @property
    def shifted(self) -> bool:
        shifts = self.cls == "peagle" or self.flags.get("sample_from_anchor", False)
        return bool(shifts)


def sliding(window: int, *kinds: str) -> dict[str, Any]:
    return {
        "layer_types": [f"{kind}_attention" for kind in kinds],
        "sliding_window": window,
        "use_sliding_window": True,
        "max_window_layers": 0,
    }


MIXED = sliding(5, "sliding", "full")
SPECS = [
    Spec("peagle", "speculators", "peagle"),
    Spec("peagle_reduced", "speculators", "peagle", {"norm_before_residual": True}, {}, True),
    Spec(
        "peagle_normed",
        "speculators",
        "peagle",
        {"fc_norm": True, "norm_output": True},
    ),
    Spec("dflash", "speculators", "dflash"),
    Spec("dflash_reduced", "speculators", "dflash", {}, {}, True),
    Spec("dflash_sliding", "speculators", "dflash", {}, MIXED),
    Spec(
        "dflash_sliding_full", "speculators", "dflash", {"sliding_window_non_causal": True}, MIXED
    ),
    *(
        Spec(
            f"dspark_{markov}_{'shifted' if shifted else 'unshifted'}",
            "speculators",
            "dspark",
            {"markov_head_type": markov, "sample_from_anchor": shifted},
            {},
            markov == "gated",
        )
        for markov in ("vanilla", "gated", "rnn")
        for shifted in (True, False)
    ),
    Spec("zlab", "dflash", "dflash"),
    Spec("zlab_sliding", "dflash", "dflash", {}, MIXED),
    Spec("zlab_sliding_full", "dflash", "dflash", {"is_causal": False}, MIXED),
    Spec("specforge", "specforge", "dflash"),
    Spec("specforge_rnn", "specforge", "dspark", {"markov_head_type": "rnn"}),
]


def draw(name: str, *shape: int) -> torch.Tensor:
    """A drawn weight of few bits; it depends on its name and shape only."""
    seed = SEED + sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scale, mean = (0.3, 0.0) if len(shape) > 1 else (0.2, 1.0 if "norm" in name else 0.0)
    return (noise * scale + mean).bfloat16().float()


def layer_config(spec: Spec) -> Qwen3Config:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **spec.layer,
    )
    config._attn_implementation = "eager"
    return config


def build(spec: Spec) -> torch.nn.Module:
    """The package's own model."""
    config = layer_config(spec)
    if spec.package == "speculators":
        return build_speculators(spec, config)
    config.block_size, config.num_target_layers = BLOCK, 8
    config.dflash_config = {"mask_token_id": MASK, "target_layer_ids": spec.ids}
    config.architectures = ["DFlashDraftModel"]
    if spec.package == "dflash":
        import dflash.model

        for key, value in spec.flags.items():
            setattr(config, key, value)
        return dflash.model.DFlashDraftModel(config)
    import importlib

    module = importlib.import_module(f"specforge.modeling.draft.{spec.cls}")
    if spec.cls == "dspark":
        config.dflash_config |= {"projector_type": "dspark", "markov_rank": 8} | spec.flags
        config.dflash_config |= {
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        }
        config.architectures = ["DSparkDraftModel"]
        return module.DSparkDraftModel(config)
    config._attn_implementation = "sdpa"
    return module.DFlashDraftModel(config)


def build_speculators(spec: Spec, layer: Qwen3Config) -> torch.nn.Module:
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashSpeculatorConfig
    from speculators.models.dflash.core import DFlashDraftModel
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.models.peagle.config import PEagleSpeculatorConfig
    from speculators.models.peagle.core import PEagleDraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    drafts = {"peagle": DEPTHS}.get(spec.cls, BLOCK if spec.shifted else BLOCK - 1)
    about = SpeculatorsConfig(
        algorithm=spec.cls,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=drafts)],
        default_proposal_method="greedy",
        verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
    )
    common: dict[str, Any] = {
        "transformer_layer_config": layer,
        "speculators_config": about,
        "draft_vocab_size": DRAFT_VOCAB if spec.reduced else VOCAB,
        "mask_token_id": MASK,
    } | spec.flags
    if spec.cls == "peagle":
        common["eagle_aux_hidden_state_layer_ids"] = spec.ids
        return PEagleDraftModel(config=PEagleSpeculatorConfig(**common))
    common |= {"block_size": BLOCK, "aux_hidden_state_layer_ids": spec.ids}
    if spec.cls == "dspark":
        return DSparkDraftModel(config=DSparkSpeculatorConfig(markov_rank=8, **common))
    return DFlashDraftModel(config=DFlashSpeculatorConfig(**common))


def fill(model: torch.nn.Module, spec: Spec) -> None:
    """Give every parameter its drawn value, what the target lends included."""
    ids = torch.sort(
        torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[:DRAFT_VOCAB]
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            shared = {"embed_tokens.weight": "embed", "lm_head.weight": "head"}
            own = spec.cls == "peagle" or (spec.reduced and name == "lm_head.weight")
            known = shared.get(name) if not own else None
            tensor.copy_(draw(known or f"{spec.name}/{name}", *tensor.shape))
        for name, tensor in model.named_buffers():
            if name == "d2t" and spec.reduced:
                tensor.copy_(ids.values - torch.arange(DRAFT_VOCAB))
            if name == "t2d" and spec.reduced:
                tensor.zero_()[ids.values] = True


def inputs(spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, VOCAB - 1, (LENGTH,), generator=generator)
    return tokens, 2 * draw("taps", LENGTH, len(spec.ids) * HIDDEN)


Answer = tuple[torch.Tensor, torch.Tensor]
"""Logits [N, K, D] and drafts [N, K]."""


@torch.no_grad()
def answer(spec: Spec, model: torch.nn.Module) -> Answer:
    """What a head answers at every anchor."""
    tokens, taps = inputs(spec)
    if spec.cls == "peagle":
        return answer_peagle(spec, model, tokens, taps)
    if spec.package == "speculators":
        hidden, logits = speculators_block(model, tokens, taps)
    elif spec.package == "dflash":
        hidden, logits = dflash_block(model, tokens, taps)
    else:
        hidden, logits = specforge_block(model, tokens, taps)
    first = int(not spec.shifted)
    hidden, logits = hidden[:, first:], logits[:, first:]
    roots = tokens[ANCHORS]
    if spec.cls == "dflash":
        return logits, to_target(model, logits.argmax(-1))
    if spec.package == "specforge":
        drafts, corrected = model.markov_head.sample_block_tokens(
            logits, first_prev_token_ids=roots, hidden_states=hidden
        )
        return corrected, drafts
    before = roots[:, None].repeat(1, logits.shape[1])
    for slot in range(logits.shape[1]):
        bias = model.markov_head.block_bias(prev_token_ids=before, hidden_states=hidden)
        drafts = to_target(model, (logits + bias).argmax(-1))
        if slot + 1 < logits.shape[1]:
            before[:, slot + 1] = drafts[:, slot]
    return logits + bias, drafts


def to_target(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    d2t = getattr(model, "d2t", None)
    return ids if d2t is None else ids + d2t[ids]


def speculators_block(
    model: torch.nn.Module, tokens: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from speculators.models.dflash import core

    core.select_anchors = lambda mask, count, block: (
        torch.tensor(ANCHORS),
        torch.ones(len(ANCHORS), dtype=torch.bool),
    )
    hidden, logits, *_ = model._backbone_forward(
        taps[None],
        tokens[None],
        torch.ones(1, LENGTH),
        torch.zeros(1, LENGTH, HIDDEN),
        torch.zeros(1, LENGTH, dtype=torch.long),
        max_anchors=len(ANCHORS),
    )
    return hidden.view(len(ANCHORS), BLOCK, -1), logits.view(len(ANCHORS), BLOCK, -1)


def block_of(token: torch.Tensor) -> torch.Tensor:
    block = torch.full((1, BLOCK), MASK)
    block[0, 0] = token
    return torch.nn.functional.embedding(block, draw("embed", VOCAB, HIDDEN))


def dflash_block(
    model: torch.nn.Module, tokens: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    import dflash.model as package

    found = []
    for anchor in ANCHORS:
        cache = package._make_cache(model.config)
        for start, stop in ((0, anchor - 1), (anchor - 1, anchor)):
            hidden = model(
                target_hidden=taps[None, start:stop],
                noise_embedding=block_of(tokens[stop]),
                position_ids=torch.arange(start, stop + BLOCK)[None],
                past_key_values=cache,
                use_cache=True,
            )
            package._crop_to(cache, stop)
        found.append(hidden[0, -BLOCK:])
    hidden = torch.stack(found)
    return hidden, hidden @ draw("head", VOCAB, HIDDEN).T


def specforge_block(
    model: torch.nn.Module, tokens: torch.Tensor, taps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    found = [
        model(
            position_ids=torch.arange(anchor + BLOCK)[None],
            noise_embedding=block_of(tokens[anchor]),
            target_hidden=taps[None, :anchor],
        )[0, -BLOCK:]
        for anchor in ANCHORS
    ]
    hidden = torch.stack(found)
    return hidden, hidden @ draw("head", VOCAB, HIDDEN).T


def answer_peagle(
    spec: Spec, model: torch.nn.Module, tokens: torch.Tensor, taps: torch.Tensor
) -> Answer:
    """Row i pairs token i + 1 with the taps of position i: the anchor is at i + 1."""
    from speculators.losses import resolve_loss_config
    from speculators.models.peagle import core

    rows = LENGTH - 1
    depths = [(i, depth) for depth in range(DEPTHS) for i in range(rows - depth)]
    core.generate_cod_sample_indices = lambda **_: tuple(torch.tensor(depths).T)
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda _m, _x, out: seen.append(out[0]))
    model(
        taps[None, :rows],
        tokens[None, 1:],
        torch.zeros(1, rows, dtype=torch.long),
        loss_mask=torch.ones(1, rows),
        verifier_last_hidden_states=torch.zeros(1, rows, HIDDEN),
        num_depths=DEPTHS,
        loss_config=resolve_loss_config("kl_div", "eager"),
    )
    hook.remove()
    place = {pair: n for n, pair in enumerate(depths)}
    wanted = [[place[anchor - 1, depth] for depth in range(DEPTHS)] for anchor in ANCHORS]
    logits = seen[0][torch.tensor(wanted)]
    return logits, to_target(model, logits.argmax(-1))


def make(spec: Spec) -> torch.nn.Module:
    model = build(spec).eval()
    fill(model, spec)
    return model


def write() -> None:
    for old in HERE.glob("*/config.json"):
        shutil.rmtree(old.parent)
    tokens, _ = inputs(SPECS[0])
    tensors = {"tokens": tokens}
    tensors |= {name: draw(name, VOCAB, HIDDEN) for name in ("embed", "head")}
    entries = []
    for spec in SPECS:
        with tempfile.TemporaryDirectory() as scratch:
            make(spec).to(torch.bfloat16).save_pretrained(scratch)
            (HERE / spec.name).mkdir()
            for name in ("config.json", "model.safetensors"):
                shutil.copyfile(f"{scratch}/{name}", HERE / spec.name / name)
        logits, drafts = answer(spec, make(spec))
        tensors |= {
            f"{spec.name}/taps": inputs(spec)[1],
            f"{spec.name}/logits": logits,
            f"{spec.name}/drafts": drafts,
        }
        entries.append(
            {
                "name": spec.name,
                "kind": spec.kind,
                "taps": spec.taps,
                "slots": "shifted" if spec.shifted else "unshifted",
            }
        )
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "references.safetensors")
    versions = {name: version(name) for name in ("speculators", "dflash", "torch", "transformers")}
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    about = json.dumps(versions | {"specforge": "0.2.0"})
    head = f'{{"versions": {about},\n"anchors": {ANCHORS}, "cases": [\n'
    (HERE / "references.json").write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file())
    if size > BUDGET:
        raise SystemExit(f"the references take {size} bytes, more than {BUDGET}")
    print(f"{len(SPECS)} cases, {size} bytes")


def check() -> None:
    """Recompute every case and compare."""
    tensors = load_file(HERE / "references.safetensors")
    worst = 0.0
    for spec in SPECS:
        logits, drafts = answer(spec, make(spec))
        worst = max(worst, float((logits - tensors[f"{spec.name}/logits"]).abs().max()))
        if worst > TOLERANCE or not torch.equal(drafts, tensors[f"{spec.name}/drafts"]):
            raise SystemExit(f"{spec.name}: differs by {worst}")
    print(f"all cases agree, largest difference {worst:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=sys.modules[__name__].__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    (check if parser.parse_args().check else write)()
