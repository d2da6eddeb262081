"""``margingate doctor``: what holds on this machine, in one report."""
