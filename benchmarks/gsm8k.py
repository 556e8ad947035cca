"""GSM8K end to end: a Llama trained from scratch on text found on this machine, then fine-tuned in several precisions.

    python benchmarks/gsm8k.py --data GSM8K     # four minutes on an H200; GSM8K holds train.jsonl and test.jsonl

1. Text: sources and documentation of Python's standard library and of the installed packages, the training questions of GSM8K
   (github.com/openai/grade-school-math, MIT), and drawn equations in its notation. The model, 260M parameters by default, and
   its tokenizer are made from it by the fine-tuning recipe in bf16 and saved as a Hugging Face directory.
2. ``halo-train compare`` fine-tunes that directory on GSM8K's training split in each precision, from the same weights on the
   same batches, and validates on the test split.
3. Each exported model, without 8-bit layers now, answers the test questions greedily.

What the model knows is what a minute of training can teach it, so expect a few per cent of exact matches, with a standard error
that hides any effect of 8 bits; test losses of two precisions differ by 0.03 to either side for no other reason than that a
run has taken another path (docs/LOG.md). The share of right equations among those that the answers write down, such as ``<<48/2=24>>``,
tells more: some thousand instead of some dozen successes.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import site
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from arithmetic import drills, equations
from common import RESULTS, environment, save_json
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from halo_train.recipes import finetune
from halo_train.training.compare import Comparison, plan, run_members
from halo_train.training.compare_report import read_lines, write_comparison
from halo_train.training.config import load_config
from halo_train.training.evaluation import Evaluation, run_evaluation
from halo_train.training.loop import pick_device
from halo_train.training.model import export_model, train_tokenizer

SUFFIXES = (".py", ".md", ".rst", ".txt")


def documents(roots: list[Path], megabytes: float) -> Iterator[str]:
    """Texts under the roots in an order that depends on their names alone, until there are so many characters."""
    files = sorted({path for root in roots for path in root.rglob("*") if path.suffix in SUFFIXES})
    random.Random(0).shuffle(files)
    left = megabytes * 1e6
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 1000 <= len(text) <= 200_000:  # longer ones are tables and generated code
            yield text
            left -= len(text)
        if left <= 0:
            return


def write_jsonl(path: Path, rows: Iterator[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def write_data(args: argparse.Namespace, folder: Path) -> list[str]:
    """text.jsonl, train.jsonl and test.jsonl in the formats of the recipe; returns the documents."""
    split = {
        name: [json.loads(line) for line in (args.data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    roots = [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]
    texts = list(documents(roots, args.megabytes))
    questions = [row["question"] for row in split["train"]]
    texts += ["\n\n".join(questions[i : i + 8]) for i in range(0, len(questions), 8)]
    texts += drills(args.drills)
    write_jsonl(folder / "text.jsonl", ({"text": text} for text in texts))
    for name, rows in split.items():
        pairs = ({"prompt": prompt(row["question"]), "completion": " " + row["answer"]} for row in rows)
        write_jsonl(folder / f"{name}.jsonl", pairs)
    return texts


def fresh_model(args: argparse.Namespace, texts: list[str], folder: Path) -> int:
    """A Hugging Face directory with random weights and a tokenizer trained on a part of the texts; the parameters' number."""
    sample = random.Random(1).sample(texts, k=max(1, len(texts) // 4))
    tokenizer = train_tokenizer(sample, args.vocab)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 64),
        num_key_value_heads=max(1, args.hidden // 256),
        max_position_embeddings=args.seq_len,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(args.seed)
    with pick_device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    export_model(model, tokenizer, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def run_file(path: Path, **sections: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"save": {"every": 1_000_000, "background": True}, **sections}))
    return path


def pretrain(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains ``fresh`` on the text; the model is in ``pretrain/export``."""
    file = run_file(
        folder / "pretrain.yaml",
        run={"name": "pretrain", "dir": str(folder), "seed": args.seed},
        model={"path": "fresh"},
        quant={"recipe": "bf16"},
        data={
            "train": "text.jsonl",
            "cache_dir": str(folder / "cache"),
            "seq_len": args.seq_len,
            "valid_fraction": 0.005,
        },
        train={
            "steps": args.pretrain_steps,
            "micro_batch": args.micro_batch,
            "lr": 6e-4,
            "warmup_steps": args.pretrain_steps // 10,
            "weight_decay": 0.1,
            "device": args.device,
        },
        log={"eval_every": args.pretrain_steps, "every": 50},
    )
    return finetune.run(load_config(file))


def comparison(args: argparse.Namespace, folder: Path) -> Comparison:
    """The fine-tuning runs, in every precision."""
    file = run_file(
        folder / "gsm8k.yaml",
        run={"name": "gsm8k", "dir": str(folder)},
        model={"path": "pretrain/export"},
        data={
            "train": "train.jsonl",
            "valid": "test.jsonl",
            "cache_dir": str(folder / "cache"),
            "seq_len": min(512, args.seq_len),
        },
        train={
            "steps": args.steps,
            "micro_batch": args.micro_batch,
            "lr": 3e-4,
            "warmup_steps": args.steps // 20,
            "weight_decay": 0.1,
            "device": args.device,
        },
        log={"eval_every": args.steps, "every": 50},
    )
    seeds = ",".join(str(args.seed + i) for i in range(args.seeds))
    return plan(file, [f"quant.recipe={args.recipes}", f"run.seed={seeds}"], None)


def results(compared: Comparison) -> list[dict[str, Any]]:
    """A row of the table for each run that has finished."""
    rows = []
    for line in read_lines(compared):
        folder = compared.folder / line.name
        summary = json.loads((folder / "summary.json").read_text())
        row = {**vars(line), "data_wait": summary["data_wait"], "exact_match": None}
        answers = folder / "answers.json"
        if answers.is_file():
            row["exact_match"] = found = json.loads(answers.read_text())["exact_match"]
            row["equations"] = equations(sample["generated"] for sample in found.pop("samples"))
        rows.append(row)
    return rows


def answer(args: argparse.Namespace, folder: Path, run: Path) -> None:
    """Lets the run's model answer the test questions: ``answers.json`` in the run's folder."""
    asked = Evaluation(
        data=folder / "test.jsonl",
        task="exact-match",
        lm_eval=[],
        form="auto",
        rename={},
        pattern="####",
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        seq_len=args.seq_len,
        batch=args.answers_at_once,
    )
    file = run_evaluation(run, asked, pick_device(args.device), run / "answers.json")
    first = json.loads(file.read_text())["exact_match"]["samples"][0]
    print(f"{first['prompt']!r}\n-> {first['generated']!r} (expected {first['expected']})", flush=True)
    torch.cuda.empty_cache()


def report(record: dict[str, Any]) -> str:
    """The table and what is needed to read it."""
    env, settings, before = record["environment"], record["settings"], record["pretraining"]
    lines = [
        f"# GSM8K end to end, {env['gpu']}, {env['date']}",
        "",
        f"`{record['command']}`; torch {env['torch']}, driver {env['driver']}, commit {env['commit']}; {record['seconds']:.0f} s in all.",
        "",
        f"A Llama of {record['parameters'] / 1e6:.0f}M parameters (hidden {settings['hidden']}, {settings['layers']} layers) from random weights:",
        f"{settings['pretrain_steps']} steps of {settings['micro_batch']} rows on {record['text_megabytes']:.0f} MB of text in bf16, validation loss "
        f"{before['valid_before']:.3f} to {before['valid_after']:.3f}.",
        f"Then {settings['steps']} steps of {settings['micro_batch']} rows on GSM8K's training split; loss on its test split, greedy answers of the",
        "exported model, products in bfloat16, to its test questions.",
        "",
        "| precision | test loss | gap | training loss | exact match | answered | right equations | tokens/s | speed | data wait | 8-bit | peak GiB | "
        "SQNR fprop/dgrad/wgrad |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in record["results"]:
        match = row["exact_match"]
        score, answered, right = "-", "-", "-"
        if match is not None:
            score = f"{percent(match['exact_match'], match['standard_error'])} ({match['correct']}/{match['questions']})"
            answered = f"{100 * (1 - match['without_answer'] / match['questions']):.0f}%"
            right = f"{percent(row['equations']['right'], row['equations']['standard_error'])} of {row['equations']['written']}"
        memory = "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}"
        speed = "-" if row["emulated"] or row["speed"] is None else f"{row['speed']:.2f}"
        gap = "-" if row["gap"] is None else f"{row['gap']:+.4f}"
        lines.append(
            f"| {row['name']} | {row['valid_loss']:.4f} | {gap} | {row['train_loss']:.4f} | "
            f"{score} | {answered} | {right} | {row['tokens_per_second']:,.0f} | {speed} | {100 * row['data_wait']:.2f}% | {100 * row['share_8bit']:.0f}% | {memory} | "
            f"{'/'.join(f'{db:.0f}' for db in row['sqnr_db'].values())} |"
        )
    lines += [
        "",
        "gap: test loss minus that of the first precision, same weights, data, order and seed. ±: standard error over the questions; another seed moves",
        "the figures too. answered: share of the texts with something after `####`. right equations: share of the `<<48/2=24>>` in the answers that hold.",
        "tokens/s: training, median step, padding not counted. data wait: share of the steps' time. 8-bit: share of the operations in matrix products.",
        "SQNR in dB, median layer.",
    ]
    lines += [f"\n{name} failed with exit code {code}." for name, code in record["failed"].items()]
    return "\n".join(lines) + "\n"


def percent(share: float, error: float) -> str:
    return f"{100 * share:.2f}% ± {100 * error:.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with GSM8K's train.jsonl and test.jsonl"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gsm8k"), help="is replaced")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--recipes", default="bf16,fp8,int8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="fine-tuning runs of each precision")
    parser.add_argument("--megabytes", type=float, default=12, help="of found text")
    parser.add_argument("--drills", type=int, default=6000, help="texts of 60 drawn equations")
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--pretrain-steps", type=int, default=120)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--limit", type=int, help="test questions")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--answers-at-once", type=int, default=1400)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--commit", help="where the sources are no git checkout")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()

    def stage(name: str) -> None:
        print(f"\n=== {time.perf_counter() - started:.0f} s: {name}", flush=True)

    folder = args.work.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stage("text and tokenizer")
    texts = write_data(args, folder)
    parameters = fresh_model(args, texts, folder / "fresh")
    stage(f"{parameters / 1e6:.0f}M parameters from scratch")
    before = pretrain(args, folder)
    torch.cuda.empty_cache()  # the memory is for the runs now
    record = {
        "environment": environment(args.commit),
        "command": shlex.join(["python", "benchmarks/gsm8k.py", *sys.argv[1:]]),
        "settings": {key: value for key, value in vars(args).items() if not isinstance(value, Path)},
        "parameters": parameters,
        "text_megabytes": sum(map(len, texts)) / 1e6,
        "pretraining": {key: before[key] for key in ("valid_before", "valid_after", "tokens_per_second")},
        "failed": {},
    }
    compared = comparison(args, folder)

    def write() -> Path:
        """Again after each run and each model's answers, so that a program that is stopped leaves what it had."""
        record["results"] = results(compared)
        record["seconds"] = time.perf_counter() - started
        file = save_json("gsm8k", record, args.out)
        file.with_suffix(".md").write_text(report(record))
        return file

    for member in compared.members:
        stage(f"fine-tuning {member.name}")
        record["failed"].update(run_members(replace(compared, members=[member])))
        file = write()
    for member in compared.members:
        if member.summary is not None:
            stage(f"answers of {member.name}")
            answer(args, folder, member.folder)
            file = write()
    table, _ = write_comparison(compared, record["failed"])
    Console(width=140).print(table)
    shutil.copyfile(compared.folder / "compare.png", file.with_suffix(".png"))
    print(report(record))
    stage(f"written: {file}")


if __name__ == "__main__":
    main()
