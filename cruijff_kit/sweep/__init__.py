"""Starting runs: the launcher that Hydra calls for a sweep, and what is said when a sweep ends. Called by Hydra."""
