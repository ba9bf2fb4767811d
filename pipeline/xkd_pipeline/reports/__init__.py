"""What is said before and after: `plan`, `pair`, `show`, `report`.

May import: maintain, stages and below.
Lost without it: planning and pages; caches are made all the same.
"""
