"""LanguageModel obeys the law of a layer on tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from layerzoo import SpecError, build
from layerzoo.layer import Reach
from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.train.lit import LitModel

VOCAB, T = 13, 24
LINEAR = {"name": "linear", "heads": 2, "decay": "scalar"}
SLIDING = {"name": "sliding", "heads": 2, "window": 4, "sinks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-conv": {"conv": 0},
    "conv-1": {"conv": 1},
    "mlp": {"mlp": 1.5},
    "tie": {"tie": True, "conv": 2, "mlp": 2.0},
    "persistent": {"persistent": 3, "mlp": 1.0},
}
VARIANT = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())


def model(dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
    given = {"vocab_size": VOCAB, "dim": 16, "depth": 2, "layers": [LINEAR, SLIDING], **fields}
    return LanguageModel(**given).to(dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape)


def close(got: Any, want: Any, tol: float = 1e-9) -> None:
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tol)


@VARIANT
def test_the_law_holds_on_tokens(fields: dict[str, Any]) -> None:
    net, x = model(**fields), tokens(2, T)
    whole = net(x)
    assert whole[0].shape == (2, T, VOCAB)
    close(net(x, net.init_state(2)), whole, 0.0)
    splits = [[at, T - at] for at in range(T + 1)]
    for sizes in ([1] * T, [5, 0, 2, T - 7], *splits):
        outputs, state = [], None
        for piece in x.split(sizes, 1):
            y, state = net(piece, state)
            outputs.append(y)
        close((torch.cat(outputs, 1), state), whole)


@VARIANT
def test_hidden_and_head_are_forward(fields: dict[str, Any]) -> None:
    net, x = model(**fields), tokens(2, T)
    close(net.head(net.hidden(x)[0]), net(x)[0], 0.0)


def test_variants_differ_in_their_parts() -> None:
    assert {"conv.weight", "mlp.up.weight"} & set(model().blocks[0].state_dict()) == {
        "conv.weight"
    }
    bare = set(model(conv=0).blocks[0].state_dict())
    assert not any(name.startswith(("conv", "mlp")) for name in bare)
    assert "mlp.up.weight" in model(mlp=2.0).blocks[0].state_dict()
    tied, loose = model(tie=True), model()
    assert tied.out.weight is tied.embedding.weight
    assert loose.out.weight is not loose.embedding.weight
    # Unit logits at the start: a tied embedding that starts at 1 would give logits of dim^1/2.
    assert 0.5 < float(tied(tokens(2, T))[0].std().detach()) < 2


def test_layers_are_tiled_over_depth() -> None:
    net = model(depth=4, layers=[LINEAR, "softmax"])
    names = [block.layer.name for block in net.each_block()]
    assert names == ["linear", "softmax"] * 2
    names = [b.layer.name for b in model(depth=3, layers=[LINEAR, "softmax"]).each_block()]
    assert names == ["linear", "softmax", "linear"]
    assert len({id(block.layer) for block in net.each_block()}) == 4, "no weights are shared"


NAMED = {"window": SLIDING, "linear": LINEAR, "full": "softmax"}


@pytest.mark.parametrize(
    "pattern, depth, want",
    [
        ("window linear", 5, "WLWLW"),
        ("window*3 full", 8, "WWWFWWWF"),
        ("full window*2", 4, "FWWF"),
        (" linear  full*1 ", 2, "LF"),
    ],
)
def test_patterns_of_names_are_tiled(pattern: str, depth: int, want: str) -> None:
    net = model(depth=depth, layers=NAMED, pattern=pattern)
    names = {"W": "sliding", "L": "linear", "F": "softmax"}
    assert [block.layer.name for block in net.each_block()] == [names[letter] for letter in want]
    specs = [NAMED["window"] if letter == "W" else None for letter in want]
    for block, spec in zip(net.each_block(), specs, strict=True):
        assert spec is None or spec.items() <= block.layer.spec().items()


def test_overrides_are_fields_or_whole_specs() -> None:
    changes = {
        0: {"window": 7},
        2: "linear",
        -1: {"name": "softmax", "heads": 4},
        "-2": {"heads": 1},
    }
    net = model(depth=6, layers=[SLIDING, "softmax"], overrides=changes)
    got = [block.layer.spec() for block in net.each_block()]
    names = ["sliding", "softmax", "linear", "softmax", "sliding", "softmax"]
    assert [spec["name"] for spec in got] == names
    assert (got[0]["window"], got[0]["sinks"], got[0]["heads"]) == (7, 2, 2)  # merged
    assert (got[4]["window"], got[4]["heads"]) == (4, 1)
    assert got[5]["heads"] == 4 and got[3] == got[1] == build("softmax", dim=16).spec()
    named = model(depth=3, layers=NAMED, pattern="full", overrides={1: {"heads": 1}})
    assert [block.layer.heads for block in named.each_block()] == [4, 1, 4]
    child = build("linear", dim=16, heads=2)
    assert model(depth=3, overrides={1: child}).blocks[1].layer is child


@pytest.mark.parametrize(
    "fields",
    [
        {
            "layers": NAMED,
            "pattern": "window*2 full",
            "overrides": {"-1": {"heads": 2}, 0: "linear"},
        },
        {"layers": ["linear", SLIDING], "overrides": {1: {"window": 3}}, "persistent": 4},
    ],
)
def test_a_config_survives_json_and_a_checkpoint(fields: dict[str, Any]) -> None:
    config = ModelConfig(vocab_size=VOCAB, dim=16, depth=4, **fields)
    assert config.overrides and all(type(index) is int for index in config.overrides)
    full = config.to_fields()
    assert ModelConfig.from_fields(json.loads(json.dumps(full))).to_fields() == full
    assert LitModel(network=config).hparams["network"] == full
    assert ModelConfig.from_fields(full).blocks() == [
        (place, build(spec, dim=16).spec()) for place, spec in config.blocks()
    ]


def test_persistent_tokens_are_tokens_in_front() -> None:
    """Equal to a model with a larger vocabulary, whose further tokens open every sequence."""
    net, n = model(persistent=3), 3
    plain, x = model(vocab_size=VOCAB + n), tokens(2, T)
    weights = net.state_dict()
    more = weights.pop("persistent")
    weights["embedding.weight"] = torch.cat((weights["embedding.weight"], more))
    plain.load_state_dict({**plain.state_dict(), **weights, "out.weight": plain.out.weight})
    opening = torch.arange(VOCAB, VOCAB + n).expand(2, n)
    h, state = plain.hidden(torch.cat((opening, x), 1))
    close(net.hidden(x), (h[:, n:], state))
    close(net.init_state(2), plain.hidden(opening)[1])
    bare = model()
    assert "persistent" not in bare.state_dict()


@pytest.mark.parametrize("documents", [False, True])
def test_persistent_tokens_are_learned(documents: bool) -> None:
    net, x = model(persistent=3), tokens(*DOCUMENTS.shape)
    net(x, documents=DOCUMENTS if documents else None)[0].square().sum().backward()
    assert net.persistent is not None and net.persistent.grad is not None
    assert net.persistent.grad.isfinite().all() and (net.persistent.grad.abs().amax(1) > 0).all()


@pytest.mark.parametrize("tie", [False, True])
def test_persistent_tokens_start_as_large_as_tokens(tie: bool) -> None:
    net = model(persistent=64, dim=64, tie=tie)
    assert net.persistent is not None
    with torch.no_grad():
        assert 0.9 < float(net.persistent.std() / net.embedding.weight.std()) < 1.1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"persistent": -1}, "persistent: must not be negative, got -1"),
        ({"layers": NAMED}, "pattern: missing; layers by name need an order"),
        ({"layers": {}, "pattern": ""}, "pattern: needs 1 to depth=2 specs to tile, got 0"),
        ({"layers": NAMED, "pattern": "full*3"}, "pattern: needs 1 to depth=2 specs to tile, got"),
        ({"layers": NAMED, "pattern": "ful"}, "pattern: no layer 'ful'; did you mean 'full'?"),
        (
            {"layers": NAMED, "pattern": "full*0"},
            "pattern: 'full*0': expected a count in [1, 10000]",
        ),
        ({"layers": NAMED, "pattern": "full*x"}, "pattern: 'full*x': expected a count in [1,"),
        (
            {"layers": NAMED, "pattern": f"full*{2**40}"},
            f"pattern: 'full*{2**40}': expected a count in [1, 10000]",
        ),
        ({"pattern": "full"}, "pattern: needs layers by name, {a: .., b: ..}"),
        (
            {"layers": {**NAMED, "unused": "linaer"}, "pattern": "full"},
            "layers.unused: unknown layer 'linaer'; did you mean 'linear'?",
        ),
        (
            {"layers": {"a": {"name": "linear", "heads": 3}}, "pattern": "a"},
            "layers.a: linear: heads (or give",
        ),
        ({"overrides": [1]}, "overrides: expected a mapping or null, got (1,)"),
        ({"overrides": {"first": {}}}, "overrides[first]: expected the index of a block, such as"),
        ({"overrides": {True: {}}}, "overrides[True]: expected the index of a block"),
        ({"overrides": {0: {}, "0": {}}}, "overrides[0]: given twice"),
        ({"overrides": {2: {}}}, "overrides[2]: no such block; there are 0 to 1, or -1 to -2"),
        ({"overrides": {-3: {}}}, "overrides[-3]: no such block"),
        ({"overrides": {0: {}, -2: {}}}, "overrides[-2]: is the same block as overrides[0]"),
        ({"overrides": {0: 3}}, "overrides[0]: expected fields, or a spec, got 3"),
        ({"overrides": {-1: {"windw": 3}}}, "overrides[-1]: sliding: unknown field 'windw'; did"),
        ({"overrides": {-1: "linaer"}}, "overrides[-1]: unknown layer 'linaer'; did you mean"),
        ({"overrides": {0: {"heads": 3}}}, "overrides[0]: linear: heads (or give"),
        (
            {"layers": [build("linear", dim=16, heads=2)]},
            "layers[0]: a built layer cannot be tiled; give its spec",
        ),
        (
            {"layers": [build("linear", dim=16), "linear"], "overrides": {0: {"heads": 2}}},
            "overrides[0]: the block's layer is built and takes no fields",
        ),
        ({"layers": []}, "layers: needs 1 to depth=2 specs to tile, got 0"),
        ({"layers": ["linear"] * 3}, "layers: needs 1 to depth=2 specs to tile, got 3"),
        ({"layers": "linear"}, "layers: expected a mapping or a list of"),
        ({"layers": ["linear", "linaer"]}, "layers[1]: unknown layer 'linaer'; did you mean"),
        ({"layers": ["linear", {**LINEAR, "heads": 3}]}, "layers[1]: linear: heads (or give"),
        ({"vocab_size": 0}, "vocab_size: must be at least 1, got 0"),
        ({"dim": 0}, "dim: must be at least 1, got 0"),
        ({"depth": 0}, "depth: must be at least 1, got 0"),
        ({"depth": 2**31}, "depth: must be in [1, 10000], got 2147483648"),
        ({"conv": 2**63}, "conv: 9223372036854775808 does not fit 64 bits"),
        ({"mlp": float("inf")}, "mlp: must be finite, got inf"),
        ({"mlp": float("nan")}, "mlp: must be finite, got nan"),
        ({"conv": -1}, "conv: must not be negative, got -1"),
        ({"mlp": -0.5}, "mlp: must not be negative, got -0.5"),
        ({"tie": "yes"}, "tie: expected bool, got 'yes'"),
        ({"width": 3}, "unknown field 'width'"),
        ({"impl": "chunk"}, "impl 'chunk' is unknown; did you mean 'chunked'?"),
    ],
)
def test_errors_name_the_place(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        model(**fields)
    assert str(error.value).startswith(message)


def test_impl_reaches_every_layer_and_is_recorded() -> None:
    parallel = {"name": "parallel", "children": [LINEAR, SLIDING]}
    net, x = model(layers=[parallel], impl="recurrent"), tokens(2, T)
    assert {child.impl for child in net.blocks[0].layer.layers} == {"recurrent"}
    want = net(x)
    for op in net.blocks[0].layer.ops():
        op.used.clear()
    net(x)
    ran = {"linear_attention": ["recurrent"], "sliding_attention": ["recurrent"]}
    assert net.choices() == ran
    net.blocks[0].layer.impl = net.blocks[1].layer.impl = "chunked"
    close(net(x), want)


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)])
def test_tokens_are_integers_of_two_dimensions(bad: Tensor) -> None:
    with pytest.raises(SpecError, match=r"tokens: expected integers \[B, T\], got"):
        model()(bad)


DOCUMENTS = torch.tensor(
    [
        [0, 0, 0, 1, 2, 2, 2, 2, 2, 0, 0, 0],  # the first id returns: another document
        [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3],
        [2, 2, 7, 7, 7, 7, 7, 7, 7, 7, 7, 1],
        [1, 1, 1, 1, 9, 9, 9, 9, 9, 9, 5, 5],  # begins with the id that ends the row above
    ]
)


@VARIANT
def test_packed_documents_equal_separate_runs(fields: dict[str, Any]) -> None:
    net, x = model(**fields), tokens(*DOCUMENTS.shape)
    packed, state = net(x, documents=DOCUMENTS)
    assert state is None
    for row, ids in enumerate(DOCUMENTS):
        lengths = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
        alone = [net(piece[None])[0][0] for piece in x[row].split(lengths)]
        close(packed[row], torch.cat(alone))


@VARIANT
def test_documents_of_no_tokens(fields: dict[str, Any]) -> None:
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert model(**fields)(none, documents=none)[0].shape == (2, 0, VOCAB)


def test_documents_do_not_continue_a_state() -> None:
    net, x = model(), tokens(*DOCUMENTS.shape)
    with pytest.raises(SpecError, match="documents: cannot continue a state"):
        net(x, net.init_state(len(x)), documents=DOCUMENTS)


def window(size: int, sinks: int = 0) -> dict[str, Any]:
    return {"name": "sliding", "heads": 2, "window": size, "sinks": sinks}


@pytest.mark.parametrize(
    "fields, reach",
    [
        ({"layers": [window(3)], "conv": 0}, Reach(4)),
        ({"layers": [window(1)], "conv": 0}, Reach(0)),
        ({"layers": [window(3), window(2)], "conv": 4, "mlp": 1.0}, Reach(9)),
        ({"layers": [window(2)], "conv": 1, "depth": 5}, Reach(5)),
        ({"layers": [window(3, sinks=2), window(2)], "conv": 0}, Reach(3, 2)),
        ({"layers": [window(3, sinks=1), window(3, sinks=3)], "conv": 2}, Reach(6, 3)),
        (
            {"layers": [{"name": "parallel", "children": [window(2, 1), window(4)]}], "conv": 0},
            Reach(6, 1),
        ),
        ({"layers": [window(3, sinks=3)], "conv": 0, "persistent": 2}, Reach(4, 1)),
        ({"layers": [window(3, sinks=1)], "conv": 0, "persistent": 4}, Reach(4, 0)),
    ],
)
def test_reach_is_where_the_last_logits_stop_changing(
    fields: dict[str, Any], reach: Reach
) -> None:
    net = model(**fields)
    assert net.reach() == reach
    x = tokens(1, T).repeat(T + 1, 1)  # row t has another token t; the last row is left alone
    x[range(T), range(T)] = (x[range(T), range(T)] + 1) % VOCAB
    logits = net(x)[0][:, -1]
    changes = ((logits[:-1] - logits[-1]).abs().amax(-1) > 1e-12).tolist()
    # A key that two tokens share may cancel in between; the far ends are what is claimed.
    assert changes[T - 1 - reach.back], "the furthest token has no effect"
    assert not any(changes[reach.sinks : T - 1 - reach.back]), "a token out of reach has one"
    assert all(changes[: reach.sinks]), "a sink has no effect"


@pytest.mark.parametrize("layer", ["linear", "softmax"])
def test_reach_is_unbounded_with_one_such_layer(layer: str) -> None:
    assert model(layers=[window(3), layer]).reach() is None


@VARIANT
@pytest.mark.parametrize("length", [1, 3, T])
def test_state_bytes(fields: dict[str, Any], length: int) -> None:
    net = model(torch.float32, **fields)
    leaves = tree_leaves(net(tokens(1, length))[1])
    size = net.state_bytes(length)
    assert sum(leaf.nbytes for leaf in leaves) == size.total == size.memory + size.buffers


@VARIANT
def test_a_state_holds_no_long_prompt(fields: dict[str, Any]) -> None:
    """A view would keep, and save, all of the tensor that it was cut from."""
    net = model(torch.float32, **fields)
    held = sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(net(tokens(1, 300))[1]))
    assert held <= 2 * net.state_bytes(300).total  # slack, in which a cache may append


def test_cautions_count_persistent_tokens() -> None:
    ttt = {"name": "ttt_linear", "heads": 2, "mini_batch": 8}
    assert model(layers=[ttt]).cautions(6) and not model(layers=[ttt], persistent=2).cautions(6)


@VARIANT
@pytest.mark.parametrize("length", [1, 3, T])
def test_flops(fields: dict[str, Any], length: int) -> None:
    net = model(**fields, impl="recurrent")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(tokens(1, length))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "conv" not in str(op))  # what is counted
    assert net.flops_per_token(length) == pytest.approx(products / length, rel=1e-6)
