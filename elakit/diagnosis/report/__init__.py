"""Report of a diagnosis as one self-contained HTML page."""

from elakit.diagnosis.measures import MEANINGS, measure_table
from elakit.diagnosis.report.page import render, write
from elakit.diagnosis.sentences import summary
from elakit.files import check_path

__all__ = ["MEANINGS", "check_path", "measure_table", "render", "summary", "write"]
