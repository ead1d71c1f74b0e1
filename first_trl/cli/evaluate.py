"""`first-trl evaluate MODEL --task ...`: predictions and calibration of any model on a task, without a recipe."""

import argparse
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import yaml

from ..utils.files import write_json
from ..utils.text_tables import text_table
from ..vocabulary import NEW_ABOVE, TARGET_PROBS


SCORINGS = ("auto", "token", "choices", "decision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `first-trl evaluate` to a parser."""
    parser.add_argument(
        "model", help="folder or Hub id of a causal language model, a LoRA adapter or a decision model"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--task", required=True, help="a task (see the docs of first_trl.tasks), or system_one")
    parser.add_argument("--path", help="file, folder or Hub id of its rows (default: the benchmark's own)")
    parser.add_argument("--split", default="test", help="split, slices allowed (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="score this many rows, drawn at random with --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the task")
    parser.add_argument(
        "--scoring",
        choices=SCORINGS,
        default="auto",
        help="token: one token an answer, over the whole vocabulary; choices: the log-probability of each choice's text; "
        "decision: the probabilities of pipeline('decision'), for system_one; auto: decision for system_one, else what was "
        "saved with the model, else token where every answer is one token, else choices",
    )
    parser.add_argument(
        "--length",
        choices=("none", "tokens", "characters", "bytes", "unconditional"),
        default="none",
        help="choices: what a log-probability is divided by, or compared with its value without the question "
        "(default: none, the probability of the whole text)",
    )
    parser.add_argument(
        "--permutations",
        type=int,
        default=0,
        metavar="N",
        help="also ask every question in N orders of its lettered options: how often the answer flips, and the scores of "
        "the average over the orders",
    )
    parser.add_argument(
        "--target-probs",
        metavar="FILE",
        help="also write the scored rows with the model's probabilities (averaged over --permutations) as `target_probs`, "
        "Parquet: soft labels for a student of any tokenizer",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        help="default: the one saved with the model (by number of options where it has one), else 1",
    )
    parser.add_argument(
        "--novelty",
        action="store_true",
        help="a temperature for each question by how new it is, with what was saved with the model for it; predictions hold "
        "the share of the training rows that are no newer",
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--max-length", type=int, help="longer prompts lose their beginning (default: the model's context)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="precision to load in, e.g. float32 (default: that of the weights)"
    )
    parser.add_argument("--device", help="default: the accelerator, else the CPU")
    parser.add_argument("--bins", type=int, default=10, help="bins of the calibration error (default: %(default)s)")
    parser.add_argument("--output-dir", default="evaluation", help="where the results go (default: %(default)s)")
    parser.add_argument(
        "--eval-results", metavar="DATASET_ID", help="also write .eval_results/<task>.yaml for this dataset of the Hub"
    )


def main(args: argparse.Namespace) -> int:
    """Print the scores beside those of the baselines; write `report.json`, `predictions.jsonl` and a diagram."""
    from transformers import AutoTokenizer
    from transformers.decision import DecisionConfig

    from ..evaluation.loading import load_model
    from ..evaluation.novelty_scaling import NoveltyScaling
    from ..tasks.decision_extras import read_decision_extras, read_temperature
    from ..utils.processes import process_state

    options = dict(map(_key_value, args.option))
    if (args.task == "system_one") != (args.scoring == "decision") and args.scoring != "auto":
        raise ValueError("--scoring decision belongs to --task system_one, and the other scorings to the other tasks.")
    if args.length != "none" and args.scoring not in ("auto", "choices"):
        raise ValueError(f"--length is about whole texts: leave it out, or --scoring {args.scoring}.")
    if args.target_probs is not None and args.task == "system_one":
        raise ValueError("--target-probs writes rows of a task with prompts; system_one has requests.")
    if args.permutations == 1:
        raise ValueError("--permutations must be 2 or more: the given order is one of them.")
    if args.temperature is not None and not args.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature}.")
    if args.novelty and (args.temperature is not None or args.permutations or args.scoring not in ("auto", "token")):
        raise ValueError(
            "--novelty is for answers of one token and brings its own temperatures: leave --temperature, "
            "--permutations and other scorings out."
        )
    if args.novelty and args.task == "system_one":
        raise ValueError("--novelty reads the answer position of a task with prompts; system_one has requests.")
    rows = _rows(args, options)
    model, home = load_model(args.model, revision=args.revision, dtype=args.dtype)
    if getattr(model, "hf_device_map", None) is None:
        model = model.to(args.device or process_state().device)
    model.eval()
    revision = args.revision if home == args.model else None
    tokenizer = AutoTokenizer.from_pretrained(home, revision=revision)
    config = DecisionConfig.from_pretrained(args.model, revision=args.revision)
    extras = read_decision_extras(args.model, revision=args.revision)
    if "scoring" in extras and args.scoring == "auto" and args.length == "none":
        args.scoring, args.length = extras["scoring"]["scoring"], extras["scoring"]["length"]
    saved: Any = args.temperature
    if args.novelty:
        digest = (extras.get("novelty") or {}).get("sha256")
        saved = NoveltyScaling.load(args.model, revision=args.revision, digest=digest)
    elif saved is None:
        saved = read_temperature(args.model, revision=args.revision)
    predictions, report, lines = _score(args, model, tokenizer, config, saved, rows)
    folder = Path(args.output_dir)
    report = {"model": args.model, "revision": args.revision, "task": args.task, "split": args.split, **report}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    text = "\n".join(json.dumps(row) for row in predictions) + "\n"
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    print(_table(report["scores"]))
    print("\n".join(lines))
    written = ["report.json", "predictions.jsonl"]
    if args.eval_results:
        written.append(_write_eval_results(folder, args, report))
    print(f"Wrote {', '.join(written)} in {folder}.")
    return 0


def _key_value(text: str) -> tuple[str, Any]:
    """An option of a task: numbers, `true` and `false` as such, all else as it was typed, leading spaces included."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"--option takes KEY=VALUE, got {text!r}.")
    read = yaml.safe_load(value) if value.strip() and value == value.strip() and value[0] not in "{[" else value
    return key, read if isinstance(read, bool | int | float) else value


def _rows(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    if args.task == "system_one":
        from ..tasks.system_one import read_requests

        if args.path is None:
            raise ValueError("--task system_one needs --path, a file of requests with gold answers.")
        if options:
            raise ValueError(f"system_one has no option {next(iter(options))!r}.")
        questions = read_requests(args.path)
        if args.limit is not None and args.limit < len(questions):
            import numpy as np

            kept = np.sort(np.random.default_rng(args.seed).choice(len(questions), args.limit, replace=False))
            questions = [questions[i] for i in kept]
        return questions
    from ..tasks import get_task

    task = get_task(args.task, **options)
    split = task.load(args.split, path=args.path, limit=args.limit, seed=args.seed)
    for reason, count in split.reasons.items():
        print(f"{count} rows left out: {reason}")
    if not any(split.dataset["choices"]):
        raise ValueError(f"The rows of {args.task} have no choices; score free text with a recipe.")
    return split.dataset


def _score(
    args: argparse.Namespace, model: Any, tokenizer: Any, config: Any, saved: Any, rows: Any
) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """Predictions as rows, the report, and what a reader must know."""
    from ..evaluation.distributions import baselines, distribution_scores

    orders: Any = None
    more: dict[str, Any] = {}
    if args.task == "system_one":
        from ..calibration.conditional import OptionTemperature
        from ..evaluation.decisions import predict_decisions

        # Without one by number of options, decision.json has one for each type of question
        given = saved if isinstance(saved, OptionTemperature) else None
        given = given if args.temperature is None else OptionTemperature(args.temperature, {})
        options: dict[str, Any] = {"temperature": given, "batch_size": args.batch_size}
        found = predict_decisions(model, tokenizer, rows, config, **options)
        if args.permutations:
            from ..evaluation.option_order import evaluate_decision_order

            options |= {"permutations": args.permutations, "seed": args.seed}
            orders = evaluate_decision_order(model, tokenizer, rows, config, **options)
        scoring, temperature = (
            "decision",
            dict(config.temperature) if given is None else given.to_dict() if given.kinds else given.common,
        )
    else:
        found, scoring, temperature, orders, more = _score_choices(args, model, tokenizer, saved, rows)
    scores = {"model": distribution_scores(found, n_bins=args.bins)}
    if orders is not None:
        averaged = dataclasses.replace(found, probabilities=orders.averaged)
        scores[f"mean of {args.permutations} orders"] = distribution_scores(averaged, n_bins=args.bins)
    scores |= {name: distribution_scores(one, n_bins=args.bins) for name, one in baselines(found).items()}
    predictions = [
        {"id": name, "kind": kind, "options": list(options), "probabilities": p.tolist(), "gold": q.tolist()}
        for name, kind, options, p, q in zip(
            found.ids, found.kinds, found.options, found.probabilities, found.gold, strict=True
        )
    ]
    for name, values in more.items():
        predictions = [{**row, name: float(value)} for row, value in zip(predictions, values, strict=True)]
    lines = [
        f"Scoring: {scoring}; temperature {temperature}; {args.bins} bins of equal width. Probabilities are those of the "
        "options alone.",
        "ECE argmax: against the gold's most likely option. ECE drawn: against labels drawn from the gold; the two are "
        "equal where the gold is one option. Prior: the mean gold of the scored questions themselves.",
    ]
    report = {"scoring": scoring, "temperature": temperature, "n_bins": args.bins, "scores": scores}
    if more:
        report["novelty"] = {
            "mean": float(more["novelty"].mean()),
            "new": float((more["novelty"] > NEW_ABOVE).mean()),
        }
        lines.append(
            f"Novelty: {100 * report['novelty']['new']:.1f} % of the questions are farther from the training rows than "
            f"{100 * NEW_ABOVE:.0f} % of these are from each other."
        )
    if scoring == "choices":
        report["length"] = args.length
        lines.append(
            "Whole texts are compared by their log-probability"
            + {
                "none": "; longer ones have less (see --length).",
                "unconditional": " minus that without the question.",
            }.get(args.length, f" divided by their {args.length}.")
        )
    if orders is not None:
        report["option_order"] = order = orders.report
        lines.insert(
            0,
            f"Option order: in another order of the options the answer is another one in {100 * order['flip_rate']:.1f} % of "
            f"cases, for {100 * order['any_flip']:.1f} % of the questions at least once; the confidence moves by "
            f"{100 * order['confidence_spread']:.1f} points (standard deviation over {order['n_orders']:.3g} orders).",
        )
    return predictions, report, lines


def _score_choices(
    args: argparse.Namespace, model: Any, tokenizer: Any, temperature: Any, rows: Any
) -> tuple[Any, str, Any, Any, dict[str, Any]]:
    import numpy as np

    from ..calibration import CalibrationWarning
    from ..calibration.conditional import OptionTemperature
    from ..evaluation.distributions import OptionPredictions
    from ..evaluation.multiple_choice import evaluate_multiple_choice
    from ..evaluation.novelty_scaling import NoveltyScaling
    from ..evaluation.whole_answers import evaluate_whole_answers
    from ..tasks.answers import NotOneToken, question_kinds

    scoring = "choices" if args.scoring == "auto" and args.length != "none" else args.scoring
    labelled = rows.select([i for i, gold in enumerate(rows["gold"]) if gold >= 0])
    if len(labelled) == 0:
        raise ValueError(f"No row of split {args.split!r} has an answer: there is nothing to score.")
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "temperature": temperature}
    with warnings.catch_warnings():
        # What a small sample means for an ECE is said of its own report, which is not printed here
        warnings.simplefilter("ignore", CalibrationWarning)
        if scoring != "choices":
            try:
                predicted = evaluate_multiple_choice(model, tokenizer, labelled, **options).predictions
                scoring = "token"
            except NotOneToken:
                if scoring == "token" or args.novelty:
                    raise
                scoring = "choices"
        if scoring == "choices":
            if isinstance(temperature, OptionTemperature):
                raise ValueError(
                    "The temperature that was saved with this model depends on the number of options, which whole answers do "
                    "not support. Give --temperature."
                )
            predicted = evaluate_whole_answers(model, tokenizer, labelled, length=args.length, **options).predictions
    more = {}
    if isinstance(temperature, NoveltyScaling):
        more = {name: predicted[name] for name in ("temperature", "novelty")}
        temperature = {"by": "novelty", "mean": float(more["temperature"].mean()), **temperature.temperature.to_dict()}
    scores = predicted.get("choice_scores", predicted["choice_logprobs"])
    probabilities = [
        np.exp(values[:n] - np.logaddexp.reduce(values[:n]))
        for values, n in zip(scores, predicted["n_choices"], strict=True)
    ]
    orders = None
    if args.permutations:
        from ..evaluation.option_order import evaluate_option_order
        from ..tasks import get_task

        task: Any = get_task(args.task, **dict(map(_key_value, args.option)))
        how: dict[str, Any] = {"permutations": args.permutations, "seed": args.seed, "scoring": scoring}
        orders = evaluate_option_order(model, tokenizer, task, labelled, length=args.length, **how, **options)
    if args.target_probs is not None:
        from datasets import List, Value

        soft = [p.tolist() for p in (probabilities if orders is None else orders.averaged)]
        path = Path(args.target_probs)
        path.parent.mkdir(parents=True, exist_ok=True)
        others = labelled.select_columns([name for name in labelled.column_names if name != TARGET_PROBS])
        others.add_column(TARGET_PROBS, soft, feature=List(Value("float64"))).to_parquet(path)
        print(f"Wrote {len(soft)} rows with `{TARGET_PROBS}` to {path}.")
    # Rows with soft labels are scored against these
    given = labelled[TARGET_PROBS][:] if TARGET_PROBS in labelled.column_names else [None] * len(labelled)
    gold = [
        np.eye(len(p))[g] if soft_gold is None else np.array(soft_gold)
        for p, g, soft_gold in zip(probabilities, labelled["gold"], given, strict=True)
    ]
    choices = [tuple(choice) for choice in labelled["choices"]]
    predictions = OptionPredictions(list(labelled["id"]), question_kinds(labelled), probabilities, gold, choices)
    shown = temperature.to_dict() if isinstance(temperature, OptionTemperature) else temperature
    return predictions, scoring, shown, orders, more


_COLUMNS = {
    "accuracy": ("accuracy %", 100, 1),
    "mean_confidence": ("confidence %", 100, 1),
    "ece_argmax": ("ECE argmax %", 100, 1),
    "ece_drawn": ("ECE drawn %", 100, 1),
    "nll": ("NLL", 1, 3),
    "kl": ("KL", 1, 3),
    "brier": ("Brier", 1, 3),
    "rps": ("RPS", 1, 3),
}


def _table(scores: dict[str, dict[str, Any]]) -> str:
    shown = [
        (key, factor, digits)
        for key, (_, factor, digits) in _COLUMNS.items()
        if any(row[key] is not None for row in scores.values())
    ]
    rows = [
        [
            name,
            str(row["n"]),
            *("" if row[key] is None else f"{factor * row[key]:.{digits}f}" for key, factor, digits in shown),
        ]
        for name, row in scores.items()
    ]
    return "\n".join(
        text_table(["", "n", *(_COLUMNS[key][0] for key, _, _ in shown)], rows, right=range(1, len(shown) + 2))
    )


def _write_eval_results(folder: Path, args: argparse.Namespace, report: dict[str, Any]) -> str:
    """Results as the Hub reads them from a model's repository."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    scores = report["scores"]["model"]
    entries = [
        EvalResultEntry(
            dataset_id=args.eval_results,
            task_id=f"{args.task}_{name}",
            value=scores[name],
            notes=f"first-trl evaluate, split {args.split}, {scores['n']} questions, scoring {report['scoring']}"
            + (f", length {report['length']}" if "length" in report else ""),
        )
        for name in ("accuracy", "ece_argmax", "ece_drawn", "nll", "kl", "brier")
    ]
    file = folder / ".eval_results" / f"{args.task}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
    return str(file.relative_to(folder))
