"""Where the readings of a report come from: the folder of a finished run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dualstream.analysis.annotated_images import AnnotatedImage, open_annotated
from dualstream.analysis.resumable_rows import ResumableRows
from dualstream.analysis.what.depth_maps import DepthMaps, read_vocabulary
from dualstream.modeling.decoder_tables import token_tables
from dualstream.processing.reading_series import ReadingSeries

from .series import series_of_maps, words_of


class RunSource:
    """The output folder of ``dualstream analyze what``.

    Args:
        folder: of the run.
        model: where the tokenizer lies; None: the name that the run states.
        data: where the pictures lie now; None: the source that the run states, seen from the working folder.

    Raises:
        ValueError: the folder holds no such run, or the tokenizer is not found.
    """

    def __init__(self, folder: str | Path, model: str | None = None, data: str | None = None) -> None:
        self.folder = Path(folder)
        path = self.folder / "configuration.json"
        if not path.is_file():
            raise ValueError(
                f"{self.folder} holds no configuration.json; give the folder of `dualstream analyze what`."
            )
        self.settings = json.loads(path.read_text(encoding="utf-8"))
        missing = {"model", "data", "limit", "seed"} - set(self.settings)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: it is no run of `dualstream analyze what`.")
        self.data = str(data or self.settings["data"])
        self.pieces = read_vocabulary(self.folder)
        self.rows = ResumableRows(self.folder, self.settings)
        self.name = str(self.settings["model"])
        self.tables = token_tables(_tokenizer(model or self.name), len(self.pieces))

    @cached_property
    def images(self) -> Sequence[AnnotatedImage]:
        """The test pictures that were read."""
        done = self.rows.done
        settings = self.settings
        found = open_annotated(self.data, settings["limit"], "test", settings["seed"])
        return [image for image in found if f"test:{image.name}" in done]

    def series(self, image: AnnotatedImage) -> ReadingSeries:
        """The readings of a picture, shown first at the depth that the run chose."""
        maps = DepthMaps.from_table(self.rows.read(f"test:{image.name}"), self.pieces)
        return series_of_maps(maps, self.name, self.tables, self._chosen_depth, words_of(image))

    @cached_property
    def _chosen_depth(self) -> int | None:
        path = self.folder / "choice.json"
        return json.loads(path.read_text(encoding="utf-8"))["llm_depth"] if path.is_file() else None


def _tokenizer(name: str) -> Any:
    """The tokenizer of an embedded model, a folder or a Hub id."""
    from transformers import AutoTokenizer

    from dualstream.modeling.auto import EMBEDDED_MODELS, default_model_path

    place = str(default_model_path(name)) if name in EMBEDDED_MODELS else name
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={name!r}: its tokenizer cannot be opened ({str(error).splitlines()[0]}); say with --model where "
            "the model of this run lies."
        ) from error
