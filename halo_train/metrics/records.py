"""``quant.jsonl``: the samples of a run on disk, one line a layer and sampled step."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from .sample import QuantSample, SampleSize


class JsonlSink:
    """Appends every sample to a file, flushed at once. NaN becomes null.

    Args:
        path: of the file; its folder exists.
        start_step: step at which the run goes on; lines of later steps and what is no sample are removed, 0 starts a new file.
    """

    def __init__(self, path: str | Path, start_step: int = 0) -> None:
        self.path = Path(path)
        kept = [line for line in _lines(self.path) if _step_of(line) <= start_step] if start_step else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def __call__(self, sample: QuantSample) -> None:
        size = dataclasses.asdict(sample.size)
        with self.path.open("a", encoding="utf-8") as file:
            for layer, parts in sample.values.items():
                line = {
                    "step": sample.step,
                    "layer": layer,
                    "recipe": sample.recipes[layer],
                    "sample": size,
                    "values": {
                        part: {k: _json(v) for k, v in stats.items()} for part, stats in parts.items()
                    },
                    "exponents": {
                        part: [round(share, 6) for share in shares]
                        for part, shares in sample.histograms.get(layer, {}).items()
                    },
                }
                file.write(json.dumps(line) + "\n")


def read_samples(path: str | Path) -> list[QuantSample]:
    """The samples of a ``quant.jsonl`` in the order of their steps; a last line that was cut short is left out.

    Raises:
        ValueError: another line is not one of :class:`JsonlSink`.
    """
    samples: dict[int, QuantSample] = {}
    lines = _lines(Path(path))
    for number, line in enumerate(lines, 1):
        try:
            _add(samples, line)
        except (KeyError, TypeError, AttributeError) as error:
            if line is None and number == len(lines):
                break
            raise ValueError(
                f"{path}: line {number} is no sample of JsonlSink; remove it, or the file if it is something else"
            ) from error
    return [samples[step] for step in sorted(samples)]


def _add(samples: dict[int, QuantSample], line: Any) -> None:
    sample = samples.setdefault(
        line["step"], QuantSample(line["step"], SampleSize(**line["sample"]), {}, {}, {})
    )
    layer = line["layer"]
    values = {
        part: {k: math.nan if v is None else v for k, v in stats.items()}
        for part, stats in line["values"].items()
    }
    sample.recipes[layer], sample.histograms[layer] = line["recipe"], line["exponents"]
    sample.values[layer] = values


def _step_of(line: Any) -> float:
    step = line.get("step") if isinstance(line, dict) else None
    return step if isinstance(step, int) else math.inf


def _lines(path: Path) -> list[Any]:
    """None for what is no JSON."""
    return [_parsed(text) for text in path.read_bytes().splitlines()] if path.exists() else []


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _json(value: float) -> float | None:
    # Seven digits are more than a sampled statistic has, and halve the file.
    return float(f"{value:.7g}") if math.isfinite(value) else None
