"""Hydra config groups; the YAML beside this file ships with the package."""
