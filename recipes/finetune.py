"""Full fine-tuning of a causal language model with 8-bit linear layers, on one GPU or many.

    halo-train run recipes/quickstart.yaml
    halo-train run recipes/quickstart.yaml --nproc 4 train.grad_accum=4
    halo-train run my.yaml quant.recipe=int8 train.lr=1e-5

- any causal model of transformers: a Hugging Face directory, or random weights from a config file
- JSONL, parquet or a data set of the hub with messages (loss on the assistant's turns only), prompt and completion or Alpaca's
  fields (loss on completions only), or text; on request packed
- AdamW, bfloat16 autocast, weights in float32 or bfloat16; the linear layers run the precision recipe ``quant.recipe``
- with ``eval.exact_match`` answers that the model writes on the way, compared with those of a file
- with ``log.quant_every`` the quantisation error of every layer and product: ``quant.jsonl``, ``quant_report.html``
- several processes, of ``--nproc`` or torchrun: FSDP2, weights travel in 8 bits; checkpoints that any number of processes resume
- stops at will (Ctrl-C, SIGTERM), goes on bit for bit when it is started again
- leaves a Hugging Face directory without a trace of the 8-bit layers; ``halo-train compare`` sets several precisions side by side
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from halo_train import HaloConfig, revert
from halo_train.quant_report import write_report
from halo_train.training.blocks import checkpoint_activations, compile_blocks
from halo_train.training.checkpoint import CheckpointWriter, Progress, latest_checkpoint, load_checkpoint
from halo_train.training.config import Config, EvalSection
from halo_train.training.data import BatchStream, ShuffledBatches
from halo_train.training.distributed import (
    Ranks,
    callable_in_parts,
    join,
    own_files,
    require_several_possible,
    shard,
    whole,
    whole_weights,
)
from halo_train.training.errors import Interrupted, RunFailed
from halo_train.training.exact_match import Score, exact_match
from halo_train.training.flops import FlopCounter, bf16_peak
from halo_train.training.logging import (
    MetricsFile,
    ProgressBar,
    environment,
    read_metrics,
    write_atomically,
)
from halo_train.training.loop import (
    StopSignals,
    evaluate,
    pick_device,
    prepare_equalizers,
)
from halo_train.training.loss import TokenLoss
from halo_train.training.model import build_loss, export_model
from halo_train.training.optim import build_optimizer, learning_rate, set_learning_rate
from halo_train.training.packing import require_isolation
from halo_train.training.precision import (
    convert,
    measure,
    quant_metrics,
    read_recipes,
    require_low_precision,
)
from halo_train.training.prepare import Data, load_data, require_same_data
from halo_train.training.report import Result, plot_losses, run_table, summarise
from halo_train.training.run_folder import check_run_folder, make_run_folder
from halo_train.training.sharded_load import weights_while_used
from halo_train.training.trackers import Trackers
from halo_train.training.watchdog import locate_non_finite


def run(config: Config) -> dict[str, Any]:
    """Trains, measures, exports; prints as it goes.

    Returns:
        What is written to ``summary.json``.

    Raises:
        UserError: settings, data, model or device that cannot work; nothing was started.
        RunFailed: non-finite loss, or a checkpoint that could not be written; the last checkpoint is whole.
        Interrupted: SIGINT or SIGTERM, after saving a checkpoint.
    """
    with join(pick_device(config.train.device)) as ranks:
        require_several_possible(config, ranks.world_size)
        folder = check_run_folder(config)
        ranks.wait()  # before the first makes the folder
        recipes = read_recipes(config.quant.recipe)
        for recipe in set(recipes.values()):
            require_low_precision(recipe, ranks.device)
        with StopSignals() as stop, own_files(ranks, folder) as files:
            with ranks.first_goes_first():
                data = load_data(config, folder)
                if ranks.first:
                    make_run_folder(folder, config)
                    require_same_data(folder, data)
                    write_atomically(folder / "env.json", json.dumps(environment(), indent=2) + "\n")
                    if not Path(config.model.path).is_dir():
                        data.tokenizer.save_pretrained(folder / "tokenizer")
            result = train(config, recipes, folder, files, data, ranks, stop)
            return conclude(config, result, folder, files, data, ranks)


def conclude(
    config: Config, result: Result, folder: Path, files: Path, data: Data, ranks: Ranks
) -> dict[str, Any]:
    """Writes and prints what came out of a run, and returns its summary. ``files``: of this process."""
    if config.log.quant_every:
        print(f"quantisation error by layer: {write_report(files)[0][0]}", flush=True)
    plot_losses(files / "loss.png", f"{config.run.name}: {result.recipe}", files / "metrics.jsonl")

    emulated = ranks.device.type == "cpu" and config.quant.recipe != "bf16"
    summary = {
        "name": config.run.name,
        "device": str(ranks.device),
        "processes": ranks.world_size,
        "emulated_on_cpu": emulated,
        "trained_token_share": data.train.trained_tokens / data.train.tokens,
        **result.to_dict(),
    }
    write_atomically(files / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\nvalidation loss: {result.valid_before:.4f} before, {result.valid_after:.4f} after\n")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(run_table(result, emulated))
    print(f"\nmodel: {folder / 'export'}\nplot:  {folder / 'loss.png'}\nall:   {folder}")
    return summary


def train(
    config: Config,
    recipes: dict[str, HaloConfig],
    folder: Path,
    files: Path,
    data: Data,
    ranks: Ranks,
    stop: StopSignals,
) -> Result:
    """One training run with one precision recipe, or one for each layer. Errors as in :func:`run`.

    Args:
        folder: of the run, for checkpoints and export; files: of this process, for all else.
    """
    cfg, label, device = config.train, config.quant.label, ranks.device
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    loss_of = build_loss(config, data.tokenizer, device, sharded=ranks.several)
    model, path = loss_of.model, Path(config.model.path)
    if config.data.packing:
        with weights_while_used(model, path):
            require_isolation(model, config.model.path)

    # Where it can be, the first validation is that of the model before its conversion.
    checkpoint = latest_checkpoint(checkpoints)
    valid_before = None if checkpoint or ranks.several else evaluate(loss_of, data.valid, device)

    conversion = convert(model, recipes, config, files)
    if loss_of.whole_logits:
        print(f"the logits of all tokens are in memory at once: {loss_of.whole_logits}", flush=True)

    if cfg.activation_checkpointing != "none":
        checkpoint_activations(model, cfg.activation_checkpointing)
    if ranks.several:
        shard(loss_of, model, ranks, path)
    optimizer = build_optimizer(model, cfg)
    progress = load_checkpoint(checkpoint, model, optimizer) if checkpoint else Progress()
    if checkpoint:
        print(f"resumed from {checkpoint}", flush=True)
    if not checkpoint and any(recipe.equalize for recipe in recipes.values()):
        batches = ShuffledBatches(data.train, cfg.micro_batch, data.pad_id, config.run.seed)
        first_step = (batches[i] for i in range(ranks.rank, cfg.grad_accum, ranks.world_size))
        prepare_equalizers(loss_of, first_step, device)
    if ranks.several and not checkpoint:  # what is sharded is converted already
        valid_before = evaluate(loss_of, data.valid, device, ranks)
    if cfg.compile:
        compile_blocks(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    counter, peak = FlopCounter(model), bf16_peak(device)
    if peak:
        print(f"mfu is the share of {peak / 1e12:.0f} TFLOP/s, this GPU's dense bfloat16 peak", flush=True)

    loss_of.train()
    with (
        CheckpointWriter(checkpoints, config.save.keep, background=config.save.background) as writer,
        MetricsFile(files / "metrics.jsonl", progress.step) as metrics,
        Trackers(
            config.log, files, f"{config.run.name}-{label}", config.model_dump(mode="json"), progress.step
        ) as trackers,
        ProgressBar(label, data.steps, progress.step, config.log.every) as bar,
        ExitStack() as stack,
    ):
        quant = None
        if config.log.quant_every:
            quant = stack.enter_context(quant_metrics(config, model, files, progress.step, trackers))
        if valid_before is not None:
            metrics.write(step=0, valid_loss=valid_before)
            bar.note(f"validation loss {valid_before:.4f} before training")

        stream = stack.enter_context(
            BatchStream(
                data.train,
                cfg.micro_batch,
                data.pad_id,
                config.run.seed,
                progress.batches,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        )
        for step in range(progress.step + 1, data.steps + 1):
            started = time.perf_counter()
            micro_batches = [next(stream) for _ in range(cfg.grad_accum // ranks.world_size)]
            waited = time.perf_counter() - started
            # The mean is over the trained tokens of the whole step, not a mean of means over its micro-batches.
            trained, tokens = ranks.sums(
                [sum(batch.trained for batch in micro_batches), sum(batch.tokens for batch in micro_batches)]
            )

            total = torch.zeros((), device=device)
            for batch in micro_batches:
                loss = loss_of(**batch.inputs(device)) / trained
                loss.backward()
                total += loss.detach()
            grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), cfg.clip))
            # The loop's only wait for the GPU in a step.
            value, norm = torch.stack([total, grad_norm.to(total)]).tolist()
            (value,) = ranks.sums([value])
            if not (math.isfinite(value) and math.isfinite(norm)):
                where = "one process can tell"
                if not ranks.several:
                    where = locate_non_finite(loss_of, micro_batches, device)
                writer.wait()
                saved = latest_checkpoint(checkpoints)
                kept = (
                    f"the last checkpoint, {saved}, is kept" if saved else "no checkpoint was saved before it"
                )
                raise RunFailed(
                    f"step {step}: loss {value}, gradient norm {norm} is not finite; first: {where}; the weights were not "
                    f"updated with it and {kept}; lower train.lr, lengthen train.warmup_steps, or compare with "
                    "quant.recipe=bf16"
                )

            lr = learning_rate(step, data.steps, cfg)
            set_learning_rate(optimizer, lr)
            optimizer.step()
            optimizer.zero_grad()
            progress = Progress(step, stream.position)

            seconds = time.perf_counter() - started
            flops = counter.step(micro_batches)
            values = {
                "loss": value,
                "lr": lr,
                "grad_norm": norm,
                "tokens": tokens,
                "trained_tokens": trained,
                "tokens_per_second": tokens / seconds,
                "data_wait": waited / seconds,
                "share_8bit": flops.eight_bit / flops.total,
            }
            if peak:
                values["mfu"] = flops.total / seconds / peak
            if device.type == "cuda":
                values["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            metrics.write(step=step, **values)
            trackers.log(step, **values)
            if quant is not None:
                quant.step()
            bar.step(step, loss=values["loss"], tokens_s=values["tokens_per_second"])

            last = step == data.steps
            if step % config.log.eval_every == 0 or last:
                valid = evaluate(loss_of, data.valid, device, ranks)
                metrics.write(step=step, valid_loss=valid)
                trackers.log(step, valid_loss=valid)
                bar.note(f"validation loss {valid:.4f} at step {step}")
            if data.questions and (last or (config.eval.every and step % config.eval.every == 0)):
                score = answer(loss_of, data, config.eval, ranks)
                (files / "answers").mkdir(exist_ok=True)
                write_atomically(files / "answers" / f"step-{step}.json", score.to_json())
                metrics.write(step=step, exact_match=score.exact_match)
                trackers.log(step, exact_match=score.exact_match)
                bar.note(f"{score} at step {step}")
            stopping, failed = ranks.sums([stop.received or 0, writer.failed])
            if failed:
                writer.wait()
            if step % config.save.every == 0 or last or stopping:
                writer.save(model, optimizer, progress)
            if stopping:
                writer.wait()
                raise Interrupted(
                    stop.received or signal.SIGTERM,
                    f"stopped after step {step} of {data.steps}; repeat the command to go on ({folder})",
                )

    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    errors = measure(loss_of, data, device)
    weights = whole_weights(model) if ranks.several else None
    if ranks.first:
        export_model(model if ranks.several else revert(model), data.tokenizer, folder / "export", weights)
    ranks.wait()
    return Result(
        recipe=label,
        layers_converted=len(conversion.converted),
        layers_left_alone=len(conversion.skipped),
        peak_memory_gib=memory,
        errors=errors,
        **summarise(read_metrics(files / "metrics.jsonl")),
    )


def answer(loss_of: TokenLoss, data: Data, section: EvalSection, ranks: Ranks) -> Score:
    """Lets the model, as it trains, answer the questions of the section ``eval``."""
    # Compiled, every length would be compiled apart.
    with torch.compiler.set_stance("force_eager"), callable_in_parts(loss_of):
        return exact_match(
            loss_of.model,
            data.tokenizer,
            data.questions,
            section.pattern,
            max_new_tokens=section.max_new_tokens,
            batch=section.batch,
            ranks=ranks,
        )
