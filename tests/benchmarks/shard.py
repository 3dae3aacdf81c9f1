"""Addresses of JPEGs → WebDataset tars of 256 px crops: our dataset job against img2dataset, in turns, on two cores.

python -m tests.benchmarks.shard --peer-python VENV/bin/python [--folder PHOTOS] [--quick] [--save]

img2dataset has an environment of its own: `python -m venv VENV`, `VENV/bin/pip install img2dataset==1.47.0`. A local
nginx serves crops of the photographs under PHOTOS, or of made pictures, in 0.5 to 12 megapixels, equally many of each.
Both sides fetch the same listing and make JPEGs of quality 95 with colour at half resolution, SHA-256 of what was
fetched, tars, and a parquet of what became of each row. Steady is from the first request that nginx saw to the last
file of a shard, so neither side's start counts; whole is the command from start to exit. `bare` is our decode, resize
and encode alone, from memory, in as many processes. Where there are more than two cores, nginx has one of its own.
"""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro
from PIL import Image

from jobs.command_line import report_errors
from jobs.session import PROJECT
from jobs.wiring.shard_dataset import ShardDatasetConfig
from ldm.config import Config
from pipeline.ingest.fetch import FetchConfig
from pipeline.ingest.transforms import ChromaSampling, Measured, Picture, PictureConfig, measure, render
from pipeline.sources.tables import UrlTableConfig
from pipeline.store.shards import read_rows
from tests.benchmarks.photos import Photo, make_photos
from tests.benchmarks.shard_profile import profile
from tests.benchmarks.web_server import WebServer, web_server

RESULTS = Path(__file__).parent / "results"
GOAL, BARE_GOAL, FLOOR_DB = 2.0, 0.9, 30.0
MEGAPIXELS = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)
PICTURE = PictureConfig(image_size=256, quality=95, chroma=ChromaSampling.HALF)
NUM_WORKERS, SHARDS_PER_WORKER = 2, 2
COMPARED_ROWS = 200
PEER = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"
PEER_VERSIONS = """
import importlib.metadata as found, json, sys
names = ("img2dataset", "albumentations", "numpy", "opencv-python-headless", "pyarrow", "webdataset")
print(json.dumps({"python": sys.version.split()[0]} | {name: found.version(name) for name in names}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardBenchmark(Config):
    """Images a second of the whole dataset job."""

    peer_python: str
    """The python that img2dataset is installed for."""
    rounds: int = 3
    """Turns of each side, after one that is not counted."""
    rows: int = 768
    """Rows of one turn."""
    class_rows: int = 192
    """Rows of one turn with pictures of one size; 0 for no such turns."""
    photos_each: int = 8
    """Different pictures of each size."""
    peer_threads: int = 16
    """Threads of each process of img2dataset."""
    folder: str = ""
    """Photographs (*.jpg, at any depth) to crop instead of made pictures."""
    quick: bool = False
    """Under a minute: one turn, no warm-up, up to 2 megapixels."""
    save: bool = False
    """Write the result beside the other results."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A parquet of addresses and captions."""

    path: Path
    photos: tuple[Photo, ...]

    @property
    def rows_per_shard(self) -> int:
        """Shards of which each worker makes equally many."""
        return math.ceil(len(self.photos) / (NUM_WORKERS * SHARDS_PER_WORKER))


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of one side: rows a second in steady work, and of the whole command."""

    steady: float
    whole: float


@report_errors()
def main() -> None:
    """Run both sides in turns and print the tables."""
    settings = tyro.cli(ShardBenchmark, description=__doc__)
    sizes: Sequence[float] = MEGAPIXELS
    if settings.quick:
        settings, sizes = replace(settings, rounds=1, rows=96, class_rows=0, photos_each=2), MEGAPIXELS[:3]
    peer_versions = _peer_versions(settings.peer_python)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="shard-benchmark-") as folder:
        home = Path(folder)
        photos = make_photos(home / "photos", sizes, settings.photos_each, settings.folder)
        os.sched_setaffinity(0, cores[NUM_WORKERS : NUM_WORKERS + 1] or cores)
        with web_server(home / "photos", home / "nginx") as server:
            os.sched_setaffinity(0, cores[:NUM_WORKERS])
            record = _measured(settings, sizes, photos, server, home)
    record |= {"settings": settings.to_dict() | {"peer_python": "", "folder": ""}, "num_cores": len(cores)}
    record |= {"machine": platform.processor() or platform.machine(), "versions": _versions(), "peer": peer_versions}
    _print(record)
    if settings.save:
        name = "shard-photos.json" if settings.folder else "shard.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n")
    print(f"shard-bare ratio {record['bare_ratio']:.2f} goal {BARE_GOAL}")
    print(f"shard ratio {record['ratio']:.2f} goal {GOAL}")


def _measured(
    settings: ShardBenchmark, sizes: Sequence[float], photos: list[Photo], server: WebServer, home: Path
) -> dict[str, Any]:
    """Return the figures of every turn, of every size, and of the stages."""
    bench = _Bench(settings, server, home)
    mixed = bench.listing("mixed", photos, settings.rows)
    if not settings.quick:
        bench.both(bench.listing("warm-up", photos, settings.rows // 8))
    turns: dict[str, list[Turn]] = {"ours": [], "img2dataset": [], "bare": []}
    for number in range(settings.rounds):
        for side, turn in (*bench.both(mixed, is_compared=number == 0).items(), ("bare", _bare(mixed))):
            turns[side].append(turn)
            print(f"  round {number + 1}: {side:12}{turn.steady:8.1f} images/s steady{turn.whole:8.1f} whole")
    classes: dict[str, dict[str, float]] = {}
    for size in sizes if settings.class_rows else ():
        of_size = [photo for photo in photos if photo.megapixels == size]
        of_sides = bench.both(bench.listing(f"{size:g}", of_size, settings.class_rows))
        classes[f"{size:g}"] = {side: turn.steady for side, turn in of_sides.items()}
    config = bench.config(mixed, home / "profile")
    return {
        "images_a_second": {
            side: [{"steady": turn.steady, "whole": turn.whole} for turn in of_side] for side, of_side in turns.items()
        },
        "ratio": _ratio(turns["ours"], turns["img2dataset"], "steady"),
        "whole_ratio": _ratio(turns["ours"], turns["img2dataset"], "whole"),
        "bare_ratio": _ratio(turns["ours"], turns["bare"], "steady"),
        "worst_psnr_db": bench.worst_psnr_db,
        "megapixels": classes,
        "milliseconds": _profile(config, photos),
    }


class _Bench:
    """What all turns share."""

    def __init__(self, settings: ShardBenchmark, server: WebServer, home: Path) -> None:
        self.settings = settings
        self.server = server
        self.home = home
        self.worst_psnr_db = math.inf
        self.num_turns = 0

    def listing(self, name: str, photos: Sequence[Photo], num_rows: int) -> Listing:
        """Write a listing in which every few rows hold every size."""
        by_number = sorted(photos, key=lambda photo: photo.path.stem.partition("-")[2])
        listed = tuple(by_number[row % len(by_number)] for row in range(num_rows))
        urls = [self.server.url(photo.path.stem, row) for row, photo in enumerate(listed)]
        captions = [f"photograph number {row}" for row in range(num_rows)]
        path = self.home / f"listing-{name}" / "urls.parquet"
        path.parent.mkdir()
        pq.write_table(pa.table({"URL": urls, "TEXT": captions}), path)
        return Listing(path, listed)

    def both(self, listing: Listing, *, is_compared: bool = False) -> dict[str, Turn]:
        """Let both sides make a dataset of a listing, see that both made all of it, and return their turns."""
        self.num_turns += 1
        ours, theirs = (self.home / f"{side}-{self.num_turns}" for side in ("ours", "theirs"))
        config = ours.with_suffix(".yaml")
        config.write_text(self.config(listing, ours).to_yaml())
        command = [sys.executable, "-m", "jobs.shard_dataset", "laion", "--config", str(config)]
        turns = {"ours": self._turn(command, ours / "train", listing)}
        peer = [self.settings.peer_python, "-c", PEER, json.dumps(self._peer_settings(listing, theirs))]
        turns["img2dataset"] = self._turn(peer, theirs, listing)
        assert _num_files(ours / "train") == _num_files(theirs), "the sides made different numbers of tars"
        if is_compared:
            self.worst_psnr_db = _compared(ours / "train", theirs, len(listing.photos))
        return turns

    def config(self, listing: Listing, root: Path) -> ShardDatasetConfig:
        """Return our side's configuration."""
        return ShardDatasetConfig(
            root=str(root),
            source=UrlTableConfig(
                folder=str(listing.path.parent), rows_per_shard=listing.rows_per_shard, holdout_share=0.0
            ),
            picture=PICTURE,
            fetch=FetchConfig(allowed_networks=("127.0.0.0/8",), allowed_ports=(self.server.port,)),
            max_actors=NUM_WORKERS,
        )

    def _peer_settings(self, listing: Listing, folder: Path) -> dict[str, object]:
        picture = {"image_size": 256, "resize_mode": "center_crop", "encode_format": "jpg", "encode_quality": 95}
        columns = {"url_list": str(listing.path), "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT"}
        workers = {"processes_count": NUM_WORKERS, "thread_count": self.settings.peer_threads}
        output = {"output_folder": str(folder), "output_format": "webdataset", "compute_hash": "sha256"}
        # No EXIF: our side keeps none.
        shards = {"number_sample_per_shard": listing.rows_per_shard, "extract_exif": False}
        return {**picture, **columns, **workers, **output, **shards}

    def _turn(self, command: list[str], folder: Path, listing: Listing) -> Turn:
        """Run a side and see that it asked once for every row."""
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}  # a look-up in the network at the peer's start
        start = time.monotonic()
        done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - start
        assert done.returncode == 0, f"{command[:3]} failed: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        requests, num_rows = self.server.new_requests(), len(listing.photos)
        num_answers = sum(request.status == 200 for request in requests)
        assert num_answers == len(requests) == num_rows, f"{num_answers} of {len(requests)} answers, {num_rows} rows"
        ended = max(path.stat().st_mtime for path in folder.iterdir())
        return Turn(num_rows / (ended - min(request.started for request in requests)), num_rows / seconds)


def _profile(config: ShardDatasetConfig, photos: Sequence[Photo]) -> dict[str, dict[str, float]]:
    """Return the CPU time of our stages, in a process that is set as Ray sets its workers."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(profile, config, photos).result()


def _bare(listing: Listing) -> Turn:
    """Decode, resize and encode the pictures of a listing from memory, in as many processes as the sides have."""
    spawn = multiprocessing.get_context("spawn")
    barrier, times = spawn.Barrier(NUM_WORKERS), spawn.Queue()
    paths = [photo.path for photo in listing.photos]
    shares = [paths[worker::NUM_WORKERS] for worker in range(NUM_WORKERS)]
    processes = [spawn.Process(target=_render_all, args=(share, barrier, times)) for share in shares]
    start = time.monotonic()
    for process in processes:
        process.start()
    stamps = [times.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(stop for _, stop in stamps) - min(begin for begin, _ in stamps)
    return Turn(len(paths) / seconds, len(paths) / (time.monotonic() - start))


def _render_all(paths: Sequence[Path], barrier: Barrier, times: Queue[tuple[float, float]]) -> None:
    contents = {path: path.read_bytes() for path in set(paths)}
    barrier.wait()
    start = time.time()
    for path in paths:
        measured = measure(contents[path], PICTURE)
        assert isinstance(measured, Measured)
        assert isinstance(render(contents[path], measured, PICTURE), Picture)
    times.put((start, time.time()))


def _num_files(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def _compared(ours: Path, theirs: Path, num_rows: int) -> float:
    """See that both sides' tars hold alike pictures of the same addresses and return the worst PSNR."""
    found = {name: dict(_pictures(folder)) for name, folder in (("ours", ours), ("theirs", theirs))}
    assert found["ours"].keys() == found["theirs"].keys(), "the sides have pictures of different addresses"
    assert len(found["ours"]) == num_rows, f"{len(found['ours'])} pictures of {num_rows} rows"
    worst = math.inf
    for url in islice(found["ours"], COMPARED_ROWS):
        one, other = (Image.open(io.BytesIO(found[side][url])) for side in ("ours", "theirs"))
        form, wanted = (one.size, one.mode, _sampling(one)), (other.size, other.mode, _sampling(other))
        assert form == wanted, f"{url}: ours is {form}, theirs is {wanted}"
        error = np.square(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).mean()
        worst = min(worst, 10 * math.log10(255**2 / max(error, 1e-6)))
    assert worst > FLOOR_DB, f"pictures of the same address are {worst:.1f} dB apart, the floor is {FLOOR_DB}"
    return worst


def _pictures(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*.tar")):
        for row in read_rows(str(path)):
            yield json.loads(row["json"])["url"], row["jpg"]


def _sampling(image: Image.Image) -> object:
    """Return how finely a JPEG holds each colour, and its tables, which are its quality."""
    return [layer[1:3] for layer in image.layer], image.quantization  # type: ignore[attr-defined]


def _ratio(ours: list[Turn], theirs: list[Turn], what: str) -> float:
    return statistics.median(getattr(one, what) / getattr(other, what) for one, other in zip(ours, theirs, strict=True))


def _print(record: dict[str, Any]) -> None:
    print(f"\n{record['machine']}, {NUM_WORKERS} of {record['num_cores']} cores, {record['versions']}")
    print(f"img2dataset: {record['peer']}; same pictures to {record['worst_psnr_db']:.1f} dB or better")
    print(f"{'images/s':14}{'median':>9}{'min':>9}{'max':>9}   whole command:{'median':>9}{'min':>9}{'max':>9}")
    for side, turns in record["images_a_second"].items():
        columns = [_spread([turn[what] for turn in turns]) for what in ("steady", "whole")]
        print(f"{side:14}{columns[0]}{'':17}{columns[1] if side != 'bare' else ''}")
    rows = record["settings"]["rows"]
    spent = {
        side: statistics.median(rows / turn["whole"] - rows / turn["steady"] for turn in turns)
        for side, turns in record["images_a_second"].items()
    }
    print(f"ratio {record['ratio']:.2f} steady; {record['whole_ratio']:.2f} whole command of {rows} rows, of which")
    print(f"start and end take ours {spent['ours']:.1f} s, img2dataset {spent['img2dataset']:.1f} s\n")
    for size, rates in record["megapixels"].items():
        ours, theirs = rates["ours"], rates["img2dataset"]
        print(f"{size:>4} MP: ours {ours:7.1f}, img2dataset {theirs:7.1f} images/s, x{ours / theirs:.2f}")
    stages = record["milliseconds"]
    print(f"\nms of CPU an image, ours{''.join(f'{stage:>9}' for stage in stages['mixed'])}")
    for size, spent in stages.items():
        print(f"{size:>24}" + "".join(f"{value:9.2f}" for value in spent.values()))


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):9.1f}{min(values):9.1f}{max(values):9.1f}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "pillow": PIL.__version__, "ray": ray.__version__}


def _peer_versions(python: str) -> dict[str, str]:
    try:
        done = subprocess.run([python, "-c", PEER_VERSIONS], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--peer-python {python} has no img2dataset; see the first lines of this file") from error
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


if __name__ == "__main__":
    main()
