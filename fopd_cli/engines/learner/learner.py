"""The student, learning: FSDP2, fp32 master weights, AdamW, exact losses from hidden states, freshness in the
same pass.

One optimizer step on a batch of B samples:

    1. every rank takes a share of the samples (balanced by squared lengths), split under a token budget
    2. per micro-batch, one forward gives the drifts D_roll_i, from them f_i and w_i, then losses and the
       head's gradients; backward follows
    3. the gradient is summed over ranks, divided by the batch's mean weight if weights are normalised,
       clipped and applied

A micro-batch's weights need only its own forward pass. What needs the whole batch (normalisation,
`step_scale`) is a common factor: it is applied to the summed gradient or the learning rate afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from fopd_cli.engines.learner import dcp, lora
from fopd_cli.engines.learner.likeliest import likeliest
from fopd_cli.engines.learner.micro_batch import MicroBatch, placeholder
from fopd_cli.engines.learner.pieces import Piece, pieces
from fopd_cli.engines.learner.prefetch import Lane, Prefetched
from fopd_cli.engines.learner.staging import Staging
from fopd_cli.engines.models.heads import HeadRule
from fopd_cli.engines.models.hf import DTYPES, blocks, head_rule, modules_in_fp32
from fopd_cli.engines.models.shards import Unread
from fopd_cli.engines.resting import Resting
from fopd_cli.engines.tokens import rope
from fopd_cli.engines.tokens.batching import balanced_shares, by_token_budget
from fopd_cli.engines.tokens.packing import check_looks_back, check_packing
from fopd_cli.engines.tokens.token_batch import TokenBatch, enable_packing
from fopd_cli.freshness import drift, pace, score
from fopd_cli.freshness.policies import POLICIES, Policy
from fopd_cli.losses.chunked import Weighting, chunked_objective
from fopd_cli.losses.head import Head
from fopd_cli.losses.objective import shares, weighting
from fopd_cli.losses.terms import LossSpec, TokenTerms
from fopd_cli.recipe import Freshness, Learner
from fopd_cli.samples import Sample, SampleStats, StepReport

# what a checkpoint stores of the student
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True)
class LearnerConfig:
    """The recipe's sections that the learner uses, and what follows from the whole recipe and the run."""

    learner: Learner
    freshness: Freshness
    loss: LossSpec
    average: Literal["sample", "token"]
    anchor: float  # lambda, at most; 0: none
    compute_dtype: torch.dtype
    vocab: int
    longest: int  # tokens in the longest possible sample
    pace: float | None = None  # of the anchor, in optimizer steps
    adapter_only: bool = False  # publish only the adapters of a LoRA student

    @property
    def policy(self) -> Policy:
        return POLICIES[self.freshness.policy]

    @property
    def optimizer_dtype(self) -> torch.dtype:
        """For AdamW's states between steps."""
        return DTYPES[self.learner.optimizer_dtype]


def sharded(compute_dtype: torch.dtype, offload: bool, world: int) -> bool:
    """Whether the learner runs under FSDP2, and so in a process group."""
    return world > 1 or offload or compute_dtype != torch.float32


def lr_factor(section: Learner, step: int) -> float:
    """Warm-up from 1/warmup to 1, then the decay, which reaches `min_lr_ratio` in the last step, `steps - 1`,
    even if the warm-up is not over by then. A pure function of the step.
    """
    last = section.steps - 1
    if step < section.warmup_steps and (step < last or section.decay == "constant"):
        return (step + 1) / section.warmup_steps
    if section.decay == "constant":
        return 1.0
    progress = 1.0 if step >= last else (step - section.warmup_steps) / (last - section.warmup_steps)
    match section.decay:
        case "cosine":
            shape = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            shape = 1 - progress
        case _:
            assert_never(section.decay)
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * shape


class _Student(nn.Module):
    """The model and its loss as one forward, so that a sharded head is whole while the loss needs it."""

    def __init__(self, lm: Any, rule: HeadRule) -> None:
        super().__init__()
        self.lm, self.rule = lm, rule

    def forward(
        self, batch: MicroBatch, spec: LossSpec, vocab: int, teacher_head: Head | None, weighting: Weighting
    ) -> tuple[Tensor, ...]:
        hidden = batch.tokens.hidden(self.lm).index_select(0, batch.index)
        head = self.rule.head(self.lm).first(vocab)
        value, terms = chunked_objective(spec, hidden, batch.at, head, teacher_head, weighting)
        # A tuple: FSDP hooks on tensors that it can see.
        return (value, *(getattr(terms, f.name) for f in fields(TokenTerms)))

    def hidden(self, tokens: TokenBatch) -> Tensor:
        """Only the post-norm hidden states `(tokens, width)`; if the model is sharded, a forward of its
        own.
        """
        return tokens.hidden(self.lm)


class FsdpLearner:
    """Implements `protocols.Learner`. `model` is the student in fp32; `teacher_heads` are in the order of the
    teachers, none if the targets are log-probs. `unread`: the model is on the meta device, and its weights
    are read after sharding.
    """

    def __init__(
        self,
        model: Any,
        teacher_heads: Sequence[Head | Tensor],
        config: LearnerConfig,
        device: torch.device,
        rank: int,
        world: int,
        unread: Unread | None = None,
    ) -> None:
        self.config, self.device, self.rank, self.world = config, device, rank, world
        self.version = 0
        self.floor = drift.NoiseFloor()
        self._resting, self._staging = Resting(device), Staging(device)
        self._writers: dist.ProcessGroup | None = None
        self._heads_at_rest = [Head.of(head).first(config.vocab) for head in teacher_heads]
        self.teacher_heads = [head.to(device) for head in self._heads_at_rest]
        # a prefix that samples share is in a row once
        self.shared = device.type == "cpu" and not rope.by_length(model.config)
        self.lane = Lane(device)
        if config.learner.packing:
            enable_packing(model, config.learner.compile)
        # In evaluation mode: with dropout, the student that learns would not be the one that sampled.
        self.student = _Student(model.eval(), head_rule(model.config, "student.model"))
        self._shard(unread)
        self._probe(looks_back=unread is not None)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad],
            lr=config.learner.lr,
            betas=config.learner.betas,
            weight_decay=config.learner.weight_decay,
            **self._kernel(),
        )

    def _kernel(self) -> dict[str, bool]:
        """For AdamW. The fused kernel needs no memory besides the states, while the other needs several
        shards' worth on the way, and it visits offloaded states on the host once, not a dozen times. They
        round differently, and runs on a CPU must repeat those of earlier versions to the bit.
        """
        fused = self.device.type == "cuda" or self.config.learner.offload
        return {"fused": fused, "foreach": not fused}

    def _shard(self, unread: Unread | None) -> None:
        """One rank that computes in fp32 has nothing to shard or cast; otherwise FSDP2 keeps the fp32
        masters. Either way, weights that are still unread are read then.
        """
        lm, config = self.student.lm, self.config
        if config.learner.compile:
            # Inside the checkpoint wrapper, or nothing would be compiled, and without the hooks around a
            # block.
            for block in blocks(lm):
                block.forward = torch.compile(block.forward)
        if config.learner.activation_checkpointing:
            block_type = type(blocks(lm)[0])
            apply_activation_checkpointing(
                lm, checkpoint_wrapper, check_fn=lambda m: isinstance(m, block_type)
            )
        if not sharded(config.compute_dtype, config.learner.offload, self.world):
            if unread is None:
                self.student.to(self.device)
            else:
                unread.place(self.student, lm, self.device)
            return
        mesh = dist.init_device_mesh(self.device.type, (self.world,))
        policy: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=config.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
            "offload_policy": OffloadPolicy(),
        }
        if config.learner.offload:
            policy["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        narrow = policy["mp_policy"]
        # samplers keep them in fp32, and a router's choice depends on it
        for module in modules_in_fp32(lm, config.compute_dtype):
            fully_shard(module, **{**policy, "mp_policy": replace(narrow, param_dtype=None)})
        for block in blocks(lm):
            fully_shard(block, **policy)
        fully_shard(self.student, reshard_after_forward=False, **policy)
        register_fsdp_forward_method(self.student, "hidden")
        if unread is not None:
            home = torch.device("cpu") if config.learner.offload else self.device
            unread.fill(self.student, lm, home)

    def _probe(self, looks_back: bool) -> None:
        """Checks that need the weights as they are sharded, on their device."""
        config, student = self.config, self.student
        with torch.compiler.set_stance("force_eager"):  # nothing is compiled for the probe's few lengths
            if looks_back:
                check_looks_back(student.hidden, student.lm, self.device, "student.model")
            if config.learner.packing:
                check_packing(
                    student.hidden, student.lm, config.vocab, config.longest, self.device, "learner.packing"
                )
        if isinstance(student, FSDPModule):
            # the optimizer needs the shards, and a forward without a backward leaves them gathered
            student.reshard()

    # ---- one optimizer step --------------------------------------------------------------------------------

    def train(
        self, step: int, samples: Sequence[Sample], before_update: Callable[[], None] = lambda: None
    ) -> StepReport:
        if step != self.version:
            raise RuntimeError(
                f"asked for optimizer step {step}, but the student is at version {self.version}"
            )
        config = self.config
        self.optimizer.zero_grad(set_to_none=True)
        micro, stats, loss, anchor = self._batches(samples), [], 0.0, 0.0
        # Sharded gradients are scattered after each micro-batch: doing it once at the end would save the bus
        # some work, but keep 4 bytes per parameter, unsharded, on every rank until then.
        batches = self._prefetched(samples, micro)
        for indices, batch in zip(micro, batches, strict=True):
            metrics, objective_value, anchor_value = self._forward(samples, indices, batch)
            objective_value.backward()
            batches.ahead()  # before the first metric is read, which waits for the device
            loss, anchor = loss + objective_value.item() / self.world, anchor + anchor_value.item()
            if indices:
                stats.append((indices, _stats(samples, indices, metrics)))
        merged = self._gather(stats, len(samples))
        loss, anchor = self._sum(loss), self._sum(anchor)
        mean_weight = float(merged.weight.mean())
        if config.freshness.weights == "normalized" and mean_weight > 0:
            loss, anchor = loss / mean_weight, anchor / mean_weight
            self._scale_gradients(1 / mean_weight)
        grad_norm = self._clip()
        lr = (
            config.learner.lr
            * lr_factor(config.learner, step)
            * (mean_weight if config.freshness.step_scale == "freshness" else 1.0)
        )
        skipped = mean_weight == 0
        if not math.isfinite(grad_norm):
            raise RuntimeError(
                f"the gradient of optimizer step {step} is not finite ({grad_norm}); nothing was updated"
            )
        if not skipped:
            before_update()
            self._update(lr)
        floor = self.floor.value
        self.floor.update(
            [float(d) for d, lag in zip(merged.drift_roll, merged.lag, strict=True) if lag == 0]
        )
        self.version = step + 1
        lengths = [len(s.rollout.token_ids) for s in samples]
        return StepReport(
            step=step,
            stats=merged,
            loss=loss,
            anchor=anchor,
            grad_norm=grad_norm,
            clipped=0 < config.learner.clip < grad_norm,
            lr=lr,
            skipped=skipped,
            noise_floor=floor,
            tokens=sum(lengths),
            padded_tokens=self._padded(samples, micro),
        )

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._cast_states(torch.float32)
        self.optimizer.step()
        self._rest_states()

    def _rest_states(self) -> None:
        self._cast_states(self.config.optimizer_dtype)

    def _cast_states(self, dtype: torch.dtype) -> None:
        """AdamW always computes in fp32; states are narrower only at rest, while activations need the
        memory.
        """
        for state in self.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(dtype)

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample], named: Container[int] = ()) -> SampleStats:
        parts, micro = [], self._batches(samples)
        batches = self._prefetched(samples, micro)
        for indices, batch in zip(micro, batches, strict=True):
            metrics, _, _ = self._forward(samples, indices, batch)
            batches.ahead()
            if indices:
                found = _stats(samples, indices, metrics, batch)
                for place, i in enumerate(indices):
                    if samples[i].rollout.key in named:
                        found.likeliest[place] = likeliest(samples[i].targets, self.teacher_heads)
                parts.append((indices, found))
        return self._gather(parts, len(samples))

    def _batches(self, samples: Sequence[Sample]) -> list[list[int]]:
        """This rank's micro-batches; every rank gets the same number, some of them empty."""
        lengths = [len(s.rollout.token_ids) for s in samples]
        split = []
        for share in balanced_shares(lengths, self.world):
            groups = []
            for teacher in sorted({samples[i].targets.teacher for i in share}):  # each has its own head
                own = [i for i in share if samples[i].targets.teacher == teacher]
                found = by_token_budget(
                    [lengths[i] for i in own], self.config.learner.micro_tokens, self.config.learner.packing
                )
                groups += [[own[i] for i in group] for group in found]
            split.append(groups)
        most = max(len(groups) for groups in split)
        return split[self.rank] + [[] for _ in range(most - len(split[self.rank]))]

    def _prefetched(self, samples: Sequence[Sample], micro: list[list[int]]) -> Prefetched[MicroBatch]:
        """The micro-batches on the device. An empty one is a placeholder, because all sharded ranks must run
        the same forwards.
        """
        pinned = self.device.type == "cuda"

        def maker(indices: list[int]) -> Callable[[], MicroBatch]:
            chosen = [samples[i] for i in indices] or [placeholder(samples[0])]
            return lambda: MicroBatch.of(chosen, self.config.learner.packing, self.shared, pinned)

        return Prefetched(self.lane, [maker(indices) for indices in micro])

    def _forward(
        self, samples: Sequence[Sample], indices: list[int], batch: MicroBatch
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One micro-batch: its samples' metrics, its share of the objective, its share of the anchor term;
        all of them still being computed. A placeholder's weight is zero.
        """
        config, n = self.config, len(batch.lag)
        sample, lag, lengths = batch.sample, batch.lag, batch.lengths
        # A cached label is for the context that the student read, whether or not that still exists.
        still_there = batch.by_student & batch.current
        mask = batch.by_student if config.freshness.reexecute.labels == "cached" else still_there
        aligned = torch.isfinite(batch.at.behaviour)
        _, coverage = drift.per_sample(
            torch.zeros_like(batch.at.behaviour), aligned, batch.by_student, sample, n
        )
        # The teacher is frozen: if the context did not change, D_sup is exactly 0 and every position aligned.
        drift_sup, coverage_sup = drift.per_sample(batch.drift_sup, still_there, batch.by_student, sample, n)

        def freshness(of: Tensor, drift_roll: Tensor) -> Tensor:
            above = self.floor.subtract(drift_roll)
            return score.freshness(
                lag[of],
                above,
                drift_sup[of],
                coverage[of],
                coverage_sup[of],
                config.freshness.alpha,
                config.freshness.beta,
            )

        def weigh(of: Tensor, drift_roll: Tensor) -> Tensor:
            return score.weights(config.policy, freshness(of, drift_roll), lag[of], config.freshness.xi)

        total = sum(int(s.rollout.loss_mask.sum()) for s in samples)
        share = shares(lengths, config.average, len(samples), total) * bool(indices)
        pull: float | Tensor = config.anchor
        if config.pace is not None:
            pull = pace.strength(lag, config.anchor, config.pace)
        # FSDP averages gradients over ranks, but shares are of the whole batch: hence the factor.
        coefficients = weighting(
            sample, mask, aligned, share * self.world, pull, None if config.policy.weights == "one" else weigh
        )
        teacher_head = (
            self.teacher_heads[samples[indices[0] if indices else 0].targets.teacher]
            if self.teacher_heads
            else None
        )
        value, *found = self.student(batch, config.loss, config.vocab, teacher_head, coefficients)
        terms = TokenTerms(*found)
        loss, _ = drift.per_sample(terms.loss, mask, mask, sample, n)
        drift_roll, _ = drift.per_sample(terms.drift, aligned, mask, sample, n)
        everyone = torch.arange(n, device=self.device)
        f, w = freshness(everyone, drift_roll), weigh(everyone, drift_roll)
        anchor = (share * w * drift_roll).sum()

        def mean(term: Tensor) -> Tensor:
            return drift.per_sample(term, mask, mask, sample, n)[0]

        metrics = {
            "lag": lag,
            "length": lengths,
            "loss": loss,
            "kl": mean(terms.kl),
            "forward_kl": mean(terms.forward_kl),
            "entropy": mean(terms.entropy),
            "kl_quartiles": _quartiles(terms.kl, batch, mask),
            "token_kl": terms.kl,
            "student_mass": mean(terms.student_mass),
            "teacher_mass": mean(terms.teacher_mass),
            "clamped": mean(terms.clamped),
            "drift_roll": drift_roll,
            "drift_sup": drift_sup,
            "coverage_roll": coverage,
            "coverage_sup": coverage_sup,
            "freshness": f,
            "weight": w,
        }
        return metrics, value, anchor

    # ---- ranks ---------------------------------------------------------------------------------------------

    def _sum(self, value: float) -> float:
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def _gather(self, parts: list[tuple[list[int], SampleStats]], count: int) -> SampleStats:
        """Metrics of the whole batch, in batch order, on every rank."""
        everyone: list[Any] = [parts]
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, parts)
        flat = [part for rank in everyone for part in rank]
        order = np.argsort(np.concatenate([np.array(indices) for indices, _ in flat]))
        assert len(order) == count
        return SampleStats(
            **{
                f.name: np.concatenate([getattr(p, f.name) for _, p in flat])[order]
                for f in fields(SampleStats)
            }
        )

    def _padded(self, samples: Sequence[Sample], micro: list[list[int]]) -> int:
        lengths = [[len(samples[i].rollout.token_ids) for i in group] for group in micro if group]
        own = sum(sum(group) if self.config.learner.packing else max(group) * len(group) for group in lengths)
        return int(self._sum(own))

    def _scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([p.grad for p in self.student.parameters() if p.grad is not None], factor)

    def _clip(self) -> float:
        clip = self.config.learner.clip if self.config.learner.clip > 0 else math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), clip, foreach=True)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    # ---- weights and state ---------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self, dtypes: Mapping[str, torch.dtype] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Full weights under Hugging Face names, tied ones once, adapters merged (or only the adapters, if
        the recipe says so); a collective on several ranks, which gathers `dtypes` if these are narrower.
        """
        if self.config.adapter_only:
            yield from lora.adapters(self.student.lm)
        else:
            yield from lora.merged(self.student.lm, dtypes or {})

    @torch.no_grad()
    def pieces(self) -> list[Piece] | None:
        return pieces(self.student.lm, self.config.adapter_only, self.rank)

    def snapshot(self, staged: bool) -> dcp.Snapshot:
        if self.world > 1 and self._writers is None:
            # Of its own, since it may be used from another thread, while training uses the ranks' group.
            self._writers = dist.new_group(backend="gloo")
        begun = bool(self.optimizer.state)
        model, optimizer = get_state_dict(self.student, self.optimizer, options=TRAINABLE)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if staged:
            state = self._staging.copy(state)
        if not begun:
            self._unmake_states()
        floor = {"value": self.floor.value, "samples": self.floor.samples}
        extra = {"version": self.version, "optimizer_begun": begun, "noise_floor": floor}
        return dcp.Snapshot(state, extra, self._writers)

    def restore(self, folder: Path, extra: dict[str, Any]) -> None:
        model, optimizer = get_state_dict(self.student, self.optimizer, options=TRAINABLE)
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        dcp.load(state, folder, alone=self.world == 1)
        set_state_dict(
            self.student,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=TRAINABLE,
        )
        for group in self.optimizer.param_groups:  # recipe or device may have changed since
            group.update(
                betas=self.config.learner.betas,
                weight_decay=self.config.learner.weight_decay,
                **self._kernel(),
            )
        if extra.get("optimizer_begun", True):
            self._rest_states()
        else:
            self._unmake_states()
        self.version = extra["version"]
        self.floor = drift.NoiseFloor(**extra["noise_floor"])

    def _unmake_states(self) -> None:
        """AdamW has no states before its first step. To save or load, torch makes them by a step that counts
        as one.
        """
        self.optimizer.state.clear()

    def sleep(self) -> None:
        if self.device.type == "cpu":
            return
        self.optimizer.zero_grad(set_to_none=True)
        if not self.config.learner.offload:  # when offloaded, all this is always on the host
            self._resting.sleep(self.student)
            self._resting.sleep_states(self.optimizer.state)
        # page-locked since the first sleep: they cross the bus in every turn
        self._heads_at_rest = [head.map(Tensor.pin_memory) for head in self._heads_at_rest]
        self.teacher_heads = self._heads_at_rest
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()  # copies end before another role gets their memory
            torch.cuda.empty_cache()

    def wake(self) -> None:
        if self.device.type == "cpu":
            return
        if not self.config.learner.offload:
            self._resting.wake(self.student)
            self._resting.wake_states(self.optimizer.state)
        self.teacher_heads = [head.to(self.device) for head in self._heads_at_rest]


def _by_sample(term: Tensor, batch: MicroBatch, count: int) -> np.ndarray:
    """object `(count,)`: the term at each sample's loss-bearing positions, in their order."""
    values, sample = term.detach().float().cpu().numpy(), batch.sample.cpu().numpy()
    by_student = batch.by_student.cpu().numpy()  # a sample without any has one of weight 0
    found = np.empty(count, dtype=object)
    for i in range(count):
        found[i] = values[(sample == i) & by_student]
    return found


def _stats(
    samples: Sequence[Sample], indices: list[int], metrics: dict[str, Tensor], batch: MicroBatch | None = None
) -> SampleStats:
    """What `_forward` returned for these samples; waits for it. With their `batch`, also token by token."""
    of_tokens = metrics.pop("token_kl")
    found = {name: _numpy(value) for name, value in metrics.items()}
    for name in ("lag", "length"):
        found[name] = found[name].astype(np.int64)
    token_kl = np.full(len(indices), None, dtype=object)
    if batch is not None:
        token_kl = _by_sample(of_tokens, batch, len(indices))
    keys = np.array([samples[i].rollout.key for i in indices])
    unnamed = np.full(len(indices), None, dtype=object)
    return SampleStats(keys=keys, token_kl=token_kl, likeliest=unnamed, **found)


def _quartiles(term: Tensor, batch: MicroBatch, mask: Tensor) -> Tensor:
    """(samples, 4): the term's mean over each quarter of a sample's loss-bearing positions; nan where there
    is none.
    """
    bucket = 4 * batch.sample + batch.quarter
    empty = torch.zeros(4 * len(batch.lag), device=term.device)
    total = empty.index_add(0, bucket, torch.where(mask, term, 0.0))
    return (total / empty.index_add(0, bucket, mask.to(term.dtype))).reshape(-1, 4)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)
