"""Which epochs are saved."""


def saved_epochs(epochs_to_save: str | list[int], epochs: int) -> set[int]:
    """The 0-indexed epochs whose adapter is kept.

    Args:
        epochs_to_save: "all", "none", "last" or a list of epochs.
        epochs: how many epochs there are.
    """
    epochs_by_name = {"all": range(epochs), "none": (), "last": [epochs - 1]}
    return set(epochs_by_name[epochs_to_save] if isinstance(epochs_to_save, str) else epochs_to_save)
