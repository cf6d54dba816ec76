"""How much of a run is recorded: what its history will take is known before its first step."""

from __future__ import annotations

__all__ = ["as_record_every"]

HISTORY_BYTES = 3 * 2**28
"""What a history may take: three quarters of what a checkpoint may."""


def as_record_every(asked: int | None, saved: int | None, width: int, num_steps: int) -> int:
    """Which steps to record, so that the history stays within `HISTORY_BYTES`.

    Args:
        asked: every so many; None to choose: every step, or as many as there is room for.
        saved: as the checkpoint has it, if there is one: its records cannot be made denser.
        width: bytes of the record of a step.
        num_steps: steps in all.

    Returns:
        Every how many steps one is recorded; by choice a power of two, times `saved`.

    Raises:
        ValueError: if what was asked for does not fit, or is not what the checkpoint holds.

    Example:
        >>> as_record_every(None, None, 27 * 1_024, 1_000_000)
        64
    """
    most = max(HISTORY_BYTES // width, 1)
    if asked is None:
        every = saved or 1
        while num_steps // every > most:
            every *= 2
        return every
    if saved not in (None, asked):
        raise ValueError(f"record_every must be None, or {saved} as in the checkpoint; got {asked}")
    if num_steps // asked > most:
        raise ValueError(
            f"record_every must be at least {num_steps // (most + 1) + 1}, or None, for a history "
            f"of {num_steps} steps with {width} bytes each, to take at most "
            f"{HISTORY_BYTES >> 20} MiB; got {asked}"
        )
    return asked
