"""Which packed directory answers for a model's name: finds it, or converts into the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from elute.errors import UnsupportedError
from elute.formats import packed_layout as layout

if TYPE_CHECKING:
    from elute.formats.packed import PackedModel
    from elute.formats.sources import Source
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
    progress: Progress | None = None,
) -> PackedModel:
    """The packed model of a path, hub id or "default", fetched and packed into the cache.

    Raises UnsupportedError when a packed folder is asked to be packed otherwise, and as resolve,
    open_checkpoint and convert do.
    """
    from elute.formats import sources
    from elute.formats.packed import PackedModel

    chosen = choose_recipe(bits, recipe)
    source = fetch(model, cache_dir=cache_dir, progress=progress)
    if is_packed(source.path):
        if bits is not None or recipe is not None:
            raise UnsupportedError(
                f"{source.path}: is packed already and cannot be packed otherwise; leave bits and "
                "recipe out, or give the model that it was made from"
            )
        return PackedModel.open(source.path)
    target = (cache_dir or sources.cache_dir()) / "packed" / cache_name(source, chosen)
    if is_packed(target):
        return PackedModel.open(target)
    log.info("%s: converting into %s", source.id, target)
    return pack_checkpoint(source.path, target, chosen, progress=progress)


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
    config.json, and a tokenizer that cannot be loaded.
    """
    from elute.formats import open_checkpoint
    from elute.formats.tokenizer import Tokenizer
    from elute.model.families import op_list
    from elute.model.weights import check_weights
    from elute.pack.convert import convert

    checkpoint: Checkpoint = open_checkpoint(source)
    ops = op_list(checkpoint.config)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    check_weights(ops, shapes.get, where=checkpoint.source)
    Tokenizer.from_files(checkpoint.tokenizer_files())

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


def cache_name(source: Source, recipe: Recipe) -> str:
    """Names a packed model after all that it depends on: source, recipe and layout."""
    told = json.dumps(recipe.to_json(), sort_keys=True)
    digest = hashlib.sha256(told.encode()).hexdigest()[:RECIPE_DIGITS]
    return f"{source.slug}-{digest}-v{layout.LAYOUT}"
