"""How often a password may be tried. Whose password it is, is ui/passwords.py's."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

# A person mistypes a few times in a row; afterwards a try every half minute is 2,880 a day from one address.
_EACH = (5, 30.0)
# From all strangers together: 28,800 tries a day, against the 10^11 passwords of eight letters.
_ALL = (30, 3.0)
# Addresses remembered: under a megabyte. Who is forgotten for want of room is still counted among all.
_REMEMBERED = 4096


class _Bucket:
    """Tokens, up to `room`; one comes back every `pause` seconds."""

    __slots__ = ("pause", "room", "seen", "tokens")

    def __init__(self, room: int, pause: float, now: float):
        self.room, self.pause, self.tokens, self.seen = room, pause, float(room), now

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 where there is one."""
        self.tokens = min(self.room, self.tokens + (now - self.seen) / self.pause)
        self.seen = now
        return max(0.0, (1 - self.tokens) * self.pause)


class Throttle:
    """Counts tries a client and in total.

    A stranger who hammers uses up what all strangers share. That must not shut out who knows the password, so two are
    counted by themselves alone: a browser that has logged in before (it shows a signed cookie; OWASP calls it a device
    cookie), and this very machine, which is reached through an SSH tunnel by whoever owns the pod.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._all = _Bucket(*_ALL, clock())
        self._each: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, client: str, *, known: bool = False) -> int:
        """Count a try, or return the whole seconds to wait before the next. Taken before the password is looked at:
        many tries at once cannot outrun it."""
        now = self._clock()
        buckets = [self._bucket(client, now), *([] if known else [self._all])]
        wait = max(bucket.wait(now) for bucket in buckets)
        if wait > 0:
            return math.ceil(wait)
        for bucket in buckets:
            bucket.tokens -= 1
        return 0

    def forget(self, client: str, *, known: bool = False) -> None:
        """It was the right password: what was counted is given back."""
        self._each.pop(client, None)
        if not known:
            self._all.tokens = min(self._all.room, self._all.tokens + 1)

    def _bucket(self, client: str, now: float) -> _Bucket:
        bucket = self._each.setdefault(client, _Bucket(*_EACH, now))
        self._each.move_to_end(client)
        while len(self._each) > _REMEMBERED:
            self._each.popitem(last=False)
        return bucket
