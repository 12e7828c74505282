"""Batch jobs: series on disk, planned, written and read; the cells of the paper's table."""
