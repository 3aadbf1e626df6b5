"""Data: rows read from files or drawn by generators, rendered to token ids, and put into batches.

    layouts, readers, rows   files to rows          instruct, packing, batches   to tokens, packs and tensors
    conversations            to what is asked       leaks, preview, convert      checks and commands

Only `batches` knows torch. Called by the plan, recipes and evaluation; `cruijff-kit data` are its commands.
"""
