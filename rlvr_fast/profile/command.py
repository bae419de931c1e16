"""The command behind ``rlvr-fast profile``: options to a shape, progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlvr_fast import _validate as check
from rlvr_fast.command_line import as_json, check_file, print_json, progress
from rlvr_fast.profile.measure import profile
from rlvr_fast.profile.models import MODELS, ModelShape
from rlvr_fast.profile.shape import Shape

CPU_SECONDS = 60.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(*, model: str | None, hidden_size: int | None, vocabulary_size: int | None, parameters: float | None,
        softcap: float | None, prompts: int, group_size: int, length: int, device: str, dtype: str, backend: str,
        levels: str, repeats: int, seconds: float | None, json_file: str | None, trace: Path | None) -> None:
    """Profile and print. Raises ValueError, TypeError or OSError, naming the option."""
    if model == "list":
        Console().print(_model_table())
        return
    head = _head(model, hidden_size, vocabulary_size)
    where = _device(device)
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    precision = DTYPES.get(dtype, torch.bfloat16 if where.type == "cuda" else torch.float32)
    for option, path in (("--json", json_file), ("--trace", trace)):
        check_file(option, path)
    total = head.parameters if parameters is None else int(check.positive("--parameters", parameters))
    shape = Shape(prompts, group_size, length, head.vocabulary_size, head.hidden_size)
    with progress(TextColumn("{task.description:<32}"), BarColumn(), TimeElapsedColumn(),
                  quiet=json_file == "-") as bar:
        task = bar.add_task("starting", total=None)
        report = profile(
            shape, parameters=total, softcap=head.softcap if softcap is None else softcap,
            levels=[level.strip() for level in levels.split(",") if level.strip()], device=where, dtype=precision,
            backend=backend, repeats=repeats, trace=trace,
            seconds=CPU_SECONDS if seconds is None and where.type == "cpu" else seconds,
            progress=lambda done, total, text: bar.update(task, completed=done, total=total, description=text))
    if json_file is not None:
        if json_file == "-":
            print_json(report.to_json())
            return
        Path(json_file).write_text(as_json(report.to_json()), encoding="utf-8")
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    console.print(report.render())
    for path, what in ((json_file, "figures"), (trace, "trace, for ui.perfetto.dev")):
        if path is not None:
            console.print(f"{what}: {path}", soft_wrap=True, markup=False)


def _head(model: str | None, hidden_size: int | None, vocabulary_size: int | None) -> ModelShape:
    if model is not None:
        if hidden_size is not None or vocabulary_size is not None:
            raise ValueError("give --model, or --hidden-size and --vocabulary-size, not both")
        if model.lower() not in MODELS:
            raise ValueError(f"--model must be one of {', '.join(MODELS)}; got {model!r}. For another model give "
                             "--hidden-size and --vocabulary-size")
        return MODELS[model.lower()]
    if hidden_size is None or vocabulary_size is None:
        raise ValueError("give --model, or both --hidden-size and --vocabulary-size")
    return ModelShape(hidden_size, vocabulary_size, None, "")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def _model_table() -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("model", "D", "V", "parameters", "softcap", "model card on huggingface.co"):
        table.add_column(column, justify="left" if column.startswith("model") else "right")
    for name, shape in MODELS.items():
        table.add_row(name, str(shape.hidden_size), str(shape.vocabulary_size),
                      "" if shape.parameters is None else f"{shape.parameters / 1e9:.3g}B",
                      "" if shape.softcap is None else f"{shape.softcap:g}", shape.source)
    return table
