"""Logits processors with a state of their own, for a vocabulary of five letters and an end."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from mlx_drift import stream_generate
from tiny import NoText, tiny_llama

SIZE, EOS = 6, 5  # of the vocabulary; five letters, and what ends a text
PROMPT = [3, 1, 4, 1, 2]
COUNT = 48


class Stateful:
    """Sees every committed position once, in order, and says what may come there.

    Attributes:
        seen: How many tokens there were at each call.
        strict: Raise at a token that was not allowed, or after the last: no text of a plain loop,
            but for the step that it is ahead.
    """

    def __init__(self, strict=False):
        self.strict = strict
        self.seen = []
        self.may_come = [True] * SIZE

    def __call__(self, tokens, logits):
        if self.seen:
            last = tokens[-1].item()
            assert not self.strict or (self.may_come[last] and last != EOS)
            self.advance(last)
        self.seen.append(tokens.size)
        self.may_come = self.allowed()
        return mx.where(mx.array(self.may_come), logits, -mx.inf)


class Counter(Stateful):
    """Every third token is the first letter, and no other is."""

    def advance(self, token):
        pass

    def allowed(self):
        third = len(self.seen) % 3 == 0
        return [(token == 0) == third for token in range(SIZE)]


class Automaton(Stateful):
    """What may come hangs on the tokens before by a table; it forks by itself."""

    state = 0

    def fork(self):
        other = Automaton(self.strict)
        other.seen, other.may_come, other.state = self.seen[:], self.may_come, self.state
        return other

    def advance(self, token):
        self.state = (2 * self.state + token) % 4

    def allowed(self):
        return [(self.state + token) % 3 != 0 for token in range(SIZE)]


class Budget(Stateful):
    """Four tokens of thought after a 1, at most: then comes a 2, and no end before it."""

    thought = None

    def advance(self, token):
        if token == 1 and self.thought is None:
            self.thought = 0
        elif token == 2:
            self.thought = None
        elif self.thought is not None:
            self.thought += 1

    def allowed(self):
        if self.thought is None:
            return [token != EOS for token in range(SIZE)]
        return [token == 2 if self.thought == 4 else token != EOS for token in range(SIZE)]


class Letters:
    """The vocabulary, as llguidance asks for it."""

    eos_token_id, bos_token_id, special_token_ids = EOS, None, (EOS,)
    tokens = (b"a", b"b", b"c", b"d", b"e", b"<eos>")

    def __call__(self, text):
        return [self.tokens.index(letter.encode()) for letter in text]


@cache
def grammar():
    llguidance = pytest.importorskip("llguidance")  # of the dev extra
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Letters()))
    rule = llguidance.LLMatcher.grammar_from_regex("(a[bc]?[de]+|[bd]c(ab)*){1,12}")
    return llguidance.LLMatcher(tokenizer, rule)


class Grammar(Stateful):
    """llguidance's matcher, which cannot be pickled but has a `deep_copy`."""

    def __init__(self, strict=False):
        super().__init__(strict)
        self.matcher = grammar().deep_copy()

    def advance(self, token):
        assert self.matcher.consume_token(token)

    def allowed(self):
        mask = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        assert not self.matcher.is_error(), self.matcher.get_error()
        return np.unpackbits(mask, bitorder="little")[:SIZE].astype(bool).tolist()


class Believed(Counter):
    """Marked for what it is not."""

    stateless = True


class Text(NoText):
    eos_token_ids = frozenset([EOS])


def small_llama(**overrides):
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(vocab_size=SIZE, **sizes | overrides)


def plain(model, prompt, *processors, count=COUNT, **keywords):
    """What mlx-lm's plain loop gives."""
    steps = generate_step(
        mx.array(prompt), model, max_tokens=count, logits_processors=list(processors), **keywords
    )
    tokens = [int(token) for token, _ in steps]
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def say(model, drafter, k, *processors, prompt=PROMPT, count=COUNT, tree=None, **keywords):
    """What drafts of k say, or of a tree of so many rows."""
    return list(
        stream_generate(
            model,
            Text(),
            prompt,
            count,
            drafter=drafter,
            num_draft_tokens=k if tree is None else None,
            tree=tree,
            logits_processors=processors,
            **keywords,
        )
    )


def tokens_of(responses):
    return [response.token for response in responses]


def positions(count, prompt=PROMPT):
    return list(range(len(prompt), len(prompt) + count))
