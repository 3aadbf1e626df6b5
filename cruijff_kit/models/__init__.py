"""Base models: fetching, building, tokenising, and saving adapters. Called by recipes, evaluation and the plan."""
