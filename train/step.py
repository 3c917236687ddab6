"""One update of the weights: a global batch, in as many slices as there are processes and parts that each takes.

A slice sees its own clips alone, and its own statistics of batch normalisation unless they are synchronised. So two
processes do what one does with `accumulate=2`, and with `sync_batchnorm` what one does with the batch as a whole.
"""

import contextlib
import copy
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from lipprep.train.augment import AugmentedBatch, correct, cross_entropy, train_batch
from lipprep.train.boundary import words_of
from lipprep.train.config import Config
from lipprep.train.device import autocast
from lipprep.train.distill import distillation
from lipprep.train.draws import AugmentOptions, draw, partners
from lipprep.train.epoch import rank_rows
from lipprep.train.ranks import ALONE, Ranks
from lipprep.train.sync_norm import synchronised
from lipprep.train.timing import Clock


class MovingAverage:
    """A copy of a model, `module`, that follows its weights and statistics as an exponential moving average.

    The decay rises to `decay` as (1 + n) / (10 + n) after n updates, so that the first weights are soon forgotten (as
    in TensorFlow's ExponentialMovingAverage with num_updates). `updates` is n. torch's AveragedModel counts on the
    device: each of its updates would wait for a GPU.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.updates = 0
        self._decay = decay
        self._tensors: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """Follow the model, after a step."""
        n = self.updates
        decay = min(self._decay, (1 + n) / (10 + n)) if n else 0.0
        if not self._tensors:  # they stay the same ones, and to list them takes longer than to mix them
            # Each tensor once: a state dict lists those of modules that have two names twice.
            own, followed = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
            pairs = list(zip(own, followed, strict=True))
            for floats in (True, False):
                chosen = [pair for pair in pairs if pair[0].is_floating_point() is floats]
                self._tensors[floats] = [own for own, _ in chosen], [value for _, value in chosen]
        torch._foreach_lerp_(*self._tensors[True], 1 - decay)
        torch._foreach_copy_(*self._tensors[False])  # the batches that batch normalisation has seen
        self.updates += 1


class Step:
    """Updates a model with one batch after another. Every random draw of a step comes from (seed, step)."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: Config,
        *,
        clips: int,
        size: int,
        fps: float,
        device: torch.device,
        scaler: torch.amp.GradScaler | None = None,
        average: MovingAverage | None = None,
        teacher: torch.nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """A global batch has `clips` clips, whose frames have `size` pixels a side. `average` follows the weights.

        `teacher` is in evaluation mode, and what it answers is learnt, too.
        """
        self.model, self._optimizer, self._config, self._ranks, self._device = model, optimizer, config, ranks, device
        self._size, self._fps, self._clips = size, fps, clips
        self._scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self._average = average
        self._teacher = teacher
        self._taught_boundary = None if teacher is None else teacher.boundary
        self._formulas = {model.boundary, self._taught_boundary} - {None}
        self._own = rank_rows(clips, rank=ranks.rank, world=ranks.world)
        self._network = model
        self.clock: Clock | None = None  # to be told where the time goes
        self.show: Callable[[AugmentedBatch, torch.Tensor], None] | None = None  # called once, with what goes in next
        if ranks.world > 1:
            self._network = DistributedDataParallel(
                synchronised(model) if config.sync_batchnorm else model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
        # Found only now: synchronised, a part may be another module.
        self._frozen = [model.get_submodule(name) for name in config.freeze]
        if config.compile:
            self._network = torch.compile(self._network)
            if teacher is not None and not teacher.frontend3D.skips_padding:
                self._teacher = torch.compile(teacher)

    def rows(self, step: int) -> np.ndarray:
        """The clips of the global batch of a step that this process needs: its own, then those mixed with them."""
        partner = partners(self._clips, self._options(step), seed=(self._config.seed, step))
        if partner is None:
            return self._own
        return np.concatenate([self._own, np.setdiff1d(partner[self._own], self._own)])

    def __call__(self, batch: dict, *, step: int, lr: float) -> torch.Tensor:
        """Update with the clips `rows(step)`.

        Returns the mean loss of this process's own clips, the part of them that was read right, and, with a teacher,
        what of the loss is for its answers: (2,) or (3,), on the device.
        """
        config, own, options = self._config, self._own, self._options(step)
        seed, rows = (config.seed, step), self.rows(step)
        known = np.stack([batch["lengths"].numpy(), batch["durations"].numpy()], axis=1, dtype=np.float64)
        lengths_B, durations_B = self._ranks.gather(known[: len(own)]).T
        draws = draw(lengths_B.astype(np.int64), durations_B, options, size=self._size, fps=self._fps, seed=seed)
        words_R = words_of(batch, self._formulas, fps=self._fps)
        self._mark("augment")
        # Without waiting on CUDA alone: there the loader has copied the clips out of the memory that it uses again.
        video_RTSS = batch["video"].to(self._device, non_blocking=self._device.type == "cuda")
        labels_R = batch["labels"].to(self._device, non_blocking=self._device.type == "cuda")
        self._mark("copy")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._network.train()
        for part in self._frozen:
            part.eval()
        self._optimizer.zero_grad(set_to_none=True)
        told = torch.zeros(2 if self._teacher is None else 3, device=self._device)
        whole = config.accumulate * self._ranks.world == 1
        # What is compiled is compiled anew for each length.
        frames = int(lengths_B.max()) if config.compile else None
        for turn, mine in enumerate(np.split(own, config.accumulate)):
            last = turn == config.accumulate - 1
            number = self._ranks.rank * config.accumulate + turn
            torch.manual_seed(_seed(*seed) if whole else _seed(*seed, number))  # dropout
            needed = mine if draws.partner is None else np.concatenate([mine, np.setdiff1d(draws.partner[mine], mine)])
            video, labels, words = video_RTSS, labels_R, words_R
            if not np.array_equal(needed, rows):
                order = np.argsort(rows)
                places = order[np.searchsorted(rows, needed, sorter=order)]
                here = torch.from_numpy(places).to(self._device, non_blocking=self._device.type == "cuda")
                video, labels = video_RTSS[here], labels_R[here]
                words = {formula: frames_R2[places] for formula, frames_R2 in words_R.items()}
            how = {"rows": needed, "wanted": len(mine), "frames": frames}
            augmented = train_batch(video, draws, options, words=words, **how)
            if self.show is not None:
                self.show(augmented, labels)
                self.show = None
            self._mark("augment")
            quiet = contextlib.nullcontext() if last or self._ranks.world == 1 else self._network.no_sync()
            with quiet:
                logits_BC = self._answers(self._network, augmented, self.model.boundary)
                normalised = self.model.normalised
                loss = cross_entropy(logits_BC, labels, augmented, config.label_smoothing, normalised=normalised)
                figures = [correct(logits_BC.detach(), labels, augmented)]
                if self._teacher is not None:
                    with torch.no_grad():
                        taught_BC = self._answers(self._teacher, augmented, self._taught_boundary)
                    distill = distillation(logits_BC, taught_BC, temperature=config.distill_temperature)
                    figures.append(config.distill_weight * distill.detach())
                    loss = loss + config.distill_weight * distill
                self._mark("forward")
                self._scaler.scale(loss / config.accumulate).backward()
            self._mark("backward")
            told += torch.stack([loss.detach(), *figures]) / config.accumulate
        if config.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            self._average.update(self.model)
        self._mark("optimizer")
        return told

    def _answers(self, network: torch.nn.Module, batch: AugmentedBatch, boundary: str | None) -> torch.Tensor:
        """What a network says to a slice, logits (B, C) float32; `boundary` is the formula of what it is told."""
        with autocast(self._device, self._config.resolved["precision"]):
            return network(batch.x_B1THW, batch.lengths_B, batch.boundaries.get(boundary)).float()

    def _options(self, step: int) -> AugmentOptions:
        augment = self._config.augment
        return augment.whole() if step < self._config.augment_after else augment

    def _mark(self, part: str) -> None:
        if self.clock is not None:
            self.clock.mark(part)


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])
