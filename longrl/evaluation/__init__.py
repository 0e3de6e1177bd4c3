"""Scores with intervals, sample records, learning curves and the report."""
