"""Stage 1, put together: images → loader → task → loop → an autoencoder folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from jobs.wiring.autoencoder_memory import Reconstructing, advice, described, needed, row_flops
from jobs.wiring.machine import free_share, trains_on_cpu
from jobs.wiring.recording import open_record
from jobs.wiring.self_testing import Forecast, begin_self_tests
from ldm import storage
from ldm.autoencoder.codebook import CodebookConfig, CodebookMemory
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig
from ldm.autoencoder.regularizer import Regularizer
from ldm.config import Config, added_later
from ldm.evaluation.features import feature_network
from ldm.first_stage import EVALUATION_FILE, NoAutoencoderError, load_autoencoder
from ldm.interop.diffusers import CONFIG_NAME, save_autoencoder, weights_digest
from ldm.losses.perceptual import perceptual_distance
from ldm.precision import Precision
from ldm.training.adversary import Adversary, build_discriminator, build_memory
from ldm.training.autoencoder_task import AutoencoderTask
from ldm.training.autoencoder_validation import AutoencoderValidation, HeldOutImages
from ldm.training.checkpoint import LATEST_FILE, CheckpointStore
from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig, EngineKind
from ldm.training.engines import build_engine
from ldm.training.local_launch import LaunchConfig, Outcome
from ldm.training.loop import LoopConfig, Progress, Surroundings, train
from ldm.training.memory import UNSHARDED, Sharding, read_sharding
from ldm.training.optim import OptimConfig
from ldm.training.reconstruction_config import ReconstructionConfig
from ldm.training.speed import peak_flops
from ldm.training.state import TrainState
from ldm.training.tracking_config import TrackingConfig
from ldm.training.world import World
from pipeline.images import ImageCropConfig, ImageLoader, ImageLoaderConfig
from pipeline.ingest.picture import ResizeMode
from pipeline.order import check_world
from pipeline.store.manifest import Manifest, load_manifest
from pipeline.store.schema import Split

LATENT_STATISTICS_FILE = "latent_statistics.json"
"""Beside the weights: mean, deviation and scale factor of the held-out split's latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainAutoencoderConfig(Config):
    """Stage 1: train the autoencoder that images are compressed with."""

    root: str
    """Folder or URL of this training: checkpoints and the finished autoencoder."""
    record: str
    """Local folder of the run's own record (numbers and pictures), kept whether MLflow answers or not."""
    dataset: str
    """Folder or URL of the dataset."""
    autoencoder: AutoencoderConfig
    """The network."""
    loss: ReconstructionConfig = ReconstructionConfig()
    """The terms of the loss."""
    optim: OptimConfig = OptimConfig(beta1=0.5, beta2=0.9)
    """Optimizer and learning rate, of both networks."""
    ema: EmaConfig = EmaConfig()
    """Moving average of the weights, which is what is validated and used."""
    engine: EngineConfig = EngineConfig()
    """Local engine or DeepSpeed: each network has an engine of its own."""
    loop: LoopConfig = LoopConfig()
    """Length and intervals."""
    launch: LaunchConfig = LaunchConfig()
    """Where it runs, and on how many workers."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    batch_size: int = 32
    """Rows of a batch over all workers."""
    num_streams: int = 8
    """Canonical streams of the data order; the number of workers must divide it."""
    has_flips: bool = True
    """Whether half of the images are mirrored."""
    cache_folder: str = ""
    """Local folder for copies of remote shards."""
    seed: int = 0
    """Seed of initial weights and all draws."""
    initial: str = added_later("")
    """Address of an autoencoder of the same shape whose weights the training starts from (see `ldm.first_stage`), to
    fit it to one's own pictures; empty for drawn weights."""
    crop: ImageCropConfig = added_later(ImageCropConfig())
    """Which square of a picture is a row; held-out pictures are their centre."""
    self_tests: bool = added_later(True)
    """Whether every attempt first shows that ranks, storage, network and memory are what it needs; takes seconds."""

    def __post_init__(self) -> None:
        if self.autoencoder.regularizer is Regularizer.KL and self.loss.codebook != CodebookConfig():
            raise ValueError(f"loss.codebook belongs to vq, got {self.loss.codebook} for kl")
        if self.engine.micro_batch_size or self.engine.finds_micro_batch:
            raise ValueError(
                "stage 1 weighs two losses by the gradients of a whole batch: engine.micro_batch_size must be 0 and "
                "engine.finds_micro_batch off"
            )
        if self.engine.precision is Precision.FP16:
            raise ValueError("stage 1 weighs its losses by their gradients, too small for fp16: take bf16 or fp32")
        if self.ema.further_half_lives:
            raise ValueError(
                "stage 1 publishes one autoencoder, that of ema.half_life_samples: ema.further_half_lives must be "
                f"empty, got {self.ema.further_half_lives}"
            )
        if self.batch_size % self.num_streams:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of num_streams {self.num_streams}")

    @property
    def model_folder(self) -> str:
        """Where the finished autoencoder lies."""
        return storage.join(self.root, "model")

    @property
    def checkpoints_folder(self) -> str:
        """Where the state to go on from lies."""
        return storage.join(self.root, "checkpoints")

    def identity(self, manifest: Manifest) -> dict[str, object]:
        """Return what a checkpoint must have been made with to be resumed; lengths and intervals may change."""
        parts = {"autoencoder": self.autoencoder, "loss": self.loss, "optim": self.optim, "ema": self.ema}
        own = {name: part.to_dict() for name, part in parts.items()}
        order = {"batch_size": self.batch_size, "num_streams": self.num_streams, "seed": self.seed}
        later: dict[str, object] = {} if self.crop == ImageCropConfig() else {"crop": self.crop.to_dict()}
        if self.initial:
            later["initial"] = self.initial
        return {**own, **order, **later, "has_flips": self.has_flips, "dataset": manifest.digest}

    def loader(self, split: Split) -> ImageLoaderConfig:
        """Return how rows of a split are read."""
        return ImageLoaderConfig(
            root=self.dataset,
            split=split,
            batch_size=self.batch_size,
            num_streams=self.num_streams,
            has_flips=self.has_flips,
            seed=self.seed,
            cache_folder=self.cache_folder,
            crop=self.crop,
        )


def check_inputs(config: TrainAutoencoderConfig) -> Manifest:
    """Refuse, before any worker starts, data that does not fit; return the dataset's manifest.

    Raises:
        ValueError: naming what does not fit what.
    """
    manifest = load_manifest(config.dataset)
    size = config.crop.size_of(manifest.image_size)
    if size % config.autoencoder.factor:
        raise ValueError(f"images of {size} px are no multiple of the autoencoder's factor {config.autoencoder.factor}")
    if manifest.identity.get("picture", {}).get("resize") == ResizeMode.BUCKETS:
        raise ValueError(
            f"the pictures in {config.dataset} come in buckets; an autoencoder is trained on centre squares: make a "
            "dataset with picture.resize short-side, or centre-crop"
        )
    check_world(world=config.launch.num_workers, num_streams=config.num_streams, batch_size=config.batch_size)
    check_sharding(config)
    if config.initial:
        _initial_network(config)
    if manifest.num_rows(Split.VALIDATION) == 0:
        raise ValueError(f"{config.dataset} holds no validation rows; hold some out when the dataset is made")
    return manifest


def check_sharding(config: TrainAutoencoderConfig) -> None:
    """Refuse what can't be told a network that lies in slices.

    Raises:
        ValueError: naming the option and what to take in its place.
    """
    stage = _sharding(config).stage or 0
    if stage == 3:
        raise ValueError(f"{config.engine.zero_config} is stage 3: an autoencoder goes with stages 0 to 2, or local")
    if stage and config.engine.precision is not Precision.FP32:
        raise ValueError(
            f"{config.engine.zero_config} is stage {stage}, under which stage 1 computes in fp32: for "
            f"{config.engine.precision} take stage 0, or engine.kind local"
        )
    if stage and config.loss.codebook.moves_trained_codes:
        raise ValueError(
            f"loss.codebook.revive_after_samples moves codes beside the optimizer, which holds slices of them under "
            f"{config.engine.zero_config}: take codebook.update moving_average, stage 0, or engine.kind local"
        )


def _sharding(config: TrainAutoencoderConfig) -> Sharding:
    return UNSHARDED if config.engine.kind is EngineKind.LOCAL else read_sharding(config.engine.zero_config)


def train_autoencoder_worker(
    config: TrainAutoencoderConfig,
    world: World,
    report: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    *,
    run_id: str = "",
) -> Outcome:
    """Train in one process of the group; the main one records into the MLflow run and publishes the autoencoder."""
    manifest = load_manifest(config.dataset)
    tests = None
    training = _reconstructing(config, manifest, world.size, is_on_cpu=world.device.type == "cpu")
    if config.self_tests:
        forecast = Forecast(needed=partial(needed, training), advice=partial(advice, training))
        tests = begin_self_tests(config, config.root, manifest, forecast, world, report)
    task = build_task(config, world, ImageLoader(manifest, config.loader(Split.VALIDATION), 0, 1), report)
    task.row_flops = partial(row_flops, training)
    around = Surroundings(
        world=world,
        batch_size=config.batch_size,
        checkpoints=checkpoint_store(config, manifest, world),
        tracker=open_record(config.record, config.tracking.uri, run_id, world, report),
        report=report,
        should_stop=should_stop,
        peak_flops=peak_flops(world.device, config.engine),
    )
    loader = ImageLoader(manifest, config.loader(Split.TRAIN), world.rank, world.size)
    networks = {"autoencoder": task.autoencoder.raw, "discriminator": task.adversary.engine.raw}
    checked = task if tests is None else tests.around(task, networks, around.tracker)
    state = train(checked, loader, config.loop, around)
    is_finished = state.samples_seen >= config.loop.total_samples
    if is_finished:
        _publish(config, manifest, task, state)
    world.barrier()
    return {"is_finished": is_finished, **state.to_dict()}


def build_task(
    config: TrainAutoencoderConfig, world: World, held_out: HeldOutImages, report: Callable[[Progress], None]
) -> AutoencoderTask:
    """Return the task: networks drawn from the seed, their engines, and what they are measured with."""
    torch.manual_seed(config.seed)
    # Channels last is a fifth faster on a CPU, and what tensor cores read.
    network = _initial_network(config).to(memory_format=torch.channels_last)
    quantizer = network.quantize
    codebook = None if quantizer is None else CodebookMemory(quantizer, config.loss.codebook, config.seed)
    autoencoder = _engine(network, config, world)
    adversary = Adversary(
        engine=_engine(build_discriminator(config.loss, world), config, world),
        config=config.loss,
        world=world,
        memory=build_memory(config.loss, world, lambda notice: report(Progress(done=0, total=0, notice=notice))),
    )
    perceptual = perceptual_distance(config.loss.perceptual).to(world.device)
    features = config.loss.validation_features
    return AutoencoderTask(
        autoencoder=autoencoder,
        adversary=adversary,
        codebook=None if codebook is None else codebook.to(world.device),
        perceptual=perceptual,
        config=config.loss,
        optim=config.optim,
        validation=AutoencoderValidation(
            held_out=held_out,
            perceptual=perceptual,
            features=None if features is None else feature_network(features).to(world.device),
            config=config.loss,
            world=world,
        ),
        world=world,
        total_samples=config.loop.total_samples,
        seed=config.seed,
    )


def _initial_network(config: TrainAutoencoderConfig) -> Autoencoder:
    """Return the network to start from, which a checkpoint replaces: then it may be gone."""
    if not config.initial:
        return Autoencoder(config.autoencoder)
    try:
        network = load_autoencoder(config.initial)
    except NoAutoencoderError:
        if not storage.exists(storage.join(config.checkpoints_folder, LATEST_FILE)):
            raise
        return Autoencoder(config.autoencoder)
    if network.config != config.autoencoder:
        found, wanted = network.config.to_dict(), config.autoencoder.to_dict()
        differing = sorted(name for name in wanted if wanted[name] != found.get(name))
        listed = ", ".join(f"{name} {found.get(name)!r} there, {wanted[name]!r} here" for name in differing)
        raise ValueError(f"initial {config.initial} has another shape than autoencoder: {listed}")
    return network


def checkpoint_store(config: TrainAutoencoderConfig, manifest: Manifest, world: World) -> CheckpointStore:
    """Return the store of this training's checkpoints."""
    return CheckpointStore(config.checkpoints_folder, config.identity(manifest), config.loop.keep_checkpoints, world)


def is_done(config: TrainAutoencoderConfig, manifest: Manifest) -> bool:
    """Say whether the finished autoencoder is there, trained on this dataset to the asked length."""
    path = storage.join(config.model_folder, EVALUATION_FILE)
    if not storage.exists(path) or not storage.exists(storage.join(config.model_folder, CONFIG_NAME)):
        return False
    report = json.loads(storage.read_text(path))
    return bool(report["dataset"] == manifest.digest and report["samples_seen"] >= config.loop.total_samples)


def num_parameters(config: TrainAutoencoderConfig) -> int:
    """Return how many weights the autoencoder has."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in Autoencoder(config.autoencoder).parameters())


def describe(config: TrainAutoencoderConfig, manifest: Manifest) -> str:
    """Return what a run would do: rows, batches, workers, parameters."""
    num_rows, workers = manifest.num_rows(Split.TRAIN), config.launch.num_workers
    steps = -(-config.loop.total_samples // config.batch_size)
    return "\n".join(
        [
            f"train     {num_rows:,} images of {config.dataset}, {manifest.num_rows(Split.VALIDATION):,} held out",
            f"network   {num_parameters(config) / 1e6:,.2f} M parameters, factor {config.autoencoder.factor}",
            f"batch     {config.batch_size} = {workers} workers x {config.batch_size // workers} rows",
            f"length    {config.loop.total_samples:,} samples = {steps:,} steps = "
            f"{config.loop.total_samples / max(1, num_rows):.1f} epochs",
            f"workers   {workers} x ({config.launch.cpus_per_worker:g} CPU, {config.launch.gpus_per_worker:g} GPU), "
            f"engine {config.engine.kind}"
            + (f" ({config.engine.zero_config})" if config.engine.kind == "deepspeed" else ""),
            f"output    {config.root}",
            described(
                _reconstructing(config, manifest, workers, is_on_cpu=trains_on_cpu(config.launch)),
                free_share(config.launch),
            ),
        ]
    )


def _reconstructing(
    config: TrainAutoencoderConfig, manifest: Manifest, num_ranks: int, *, is_on_cpu: bool
) -> Reconstructing:
    return Reconstructing(
        autoencoder=config.autoencoder,
        loss=config.loss,
        side=config.crop.size_of(manifest.image_size),
        has_averages=config.ema.half_life_samples > 0,
        is_bf16=config.engine.precision is Precision.BF16,
        num_ranks=num_ranks,
        num_rows=config.batch_size // num_ranks,
        sharding=_sharding(config),
        is_on_cpu=is_on_cpu,
    )


def _engine(module: torch.nn.Module, config: TrainAutoencoderConfig, world: World) -> Engine:
    return build_engine(module, config.optim, config.ema, config.engine, world, config.batch_size // world.size)


def _publish(config: TrainAutoencoderConfig, manifest: Manifest, task: AutoencoderTask, state: TrainState) -> None:
    """Write the autoencoder and its latents' statistics; its evaluation comes last and makes it whole."""
    weights = task.autoencoder.weights()
    statistics = task.latent_statistics()
    if not task.world.is_main:
        return
    model = Autoencoder(config.autoencoder)
    model.load_state_dict(weights)
    save_autoencoder(model, config.model_folder)
    digest = weights_digest(model.state_dict(), model.config)
    latents = {"digest": digest, "dataset": manifest.digest, "split": Split.VALIDATION.value, **statistics.to_dict()}
    storage.write_text(storage.join(config.model_folder, LATENT_STATISTICS_FILE), json.dumps(latents, indent=1))
    report = {
        "digest": digest,
        "dataset": manifest.digest,
        "samples_seen": state.samples_seen,
        **state.last_validation,
    }
    storage.write_text(storage.join(config.model_folder, EVALUATION_FILE), json.dumps(report, indent=1))
