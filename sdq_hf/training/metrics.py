"""Top-1 and top-5 accuracy for `evaluate` and transformers' `Trainer`, without a download.

`evaluate.load("accuracy")` fetches a script from the Hub; these classes are the same idea and work offline.

    from evaluate import evaluator
    evaluator("image-classification").compute(
        "FOLDER_OR_HUB_ID", data, metric=Accuracy(), label_mapping=model.config.label2id
    )["accuracy"]

`evaluate`'s own evaluator hands on the best label only, so it can give top-1; `TopKEvaluator` gives top-5 as well. With
transformers 5 the former (evaluate 0.4.6) takes a folder, a Hub id or a model, but fails on a pipeline object; the latter
takes all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from evaluate import ImageClassificationEvaluator
from transformers import EvalPrediction, Pipeline


class Accuracy(evaluate.Metric):
    """Share of images whose class is the first (`accuracy`) or among the first five (`top_5_accuracy`) predictions, 0 to 1.

    `predictions`: a class number for each image, or a list of them, best first; `references`: the right class numbers.
    `top_5_accuracy` is left out when the lists are shorter than five.
    """

    def _info(self) -> evaluate.MetricInfo:
        whole, label = datasets.Value("int64"), {"references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=str(Accuracy.__doc__),
            citation="",
            inputs_description="predictions: class numbers, or lists of them, best first; references: class numbers",
            features=[
                datasets.Features({"predictions": datasets.Sequence(whole), **label}),
                datasets.Features({"predictions": whole, **label}),
            ],
        )

    def _compute(self, predictions: Any, references: Any, **kwargs: Any) -> dict[str, float]:
        ranked = np.asarray(predictions)
        ranked = ranked[:, None] if ranked.ndim == 1 else ranked
        hits = ranked[:, :5] == np.asarray(references)[:, None]
        result = {"accuracy": float(hits[:, 0].mean())}
        if ranked.shape[1] >= 5:
            result["top_5_accuracy"] = float(hits.any(axis=1).mean())
        return result


class TopKEvaluator(ImageClassificationEvaluator):
    """`evaluator("image-classification")`, which hands all labels of the pipeline's answer to the metric, best first."""

    def prepare_pipeline(self, model_or_pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        # Upstream asks whether it is a TFPreTrainedModel, which transformers 5 no longer has.
        ready = isinstance(model_or_pipeline, Pipeline)
        return model_or_pipeline if ready else super().prepare_pipeline(model_or_pipeline, *args, **kwargs)

    def predictions_processor(
        self, predictions: Sequence[Sequence[Mapping[str, Any]]], label_mapping: Mapping[str, int] | None
    ) -> dict[str, Any]:
        ranked = [sorted(answers, key=lambda answer: -answer["score"]) for answers in predictions]
        labels = [[answer["label"] for answer in answers] for answers in ranked]
        return {"predictions": [[label_mapping[label] if label_mapping else label for label in row] for row in labels]}


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """For `Trainer(compute_metrics=...)`: accuracies from logits [N, C] and labels [N]."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    ranked = np.argsort(-np.asarray(logits), axis=-1, kind="stable")[:, :5]
    return Accuracy()._compute(ranked, np.asarray(prediction.label_ids))
