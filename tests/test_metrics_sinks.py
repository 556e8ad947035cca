"""Where samples go: JSONL, wandb (offline), TensorBoard, console; and the callback of the transformers Trainer."""

from __future__ import annotations

import json
import math
import struct
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from halo_train import QuantMetrics, QuantSample, convert_to_halo_training
from halo_train.linear import halo_linears
from halo_train.metrics.console import ConsoleSink, sample_table
from halo_train.metrics.records import JsonlSink, read_samples
from halo_train.metrics.sample import SampleSize


def toy_run(sinks, steps: int = 3, **options) -> QuantSample:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    convert_to_halo_training(model, recipe="int8")
    with QuantMetrics(model, every=2, sinks=sinks, what_if=["halo0_int8"], **options) as metrics:
        for _ in range(steps):
            model(torch.randn(40, 64)).square().mean().backward()
            metrics.step()
    return metrics.last


def test_jsonl_holds_everything(tmp_path):
    path = tmp_path / "quant.jsonl"
    collected = []
    toy_run([JsonlSink(path), collected.append])
    samples = read_samples(path)
    assert [s.step for s in samples] == [1, 2]
    for read, written in zip(samples, collected, strict=True):
        assert (read.size, read.recipes) == (written.size, written.recipes)
        # A median of two biases of opposite sign has fewer digits than they.
        assert read.flat() == pytest.approx(written.flat(), rel=1e-6, abs=1e-9)
        for layer in written.histograms:
            for part, shares in written.histograms[layer].items():
                assert read.histograms[layer][part] == pytest.approx(shares, abs=1e-6)


def test_jsonl_of_a_resumed_run(tmp_path):
    path = tmp_path / "quant.jsonl"
    toy_run([JsonlSink(path)], steps=4)  # samples 1, 2, 4
    with path.open("a") as file:
        file.write('{"step": 6, "lay')  # killed while writing
    toy_run([JsonlSink(path, start_step=2)], steps=4, start_step=2)
    assert [s.step for s in read_samples(path)] == [1, 2, 4, 6]


def test_jsonl_writes_nan_as_null(tmp_path):
    sample = toy_run([])
    sample.values["0"]["fprop"]["sqnr_db"] = math.nan
    sink = JsonlSink(tmp_path / "quant.jsonl")
    sink(sample)
    assert "NaN" not in sink.path.read_text()
    assert math.isnan(read_samples(sink.path)[0].values["0"]["fprop"]["sqnr_db"])


def read_wandb(folder) -> list[dict]:
    """History rows of an offline run, from its transaction log: protocol buffers in LevelDB's log format."""
    (file,) = folder.rglob("run-*.wandb")
    rows, kinds = [], set()
    for _ in range(300):
        rows, kinds = parse_wandb(file.read_bytes())
        if "exit" in kinds:  # another process writes the file
            break
        time.sleep(0.1)
    return rows


def parse_wandb(data: bytes) -> tuple[list[dict], set[str]]:
    """History rows and kinds of all records."""
    from wandb.proto import wandb_internal_pb2

    position, rows, kinds, payload = 7, [], set(), b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(payload)
            items = record.history.item
            rows += (
                [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}] if items else []
            )
            kinds.add(record.WhichOneof("record_type"))
            payload = b""
    return rows, kinds


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from halo_train.metrics.wandb_sink import WandbSink

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="test", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    sample = toy_run([WandbSink(run)])
    run.log({"loss": 1.0})
    run.finish()
    rows = [row for row in read_wandb(tmp_path) if "quant/step" in row]
    assert [row["quant/step"] for row in rows] == [1, 2]  # also where the loop logs nothing in between
    last = rows[-1]
    assert last["quant/worst_layer/wgrad/sqnr_db"] == pytest.approx(
        min(sample.values[k]["wgrad"]["sqnr_db"] for k in "02")
    )
    assert last["quant_fprop@halo0_int8/median_db/2"] == pytest.approx(
        sample.values["2"]["fprop@halo0_int8"]["median_db"]
    )
    assert last["loss"] == 1.0  # the row of the loop's own step stays open
    assert last["quant_x_operand/exponents/0/_type"] == "histogram"
    assert last["quant_x_operand/exponents/0/values"] == pytest.approx(
        sample.histograms["0"]["x_operand"][::-1]
    )
    (table,) = [
        p
        for p in tmp_path.rglob("*.table.json")
        if json.loads(p.read_text())["data"][1][2] == pytest.approx(sample.values["2"]["fprop"]["sqnr_db"])
    ]
    assert json.loads(table.read_text())["columns"][:5] == [
        "layer",
        "recipe",
        "fprop",
        "fprop@halo0_int8",
        "dgrad",
    ]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from halo_train.metrics.tensorboard_sink import TensorBoardSink

    sample = toy_run([TensorBoardSink(tmp_path)])
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0, "scalars": 0})
    events.Reload()
    curve = events.Scalars("quant_dgrad/p10_db/0")
    assert [point.step for point in curve] == [1, 2]
    assert curve[-1].value == pytest.approx(sample.values["0"]["dgrad"]["p10_db"], rel=1e-6)
    histogram = events.Histograms("quant_x/exponents/2")[-1].histogram_value
    assert histogram.num == pytest.approx(1)
    assert np.asarray(histogram.bucket).sum() == pytest.approx(1)


def test_console_table(capsys):
    sample = toy_run([ConsoleSink()])
    console = Console(width=160, record=True)
    console.print(sample_table(sample))
    text = console.export_text()
    for layer in ("0", "2"):
        stats = sample.values[layer]["wgrad@halo0_int8"]
        assert f"{stats['sqnr_db']:.1f} / {stats['median_db']:.1f} / {stats['p10_db']:.1f}" in text
    assert text.index("worst_layer") < text.index("median_layer") < text.index(f" {sample.worst_first()[0]} ")
    assert "256 tokens" in text
    assert "worst_layer" in capsys.readouterr().out


def test_console_table_in_a_narrow_window_shows_whole_names():
    values = toy_run([]).values["0"]
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    sample = QuantSample(
        1, SampleSize(256, 256, 64), dict.fromkeys(names, "int8"), dict.fromkeys(names, values), {}
    )
    console = Console(width=80, record=True)
    console.print(sample_table(sample))
    first_column = [line.split("│")[1].strip() for line in console.export_text().splitlines() if "│" in line]
    assert all(name in "".join(first_column) for name in names)


@pytest.mark.slow
def test_trainer_with_the_callback_and_wandb(tmp_path, monkeypatch):
    """transformers' Trainer, its own wandb integration in offline mode, our samples in the same run."""
    wandb = pytest.importorskip("wandb")
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from halo_train.metrics.trainer import QuantMetricsCallback
    from halo_train.metrics.wandb_sink import WandbSink

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.init(
        project="test", dir=str(tmp_path), settings=wandb.Settings(silent=True)
    )  # the Trainer takes it over
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )  # fmt: skip
    convert_to_halo_training(model, recipe="fp8")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (64, 16))]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=["wandb"], logging_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    callback = QuantMetricsCallback(
        every=2, sinks=[JsonlSink(tmp_path / "quant.jsonl"), WandbSink()], what_if=["int8"], layers=["*mlp*"]
    )
    Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback]).train()
    wandb.finish()
    samples = read_samples(tmp_path / "quant.jsonl")
    assert [s.step for s in samples] == [1, 2, 4]
    assert len(samples[0].values) == 6
    history = read_wandb(tmp_path)
    assert [row["quant/step"] for row in history if "quant/step" in row] == [1, 2, 4]
    assert sum("train/loss" in row for row in history) == 5
    name = "model.layers.1.mlp.down_proj"
    charted = [row[f"quant_wgrad@int8/sqnr_db/{name}"] for row in history if "quant/step" in row]
    assert charted == pytest.approx([s.values[name]["wgrad@int8"]["sqnr_db"] for s in samples], rel=1e-6)
    assert not any(layer.operand_hooks for _, layer in halo_linears(model))
