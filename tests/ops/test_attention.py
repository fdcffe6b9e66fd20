"""Which attention is taken, and that it is right on every mesh and in every schedule."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import jaxpipe as jp
from jaxpipe.errors import ConfigError
from jaxpipe.models import layers
from jaxpipe.models.build import gpt_model
from jaxpipe.models.encdec import EncDecConfig
from jaxpipe.models.gpt import GPTConfig
from jaxpipe.ops.attention import attend
from jaxpipe.ops.attention_choice import capability_of, choose
from jaxpipe.runtime.layout.mesh import AXES, MANUAL
from jaxpipe.runtime.stage.stage import save_products
from jaxpipe.schedule import build

SHORT, LONG = {"head_dim": 64, "queries": 512, "keys": 512}, {"head_dim": 64, "queries": 4096, "keys": 4096}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("cudnn", {"capability": 9.0, "dtype": "bfloat16", **LONG}),
        ("cudnn", {"capability": 8.0, "dtype": "float16", **SHORT}),
        ("cudnn", {"capability": 9.0, "dtype": "bfloat16", **LONG, "head_dim": 256}),
        ("cudnn", {"capability": 9.0, "dtype": "bfloat16", **SHORT, "masked": True}),
        ("blockwise", {"capability": 8.0, "dtype": "bfloat16", **LONG, "head_dim": 256}),
        ("blockwise", {"capability": 9.0, "dtype": "bfloat16", **LONG, "head_dim": 60}),
        ("blockwise", {"capability": 9.0, "dtype": "bfloat16", **LONG, "masked": True}),
        ("blockwise", {"capability": 9.0, "dtype": "float32", **LONG}),
        ("blockwise", {"capability": 7.0, "dtype": "float16", **LONG}),
        ("blockwise", {"capability": None, "dtype": "bfloat16", **LONG}),
        ("xla", {"capability": None, "dtype": "float32", **SHORT}),
        ("xla", {"capability": 9.0, "dtype": "bfloat16", **SHORT, "biased": True}),
        ("xla", {"capability": 9.0, "dtype": "bfloat16", "head_dim": 64, "queries": 31, "keys": 31, "masked": True}),
    ],
)
def test_auto_takes_the_fused_kernel_where_it_is_and_else_by_length(name, asked):
    assert choose("auto", **asked).name == name
    assert choose("xla", **asked).name == "xla"


def h100s(**sizes: int) -> AbstractMesh:
    """A mesh of GPUs that are not there, on which programs can be traced."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), abstract_device=device)


def test_the_devices_that_count_are_those_of_the_mesh():
    assert capability_of(jax.devices()[0]) is None
    assert capability_of(h100s().abstract_device) == 8.0
    x = jax.ShapeDtypeStruct((1, 32, 4, 64), jnp.bfloat16)

    def primitives(mesh):
        def run(q, k, v):
            return attend(q, k, v, causal=True)

        with jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(run)(x, x, x))

    assert "dot_product_attention_fwd" in primitives(h100s())
    assert "dot_product_attention_fwd" not in primitives(jp.make_mesh(pipe=2).abstract_mesh)


def on_a_device(run, mesh, *shapes):
    """The program of one device of a loop, as text."""
    everywhere = PartitionSpec()
    names = {axis for axis in mesh.axis_names if axis in MANUAL or mesh.shape[axis] == 1}
    mapped = jax.shard_map(run, mesh=mesh, in_specs=everywhere, out_specs=everywhere, axis_names=names, check_vma=False)
    return str(jax.make_jaxpr(mapped)(*shapes))


@pytest.mark.parametrize("tensor", [1, 2])
def test_without_recomputation_the_kernel_runs_once_each_way(tensor):
    x, w = jax.ShapeDtypeStruct((1, 32, 64), jnp.bfloat16), jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)

    def block(w, x):
        heads = (x @ w).reshape(1, 32, 4, 16)
        return attend(heads, heads, heads, causal=True).reshape(1, 32, 64) @ w

    def step(w, x):
        y, vjp = jax.vjp(jax.checkpoint(block, policy=save_products, prevent_cse=False), w, x)
        return vjp(y)

    text = on_a_device(step, h100s(pipe=2, tensor=tensor), w, x)
    assert text.count("dot_product_attention_fwd_wrapper[") == text.count("dot_product_attention_bwd_wrapper[") == 1
    assert (text.count("shard_map[") > 1) == (tensor > 1)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_where_backwards_are_split_the_kernel_is_whole_in_the_inputs_half(remat, tensor):
    sizes = {"vocab_size": 64, "max_seq_len": 32, "num_layers": 2, "num_heads": 4, "d_model": 64, "dtype": "bfloat16"}
    schedule = build("zb_h1", devices=2, microbatches=2)
    pipe = jp.Pipeline(gpt_model(GPTConfig(**sizes)), schedule=schedule, mesh=jp.make_mesh(pipe=2), remat=remat)
    tokens = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    stage = pipe.program(params, batch).stages.stage
    mesh = h100s(pipe=2, tensor=tensor)
    texts = []

    def both(*_):  # what crosses is known within the loop only
        inputs = jax.make_jaxpr(stage.backward_input)(*stage.backward_shapes)
        texts.append((str(inputs), str(jax.make_jaxpr(stage.backward_weight)(*stage.backward_weight_shapes))))
        return jnp.zeros(())

    on_a_device(both, mesh)
    inputs, weights = texts[0]
    assert "dot_product_attention" not in weights
    assert inputs.count("dot_product_attention_bwd_wrapper[") == 1
    assert inputs.count("dot_product_attention_fwd_wrapper[") == (remat == "full")


def test_block_by_block_only_the_output_and_the_sums_are_kept():
    x = jax.ShapeDtypeStruct((1, 1280, 2, 8), jnp.float32)

    def step(q, k, v):
        run = jax.checkpoint(lambda *three: attend(*three, causal=True), policy=save_products, prevent_cse=False)
        _, vjp = jax.vjp(run, q, k, v)
        return jax.tree.leaves(vjp)

    kept = jax.eval_shape(step, x, x, x)
    assert max(leaf.size for leaf in kept) == x.size


@pytest.mark.parametrize(("heads", "kv_heads", "tensor"), [(4, 2, 2), (4, 1, 2), (8, 2, 4), (6, 3, 2), (3, 3, 2)])
def test_heads_are_shared_over_tensor_whatever_divides(heads, kv_heads, tensor):
    numbers = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(numbers.normal(size=(2, 24, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads, heads)
    )
    distances = jnp.asarray(numbers.normal(size=(9, heads)), jnp.float32)
    mask = jnp.asarray(numbers.random((2, heads, 24, 24)) < 0.7) | jnp.eye(24, dtype=bool)[None, None]
    seen = jnp.ones((2, 24), bool).at[1, 20:].set(False).at[1, 0].set(True)

    def step(implementation, q, k, v, distances, dy):
        def run(q, k, v, distances):
            return attend(
                q,
                k,
                v,
                causal=True,
                distances_LH=distances,
                mask_BHTS=mask,
                seen_BS=seen,
                implementation=implementation,
            )

        y, vjp = jax.vjp(run, q, k, v, distances)
        return y, vjp(dy)

    given = q, k, v, distances, dy
    mapped = jax.shard_map(
        lambda *given: step("blockwise", *given),
        mesh=jp.make_mesh(pipe=2, tensor=tensor),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names=set(MANUAL),
        check_vma=False,
    )
    sees = (mask & seen[:, None, None] & jnp.tril(jnp.ones((24, 24), bool))[None, None]).any(-1)
    given = *given[:4], dy * sees.swapaxes(1, 2)[..., None]  # what sees nothing gets anything
    found, expected = jax.jit(mapped)(*given), jax.jit(lambda *given: step("xla", *given))(*given)
    both = (jnp.where(sees.swapaxes(1, 2)[..., None], y, 0) for y in (found[0], expected[0]))
    tree_allclose((next(both), found[1]), (next(both), expected[1]))


@pytest.mark.parametrize(("name", "remat"), [("1f1b", "none"), ("zb_h1", "none"), ("zb_h1", "full")])
def test_pipelines_with_tensor_give_the_gradients_of_the_whole_scores(name, remat):
    cfg = GPTConfig(
        vocab_size=64, max_seq_len=24, num_layers=2, num_heads=4, num_kv_heads=2, d_model=32, attention="blockwise"
    )
    tokens = np.random.default_rng(0).integers(0, 64, (4, 24), np.int32)
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, 1)}
    schedule = build(name, devices=2, microbatches=2)
    pipe = jp.Pipeline(gpt_model(cfg), schedule=schedule, mesh=jp.make_mesh(pipe=2, tensor=2), remat=remat)
    params = jax.jit(pipe.init)(jax.random.key(0), batch)
    loss, gradient = jax.jit(pipe.value_and_grad)(params, batch)
    whole = jp.sequential(gpt_model(replace(cfg, attention="xla")), 2)
    expected = jax.jit(whole.value_and_grad)(pipe.to_canonical(params), batch)
    tree_allclose((loss, pipe.to_canonical(gradient)), expected)


def temp_bytes(length: int) -> int:
    """Temporaries of a training step on two simulated devices."""
    cfg = GPTConfig(vocab_size=32, max_seq_len=length, num_layers=2, num_heads=2, d_model=16)
    pipe = jp.Pipeline(
        gpt_model(cfg), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(pipe=2), remat="none"
    )
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(pipe.init, jax.random.key(0), batch)
    memory = jax.jit(pipe.value_and_grad).lower(params, batch).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def test_memory_of_training_grows_with_the_sequence_and_not_its_square():
    short, long = temp_bytes(4096), temp_bytes(8192)
    assert long < 2.2 * short
    assert long < 2 * 8192 * 8192 * 4  # not even the scores of one block's two heads


@pytest.mark.parametrize("most", [1, 50, 10**6])
def test_decoding_is_the_same_for_some_queries_at_a_time(most, monkeypatch):
    numbers = np.random.default_rng(0)
    q, new_k, new_v, k, v = (
        jnp.asarray(numbers.normal(size=shape), jnp.float32)
        for shape in ((2, 7, 4, 8), *[(2, 2, 7, 8)] * 2, *[(2, 2, 16, 8)] * 2)
    )
    positions = jnp.asarray([3, 9])[:, None] + jnp.arange(7)[None]
    bias_table = jnp.asarray(numbers.normal(size=(4, 32)), jnp.float32)

    def run():
        return layers.attend_cached(
            q,
            {"k": new_k, "v": new_v},
            {"k": k, "v": v},
            positions,
            bias=lambda at, to: bias_table[:, jnp.abs(at[:, :, None] - to[:, None])].swapaxes(0, 1),
            window=6,
        ), layers.attend_kept(q, k, v, jnp.arange(16)[None] < jnp.asarray([5, 16])[:, None])

    expected = run()
    monkeypatch.setattr(layers, "LONG", most)
    tree_allclose(run(), expected)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"capability": None}, "no NVIDIA GPU computes them"),
        ({"capability": 7.5}, "cuDNN has no kernel for compute capability 7.5"),
        ({"head_dim": 20}, "cuDNN's kernel has no heads of 20 dims"),
    ],
)
def test_a_kernel_that_there_is_not_is_refused_where_it_is_asked_for(given, reason):
    asked = {"capability": 9.0, "dtype": "bfloat16", **SHORT} | given
    with pytest.raises(ConfigError, match=rf"attention='cudnn' cannot be taken: {reason}; try attention='auto'"):
        choose("cudnn", **asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "cudnn"},
            "dtype='float32' must be 'bfloat16' or 'float16' for attention='cudnn'; try attention='auto'",
        ),
        ({"attention": "flash"}, "attention='flash' must be one of 'auto', 'xla', 'cudnn', 'blockwise'; try"),
    ],
)
def test_an_attention_that_cannot_be_is_refused(change, message):
    sizes = {"vocab_size": 8, "num_heads": 2, "d_model": 8}
    for make in (
        lambda: GPTConfig(max_seq_len=8, num_layers=1, **sizes, **change),
        lambda: EncDecConfig(num_encoder_layers=1, num_decoder_layers=1, head_dim=4, d_ff=8, **sizes, **change),
    ):
        with pytest.raises(ConfigError) as raised:
            make()
        assert message in str(raised.value)
