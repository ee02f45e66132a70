"""Quantities as a person reads them: bytes, durations, money, moments. Text only; measuring is others' work."""

from datetime import UTC, datetime


def size(count: float | None) -> str:
    """Bytes in decimal units, as disks and the hub count them: "5.63 GB". Empty for None."""
    if count is None:
        return ""
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= power:
            value = count / power
            return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """ "48 s", "3 min 20 s", "1 h 5 min", "2 d 3 h". Empty for None."""
    if seconds is None:
        return ""
    whole = round(max(seconds, 0))
    if whole < 60:
        return f"{whole} s" if seconds >= 10 or seconds == whole else f"{seconds:.1f} s"
    for large, length, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            count, rest = divmod(whole, length)
            return f"{count} {large} {rest // part} {small}" if rest // part else f"{count} {large}"
    raise AssertionError(whole)


def dollars(amount: float | None) -> str:
    """ "$0.42"; below a cent, "under $0.01". Empty for None."""
    if amount is None:
        return ""
    return "under $0.01" if 0 < amount < 0.01 else f"${amount:,.2f}"


def moment(iso: str | None) -> str:
    """An ISO 8601 time as "2026-11-23 14:05 UTC". Empty for None."""
    return "" if not iso else datetime.fromisoformat(iso).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
