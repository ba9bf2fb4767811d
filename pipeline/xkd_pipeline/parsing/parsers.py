"""What the pipeline asks of a parser, its settings, and which parsers there are.

To add a parser, write a class with `parse`, `identity` and `notes` in a module of its own and add
one line to PARSERS. The parsing libraries are imported when a parser is made, not before.
"""

from collections.abc import Callable, Mapping

from xkd_pipeline.parsing.parser import Parser, ParserSettings
from xkd_schemas.errors import UsageError


def _spacy(settings: ParserSettings) -> Parser:
    from xkd_pipeline.parsing.spacy_parser import SpacyParser

    return SpacyParser(settings)


def _benepar(settings: ParserSettings) -> Parser:
    from xkd_pipeline.parsing.benepar_parser import BeneparParser

    return BeneparParser(settings)


PARSERS: Mapping[str, Callable[[ParserSettings], Parser]] = {"spacy": _spacy, "benepar": _benepar}


def parser_for(settings: ParserSettings) -> Parser:
    """Load the parser of these settings.

    Raises:
        InputMissing: the pipeline or model is not installed or not there.
        UsageError: the pipeline cannot do what is asked of it.
        BadData, Refused: the model's files are broken, or would run code.
    """
    try:
        make = PARSERS[settings.kind]
    except KeyError:
        raise UsageError(f"parser '{settings.kind}' is not known", fix=f"use {' or '.join(PARSERS)}") from None
    return make(settings)
