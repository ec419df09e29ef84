"""How numbers are written, on screen, in the card and on the report page. A metric and its unit: eval/catalogue.py."""


def duration(seconds: float) -> str:
    """`41 s`, `4 min 10 s`, `3 h 05 min`, `2 d 4 h`: two units at most, the second rounded."""
    seconds = max(0, round(seconds))
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """A large count with a unit: `2.4M`, `7.3B`, `850`."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{count:.0f}"


def file_size(count: float) -> str:
    """Bytes in decimal units: `461 MB`, `2.5 GB`, `12 kB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{count:.0f} bytes"


def integer(value: float) -> str:
    """`1,234,567`."""
    return f"{value:,.0f}"


def decimal(value: float, places: int = 3) -> str:
    """A fixed number of decimals."""
    return f"{value:.{places}f}"


def percent(value: float, places: int = 1) -> str:
    """A share of one: `41.7 %`."""
    return f"{100 * value:.{places}f} %"


def figure(value: float) -> str:
    """Three significant digits, more before the point: `0.00987`, `51.2`, `1,460`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def p_value(value: float) -> str:
    """`0.012`, or `< 0.001`."""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"
