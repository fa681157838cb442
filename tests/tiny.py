"""Tiny targets with random weights, and a drafter that is right as often as it is told to be."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import Eagle3Config
from mlx_drift.drafters.eagle3 import Eagle3Network
from mlx_drift.drafters.protocol import Draft
from mlx_drift.target.model import Target

VOCAB = 64
LAYERS = 4
HIDDEN = 32


def tiny_llama(dtype: mx.Dtype = mx.float32, bits: int | None = None, **overrides) -> nn.Module:
    """A Llama whose greedy text does not settle into a loop at once."""
    mx.random.seed(3)
    arguments = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    model = llama.Model(llama.ModelArgs(**arguments | overrides))
    model.apply(lambda weight: mx.random.normal(weight.shape) * (0.3 if weight.ndim > 1 else 1.0))
    model.set_dtype(dtype)
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


class NoText(TokenizerWrapper):
    """A tokenizer for token ids without a text: nothing ends a generation but its length."""

    eos_token_ids = frozenset()
    bos_token = None
    last_segment = ""

    def __init__(self):
        pass

    @property
    def detokenizer(self):
        return self

    def add_token(self, token):
        pass

    def finalize(self):
        pass


def plain_greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """What mlx-lm generates."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def tiny_drafter(model: nn.Module, **overrides) -> ChainDrafter:
    """A random EAGLE-3.1 drafter for any target."""
    shape = Target(model).shape
    arguments = {
        "taps": (1, shape.num_layers),
        "hidden_size": shape.hidden_size,
        "intermediate_size": 64,
        "num_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "target": shape,
        "feedback": "post",
        "fc_norm": True,
        "norm_before_fc": False,
        "norm_before_residual": True,
        "draft_vocab_size": shape.vocab_size,
        "own_head": False,
    }
    config = Eagle3Config(**arguments | overrides)
    mx.random.seed(5)
    network = Eagle3Network(config)
    mx.eval(network.parameters())
    return ChainDrafter(config, network, Target(model, config.taps))


@dataclass
class OracleCache:
    """Counts ingested rows and keeps them."""

    tokens: list[int] = field(default_factory=list)
    taps: list[mx.array] = field(default_factory=list)

    @property
    def state(self) -> list[mx.array]:
        return self.taps


class Oracle:
    """Drafts the target's true continuation, spoilt where `spoil` says so.

    Args:
        text: Prompt and true continuation.
        spoil: For each round, the draft positions to get wrong.
        taps: What it asks the target for.
    """

    def __init__(self, text: list[int], spoil: list[set[int]], taps: tuple[int, ...] = (1, 3)):
        self.text = text
        self.spoil = spoil
        self.taps = taps
        self.rounds = 0

    def make_cache(self) -> OracleCache:
        return OracleCache(tokens=self.text[:1])

    def start(self, token: mx.array, cache: OracleCache) -> None:
        assert token.tolist() == cache.tokens

    def ingest(self, tokens: mx.array, taps: mx.array, cache: OracleCache) -> None:
        assert taps.shape == (tokens.size, len(self.taps), HIDDEN)
        cache.tokens += tokens.tolist()
        cache.taps.append(taps)

    def propose(self, k: int, cache: OracleCache, chooser=None) -> Draft:
        start = len(cache.tokens)
        right = (self.text[start : start + k] + [0] * k)[:k]
        spoilt = self.spoil[self.rounds % len(self.spoil)]
        self.rounds += 1
        tokens = [(t + 1) % VOCAB if i in spoilt else t for i, t in enumerate(right)]
        return Draft(mx.array(tokens, dtype=mx.int32))


class Scripted(DraftLength):
    """Drafts as many tokens as a script says, over and over; 0 for plain decoding.

    A stretch of that asks after every token whether it is to go on, and then the loop asks again.
    """

    def __init__(self, script: Iterable[int]):
        super().__init__()
        self.script = itertools.cycle(script)

    def choose(self, pending: int = 0) -> int:
        return next(self.script)


class Letters(NoText):
    """A tokenizer of the alphabet's letters, which is all it needs to ask the tiny target."""

    has_chat_template = False
    bos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(letter) % 60 for letter in text]

    def decode(self, tokens):
        return "".join(chr(60 + token) for token in tokens)


class KnowingCache(OracleCache):
    nbytes = 0
    seed = ()


class Knowing(Oracle):
    """Knows how the target goes on after any text, but for what is spoilt: the same every time."""

    def __init__(self, model, spoil):
        super().__init__([], spoil)
        self.model = model
        self.network = nn.Module()

    def make_cache(self):
        self.rounds = 0
        return KnowingCache()

    def start(self, token, cache):
        cache.tokens = token.tolist()

    def propose(self, k, cache, chooser=None):
        self.text = cache.tokens + plain_greedy(self.model, cache.tokens, k)
        return super().propose(k, cache, chooser)
