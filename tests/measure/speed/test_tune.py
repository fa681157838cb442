"""`tune`, what it keeps, and what `auto` makes of it."""

import json

import pytest

from mlx_drift import make_prompt_cache, stream_generate
from mlx_drift.decode import tuned
from mlx_drift.decode.draft_length import DraftLength
from mlx_drift.errors import DriftError
from mlx_drift.measure.speed.tune import tune
from tiny import NoText, tiny_drafter, tiny_llama

TABLE = {128: {0: 1.0, 1: 1.2, 2: 1.4}, 4096: {0: 2.0, 1: 9.0}}


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path))
    model = tiny_llama()
    return model, tiny_drafter(model)


def keep(model, drafter, table=TABLE):
    path = tuned.tuned_file(model, drafter)
    tuned.write_table(path, table, {"device": "any"})
    return path


def test_it_measures_every_length_at_every_context(pair):
    told = []
    table = tune(
        *pair,
        [1, 2, 3],
        contexts=[8, 20],
        lengths=[1, 3],
        turns=1,
        progress=lambda done, total: told.append((done, total)),
    )
    assert [(context, list(costs)) for context, costs in table.items()] == [
        (8, [0, 1, 3]),
        (20, [0, 1, 3]),
    ]
    assert all(seconds > 0 for costs in table.values() for seconds in costs.values())
    assert told[-1] == (4, 4)


@pytest.mark.parametrize(("contexts", "lengths"), [([1], [1]), ([8], [0]), ([8], [65])])
def test_it_refuses_what_cannot_be(pair, contexts, lengths):
    with pytest.raises(DriftError, match="expected"):
        tune(*pair, [1, 2], contexts=contexts, lengths=lengths)


def test_the_nearest_context_is_taken(pair):
    assert tuned.tuned_costs(*pair, 100) == {}
    keep(*pair)
    assert tuned.tuned_costs(*pair, 100) == TABLE[128]
    assert tuned.tuned_costs(*pair, 700) == TABLE[128]
    assert tuned.tuned_costs(*pair, 800) == TABLE[4096]


def test_another_quantization_drafter_device_or_version_is_another_file(pair, monkeypatch):
    model, drafter = pair
    files = [
        tuned.tuned_file(model, drafter),
        tuned.tuned_file(tiny_llama(bits=4), drafter),
        tuned.tuned_file(model, tiny_drafter(model, feedback="pre", norm_before_fc=True)),
    ]
    monkeypatch.setattr(tuned, "device_name", lambda: "another")
    files.append(tuned.tuned_file(model, drafter))
    monkeypatch.setattr(tuned, "version", lambda name: "another")
    files.append(tuned.tuned_file(model, drafter))
    assert len(set(files)) == len(files)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"contexts": 3}',
        '{"contexts": {"8": {"0": 0}}}',
        '{"contexts": {"8": {"0": "x"}}}',
        '{"contexts": {"x": {"0": 1}}}',
        '{"contexts": {"8": {"0": NaN}}}',
        '{"contexts": {"0": {"0": 1}}}',
        '{"contexts": {"8": {"-1": 1}}}',
        '{"contexts": {"8": {"0": 1' + "0" * 400 + "}}}",
        '{"contexts": {"1' + "0" * 400 + '": {"0": 1}}}',
        '{"contexts": {"8": {"0": 1e-320}}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(pair, text):
    path = keep(*pair)
    path.write_text(text)
    assert tuned.tuned_costs(*pair, 100) == {}


def test_auto_starts_from_it_and_keeps_what_it_learns(pair):
    model, drafter = pair
    cache = make_prompt_cache(model, drafter)

    def run(prompt):
        answer = stream_generate(
            model,
            NoText(),
            prompt,
            6,
            drafter=drafter,
            prompt_cache=cache,
            num_draft_tokens="auto",
        )
        return list(answer)[-1].statistics

    keep(model, drafter)
    first = run([1, 2, 3])
    assert first.draft_length.tuned
    assert first.plain_tokens < 3  # it knows what a plain step costs, and need not time three
    assert first.draft_length.fixed is None
    second = run([*cache.tokens, 4])
    assert second.draft_length is first.draft_length
    assert json.loads(json.dumps(second.to_dict()))["draft_length"]["tuned"]


def test_auto_times_plain_decoding_first(pair):
    model, drafter = pair
    answer = stream_generate(
        model, NoText(), [1, 2, 3], 24, drafter=drafter, num_draft_tokens="auto"
    )
    statistics = list(answer)[-1].statistics
    assert statistics.plain_tokens >= 3
    assert list(statistics.draft_length.costs.known())[:2] == [0, 1]


def test_what_an_answer_learned_helps_the_next_one_unless_drafting_did_not_pay(pair):
    model, drafter = pair
    good, bad = DraftLength(costs={0: 1.0, 1: 1.1}), DraftLength(costs={0: 1.0, 1: 5.0})
    tuned.remember(drafter, good)
    assert tuned.tuned_costs(model, drafter, 100) == {0: 1.0, 1: 1.1}
    tuned.remember(drafter, bad)
    assert tuned.tuned_costs(model, drafter, 100) == {}


def test_the_commands(cli, refuses, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_DRIFT_CACHE", str(tmp_path))
    arguments = ("tune", "--context", 16, "--num-draft-tokens", 2, "--num-draft-tokens", 1)
    told = json.loads(cli(*arguments, "--json")[1])
    assert list(told["contexts"]["16"]) == ["0", "1", "2"]
    assert tmp_path in tuned.Path(told["file"]).parents
    code, out, _ = cli(*arguments)
    assert code == 0
    assert "pays at" in out
    code, out, err = cli("generate", "-m", 12, "--num-draft-tokens", "auto", "--explain")
    assert code == 0
    assert "auto: " in err
    assert "tokens/s" in err
    told = json.loads(cli("generate", "-m", 4, "--num-draft-tokens", "auto", "--json")[1])
    assert told["statistics"]["draft_length"]["tuned"]
    told = json.loads(cli("generate", "-m", 8, "--json")[1])
    assert told["statistics"]["draft_length"]["fixed"] == 3
    assert told["statistics"]["draft_length"]["auto"] is not None
    refuses(
        "--num-draft-tokens is many; expected a number, or auto",
        "generate",
        "--num-draft-tokens",
        "many",
    )
    refuses("--num-draft-tokens is 99", "tune", "--num-draft-tokens", 99)
