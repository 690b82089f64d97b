"""POPE as a metric of ``evaluate``: ``evaluate.load("eval/metrics/pope")``."""

import datasets
import evaluate

from dualstream.eval.hallucination import pope

_DESCRIPTION = (
    "Yes/no questions about objects: accuracy, precision, recall and F1 of yes, and the share of yes answers."
)
_CITATION = "Li et al., Evaluating Object Hallucination in Large Vision-Language Models, 2023."


class Pope(evaluate.Metric):
    """Predictions are answers as written, references ``yes`` or ``no``. See ``dualstream.eval.hallucination.pope``."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=pope.__doc__,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        return pope(predictions, references)
