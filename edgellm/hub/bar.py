"""What ``huggingface_hub`` shows as bars, told to our own ``Progress``."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from edgellm.progress import Progress, ProgressEvent


def bar_for(repo: str, total_bytes: int, progress: Progress) -> Any:
    """A class that ``huggingface_hub`` drives like tqdm, reporting to ``progress``."""
    furthest = 0

    class DownloadBar:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.n = options.get("initial") or 0
            self.total = options.get("total")
            self.counts_bytes = options.get("unit") == "B"
            self.format_dict: dict[str, Any] = {}

        def update(self, n: float | None = 1) -> None:
            # One bar counts what the network brings, another what the disk holds: the further one
            # is shown.
            nonlocal furthest
            self.n += int(n or 0)
            if self.counts_bytes and self.n > furthest:
                furthest = self.n
                progress(ProgressEvent("download", repo, furthest, max(total_bytes, furthest)))

        def __enter__(self) -> DownloadBar:
            return self

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            """Nothing to close."""

        def _ignore(self, *args: Any, **options: Any) -> None:
            """A bar is drawn by whoever watches ``progress``."""

        close = refresh = set_description = set_description_str = set_postfix_str = _ignore

    return DownloadBar
