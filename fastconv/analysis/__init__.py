"""From the ledger's scores to gates, verdicts and secondary contrasts of a recipe."""
