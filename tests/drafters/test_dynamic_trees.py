"""Trees that heads draft: EAGLE-2's, against the definition, a path at a time."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors

from families import build
from kinds import KINDS, random_head
from mlx_drift import convert_drafter, generate, make_prompt_cache, stream_generate
from mlx_drift.decode.chooser import Chooser
from mlx_drift.decode.sampling import Sampling
from mlx_drift.drafters.chain import ChainDrafter
from mlx_drift.drafters.chain_config import EagleConfig
from mlx_drift.drafters.copying import CopyingDrafter
from mlx_drift.drafters.draft_model import DraftModelDrafter
from mlx_drift.drafters.eagle import EagleNetwork
from mlx_drift.drafters.hydra import HydraDrafter
from mlx_drift.drafters.load import load_converted
from mlx_drift.drafters.protocol import TREE
from mlx_drift.drafters.tree import DEPTH, WIDTH
from mlx_drift.errors import DriftError
from mlx_drift.target.model import Target
from mlx_drift.target.taps import remove_taps
from mtp_heads import FAMILIES, config_of, head, write_repository, written
from tiny import VOCAB, NoText, plain_greedy, tiny_drafter, tiny_llama
from trees import path_to

PROMPT = [5, 9, 2, 44, 17, 3, 60, 11, 25]
LENGTH = 32
pytestmark = pytest.mark.filterwarnings("ignore:only .* of the first drafts")


def eagle_1(model):
    target = Target(model, (5,))
    size = target.shape.hidden_size
    config = EagleConfig(
        taps=target.taps,
        hidden_size=size,
        intermediate_size=48,
        num_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        target=target.shape,
        fc_bias=True,
    )
    mx.random.seed(8)
    network = EagleNetwork(config)
    mx.eval(network.parameters())
    return ChainDrafter(config, network, target)


def reduced(model):
    base = tiny_drafter(model, draft_vocab_size=24, own_head=True)
    d2t = mx.array([*range(3, 51, 2)], mx.int32)
    return ChainDrafter(base.config, base.network, Target(model, base.taps), d2t)


HEADS = {
    "EAGLE-3.1": tiny_drafter,
    "EAGLE-3, two layers": lambda model: tiny_drafter(model, num_layers=2, feedback="pre"),
    "a reduced vocabulary": reduced,
    "a window": lambda model: tiny_drafter(model).windowed(6, 1),
    "EAGLE-1": eagle_1,
}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def plain(model):
    return plain_greedy(model, PROMPT, LENGTH)


def read(drafter):
    """The drafter's cache after the prompt."""
    target = Target(drafter.model, drafter.taps)
    cache = drafter.make_cache()
    tokens = mx.array(PROMPT)
    _, taps = target(tokens[:-1], target.make_cache())
    drafter.start(tokens[:1], cache)
    drafter.ingest(tokens[1:], taps, cache)
    return cache


def after(drafter, cache, path):
    """The drafter's likeliest draft ids after a path, and their log-probabilities."""
    return _likeliest(logits_after(drafter, cache, path))


def after_processed(drafter, cache, path):
    """The same where logits are processed, of target ids."""
    ids = drafter._target_ids(mx.arange(drafter._draft_vocab_size)).tolist()
    logits = logits_after(drafter, cache, [ids.index(token) for token in path])
    if logits is None:
        return []
    spread = mx.full((1, VOCAB), -mx.inf)
    spread[:, mx.array(ids)] = logits
    return _likeliest(ruling_out(mx.array([*PROMPT, *path]), spread))


def ruling_out(tokens, logits):
    """A third of the letters may not come: which, the last two tokens say."""
    third = (mx.arange(VOCAB) + tokens[-1] + 2 * tokens[-2]) % 3 == 0
    return mx.where(third, -mx.inf, logits)


def logits_after(drafter, cache, path):
    """Draft logits `[1, D]` after a path of draft ids, by a chain; None where there are no more."""
    if not isinstance(drafter, ChainDrafter) or not drafter.recycles:
        return in_slots(drafter, cache, path)
    logits, state, rows = cache.draft_logits, cache.recycled, cache.layers[0].offset
    for token in path:
        embedding = drafter._embed(drafter._target_ids(mx.array([token])))
        normed, state = drafter.network(embedding, state, cache.layers)
        logits = drafter._head(normed)
    for layer in cache.layers:
        layer.trim(layer.offset - rows)
    return logits


def in_slots(drafter, cache, path):
    """Draft logits `[1, D]` after a path, of a head that fills slots; to end it, none."""
    slots = drafter.max_drafts
    if len(path) == slots:
        return None
    if isinstance(drafter, HydraDrafter):
        drafted = drafter._embed(drafter._target_ids(mx.array(path, mx.int32)))
        read = mx.concatenate([cache.seed, drafted.reshape(1, -1)], axis=-1)
        return drafter.network.heads[len(path)](read)
    if getattr(drafter.config, "markov", None) is None:
        return drafter.fill(slots, cache)[len(path)][None]
    hidden, state = drafter._fill(slots, cache), None
    drafted = drafter._target_ids(mx.array(path, mx.int32)).tolist()
    for slot, token in enumerate([*cache.seed.tolist(), *drafted]):
        row = hidden[slot : slot + 1]
        bias, state = drafter.network.markov(mx.array([int(token)]), row, state)
    return drafter._head(row) + bias


def _likeliest(logits):
    if logits is None:
        return []
    logits = np.array(logits[0].astype(mx.float32), np.float64)
    scores = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-scores)[:WIDTH]
    return [(int(token), scores[token]) for token in best]


def expected(drafter, cache, count, after=after):
    """EAGLE-2's tree by its definition: paths of draft ids, and their log-probabilities."""
    beam, pool = {(): 0.0}, {}
    for _ in range(DEPTH):
        level = {
            (*path, token): score + given
            for path, score in beam.items()
            for token, given in after(drafter, cache, path)
        }
        pool |= level
        beam = dict(sorted(level.items(), key=lambda one: -one[1])[:WIDTH])
    return dict(sorted(pool.items(), key=lambda one: -one[1])[:count])


def drafted(drafter, cache, count, chooser=None):
    """The paths, of target ids, of the tree that is drafted."""
    draft = drafter.propose_tree(count, cache, chooser)
    tokens, parents = draft.tokens.tolist(), draft.parents.tolist()
    assert draft.finite.tolist() == [True]
    assert all(parent < i for i, parent in enumerate(parents))
    paths = [path_to(parents, row)[1:] for row in range(1, len(tokens) + 1)]
    return [tuple(tokens[row - 1] for row in path) for path in paths]


@pytest.mark.parametrize("count", [2, 4, 7, 15])
@pytest.mark.parametrize("name", HEADS)
def test_the_likeliest_paths_are_drafted(name, count, model):
    drafter = HEADS[name](model)
    cache = read(drafter)
    paths = {
        tuple(drafter._target_ids(mx.array(path)).tolist())
        for path in expected(drafter, cache, count)
    }
    rows = cache.layers[0].offset
    found = drafted(drafter, cache, count)
    assert len(found) == len(paths) == count
    assert set(found) == paths
    assert cache.layers[0].offset == rows  # no row of the tree is left
    assert drafted(drafter, cache, count) == found


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_paths_of_slots_are_drafted(kind, model):
    drafter = random_head(kind, model)
    cache = read(drafter)
    for count in (3, 9):
        paths = set(expected(drafter, cache, count))
        assert set(drafted(drafter, cache, count)) == paths
        assert len(paths) == count


@pytest.mark.parametrize("name", [*HEADS, *KINDS])
def test_greedy_text_is_the_targets_own(name, model, plain):
    drafter = HEADS[name](model) if name in HEADS else random_head(name, model)
    accepted = 0
    for rows in (3, 16):
        responses = [*stream_generate(model, NoText(), PROMPT, LENGTH, drafter=drafter, tree=rows)]
        assert [response.token for response in responses] == plain
        accepted += sum(responses[0].statistics.accepted)
    assert accepted > 0 or name in KINDS  # which know less of the target


@pytest.mark.parametrize("family", ["mimo", "deepseek_v3"])
def test_mtp_heads_draft_trees(family, tmp_path):
    write_repository(tmp_path / "source", config_of(family), written(family, head(family)))
    convert_drafter(str(tmp_path / "source"), tmp_path / "out", mtp=True, strict=True)
    model = build(FAMILIES[family].target)
    drafter = load_converted(tmp_path / "out", model)
    cache = read(drafter)
    assert set(drafted(drafter, cache, 6)) == set(expected(drafter, cache, 6))
    said = stream_generate(model, NoText(), PROMPT, LENGTH, drafter=drafter, tree=6)
    assert [response.token for response in said] == plain_greedy(model, PROMPT, LENGTH)


@pytest.mark.parametrize(
    "options",
    [{"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 14}, {"max_kv_size": 12}, {}],
    ids=["quantized", "windows and sinks", "all keys"],
)
def test_a_conversation_goes_on_with_trees(options):
    model = build("qwen3")
    drafter = tiny_drafter(model)
    texts = []
    for tree in (None, 6):
        cache = make_prompt_cache(model, drafter, **options)
        tokens = list(PROMPT)
        for turn in range(2):
            said = stream_generate(
                model, NoText(), tokens, 12, drafter=drafter, tree=tree, prompt_cache=cache
            )
            tokens += [response.token for response in said] + [7 + turn]
        branched = cache.fork()
        for one, last in ((branched, 8), (cache, 9)):
            said = stream_generate(
                model, NoText(), [*tokens, last], 12, drafter=drafter, tree=tree, prompt_cache=one
            )
            texts.append([response.token for response in said])
        texts.append(tokens)
    assert texts[:3] == texts[3:]


def test_auto_chooses_between_chains_and_trees(model, plain):
    drafter = tiny_drafter(model)
    cache = make_prompt_cache(model, drafter)
    for _ in range(2):  # what was learned stays with the conversation
        said = [
            *stream_generate(
                model, NoText(), PROMPT, LENGTH, drafter=drafter, tree="auto", prompt_cache=cache
            )
        ]
        assert [response.token for response in said] == plain
    length = said[-1].statistics.draft_length
    assert length.fixed is None
    assert length.candidates(TREE)
    said = stream_generate(
        model, NoText(), PROMPT, 4, drafter=drafter, num_draft_tokens="auto", prompt_cache=cache
    )
    assert not [*said][-1].statistics.draft_length.tree


def test_windows_of_a_target_past_the_wrap():
    model = build("gpt_oss")
    drafter = tiny_drafter(model)
    said = stream_generate(model, NoText(), PROMPT * 3, 48, drafter=drafter, tree=8)
    assert [response.token for response in said] == plain_greedy(model, PROMPT * 3, 48)


def test_copies_stay_chains(model):
    prompt = PROMPT * 3
    drafter = CopyingDrafter(tiny_drafter(model))
    responses = [*stream_generate(model, NoText(), prompt, LENGTH, drafter=drafter, tree=5)]
    assert [response.token for response in responses] == plain_greedy(model, prompt, LENGTH)
    assert responses[0].statistics.free_rounds["copy"] > 0


@pytest.mark.parametrize("name", [*HEADS, *KINDS])
def test_each_draft_is_processed_with_its_own_path(name, model):
    drafter = HEADS[name](model) if name in HEADS else random_head(name, model)
    cache, sampling = read(drafter), Sampling(logits_processors=(ruling_out,))
    paths = set(expected(drafter, cache, 9, after_processed))
    for _ in range(2):
        chooser = Chooser(sampling, 9, history=mx.array(PROMPT))
        assert set(drafted(drafter, cache, 9, chooser)) == paths
    assert paths != set(drafted(drafter, cache, 9))


@pytest.mark.parametrize("name", [*HEADS, *KINDS])
def test_greedy_text_is_the_targets_own_where_logits_are_processed(name, model):
    processors = make_logits_processors({7: 1.5, 11: -2.0}, 1.3, 12)
    steps = generate_step(
        mx.array(PROMPT), model, max_tokens=LENGTH, logits_processors=[*processors]
    )
    expected = [int(token) for token, _ in steps]
    drafter = HEADS[name](model) if name in HEADS else random_head(name, model)
    said = stream_generate(
        model, NoText(), PROMPT, LENGTH, drafter=drafter, tree=9, logits_processors=processors
    )
    said = [*said]
    assert [response.token for response in said] == expected
    assert name in KINDS or len(said[-1].statistics.ranks[0]) > 1


def test_no_processor_is_asked_about_a_text_that_may_not_come(model):
    def two(token):
        return (7 * token + 3) % VOCAB, (5 * token + 1) % VOCAB

    def only_two(tokens, logits):
        text = tokens.tolist()[len(PROMPT) - 1 :]
        assert all(token in two(before) for before, token in pairwise(text))
        may_come = mx.zeros((VOCAB,), mx.bool_)
        may_come[mx.array(two(text[-1]))] = True
        return mx.where(may_come, logits, -mx.inf)

    only_two.stateless = True
    steps = generate_step(mx.array(PROMPT), model, max_tokens=16, logits_processors=[only_two])
    expected = [int(token) for token, _ in steps]
    drafter = tiny_drafter(model)
    for tree in (3, 9):
        said = stream_generate(
            model, NoText(), PROMPT, 16, drafter=drafter, tree=tree, logits_processors=[only_two]
        )
        assert [response.token for response in said] == expected


def test_states_that_are_not_finite_cost_no_token(model, plain):
    drafter = tiny_drafter(model)
    drafter.network.norm.weight = drafter.network.norm.weight * mx.nan
    with pytest.warns(UserWarning, match="not finite"):
        said = [*stream_generate(model, NoText(), PROMPT, LENGTH, drafter=drafter, tree=9)]
    assert [response.token for response in said] == plain


@pytest.mark.parametrize("rows", [0, 1, 66, -3])
def test_a_number_that_makes_no_sense_is_told(rows, model):
    with pytest.raises(DriftError, match="expected 2 to 65 rows"):
        generate(model, NoText(), PROMPT, drafter=tiny_drafter(model), tree=rows)


@pytest.mark.parametrize("k", [3, 0, "auto"])
def test_a_number_of_drafts_beside_it_is_told(k, model):
    with pytest.raises(DriftError, match="num_draft_tokens and tree are both given; give one of"):
        generate(model, NoText(), PROMPT, drafter=tiny_drafter(model), num_draft_tokens=k, tree=5)


def test_who_cannot_is_told(model):
    with pytest.raises(DriftError, match=r"the drafter \(DraftModelDrafter\) drafts no trees"):
        generate(model, NoText(), PROMPT, drafter=DraftModelDrafter(tiny_llama(), model), tree=5)
    other = build("gpt2")
    with pytest.raises(DriftError, match=r"the target \(gpt2\) cannot verify trees"):
        generate(other, NoText(), PROMPT, drafter=tiny_drafter(other), tree=5)


def test_a_target_is_tried_out_once(model, monkeypatch):
    remove_taps(model)
    drafter, tried = tiny_drafter(model), []
    verify = Target.verify

    def noted(self, tokens, cache, tree=None):
        tried.append(tree)
        return verify(self, tokens, cache, tree)

    monkeypatch.setattr(Target, "verify", noted)
    counts = []
    for _ in range(2):
        tried.clear()
        generate(model, NoText(), PROMPT, max_tokens=4, drafter=drafter, tree=5)
        counts.append(len(tried))
    assert counts[0] > counts[1]
