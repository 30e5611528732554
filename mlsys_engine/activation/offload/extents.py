"""Which parts of a file or of a slab are taken."""

from __future__ import annotations

import bisect

_ALIGNMENT = 4096  # a page


class Extents:
    """Parts of a line that starts at 0, first fit from the front, so that a line of equal steps stays short.

    Free neighbours are one extent, and none touches `end`: everything from there on is free.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.end = 0
        self._capacity = capacity
        self._free: list[tuple[int, int]] = []  # (start, end), in order

    def take(self, num_bytes: int) -> int | None:
        """The start of a free part that is taken now; None when there is none."""
        size = rounded(num_bytes)
        for position, (start, end) in enumerate(self._free):
            if end - start >= size:
                if end - start == size:
                    del self._free[position]
                else:
                    self._free[position] = (start + size, end)
                return start
        if self._capacity is not None and self.end + size > self._capacity:
            return None
        self.end += size
        return self.end - size

    def give_back(self, start: int, num_bytes: int) -> None:
        """The part that was taken as `num_bytes` from `start` on is free again."""
        end = start + rounded(num_bytes)
        position = bisect.bisect(self._free, (start, end))
        if position < len(self._free) and self._free[position][0] == end:
            end = self._free.pop(position)[1]
        if position and self._free[position - 1][1] == start:
            position -= 1
            start = self._free.pop(position)[0]
        if end == self.end:
            self.end = start
        else:
            self._free.insert(position, (start, end))


def rounded(num_bytes: int) -> int:
    """What `num_bytes` take: whole pages, and one for nothing, so that no two parts share a start."""
    return max(1, -(-num_bytes // _ALIGNMENT)) * _ALIGNMENT
