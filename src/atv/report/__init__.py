"""Reports: pure functions of recorded rows. Nothing here imports torch."""

from atv.report.analysis import analysis_tables
from atv.report.classification import classification_details, classification_tables, classified, label_table
from atv.report.compare import answer, compare_tables, load_comparison
from atv.report.comparison import all_tables, comparison_tables
from atv.report.experiments import FOLDER as EXPERIMENTS
from atv.report.experiments import experiment_tables, find_experiments, load_experiment, report_tables
from atv.report.formats import FORMATS, check_format, markdown, write_tables
from atv.report.inspection import inspection_lines, inspection_table
from atv.report.page import write_page, write_plots
from atv.report.tables import score_table

__all__ = [
    "EXPERIMENTS",
    "FORMATS",
    "all_tables",
    "analysis_tables",
    "answer",
    "check_format",
    "classification_details",
    "classification_tables",
    "classified",
    "compare_tables",
    "comparison_tables",
    "experiment_tables",
    "find_experiments",
    "inspection_lines",
    "inspection_table",
    "label_table",
    "load_comparison",
    "load_experiment",
    "markdown",
    "report_tables",
    "score_table",
    "write_page",
    "write_plots",
    "write_tables",
]
