"""Runs as files that open from disk: one run, two runs compared, a folder of runs."""
