"""Which parsers there are.

To add a parser, write a class with `parse`, `identity` and `notes` in a module of its own and add
one line to PARSERS. The parsing libraries are imported when a parser is made, not before.
"""

from collections.abc import Callable, Mapping

from xkd_pipeline.parsing.parser import Parser
from xkd_schemas.config import DocumentsSection
from xkd_schemas.errors import UsageError


def _spacy(settings: DocumentsSection) -> Parser:
    from xkd_pipeline.parsing.spacy_parser import SpacyParser

    return SpacyParser(settings)


def _benepar(settings: DocumentsSection) -> Parser:
    from xkd_pipeline.parsing.benepar_parser import BeneparParser

    return BeneparParser(settings)


PARSERS: Mapping[str, Callable[[DocumentsSection], Parser]] = {"spacy": _spacy, "benepar": _benepar}


def check_parser(name: str) -> None:
    """Raise UsageError where there is no such parser."""
    if name not in PARSERS:
        raise UsageError(f"--parser: '{name}' is not a parser", fix=f"use {' or '.join(PARSERS)}")


def parser_for(settings: DocumentsSection) -> Parser:
    """Load the parser of these settings; InputMissing, UsageError, BadData or Refused says why it cannot be."""
    check_parser(settings.parser)
    return PARSERS[settings.parser](settings)
