"""Publishing an artifact on the Hub: verified, with a card, in one commit, and looked at after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import msgspec

from edgellm import quality_gate
from edgellm.artifact import PART_SUFFIXES, Artifact, open_artifact, verify
from edgellm.errors import HubError, SourceError, UsageError, VerificationError
from edgellm.hub.card import model_card
from edgellm.hub.checksums import hub_digest
from edgellm.hub.ids import HubId
from edgellm.hub.translation import SIGN_IN, WRITE_TOKEN, publishing
from edgellm.made import CARD
from edgellm.manifest import MANIFEST, Digested, Manifest
from edgellm.source.matching import listed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Publication:
    """What will stand on the Hub: ``files`` by their names there, and the ``card`` beside them."""

    artifact: Artifact
    target: HubId
    files: dict[str, Path]
    card: str
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files, the card too."""
        return sum(file.stat().st_size for file in self.files.values()) + len(self.card.encode())


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What stands on the Hub now; ``replaced``: files of an earlier artifact that were removed."""

    url: str
    commit: str
    files: tuple[str, ...]
    nbytes: int
    replaced: tuple[str, ...] = ()


def prepare(
    path: Path, target: HubId, *, base_model: str | None = None, licence: str | None = None
) -> Publication:
    """What publishing the artifact at ``path`` would upload; every checksum is recomputed.

    ``base_model`` and ``licence`` as ``model_card`` takes them. Raises ``SourceError`` for what is
    no finished artifact, ``VerificationError`` for one that is damaged or that its own conversion
    rejected, ``UsageError`` for a target that is a file.
    """
    if target.file is not None:
        raise UsageError(f"an artifact goes into a repository, {target.repo}, and not into a file")
    artifact = open_artifact(path)
    if artifact.manifest is None:
        raise SourceError(
            f"{path} has no {MANIFEST}, so nothing says what it is and whether it is whole: "
            f"`edgellm convert {path} --out DIR` makes an artifact of it, or `hf upload` takes any "
            "folder as it is"
        )
    verify(artifact)
    if rejected := quality_gate.verdict(artifact.manifest.measured):
        raise VerificationError(
            f"{path} was rejected when it was made, and is not published: {rejected}"
        )
    made = artifact.manifest.artifact
    files = {entry.path: artifact.path / entry.path for entry in made.files}
    files[MANIFEST] = artifact.path / MANIFEST
    if CARD in files:  # as the first versions of edgellm had it
        card = files.pop(CARD).read_bytes().decode()
        note = (
            f"{CARD} goes as it is, because the manifest has its checksum: convert again for a card"
        )
        return Publication(artifact, target, files, card, (note,))
    card = model_card(artifact, target, base_model=base_model, licence=licence)
    return Publication(artifact, target, files, card, tuple(_lacks(made, card)))


def check_token() -> None:
    """Raise ``HubError`` where there is no token, without which nothing can be published."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"publishing takes {WRITE_TOKEN}: {SIGN_IN}")


def publish(
    publication: Publication,
    *,
    private: bool = False,
    bars: bool = False,
) -> Published:
    """Upload it in one commit, which makes the repository and the branch where they do not exist.

    ``private``: make the repository so, and stop where it exists and is public. ``bars``: let
    ``huggingface_hub`` draw its own on stderr. Files of an artifact that was there before are
    replaced. Afterwards the Hub is asked for its own hashes. Raises ``HubError`` with the next
    step, and ``UsageError`` where the repository is public or holds parts of others; what is there
    then is as it was.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_token()
    target = publication.target
    branch = target.revision or MAIN
    api = HfApi()
    with publishing(target), _bars(bars):
        api.create_repo(target.repo, private=True if private else None, exist_ok=True)
        if private and not api.model_info(target.repo).private:
            raise UsageError(
                f"--private was asked for, and {target.repo} exists and is public: choose another "
                f"name, or make it private at {target.url}/settings"
            )
        if branch != MAIN and not branch.startswith("refs/"):
            api.create_branch(target.repo, branch=branch, exist_ok=True)
        replaced = _replaced(api, publication, branch)
        commit = api.create_commit(
            target.repo,
            operations=[
                *(CommitOperationDelete(name) for name in replaced),
                *(CommitOperationAdd(name, file) for name, file in publication.files.items()),
                CommitOperationAdd(CARD, publication.card.encode()),
            ],
            commit_message=f"{_title(publication)}, by edgellm",
            revision=branch,
        )
        _check_arrival(api, publication, commit.oid)
    return Published(
        url=f"{api.endpoint}/{target.repo}" + ("" if branch == MAIN else f"/tree/{branch}"),
        commit=commit.oid,
        files=(*publication.files, CARD),
        nbytes=publication.nbytes,
        replaced=tuple(replaced),
    )


def _title(publication: Publication) -> str:
    assert publication.artifact.manifest is not None
    made = publication.artifact.manifest.artifact
    return " ".join(filter(None, (made.base.name, made.container, made.recipe.get("quant"))))


def _lacks(made: Digested, card: str) -> Iterator[str]:
    """What a reader of the card will miss."""
    if "\nlicense:" not in card:
        yield "no licence is known of the source, so the card has none: --license ID states it"
    if "\nbase_model:" not in card:
        yield (
            f"no Hub id is known of the source ({made.base.name}), so the card links to no base: "
            "--base-model org/name does"
        )


def _replaced(api: HfApi, publication: Publication, branch: str) -> list[str]:
    """Files on the branch that would be taken for parts of the artifact, and are not.

    Those that the manifest there names belonged to an artifact before. Raises ``UsageError`` for
    others: the artifact would not verify among them, and they are not ours to delete.
    """
    target = publication.target
    there = set(api.list_repo_files(target.repo, revision=branch))
    strange = {name for name in there if "/" not in name and name.endswith(PART_SUFFIXES)}
    strange -= publication.files.keys()
    if not strange:
        return []
    before: set[str] = set()
    if MANIFEST in there:
        with TemporaryDirectory() as folder:  # not the cache, which is for models
            earlier = api.hf_hub_download(target.repo, MANIFEST, revision=branch, local_dir=folder)
            with suppress(msgspec.DecodeError):  # another program's
                manifest = msgspec.json.decode(Path(earlier).read_bytes(), type=Manifest)
                before = {entry.path for entry in manifest.artifact.files}
    if others := sorted(strange - before):
        raise UsageError(
            f"{target.repo} holds files at {branch} that no artifact of edgellm put there and that "
            f"would be taken for parts of this one ({listed(others)}): choose another repository, "
            "a branch of its own (--revision), or delete them there"
        )
    return sorted(strange)


def _check_arrival(api: HfApi, publication: Publication, commit: str) -> None:
    """Compare what the Hub says it has with what was made; raises ``HubError``."""
    assert publication.artifact.manifest is not None
    made = {entry.path: entry.sha256 for entry in publication.artifact.manifest.artifact.files}
    info = api.model_info(publication.target.repo, revision=commit, files_metadata=True)
    there = {file.rfilename: file for file in info.siblings or []}
    wrong = []
    for name, file in publication.files.items():
        found = there.get(name)
        digest = "" if found is None else (found.lfs.sha256 if found.lfs else found.blob_id) or ""
        # A large file is not read once more: its SHA-256 stands in the manifest.
        if digest != made.get(name) and (not digest or hub_digest(file, digest) != digest):
            wrong.append(name)
    if wrong:
        raise HubError(
            f"{listed(wrong)} of {publication.target.repo} at {commit} is not what was sent: run "
            "the same command again"
        )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """The library's own bars only where they are wanted; they may be off already."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
