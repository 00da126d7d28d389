"""Publishing on the Hub: everything of a model in one commit, and the budgets of a run as revisions of one repository."""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoint import DIGEST, stored_digest
from ..modeling_sdq import SDQForImageClassification
from ..packed_files import REMOTE_CODE
from .card import PICTURES, RunFacts, create_card, main_method, with_repo_id, with_tags
from .errors import HTTPError, reason_of

# What belongs to a model and is published; a later publication clears away those that it lacks.
_OWN_FILES = re.compile(
    r"config\.json|preprocessor_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|README\.md|"
    rf"{re.escape(REMOTE_CODE)}|plots/({'|'.join(PICTURES)})\.png"
)


class PublishError(RuntimeError):
    """A model was not published; the message says why, and where it is."""


def check_access(repo_id: str, token: str | bool | None = None) -> None:
    """Whether the Hub is there, knows the user, and `repo_id` is a name it takes; else `PublishError`. Writes nothing."""
    with _explained(repo_id, "before anything was done"):
        validate_repo_id(repo_id)
        HfApi(token=token).whoami()


def publish_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    card: str | ModelCard | None = None,
    kept: str | None = None,
) -> str:
    """Publish a folder that `save_pretrained` wrote, in one commit; gives the commit's address.

    The folder is loaded first, so that what is published can be loaded. The card is `card`, or the folder's README.md, or one
    that is written; its placeholder id is replaced by `repo_id`. The folder itself is not changed. A branch `revision` is
    made when it is missing. Files of an earlier publication that this one lacks are deleted in the same commit.

    Only the files of a model are published. `kept` is what an error says of where the model is.

    Raises `PublishError` when the Hub cannot be reached or refuses; `ValueError` when the folder holds no such model, or its
    card has metadata that is no YAML or was written for other weights.
    """
    folder = Path(folder)
    model = SDQForImageClassification.from_pretrained(folder)
    path = folder / "README.md"
    if card is not None:
        _check_card(str(card), folder)
    elif path.exists():
        card = path.read_text(encoding="utf-8")
        told = _check_card(card, folder).data.to_dict().get(DIGEST)
        if told not in (None, stored_digest(folder)):
            raise ValueError(
                f"{path} tells of other weights than those in its folder, saved later: remove it and plots/, and a "
                f"card without accuracy is written, or take its line {DIGEST!r} out if you have brought it up to date."
            )
    else:
        card = create_card(model, folder)
    files = [path for path in folder.rglob("*") if path.is_file() and _is_own(path.relative_to(folder).as_posix())]
    names = [path.relative_to(folder).as_posix() for path in files]
    with _explained(repo_id, kept or f"the model is in {folder}"):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main") and not str(revision).startswith("refs/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations: list[Any] = [
            CommitOperationAdd(name, path) for name, path in zip(names, files, strict=True) if name != "README.md"
        ]
        operations.append(CommitOperationAdd("README.md", with_repo_id(str(card), repo_id).encode()))
        # The Hub refuses the commit when another one was made since: files that are the same as there are not sent, so two
        # publications at the same time would be mixed up.
        try:
            parent = api.repo_info(repo_id, revision=revision).sha
        except RevisionNotFoundError as error:
            if not create_pr:
                raise
            raise PublishError(
                f"{repo_id} has no branch {revision!r} that a pull request could be for: publish there first, or leave "
                f"revision out ({kept or f'the model is in {folder}'})."
            ) from error
        there = api.list_repo_files(repo_id, revision=parent)
        stale = [name for name in there if name not in names and name != "README.md" and _is_own(name)]
        operations += [CommitOperationDelete(name) for name in stale]
        commit = api.create_commit(
            repo_id,
            operations,
            parent_commit=parent,
            commit_message=commit_message
            or f"Upload {model.config.architecture}, {model.strategy.average_bits():.2f} bits",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def publish_model(
    model: SDQForImageClassification,
    repo_id: str,
    *,
    card: str | ModelCard | None = None,
    license: str | None = None,
    tags: Sequence[str] | None = None,
    remote_code: bool = False,
    max_shard_size: int | str = "50GB",
    **options: Any,
) -> str:
    """Publish a model in memory: `SDQForImageClassification.push_to_hub`; `options` are those of `publish_folder`."""
    from .plots import plot_bits, plot_weights

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder, max_shard_size=max_shard_size, remote_code=remote_code, print_size=False)
        if card is None:
            plot_bits({"sdq": model.strategy}, folder / "plots" / "bits.png")
            if any(not layer.pinned for layer in model.strategy.values()):
                plot_weights(model, folder / "plots" / "weights.png")
            card = create_card(model, folder, license=license, tags=tags or ())
        elif license is not None or tags:
            card = _check_card(str(card), folder)
            card.data["tags"] = with_tags(card.data.get("tags") or (), tags or ())
            if license is not None:
                card.data["license"] = license
        kept = "the model is still in memory; save_pretrained keeps it"
        return publish_folder(folder, repo_id, card=card, kept=kept, **options)


def publish_run(folder: str | Path, repo_id: str, license: str | None = None, **options: Any) -> dict[str, str]:
    """Publish a finished run of `scripts/run_sdq.py`: each budget of its search on a branch, the first also on `main`.

    Cards are written with links to all of them. Gives revision -> address of its commit. Options and errors are those of
    `publish_folder`.
    """
    folder = Path(folder)
    results = json.loads((folder / "results.json").read_text())
    main = main_method(results["rows"])
    revisions = {row["name"]: revision_of(row) for row in results["rows"] if row["method"] == main}
    found: dict[str, str] = {}
    cards = {}
    for name, revision in [*revisions.items(), (next(iter(revisions)), None)]:
        path = folder / "models" / name
        model = SDQForImageClassification.from_pretrained(path)
        cards[path, revision] = create_card(
            model, path, RunFacts(results, name, revisions), license=license, revision=revision
        )
    for (path, revision), card in cards.items():
        before = f"published before that: {', '.join(found)}; " if found else ""
        kept = f"{before}the models are in {folder / 'models'}"
        found[revision or "main"] = publish_folder(path, repo_id, card=card, revision=revision, kept=kept, **options)
    return found


def revision_of(row: Mapping[str, Any]) -> str:
    """The branch for a row of a run.

    `w2.5` for 2.5 average bits, `bitops-w2` for the BitOPs of uniform 2 bits, `compression-12`, `lut-uniform3`.
    """
    budget = row["name"].rpartition("-")[2]
    prefix = {"bits": "w", "bitops": "bitops-w"}.get(row["cost"], f"{row['cost']}-")
    return prefix + budget


def _check_card(card: str, folder: Path) -> ModelCard:
    """The card; `ValueError` where its metadata cannot be read."""
    try:
        return ModelCard(card)
    except Exception as error:  # yaml has a dozen kinds of errors, huggingface_hub more
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / 'README.md'}: the metadata of the card cannot be read: {reason}") from error


def _is_own(name: str) -> bool:
    return _OWN_FILES.fullmatch(name) is not None


@contextmanager
def _explained(repo_id: str, kept: str) -> Iterator[None]:
    """Errors of the Hub's client as one line that says what to do."""
    try:
        yield
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is no name of a repository, such as org/name: {error}") from error
    except PublishError:
        raise
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError, RuntimeError) as error:
        raise PublishError(f"Cannot publish {repo_id}: {reason_of(error)} ({kept})") from error
