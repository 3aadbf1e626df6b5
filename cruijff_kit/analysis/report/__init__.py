"""The report of a sweep: one page that opens without a network, its figures and their data, and a methods text.

`cruijff-kit report` makes it, and sweep/finish.py at the end of a sweep on this machine. It reads what runs have written,
through slurm/run_states.py, sweep.json, analysis and evaluation/eval_logs.py; it trains, evaluates and changes nothing.

runs      what is reported on, read once           document  sections, tables, charts; what is written
drawing   how charts look, as SVG and as PNG       page.html the page's template
writing   makes all sections, writes the files     varying   what runs have in common, in words (for methods)
outcomes  numbers by which all are shown           methods_data  what methods says of data and prompts
wording   what intervals are over, tests, choices
overview, ranking, curves, effects, scores, calibration, groups, samples, costs, failed, methods: a section each
"""
