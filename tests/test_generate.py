"""generate and stream: batches, sampling, stops, pieces; states saved, restored, rolled back."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from layerzoo import SpecError
from layerzoo.generation.decode import generate, read_tokens, stream
from layerzoo.generation.sampling import Sampling
from layerzoo.generation.states import load_state, save_state, select_rows
from layerzoo.model import LanguageModel

VOCAB, WINDOW = 13, 6
SLIDING = {"name": "sliding", "heads": 2, "window": WINDOW, "sinks": 2}
DELTA = {"name": "gated_delta", "heads": 2}
ALLMEM = {"name": "allmem", "heads": 2, "mini_batch": 4}
# Mini-batches that no state below ends on: what is pending must be in the state.
LAYERS: dict[str, Any] = {
    "sliding": SLIDING,
    "softmax": {"name": "softmax", "heads": 2},
    "gated_delta": DELTA,
    "ttt_mlp": {"name": "ttt_mlp", "heads": 2, "mini_batch": 4},
    "titans": {"name": "titans", "heads": 2, "mini_batch": 4},
    "sliding+allmem": {"name": "parallel", "children": [SLIDING, ALLMEM]},
}
LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
PROMPTS = [[1, 2, 3], torch.tensor([4]), [5, 6, 7], [8, 9, 10, 11, 12], [0], [1, 2, 3]]
SAMPLED = {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 3}


def model(*layers: Any, dtype: torch.dtype = torch.float64, **fields: Any) -> LanguageModel:
    given = {"vocab_size": VOCAB, "dim": 16, "depth": 2, "layers": layers or [DELTA, SLIDING]}
    return LanguageModel(**{**given, **fields}).to(dtype)


def lists(rows: list[Tensor]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def same(got: Any, want: Any) -> None:
    """Bit for bit, in structure and type too."""
    assert type(got) is type(want)
    if isinstance(want, Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    else:
        assert len(got) == len(want)
        for name in want if isinstance(want, dict) else range(len(want)):
            same(got[name], want[name])


# Choosing


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, VOCAB, VOCAB + 1])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
def test_the_kept_set(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(5, VOCAB)
    logits[0] = 1.0  # all equal: the lower ids come first
    kept = Sampling(temperature, top_k, top_p).kept(logits)
    for row, got in zip(logits.double().tolist(), kept, strict=True):
        order = sorted(range(VOCAB), key=lambda n: (-row[n], n))[:top_k]
        p = torch.tensor([row[n] for n in order], dtype=torch.float64).div(temperature).softmax(0)
        want, total = [], 0.0
        for token, share in zip(order, p.tolist(), strict=True):
            want.append(token)
            total += share
            if top_p is not None and total >= top_p:
                break
        assert got.nonzero().flatten().tolist() == sorted(want)


def test_of_equals_the_lower_ids_are_kept() -> None:
    kept = Sampling(1.0, top_k=7).kept(torch.zeros(2, 5000))
    assert kept.nonzero().tolist() == [[row, n] for row in range(2) for n in range(7)]


def test_draws_follow_the_distribution() -> None:
    logits, how = torch.randn(1, VOCAB), Sampling(1.5, top_k=5, top_p=0.9)
    logits[0, 0] = -9.0  # not kept: a draw of 0 is not its
    p = (logits / 1.5).masked_fill(~how.kept(logits), -torch.inf).softmax(-1)[0]
    n = 4000
    draws = [(i + 0.5) / n for i in range(n)]  # evenly: the counts are exact but for the edges
    counts = torch.bincount(how.choose(logits.expand(n, -1), draws), minlength=VOCAB)
    assert (counts / n - p).abs().max() < 2 / n
    assert how.choose(logits, [0.0]).item() == p.nonzero()[0].item()
    assert how.choose(logits, [1 - 2**-53]).item() == p.nonzero()[-1].item()


def test_top_k_samples_among_the_likeliest() -> None:
    net, x = model(), torch.randint(VOCAB, (1, 5))
    likeliest = set(net(x)[0][0, -1].topk(3).indices.tolist())
    rows = generate(net, x.repeat(200, 1), 1, temperature=5.0, top_k=3)
    seen = Counter(int(row[-1]) for row in rows)  # prompts that are equal have draws of their own
    assert set(seen) == likeliest and min(seen.values()) > 30


# Batches


@pytest.mark.parametrize("fields", [{}, {"conv": 0}, {"mlp": 1.5, "tie": True}])
def test_greedy_generation_equals_the_full_forward(fields: dict[str, Any]) -> None:
    net, x = model(**fields), torch.randint(VOCAB, (3, 5))
    want = x
    for _ in range(8):
        with torch.no_grad():
            want = torch.cat((want, net(want)[0][:, -1].argmax(-1, keepdim=True)), 1)
    assert lists(net.generate(x, 8)) == want.tolist()


@LAYER
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_batched_equals_one_by_one(layer: Any, options: dict[str, Any]) -> None:
    net = model(layer)
    together = lists(generate(net, PROMPTS, 9, **options))
    for n, (prompt, row) in enumerate(zip(PROMPTS, together, strict=True)):
        ids = [int(token) for token in prompt]
        assert row == ids + list(stream(net, prompt, 9, index=n, **options))
    # In another grouping each place keeps its sample.
    others = [*PROMPTS[:1], [7, 7, 7, 7], *PROMPTS[2:4]]
    again = lists(generate(net, others, 9, **options))
    assert [again[n] for n in (0, 2, 3)] == [together[n] for n in (0, 2, 3)]


def test_seeds() -> None:
    net, x = model(), torch.randint(VOCAB, (3, 5))
    greedy = lists(generate(net, x, 12))
    assert lists(generate(net, x, 12, temperature=1.5, top_k=1)) == greedy
    assert lists(generate(net, x, 12, temperature=1.5, top_p=1e-9)) == greedy
    sample = lists(generate(net, x, 12, temperature=1.5, seed=3))
    torch.manual_seed(1)  # the global generator has no part in it
    assert sample == lists(generate(net, x, 12, temperature=1.5, seed=3))
    assert sample != lists(generate(net, x, 12, temperature=1.5, seed=4))
    assert sample == lists(generate(net, x, 12, temperature=1.5, seed=3, top_k=VOCAB + 1))
    assert lists(generate(net, x, 0)) == x.tolist()
    assert generate(net, [], 3) == []


@LAYER
def test_rows_end_with_a_stop_token(layer: Any) -> None:
    net, options = model(layer), {"temperature": 2.0, "seed": 1}
    whole = lists(generate(net, PROMPTS, 12, **options))
    stops = {4, 9}
    want, seen = [], []
    for prompt, row in zip(PROMPTS, whole, strict=True):  # those of the prompt do not count
        new = row[len(prompt) :]
        at = next((n + 1 for n, token in enumerate(new) if token in stops), len(new))
        want.append(row[: len(prompt) + at])
    assert len({len(row) for row in want}) > 1, "no row ends before another"
    got = generate(net, PROMPTS, 12, stop=stops, **options, on_token=lambda *x: seen.append(x))
    assert lists(got) == want
    alone = stream(net, PROMPTS[0], 12, stop=stops, **options)
    assert [*PROMPTS[0], *alone] == want[0] and list(alone) == [], "a stream that ended has ended"
    for n, prompt in enumerate(PROMPTS):  # every token was handed on as it came
        assert [token for m, token in seen if m == n] == want[n][len(prompt) :]


@LAYER
@pytest.mark.parametrize("piece", [1, 3, 19])
def test_a_prompt_read_in_pieces(layer: Any, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = model(layer), torch.randint(VOCAB, (2, 20))
    whole, state = lists(generate(net, x, 5)), read_tokens(net, x)
    lengths, hidden = [], net.hidden
    monkeypatch.setattr(net, "hidden", lambda t, s: (lengths.append(t.shape[1]), hidden(t, s))[1])
    assert lists(generate(net, x, 5, piece=piece)) == whole
    assert max(lengths) == piece and sum(lengths) == 19 + 5
    pieces = tree_leaves(read_tokens(net, x, piece=piece))
    for got, want in zip(pieces, tree_leaves(state), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1], [2, VOCAB]], {}, f"prompt 1 has a token outside the vocabulary 0..{VOCAB - 1}"),
        ([[10**30]], {}, "prompt 0 has a token outside the vocabulary"),
        ([[-1]], {}, "prompt 0 has a token outside the vocabulary"),
        ([[1]], {"temperature": float("nan")}, "temperature: must be finite and >= 0, got nan"),
        ([[1]], {"temperature": -1.0}, "temperature: must be finite and >= 0, got -1.0"),
        ([[1]], {"top_k": 0}, "top_k: must be at least 1, or none, got 0"),
        ([[1]], {"top_p": 0.0}, "top_p: must be in (0, 1], or none, got 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p: must be in (0, 1], or none, got 1.1"),
        ([[1]], {"stop": [VOCAB]}, f"stop: {VOCAB} is outside the vocabulary 0..{VOCAB - 1}"),
        ([[1]], {"seed": -1}, "seed: must not be negative, got -1"),
        ([[1, 2]], {"piece": 0}, "piece: must be at least 1 token, got 0"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens: must not be negative, got -1"),
    ],
)
def test_refusals(prompts: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        generate(model(), prompts, **{"max_new_tokens": 2, **options})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_logits_that_are_not_finite() -> None:
    net = model()
    net.out.weight.data[3, 3] = torch.nan
    with pytest.raises(SpecError, match="the logits are not finite"):
        generate(net, [[1]], 1)


# States


@LAYER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_rolled_back_or_restored_goes_on_as_it_did(
    layer: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    net = model(layer, dtype=dtype)
    s = stream(net, [1, 2, 3], temperature=1.0, seed=2)
    list(islice(s, 10))
    state, unread = s.state, s.unread
    kept = copy.deepcopy(state)
    save_state(tmp_path / "state", state)
    restored = load_state(tmp_path / "state", net)
    same(restored, state)
    list(islice(s, 11))  # the abandoned branch
    same(state, kept)  # it has not touched the state

    def go_on(state: Any) -> tuple[list[int], Any]:
        s = stream(net, [unread], 17, temperature=1.0, seed=5, state=state)
        return list(s), s.state

    want = go_on(kept)
    for start in (state, restored, state):
        got = go_on(start)
        assert got[0] == want[0]
        same(got[1], want[1])


@LAYER
def test_a_continued_state_is_the_whole(layer: Any) -> None:
    net = model(layer)
    (whole,) = lists(generate(net, [[1, 2, 3, 4, 5]], 12))
    prefix = read_tokens(net, torch.tensor([[1, 2]]))
    assert lists(generate(net, [[3, 4, 5]], 12, state=prefix)) == [whole[2:]]
    s = stream(net, [1, 2, 3, 4, 5], 7)
    assert [*range(1, 6), *s, *stream(net, [s.unread], 5, state=s.state)] == whole


def test_prompts_continue_one_state_or_a_row_each() -> None:
    net = model()
    prefixes = torch.tensor([[1, 2], [3, 4], [5, 6]])
    rows, prompts = read_tokens(net, prefixes), [[7], [8, 9], [7]]
    for n, row in enumerate(lists(generate(net, prompts, 6, state=rows))):
        (alone,) = lists(generate(net, [prefixes[n].tolist() + prompts[n]], 6))
        assert row == alone[2:]
    one = select_rows(rows, [1])
    for prompt, row in zip(prompts, lists(generate(net, prompts, 6, state=one)), strict=True):
        assert row == lists(generate(net, [[3, 4, *prompt]], 6))[0][2:]
    with pytest.raises(SpecError, match="state: has 3 rows for 2 prompts; give one, or one a"):
        generate(net, [[1], [2]], 1, state=rows)


def test_any_tree_of_tensors_is_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tree = {
        "views": [shared.T, shared[:, 1:], shared, shared],
        "pair": (torch.zeros((), dtype=torch.int64), {"b": torch.ones(2, 0).bfloat16()}),
        "none": [{}, (), []],
    }
    for state in (tree, [tree], shared):
        save_state(tmp_path / "x", state)
        same(load_state(tmp_path / "x"), state)
    big = torch.zeros(1, 10000)[:, :3]
    save_state(tmp_path / "x", big)
    assert (tmp_path / "x").stat().st_size < 500, "all that a view was cut from is in the file"
    assert not (tmp_path / "x.part").exists()
    for bad, what in (({"a": [3]}, "state/a/0: expected"), ({1: shared}, "state: expected")):
        with pytest.raises(SpecError, match=what):
            save_state(tmp_path / "bad", bad)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([DELTA], "1.layer: a dict instead of a Tensor"),
        ([DELTA, ALLMEM], "1.layer: has ['k', 'position', 'v'] instead of ['momentum', "),
        ([DELTA, SLIDING, DELTA], "2 parts instead of 3"),
        ([{**DELTA, "heads": 4}, SLIDING], "0.layer: shape [1, 2, 8, 8] instead of [1, 4, 4, 4]"),
        ([DELTA, LAYERS["sliding+allmem"]], "1.layer: a dict instead of a list"),
    ],
)
def test_a_state_of_another_model(layers: list[Any], message: str, tmp_path: Path) -> None:
    save_state(tmp_path / "state", read_tokens(model(), torch.tensor([[1, 2, 3]])))
    other = model(*layers, depth=max(2, len(layers)))
    with pytest.raises(SpecError) as error:
        load_state(tmp_path / "state", other)
    assert "state: is not of this model: " in str(error.value) and message in str(error.value)
    with pytest.raises(SpecError, match="is not of this model"):
        generate(other, [[1]], 1, state=load_state(tmp_path / "state"))


def test_files_that_hold_no_state(tmp_path: Path) -> None:
    path, net = tmp_path / "state", model()
    save_state(path, net.init_state(1))
    whole = path.read_bytes()
    for content in (
        b"",
        b"garbage",
        whole[:-9],
        whole[:40],
        whole.replace(b"layerzoo", b"otherzoo"),
    ):
        path.write_bytes(content)
        with pytest.raises(SpecError, match="is damaged, or not one that layerzoo saved"):
            load_state(path)
    with pytest.raises(SpecError, match=r"state .*: cannot be read: No such file"):
        load_state(tmp_path / "no")
    with pytest.raises(SpecError, match=r"state .*: cannot be written: "):
        save_state(tmp_path / "no" / "state", net.init_state(1))
    with pytest.raises(SpecError, match="do not have one batch size"):
        generate(net, [[1]], 1, state=[{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])


def test_the_state_stops_growing_at_the_window() -> None:
    def sizes(layer: Any) -> list[int]:
        tokens = stream(model(layer), [1], 40)
        return [sum(x.nbytes for x in tree_leaves(tokens.state)) for _ in tokens]

    bounded = sizes(LAYERS["sliding+allmem"])
    full = WINDOW - 1 + 2
    assert bounded[0] < bounded[full - 1] and set(bounded[full - 1 :]) == {bounded[-1]}
    growing = sizes(LAYERS["softmax"])
    assert all(a < b for a, b in pairwise(growing))
