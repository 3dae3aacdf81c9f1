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
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from mlflow.tracking import MlflowClient
from mlflow.types import DataType, ParamSchema, ParamSpec

from ldm import storage
from ldm.drawing import Drawing
from ldm.model_card import AUTOENCODER_FOLDER, ModelCard, find_model, load_card, model_digest
from ldm.request_table import (
    COLUMNS,
    drawing_in,
    encoded_picture,
    is_empty,
    pictures_in,
    request_of,
    typed_cells,
    with_margins,
)
from ldm.requests import Request, draw
from ldm.text_to_image import TextToImage, load_text_to_image

POINTER = "pointer"
CHAMPION = "champion"
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
REQUIREMENTS = ["torch", "transformers", "safetensors", "jaxtyping", "fsspec", "pyyaml", "pandas", "pillow"]


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
    """Draws: `predict(["a red heart"])` returns uint8 pixels, shape (n, y, x, 3); a table says more of each picture."""

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

    # MLflow reads the annotations of this one as a schema and knows only a few types: the docstring says it instead.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Return one image for each row, uint8: an array (n, y, x, 3), or a list of arrays where sizes differ.

        Args:
            context: not looked at; the model was loaded from it.
            model_input: a prompt, a list of them, or a DataFrame (or the same as a dict of columns or a list of dicts)
                with the column `prompt` and, where wanted: `negative_prompt`, `seed`, `guidance`, `steps`, `height` and
                `width` (pixels), `init_image` (bytes of a PNG or JPEG, or base64 of them, a PIL image or uint8 array),
                `mask` (the same; its light pixels are drawn anew) and `strength`; `margins` (pixels that are drawn at
                the left, top, right and bottom of an `init_image`, beside its own rows and columns); `to_prompt` and
                `to_seed` with a `share` from 0 to 1 (the picture that far on the way there from the row's own); for
                models that are told them
                `class_id`, `layout` (a list of class, left, top, right, bottom in shares of the picture),
                `semantic_map` (an integer array of the picture's size, or a picture of which a pixel's grey is its
                class, 255 none), `small` (a picture) and `noise_level`; for large sizes `tile`. What a cell leaves
                empty has its default.
            params: seed of the first image (the next ones count on), guidance and num_steps for rows that say nothing.

        Raises:
            ValueError: for no rows, unknown columns, or a row that the model can't draw.
        """
        assert self._model is not None, "mlflow calls load_context before predict"
        pictures = draw(self._model, requests_of(model_input, params or {}, self._model.card))
        return np.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else pictures


def requests_of(model_input: Any, params: Mapping[str, Any], card: ModelCard) -> list[Request]:
    """Return the requests of a pyfunc input; see `RegisteredTextToImage.predict`.

    Raises:
        ValueError: if it holds none, or a table has no column `prompt` or unknown ones.
    """
    rows = _rows(model_input)
    if not rows:
        raise ValueError("there are no prompts to draw")
    first_seed = int(params.get("seed", 0))
    return [
        _request({"seed": first_seed + number, **params_of_row(params), **row}, card) for number, row in enumerate(rows)
    ]


def params_of_row(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what params say of each row, under the names of columns."""
    names = {"guidance": "guidance", "num_steps": "steps"}
    return {column: params[name] for name, column in names.items() if params.get(name) is not None}


def _rows(model_input: Any) -> list[dict[str, Any]]:
    """Return the cells of each row that are not empty."""
    if isinstance(model_input, str):
        model_input = [model_input]
    if isinstance(model_input, Mapping) or (len(model_input) and all(isinstance(row, Mapping) for row in model_input)):
        model_input = pd.DataFrame(model_input)
    if not isinstance(model_input, pd.DataFrame):
        return [{"prompt": prompt} for prompt in model_input]
    table = model_input
    if table.shape[1] == 1 and "prompt" not in table:
        table = table.set_axis(["prompt"], axis=1)
    if "prompt" not in table:
        raise ValueError(f"the table needs a column 'prompt', it has {list(table.columns)}")
    if unknown := [str(column) for column in table.columns if column not in COLUMNS]:
        raise ValueError(f"the table has the unknown columns {unknown}; known are {', '.join(COLUMNS)}")
    return [
        {name: value for name, value in row.items() if name == "prompt" or not is_empty(value)}
        for row in table.to_dict("records")
    ]


def _request(row: Mapping[str, Any], card: ModelCard) -> Request:
    cells = {"guidance": card.guidance, **typed_cells(row)}
    drawing = with_margins(drawing_in(cells, Drawing(sampler=card.sampler)), cells)
    return request_of(cells, drawing, pictures_in(cells, encoded_picture))


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
        params=ParamSchema(
            [
                ParamSpec("seed", DataType.long, 0),
                ParamSpec("guidance", DataType.double, card.guidance),
                ParamSpec("num_steps", DataType.long, card.sampler.num_steps),
            ]
        ),
    )
