"""Run records: where they live, who writes them, how they are read again and drawn."""

from mlsys_engine.tracking.base import RunInfo, Tracker
from mlsys_engine.tracking.metrics_log import MetricsLog, MetricsTable, read_metrics
from mlsys_engine.tracking.picture import loss_picture
from mlsys_engine.tracking.registry import TRACKERS, check_trackers, make_trackers
from mlsys_engine.tracking.report import report_page
from mlsys_engine.tracking.runs import RunRecord, find_run, list_runs, new_run_dir, new_run_id, read_run

__all__ = [
    "TRACKERS",
    "MetricsLog",
    "MetricsTable",
    "RunInfo",
    "RunRecord",
    "Tracker",
    "check_trackers",
    "find_run",
    "list_runs",
    "loss_picture",
    "make_trackers",
    "new_run_dir",
    "new_run_id",
    "read_metrics",
    "read_run",
    "report_page",
]
