"""Fits by several processes: the same map for every number of them, and one message where one of them fails."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import rank_cases
from actmaps.maps import ActMap, Ranks

SECONDS = 240


def start(count, folder, *trouble):
    """The processes of `rank_cases`, with the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in map(str, range(count)):
        command = [sys.executable, rank_cases.__file__, rank, str(count), folder, *trouble]
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    return ranks


def ended(ranks):
    """Exit code and error output of every process."""
    outputs = [rank.communicate(timeout=SECONDS)[1] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def load(folder, case, rank):
    return ActMap.load(folder / f"{case}, rank {rank}.safetensors")


def outcomes(folder, rank):
    return json.loads((folder / f"outcomes-{rank}.json").read_text())


@pytest.fixture(scope="module", params=[1, 2, 3])
def group(request, tmp_path_factory):
    """How many processes there are, and the folder that holds what they fitted."""
    folder = tmp_path_factory.mktemp("ranks")
    for code, errors in ended(start(request.param, folder)):
        assert code == 0, errors
    return request.param, folder


@pytest.fixture(scope="module")
def expected():
    """The maps of this process alone, each fitted once."""
    return {}


def assert_same(one, other):
    """The same sites in the same order, numbers equal to 1e-6 of the largest of their site, and the same metadata."""
    assert list(one) == list(other)
    for site in one:
        for part in ("scale", "shift", "lower", "upper"):
            a, b = getattr(one[site], part), getattr(other[site], part)
            assert (a is b is None) or (a - b).abs().max() <= 1e-6 * b.abs().max().clamp_min(1), (site, part)
        assert one.metadata.costs[site] == pytest.approx(other.metadata.costs[site], rel=1e-4, abs=1e-6)
    metadata, expected = (replace(act_map.metadata, created="", costs={}) for act_map in (one, other))
    assert metadata == expected


# Equal maps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", rank_cases.CASES)
def test_the_map_does_not_depend_on_the_number_of_processes(group, expected, case):
    count, folder = group
    if case not in expected:
        expected[case] = rank_cases.CASES[case]()
    maps = [load(folder, case, rank) for rank in range(count)]
    for found in maps:
        assert_same(found, expected[case])
    assert len({found.metadata.created for found in maps}) == 1


def test_metadata_count_the_prompts_of_all_processes(group):
    _, folder = group
    data = load(folder, "llama", 0).metadata
    assert (data.n_source, data.n_target) == (9, 10)


# Shares --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("total", [0, 1, 4, 11])
def test_shares_are_all_items_in_order(count, first, total):
    items = list(range(total))
    shares = [Ranks(rank, count).share(items, first) for rank in range(count)]
    assert [item for share in shares for item in share] == items
    assert [len(share) for share in shares] == Ranks(0, count).sizes(total, first)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_sources_and_targets_together_are_shared_evenly(count):
    for source in range(1, 9):
        for target in range(1, 9):
            ranks = Ranks(0, count)
            sizes = [a + b for a, b in zip(ranks.sizes(source), ranks.sizes(target, source), strict=True)]
            assert max(sizes) - min(sizes) <= 1


def test_a_process_on_its_own_is_the_only_rank():
    assert Ranks.current() == Ranks(0, 1)
    assert Ranks().meet(3, 4) == [[3, 4]]
    assert Ranks().gather(torch.ones(2)).tolist() == [1, 1]


def test_tensors_of_all_ranks_are_gathered_in_their_order(group):
    count, folder = group
    rows = [[float(rank)] * 2 for rank in range(count) for _ in range(rank)]
    for rank in range(count):
        found = outcomes(folder, rank)
        assert found["gathered"] == rows
        assert found["gathered nothing"] == [0, 7]


def test_a_process_may_fit_alone_within_a_group(group):
    count, folder = group
    assert [outcomes(folder, rank)["alone"] for rank in range(count)] == [
        [2.0 * (3 - rank), 0.0] for rank in range(count)
    ]


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        ("a forward raises", "KeyError: 'colour'"),
        ("a forward is interrupted", "KeyboardInterrupt"),
        ("one fails before the others gather", "OSError: no such latents"),
    ],
)
def test_where_one_rank_fails_the_others_say_so(group, trouble, error):
    count, folder = group
    *others, last = (outcomes(folder, rank)[trouble].removesuffix(": ") for rank in range(count))
    assert last == error
    assert set(others) <= {f"RankError: rank {count - 1} of {count} failed: {error}"}


def test_the_rank_that_fits_a_broken_unit_names_the_site(group):
    count, folder = group
    first, *others = (outcomes(folder, rank)["the first unit is not finite"] for rank in range(count))
    assert first == "ValueError: model.0: the target activations have NaN or infinite entries"
    assert set(others) <= {f"RankError: rank 0 of {count} failed: {first}"}


DIFFERENT = (
    "ValueError: the ranks were given different models, sites, micro-batches or options; call fit_map on every rank"
)


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (
            "paths fork",
            "ValueError: micro-batches take different paths through the model: some arrive at model.left and",
        ),
        (
            "units differ",
            "ValueError: model.0: samples must be (n, C) and (m, C) with the same C, got (3, 1) and (3, 2)",
        ),
    ],
)
def test_what_no_process_could_fit_is_refused_by_all(group, trouble, error):
    count, folder = group
    for rank in range(count):
        assert outcomes(folder, rank)[trouble].startswith(error)


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (
            "paths fork between ranks",
            "ValueError: micro-batches take different paths through the model: some arrive at",
        ),
        ("other options", DIFFERENT),
        ("other micro-batches", DIFFERENT),
        (
            "gathered other shapes",
            "ValueError: the ranks have tensors that do not go together: (n, *[1]) of torch.float32",
        ),
    ],
)
def test_ranks_that_do_not_go_together_are_refused_by_all(group, trouble, error):
    count, folder = group
    for rank in range(count):
        assert outcomes(folder, rank)[trouble].startswith(error) == (count > 1)


def test_ranks_do_not_wait_for_one_that_was_killed(tmp_path):
    (survivor, _), (victim, _) = ended(start(2, tmp_path, "a rank is killed"))
    assert (survivor, victim) == (0, -signal.SIGKILL)
    found = outcomes(tmp_path, 0)["a rank is killed"]
    assert found.startswith("RankError: rank 0 of 2 has lost the others: one has died, or does something else")


# The command line ----------------------------------------------------------------------------------------------------


def test_every_process_of_a_command_ends_with_one_line(tmp_path):
    (code, shown), (last_code, last_shown) = ended(start(2, tmp_path, "a command fails"))
    assert (code, last_code) == (1, 1)
    assert "error: rank 1 of 2 failed: KeyError: 'colour'" in shown
    assert "error: unexpected KeyError: 'colour'" in last_shown


def fit_demo(output, *launcher):
    source, target = output.with_suffix(".source"), output.with_suffix(".target")
    source.write_text("a fox\na cat\na dog\na house\na boat\n")
    target.write_text("a fox, watercolor\na cat, watercolor\na dog, watercolor\n")
    files = ("--source", source, "--target", target)
    options = ("--batch-size", "2", "--timesteps", "2", "--steps", "4", "--device", "cpu", "--name", "same")
    command = [sys.executable, *launcher, "-m", "actmaps", "fit", "--model", "demo", *files, *options, "-o", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.slow
def test_torchrun_fits_the_map_of_one_process_and_writes_and_prints_it_once(tmp_path):
    alone, shared = fit_demo(tmp_path / "alone.safetensors"), fit_demo(tmp_path / "shared.safetensors", *TORCHRUN)
    assert (alone.returncode, shared.returncode) == (0, 0), alone.stderr + shared.stderr
    assert_same(*(ActMap.load(tmp_path / f"{name}.safetensors") for name in ("alone", "shared")))
    assert shared.stdout.count("Fitted in") == 1
