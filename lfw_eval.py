"""Evaluate a model on LFW or other test sets: accuracy, ROC, and the pairs it gets wrong.

    python lfw_eval.py                                      # the newest run's best.pt
    python lfw_eval.py --checkpoint runs/<run>/last.pt
    python lfw_eval.py --checkpoint backbone.pth --network r50     # InsightFace's iresnet
    python lfw_eval.py --checkpoint model.onnx --input-mean 0.485 0.456 0.406 \\
        --input-std 0.229 0.224 0.225                       # any ONNX model of 112x112 faces
    python lfw_eval.py --lfw data/faces_webface_112x112/cfp_fp.bin
    python lfw_eval.py --sets lfw,cfp_fp,agedb_30           # one table, runs/<run>/eval.json
    python lfw_eval.py --groups African,Asian,Caucasian,Indian   # RFW: and how unequal they are
    python lfw_eval.py --as insightface                     # an evaluation protocol preset
    python lfw_eval.py --against runs/<other>/best.pt       # is the difference significant?

It prints a table: ten-fold accuracy with its standard error, the best threshold, TAR at FAR, AUC
and EER, 95 % confidence intervals, operating points, and last.pt beside best.pt. The metrics go to
runs/<run>/lfw.json (of third-party models to runs/<file name>-<checksum>/lfw.json), and with the
hardest pairs and what makes them hard to one page, runs/<run>/report.html. Embeddings are cached in
runs/<run>/embeddings/. images/ gets theta_dist.png, roc.png and up to ten false positives and false
negatives, worst first: {i}_fp_0.jpg beside {i}_fp_1.jpg, {i}_fn_0.jpg beside {i}_fn_1.jpg.
--robustness adds the same pairs under JPEG compression, blur, occlusion and so on.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from config import Config, parse_args
from utils import UserError, exit_on_user_error, get_device, keep_freed_memory, newest_run

if TYPE_CHECKING:
    from evaluation.evaluated_model import EvaluatedModel
    from evaluation.pair_sets import SetResult
    from evaluation.protocols import Protocol


@exit_on_user_error
def main(cfg: Config) -> None:
    """Evaluate a checkpoint on test sets, print the tables, write the files."""
    # Imported here, so that --help answers at once.
    from evaluation.embedders import InputSpec
    from evaluation.evaluate import (
        compare_models,
        evaluate_set,
        measure_robustness,
        set_statistics,
    )
    from evaluation.evaluated_model import open_model
    from evaluation.groups import group_metrics, group_table
    from evaluation.pair_sets import find_pairs, load_set
    from evaluation.result_files import compared_model, write_figures, write_metrics
    from evaluation.robustness import robustness_table
    from evaluation.tables import comparison_table, set_table, summary_table

    keep_freed_memory()
    protocol, paths = choose_protocol(cfg), choose_sets(cfg)
    open_checkpoint = functools.partial(
        open_model,
        runs_dir=cfg.runs_dir,
        device=get_device(cfg.device),
        network=cfg.network,
        use_se=cfg.use_se,
        spec=InputSpec(cfg.input_mean, cfg.input_std, cfg.bgr),
        batch=cfg.eval_batch,
        progress="embedding",
        flip=False,  # the protocol combines the views
        unnormalised=True,
    )
    model = open_checkpoint(Path(cfg.checkpoint or newest_run(cfg.runs_dir, "best.pt")))
    print(f"Model: {'' if cfg.checkpoint else 'the newest run, '}{model}")

    results: list[SetResult] = []
    for path in paths:
        test_set = load_set(path, find_pairs(path, cfg.data_dir, cfg.pairs), cfg.workers)
        if test_set.name in [result.test_set.name for result in results]:
            # Names are the keys of eval.json and of cached embeddings.
            test_set = dataclasses.replace(test_set, name=str(path).replace("/", "_"))
        print(f"Test set: {test_set}")
        result = evaluate_set(model, test_set, protocol)
        result.metrics.update(set_statistics(result, cfg.seed))
        print(set_table(result.metrics))
        if cfg.robustness:
            result.metrics["robustness"] = measure_robustness(model, result, protocol)
            print(robustness_table(result.metrics["robustness"]))
        results.append(result)
    groups = None
    if cfg.sets or cfg.groups:
        print(summary_table(results))
    if cfg.groups:
        groups = group_metrics({r.test_set.name: r.metrics["accuracy"] for r in results})
        print(group_table(groups))

    figures = write_figures(Path(cfg.images_dir), results[0], cfg.lfw_source)
    write = functools.partial(
        write_metrics,
        model,
        results,
        several_sets=bool(cfg.sets or cfg.groups),
        groups=groups,
        source=cfg.lfw_source,
    )
    # Written before the other models are opened: an error there must not lose these metrics.
    json_path, page_path = write([])
    compared = []
    for other in other_models(cfg, model, open_checkpoint):
        other_results, comparisons = compare_models(other, results, protocol, cfg.seed)
        print(comparison_table([str(model), str(other)], results, other_results, comparisons))
        compared.append(compared_model(other, other_results, comparisons))
    if compared:
        write(compared)
    print(f"Wrote {json_path}, {page_path} and {figures}.")


def choose_protocol(cfg: Config) -> Protocol:
    """The protocol of --as, or the one that --flip, --fuse ... spell; UserError if they clash."""
    from evaluation.protocols import PROTOCOLS, Protocol

    if not cfg.as_:
        return Protocol(cfg.flip, cfg.fuse, cfg.subtract_mean, cfg.metric, cfg.threshold)
    fixed = ("flip", "fuse", "subtract_mean", "metric", "threshold")
    clash = [name.replace("_", "-") for name in fixed if name in cfg.given]
    if clash:
        raise UserError(f"--as {cfg.as_} fixes --{clash[0]}; leave one of the two out.")
    return PROTOCOLS[cfg.as_]


def choose_sets(cfg: Config) -> list[Path]:
    """The paths of the test sets, by default LFW's; UserError if one is missing."""
    from evaluation.pair_sets import find_sets

    given = [f"--{name}" for name in ("lfw", "sets", "groups") if getattr(cfg, name)]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} both name the test sets (--lfw one, --sets and --groups "
            "several); leave one of the two out."
        )
    if cfg.lfw:
        if not Path(cfg.lfw).exists():
            raise UserError(f"There is no test set at {cfg.lfw}; correct --lfw.")
        return [Path(cfg.lfw)]
    names = [name for name in (cfg.sets or cfg.groups).split(",") if name] or ["lfw"]
    if cfg.groups and len(names) < 2:
        raise UserError(f"--groups compares two or more test sets, not only {names[0]}.")
    paths = find_sets(names, cfg.data_dir, cfg.train_set)
    if not given and paths[0].is_file():
        print(f"LFW's images are not prepared; using {paths[0]} instead.")
    return paths


def other_models(
    cfg: Config, model: EvaluatedModel, open_checkpoint: Callable[[Path], EvaluatedModel]
) -> list[EvaluatedModel]:
    """The models to compare with: last.pt beside best.pt (or the reverse), and --against."""
    others = []
    name = {"best.pt": "last.pt", "last.pt": "best.pt"}.get(model.checkpoint.name, "")
    sibling = model.checkpoint.parent / name
    if name and model.is_ours and sibling.is_file():
        try:
            other = open_checkpoint(sibling)
        except UserError as error:
            print(f"Without {name}: {error}")
        else:
            if other.info.get("epoch") == model.info.get("epoch"):
                print(f"{name} is of the same epoch, {model.info.get('epoch')}.")
            else:
                others.append(other)
    if cfg.against:
        others.append(open_checkpoint(Path(cfg.against)))
    return others


if __name__ == "__main__":
    main(parse_args(sys.argv[1:], "lfw_eval", doc=__doc__))
