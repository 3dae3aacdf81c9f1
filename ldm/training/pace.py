"""The pace of a training beside its forecast: as metrics of a record, and in words.

    images_per_second           rows of all processes, over the seconds of the steps
    images_per_second_forecast  what forward and backward alone would make: no wait, exchange, optimizer nor averages
    forecast_share              the one over the other

The forecast is of eager, unsharded passes of the largest rows: a run whose passes are faster may exceed it.
"""

from __future__ import annotations


def pace_metrics(num_images: int, seconds: float, forecast: float) -> dict[str, float]:
    """Return what a record says of the pace.

    Args:
        num_images: rows of all processes since the last record.
        seconds: that the steps took for them.
        forecast: images a second; 0 where there is none, of which nothing is said then.
    """
    rate = num_images / max(seconds, 1e-9)
    beside = {"images_per_second_forecast": forecast, "forecast_share": rate / forecast} if forecast else {}
    return {"images_per_second": rate, **beside}


def pace_in_words(forecast: float, num_workers: int, samples_seen: int, total_samples: int) -> str:
    """Return in words how fast a training would be, and how long what is left of it would take.

    Args:
        forecast: images a second of all workers.
        num_workers: how many they are.
        samples_seen: that are behind it.
        total_samples: of the whole training.
    """
    left = total_samples - samples_seen
    samples = f"the {left:,} samples that are left" if samples_seen else f"{left:,} samples"
    workers = f"{num_workers} worker{'s' * (num_workers > 1)}"
    return (
        f"{rate_in_words(forecast)} images a second on {workers}, forward and back alone: {samples} in "
        f"{duration_in_words(left / forecast)}"
    )


def rate_in_words(rate: float) -> str:
    """Return a number of images a second: 1,234.5, 24.1, 0.042."""
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


def duration_in_words(seconds: float) -> str:
    """Return a time in its two largest units: 45 s, 33 min, 1 h 6 min, 3 d 4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
