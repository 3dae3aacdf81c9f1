"""Which autoencoder a job means, settled once before any worker starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from jobs.session import without_warnings
from jobs.wiring.precompute_latents import PrecomputeLatentsConfig
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm.first_stage import settled_address

ConfigT = TypeVar("ConfigT", PrecomputeLatentsConfig, TrainLdmConfig)


def settled(config: ConfigT) -> ConfigT:
    """Return the config with an address in place of a name at MLflow, asked of the job's own server if it has one.

    Workers then need no MLflow, and an alias that moves while they start leaves them with one autoencoder.

    Raises:
        ValueError: if MLflow has no such model of ours, or does not answer.
    """
    try:
        with without_warnings():
            where = settled_address(config.autoencoder, config.tracking.uri)
    except OSError as error:
        raise ValueError(f"{config.autoencoder} was not found out: MLflow did not answer: {error}") from error
    return replace(config, autoencoder=where)
