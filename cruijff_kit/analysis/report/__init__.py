"""The report of a sweep: one page that opens without a network, its figures and their data, and a methods text.

`cruijff-kit report` writes it, and so does sweep/finish.py at the end of a local sweep. It reads the files of the runs
through slurm/run_states.py, sweep.json, analysis and evaluation/eval_logs.py; it trains, evaluates and changes nothing.

load      the runs, read once                      document  sections, tables and charts
figures   the style of charts, as SVG and as PNG   page.html the page's template
build     builds all sections, writes the files    phrases   settings of all runs in words (for methods)
outcomes  the numbers that are reported            methods_data  the sentences about data and prompts (for methods)
wording   names of units, tests and choices        effect_sizes, effect_charts  the calculations and charts of effects
overview, ranking, curves, effects, scores, calibration, groups, samples, costs, unfinished_runs, methods: a section each
"""
