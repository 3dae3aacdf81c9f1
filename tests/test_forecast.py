"""Laws of the forecast: its arithmetic, and that what it measures is what the run then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.forecast import Forecast, ForecastConfig, forecast
from pipeline.latent_plan import plan_latents
from pipeline.plan import missing
from pipeline.store.manifest import load_manifest
from tests.tiny_latents import carry_out, latents_config, write_autoencoder, write_dataset

MADE = Forecast(
    rows_per_second=1000.0,
    num_workers=4,
    bytes_per_row=50_000.0,
    num_rows=36_000_000,
    num_rows_in_all=72_000_000,
    num_measured=100,
    start_seconds=0.0,
    config=ForecastConfig(price_per_hour=2.0, price_per_tb_month=20.0, months=3.0, epochs=5.0),
)


def test_forecast_reckons_time_bytes_and_money() -> None:
    """36 million rows at 1,000 a second are 10 hours of 4 workers; all 72 million take 3.6 TB and 80 worker hours."""
    assert MADE.seconds == 36_000
    assert MADE.worker_hours == 40
    assert MADE.worker_hours_an_epoch == 80
    assert MADE.storage_price == pytest.approx(3.6 * 20 * 3)
    assert MADE.cached_price == pytest.approx(80 * 2 + 216)
    assert MADE.online_price == pytest.approx(5 * 80 * 2)
    text = MADE.describe()
    for said in (
        "10.0 h, 40 worker hours",
        "= 1.8e+03 GB",
        "40 worker hours x 2 = 80.00",
        "pays: 80 h x 2",
        "= 376.00",
    ):
        assert said in text


def test_forecast_says_when_a_cache_does_not_pay() -> None:
    once = dataclasses.replace(MADE, config=dataclasses.replace(MADE.config, epochs=1.0))
    assert once.cached_price > once.online_price
    assert "caching  does not pay" in once.describe()


def test_forecast_measures_the_bytes_that_the_run_then_writes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", sizes=(90, 90))
    write_autoencoder(tmp_path / "autoencoder")
    config = latents_config(tmp_path, num_actors=1)
    plan = plan_latents(config)
    found = forecast(config, plan, missing(plan), ForecastConfig(seconds=0.1))
    assert not (tmp_path / "latents").exists(), "a forecast writes nothing into the cache"
    assert found.num_rows == found.num_rows_in_all == 184
    assert 1 <= found.num_measured < 184, "it was asked for a tenth of a second"
    assert found.rows_per_second > 0
    assert found.seconds > found.start_seconds > 0
    carry_out(plan)
    made = sum(shard.num_bytes for shard in load_manifest(config.root).shards)
    # Shards of other sizes share their captions' embeddings otherwise.
    assert found.bytes_per_row * 184 == pytest.approx(made, rel=0.35)


def test_negative_prices_are_refused() -> None:
    with pytest.raises(ValueError, match="price_per_hour must not be negative, got -1"):
        ForecastConfig(price_per_hour=-1)
