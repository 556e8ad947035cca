"""One linear layer with every recipe beside bf16 and torchao.float8, on shapes of Llama-3-8B; torchao where it is importable.

    python benchmarks/bench_linear.py
    python benchmarks/bench_linear.py --tokens 16384 --recipes fp8 int8 --no-save
    python benchmarks/bench_linear.py --join A.json B.json    # other numbers of tokens, measured apart, in one table

Measured as ``halo-train bench linear`` does it; torchao's layers are compiled with inductor, and also run as they are.
Writes a dated JSON file, a table and a picture.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, environment, save_json
from torch import Tensor, nn

from halo_train import RECIPES, HaloConfig
from halo_train.bench.linear import (
    Case,
    add_arguments,
    chosen_shapes,
    geometric_means,
    measure,
    recipe_case,
    recipes,
    require_gpu,
)

TORCHAO = ("tensorwise", "rowwise")

VARIANTS: dict[str, HaloConfig] = {
    "fp8 H=D=1": replace(RECIPES["fp8"], rotate_k=False, equalize=False),
    "fp8 folded dgrad": RECIPES["fp8"].with_folded_dgrad,
}
"""What rotation and equalisation cost in time, and what the other form of dgrad does."""


def torchao_cases(weight: Tensor, eager: bool) -> list[Case]:
    """torchao's layers around ``weight``, compiled, then as they are if ``eager``."""
    if importlib.util.find_spec("torchao") is None:
        return []
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch._dynamo.config.recompile_limit = 64  # All these layers share one compiled function.
    cases = []
    for compiled in (True, False) if eager else (True,):
        for recipe in TORCHAO:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.clone())
            model: nn.Module = nn.Sequential(linear)
            convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe))
            if compiled:
                model = torch.compile(model, dynamic=False)
            name = f"torchao {recipe}" + ("" if compiled else " eager")
            cases.append(Case(name, model, torch.float8_e4m3fn))
    return cases


def draw(rows: list[dict[str, Any]], means: dict[int, dict[str, float]], path: Path) -> None:
    """Speed-up by layer and geometric mean, one panel for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(means), 1, figsize=(11, 3.1 * len(means)), squeeze=False)
    for axis, (tokens, by_name) in zip(axes[:, 0], means.items(), strict=True):
        names = [name for name in by_name if name != "bf16"]
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            values = [r["speedup"] for r in rows if (r["tokens"], r["name"]) == (tokens, name)] + [
                by_name[name]
            ]
            at = [j - 0.4 + (i + 0.5) * width for j in range(len(values))]
            axis.bar(at, values, width * 0.92, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(layers) + 1), [*layers, "geometric mean"])
        axis.set_ylabel("speed-up over bf16")
        axis.set_title(f"forward + backward, {tokens} tokens", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=7, ncols=4, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]], means: dict[int, dict[str, float]], where: dict[str, Any]) -> str:
    """Markdown: microseconds of forward + backward and speed-up over bf16, by tokens and layer."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = [
        f"One linear layer, forward + backward: microseconds (times bf16). {where['gpu']}, driver {where['driver']}, torch "
        f"{where['torch']}, {where['date']}, commit {where['commit']}.",
        "",
    ]
    for tokens, by_name in means.items():
        lines += [
            f"| {tokens} tokens | "
            + " | ".join(layers)
            + " | geometric mean | GEMM share | saved B per element |",
            "|---" * (len(layers) + 4) + "|",
        ]
        for name, mean in by_name.items():
            mine = [r for r in rows if (r["tokens"], r["name"]) == (tokens, name)]
            cells = [f"{r['both_us']:.0f} ({r['speedup']:.2f})" for r in mine]
            share = " ".join(f"{r['gemm_share']:.0%}" for r in mine)
            saved = " ".join(f"{r['saved_bytes']:.2f}" for r in mine)
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {mean:.2f} | {share} | {saved} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.set_defaults(tokens=[512, 2048, 8192, 16384], recipes=list(RECIPES))
    parser.add_argument("--no-torchao-eager", action="store_true", help="torchao compiled only")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument(
        "--join", type=Path, nargs="+", metavar="JSON", help="records to put together; measures nothing"
    )
    args = parser.parse_args()
    if args.join:
        records = [json.loads(path.read_text()) for path in args.join]
        save([row for record in records for row in record["rows"]], records[0]["environment"], args.out)
        return
    require_gpu(parser)
    rows = measure(
        args.tokens,
        chosen_shapes(args),
        lambda weight: [
            *(recipe_case(r, weight) for r in recipes(args)),
            *(recipe_case(name, weight, config) for name, config in VARIANTS.items()),
            *torchao_cases(weight, not args.no_torchao_eager),
        ],
        args.rounds,
        args.settle,
    )
    if args.no_save:
        geometric_means(rows)
    else:
        save(rows, environment(args.commit), args.out)


def save(rows: list[dict[str, Any]], where: dict[str, Any], folder: Path) -> None:
    """JSON, table and picture."""
    rows = sorted(rows, key=lambda row: row["tokens"])
    means = geometric_means(rows)
    path = save_json("linear", {"environment": where, "rows": rows, "geometric_means": means}, folder)
    path.with_suffix(".md").write_text(table(rows, means, where))
    draw(rows, means, path.with_suffix(".png"))
    print(f"\n{path}")


if __name__ == "__main__":
    main()
