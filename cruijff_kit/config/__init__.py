"""What a run is: one dataclass per config group, each field with its type, default and meaning.

The YAML in conf/ makes the choices; this package says what may be chosen. `load` turns what Hydra composed into a
`RunConfig`, refusing anything that is not described here. Imported at start-up: no torch, no torchtune.
"""
