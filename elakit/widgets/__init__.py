"""Jupyter widgets: the explorer and the live panel."""
