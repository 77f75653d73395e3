"""Rows in, rows out: personas, questions, behavior sets and their audit. No torch."""
