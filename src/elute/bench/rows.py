"""Results as JSON rows: llama-bench's keys where they mean the same, and our own beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from elute.bench.end_to_end import Speed, SpeedTest
from elute.bench.machine import cpu_name, elute_build
from elute.bench.subject import Subject
from elute.runtime.executor import CHUNK

NS = 1e9
DIGITS = 4  # after the point, in what is not a whole number


def row(subject: Subject, speed: Speed, *, isa: str) -> dict[str, Any]:
    """One test at one thread count, as an object of `llama-bench -o json` with additions.

    bandwidth_share  of tg: bytes_per_token at this rate, as a share of read_gb_s, which is what
                     each thread reads in read_streams streams
    peak_share       of pp: multiplies and adds with weights, as a share of multiply_gops
    """
    test = speed.test
    found: dict[str, Any] = {
        "build_commit": elute_build(),
        "cpu_info": cpu_name(),
        "backends": "CPU",
        "model_filename": subject.name,
        "model_type": subject.model_type,
        "model_size": subject.traffic.model_bytes,
        "model_n_params": subject.traffic.n_params,
        "n_ubatch": CHUNK,
        "n_threads": speed.n_threads,
        "type_k": str(subject.cache_type),
        "type_v": str(subject.cache_type),
        "n_prompt": test.n_prompt,
        "n_gen": test.n_gen,
        "n_depth": test.n_depth,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **samples(test, speed.seconds),
        "test": test.name,
        "isa": isa,
        "bits_per_weight": round(subject.traffic.bits_per_weight, DIGITS),
    }
    if speed.ceilings is not None:
        found["read_gb_s"] = round(speed.ceilings.read_gb_s, DIGITS)
        found["read_streams"] = speed.ceilings.read_streams
        found["multiply_gops"] = round(speed.ceilings.multiply_gops, DIGITS)
    for key, value in (
        ("bytes_per_token", bytes_per_token(subject, speed)),
        ("bandwidth_share", bandwidth_share(subject, speed)),
        ("peak_share", peak_share(subject, speed)),
    ):
        if value is not None:
            found[key] = round(value, DIGITS)
    return found


def rival_row(first: Mapping[str, Any], speed: Speed) -> dict[str, Any]:
    """The rival's own row of one run, with the samples of all, and our ratio to it."""
    assert speed.ratio is not None
    return {
        **first,
        **samples(speed.test, speed.rival_seconds),
        "test": speed.test.name,
        "ratio": round(speed.ratio, DIGITS),
    }


def samples(test: SpeedTest, seconds: Sequence[float]) -> dict[str, Any]:
    """avg_ns to samples_ts as llama-bench counts them, and the median rate."""
    rates = [test.n_tokens / s for s in seconds]
    nanoseconds = [round(s * NS) for s in seconds]
    return {
        "avg_ns": round(statistics.mean(nanoseconds)),
        "stddev_ns": round(statistics.stdev(nanoseconds)) if len(seconds) > 1 else 0,
        "avg_ts": round(statistics.mean(rates), DIGITS),
        "stddev_ts": round(statistics.stdev(rates), DIGITS) if len(seconds) > 1 else 0.0,
        "samples_ns": nanoseconds,
        "samples_ts": [round(rate, DIGITS) for rate in rates],
        "median_ts": round(test.n_tokens / statistics.median(seconds), DIGITS),
    }


def bytes_per_token(subject: Subject, speed: Speed) -> float | None:
    """None for a prompt, whose tokens share what is read."""
    test = speed.test
    if test.n_prompt:
        return None
    return subject.traffic.bytes_per_token(test.n_gen, test.n_depth)


def bandwidth_share(subject: Subject, speed: Speed) -> float | None:
    n_bytes = bytes_per_token(subject, speed)
    if n_bytes is None or speed.ceilings is None:
        return None
    return n_bytes * speed.median_tok_s / 1e9 / speed.ceilings.read_gb_s


def peak_share(subject: Subject, speed: Speed) -> float | None:
    if not speed.test.n_prompt or speed.ceilings is None:
        return None
    operations = subject.traffic.prompt_operations(speed.test.n_prompt)
    seconds = speed.test.n_prompt / speed.median_tok_s
    return operations / seconds / 1e9 / speed.ceilings.multiply_gops
