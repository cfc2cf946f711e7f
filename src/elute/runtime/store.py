"""Which packed directory answers for a model's name: finds it, or converts into the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elute.errors import NOTE, EluteError, UnsupportedError
from elute.formats import packed_layout as layout

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel
    from elute.formats.sources import Source, Unfetched
    from elute.model.ops import OpList
    from elute.pack.foresee import Foreseen
    from elute.quantize.recipe import Recipe
    from elute.types import Checkpoint

log = logging.getLogger(__name__)

# (stage, done, total), units of the stage's own
Progress = Callable[[str, int, int], None]
RECIPE_DIGITS = 8  # of sha256: 32 bits tell the recipes of one model apart


def choose_recipe(bits: int | None, recipe: Recipe | str | Path | None) -> Recipe:
    """A recipe, its file, `bits` for all linear layers, or the default.

    Asking for bits asks for them of every checkpoint, so one that is quantized already is quantized
    again; without bits and recipe its codes are kept. Raises UnsupportedError for both at once.
    """
    from elute.quantize.recipe import Recipe

    if bits is not None and recipe is not None:
        raise UnsupportedError(
            f"recipe: found bits={bits} beside a recipe, wanted one of them; write the bits "
            "into the recipe"
        )
    if bits is not None:
        return replace(Recipe.default(bits=bits), requantize=True)
    if recipe is None:
        return Recipe.default()
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def is_packed(path: Path) -> bool:
    return (path / layout.MANIFEST).is_file()


def open_packed(
    model: str,
    *,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    cache_dir: Path | None = None,
    by_channel: bool = False,
    progress: Progress | None = None,
) -> PackedModel:
    """The packed model of packed_folder, which takes the same.

    by_channel  in channel order, made from it where it is in the cache; a packed folder of the
                caller's is opened as it is
    """
    from elute.formats.packed import PackedModel

    path = packed_folder(model, bits=bits, recipe=recipe, cache_dir=cache_dir, progress=progress)
    packed = PackedModel.open(path)
    if not by_channel:
        return packed
    return in_channel_order(packed, model, cache_dir=cache_dir, progress=progress)


def in_channel_order(
    packed: PackedModel,
    model: str,
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> PackedModel:
    """The same in channel order, made where it is not there; itself where it is no model of the
    cache, or cannot be in it.

    model  what it is called where it is said that it is made
    """
    from elute.formats import sources
    from elute.formats.packed import PackedModel
    from elute.runtime.calibration import BY_CHANNEL

    path = packed.path
    ours = path.parent == (cache_dir or sources.cache_dir()) / "packed"
    if not ours or not can_reorder(packed):
        return packed
    target = path.with_name(path.name + BY_CHANNEL)
    if is_packed(target):
        return PackedModel.open(target)
    log.log(NOTE, "%s: its weights are written anew by channel, once, into %s", model, target)
    made = reorder(str(path), target, cache_dir=cache_dir, progress=progress)
    log.log(
        NOTE,
        "%s: takes %.0f MB of disk in panels and %.0f MB by channel; rm -r %s removes the "
        "latter, which is made again when it is wanted",
        model,
        disk_bytes(path) / 1e6,
        disk_bytes(target) / 1e6,
        target,
    )
    return made


def by_channel_folder(packed: PackedModel) -> Path | None:
    """The same model by channel, where it was made beside a model of the cache."""
    from elute.runtime.calibration import BY_CHANNEL

    path = packed.path.with_name(packed.path.name + BY_CHANNEL)
    return path if is_packed(path) else None


def disk_bytes(folder: Path) -> int:
    """Of the files of a packed folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def packed_folder(
    model: str,
    *,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """The packed folder of a path, hub id or "default", fetched and packed into the cache.

    Raises UnsupportedError when a packed folder is asked to be packed otherwise, and as resolve,
    open_checkpoint and convert do.
    """

    chosen = choose_recipe(bits, recipe)
    source = fetch(model, cache_dir=cache_dir, progress=progress)
    if is_packed(source.path):
        return _as_asked(source.path, bits, recipe)
    target = target_folder(source, chosen, cache_dir)
    if is_packed(target):
        return target
    log.info("%s: converting into %s", source.id, target)
    return pack_checkpoint(source.path, target, chosen, progress=progress).path


def reorder(
    model: str,
    out: Path,
    *,
    layer_group: int = 1,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    cache_dir: Path | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PackedModel:
    """Packs a model into channel order: of the packed folder that it is, or is packed to first.

    layer_group  layers whose channels lie side by side

    Raises UnsupportedError for a model that is in channel order already or has experts, and as
    open_packed and PackedWriter do.
    """
    from elute.flash.banks import banks_of
    from elute.model.families import op_list
    from elute.pack import reorder as pack_reorder
    from elute.runtime import calibration

    packed = open_packed(model, bits=bits, recipe=recipe, cache_dir=cache_dir, progress=progress)
    ops = op_list(packed.config)
    if packed.banks:
        raise UnsupportedError(f"{packed.path}: is in channel order already; use it as it is")
    if has_experts(packed.config):
        raise UnsupportedError(
            f"{packed.path}: found experts, wanted a model without; only the experts that a token "
            "picks are read anyway, so use it as it is"
        )

    def told(done: int, total: int, _tensor: str) -> None:
        if progress is not None:
            progress("reorder", done, total)

    done = pack_reorder.reorder(packed, out, banks_of(ops, layer_group), force=force, progress=told)
    scores = calibration.saved(packed, ops)
    if scores is not None:
        calibration.save(done, scores)
    return done


def can_reorder(packed: PackedModel | Foreseen) -> bool:
    """Whether all its layers can be in channel order: no experts, no columns in an order of their
    own."""
    ordered = any(getattr(record, "columns", False) for record in packed.records.values())
    return not getattr(packed, "banks", {}) and not ordered and not has_experts(packed.config)


def has_experts(config: Mapping[str, Any]) -> bool:
    from elute.model.families import op_list
    from elute.model.ops import Experts

    return any(isinstance(op, Experts) for op in op_list(config).ops)


def fetch(model: str, *, cache_dir: Path | None = None, progress: Progress | None = None) -> Source:
    """The model's files, downloaded when they are not here. Raises as formats.sources.resolve."""
    from elute.formats import sources

    return sources.resolve(model, cache_dir=cache_dir, progress=progress)


def pack_checkpoint(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> PackedModel:
    """Converts the tensors that the op list uses.

    Refuses at once, not after minutes of work, an unknown architecture, tensors that do not fit
    config.json, a tokenizer that cannot be loaded, and experts that no executor would take.
    """
    from elute.model.weights import check_columns
    from elute.pack.convert import convert
    from elute.pack.foresee import column_order

    checkpoint, ops = checked_checkpoint(source)
    check_columns(
        ops,
        lambda name: column_order(checkpoint, name, recipe) is not None,
        where=checkpoint.source,
    )

    def told(done: int, total: int, _tensor: str) -> None:
        if progress is not None:
            progress("convert", done, total)

    return convert(
        checkpoint,
        out,
        recipe,
        tensors=(*ops.matrices(), *ops.vectors()),
        floats=ops.vectors(),
        runs=ops.runs(),
        progress=told,
        force=force,
    )


def checked_checkpoint(path: Path, *, with_tokenizer: bool = True) -> tuple[Checkpoint, OpList]:
    """Refuses what pack_checkpoint refuses at once; with_tokenizer: whether there is one."""
    from elute.formats import open_checkpoint
    from elute.formats.tokenizer import Tokenizer
    from elute.model.families import op_list
    from elute.model.weights import check_weights

    checkpoint: Checkpoint = open_checkpoint(path)
    ops = op_list(checkpoint.config)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    check_weights(ops, shapes.get, where=checkpoint.source)
    if with_tokenizer:
        Tokenizer.from_files(checkpoint.tokenizer_files())
    return checkpoint, ops


def foresee_packed(
    model: str,
    *,
    bits: int | None = None,
    recipe: Recipe | str | Path | None = None,
    cache_dir: Path | None = None,
    hub_cache: Path | None = None,
    endpoint: str | None = None,
) -> PackedModel | Foreseen:
    """What open_packed gives where it is there already, else what it would give, from headers.

    Packs nothing, and of a repository that is not here fetches headers alone. Raises as open_packed
    does, and EluteError for a wheel that is not fetched.
    """
    from elute.formats import sources
    from elute.formats.packed import PackedModel
    from elute.model.weights import check_columns
    from elute.pack.foresee import foresee

    chosen = choose_recipe(bits, recipe)
    source = sources.locate(model, cache_dir=cache_dir, hub_cache=hub_cache)
    if isinstance(source, sources.Unfetched):
        return _foresee_remote(source, chosen, endpoint)
    if is_packed(source.path):
        return PackedModel.open(_as_asked(source.path, bits, recipe))
    target = target_folder(source, chosen, cache_dir)
    if is_packed(target):
        return PackedModel.open(target)
    checkpoint, ops = checked_checkpoint(source.path)
    names = (*ops.matrices(), *ops.vectors())
    found = foresee(checkpoint, chosen, tensors=names, floats=ops.vectors())
    check_columns(ops, found.orders.__contains__, where=checkpoint.source)
    return found


def _foresee_remote(model: Unfetched, recipe: Recipe, endpoint: str | None) -> Foreseen:
    import tempfile

    from elute.formats.remote_headers import RemoteRepository, fetch_headers, renamed
    from elute.model.weights import check_columns
    from elute.pack.foresee import foresee

    repository = RemoteRepository(model.repo, model.id, model.revision, endpoint)
    with tempfile.TemporaryDirectory(prefix="elute-headers-") as folder:
        try:
            path = fetch_headers(repository, model.file, Path(folder))
            # A GGUF file has its tokenizer in the header; a folder's is megabytes, and not fetched.
            in_header = model.file is not None
            checkpoint, ops = checked_checkpoint(path, with_tokenizer=in_header)
            names = (*ops.matrices(), *ops.vectors())
            found = foresee(
                checkpoint, recipe, tensors=names, floats=ops.vectors(), headers_only=True
            )
            check_columns(ops, found.orders.__contains__, where=checkpoint.source)
        except EluteError as error:
            raise renamed(error, Path(folder), repository, model.file) from None
    return replace(found, source=model.id)


def target_folder(source: Source, recipe: Recipe, cache_dir: Path | None) -> Path:
    """Where in the cache a source is packed to."""
    from elute.formats import sources

    return (cache_dir or sources.cache_dir()) / "packed" / cache_name(source, recipe)


def _as_asked(path: Path, bits: int | None, recipe: Recipe | str | Path | None) -> Path:
    """Raises UnsupportedError when a packed folder is asked to be packed otherwise."""
    if bits is not None or recipe is not None:
        raise UnsupportedError(
            f"{path}: is packed already and cannot be packed otherwise; leave bits and "
            "recipe out, or give the model that it was made from"
        )
    return path


def cache_name(source: Source, recipe: Recipe) -> str:
    """Names a packed model after all that it depends on: source, recipe and layout."""
    told = json.dumps(recipe.to_json(), sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:RECIPE_DIGITS]
    return f"{source.slug}-{digest}-v{layout.LAYOUT}"
