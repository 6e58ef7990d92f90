"""The report of a diagnosis: one HTML page that needs nothing but itself."""

from elakit.diagnosis import MEANINGS, measure_table, summary
from elakit.diagnosis.report.page import render, write
from elakit.files import check_path

__all__ = ["MEANINGS", "check_path", "measure_table", "render", "summary", "write"]
