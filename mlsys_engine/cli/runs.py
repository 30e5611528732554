"""`mlsys runs list|show|plot`: the records of earlier trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mlsys_engine.cli.output import Output, figure
from mlsys_engine.cli.sparkline import sparkline
from mlsys_engine.errors import ConfigError, did_you_mean
from mlsys_engine.tracking import RunRecord, find_run, json_files, list_runs, loss_picture, read_run
from mlsys_engine.tracking.picture import loss_curves, smooth
from mlsys_engine.tracking.runs import PICTURE_FILE

_USAGE = """usage: mlsys runs COMMAND [options]

  mlsys runs list           every run, oldest first
  mlsys runs show [RUN]     one run's record
  mlsys runs plot [RUN]     draws the picture of its loss again, and a line of it here

RUN is 'latest' (the default), an id, the beginning of one, or the path of a run folder.
"""


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Lists every run, oldest first."""

    runs_dir: Path = Path("runs")
    """Folder that holds the runs."""
    limit: int | None = None
    """Number of runs to show, the newest ones; None shows all."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Shows one run's record: final metrics, baselines and what it takes to get it again."""

    run: tyro.conf.Positional[str] = "latest"
    """'latest', an id, the beginning of one, or the path of a run folder."""
    runs_dir: Path = Path("runs")
    """Folder that holds the runs."""
    json: bool = False
    """Print the whole record as JSON."""


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Draws the picture of a run's loss again."""

    run: tyro.conf.Positional[str] = "latest"
    """'latest', an id, the beginning of one, or the path of a run folder."""
    runs_dir: Path = Path("runs")
    """Folder that holds the runs."""
    output: Path | None = None
    """File to write; None writes loss.svg into the run folder."""
    json: bool = False
    """Print the path as JSON."""


def run(arguments: Sequence[str]) -> int:
    """Runs the subcommand named first."""
    name, rest = (arguments[0], list(arguments[1:])) if arguments else ("--help", [])
    if name in ("--help", "-h"):
        Output().say(_USAGE.rstrip())
        return 0
    if name not in _COMMANDS:
        raise ConfigError(
            f"There is no command 'runs {name}'.",
            f"Commands are {', '.join(f'runs {known}' for known in _COMMANDS)}.",
            did_you_mean(name, _COMMANDS),
        )
    kind, function = _COMMANDS[name]
    options = tyro.cli(kind, args=rest, prog=f"mlsys runs {name}", config=(tyro.conf.FlagCreatePairsOff,))
    return int(function(options))


def _list(options: ListOptions) -> int:
    records = list_runs(options.runs_dir)
    if options.limit is not None:
        records = records[len(records) - min(len(records), max(0, options.limit)) :]
    out = Output(as_json=options.json)
    out.json([_summary(record) for record in records])
    if options.json:
        return 0
    if not records:
        out.say(f"No runs in {options.runs_dir}. Train one with: mlsys train")
        return 0
    columns = ("run", "status", "steps", "ranks", "loss", "val loss", "bits/byte")
    rows = []
    for record in records:
        metrics = record.metrics
        names = ("loss", "val_loss", "val_bits_per_byte")
        shown = [record.fields.get("steps"), record.fields.get("world_size")]
        rows.append(
            [record.id, record.status, *map(figure, shown), *(figure(metrics.get(name)) for name in names)]
        )
    out.table("", columns, rows)
    return 0


def _summary(record: RunRecord) -> dict[str, Any]:
    fields = {key: value for key, value in record.to_dict().items() if key not in ("manifest", "process")}
    code, data = (record.manifest.get(part) or {} for part in ("code", "data"))
    return {**fields, "commit": code.get("commit"), "data_fingerprint": data.get("fingerprint")}


def _show(options: ShowOptions) -> int:
    record = read_run(find_run(options.run, options.runs_dir))
    out = Output(as_json=options.json)
    out.json(record.to_dict())
    if options.json:
        return 0
    fields, manifest = record.fields, record.manifest
    code, data = manifest.get("code") or {}, manifest.get("data") or {}
    hardware, environment = manifest.get("hardware") or {}, manifest.get("environment") or {}
    threads = manifest.get("threads") or {}
    out.pairs(
        [
            ("run", record.id),
            ("status", f"{record.status}, {figure(fields.get('steps'))} steps"),
            ("created", record.created),
            (
                "ranks",
                f"{fields.get('world_size')} on {fields.get('backend')}, plan {fields.get('plan_hash')}",
            ),
            ("code", _code_line(code)),
            ("data", f"{data.get('description', '?')}, fingerprint {str(data.get('fingerprint'))[:16]}"),
            ("recipe", str((manifest.get("config") or {}).get("recipe", "none: started by a script"))),
            ("software", f"Python {environment.get('python')}, torch {environment.get('torch')}"),
            ("hardware", _hardware_line(hardware, threads)),
            ("folder", str(record.path)),
        ]
    )
    print_comparison(out, record.metrics, record.baselines)
    rest = [(name, figure(value)) for name, value in record.metrics.items() if name != "val_bits_per_byte"]
    out.say()
    out.pairs(rest)
    for warning in (*record.warnings, *record.read_metrics().problems):
        out.say(f"Note: {warning}")
    return 0


def print_comparison(out: Output, metrics: Any, baselines: Any) -> None:
    """The model's validation bits per byte beside those of the baselines; nothing when there are none."""
    model = json_files.number(metrics.get("val_bits_per_byte"))
    values = {name: json_files.number(measures.get("bits_per_byte")) for name, measures in baselines.items()}
    known = {name: value for name, value in values.items() if value}
    if not known:
        return
    out.say()
    if model is None:
        rows = [[name, figure(value)] for name, value in known.items()]
        out.table("", ("validation", "bits per byte"), rows)
        return
    rows = [[name, figure(value), f"{(model / value - 1) * 100:+.1f} %"] for name, value in known.items()]
    out.table(
        "", ("validation", "bits per byte", "model against it"), [*rows, ["this model", figure(model), ""]]
    )


def _code_line(code: Any) -> str:
    if not code.get("commit"):
        return str(code.get("note", "unknown"))
    changes = f", with uncommitted changes ({code.get('diff_file', 'not kept')})" if code.get("dirty") else ""
    return f"{code['commit']}{changes}"


def _hardware_line(hardware: Any, threads: Any) -> str:
    gpus = ", ".join(gpu.get("name", "?") for gpu in hardware.get("gpus") or []) or "no GPU"
    memory_gib = (hardware.get("memory_bytes") or 0) / 2**30
    num_threads = threads.get("num_threads", threads.get("torch_threads", "?"))
    return f"{hardware.get('cpu')}, {hardware.get('logical_cores')} cores, {memory_gib:.0f} GiB, {gpus}; " + (
        f"{num_threads} thread{'s' * (num_threads != 1)} a rank"
    )


def _plot(options: PlotOptions) -> int:
    record = read_run(find_run(options.run, options.runs_dir))
    table = record.read_metrics()
    target = options.output or record.path / PICTURE_FILE
    fields = {**record.fields, "id": record.id}
    try:
        json_files.write_text(target, loss_picture(fields, table.rows))
    except OSError as error:
        raise ConfigError(
            f"The picture {target} cannot be written: {error.strerror}.",
            "It needs an existing folder that you may write.",
            "Name another file with --output.",
        ) from None
    out = Output(as_json=options.json)
    out.json({"run": record.id, "picture": str(target), "problems": list(table.problems)})
    curves = loss_curves(fields, table.rows)
    for label, points in (("training", smooth(curves.train)), ("validation", list(curves.validation))):
        if points:
            line = sparkline([y for _, y in points])
            out.say(f"{label:<10}  {line}  {points[0][1]:.3f} to {points[-1][1]:.3f} {curves.unit}")
    if not table.rows:
        out.say("The run has no metrics yet.")
    for problem in table.problems:
        out.say(f"Note: {problem}")
    out.say(f"picture     {target}")
    return 0


_COMMANDS: dict[str, tuple[Any, Any]] = {
    "list": (ListOptions, _list),
    "show": (ShowOptions, _show),
    "plot": (PlotOptions, _plot),
}
