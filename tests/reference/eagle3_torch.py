"""The EAGLE-3 / EAGLE-3.1 drafter in plain PyTorch, written to be trusted by reading.

This is a second, independent writing of the equations: it shares no code with the package and
prefers loops and names over speed. Sources: paper.md sections 5.1 (EAGLE-3 and its training-time
test), 5.2 (fc_norm, norm_output) and 5.3 (norm_before_fc, norm_before_residual); tensor names and
the order of operations are those of formats.md section 2.

Letters used for shapes:

    L  rows (prefix positions)        H  drafter hidden size      V  target vocabulary
    A  taps (target layers read)      T  target hidden size       D  draft vocabulary
    nh query heads   nk key/value heads   hd head dimension       D = V when the head is tied

One pass over the drafter (formats.md section 2), for target features ``a_1 .. a_A`` and a token:

    a_i    = RMS(a_i; fc_norm.i)         if fc_norm
    z      = RMS(concat(a); input_norm)  if norm_before_fc else concat(a)
    g      = fc(z)                                  step 0 only: fed-back states skip all of this
    e      = RMS(embed(token); input_layernorm)
    hn     = RMS(g; hidden_norm)
    res    = hn if norm_before_residual else g
    h      = res + o_proj(attn(concat[e, hn]))
    h      = h + mlp(RMS(h; post_attention_layernorm))
    y      = RMS(h; norm)                           after the last layer
    logits = lm_head(y)
    next g = y if norm_output else h

With both fc_norm and norm_before_fc this file follows the block above: fc_norm first, on each tap,
then input_norm over the concatenation. (paper.md 5.3 says vLLM would apply input_norm first; no
published checkpoint has both.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last axis. x [..., n], weight [n]."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return weight * (x / torch.sqrt(mean_square + eps))


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``, any shape."""
    return x * torch.sigmoid(x)


def rope_frequencies(rotated: int, theta: float, scaling: dict[str, Any] | None) -> list[float]:
    """The rotated/2 angular frequencies (radians per position) of rotary embedding.

    ``rotated`` is how many channels of a head are rotated: hd, or a part of it. Plain:
    ``theta ** (-2 d / rotated)``. ``linear`` divides every frequency by ``factor`` (the same as
    dividing positions). ``llama3`` keeps the frequencies of wavelengths shorter than
    ``original / high_freq_factor``, divides those of wavelengths longer than
    ``original / low_freq_factor`` by ``factor``, and interpolates in between.
    """
    plain = [theta ** (-2.0 * d / rotated) for d in range(rotated // 2)]
    kind = "default" if scaling is None else scaling["rope_type"]
    if scaling is None or kind == "default":
        return plain
    if kind == "linear":
        return [f / scaling["factor"] for f in plain]
    if kind == "llama3":
        factor = scaling["factor"]
        low = scaling["low_freq_factor"]
        high = scaling["high_freq_factor"]
        original = scaling["original_max_position_embeddings"]
        scaled = []
        for f in plain:
            wavelength = 2.0 * math.pi / f
            if wavelength < original / high:
                scaled.append(f)
            elif wavelength > original / low:
                scaled.append(f / factor)
            else:
                smooth = (original / wavelength - low) / (high - low)
                scaled.append((1.0 - smooth) * f / factor + smooth * f)
        return scaled
    raise ValueError(f"rope type {kind!r} is not part of this reference")


def apply_rope(x: Tensor, positions: list[int], frequencies: list[float]) -> Tensor:
    """Rotate-half RoPE: channel d is paired with channel d + half, half the rotated ones.

    There are as many pairs as frequencies; channels after the pairs stay as they are (partial
    rotary embedding, as in Qwen3-Next, Qwen3.5 and GLM-4).

    x [L, heads, hd], ``positions`` one per row -> [L, heads, hd].
    """
    half = len(frequencies)
    out = x.clone()
    for row, position in enumerate(positions):
        for d in range(half):
            angle = position * frequencies[d]
            first, second = x[row, :, d], x[row, :, d + half]
            out[row, :, d] = first * math.cos(angle) - second * math.sin(angle)
            out[row, :, d + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


class Eagle3Reference:
    """An EAGLE-3 / EAGLE-3.1 drafter over canonical tensors (formats.md section 2).

    config
        Keys read: num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim,
        rms_norm_eps, rope_theta, rope_scaling (dict with ``rope_type``, or None),
        partial_rotary_factor, sliding_window (int or None), qk_norm, gated_attention, taps,
        fc_norm, norm_before_fc, norm_before_residual, norm_output, tied. Biases are used where a
        ``*.bias`` tensor is present.
    weights
        Canonical name -> tensor, PyTorch ``[out, in]`` layout.
    embed
        [V, H], the rows the drafter embeds tokens with.
    target_head
        [V, H], used only when ``tied`` (the drafter has no ``lm_head.weight``).
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        embed: Tensor,
        target_head: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.weights = {n: w.to(dtype) for n, w in weights.items() if w.is_floating_point()}
        self.embed = embed.to(dtype)
        if config["tied"]:
            if target_head is None:
                raise ValueError("a tied drafter needs the target's head")
            self.head = target_head.to(dtype)
        else:
            self.head = self.weights["lm_head.weight"]
        self.frequencies = rope_frequencies(
            int(config["head_dim"] * config["partial_rotary_factor"]),
            config["rope_theta"],
            config["rope_scaling"],
        )

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm with the weight ``{name}.weight``."""
        return rms_norm(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def linear(self, x: Tensor, name: str) -> Tensor:
        """``x @ W.T (+ b)`` with ``{name}.weight`` and, if present, ``{name}.bias``."""
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def fuse_taps(self, taps: Tensor) -> Tensor:
        """The fused feature g of step 0 (paper.md 5.1, 5.2). taps [L, A, T] -> [L, H]."""
        pieces = []
        for i in range(len(self.config["taps"])):
            tap = taps[:, i, :]
            if self.config["fc_norm"]:
                tap = self.norm(tap, f"fc_norm.{i}")
            pieces.append(tap)
        z = torch.cat(pieces, dim=-1)
        if self.config["norm_before_fc"]:
            z = self.norm(z, "input_norm")
        return self.linear(z, "fc")

    def visible_from(self, row: int) -> int:
        """First step-0 row that ``row`` may attend to: 0, or the sliding window's edge.

        Training definition: step-0 key r is visible iff ``r <= row`` and ``row - r < window``. It
        depends on the row alone, not on the step.
        """
        window = self.config["sliding_window"]
        return 0 if window is None else max(0, row - window + 1)

    def attention(
        self,
        layer: int,
        x: Tensor,
        step: int,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """Training-time-test attention of one layer at one step (paper.md 5.1).

        x [L, in] -> [L, H]. ``keys`` and ``values`` are this layer's memory: entry s is
        [L, nk, hd], made at step s; this call appends entry ``step``.

        The query of row i (RoPE position i + step) sees the step-0 keys of rows <= i (RoPE position
        of row r is r) and, of the later steps s = 1 .. step, only row i's own key (position i + s).
        """
        c = self.config
        heads, kv_heads, head_dim = (
            c["num_attention_heads"],
            c["num_key_value_heads"],
            c["head_dim"],
        )
        rows = x.shape[0]
        prefix = f"layers.{layer}.self_attn"

        q = self.linear(x, f"{prefix}.q_proj")
        if c["gated_attention"]:  # Qwen3-Next's rows: head 0's query, its gate, head 1's query, ...
            pairs = q.reshape(rows, heads, 2, head_dim)
            q, gate = pairs[:, :, 0], pairs[:, :, 1]
        q = q.reshape(rows, heads, head_dim)
        k = self.linear(x, f"{prefix}.k_proj").reshape(rows, kv_heads, head_dim)
        v = self.linear(x, f"{prefix}.v_proj").reshape(rows, kv_heads, head_dim)
        if c["qk_norm"]:  # per head, before RoPE
            q = self.norm(q, f"{prefix}.q_norm")
            k = self.norm(k, f"{prefix}.k_norm")
        positions = [row + step for row in range(rows)]
        q = apply_rope(q, positions, self.frequencies)
        k = apply_rope(k, positions, self.frequencies)
        keys.append(k)
        values.append(v)

        out = torch.zeros(rows, heads, head_dim, dtype=self.dtype)
        for i in range(rows):
            # (step, row) of every key that row i sees at this step.
            visible = [(0, r) for r in range(self.visible_from(i), i + 1)]
            visible += [(s, i) for s in range(1, step + 1)]
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                seen_keys = torch.stack([keys[s][r, kv_head] for s, r in visible])
                seen_values = torch.stack([values[s][r, kv_head] for s, r in visible])
                scores = seen_keys @ q[i, head] / math.sqrt(head_dim)
                out[i, head] = torch.softmax(scores, dim=0) @ seen_values
                if c["gated_attention"]:
                    out[i, head] *= torch.sigmoid(gate[i, head])
        return self.linear(out.reshape(rows, heads * head_dim), f"{prefix}.o_proj")

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """SwiGLU: ``down(silu(gate(x)) * up(x))``. x [L, H] -> [L, H]."""
        prefix = f"layers.{layer}.mlp"
        gate = self.linear(x, f"{prefix}.gate_proj")
        up = self.linear(x, f"{prefix}.up_proj")
        return self.linear(silu(gate) * up, f"{prefix}.down_proj")

    def train_time_test(self, tokens: Tensor, taps: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Run ``steps`` chain steps from every row at once, teacher-forced (paper.md 5.1).

        tokens [L + 1] int, taps [L, A, T] (``taps[i]`` was captured at ``tokens[i]``)
        -> logits [steps, L, D], states [steps, L, H].

        Row i of step j embeds ``tokens[i + 1 + j]`` and its logits predict ``tokens[i + 2 + j]``.
        Rows with ``i + 1 + j > L`` have no such token: they embed token 0 and their results mean
        nothing (they reach no other row). ``states[j]`` is what step j hands to step j + 1: the
        normed y with norm_output, else the un-normed h.
        """
        c = self.config
        rows = taps.shape[0]
        layers = c["num_hidden_layers"]
        keys: list[list[Tensor]] = [[] for _ in range(layers)]
        values: list[list[Tensor]] = [[] for _ in range(layers)]
        all_logits = []
        all_states = []

        g = self.fuse_taps(taps.to(self.dtype))
        for step in range(steps):
            fed = []
            for i in range(rows):
                index = i + 1 + step
                fed.append(int(tokens[index]) if index <= rows else 0)

            # Layer 0: embedding and fused feature side by side, 2H wide, embedding first.
            e = self.norm(self.embed[fed], "layers.0.input_layernorm")
            hn = self.norm(g, "layers.0.hidden_norm")
            residual = hn if c["norm_before_residual"] else g
            both = torch.cat([e, hn], dim=-1)
            h = residual + self.attention(0, both, step, keys[0], values[0])
            h = h + self.mlp(0, self.norm(h, "layers.0.post_attention_layernorm"))

            # Layers 1 and up: plain Llama layers.
            for n in range(1, layers):
                x = self.norm(h, f"layers.{n}.input_layernorm")
                h = h + self.attention(n, x, step, keys[n], values[n])
                h = h + self.mlp(n, self.norm(h, f"layers.{n}.post_attention_layernorm"))

            y = self.norm(h, "norm")
            g = y if c["norm_output"] else h
            all_logits.append(y @ self.head.T)
            all_states.append(g)
        return torch.stack(all_logits), torch.stack(all_states)
