"""Data: rows read from files or drawn by generators, rendered to token ids, and put into batches.

    dataset_files, readers, rows   files to rows           instruct, packing, batches   to tokens, packs and tensors
    conversations                  to prompts, answers     leaks, near_duplicates       checks

Only `batches` imports torch.
"""
