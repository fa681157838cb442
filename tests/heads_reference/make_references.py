"""Write Hydra and EAGLE-4 heads, and what an independent writing of their equations drafts.

    python tests/heads_reference/make_references.py           # write everything here
    python tests/heads_reference/make_references.py --check   # recompute, compare instead

The tests read the files alone. The environment: torch 2.13.0, safetensors. No package runs these
heads any more, so this is plain PyTorch: zankner/Hydra's `hydra_heads/*.py` read and written
anew, for chains, and of EAGLE-4 the EAGLE-3.1 layer and `efficient_lm_head_config`. Nothing of
mlx-drift is imported.

NAME/config.json, NAME/hydra_lm_head.pt or NAME/model.safetensors
    The head, in its trainer's layout, with the target's own embedding where the trainer saves it.
references.safetensors
    ``tokens`` [L+1] and ``embed`` [V, H], ``head`` [V, H] of the target; ``NAME/taps`` [L, A, H];
    ``NAME/logits`` [N, K, D] and ``NAME/drafts`` [N, K] behind each of the ANCHORS rows.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
SEED, LENGTH, VOCAB, DRAFT_VOCAB, HIDDEN, LAYERS = 31, 20, 48, 24, 32, 8
INNER, QUERY_HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 40, 4, 2, 8, 1e-5, 10000.0
ANCHORS = [3, 9, 15]
HEADS, DEPTH, RANK, CANDIDATES = 3, 5, 8, 6
TOLERANCE, BUDGET = 2e-5, 450_000

Tensors = dict[str, Tensor]
BASE = {
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
    "num_attention_heads": QUERY_HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
"""The target's config, which Hydra's checkpoints leave out."""


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    y = x @ t[f"{name}.weight"].T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotates halves of heads `[n, M, d]`."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * THETA ** -(torch.arange(half) / half)
    left, right = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def attention(t: Tensors, at: str, x: Tensor) -> Tensor:
    """Causal attention over whole rows `[M, …]`."""
    rows = torch.arange(len(x))
    q, k, v = (
        linear(t, f"{at}.self_attn.{name}_proj", x).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1)
        for name in "qkv"
    )
    q, k = rotate(q, rows), rotate(k, rows)
    k, v = (each.repeat_interleave(QUERY_HEADS // KV_HEADS, 0) for each in (k, v))
    scores = (q @ k.mT * HEAD_DIM**-0.5).masked_fill(rows > rows[:, None], -torch.inf)
    heads = scores.softmax(-1) @ v
    return linear(t, f"{at}.self_attn.o_proj", heads.transpose(0, 1).flatten(1))


def feed_forward(t: Tensors, at: str, x: Tensor) -> Tensor:
    x = norm(x, t[f"{at}.post_attention_layernorm.weight"])
    gate, up = (linear(t, f"{at}.mlp.{name}_proj", x) for name in ("gate", "up"))
    return linear(t, f"{at}.mlp.down_proj", F.silu(gate) * up)


def block(t: Tensors, at: str, x: Tensor) -> Tensor:
    """A whole Llama layer."""
    x = x + attention(t, at, norm(x, t[f"{at}.input_layernorm.weight"]))
    return x + feed_forward(t, at, x)


def layer_shapes(at: str, read: int = HIDDEN) -> dict[str, tuple[int, ...]]:
    width, kv = QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    matrices = {
        "self_attn.q_proj": (width, read),
        "self_attn.k_proj": (kv, read),
        "self_attn.v_proj": (kv, read),
        "self_attn.o_proj": (HIDDEN, width),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    return {f"{at}.{name}.weight": shape for name, shape in matrices.items()}


def drawn(shapes: dict[str, tuple[int, ...]], generator: torch.Generator) -> Tensors:
    """Random tensors, gains about 1, as float16 can hold them."""
    return {
        name: (
            torch.randn(shape, generator=generator) * (0.15 if len(shape) > 1 else 0.2)
            + (name.endswith("norm.weight") or ".fc_norm." in f".{name}") * 1.0
        ).half()
        for name, shape in shapes.items()
    }


class Hydra:
    """`mlp` heads, behind a prefix layer or not: every draft is read by the heads that follow."""

    def __init__(self, blocks: int, prefix: bool, offset: int) -> None:
        self.blocks, self.prefix = blocks, prefix
        self.taps = [LAYERS - offset if offset else LAYERS + 1]
        self.config: dict[str, Any] = {
            "hydra_num_heads": HEADS,
            "hydra_num_layers": blocks,
            "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
            "grounded_heads": True,
            "hidden_state_offset": offset,
            "base_model_name_or_path": "owner/base",
        }

    def place(self, number: int) -> int:
        """Where a block stands in its sequence: between dropouts, if there is a prefix."""
        return 2 * number + 1 if self.prefix else number

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for head in range(HEADS):
            for number in range(self.blocks):
                at = f"hydra_mlp.{head}.{self.place(number)}"
                wide = (head + 2) * HIDDEN if number == 0 else HIDDEN
                for part in ("linear", "res_connection")[: 1 + (number == 0)]:
                    found |= {f"{at}.{part}.weight": (HIDDEN, wide), f"{at}.{part}.bias": (HIDDEN,)}
            at = f"hydra_lm_head.{head}" + ".1" * self.prefix
            found |= {f"{at}.weight": (VOCAB, HIDDEN), f"{at}.bias": (VOCAB,)}
        if self.prefix:
            found |= layer_shapes("prefix_embeding_layer.layers.0")
            found |= {"prefix_embeding_layer.norm.weight": (HIDDEN,)}
            found |= {"prefix_embeding_layer.embed_tokens.weight": (VOCAB, HIDDEN)}
        return found

    def draft(self, t: Tensors, tokens: Tensor, taps: Tensor, embed: Tensor) -> Iterator[Tensor]:
        states = taps[:, 0]
        if self.prefix:
            states = block(t, "prefix_embeding_layer.layers.0", states)
            states = norm(states, t["prefix_embeding_layer.norm.weight"])
        read = torch.cat([states[-1], embed[tokens[-1]]])
        for head in range(HEADS):
            at = f"hydra_mlp.{head}."
            x = linear(t, f"{at}{self.place(0)}.res_connection", read) + F.silu(
                linear(t, f"{at}{self.place(0)}.linear", read)
            )
            for number in range(1, self.blocks):
                x = x + F.silu(linear(t, f"{at}{self.place(number)}.linear", x))
            logits = linear(t, f"hydra_lm_head.{head}" + ".1" * self.prefix, x)
            yield logits
            read = torch.cat([read, embed[logits.argmax()]])


class HydraEagle:
    """`eagle-attn`: a decoder layer whose output is the next state, read by the target's head."""

    def __init__(self, offset: int) -> None:
        self.taps = [LAYERS - offset if offset else LAYERS + 1]
        self.config: dict[str, Any] = {
            "hydra_num_heads": 1,
            "hydra_num_layers": 1,
            "hydra_head_arch": "eagle-attn",
            "grounded_heads": True,
            "hidden_state_offset": offset,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        fused = {"fc.weight": (HIDDEN, 2 * HIDDEN), "fc.bias": (HIDDEN,)}
        return layer_shapes("attn") | fused

    def draft(self, t: Tensors, tokens: Tensor, taps: Tensor, embed: Tensor) -> Iterator[Tensor]:
        rows = linear(t, "fc", torch.cat([embed[tokens], taps[:, 0]], -1))
        for _ in range(DEPTH):
            state = block(t, "attn", rows)[-1]
            logits = t["lm_head.weight"] @ state
            yield logits
            joined = linear(t, "fc", torch.cat([embed[logits.argmax()], state]))
            rows = torch.cat([rows, joined[None]])


class Eagle4:
    """EAGLE-3.1, of whose vocabulary only the candidates of a low-rank head have a logit."""

    def __init__(self, reduced: bool) -> None:
        self.taps = [2, 4, 5]
        self.rows = DRAFT_VOCAB if reduced else VOCAB
        cheap = {"type": "low_rank", "rank": RANK, "num_candidates": CANDIDATES}
        self.config: dict[str, Any] = BASE | {
            "architectures": ["LlamaForCausalLMEagle4"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": self.rows,
            "fc_norm": True,
            "norm_output": True,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in self.taps]},
            "efficient_lm_head_config": cheap,
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            **layer_shapes("layers.0", 2 * HIDDEN),
            "layers.0.hidden_norm.weight": (HIDDEN,),
            "fc.weight": (HIDDEN, 3 * HIDDEN),
            **{f"fc_norm.{i}.weight": (HIDDEN,) for i in range(3)},
            "norm.weight": (HIDDEN,),
            "lm_head.weight": (self.rows, HIDDEN),
            "efficient_lm_head_down_proj.weight": (RANK, HIDDEN),
            "efficient_lm_head.weight": (self.rows, RANK),
        }

    def ids(self) -> Tensor:
        return torch.arange(self.rows) * VOCAB // self.rows

    def draft(self, t: Tensors, tokens: Tensor, taps: Tensor, embed: Tensor) -> Iterator[Tensor]:
        normed = [norm(taps[:, i], t[f"fc_norm.{i}.weight"]) for i in range(3)]
        embeddings, states = embed[tokens], linear(t, "fc", torch.cat(normed, -1))
        for _ in range(DEPTH):
            pair = [
                norm(embeddings, t["layers.0.input_layernorm.weight"]),
                norm(states, t["layers.0.hidden_norm.weight"]),
            ]
            x = states + attention(t, "layers.0", torch.cat(pair, -1))
            state = norm((x + feed_forward(t, "layers.0", x))[-1], t["norm.weight"])
            scores = linear(t, "efficient_lm_head", linear(t, "efficient_lm_head_down_proj", state))
            best = scores.topk(CANDIDATES).indices
            logits = torch.full((self.rows,), -torch.inf)
            logits[best] = t["lm_head.weight"][best] @ state
            yield logits
            token = self.ids()[logits.argmax()]
            embeddings = torch.cat([embeddings, embed[token][None]])
            states = torch.cat([states, state[None]])


CASES: dict[str, Hydra | HydraEagle | Eagle4] = {
    "hydra_mlp": Hydra(1, prefix=False, offset=0),
    "hydra_mlp_deep": Hydra(3, prefix=False, offset=1),
    "hydra_prefix": Hydra(2, prefix=True, offset=0),
    "hydra_eagle": HydraEagle(offset=0),
    "hydra_eagle_earlier": HydraEagle(offset=2),
    "eagle4": Eagle4(reduced=False),
    "eagle4_reduced": Eagle4(reduced=True),
}


def make(out: Path) -> Tensors:
    """Writes the heads; returns the references."""
    generator = torch.Generator().manual_seed(SEED)
    embed, head = ((0.3 * torch.randn(VOCAB, HIDDEN, generator=generator)).half() for _ in range(2))
    tokens = torch.randint(0, VOCAB, (LENGTH + 1,), generator=generator)
    found = {"tokens": tokens, "embed": embed, "head": head}
    for name, case in CASES.items():
        stored = drawn(case.shapes(), generator)
        if not isinstance(case, Eagle4):
            stored["input_embed_fn.weight"] = embed
        if isinstance(case, HydraEagle):
            stored["lm_head.weight"] = head
        t = {key: tensor.float() for key, tensor in stored.items()}
        taps = torch.randn(LENGTH, len(case.taps), HIDDEN, generator=generator)
        drafts, logits = [], []
        for anchor in ANCHORS:
            rows = list(case.draft(t, tokens[1 : anchor + 1], taps[:anchor], embed.float()))
            logits.append(torch.stack(rows))
            drafts.append(logits[-1].argmax(-1))
        found[f"{name}/taps"] = taps
        found[f"{name}/logits"] = torch.stack(logits)
        found[f"{name}/drafts"] = torch.stack(drafts)
        if isinstance(case, Eagle4):
            found[f"{name}/drafts"] = case.ids()[found[f"{name}/drafts"]]
            stored["d2t"] = case.ids() - torch.arange(case.rows)
            stored["t2d"] = torch.isin(torch.arange(VOCAB), case.ids())
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(case.config, indent=1) + "\n")
        if isinstance(case, Eagle4):
            save_file(stored, folder / "model.safetensors")
        else:
            torch.save(stored, folder / "hydra_lm_head.pt")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = HERE / "references.safetensors"
    if args.check:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            found, written = make(Path(folder)), load_file(path)
        assert found.keys() == written.keys(), found.keys() ^ written.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(written[name], tensor, rtol=0, atol=TOLERANCE)
        return
    save_file(make(HERE), path)
    size = sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file())
    assert size < BUDGET, size
    print(f"{size} bytes")


if __name__ == "__main__":
    main()
