"""Contexts on threads of their own: each gives what it gives alone, and none gets into another's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import bwcache_compile as bw
from tests.models import OneStream

STATIC = bw.CacheConfig(policy="static", steps_mask=(0, 1, 1, 0, 1, 0))
STEPS = len(STATIC.steps_mask or ())


@torch.no_grad()
def call(cached: bw.CachedModel, model: OneStream, stream: int, step: int) -> Tensor:
    with cached.cache_context(f"stream {stream}"):
        return cached(*model.example(batch=1 + stream % 2, step=step + 10 * stream))


def test_eight_contexts_on_four_threads_equal_each_alone() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    alone = [[call(cached, model, stream, step) for step in range(STEPS)] for stream in range(8)]
    captures = cached.report().captures
    cached.reset()

    def two(stream: int) -> list[tuple[Tensor, Tensor]]:
        return [(call(cached, model, stream, step), call(cached, model, stream + 4, step)) for step in range(STEPS)]

    with ThreadPoolExecutor(4) as pool:
        pairs = list(pool.map(two, range(4)))
    together = [[pair[i] for pair in pairs[stream]] for i in (0, 1) for stream in range(4)]
    for stream in range(8):
        assert all(torch.equal(a, b) for a, b in zip(together[stream], alone[stream], strict=True)), stream
    assert cached.report().captures == captures
    assert all(str(cached.report()).count(f"stream {stream}: 3 computed, 3 reused  #..#.#") == 1 for stream in range(8))


def test_threads_that_need_one_program_capture_it_once() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    ready = threading.Barrier(4, timeout=60)

    def first(stream: int) -> Tensor:
        ready.wait()
        return call(cached, model, 2 * stream, 0)

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(first, range(4)))
    assert cached.report().captures == 1
    with torch.no_grad():
        assert all(torch.equal(output, model(*model.example(step=20 * stream))) for stream, output in enumerate(outputs))


def test_a_capture_waits_until_nothing_runs() -> None:
    """Tracing puts hooks on every module of the process; a program that ran meanwhile would leave its names in the graph."""
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    call(cached, model, 0, 0)
    inside, captured = threading.Event(), threading.Event()
    graphs = cached._programs.latest.graphs
    original = graphs["compute"]
    seen: list[bool] = []

    def slow(*operands: Any) -> Any:
        inside.set()
        seen.append(captured.wait(0.3))
        return original(*operands)

    graphs["compute"] = slow
    cached.reset()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(call, cached, model, 0, 0)
        assert inside.wait(60)
        other = pool.submit(lambda: (call(cached, model, 1, 0), captured.set()))  # another batch size: a capture
        running.result()
        other.result()
    assert seen == [False]
    assert cached.report().captures == 2


def test_one_context_entered_twice_at_once_raises() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    call(cached, model, 0, 0)
    inside, tried = threading.Event(), threading.Event()

    def pausing(run: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*operands: Any) -> Any:
            inside.set()
            assert tried.wait(60)
            return run(*operands)

        return slow

    graphs = cached._programs.latest.graphs
    graphs["reuse"] = pausing(graphs["reuse"])
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, cached, model, 0, 1)
        assert inside.wait(60)
        with pytest.raises(bw.StateError) as caught:
            call(cached, model, 0, 1)
        tried.set()
        running.result()
    assert str(caught.value) == (
        "context 'stream 0' is in use by another thread. Give each thread its own context: `with cached.cache_context(name):`."
    )
    call(cached, model, 0, 2)
    assert str(cached.report()) == "stream 0: 1 computed, 2 reused  #.."


def test_an_edit_while_a_call_runs_is_not_lost() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    call(cached, model, 0, 0)
    cached.reset()
    graphs = cached._programs.latest.graphs
    original = graphs["compute"]

    def edited_meanwhile(*operands: Any) -> Any:
        returned = original(*operands)
        for parameter in model.parameters():
            parameter.data *= 1.1
        cached.invalidate()
        return returned

    graphs["compute"] = edited_meanwhile
    call(cached, model, 0, 0)
    graphs["compute"] = original
    output = call(cached, model, 0, 1)
    with torch.no_grad():
        assert torch.equal(output, model(*model.example(step=1))), "what was cached came from the old weights"


def test_a_call_may_run_while_another_thread_exports_a_model() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    call(cached, model, 0, 0)
    inside, finished = threading.Event(), threading.Event()

    class Waiting(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            inside.set()
            assert finished.wait(60)
            return x + 1

    with ThreadPoolExecutor(1) as pool:
        exporting = pool.submit(torch.export.export, Waiting(), (torch.ones(2),), strict=False)
        assert inside.wait(60)
        try:
            call(cached, model, 0, 1)
        finally:
            finished.set()
        exporting.result()
    assert str(cached.report()) == "stream 0: 1 computed, 1 reused  #."


def test_a_capture_goes_before_runs_that_begin_after_it() -> None:
    model = OneStream().eval()
    cached = bw.transform(model, STATIC)
    call(cached, model, 0, 0)
    gate, order = cached._programs.gate, []

    def capture() -> None:
        call(cached, model, 1, 0)  # of another batch size
        order.append("captured")

    def later() -> None:
        gate.enter()
        order.append("ran")
        gate.leave()

    gate.enter()
    threads = [threading.Thread(target=capture), threading.Thread(target=later)]
    threads[0].start()
    while not gate._waiting:
        time.sleep(0.001)
    threads[1].start()
    gate.enter()  # a thread that runs already is not kept waiting
    gate.leave()
    gate.leave()
    for thread in threads:
        thread.join(60)
    assert sorted(order) == ["captured", "ran"]
    assert not gate._running
