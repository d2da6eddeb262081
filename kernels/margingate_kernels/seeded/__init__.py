"""Seeded draws: a token of a row's softmax as an argmax of logits and noise, with its margin.

Noise and arithmetic: :mod:`.noise`; filters, margin and the reference: :mod:`.draw`; the call: :mod:`.sample`.
"""

from margingate_kernels.seeded.draw import Draw, Drawn, draw_reference, pack
from margingate_kernels.seeded.sample import draw

__all__ = ["Draw", "Drawn", "draw", "draw_reference", "pack"]
