"""`elute info`: what a model consists of."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import click

from elute.cli import options

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel


@click.command("info")
@click.argument("model", default="default")
@options.pack_options
@options.kernel_options
@options.cache_type
@click.option("--verify", is_flag=True, help="Hash every file and compare with the manifest.")
@options.as_json
@options.quiet
def command(model: str, verify: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Show architecture, sizes and quantization of MODEL, packed first where it is not."""
    from elute.cli.kernel_choice import kernels_json
    from elute.cli.screen import Screen, answer_json
    from elute.runtime.store import open_packed

    with Screen(quiet=quiet) as screen:
        packed = open_packed(model, bits=given["bits"], recipe=given["recipe"], progress=screen)
    if verify:
        packed.verify()
    told = describe(packed, given["cache_type"] or "f16")
    widths = {kind["bits"] for kind in told["matrices"]}
    told |= kernels_json(given["isa"], widths, given["kernel"])
    if verify:
        told["verified"] = True
    if as_json:
        answer_json(told)
    else:
        click.echo(_page(told))


def describe(packed: PackedModel, cache_type: str) -> dict[str, Any]:
    """The keys of --json."""
    from elute.formats.packed_layout import MatrixRecord
    from elute.formats.tokenizer import Tokenizer
    from elute.kernels import kv_cache
    from elute.model.families import op_list
    from elute.runtime.store import by_channel_folder, disk_bytes

    ops = op_list(packed.config)
    kind = kv_cache.cache_type(cache_type, head_width=ops.head_width)
    position_bytes = kv_cache.position_bytes(
        kind, n_kv_heads=ops.n_kv_heads, head_width=ops.head_width
    )
    files = packed.tokenizer_files()
    tokenizer = Tokenizer.from_files(files)
    kinds: dict[tuple[int, int, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for record in packed.records.values():
        if isinstance(record, MatrixRecord):
            totals = kinds[record.bits, record.group_size, record.affine.value]
            totals[0] += 1
            totals[1] += record.shape[0] * record.shape[1]
            totals[2] += sum(part.n_bytes for part in record.parts())
    by_channel = by_channel_folder(packed)
    return {
        "path": str(packed.path),
        "disk_bytes": disk_bytes(packed.path),
        "by_channel": None
        if by_channel is None
        else {"path": str(by_channel), "disk_bytes": disk_bytes(by_channel)},
        "source": packed.source,
        "model_type": packed.config.get("model_type"),
        "weights": sum(totals[1] for totals in kinds.values()),
        "bytes": packed.nbytes,
        "bits_per_weight": round(packed.bits_per_weight, 3),
        "layers": ops.n_layers,
        "vocabulary": ops.vocabulary,
        "context": ops.context,
        "cache_type": str(kind),
        "cache_bytes_per_token": ops.n_layers * position_bytes,
        "chat_template": bool(files.chat_template or files.tokenizer_config.get("chat_template")),
        "end_tokens": [tokenizer.token_text(token) for token in tokenizer.eos_ids],
        "matrices": [
            {
                "bits": bits,
                "group_size": group_size,
                "affine": affine,
                "count": count,
                "weights": weights,
                "bytes": n_bytes,
            }
            for (bits, group_size, affine), (count, weights, n_bytes) in sorted(kinds.items())
        ],
    }


def _page(told: dict[str, Any]) -> str:
    from elute.cli.kernel_choice import kernel_lines
    from elute.cli.screen import MIB

    lines = [
        ("path", told["path"]),
        *(_by_channel(told["by_channel"]) if told["by_channel"] else ()),
        ("made from", told["source"]),
        ("model", f"{told['model_type']}, {told['layers']} layers"),
        ("weights", f"{told['weights'] / 1e6:.1f} million, {told['bytes'] / MIB:.0f} MiB"),
        ("bits", f"{told['bits_per_weight']:.2f} a weight, scales included"),
        *(
            (
                "",
                f"{kind['bits']} bits, groups of {kind['group_size']}, {kind['affine']}: "
                f"{kind['count']} matrices, {kind['weights'] / 1e6:.1f} million weights",
            )
            for kind in told["matrices"]
        ),
        *(("" if i else "kernels", line) for i, line in enumerate(kernel_lines(told))),
        (
            "context",
            f"{told['context']} tokens, {told['cache_bytes_per_token']} bytes each in "
            f"{told['cache_type']}",
        ),
        ("vocabulary", f"{told['vocabulary']}, answers end at {', '.join(told['end_tokens'])}"),
        ("chat", "has a template" if told["chat_template"] else "no template: use run --raw"),
    ]
    if told.get("verified"):
        lines.append(("files", "all as the manifest says"))
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


def _by_channel(found: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return (
        (
            "by channel",
            f"{found['path']}, {found['disk_bytes'] / 1e6:.0f} MB more of disk for --memory with "
            "--sparsity; rm -r removes it, and it is made again when it is wanted",
        ),
    )
