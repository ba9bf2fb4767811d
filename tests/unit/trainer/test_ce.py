"""Cross-entropy wired to the cache."""

import slow_losses as slow
from slow_documents import alone, assert_term, ready, terms_of


def test_cross_entropy_is_that_of_the_models_own_logits() -> None:
    made, batch = ready("ce")

    found = terms_of(made.distiller, batch)["ce.ce"]

    rows = [(d.logits[p].tolist(), d.ids[p + 1]) for d in alone(made) for p in d.predict]
    total, count = slow.cross_entropy([z for z, _ in rows], [y for _, y in rows], [True] * len(rows))
    assert_term(found, total, count)
