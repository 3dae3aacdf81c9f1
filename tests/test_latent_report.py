"""Laws of the latent cache's report: it shows what the cache holds, and needs nothing beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.wiring.precompute_latents import metrics_of
from pipeline.latent_report import chosen_rows, write_latent_report
from pipeline.store.manifest import load_manifest
from tests.html_page import parse
from tests.tiny_latents import latents_config, write_latents


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_latents(folder)
    return folder


def test_report_shows_the_gates_rows_from_the_worst_to_the_best_and_the_channels(made: Path) -> None:
    path = write_latent_report(latents_config(made))
    page = parse(Path(path).read_bytes())
    manifest = load_manifest(str(made / "latents"))
    figures = sorted(figure for shard in manifest.shards for figure in shard.details["gate"]["psnr"])
    shown = [float(node.text.split(" dB")[0]) for node in page.by_id("pairs").all("figcaption")]
    assert shown == pytest.approx(figures, abs=0.3), "decoded alone and decoded in a batch are nearly the same"
    assert shown == sorted(shown)
    assert all(image.attributes["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert len(page.by_id("pairs").all("img")) == 2 * len(figures)
    rows = page.by_id("channels").rows()
    assert rows[0] == ["channel", "mean", "std", "min", "max"]
    assert [float(value) for value in rows[1][1:]] == pytest.approx(
        [manifest.summary[name][0] for name in ("mean", "std", "min", "max")], rel=1e-3
    )
    assert manifest.summary["dataset"] in page.by_id("making").text


def test_report_of_the_same_cache_is_the_same_bytes(made: Path) -> None:
    config = latents_config(made)
    first = Path(write_latent_report(config)).read_bytes()
    assert Path(write_latent_report(config)).read_bytes() == first


def test_chosen_rows_begin_with_the_worst_and_spread_over_the_order(made: Path) -> None:
    manifest = load_manifest(str(made / "latents"))
    figure_of = {
        (shard.split, shard.name, tuple(row)): figure
        for shard in manifest.shards
        for row, figure in zip(shard.details["gate"]["rows"], shard.details["gate"]["psnr"], strict=True)
    }
    chosen = [figure_of[shard.split, shard.name, row] for shard, row in chosen_rows(manifest, 5)]
    assert len(chosen) == 5
    assert (chosen[0], chosen[-1]) == (min(figure_of.values()), max(figure_of.values()))
    assert chosen == sorted(chosen)


def test_metrics_are_the_manifests_totals(made: Path) -> None:
    metrics = metrics_of(load_manifest(str(made / "latents")))
    assert (metrics["rows"], metrics["shards"]) == (22, 4)
    assert metrics["channel_1_std"] == load_manifest(str(made / "latents")).summary["std"][1]
    assert metrics["bytes"] == sum(
        path.stat().st_size for path in (made / "latents").glob("*/*") if not path.name.endswith("record.json")
    )
