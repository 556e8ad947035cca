"""The YAML file of a run: sections and fields with their defaults, strict reading, ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from halo_train.config import RECIPES, did_you_mean

from .errors import UserError

INPUT_PATHS = ("model.path", "data.train", "data.valid", "eval.exact_match", "quant.recipe")
"""Relative paths of inputs: in a YAML file they start at the file's folder, in an override at the current folder."""

RECIPE_FILE = ".json"
"""How a ``quant.recipe`` ends that is a file of recipes by layer instead of a name."""

STDLIB = "stdlib"
"""Value of ``data.train`` that means pairs made from Python's standard library instead of a file."""

HUB = "hf:"
"""Start of a ``data.train`` that names a data set of the Hugging Face hub instead of a path."""

_MAY_CHANGE = ("data.cache_dir", "train.device")
"""Outside the sections run, save, log and eval: what may differ when a run is resumed."""

_Positive = Annotated[int, Field(gt=0)]
_NotNegative = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class RunSection(_Section):
    """Where the run lives."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.+=-]*$")]
    """Folder under ``dir``; letters, digits and ``_ . + = -``."""
    dir: Path = Path("runs")
    """Relative to the current folder."""
    resume: Literal["auto", "never"] = "auto"
    """A run of this name that is there already: go on from its last checkpoint if it has the same settings; or refuse."""
    overwrite: bool = False
    """Delete an existing run of this name first, and start from the beginning."""
    seed: _NotNegative = 0
    """Of the random weights, the order of the data and the validation split."""


class ModelSection(_Section):
    """What is trained."""

    path: str
    """A Hugging Face model directory, or a model's config as a JSON file: random weights and a tokenizer trained on the data."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and their gradients. ``bfloat16`` halves both; updates are then rounded stochastically. Products are in
    bfloat16 or 8 bits either way."""


class QuantSection(_Section):
    """How the linear layers compute."""

    recipe: str = "fp8"
    """A named precision recipe (``halo-train ls`` lists them), or a file of recipes by layer from ``halo-train calibrate``."""
    output_layer: bool = False
    """The output layer too: a faster step; docs/numerics.md, section 8, has what it costs in accuracy."""
    fuse: bool = True
    """Norms and gated MLPs of known transformer blocks write 8 bits once for all layers that read them; docs/blocks.md."""
    recompute: Literal["nothing", "inputs", "mlp"] | None = None
    """What 8-bit layers compute again in backward, bit for bit, for memory; docs/blocks.md. null is what a recipe file says."""

    @field_validator("recipe")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in RECIPES and not name.endswith(RECIPE_FILE):
            raise ValueError(f"must be one of {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
        return name

    @property
    def label(self) -> str:
        """The recipe's name; of a file its own, without folder and ending."""
        return self.recipe if self.recipe in RECIPES else Path(self.recipe).stem


class DataSection(_Section):
    """What it is trained on."""

    train: str
    """A JSONL (also .jsonl.gz) or parquet file, see ``format``; a folder or ``hf:NAME`` of the Hugging Face hub, which the
    datasets library reads; or ``stdlib``."""
    valid: str | None = None
    """As ``train``; null takes ``valid_fraction`` of the training rows instead."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the training rows that validate, where ``valid`` is null."""
    subset: str | None = None
    """Of a data set that has several, as in ``datasets.load_dataset(NAME, subset)``."""
    split: str = "train"
    """Of a folder or ``hf:NAME`` in ``train``, e.g. ``train[:10%]``."""
    valid_split: str = "validation"
    """Of a folder or ``hf:NAME`` in ``valid``."""
    format: Literal["auto", "messages", "prompt_completion", "text", "alpaca"] = "auto"
    """Fields of a row: ``messages`` (the tokenizer's chat template; loss on the assistant's turns) and perhaps ``tools``;
    ``prompt`` and ``completion`` or alpaca's ``instruction``, ``input``, ``output`` (loss on the last); ``text`` (loss on
    all); ``auto`` is that of a file's first row."""
    rename: dict[str, str] = {}
    """Fields to rename first, e.g. ``{question: prompt, answer: completion}``."""
    cache_dir: Path = Path(".cache")
    """Of tokenised data; relative to the current folder."""
    seq_len: Annotated[int, Field(ge=16)] = 1024
    """Tokens; what is longer is cut at its end, ``text`` into pieces."""
    packing: bool = False
    """Fill each row with documents up to ``seq_len``; attention, positions and loss keep them apart."""


class TrainSection(_Section):
    """How it is trained: AdamW, bfloat16 autocast."""

    steps: _Positive | None = None
    """Optimiser steps; or give ``epochs``."""
    epochs: _Positive | None = None
    """Passes over the training rows, in place of ``steps``."""
    micro_batch: _Positive = 8
    """Rows in one forward pass."""
    grad_accum: _Positive = 1
    """Forward passes in one step."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up: decay to zero, or none."""
    warmup_steps: _NotNegative = 0
    """Over which the learning rate rises from zero."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit`` keeps both moments in 8 bits (torchao): 2 bytes a weight instead of 8."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Not applied to norms and biases."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in backward for memory, layer by layer, bit for bit: ``selective`` all but products, attention and
    rounding, ``full`` everything."""
    compile: bool = False
    """torch.compile of each decoder layer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto`` is the GPU where there is one."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.steps is None and self.epochs is None:
            raise ValueError("steps or epochs is required, but neither is given")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps={self.steps} and epochs={self.epochs} exclude each other; set one of them to null, e.g. "
                "train.steps=null"
            )
        return self

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainSection:
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be less than steps={self.steps}; got {self.warmup_steps}")
        return self


class SaveSection(_Section):
    """Checkpoints."""

    every: _Positive = 500
    """Steps; the last step is always saved."""
    keep: _Positive = 2
    """Newest checkpoints that are kept."""
    background: bool = False
    """Training goes on while a checkpoint is written, which takes CPU memory for a copy of weights and optimiser state."""


class EvalSection(_Section):
    """Answers that the model writes greedily during the run; all of them are in ``answers/``."""

    exact_match: str | None = None
    """Rows whose prompts are answered, a file as in ``data.train``; null is none."""
    pattern: str | None = None
    """Regular expression before the answer, such as ``####``: the rest of the line, or its group, has to be that of the row;
    numbers without ``,`` and ``$``. null compares the whole text."""
    every: _NotNegative = 0
    """Steps; the last step is always among them, 0 is that alone."""
    limit: _Positive | None = None
    """Rows, from the first; null is all."""
    max_new_tokens: _Positive = 256
    """Length of an answer."""
    batch: _Positive = 32
    """Rows that are answered at a time."""


class LogSection(_Section):
    """What is told on the way; every step's numbers are always in ``metrics.jsonl``."""

    every: _Positive = 10
    """Steps between printed lines where there is no terminal for a progress bar."""
    eval_every: _Positive = 100
    """Steps between validations; the first and the last step are always validated."""
    wandb: bool = False
    """Also log to Weights & Biases; offline where no key is set."""
    tensorboard: bool = False
    """Also write TensorBoard's files, to the folder ``tensorboard`` of the run."""
    quant_every: _NotNegative = 0
    """Steps between samples of the quantisation error, in ``quant.jsonl``, wandb and the report; 0 is never."""
    quant_layers: list[str] = ["*"]
    """Patterns on the names of the layers that are sampled; on the command line separated by commas."""
    quant_what_if: list[str] = ["fp8_plain", "fp8", "int8"]
    """Recipes that are measured on the same data beside the one that runs."""

    @field_validator("quant_layers", "quant_what_if", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("quant_what_if")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in RECIPES:
                raise ValueError(f"must be out of {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}")
        return names


class Config(_Section):
    """One run. Build it with :func:`load_config`."""

    run: RunSection
    model: ModelSection
    quant: QuantSection = QuantSection()
    data: DataSection
    train: TrainSection
    save: SaveSection = SaveSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _recomputed_once(self) -> Config:
        what, mode = self.quant.recompute, self.train.activation_checkpointing
        if what in ("inputs", "mlp") and mode != "none":
            raise ValueError(
                f"quant.recompute={what} and train.activation_checkpointing={mode} would both recompute; set one of them to nothing or none"
            )
        return self

    def to_yaml(self) -> str:
        """Every field with its value; reading it back gives the same config."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies overrides.

    Args:
        path: of the file.
        overrides: ``section.key=value`` strings; ``null`` is None.

    Raises:
        UserError: no such file, no YAML, an unknown key (with the nearest valid one), a value of the wrong type or out
            of range. All faults of the file are in one message, one line each.
    """
    values = _read(path)
    _anchor_paths(values, path.resolve().parent)
    changes: dict[str, Any] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"override must have the form section.key=value; got {override!r}, e.g. train.steps=10"
            )
        _assign(changes, key, None if value == "null" else value)
    _anchor_paths(changes, Path.cwd())
    try:
        return Config.model_validate(_merge(values, changes))
    except ValidationError as error:
        raise UserError(f"{path}: {_describe(error)}") from None


def first_difference(old: Config, new: Config) -> str | None:
    """``"section.key was ..., now ..."`` for the first field by which the steps of the runs would differ, or None."""
    before, after = old.model_dump(), new.model_dump()
    for key in _all_keys():
        section, name = key.split(".")
        fixed = key == "run.seed" or (
            section not in ("run", "save", "log", "eval") and key not in _MAY_CHANGE
        )
        if fixed and before[section][name] != after[section][name]:
            return f"{key} was {before[section][name]}, now {after[section][name]}"
    return None


def is_list(key: str) -> bool:
    """Whether the field ``section.key`` holds several values itself, which an override separates by commas."""
    fields = {
        f"{name}.{k}": field for name, section in _sections() for k, field in section.model_fields.items()
    }
    return key in fields and get_origin(fields[key].annotation) is list


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"config file {path} does not exist; `halo-train ls` lists the files that come with halo_train"
        )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        kind = "nothing" if values is None else type(values).__name__
        raise UserError(f"{path} must hold sections such as run:, model:, data:, train:; it holds {kind}")
    return values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(
                f"override {dotted}: {section!r} already has a value of its own; give one of the two"
            )
    values[key] = value


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inside = merged.get(key)
        both = isinstance(value, dict) and isinstance(inside, dict)
        merged[key] = _merge(inside, value) if both else value  # type: ignore[arg-type]
    return merged


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    for dotted in INPUT_PATHS:
        name, key = dotted.split(".")
        section = values.get(name)
        path = section.get(key) if isinstance(section, dict) else None
        is_name = is_no_path(path) or (dotted == "quant.recipe" and not str(path).endswith(RECIPE_FILE))
        if isinstance(section, dict) and isinstance(path, str) and not is_name:
            section[key] = str(folder / Path(section[key]).expanduser())


def is_no_path(source: object) -> bool:
    """Whether a ``data.train`` or ``data.valid`` names something else than a file or folder."""
    return source == STDLIB or str(source).startswith(HUB)


def _describe(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_nearest(key)}")
        elif fault["type"] == "missing":
            lines.append(f"{key}: required, but not given")
        elif fault["type"] == "value_error":
            got = "" if isinstance(fault["input"], dict) else f"; got {fault['input']!r}"
            lines.append(f"{key}: {fault['ctx']['error']}{got}".removeprefix(": "))  # none between sections
        else:
            message = fault["msg"].removeprefix("Input ")
            lines.append(f"{key}: {message}; got {fault['input']!r}")
    return "\n  ".join(["", *lines]) if len(lines) > 1 else lines[0]


def _nearest(dotted: str) -> str:
    keys = list(_all_keys())
    leaf = dotted.rsplit(".", 1)[-1]
    same_leaf = [key for key in keys if key.endswith("." + leaf)]
    if same_leaf:
        return f"; did you mean {same_leaf[0]!r}?"
    section = dotted.partition(".")[0]
    known = [key.partition(".")[2] for key in keys if key.startswith(section + ".")]
    if known:
        near = did_you_mean(leaf, known).replace("mean '", f"mean '{section}.")
        return near or f"; {section} has {', '.join(known)}"
    return did_you_mean(dotted, Config.model_fields) or f"; the sections are {', '.join(Config.model_fields)}"


def _all_keys() -> Iterator[str]:
    for name, section in _sections():
        yield from (f"{name}.{key}" for key in section.model_fields)


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in Config.model_fields.items():
        section = next(t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type))
        assert issubclass(section, BaseModel)
        yield name, section
