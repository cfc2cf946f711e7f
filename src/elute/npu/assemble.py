"""From what a calibration measured to what runs: the products of a device and their shadows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from elute.errors import EluteError, FormatError
from elute.npu.calibrate import SiteStatistics
from elute.npu.choices import Choice
from elute.npu.codes import Codes
from elute.npu.device import Q_MAX, Graph, Outputs, Product, Profile
from elute.npu.linear import StaticLinear
from elute.npu.rows import Rows, weight_scales
from elute.npu.sites import Site
from elute.types import F32, I8, I64

HOT_SHARE = 0.03  # rows that stay in memory, of the bytes of all int8 weights

CodesOf = Callable[[Site], Codes]


def static_linears(
    sites: Sequence[Site],
    codes_of: CodesOf,
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
        found, choice, codes = statistics[site.name], choices[site.name], codes_of(site)
        scale = float(np.float32(choice.bound(found.input)) / np.float32(Q_MAX))
        products = tuple(
            _product(site, i, codes, scales, scale, seen, profile, (identity, str(chunk)))
            for i, (scales, seen) in enumerate(
                zip(scaled[site.name], found.output_scales, strict=True)
            )
        )
        with _naming(site.name):
            rows = Rows(codes, scaled[site.name], hot[site.name])
        graph = Graph(chunk, products)
        linears.append(
            StaticLinear(site, graph, profile.outputs, rows, shadow=choice.shadow, isa=isa)
        )
    return linears


def _product(
    site: Site,
    index: int,
    codes: Codes,
    scales: F32,
    input_scale: float,
    output_scale: float,
    profile: Profile,
    told: tuple[str, ...],
) -> Product:
    name = site.weights[index]

    def weights() -> I8:
        with _naming(name):
            return codes.rows(index, scales)

    scale = output_scale if profile.outputs is Outputs.INT8 else None
    digest = hashlib.sha256("\0".join((*told, name, repr(input_scale), repr(scale))).encode())
    digest.update(scales.tobytes())
    return Product(
        name, codes.shapes[index], weights, scales, input_scale, scale, digest.hexdigest()
    )


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
    `share` goes; of those that had none, the ones that came nearest to it first."""
    budget = share * sum(
        found.input.channels.size * sum(p.size for p in found.peaks)
        for found in statistics.values()
    )
    names, channels, counts, nearness, sizes = [], [], [], [], []
    for i, site in enumerate(sites):
        choice = choices[site.name]
        if not choice.shadow:
            continue
        found = statistics[site.name]
        outliers, peaks = found.outliers[choice], found.input.channels / choice.bound(found.input)
        if site.columns is not None:
            outliers, peaks = outliers[site.columns], peaks[site.columns]
        names.append(np.full(outliers.size, i))
        channels.append(np.arange(outliers.size))
        counts.append(outliers)
        nearness.append(peaks)
        sizes.append(np.full(outliers.size, sum(p.size for p in found.peaks)))
    hot: dict[str, list[int]] = {site.name: [] for site in sites}
    if names:
        of_site, channel = np.concatenate(names), np.concatenate(channels)
        size = np.concatenate(sizes)
        order = np.lexsort((-np.concatenate(nearness), -np.concatenate(counts) / size))
        kept = order[size[order].cumsum() <= budget]
        for i in kept:
            hot[sites[of_site[i]].name].append(int(channel[i]))
    return {name: np.array(sorted(each), np.int64) for name, each in hot.items()}
