"""Where a run is recorded; apart from the MLflow file, so that a machine without MLflow can read a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ldm.config import Config


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig(Config):
    """Where a run is recorded."""

    uri: str = "sqlite:///runs/mlflow.db"
    """MLflow tracking URI: sqlite:///file.db, or http(s)://host:port of a server; empty keeps only the local record."""
    experiment: str = "ldm"
    """MLflow experiment."""
    artifacts: str = ""
    """Where a new experiment keeps its files; empty lets MLflow decide (a server) or takes the database's folder."""
    model_name: str = ""
    """Name in the model registry; empty registers nothing."""
