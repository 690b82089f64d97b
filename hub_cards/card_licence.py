"""Which licence a card states: it is asked for, or read off the card of the base; it is never guessed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .card_subject import MODEL, POINTER, Subject
from .release_files import CARD

FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """What the card says.

    Attributes:
        fields: ``license``, and ``license_name`` and ``license_link`` where the Hub has no short name for it.
        base: the same of the base, empty if there is no base or its licence is not known.
    """

    fields: dict[str, Any]
    base: dict[str, str]


def settle_licence(subject: Subject, given: str | None, name: str | None = None, link: str | None = None) -> Licence:
    """Find the licence of a model.

    A whole model has the licence of its base. A decoder or adapter may have one of its own.

    Args:
        subject: whose card is made.
        given: identifier of the Hub.
        name: with ``other``, how the licence is called.
        link: with ``other``, where it stands.

    Raises:
        ValueError: none is given and that of the base is not known; the given one contradicts that of the base of a
            whole model; ``other`` without a name and a link.
    """
    base = {} if subject.base is None else base_licence(subject.base)
    stated = {key: value for key, value in zip(FIELDS, (given, name, link), strict=True) if value}
    old = {key: str(subject.old_card[key]) for key in FIELDS if subject.old_card.get(key)}
    fields = stated or base or old
    if not fields.get("license"):
        whose = f"of the base model {subject.base}" if subject.base else f"of {subject.name}"
        raise ValueError(f"the licence {whose} is not known here; name it by --license, e.g. --license apache-2.0.")
    if fields["license"] == "other" and not (fields.get("license_name") and fields.get("license_link")):
        raise ValueError("--license other needs --license-name and --license-link.")
    whole = subject.kind in (MODEL, POINTER)
    if whole and base and any(base.get(key) != fields.get(key) for key in FIELDS[:2]):
        raise ValueError(
            f"--license {fields['license']} contradicts that of the base model {subject.base}, {_shown(base)}; a "
            "model with its weights has its licence."
        )
    return Licence(fields, base)


def base_licence(base: str) -> dict[str, str]:
    """The licence on the card of a base (embedded model, folder, Hub repository); empty if it is not known."""
    from dualstream.modeling import EMBEDDED_MODELS, default_model_path

    folder = default_model_path(base) if base in EMBEDDED_MODELS else Path(base)
    data = _local(folder / CARD) if folder.is_dir() else _remote(base)
    return {key: str(data[key]) for key in FIELDS if data.get(key)}


def licence_text(subject: Subject, licence: Licence) -> str:
    """The card's paragraph."""
    own = f"{'These files' if subject.kind not in (MODEL, POINTER) else 'This model'}: {_shown(licence.fields)}."
    if subject.base is None:
        return own
    base = f" The base model `{subject.base}`: "
    return own + base + (f"{_shown(licence.base)}." if licence.base else "see its own card.")


def _shown(fields: dict[str, str]) -> str:
    name = fields.get("license_name") or fields["license"]
    return f"[{name}]({fields['license_link']})" if fields.get("license_link") else f"`{name}`"


def _local(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    from huggingface_hub import RepoCard

    return RepoCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()


def _remote(base: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    try:
        return _local(Path(hf_hub_download(base, CARD)))
    except Exception:  # no network, no such repository, no card, no licence to see: all mean that it is not known
        return {}
