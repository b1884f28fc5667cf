"""The paper's public code and this one on the same activations: the same maps, the same outputs, and what each costs.

    git clone https://github.com/apple/ml-act
    python benchmarks/vs_reference.py --reference ml-act
    python benchmarks/vs_reference.py --reference ml-act --part estimators application     # needs scikit-learn only
    pip install scikit-learn hydra-core wandb pandas                                       # what its scripts need, for all parts

Parts:
    estimators   its hooks' `fit` and our estimators: maps, time, peak memory
    application  its hooks and ours on the output of a normalisation layer, with the same map: outputs, time
    fitting      its script `learn_intervention`, a pass over all prompts for every site, and `fit_map`: maps, time, files
    differences  where the two differ on purpose, each shown by an experiment

The checkout is imported as it is; nothing of it is copied.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import transformers

from measuring import add_options, finished, started
from reference import application, differences, estimators, fitting
from reference.checkout import NAMES, use_checkout

PARTS = ("estimators", "application", "fitting", "differences")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder of a checkout of github.com/apple/ml-act")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512], help="of each side, for the estimators")
    parser.add_argument("--case", choices=fitting.CASES, nargs="+", default=list(fitting.CASES), help="what is fitted")
    parser.add_argument(
        "--prompts",
        type=int,
        default=16,
        help="source and target prompts together, for fitting; with fewer, steep slopes make rounding grow from site to site",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of estimators and fits; outputs get ten times as many")
    add_options(parser)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    use_checkout(options.reference)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    console, device, dtype = started(options)
    if options.peak:
        side, method, count = options.peak
        print(json.dumps(estimators.peak(side, method, int(count), device)))
        return
    figures: dict[str, list[Any]] = {}
    if "estimators" in options.part:
        again = [__file__, "--reference", str(options.reference), "--device", options.device]
        with console.status("estimators"):
            wanted = [(method, count) for method in NAMES for count in options.samples]
            figures["estimators"] = [estimators.estimate(*each, options.rounds, device, again) for each in wanted]
        console.print(estimators.table(figures["estimators"]))
    if "application" in options.part:
        with console.status("application"):
            figures["application"] = [
                application.apply_both(case, 10 * options.rounds, device, dtype) for case in application.CASES
            ]
        console.print(application.table(figures["application"]))
    if "fitting" in options.part:
        with console.status("fitting"):
            figures["fitting"] = [
                fitting.fit_both(case, options.reference, options.prompts, options.batch_size, options.rounds, device)
                for case in options.case
            ]
        console.print(fitting.table(figures["fitting"]))
    if "differences" in options.part:
        figures["differences"] = differences.differences()
        console.print(differences.table(figures["differences"]))
    finished(console, options, device, {part: [asdict(row) for row in rows] for part, rows in figures.items()})


if __name__ == "__main__":
    main()
