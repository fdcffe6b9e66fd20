"""Wrong input to the mesh, the pipeline and the oracle: one line that says rule, value and nearest valid choice."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import toy_batch, toy_model, toy_pipeline
from jax.sharding import PartitionSpec

import jaxpipe as jp
from jaxpipe.errors import ConfigError, PartitionError, ScheduleError
from jaxpipe.runtime.layout.mesh import by_links
from jaxpipe.schedule import build


def one_line(error) -> str:
    """The message, which must be a single line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def test_too_few_devices():
    with pytest.raises(ConfigError) as error:
        jp.make_mesh(16)
    assert one_line(error) == (
        "mesh.pipe=16 needs 16 devices but there are 8 (cpu); try mesh.pipe=8 or mesh.simulate=16 to simulate them "
        "on the CPU"
    )


@pytest.mark.parametrize(
    ("sizes", "asked", "near"),
    [
        ({"pipe": 2, "data": 8}, "mesh.pipe=2 * mesh.data=8 needs 16", "mesh.pipe=1"),
        ({"pipe": 3, "fsdp": 3, "tensor": 1}, "mesh.pipe=3 * mesh.fsdp=3 needs 9", "mesh.pipe=2"),
        ({"tensor": 9}, "mesh.tensor=9 needs 9", "mesh.tensor=8"),
    ],
)
def test_a_product_of_axes_that_is_too_large_names_both_numbers_and_the_nearest(sizes, asked, near):
    with pytest.raises(ConfigError) as error:
        jp.make_mesh(**sizes)
    assert f"{asked} devices but there are 8 (cpu); try {near} or mesh.simulate=" in one_line(error)


@dataclass
class FakeDevice:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "H100"


def test_processes_may_not_be_left_over():
    devices = [FakeDevice(n, n // 4) for n in range(8)]
    with pytest.raises(ConfigError) as error:
        jp.make_mesh(pipe=4, devices=devices)
    assert one_line(error) == (
        "mesh.pipe=4 uses 4 devices but the 2 processes have 8, and none may be left over; try mesh.data=2"
    )


def test_the_pipe_crosses_hosts_first():
    devices = [FakeDevice(n, n // 4) for n in range(16)]
    grid = by_links((4, 1, 2, 2), devices)
    hosts = [{device.process_index for device in grid[place].flat} for place in range(4)]
    assert hosts == [{0}, {1}, {2}, {3}]
    grid = by_links((2, 4, 1, 2), devices)
    assert [sorted({device.process_index for device in grid[place].flat}) for place in range(2)] == [[0, 1], [2, 3]]
    assert all(len({device.process_index for device in row}) == 1 for row in grid.reshape(-1, 2))


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_axis_sizes_are_whole_numbers(size):
    with pytest.raises(ConfigError) as error:
        jp.make_mesh(pipe=size)
    assert "must be a whole number of at least 1; try 1" in one_line(error)


def test_simulating_after_jax_has_started_is_refused():
    jax.devices()
    with pytest.raises(ConfigError) as error:
        jp.simulate_devices(64)
    assert "must be set before JAX starts, and it already runs with 8 cpu devices" in one_line(error)


def test_annotations_that_do_not_fit():
    model = toy_model(2)

    def door(specs, tensor=2, carry=None):
        blocks = [replace(model.blocks[0], specs=specs)] * 2
        pipe = jp.Pipeline(
            jp.Model(model.embed, blocks, model.head_loss, carry_spec=carry or PartitionSpec()),
            schedule=build("1f1b", devices=1, microbatches=2),
            mesh=jp.make_mesh(tensor=tensor),
        )
        return pipe.init(jax.random.key(0), toy_batch(4))

    columns = PartitionSpec(None, "tensor")
    for specs, tensor, message in [
        (
            {"upp": columns},
            2,
            "specs of blocks/block name 'upp', which is no parameter; try one of 'down', 'scale', 'up'",
        ),
        ({"scale": columns}, 2, "specs of blocks/block cut dim 1 of 'scale', which has shape [8]; try dim 0"),
        (
            {"up": columns},
            3,
            "blocks/block/up has size 16 in dim 1, which must be divisible by mesh.tensor=3; try mesh.tensor=2",
        ),
        ({"up": PartitionSpec("fsdp", "tensor")}, 2, "may name only the axis 'tensor', the others are the pipeline's"),
    ]:
        with pytest.raises(PartitionError) as error:
            door(specs, tensor)
        assert message in one_line(error)
    with pytest.raises(PartitionError, match=r"carry_spec=.* may name only the axis 'tensor'"):
        door({}, carry=PartitionSpec("data"))


def test_an_unknown_shard():
    with pytest.raises(ConfigError) as error:
        toy_pipeline("1f1b", 2, 2, shard="weights")
    assert one_line(error) == "shard='weights' must be 'params' or 'optimizer'; try 'params'"


def test_layers_that_do_not_divide():
    schedule = build("interleaved_1f1b", devices=4, microbatches=4, repeats=2)
    with pytest.raises(PartitionError) as error:
        jp.Pipeline(toy_model(10), schedule=schedule, mesh=jp.make_mesh(4))
    assert one_line(error) == (
        "num_layers=10 must be a multiple of devices=4 * repeats=2 = 8; try num_layers=8 or 16, or stages='even'"
    )


def test_mesh_and_schedule_of_different_sizes():
    with pytest.raises(ConfigError) as error:
        jp.Pipeline(toy_model(4), schedule=build("1f1b", devices=4, microbatches=4), mesh=jp.make_mesh(2))
    assert one_line(error) == "mesh.pipe=2 must equal the schedule's devices=4; try mesh.pipe=4"


def test_unknown_remat():
    with pytest.raises(ConfigError) as error:
        toy_pipeline("1f1b", 2, 2, remat="some")
    assert one_line(error) == "remat='some' must be one of full, none, all or a policy of jax.checkpoint; try 'full'"


def test_batches_that_do_not_divide():
    pipe = toy_pipeline("1f1b", 2, 4, data=2)
    params = pipe.init(jax.random.key(0), toy_batch(16))
    with pytest.raises(ConfigError) as error:
        jax.jit(pipe.value_and_grad)(params, toy_batch(20))
    assert one_line(error) == "batch size 20 must be a multiple of microbatches=4 * data=2 = 8; try 16"


def test_batch_leaves_of_different_sizes():
    batch = toy_batch(4)
    batch["mask"] = batch["mask"][:2]
    with pytest.raises(ConfigError) as error:
        toy_pipeline("1f1b", 2, 2).init(jax.random.key(0), batch)
    assert "leading sizes ['2', '4'] but must share one" in one_line(error)


def test_a_block_that_changes_the_carry():
    model = toy_model(2)
    wider = jp.Block(model.blocks[0].init, lambda p, x, mb, key: jnp.concatenate([x, x], -1))
    pipe = jp.Pipeline(
        jp.Model(model.embed, [wider] * 2, model.head_loss),
        schedule=build("1f1b", devices=2, microbatches=2),
        mesh=jp.make_mesh(2),
    )
    params = pipe.init(jax.random.key(0), toy_batch(4))
    with pytest.raises(PartitionError) as error:
        pipe.loss(params, toy_batch(4))
    assert "block 0 returns float32[2, 5, 16]" in one_line(error) and "try float32[2, 5, 8]" in one_line(error)


def test_blocks_of_one_kind_with_different_functions():
    model = toy_model(2)
    mixed = [model.blocks[0], jp.Block(model.blocks[0].init, lambda p, x, mb, key: x)]
    with pytest.raises(PartitionError) as error:
        jp.Pipeline(
            jp.Model(model.embed, mixed, model.head_loss),
            schedule=build("1f1b", devices=2, microbatches=2),
            mesh=jp.make_mesh(2),
        )
    assert one_line(error) == (
        "blocks 0 and 1 are of kind='block' but have different apply functions; try the same function for both, or "
        "kind='block1' for block 1"
    )


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([3, 1, 2, 1], "stages=[3, 1, 2, 1] hold 7 blocks but the model has 8; try [2, 2, 2, 2]"),
        ([4, 4], "must hold one number of blocks for each of devices=4 * repeats=1 = 4 stages; try [2, 2, 2, 2]"),
        ([9, -1, 0, 0], "must hold one number of blocks for each of devices=4"),
        ("Ettt|ttt|tt|L|", "must hold L once, last in the last stage"),
        ("Ettt|tttt|tL", "has 3 stages but the schedule has 4; try 'Ett|tt|tt|ttL' for 8 blocks in 4 stages"),
    ],
)
def test_stages_that_do_not_fit(stages, message):
    schedule = build("1f1b", devices=4, microbatches=4)
    with pytest.raises(PartitionError) as error:
        jp.Pipeline(toy_model(8), schedule=schedule, mesh=jp.make_mesh(4), stages=stages)
    assert message in one_line(error)


def test_scanning_cannot_split_the_backward():
    with pytest.raises(ScheduleError) as error:
        jp.Pipeline(
            toy_model(4), schedule=build("zb_h1", devices=2, microbatches=4), mesh=jp.make_mesh(2), scan_blocks=True
        )
    assert one_line(error) == (
        "scan_blocks=True cannot split the backwards of schedule 'zb_h1' into I and W; try scan_blocks=False, or "
        "'1f1b' or 'interleaved_1f1b'"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"idle": "wait"}, "idle='wait' must be 'skip' or 'mask'; try 'skip'"),
        ({"remat": ["full"]}, "remat=['full'] must hold one value for each of 2 stages; try 'full' for all"),
        ({"remat": ["full", 3]}, "remat=3 must be one of full, none, all or a policy of jax.checkpoint; try 'full'"),
    ],
)
def test_options_with_unknown_values(option, message):
    with pytest.raises(ConfigError) as error:
        jp.Pipeline(toy_model(2), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2), **option)
    assert one_line(error) == message


def test_offloading_to_the_host_warns_where_there_is_nothing_else():
    with pytest.warns(UserWarning, match="offload=True has no effect on CPU devices"):
        pipe = jp.Pipeline(
            toy_model(2), schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2), offload=True
        )
    assert not pipe.offload


def test_a_second_stream_where_lanes_start_one_hop_each():
    with pytest.warns(UserWarning, match=r"second_stream=True has no effect on placement='loop' of schedule '1f1b'"):
        jp.Pipeline(
            toy_model(2), schedule=build("1f1b", devices=2, microbatches=4), mesh=jp.make_mesh(2), second_stream=True
        )


def test_a_parameter_that_is_an_integer():
    model = toy_model(2)
    counting = jp.Block(lambda key, x: {"n": jnp.zeros((), jnp.int32)}, lambda p, x, mb, key: x)
    pipe = jp.Pipeline(
        jp.Model(model.embed, [counting] * 2, model.head_loss),
        schedule=build("1f1b", devices=2, microbatches=2),
        mesh=jp.make_mesh(2),
    )
    with pytest.raises(PartitionError) as error:
        pipe.init(jax.random.key(0), toy_batch(4))
    assert one_line(error) == (
        "parameter ['blocks'][0][0]['n'] is int32[2] but parameters must be floating-point, for they have gradients; "
        "try it in the batch, in the carry, or as a constant"
    )


def test_an_aux_that_is_no_number():
    model = toy_model(2)
    wide = jp.Block(model.blocks[0].init, lambda p, x, mb, key: (x, x.sum(-1)))
    pipe = jp.Pipeline(
        jp.Model(model.embed, [wide] * 2, model.head_loss),
        schedule=build("1f1b", devices=2, microbatches=2),
        mesh=jp.make_mesh(2),
    )
    with pytest.raises(PartitionError) as error:
        pipe.loss(pipe.init(jax.random.key(0), toy_batch(4)), toy_batch(4))
    assert one_line(error) == (
        "block 0 returns an aux of float32[2, 5] but it must be one floating-point number; try its sum or mean"
    )


def test_a_weight_that_depends_on_activations_beside_an_aux():
    model = toy_model(2)
    block = jp.Block(model.blocks[0].init, lambda p, x, mb, key: (x, x.mean()))
    head = jp.HeadLoss(lambda key, x, mb: {}, lambda p, x, mb, key: (x.sum(), (x > 0).sum()))
    pipe = jp.Pipeline(
        jp.Model(model.embed, [block] * 2, head),
        schedule=build("1f1b", devices=2, microbatches=2),
        mesh=jp.make_mesh(2),
    )
    with pytest.raises(ConfigError) as error:
        pipe.loss(pipe.init(jax.random.key(0), toy_batch(4)), toy_batch(4))
    assert "must depend on the batch only; try the sum of a mask in mb" in one_line(error)


def test_metrics_that_are_not_there_or_have_no_rows():
    pipe = toy_pipeline("1f1b", 2, 2)
    params = pipe.init(jax.random.key(0), toy_batch(4))
    with pytest.raises(ConfigError, match="has_aux=True needs metrics"):
        pipe.loss(params, toy_batch(4), has_aux=True)
    model = toy_model(2)
    head = jp.HeadLoss(lambda key, x, mb: {}, lambda p, x, mb, key: (x.sum(), 1.0, {"last": x[0]}))
    odd = jp.Pipeline(jp.Model(model.embed, model.blocks, head), schedule=pipe.schedule, mesh=pipe.mesh)
    with pytest.raises(ConfigError) as error:
        odd.loss(odd.init(jax.random.key(0), toy_batch(4)), toy_batch(4), has_aux=True)
    assert one_line(error) == (
        "metrics['last'] has shape [5, 8] but must be a number or have the microbatch's rows first; try [2, …]"
    )


def test_a_model_without_blocks_and_a_tie_to_nowhere():
    model = toy_model(2)
    with pytest.raises(PartitionError, match="must hold at least one block"):
        jp.Model(model.embed, [], model.head_loss)
    with pytest.raises(PartitionError, match=r"must map a path 'head/…' or 'blocks/block/…' to a path 'embed/…'"):
        jp.Model(model.embed, model.blocks, model.head_loss, tie={"kernel": "embed/table"})
    tied = jp.Model(model.embed, model.blocks, model.head_loss, tie={"head/kernle": "embed/table"})
    with pytest.raises(PartitionError, match=r"head has no leaf 'kernle'; try 'head/kernel'"):
        jp.sequential(tied).init(jax.random.key(0), toy_batch(2))


def refusal(kind, call) -> str:
    """What a call is refused with, one line of one kind of error."""
    with pytest.raises(kind) as error:
        call()
    return one_line(error)


def two_stages(model, **options) -> jp.Pipeline:
    return jp.Pipeline(model, schedule=build("1f1b", devices=2, microbatches=2), mesh=jp.make_mesh(2), **options)


def input_batch(rows: int):
    """What a model reads whose head has no targets."""
    return {name: leaf for name, leaf in toy_batch(rows).items() if name not in ("targets", "mask")}


def gradient_of(model, batch=None):
    """A whole step of a model, on two devices."""
    pipe, batch = two_stages(model), batch or toy_batch(4)
    return jax.jit(pipe.value_and_grad)(pipe.init(jax.random.key(0), batch), batch)


RULE = "head_loss.apply must return (loss_sum, weight) or (loss_sum, weight, metrics), two scalars first, but "


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (
            lambda x: {"loss": x.sum(), "n": 1.0},
            "returns a dict of 'loss', 'n'; try return out['loss'], weight, metrics",
        ),
        (lambda x: (x.sum((1, 2)), jnp.ones(2)), "loss_sum is float32[2]; try its sum over the rows"),
        (lambda x: x.sum((1, 2)), "returns float32[2]; try (loss.sum(), 1.0 * loss.size)"),
        (lambda x: x.sum(), "returns float32[]; try (loss_sum, weight), with the number of tokens or rows"),
        (lambda x: (x.sum().astype(int), 1.0), "loss_sum is int32[]; try a floating-point number"),
        (lambda x: (x.sum(), jnp.ones(2)), "weight is float32[2]; try what the loss was summed over, as one number"),
        (lambda x: (x.sum(), 1.0, {}, 3), "returns 4 values; try"),
        (lambda x: None, "returns None; try"),
    ],
)
def test_what_a_head_returns(returns, message):
    model = toy_model(2)
    head = jp.HeadLoss(model.head_loss.init, lambda p, x, mb, key: returns(x))
    whole = jp.Model(model.embed, model.blocks, head)
    assert refusal(PartitionError, lambda: gradient_of(whole, input_batch(4))).startswith(RULE + message)
    oracle = jp.sequential(whole)
    canonical = oracle.init(jax.random.key(0), input_batch(2))
    assert refusal(PartitionError, lambda: oracle.loss(canonical, input_batch(2))).startswith(RULE + message)


def test_a_plain_number_is_a_weight():
    model = toy_model(2)
    head = jp.HeadLoss(model.head_loss.init, lambda p, x, mb, key: (x.sum(), 2))
    whole = jp.Model(model.embed, model.blocks, head)
    pipe, oracle = two_stages(whole), jp.sequential(whole, row_groups=2)
    params = pipe.init(jax.random.key(0), input_batch(4))
    wanted = oracle.loss(pipe.to_canonical(params), input_batch(4))
    assert jnp.allclose(pipe.loss(params, input_batch(4)), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own | {"extra": jnp.zeros(3)}, "extra is missing and float32[3]"),
        (lambda own: own | {"scale": jnp.ones(4)}, "scale is float32[8] and float32[4]"),
    ],
)
def test_blocks_of_one_kind_with_different_parameters(change, message):
    model = toy_model(2)
    first = replace(model.blocks[0], specs={})
    second = replace(first, init=lambda key, x: change(first.init(key, x)))
    mixed = jp.Model(model.embed, [first, second], model.head_loss)
    expected = (
        f"blocks 0 and 1 are of kind='block' but have different parameters: {message}; try kind='block1' for block 1"
    )
    assert refusal(PartitionError, lambda: two_stages(mixed).init(jax.random.key(0), toy_batch(4))) == expected
    assert refusal(PartitionError, lambda: jp.sequential(mixed).init(jax.random.key(0), toy_batch(4))) == expected


@pytest.mark.parametrize(
    ("tie", "message"),
    [
        ({"head/out/bias": "embed/table"}, "joins float32[12] and float32[12, 8], which must be alike; try leaving"),
        (
            {"blocks/block/scale": "embed/table"},
            "joins float32[8] and float32[12, 8], which must be alike; try leaving",
        ),
        ({"head/kernel": "embed/tabel"}, "names 'embed/tabel', but embed has no leaf 'tabel'; try 'embed/table'"),
        ({"blocks/block/scael": "embed/table"}, "but blocks/block has no leaf 'scael'; try 'blocks/block/scale'"),
        ({"head/out": "embed/table"}, "names 'head/out', but head has no leaf 'out'; try 'head/out/bias'"),
    ],
)
def test_ties_of_leaves_that_are_not_alike_or_not_there(tie, message):
    model = toy_model(2)
    tied = jp.Model(model.embed, model.blocks, model.head_loss, tie=tie)
    for make in (two_stages(tied).init, jp.sequential(tied).init):
        text = refusal(PartitionError, lambda make=make: make(jax.random.key(0), toy_batch(4)))
        assert text.startswith(f"tie={tie}") and message in text


def test_random_keys_do_not_pass_from_block_to_block():
    model = toy_model(2)
    embed = jp.Embed(model.embed.init, lambda p, mb, key: {"x": model.embed.apply(p, mb, key), "k": jax.random.key(0)})
    whole = jp.Model(embed, [jp.Block(lambda key, c: {}, lambda p, c, mb, key: c)] * 2, model.head_loss)
    message = "carry['k'] is key<fry>[] but what passes from block to block must be numbers; try the key that embed,"
    assert refusal(PartitionError, lambda: jp.sequential(whole).init(jax.random.key(0), toy_batch(4))).startswith(
        message
    )
    nothing = replace(embed, apply=lambda p, mb, key: None)
    whole = jp.Model(nothing, whole.blocks, model.head_loss)
    message = "embed.apply returns no array but must return what the first block is given; try [rows, …]"
    assert refusal(PartitionError, lambda: two_stages(whole).init(jax.random.key(0), toy_batch(4))) == message


def called_back(x):
    return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_parts_that_cannot_be_differentiated_are_named(remat):
    model = toy_model(2)
    block = replace(model.blocks[0], apply=lambda p, x, mb, key: called_back(model.blocks[0].apply(p, x, mb, key)))
    head = replace(model.head_loss, apply=lambda p, x, mb, key: model.head_loss.apply(p, called_back(x), mb, key))
    whiles = lambda p, x, mb, key: jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x + p["scale"].sum(), x)  # noqa: E731
    for parts, name, reason in [
        ({"blocks": [block] * 2}, "blocks[0].apply", "Pure callbacks do not support JVP"),
        (
            {"blocks": [replace(block, apply=whiles)] * 2},
            "blocks[0].apply",
            "Reverse-mode differentiation does not work",
        ),
        ({"head_loss": head}, "head_loss.apply", "Pure callbacks do not support JVP"),
    ]:
        pipe = two_stages(replace(model, **parts), remat=remat)
        params = pipe.init(jax.random.key(0), toy_batch(4))
        text = refusal(PartitionError, lambda pipe=pipe, params=params: pipe.value_and_grad(params, toy_batch(4)))
        assert (
            text.startswith(f"{name} cannot be differentiated: {reason}") and "; try jax.custom_vjp around it" in text
        )


def test_what_a_part_does_wrong_itself_is_not_explained_away():
    model = toy_model(2)
    block = replace(model.blocks[0], apply=lambda p, x, mb, key: x + p["up"])
    pipe = two_stages(replace(model, blocks=[block] * 2))
    params = pipe.init(jax.random.key(0), toy_batch(4))
    with pytest.raises((TypeError, ValueError), match=r"broadcast|rank"):
        pipe.value_and_grad(params, toy_batch(4))


NOT_ROWS = "but must be an array with the rows first, [B, …]; try "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: jax.tree.map(lambda x: x.tolist(), b),
            f"batch['mask'][0][0] is one float {NOT_ROWS}numpy.asarray of",
        ),
        (
            lambda b: [b, b],
            "batch is a list of 2 batches but must be one whose leaves are [B, …], which the pipeline cuts",
        ),
        (
            lambda b: b | {"step": 3},
            f"batch['step'] is one int {NOT_ROWS}one value per row, or a constant of the model",
        ),
        (
            lambda b: b | {"step": jnp.ones(())},
            f"batch['step'] is one float32 {NOT_ROWS}one value per row, or a constant",
        ),
        (
            lambda b: b | {"name": "x"},
            "batch['name'] is the text 'x' but must be an array of numbers [B, …]; try leaving",
        ),
        (lambda b: {}, "batch holds no array but must have leaves [B, …]; try {'tokens': …, 'targets': …}"),
        (lambda b: {"tokens": b["tokens"]}, "the batch has no 'targets', which the model reads, but 'tokens'; try"),
    ],
)
def test_batches_that_are_no_tree_of_arrays(change, message):
    pipe, batch = two_stages(toy_model(2)), toy_batch(4)
    oracle = jp.sequential(pipe.model)
    params = pipe.init(jax.random.key(0), batch)
    canonical = pipe.to_canonical(params)
    for call in (pipe.loss, pipe.value_and_grad):
        assert refusal(ConfigError, lambda call=call: call(params, change(batch))).startswith(message)
    assert refusal(ConfigError, lambda: oracle.loss(canonical, change(batch))).startswith(message)


def test_keys_that_are_none():
    pipe, batch = two_stages(toy_model(2)), toy_batch(4)
    params = pipe.init(jax.random.key(0), batch)
    rule = "must be one key of jax.random, or None for deterministic; try"
    for key, message in [
        (3, f"key=3 {rule} jax.random.key(3)"),
        ("dropout", f"key=dropout {rule} jax.random.key(0)"),
        (jnp.zeros(2), f"key=float32[2] {rule} jax.random.key(0)"),
        (jax.random.split(jax.random.key(0)), "key has shape [2] but must be one key of jax.random; try key[0], or"),
    ]:
        for call in (pipe.loss, pipe.value_and_grad):
            assert refusal(ConfigError, lambda call=call, key=key: call(params, batch, key)).startswith(message)
    assert "try jax.random.key(3)" in refusal(ConfigError, lambda: pipe.init(3, batch))
    assert refusal(ConfigError, lambda: jp.sequential(pipe.model).init(None, batch)) == (
        "key=None must be a key of jax.random to make parameters with; try jax.random.key(0)"
    )


def test_parameters_of_something_else():
    pipe, batch = two_stages(toy_model(2)), toy_batch(4)
    params = pipe.init(jax.random.key(0), batch)
    canonical, oracle = pipe.to_canonical(params), jp.sequential(pipe.model)
    for call in (lambda p: pipe.loss(p, batch), lambda p: jax.jit(pipe.value_and_grad)(p, batch), pipe.to_canonical):
        assert refusal(PartitionError, lambda call=call: call(canonical)) == (
            "params is a canonical tree, whose blocks are by kind (block), but a pipeline takes its own; "
            "try pipe.from_canonical(params)"
        )
    for call in (pipe.from_canonical, lambda p: oracle.loss(p, batch)):
        assert "try pipe.to_canonical(params)" in refusal(PartitionError, lambda call=call: call(params))
    assert refusal(PartitionError, lambda: pipe.loss({"params": params}, batch)) == (
        "the parameters' tree has the keys 'params' but must hold 'embed', 'blocks' and 'head'; try its 'params'"
    )
    other = two_stages(toy_model(4)).init(jax.random.key(0), batch)
    assert "try pipe.from_canonical(other.to_canonical(params))" in refusal(
        PartitionError, lambda: pipe.loss(other, batch)
    )


def test_options_that_are_something_else():
    model, schedule, mesh = toy_model(4), build("1f1b", devices=2, microbatches=2), jp.make_mesh(2)
    make = lambda **options: jp.Pipeline(**({"model": model, "schedule": schedule, "mesh": mesh} | options))  # noqa: E731
    for option, kind, message in [
        ({"model": None}, ConfigError, "model is None but must be a Model; try jaxpipe.nn.from_nnx"),
        ({"schedule": "1f1b"}, ScheduleError, "schedule is '1f1b' but must be a Schedule; try jaxpipe.schedule.build("),
        ({"mesh": 2}, ConfigError, "mesh is 2 but must be a Mesh; try jaxpipe.make_mesh(pipe=2)"),
        ({"costs": 3}, ScheduleError, "costs is 3 but must be a Costs; try Costs("),
        ({"remat": None}, ConfigError, "remat=None must be one of full, none, all or a policy of jax.checkpoint; try"),
        (
            {"stages": 2},
            PartitionError,
            "stages=2 must hold one number of blocks for each of devices=2 * repeats=1 = 2",
        ),
        ({"stages": [True, 3]}, PartitionError, "stages=[True, 3] must hold one number of blocks"),
        ({"stages": [1.5, 2.5]}, PartitionError, "stages=[1.5, 2.5] must hold one number of blocks"),
    ]:
        assert refusal(kind, lambda option=option: make(**option)).startswith(message)
    assert make(stages=np.array([1, 3])).stages == make(stages=jnp.array([1, 3])).stages == (1, 3)


def test_axes_that_there_are_not():
    for axes, near in [({"expert": 2}, "fsdp=2"), ({"dp": 4}, "data=4"), ({"tensr": 2}, "tensor=2")]:
        (name, size), *_ = axes.items()
        message = f"mesh.{name}={size} is no axis; there are pipe, data, fsdp, tensor; try {near}"
        assert refusal(ConfigError, lambda axes=axes: jp.make_mesh(**axes)) == message
    for devices in (2, [], [0, 1]):
        message = f"devices={devices!r} must be a sequence of JAX's devices; try jax.devices()[:2]"
        assert refusal(ConfigError, lambda devices=devices: jp.make_mesh(2, devices=devices)) == message
    assert jp.make_mesh(np.int64(2)).shape["pipe"] == 2  # pyright: ignore[reportArgumentType]


def test_models_of_something_else():
    block = toy_model(1).blocks[0]
    for blocks, found in [(block, "blocks is a Block"), (4, "blocks is a int"), ([len], "blocks[0] is a builtin")]:
        text = refusal(PartitionError, lambda blocks=blocks: jp.Model(None, blocks, None))
        assert text.startswith(found) and "but blocks must be a list of jaxpipe.Block, one per layer" in text
    text = refusal(PartitionError, lambda: jp.Model(None, [block], None, tie=[("head/kernel", "embed/table")]))  # pyright: ignore
    assert "must map paths to paths; try {'head/kernel': 'embed/table'}" in text


def test_row_groups_of_the_oracle():
    with pytest.raises(ConfigError, match="row_groups=0 must be a whole number of at least 1; try 1"):
        jp.sequential(toy_model(1), row_groups=0)
