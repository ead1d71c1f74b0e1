"""Reports: of one run, and merged over seeds and sweeps."""

from .merge import merge_runs
from .merged import MergedCell, MergedReport
from .run import write_report
from .write import write_merged_report


__all__ = ["MergedCell", "MergedReport", "merge_runs", "write_merged_report", "write_report"]
