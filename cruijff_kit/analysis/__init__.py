"""Statistics of finished results: scores with intervals, comparisons, rankings. It trains and evaluates nothing.

sweep            the whole analysis of a list of results, from the modules below
configurations   runs that differ only in their seed
rankings         the best configuration, and those that cannot be distinguished from it
comparisons      each configuration compared with the base model, chance, and the best
estimates        metrics and losses of a configuration with intervals, over items and seeds
differences      tests of whether two differ: items and seeds as crossed random effects
intervals        of one run: shares, means, any metric
measures         metrics of many weighted samples at once
power            the difference that a sweep of this size can detect
samples          .eval logs as arrays
permutation      tests of whether metrics differ between groups of samples
subgroups        scores and tests of groups of samples
subgroup_samples the samples of each group, from a run, a log or a CSV
effects          the share of the variance that each setting of a sweep explains
headlines        the metric of a scorer that is shown and compared
validation       the validation loss row by row
reproduction     comparison of a run with its reproduction
results_frame    results as a data frame, as CSV and as JSON
results_table    results as a table in the terminal
table_cells      the cells of these tables
summary          experiment_summary.md of a sweep
status_table     the states of runs as a table
"""
