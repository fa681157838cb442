"""Trains a one-layer draft model for the embedded target: what mlx-lm's own loop needs to draft.

    python tests/benchmarks/draft_model.py --out FOLDER --minutes 6
    mlx-drift bench --baseline-draft-model FOLDER

There is no small model with the embedded target's tokenizer, so this makes one, an mlx-lm folder:
a Llama of one layer that starts with the target's embedding and learns the answers that the target
knows by heart, from chats made by `examples/train_demo_pair/data.py`. It reads tokens alone, no
taps, so it is wide in its feed-forward part: what can be learnt there is which token follows the
last few.

Needs the dev extra (torch). At the end it drafts for the target on held-out questions, and the
acceptance is printed.
"""

import argparse
import itertools
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten
from mlx_lm import load
from mlx_lm.utils import dequantize_model
from tokenizers import Tokenizer
from torch import Tensor

from mlx_drift.decode.statistics import Statistics
from mlx_drift.demo import TARGET
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.files.json_file import read_json
from mlx_drift.generate import stream_generate

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from recipe.muon import Muon  # noqa: E402
from recipe.rows import pack  # noqa: E402
from recipe.schedule import paced  # noqa: E402
from recipe.target import Llama, LlamaConfig  # noqa: E402
from train_demo_pair.data import load_facts, read_jsonl, training_chats  # noqa: E402
from train_demo_pair.tokenizer import (  # noqa: E402
    BOS,
    EOT,
    PAD,
    encode_chat,
    generation_prompt,
    token_id,
)

ROW, ROWS = 512, 2
"""Tokens a row, and rows a step."""

SIZES = {
    "num_hidden_layers": 1,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""Where the draft model differs from the target. More and narrower heads: one for each of the last
tokens, since there is no second layer to combine what one head found."""


def read_target() -> Llama:
    """Returns the embedded target in PyTorch, dequantized."""
    model, _ = load(str(TARGET))
    dequantize_model(model)
    model.set_dtype(mx.float32)
    config = read_json(TARGET / "config.json")
    target = Llama(LlamaConfig(**{name: config[name] for name in LlamaConfig.__dataclass_fields__}))
    weights = tree_flatten(model.parameters())
    target.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in weights})
    return target


def new_draft_model(target: Llama) -> Llama:
    """Returns a draft model that has the target's embedding already, which is also its head.

    The final norm starts small: the residual stream of one layer is mostly the last token itself,
    which would be drafted again with certainty.
    """
    draft = Llama(LlamaConfig(**vars(target.config) | SIZES))
    draft.init_weights()
    draft.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    torch.nn.init.constant_(draft.model.norm.weight, 0.3)
    return draft


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the epoch, ids, and what the assistant says of them, both `[ROWS, ROW]`."""
    rng, facts = random.Random(seed), load_facts()
    for epoch in itertools.count():
        sequences = [encode_chat(tokenizer, chat) for chat in training_chats(facts, rng)]
        rows = list(pack(sequences, ROW, token_id(tokenizer, PAD)))
        rng.shuffle(rows)
        for start in range(0, len(rows) - ROWS + 1, ROWS):
            ids, said = zip(*rows[start : start + ROWS], strict=True)
            yield epoch, torch.stack(ids), torch.stack(said)


def train(draft: Llama, tokenizer: Tokenizer, minutes: float, lr: float) -> None:
    """Trains the draft model on the answers that the target knows by heart."""
    named = list(draft.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() == 1 or "embed" in name]
    muon = Muon(matrices, lr=lr, momentum=0.95)
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    source, reported = batches(tokenizer, seed=0), time.monotonic()
    losses: list[float] = []
    right: list[float] = []
    for step, elapsed in paced(minutes, [muon, adamw]):
        epoch, ids, said = next(source)
        state = draft.hidden_states(ids[:, :-1])[-1][said[:, 1:]]
        logits, truth = draft.logits(state), ids[:, 1:][said[:, 1:]]
        loss = F.cross_entropy(logits, truth)
        loss.backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        right.append((logits.argmax(-1) == truth).float().mean().item())
        if time.monotonic() - reported > 30:
            print(
                f"{elapsed / 60:5.1f} min  step {step}  epoch {epoch}"
                f"  loss {np.mean(losses):.3f}  right {np.mean(right):.3f}",
                flush=True,
            )
            reported = time.monotonic()
            losses.clear()
            right.clear()


def save(draft: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the draft model as a folder that mlx-lm loads."""
    draft.save(folder, token_id(tokenizer, BOS), token_id(tokenizer, EOT))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TARGET / name, folder / name)


def acceptance(folder: Path, tokenizer: Tokenizer, questions: int, k: int) -> Statistics:
    """Lets the draft model draft for the embedded target on held-out questions."""
    model, wrapped = load(str(TARGET))
    dequantize_model(model)
    small, _ = load(str(folder))
    drafter = DraftModelDrafter(small, model)
    found = Statistics()
    for record in read_jsonl(EXAMPLES / "train_demo_pair" / "heldout.jsonl")[
        -questions:
    ]:  # the unseen wordings
        prompt = generation_prompt(tokenizer, record["messages"])
        *_, last = stream_generate(model, wrapped, prompt, 64, drafter=drafter, num_draft_tokens=k)
        found.add(last.statistics)
    return found


def main() -> None:
    """Trains, saves, and prints what is accepted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--questions", type=int, default=16, help="held-out ones, to be asked")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    draft = new_draft_model(read_target())
    train(draft, tokenizer, arguments.minutes, arguments.lr)
    save(draft, tokenizer, arguments.out)
    found = acceptance(arguments.out, tokenizer, arguments.questions, k=4)
    steps = " ".join(f"{share:.2f}" for share in found.conditional_acceptance)
    print(f"accepted drafts a round (K = 4): {found.acceptance_length:.2f}; conditional: {steps}")


if __name__ == "__main__":
    main()
