"""The structure that a newcomer relies on: import direction, lean import, where torch.ops and csrc are named."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from halo_train import ops
from halo_train.ops.schemas import GENERIC_OPS, SCHEMAS, TRITON_OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "halo_train"

# A module may import from those on earlier lines only.
LAYERS = [
    ["config", "hadamard_matrices"],
    ["ops"],
    ["recipe_file", "cost", "hadamard", "quantize"],
    ["reuse"],
    ["gemm"],
    ["operands", "weight_cache", "agreement"],
    ["products"],
    ["functional", "fused"],
    ["fsdp", "shared_input"],
    ["linear"],
    ["blocks", "equalizer_state"],
    ["convert", "metrics"],
    ["calibrate"],
    ["__init__"],
    ["quant_report"],
    ["training"],
    ["bench", "recipes"],
    ["cli"],
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "recipes").rglob("*.py")])


def layer_of(path: Path) -> str:
    relative = path.relative_to(ROOT).parts
    return "recipes" if relative[0] == "recipes" else Path(relative[1]).stem


def own_imports(path: Path) -> list[tuple[ast.stmt, str]]:
    """(statement, module of ours that it imports) for every import of our own package in a file."""
    found = []
    package = [
        "halo_train",
        *(["recipes"] if layer_of(path) == "recipes" else path.relative_to(PACKAGE).parts[:-1]),
    ]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "halo_train":
                known = len(parts) > 1 and parts[1] in RANK
                found.append((node, parts[1] if known else "__init__"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_stand_at_the_top(path):
    here = layer_of(path)
    assert here in RANK, f"{here} has no place in LAYERS"
    tree = ast.parse(path.read_text())
    inside = {
        inner.lineno
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(f)
        if isinstance(inner, ast.stmt)
    }
    for node, target in own_imports(path):
        assert node.lineno not in inside, f"{path.name}:{node.lineno} imports {target} inside a function"
        same_folder = here == target and path.parent != PACKAGE
        assert RANK[target] < RANK[here] or same_folder or here == "__init__", f"{here} imports {target}"


def test_only_ops_names_torch_ops():
    naming = {p.relative_to(PACKAGE).as_posix() for p in FILES if "torch.ops.halo_train" in p.read_text()}
    assert naming == {"ops/registry.py"}


def test_every_op_has_a_reference_of_its_name_and_every_kernel_a_source_file():
    status = ops.kernel_status()["ops"]
    assert {name: function.__name__ for name, (_, function) in SCHEMAS.items()} == {
        name: name for name in SCHEMAS
    }
    assert set(ops.KERNEL_OPS) | set(TRITON_OPS) == set(status) == set(SCHEMAS) - GENERIC_OPS
    for source in ops.KERNEL_OPS.values():
        assert (ROOT / "csrc" / source).exists()


def test_import_needs_torch_only_and_leaves_cuda_alone():
    code = """
import sys
for name in ("transformers", "numpy", "yaml", "pydantic", "einops", "matplotlib", "wandb", "torchao", "typer"):
    sys.modules[name] = None
import torch
torch.cuda.init = torch._C._cuda_init = lambda *a: sys.exit("CUDA was initialised")
import halo_train
assert not torch.cuda.is_initialized()
heavy = {"triton", "torch._inductor", "torch._dynamo"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_are_documented():
    import halo_train

    for name in halo_train.__all__:
        if name != "RECIPES":
            assert getattr(halo_train, name).__doc__, name


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
