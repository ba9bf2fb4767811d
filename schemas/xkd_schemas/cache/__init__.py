"""Manifests, and a sealed table read with every byte checked.

May import: codecs and what stands below them.
Lost without it: reading and writing caches.
"""
