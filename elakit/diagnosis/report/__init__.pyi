from ...files import check_path as check_path
from ..measures import MEANINGS as MEANINGS
from ..measures import measure_table as measure_table
from ..sentences import summary as summary
from .page import render as render
from .page import write as write
