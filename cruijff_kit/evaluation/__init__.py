"""Evaluation: inspect-ai tasks answered by the model in memory. Called by runs.

engine      knows torch: decodes batches of prompts           provider      knows inspect-ai: its model API over an engine
run_tasks   evaluates: one log and one Evaluation per task    multi_run     several runs together, in common passes
baseline    evaluates the base model, cached                  fork_pool     and in processes beside this one
build_tasks, tasks/, external_tasks                           builds tasks: those that ship, the user's, those of packages
inspect_eval, log_checks                                      calls eval(); checks that its log is complete
prompt_check, targets                                         checks prompts and targets before training
scorers, numbers, metrics, chance                             options, risks and numbers; metrics; the constant baseline
eval_logs, log_redaction                                      reads logs; withholds the samples of red data
evaluation_grid   which evaluations a result lacks
"""
