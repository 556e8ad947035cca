"""halo-train export: the tensors against an independent rounding, the FP8 directory read back, the last checkpoint of a run."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_fixtures import halo_train, write_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from halo_train.recipes import finetune
from halo_train.training import hf_export
from halo_train.training.config import load_config
from halo_train.training.hf_export import export, layers_for_fp8, quantize_weight
from halo_train.training.model import export_model, train_tokenizer

SIZES = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 200,  # no multiple of 16: down_proj stays in bfloat16
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _directory(folder: Path, kind: str = "llama", **sizes: object) -> Path:
    tokenizer = train_tokenizer(["def f(x): return x"] * 3, 320)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}))
    export_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _directory(tmp_path_factory.mktemp("model") / "hf", intermediate_size=256)


def _e4m3_values() -> torch.Tensor:
    """All finite values by the format's definition: sign, 4 exponent bits with bias 7, 3 mantissa bits; float64."""
    found = [0.0]
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # NaN
                found.append(
                    (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
                )
    positive = torch.tensor(sorted(set(found)), dtype=torch.float64)
    return torch.cat([-positive.flip(0), positive])


def test_weights_are_rounded_to_the_nearest_e4m3_value_of_their_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 33, generator=generator) * torch.logspace(-6, 3, 7)[:, None]
    weight[3] = 0
    data, scale = quantize_weight(weight.bfloat16())
    assert (data.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.bfloat16, (7, 1))
    assert scale[3] == 1
    exact = weight.bfloat16().double() / scale.double()
    nearest = (exact.unsqueeze(-1) - _e4m3_values()).abs().amin(-1)
    error = (data.double() - exact).abs()
    inside = exact.abs() <= 448
    # Of two equally near values either will do; the division itself rounds in float32.
    assert torch.allclose(error[inside], nearest[inside], rtol=1e-5, atol=1e-5)
    # The scale is a bfloat16, so the largest value of a row may lie a little outside.
    assert (data.double().abs()[~inside] == 448).all()
    assert exact.abs().amax() <= 448 * (1 + 2**-8)


def test_fp8_directory_holds_the_model(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "fp8"
    message = export(source, "compressed-tensors", out)
    assert "14 weights in e4m3" in message
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    layers = {key.removesuffix("_scale").removesuffix(".weight") for key in after if key.endswith("_scale")}
    assert len(layers) == 14
    assert set(after) == set(before) | {f"{layer}.weight_scale" for layer in layers}
    for key, tensor in before.items():
        if key.removesuffix(".weight") in layers:
            back = after[key].float() * after[f"{key}_scale"].float()
            assert after[key].dtype == torch.float8_e4m3fn
            # Half a unit of a mantissa of 3 bits, and half a subnormal step, the row's amax being 448.
            floor = tensor.abs().amax(1, keepdim=True) * 2.0**-10 / 448 * 1.01
            assert ((back - tensor).abs() <= tensor.abs() * (2.0**-4 + 2.0**-8) + floor).all()
        else:
            assert torch.equal(after[key], tensor.bfloat16())
    config = json.loads((out / "config.json").read_text())
    scheme = config["quantization_config"]
    assert (scheme["quant_method"], scheme["format"], scheme["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    assert AutoTokenizer.from_pretrained(out)("x")["input_ids"]
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) < 0.5 * sum(
        p.stat().st_size for p in source.glob("*.safetensors")
    )


def test_transformers_reads_the_fp8_directory_and_its_logits_are_near(source: Path, tmp_path: Path) -> None:
    """By the compressed-tensors package: dequantised weights, and inputs rounded by token."""
    export(source, "compressed-tensors", tmp_path / "fp8")
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
        near = model(ids).logits.float()
    noise = (near - exact).norm() / exact.norm()
    assert 0.003 < noise < 0.1  # bfloat16 alone is below


def test_its_logits_are_those_of_the_plain_export_with_rounded_weights_and_inputs(
    source: Path, tmp_path: Path
) -> None:
    """compressed-tensors reads what was meant: the plain model with our weights put back and inputs rounded here."""
    export(source, "compressed-tensors", tmp_path / "fp8")
    export(source, "hf", tmp_path / "hf")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)

    def rounded_by_token(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        scale = args[0].abs().amax(-1, keepdim=True) / 448
        return (args[0] / scale).to(torch.float8_e4m3fn).float() * scale

    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = plain(ids).logits
        for name, layer in plain.named_modules():
            if f"{name}.weight_scale" in stored:
                layer.weight.copy_(stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float())
                layer.register_forward_pre_hook(rounded_by_token)
        expected = plain(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype=torch.float32)(ids).logits
    assert (found - expected).norm() < 1e-3 * (expected - exact).norm()


def test_layers_that_vllm_merges_are_stored_alike(tmp_path: Path) -> None:
    """One key head of 8: k and v do not fit the kernels, so q, which would, stays in bfloat16 as well."""
    folder = _directory(tmp_path / "hf", head_dim=8, num_key_value_heads=1, intermediate_size=256)
    layers, ignored = layers_for_fp8(folder)
    attention = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkv"}
    assert attention < set(ignored)
    assert {name.rpartition(".")[2] for name in layers} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_what_is_no_multiple_of_16_or_tied_is_left_alone(tmp_path: Path) -> None:
    folder = _directory(tmp_path / "hf", kind="qwen2", tie_word_embeddings=True)
    layers, ignored = layers_for_fp8(folder)
    # lm_head is the embedding's weight: nothing of that name is stored.
    assert ignored == [
        "lm_head",
        *(f"model.layers.{i}.mlp.{name}_proj" for i in range(2) for name in ("down", "gate", "up")),
    ]
    assert len(layers) == 8
    assert export(folder, "compressed-tensors", tmp_path / "fp8").startswith(f"{tmp_path / 'fp8'}: 8 weights")
    assert "lm_head.weight" not in load_file(tmp_path / "fp8" / "model.safetensors")
    biases = {k for k in load_file(tmp_path / "fp8" / "model.safetensors") if k.endswith("q_proj.bias")}
    assert len(biases) == 2


def test_shards_stay_shards(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    export(tmp_path / "sharded", "compressed-tensors", tmp_path / "fp8")
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        stored = load_file(tmp_path / "fp8" / name)
        assert set(stored) == {key for key, file in index["weight_map"].items() if file == name}
    assert sum(key.endswith("_scale") for key in index["weight_map"]) == 14


def test_a_run_gives_bfloat16_and_its_last_checkpoint_when_it_did_not_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.run(load_config(write_run(tmp_path)))
    run = tmp_path / "runs" / "tiny"
    final = load_file(run / "export" / "model.safetensors")
    assert halo_train("export", str(run), "--output", str(tmp_path / "a")) == 0
    plain = load_file(tmp_path / "a" / "model.safetensors")
    assert all(torch.equal(plain[key], tensor.bfloat16()) for key, tensor in final.items())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"

    os.rename(run / "export", tmp_path / "gone")
    assert halo_train("export", str(run), "--output", str(tmp_path / "b")) == 0
    again = load_file(tmp_path / "b" / "model.safetensors")
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in plain.items())
    earlier = run / "checkpoints" / "step-4"
    assert halo_train("export", str(earlier), "--output", str(tmp_path / "c")) == 0
    assert not torch.equal(
        load_file(tmp_path / "c" / "model.safetensors")["lm_head.weight"], plain["lm_head.weight"]
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    assert halo_train("export", str(run), "--output", str(tmp_path / "a")) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert halo_train("export", str(tmp_path), "--output", str(tmp_path / "d")) == 2
    assert "holds no model: no config.json, export or checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["hf", "compressed-tensors"])
def test_a_full_disk_leaves_nothing_behind(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    def full(tensors: dict[str, torch.Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(hf_export, "save_file", full)
    assert halo_train("export", str(source), "--format", form, "--output", str(tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"halo-train: {tmp_path / 'out'} could not be written: ")
    assert "No space left on device" in err
    assert list(tmp_path.iterdir()) == []


def test_stacked_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _directory(tmp_path / "moe", kind="mixtral", num_local_experts=2, intermediate_size=32)
    arguments = ["export", str(folder), "--format", "compressed-tensors", "--output", str(tmp_path / "fp8")]
    assert halo_train(*arguments) == 2
    assert "holds the matrices of several experts" in capsys.readouterr().err
    assert not (tmp_path / "fp8").exists()


def test_bench_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("bench") == 0
    assert "linear" in capsys.readouterr().out
    assert halo_train("bench", "linaer") == 2
    assert "did you mean 'linear'?" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
def test_bench_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert halo_train("bench", "linear", "--tokens", "512") == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
