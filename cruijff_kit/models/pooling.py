"""Name the ways to pool the states of a text's positions (see hidden_states). No torch."""

POOLINGS = ("mean", "mean_non_padding", "median", "first", "last", "last_non_padding")
NO_POOLING = "none"  # no pooling: the state of every position
