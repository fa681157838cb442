"""A DFlash drafter in plain PyTorch, with speculators' tensor names (arXiv 2602.06036).

A block is the last committed token and mask tokens behind it; one pass of a few bidirectional
layers fills it. What the target made of the tokens before the block is the context: fused once, it
enters every layer as further keys and values. A slot predicts the token at its own position.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.drafter import tap_layers
from recipe.own_head import OwnHead, stored_tensors, write
from recipe.rows import Row
from recipe.target import MLP, Attention, Llama, LlamaConfig, RMSNorm, apply_rope, rope_table


class BlockAttention(Attention):
    """Attention of blocks to their contexts and to themselves; queries and keys are normed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.config = config
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, anchors: Tensor) -> Tensor:
        """Maps blocks `[N, B, H]` to the same; a block sees the context before its anchor.

        Args:
            x: The slots.
            context: What the target made of the row, fused, `[L, H]`.
            anchors: Where each block's first slot stands, `[N]`.
        """
        (blocks, width), length = x.shape[:2], len(context)
        positions = anchors[:, None] + torch.arange(width)
        q = self._rotated(self.q_norm(self._heads(self.q_proj(x), self.heads)), positions)
        k = self._rotated(self.k_norm(self._heads(self.k_proj(x), self.kv_heads)), positions)
        v = self._heads(self.v_proj(x), self.kv_heads)  # as the others [heads, N, B, head_dim]
        context_k = self.k_norm(self._heads(self.k_proj(context)[None], self.kv_heads))
        context_k = self._rotated(context_k, torch.arange(length)[None])[:, 0]
        context_v = self._heads(self.v_proj(context)[None], self.kv_heads)[:, 0]
        groups = self.heads // self.kv_heads
        k, v, context_k, context_v = (
            each.repeat_interleave(groups, dim=0) for each in (k, v, context_k, context_v)
        )
        q = q * self.head_dim**-0.5
        outside = torch.arange(length) >= anchors[:, None, None]
        before = (q.flatten(1, 2) @ context_k.mT).unflatten(1, (blocks, width))
        before = before.masked_fill(outside, -torch.inf)
        weights = torch.cat([before, q @ k.mT], dim=-1).softmax(-1)
        seen, own = weights.split([length, width], dim=-1)
        heads = (seen.flatten(1, 2) @ context_v).unflatten(1, (blocks, width)) + own @ v
        return self.o_proj(heads.permute(1, 2, 0, 3).flatten(-2))

    def _heads(self, projected: Tensor, heads: int) -> Tensor:
        return projected.unflatten(-1, (heads, self.head_dim)).permute(2, 0, 1, 3)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        return apply_rope(x, rope_table(self.config, positions))


class BlockLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = BlockAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, context: Tensor, anchors: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, anchors)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlash(OwnHead):
    def __init__(
        self, config: LlamaConfig, draft_ids: Tensor, layers: int, block: int, mask: int
    ) -> None:
        """A drafter of blocks of `block` slots; slots after the first embed the token `mask`."""
        super().__init__()
        self.config, self.block, self.mask = config, block, mask
        self.taps = tap_layers(config.num_hidden_layers)
        size = config.hidden_size
        self.fc = nn.Linear(len(self.taps) * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, config.rms_norm_eps)
        self.layers = nn.ModuleList(BlockLayer(config) for _ in range(layers))
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.add_head(config, draft_ids)
        # The target's embedding of the mask, which the checkpoint does not repeat.
        self.register_buffer("masked", torch.zeros(size), persistent=False)

    def init_from_target(self, target: Llama) -> None:
        """Start with the deepest tap as context, the target's head, and layers that add nothing."""
        size = self.config.hidden_size
        with torch.no_grad():
            self.fc.weight[:, -size:] = torch.eye(size)
            for layer in self.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            self.lm_head.weight.copy_(target.model.embed_tokens.weight[self.draft_ids])
            self.bind(target)
            self.norm.weight.fill_(self.masked.square().mean().sqrt())  # as large as it came

    def bind(self, target: Llama) -> None:
        """Takes the target's embedding of the mask."""
        self.masked.copy_(target.model.embed_tokens.weight[self.mask])

    def start(self, row: Row) -> list[Tensor]:
        """What `unroll` starts from, of what the target makes of a row."""
        return row.taps

    def unroll(
        self,
        taps: list[Tensor],
        next_embedding: Callable[[int, Tensor | None], Tensor],
        steps: int,
        rows: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A block behind every row at once: as Eagle3.unroll, slot by slot of the first `steps`.

        Row i is the last of the context; the block starts with token i+1. Nothing is fed back.
        """
        context = self.hidden_norm(self.fc(torch.cat(taps, dim=-1)))[0]
        rows = torch.arange(len(context)) if rows is None else rows
        x = self.masked.expand(len(rows), self.block, -1).clone()
        x[:, 0] = next_embedding(0, None)[0, rows]
        for layer in self.layers:
            x = layer(x, context, rows + 1)
        for normed in self.norm(x)[None, :, 1 : steps + 1].unbind(2):
            yield normed, normed

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """The layout of speculators' `dflash` models."""
        layers = len(self.layers)
        transformer: dict[str, Any] = {
            "model_type": "qwen3",
            **asdict(self.config),
            "num_hidden_layers": layers,
            "layer_types": ["full_attention"] * layers,
            "hidden_act": "silu",
            "attention_bias": False,
        }
        proposal = {"proposal_type": "greedy", "speculative_tokens": self.block - 1}
        stored: dict[str, Any] = {
            "architectures": ["DFlashDraftModel"],
            "speculators_model_type": "dflash",
            "speculators_config": {"algorithm": "dflash", "proposal_methods": [proposal]},
            "transformer_layer_config": transformer,
            "draft_vocab_size": len(self.d2t),
            "aux_hidden_state_layer_ids": self.taps,  # inputs of layers, as ours are numbered
            "block_size": self.block,
            "mask_token_id": self.mask,
            "sample_from_anchor": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        write(folder, stored, stored_tensors(self, dtype))

    @classmethod
    def load(cls, folder: Path, target: Llama) -> "DFlash":
        stored = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        drafter = cls(
            target.config,
            tensors["d2t"] + torch.arange(len(tensors["d2t"])),
            stored["transformer_layer_config"]["num_hidden_layers"],
            stored["block_size"],
            stored["mask_token_id"],
        )
        drafter.load_state_dict(tensors)
        drafter.bind(target)
        return drafter
