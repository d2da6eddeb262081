"""Seeded sampling: which rows of a forward are drawn, and their draw."""
