"""What a run does with what it finds in its directory: `python run_directory_worker.py FOLDER`. Prints one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from toy import Toy

from ofa_ds import checkpoint
from ofa_ds.checkpoint.manifest import read_manifest, write_document
from ofa_ds.checkpoint.run_lease import run_lease
from ofa_ds.config import BatchConfig, OptimConfig, TrainConfig
from ofa_ds.engine.config import load_deepspeed_config
from ofa_ds.engine.engine import Engine, build
from ofa_ds.engine.process_group import init_distributed
from ofa_ds.storage.lease import take


def told(action: Callable[[], object]) -> dict[str, str]:
    """What an action returns or raises, and what is said on stderr meanwhile."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            result = str(action())
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return {"result": result, "stderr": stderr.getvalue()}


def names(run_dir: Path) -> list[str]:
    return sorted(name for name in os.listdir(run_dir) if not name.startswith(".lease"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def newer(directory: Path) -> None:
    document = json.loads((directory / "manifest.json").read_text())
    del document["xxh3_128"]
    (directory / "manifest.json").unlink()
    write_document(directory / "manifest.json", {**document, "version": 3})


class Cases:
    """Each method: one directory, one story."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder

    def saved(self, name: str, *steps: int) -> Path:
        for step in steps:
            checkpoint.save(self.engine, self.folder / name, step, extra={}, keep=9)
        return self.folder / name

    def resume(self, run_dir: Path) -> dict[str, object]:
        def action() -> object:
            with run_lease(run_dir, 0, self.engine.gather) as lease:
                manifest = checkpoint.resume(self.engine, run_dir, lease=lease)
            return manifest.step if manifest else "begins at 0"

        return {**told(action), "names": names(run_dir)}

    def all_damaged(self) -> object:
        run_dir = self.saved("all_damaged", 1, 2, 3)
        for step in (1, 3):
            flip(run_dir / f"step_{step:08d}" / "rank_00000.safetensors")
        (run_dir / "step_00000002" / "manifest.json").write_text("{")
        return [self.resume(run_dir) for _ in range(2)]

    def newest_damaged(self) -> object:
        """Then the run goes on over the same step and beyond."""
        run_dir = self.saved("newest_damaged", 1, 2, 3)
        flip(run_dir / "step_00000003" / "rank_00000.safetensors")
        with open(run_dir / "step_00000002" / "rank_00000.safetensors", "ab") as file:
            file.write(b"x")
        found = self.resume(run_dir)
        saves = told(lambda: [checkpoint.save(self.engine, run_dir, step, extra={}, keep=1) for step in (2, 3, 4)])
        return {**found, "saves": saves, "after": names(run_dir)}

    def newest_of_newer_version(self) -> object:
        run_dir = self.saved("newer", 1, 2)
        newer(run_dir / "step_00000002")
        return self.resume(run_dir)

    def newest_on_a_disk_that_is_not_there(self) -> object:
        run_dir = self.saved("unmounted", 1)
        (run_dir / "step_00000002").symlink_to(run_dir / "mnt" / "step_00000002")
        return self.resume(run_dir)

    def disk_fails(self) -> object:
        run_dir = self.saved("disk", 1, 2)
        preadv = os.preadv

        def fail(descriptor: int, *arguments: object) -> int:
            if "step_00000002" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(5, "Input/output error")
            return preadv(descriptor, *arguments)

        os.preadv = fail
        try:
            return self.resume(run_dir)
        finally:
            os.preadv = preadv

    def nothing_there(self) -> object:
        return self.resume(self.folder / "new")

    def tidying_fails(self) -> object:
        """`latest` is a directory, and an old checkpoint a link to another disk."""
        run_dir = self.saved("tidy", 1, 2)
        os.rename(run_dir / "step_00000001", self.folder / "disk2")
        (run_dir / "step_00000001").symlink_to(self.folder / "disk2")
        (run_dir / "latest").unlink()
        (run_dir / "latest" / "mine").mkdir(parents=True)
        found = told(lambda: checkpoint.save(self.engine, run_dir, 3, extra={}, keep=1))
        saver = checkpoint.BackgroundSaver(self.engine, run_dir, keep=1)
        saver.start(4, {})
        in_background = told(saver.finish)
        saver.close()
        return {**found, "background": in_background, "failure": saver.failure, "names": names(run_dir)}

    def lease_taken_meanwhile(self) -> object:
        """By another host that saw no beat: the old owner publishes nothing and deletes nothing."""
        run_dir = self.saved("taken", 1, 2)
        results = []
        for in_background in (False, True):
            with run_lease(run_dir, 0, self.engine.gather) as lease:
                saver = checkpoint.BackgroundSaver(self.engine, run_dir, keep=1, lease=lease)
                if in_background:
                    saver.start(3, {})
                path = next(run_dir.glob(".lease_????????"))
                path.write_text(json.dumps({**json.loads(path.read_text()), "start": "another boot 1"}))
                with contextlib.redirect_stderr(io.StringIO()):
                    other = take(run_dir, beat_s=0.01, limit_s=0.01)
                before = names(run_dir)
                save = (
                    saver.finish
                    if in_background
                    else lambda lease=lease: checkpoint.save(self.engine, run_dir, 3, extra={}, keep=1, lease=lease)
                )
                found = told(save)
                saver.close()
                other.release()
            results.append({**found, "changed": names(run_dir) != before, "names": names(run_dir)})
        return results

    def no_numbers(self) -> object:
        extra = {"loss": float("nan"), "x": [float("inf"), 1]}
        path = checkpoint.save(self.engine, self.folder / "nan", 1, extra=extra)
        return read_manifest(path).extra


def main(folder: Path) -> None:
    ranks = init_distributed("cpu")
    batch, optim, steps = BatchConfig(global_rows=3, micro_rows=3), OptimConfig(eps=1e-6), TrainConfig(num_steps=9)
    config = load_deepspeed_config("zero3")
    engine = build(lambda: Toy(), deepspeed=config, optim=optim, batch=batch, train=steps, ranks=ranks)
    cases = Cases(engine, folder)
    stories = (
        cases.all_damaged, cases.newest_damaged, cases.newest_of_newer_version,
        cases.newest_on_a_disk_that_is_not_there, cases.disk_fails, cases.nothing_there, cases.tidying_fails,
        cases.lease_taken_meanwhile, cases.no_numbers,
    )  # fmt: skip
    print(json.dumps({story.__name__: story() for story in stories}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
