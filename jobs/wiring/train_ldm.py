"""Stage 2, put together: latents → loader → task → loop → a model folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from jobs.wiring.initial_model import (
    InitialModel,
    check_initial,
    first_network,
    initial_model,
    initial_notice,
    trained_space,
)
from jobs.wiring.memory_forecast import Denoising, advice, needed, told_of
from jobs.wiring.micro_batch import with_micro_batch
from jobs.wiring.recording import open_record
from jobs.wiring.self_testing import Forecast, begin_self_tests
from jobs.wiring.speed_forecast import forecast_rate
from ldm import storage
from ldm.conditioning.conditioner import ConditioningConfig
from ldm.conditioning.layout import num_objects
from ldm.conditioning.rows import RowConditions
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, text_encoder_digest
from ldm.config import Config, added_later
from ldm.denoiser import build_denoiser, check_denoiser, denoiser_digests, save_denoiser
from ldm.first_stage import load_autoencoder
from ldm.interop.diffusers import save_autoencoder, weights_digest
from ldm.model_card import AUTOENCODER_FOLDER, MODEL_FILE, ModelCard, keep_model, load_card, model_digest, save_card
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import TextToImage
from ldm.training.checkpoint import CheckpointStore
from ldm.training.diffusion_task import DiffusionTask, ObjectiveConfig, call_in_own_dtype
from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig
from ldm.training.engines import build_engine
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import LoopConfig, Progress, Surroundings, train
from ldm.training.optim import OptimConfig
from ldm.training.speed import peak_flops
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World
from ldm.types import Condition, Image
from ldm.unet.model import UNetConfig
from pipeline.latent_plan import check_latents, check_told, token_reader
from pipeline.latent_summary import cached_size, latent_size
from pipeline.loader import LatentLoader, LoaderConfig
from pipeline.order import check_world
from pipeline.store.manifest import Manifest, load_manifest
from pipeline.store.schema import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig(Config):
    """Sample images that are drawn along the training, from the averaged weights."""

    prompts: tuple[str, ...] = ()
    """Captions to draw; none draws nothing. Where more than captions is told, as many held-out rows instead."""
    sampler: SamplerConfig = SamplerConfig(num_steps=20)
    """How they, and later the finished model's images, are sampled."""
    guidance: float = 3.0
    """Classifier-free guidance scale; 1 is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainLdmConfig(Config):
    """Stage 2: train the conditional denoiser on cached latents."""

    root: str
    """Folder or URL of this training: checkpoints and the finished model."""
    record: str
    """Local folder of the run's own record (numbers and pictures), kept whether MLflow answers or not."""
    latents: str
    """Folder or URL of the latent cache."""
    autoencoder: str
    """The autoencoder that made it: folder, checkpoint, URL, hub name, models:/NAME/1 or shipped:small_f4."""
    text: TextEncoderConfig
    """The text encoder that made it."""
    image_size: int = added_later(0)
    """Which of the latents' image sizes is trained on; 0 for the only one."""
    unet: UNetConfig
    """The denoiser."""
    conditioning: ConditioningConfig = added_later(ConditioningConfig())
    """What it is told."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What it learns."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    ema: EmaConfig = EmaConfig()
    """Moving averages of the weights, which are what is validated and used."""
    engine: EngineConfig = EngineConfig()
    """Local engine or DeepSpeed."""
    loop: LoopConfig = LoopConfig()
    """Length and intervals."""
    launch: LaunchConfig = LaunchConfig()
    """Where it runs, and on how many workers."""
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    """Sample images along the way."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    batch_size: int = 64
    """Rows of a batch over all workers."""
    caption_dropout: float = 0.1
    """Share of rows whose caption is replaced by the empty one, for classifier-free guidance."""
    num_streams: int = 8
    """Canonical streams of the data order; the number of workers must divide it."""
    cache_folder: str = ""
    """Local folder for copies of remote shards."""
    cache_bytes: int = 0
    """Most bytes of copies in `cache_folder`, for all ranks of a machine together; 0 is no limit."""
    seed: int = 0
    """Seed of initial weights and all draws."""
    initial: str = added_later("")
    """Folder or URL of a finished model whose weights the training begins with, and whose scale of latents it keeps;
    empty draws them from the seed."""
    self_tests: bool = added_later(True)
    """Whether every attempt first shows that ranks, storage, network and memory are what it needs, and forecasts its
    images a second; takes seconds, and three passes of a micro-batch."""

    def __post_init__(self) -> None:
        if self.batch_size % self.num_streams:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of num_streams {self.num_streams}")

    @property
    def model_folder(self) -> str:
        """Where the finished model lies."""
        return storage.join(self.root, "model")

    @property
    def model_folders(self) -> dict[int, str]:
        """Where the models of all averages lie, by half-life in samples; the main one comes last."""
        further = {each: storage.join(self.root, f"model_half_life_{each}") for each in self.ema.further_half_lives}
        return {**further, self.ema.half_life_samples: self.model_folder}

    @property
    def initial_model(self) -> InitialModel | None:
        """The model that the training begins with, if it does."""
        return initial_model(self)

    def identity(self, manifest: Manifest) -> dict[str, object]:
        """Return what a checkpoint must have been made with to be resumed; lengths and intervals may change."""
        parts = {"unet": self.unet, "optim": self.optim, "ema": self.ema}
        own = {name: part.to_dict() for name, part in parts.items()} | {"objective": self.objective.of_training()}
        engine = {"precision": self.engine.precision.value}  # any engine on as many workers reads what another saved
        if self.conditioning != ConditioningConfig():
            own["conditioning"] = self.conditioning.to_dict()
        if self.image_size:
            own["image_size"] = {"image_size": self.image_size}
        if self.initial_model:
            own["initial"] = {"digest": self.initial_model.digest}
        order = {"batch_size": self.batch_size, "num_streams": self.num_streams, "seed": self.seed}
        return {**own, "engine": engine, **order, "caption_dropout": self.caption_dropout, "latents": manifest.digest}

    def loader(self, split: Split) -> LoaderConfig:
        """Return how rows of a split are read."""
        told = self.conditioning
        return LoaderConfig(
            root=self.latents,
            split=split,
            image_size=self.image_size,
            batch_size=self.batch_size,
            num_streams=self.num_streams,
            caption_dropout=self.caption_dropout if split is Split.TRAIN else 0.0,
            max_boxes=num_objects(told.layout_transformer) if told.has_layout else 1,
            seed=self.seed,
            cache_folder=self.cache_folder,
            cache_bytes=self.cache_bytes,
        )


def check_inputs(config: TrainLdmConfig) -> Manifest:
    """Refuse, before any worker starts, data that does not fit the configuration; return the latents' manifest.

    Raises:
        ValueError: naming what does not fit what.
    """
    manifest = load_manifest(config.latents)
    autoencoder = load_autoencoder(config.autoencoder)
    digest = weights_digest(autoencoder.state_dict(), autoencoder.config)
    cached_size(manifest, config.image_size)
    check_latents(manifest, autoencoder_digest=digest, text_digest=text_encoder_digest(config.text))
    check_denoiser(
        config.unet,
        config.conditioning,
        latent_channels=autoencoder.config.latent_channels,
        text_width=int(manifest.summary.get("text_width", 0)),
        pooled_width=manifest.summary.get("pooled_width"),
    )
    check_told(config.conditioning, manifest)
    check_world(world=config.launch.num_workers, num_streams=config.num_streams, batch_size=config.batch_size)
    config.engine.micro_batches(config.batch_size // config.launch.num_workers)
    if initial := config.initial_model:
        check_initial(initial, config, manifest)
    if manifest.num_rows(Split.VALIDATION) == 0:
        raise ValueError(f"{config.latents} holds no validation rows; hold some out when the dataset is made")
    return manifest


def train_ldm_worker(
    config: TrainLdmConfig,
    world: World,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    *,
    run_id: str = "",
) -> Outcome:
    """Train in one process of the group; the main one records into the MLflow run and publishes the finished model."""
    manifest = load_manifest(config.latents)
    if (initial := config.initial_model) and world.is_main:
        report(Progress(done=0, total=0, notice=initial_notice(initial, manifest)))
    tests = None
    training = denoising(config, manifest, world.size, is_on_cpu=world.device.type == "cpu")
    if config.self_tests:
        least = training.with_least_rows()
        forecast = Forecast(needed=partial(needed, least), advice=partial(advice, least))
        tests = begin_self_tests(config, config.root, manifest, forecast, world, report)
    training, searched = with_micro_batch(training, config.root, world, report)
    rate = 0.0 if tests is None else tests.timed(partial(forecast_rate, training, world, searched))
    read_tokens = token_reader(manifest, config.text, config.conditioning.text, world.device)
    loader = LatentLoader(manifest, config.loader(Split.TRAIN), world.rank, world.size, read_tokens)
    held_out = LatentLoader(manifest, config.loader(Split.VALIDATION), 0, 1, read_tokens)
    torch.manual_seed(config.seed)
    rows = config.batch_size // world.size
    network = first_network(initial, config.unet, config.conditioning)
    engine = build_engine(network, config.optim, config.ema, training.engine, world, rows)
    task = DiffusionTask(
        engine=engine,
        objective=config.objective,
        optim=config.optim,
        conditions=row_conditions(config, manifest),
        held_out=held_out,
        world=world,
        micro_batches=training.engine.micro_batches,
        total_samples=config.loop.total_samples,
        seed=config.seed,
        preview=_preview(config, engine, manifest, world, held_out),
        row_flops=training.row_flops,
        further_half_lives=config.ema.further_half_lives,
    )
    around = Surroundings(
        world=world,
        batch_size=config.batch_size,
        checkpoints=checkpoint_store(config, manifest, world),
        tracker=open_record(config.record, config.tracking.uri, run_id, world, report),
        report=report,
        should_stop=should_stop,
        peak_flops=peak_flops(world.device, config.engine),
        forecast=rate,
    )
    checked = task if tests is None else tests.around(task, {"unet": engine.raw}, around.tracker)
    state = train(checked, loader, config.loop, around)
    is_finished = state.samples_seen >= config.loop.total_samples
    if is_finished:
        _publish(config, manifest, engine, state.samples_seen, world)
    world.barrier()
    return {"is_finished": is_finished, **state.to_dict()}


def checkpoint_store(config: TrainLdmConfig, manifest: Manifest, world: World) -> CheckpointStore:
    """Return the store of this training's checkpoints."""
    root = storage.join(config.root, "checkpoints")
    return CheckpointStore(root, config.identity(manifest), config.loop.keep_checkpoints, world)


def is_done(config: TrainLdmConfig, manifest: Manifest) -> bool:
    """Say whether the finished model of every average is there, made of these latents by this configuration."""
    folders = config.model_folders.values()
    if not all(storage.exists(storage.join(folder, MODEL_FILE)) for folder in folders):
        return False
    lineages = [load_card(folder).lineage for folder in folders]
    initial = config.initial_model
    made_of = manifest.digest, initial.digest if initial else ""
    is_same = all((each.get("latents_digest"), each.get("initial_digest", "")) == made_of for each in lineages)
    return is_same and all(int(each.get("samples_seen", 0)) >= config.loop.total_samples for each in lineages)


def num_parameters(config: TrainLdmConfig) -> int:
    """Return how many weights are trained."""
    with torch.device("meta"):
        network = build_denoiser(config.unet, config.conditioning)
    return sum(weight.numel() for weight in network.parameters())


def denoising(config: TrainLdmConfig, manifest: Manifest, num_ranks: int, *, is_on_cpu: bool) -> Denoising:
    """Return a training on so many ranks, as far as its memory and its passes go."""
    return Denoising(
        unet=config.unet,
        conditioning=config.conditioning,
        told=told_of(manifest, config.image_size),
        engine=config.engine,
        num_averages=len(config.ema.half_lives),
        num_ranks=num_ranks,
        num_rows=config.batch_size // num_ranks,
        is_on_cpu=is_on_cpu,
        saves_in_background=config.loop.saves_in_background,
    )


def row_conditions(config: TrainLdmConfig, manifest: Manifest) -> RowConditions:
    """Return what makes conditions of the latents' rows."""
    factor = cached_size(manifest, config.image_size) // latent_size(manifest, config.image_size)[0]
    space = trained_space(config.initial_model, manifest)
    return RowConditions(config=config.conditioning, space=space, factor=factor, seed=config.seed)


def _card(
    config: TrainLdmConfig,
    manifest: Manifest,
    digests: tuple[str, str] = ("", ""),
    samples_seen: int = 0,
    half_life: int = 0,
) -> ModelCard:
    initial = config.initial_model
    space = trained_space(initial, manifest)
    return ModelCard(
        unet_digest=digests[0],
        conditioner_digest=digests[1],
        conditioning=config.conditioning,
        autoencoder_digest=str(manifest.identity["autoencoder"]),
        text=config.text,
        text_digest=str(manifest.identity["text_encoder"]),
        schedule=config.objective.schedule,
        prediction=config.objective.prediction,
        latent_mean=space.mean,
        latent_std=space.std,
        latent_kind=space.kind,
        latent_size=latent_size(manifest, config.image_size),
        sampler=config.preview.sampler,
        guidance=config.preview.guidance,
        lineage={
            "latents_digest": manifest.digest,
            "latents_uri": config.latents,
            "dataset_digest": str(manifest.summary["dataset"]),
            "autoencoder_uri": config.autoencoder,
            "autoencoder_digest": str(manifest.identity["autoencoder"]),
            "config_digest": config.digest(),
            "samples_seen": str(samples_seen),
            "half_life_samples": str(half_life),
            **(initial.lineage() if initial else {}),
        },
    )


def _preview(
    config: TrainLdmConfig, engine: Engine, manifest: Manifest, world: World, held_out: LatentLoader
) -> Callable[[], dict[str, Image]] | None:
    prompts = config.preview.prompts
    if not prompts:
        return None
    model = TextToImage(
        unet=partial(call_in_own_dtype, engine),
        autoencoder=load_autoencoder(config.autoencoder).to(world.device).eval(),
        text_encoder=TextEncoder(config.text, world.device),
        card=_card(config, manifest),
        device=world.device,
    )
    condition = model.condition(prompts)
    if not config.conditioning.is_text_only:
        condition = _held_out_condition(config, manifest, held_out, world)
    seeds = range(condition.num_rows or len(prompts))
    scales = [config.preview.guidance] * len(seeds)
    return lambda: {"samples": model.images(condition, seeds, scales, config.preview.sampler)}


def _held_out_condition(config: TrainLdmConfig, manifest: Manifest, held_out: LatentLoader, world: World) -> Condition:
    """Return what the first held-out rows of one shape are told, as many as there are prompts: those alone say less."""
    start, stop = next(held_out.spans(0, held_out.num_rows, len(config.preview.prompts)))
    return row_conditions(config, manifest).whole(held_out.rows(start, stop)).to(world.device, torch.float32)


def _publish(config: TrainLdmConfig, manifest: Manifest, engine: Engine, samples_seen: int, world: World) -> None:
    """Write the models of all averages; a description goes first, comes back last, and makes its folder whole."""
    if world.is_main:
        keep_model(config.model_folder)  # a registered version may point to it
    for half_life, folder in config.model_folders.items():
        weights = engine.weights(half_life)
        if not world.is_main:
            continue
        storage.remove_file(storage.join(folder, MODEL_FILE))
        save_denoiser(config.unet, config.conditioning, weights, folder)
        save_autoencoder(load_autoencoder(config.autoencoder), storage.join(folder, AUTOENCODER_FOLDER))
        digests = denoiser_digests(config.unet, config.conditioning, weights)
        card = _card(config, manifest, digests, samples_seen, half_life)
        save_card(card, folder)
        logger.info("model %s in %s", model_digest(card), folder)
