"""Models and tokenizers by transformers' own classes: from a directory or, with random weights, from a config file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from .config import Config
from .errors import RunFailed, UserError
from .loss import TokenLoss
from .sharded_load import WholeModelNeeded, empty_model

EOS = "<|endoftext|>"
PAD = "<|pad|>"


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Of transformers, which draws them into log files too and for a second's work."""
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()


def load_tokenizer(path: Path, texts: Iterable[str], saved: Path) -> Any:
    """The tokenizer of a model directory; for a config file a byte-level BPE trained on ``texts``.

    Args:
        path: ``model.path``.
        texts: what a new tokenizer is trained on; its size is the ``vocab_size`` of the config file.
        saved: folder of a tokenizer that an earlier part of the run trained; taken when it is there.

    Raises:
        UserError: no such path, or no tokenizer in the directory.
    """
    if path.is_dir():
        return tokenizer_of(path)
    if saved.is_dir():
        return AutoTokenizer.from_pretrained(saved)
    return train_tokenizer(texts, read_model_config(path).vocab_size)


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model directory.

    Raises:
        UserError: there is none. Of its files transformers misses not even all: it makes an empty one of the model's kind.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder} has no tokenizer that transformers can load: {error}") from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"{folder} has no vocabulary for its tokenizer; copy tokenizer.json and tokenizer_config.json of the model there"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with eos and pad tokens, of at most ``vocab_size`` entries; a digit is a token. Any text round-trips.

    Raises:
        UserError: vocab_size has no room for the 256 bytes and the two special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise UserError(
            f"vocab_size in model.path must be at least {len(alphabet) + 2} for a byte-level tokenizer; got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    # One token a digit, as Llama and Qwen have it: small models learn arithmetic on digits, not on a table of numbers.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS, PAD], initial_alphabet=alphabet, show_progress=False
        ),
    )
    # Without the clean-up that BERT's tokenizers want, decode(encode(text)) is the text, spaces included.
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def read_model_config(path: Path) -> Any:
    """A transformers config from a JSON file such as a model's ``config.json``.

    Raises:
        UserError: no such file, no JSON object, or a model_type that transformers does not know.
    """
    if not path.is_file():
        raise UserError(
            f"model.path: {path} does not exist; give a Hugging Face model directory or a config JSON file"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model.path: {path} is not valid JSON: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f'model.path: {path} must be a JSON object with a "model_type", e.g. "llama"'
        ) from None
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.path: transformers cannot read {path}: {error}") from None


def build_model(
    path: Path,
    tokenizer: Any,
    seed: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """A causal language model: loaded from a directory, or random from a config file, made on the device itself.

    Args:
        device: ``meta`` for a directory gives :func:`halo_train.training.sharded_load.empty_model`.
        seed: of the random weights.
        seq_len: longest sequence that it has to take.
        dtype: of the weights, but for those of a directory that transformers keeps in float32.

    Raises:
        WholeModelNeeded: a directory that cannot be loaded later, on ``meta`` only.
        UserError: not loadable as a causal language model; the tokenizer has more entries than the embedding; the model
            takes shorter sequences only.
    """
    later = torch.device(device).type == "meta"
    try:
        if path.is_dir() and later:
            model = empty_model(path, dtype)
        elif path.is_dir():
            with nullcontext() if sys.stderr.isatty() else without_progress_bars():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        else:
            config = read_model_config(path)
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
            torch.manual_seed(seed)
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.path: transformers cannot load a causal language model from {path}: {error}"
        ) from None
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise UserError(
            f"model.path: the tokenizer has {len(tokenizer)} entries and the model's embedding only {size}; use the "
            "tokenizer that belongs to the model"
        )
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(
            f"data.seq_len must be at most the model's max_position_embeddings={longest}; got {seq_len}"
        )
    return model if later else model.to(device)


def build_loss(config: Config, tokenizer: Any, device: torch.device, sharded: bool = False) -> TokenLoss:
    """The model of the run inside its loss, on the device. Errors as in :func:`build_model`.

    Args:
        sharded: :func:`halo_train.training.distributed.shard` follows, which brings the model to the device. Where it can read
            the weights too, the parameters stay on the meta device until then; else it says why not.
    """
    dtype = getattr(torch, config.model.dtype)
    path = Path(config.model.path)

    def build(device: torch.device | str) -> TokenLoss:
        return TokenLoss(build_model(path, tokenizer, config.run.seed, config.data.seq_len, dtype, device))

    if sharded and path.is_dir():
        try:
            return build("meta")
        except WholeModelNeeded as reason:
            print(f"each process loads the whole model into its CPU memory: {reason} ({path})", flush=True)
    return build("cpu" if sharded else device)


def export_model(
    model: nn.Module, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Writes a Hugging Face directory (safetensors, config, tokenizer); it appears whole or not at all.

    Args:
        model: without HaloLinear layers, see :func:`halo_train.revert`.
        folder: an earlier export there is replaced.
        weights: by the names of the model's ``state_dict``, of a model whose own are sharded.
    """
    with written_whole(folder) as temporary, without_progress_bars():
        model.save_pretrained(temporary, state_dict=weights)  # type: ignore[operator]
        tokenizer.save_pretrained(temporary)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which in the end takes the place of ``folder``; nothing of it stays after an error.

    Raises:
        RunFailed: the disk does not take it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"{folder} could not be written: {error}; make room and repeat the command"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
