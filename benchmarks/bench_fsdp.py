"""A training step of a Llama under FSDP2: bf16, torchao.float8 and halo_train, time, memory and bytes on the wire.

    torchrun --nproc-per-node 4 benchmarks/bench_fsdp.py                          # about 150 s on 4 H200s
    torchrun --nproc-per-node 2 benchmarks/bench_fsdp.py --tiny --device cpu      # shows that it runs

The shape is that of Llama-3-8B, cut to 8 blocks (those of transformers), vocabulary 128256, one sequence of 8192 tokens a GPU,
weights and AdamW in float32, bfloat16 parameters in forward and backward, gradients reduced in float32, blocks and model
sharded and blocks compiled one by one; the output layer stays in bfloat16 but where a name says otherwise. Every variant starts from the same
weights and sees the same tokens. A step is timed after all ranks have waited for each other, which leaves each host no lead,
and steps in a row, without waiting between them. Writes a dated JSON file.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import RESULTS, check_only, environment, save_json
from llama import Shape
from timeline import timeline
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from wire import bytes_sent

from halo_train import convert_to_halo_training

TINY = Shape(2, 64, 4, 2, 160, 128, 64)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run the linear layers of the blocks."""

    name: str
    convert: Callable[[nn.Module], Any]
    compiled: bool = True
    after_step: Callable[[nn.Module], None] | None = None


class Llama(nn.Module):
    """Embedding, the blocks of transformers, norm, output layer; returns the mean loss of the next token, in bfloat16."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            attn_implementation="sdpa",
        )
        self.head = shape.hidden // shape.heads
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(shape.blocks))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [1, tokens + 1]."""
        x = self.embedding(tokens[:, :-1])
        frequency = 500000.0 ** (-torch.arange(0, self.head, 2, device=x.device) / self.head)
        angle = torch.outer(torch.arange(x.shape[1], device=x.device), frequency).repeat(1, 2)[None]
        positions = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, position_embeddings=positions)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def in_block(module: nn.Module, name: str) -> bool:
    return "lm_head" not in name


def every_layer(module: nn.Module, name: str) -> bool:
    return True


def variants(device: str) -> list[Variant]:
    """bf16 first: it is what the others are compared with."""
    found = [Variant("bf16", lambda model: None)]
    if importlib.util.find_spec("torchao") is not None and device == "cuda":
        from torchao.float8 import (
            Float8LinearConfig,
            convert_to_float8_training,
            precompute_float8_dynamic_scale_for_fsdp,
        )

        tensorwise = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        rowwise = Float8LinearConfig.from_recipe_name("rowwise")
        for name, config, layers, after in (
            (
                "torchao tensorwise, float8 all-gather",
                tensorwise,
                in_block,
                precompute_float8_dynamic_scale_for_fsdp,
            ),
            ("torchao rowwise", rowwise, in_block, None),
            (
                "torchao tensorwise, output layer too",
                tensorwise,
                every_layer,
                precompute_float8_dynamic_scale_for_fsdp,
            ),
        ):
            found.append(
                Variant(
                    name,
                    lambda model, config=config, layers=layers: convert_to_float8_training(
                        model, config=config, module_filter_fn=layers
                    ),
                    after_step=after,
                )
            )

    def halo(
        layers: Callable[[nn.Module, str], bool] = in_block,
        recipe: str = "fp8",
        fuse: bool = True,
        recompute: str = "nothing",
    ) -> Callable[[nn.Module], None]:
        def convert(model: nn.Module) -> None:
            convert_to_halo_training(
                model, recipe=recipe, module_filter_fn=layers, fuse=fuse, recompute=recompute
            )

        return convert

    return [
        *found,
        Variant("halo_train fp8", halo()),
        Variant("halo_train fp8, inputs rounded again", halo(recompute="inputs")),
        Variant("halo_train int8", halo(recipe="int8")),
        Variant("halo_train int8, inputs rounded again", halo(recipe="int8", recompute="inputs")),
        Variant("halo_train fp8, output layer too", halo(every_layer)),
        Variant(
            "halo_train fp8, output layer too, inputs rounded again", halo(every_layer, recompute="inputs")
        ),
        Variant("halo_train fp8, not fused", halo(fuse=False)),
        Variant("halo_train fp8, eager", halo(), compiled=False),
        Variant("bf16, eager", lambda model: None, compiled=False),
    ]


def prepare(variant: Variant, shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """The training step of one variant, warm; returns loss and gradient norm."""
    torch._dynamo.reset()
    with torch.device("meta"):
        model = Llama(shape)
    variant.convert(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(dist.get_rank())

    def step() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(shape.vocabulary, (1, shape.tokens + 1), generator=generator).to(device)
        loss = model(tokens)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if variant.after_step is not None:
            variant.after_step(model)
        return loss.detach(), norm

    with torch.compiler.set_stance("force_eager"):  # equalisation factors come from the first batch
        step()
    if variant.compiled:
        for block in model.blocks:
            block.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    step()
    return step


def measure(variant: Variant, shape: Shape, device: torch.device, steps: int) -> dict[str, Any]:
    """Step time, memory, bytes, loss and gradient norm of one variant."""
    started = time.perf_counter()
    step = prepare(variant, shape, device)
    synchronise(device)
    warm_up = time.perf_counter() - started
    with bytes_sent() as sent:
        step()
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    gc.collect()
    gc.disable()  # a collection on one rank keeps all others waiting, each at another moment
    for _ in range(steps):
        dist.barrier()
        synchronise(device)
        began = time.perf_counter()
        loss, norm = step()
        synchronise(device)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronise(device)
    in_a_row = (time.perf_counter() - began) / steps
    gc.enable()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    mine = {
        "loss": loss.item(),
        "norm": norm.item(),
        "peak": peak,
        "ms": 1e3 * statistics.median(times),
        "ms_in_a_row": 1e3 * in_a_row,
    }
    dist.barrier()
    synchronise(device)
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    gpu_ms = timeline(step) if device.type == "cuda" else None
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return {
        "name": variant.name,
        "ms": max(r["ms"] for r in ranks),
        "ms_in_a_row": max(r["ms_in_a_row"] for r in ranks),
        "peak_gib": max(r["peak"] for r in ranks) / 2**30,
        "bytes": sent,
        "loss": statistics.fmean(r["loss"] for r in ranks),
        "grad_norm": mine["norm"],
        "grad_norm_equal_on_all_ranks": len({r["norm"] for r in ranks}) == 1,
        "warm_up_s": round(warm_up, 1),
        "host_ms": 1e3 * host,
        "gpu_ms": gpu_ms,
    }


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict[str, Any]]) -> str:
    """Times beside bf16."""
    lines = [
        f"{'':<40}{'ms':>8}{'x bf16':>8}{'in a row':>10}{'x bf16':>8}{'GiB':>7}{'all-gather':>12}{'red.-sc.':>10}{'all-red.':>10}{'loss':>9}{'norm':>8}"
    ]
    for row in rows:
        gib = {kind: f"{n / 2**30:.3f}" for kind, n in row["bytes"].items()}
        lines.append(
            f"{row['name']:<40}{row['ms']:>8.1f}{rows[0]['ms'] / row['ms']:>8.3f}{row['ms_in_a_row']:>10.1f}{rows[0]['ms_in_a_row'] / row['ms_in_a_row']:>8.3f}{row['peak_gib']:>7.2f}{gib['all_gather']:>12}"
            f"{gib['reduce_scatter']:>10}{gib['all_reduce']:>10}{row['loss']:>9.4f}{row['grad_norm']:>8.3f}"
            + ("" if row["grad_norm_equal_on_all_ranks"] else "  norms differ between ranks")
        )
    lines.append("GiB of bytes: what one rank puts into the collectives of one step")
    for row in rows:
        if row["gpu_ms"]:
            kernels = sorted(row["gpu_ms"]["kernels"].items(), key=lambda item: -item[1])
            lines.append(
                f"{row['name']}: host {row['host_ms']:.0f} ms; GPU computes {row['gpu_ms']['compute']:.1f}, waits for communication "
                f"{row['gpu_ms']['exposed']:.1f}, idle {row['gpu_ms']['idle']:.1f}; "
                + ", ".join(f"{name} {ms:.1f}" for name, ms in kernels)
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a few thousand weights, to see that it runs")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, default=150, help="no further variant is started after this time"
    )
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args()
    check_only(parser, args.only, [variant.name for variant in variants(args.device)])
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, rank if args.device == "cuda" else None)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    shape = TINY if args.tiny else Shape()
    started, rows = time.perf_counter(), []
    for variant in variants(args.device):
        late = torch.tensor(float(time.perf_counter() - started > args.seconds), device=device)
        dist.all_reduce(late, dist.ReduceOp.MAX)
        if late or (args.only and variant.name not in args.only):
            continue
        rows.append(measure(variant, shape, device, args.steps))
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(
                table([*rows[:1], rows[-1]]).splitlines()[2],
                f"  {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    if dist.get_rank() == 0:
        print(table(rows))
        if not args.no_save:
            record = {
                "environment": environment(args.commit),
                "command": f"torchrun --nproc-per-node {dist.get_world_size()} benchmarks/bench_fsdp.py",
                "gpus": dist.get_world_size(),
                "shape": dataclasses.asdict(shape),
                "rows": rows,
            }
            print(save_json(f"fsdp-{dist.get_world_size()}gpus", record, args.out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
