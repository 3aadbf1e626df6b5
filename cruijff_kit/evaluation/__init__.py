"""Evaluation: inspect-ai tasks answered by the model in memory. Called by run.

engine      knows torch: decodes batches of prompts          provider   knows inspect-ai: its model API over an engine
evaluate    runs tasks, checks that nothing is missing       baseline   the untrained model, cached
together    the same of several runs in common passes         workers    and in processes beside this one
prompts     proves that evaluation asks what training taught  tasks/    the tasks that ship with cruijff_kit
scorers     options, risks and numbers; metrics over them     items      what each sample of a log was worth
names       what the entries of eval.tasks mean              foreign   tasks of the user's, or of a package
"""
