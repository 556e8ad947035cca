"""The report: recommendations against planted faults, the page in a real browser, and the commands that make it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from training_fixtures import halo_train, write_run

from halo_train import QuantSample, load_recipe
from halo_train.metrics import PRODUCTS
from halo_train.metrics.records import JsonlSink, read_samples
from halo_train.metrics.sample import SampleSize
from halo_train.quant_report import advise, write_report
from halo_train.quant_report.page import page_data, render_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def sample(step: int = 50, **layers: dict[str, float]) -> QuantSample:
    """Layers that run fp8: ``name={"": dB as run, "int8": dB, ...}``, all three products alike; ``x_nan`` a share."""
    values = {}
    for name, scores in layers.items():
        parts = {"x": {"nonfinite": scores.pop("x_nan", 0.0), "crest": 20.0, "underflow": 0.0}}
        parts["x_operand"] = {"crest": 5.0, "underflow": 0.0}
        parts["e_dgrad_operand"] = {"crest": 90.0, "underflow": 0.4}
        for label, db in scores.items():
            for product in PRODUCTS:
                lower = db - 1 if product == "dgrad" else db
                parts[product + (f"@{label}" if label else "")] = {"sqnr_db": db + 5, "median_db": lower}
        values[name] = parts
    return QuantSample(step, SampleSize(256, 256, 64), dict.fromkeys(values, "fp8"), values, {})


def test_recommendations():
    found = advise(
        [
            sample(
                good={"": 28.0, "int8": 40.0},
                rotated={"": 15.0, "fp8_plain": 28.0, "int8": 20.0},
                both={"": 16.0, "fp8_plain": 28.0, "int8": 40.0},
                integer={"": 14.0, "fp8_plain": 16.0, "int8": 35.0},
                hopeless={"": 3.0, "fp8_plain": 4.0, "int8": 12.0},
                broken={"": math.nan, "int8": math.nan, "x_nan": 0.01},
            )
        ]
    )
    by_layer = {advice.layer: advice for advice in found}
    assert [a.layer for a in found] == [
        "broken",
        "hopeless",
        "integer",
        "rotated",
        "both",
    ]  # the worst first, good not at all
    assert by_layer["rotated"].action == "turn the rotation off here: fp8_plain"
    assert by_layer["integer"].action == by_layer["both"].action == "use int8 here"  # faster than fp8_plain
    assert by_layer["hopeless"].recipe == "bf16"
    assert by_layer["broken"].recipe is None
    assert "X in 1.0% of its rows" in by_layer["broken"].evidence
    assert by_layer["integer"].evidence == (
        "dgrad 13.0 dB in the median, 34.0 with int8; 40% of e_dgrad_operand flushed to zero; crest factor of "
        "e_dgrad_operand 90"
    )


def test_tensorwise_recipes_are_for_comparison():
    """halo0_fp8 says that e4m3 without rotation is enough, not that the layer should run it."""
    (advice,) = advise([sample(a={"": 15.0, "halo0_fp8": 28.0, "int8": 20.0})])
    assert (advice.recipe, advice.action) == ("fp8_plain", "turn the rotation off here: fp8_plain")
    assert advice.evidence.startswith("dgrad 14.0 dB in the median, 27.0 with halo0_fp8")
    assert advice.evidence.endswith("; fp8_plain was not measured: it is halo0_fp8 with one scale a row")
    (advice,) = advise([sample(a={"": 15.0, "halo0_fp8": 28.0, "fp8_plain": 19.0})])
    assert advice.recipe == "bf16"
    (advice,) = advise([sample(a={"": 15.0, "halo1_fp8": 28.0, "halo2_int8": 40.0})])
    assert advice.recipe == "bf16"
    paper = sample(a={"": 15.0, "halo1_int8": 28.0})
    (advice,) = advise([dataclasses.replace(paper, recipes={"a": "halo0_int8"})])
    assert advice.recipe == "halo1_int8"  # who runs the paper's schemes gets them


def test_one_bad_draw_is_not_enough():
    steady = [sample(step, a={"": 30.0, "int8": 40.0}) for step in (1, 50)]
    assert advise([*steady, sample(100, a={"": 10.0, "int8": 40.0})]) == []
    assert len(advise([sample(step, a={"": 10.0, "int8": 40.0}) for step in (1, 50, 100)])) == 1


def test_page_holds_the_figures_and_loads_nothing():
    samples = [sample(step, a={"": 15.0, "int8": 40.0}, b={"": 30.0, "int8": 41.0}) for step in (1, 50)]
    data = page_data(samples)
    assert data["steps"] == [1, 50]
    assert data["values"]["a"]["wgrad@int8"][:3] == [40, 45, 40]
    assert data["drift"]["worst_layer"]["fprop"] == [15, 15]
    assert data["drift"]["median_layer"]["dgrad"] == [21.5, 21.5]
    assert data["tensors"]["a"]["x"][0] == 20
    assert data["mapping"] == {"a": "int8", "*": "fp8"} or data["mapping"] == {"b": "fp8", "*": "int8"}
    page = render_page("a </script><b>", samples)
    embedded = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL).group(
        1
    )
    assert json.loads(embedded) == data
    assert "<b>" not in page.split("<style>")[0]
    assert not re.search(r"(src|href)=\"(?!data:,)", page)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def browse(page: Path, *options: str) -> tuple[str, str]:
    """(DOM after the scripts ran, what the console said) in headless Chromium."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=3000",
        *options, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with samples at steps 1, 2, 4, 6."""
    folder = tmp_path_factory.mktemp("quant")
    assert halo_train("run", str(write_run(folder)), "log.quant_every=2", "train.grad_accum=1") == 0
    return folder / "runs" / "tiny"


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
@pytest.mark.parametrize("dark", [0, 1])
def test_page_in_a_browser(run: Path, size: str, dark: int):
    dom, console = browse(
        run / "quant_report.html",
        f"--window-size={size}",
        f"--blink-settings=preferredColorScheme={1 - dark}",
    )
    assert console == ""
    heat = re.search(r'<table class="heat".*?</table>', dom, re.DOTALL).group()
    layers = read_samples(run / "quant.jsonl")[-1].values
    assert heat.count("<td title=") == len(layers) == 14
    assert heat.count("background:") == 14 * 3 * 3  # as run, fp8_plain and int8; fp8 is what runs
    worst = min(min(parts["fprop"][s] for s in ("sqnr_db", "median_db")) for parts in layers.values())
    assert f"<b>{worst:.1f} dB</b>" in dom
    assert dom.count("<circle") > 14 * 2 + 4 * 3
    assert dom.count("<polyline") == 3 + 3


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_of_a_run_with_nan(tmp_path: Path):
    """Is said, and not taken for what was not measured."""
    broken = sample(a={"": 30.0, "int8": 40.0}, b={"": 28.0, "int8": 41.0})
    for stats in broken.values["a"].values():
        stats.update(dict.fromkeys(stats, math.nan))
    JsonlSink(tmp_path / "quant.jsonl")(broken)
    dom, console = browse(write_report(tmp_path)[0][0], "--window-size=1200,900")
    assert console == ""
    heat = re.search(r'<table class="heat".*?</table>', dom, re.DOTALL).group()
    assert heat.count('<td class="low">NaN</td>') == 6
    assert heat.count("background:") == 6
    assert "Infinity" not in re.sub("<script.*?</script>", "", dom, flags=re.DOTALL)
    assert "<b>NaN</b>" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_browser_test_would_see_an_error(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("<script>nowhere()</script>")
    assert "nowhere is not defined" in browse(page)[1]


def test_pictures_and_samples_of_a_run(run: Path):
    assert [s.step for s in read_samples(run / "quant.jsonl")] == [1, 2, 4, 6]
    for name in ("heatmap", "drift", "rotation"):
        assert (run / f"quant_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_report_command(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "quant_report.html").unlink()
    assert halo_train("report", str(run)) == 0
    out = capsys.readouterr().out
    assert (run / "quant_report.html").exists()
    assert str(run / "quant_report.html") in out
    assert "worst_layer" in out
    assert "Nothing to change" in out or "What to do" in out
    assert halo_train("report", str(run.parent)) == 2
    assert "has no samples; record some with QuantMetrics" in capsys.readouterr().err


def test_resumed_run_goes_on_with_its_samples(tmp_path: Path):
    options = ("log.quant_every=2", "train.grad_accum=1")
    file = str(write_run(tmp_path))
    assert halo_train("run", file, *options, "save.keep=9") == 0
    folder = tmp_path / "runs" / "tiny"
    shutil.rmtree(folder / "checkpoints" / "step-6")
    before = read_samples(folder / "quant.jsonl")
    assert halo_train("run", file, *options) == 0
    after = read_samples(folder / "quant.jsonl")
    assert [s.step for s in after] == [1, 2, 4, 6]
    assert after[-1].flat() == pytest.approx(before[-1].flat())


def test_calibrate_command_and_a_run_with_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, recipe = str(write_run(tmp_path)), tmp_path / "mixed.json"
    assert halo_train("calibrate", file, "--batches", "2", "--output", str(recipe)) == 0
    printed = capsys.readouterr()
    assert "14 layers, 2 batches" in printed.out
    assert f"quant.recipe={recipe}" in printed.err
    recipes = load_recipe(recipe)
    assert len(recipes) == 14
    text = json.loads(recipe.read_text())
    text["recipe"]["model.layers.0.mlp.up_proj"] = "int8"
    recipe.write_text(json.dumps(text))
    assert halo_train("run", file, f"quant.recipe={recipe}", "train.steps=2") == 0
    folder = tmp_path / "runs" / "tiny"
    converted = json.loads((folder / "conversion.json").read_text())["converted"]
    assert {c["name"]: c["recipe"] for c in converted}["model.layers.0.mlp.up_proj"] == "int8"
    assert json.loads((folder / "summary.json").read_text())["recipe"] == "mixed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "{file}", "quant.recipe=none.json"], "none.json"),
        (["run", "{file}", "log.quant_every=2", "log.quant_what_if=fp8,fp9"], "must be out of"),
        (
            ["run", "{file}", "log.quant_every=2", "log.quant_layers=*.norm"],
            "'*.norm' matches none of the 14",
        ),
        (["calibrate", "{file}", "--output", "recipe.yaml"], "--output must end with .json"),
        (
            ["calibrate", "{file}", "--output", "nowhere/recipe.json"],
            "--output must be in a folder that exists",
        ),
    ],
)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    file = write_run(tmp_path)
    assert halo_train(*(argument.format(file=file) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_was_killed_while_it_wrote(run: Path, tmp_path: Path):
    lines = (run / "quant.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "quant.jsonl").write_text("".join(lines[:-1]) + lines[-1][:60])
    files, _ = write_report(tmp_path)
    assert all(file.exists() for file in files)
    assert len(read_samples(tmp_path / "quant.jsonl")[-1].values) == 13


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "quant.jsonl has no samples; record some with"),
        (b'{"step": 1, "la', "quant.jsonl has no samples"),
        (b'{"step": 1}\n', "quant.jsonl: line 1 is no sample of JsonlSink; remove it"),
        (b"[1, 2]\n", "line 1 is no sample"),
        (b"null\n[]\n", "line 1 is no sample"),
        (b"\xad\x00\n\xff\n", "line 1 is no sample"),
        (None, "a report is of the folder of a run; "),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: bytes | None, message: str):
    folder = tmp_path / "run"
    if text is not None:
        folder.mkdir()
        (folder / "quant.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        write_report(folder)


def test_a_resumed_run_keeps_what_can_be_read(tmp_path: Path):
    path = tmp_path / "quant.jsonl"
    for step in (1, 2, 3):
        JsonlSink(path, step - 1)(dataclasses.replace(sample(a={"": 30.0}), step=step))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:50], "[]", '{"step": "1"}', lines[1], lines[2]]))
    JsonlSink(path, 2)
    assert [found.step for found in read_samples(path)] == [1, 2]


def test_null_in_the_file_is_a_gap_in_the_page(tmp_path: Path):
    sink = JsonlSink(tmp_path / "quant.jsonl")
    broken = sample(a={"": 30.0})
    broken.values["a"]["fprop"]["sqnr_db"] = math.nan
    sink(dataclasses.replace(broken, step=1))
    files, advice = write_report(tmp_path)
    assert all(file.exists() for file in files)
    assert advice[0].recipe == "bf16"
    data = page_data(read_samples(tmp_path / "quant.jsonl"))
    assert data["values"]["a"]["fprop"][0] is None
