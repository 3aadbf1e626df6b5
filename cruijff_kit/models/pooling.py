"""How the states of a text's positions are pooled, by name (see hidden_states). No torch."""

POOLINGS = ("mean", "mean_non_padding", "median", "first", "last", "last_non_padding")
EACH = "none"  # no pooling: the state of every position
