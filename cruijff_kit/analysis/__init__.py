"""Statistics of finished results: what they are worth, which differ, how sure one may be. Trains and evaluates nothing.

measures    a metric of many weighted samples at once     intervals   of shares, of means, of any metric
permutation do metrics differ between groups?             subgroups   groups of samples; subgroup_samples reads them
effects     what settings explain of what differs
crossed     differences over test items and seeds         power       what a sweep of this size can find
"""
