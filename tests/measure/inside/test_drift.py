"""Attention drift: what is captured, how it is split and averaged, interventions, the command."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from dialects import HIDDEN as HEAD_HIDDEN
from dialects import LAYERS, eagle, eagle_head
from mlx_drift import DriftError, convert_drafter, load_demo, load_drafter, stream_generate
from mlx_drift.demo import CHAINS, DEMO
from mlx_drift.drafters.load import load_converted
from mlx_drift.drafters.prompt_lookup import PromptLookupDrafter
from mlx_drift.measure.inside.drift import Settings, drift
from mlx_drift.measure.inside.figures import figures_of
from mlx_drift.measure.inside.intervene import intervention
from mlx_drift.target.model import Target, TargetShape
from mlx_drift.watch.around import Around, root_mean_square
from mlx_drift.watch.observe import Chain, Observed, Step
from mlx_drift.watch.sums import CLASSES, Split, Sums, add_up
from tiny import HIDDEN, VOCAB, NoText, tiny_drafter, tiny_llama

ROWS, DRAFTS = 12, 5
PROMPTS = [[5, 9, 2, 44, 17, 3, 60, 11], [25, 8, 30]]


def lively_drafter(**overrides):
    """A drafter whose attention is far from even."""
    drafter = tiny_drafter(tiny_llama(), **overrides)
    mx.random.seed(11)
    weights = drafter.network.parameters()
    drafter.network.update(
        tree_map(lambda w: mx.random.normal(w.shape) * (0.3 if w.ndim > 1 else 1.0), weights)
    )
    mx.eval(drafter.network.parameters())
    return drafter


def conversation(rows=ROWS):
    mx.random.seed(2)
    return mx.random.randint(0, VOCAB, (rows + 1,)), mx.random.normal((rows, 2, HIDDEN))


class Fed(Around):
    """Keeps what a network is fed."""

    def __init__(self, inner):
        super().__init__(inner)
        self._fed = []

    def __call__(self, embedding, hidden, caches):
        self._fed.append((embedding, hidden))
        return self.inner(embedding, hidden, caches)

    def rows(self):
        """All embeddings and hidden states, `[n, H]` each."""
        return [np.array(mx.concatenate(list(part)), np.float64) for part in zip(*self._fed)]  # noqa: B905


def watch(drafter, rows=1000):
    """A watched drafter, what sees it, and what feeds it."""
    fed = Fed(drafter.network)
    seen = Observed(fed, rows)
    return drafter.through(seen), seen, fed


def decode(drafter):
    """Two blocks of committed rows, and a chain behind the second."""
    tokens, taps = conversation()
    cache = drafter.make_cache()
    drafter.ingest(tokens[1:8], taps[:7], cache)
    drafter.ingest(tokens[8:], taps[7:], cache)
    return drafter.propose(DRAFTS, cache).tokens.tolist()


# What is captured is attention


def numpy_attention(drafter, embedding, hidden, positions, visible):
    """All queries times all keys of the first layer, `[heads, n, n]`, written out."""
    layer, config = drafter.network.layers[0], drafter.config

    def norm(x, module):
        scale = np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps)
        return x / scale * np.array(module.weight, np.float64)

    def rotated(x):
        frequencies = config.rope_theta ** (-np.arange(0, 8, 2) / 8)
        angles = np.array(positions)[:, None, None] * frequencies
        a, b = x[..., :4], x[..., 4:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    both = np.concatenate(
        [norm(embedding, layer.input_layernorm), norm(hidden, layer.hidden_norm)], -1
    )
    attention = layer.self_attn
    queries, keys = (
        (both @ np.array(m.weight, np.float64).T).reshape(len(both), -1, 8)
        for m in (attention.q_proj, attention.k_proj)
    )
    if config.qk_norm:
        queries, keys = norm(queries, attention.q_norm), norm(keys, attention.k_norm)
    queries, keys = rotated(queries), np.repeat(rotated(keys), 2, axis=1)
    scores = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(8)
    weights = np.where(visible, np.exp(scores), 0.0)
    return weights / weights.sum(-1, keepdims=True)


def torch_attention(drafter, embedding, hidden, positions, visible):
    """The same by PyTorch, with the parts of the reference drafter."""
    import torch
    from eagle3_torch import apply_rope, rms_norm, rope_frequencies

    def tensor(x):
        return torch.tensor(np.array(x, np.float64))

    layer, config = drafter.network.layers[0], drafter.config
    eps, attention = config.rms_norm_eps, layer.self_attn
    frequencies = rope_frequencies(8, config.rope_theta, None)
    both = torch.cat(
        [
            rms_norm(tensor(embedding), tensor(layer.input_layernorm.weight), eps),
            rms_norm(tensor(hidden), tensor(layer.hidden_norm.weight), eps),
        ],
        dim=-1,
    )
    heads = []
    for name in ("q", "k"):
        x = (both @ tensor(attention[f"{name}_proj"].weight).T).reshape(len(both), -1, 8)
        if config.qk_norm:
            x = rms_norm(x, tensor(attention[f"{name}_norm"].weight), eps)
        heads.append(apply_rope(x, list(positions), frequencies))
    queries, keys = heads[0], heads[1].repeat_interleave(2, dim=1)
    scores = torch.einsum("qhd,khd->hqk", queries, keys) / 8**0.5
    scores = scores.masked_fill(~torch.tensor(visible), -torch.inf)
    return torch.softmax(scores, dim=-1).numpy()


NAIVE = [numpy_attention, pytest.param(torch_attention, marks=pytest.mark.torch)]
VARIANTS = [{}, {"qk_norm": True}, {"sliding_window": 5}, {"window": 4, "sinks": 2}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("naive", NAIVE)
def test_captured_attention_is_the_full_matrix(naive, variant):
    asked = {name: variant.get(name) for name in ("window", "sinks")}
    drafter = lively_drafter(**{k: v for k, v in variant.items() if k not in asked})
    if asked["window"]:
        drafter = drafter.windowed(**asked)
    watched, seen, fed = watch(drafter)
    decode(watched)
    (first,), second = seen.take(), seen.take_last()

    n = ROWS + DRAFTS - 1
    row, key = np.arange(n)[:, None], np.arange(n)[None]
    window = asked["window"] or variant.get("sliding_window") or n
    visible = (key <= row) & ((row - key < window) | (key < (asked["sinks"] or 0)))
    expected = naive(drafter, *fed.rows(), range(n), visible)
    found = [(slice(0, 7), first.steps[0]), (slice(7, ROWS), second.steps[0])]
    found += [(slice(ROWS + k, ROWS + k + 1), second.steps[k + 1]) for k in range(DRAFTS - 1)]
    for rows, step in found:
        (weights,) = step.weights
        weights = np.array(weights)
        np.testing.assert_allclose(weights, expected[:, rows, : rows.stop], rtol=0, atol=1e-5)
        assert np.abs(weights.sum(-1) - 1).max() < 1e-6


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=str)
@pytest.mark.parametrize("naive", NAIVE)
def test_teacher_forced_attention_is_the_full_matrix(naive, variant):
    drafter = lively_drafter(**variant)
    watched, seen, fed = watch(drafter)
    steps = 3
    watched.train_time_test(*conversation(), steps)
    chain = seen.take_last()

    step, i = np.divmod(np.arange(steps * ROWS), ROWS)
    window = variant.get("sliding_window") or ROWS
    first = (step == 0) & (i <= i[:, None]) & (i[:, None] - i < window)
    visible = first | ((step > 0) & (step <= step[:, None]) & (i == i[:, None]))
    expected = naive(drafter, *fed.rows(), step + i, visible)
    for s in range(steps):
        weights = np.array(chain.steps[s].weights[0])
        rows = expected[:, s * ROWS : (s + 1) * ROWS]
        own = np.stack([rows[:, np.arange(ROWS), j * ROWS + np.arange(ROWS)] for j in range(steps)])
        full = np.concatenate([rows[..., :ROWS], np.moveaxis(own[1 : s + 1], 0, -1)], axis=-1)
        np.testing.assert_allclose(weights, full, rtol=0, atol=1e-5)
        assert np.abs(weights.sum(-1) - 1).max() < 1e-6


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (4, 0), (4, 2)])
def test_watching_changes_nothing(window, sinks):
    drafter = lively_drafter().windowed(window, sinks)
    assert decode(watch(drafter, rows=3)[0]) == decode(drafter)
    chains = [d.train_time_test(*conversation(), 4) for d in (watch(drafter)[0], drafter)]
    assert all(mx.array_equal(a, b) for a, b in zip(*chains, strict=True))


@pytest.mark.parametrize("name", CHAINS)
def test_watching_changes_no_token_and_no_acceptance(name):
    model, tokenizer, drafter = load_demo(name)
    prompt = "Show me the source of `shlex.quote`."

    def answer(drafter):
        told = list(
            stream_generate(model, tokenizer, prompt, 24, drafter=drafter, num_draft_tokens=5)
        )
        counts = told[-1].statistics
        return [r.token for r in told], counts.rounds, counts.tested, counts.accepted

    watched, seen, _ = watch(drafter)
    plain = answer(drafter)
    assert answer(watched) == plain
    assert len(seen.take()) == plain[1]


# Classes


@pytest.mark.parametrize(
    ("split", "committed", "edges"),
    [
        (Split(prompt=5, sinks=1, recent=2), 8, [0, 1, 5, 6, 8]),
        (Split(prompt=5, sinks=2, recent=0), 8, [0, 2, 5, 8, 8]),
        (Split(prompt=5, sinks=1, recent=3), 5, [0, 1, 2, 2, 5]),  # recent before prompt
        (Split(prompt=5, sinks=1, recent=3), 6, [0, 1, 3, 3, 6]),
        (Split(prompt=0, sinks=1, recent=9), 3, [0, 1, 1, 1, 3]),  # the sink before all
        (Split(prompt=1, sinks=4, recent=2), 2, [0, 2, 2, 2, 2]),
    ],
)
def test_where_classes_begin(split, committed, edges):
    assert split.edges(committed) == edges


def test_masses_of_a_constructed_case():
    # sink, prompt, answer, recent, drafts
    weights = np.array([[0.5, 0.1, 0.1, 0.05, 0.1, 0.05, 0.05, 0.05]])
    masses = Split(prompt=3, sinks=1, recent=2).masses(weights, committed=6)
    np.testing.assert_allclose(masses, [[0.5, 0.2, 0.05, 0.15, 0.1]], atol=1e-12)


def one_chain():
    """A chain of two steps whose figures can be told by hand; two heads, three committed rows."""
    states = [mx.array([[0.0, 4.0]]), mx.array([[8.0, 0.0]])]
    even, sharp = [1 / 3] * 3, [1.0, 0.0, 0.0]
    later = [[0.25] * 4, [0.0, 0.0, 0.0, 1.0]]
    weights = [mx.array([even, sharp])[:, None], mx.array(later)[:, None]]
    return Chain(
        taps=mx.array([[[3.0, 4.0], [1.0, 1.0]]]),
        fused=mx.array([[3.0, 0.0]]),
        steps=[Step(s, [w]) for s, w in zip(states, weights, strict=True)],
    )


def test_figures_of_a_constructed_chain():
    split = Split(prompt=2, sinks=1, recent=1)
    sums = add_up(one_chain(), slice(-1, None), [3], split)
    root = np.sqrt(2)
    assert sums.chains == 1
    np.testing.assert_allclose(sums.taps, [5 / root, 1])
    np.testing.assert_allclose(sums.fused, 3 / root)
    np.testing.assert_allclose(sums.states[:, 0], [4 / root, 8 / root])
    np.testing.assert_allclose(sums.states[:, 1], [0, 0])
    np.testing.assert_allclose(sums.states[:, 2], [5 / 3, np.sqrt(80) / 4])
    np.testing.assert_allclose(sums.entropy, [[np.log(3), 0], [np.log(4), 0]], rtol=1e-6)
    third, quarter = 1 / 3, 1 / 4
    expected = [
        [[third, third, 0, third, 0], [1, 0, 0, 0, 0]],
        [[quarter, quarter, 0, quarter, quarter], [0, 0, 0, 0, 1]],
    ]
    np.testing.assert_allclose(sums.attention, expected, rtol=1e-6)

    other = Sums(3, sums.taps, 1.0, 3 * sums.states, sums.entropy, sums.attention)
    figures = figures_of([sums, other], layers=2)
    assert figures.chains == 4
    assert figures.rms[1].value == pytest.approx((8 + 24) / root / 4)
    assert figures.growth == pytest.approx((2, 2, 2))
    assert figures.attention["drafts"][1].value == pytest.approx(2 * (0.25 + 1) / 2 / 4)
    assert [(head.layer, head.head) for head in figures.heads] == [(0, 0), (1, 0)]
    assert figures.heads[1].attention["drafts"] == pytest.approx([0, 2 / 4])
    assert figures.heads[0].entropy == pytest.approx([2 * np.log(3) / 4, 2 * np.log(4) / 4])


# The run


def figures_in(arm):
    return [f for f in (arm.free_running, arm.teacher_forced) if f is not None]


@pytest.mark.parametrize("window", [None, 4])
def test_masses_sum_to_1_and_only_whole_rounds_count(window):
    model = tiny_llama()
    drafter = tiny_drafter(model, num_layers=2).windowed(window, sinks=1 if window else 0)
    told = []
    found = drift(
        model,
        NoText(),
        {"tiny": drafter},
        PROMPTS,
        Settings(steps=3, max_tokens=9),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(1, 2), (2, 2)]
    (arm,) = found.arms
    assert arm.acceptance_length.value == 0  # so each round commits one token, and 6 are whole
    assert arm.free_running.chains == 6 * len(PROMPTS)
    assert arm.teacher_forced.chains == sum(9 + len(p) - 1 - 3 + 1 - (len(p) - 2) for p in PROMPTS)
    for figures in figures_in(arm):
        assert len(figures.heads) == 2 * 4
        total = sum(np.array(figures.attention[name])[:, 0] for name in CLASSES)
        assert np.abs(total - 1).max() < 1e-6
        for head in figures.heads:
            assert np.abs(sum(np.array(m) for m in head.attention.values()) - 1).max() < 1e-6
        assert figures.attention["drafts"][0].value == 0
        assert figures.attention["drafts"][1].value > 0


def test_the_teacher_forced_column_is_the_chain_of_training():
    model = tiny_llama()
    drafter = tiny_drafter(model, feedback="pre")
    prompt = PROMPTS[0]
    (arm,) = drift(model, NoText(), {"x": drafter}, [prompt], Settings(3, 9)).arms
    said = [r.token for r in stream_generate(model, NoText(), prompt, 9, drafter=drafter)]
    text = mx.array(prompt + said)
    target = Target(model, drafter.taps)
    _, taps = target(text[:-1], target.make_cache())
    _, states = drafter.train_time_test(text, taps, 3)
    wanted = states[:, len(prompt) - 2 : taps.shape[0] - 2]
    rms = root_mean_square(wanted).mean(axis=(1, 2)).tolist()
    assert [step.value for step in arm.teacher_forced.rms] == pytest.approx(rms, rel=1e-5)
    fused = root_mean_square(drafter.network.fuse(taps))[len(prompt) - 2 : taps.shape[0] - 2]
    assert arm.teacher_forced.fused.value == pytest.approx(fused.mean().item(), rel=1e-5)
    assert arm.free_running.rms[0].value > 0


def test_eagle_1_heads_drift_too(tmp_path):
    eagle(eagle_head(), tmp_path / "head")
    shape = TargetShape(hidden_size=HEAD_HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
    convert_drafter(str(tmp_path / "head"), tmp_path / "out", target=shape)
    model = tiny_llama(num_hidden_layers=LAYERS)
    drafter = load_drafter(str(tmp_path / "out"), model)
    (arm,) = drift(model, NoText(), {"eagle": drafter}, PROMPTS, Settings(3, 9)).arms
    assert len(arm.free_running.taps) == 1
    assert arm.free_running.fused.value == pytest.approx(arm.free_running.taps[0].value)
    assert len(figures_in(arm)) == 2


def test_the_map_is_of_one_round():
    model = tiny_llama()
    settings = Settings(steps=4, max_tokens=6)
    (arm,) = drift(model, NoText(), {"x": tiny_drafter(model)}, PROMPTS[:1], settings).arms
    rows = len(PROMPTS[0]) - 1
    assert arm.map.weights.shape == (rows + 3, rows + 3)
    assert arm.map.edges == [0, 1, rows - 4, rows - 4, rows]
    np.testing.assert_allclose(arm.map.weights.sum(axis=1), 1, atol=1e-6)
    assert not np.triu(arm.map.weights, 1).any()


# Interventions


def states_of(drafter):
    """What a decoded chain recycles, `[K, H]`, and the fused input it started from."""
    watched, seen, _ = watch(drafter)
    decode(watched)
    chain = seen.take_last()
    return mx.stack([step.states[-1] for step in chain.steps]), chain.fused[-1]


def treated(text, drafter, seed=0):
    return intervention(text)(drafter, seed)


def test_pin_recycles_the_fused_inputs_rms():
    drafter = lively_drafter(feedback="pre", norm_before_residual=False)
    states, fused = states_of(treated("pin", drafter))
    plain, _ = states_of(drafter)
    rms = root_mean_square(states)[:, 0]
    assert mx.allclose(rms, root_mean_square(fused), rtol=1e-5)
    assert not mx.allclose(root_mean_square(plain)[:, 0], rms, rtol=1e-2)
    scaled = plain[0] * rms[0] / root_mean_square(plain[0])
    assert mx.allclose(states[0], scaled, rtol=1e-4, atol=1e-5)  # the direction stays
    _, forced = treated("pin", drafter).train_time_test(*conversation(), 3)
    fused = drafter.network.fuse(conversation()[1])
    assert mx.allclose(root_mean_square(forced), root_mean_square(fused)[None], rtol=1e-5)


def test_normalize_recycles_rms_1_and_leaves_what_is_normed_already():
    drafter = lively_drafter(feedback="pre")
    states, _ = states_of(treated("normalize", drafter))
    assert mx.allclose(root_mean_square(states), mx.array(1.0), rtol=1e-4)
    post = lively_drafter(feedback="post")
    post.network.norm.weight = mx.ones(HIDDEN)
    assert mx.allclose(states_of(treated("normalize", post))[0], states_of(post)[0], atol=1e-4)


@pytest.mark.parametrize("path", ["hidden", "embedding"])
def test_noise(path):
    drafter = lively_drafter()
    plain, _ = states_of(drafter)
    assert mx.array_equal(states_of(treated(f"noise-{path}:0", drafter))[0], plain)
    noisy = [states_of(treated(f"noise-{path}:0.5", drafter, seed))[0] for seed in (0, 0, 1)]
    assert mx.array_equal(noisy[0], noisy[1])
    assert not mx.array_equal(noisy[0], noisy[2])
    fed = Fed(drafter.network)
    treated(f"noise-{path}:0.5", drafter.through(fed)).train_time_test(*conversation(400), 1)
    ((embedding, hidden),) = fed._fed
    tokens, taps = conversation(400)
    clean = [drafter._embed(tokens[1:]), drafter.network.fuse(taps)]
    added = [root_mean_square(a - b) for a, b in zip((embedding, hidden), clean, strict=True)]
    meant = path == "embedding"
    assert not added[meant].any()
    share = added[1 - meant] / root_mean_square(clean[1 - meant])
    assert share.mean().item() == pytest.approx(0.5, rel=0.02)


def test_interventions_are_compared_with_the_drafter_as_it_is():
    model, tokenizer, drafter = load_demo("eagle3")
    prompts = [tokenizer.encode("def quote(s):"), tokenizer.encode("Return a shell-escaped")]
    asked = "pin", "noise-hidden:0", "noise-hidden:2"
    found = drift(model, tokenizer, {"x": drafter}, prompts, Settings(4, 16), asked)
    plain, pinned, same, lost = found.arms
    assert [arm.name for arm in found.arms] == ["x", *(f"x, {text}" for text in asked)]
    assert plain.of_baseline is None
    assert same.acceptance_length == plain.acceptance_length
    assert same.free_running == plain.free_running
    assert same.of_baseline == (1, 1, 1)
    assert pinned.free_running.growth == pytest.approx((1, 1, 1))
    assert plain.free_running.growth.low > 1.2
    assert lost.of_baseline.value < 0.5
    assert lost.of_baseline.value == pytest.approx(
        lost.acceptance_length.value / plain.acceptance_length.value
    )


@pytest.mark.parametrize(
    "text", ["", "pins", "noise-hidden", "noise-hidden:", "noise-hidden:-1", "noise:1", "pin:2"]
)
def test_unknown_interventions(text):
    with pytest.raises(DriftError, match="expected pin, normalize, noise-hidden:ALPHA"):
        intervention(text)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, "steps is 1; expected 2 to 64"),
        ({"steps": 65}, "steps is 65"),
        ({"max_tokens": 8}, "a round of 8 drafts needs at least 9"),
        ({"recent": -1}, "recent is -1"),
        ({"sinks": -1}, "sinks is -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(DriftError, match=message):
        Settings(**settings)


def test_nothing_to_measure():
    model = tiny_llama()
    with pytest.raises(DriftError, match="nothing to measure"):
        drift(model, NoText(), {}, PROMPTS)
    with pytest.raises(DriftError, match=r"lookup recycles no state.*no head"):
        drift(model, NoText(), {"lookup": PromptLookupDrafter(model)}, PROMPTS)


def test_answers_that_are_too_short():
    model = tiny_llama()
    stops = NoText()
    first = next(iter(stream_generate(model, NoText(), PROMPTS[0], 1))).token
    stops.eos_token_ids = frozenset([first])
    with pytest.raises(DriftError, match="x: no round drafts as many tokens"):
        # The one token there is comes with the last round, which drafts nothing.
        drift(model, stops, {"x": tiny_drafter(model)}, [PROMPTS[0][:1]], Settings(2, 3))


# The command


def test_the_command_on_the_embedded_pair(cli, tmp_path):
    arguments = ["drift", "-p", "def quote(s):", "-p", "Return a", "--steps", 3, "-m", 8]
    arguments += ["--ignore-chat-template"]
    code, out, err = cli(*arguments, "--json", "--intervene", "noise-embedding:0.5")
    assert code == 0, err
    found = json.loads(out)
    assert (found["steps"], found["prompts"], found["seed"]) == (3, 2, 0)
    assert [arm["drafter"] for arm in found["arms"]] == [n for n in CHAINS for _ in range(2)]
    model, tokenizer, _ = load_demo()
    drafters = {name: load_converted(DEMO / name, model) for name in CHAINS}
    prompts = [tokenizer.encode(text) for text in ("def quote(s):", "Return a")]
    whole = drift(model, tokenizer, drafters, prompts, Settings(3, 8), ["noise-embedding:0.5"])
    assert json.loads(json.dumps(whole.to_dict())) == found
    assert "map" not in found["arms"][0]

    code, out, err = cli(*arguments, "--drafter", "eagle3", "--heads", "--no-teacher-forced")
    assert code == 0, err
    assert "RMS 3 ÷ 1" in out
    assert "eagle3 · free-running" in out
    assert "eagle3 · heads" in out
    assert "eagle3.1" not in out
    assert "teacher-forced" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_command_reads_questions(cli, tmp_path):
    questions = tmp_path / "question.jsonl"
    turns = [["def quote(s):", "And then?"], ["Return a"], ["never asked"]]
    questions.write_text("".join(json.dumps({"turns": t}) + "\n" for t in turns))
    arguments = ["drift", "--questions", questions, "--limit", 2, "--drafter", "eagle3", "--json"]
    code, out, err = cli(*arguments, "--steps", 2, "-m", 6, "--recent", 2, "--sinks", 2)
    assert code == 0, err
    found = json.loads(out)
    assert (found["prompts"], found["recent"], found["sinks"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "steps is 1"),
        (["-m", "8"], "needs at least 9"),
        (["--intervene", "freeze"], "--intervene freeze: expected pin"),
        (["--drafter", "eagle3", "--drafter", "eagle3"], "eagle3 is given more than once"),
        (["--drafter", "eagle9"], "eagle9 needs its --model"),
        (["-p", " "], "the prompt is empty"),
        (["-p", "a", "--questions", "b"], "give one of them"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--chat-template-config", "["], "not valid JSON"),
    ],
)
def test_refused_in_one_line(refuses, arguments, message):
    refuses(message, "drift", *arguments)


def test_ctrl_c(cli, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_drift.cli.drift.drift", interrupted)
    code, out, err = cli("drift", "--json")
    assert (code, out) == (130, "")
    assert err == "interrupted before there was anything to report\n"


# Pictures


def test_matplotlib_is_loaded_for_pictures_alone():
    quick = "import sys, mlx_drift.cli; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", quick], check=True)


def test_no_matplotlib(refuses, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refuses("pip install 'mlx-drift[plot]'", "drift", "--plot", tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


@pytest.mark.parametrize(("steps", "interventions"), [(2, []), (12, ["pin"])])
def test_pictures(steps, interventions, tmp_path):
    pytest.importorskip("matplotlib")
    from mlx_drift.measure.inside.drift_plot import plot_drift

    model = tiny_llama()
    drafters = {"a": tiny_drafter(model), "b": tiny_drafter(model, feedback="pre")}
    settings = Settings(steps, steps + 2, teacher_forced=steps == 2)
    prompts = PROMPTS if steps == 2 else [PROMPTS[0] * 15]  # more than a map has room for
    found = drift(model, NoText(), drafters, prompts, settings, interventions)
    paths = plot_drift(found, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["growth.png", "attention.png", "map.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(DriftError, match="cannot be written"):
        plot_drift(found, tmp_path / "file")
