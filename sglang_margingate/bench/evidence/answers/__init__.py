"""Evidence for answers beyond greedy tokens."""
