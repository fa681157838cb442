"""Export: what is given back to PyTorch comes home as the same drafter."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from dialects import HIDDEN, LAYERS, Head, head, speculators
from mlx_drift import DriftError, convert_drafter, export_drafter
from mlx_drift.convert.convert import Conversion
from mlx_drift.demo import DEMO
from mlx_drift.drafters.config import read_config
from mlx_drift.files.tensors import read_safetensors
from mlx_drift.target.model import TargetShape
from tiny import VOCAB

SHAPE = TargetShape(hidden_size=HIDDEN, vocab_size=VOCAB, num_layers=LAYERS)
REFERENCES = Path(__file__).parents[1] / "speculators_reference"
NORMALIZED = {"fc_norm": True, "norm_output": True, "norm_before_residual": False}
PLAIN = {"norm_before_residual": False}

BOTH = {
    "plain": head(**PLAIN),
    "normalized": head(**NORMALIZED),
    "own embedding, full vocabulary": head(embedding=True, reduced=False, **PLAIN),
    "taps that start at 1": head((1, 6, 9), **PLAIN),
    "taps that end at the last layer": head((3, 7, LAYERS), **PLAIN),
    "the default outputs": head((1, 5, 8), **PLAIN),
    "four taps": head((2, 5, 8, 11), **NORMALIZED),
    "theta": head(rope_theta=1e6, **PLAIN),
    "yarn": head(rope_scaling={"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}, **PLAIN),
}
SPECULATORS = {
    "the embedding": head((0, 3, 7), **PLAIN),
    "norm_before_fc": head(norm_before_fc=True, norm_output=True, norm_before_residual=True),
    "qk_norm": head(qk_norm=True, **PLAIN),
    "two layers": head(layers=2, **PLAIN),
}
CASES = [("specforge", name, BOTH[name]) for name in BOTH]
CASES += [("speculators", name, made) for name, made in (BOTH | SPECULATORS).items()]


def converted(made: Head, folder: Path, **options) -> Conversion:
    speculators(made, folder.with_name(f"{folder.name}-source"))
    source = folder.with_name(f"{folder.name}-source")
    return convert_drafter(str(source), folder, target=SHAPE, taps="input", **options)


def same(first: Conversion, second: Conversion) -> bool:
    """Whether two configs say the same, wherever they have it from."""
    bare = [replace(d.config, source={}, provenance={}, quantization=None) for d in (first, second)]
    return bare[0] == bare[1]


@pytest.mark.parametrize(("form", "name", "made"), CASES, ids=[f"{f} {n}" for f, n, _ in CASES])
def test_comes_home_bit_for_bit(form, name, made, tmp_path):
    first = converted(made, tmp_path / "first")
    export_drafter(tmp_path / "first", tmp_path / "pytorch", format=form)
    again = convert_drafter(str(tmp_path / "pytorch"), tmp_path / "again", strict=True)
    assert again.dialect.lower() == form
    assert same(first, again)
    assert not again.notes
    tensors = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("first", "again")]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("form", ["specforge", "speculators"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_quantized_head_comes_home_dequantized(form, dtype, tmp_path):
    first = converted(BOTH["normalized"], tmp_path / "first", quantize=True, q_group_size=32)
    if dtype == "float32":
        (tmp_path / "first").rename(tmp_path / "half")
        source = str(tmp_path / "first-source")
        first = convert_drafter(
            *(source, tmp_path / "first"),
            **{"target": SHAPE, "taps": "input", "dtype": dtype},
            **{"quantize": True, "q_group_size": 32},
        )
    done = export_drafter(tmp_path / "first", tmp_path / "pytorch", format=form)
    assert any("dequantized" in note for note in done.notes)
    again = convert_drafter(str(tmp_path / "pytorch"), tmp_path / "again", strict=True)
    assert same(first, again)
    packed, got = (read_safetensors(tmp_path / f / "model.safetensors") for f in ("first", "again"))
    assert f"{got['fc.weight'].dtype}".endswith(dtype)
    for name, tensor in got.items():
        layer = name.removesuffix(".weight")
        expected = packed[name]
        if f"{layer}.scales" in packed:
            parts = [packed[f"{layer}.{part}"] for part in ("weight", "scales", "biases")]
            expected = mx.dequantize(*parts, group_size=32, bits=4)
        assert tensor.dtype == expected.dtype
        assert mx.array_equal(tensor, expected)


def test_what_the_tools_read(tmp_path):
    converted(BOTH["normalized"], tmp_path / "first")
    export_drafter(tmp_path / "first", tmp_path / "a", format="specforge")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "eagle_config" not in config  # 2, n // 2, n − 3: every tool's default
    assert (config["fc_norm"], config["norm_output"]) == (True, True)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "midlayer.self_attn.q_proj.weight" in tensors
    ids = np.flatnonzero(tensors["t2d"])
    assert tensors["d2t"].dtype == np.int64
    assert np.array_equal(np.sort(tensors["d2t"] + np.arange(ids.size)), ids)
    with safe_open(tmp_path / "a" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}

    converted(BOTH["four taps"], tmp_path / "second")
    export_drafter(tmp_path / "second", tmp_path / "b", format="specforge")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 4, 7, 10]
    export_drafter(tmp_path / "second", tmp_path / "c", format="speculators", target="me/target")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 5, 8, 11]
    assert config["speculators_config"]["verifier"]["name_or_path"] == "me/target"


REFUSED = [
    ("specforge", SPECULATORS["norm_before_fc"], "norm_before_residual is on"),
    ("specforge", head(norm_before_fc=True, **PLAIN), "norm_before_fc is on"),
    ("specforge", SPECULATORS["qk_norm"], "qk_norm is on, which .* say; --format speculators can"),
    ("specforge", SPECULATORS["two layers"], "it has 2 layers"),
    ("specforge", SPECULATORS["the embedding"], "the embedding, the output of no layer"),
    ("speculators", head(gated=True, **PLAIN), "its attention has a gate .* say$"),
    ("speculators", head(fc_norm=True, norm_before_fc=True, **PLAIN), "both fc_norm and norm_bef"),
]


@pytest.mark.parametrize(("form", "made", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_a_format_cannot_say_is_refused_by_name(form, made, message, tmp_path):
    converted(made, tmp_path / "first")
    with pytest.raises(DriftError, match=message):
        export_drafter(tmp_path / "first", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "kind", "message"),
    [
        (
            "specforge",
            "mtp",
            "is written for EAGLE-3 drafters, and this is .* type 'mtp'; --format speculators can",
        ),
        ("specforge", "dflash", "type 'dflash'$"),
        ("speculators", "medusa", "is written for EAGLE-3 drafters and MTP heads.* 'medusa'"),
    ],
)
def test_other_kinds_are_refused(form, kind, message, tmp_path):
    with pytest.raises(DriftError, match=message):
        export_drafter(DEMO / kind, tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "target", "message"),
    [
        ("specforge", "me/target", "--target is for --format speculators; specforge names none"),
        ("speculators", " ", "--target is ' '; expected the target's name"),
        ("speculators", "me\nyou", r"--target is 'me\\nyou'; expected"),
    ],
)
def test_a_target_that_would_not_be_told_is_refused(form, target, message, tmp_path):
    with pytest.raises(DriftError, match=message):
        export_drafter(DEMO / "eagle3.1", tmp_path / "out", format=form, target=target)
    assert not (tmp_path / "out").exists()


MTP_REFERENCES = REFERENCES.with_name("mtp_reference")


@pytest.mark.parametrize(
    "head", [DEMO / "mtp", MTP_REFERENCES / "speculators_qwen3", MTP_REFERENCES / "llama"]
)
def test_an_mtp_head_comes_home_bit_for_bit(head, tmp_path):
    """The second is as the package wrote it: what is given back has its tensors, by its names."""
    convert_drafter(str(head), tmp_path / "first", mtp=head.parent == MTP_REFERENCES)
    export_drafter(tmp_path / "first", tmp_path / "out", format="speculators", target="me/target")
    convert_drafter(str(tmp_path / "out"), tmp_path / "again", mtp=True, strict=True)
    first, again = (read_config(tmp_path / name) for name in ("first", "again"))
    blocks = [c.block | {"rope_parameters": None} for c in (first, again)]
    assert blocks[0] == blocks[1]
    bare = [replace(c, source={}, provenance={}, block={}) for c in (first, again)]
    assert bare[0] == bare[1]
    tensors = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("first", "again")]
    assert tensors[0] == tensors[1]
    if "speculators" in head.name:
        written = {k: v for k, v in load_tensors(head).items() if "verifier" not in k}
        got = load_tensors(tmp_path / "out")
        assert got.keys() == written.keys()
        assert all(mx.array_equal(got[name], written[name]) for name in got)
        ours, theirs = (
            json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", head)
        )
        assert ours.keys() <= theirs.keys()
        ours, theirs = (one["transformer_layer_config"] for one in (ours, theirs))
        assert ours == {key: theirs[key] for key in ours}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mimo", "its block is one of mimo"),
        ("qwen3_next", "its block is one of qwen3_next, and llama or qwen3 is what is written"),
        ("deepseek_v3", "its block is one of deepseek_v3"),
    ],
)
def test_an_mtp_head_that_cannot_be_said_is_refused_by_name(name, message, tmp_path):
    convert_drafter(str(MTP_REFERENCES / name), tmp_path / "first", mtp=True)
    with pytest.raises(DriftError, match=message):
        export_drafter(tmp_path / "first", tmp_path / "out", format="speculators")


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"feedback": "pre"}, "it recycles the state before its norm"),
        ({"taps": "output"}, "it reads another state of the target"),
        ({"window": 8}, "it has a sliding window of 8"),
    ],
)
def test_switches_of_an_mtp_head_are_refused_by_name(switches, message, tmp_path):
    convert_drafter(
        str(MTP_REFERENCES / "speculators_qwen3"), tmp_path / "first", mtp=True, **switches
    )
    with pytest.raises(DriftError, match=message):
        export_drafter(tmp_path / "first", tmp_path / "out", format="speculators")


@pytest.mark.parametrize("name", ["~nosuchuser/out", "a" * 300, "a\0b", "/dev/null/out"])
def test_places_that_cannot_be_written_to(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for write in (
        lambda: convert_drafter(str(DEMO / "eagle3"), name),
        lambda: export_drafter(DEMO / "eagle3", name, format="specforge"),
    ):
        with pytest.raises(DriftError, match="cannot be written") as refused:
            write()
        assert len(str(refused.value).splitlines()) == 1


def test_bad_input_gets_one_line(tmp_path, refuses):
    converted(BOTH["plain"], tmp_path / "first")
    out = ("--format", "specforge", "--path", tmp_path / "out")
    refuses("not a converted drafter", "export", tmp_path / "first-source", *out)
    (tmp_path / "there").mkdir()
    there = ("--format", "specforge", "--path", tmp_path / "there")
    refuses("choose another --path", "export", tmp_path / "first", *there)
    refuses(
        "expected a Hub repository", "export", tmp_path / "first", *out, "--upload-repo", "a/b/c"
    )


def test_the_command_and_its_card(cli, tmp_path):
    out = tmp_path / "out"
    code, shown, told = cli(
        *("export", DEMO / "eagle3.1", "--format", "specforge", "--path", out, "--json")
    )
    assert code == 0
    assert json.loads(shown)["config"]["norm_output"] is True
    assert "pull request 879" in told
    card = (out / "README.md").read_text()
    assert "EAGLE-3.1 (normalized)" in card
    assert "format of SpecForge" in card


def exported_references(folder: Path) -> list[str]:
    """Exports every head of the speculators package, converted, into a folder; returns names."""
    names = []
    for entry in json.loads((REFERENCES / "references.json").read_text())["cases"]:
        name = entry["name"]
        taps = read_safetensors(REFERENCES / "references.safetensors")[f"{name}/taps"]
        shape = TargetShape(hidden_size=taps.shape[-1], vocab_size=48, num_layers=10)
        convert_drafter(str(REFERENCES / name), folder / "mlx" / name, target=shape)
        out = folder / name
        target = "narrow-target" if name == "target_width" else "tiny-target"
        export_drafter(folder / "mlx" / name, out, format="speculators", target=target)
        names.append(name)
    return names


def test_the_packages_own_heads_come_back_as_it_wrote_them(tmp_path):
    """`make_references.py --exported` runs the package itself on what is written here."""
    for name in exported_references(tmp_path):
        written = load_tensors(REFERENCES / name)
        got = load_tensors(tmp_path / name)
        assert got.keys() == written.keys()
        for key, tensor in written.items():
            assert got[key].dtype == tensor.dtype
            assert mx.array_equal(got[key], tensor), (name, key)
        ours, theirs = (
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / name, REFERENCES / name)
        )
        for key in (
            *("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"),
            "draft_vocab_size",
        ):
            assert ours[key] == theirs.get(key, ours[key] if key == "fc_norm" else False), key


def load_tensors(folder: Path) -> dict[str, mx.array]:
    return read_safetensors(folder / "model.safetensors")


if __name__ == "__main__":  # for make_references.py --exported
    print(*exported_references(Path(sys.argv[1])))
