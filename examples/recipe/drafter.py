"""EAGLE-3 drafters in plain PyTorch, with SpecForge's tensor names.

One decoder layer whose q/k/v read [embedding of the next token ; target feature]. Row i pairs the
target's residual streams at position i with token i+1 and predicts token i+2; from the second
step on, the drafter's own state replaces the target feature. `Switches` are all that drafters
differ in; the first two are the difference between the pair's (EAGLE-3.1).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recipe.chains import Chains
from recipe.own_head import OwnHead, stored_tensors, write
from recipe.rows import Row
from recipe.target import MLP, Attention, Llama, LlamaConfig, RMSNorm


@dataclass(frozen=True)
class Switches:
    """What a drafter does otherwise than EAGLE-3, under the names of its config.json.

    * `fc_norm`: an RMSNorm for each tapped stream, so that the deepest and largest does not drown
      the others;
    * `norm_output`: the state that is fed back is the final-norm output, so its size is bounded;
    * `norm_before_residual`: the residual starts at the normed state (speculators);
    * `attn_output_gate`: what each head says is multiplied, element by element, with the sigmoid
      of a projection of what the queries read (Qiu et al., arXiv 2505.06708). Stored as Qwen3-Next
      does: each head of `q_proj` has its queries' rows first, then its gate's.
    """

    fc_norm: bool = False
    norm_output: bool = False
    norm_before_residual: bool = False
    attn_output_gate: bool = False


PLAIN = Switches()
NORMALIZED = Switches(fc_norm=True, norm_output=True)
QUERIES, GATE = "midlayer.self_attn.q_proj.weight", "midlayer.gate_proj.weight"


def tap_layers(layers: int) -> list[int]:
    """EAGLE-3's low, middle and high tap, as indices into [embedding, out_0, out_1, ...]."""
    return [2, layers // 2, layers - 3]


class DrafterLayer(nn.Module):
    def __init__(self, config: LlamaConfig, gated: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, 2 * config.hidden_size)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        if gated:  # the last, so that all the others get the random numbers they get without it
            width = config.num_attention_heads * config.head_dim
            self.gate_proj = nn.Linear(2 * config.hidden_size, width, bias=False)


class Eagle3(OwnHead):
    def __init__(self, config: LlamaConfig, draft_ids: Tensor, switches: Switches) -> None:
        super().__init__()
        self.config, self.switches = config, switches
        self.taps = tap_layers(config.num_hidden_layers)
        size = config.hidden_size
        if switches.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(size, config.rms_norm_eps) for _ in self.taps)
        self.fc = nn.Linear(len(self.taps) * size, size, bias=False)
        self.midlayer = DrafterLayer(config, switches.attn_output_gate)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.add_head(config, draft_ids)

    def init_from_target(self, target: Llama) -> None:
        """Start as a logit lens: the deepest tap goes straight to the target's norm and head."""
        size, layer = self.config.hidden_size, self.midlayer
        with torch.no_grad():
            self.fc.weight[:, -size:] = torch.eye(size)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
            self.norm.weight.copy_(target.model.norm.weight)
            self.lm_head.weight.copy_(target.model.embed_tokens.weight[self.draft_ids])

    def start(self, row: Row) -> list[Tensor]:
        """What `unroll` starts from, of what the target makes of a row."""
        return row.taps

    def feature(self, taps: list[Tensor]) -> Tensor:
        if self.switches.fc_norm:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        return self.fc(torch.cat(taps, dim=-1)).float()

    def unroll(
        self,
        taps: list[Tensor],
        next_embedding: Callable[[int, Tensor | None], Tensor],
        steps: int,
        rows: Tensor | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A draft chain from every row at once (train-time test): (normed, fed-back) states.

        `next_embedding(step, normed)` embeds the token that each row reads at `step`: the true
        next token in training, its own draft (from the previous step's `normed`) when measured.
        With `rows` only their chains go on: all that is yielded, and embedded from step 1 on, is
        of those rows.
        """
        layer = self.midlayer
        state, normed = self.feature(taps), None
        chains = Chains(layer.self_attn, self.config, state.shape[1], rows)
        for step in range(steps):
            embedding, residual = next_embedding(step, normed), layer.hidden_norm(state)
            u = torch.cat([layer.input_layernorm(embedding), residual], dim=-1)
            if not self.switches.norm_before_residual:
                residual = state
            heads = chains.heads(u)
            if step == 0:
                u, residual = u[:, chains.rows], residual[:, chains.rows]
            if self.switches.attn_output_gate:
                gate = layer.self_attn.split(layer.gate_proj(u), layer.self_attn.heads)
                heads = heads * gate.sigmoid()
            state = residual + layer.self_attn.out(heads)
            state = state + layer.mlp(layer.post_attention_layernorm(state))
            normed = self.norm(state)
            state = normed if self.switches.norm_output else state
            yield normed, state

    def save(self, folder: Path, dtype: torch.dtype, also_bin: bool = True) -> None:
        """SpecForge's layout, as safetensors in `folder` and as a torch file in `folder`-bin."""
        config = self.config
        # SpecForge numbers taps by the layer that writes them: one less than our indices.
        eagle: dict[str, Any] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in self.taps]}
        eagle["use_aux_hidden_state"] = True
        eagle |= {switch: True for switch, on in asdict(self.switches).items() if on}
        stored = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "num_hidden_layers": 1,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "max_position_embeddings": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "draft_vocab_size": len(self.d2t),
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "eagle_config": eagle,
        }
        tensors = stored_tensors(self, dtype)
        if self.switches.attn_output_gate:
            both = torch.stack([self._by_head(tensors[QUERIES]), self._by_head(tensors.pop(GATE))])
            tensors[QUERIES] = both.transpose(0, 1).flatten(0, 2).contiguous()
        write(folder, stored, tensors)
        if also_bin:
            bin_folder = folder.with_name(folder.name + "-bin")
            bin_folder.mkdir(parents=True, exist_ok=True)
            (bin_folder / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
            torch.save(tensors, bin_folder / "pytorch_model.bin")

    def _by_head(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, (self.config.num_attention_heads, -1))

    @classmethod
    def load(cls, folder: Path, config: LlamaConfig) -> "Eagle3":
        tensors = load_file(folder / "model.safetensors")
        stored = json.loads((folder / "config.json").read_text())["eagle_config"]
        names = Switches.__dataclass_fields__
        switches = Switches(**{name: on for name, on in stored.items() if name in names})
        draft_ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
        drafter = cls(config, draft_ids, switches)
        if switches.attn_output_gate:
            queries, gate = drafter._by_head(tensors[QUERIES]).chunk(2, dim=1)
            tensors |= {QUERIES: queries.flatten(0, 1), GATE: gate.flatten(0, 1)}
        drafter.load_state_dict(tensors)
        return drafter
