"""The benchmarks end to end at their smallest: what they report must be right, whatever the time that it took."""

import importlib
import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch):
    """Import a module of the benchmarks folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def figures(main, path, *arguments):
    """Run a benchmark's main function and read what it writes."""
    main([*arguments, "--threads", "1", "--json", str(path / "figures.json")])
    return json.loads((path / "figures.json").read_text())


def test_ratios_are_medians_of_the_ratios_within_rounds(benchmark):
    timings = benchmark("measuring").Timings(wall={"a": [2.0, 6.0, 40.0], "b": [1.0, 2.0, 10.0]})

    assert timings.seconds("a") == 6.0
    assert timings.ratio("a", "b") == 3.0
    assert timings.spread("a", "b") == (2.5, 3.5)


def test_every_round_times_each_setup_once_after_a_run_that_does_not_count(benchmark):
    ran = []
    setups = {name: lambda name=name: nullcontext(lambda: ran.append(name)) for name in "ab"}

    timings = benchmark("measuring").side_by_side(setups, 2, CPU)

    assert ran == list("bbaaaabb")
    assert [len(times) for times in timings.wall.values()] == [2, 2]


@pytest.mark.parametrize(
    ("name", "sites", "parameters"),
    [("unet", 109, 860), ("sdxl", 256, 2567), ("flux", 76, 11891), ("llama", 65, 8030)],
)
def test_real_models_have_the_real_number_of_sites_and_parameters(benchmark, name, sites, parameters):
    subject = benchmark("random_models").build(name, torch.device("meta"), torch.bfloat16, real=True)

    assert len(subject.random_map()) == sites
    assert round(sum(p.numel() for p in subject.module.parameters()) / 1e6) == parameters
    assert {p.dtype for p in subject.module.parameters()} == {torch.bfloat16}


def test_reduced_sdxl_has_the_sites_of_the_real_one(benchmark):
    build = benchmark("random_models").build

    real, reduced = (build("sdxl", torch.device("meta"), real=real).random_map() for real in (True, False))

    assert list(reduced) == list(real)
    assert sum(affine.channels for affine in real.values()) == 294080


@pytest.mark.slow
def test_fit_cost_finds_the_maps_of_a_pass_per_site(benchmark, tmp_path):
    found = figures(
        benchmark("fit_cost").main, tmp_path, "--model", "sdxl", "llama", "--size", "8", "--prompts", "4",
        "--batch-size", "2", "--repeats", "1", "--reference-sites", "2", "--memory-prompts", "4",
    )  # fmt: skip

    sdxl, llama = found["time"]
    assert (sdxl["sites"], llama["sites"]) == (256, 33)
    assert max(cost["difference"] for cost in (sdxl, llama)) < 1e-5
    assert all(cost["per_site"] > cost["ours"] > 0 for cost in (sdxl, llama))
    assert found["memory"][0]["peak"] > found["memory"][0]["before"] > 0


def test_overhead_compares_the_variants_of_a_unet(benchmark, tmp_path):
    arguments = ["--model", "sdxl", "--size", "8", "--rounds", "2", "--variant", "plain again", "hooks", "rows"]

    rows = figures(benchmark("overhead").main, tmp_path, *arguments)["rows"]

    assert [row["variant"] for row in rows] == ["plain", "plain again", "hooks", "rows"]
    assert rows[0]["ratio"] == 1
    assert all(row["compared_with"] == "plain" and row["milliseconds"] > 0 for row in rows)


def test_overhead_row_strengths_steer_the_conditional_row_only(benchmark):
    run = benchmark("overhead").denoising(benchmark("random_models").build("flux", CPU, size=4), 4)

    assert run.rows.tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_overhead_compiled_models_are_steered_too(benchmark, tmp_path):
    arguments = ["--model", "llama", "--tokens", "3", "--rounds", "1", "--backend", "aot_eager", "--variant"]

    rows = figures(benchmark("overhead").main, tmp_path, *arguments, "hooks", "compiled hooks", "compiled")["rows"]

    plain, hooks, steered, compiled = rows
    assert (hooks["compared_with"], steered["compared_with"], compiled["compared_with"]) == (
        "plain",
        "compiled",
        "plain",
    )
    assert steered["deviation"] < 1e-4  # 1 if the hooks were left out
    assert plain["per_second"] == pytest.approx(1000 / plain["milliseconds"])


def test_overhead_folded_models_do_what_hooks_do_and_blocks_cannot_fold(benchmark, tmp_path, capsys):
    arguments = ["--model", "sdxl", "flux", "--size", "8", "--rounds", "1", "--variant", "hooks", "folded"]

    rows = figures(benchmark("overhead").main, tmp_path, *arguments)["rows"]

    assert [row["variant"] for row in rows] == ["plain", "hooks", "folded", "plain", "hooks"]
    assert rows[2]["deviation"] < 1e-3
    assert "transformer of FLUX.1 cannot be folded" in capsys.readouterr().out


def test_load_times_every_step_on_sdxl(benchmark, tmp_path, capsys):
    found = figures(benchmark("load").main, tmp_path, "--rounds", "3")["milliseconds"]

    assert "256 sites, 294,080 units" in capsys.readouterr().out
    assert found["load and arm"] >= 0.5 * (found["load"] + found["arm"]) > 0
    assert {"set", "first layer again", "remove", "change the strength"} < set(found)


def test_load_counts_what_a_user_waits_for(benchmark):
    steps = {"load": 5, "arm": 3, "first layer": 2, "a layer": 1, "set": 0.5, "first layer again": 4, "remove": 9}

    sums = benchmark("load").totals({step: [value] * 2 for step, value in steps.items()})

    assert sums == {"load and arm": 9, "change the strength": 3.5}


def test_vs_reference_asks_for_a_checkout(benchmark, tmp_path):
    main = benchmark("vs_reference").main

    with pytest.raises(SystemExit, match=r"--reference is missing: git clone https://github.com/apple/ml-act"):
        main([])
    with pytest.raises(SystemExit, match=r"is no checkout of the reference, act/hooks/transport.py is not in it"):
        main(["--reference", str(tmp_path)])


def test_vs_reference_names_the_package_that_the_reference_lacks(benchmark, monkeypatch, tmp_path):
    (tmp_path / "broken_act.py").write_text("import hydra_of_lerna.utils\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(SystemExit, match="imports hydra_of_lerna, which is not installed: pip install hydra_of_lerna"):
        benchmark("reference.checkout").reference_module("broken_act")


def test_vs_reference_compares_maps_up_to_the_first_site_out_of_order(benchmark):
    from actmaps.maps import ActMap, AffineMap

    one = AffineMap(torch.tensor([1.0]), torch.tensor([0.0]))
    moved = AffineMap(torch.tensor([1.0]), torch.tensor([0.5]))
    ours = ActMap({"a": one, "b": one, "c": one})

    comparable, gaps = benchmark("reference.fitting").compare({"c": one, "a": one, "b": moved}, ours, "")

    assert (comparable, gaps) == (2, [0.0, 0.5, 0.0])


@pytest.fixture
def checkout(monkeypatch):
    """Folder of the reference, whose import is undone."""
    folder = os.environ.get("ACT_REFERENCE_DIR")
    if not folder:
        pytest.skip("set ACT_REFERENCE_DIR to a checkout of github.com/apple/ml-act to compare with it")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.mark.slow
def test_vs_reference_finds_equal_maps_and_outputs(benchmark, checkout, tmp_path):
    pytest.importorskip("sklearn", reason="the reference needs scikit-learn")

    found = figures(
        benchmark("vs_reference").main, tmp_path, "--reference", checkout, "--part", "estimators", "application",
        "differences", "--samples", "16", "--rounds", "1",
    )  # fmt: skip

    assert max(row["difference"] for row in found["estimators"]) < 1e-5
    assert max(row["difference"] for row in found["application"]) < 1e-5
    assert found["differences"][0]["ours"] == "slope 1, the mean shift"


@pytest.mark.slow
def test_vs_reference_fits_the_maps_that_its_script_fits(benchmark, checkout, tmp_path):
    for package in ("hydra", "wandb", "pandas"):
        pytest.importorskip(package, reason=f"the reference's scripts need {package}")

    found = figures(
        benchmark("vs_reference").main, tmp_path, "--reference", checkout, "--part", "fitting",
        "--case", "language", "--prompts", "16", "--rounds", "1",
    )  # fmt: skip

    (row,) = found["fitting"]
    assert row["sites"] == row["comparable"] == 32
    assert row["difference"] < 1e-3
    assert row["reference_seconds"] > row["our_seconds"]


@pytest.mark.slow
def test_processes_that_share_a_fit_get_the_map_of_one(benchmark, tmp_path):
    options = ("--model", "text_encoder", "--prompts", "4", "--batch-size", "1", "--rounds", "1", "--processes", "2")
    found = figures(benchmark("distributed_fit").main, tmp_path, *options)

    (gain,) = found["gains"]
    assert (found["processes"], gain["sites"], gain["prompts"]) == (2, 25, 4)
    assert gain["difference"] <= 1e-6
    assert gain["speed_up"] == pytest.approx(gain["alone"] / gain["together"])
