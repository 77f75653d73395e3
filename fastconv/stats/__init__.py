"""What the numbers say: evidence, statistics, gates, verdicts and the report. No torch."""
