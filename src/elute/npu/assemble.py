"""From what a calibration measured to what runs: the products of a device and their shadows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from elute.errors import EluteError, FormatError
from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import Choice
from elute.npu.device import Q_MAX, Device, Graph, Outputs, Product, Profile, Progress
from elute.npu.linear import StaticLinear
from elute.npu.rows import Rows, weight_rows, weight_scales
from elute.npu.sites import Site
from elute.types import F32, I8, I64, PackedMatrix

HOT_SHARE = 0.03  # rows that stay in memory, of the bytes of all int8 weights

Matrices = Callable[[str], PackedMatrix]


def assemble(
    sites: Sequence[Site],
    matrices: Matrices,
    statistics: Mapping[str, SiteStatistics],
    choices: Mapping[str, Choice],
    device: Device,
    *,
    chunk: int,
    identity: str,
    isa: str,
    per_channel: bool = True,
    hot_share: float = HOT_SHARE,
    progress: Progress | None = None,
) -> list[StaticLinear]:
    """static_linears of a device, and loads it. Raises as both do."""
    linears = static_linears(
        sites,
        matrices,
        statistics,
        choices,
        device.profile,
        chunk=chunk,
        identity=identity,
        isa=isa,
        per_channel=per_channel,
        hot_share=hot_share,
    )
    device.load([linear.graph for linear in linears], progress=progress)
    return linears


def static_linears(
    sites: Sequence[Site],
    matrices: Matrices,
    statistics: Mapping[str, SiteStatistics],
    choices: Mapping[str, Choice],
    profile: Profile,
    *,
    chunk: int,
    identity: str,
    isa: str,
    per_channel: bool = True,
    hot_share: float = HOT_SHARE,
) -> list[StaticLinear]:
    """Of all sites, for devices of a profile. Raises FormatError for weights that are not finite.

    choices    of each site; see choices.choose
    identity   of the weights: part of what the products' digests are made of
    hot_share  the bytes of weight rows that stay in memory, of those of all int8 weights
    """
    scaled = {
        site.name: [
            weight_scales(peaks, per_channel=per_channel and profile.per_channel)
            for peaks in statistics[site.name].peaks
        ]
        for site in sites
    }
    hot = _hot(sites, statistics, choices, hot_share)
    linears = []
    for site in sites:
        found, choice = statistics[site.name], choices[site.name]
        scale = float(np.float32(choice.bound(found.input)) / np.float32(Q_MAX))
        products = tuple(
            _product(name, matrices, scales, scale, seen, profile, (identity, str(chunk)), isa)
            for name, scales, seen in zip(
                site.weights, scaled[site.name], found.output_scales, strict=True
            )
        )
        held = [matrices(name) for name in site.weights]
        with _naming(site.name):
            rows = Rows(held, scaled[site.name], hot[site.name], isa=isa)
        graph = Graph(chunk, products)
        linears.append(
            StaticLinear(site, graph, profile.outputs, rows, shadow=choice.shadow, isa=isa)
        )
    return linears


def _product(
    name: str,
    matrices: Matrices,
    scales: F32,
    input_scale: float,
    output_scale: float,
    profile: Profile,
    told: tuple[str, ...],
    isa: str,
) -> Product:
    def weights() -> I8:
        with _naming(name):
            return weight_rows(matrices(name), scales, isa=isa)

    scale = output_scale if profile.outputs is Outputs.INT8 else None
    digest = hashlib.sha256("\0".join((*told, name, repr(input_scale), repr(scale))).encode())
    digest.update(scales.tobytes())
    shape = matrices(name).shape
    return Product(name, shape, weights, scales, input_scale, scale, digest.hexdigest())


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except EluteError:
        raise
    except ValueError as error:  # weights that are not finite
        raise FormatError(f"{name}: {error}; convert it again") from None


def _hot(
    sites: Sequence[Site],
    statistics: Mapping[str, SiteStatistics],
    choices: Mapping[str, Choice],
    share: float,
) -> dict[str, I64]:
    """The channels with most outliers for each byte of their rows, over all sites, as far as
    `share` goes."""
    budget = share * sum(
        found.input.channels.size * sum(p.size for p in found.peaks)
        for found in statistics.values()
    )
    names, channels, counts, sizes = [], [], [], []
    for i, site in enumerate(sites):
        choice = choices[site.name]
        if not choice.shadow:
            continue
        found = statistics[site.name]
        outliers = found.outliers[choice]
        if site.columns is not None:
            outliers = outliers[site.columns]
        seen = np.flatnonzero(outliers)
        names.append(np.full(seen.size, i))
        channels.append(seen)
        counts.append(outliers[seen])
        sizes.append(np.full(seen.size, sum(p.size for p in found.peaks)))
    hot: dict[str, list[int]] = {site.name: [] for site in sites}
    if names:
        of_site, channel = np.concatenate(names), np.concatenate(channels)
        size = np.concatenate(sizes)
        order = np.argsort(-np.concatenate(counts) / size, kind="stable")
        kept = order[size[order].cumsum() <= budget]
        for i in kept:
            hot[sites[of_site[i]].name].append(int(channel[i]))
    return {name: np.array(sorted(each), np.int64) for name, each in hot.items()}
