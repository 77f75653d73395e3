"""Statistics: series of scores, intervals, tests, power, gates and verdicts. Uses neither torch nor the network."""
