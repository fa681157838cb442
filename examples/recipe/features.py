"""What the frozen target makes of a text, computed once for a whole training.

A drafter reads three of the target's residual streams, or its final state, and is compared with
what the target says next; neither changes while drafters are trained. In float16 that is 8 bytes a
token and unit of width (4.6 kB a token at 576), in files that are read row by row.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipe.drafter import tap_layers
from recipe.precision import products
from recipe.rows import Row, Text
from recipe.target import Llama


@torch.no_grad()
def read(target: Llama, ids: Tensor, said: Tensor) -> list[Row]:
    """Lets the target read rows of one length, `[B, L]`."""
    with products(target):
        streams = target.hidden_states(ids)
        final = target.model.norm(streams[-1])
        choice = target.head(final).max(-1).indices  # argmax takes six times as long in bfloat16
    taps = [streams[tap].float() for tap in tap_layers(target.config.num_hidden_layers)]
    return [
        Row(ids[i], said[i], choice[i], [tap[i : i + 1] for tap in taps], final[i].float())
        for i in range(len(ids))
    ]


def store(rows: Iterable[Row], path: Path) -> None:
    """Writes rows of any lengths into a file, which appears when it is whole."""
    rows = list(rows)
    tensors = {
        "lengths": torch.tensor([len(row.ids) for row in rows]),
        "ids": torch.cat([row.ids for row in rows]).int(),
        "said": torch.cat([row.said for row in rows]),
        "choice": torch.cat([row.choice for row in rows]).int(),
        "states": torch.cat(
            [torch.stack([*(tap[0] for tap in row.taps), row.final], 1).half() for row in rows]
        ),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


class Features(Sequence[Row]):
    """The rows of some files, in the order of the files; states are read when a row is."""

    def __init__(self, paths: Iterable[Path] = ()) -> None:
        self._files = []
        self._ends: list[int] = []  # rows up to the end of each file
        for path in paths:
            self.add(path)

    def add(self, path: Path) -> None:
        """Appends the rows of a file."""
        self._files.append(_File(path))
        self._ends.append(len(self) + len(self._files[-1].edges) - 1)

    def __len__(self) -> int:
        """How many rows there are."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices
        """Reads a row."""
        file = bisect_right(self._ends, index)
        return self._files[file].row(index - (self._ends[file - 1] if file else 0))

    def texts(self) -> Iterator[Text]:
        """All rows' tokens, without their states."""
        for file in self._files:
            for start, stop in zip(file.edges, file.edges[1:], strict=False):
                yield file.ids[start:stop].tolist(), file.said[start:stop].tolist()


class _File:
    def __init__(self, path: Path) -> None:
        self._opened = safe_open(path, framework="pt")
        self.ids, self.said, self.choice = (
            self._opened.get_tensor(name) for name in ("ids", "said", "choice")
        )
        self._states = self._opened.get_slice("states")
        self.edges = [0, *accumulate(self._opened.get_tensor("lengths").tolist())]

    def row(self, index: int) -> Row:
        span = slice(*self.edges[index : index + 2])
        *taps, final = self._states[span].float().unbind(1)
        return Row(
            self.ids[span].long(),
            self.said[span],
            self.choice[span].long(),
            [tap[None] for tap in taps],
            final,
        )


def endless(rows: Sequence[Row], seed: int, start: int = 0) -> Iterator[Row]:
    """All rows without end from number `start` on, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for index in order[start:]:
            yield rows[index]
        start = max(0, start - len(order))


def draft_vocabulary(texts: Iterable[Text], size: int, vocab_size: int) -> Tensor:
    """The ids that the target says most often, ascending."""
    spoken = [i for ids, mask in texts for i, said in zip(ids, mask, strict=True) if said]
    counts = torch.bincount(torch.tensor(spoken), minlength=vocab_size)
    # Stable: among equally rare tokens the lower id (the earlier BPE merge) wins.
    return counts.argsort(descending=True, stable=True)[:size].sort().values
