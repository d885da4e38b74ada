"""Reports: pure functions of recorded rows. Nothing here loads torch."""

from atv.report.tables import accuracy_table, markdown

__all__ = ["accuracy_table", "markdown"]
