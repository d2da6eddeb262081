"""What a GPU of each architecture holds, as kernels must know it: constants are chosen by these limits, not by names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Limits of one architecture (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").

    Parameters
    ----------
    capability
        Compute capability, ten times: 90 is 9.0.
    name
        A card of it.
    shared_block
        Bytes of shared memory that one program may have.
    shared_sm
        Bytes of shared memory of a multiprocessor.
    """

    capability: int
    name: str
    shared_block: int
    shared_sm: int

    @property
    def target(self) -> str:
        """As the compiler names it."""
        return f"sm_{self.capability}"


REGISTERS = 65_536
"""32-bit registers of a multiprocessor, and the most that one program may have, on every card below."""

CARDS = (
    Card(80, "A100", 163 * 1024, 164 * 1024),
    Card(86, "A10, RTX 3090", 99 * 1024, 100 * 1024),
    Card(89, "L4, L40S, RTX 4090", 99 * 1024, 100 * 1024),
    Card(90, "H100, H200", 227 * 1024, 228 * 1024),
    Card(100, "B200", 227 * 1024, 228 * 1024),
    Card(120, "RTX 5090, RTX PRO 6000", 99 * 1024, 100 * 1024),
)
"""The architectures that every kernel is compiled for. Only Hopper's (9.0) was run: see docs/benchmarks.md."""
