"""What a trained router does, as numbers and figures, and one report that joins them."""

from remoe.analysis.report import redraw_report, write_report

__all__ = ["redraw_report", "write_report"]
