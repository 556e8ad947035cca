"""benchmarks/gsm8k.py from beginning to end, with everything as small as it gets."""

import importlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("arithmetic")


def test_equations_are_found_and_checked(arithmetic: ModuleType) -> None:
    found = arithmetic.equations(
        [
            "<<2+2=4>>4, <<3*3=8>>8 and <<a=3>>",
            "<<1/3=.33>>.33 <<(1,000-1)/-3=-333>> <<1/0=0>>",
            "",
            "<<2**9=512>>",
        ]
    )
    assert found["written"] == 4
    assert found["right"] == 0.75
    # By hand: residuals of the texts, right - 0.75 written, are 1 - 1.5 and 2 - 1.5.
    assert found["standard_error"] == pytest.approx((0.25 + 0.25) ** 0.5 / 4)
    assert arithmetic.equations(["nothing"]) == {"written": 0, "right": 0, "standard_error": 0}


@pytest.mark.parametrize("text", ["__import__('os')", "9**9**9", "'a'", "f(1)", "True", "1;2", ""])
def test_only_arithmetic_is_evaluated(arithmetic: ModuleType, text: str) -> None:
    assert arithmetic.value(text) is None
    assert arithmetic.value("2.5*(4-1)") == Fraction(15, 2)


def test_drills_hold(arithmetic: ModuleType) -> None:
    (text,) = arithmetic.drills(1)
    assert text == next(arithmetic.drills(5))
    assert arithmetic.equations([text]) == {"written": 60, "right": 1, "standard_error": 0}


@pytest.mark.slow
def test_the_benchmark_runs_and_its_table_is_that_of_the_runs(tmp_path: Path) -> None:
    data = tmp_path / "gsm8k"
    data.mkdir()
    for split, count in (("train", 24), ("test", 4)):
        rows = [
            {"question": f"What is {i} plus 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
            for i in range(count)
        ]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {
        "megabytes": 0.05, "drills": 2, "vocab": 300, "hidden": 32, "layers": 1, "seq-len": 256, "micro-batch": 4, "pretrain-steps": 3,
        "steps": 3, "max-new-tokens": 4, "recipes": "bf16,fp8", "device": "cpu", "commit": "test",
        "work": tmp_path / "work", "out": tmp_path / "out", "data": data,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks" / "gsm8k.py")]
    command += [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    (file,) = (tmp_path / "out").glob("*.json")
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["results"]] == ["bf16", "fp8"]
    assert record["text_megabytes"] > 0.05
    for row in record["results"]:
        assert row["equations"]["written"] >= 0
        summary = tmp_path / "work" / "gsm8k-compare" / row["name"] / "summary.json"
        assert row["valid_loss"] == json.loads(summary.read_text())["valid_after"]
        assert row["exact_match"]["questions"] == 4
    assert f"{record['results'][1]['gap']:+.4f}" in file.with_suffix(".md").read_text()
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # Nothing of the data set goes into the results.
    assert "What is" not in file.read_text() + file.with_suffix(".md").read_text()
