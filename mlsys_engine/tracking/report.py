"""A run as one HTML page that needs nothing else: picture, figures, baselines and the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mlsys_engine.tracking import json_files
from mlsys_engine.tracking.picture import loss_picture

_STYLE = """
body { font: 15px/1.5 system-ui, Helvetica, Arial, sans-serif; color: #222; }
body { max-width: 900px; margin: 2em auto; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
td { padding: .2em 1.2em .2em 0; border-bottom: 1px solid #e6e6e6; vertical-align: top; }
td:last-child { font-variant-numeric: tabular-nums; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12.5px; }
svg { max-width: 100%; height: auto; }
"""


def report_page(fields: Mapping[str, Any], rows: Sequence[Mapping[str, float]]) -> str:
    """The page of a run, from run.json's fields and the metrics rows."""
    title = f"Run {fields.get('id', '?')}"
    code = (fields.get("manifest") or {}).get("code") or {}
    facts = [
        ("status", fields.get("status")),
        ("created", fields.get("created")),
        ("steps", fields.get("steps")),
        ("ranks", f"{fields.get('world_size')} on {fields.get('backend')}"),
        ("code", f"{code.get('commit') or code.get('note')}{' with changes' if code.get('dirty') else ''}"),
        ("plan", fields.get("plan_hash")),
    ]
    metrics = fields.get("metrics") or {}
    baselines = [
        (f"{name}, {unit.replace('_', ' ')}", value)
        for name, measures in (fields.get("baselines") or {}).items()
        for unit, value in (measures.items() if isinstance(measures, Mapping) else [("value", measures)])
    ]
    manifest = json_files.dumps(fields.get("manifest") or {}, indent=2)
    sections = [
        f"<h1>{escape(title)}</h1>",
        _table(facts),
        loss_picture(fields, rows),
        "<h2>Final metrics</h2>",
        _table(metrics.items()),
        *(["<h2>Baselines</h2>", _table(baselines)] if baselines else []),
        f"<h2>Manifest</h2><pre>{escape(manifest)}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(sections) + "\n</body></html>\n"


def _table(pairs: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(_shown(value))}</td></tr>" for name, value in pairs
    )
    return f"<table>{cells}</table>"


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
