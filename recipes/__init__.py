"""cruijff_kit's torchtune recipes: one file per method, read top to bottom."""
