"""Faults to plant, one at a time, and the tests that run the file in which each is planted."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault.

    kind: the part of the product that it is in.
    file: where it is planted, from the root of the repository.
    right: the text that is there, once.
    wrong: what replaces it.
    tests: files of tests, and words of laws, see `laws`.
    """

    kind: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


LAWS = "laws: "


def laws(words: str) -> tuple[str, ...]:
    """The checks of layers whose ids have these words, as in "linear or gla"."""
    return (LAWS + words,)


VECTORS = ("tests/test_vectors.py", "tests/test_closed_forms.py")
FAST = ("tests/test_fast_weights_vectors.py", "tests/test_fast_weights.py")
TASKS = ("tests/test_task_suite.py",)
METRICS = ("tests/test_metrics.py", "tests/test_overwrite.py", "tests/test_continual.py")
GRID = ("tests/test_grid.py",)
REPORT = ("tests/test_statistics.py", "tests/test_report.py", "tests/test_scaling.py")
RESUME = ("tests/test_resume.py", "tests/test_resumed.py")
HF = ("tests/test_hf.py", "tests/test_evaluate.py")

FAULTS = [
    # Ops
    Fault(
        "op",
        "memories/linear/rule.py",
        "state = decay[:, t].unsqueeze(-1) * state + write",
        "state = decay[:, t].unsqueeze(-1) * (state + write)",
        (*laws("linear or gla"), *VECTORS),
    ),
    Fault(
        "op",
        "memories/linear/chunked.py",
        "state = state * per_token(log_decay, k)[:, 0].exp().unsqueeze(-1)",
        "state = state * per_token(log_decay, k)[:, 0].unsqueeze(-1)",
        laws("gla or retention"),
    ),
    Fault(
        "op",
        "memories/delta/rule.py",
        "(beta[:, t, :, None] * k[:, t]).unsqueeze(-1) @ error",
        "(beta[:, t, :, None].square() * k[:, t]).unsqueeze(-1) @ error",
        (*VECTORS, *laws("delta")),
    ),
    Fault(
        "op",
        "memories/delta/chunked.py",
        "db = torch.linalg.vecdot(x, e - batched_matmul(scores[:, :, 1], u)).unsqueeze(-1)",
        "db = torch.linalg.vecdot(x, e).unsqueeze(-1)",
        laws("delta and implementations"),
    ),
    Fault(
        "op",
        "memories/delta/chunked.py",
        "state = torch.baddbmm(state * whole, fade, u[n], out=states[n + 1])",
        "state = torch.baddbmm(state, fade, u[n], out=states[n + 1])",
        laws("gated_delta or kda"),
    ),
    Fault(
        "op",
        "memories/common/decays.py",
        "FLOOR = -40.0",
        "FLOOR = -4.0",
        ("tests/test_ops.py", *VECTORS, *laws("gated_linear or kda")),
    ),
    Fault(
        "op",
        "memories/common/decays.py",
        'wide = torch.float32 if g.device.type == "mps" else torch.float64  # mps has none',
        "wide = torch.float32",
        ("tests/test_ops.py", "tests/test_wide.py", *laws("gated_delta and precision")),
    ),
    Fault(
        "op",
        "memories/common/decays.py",
        "d_prefix[:, :, :, 1, -1] += of_right",
        "pass",
        laws("gla and implementations"),
    ),
    Fault(
        "op",
        "memories/mesa/systems.py",
        "enough = torch.finfo(b.dtype).eps ** 2 * rr.detach()",
        "enough = torch.finfo(b.dtype).eps * rr.detach()",
        (*VECTORS, "tests/test_closed_form_rules.py", *laws("mesa")),
    ),
    Fault(
        "op",
        "memories/mesa/systems.py",
        "drr = d_size - d_ratio * step.ratio",
        "drr = d_size",
        laws("mesa and implementations"),
    ),
    Fault(
        "op",
        "memories/fast_weights/recurrent.py",
        "keep = 1.0 if decay is None else 1 - token(decay, t)",
        "keep = 1.0 if decay is None else 1 - token(decay, t) ** 2",
        (*FAST, *laws("titans")),
    ),
    Fault(
        "op",
        "memories/fast_weights/recurrent.py",
        "S = [total / C * S[m] + U[m] for m in matrices]",
        "S = [total * S[m] + U[m] for m in matrices]",
        (*FAST, *laws("lact or allmem")),
    ),
    Fault(
        "op",
        "memories/fast_weights/forgetting.py",
        "W.norm(dim=-2, keepdim=True) + self.eps",
        "W.norm(dim=-1, keepdim=True) + self.eps",
        (*FAST, "tests/test_fast_weights_rules.py", *laws("lact or allmem")),
    ),
    Fault(
        "op",
        "memories/fast_weights/optimisers.py",
        "flip = S.shape[-2] > S.shape[-1]",
        "flip = False",
        (*FAST, "tests/test_fast_weights_rules.py", *laws("lact")),
    ),
    Fault(
        "op",
        "memories/fast_weights/objectives.py",
        "return self.p * e.sign() * e.abs().pow(self.p - 1)",
        "return e.sign() * e.abs().pow(self.p - 1)",
        (*FAST, *laws("moneta")),
    ),
    Fault(
        "op",
        "attention/sliding/rule.py",
        "head, tail = cached_sinks(end, window, sinks), min(window - 1, end)",
        "head, tail = cached_sinks(end, window, sinks), min(window, end)",
        laws("sliding"),
    ),
    Fault(
        "op",
        "attention/sliding/chunked.py",
        "keys = slice(end - (last - first) - reach, end)",
        "keys = slice(end - (last - first) - reach + 1, end)",
        laws("sliding"),
    ),
    Fault(
        "op",
        "attention/forgetting/chunked.py",
        "ds.addcmul_(weights, ds.sum(-1, keepdim=True), value=-1)",
        "ds.addcmul_(weights, ds.mean(-1, keepdim=True), value=-1)",
        laws("forgetting and implementations"),
    ),
    Fault(
        "op",
        "attention/forgetting/rule.py",
        'surplus = 0 if window is None else max(0, cache["k"].shape[1] - (window - 1))',
        'surplus = 0 if window is None else max(0, cache["k"].shape[1] - window)',
        laws("forgetting"),
    ),
    Fault(
        "op",
        "attention/sink_logit.py",
        "unit = 2.0 ** -math.floor(math.log2(scale))",
        "unit = 2.0 ** math.floor(math.log2(scale))",
        ("tests/test_vectors.py", "tests/test_attention.py", *laws("sliding or softmax")),
    ),
    # Layers
    Fault(
        "layer",
        "layerzoo/memory.py",
        'self.scale = {"l2": 1.0, "rms": 1 / self.key_dim, "none": self.key_dim**-0.5}[',
        'self.scale = {"l2": 1.0, "rms": 1.0, "none": self.key_dim**-0.5}[',
        ("tests/test_shell.py", "tests/test_closed_form_layers.py"),
    ),
    Fault(
        "layer",
        "layerzoo/memory.py",
        'return o, {"rule": inner, "position": state["position"] + write.k.shape[1]}',
        'return o, {"rule": inner, "position": state["position"] + q.shape[1]}',
        laws("alignment"),
    ),
    Fault(
        "layer",
        "layerzoo/shell.py",
        "            k = k + self.key_bias.to(k.dtype)",
        "            k = k + self.key_bias.to(k.dtype).detach()",
        ("tests/test_shell.py", "tests/test_combinations.py"),
    ),
    Fault(
        "layer",
        "layerzoo/rotary.py",
        "positions = torch.arange(start, start + T, device=x.device, dtype=dtype)",
        "positions = torch.arange(T, device=x.device, dtype=dtype)",
        laws("softmax or sliding"),
    ),
    Fault(
        "layer",
        "layerzoo/rotary.py",
        "return theta * (1 - scaled + scaled / self.factor)",
        "return theta * (1 - scaled + scaled * self.factor)",
        ("tests/test_rotary.py",),
    ),
    Fault(
        "layer",
        "layerzoo/nn.py",
        "self.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus^-1",
        "self.bias = nn.Parameter(steps.log())",
        ("tests/test_shell.py", "tests/test_closed_form_layers.py", "tests/test_closed_forms.py"),
    ),
    Fault(
        "layer",
        "memories/delta/rule.py",
        "beta = self.config.beta_max * self.beta(x).sigmoid()",
        "beta = self.beta(x).sigmoid()",
        ("tests/test_closed_form_layers.py", "tests/test_closed_form_rules.py", *laws("delta")),
    ),
    Fault(
        "layer",
        "layerzoo/model/compose/parallel.py",
        "sinks = max(0, self.sinks - past)",
        "sinks = self.sinks",
        laws("parallel"),
    ),
    Fault(
        "layer",
        "layerzoo/model/compose/reset.py",
        'y, s = child(parts.pop("x"), s, **parts)',
        'y, s = child(parts.pop("x"), None, **parts)',
        laws("reset"),
    ),
    Fault(
        "layer",
        "layerzoo/model/compose/gated.py",
        "return torch.lerp(b, a, g.sigmoid().to(a.dtype)), list(new)",
        "return torch.lerp(a, b, g.sigmoid().to(a.dtype)), list(new)",
        ("tests/test_compose.py", *laws("gated")),
    ),
    Fault(
        "layer",
        "attention/common.py",
        "q = q * (self.key_dim * self.temperature).to(q.dtype)",
        "q = q * self.temperature.to(q.dtype)",
        ("tests/test_shell.py", "tests/test_attention.py"),
    ),
    # Metrics
    Fault(
        "metric",
        "layerzoo/metrics/binned.py",
        "bins = (torch.bucketize(at, self.edges, right=True) - 1).clamp(min=0)",
        "bins = (torch.bucketize(at, self.edges) - 1).clamp(min=0)",
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/accuracy.py",
        "                if largest := out[name]:",
        "                if largest := out[name] or 1.0:",
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/overwrite.py",
        "other = (answered & (bound == answer)).any(1) & ~stale",
        "other = (answered & (bound == answer)).any(1)",
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/continual.py",
        "forgetting = (R[1:K].amax(0) - last)[:-1]",
        "forgetting = (R[:K].amax(0) - last)[:-1]",
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/continual.py",
        '"continual/forward_transfer": (R[:K].diagonal() - R[0])[1:].mean(),',
        '"continual/forward_transfer": (R[:K].diagonal() - R[0]).mean(),',
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/loss.py",
        'out["loss/bits_per_byte"] = loss / math.log(2) / self.bytes_per_token',
        'out["loss/bits_per_byte"] = loss / math.log(2) * self.bytes_per_token',
        ("tests/test_metrics.py", "tests/test_text.py"),
    ),
    Fault(
        "metric",
        "layerzoo/metrics/recall.py",
        'out["recall/beyond_window"] = beyond[1] / sum(beyond)',
        'out["recall/beyond_window"] = beyond[1] / total',
        METRICS,
    ),
    Fault(
        "metric",
        "layerzoo/metrics/needle.py",
        "self.counts[0] += (wrong == 0).sum()",
        "self.counts[0] += (wrong <= 1).sum()",
        ("tests/test_needle.py", "tests/test_metrics.py"),
    ),
    # Tasks
    Fault(
        "task",
        "layerzoo/data/mqar.py",
        "lag[rows, queries] = queries - value_at",
        "lag[rows, queries] = queries - value_at + 1",
        TASKS,
    ),
    Fault(
        "task",
        "layerzoo/data/mqar.py",
        "values = half + choose(half, D, bits(*key, 1, np.arange(D)))",
        "values = half + choose(half, D, bits(*key, 0, np.arange(D)))",
        TASKS,
    ),
    Fault(
        "task",
        "layerzoo/data/overwrite.py",
        '"between": at_queries(U - 1 - last),',
        '"between": at_queries(U - last),',
        ("tests/test_overwrite.py", *TASKS),
    ),
    Fault(
        "task",
        "layerzoo/data/random.py",
        "other = n + below(population - n, random[:, n])",
        "other = below(population, random[:, n])",
        (*TASKS, "tests/test_tasks.py"),
    ),
    Fault(
        "task",
        "layerzoo/data/random.py",
        "left[rows, drawn[:, n]] = 0",
        "pass",
        TASKS,
    ),
    Fault(
        "task",
        "layerzoo/data/loading.py",
        'return {"done": self.done % (self.limit or len(self))}',
        'return {"done": self.done}',
        (*RESUME, "tests/test_tasks.py"),
    ),
    # Grids
    Fault(
        "grid",
        "ablations/cells/cell.py",
        '    if digest:\n        tree["digest"] = {**digest}\n',
        "",
        ("tests/test_grid_data.py", *GRID),
    ),
    Fault(
        "grid",
        "ablations/cells/arms.py",
        "arms = [arm for arm in arms if len(arm.items() - firsts.items()) <= 1]",
        "arms = [arm for arm in arms if len(arm.items() - firsts.items()) <= 2]",
        GRID,
    ),
    Fault(
        "grid",
        "ablations/cells/tune.py",
        "best = min(finished, key=lambda t: (-t.seeds, sign * (t.mean or 0.0)), default=None)",
        "best = min(finished, key=lambda t: sign * (t.mean or 0.0), default=None)",
        GRID,
    ),
    Fault(
        "grid",
        "ablations/cells/match.py",
        "    if abs(share(here)) <= match.tolerance:\n        return config, {}\n",
        "    if share(here) <= match.tolerance:\n        return config, {}\n",
        ("tests/test_match.py",),
    ),
    Fault(
        "grid",
        "ablations/cells/differences.py",
        'return "told" if both or solved or tuned.has(each, 0) else "hidden"',
        'return "told" if any(wrote) or solved or tuned.has(each, 0) else "hidden"',
        ("tests/test_confounds.py",),
    ),
    Fault(
        "grid",
        "ablations/cells/confounds.py",
        "if most is not None and ratios[most] > 1 + SIZE_TOLERANCE:",
        "if most is not None and ratios[most] > 2 + SIZE_TOLERANCE:",
        ("tests/test_confounds.py",),
    ),
    # Statistics
    Fault(
        "statistics",
        "ablations/reporting/statistics.py",
        "spread = float(np.std(values, ddof=1)) / math.sqrt(n)",
        "spread = float(np.std(values)) / math.sqrt(n)",
        REPORT,
    ),
    Fault(
        "statistics",
        "ablations/reporting/statistics.py",
        "half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * spread",
        "half = float(stats.norm.ppf((1 + confidence) / 2)) * spread",
        REPORT,
    ),
    Fault(
        "statistics",
        "ablations/reporting/statistics.py",
        "np.arange(len(p), 0, -1)",
        "len(p)",
        REPORT,
    ),
    Fault(
        "statistics",
        "ablations/reporting/comparisons.py",
        "return self.measured * self.expected > 0",
        "return self.measured >= 0",
        ("tests/test_validate.py", "tests/test_report.py"),
    ),
    Fault(
        "statistics",
        "ablations/reporting/power_laws.py",
        "gradient[1:n:2] = -shares[: self.variables] * u.T",
        "gradient[1:n:2] = -shares[: self.variables]",
        ("tests/test_scaling.py",),
    ),
    # Resume
    Fault(
        "resume",
        "layerzoo/train/checkpoints.py",
        '    torch.set_rng_state(state["torch"])\n',
        "",
        RESUME,
    ),
    Fault(
        "resume",
        "layerzoo/train/checkpoints.py",
        "newest = sorted(others, key=others.__getitem__, reverse=True)",
        "newest = sorted(others, key=others.__getitem__)",
        RESUME,
    ),
    Fault(
        "resume",
        "layerzoo/train/resumed.py",
        "if name not in read and given != before and not chosen:",
        "if name in read and given != before and not chosen:",
        RESUME,
    ),
    Fault(
        "resume",
        "layerzoo/train/older_checkpoints.py",
        'before = {name: False for name in ("qk_norm", "out_gate") if name in fields}',
        "before = {}",
        ("tests/test_shell.py", *RESUME),
    ),
    # Pretrained models
    Fault(
        "hf",
        "layerzoo/hf/model.py",
        "        for module, values in model.constants.items():\n"
        "            for name, value in values.items():\n"
        "                module.get_buffer(name).copy_(value)\n",
        "",
        HF,
    ),
    Fault(
        "hf",
        "layerzoo/hf/model.py",
        "        if self.alone and isinstance(mixer, Parallel):\n            y, first",
        "        if isinstance(mixer, Parallel):\n            y, first",
        HF,
    ),
    Fault(
        "hf",
        "layerzoo/hf/model.py",
        "if id(parameter) not in theirs:",
        "if id(parameter) in theirs:",
        (*HF, "tests/test_distil.py"),
    ),
]
