"""From the ledger to gates and verdicts: one reading, the evidence gathered from it, what it decides. No torch."""
