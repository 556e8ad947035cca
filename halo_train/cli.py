"""The ``halo-train`` command: run, compare, validate, ls, cp, schema, preprocess, eval, export, report, calibrate, bench, doctor."""

from __future__ import annotations

import importlib
import json
import logging
import pkgutil
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

# transformers imports torchao where it is installed, which complains about kernels of its own that nobody asked for.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

try:
    import numpy as np
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from halo_train import bench as benchmarks
    from halo_train.calibrate import Prefer
    from halo_train.config import did_you_mean
    from halo_train.metrics.console import sample_table
    from halo_train.metrics.records import read_samples
    from halo_train.quant_report import write_report
    from halo_train.recipes import finetune
    from halo_train.training import doctor as machine
    from halo_train.training.compare import plan, run_members
    from halo_train.training.compare_report import write_comparison
    from halo_train.training.config import RECIPE_FILE, Config, is_no_path, load_config
    from halo_train.training.distributed import launch
    from halo_train.training.encode import decode_pieces
    from halo_train.training.errors import Interrupted, RunFailed, UserError, what_is_full
    from halo_train.training.evaluation import Evaluation, Task, run_evaluation
    from halo_train.training.hf_export import ExportFormat, export
    from halo_train.training.listing import recipes_table, run_files_table
    from halo_train.training.loop import pick_device
    from halo_train.training.precision import calibrate_layers
except ModuleNotFoundError as _error:
    _package = (_error.name or "").partition(".")[0]
    if _package == "halo_train":
        raise
    raise SystemExit(
        f"halo-train: the package {_package!r} is missing; the command needs the training extra: "
        "pip install 'halo_train[train]'"
    ) from None

app = typer.Typer(
    help="Fine-tune transformers with Hadamard-rotated 8-bit linear layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Processes = Annotated[int, typer.Option(min=1, help="Processes on this machine, one for each GPU.")]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of the run.", show_default=False)]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Fields to change, e.g. train.steps=10.", show_default=False
    ),
]


@app.command()
def run(
    file: _File,
    overrides: _Overrides = None,
    nproc: _Processes = 1,
) -> None:
    """Fine-tune as FILE says. On several machines: torchrun ... -m halo_train.cli run FILE."""
    config = load_config(file, overrides or ())
    if nproc > 1:
        launch(nproc, config, ["run", str(file), *(overrides or ())])
    finetune.run(config)


@app.command()
def compare(
    file: _File,
    overrides: _Overrides = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps, in place of what FILE says.")
    ] = None,
    nproc: _Processes = 1,
) -> None:
    """Run FILE several times and set the runs side by side.

    halo-train compare FILE quant.recipe=bf16,fp8,int8: each value gives a run;
    run.seed=0,1,2 repeats all of them. One table and one picture at the end. A
    run that fails does not stop the others; the same command tries it again.
    """
    comparison = plan(file, overrides or (), steps)
    failed = run_members(comparison, nproc)
    table, files = write_comparison(comparison, failed)
    console = _console()
    console.print(table)
    for path in files:
        print(path)
    if failed:
        raise RunFailed(
            f"{len(failed)} of {len(comparison.members)} runs failed: {', '.join(failed)}; the message of each is above; "
            "the same command tries them again and keeps the others"
        )


@app.command()
def validate(file: _File, overrides: _Overrides = None) -> None:
    """Check FILE and print it with every default filled in; nothing is started."""
    config = load_config(file, overrides or ())
    for key, path in _inputs(config).items():
        if not path.exists():
            raise UserError(f"{key}: {path} does not exist")
    print(config.to_yaml(), end="")
    print(f"{file} is valid", file=sys.stderr)


@app.command()
def ls() -> None:
    """List the run files that come with halo_train and the named precision recipes."""
    console = _console()
    console.print(run_files_table(_shipped()))
    console.print(recipes_table())


@app.command()
def cp(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A run file of `halo-train ls`.", show_default=False)
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The copy, which must not exist.", show_default=False)
    ],
) -> None:
    """Copy a run file that comes with halo_train, and the files that it names; nothing is overwritten."""
    known = {path.stem: path for path in _shipped()}
    source = known.get(name.removesuffix(".yaml"))
    if source is None:
        raise UserError(f"NAME must be one of {', '.join(known)}{did_you_mean(name, known)}; got {name!r}")
    beside = [
        path for path in _inputs(load_config(source)).values() if path.parent == source.resolve().parent
    ]
    copies = {source: file, **{path: file.parent / path.name for path in beside}}
    if not file.parent.is_dir():
        raise UserError(f"the folder {file.parent} does not exist; make it first")
    for original, copy in copies.items():
        same = original != source and copy.is_file() and copy.read_bytes() == original.read_bytes()
        if copy.exists() and not same:
            raise UserError(f"{copy} exists and is not overwritten; choose another FILE or remove it")
    for original, copy in copies.items():
        shutil.copyfile(original, copy)
        print(copy)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a run file, for editors that complete and check YAML."""
    print(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def preprocess(
    file: _File,
    overrides: _Overrides = None,
    show: Annotated[int, typer.Option(min=0, help="Training rows that are printed.")] = 3,
) -> None:
    """Read and tokenise the data of FILE and show what is trained, marked «so»; nothing is trained."""
    config = load_config(file, overrides or ())
    data = finetune.load_data(config, config.run.dir / config.run.name)
    train, store = data.train, data.train.store
    lengths = np.sort(store.lengths()[train.rows.documents])
    print(
        f"tokens a document: {lengths[0]} to {lengths[-1]}, median {np.median(lengths):g}, "
        f"95% at most {lengths[int(0.95 * (len(lengths) - 1))]}; data.seq_len={config.data.seq_len}"
    )
    console = _console()
    for row in range(min(show, len(train.rows))):
        documents = [store.document(number) for number in train.rows[row]]
        trained = sum(int((document >= 0).sum()) for document in documents)
        packed = f" in {len(documents)} documents" if config.data.packing else ""
        console.rule(
            f"row {row + 1}: {trained} of {train.rows.lengths[row]} tokens trained{packed}", align="left"
        )
        for number, document in enumerate(documents, start=1):
            if config.data.packing:
                console.print(f"document {number}, {len(document)} tokens:", style="bold")
            pieces = decode_pieces(document, data.tokenizer)
            console.print(
                Text.assemble(*((f"«{text}»", "green") if on else text for text, on in pieces)),
                soft_wrap=True,
            )


@app.command("eval")
def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Model directory, or folder of a run.", show_default=False)
    ],
    data: Annotated[Path | None, typer.Option(help="Rows, as data.train takes them.")] = None,
    task: Annotated[Task, typer.Option(help="loss; or loss and exact match of generated answers.")] = "loss",
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Regular expression before the answer, such as '####': the rest of the line, or its group, is compared. "
            "Without it the whole text is."
        ),
    ] = None,
    lm_eval: Annotated[str, typer.Option(help="Tasks of EleutherAI's lm-eval, separated by commas.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, from the first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a generated answer.")] = 256,
    seq_len: Annotated[
        int, typer.Option(min=16, help="Tokens after which a row is cut for its loss.")
    ] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Rows in one forward pass.")] = 32,
    form: Annotated[str, typer.Option("--format", help="See data.format.")] = "auto",
    rename: Annotated[
        list[str] | None, typer.Option(help="Field to rename first, old=new; may be repeated.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    output: Annotated[Path | None, typer.Option(help="JSON file; DIR/eval/<name of the data>.json.")] = None,
) -> None:
    """Evaluate a model: loss, exact match of generated answers, lm-eval.

    halo-train eval runs/math --data test.jsonl --task exact-match --pattern '####'
    """
    asked = Evaluation(
        data=data,
        task=task,
        lm_eval=[name for name in lm_eval.split(",") if name],
        form=form,
        rename=_pairs(rename or []),
        pattern=pattern,
        limit=limit,
        max_new_tokens=max_new_tokens,
        seq_len=seq_len,
        batch=batch,
    )
    print(run_evaluation(folder, asked, pick_device(device), output))


@app.command("export")
def export_directory(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Folder of a run, a checkpoint, or a model.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="Directory that is written.")],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="hf: bfloat16; compressed-tensors: FP8 as vLLM reads it."),
    ] = "hf",
) -> None:
    """Write a model as a Hugging Face directory, in bfloat16 or in FP8 for vLLM."""
    print(export(folder, form, output))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def bench(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Which one; none lists them.")] = "",
) -> None:
    """Measure this GPU: halo-train bench linear; halo-train bench NAME --help tells the options of each."""
    known = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    if name in known:
        importlib.import_module(f"{benchmarks.__name__}.{name}").main(context.args)
    elif name and not name.startswith("-"):
        raise UserError(f"NAME must be one of {', '.join(known)}{did_you_mean(name, known)}; got {name!r}")
    else:
        print(
            f"halo-train bench NAME, one of {', '.join(known)}; halo-train bench NAME --help tells its options"
        )


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
) -> None:
    """Show what 8 bits cost in a run, layer by layer: an HTML page, pictures, and what to change.

    Of runs with log.quant_every, and of every folder with a quant.jsonl.
    """
    try:
        files, advice = write_report(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    console = _console()
    console.print(sample_table(read_samples(folder / "quant.jsonl")[-1], limit=5))
    todo = Table("layer", "what to do", "evidence", title="What to do", title_justify="left")
    for entry in advice:
        todo.add_row(entry.layer, entry.action, entry.evidence)
    console.print(todo if advice else "Nothing to change: every product of every layer is good enough.")
    for file in files:
        print(file)


@app.command()
def calibrate(
    file: _File,
    overrides: _Overrides = None,
    batches: Annotated[int, typer.Option(min=1, help="Batches that are measured.")] = 4,
    prefer: Annotated[
        Prefer,
        typer.Option(
            help="memory: bf16 only where 8 bits are not accurate enough; time: also where not faster."
        ),
    ] = "memory",
    output: Annotated[Path, typer.Option(help="Recipe file that is written.")] = Path("recipe.json"),
) -> None:
    """Choose a recipe for every layer of the model in FILE by its measured error; nothing is trained.

    Use it with `halo-train run FILE quant.recipe=recipe.json`."""
    if output.suffix != RECIPE_FILE:
        raise UserError(f"--output must end with {RECIPE_FILE}; got {output}")
    if not output.parent.is_dir():
        raise UserError(f"--output must be in a folder that exists; got {output}; make {output.parent} first")
    result = calibrate_layers(load_config(file, overrides or ()), batches, prefer)
    print(result)
    result.save(output)
    print(f"written: {output}; use it with quant.recipe={output}", file=sys.stderr)


@app.command()
def doctor() -> None:
    """Show GPU, PyTorch and kernels, and test that the results are right; exit code 1 if one is not."""
    console = _console()
    about = Table(show_header=False, title="This machine", title_justify="left")
    for what, value in machine.describe_machine():
        about.add_row(what, value)
    console.print(about)
    tests = Table(
        "test",
        "device",
        "",
        "fprop / dgrad / wgrad against nn.Linear in float64",
        title="Self-test",
        title_justify="left",
    )
    failed = 0
    for check in machine.self_test():
        failed += not check.ok
        tests.add_row(
            check.name, check.device, "[green]ok[/green]" if check.ok else "[red]FAILED[/red]", check.detail
        )
    console.print(tests)
    if failed:
        raise RunFailed(f"{failed} of the self-tests failed; see the table")


def main() -> None:
    """Entry point: errors that the user can act on are one message and an exit code, not a traceback."""
    try:
        app()
    except Exception as error:
        known = error if isinstance(error, (UserError, RunFailed, Interrupted)) else what_is_full(error)
        if known is None:
            raise
        print(f"halo-train: {known}", file=sys.stderr)
        sys.exit(known.exit_code)
    except KeyboardInterrupt:
        print("halo-train: interrupted", file=sys.stderr)
        sys.exit(130)


def _console() -> Console:
    # Into a pipe rich would wrap at 80 columns, in the middle of paths.
    return Console(width=None if sys.stdout.isatty() else 140)


def _pairs(texts: list[str]) -> dict[str, str]:
    for text in texts:
        if text.count("=") != 1:
            raise UserError(f"--rename must have the form old=new; got {text!r}, e.g. question=prompt")
    return dict(text.split("=") for text in texts)


def _shipped() -> list[Path]:
    return sorted(Path(finetune.__file__).parent.glob("*.yaml"))


def _inputs(config: Config) -> dict[str, Path]:
    """Files and directories that a run reads, by the field that names them."""
    named = {
        "model.path": config.model.path,
        "data.train": None if is_no_path(config.data.train) else config.data.train,
        "data.valid": None if is_no_path(config.data.valid) else config.data.valid,
        "eval.exact_match": None if is_no_path(config.eval.exact_match) else config.eval.exact_match,
        "quant.recipe": config.quant.recipe if config.quant.recipe.endswith(RECIPE_FILE) else None,
    }
    return {key: Path(path) for key, path in named.items() if path is not None}


if __name__ == "__main__":
    main()
