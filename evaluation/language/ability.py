"""What else the model can do: multiple-choice accuracy through lm-eval (pip install lm_eval), on the model as it is steered now."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_QUESTIONS = files(__package__) / "texts" / "questions.jsonl"


@dataclass(frozen=True)
class MultipleChoiceScores:
    """Accuracy on n questions, as shares in [0, 1]; chance is one over the number of choices.

    Attributes:
        accuracy: how often the right choice is the likeliest.
        normalised: how often it is the likeliest per character, which does not favour short choices.
        accuracy_se, normalised_se: their standard errors over questions; NaN for a single question.
        questions: how many were asked.
    """

    accuracy: float
    normalised: float
    accuracy_se: float
    normalised_se: float
    questions: int


def multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | PathLike[str] | None = None,
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> MultipleChoiceScores:
    """Accuracy on multiple-choice questions, each choice rated by its likelihood behind `Question: ... Answer:`. Needs no network.

    Args:
        model: a causal language model, steered or not.
        tokenizer: its tokenizer.
        path: a file with one JSON object per line: "question", "choices" (texts) and "answer" (number of the right one, from 0);
            by default the package's own questions.
        batch_size: choices that run at once.
        limit: ask the first so many only.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: naming the line that is no such object.
    """
    _require_lm_eval()
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    source = _QUESTIONS if path is None else Path(path)
    questions = read_questions(source.read_text(encoding="utf-8"), str(source))[:limit]

    class LocalQuestions(ConfigurableTask):
        """A task whose questions are at hand."""

        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": Dataset.from_list(questions)}

    task = LocalQuestions(
        config={
            "task": "multiple_choice",
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
    )
    manager = TaskManager(include_defaults=False)  # reading lm-eval's thousands of tasks takes seconds
    found = _evaluate(model, tokenizer, [task], batch_size, task_manager=manager)["multiple_choice"]
    return MultipleChoiceScores(
        accuracy=found["acc"],
        normalised=found["acc_norm"],
        accuracy_se=found.get("acc_stderr", math.nan),
        normalised_se=found.get("acc_norm_stderr", math.nan),
        questions=len(questions),
    )


def harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = ("mmlu",),
    *,
    num_fewshot: int | None = 5,
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, float]]:
    """Run tasks of lm-eval by name, whose data the hub or its cache must hold. The paper reports "mmlu" with five examples.

    Args:
        model: a causal language model, steered or not.
        tokenizer: its tokenizer.
        tasks: see `lm-eval ls tasks`.
        num_fewshot: examples in front of each question; None takes the task's own number.
        limit: ask the first so many per (sub)task only.
        batch_size: sequences that run at once.

    Returns:
        Metrics by task and group of tasks, for example {"mmlu": {"acc": 0.53, "acc_stderr": 0.004}, "mmlu_anatomy": ...}.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: for unknown tasks.
        ConnectionError: if a task's data is neither cached nor to be had.
    """
    _require_lm_eval()
    from datasets.exceptions import DatasetNotFoundError
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    try:
        return _evaluate(
            model, tokenizer, list(tasks), batch_size, num_fewshot=num_fewshot, limit=limit, task_manager=manager
        )
    except (ConnectionError, DatasetNotFoundError) as error:
        raise ConnectionError(
            f"the data of lm-eval's {', '.join(tasks)} is neither in the cache of `datasets` nor to be had from the hub; run once "
            f"where the hub can be reached and bring the cache along (HF_HOME), or use `multiple_choice`, which needs none: {error}"
        ) from error


def read_questions(text: str, name: str) -> list[dict[str, Any]]:
    """The questions in `text`, one JSON object per line; `name` says in errors where it is from.

    Raises:
        ValueError: naming the line without "question", "choices" or an "answer" among them.
    """
    questions = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, choices, answer = str(row["question"]), [str(choice) for choice in row["choices"]], row["answer"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{name}, line {number}: expected a JSON object with question, choices and answer: {error!r}"
            ) from error
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise ValueError(f"{name}, line {number}: answer is {answer!r}, expected 0 to {len(choices) - 1}")
        questions.append({"question": question, "choices": choices, "answer": answer})
    if not questions:
        raise ValueError(f"{name} has no questions")
    return questions


def _require_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise ImportError(f"multiple-choice accuracy needs lm-eval: pip install lm_eval ({error})") from error


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[Any], batch_size: int, **options: Any
) -> dict[str, dict[str, float]]:
    """Metrics by task, without lm-eval's names of filters behind theirs."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    # Without seeds of its own it leaves the global generators alone.
    seeds = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}
    results = simple_evaluate(wrapped, tasks=tasks, log_samples=False, **seeds, **options)
    found = {**results["results"], **results.get("groups", {})}
    return {
        task: {
            metric.split(",")[0]: float(value)
            for metric, value in metrics.items()
            if "," in metric and isinstance(value, int | float)
        }
        for task, metrics in found.items()
    }
