"""benchmarks/train_parity.py runs from end to end, and planting outliers leaves the function as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def train_parity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_parity

    yield train_parity
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for name in ("train_parity", "parity_table", "llama", "common"):
        sys.modules.pop(name, None)


def test_every_run_is_in_the_record(train_parity, tmp_path):
    schemes = ["fp8", "HALO-0 int8"]
    train_parity.main(
        ["--smoke", "--outliers", "1", "64", "--schemes", "bf16", *schemes, "--out", str(tmp_path)]
    )
    (record,) = tmp_path.glob("*.json")
    runs = json.loads(record.read_text())["runs"]
    assert {(r["scheme"], r["outlier"]) for r in runs} == {
        (s, c) for s in ("bf16", *schemes) for c in (1, 64)
    }
    table = record.with_suffix(".md").read_text()
    gap = next(r["loss"] for r in runs if (r["scheme"], r["outlier"]) == (schemes[1], 64))
    gap -= next(r["loss"] for r in runs if (r["scheme"], r["outlier"]) == ("bf16", 64))
    assert f"{gap:+.4f}" in table
    assert record.with_suffix(".png").stat().st_size > 0


def test_again_it_goes_on_from_the_same_weights(train_parity, tmp_path, capsys):
    options = ["--smoke", "--outliers", "1", "--out", str(tmp_path), "--schemes"]
    train_parity.main([*options, "bf16", "fp8"])
    (path,) = tmp_path.glob("*.json")
    first, weights = json.loads(path.read_text()), (tmp_path / "train-parity-pretrained.pt").read_bytes()
    train_parity.main([*options, "bf16", "fp8", "int8"])
    second = json.loads(path.read_text())
    assert second["pretraining"] == first["pretraining"]
    assert [r["scheme"] for r in second["runs"]] == ["bf16", "fp8", "int8"]
    assert second["runs"][:2] == first["runs"]
    assert (tmp_path / "train-parity-pretrained.pt").read_bytes() == weights
    assert "1 of 1  c=1" in capsys.readouterr().out


def test_parts_of_the_same_weights_are_one_record(train_parity, tmp_path):
    """Two machines pre-train to the same bits; their runs add up, and those from other weights are refused."""
    parts = []
    for scheme in ("bf16", "int8"):
        out = tmp_path / scheme
        train_parity.main(["--smoke", "--outliers", "1", "--schemes", scheme, "--out", str(out)])
        parts += [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert [[r["scheme"] for r in part["runs"]] for part in parts] == [["bf16"], ["int8"]]
    joined = sys.modules["parity_table"].joined
    record = joined([*parts, parts[0]])
    assert [r["scheme"] for r in record["runs"]] == ["bf16", "int8"]
    gap = parts[1]["runs"][0]["loss"] - parts[0]["runs"][0]["loss"]
    path = tmp_path / "all.json"
    assert f"{gap:+.4f}" in sys.modules["parity_table"].write_report(record, path)
    assert path.with_suffix(".png").stat().st_size > 0
    with pytest.raises(ValueError, match="same weights"):
        joined([parts[0], {**parts[1], "weights_sha256_16": "other"}])


def test_planted_outliers_leave_the_function(train_parity):
    model = train_parity.build(train_parity.SMOKE, "cpu").double()
    tokens = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))
    inputs = []
    model.blocks[0].q.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    before = model(tokens)
    train_parity.plant_outliers(model, 512)
    torch.testing.assert_close(model(tokens), before, rtol=1e-9, atol=0)
    assert inputs[1].abs().max() > 100 * inputs[0].abs().max()
