"""Faults planted among good clips, and where `lipprep report` puts them in its order of suspicion.

    python benchmarks/faults.py grid      1,000 clips cut out of GRID's videos (LIPPREP_GRID), their speakers known
    python benchmarks/faults.py sample    1,000 clips of the sample corpus, no speakers known

Twenty each: black frames, frozen frames, a copy of another clip, another person's face (these planted in the videos),
and landmarks that are 20 pixels off. Half of each kind is planted in the whole clip, half from somewhere on, the
copies as they are or in another encoding. All is seeded, and lies in build/faults afterwards, to be looked at.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import cv2
import numpy as np
from tqdm import tqdm

from lipprep.pipeline.manifest import load_manifest
from lipprep.pipeline.plan import Layout
from lipprep.pipeline.sample import make_sample
from lipprep.pipeline.sources import GRID_FRAMES, grid
from lipprep.stages.shard.codec import npy_array
from lipprep.stages.shard.reader import TarMembers
from lipprep.stages.video import read_frames

BUILD = Path("build/faults")
CLIPS, OF_A_KIND, FIRST, WANTED = 1000, 20, 150, 95
KINDS = ("black", "frozen", "duplicate", "face", "shift")
SHIFT = 20.0  # pixels of the source


def write(path: Path, frames: list[np.ndarray], crf: int = 18) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    H, W = (side // 2 * 2 for side in frames[0].shape[:2])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = W, H, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "threads=1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:H, :W]), format="bgr24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def window(root: Path, row: dict) -> list[np.ndarray]:
    """The frames of a clip as an LRW file would hold them."""
    if row["start"] is None:
        return list(read_frames(root / row["video"], color=True))
    first = max(row["start"], 0)
    return list(read_frames(root / row["video"], first=first, last=first + GRID_FRAMES, color=True))


def plant(root: Path, row: dict) -> None:
    """Write one clip, with its fault."""
    cv2.setNumThreads(1)
    out = BUILD / "videos" / row["file"]
    frames, begin, fault = window(root, row), row["begin"], row["fault"]
    if fault == "black":
        frames = [frame * (n < begin) for n, frame in enumerate(frames)]
    elif fault == "frozen":
        frames = [frames[min(n, begin)] for n in range(len(frames))]
    elif fault == "face":
        other = window(Path(row["other_root"]), row["other"])
        H, W = frames[0].shape[:2]
        other = [cv2.resize(frame, (W, H)) for frame in other]
        frames = [frame if n < begin else other[min(n, len(other) - 1)] for n, frame in enumerate(frames)]
    write(out, frames)


def rows_of(kind: str, rng: np.random.Generator) -> tuple[Path, list[dict], list[dict], Path]:
    """Where videos lie, the clips, other people's clips, and where these lie."""
    grid_root = Path(os.environ["LIPPREP_GRID"])
    windows = [
        {"video": r.video, "word": r.word, "start": r.start, "speaker": r.speaker}
        for r in grid(grid_root)
        if r.start >= 0
    ]
    order = rng.permutation(len(windows))
    if kind == "grid":
        rows = [dict(windows[i]) for i in order]
        return grid_root, rows[:CLIPS], rows[CLIPS:], grid_root
    root = Path("build/faults-sample")
    make_sample(root, clips=CLIPS, workers=2)
    videos = sorted(root.rglob("*.mp4"))
    rows = [
        {"video": v.relative_to(root).as_posix(), "word": v.parts[-3], "start": None, "speaker": ""} for v in videos
    ]
    return root, rows, [dict(windows[i]) for i in order], grid_root


def build(kind: str) -> dict[str, str]:
    """Make the corpus of videos and its table; the faults by key."""
    rng = np.random.default_rng(0)
    shutil.rmtree(BUILD, ignore_errors=True)
    root, rows, others, other_root = rows_of(kind, rng)
    chosen = rng.permutation(len(rows))
    for n, index in enumerate(chosen):
        row = rows[index]
        fault = KINDS[n // OF_A_KIND] if n < OF_A_KIND * len(KINDS) else None
        begin = 0 if n % 2 else int(rng.integers(6, 15))
        row |= {"fault": fault, "begin": begin, "file": f"{index:04d}.mp4"}
        if fault == "duplicate":
            row["copy_of"] = rows[chosen[len(chosen) - 1 - n]]
        if fault == "face":
            row["other"] = next(o for o in others if o["speaker"] != row["speaker"] and not o.get("taken"))
            row["other"]["taken"] = True
            row["other_root"] = str(other_root)
    with ProcessPoolExecutor(2) as pool:
        list(tqdm(pool.map(partial(plant, root), rows), total=len(rows), desc="videos"))
    for row in rows:
        if row["fault"] == "duplicate":
            source, copy = (BUILD / "videos" / r["file"] for r in (row["copy_of"], row))
            if row["begin"]:
                shutil.copyfile(source, copy)
            else:
                write(copy, list(read_frames(source, color=True)), crf=26)
    with (BUILD / "clips.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "word", "speaker", "split"])
        table.writerows([row["file"], row["word"], row["speaker"], "train"] for row in rows)
    return {Path(row["file"]).stem: row["fault"] for row in rows if row["fault"]}


def lipprep(*arguments: str) -> str:
    command = [sys.executable, "-m", "lipprep", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=BUILD).stdout


def shift_landmarks(faults: dict[str, str]) -> None:
    """Landmark files of all clips, those of some shifted, for `--detector archive`."""
    manifest = load_manifest(BUILD / "found.jsonl")
    layout = Layout(BUILD / "work" / "found", BUILD / "none")
    rng = np.random.default_rng(1)
    folder = BUILD / "points"
    folder.mkdir()
    for (split, number), clips in manifest.chunks().items():
        with TarMembers(layout.tar("landmarks", split, number)) as members:
            for clip in clips:
                name = f"{clip.key}.landmarks.npy"
                if name not in members:
                    continue
                points = npy_array(members.read(name)).astype(np.float64)
                if faults.get(clip.key) == "shift":
                    angle = rng.uniform(0, 2 * np.pi)
                    points = points + SHIFT * np.array([np.cos(angle), np.sin(angle)])
                np.savez(folder / f"{clip.key}.npz", data=points)


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "grid"
    faults = build(kind)
    (BUILD / "faults.json").write_text(json.dumps(faults))
    lipprep("manifest", "csv", "clips.csv", "--root", "videos", "-o", "found.jsonl")
    lipprep("landmarks", "-m", "found.jsonl", "--max-failures", "100%")
    shift_landmarks(faults)
    shutil.copyfile(BUILD / "found.jsonl", BUILD / "given.jsonl")
    how = ("-m", "given.jsonl", "--max-failures", "100%")
    lipprep("landmarks", *how, "--detector", "archive", "--archive", "points")
    lipprep("crops", *how)
    report = json.loads(lipprep("report", "-m", "given.jsonl", "-o", "report.html", "--json"))
    order = [suspect["key"] for suspect in report["suspicion"]]
    place = {key: n for n, key in enumerate(order, 1)}
    found = Counter(fault for key, fault in faults.items() if place.get(key, len(order) + 1) <= FIRST)
    for fault in KINDS:
        late = sorted((place.get(key, 9999), key) for key, f in faults.items() if f == fault)[-3:]
        print(f"{fault:10} {found[fault]:2} of {OF_A_KIND} within the first {FIRST}; the last of them {late}")
    total = sum(found.values())
    print(f"all        {total} of {len(faults)}, wanted {WANTED}: {'ok' if total >= WANTED else 'MISSED'}")


if __name__ == "__main__":
    main()
