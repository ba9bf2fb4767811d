"""The offline stage: a corpus and a teacher in, Arrow shards out. Never imported by the trainer."""
