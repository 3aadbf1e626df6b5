"""Start the runs of a sweep and print its summary; Hydra calls this package."""
