"""Reports: pure functions of recorded rows. Nothing here loads torch."""

from atv.report.analysis import analysis_tables
from atv.report.formats import FORMATS, check_format, markdown, write_tables
from atv.report.page import write_page, write_plots
from atv.report.paper_tables import all_tables, paper_tables
from atv.report.tables import accuracy_table

__all__ = [
    "FORMATS",
    "accuracy_table",
    "all_tables",
    "analysis_tables",
    "check_format",
    "markdown",
    "paper_tables",
    "write_page",
    "write_plots",
    "write_tables",
]
