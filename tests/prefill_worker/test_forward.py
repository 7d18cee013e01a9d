"""A forward that fails is cut down until only the guilty fail: real forwards, failures put in where memory ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from prefill_worker import forward as module
from prefill_worker.forward import SMALL_CHUNK_TOKENS, Forward, Outcome, packs
from prefill_worker.tiers.block import StoredBlock
from shared.engine.encode import encode_block, encode_blocks, new_extent
from shared.engine.native import builder
from shared.engine.native.encoder import NativeEncoder
from shared.engine.served_model import ServedModel
from shared.errors import DrystoneError, Reason
from shared.kv.birth import chunk_checksum, chunk_plan
from shared.model.catalog import cache_dir

# What memory that has run out looks like: Python's, CUDA's, torch's on a CPU, cuBLAS's.
OUT_OF_MEMORY = [
    MemoryError("no more"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@dataclass(frozen=True)
class Block:
    key: bytes
    token_ids: tuple[int, ...]
    tenant: str = ""


def blocks(*lengths: int) -> list[Block]:
    return [Block(bytes([index]) * 32, tuple(range(5, 5 + n)), f"t{index}") for index, n in enumerate(lengths)]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception], list[int]]:
    """Makes each pass of the model over more than so many rows raise; gives the rows of every pass."""
    whole = ServedModel.forward_kv

    def limit(most: int, error: Exception) -> list[int]:
        seen: list[int] = []

        def limited(model: ServedModel, ids: torch.Tensor, *rest: Any) -> None:
            seen.append(len(ids))
            if len(ids) > most:
                raise error
            whole(model, ids, *rest)

        monkeypatch.setattr(ServedModel, "forward_kv", limited)
        return seen

    return limit


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Sequence[Any]], bool]], list[list[int]]]:
    """Makes batches that a test dislikes raise; gives the lengths of the blocks of every batch."""

    def dislike(fails: Callable[[Sequence[Any]], bool]) -> list[list[int]]:
        seen: list[list[int]] = []

        def tried(model: ServedModel, batch: Sequence[Any], pack_tokens: int, **rest: Any) -> object:
            seen.append([len(ids) for ids, _ in batch])
            assert pack_tokens == sum(seen[-1]), "a batch is one forward"
            if fails(batch):
                raise OUT_OF_MEMORY[1]
            return encode_blocks(model, batch, pack_tokens, **rest)

        monkeypatch.setattr(module, "encode_blocks", tried)
        return seen

    return dislike


def failed(made: StoredBlock | DrystoneError) -> str:
    assert isinstance(made, DrystoneError)
    assert made.reason is Reason.BLOCK_UNAVAILABLE
    assert made.__cause__ is None
    assert made.__context__ is None, "it would keep the failed forward's tensors"
    return made.message


def check(model: ServedModel, job: Block, made: StoredBlock | DrystoneError) -> None:
    """The block is the job's, its bytes are what one forward gives, and its birth verifies."""
    assert isinstance(made, StoredBlock)
    assert (made.key, made.token_ids, made.tenant) == (job.key, job.token_ids, job.tenant)
    shape, tokens = model.geometry.shape, len(job.token_ids)
    extent = new_extent(shape, tokens)
    encode_block(model, list(job.token_ids), extent)
    ours = torch.frombuffer(made.data, dtype=torch.float32)
    torch.testing.assert_close(ours, extent.view(-1), atol=2e-5, rtol=1e-4)
    sums = [
        chunk_checksum(job.key, made.birth.birth_id, shape, tokens, chunk, made.data[chunk.offset :][: chunk.length])
        for chunk in chunk_plan(shape, tokens)
    ]
    assert made.birth.checksums == tuple(sums)


def check_all(model: ServedModel, jobs: list[Block], outcome: Outcome) -> None:
    for job, made in zip(jobs, outcome.made, strict=True):
        check(model, job, made)


def test_a_batch_gives_each_block_in_order(served: ServedModel) -> None:
    jobs = blocks(7, 30, 1)
    outcome = Forward(served, None).run(jobs)
    [(tokens, seconds)] = outcome.forwards
    assert (tokens, seconds > 0, outcome.splits, outcome.retries) == (38, True, 0, 0)
    check_all(served, jobs, outcome)


def test_the_extent_is_not_copied(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    extents: list[torch.Tensor] = []

    def noted(*arguments: Any) -> torch.Tensor:
        extents.append(new_extent(*arguments))
        return extents[-1]

    monkeypatch.setattr(module, "new_extent", noted)
    [made] = Forward(served, None).run(blocks(9)).made
    assert isinstance(made, StoredBlock)
    written = made.data[:4].tobytes()
    extents[0].view(-1)[0] += 1.0
    assert made.data[:4].tobytes() != written


def test_the_native_encoder_does_batches_of_one(served: ServedModel, rows: Any) -> None:
    kernel = builder.load(cache_dir() / "kernels")
    if kernel is None:
        pytest.skip("needs a C++ compiler")
    native = NativeEncoder.prove(served, kernel)
    assert native is not None
    job = blocks(20)
    seen = rows(10**6, MemoryError())
    outcome = Forward(served, native).run(job)
    assert seen == []
    check_all(served, job, outcome)


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_a_batch_that_is_too_large_is_split(served: ServedModel, batches: Any, fits: int) -> None:
    jobs = blocks(3, 4, 5, 6)
    seen = batches(lambda batch: len(batch) > fits)
    outcome = Forward(served, None).run(jobs)
    halves = [[3, 4], [5, 6]]
    assert seen == [[3, 4, 5, 6], *halves]
    assert outcome.splits == (3 if fits == 1 else 1)
    expected = [3, 4, 5, 6] if fits == 1 else [7, 11]
    assert [tokens for tokens, _ in outcome.forwards] == expected, "a failed forward is no measure of the rate"
    check_all(served, jobs, outcome)


def test_an_odd_batch_loses_nobody(served: ServedModel, batches: Any) -> None:
    jobs = blocks(3, 4, 5)
    batches(lambda _: True)
    outcome = Forward(served, None).run(jobs)
    assert outcome.splits == 2
    check_all(served, jobs, outcome)


def test_of_a_batch_only_the_guilty_block_fails(served: ServedModel, rows: Any) -> None:
    jobs = blocks(3, 40, 5, 6)
    rows(39, RuntimeError("device-side assert"))
    outcome = Forward(served, None).run(jobs)
    assert "device-side assert" in failed(outcome.made[1])
    assert (outcome.splits, outcome.retries) == (2, 0), "what is not for want of memory is not tried again alone"
    rows(10**6, MemoryError())
    for index in (0, 2, 3):
        check(served, jobs[index], outcome.made[index])


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_block_without_memory_is_encoded_in_smaller_chunks(served: ServedModel, rows: Any, error: Exception) -> None:
    [job] = blocks(2 * SMALL_CHUNK_TOKENS + 3)
    seen = rows(SMALL_CHUNK_TOKENS, error)
    outcome = Forward(served, None).run([job])
    assert seen == [131, 64, 64, 3]
    assert (outcome.retries, outcome.splits) == (1, 0)
    rows(10**6, error)
    check(served, job, outcome.made[0])


def test_a_block_without_memory_even_so_fails_alone(served: ServedModel, rows: Any) -> None:
    jobs = blocks(8, 100)
    seen = rows(50, OUT_OF_MEMORY[1])
    outcome = Forward(served, None).run(jobs)
    assert seen == [8, 100, 8, 100, 64], "once more in small chunks, and not for ever"
    assert "CUDA out of memory" in failed(outcome.made[1])
    assert (outcome.retries, outcome.splits) == (1, 1)
    rows(10**6, MemoryError())
    check(served, jobs[0], outcome.made[0])


def test_a_failed_forward_has_given_its_memory_back_when_its_halves_begin(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[weakref.ref[torch.Tensor]] = []

    def failing(_: ServedModel, batch: Sequence[Any], **rest: Any) -> None:
        del rest
        assert all(extent() is None for extent in tried)
        tried.extend(weakref.ref(extent) for _, extent in batch)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "encode_blocks", failing)
    outcome = Forward(served, None).run(blocks(3, 4, 5, 6))
    assert (outcome.splits, len(tried)) == (3, 8)
    check_all(served, blocks(3, 4, 5, 6), outcome)


def test_a_block_that_is_not_finite_leaves_nothing_in_memory(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(_: ServedModel, ids: torch.Tensor, positions: torch.Tensor, context: Any) -> None:
        del ids, positions
        context.extent.fill_(torch.nan)

    extents: list[weakref.ref[torch.Tensor]] = []

    def noted(*arguments: Any) -> torch.Tensor:
        extent = new_extent(*arguments)
        extents.append(weakref.ref(extent))
        return extent

    monkeypatch.setattr(ServedModel, "forward_kv", spoiled)
    monkeypatch.setattr(module, "new_extent", noted)
    gc.collect()
    gc.disable()
    try:
        outcome = Forward(served, None).run(blocks(3, 4))
        assert [extent() for extent in extents] == [None, None]
    finally:
        gc.enable()
    assert ["not finite" in failed(made) for made in outcome.made] == [True, True]


def test_an_extent_without_memory_is_a_failure_like_others(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shape: Any, tokens: int) -> torch.Tensor:
        if tokens > 10:
            raise OUT_OF_MEMORY[2]
        return new_extent(shape, tokens)

    monkeypatch.setattr(module, "new_extent", refuse)
    small, large = Forward(served, None).run(blocks(4, 20)).made
    assert isinstance(small, StoredBlock)
    assert "can't allocate" in failed(large)


@pytest.mark.parametrize("lengths", [(20,), (6, 20, 5)])
def test_what_is_not_finite_fails_its_block_alone_and_is_not_tried_again(
    served: ServedModel, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    passes, whole = [], ServedModel.forward_kv

    def spoiled(model: ServedModel, ids: torch.Tensor, positions: torch.Tensor, context: Any) -> None:
        passes.append(len(ids))
        whole(model, ids, positions, context)
        if len(ids) == 20:
            context.extent[0, 3] = torch.inf

    monkeypatch.setattr(ServedModel, "forward_kv", spoiled)
    jobs = blocks(*lengths)
    outcome = Forward(served, None).run(jobs)
    assert passes == list(lengths)
    assert (outcome.splits, outcome.retries) == (0, 0)
    for job, made in zip(jobs, outcome.made, strict=True):
        if len(job.token_ids) == 20:
            assert "not finite" in failed(made)
        else:
            check(served, job, made)


def test_what_is_left_of_a_batch_is_not_tried_when_stopping(served: ServedModel, batches: Any) -> None:
    forward: Forward[Block] = Forward(served, None)

    def stop(_: Any) -> bool:
        forward.stopping = True
        return True

    batches(stop)
    made = forward.run(blocks(3, 4)).made
    assert [one.reason for one in made if isinstance(one, DrystoneError)] == [Reason.DRAINING] * 2


def test_a_cpu_does_not_pack(served: ServedModel) -> None:
    assert not packs(served)
