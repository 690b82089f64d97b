"""What is added when all shards of a corpus are there: rejects, manifest, figures and the dataset card."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import yaml

from .atomic import atomic_file, read_json, write_json
from .depths import config_name
from .images import image_hash
from .schema import COLUMNS, features, token_map_of_row
from .survey import survey

if TYPE_CHECKING:
    from .reading import MapReader
    from .shards import CorpusFolder
    from .sources import ImageSource

PACKAGES = ("dualstream", "torch", "transformers", "datasets", "pyarrow")
EVERYTHING = "all"
TEMPLATE = Path(__file__).with_name("card.md")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
PICTURE_SIDE = 1000


@dataclass(frozen=True)
class CardFields:
    """What only a person can say.

    Attributes:
        license: licence of the images, as the Hub abbreviates it; default what the source knows.
        provenance: where the images come from, a sentence.
        title: heading of the card.
    """

    license: str | None = None
    provenance: str | None = None
    title: str | None = None


def is_finalized(corpus: CorpusFolder) -> bool:
    """Whether the manifest and card of this very corpus are there."""
    manifest = read_json(corpus.path / "manifest.json")
    return manifest is not None and manifest["configuration_sha256"] == corpus.digest


def finalize(corpus: CorpusFolder, source: ImageSource, reader: MapReader, fields: CardFields | None = None) -> dict:
    """Check every file of a corpus and write `rejects.jsonl`, `figures/`, `README.md` and `manifest.json`.

    Every file is written atomically and depends on the corpus alone, so that two processes may do it at once.

    Args:
        corpus: the corpus; all shards must be finished.
        source: its pictures, of which one is drawn.
        reader: what read them.
        fields: what to say of licence and provenance.

    Returns:
        The manifest.

    Raises:
        ValueError: if a shard is missing or damaged, no picture could be read, or the source has changed.
    """
    missing = corpus.missing()
    if missing is None or missing:
        left = "an unknown number of" if missing is None else f"{len(missing)} of {corpus.num_shards}"
        raise ValueError(f"{corpus.path} is not finished: {left} shards are missing; run every share of the build.")
    rejects, shards = [], []
    for record in corpus.records(deep=True):
        rejects += record["rejects"]
        shards.append({key: value for key, value in record.items() if key not in ("rejects", "configuration_sha256")})
    images = sum(shard["images"] for shard in shards)
    if images == 0:
        raise ValueError(f"none of the {len(rejects)} pictures of {source.name} could be read: {rejects[:1]}")
    manifest = {
        "configuration_sha256": corpus.digest,
        "configuration": corpus.configuration,
        "versions": {package: version(package) for package in PACKAGES},
        "images": images,
        "rows": images * len(corpus.depths),
        "rejected": len(rejects),
        "figures": survey(corpus, reader.vocabulary),
        "shards": shards,
    }
    with atomic_file(corpus.path / "rejects.jsonl") as file:
        file.writelines((json.dumps(reject, ensure_ascii=False) + "\n").encode() for reject in rejects)
    pictures = _draw(corpus, source, reader)
    with atomic_file(corpus.path / "README.md") as file:
        file.write(card(corpus, source, manifest, pictures, fields or CardFields()).encode())
    write_json(corpus.path / "manifest.json", manifest)  # last: it says that the rest is there
    return manifest


def card(
    corpus: CorpusFolder, source: ImageSource, manifest: dict[str, Any], pictures: dict[str, str], fields: CardFields
) -> str:
    """Return the dataset card, with the viewer's configurations in its header.

    Args:
        corpus: the corpus.
        source: where the pictures come from.
        manifest: see ``finalize``.
        pictures: part -> file of its picture, relative to the corpus.
        fields: licence and provenance.
    """
    configuration, figures = manifest["configuration"], manifest["figures"]
    license_id = fields.license or source.license
    title = fields.title or f"Token maps: {source.name} read by {configuration['model']}"
    rejected = manifest["rejected"]
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=title,
        images=f"{manifest['images']:,}",
        model=configuration["model"],
        pictures="\n\n".join(f"![{part}: the word of every token]({file})" for part, file in pictures.items()),
        folder=corpus.path.name,
        split=corpus.split,
        first_config=next(iter(figures)),
        deepest=f"`{list(figures)[-1]}`",
        configs=_figure_table(figures),
        words="\n".join(f"- `{part}`: {_word_list(values['words'])}" for part, values in figures.items()),
        columns="\n".join(["| column | meaning |", "|---|---|", *_column_rows()]),
        probabilities=_probability_note(configuration),
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(manifest).items()),
        rejects=f"{rejected:,} images could not be read; `rejects.jsonl` says why."
        if rejected
        else "No image failed.",
        provenance=fields.provenance or _provenance(configuration["source"]),
        license=license_id,
        limits=_limits(configuration),
    )
    header = yaml.safe_dump(_header(corpus, manifest, license_id, title), sort_keys=False, allow_unicode=True)
    return f"---\n{header}---\n\n{text}"


def _header(corpus: CorpusFolder, manifest: dict[str, Any], license_id: str, title: str) -> dict[str, Any]:
    """The card's YAML: one configuration per depth, and one of all rows, which is the default."""
    folders = {config_name(depth): config_name(depth) for depth in corpus.depths}
    if len(folders) > 1:
        folders = {EVERYTHING: "*", **folders}
    configs: list[dict[str, Any]] = [
        {
            "config_name": name,
            "data_files": [{"split": corpus.split, "path": f"data/{folder}/{corpus.split}-*.parquet"}],
        }
        for name, folder in folders.items()
    ]
    configs[0]["default"] = True
    top_k = corpus.configuration["top_k"]
    return {
        "pretty_name": title,
        "license": license_id,
        "tags": ["token-maps", "interpretability", "vision-language-model", "dualstream"],
        "size_categories": [next((name for limit, name in SIZES if manifest["rows"] < limit), "1M<n<10M")],
        "configs": configs,
        "dataset_info": [{"config_name": name, "features": features(top_k)._to_yaml_list()} for name in folders],
    }


def _draw(corpus: CorpusFolder, source: ImageSource, reader: MapReader) -> dict[str, str]:
    """Draw the first picture's map at every depth; returns part -> file."""
    rows = {config_name(depth): _first_row(corpus, index) for index, depth in enumerate(corpus.depths)}
    first = next(iter(rows.values()))
    image = next(source.items(first["index"])).load()
    if image_hash(image) != first["image_hash"]:
        raise ValueError(f"image {first['source_id']} of {source.name} is not the one that was read; was it replaced?")
    files = {}
    for part, row in rows.items():
        title = f"{row['model']}: {row['source_id']} read at {part}"
        drawing = token_map_of_row(row, image, reader.processor.tokenizer).to_image(PICTURE_SIDE, title)
        png = io.BytesIO()
        drawing.save(png, "png")
        files[part] = f"figures/{part}.png"
        with atomic_file(corpus.path / files[part]) as file:
            file.write(png.getvalue())
    return files


def _first_row(corpus: CorpusFolder, depth_number: int) -> dict[str, Any]:
    """The first row of a depth."""

    def rows() -> Iterator[dict[str, Any]]:
        for shard in range(corpus.num_shards or 0):
            for batch in pq.ParquetFile(corpus.file(shard, corpus.depths[depth_number])).iter_batches(1):
                yield from batch.to_pylist()

    return next(rows())


def _figure_table(figures: dict[str, Any]) -> str:
    lines = [
        "| part | images | tokens per image | left when merged | meaningless | probability | agrees |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, values in figures.items():
        shares = [_percent(values[name]) for name in ("runs", "meaningless", "probability", "agreement")]
        count, tokens = values["tokens"]["n"], values["tokens"]["mean"]
        lines.append(f"| `{part}` | {count:,} | {tokens:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _percent(figure: dict[str, Any]) -> str:
    low, high = figure["interval"]
    return f"{100 * figure['mean']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _word_list(words: dict[str, float]) -> str:
    return ", ".join(f"`{word.replace('`', '´')}` {100 * share:.1f} %" for word, share in words.items())


def _column_rows() -> list[str]:
    return [f"| `{name}` | {meaning} |" for name, meaning in COLUMNS.items()]


def _probability_note(configuration: dict[str, Any]) -> str:
    if configuration["decoder_kind"] == "pruned" and None in configuration["depths"]:
        return "at the connector over the classes of the pruned visual decoder, elsewhere over the whole vocabulary."
    return "over the whole vocabulary, at every depth."


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    configuration = manifest["configuration"]
    source = configuration["source"]
    return {
        "source": f"`{source['name']}` ({source['kind']}), split `{configuration['split']}`",
        "images, rows": f"{manifest['images']:,}, {manifest['rows']:,}",
        "model": f"`{configuration['model']}`, revision `{configuration['model_revision']}`",
        "read at the connector by": f"{configuration['decoder_kind']} `{configuration['decoder_hash'][:16]}`",
        "final norm inside the language model": "applied" if configuration["final_norm"] else "not applied",
        "readings per token": str(configuration["top_k"]),
        "precision": f"`{configuration['dtype']}`; log-probabilities in float32",
        "batches": f"{configuration['batch_size']} images of equal grids",
        "shards": f"{len(manifest['shards'])} of {configuration['rows_per_shard']} images",
        "versions": ", ".join(f"{name} {number}" for name, number in manifest["versions"].items()),
    }


def _provenance(source: dict[str, Any]) -> str:
    if source["kind"] == "scenes":
        return "synthetic scenes drawn by dualstream, no photographs."
    return f"the {source['kind']} `{source['name']}`; whoever made this corpus stated no more."


def _limits(configuration: dict[str, Any]) -> str:
    limits = []
    if configuration["source"]["kind"] == "scenes":
        limits.append("- The pictures are synthetic. What a model reads in them says little about photographs.")
    if configuration["decoder_kind"] == "unembedding" and None in configuration["depths"]:
        limits.append(
            "- At the connector the tokens are read with the language model's output matrix, which was not made for\n"
            "  states before the language model: a rough reader unless the model was trained to be read so."
        )
    return "\n".join(limits)
