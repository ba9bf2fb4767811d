"""Any order of starts, deaths, damages and repairs ends, after one more run, with the undisturbed bytes."""

import functools
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import faulty_disk
from damages import ROUNDS, flipped, outcome, targets
from fake_stage import run
from small_cache import files_of
from xkd_pipeline.maintain.gc import collect
from xkd_pipeline.maintain.repair import repair
from xkd_pipeline.maintain.verify import verify
from xkd_pipeline.workers.contract import Workers
from xkd_schemas.errors import BadData, DiskFailed


def work(root: Path) -> None:
    run(root, units=3)


def refusal(root: Path) -> str:
    """What a run says that cannot go on with what it finds, or ""."""
    try:
        work(root)
    except BadData as error:
        return error.what
    return ""


@functools.cache
def undisturbed() -> tuple[dict[str, bytes], int]:
    """The files of a run that nobody disturbs, and its number of operations."""
    with tempfile.TemporaryDirectory() as folder:
        with faulty_disk.injected("*:0:count") as fault:
            work(Path(folder) / "cache")
        return files_of(Path(folder) / "cache"), fault.seen


class CacheMachine(RuleBasedStateMachine):
    """One cache folder; `damaged` says whether a file was changed since the last run to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="xkd-machine-"))
        self.root = self.folder / "cache"
        self.finished = self.damaged = False

    def teardown(self) -> None:
        self.resume()
        shutil.rmtree(self.folder)

    @rule(share=st.floats(0, 1), action=st.sampled_from(["kill", "cut"]), seed=st.sampled_from(["", "1", "2"]))
    def start_and_die(self, share: float, action: str, seed: str) -> None:
        with faulty_disk.injected(f"*:{1 + int(share * undisturbed()[1])}:{action}", seed):
            code = faulty_disk.exit_code_of(lambda: work(self.root))
        assert code in (0, -9) or (code == 65 and self.damaged)
        self.finished = self.finished and not self.damaged

    @rule(share=st.floats(0, 1), name=st.sampled_from(["ENOSPC", "EIO"]))
    def start_on_a_failing_disk(self, share: float, name: str) -> None:
        with faulty_disk.injected(f"*:{1 + int(share * undisturbed()[1])}:{name}"):
            try:
                work(self.root)
            except DiskFailed:
                pass
            except BadData:
                assert self.damaged
        self.finished = self.finished and not self.damaged

    @precondition(lambda self: self.root.exists() and targets(self.root))
    @rule(which=st.integers(0, 99), share=st.floats(0, 0.999), how=st.sampled_from(["flip", "cut", "remove", "swap"]))
    def damage(self, which: int, share: float, how: str) -> None:
        files = targets(self.root)
        path = files[which % len(files)]
        content = path.read_bytes()
        if how == "flip" and content:
            path.write_bytes(flipped(content, int(share * 8 * len(content))))
        elif how == "cut" and content:
            path.write_bytes(content[: int(share * len(content))])
        elif how == "remove":
            path.unlink()
        elif how == "swap":
            other = files[int(share * len(files))]
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        self.damaged = True

    @rule()
    def resume(self) -> None:
        if said := refusal(self.root):
            assert self.damaged
            assert "plan.json" in said
            shutil.rmtree(self.root)  # what the message says to do
            work(self.root)
        self.finished, self.damaged = True, False
        assert files_of(self.root) == undisturbed()[0]

    @precondition(lambda self: (self.root / "documents").is_dir())
    @rule(level=st.sampled_from(["quick", "full"]))
    def look(self, level: str) -> None:
        said = outcome(lambda: verify(self.root, level))
        if self.finished and not self.damaged:
            assert said == "silent"
        if files_of(self.root) != undisturbed()[0] and level == "full":
            assert said == "found"
        assert said in ("found", "silent")

    @precondition(lambda self: (self.root / "documents").is_dir())
    @rule()
    def repair_and_collect(self) -> None:
        before = files_of(self.root)
        for job in (lambda: repair(self.root, Workers()), lambda: collect(self.root, older_than=0, dry_run=False)):
            assert not outcome(job).startswith("crash")
        if self.finished and not self.damaged:
            assert files_of(self.root) == before == undisturbed()[0]

    @invariant()
    def nothing_is_left_outside(self) -> None:
        assert {path.name for path in self.folder.iterdir()} <= {"cache"}


@pytest.mark.filterwarnings("default")
class TestCache(CacheMachine.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(
        max_examples=ROUNDS, stateful_step_count=14, deadline=None, derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
