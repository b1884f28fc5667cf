"""One-pass causal fitting against its definition, and everything that can go wrong in it."""

import gc
from dataclasses import dataclass, replace

import pytest
import torch
from greenlet import greenlet
from torch import nn

import tiny_models
from actmaps.maps import ESTIMATORS, METHODS, ActMap, ActMapMetadata, AffineMap, find_sites, fit_map, steer
from actmaps.maps.affine import transport
from actmaps.maps.methods import TRANSPORTS
from actmaps.maps.pooling import samples
from actmaps.maps.sites import resolve


def normal(*shape, mean=0.0, std=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std + mean


def fit(model, source, target, **options):
    return fit_map(model, source, target, progress=False, **options)


@pytest.fixture(autouse=True, scope="module")
def _only_new_objects_are_searched():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_greenlets():
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), greenlet) and found and found.gr_frame]


def hooks(*models):
    modules = [module for model in models for module in model.modules()]
    return sum(len(module._forward_hooks) + ("forward" in vars(module)) for module in modules)


# The definition, naively: one pass over all data per site, with the maps of the sites before it applied.


class _Enough(Exception):
    pass


def pass_per_site(
    model, sides, sites, method="linear", pooling="none", positions=None, causal=True, moved=("source",)
):
    """Maps by definition 3.2 of the paper. `sites` in execution order; `sides` maps "source" and "target" to batches."""
    component = sites[0].split(".")[0]
    places = resolve({component: model}, sites, "the test")
    maps = {}
    for site in sites:
        collected = {"source": [], "target": []}
        for side, batches in sides.items():
            for batch in batches:
                handles = []
                mask = batch.get("attention_mask") if isinstance(batch, dict) else None

                def collect(_module, _args, x, into=collected[side], mask=mask, site=site):
                    dim = places[site].channel_dim(x)
                    options = {"pooling": pooling, "positions": positions, "site": site, "mask": mask}
                    into.append(samples(x, channel_dim=dim, **options))
                    raise _Enough

                def move(site, x):
                    return transport(x, maps[site].scale, maps[site].shift, channel_dim=places[site].channel_dim(x))

                for done in maps if causal and side in moved else ():
                    hook = lambda m, a, x, done=done: move(done, x)  # noqa: E731
                    handles.append(places[done].module.register_forward_hook(hook))
                handles.append(places[site].module.register_forward_hook(collect))
                try:
                    with torch.no_grad():
                        model(**batch) if isinstance(batch, dict) else model(batch)
                except _Enough:
                    pass
                finally:
                    for handle in handles:
                        handle.remove()
        maps[site] = ESTIMATORS[method](torch.cat(collected["source"]), torch.cat(collected["target"]))
    return maps


def assert_equal_maps(one, other, tolerance=1e-6):
    """Equal to `tolerance`, relative to the largest scale and shift of the site."""
    assert list(one) == list(other)
    for site in one:
        for part in ("scale", "shift"):
            a, b = getattr(one[site], part), getattr(other[site], part)
            assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1), (site, part)


@dataclass
class Case:
    """A model with sites in execution order, and four source and three target prompts as one micro-batch each."""

    model: nn.Module
    sides: dict
    sites: list

    def cut(self, source, target):
        """The same prompts in micro-batches of the given sizes."""
        return {"source": _cut(self.sides["source"][0], source), "target": _cut(self.sides["target"][0], target)}


def _cut(batch, sizes):
    if isinstance(batch, dict):
        rows = zip(*(value.split(sizes) for value in batch.values()), strict=True)
        return [dict(zip(batch, values, strict=True)) for values in rows]
    return list(batch.split(sizes))


def chain_case():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(4))).eval()
    sides = {"source": [normal(4, 5, 6)], "target": [normal(3, 5, 6, mean=0.5, std=1.5, seed=1)]}
    return Case(model, sides, [f"model.{i}.1" for i in range(4)])


def unet_case():
    """Every third norm of a U-Net, whose registration order is not its execution order."""
    torch.manual_seed(1)
    model = tiny_models.unet()

    def batch(rows, seed, mean):
        return {
            "sample": normal(rows, 4, 8, 8, seed=seed),
            "timestep": torch.linspace(1, 900, rows).long(),
            "encoder_hidden_states": normal(rows, 5, 32, mean=mean, seed=seed + 10),
        }

    source, target = batch(4, 0, 0.0), batch(3, 1, 0.7)
    return Case(model, {"source": [source], "target": [target]}, find_sites(model, example=source)[::3])


def text_case():
    """A text encoder whose prompts have 3 to 9 real tokens."""
    torch.manual_seed(2)
    model = tiny_models.text_encoder(40)

    def batch(rows, seed):
        ids = torch.randint(0, 38, (rows, 10), generator=torch.Generator().manual_seed(seed))
        mask = torch.arange(10) < torch.tensor([5, 9, 3, 7])[:rows, None]
        return {"input_ids": ids, "attention_mask": mask.long()}

    source, target = batch(4, 0), batch(3, 1)
    return Case(model, {"source": [source], "target": [target]}, find_sites(model, example=source))


CASES = {"chain": chain_case, "unet": unet_case, "text": text_case}
CUTS = {"one": ([4], [3]), "many": ([1] * 4, [1] * 3), "unequal": ([1, 3], [2, 1])}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("transport_target", [False, True])
@pytest.mark.parametrize("method", TRANSPORTS)
def test_one_pass_gives_the_maps_of_the_definition(case, method, transport_target, cut):
    sides = case.cut(*CUTS[cut])
    found = fit(
        case.model, **sides, sites=case.sites, method=method, transport_target=transport_target, positions=None
    )
    moved = ("source", "target") if transport_target else ("source",)
    assert_equal_maps(found, pass_per_site(case.model, sides, case.sites, method, moved=moved))


@pytest.mark.parametrize("pooling", ["mean", "last", "max", "min"])
@pytest.mark.parametrize("method", TRANSPORTS)
def test_one_pass_gives_the_maps_of_the_definition_for_every_pooling(case, method, pooling):
    sides = case.cut(*CUTS["unequal"])
    found = fit(case.model, **sides, sites=case.sites, method=method, pooling=pooling)
    assert_equal_maps(found, pass_per_site(case.model, sides, case.sites, method, pooling))


@pytest.mark.parametrize("method", TRANSPORTS)
def test_fitted_at_once_every_site_sees_the_unmodified_model(case, method):
    sides = case.cut(*CUTS["unequal"])
    found = fit(case.model, **sides, sites=case.sites, method=method, causal=False, positions=3)
    assert_equal_maps(found, pass_per_site(case.model, sides, case.sites, method, positions=3, causal=False))
    causal = fit(case.model, **sides, sites=case.sites, method=method, positions=3)
    assert torch.equal(found[case.sites[0]].shift, causal[case.sites[0]].shift)
    assert not torch.allclose(found[case.sites[-1]].shift, causal[case.sites[-1]].shift, atol=1e-3)


def test_how_prompts_are_cut_does_not_matter(case):
    whole, *cut = (fit(case.model, **case.cut(*rows), sites=case.sites, positions=3) for rows in CUTS.values())
    by_size = fit(case.model, **case.sides, sites=case.sites, positions=3, batch_size=2)
    for other in (*cut, by_size):
        assert_equal_maps(other, whole, 1e-4)  # kernels of other batch sizes round differently


def test_sites_come_in_execution_order_without_an_example():
    case = unet_case()
    sites = list(fit(case.model, **case.sides))
    assert sites[::3] == case.sites
    assert sites != find_sites(case.model)


def test_the_last_site_is_moved_onto_the_target(case):
    act_map = fit(case.model, **case.sides, sites=case.sites, method="gaussian", positions=None)
    before, after = act_map.metadata.costs[case.sites[-1]]
    assert 0 <= after < 1e-4 * before


# Closed forms


class Scaled(nn.Module):
    """x -> factor * x + offset, a site without parameters."""

    def __init__(self, factor, offset):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x):
        return self.factor * x + self.offset


def scaled_chain():
    """x -> 2 x + 1 -> -1 (2 x + 1) + 3 -> half of that."""
    return nn.Sequential(Scaled(2.0, 1.0), Scaled(-1.0, 3.0), Scaled(0.5, 0.0))


SITES = ["model.0", "model.1", "model.2"]
SOURCE = torch.tensor([[-1.0], [0.0], [1.0]])


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("transport_target", [False, True])
def test_causal_maps_of_a_chain_on_paper(method, transport_target):
    # Target 3 x + 5 arrives at site 0 as 6 x + 11, the source as 2 x + 1: slope 3, shift 8. Moved source equals target from
    # there on, so later maps are the identity; where targets move as well, these start at 18 x + 41.
    act_map = fit(
        scaled_chain(), [SOURCE], [3 * SOURCE + 5], sites=SITES, method=method, transport_target=transport_target
    )
    expected = {"model.0": (3, 8)}
    if transport_target:
        # source -(6 x + 11) + 3 = -6 x - 8; target -18 x - 38: slope 3, shift -14; both moved: -18 x - 38, -54 x - 128; halved
        expected |= {"model.1": (3, -14), "model.2": (3, -7)}
    else:
        expected |= {"model.1": (1, 0), "model.2": (1, 0)}
    for site, (scale, shift) in expected.items():
        assert act_map[site].scale.item() == pytest.approx(scale, abs=1e-6)
        assert act_map[site].shift.item() == pytest.approx(shift, abs=1e-5)


def test_simultaneous_maps_of_a_chain_on_paper():
    act_map = fit(scaled_chain(), [SOURCE], [3 * SOURCE + 5], sites=SITES, causal=False)
    # 2 x + 1 to 6 x + 11; -2 x + 2 to -6 x - 8; -x + 1 to -3 x - 4
    assert {site: (m.scale.item(), m.shift.item()) for site, m in act_map.items()} == {
        "model.0": (3.0, 8.0),
        "model.1": (3.0, -14.0),
        "model.2": (3.0, -7.0),
    }


@pytest.mark.parametrize("support", ["observed", (0.0, 1.0)])
def test_support_bounds_are_the_range_of_the_arriving_source(support):
    act_map = fit(scaled_chain(), [SOURCE], [3 * SOURCE + 5], sites=SITES, method="mean", support=support)
    # source moved by 10 at site 0: 2 x + 11, then -2 x - 8
    bounds = {site: (m.lower.item(), m.upper.item()) for site, m in act_map.items()}
    assert bounds["model.0"] == (-1.0, 3.0)
    assert bounds["model.1"] == (-10.0, -6.0)
    assert act_map.metadata.support == support


def test_sources_outside_a_quantile_support_are_not_moved_while_fitting():
    source = torch.arange(11.0)[:, None]
    act_map = fit(
        nn.Sequential(Scaled(1, 0), Scaled(1, 0)),
        [source],
        [source + 10],
        sites=SITES[:2],
        method="mean",
        support=(0.1, 0.9),
    )
    assert act_map["model.1"].shift.item() == pytest.approx(10 - 90 / 11)  # nine of eleven have moved


def test_the_shift_rule_is_used_while_fitting():
    model = nn.Sequential(nn.GroupNorm(1, 2), nn.GroupNorm(2, 2)).eval()
    source, target = normal(6, 2, 4, 4), normal(6, 2, 4, 4, std=3, mean=1, seed=1)
    model[0].weight.data.fill_(2.0)
    affine, shift = (fit(model, [source], [target], spatial=rule, pooling="mean") for rule in ("affine", "shift"))
    assert torch.equal(affine["model.0"].scale, shift["model.0"].scale)
    assert not torch.allclose(affine["model.1"].scale, shift["model.1"].scale)
    assert shift.metadata.spatial == "shift"


class Twice(nn.Module):
    """One norm that runs twice."""

    def __init__(self):
        super().__init__()
        self.norm, self.middle, self.seen = Scaled(1.0, 0.0), Scaled(1.0, 100.0), []

    def forward(self, x):
        first = self.norm(x)
        second = self.norm(self.middle(first))
        self.seen.append((first.flatten().tolist(), second.flatten().tolist()))
        return second


def test_a_site_that_runs_twice_is_fitted_at_its_first_visit_and_applied_at_both():
    model = Twice()
    act_map = fit(model, [SOURCE], [SOURCE + 7], sites=["norm", "middle"], method="mean")
    assert act_map["model.norm"].shift.item() == 7
    assert act_map["model.middle"].shift.item() == 0  # the source has been moved before it
    model = Twice()
    whole = nn.Sequential(model, Scaled(1.0, 0.0))
    fit(whole, [SOURCE], [SOURCE + 7], sites=["norm", "1"], method="mean")
    assert model.seen[0] == ([6.0, 7.0, 8.0], [113.0, 114.0, 115.0])
    assert model.seen[1] == ([6.0, 7.0, 8.0], [106.0, 107.0, 108.0])


def test_steering_that_is_armed_is_seen_by_the_fit():
    model = scaled_chain()
    armed = ActMap({"model.0": AffineMap(torch.tensor([1.0]), torch.tensor([10.0]))})
    with steer(model, armed):
        act_map = fit(model, [SOURCE], [SOURCE], sites=["0"], support="observed")
    assert (act_map["model.0"].lower.item(), act_map["model.0"].upper.item()) == (9.0, 13.0)


# Inputs


def test_padding_never_counts():
    model = tiny_models.text_encoder(40)
    ids = torch.randint(0, 38, (6, 8), generator=torch.Generator().manual_seed(0))
    lengths = [3, 5, 8, 2, 4, 6]
    mask = (torch.arange(8) < torch.tensor(lengths)[:, None]).long()
    alone = [{"input_ids": row[None, :n]} for row, n in zip(ids, lengths, strict=True)]
    padded = {"input_ids": ids, "attention_mask": mask}
    target = [{"input_ids": ids.flip(1)}]
    for pooling in ("none", "mean"):
        one = fit(model, [padded], target, positions=None, pooling=pooling)
        other = fit(model, alone, target, positions=None, pooling=pooling)
        assert_equal_maps(one, other, 1e-4)


def test_components_and_forward():
    first, second = nn.LayerNorm(3), nn.LayerNorm(3)
    components = {"text_encoder": nn.Sequential(first), "unet": nn.Sequential(second)}
    source, target = [{"prompt": normal(4, 3)}], [{"prompt": normal(5, 3, seed=1)}, {"prompt": normal(3, 3, seed=2)}]
    act_map = fit(components, source, target, forward=lambda batch: second(first(batch["prompt"])))
    assert list(act_map) == ["text_encoder.0", "unet.0"]
    assert (act_map.metadata.n_source, act_map.metadata.n_target) == (4, 8)
    assert act_map.metadata.architecture == {"text_encoder": "Sequential", "unet": "Sequential"}


def test_sites_that_the_forward_does_not_reach():
    model = nn.ModuleDict({"used": nn.LayerNorm(3), "unused": nn.LayerNorm(3)})
    arguments = [normal(4, 3)], [normal(4, 3, seed=1)]
    options = {"forward": lambda x: model["used"](x)}
    assert list(fit(model, *arguments, **options)) == ["model.used"]
    with pytest.raises(ValueError, match=r"1 of 2 sites were never reached by the forward, for example model\.unused"):
        fit(model, *arguments, sites=["used", "unused"], **options)
    with pytest.raises(ValueError, match="2 of 2 sites were never reached"):
        fit(model, *arguments, forward=lambda x: x)


def test_batch_size_cuts_mappings_with_nested_and_scalar_entries():
    model, seen = nn.Sequential(nn.LayerNorm(2)), []

    def forward(batch):
        seen.append((tuple(batch["x"].shape), tuple(batch["extra"]["ids"].shape), batch["t"].item(), batch["names"]))
        model(batch["x"])

    batch = {"x": normal(5, 2), "extra": {"ids": torch.zeros(5, 3)}, "t": torch.tensor(9), "names": list("abcde")}
    fit(model, [batch], [batch], forward=forward, batch_size=2)
    assert seen[:3] == [((2, 2), (2, 3), 9, ["a", "b"]), ((2, 2), (2, 3), 9, ["c", "d"]), ((1, 2), (1, 3), 9, ["e"])]


def test_what_is_recorded():
    given = ActMapMetadata(name="anime", licence="CC0-1.0", n_source=99, created="")
    act_map = fit(
        scaled_chain(), [SOURCE], [SOURCE + 1], sites=SITES, method="mean", positions=16, seed=5, metadata=given
    )
    metadata = act_map.metadata
    assert (metadata.name, metadata.licence, metadata.n_source, metadata.n_target) == ("anime", "CC0-1.0", 99, 3)
    assert (metadata.method, metadata.pooling, metadata.positions, metadata.seed) == ("mean", "none", 16, 5)
    assert (metadata.support, metadata.spatial, metadata.causal, metadata.transport_target) == (
        "all",
        "affine",
        True,
        False,
    )
    assert metadata.created.endswith("+00:00")
    assert torch.__version__.startswith(metadata.libraries["torch"])
    assert metadata.costs["model.0"] == (4.0, 0.0)  # 2 (x + 1) + 1 lies 2 from 2 x + 1
    assert fit(scaled_chain(), [SOURCE], [SOURCE], sites=SITES, pooling="mean").metadata.positions is None


def test_progress_counts_sites(capsys):
    fit_map(scaled_chain(), [SOURCE], [SOURCE], sites=SITES)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_float32_statistics(dtype):
    model = nn.Sequential(nn.LayerNorm(4)).to(dtype)
    source, target = normal(64, 3, 4).to(dtype), normal(64, 3, 4, mean=2, seed=1).to(dtype)
    act_map = fit(model, [source], [target], positions=None)
    with torch.no_grad():
        expected = ESTIMATORS["linear"](model(source).flatten(0, 1).float(), model(target).flatten(0, 1).float())
    assert_equal_maps(act_map, {"model.0": expected}, 1e-7)


def test_training_mode_is_off_while_fitting_and_back_after():
    model = nn.Sequential(nn.LayerNorm(3), nn.Dropout(0.9), nn.LayerNorm(3)).train()
    model[2].eval()
    source, target = [normal(8, 3)], [normal(8, 3, seed=1)]
    assert_equal_maps(fit(model, source, target), fit(model, source, target), 0)
    assert [module.training for module in model] == [True, True, False]


# Refusals


def test_exact_contract_for_bad_input():
    model, batch = scaled_chain(), [SOURCE]
    for source, target, message in (
        ([], batch, "the source set is empty: give at least one micro-batch of source prompts"),
        (batch, (), "the target set is empty"),
        (SOURCE, batch, "source must be a sequence of micro-batches, got Tensor; wrap a single one in a list"),
        (batch, {"x": SOURCE}, "target must be a sequence of micro-batches, got dict"),
        ("prompt", batch, "source must be a sequence of micro-batches, got str"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, source, target, sites=SITES)
    for option, message in (
        ({"method": "linaer"}, "method must be one of linear, mean, gaussian.*, got 'linaer'"),
        ({"pooling": "median"}, "pooling must be one of none, mean, last, max, min, got 'median'"),
        ({"spatial": "none"}, "spatial must be one of affine, shift, got 'none'"),
        ({"support": "some"}, 'support must be "all", "observed" or quantiles'),
        ({"support": (0.9, 0.1)}, 'support must be "all", "observed" or quantiles'),
        ({"positions": 0}, "positions must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sites": ["model.7"]}, r"'model\.7' is not in the model; closest: model\."),
        ({"sites": "0"}, r"site pattern '0' matches no site; closest: "),
        ({"sites": []}, "list of site patterns is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(model, batch, batch, **{"sites": SITES, **option})
    with pytest.raises(ValueError, match="no normalisation layer"):
        fit(model, batch, batch)
    with pytest.raises(ValueError, match=r"with several components \(a, b\) give `forward`"):
        fit({"a": model, "b": model}, batch, batch, sites=["a.0"])
    with pytest.raises(
        ValueError, match=r"cannot count the rows of a micro-batch \(dict\): its entries have \[1, 2\] rows"
    ):
        fit(model, [{"a": torch.ones(1), "b": torch.ones(2)}], batch, sites=SITES, batch_size=1)
    assert hooks(model) == 0


def test_one_prompt_has_no_slope_but_a_mean():
    with pytest.raises(
        ValueError, match=r"model\.0: method 'linear' needs at least 2 source samples, got 1; add prompts"
    ):
        fit(scaled_chain(), [SOURCE[:1]], [SOURCE], sites=SITES)
    with pytest.raises(ValueError, match=r"model\.0: method 'gaussian' needs at least 2 target samples, got 1"):
        fit(scaled_chain(), [SOURCE], [SOURCE[:1]], sites=SITES, method="gaussian")
    assert fit(scaled_chain(), [SOURCE[:1]], [SOURCE[2:]], sites=SITES, method="mean")["model.0"].shift.item() == 4


def test_units_that_differ_between_the_sets_are_refused_by_site():
    with pytest.raises(ValueError, match=r"model\.0: samples must be .* got \(3, 1\) and \(3, 2\)"):
        fit(scaled_chain(), [SOURCE], [SOURCE.repeat(1, 2)], sites=SITES)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["source", "target"])
def test_activations_that_are_not_finite_are_refused_by_site(side, bad):
    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(x > 50, bad, x)

    model = nn.Sequential(Scaled(1, 0), Breaks(), Scaled(1, 0))
    sides = {"source": [SOURCE], "target": [SOURCE]}
    sides[side] = [SOURCE + 100]
    with pytest.raises(ValueError, match=rf"model\.1: the {side} activations have NaN or infinite entries"):
        fit(model, **sides, sites=SITES, transport_target=True, causal=False)
    assert hooks(model) == 0
    assert live_greenlets() == []


# Ends


class Fails(nn.Module):
    """Raises on the marked micro-batch, and notes which forwards were unwound."""

    def __init__(self, error):
        super().__init__()
        self.first, self.second, self.error, self.log = Scaled(1, 0), Scaled(1, 0), error, []

    def forward(self, x):
        mark = x[0, 0].item()
        try:
            y = self.first(x)
            if mark == 3:
                raise self.error
            return self.second(y)
        finally:
            self.log.append(mark)


def marked(*marks):
    return [torch.full((2, 1), float(mark)) + torch.tensor([[0.0], [1.0]]) for mark in marks]


@pytest.mark.parametrize("error", [RuntimeError("out of tune"), KeyboardInterrupt(), SystemExit(2)])
def test_an_exception_in_one_micro_batch_ends_all(error):
    model = Fails(error).train()
    with pytest.raises(type(error)) as raised:
        fit(model, marked(1, 2, 3, 4), marked(5, 6), sites=["first", "second"])
    assert raised.value is error
    assert sorted(model.log) == [1, 2, 3, 4, 5, 6]  # every forward was unwound
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())
    raised.value.__traceback__ = None
    assert live_greenlets() == []


def test_an_interrupt_while_a_map_is_fitted_ends_all():
    def interrupted(*_):
        raise KeyboardInterrupt

    model, method = Fails(None).train(), replace(METHODS["linear"], estimator=interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, marked(1, 2), marked(5), sites=["first", "second"], method=method)
    assert (sorted(model.log), hooks(model), live_greenlets()) == ([1, 2, 5], 0, [])
    assert all(module.training for module in model.modules())


def test_an_exception_while_unwinding_does_not_spare_the_others():
    class Stubborn(Fails):
        def forward(self, x):
            try:
                return super().forward(x)
            except BaseException as error:
                if x[0, 0] in (1, 4):
                    raise ValueError("while unwinding") from error
                raise

    model = Stubborn(RuntimeError("first"))
    with pytest.raises((RuntimeError, ValueError)):
        fit(model, marked(1, 2, 3, 4), marked(5), sites=["first", "second"])
    assert (sorted(model.log), hooks(model), live_greenlets()) == ([1, 2, 3, 4, 5], 0, [])


def test_a_forward_that_survives_its_end_runs_on_unhooked():
    class Survivor(Fails):
        def forward(self, x):
            try:
                return super().forward(x)
            except BaseException:
                return self.second(self.first(x))

    model = Survivor(RuntimeError())
    fit(model, marked(1, 2), marked(5), sites=["first"])
    assert (hooks(model), live_greenlets()) == (0, [])


def test_forwards_are_ended_when_the_last_site_is_fitted():
    model = Fails(None)
    after = []
    fit(model, marked(1, 2), marked(5), sites=["first"], forward=lambda x: after.append(model(x)))
    assert (after, sorted(model.log), live_greenlets()) == ([], [1, 2, 5], [])


def test_micro_batches_that_take_different_paths_are_refused():
    class Forks(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Scaled(1, 0), Scaled(1, 0)

        def forward(self, x):
            return self.left(x) if x.mean() > 0 else self.right(x)

    model = Forks()
    message = r"take different paths through the model: some arrive at model\.left and others at model\.right"
    with pytest.raises(ValueError, match=message):
        fit(model, [SOURCE + 5], [SOURCE - 5], sites=["left", "right"])
    with pytest.raises(ValueError, match=r"some arrive at model\.left and others at the end"):
        fit(model, [SOURCE + 5], [SOURCE - 5], sites=["left"])
    assert (hooks(model), live_greenlets()) == (0, [])


def test_too_little_memory_ends_the_fit_with_advice(monkeypatch):
    model, left = scaled_chain().train(), iter([(8 << 30, 16 << 30), (1 << 29, 16 << 30)])
    monkeypatch.setattr("actmaps.maps.fitting.available_memory", lambda _device: next(left))
    monkeypatch.setattr("actmaps.maps.fitting.monotonic", iter(range(100)).__next__)
    message = r"only 0\.5 of 16\.0 GiB are free on cpu while 2 of 3 micro-batches .*smaller `positions`"
    with pytest.raises(MemoryError, match=message):
        fit(model, [SOURCE, SOURCE], [SOURCE], sites=SITES)
    assert (hooks(model), live_greenlets(), model.training) == (0, [], True)


def test_where_memory_is_unknown_the_fit_goes_on(monkeypatch):
    monkeypatch.setattr("actmaps.maps.fitting.available_memory", lambda _device: (0, 0))
    assert len(fit(scaled_chain(), [SOURCE], [SOURCE], sites=SITES)) == 3


def test_no_gradient_is_recorded_and_the_grad_mode_comes_back():
    model, seen = nn.Sequential(nn.LayerNorm(3)), []
    fit(model, [normal(4, 3)], [normal(4, 3)], forward=lambda x: seen.append(torch.is_grad_enabled()) or model(x))
    assert seen == [False, False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("outside", ["plain", "inference", "autocast"])
@pytest.mark.parametrize("inside", ["enable_grad", "inference", "autocast", "autocast off"])
def test_modes_that_forwards_enter_neither_mix_nor_leak(inside, outside):
    contexts = {
        "plain": torch.enable_grad,
        "enable_grad": torch.enable_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "autocast off": lambda: torch.autocast("cpu", enabled=False),
    }

    def modes():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
        )

    model, seen, before = nn.Sequential(*scaled_chain(), Scaled(1.0, 0.0)), [], []

    def forward(x):
        before.append(modes())
        x = model[0](x)
        with contexts[inside]():
            expected = modes()
            x = model[1](x)
            seen.append(modes() == expected)
            x = model[2](x)
            seen.append(modes() == expected)
        seen.append(modes() == before[0])

    with contexts[outside]():
        outer = modes()
        fit(model, [SOURCE, SOURCE], [SOURCE], forward=lambda x: [forward(x), model[3](x)], sites=[*SITES, "model.3"])
        assert modes() == outer
        fit(model, [SOURCE, SOURCE], [SOURCE], forward=forward, sites=SITES)  # unwound within the modes
        assert modes() == outer
    assert all(seen)
    assert len(set(before)) == 1


def test_samples_of_a_site_are_freed_when_its_map_is_fitted():
    """On the way from one site to the next, only samples of the next one are alive: of those that have arrived there."""
    alive = []

    class Counts(nn.Module):
        def forward(self, x):
            shapes = [t.shape for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
            alive.append(shapes.count((50 * 7, 1)))
            return x

    model = nn.Sequential(Scaled(1, 0), Counts(), Scaled(1, 0))
    fit(model, [normal(50, 40, 1)] * 3, [normal(50, 40, 1)] * 3, sites=["0", "2"], positions=7)
    assert alive == [0, 1, 2, 3, 4, 5]
