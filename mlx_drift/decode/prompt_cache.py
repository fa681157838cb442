"""What a conversation keeps from turn to turn: tokens, and the caches of target and drafter.

Notable:
- The prompt of every turn is the whole conversation. What the caches hold of it is kept: they go
  back to where the prompt leaves the tokens they have seen, as far as they can, else to a snapshot
  of a turn's start or end, else to the beginning (`PromptCache.reuse` says which).
- Between turns the invariant of the rounds holds: the target has a row for every token but the
  last, the drafter one for every token but the first. So no tap is left pending: the last token is
  fed with what follows it, and brings its own.
- One thread at a time: every step on the caches holds their lock, and whoever finds it held is
  told. Between steps another prompt may take over; the answer under way is told at its next step.
"""

import copy
import warnings
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.decode.plain import time_plain_steps
from mlx_drift.decode.snapshots import Snapshots
from mlx_drift.decode.speculate import Cut, Progress, every, prefill
from mlx_drift.decode.text import Round, Settle
from mlx_drift.drafters.protocol import Drafter, DrafterCache
from mlx_drift.errors import DriftError, DriftWarning
from mlx_drift.target.caches import KVQuantization, TargetCache
from mlx_drift.target.model import Target

Reuse = Literal["nothing", "extended", "trimmed", "snapshot", "started over"]
"""How a prompt found the caches: empty; ending where it goes on; holding rows past the point where
it branches off, which were trimmed, or left for a snapshot, or could not be left but by starting
over."""

IN_USE = "the prompt cache is in use by another thread; make one for each conversation, or fork it"
MEANWHILE = (
    "the prompt cache was finished or used for another prompt meanwhile, so this answer cannot go "
    "on; make a prompt cache for each conversation"
)


class PromptCache:
    """What one conversation has in the caches. Make it with `make_prompt_cache`.

    Attributes:
        tokens: The tokens that the caches have seen.
        reuse: How the last prompt found the caches.
        reused: How many of its tokens need not be fed.
        whole: Nothing was interrupted while they changed.
        draft_length: What `num_draft_tokens="auto"` learned in this conversation.
        single_use: It is given up after one answer, so nothing is made ready for another.
        first_prompt: How many tokens its first prompt had.
        target_cache: The target's, with a row for every token but the last.
        drafter_cache: The drafter's, with a row for every token but the first.
    """

    def __init__(
        self,
        model: nn.Module,
        drafter: Drafter,
        *,
        max_kv_size: int | None,
        quantization: KVQuantization | None,
        max_snapshots: int,
    ):
        self.model = model
        self.drafter = drafter
        self.max_kv_size = max_kv_size
        self.quantization = quantization
        self.target = Target(model, drafter.taps)
        self.reuse: Reuse = "nothing"
        self.reused = 0
        self.whole = True
        self.draft_length: DraftLength | None = None
        self.single_use = False
        self.first_prompt = 0
        self.tokens: list[int] = []
        self._snapshots = Snapshots(max_snapshots)
        self._settle: Settle | None = None
        self._under_way: Generator[Round] | None = None
        self._prompts = 0
        self._lock = Lock()
        self._told = False  # that a prompt began the conversation anew
        self.target_cache, self.drafter_cache = self._make_caches()

    @property
    def nbytes(self) -> int:
        """The bytes of the caches and the snapshots."""
        return self.target_cache.nbytes + self.drafter_cache.nbytes + self._snapshots.nbytes

    @property
    def max_snapshots(self) -> int:
        """How many snapshots of turns are kept."""
        return self._snapshots.most

    @property
    def is_ahead(self) -> bool:
        """Whether a stretch of plain decoding is under way.

        The target has begun the next step, and the drafter has yet to see the last tokens.
        """
        return self._settle is not None

    def fork(self) -> "PromptCache":
        """Copies the conversation, to go on from here in two ways; `copy.deepcopy` is the same.

        Neither sees what is fed to the other. An answer under way goes on in this one; in the copy
        it ended with the tokens so far. Model, drafter and snapshots are shared, and so is what the
        caches hold, until one of the two is fed: that one then copies it.

        Raises:
            DriftError: If another thread is in the middle of a step.
        """
        with self.alone():
            mx.eval(self.target_cache.state, self.drafter_cache.state)
            other = PromptCache.__new__(PromptCache)
            vars(other).update(vars(self))
            other.tokens, other._snapshots = list(self.tokens), self._snapshots.fork()
            other.draft_length = copy.deepcopy(self.draft_length)
            other.target_cache = self.target_cache.fork()
            other.drafter_cache = self.drafter_cache.fork()
            other._under_way = other._settle = None
            other._lock, other._told = Lock(), True
            if self._settle is not None:
                self._settle(other.target_cache, other.drafter_cache)
                mx.eval(other.target_cache.state, other.drafter_cache.state)
        return other

    def __copy__(self) -> "PromptCache":
        """Forks."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "PromptCache":
        """Forks."""
        return self.fork()

    def read(self, prompt: list[int], *, step_size: int, progress: Progress) -> int:
        """Brings the caches to the last token of a prompt, feeding what they do not hold of it.

        Args:
            prompt: Token ids of the whole conversation.
            step_size: Tokens a chunk.
            progress: Told after each chunk.

        Returns:
            How many tokens need not be fed again.

        Raises:
            DriftError: If `step_size` is less than 1.
        """
        for done in self.reading(prompt, cut=every(step_size)):
            progress(done, len(prompt))
        return self.reused

    def begin(self) -> int:
        """Ends the answer under way, if there is one, and begins another; returns its number."""
        with self.alone():
            self._finish()
            self._prompts += 1
            return self._prompts

    def reading(
        self, prompt: list[int], *, cut: Cut, marks: Collection[int] = (), number: int | None = None
    ) -> Iterator[int]:
        """Reads a prompt as `read` does, chunk by chunk.

        Between chunks the caches are as between rounds: they may be forked, or the rest given up.

        Args:
            prompt: Token ids of the whole conversation.
            cut: Says where a chunk ends.
            marks: Numbers of tokens after which another prompt may branch off; they may grow. Where
                trimming would not bring them back, a snapshot of each is taken, and kept while
                others go.
            number: What `begin` returned; None to begin here.

        Yields:
            How many tokens have been fed or need not be: before the first chunk and after each.

        Raises:
            DriftError: If another prompt was read since, or another thread is in a step.
        """
        number = self.begin() if number is None else number
        was_whole = self.whole
        with self.under_way(number):
            self._go_back(prompt, was_whole)
            self.first_prompt = self.first_prompt or len(prompt)
        self.reused = max(0, len(self.tokens) - 1)

        def cut_at_marks(start: int) -> int:
            return min([cut(start), *(mark - 1 for mark in marks if mark - 1 > start)])

        chunks = prefill(
            self.target,
            self.drafter,
            mx.array(prompt, dtype=mx.int32),
            self.target_cache,
            self.drafter_cache,
            cut=cut_at_marks,
            done=self.reused,
        )
        done: int | None = 0
        while done is not None:
            with self.under_way(number):
                done = next(chunks, None)
                if done is not None:
                    self.tokens = prompt[: done + 1]
                if done is None or done + 1 in marks:
                    self._remember(keep=done is not None)
            if done is not None:
                yield done

    def reach(self, shared: int) -> int:
        """Tells how many tokens would stay for a prompt whose first `shared` tokens are its own."""
        if self.whole and shared == len(self.tokens) > 1:
            return shared
        caches = self.target_cache, self.drafter_cache
        if shared > 1 and all(cache.can_rewind(shared - 1) for cache in caches):
            return shared
        return self._snapshots.reach(shared)

    def follow(self, rounds: Generator[Round], number: int) -> Iterator[Round]:
        """Passes the rounds of the answer of that number on, and keeps their tokens.

        Raises:
            DriftError: If it was ended meanwhile, or another thread is in a step.
        """
        is_last = False
        try:
            while not is_last:
                with self.under_way(number):
                    self._under_way = rounds
                    round = next(rounds)
                    self.tokens += round.tokens
                    self._settle = round.settle
                    if is_last := round.is_last:  # nobody comes in between
                        self._finish()
                yield round
        finally:
            # Where another thread is in a step, that of a fork say, the next one to use it ends it.
            if self._lock.acquire(blocking=False):
                try:
                    if self._prompts == number:
                        self._finish()
                finally:
                    self._lock.release()

    def finish(self) -> None:
        """Ends the answer under way, if there is one: takes back what is ahead of its tokens.

        Whoever asks for more of that answer is told so.

        Raises:
            DriftError: If another thread is in the middle of a step.
        """
        self.begin()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps other threads out, without waiting for them.

        Raises:
            DriftError: If another thread is in the middle of a step.
        """
        if not self._lock.acquire(blocking=False):
            raise DriftError(IN_USE)
        try:
            yield
        finally:
            self._lock.release()

    def _finish(self) -> None:
        rounds, self._under_way = self._under_way, None
        if rounds is not None:
            was_whole, self.whole, self._settle = self.whole, False, None
            rounds.close()  # which may fail half-way
            self.whole = was_whole
            self._compute()

    def _compute(self) -> None:
        """Computes what is still lazy, which belongs to this thread, for whoever comes next."""
        if not self.single_use:
            mx.async_eval(self.target_cache.state, self.drafter_cache.state)

    def time_plain(self, last: int, number: int) -> float | None:
        """Times plain steps after an answer; None if the caches have gone on to another prompt.

        Args:
            last: The answer's last token.
            number: The answer's.

        Returns:
            Seconds of one.
        """
        try:
            with self.under_way(number):
                return time_plain_steps(self.target, mx.array([last]), self.target_cache)
        except DriftError:
            return None

    @contextmanager
    def under_way(self, number: int | None = None) -> Iterator[None]:
        """Marks that the caches change, by this thread; interrupted, they are not whole.

        Raises:
            DriftError: If another thread is in the middle of a step, or another answer than that
                of the number was begun.
        """
        with self.alone():
            if number not in (None, self._prompts):
                raise DriftError(MEANWHILE)
            self.whole = False
            yield
            self.whole = True

    def _go_back(self, prompt: Sequence[int], whole: bool) -> None:
        """Keeps what the caches hold of a prompt, token ids, and forgets the rest."""
        pairs = zip(self.tokens, prompt, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        shared = min(len(self.tokens), len(prompt)) if shared is None else shared
        self._tell_if_begun_anew(shared)
        # A prompt that is held whole has no row left to be fed, which would bring the first draft.
        # As what is drawn depends on the drafts, it must be there as it would be anew.
        is_seeded = shared < len(prompt) or self.drafter_cache.seed is not None
        if whole and is_seeded and shared == len(self.tokens) > 1:
            self.reuse = "extended"
            self._remember()
        elif (trimmed := min(shared, len(prompt) - 1)) > 1 and self._rewind(trimmed - 1):
            self.reuse, shared = "trimmed", trimmed
        elif restored := self._snapshots.restore(shared, self.target_cache, self.drafter_cache):
            self.reuse, shared = "snapshot", restored
        else:
            self.reuse, shared = "started over" if self.tokens else "nothing", 0
            self.target_cache, self.drafter_cache = self._make_caches()
        self.tokens = list(prompt[:shared])
        self._snapshots.forget(shared)

    def _tell_if_begun_anew(self, shared: int) -> None:
        """Warns, once, if a prompt leaves the conversation within its very first prompt."""
        if self._told or len(self.tokens) <= self.first_prompt or shared >= self.first_prompt:
            return
        self._told = True
        warnings.warn(
            f"this prompt shares only its first {shared} tokens with the conversation in the "
            "prompt cache, which is forgotten from there on: here a prompt is the whole "
            "conversation, not the new turn alone. For another conversation make another prompt "
            "cache, or fork one",
            DriftWarning,
            stacklevel=2,
        )

    def _remember(self, keep: bool = False) -> None:
        self._snapshots.take(len(self.tokens), self.target_cache, self.drafter_cache, keep)

    def _make_caches(self) -> tuple[TargetCache, DrafterCache]:
        target_cache = self.target.make_cache(
            max_kv_size=self.max_kv_size, quantization=self.quantization
        )
        return target_cache, self.drafter.make_cache()

    def _rewind(self, rows: int) -> bool:
        caches = self.target_cache, self.drafter_cache
        return all(c.can_rewind(rows) for c in caches) and all(c.rewind(rows) for c in caches)


def check_snapshots(max_snapshots: int) -> None:
    """Checks how many snapshots are to be kept.

    Raises:
        DriftError: If that is no number of them.
    """
    if max_snapshots < 0:
        raise DriftError(f"max_snapshots is {max_snapshots}; expected at least 0")


def make_prompt_cache(
    model: nn.Module,
    drafter: Drafter,
    *,
    max_kv_size: int | None = None,
    kv_bits: int | None = None,
    kv_group_size: int = KVQuantization.group_size,
    quantized_kv_start: int = KVQuantization.start,
    max_snapshots: int = 4,
) -> PromptCache:
    """Makes an empty prompt cache for one conversation, to give to `stream_generate` at each turn.

    Args:
        model: The target, as `mlx_lm.load` returns it.
        drafter: A drafter loaded for it.
        max_kv_size: As in mlx-lm: rows to keep at most, the first four and the last ones.
        kv_bits: As in mlx-lm: bits of quantized keys and values; None for none.
        kv_group_size: As in mlx-lm.
        quantized_kv_start: As in mlx-lm: from how many rows on they are quantized.
        max_snapshots: How many starts and ends of turns can be gone back to where rows cannot be
            trimmed: sliding windows past the wrap, recurrent states. The oldest are dropped.

    Raises:
        DriftError: If a number is out of range, the target's caches cannot take rows back, or
            mlx-lm cannot quantize them.
    """
    check_snapshots(max_snapshots)
    quantization = None
    if kv_bits is not None:
        quantization = KVQuantization(kv_bits, kv_group_size, quantized_kv_start)
    return PromptCache(
        model,
        drafter,
        max_kv_size=max_kv_size,
        quantization=quantization,
        max_snapshots=max_snapshots,
    )
