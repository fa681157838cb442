"""How many drafts a round a drafter gets accepted, without writing a speculative decoder.

Greedy speculative decoding does not change the target's answer, so the answer is generated once
and every round is known in advance: `unroll` drafts a chain from every row in one pass, and a
round that starts at row i accepts as many drafts as agree with the answer from token i+2 on.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from answers import generate
from data import read_jsonl
from drafter import Eagle3
from mtp import MTP
from rows import Sequence
from target import Llama, LlamaConfig
from tokenizer import generation_prompt

ANSWER_TOKENS = 128
NAMES = ("eagle3", "eagle3.1", "mtp")
Drafter = Eagle3 | MTP


@dataclass(frozen=True)
class Measured:
    acceptance_length: float  # accepted drafts a round, free-running
    conditional: list[float]  # P(draft k accepted | k-1 accepted), free-running
    agreement: list[float]  # argmax equals the target's, teacher-forced
    rms: list[float]  # of the fed-back state, teacher-forced

    def __str__(self) -> str:
        def listed(values: list[float]) -> str:
            return " ".join(f"{value:.3f}" for value in values)

        return (
            f"acceptance_length {self.acceptance_length:.3f}"
            f"\n    conditional {listed(self.conditional)}"
            f"\n    agreement   {listed(self.agreement)}"
            f"\n    rms         {listed(self.rms)}"
        )


def heldout_answers(
    target: Llama, tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> dict[str, list[Sequence]]:
    """The target's greedy answers to the held-out questions, by split."""
    prompts = [generation_prompt(tokenizer, record["messages"]) for record in records]
    answers = generate(target, tokenizer, prompts, [0.0] * len(prompts), ANSWER_TOKENS)
    by_split: dict[str, list[Sequence]] = {}
    for record, answer in zip(records, answers, strict=True):
        by_split.setdefault(record["split"], []).append(answer)
    return by_split


def ahead(ids: Tensor, by: int) -> Tensor:
    """Row i of the result is token i + `by`; the last rows wrap around and are never counted."""
    return ids.roll(-by)


def count_rounds(matches: list[list[bool]], first: int) -> tuple[int, list[int], list[int]]:
    """Rounds, and how often draft k was reached and accepted; `matches[row]` is row's chain.

    Row r predicts token r+2, so the last two rows have nothing to predict.
    """
    length, steps = len(matches), len(matches[0])
    reached, accepted = [0] * steps, [0] * steps
    row, rounds = first, 0
    while row < length - 2:
        rounds, taken = rounds + 1, 0
        while taken < min(steps, length - 2 - row):
            reached[taken] += 1
            if not matches[row][taken]:
                break
            accepted[taken] += 1
            taken += 1
        row += taken + 1  # the target's own token ends the round
    return rounds, reached, accepted


@torch.no_grad()
def measure(drafter: Drafter, target: Llama, answers: list[Sequence], steps: int) -> Measured:
    """`answers` are the target's greedy ones, each after its prompt."""
    embed = target.model.embed_tokens
    rounds, reached, accepted = 0, torch.zeros(steps), torch.zeros(steps)
    rows, hits, squares = torch.zeros(steps), torch.zeros(steps), torch.zeros(steps)

    def choose(normed: Tensor) -> Tensor:
        return drafter.choose(target, normed[0])

    for token_ids, said in answers:
        ids = torch.tensor(token_ids)
        start = drafter.read(target, target.hidden_states(ids[None]))
        first = said.index(True) - 1  # the row that reads the target's first token

        def forced(step: int, normed: Tensor | None, ids: Tensor = ids) -> Tensor:
            return embed(ahead(ids, step + 1))[None]

        def own(step: int, normed: Tensor | None, ids: Tensor = ids) -> Tensor:
            return embed(ahead(ids, 1) if normed is None else choose(normed))[None]

        for step, (normed, state) in enumerate(drafter.unroll(start, forced, steps)):
            valid = slice(first, len(ids) - 2 - step)  # rows whose predicted token exists
            rows[step] += len(ids[valid])
            hits[step] += (choose(normed) == ahead(ids, step + 2))[valid].sum()
            squares[step] += state[0, valid].square().mean(-1).sum()

        chains = [choose(normed) for normed, _ in drafter.unroll(start, own, steps)]
        matches = torch.stack(
            [drafts == ahead(ids, step + 2) for step, drafts in enumerate(chains)], dim=-1
        )
        counts = count_rounds(matches.tolist(), first)
        rounds += counts[0]
        reached += torch.tensor(counts[1])
        accepted += torch.tensor(counts[2])
    return Measured(
        acceptance_length=accepted.sum().item() / rounds,
        conditional=(accepted / reached.clamp(min=1)).tolist(),
        agreement=(hits / rows.clamp(min=1)).tolist(),
        rms=(squares / rows.clamp(min=1)).sqrt().tolist(),
    )


def load_drafter(folder: Path, config: LlamaConfig) -> Drafter:
    stored = json.loads((folder / "config.json").read_text())
    is_mtp = stored.get("speculators_model_type") == "mtp"
    return MTP.load(folder, config) if is_mtp else Eagle3.load(folder, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("drafters", type=Path, nargs="*", help="default: all of pair/")
    parser.add_argument("--target", type=Path, default=Path("pair/target-dequantized"))
    parser.add_argument("--heldout", type=Path, default=Path(__file__).with_name("heldout.jsonl"))
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    target = Llama.load(args.target)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    by_split = heldout_answers(target, tokenizer, read_jsonl(args.heldout))
    by_split["all"] = [answer for answers in by_split.values() for answer in answers]
    for folder in args.drafters or [Path("pair") / name for name in NAMES]:
        drafter = load_drafter(folder, target.config)
        for steps in args.draft_tokens:
            for split, answers in by_split.items():
                measured = measure(drafter, target, answers, steps)
                print(f"{folder.name}, K={steps}, {split}: {measured}", flush=True)


if __name__ == "__main__":
    main()
