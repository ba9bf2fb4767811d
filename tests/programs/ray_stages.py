"""The real stages, slow, for ray_kills.py; workers of Ray can import them."""

from fake_stage import slow_writes
from xkd_pipeline.alignment import AlignStage
from xkd_pipeline.capture.stage import TeacherStage
from xkd_pipeline.parsing.stage import DocumentsStage
from xkd_pipeline.workers.contract import Make


class SlowDocuments(DocumentsStage):
    def load(self) -> Make:
        slow_writes()
        return super().load()


class SlowTeacher(TeacherStage):
    def load(self) -> Make:
        slow_writes()
        return super().load()


class SlowAlign(AlignStage):
    def load(self) -> Make:
        slow_writes()
        return super().load()
