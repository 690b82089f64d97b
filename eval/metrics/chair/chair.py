"""CHAIR as a metric of ``evaluate``: ``evaluate.load("eval/metrics/chair")``."""

import datasets
import evaluate

from dualstream.eval.hallucination import ObjectWords, chair

_DESCRIPTION = "Objects that captions make up, by mention and by caption, with recall and length beside."
_CITATION = "Rohrbach et al., Object Hallucination in Image Captioning, 2018."


class Chair(evaluate.Metric):
    """Predictions are captions, references the lists of objects shown; ``synonyms_file`` is needed.

    See ``dualstream.eval.hallucination.chair``.
    """

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=chair.__doc__,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(self, predictions, references, synonyms_file=None, reference_captions=None):
        if synonyms_file is None:
            raise ValueError("synonyms_file is missing: the file with one object per line, its words between commas.")
        return chair(predictions, references, ObjectWords.from_file(synonyms_file), reference_captions)
