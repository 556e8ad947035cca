"""A whole training step, Llama-3-8B shape cut to 8 layers: bf16, torchao.float8 (where importable) and our recipes.

    python benchmarks/bench_step.py
    python benchmarks/bench_step.py --mode compiled --recipes fp8 int8 --no-save
    python benchmarks/bench_step.py --mode compiled --loss chunked --layers 32 --steps 4      # all of the model: fills an H200

Measured as ``halo-train bench step`` does it. Writes a dated JSON file, after every row, and in the end a table and a picture.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, check_only, environment, save_json
from step_table import save
from torch import nn

from halo_train import convert_to_halo_training
from halo_train.bench.linear import require_gpu
from halo_train.bench.step import CHECKPOINTING, Case, add_arguments, measure, recipe_case, recipes, size_of


def variants(recipe: str) -> list[Case]:
    """A recipe with every layer rounding what it reads for itself (norms and SwiGLU write bfloat16); with less kept for backward; with
    the output layer in 8 bits; both."""

    def case(what: str, **options: Any) -> Case:
        return Case(
            f"{recipe}, {what}", lambda model: convert_to_halo_training(model, recipe=recipe, **options)
        )

    less = ("inputs", "mlp")
    return [
        case("fuse=False", fuse=False),
        *(case(f"recompute={what}", recompute=what) for what in less),
        case("output layer too", output_layer=True),
        *(case(f"recompute={what}, output layer too", recompute=what, output_layer=True) for what in less),
    ]


def torchao_cases() -> list[Case]:
    if importlib.util.find_spec("torchao") is None:
        return []
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch._dynamo.config.recompile_limit = 64

    def case(recipe: str, output_layer: bool) -> Case:
        config = Float8LinearConfig.from_recipe_name(recipe)

        def convert(model: nn.Module) -> None:
            convert_to_float8_training(
                model, config=config, module_filter_fn=lambda module, name: output_layer or name != "lm_head"
            )

        return Case(f"torchao {recipe}{', output layer too' if output_layer else ''}", convert)

    return [case("tensorwise", False), case("tensorwise", True), case("rowwise", False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(checkpointing=list(CHECKPOINTING), recipes=["fp8", "int8"])
    parser.add_argument("--only", nargs="+", help="cases to measure, bf16 among them, instead of all")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    require_gpu(parser)
    cases = [
        *(recipe_case(recipe) for recipe in recipes(args)),
        *(case for recipe in recipes(args)[1:] for case in variants(recipe)),
        *torchao_cases(),
    ]
    check_only(parser, args.only, [case.name for case in cases])
    if args.only:
        cases = [case for case in cases if case.name in args.only]
    rows: list[dict[str, Any]] = []
    record = {"environment": environment(args.commit), "size": size_of(args)._asdict(), "rows": rows}
    for row in measure(size_of(args), cases, args):
        rows.append(row)
        if not args.no_save:
            save_json("step", record, args.out)  # a later case may run out of memory or time
    if not args.no_save:
        print(f"\n{save(record, args.out)}")


if __name__ == "__main__":
    main()
