from .panel import Panel as Panel
from .panel import live as live
