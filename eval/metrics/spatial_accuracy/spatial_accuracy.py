"""Accuracy on spatial relations as a metric of ``evaluate``: ``evaluate.load("eval/metrics/spatial_accuracy")``."""

import datasets
import evaluate

from dualstream.eval.spatial_tasks.scoring import relation_accuracy

_DESCRIPTION = (
    "Individual, pair and set accuracy on spatial relations, flip consistency, and the rate of invalid answers."
)
_CITATION = "Kamath et al., What's 'up' with vision-language models?, 2023 (pairs and sets)."


class SpatialAccuracy(evaluate.Metric):
    """Predictions are answers as written, references relations. See ``scoring.relation_accuracy``."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=relation_accuracy.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, pairs=None, sets=None, set_size=4, options=None):
        return relation_accuracy(predictions, references, pairs, sets, set_size, options)
