"""The conversation with SLURM: queries, submissions, cancellations, and the states of runs that follow from its answers."""
