"""Makes cruijff_kit's launcher known to Hydra, which starts launchers from its hydra_plugins namespace only."""
