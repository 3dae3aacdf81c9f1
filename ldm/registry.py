"""THE MLflow model file: a trained model as a version in the registry, and as a pyfunc that draws.

A version holds a pointer (address and digest of the model folder), never a second copy of the weights. Its tags name
what it was made of, so that model, latents, dataset, code and evaluation can be followed from either end.
"""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from ldm import storage
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import (
    AUTOENCODER_FOLDER,
    ModelCard,
    TextToImage,
    find_model,
    load_card,
    load_text_to_image,
    model_digest,
)

POINTER = "pointer"
CHAMPION = "champion"
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
REQUIREMENTS = ["torch", "transformers", "safetensors", "jaxtyping", "fsspec", "pyyaml", "pandas"]


class RegistryError(OSError):
    """The registry could not be reached or refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredModel:
    """A version in the registry.

    Attributes:
        name: the registered model.
        version: its number.
        uri: what `mlflow.pyfunc.load_model` takes.
    """

    name: str
    version: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PointedAutoencoder:
    """Where the autoencoder of a registered model lies.

    Attributes:
        folder: its address, in the layout of diffusers.
        digest: of its weights and configuration, as the model's description names it.
    """

    folder: str
    digest: str


class RegisteredTextToImage(PythonModel):
    """Draws prompts: `predict(["a red heart"])` returns uint8 pixels, shape (n, y, x, 3)."""

    def __init__(self) -> None:
        self._model: TextToImage | None = None

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model that the pointer names.

        Raises:
            ValueError: if what lies there is not what was registered, showing both digests.
        """
        pointer = json.loads(Path(context.artifacts[POINTER]).read_text())
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_text_to_image(find_model(pointer["uri"], pointer["digest"]), device)

    # MLflow reads the annotations of this one as a schema and knows only a few types: the signature says it instead.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return one image for each prompt.

        Args:
            context: not looked at; the model was loaded from it.
            model_input: a list of prompts, or a DataFrame with a column `prompt` (or only one column).
            params: seed of the first image (the next ones count on), guidance, num_steps.
        """
        assert self._model is not None, "mlflow calls load_context before predict"
        prompts = prompts_of(model_input)
        chosen = params or {}
        card = self._model.card
        first_seed = int(chosen.get("seed", 0))
        num_steps = int(chosen.get("num_steps") or card.sampler.num_steps)
        guidance = float(chosen.get("guidance", card.guidance))
        sampler = SamplerConfig(
            stepper=card.sampler.stepper, num_steps=num_steps, eta=card.sampler.eta, grid=card.sampler.grid
        )
        return self._model.generate(
            prompts,
            seeds=[first_seed + row for row in range(len(prompts))],
            guidance=[guidance] * len(prompts),
            sampler=sampler,
        )


def prompts_of(model_input: Any) -> list[str]:
    """Return the prompts of a pyfunc input.

    Raises:
        ValueError: if it holds none, or a table has no column `prompt`.
    """
    if isinstance(model_input, pd.DataFrame):
        if "prompt" not in model_input and model_input.shape[1] != 1:
            raise ValueError(f"the table needs a column 'prompt', it has {list(model_input.columns)}")
        model_input = model_input["prompt" if "prompt" in model_input else model_input.columns[0]]
    prompts = [str(prompt) for prompt in ([model_input] if isinstance(model_input, str) else model_input)]
    if not prompts:
        raise ValueError("there are no prompts to draw")
    return prompts


def register(*, uri: str, run_id: str, name: str, folder: str, tags: Mapping[str, str]) -> RegisteredModel:
    """Register the model in a folder as a new version, logged by the run that trained it.

    Args:
        uri: MLflow tracking URI, which is the registry's too.
        run_id: the run that trained it.
        name: name of the registered model.
        folder: address of the model folder; it stays where it is.
        tags: lineage beside what the model's own card holds.

    Raises:
        RegistryError: if the registry can't be reached.
    """
    try:
        return _register(uri, run_id, name, folder, tags)
    except MlflowException as error:
        raise RegistryError(str(error).splitlines()[0][:300]) from error


def _register(uri: str, run_id: str, name: str, folder: str, tags: Mapping[str, str]) -> RegisteredModel:
    card = load_card(folder)
    mlflow.set_tracking_uri(uri)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        pointer = Path(scratch) / "pointer.json"
        pointer.write_text(json.dumps({"uri": folder, "digest": model_digest(card)}, indent=1))
        with mlflow.start_run(run_id=run_id):
            info = mlflow.pyfunc.log_model(
                name="text_to_image",
                python_model=RegisteredTextToImage(),
                artifacts={POINTER: str(pointer)},
                signature=_signature(card),
                pip_requirements=REQUIREMENTS,
                registered_model_name=name,
            )
    version = str(info.registered_model_version)
    client = MlflowClient(uri)
    for key, value in {**card.lineage, **tags, "model_digest": model_digest(card), "model_uri": folder}.items():
        client.set_model_version_tag(name, version, key, value)
    return RegisteredModel(name=name, version=version, uri=f"models:/{name}/{version}")


def pointed_autoencoder(where: str, uri: str = "") -> PointedAutoencoder:
    """Return the autoencoder of a version or run that this project registered, by its pointer; runs no code of it.

    Args:
        where: `models:/NAME/VERSION`, `models:/NAME@ALIAS` or `runs:/RUN_ID/text_to_image`.
        uri: MLflow tracking URI; empty is what `MLFLOW_TRACKING_URI` says, or MLflow's own default.

    Raises:
        ValueError: if there is no such version or run, it has no pointer, or another model lies where that points.
        RegistryError: if the registry can't be reached.
    """
    if uri:
        mlflow.set_tracking_uri(uri)
    try:
        with _quiet():
            pointer = mlflow.artifacts.load_dict(f"{where.rstrip('/')}/artifacts/{POINTER}.json")
    except (MlflowException, OSError) as error:
        if isinstance(error, MlflowException) and error.error_code not in _NOT_THERE:
            raise RegistryError(str(error).splitlines()[0][:300]) from error
        raise ValueError(
            f"{where} names no model that this project registered: expected artifacts/{POINTER}.json in it at "
            f"{mlflow.get_tracking_uri()}, got: {str(error).splitlines()[0][:300]}"
        ) from error
    folder = find_model(pointer["uri"], pointer["digest"])
    return PointedAutoencoder(
        folder=storage.join(folder, AUTOENCODER_FOLDER), digest=load_card(folder).autoencoder_digest
    )


def record_evaluation(
    *, uri: str, model: RegisteredModel, protocol_digest: str, metrics: Mapping[str, float], has_passed: bool
) -> str:
    """Write an evaluation on a version, and move the alias `champion` to it if it passed its gate.

    Returns:
        The version that is the champion now; empty where none is.

    Raises:
        RegistryError: if the registry can't be reached.
    """
    client = MlflowClient(uri)
    tags = {"evaluation_protocol": protocol_digest, "evaluation_passed": str(has_passed).lower()}
    tags |= {f"evaluation.{name}": f"{value:.6g}" for name, value in metrics.items()}
    try:
        for key, value in tags.items():
            client.set_model_version_tag(model.name, model.version, key, value)
        if has_passed:
            client.set_registered_model_alias(model.name, CHAMPION, model.version)
        return str(client.get_registered_model(model.name).aliases.get(CHAMPION, ""))
    except MlflowException as error:
        raise RegistryError(str(error).splitlines()[0][:300]) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's advice and its "created version" off the terminal; what goes wrong is raised."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _signature(card: ModelCard) -> ModelSignature:
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("guidance", DataType.double, card.guidance),
                ParamSpec("num_steps", DataType.long, card.sampler.num_steps),
            ]
        ),
    )
