"""Everything that talks to SLURM: asking it, submitting to it, and what happens inside a job. Called by launch/ and by the
commands (status, logs, cancel, resume, doctor); nothing here trains.
"""
