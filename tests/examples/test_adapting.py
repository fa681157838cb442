"""The stories of `examples/adapt`, small and on the embedded pair: the commands do as they say."""

import json
import sys
from pathlib import Path

from mlx_drift.demo import TARGET

ADAPT = Path(__file__).parents[2] / "examples" / "adapt"


def test_a_foreign_template(cli, tmp_path):
    """Both templates are in the data, and each has its own figures, with their ratio."""
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps({"turns": [f"What is {n}?"]}) for n in range(40)]
    questions.write_text("\n".join(lines))
    out = tmp_path / "healed"
    code, said, err = cli(
        *("adapt", "--drafter", "eagle3", "--data", questions, "--mlx-path", out, "--json"),
        *("--chat-template", "own", "--chat-template", ADAPT / "foreign.jinja"),
        *("--max-tokens", 8, "--max-seq-length", 64, "--batch-size", 8, "--steps", 2),
        *("--iters", 2, "--steps-per-eval", 2, "--learning-rate", 3e-4),
    )
    assert code == 0, err
    told = json.loads(said)
    start, end = told["history"]
    assert end["val_loss"] < start["val_loss"]
    after = told["conditions"][0]["drafters"]["after"]
    groups = {"all", "own template", "foreign.jinja"}
    assert after["acceptance"].keys() == after["ratio_to_first_drafter"].keys() == groups


def test_style_writes_what_mlx_lm_lora_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ADAPT), *sys.path])
    import style

    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(f"What is {n}?" for n in range(11)))
    arguments = ["--model", str(TARGET), "--questions", str(questions), "--style", "Be brief."]
    arguments += ["--out", str(tmp_path / "out"), "--max-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["style.py", *arguments])
    style.main()
    train, valid = (
        [json.loads(line) for line in (tmp_path / "out" / f"{part}.jsonl").open()]
        for part in ("train", "valid")
    )
    assert (len(train), len(valid)) == (10, 1)
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant"]
