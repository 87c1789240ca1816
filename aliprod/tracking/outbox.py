"""What is to be sent to MLflow, and the one thread that sends it.

Putting returns at once, whatever MLflow does. While it is away the head of the queue is tried again and again,
so that order is kept; what it refuses is put aside with a sentence. Nothing hangs on the queue surviving: what
it holds is in the storage path too, and `Tracking.job_finished` sends from there.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from aliprod.tracking.server import is_away, sentence

LIMIT = 10_000  # things waiting, of about 1 KB each
TRIES = 3  # of one thing, by a server that answers other calls
SLOWEST_SECONDS = 30.0  # between two tries while MLflow is away


@dataclass(frozen=True)
class Item:
    label: str  # what a person reads when it could not be sent
    send: Callable[[], None]  # may be called again after it raised
    only_latest: bool  # takes the place of one with this label that still waits


class Outbox:
    """A bounded queue with a sender thread.

    Args:
        probe: a cheap call that raises while MLflow is away.
        say: prints one line.
    """

    def __init__(self, probe: Callable[[], None], say: Callable[[str], None]) -> None:
        self._probe, self._say = probe, say
        self._waiting: deque[Item] = deque()
        self._refused: list[str] = []
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        self._away = False
        threading.Thread(target=self._work, name="mlflow-sender", daemon=True).start()

    def put(self, label: str, send: Callable[[], None], *, only_latest: bool = False, spare: bool = False) -> None:
        """Queue one thing.

        Args:
            only_latest: drop what waits under the same label.
            spare: may be left out when the queue is full, because something later sends it too.
        """
        with self._changed:
            if only_latest:
                self._waiting = deque(item for item in self._waiting if item.label != label or not item.only_latest)
            if spare and len(self._waiting) >= LIMIT:
                return
            self._waiting.append(Item(label, send, only_latest))
            self._changed.notify_all()

    def flush(self, seconds: float) -> list[str]:
        """Wait until all is sent, at most this long; what was refused or still waits, each once."""
        self._hurry.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout=seconds)
            left = [f"{item.label}: MLflow is away" for item in self._waiting]
            unsent = list(dict.fromkeys(self._refused + left))
        self._hurry.clear()
        return unsent

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                item = self._waiting[0]  # stays at the head until sent: flush must see it
            refusal = self._deliver(item)
            with self._changed:
                if refusal:
                    self._refused.append(refusal)
                if self._waiting and self._waiting[0] is item:  # a newer one may have taken its place
                    self._waiting.popleft()
                self._changed.notify_all()

    def _deliver(self, item: Item) -> str:
        """Send, however long it takes; the sentence of a refusal, or ''."""
        tries, pause = 0, 0.5
        while True:
            try:
                item.send()
            except Exception as error:  # noqa: BLE001 - the thread's door: one thing must not keep back the others
                if self._reachable():
                    tries += 1
                    if tries == TRIES or not is_away(error):
                        return self._refusal(item, error)
                self._wait(pause)
                pause = min(2 * pause, SLOWEST_SECONDS)
            else:
                self._back()
                return ""

    def _reachable(self) -> bool:
        try:
            self._probe()
        except Exception as error:  # noqa: BLE001 - the same door
            if not self._away:
                self._say(f"MLflow is away ({sentence(error)}); training goes on, what it lacks is sent later.")
            self._away = True
            return False
        self._back()
        return True

    def _back(self) -> None:
        if self._away:
            self._say("MLflow is back; sending what it lacks.")
        self._away = False

    def _refusal(self, item: Item, error: Exception) -> str:
        refusal = f"{item.label}: {sentence(error)}"
        self._say(f"MLflow refused {refusal}")
        return refusal

    def _wait(self, pause: float) -> None:
        if self._hurry.wait(pause):  # somebody waits for the end
            time.sleep(0.25)
