"""What a token reads and computes, as a share of what the machine could do."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm.profiling import roofline as limits
from edgellm.profiling.document import ArtifactFacts, Figure, Limit, Roofline, Settings
from edgellm.profiling.roofline import kv_bytes_per_token, measure_limits, roofline

FACTS = {
    "name": "small", "container": "gguf", "sha256": "0", "size_bytes": 1,
    "bytes_per_token": 100_000_000, "prompt_weights": 50_000_000, "kv_values": 1000,
}  # fmt: skip
SETTINGS = {
    "runtime": "fake", "device": "cpu", "threads": 2, "kv_cache": "f16",
    "prompt_tokens": 512, "new_tokens": 128, "depth_tokens": 4096,
}  # fmt: skip
LIMIT = Limit(threads=2, bandwidth_bytes_per_s=2e10, flops_per_s=1e11)
MIDDLE = 4096 + 512 + 64


def facts(**changes: Any) -> ArtifactFacts:
    return ArtifactFacts(**(FACTS | changes))


def settings(**changes: Any) -> Settings:
    return Settings(**(SETTINGS | changes))


def speed(value: float) -> Figure:
    return Figure(samples=(value,), median=value, low=value, high=value)


def test_shares_of_what_the_machine_can() -> None:
    found = roofline(facts(), settings(), 10**9, speed(100.0), speed(500.0), LIMIT)
    read = 100_000_000 + MIDDLE * 1000 * 2
    assert found == Roofline(
        bytes_per_token=read,
        decode_share=pytest.approx(read * 100 / 2e10),
        flops_per_token=100_000_000,
        prefill_share=pytest.approx(1e8 * 500 / 1e11),
    )


@pytest.mark.parametrize(
    ("changed", "asked", "kv_bytes", "expected"),
    [
        ({}, {"kv_cache": "f32"}, 10**9, MIDDLE * 4000),
        ({}, {"kv_cache": "q8_0"}, 10**9, MIDDLE * 1000 * 34 / 32),
        ({}, {"depth_tokens": 0}, 10**9, (512 + 64) * 2000),
        # A cache that keeps no more than windows hold.
        ({}, {}, 12_345, 12_345),
        # A window of 100 tokens in one of two layers.
        ({"kv_windows": (100, None)}, {}, 10**9, 500 * (100 + MIDDLE) * 2),
        ({"kv_windows": (100, None)}, {"depth_tokens": 0, "prompt_tokens": 8}, 10**9, 72 * 2000),
        # Where the artifact does not say, from what all keys and values take.
        ({"kv_values": None}, {}, 4736 * 7, MIDDLE * 7),
        ({}, {"kv_cache": "fp8"}, 4736 * 7, MIDDLE * 7),
    ],
)
def test_keys_and_values_of_the_middle_of_the_answer(
    changed: dict[str, Any], asked: dict[str, Any], kv_bytes: int, expected: float
) -> None:
    assert kv_bytes_per_token(facts(**changed), settings(**asked), kv_bytes) == expected


def test_what_is_not_known_has_no_share() -> None:
    def found(**changes: Any) -> Roofline:
        given: dict[str, Any] = {
            "facts": facts(), "settings": settings(), "kv_bytes": 1, "decode": speed(1.0),
            "prefill": speed(1.0), "limit": LIMIT,
        }  # fmt: skip
        return roofline(**(given | changes))

    unknown = found(facts=facts(bytes_per_token=None, prompt_weights=None))
    assert unknown == Roofline()
    assert found(decode=None).decode_share is None
    assert found(prefill=None).prefill_share is None
    for without in (found(limit=None), found(settings=settings(device="cuda"))):
        assert without.decode_share is without.prefill_share is None
        assert without.bytes_per_token == 100_000_001


def test_limits_are_measured_once_for_each_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []

    def bandwidth(threads: int) -> float:
        measured.append(threads)
        return 1e9 * threads

    # Two threads were kept waiting.
    flops = {1: 1e10, 2: 0.5e10, 4: 3e10}
    monkeypatch.setattr(limits, "memory_bandwidth_bytes_per_s", bandwidth)
    monkeypatch.setattr(limits, "product_flops_per_s", lambda threads: flops[threads])
    monkeypatch.setattr(limits.os, "cpu_count", lambda: 4)
    assert measure_limits([4, 2, 4]) == (
        Limit(threads=2, bandwidth_bytes_per_s=2e9, flops_per_s=1e10),
        Limit(threads=4, bandwidth_bytes_per_s=4e9, flops_per_s=3e10),
    )
    assert measured == [1, 2, 4]
    more = Limit(threads=900, bandwidth_bytes_per_s=4e9, flops_per_s=3e10)
    assert measure_limits([900]) == (more,), "900 threads are no quicker than a CPU for each"
    assert measured == [1, 2, 4, 1, 4]


def test_products_are_counted_and_run_on_so_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def product(side: int, threads: int) -> int:
        made.append((side, threads))
        return side

    monkeypatch.setattr(limits, "_product", product)
    monkeypatch.setattr(limits, "_seconds", lambda side: side**3 * 1e-10)
    monkeypatch.setattr(limits, "PRODUCTS_S", 0.0)
    # 2 x side cubed operations in side cubed x 0.1 ns; the first that takes 50 ms is the last.
    assert limits.product_flops_per_s(3) == pytest.approx(2e10)
    assert made == [(512, 3), (1024, 3)]


def test_the_product_is_one_of_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    (product,) = limits._product(8, 1)()  # type: ignore[misc]
    assert product.shape == (8, 8)
    assert (product == 8).all()


def test_a_product_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIDES", (64,))
    monkeypatch.setattr(limits, "PRODUCTS_S", 0.01)
    # The slowest boards compute some 1e9 a second, and no CPU 1e14.
    assert 1e7 < limits.product_flops_per_s(1) < 1e14
