"""The drafter's arithmetic: against an independent PyTorch writing and its own decoding."""

from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from cases import Case, load_cases, random_case, random_config

from mlx_drift.drafters.cache import ChainCache
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.config import config_from_dict
from mlx_drift.drafters.load import load_network

CASES = {case.name: case for case in load_cases()}
SAME_NAME = """
    taps fc_norm norm_before_fc norm_before_residual hidden_size intermediate_size
    num_attention_heads num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling
    partial_rotary_factor sliding_window attention_bias qk_norm gated_attention draft_vocab_size
""".split()


def drafter_of(case: Case) -> ChainDrafter:
    """The package's drafter with a case's weights."""
    source = case.config
    other_width = source["hidden_size"] != source["target_hidden_size"]
    config = config_from_dict(
        {key: source[key] for key in SAME_NAME}
        | {
            "drafter_type": "eagle3",
            "format_version": 1,
            "feedback": "post" if source["norm_output"] else "pre",
            "num_layers": source["num_hidden_layers"],
            "max_position_embeddings": 64,
            "own_embedding": other_width,
            "attention_output_bias": source["attention_bias"],
            "own_head": other_width or not source["tied"],
            "target": {
                "hidden_size": source["target_hidden_size"],
                "vocab_size": source["vocab_size"],
            },
        }
    )
    weights = {name: mx.array(value) for name, value in case.weights.items() if name != "d2t"}
    embed, head = mx.array(case.embed), mx.array(case.target_head)
    if other_width:  # then the target's rows are of no use
        weights["embed_tokens.weight"] = embed
        weights.setdefault("lm_head.weight", head)
    network = load_network(config, weights, Path(case.name))
    target = SimpleNamespace(
        model=None,
        embed=lambda ids: embed[ids],
        head=lambda states: states @ head.T,
        shape=config.target,
    )
    return ChainDrafter(config, network, target, None)


def assert_equals_pytorch(case: Case, logits: np.ndarray, states: np.ndarray) -> None:
    steps, rows, _ = logits.shape
    valid = np.arange(steps)[:, None] + np.arange(rows)[None] < rows
    ours = drafter_of(case).train_time_test(mx.array(case.tokens), mx.array(case.taps), steps)
    for got, expected in zip(ours, (logits, states), strict=True):
        np.testing.assert_allclose(np.array(got)[valid], expected[valid], rtol=0, atol=1e-4)


def run_pytorch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    import torch
    from make_references import run_case

    return run_case(case, 4, torch.float32)


def test_every_combination_of_the_norm_switches_is_there():
    switches = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output", "tied")
    combinations = {tuple(c.config[s] for s in switches) for c in CASES.values()}
    assert len(combinations) == 2 ** len(switches)


@pytest.mark.parametrize("name", CASES)
def test_equals_committed_pytorch_reference(name):
    case = CASES[name]
    assert_equals_pytorch(case, case.logits, case.states)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_equals_live_pytorch(name):
    fresh = random_case(f"live/{name}", CASES[name].config, seed=7)
    assert_equals_pytorch(fresh, *run_pytorch(fresh))


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(20))
def test_equals_live_pytorch_for_random_configs(seed):
    case = random_case(f"live/{seed}", random_config(seed), seed)
    assert_equals_pytorch(case, *run_pytorch(case))


@pytest.mark.parametrize("name", CASES)
def test_equals_step_by_step_decoding(name):
    """Row i's chain, decoded with caches from the rows before it, is column i of the chain."""
    case = CASES[name]
    window = case.config["sliding_window"]
    steps = 4 if window is None else 1  # later steps: training anchors the window elsewhere
    drafter = drafter_of(case)
    tokens, taps = mx.array(case.tokens), mx.array(case.taps)
    logits, states = drafter.train_time_test(tokens, taps, steps)
    for row in range(taps.shape[0] - steps):
        caches = [ChainCache(window) for _ in drafter.network.layers]
        rows, hidden = tokens[1 : row + 2], drafter.network.fuse(taps[: row + 1])
        for step in range(steps):
            normed, state = drafter.network(drafter._embed(rows), hidden, caches)
            assert mx.abs(drafter._head(normed[-1]) - logits[step, row]).max().item() < 1e-5
            assert mx.abs(state[-1] - states[step, row]).max().item() < 1e-5
            rows, hidden = tokens[row + step + 2 : row + step + 3], state[-1:]


def test_decoding_window_moves_with_the_query():
    """Engines anchor the window at the query's position, also while chaining."""
    case = CASES["extra/window5"]
    drafter = drafter_of(case)
    tokens, taps = mx.array(case.tokens), mx.array(case.taps)
    hidden = mx.random.normal((1, case.config["hidden_size"]))

    def chained(first: int) -> mx.array:
        """One chain row after the committed rows from `first` on; RoPE is relative."""
        cache = drafter.make_cache()
        drafter.ingest(tokens[first + 1 :], taps[first:], cache)
        return drafter.network(drafter._embed(tokens[:1]), hidden, cache.layers)[0]

    visible = case.config["sliding_window"] - 1
    everything, enough, too_few = (
        chained(taps.shape[0] - n) for n in (taps.shape[0], visible, visible - 1)
    )
    assert mx.abs(everything - enough).max().item() < 1e-5
    assert mx.abs(everything - too_few).max().item() > 1e-3


@pytest.mark.parametrize("name", [n for n in CASES if not CASES[n].config["sliding_window"]])
def test_proposals_are_the_chain_of_the_last_row(name):
    """`propose` drafts greedily what `train_time_test` gives when its own drafts are forced."""
    drafter = drafter_of(CASES[name])
    tokens, taps = mx.array(CASES[name].tokens), mx.array(CASES[name].taps)
    rows, steps = taps.shape[0], 4
    cache = drafter.make_cache()
    drafter.ingest(tokens[1:8], taps[:7], cache)  # in two parts, as rounds do
    drafter.ingest(tokens[8:], taps[7:], cache)
    drafted = drafter.propose(steps, cache).tokens
    forced = mx.concatenate([tokens, drafted.astype(tokens.dtype)])
    chain = [logits[rows - 1] for logits, _ in drafter.train_time_test_steps(forced, taps, steps)]
    assert drafted.tolist() == [mx.argmax(logits).item() for logits in chain]


def test_a_chain_leaves_only_committed_rows():
    case = CASES["switches/none/reduced"]
    drafter = drafter_of(case)
    tokens, taps = mx.array(case.tokens), mx.array(case.taps)
    cache, reference = drafter.make_cache(), drafter.make_cache()
    drafter.ingest(tokens[1:8], taps[:7], cache)
    drafter.propose(5, cache)
    drafter.ingest(tokens[8:], taps[7:], cache)
    drafter.ingest(tokens[1:], taps, reference)
    for ours, theirs in zip(cache.layers, reference.layers, strict=True):
        assert ours.offset == theirs.offset == taps.shape[0]
        for a, b in zip(ours.rows.keys_and_values(), theirs.rows.keys_and_values(), strict=True):
            assert mx.abs(a - b).max().item() < 1e-5


def test_drafting_reads_nothing_back():
    """Inside `mx.compile` a host read raises: a round's only one is the loop's."""
    case = CASES["switches/none/reduced"]
    drafter = drafter_of(case)

    @mx.compile
    def draft(tokens, taps):
        cache = drafter.make_cache()
        drafter.ingest(tokens[1:], taps, cache)
        return drafter.propose(4, cache).tokens

    assert draft(mx.array(case.tokens), mx.array(case.taps)).size == 4
