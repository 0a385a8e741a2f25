"""Learning: the loop, checkpoints, the run folder."""
