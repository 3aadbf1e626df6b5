"""Statistics of finished results: what they are worth, which differ, how sure one may be. Trains and evaluates nothing.

sweep            everything about a list of results, from the modules below
configurations   runs that differ in their seed only
rankings         which configuration is best, by what, and which cannot be distinguished from it
comparisons      each configuration against the base model, chance, and the best
estimates        values of a configuration with intervals, over items and seeds
differences      whether two differ: items and seeds as crossed random effects
intervals        of one run: shares, means, any metric             measures   metrics of many weighted samples at once
power            what a sweep of this size can find                samples    .eval logs as arrays
permutation      do metrics differ between groups of samples?      subgroups  groups of samples; subgroup_samples reads them
effects          what the settings of a sweep do
headlines        which metric of a scorer is shown and compared
validation       the validation loss row by row
"""
