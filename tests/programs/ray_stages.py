"""Stages for tests of Ray, which workers can import: real ones that are slow or die, and one that says where it is."""

import os
import sys
import time
from typing import Any

import xkd_pipeline
from fake_stage import SECONDS, FakeStage, slow_writes
from xkd_pipeline.alignment import AlignStage
from xkd_pipeline.capture import stage as teacher
from xkd_pipeline.capture.stage import TeacherStage
from xkd_pipeline.parsing import stage as documents
from xkd_pipeline.parsing.stage import DocumentsStage
from xkd_pipeline.workers.contract import AS_PLANNED, Make
from xkd_schemas.cache.manifest import Commit, MadeDifferently

POISON = "2. What does the code print?"
"""The prompt of one document of small_cache."""


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


class PoisonedDocuments(DocumentsStage):
    """Its parser dies of one document."""

    def load(self) -> Make:
        parser_for = documents.parser_for

        def deadly(settings: Any) -> Any:
            parser = parser_for(settings)
            parse = parser.parse
            parser.parse = lambda docs: os._exit(9) if any(POISON in d.text for d in docs) else parse(docs)
            return parser

        documents.parser_for = deadly
        return super().load()


class PoisonedTeacher(TeacherStage):
    """Its tokenizer dies of one document."""

    def load(self) -> Make:
        encoder_of = teacher.encoder_of

        class Deadly:
            def __init__(self, encoder: Any) -> None:
                self._encoder = encoder

            def encode_batch(self, block: Any, limits: Any = None) -> Any:
                if any(POISON in text for text in block.texts):
                    os._exit(9)
                return self._encoder.encode_batch(block, limits)

        teacher.encoder_of = lambda settings: Deadly(encoder_of(settings))
        return super().load()


class Telling(FakeStage):
    """Puts into the record which GPUs a worker was given and where our code came from, as names of counts."""

    def make(self, unit: int, care: MadeDifferently = AS_PLANNED) -> Commit:
        time.sleep(SECONDS)
        commit = super().make(unit, care)
        told = {f"gpu {os.environ.get('CUDA_VISIBLE_DEVICES')}": 1, f"code {xkd_pipeline.__file__}": 1}
        return commit.model_copy(update={"counts": told})


class Importing(FakeStage):
    """Puts into the record where a module of the standard library came from, and the path it was looked for in."""

    def load(self) -> Make:
        import colorsys

        told = {f"module {colorsys.__file__}": 1, **dict.fromkeys((f"path {entry}" for entry in sys.path), 1)}
        return lambda unit, care=AS_PLANNED: self.make(unit, care).model_copy(update={"counts": told})
