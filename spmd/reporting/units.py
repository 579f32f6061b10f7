"""Numbers as people read them: three digits and a unit."""

from collections.abc import Sequence

_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_FLOPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def size(n: float) -> str:
    """Bytes: `1.50 MiB`."""
    return _scaled(n, _BYTES, "B")


def flops(n: float) -> str:
    """Operations: `2.10 TFLOP`."""
    for scale, unit in _FLOPS:
        if abs(n) >= scale:
            return f"{_digits(n / scale)} {unit}FLOP"
    return f"{n:,.0f} FLOP"


def seconds(n: float) -> str:
    """Times: `18.6 ms`; 0 is `0 s`."""
    for scale, unit in _SECONDS:
        if abs(n) >= scale:
            return f"{_digits(n / scale)} {unit}"
    return f"{_digits(n / 1e-9)} ns" if n else "0 s"


def percent(share: float) -> str:
    return f"{share * 100:.1f}%"


def signed(text: str) -> str:
    """A formatted difference, with its sign."""
    return text if text.startswith("-") else f"+{text}"


def plural(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def table(
    rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  "
) -> list[str]:
    """Lines of aligned columns; those in `right` are aligned to the right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def shortened(text: str, width: int) -> str:
    """At most `width` characters: what is in the middle goes."""
    if len(text) <= width:
        return text
    head = (width - 3) // 3
    return f"{text[:head]}...{text[len(text) - (width - 3 - head):]}"


def _scaled(n: float, scales: Sequence[tuple[float, str]], unit: str) -> str:
    for scale, name in scales:
        if abs(n) >= scale:
            return f"{_digits(n / scale)} {name}"
    return f"{n:,.0f} {unit}"


def _digits(x: float) -> str:
    """Three significant digits, and no exponent."""
    whole = len(str(int(abs(x))))
    return f"{x:,.{max(3 - whole, 0)}f}"
