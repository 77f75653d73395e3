"""Data: personas, questions, behaviors and their training rows, and the reading of data files. Knows no torch."""
