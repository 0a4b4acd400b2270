import time
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Checkpoint


class Checkpoints(Checkpoint):
    def __init__(self, seconds=None, steps=None, folder=None, keep=2):
        self.seconds, self.folder = seconds, Path(folder)
        self.last = time.monotonic()

    def save(self, trainer):
        p = self.folder / f"step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(p)
        self.last = time.monotonic()
        for o in self.folder.glob("*.ckpt"):
            if o != p:
                o.unlink()

    def on_train_batch_end(self, trainer, *a):
        if time.monotonic() - self.last > self.seconds:
            self.save(trainer)

    def on_train_end(self, trainer, m):
        self.save(trainer)


def newest_checkpoint(folder):
    return max(Path(folder).glob("*.ckpt"), key=lambda p: int(p.stem.split("=")[1]), default=None)


def purge_step(p):
    return None if p is None else int(p.stem.split("=")[1]) + 1
