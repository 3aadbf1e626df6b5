"""Data: rows read from files or drawn by generators, rendered to token ids, and put into batches.

Rows and generators know nothing of torch; `batches` does. Called by recipes and evaluation.
"""
