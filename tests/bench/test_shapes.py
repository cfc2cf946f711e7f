import pytest

from elute.bench.shapes import CONFIGS, head_shape, layer_shapes
from elute.pack.quads import check_groups


@pytest.mark.parametrize(
    ("shape", "layer", "head"),
    [
        ("llama-2-7b", [(4096, 4096), (11008, 4096), (4096, 11008)], (32000, 4096)),
        (
            "llama-3-8b",
            [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)],
            (128256, 4096),
        ),
        ("bitnet-3b", [(3200, 3200), (8640, 3200), (3200, 8640)], (32002, 3200)),
        ("smollm2-135m", [(576, 576), (192, 576), (1536, 576), (576, 1536)], (49152, 576)),
    ],
)
def test_matrices_of_published_models(shape, layer, head):
    assert list(layer_shapes(shape)) == layer
    assert head_shape(shape) == head


@pytest.mark.parametrize("shape", CONFIGS)
def test_groups_of_64_fit_every_published_model(shape):
    for _, k in (*layer_shapes(shape), head_shape(shape)):
        check_groups(k, 64)
