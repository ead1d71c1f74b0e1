"""Shares what a run made: students, cache and their cards."""
