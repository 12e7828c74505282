"""How good a trained model is: measures, the classifier some of them need, pictures, a report."""

from ncfast.evaluation.protocol import csv_rows, evaluate

__all__ = ["csv_rows", "evaluate"]
