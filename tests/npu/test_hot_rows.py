"""The law of hot channels: any share of rows in memory, any place of the others and any reader give
the same logits; faults are one sentence, never a wrong token."""

import faulthandler
import re

import numpy as np
import pytest

from elute.bench.random_packed import random_packed
from elute.bench.random_weights import random_recipe
from elute.bench.shapes import CONFIGS
from elute.errors import DeviceError
from elute.flash.banks import banks_of, channel_sizes, expert_sizes
from elute.flash.fetch import Fetcher, Run
from elute.flash.plan import least_window, solve, solve_banks
from elute.flash.sparsity import Threshold
from elute.flash.weights import FlashWeights, uses
from elute.formats.packed import PackedModel
from elute.model.families import op_list
from elute.npu.assemble import static_linears
from elute.npu.calibrate import calibrate
from elute.npu.choices import Choice
from elute.npu.prompts import PromptExecutor
from elute.npu.rows import Rows
from elute.npu.sim import Keep, Sim
from elute.pack.reorder import dequantized, reorder
from elute.runtime.executor import Executor
from elute.runtime.flash_codes import codes_of, runs_of

CONFIG = {
    **CONFIGS["llama-3.2-1b"],
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
MIXTURE = {
    **CONFIGS["olmoe-1b-7b"],
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 10,
    "num_experts_per_tok": 3,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
TEXT = np.random.default_rng(0).integers(0, 512, 300).astype(np.int32)
PROMPT = np.random.default_rng(1).integers(0, 512, 150).astype(np.int32)
CHUNK = 64
READERS = ["io_uring", "pread"]
SHADOWED = Choice(0.99, True)
HALF = 65536  # small, so that sites take several steps
HANG_S = 120


@pytest.fixture(autouse=True)
def _no_hang():
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def panels(tmp_path_factory) -> PackedModel:
    folder = tmp_path_factory.mktemp("hot") / "panels"
    return random_packed(CONFIG, random_recipe(bits=4, outer_bits=6), folder)


@pytest.fixture(scope="module")
def folders(panels, tmp_path_factory) -> dict[str, PackedModel]:
    folder = tmp_path_factory.mktemp("hot-channels")
    ops = op_list(panels.config)
    channels = {
        f"channels{group}": reorder(panels, folder / str(group), banks_of(ops, group))
        for group in (1, 2)
    }
    return {"panels": panels, **channels}


@pytest.fixture(scope="module")
def statistics(panels):
    executor = Executor(op_list(panels.config), panels, n_threads=1)
    return calibrate(executor, lambda name: dequantized(panels, name), TEXT)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> PackedModel:
    folder = tmp_path_factory.mktemp("hot") / "mixture"
    return random_packed(MIXTURE, random_recipe(bits=4, outer_bits=6), folder)


def on_flash(packed, share, **options) -> FlashWeights:
    """share: of the planes that stay, beside the least that a forward needs."""
    ops = op_list(packed.config)
    sizes = [sized.size for sized in channel_sizes(ops, packed.records)] if packed.banks else []
    sizes = sizes or [sized.size for sized in expert_sizes(ops, packed.records)]
    if sizes:
        total = sum(size.total for size in sizes)
        plan = solve_banks(2 * max(s.total for s in sizes) + int(share * total), {}, sizes)
    else:
        order = uses(ops, packed)
        plan = solve(least_window(order) + int(share * sum(use.total for use in order)), {}, order)
    return FlashWeights(packed, ops, plan, **options)


def fetcher(packed, **options) -> Fetcher:
    return Fetcher(packed, **{"half_bytes": HALF, **options})


def prompts(
    packed, statistics, *, weights=None, hot=0.03, device=None, n_threads=2, in_flight=3, **options
) -> PromptExecutor:
    """With a shadow at every site."""
    weights = packed if weights is None else weights
    executor = Executor(op_list(packed.config), weights, n_threads=n_threads)
    device = Sim("sim", keep=Keep.NOTHING) if device is None else device
    linears = static_linears(
        executor.sites,
        codes_of(weights, packed, fetcher(packed, **options), isa=executor.isa),
        statistics,
        dict.fromkeys(statistics, SHADOWED),
        device.profile,
        chunk=CHUNK,
        identity="",
        isa=executor.isa,
        hot_share=hot,
    )
    device.load([linear.graph for linear in linears])
    return PromptExecutor(executor, linears, device, chunk=CHUNK, in_flight=in_flight)


def answers(executor: PromptExecutor):
    """Logits of a prompt of several chunks, of tokens after it, and of another prompt."""
    rows = [executor.prompt(PROMPT, 0, all_logits=True)]
    for i in range(3):
        rows.append(executor.forward(np.array([7 + i], np.int32), PROMPT.size + i))
    rows.append(executor.prompt(PROMPT[::-1].copy()[:50], 20))
    rows.append(executor.forward(np.array([9], np.int32), 70))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def wanted(panels, statistics):
    return answers(prompts(panels, statistics))


@pytest.mark.parametrize("hot", [0, 0.001, 0.03, 1])
@pytest.mark.parametrize("order", ["panels", "channels1", "channels2"])
def test_any_share_of_hot_rows_gives_the_same_bits(folders, statistics, wanted, hot, order):
    executor = prompts(folders[order], statistics, hot=hot)
    assert np.array_equal(answers(executor), wanted)
    figures = executor.figures()
    assert figures.wanted > 0
    assert figures.read_bytes == 0
    assert figures.hot_bytes <= hot * sum(
        n * k for linear in executor.linears for n, k in (p.shape for p in linear.graph.products)
    )
    assert (figures.hit_rate == 1) == (hot == 1)
    assert (figures.hit_rate == 0) == (hot == 0)


@pytest.mark.parametrize("hot", [0, 0.03, 1])
@pytest.mark.parametrize("order", ["panels", "channels1", "channels2"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("share", [0, 0.2])
def test_rows_from_flash_give_the_same_bits(folders, statistics, wanted, hot, order, reader, share):
    packed = folders[order]
    weights = on_flash(packed, share, reader=reader)
    assert not weights.all_in_memory
    executor = prompts(packed, statistics, weights=weights, hot=hot, reader=reader)
    assert np.array_equal(answers(executor), wanted)
    figures = executor.figures()
    assert figures.found <= figures.wanted
    assert (figures.read_bytes > 0) == (hot < 1)


def test_weights_that_are_all_in_memory_are_not_read(folders, statistics, wanted):
    for packed in folders.values():
        weights = on_flash(packed, 2)
        assert weights.all_in_memory
        executor = prompts(packed, statistics, weights=weights)
        assert np.array_equal(answers(executor), wanted)
        assert executor.figures().read_bytes == 0


@pytest.mark.parametrize("gap_bytes", [0, 4096, 1 << 20])
@pytest.mark.parametrize("half_bytes", [HALF, 1 << 20])
@pytest.mark.parametrize("order", ["panels", "channels1"])
def test_nor_do_gaps_and_buffers_change_a_bit(
    folders, statistics, wanted, gap_bytes, half_bytes, order
):
    packed = folders[order]
    executor = prompts(
        packed,
        statistics,
        weights=on_flash(packed, 0),
        gap_bytes=gap_bytes,
        half_bytes=half_bytes,
        request_bytes=8192,
        depth=2,
    )
    assert np.array_equal(answers(executor), wanted)


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize(
    "faults", ["slow=5", "late%60 full%30 short%50 again%20", "late%80 short%80 seed=2"]
)
@pytest.mark.parametrize("order", ["panels", "channels1"])
def test_what_harms_nothing_changes_no_bit(folders, statistics, wanted, below, faults, order):
    packed = folders[order]
    executor = prompts(
        packed,
        statistics,
        weights=on_flash(packed, 0.3),
        reader=f"faulty:{below} {faults}",
        sums=packed.page_sums(),
        request_bytes=16384,
    )
    assert np.array_equal(answers(executor), wanted)


@pytest.mark.parametrize("below", READERS)
@pytest.mark.parametrize("fault", ["eio", "flip"])
@pytest.mark.parametrize("order", ["panels", "channels1"])
@pytest.mark.parametrize("keep", [Keep.INT8, Keep.NOTHING])
def test_a_bad_read_is_an_error_and_the_next_prompt_is_right(
    folders, statistics, wanted, below, fault, order, keep
):
    """Of what is read: at first nothing, then a shadow's rows or the device's weights."""
    packed = folders[order]
    weights = on_flash(packed, 0)
    quiet = prompts(
        packed,
        statistics,
        weights=weights,
        hot=0,
        device=Sim(keep=keep),
        reader="faulty:pread",
        request_bytes=REQUEST,
    )
    loading = count_reads(quiet)
    quiet.prompt(PROMPT[:100], 0)
    running = count_reads(quiet)
    assert running > loading or keep is Keep.INT8
    failing = loading + max(1, (running - loading) // 2)
    executor = prompts(
        packed,
        statistics,
        weights=on_flash(packed, 0),
        hot=0,
        device=Sim(keep=keep),
        reader=f"faulty:{below} {fault}@{failing}",
        sums=packed.page_sums(),
        request_bytes=REQUEST,
    )
    with pytest.raises(DeviceError) as raised:
        executor.prompt(PROMPT[:100], 0)
    why = "Input/output error" if fault == "eio" else "their CRC-32C is"
    assert re.match(
        rf"\S*model-00001\.safetensors: cannot read \d+ bytes from byte \d+ \({why}",
        str(raised.value),
    )
    assert "elute verify" in str(raised.value)
    assert np.array_equal(answers(executor), wanted)


REQUEST = 8192


def count_reads(executor: PromptExecutor) -> int:
    """Of REQUEST bytes at most, by the fetcher that all sites share."""
    codes = executor.linears[0].rows._codes
    return codes._fetcher.figures()[1]


def test_a_failure_while_hot_rows_are_read_is_an_error(panels, statistics):
    with pytest.raises(DeviceError, match="Input/output error"):
        prompts(panels, statistics, weights=on_flash(panels, 0), reader="faulty:pread eio@1")


def test_files_that_are_gone_are_an_error(panels, tmp_path):
    import shutil

    shutil.copytree(panels.path, tmp_path / "model")
    packed = PackedModel.open(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(DeviceError, match="No such file"):
        fetcher(packed)


@pytest.mark.parametrize("share", [0, 0.2])
def test_a_mixture_whose_experts_come_from_flash_gives_the_same_bits(mixture, share):
    ops = op_list(mixture.config)
    resident = Executor(ops, mixture, n_threads=2)
    statistics = calibrate(resident, lambda name: dequantized(mixture, name), TEXT)
    wanted = answers(prompts(mixture, statistics))
    by_banks = on_flash(mixture, share)
    assert by_banks.plan.staging
    order = uses(ops, mixture)
    room = int(share * sum(use.total for use in order))
    streamed = FlashWeights(mixture, ops, solve(least_window(order) + room, {}, order))
    assert streamed.plan.places
    for weights in (by_banks, streamed):
        for in_flight in (1, 2):  # two at a time read the experts anew for each, and are as right
            executor = prompts(mixture, statistics, weights=weights, in_flight=in_flight)
            assert np.array_equal(answers(executor), wanted)
            weights = (
                on_flash(mixture, share)
                if weights.plan.staging
                else FlashWeights(mixture, ops, streamed.plan)
            )


@pytest.mark.parametrize("order", ["panels", "channels1"])
def test_segments_that_make_their_products_read_weights_as_forwards_do(folders, statistics, order):
    """A calibration stops and begins forwards anywhere."""
    packed = folders[order]
    executor = Executor(op_list(packed.config), on_flash(packed, 0), n_threads=2)
    found = calibrate(executor, lambda name: dequantized(packed, name), TEXT)
    for name, of in statistics.items():
        assert found[name].effects == of.effects
        assert np.array_equal(found[name].input.histogram, of.input.histogram)


@pytest.mark.parametrize("order", ["panels", "channels1"])
def test_decoding_goes_on_with_sparse_weights_from_flash(folders, statistics, order):
    packed = folders[order]

    def told(weights):
        executor = prompts(packed, statistics, weights=weights)
        host = executor.host
        ones = [
            np.ones(linear.graph.products[0].shape[1], np.float32) for linear in executor.linears
        ]
        host.sparsify(
            {name: Threshold(one, 0.5) for name, one in zip(host.inputs, ones, strict=True)}
        )
        return answers(executor)

    wanted = told(packed)
    assert np.array_equal(told(on_flash(packed, 0)), wanted)
    assert np.array_equal(told(on_flash(packed, 0.4)), wanted)


@pytest.mark.parametrize("order", ["panels", "channels1"])
def test_rows_in_small_parts_make_the_same_shadows(folders, statistics, order):
    """A shadow that wants more rows than are held at a time."""
    packed = folders[order]
    weights = on_flash(packed, 0)
    executor = prompts(packed, statistics, weights=weights, in_flight=1)
    wide = prompts(packed, statistics, in_flight=1)
    rng = np.random.default_rng(3)
    for small, whole in zip(executor.linears, wide.linears, strict=True):
        n = sum(p.shape[0] for p in small.graph.products)
        rows = small.rows
        small.rows = Rows(rows._codes, rows._scales, rows._hot, part_bytes=7 * n)
        x = rng.normal(0, 20, (9, small.graph.products[0].shape[1])).astype(np.float32)
        x[3] = 0  # no outlier
        made, plain = small.split(x), whole.split(x)
        small.add_shadow(made)
        whole.add_shadow(plain)
        assert len(made.wanted.cuts) > 1
        assert np.array_equal(made.shadow, plain.shadow)


def test_outputs_that_int8_saturates_are_repaired_from_flash(folders, statistics):
    wanted = answers(prompts(folders["panels"], statistics, device=Sim("htp")))
    for packed in folders.values():
        for weights in (packed, on_flash(packed, 0)):
            executor = prompts(packed, statistics, weights=weights, device=Sim("htp"))
            assert np.array_equal(answers(executor), wanted)
            assert executor.figures().counts.saturated > 0


def test_a_fetcher_reads_what_it_is_asked_for(panels):
    file = next(iter(panels.shards))
    held = (panels.path / file).read_bytes()
    reads = fetcher(panels, half_bytes=16384)
    steps = [
        [Run(file, 4096 * i, 8192, 0), Run(file, 4096 * (i + 5), 4096, 12288)] for i in range(4)
    ]
    for _ in range(3):
        reading = reads.begin(steps)
        for step, half in zip(steps, reading.halves(), strict=True):
            for run in step:
                found = half[run.at : run.at + run.n_bytes].tobytes()
                assert found == held[run.offset : run.offset + run.n_bytes]
    assert reads.figures()[0] == 3 * 4 * 12288
    reads.begin(steps).close()  # nobody waits
    assert list(reads.begin([]).halves()) == []


def test_a_fetcher_refuses_what_is_not_there(panels):
    file = next(iter(panels.shards))
    reads = fetcher(panels)
    end = (panels.path / file).stat().st_size
    with pytest.raises(DeviceError, match="the file ends before that"):
        list(reads.begin([[Run(file, end, 4096, 0)]]).halves())
    for run in (Run(file, 1, 4096, 0), Run(file, 0, 100, 0), Run(file, 0, 4096, HALF)):
        with pytest.raises(ValueError, match="a piece"):
            reads.begin([[run]])


def test_runs_join_over_small_gaps():
    numbers = np.array([1, 2, 3, 5, 9, 10, 20])
    assert runs_of(numbers, 0) == [(1, 4), (5, 6), (9, 11), (20, 21)]
    assert runs_of(numbers, 1) == [(1, 6), (9, 11), (20, 21)]
    assert runs_of(numbers, 3) == [(1, 11), (20, 21)]
